# SPDX-License-Identifier: GPL-2.0-or-later
"""Steal time: how long a vCPU was ready to run and did not (Linux: record_steal_time; kvm/x86/msr.rst).

It is the time that the thread serving KVM_RUN has waited: for a CPU, or for its turn while another vCPU of the VM ran.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from kvmfs.abi.para import KVM_STEAL_VALID_BITS, KVM_VCPU_FLUSH_TLB
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

KVM_MSR_ENABLED = 1
RECORD_NS = 10**6               # guests look at it in their timer tick; more often is not worth the reading
_HEAD = struct.Struct("<QII")   # struct kvm_steal_time: steal, version, flags
_PREEMPTED, _SIZE = 16, 64
_U32 = struct.Struct("<I")


@cache
def available() -> bool:
    """``sched_info_on``: does this kernel count how long threads wait?"""
    with suppress(OSError):
        return len(_read(os.getpid()).split()) >= 2
    return False


def _read(tid: int) -> bytes:
    with open(f"/proc/self/task/{tid}/schedstat", "rb", buffering=0) as file:
        return file.read(64)


class StealTime:
    """A vCPU's: ``msr`` is MSR_KVM_STEAL_TIME."""

    __slots__ = ("_last", "_tid", "_waited", "msr", "recorded_ns")

    def __init__(self) -> None:
        self.msr = 0
        self._tid = self._last = self._waited = self.recorded_ns = 0

    def stolen(self, waited: int) -> int:
        """Nanoseconds since the last call.  A thread that is new here has lost nothing of this vCPU's yet.

        ``waited``: nanoseconds that the vCPU has waited for its turn so far.
        """
        tid = threading.get_native_id()
        delay = int(_read(tid).split()[1])
        lost = max(0, delay - self._last) if tid == self._tid else 0
        self._tid, self._last = tid, delay
        lost += waited - self._waited
        self._waited = waited
        return lost


def record_steal_time(vcpu: Vcpu) -> None:
    """KVM_REQ_STEAL_UPDATE."""
    steal = vcpu.arch.steal_time
    if not steal.msr & KVM_MSR_ENABLED:
        return
    now = time.monotonic_ns()
    if now - steal.recorded_ns < RECORD_NS:
        return
    steal.recorded_ns = now
    gpa, slots = steal.msr & KVM_STEAL_VALID_BITS, vcpu.vm.memslots
    try:
        total, version, flags = _HEAD.unpack(slots.read(gpa, _HEAD.size))
        if slots.read(gpa + _PREEMPTED, 1)[0] & KVM_VCPU_FLUSH_TLB:
            vcpu.cpu.flush_tlb()
        slots.write(gpa + _PREEMPTED, b"\0")
        version = version + (version & 1) + 1 & 0xFFFFFFFF
        slots.write(gpa + 8, _U32.pack(version))
        slots.write(gpa, _HEAD.pack(total + steal.stolen(vcpu.cpu.waited) & (1 << 64) - 1, version, flags))
        slots.write(gpa + 8, _U32.pack(version + 1 & 0xFFFFFFFF))
    except (KvmError, OSError):
        return
    vcpu.vm.engine.invalidate(gpa, _SIZE)
