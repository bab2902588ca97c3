# SPDX-License-Identifier: GPL-2.0-or-later
"""When KVM_RUN needs no Python: the vCPU is armed, and native code (_fastpath.c) serves it until something is different.

Everything is decided here: :meth:`Lane.arm` looks, after a KVM_RUN that Python has served, whether anything is pending for the
vCPU or may be asked of the machine at its next exits.  Whoever changes what it has looked at says so afterwards with
:meth:`Lane.stop`; any ioctl on the vCPU takes it back with its mutex.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvmfs.abi.exits import KVM_EXIT_MMIO, KVM_MP_STATE_RUNNABLE
from kvmfs.kvm import events, x86_exits

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu
    from kvmfs.kvm.lapic import Lapic

FREE, ARMED, RUNNING, WANTED = range(4)
_STATE, _STOP = 0, 1                    # words of a lane
NONE, OUT, IN, READ, WRITE = range(5)   # how an exit is completed
_PYTHON: Final = -1                     # arch.complete_userspace_io says it
_WITH_PORTS, _WITH_HLT, _WITH_APIC, _READY, _NOT_READY = 1, 2, 4, 8, 16
_PLACE_READ, _PLACE_WRITE, _PLACE_PORT = 1, 2, 4        # a place: with a page of MMIO, or a port << 12
_PAGE = 4096
_KINDS, _PLACES = 8, 8
_REQUEST_WINDOW, _EXIT_REASON, _MMIO, _PORT, _VALID_REGS, _DIRTY_REGS = 0, 8, 32, 34, 288, 296     # of kvm_run

_COMPLETIONS: Final[tuple[Callable[[Vcpu], int] | None, ...]] = (
    None, x86_exits.complete_io_out, x86_exits.complete_io_in, x86_exits.complete_mmio_read, x86_exits.next_fragment)


class LaneState(ctypes.Structure):
    """Lane of _fastpath.c."""

    _fields_ = (
        ("state", ctypes.c_int32),
        ("stop", ctypes.c_int32),
        ("tid", ctypes.c_uint32),
        ("with_", ctypes.c_uint32),
        ("complete", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("completing", ctypes.c_int32),
        ("nplaces", ctypes.c_uint32),
        ("apic_base", ctypes.c_uint64),
        ("runs", ctypes.c_uint64),
        ("mmio_exits", ctypes.c_uint64),
        ("halt_exits", ctypes.c_uint64),
        ("exits", ctypes.c_uint64 * _KINDS),
        ("place", ctypes.c_uint64 * _PLACES),
        ("vcpu", ctypes.c_void_p),
        ("run", ctypes.c_void_p),
    )
    complete: int
    kind: int
    completing: int
    nplaces: int
    runs: int
    mmio_exits: int
    halt_exits: int
    exits: ctypes.Array[ctypes.c_uint64]
    vcpu: int
    run: int


@functools.cache
def load() -> ctypes.CDLL | None:
    """The native part; None: it is not built.  It needs no more files once it is loaded."""
    spec = importlib.util.find_spec("kvmfs.kvm._fastpath")
    if spec is None or spec.origin is None:
        return None
    lib = ctypes.CDLL(spec.origin)
    ptr, u32, u64, i32 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
    for name, result, arguments in (
        ("fp_link", None, (ptr, ptr, ptr, ptr)), ("fp_open", None, (ptr, u64, u64)), ("fp_set", None, (ptr, u64, ptr)),
        ("fp_claim", i32, (ptr, i32)), ("fp_release", None, (ptr, i32)),
        ("fp_arm", None, (ptr, u32, u32, i32, u64, u64)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Lanes:
    """Those of a VM; ``address``: its struct shortcut (kvmfs/fuse/shortcut.h), 0: there is none."""

    def __init__(self, first_inode: int, count: int) -> None:
        self.enabled = True             # False: every ioctl is to be seen by Python
        self.lib = load()
        self._table = ctypes.create_string_buffer(40 + 8 * count if self.lib is not None else 1)
        self.address = ctypes.addressof(self._table) if self.lib is not None else 0
        if self.lib is not None:
            self.lib.fp_open(self.address, first_inode, count)

    def add(self, vcpu: Vcpu) -> Lane:
        """The new vCPU's."""
        lane = Lane(self, vcpu)
        if self.lib is not None:
            self.lib.fp_link(*vcpu.cpu.entry_points)
            lane.info.vcpu, lane.info.run = vcpu.cpu.address, ctypes.addressof(ctypes.c_char.from_buffer(vcpu.run_map))
            self.lib.fp_set(self.address, vcpu.index, lane.address)
        return lane

    def remove(self, index: int) -> None:
        """That vCPU goes; nobody runs it."""
        if self.lib is not None:
            self.lib.fp_set(self.address, index, None)


def _is_busy(vcpu: Vcpu, apic: Lapic) -> bool:
    """Is something to be done for the local APIC before the guest goes on?"""
    arch = vcpu.arch
    return bool(arch.mp_state != KVM_MP_STATE_RUNNABLE or apic.pending_events or apic.eoi_exit is not None
                or (apic.timer.pending and apic.timer.has_pending) or arch.vapic_addr or arch.pv_eoi.pending)


class Lane:
    """A vCPU's.  ``words[0]`` is its state: 0, it is Python's."""

    def __init__(self, lanes: Lanes, vcpu: Vcpu) -> None:
        self._lanes, self._lib, self._vcpu = lanes, lanes.lib, vcpu
        self.info = LaneState(complete=_PYTHON)
        self.address = ctypes.addressof(self.info)
        self.words = memoryview(self.info).cast("B").cast("i")
        self.halted = False             # the guest has waited in this KVM_RUN

    def stop(self) -> None:
        """Any thread: something may have changed that :meth:`arm` has looked at; not at every change the vCPU is kicked."""
        self.words[_STOP] = 1

    def claim(self, wait: bool) -> bool:
        """Take the vCPU to Python.  False: it runs.  The caller has its mutex."""
        lib = self._lib
        if lib is None:
            return True
        if not lib.fp_claim(self.address, wait):
            return False
        self.take_over()
        return True

    def take_over(self) -> None:
        """The vCPU is Python's: so is what its last exit left open."""
        info = self.info
        how = info.complete
        if how != _PYTHON:
            info.complete = _PYTHON
            self._vcpu.arch.complete_userspace_io = _COMPLETIONS[how]

    def release(self) -> None:
        """Python is done with what it went on with."""
        if self._lib is not None:
            self._lib.fp_release(self.address, 0)

    def arm(self, tid: int) -> bool:
        """After a KVM_RUN of the client's thread ``tid`` that returned 0: give the vCPU to the native code, if that can serve it.

        From then on it is not the caller's any more.
        """
        lib, words = self._lib, self.words
        if lib is None:
            return False
        if self.halted:                 # its exits are few, and each look delays the answer
            self.halted = False
            return False
        if words[_STOP]:
            words[_STOP] = 0            # before the look: what changes after it sets it again
            self.info.nplaces = 0
        vcpu = self._vcpu
        arch, vm, run = vcpu.arch, vcpu.vm, vcpu.run
        apic = arch.apic
        busy = arch.apic_attention if apic is None else _is_busy(vcpu, apic)
        if (busy or not self._lanes.enabled or vcpu.copy_run or vcpu.dirty_ring is not None or vm.mirrored
                or arch.requests or arch.event_request or arch.entry_check or arch.guest_debug
                or arch.given or arch.triple_fault or vcpu.sigset is not None
                or arch.pio_linear_rip is not None or arch.exception.pending or events.needs_reinjection(vcpu)
                or run[_REQUEST_WINDOW] or run[_VALID_REGS] or run[_DIRTY_REGS] or vm.dead or not vm.arch.resumed.is_set()
                or x86_exits.is_tapped()):
            return False
        complete = arch.complete_userspace_io
        cpu = vcpu.cpu
        if complete not in _COMPLETIONS or (complete is x86_exits.complete_io_in and cpu.exit.string):
            return False
        how = _COMPLETIONS.index(complete)
        with_ = 0 if vm.pio_bus.ranges else _WITH_PORTS
        if apic is not None:
            with_ |= _WITH_APIC | (_READY if apic.chip.pic is not None else 0 if apic.accepts_dm_intr() else _NOT_READY)
        elif not vm.arch.hlt_in_guest:
            with_ |= _WITH_HLT
        lib.fp_arm(self.address, tid, with_, how, arch.apic_base, self._place(how))
        return True

    def _place(self, how: int) -> int:
        """Where the exit was that the client answers with ``how``, if accesses there are always the client's; 0: they are not."""
        vcpu = self._vcpu
        vm, run, direction = vcpu.vm, vcpu.run, _PLACE_WRITE if how in (OUT, WRITE) else _PLACE_READ
        if how in (OUT, IN):
            if not vm.pio_bus.ranges:
                return 0                # _WITH_PORTS says it for all of them, and there is not room for many
            port = int.from_bytes(run[_PORT:_PORT + 2], "little")
            here = vm.pio_bus.may_write(port) if how == OUT else vm.pio_bus.may_read(port)
            return 0 if here else port << 12 | _PLACE_PORT | direction
        if how == NONE or run[_EXIT_REASON] != KVM_EXIT_MMIO:
            return 0
        page = int.from_bytes(run[_MMIO:_MMIO + 8], "little") & -_PAGE
        if (vcpu.arch.apic is not None and page == vcpu.arch.apic_base & -_PAGE) or any(
                r.addr < page + _PAGE and page < r.addr + max(r.size, 1) for r in vm.mmio_bus.ranges):
            return 0
        return page | direction

    def begun(self, vcpu: Vcpu) -> int:
        """Handle the exit with which native code gave a KVM_RUN back; as the handlers of x86_exits."""
        apic = vcpu.arch.apic
        if apic is None:
            return self._begun(vcpu)
        apic.thread = threading.get_ident()
        apic.in_guest = True            # as irq.enter_or_block does
        try:
            return self._begun(vcpu)
        finally:
            apic.in_guest = False

    def _begun(self, vcpu: Vcpu) -> int:
        self.take_over()
        info = self.info
        kind, completing = info.kind, info.completing
        if completing == READ:
            return x86_exits.next_round(vcpu, kind)
        if completing == WRITE:
            return x86_exits.after_fragment(vcpu, kind)
        return x86_exits.HANDLERS[kind](vcpu)


class VcpuMutex:
    """``vcpu->mutex``: ``lock`` among Python's threads, and the lane."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lane: Lane | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """False: somebody has it, and the caller does not want to wait."""
        if not self.lock.acquire(blocking):
            return False
        lane = self.lane
        if lane is not None and lane.words[_STATE] and not lane.claim(blocking):
            self.lock.release()
            return False
        return True

    def release(self) -> None:
        """Let others in."""
        self.lock.release()

    def locked(self) -> bool:
        """Has anybody got it?"""
        return self.lock.locked() or self.running()

    def running(self) -> bool:
        """Is a KVM_RUN under way that native code has begun?"""
        return self.lane is not None and self.lane.words[_STATE] >= RUNNING
