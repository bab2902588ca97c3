# SPDX-License-Identifier: GPL-2.0-or-later
"""The registers of a vCPU as attributes, live."""

from __future__ import annotations

from typing import Final

from kvmfs.cpu.layout import CpuState

_MASK64: Final = (1 << 64) - 1
_EFER_SVME: Final = 1 << 12
_HF_INHIBIT: Final = 8
_TSS_BUSY: Final = 2
_TR: Final = 7


class _Field:
    """An attribute that is a field of the state."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: StateFields, owner: type) -> int:
        value: int = getattr(instance._s, self._name)
        return value

    def __set__(self, instance: StateFields, value: int) -> None:
        setattr(instance._s, self._name, value)


class _Cr:
    """A control register; Cpu.commit_state() after setting it (CR2 and CR8 need none)."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, instance: StateFields, owner: type) -> int:
        return instance._s.cr[self._index]

    def __set__(self, instance: StateFields, value: int) -> None:
        instance._s.cr[self._index] = value


class StateFields:
    """State that is a field, or nearly one. ``_s`` is where the state lives now."""

    _s: CpuState

    rip = _Field("rip, as offset in CS")
    sysenter_cs = _Field("IA32_SYSENTER_CS, 32 bits")
    sysenter_esp = _Field("IA32_SYSENTER_ESP")
    sysenter_eip = _Field("IA32_SYSENTER_EIP")
    star = _Field("MSR_STAR")
    lstar = _Field("MSR_LSTAR")
    cstar = _Field("MSR_CSTAR")
    fmask = _Field("MSR_SYSCALL_MASK")
    kernel_gs_base = _Field("MSR_KERNEL_GS_BASE")
    tsc_aux = _Field("MSR_TSC_AUX")
    pat = _Field("MSR_IA32_CR_PAT")
    xcr0 = _Field("XCR0")
    cr0 = _Cr(0)
    cr2 = _Cr(2)
    cr3 = _Cr(3)
    cr4 = _Cr(4)

    def gpr(self, index: int) -> int:
        """Register 0 … 15 in hardware order."""
        return self._s.regs[index]

    def set_gpr(self, index: int, value: int) -> None:
        """Set register 0 … 15."""
        self._s.regs[index] = value

    @property
    def rflags(self) -> int:
        """RFLAGS, the arithmetic flags included (the engine folds them when the guest stops)."""
        return self._s.rflags

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._s.rflags = value | 2

    @property
    def cr8(self) -> int:
        """The task priority that the guest reads and writes as CR8."""
        return self._s.v_tpr & 15

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._s.v_tpr = value & 15

    @property
    def efer(self) -> int:
        """EFER as the guest should see it, without the engine's SVME. commit_state() after setting it."""
        return self._s.efer & ~_EFER_SVME

    @efer.setter
    def efer(self, value: int) -> None:
        self._s.efer = value | _EFER_SVME

    @property
    def tsc_offset(self) -> int:
        """Guest TSC minus the host's, 64 bits, unsigned."""
        return self._s.tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self._s.tsc_offset = value & _MASK64

    def dr(self, index: int) -> int:
        """Debug register 0 … 7."""
        return self._s.dr[index]

    def set_dr(self, index: int, value: int) -> None:
        """Set debug register 0 … 7; state only, no breakpoint fires."""
        self._s.dr[index] = value

    def segment(self, index: int) -> tuple[int, int, int, int]:
        """(selector, base, limit in bytes, attributes in the VMCB's 12-bit form); ES CS SS DS FS GS LDTR TR."""
        seg = self._s.segs[index]
        attrib = seg.flags >> 8 & 0xFF | seg.flags >> 12 & 0xF00
        # QEMU wants an available TSS in TR and never shows the busy bit that hardware sets
        return seg.selector, seg.base, seg.limit, attrib | _TSS_BUSY if index == _TR else attrib

    def set_segment(self, index: int, selector: int, base: int, limit: int, attrib: int) -> None:
        """The reverse of :meth:`segment`; commit_state() afterwards."""
        if index == _TR:
            attrib &= ~_TSS_BUSY
        seg = self._s.segs[index]
        seg.selector, seg.base, seg.limit = selector, base, limit
        seg.flags = (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12

    @property
    def gdt(self) -> tuple[int, int]:
        """(base, limit)."""
        return self._s.gdt.base, self._s.gdt.limit

    @gdt.setter
    def gdt(self, value: tuple[int, int]) -> None:
        self._s.gdt.base, self._s.gdt.limit = value

    @property
    def idt(self) -> tuple[int, int]:
        """(base, limit)."""
        return self._s.idt.base, self._s.idt.limit

    @idt.setter
    def idt(self, value: tuple[int, int]) -> None:
        self._s.idt.base, self._s.idt.limit = value

    @property
    def interrupt_shadow(self) -> int:
        """0, or 2: after STI or MOV SS (which of them is not known; KVM_X86_SHADOW_INT_STI is 2, MOV_SS 1)."""
        return 2 if self._s.hflags & _HF_INHIBIT else 0

    @interrupt_shadow.setter
    def interrupt_shadow(self, value: int) -> None:
        self._s.hflags = self._s.hflags & ~_HF_INHIBIT | (_HF_INHIBIT if value else 0)
