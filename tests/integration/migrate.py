# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that moves a running guest: ``migrate.py NODE save FILE``, and then ``migrate.py NODE restore FILE`` elsewhere.

The guest has two vCPUs.  One counts the PIT's ticks through the PIC and its LAPIC timer's, the other those of its TSC
deadline; an IPI waits for the first one's task priority to sink.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import struct
import sys
import threading
import time
from typing import Any

from kvmfs.abi import structs
from kvmfs.abi.apic import APIC_IRR
from kvmfs.testing import Kvm, KvmCallError
from kvmfs.testing.client import Vcpu, Vm
from tests.asm import assemble
from tests.unit.irq_machine import APIC, COUNTS, FLAT, GDT, IDT, PIC_EOI, PIC_INIT, handler
from tests.unit.machine import CODE, RAM
from tests.unit.test_kvm_irq_guests import smp

GO = 0x2F80             # the restoring client writes here how many ticks of each kind are enough
PIT_TICK, LAPIC_TICK, DEADLINE_TICK, WAITING = 0x20, 0x31, 0x33, 0x2C
TICKS = (PIT_TICK, LAPIC_TICK, DEADLINE_TICK)
TSC_DEADLINE_MSR, DEADLINE_FEATURE = 0x6E0, 1 << 24
ARM = "rdtsc; add eax, 2000000; adc edx, 0; mov ecx, 0x6e0; wrmsr\n"
BODY = PIC_INIT + f"""
    mov al, 0xfe; out 0x21, al; mov al, 0xff; out 0xa1, al
    mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al
    mov dword ptr [{APIC + 0x350:#x}], 0x700
    mov dword ptr [{APIC + 0x80:#x}], 0x2f
    mov dword ptr [{APIC + 0x300:#x}], {0x40000 | WAITING:#x}
    mov dword ptr [{APIC + 0x3E0:#x}], 0xb; mov dword ptr [{APIC + 0x320:#x}], {0x20000 | LAPIC_TICK:#x}
    mov dword ptr [{APIC + 0x380:#x}], 1000000
    mov eax, cr4; or eax, 0x200; mov cr4, eax; movd xmm3, esp; mov ebp, 0x1234abcd
count: sti; hlt; cli; mov eax, [{GO:#x}]; test eax, eax; jz count
""" + "".join(f"cmp [{COUNTS + 4 * v:#x}], eax; jb count\n" for v in TICKS) + f"""
    mov dword ptr [{APIC + 0x80:#x}], 0; sti; nop; nop; cli
    movd ecx, xmm3; cmp ecx, esp; jne bad; cmp ebp, 0x1234abcd; jne bad
    mov al, 1; out 0xf4, al
bad: out 0xf6, al
""" + handler(PIT_TICK, PIC_EOI) + handler(LAPIC_TICK) + handler(WAITING) + (
    f"vec_33: pushad; {ARM} popad\n lock inc dword ptr [{COUNTS + 4 * DEADLINE_TICK:#x}]\n"
    f"mov dword ptr [{APIC + 0xB0:#x}], 0; iretd\n")
# In the order in which they are set again.
VCPU_STATE = {"KVM_GET_REGS": structs.KvmRegs, "KVM_GET_XSAVE": structs.KvmXsave, "KVM_GET_XCRS": structs.KvmXcrs,
              "KVM_GET_SREGS": structs.KvmSregs, "KVM_GET_MP_STATE": structs.KvmMpState, "KVM_GET_LAPIC": structs.KvmLapicState,
              "KVM_GET_VCPU_EVENTS": structs.KvmVcpuEvents, "KVM_GET_DEBUGREGS": structs.KvmDebugregs}


def make(node: str) -> Vm:
    kvm = Kvm(node)
    vm = kvm.create_vm()
    vm.create_irqchip()
    vm.ioctl("KVM_CREATE_PIT2", structs.KvmPitConfig())
    vm.add_memory(0, RAM)
    cpuid = kvm.supported_cpuid()
    for entry in cpuid:
        if entry.function == 1:
            entry.ecx |= DEADLINE_FEATURE
    for _ in range(2):
        vm.create_vcpu(cpuid=cpuid)
    return vm


def load(vm: Vm) -> None:
    enable = f"mov dword ptr [{APIC + 0x320:#x}], {0x40000 | DEADLINE_TICK:#x}\n" + ARM
    code, symbols = assemble(smp(2, BODY, enable), CODE, 32)
    vm.write(CODE, code)
    vm.write(GDT, FLAT)
    for name, address in symbols.items():
        if name.startswith("vec_"):
            gate = address & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (address >> 16) << 48
            vm.write(IDT + 8 * int(name[4:], 16), struct.pack("<Q", gate))
    boot = vm.vcpus[0]
    boot.set_protected_mode(start=CODE, stack=0x7000)
    sregs = boot.sregs
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = GDT, len(FLAT) - 1, IDT, 0x7FF
    boot.sregs = sregs


class Runner(threading.Thread):
    """A vCPU's thread; ``reason``: the exit that ended it."""

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__(daemon=True)
        self.vcpu, self.exit, self.stopping = vcpu, None, False
        self.start()

    def run(self) -> None:
        while not self.stopping:
            try:
                self.exit = self.vcpu.run()
                return
            except KvmCallError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    raise

    def stop(self) -> None:
        self.stopping = True
        self.vcpu.state.immediate_exit = 1
        while self.is_alive():
            signal.pthread_kill(self.ident or 0, signal.SIGUSR1)
            self.join(0.05)
        self.vcpu.state.immediate_exit = 0


def count(vm: Vm, vector: int) -> int:
    value: int = struct.unpack("<I", vm.read(COUNTS + 4 * vector, 4))[0]
    return value


def msr_list(kvm: Kvm) -> list[int]:
    buffer = bytearray(struct.pack("<I", 1000) + bytes(4000))
    kvm.ioctl("KVM_GET_MSR_INDEX_LIST", buffer)
    number, = struct.unpack_from("<I", buffer)
    return list(struct.unpack_from(f"<{number}I", buffer, 4))


def save_vcpu(vcpu: Vcpu) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for call, kind in VCPU_STATE.items():
        vcpu.ioctl(call, value := kind())
        state[call] = bytes(value)
    state["msrs"] = {}
    for index in msr_list(vcpu.vm.kvm):
        try:
            state["msrs"][index] = vcpu.get_msr(index)
        except KvmCallError:            # of a feature that the guest has not
            continue
    return state


def restore_vcpu(vcpu: Vcpu, state: dict[str, Any]) -> None:
    for call in VCPU_STATE:
        vcpu.ioctl(call.replace("GET", "SET"), bytearray(state[call]))
        if call == "KVM_GET_SREGS":     # the deadline is one only once the LAPIC is there
            for index, value in state["msrs"].items():
                if index != TSC_DEADLINE_MSR:
                    vcpu.set_msr(index, value)
    vcpu.set_msr(TSC_DEADLINE_MSR, state["msrs"][TSC_DEADLINE_MSR])


def save(vm: Vm, path: str) -> None:
    load(vm)
    runners = [Runner(vcpu) for vcpu in vm.vcpus]
    deadline = time.monotonic() + 20
    while any(count(vm, v) < 20 for v in TICKS):
        assert time.monotonic() < deadline, ([count(vm, v) for v in TICKS], runners[0].exit, hex(vm.vcpus[0].regs.rip))
        time.sleep(0.005)
    for runner in runners:
        runner.stop()
    state: dict[str, Any] = {"vcpus": [save_vcpu(vcpu) for vcpu in vm.vcpus], "chips": []}
    for number in range(3):
        vm.ioctl("KVM_GET_IRQCHIP", chip := structs.KvmIrqchip(chip_id=number))
        state["chips"].append(bytes(chip))
    vm.ioctl("KVM_GET_PIT2", pit := structs.KvmPitState2())
    vm.ioctl("KVM_GET_CLOCK", clock := structs.KvmClockData())
    state["pit"], state["clock"], state["memory"] = bytes(pit), clock.clock, vm.read(0, RAM)
    irr, = struct.unpack_from("<I", state["vcpus"][0]["KVM_GET_LAPIC"], APIC_IRR + 16 * (WAITING // 32))
    assert irr >> WAITING % 32 & 1, "the IPI does not wait"
    with open(path, "wb") as file:
        pickle.dump(state, file)
    print("saved", *(count(vm, v) for v in (*TICKS, WAITING)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def restore(vm: Vm, path: str) -> None:
    with open(path, "rb") as file:
        state = pickle.load(file)
    vm.write(0, state["memory"])
    vm.ioctl("KVM_SET_CLOCK", structs.KvmClockData(clock=state["clock"]))
    for chip in state["chips"]:
        vm.ioctl("KVM_SET_IRQCHIP", structs.KvmIrqchip.from_buffer_copy(chip))
    for vcpu, saved in zip(vm.vcpus, state["vcpus"], strict=True):
        restore_vcpu(vcpu, saved)
    vm.ioctl("KVM_SET_PIT2", structs.KvmPitState2.from_buffer_copy(state["pit"]))
    before = max(count(vm, v) for v in TICKS)
    vm.write(GO, struct.pack("<I", before + 50))
    runners = [Runner(vcpu) for vcpu in vm.vcpus]
    runners[0].join(20)
    assert runners[0].exit is not None, [count(vm, v) for v in TICKS]
    runners[1].stop()
    assert all(count(vm, v) >= before + 50 for v in TICKS)
    print("restored", runners[0].exit, count(vm, WAITING))


def main() -> None:
    node, what, path = sys.argv[1:]
    signal.signal(signal.SIGUSR1, lambda *_: None)
    vm = make(node)
    (save if what == "save" else restore)(vm, path)


main()
