# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC's registers, as page, as x2APIC's MSRs and as state (Linux: arch/x86/kvm/lapic.c; SDM vol. 3, 11.4).

Accesses come from the vCPU's thread, and take the irqchip's lock.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi.flags import KVM_X86_QUIRK_LAPIC_MMIO_HOLE
from kvmfs.abi.msrs import APIC_BASE_MSR
from kvmfs.errors import KvmError
from kvmfs.kvm import vapic
from kvmfs.kvm.lapic_core import LVT_ENTRIES, LVT_ENTRIES_CMCI, LVT_REGISTERS, LapicCore, x2apic_ldr

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

_get, _put = struct.Struct("<I").unpack_from, struct.Struct("<I").pack_into
_LVT = A.APIC_LVT_MASKED | A.APIC_SEND_PENDING | A.APIC_VECTOR_MASK
_LINT = _LVT | A.APIC_MODE_MASK | A.APIC_INPUT_POLARITY | A.APIC_LVT_REMOTE_IRR | A.APIC_LVT_LEVEL_TRIGGER
# What can be written to each entry; the timer's modes come on top.
LVT_MASKS = dict(zip(LVT_REGISTERS, (_LVT, _LVT | A.APIC_MODE_MASK, _LVT | A.APIC_MODE_MASK, _LINT, _LINT, _LVT,
                                     _LVT | A.APIC_MODE_MASK), strict=True))
_VECTOR_REGISTERS = tuple(base + 16 * i for base in (A.APIC_ISR, A.APIC_TMR, A.APIC_IRR) for i in range(8))
_READABLE = frozenset((
    A.APIC_ID, A.APIC_LVR, A.APIC_TASKPRI, A.APIC_PROCPRI, A.APIC_LDR, A.APIC_SPIV, *_VECTOR_REGISTERS, A.APIC_ESR,
    A.APIC_ICR, *LVT_REGISTERS[:LVT_ENTRIES], A.APIC_TMICT, A.APIC_TMCCT, A.APIC_TDCR))
_READABLE_XAPIC = frozenset((A.APIC_ARBPRI, A.APIC_DFR, A.APIC_ICR2))
X2APIC_ICR_RESERVED = 0xFFF00000 | 3 << 16 | 1 << 13


class Lapic(LapicCore):
    """The whole of ``struct kvm_lapic``."""

    # ---- register accesses --------------------------------------------------------------------------

    def _sync_vectors(self) -> None:
        """Put the bitmaps into the page."""
        for base, bits in ((A.APIC_ISR, self.isr), (A.APIC_TMR, self.tmr), (A.APIC_IRR, self.irr)):
            for i in range(8):
                self.set_reg(base + 16 * i, bits >> 32 * i)

    def read_register(self, offset: int) -> int | None:
        """``kvm_lapic_reg_read`` at a multiple of 16; None: there is nothing to read."""
        if offset not in _READABLE and not (
                (offset in _READABLE_XAPIC and not self.x2apic_mode)
                or (offset == A.APIC_LVTCMCI and self.lvt_entries == LVT_ENTRIES_CMCI)):
            return None
        if offset == A.APIC_ARBPRI:
            return 0
        if offset == A.APIC_TMCCT:
            return self.timer.current_count()
        if offset == A.APIC_TASKPRI:
            vapic.report_tpr_access(self.vcpu, is_write=False)
        elif offset == A.APIC_PROCPRI:
            self.update_ppr()
        elif A.APIC_ISR <= offset < A.APIC_ESR:
            self._sync_vectors()
        return self.reg(offset)

    def write_register(self, offset: int, value: int) -> bool:
        """``kvm_lapic_reg_write``; False: #GP for an x2APIC guest, nothing otherwise."""
        writer = _WRITERS.get(offset)
        return writer is not None and writer(self, offset, value)

    def _write_id(self, offset: int, value: int) -> bool:
        if self.x2apic_mode:
            return False
        self._set_xapic_id(value >> 24)
        return True

    def _write_tpr(self, offset: int, value: int) -> bool:
        vapic.report_tpr_access(self.vcpu, is_write=True)
        self.set_tpr(value & 0xFF)
        return True

    def _write_eoi(self, offset: int, value: int) -> bool:
        self.eoi()
        return True

    def _write_dest(self, offset: int, value: int) -> bool:
        """LDR and DFR."""
        if self.x2apic_mode:
            return False
        self.set_reg(offset, value & 0xFF000000 if offset == A.APIC_LDR else value | 0x0FFFFFFF)
        self.chip.map_changed()
        return True

    def _write_spiv(self, offset: int, value: int) -> bool:
        directed = self.reg(A.APIC_LVR) & A.APIC_LVR_DIRECTED_EOI
        self._set_spiv(value & (0x3FF | (A.APIC_SPIV_DIRECTED_EOI if directed else 0)))
        if not value & A.APIC_SPIV_APIC_ENABLED:
            for lvt in LVT_REGISTERS[:self.lvt_entries]:
                self.set_reg(lvt, self.reg(lvt) | A.APIC_LVT_MASKED)
            self.timer.lvtt_changed()
            self.timer.pending = False
        return True

    def _write_icr(self, offset: int, value: int) -> bool:
        value &= ~A.APIC_SEND_PENDING
        self.send_ipi(value, self.reg(A.APIC_ICR2))
        self.set_reg(A.APIC_ICR, value)
        return True

    def _write_icr2(self, offset: int, value: int) -> bool:
        if self.x2apic_mode:
            return False
        self.set_reg(A.APIC_ICR2, value & 0xFF000000)
        return True

    def _write_lvt(self, offset: int, value: int) -> bool:
        if offset == A.APIC_LVTCMCI and self.lvt_entries != LVT_ENTRIES_CMCI:
            return False
        if not self.sw_enabled:
            value |= A.APIC_LVT_MASKED
        mask = LVT_MASKS[offset]
        if offset == A.APIC_LVTT:
            self.set_reg(offset, value & (mask | self.timer.mode_mask))
            self.timer.lvtt_changed()
        else:
            self.set_reg(offset, value & mask)
            if offset == A.APIC_LVT0:
                self._manage_nmi_watchdog()
        return True

    def _write_tmict(self, offset: int, value: int) -> bool:
        if not self.timer.deadline_mode:
            self.timer.cancel()
            self.set_reg(A.APIC_TMICT, value)
            self.timer.start()
        return True

    def _write_tdcr(self, offset: int, value: int) -> bool:
        self.set_reg(A.APIC_TDCR, value & 0xB)
        self.timer.divisor_changed()
        return True

    def _write_esr(self, offset: int, value: int) -> bool:
        return not self.x2apic_mode or not value

    def _write_self_ipi(self, offset: int, value: int) -> bool:
        if not self.x2apic_mode or value & ~A.APIC_VECTOR_MASK:
            return False
        self.send_ipi(A.APIC_DEST_SELF | value, 0)
        return True

    # ---- the page (the vCPU's thread, takes the lock) -----------------------------------------------

    def _in_page(self, address: int) -> bool:
        return self.base_address <= address < self.base_address + A.APIC_MMIO_LENGTH

    def _hole(self) -> bool:
        """The page is there but no APIC behind it."""
        return not self.hw_enabled or self.x2apic_mode

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        if not self._in_page(address):
            return None
        if self._hole():
            quirk = not self.vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_LAPIC_MMIO_HOLE
            return b"\xff" * size if quirk else None
        offset = address - self.base_address
        within = offset & 0xF
        value = None
        if within + size <= 4:
            with self.chip.lock:
                value = self.read_register(offset & ~0xF)
        return (value or 0).to_bytes(4, "little")[within:within + size].ljust(size, b"\0")

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        if not self._in_page(address):
            return False
        if self._hole():
            return not self.vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_LAPIC_MMIO_HOLE
        offset = address - self.base_address
        if len(data) == 4 and not offset & 0xF:
            with self.chip.lock:
                self.write_register(offset, int.from_bytes(data, "little"))
        return True

    # ---- x2APIC's MSRs (take the lock) --------------------------------------------------------------

    def _icr_is_split(self) -> bool:
        """AMD's hardware keeps the x2APIC ICR in two registers, Intel's in one of 64 bits."""
        return self.vcpu.vm.vendor.name == "amd"

    def read_msr(self, index: int) -> int | None:
        """``kvm_x2apic_msr_read``; None: #GP."""
        return self.read_msr_register(index - APIC_BASE_MSR << 4) if self.x2apic_mode else None

    def read_msr_register(self, offset: int) -> int | None:
        """``kvm_lapic_msr_read``: also for Hyper-V's MSRs, whatever the APIC's mode."""
        with self.chip.lock:
            if offset == A.APIC_ICR:
                high = A.APIC_ICR2 if self._icr_is_split() else A.APIC_ICR + 4
                return self.reg(A.APIC_ICR) | self.reg(high) << 32
            return self.read_register(offset) if offset <= A.APIC_LAST_REG else None

    def write_msr(self, index: int, value: int) -> bool:
        """``kvm_x2apic_msr_write``; False: #GP."""
        return self.x2apic_mode and self.write_msr_register(index - APIC_BASE_MSR << 4, value)

    def write_msr_register(self, offset: int, value: int) -> bool:
        """``kvm_lapic_msr_write``."""
        with self.chip.lock:
            if offset == A.APIC_ICR:
                return self._write_x2apic_icr(value)
            return not value >> 32 and self.write_register(offset, value)

    def _write_x2apic_icr(self, value: int) -> bool:
        if value & X2APIC_ICR_RESERVED:
            return False
        value &= ~A.APIC_SEND_PENDING
        self.send_ipi(value & 0xFFFFFFFF, value >> 32)
        self.set_reg(A.APIC_ICR, value)
        self.set_reg(A.APIC_ICR2 if self._icr_is_split() else A.APIC_ICR + 4, value >> 32)
        return True

    # ---- KVM_GET_LAPIC, KVM_SET_LAPIC (take the lock) -----------------------------------------------

    def get_state(self) -> bytes:
        """A struct kvm_lapic_state."""
        with self.chip.lock:
            self._sync_vectors()
            state = bytearray(self._regs)
            _put(state, A.APIC_TMCCT, self.timer.current_count())
            if self.x2apic_mode:
                if not self.vcpu.vm.arch.x2apic_format:
                    _put(state, A.APIC_ID, self.x2apic_id << 24 & 0xFFFFFFFF)
                if not self._icr_is_split():
                    _put(state, A.APIC_ICR2, _get(state, A.APIC_ICR + 4)[0])
            return bytes(state)

    def set_state(self, data: bytes) -> None:
        """EINVAL: with 32-bit IDs, an x2APIC ID that is not the vCPU's."""
        state = bytearray(data)
        with self.chip.lock:
            self._set_spiv(_get(state, A.APIC_SPIV)[0])
            if self.x2apic_mode:
                if self.vcpu.vm.arch.x2apic_format and _get(state, A.APIC_ID)[0] != self.x2apic_id:
                    raise KvmError(errno.EINVAL)
                _put(state, A.APIC_ID, self.x2apic_id)
                _put(state, A.APIC_LDR, x2apic_ldr(self.x2apic_id))
                if not self._icr_is_split():
                    _put(state, A.APIC_ICR + 4, _get(state, A.APIC_ICR2)[0])
            self._regs[:] = state
            self.isr, self.tmr, self.irr = (
                sum(self.reg(base + 16 * i) << 32 * i for i in range(8)) for base in (A.APIC_ISR, A.APIC_TMR, A.APIC_IRR))
            self.highest_isr_cache = -1
            self.chip.map_changed()
            self.set_version()
            self.vcpu.cpu.cr8 = self.reg(A.APIC_TASKPRI) >> 4 & 0xF
            self.update_ppr()
            self.timer.cancel()
            self.timer.lvtt_changed()
            self._manage_nmi_watchdog()
            self.timer.update_divide_count()
            self.timer.start(A.APIC_TMCCT)
            self.set_reg(A.APIC_TMCCT, 0)
            self.vcpu.arch.event_request = True
            if self.chip.ioapic is not None:
                self.chip.ioapic.restore_rtc(self)


_WRITERS: dict[int, Callable[[Lapic, int, int], bool]] = {
    A.APIC_ID: Lapic._write_id,
    A.APIC_TASKPRI: Lapic._write_tpr,
    A.APIC_EOI: Lapic._write_eoi,
    A.APIC_LDR: Lapic._write_dest,
    A.APIC_DFR: Lapic._write_dest,
    A.APIC_SPIV: Lapic._write_spiv,
    A.APIC_ICR: Lapic._write_icr,
    A.APIC_ICR2: Lapic._write_icr2,
    **dict.fromkeys(LVT_REGISTERS, Lapic._write_lvt),
    A.APIC_TMICT: Lapic._write_tmict,
    A.APIC_TDCR: Lapic._write_tdcr,
    A.APIC_ESR: Lapic._write_esr,
    A.APIC_SELF_IPI: Lapic._write_self_ipi,
}
