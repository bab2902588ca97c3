# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM shows of itself to people (Linux: the kvm directory of debugfs, and what a debugger asks).

Any thread may call these while vCPUs run; nothing here changes what a guest or a client can see.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kvmfs.abi.exits import KVM_MP_STATE_HALTED
from kvmfs.errors import KvmError
from kvmfs.kvm import mmu, regs, stats

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm

T = TypeVar("T")

MAX_READ: Final = 16384             # bytes of memory in one answer
_REST_PATIENCE: Final = 2.0         # seconds for a vCPU to leave its guest
_REST_POLL: Final = 0.005
_CODE: Final = 64                   # bytes from rip on


def vcpu_state(vcpu: Vcpu) -> str:
    """One word: "guest" (in KVM_RUN), "halted" (in KVM_RUN, its CPU stands still), "ioctl", or "client" (nobody is in it)."""
    if vcpu.request is not None or vcpu.mutex.running():
        halted = vcpu.arch.stat.blocking or vcpu.arch.mp_state == KVM_MP_STATE_HALTED
        return "halted" if halted else "guest"
    return "ioctl" if vcpu.mutex.locked() else "client"


def describe(vm: Vm) -> dict[str, Any]:
    """The VM's memory slots and vCPUs."""
    return {
        "slots": [{"slot": slot.id, "gpa": slot.gpa, "size": slot.size, "hva": slot.hva, "flags": slot.flags}
                  for slot in list(vm.memslots)],
        "vcpus": [{"id": vcpu.vcpu_id, "state": vcpu_state(vcpu)} for vcpu in list(vm.vcpus)],
    }


def statistics(vm: Vm) -> dict[str, Any]:
    """``vcpus``: each one's statistics under Linux's names (numbers, lists of numbers for histograms), its times, and its exits
    by reason (SVM's codes; ``vendor`` says how Linux calls them here); ``translation``; ``memory``, bytes of its slots."""
    return {"vendor": vm.vendor.name, "translation": stats.translation(vm), "memory": sum(slot.size for slot in list(vm.memslots)),
            "vcpus": [{"id": vcpu.vcpu_id, **stats.values(vcpu), **stats.times(vcpu), "wrmsr_exits": vcpu.arch.stat.wrmsr_exits,
                       "reasons": {str(code): count for code, count in stats.exit_reasons(vcpu).items()}}
                      for vcpu in list(vm.vcpus)]}


def at_rest(vcpu: Vcpu, action: Callable[[], T]) -> T:
    """Do ``action`` while the vCPU is not in its guest; it is made to leave it for a moment.

    Raises KvmError(EBUSY) when it does not.
    """
    done = threading.Event()
    outcome: list[T] = []

    def work(_: Vcpu) -> None:
        if not done.is_set():
            outcome.append(action())
            done.set()

    asked = False
    for _ in range(int(_REST_PATIENCE / _REST_POLL)):
        if vcpu.mutex.acquire(blocking=False):
            try:
                work(vcpu)
            finally:
                vcpu.mutex.release()
        elif vcpu_state(vcpu) == "halted":
            work(vcpu)              # its thread waits, and comes back to the guest only through its own requests
        elif not asked:
            asked = True
            vcpu.request_work(work)
            vcpu.kick()
        if done.wait(_REST_POLL):
            return outcome[0]
    done.set()
    raise KvmError(errno.EBUSY)


def registers(vcpu: Vcpu) -> dict[str, Any]:
    """struct kvm_regs and kvm_sregs as hexadecimal digits, and the code at rip."""
    def look() -> dict[str, Any]:
        linear = regs.linear_rip(vcpu)
        return {"regs": regs.get_regs(vcpu).hex(), "sregs": regs.get_sregs(vcpu).hex(), "linear_rip": linear,
                "bits": code_bits(vcpu), "code": mmu.read_virtual(vcpu, linear, _CODE).hex(), "mp_state": vcpu.arch.mp_state}

    return at_rest(vcpu, look)


def code_bits(vcpu: Vcpu) -> int:
    """16, 32 or 64: what the code segment makes of instructions."""
    if regs.is_64_bit_mode(vcpu):
        return 64
    cs = 1
    return 32 if vcpu.cpu.segment(cs)[3] >> 10 & 1 else 16


def read_physical(vm: Vm, gpa: int, size: int) -> bytes:
    """Guest memory.  KvmError(EFAULT) where no slot is."""
    return vm.memslots.read(gpa, min(size, MAX_READ))


def read_virtual(vcpu: Vcpu, gva: int, size: int) -> bytes:
    """Guest memory by the vCPU's page tables; short where a page is missing."""
    return at_rest(vcpu, lambda: mmu.read_virtual(vcpu, gva, min(size, MAX_READ)))
