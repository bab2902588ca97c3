# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V's reference time: a counter in units of 100 ns, and the page with which a guest works it out from its TSC.

Linux: compute_tsc_page_parameters and kvm_hv_setup_tsc_page in hyperv.c; TLFS, chapter "Timers".  The time is kvmclock's.
In the page: time = (TSC * scale >> 64) + offset, valid while the sequence number is not 0.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from kvmfs.abi.hyperv import HV_X64_MSR_TSC_REFERENCE_ENABLE
from kvmfs.errors import KvmError
from kvmfs.kvm import kvmclock

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vm
    from kvmfs.kvm.tsc import Scale

UNSET, GUEST_CHANGED, HOST_CHANGED, SET, BROKEN = range(5)      # enum hv_tsc_page_status
_M32, _M64 = (1 << 32) - 1, (1 << 64) - 1
_PAGE_MASK = _M64 & ~0xFFF
_U32 = struct.Struct("<I")
_PAGE = struct.Struct("<IIQQ")          # struct ms_hyperv_tsc_page: sequence, reserved, scale, offset


class ReferenceTsc:
    """HV_X64_MSR_REFERENCE_TSC of one VM and its page; ``lock`` is hv_lock, held by who calls."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.lock = threading.RLock()
        self.msr = 0
        self.status = UNSET
        self.emulation_control = 0      # HV_X64_MSR_TSC_EMULATION_CONTROL
        self._scale = self._offset = 0

    def set_msr(self, value: int, *, host: bool) -> bool:
        """The page is filled in with the next clock update, for which the caller has to ask: True."""
        self.msr = value
        if not value & HV_X64_MSR_TSC_REFERENCE_ENABLE:
            self.status = UNSET
            return False
        self.status = HOST_CHANGED if host else GUEST_CHANGED
        return True

    def _update_is_unsafe(self) -> bool:
        """``tsc_page_update_unsafe``: a migrated guest counts on the page's values until it says otherwise."""
        return self.status != GUEST_CHANGED and bool(self.emulation_control)

    def request_update(self) -> None:
        """``kvm_hv_request_tsc_page_update``: the clock is about to change."""
        if self.status == SET:
            with self.lock:
                if self.status == SET and not self._update_is_unsafe():
                    self.status = HOST_CHANGED

    def setup(self, timestamp: int, system_time: int, scale: Scale, *, stable: bool) -> None:
        """``kvm_hv_setup_tsc_page``: a vCPU has these pvclock parameters now."""
        if self.status not in (GUEST_CHANGED, HOST_CHANGED):
            return
        with self.lock:
            if (self.status in (GUEST_CHANGED, HOST_CHANGED) and self.msr & HV_X64_MSR_TSC_REFERENCE_ENABLE):
                try:
                    good = self._fill(self.msr & _PAGE_MASK, timestamp, system_time, scale, stable=stable)
                except KvmError:
                    good = False
                self.status = SET if good else BROKEN

    def _fill(self, gpa: int, timestamp: int, system_time: int, scale: Scale, *, stable: bool) -> bool:
        slots = self._vm.memslots
        sequence, _, old_scale, old_offset = _PAGE.unpack(slots.read(gpa, _PAGE.size))
        if sequence and self._update_is_unsafe():
            self._scale, self._offset = old_scale, old_offset
            return True
        slots.write(gpa, _U32.pack(0))          # meanwhile the guest reads the MSR
        if not stable or scale.mult >= 100 << (32 - scale.shift):
            return False
        self._scale = (1 << (32 + scale.shift)) * scale.mult // 100
        self._offset = system_time // 100 - (timestamp * self._scale >> 64) & _M64
        slots.write(gpa, _PAGE.pack(0, 0, self._scale, self._offset))
        sequence = sequence + 1 & _M32
        slots.write(gpa, _U32.pack(1 if sequence in (0, _M32) else sequence))
        self._vm.engine.invalidate(gpa, _PAGE.size)
        return True

    def time_ref_counter(self) -> int:
        """``get_time_ref_counter``: HV_X64_MSR_TIME_REF_COUNT, in 100 ns."""
        if self.status != SET:
            return kvmclock.get_kvmclock(self._vm).clock // 100
        return (self._vm.vcpus[0].cpu.guest_tsc() * self._scale >> 64) + self._offset & _M64
