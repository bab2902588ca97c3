# SPDX-License-Identifier: GPL-2.0-or-later
"""Steal time: how long a vCPU was ready to run and did not (Linux: record_steal_time; kvm/x86/msr.rst).

In Linux that is the time for which the vCPU's thread has waited for a CPU.  Here two threads have a part in a vCPU, the
client's that calls KVM_RUN and the one that serves it; and the latter may have to wait for its turn while another vCPU of
the VM runs.
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
RECORD_NS = 10**6               # guests look at it in their timer tick; more often is not worth the reading,
NOTICEABLE_NS = 10**5           # except when the client's thread has waited for as long as this
_MAX_FILES = 256
_HEAD = struct.Struct("<QII")   # struct kvm_steal_time: steal, version, flags
_PREEMPTED, _SIZE = 16, 64
_U32 = struct.Struct("<I")


@cache
def available() -> bool:
    """``sched_info_on``: does this kernel count how long threads wait?"""
    with suppress(OSError, IndexError, ValueError), open("/proc/self/schedstat", "rb") as file:
        return len(file.read().split()) >= 2
    return False


class RunDelays:
    """How long the threads of one process have waited for a CPU (``sched_info.run_delay``).

    ``tasks``: a descriptor of its /proc/PID/task.  Files stay open: reading is much cheaper than opening.
    """

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()   # of all vCPUs: what one of them closes no other one may be reading

    def of(self, tid: int) -> int:
        """Nanoseconds; 0 for a thread that is gone."""
        with self._lock, suppress(OSError, IndexError, ValueError):
            file = self._files.get(tid)
            if file is None:
                file = self._open(tid)
            try:
                return int(os.pread(file, 64, 0).split()[1])
            except OSError:             # a thread of that number has ended; is there another one?
                os.close(self._files.pop(tid))
                return int(os.pread(self._open(tid), 64, 0).split()[1])
        return 0

    def _open(self, tid: int) -> int:
        if len(self._files) >= _MAX_FILES:
            for old in self._files.values():
                os.close(old)
            self._files.clear()
        file = self._files[tid] = os.open(f"{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._tasks)
        return file


@cache
def _own_delays(pid: int) -> RunDelays:
    return RunDelays(os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


class StealTime:
    """A vCPU's: ``msr`` is MSR_KVM_STEAL_TIME."""

    __slots__ = ("_last", "_waited", "msr", "recorded_ns")

    def __init__(self) -> None:
        self.msr = 0
        self._last: dict[str, tuple[int, int]] = {}         # whose thread → its tid, and its delay then
        self._waited = self.recorded_ns = 0

    def noticeable(self, client: int, client_delay: int) -> bool:
        """Has the client's thread waited for long since the last call of ``stolen``?"""
        known, last = self._last.get("client", (0, 0))
        return client == known and client_delay - last >= NOTICEABLE_NS

    def stolen(self, waited: int, client: int, client_delay: int) -> int:
        """Nanoseconds since the last call.  A thread that is new here has lost nothing of this vCPU's yet.

        ``waited``: nanoseconds that the vCPU has waited for its turn so far; ``client``: the client's thread.
        """
        lost, self._waited = waited - self._waited, waited
        mine = threading.get_native_id()
        for whose, tid, delay in (("own", mine, _own_delays(os.getpid()).of(mine)), ("client", client, client_delay)):
            known, last = self._last.get(whose, (0, 0))
            if tid == known:
                lost += max(0, delay - last)
            self._last[whose] = tid, delay
        return lost


def record_steal_time(vcpu: Vcpu) -> None:
    """KVM_REQ_STEAL_UPDATE."""
    steal = vcpu.arch.steal_time
    if not steal.msr & KVM_MSR_ENABLED:
        return
    now = time.monotonic_ns()
    client = vcpu.request.tid if vcpu.request is not None else 0
    delay = vcpu.vm.host.run_delay(client) if client else 0
    if now - steal.recorded_ns < RECORD_NS and not steal.noticeable(client, delay):
        return
    steal.recorded_ns = now
    lost = steal.stolen(vcpu.cpu.waited, client, delay)
    gpa, slots = steal.msr & KVM_STEAL_VALID_BITS, vcpu.vm.memslots
    try:
        total, version, flags = _HEAD.unpack(slots.read(gpa, _HEAD.size))
        if slots.read(gpa + _PREEMPTED, 1)[0] & KVM_VCPU_FLUSH_TLB:
            vcpu.cpu.flush_tlb()
        slots.write(gpa + _PREEMPTED, b"\0")
        version = version + (version & 1) + 1 & 0xFFFFFFFF
        slots.write(gpa + 8, _U32.pack(version))
        slots.write(gpa, _HEAD.pack(total + lost & (1 << 64) - 1, version, flags))
        slots.write(gpa + 8, _U32.pack(version + 1 & 0xFFFFFFFF))
        vcpu.cpu.tell_preemption(gpa + _PREEMPTED)
    except (KvmError, OSError):
        return
    vcpu.vm.engine.invalidate(gpa, _SIZE)
