# SPDX-License-Identifier: GPL-2.0-or-later
"""Intel's virtualization as the vendor module (Linux: arch/x86/kvm/vmx/vmx.c).

The guest runs on the same engine as AMD's.  What Intel's hardware would hold against the state it is to enter
with, VM entry's checks on the guest state area (SDM vol. 3, 27.3.1), is checked here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.abi import x86 as X
from kvmfs.abi.exits import KVM_GUESTDBG_SINGLESTEP, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI
from kvmfs.abi.structs import KvmSegment
from kvmfs.cpu.cpu import EXIT_FETCH, EXIT_UNKNOWN
from kvmfs.kvm import regs
from kvmfs.kvm.guest_debug import effective_dr7
from kvmfs.kvm.tsc import Scaling
from kvmfs.vendor import segments
from kvmfs.vendor.ops import (
    SEG_CS,
    SEG_DS,
    SEG_ES,
    SEG_FS,
    SEG_GS,
    SEG_LDTR,
    SEG_SS,
    SEG_TR,
    KvmX86Ops,
)
from kvmfs.vendor.segments import DB, DPL, G, L, P, S

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

# Exit reason 33 (entry failed: invalid guest state) with bit 31 (VM-entry failure).
VMX_EXIT_INVALID_STATE = 0x80000021
EXIT_REASON_CR_ACCESS, EXIT_REASON_EPT_VIOLATION = 28, 48
# Qualification (SDM table 28-7): of the final address, known.
EPT_READ, EPT_WRITE, EPT_FETCH = (1 << 8 | 1 << 7 | access for access in (1, 2, 4))
CR_ACCESS_LMSW = 1 << 6 | 3 << 4               # qualification (SDM table 28-3): LMSW from memory
RFLAGS_RESERVED = ((1 << 64) - 1) & ~0x3F7FD7
X86_EFLAGS_VM, X86_EFLAGS_IF = 1 << 17, 1 << 9
_CODE_TYPES = frozenset((9, 11, 13, 15))
_DATA, _CODE, _LDT, _TSS = 0x93, 0x9B, 0x82, 0x8B


@functools.lru_cache(maxsize=256)
def _segment_bits(attrib: int) -> bytes:
    """``vmx_get_segment``."""
    return segments.bits_of(segments.from_attrib(attrib))


class Vmx(KvmX86Ops):
    """kvm-intel, with unrestricted guest: real mode is entered as it is."""

    name, module = "intel", "vmx"
    tsc_scaling = Scaling(frac_bits=48, max_ratio=(1 << 64) - 1)        # the TSC multiplier: SDM vol. 3, 26.6.5
    hypercall_bytes = b"\x0f\x01\xc1"       # VMCALL
    passthrough_msrs = (
        M.MSR_STAR, M.MSR_LSTAR, M.MSR_SYSCALL_MASK, M.MSR_FS_BASE, M.MSR_GS_BASE, M.MSR_KERNEL_GS_BASE,
        M.MSR_IA32_SYSENTER_CS, M.MSR_IA32_SYSENTER_ESP, M.MSR_IA32_SYSENTER_EIP,
    )

    def vcpu_create(self, vcpu: Vcpu) -> None:
        """Only Intel's CPUs know SYSENTER in long mode."""
        super().vcpu_create(vcpu)
        vcpu.vm.engine.long_mode_sysenter()

    def vcpu_reset(self, vcpu: Vcpu, init_event: bool) -> None:
        """SDM vol. 3, table 10-1."""
        cpu = vcpu.cpu
        for index in (SEG_ES, SEG_SS, SEG_DS, SEG_FS, SEG_GS):
            cpu.set_segment(index, 0, 0, 0xFFFF, _DATA)
        cpu.set_segment(SEG_CS, 0xF000, 0xFFFF0000, 0xFFFF, _CODE)
        cpu.set_segment(SEG_TR, 0, 0, 0xFFFF, _TSS)
        cpu.set_segment(SEG_LDTR, 0, 0, 0xFFFF, _LDT)
        cpu.gdt = cpu.idt = (0, 0xFFFF)
        if not init_event:
            cpu.sysenter_cs = cpu.sysenter_esp = cpu.sysenter_eip = 0

    def set_pdptrs(self, vcpu: Vcpu, pdptrs: tuple[int, ...]) -> None:
        """The VMCS has fields for them (SDM vol. 3, 25.4.2)."""
        vcpu.cpu.set_pdptrs(pdptrs)

    def segment_bits(self, index: int, attrib: int, large: bool) -> bytes:
        return _segment_bits(attrib)

    def set_segment(self, vcpu: Vcpu, index: int, segment: KvmSegment) -> None:
        """``__vmx_set_segment``: clients forget the accessed bit, which entry insists on."""
        attrib = segments.to_attrib(segment)
        if index != SEG_LDTR:
            attrib |= 1
        vcpu.cpu.set_segment(index, segment.selector, segment.base, segment.limit, attrib)

    def exit_info(self, vcpu: Vcpu) -> tuple[int, int, int, int, int]:
        """``vmx_get_exit_info``; where there is no memory that is an EPT violation.

        The only other exit that asks for this is a LMSW whose operand cannot be read.
        """
        if vcpu.cpu.exit.kind == EXIT_FETCH:
            return EXIT_REASON_EPT_VIOLATION, EPT_FETCH, 0, 0, 0
        if vcpu.cpu.exit.kind == EXIT_UNKNOWN:
            return EXIT_REASON_EPT_VIOLATION, EPT_WRITE if vcpu.cpu.exit.info1 else EPT_READ, 0, 0, 0
        return EXIT_REASON_CR_ACCESS, CR_ACCESS_LMSW, 0, 0, 0

    def inject_irq_blocked(self, vcpu: Vcpu) -> bool:
        return True

    def prepare_debugged_entry(self, vcpu: Vcpu) -> None:
        """Entry with TF wants a pending #DB where STI or MOV SS shadow the instruction: the shadow goes instead."""
        if vcpu.arch.guest_debug & KVM_GUESTDBG_SINGLESTEP:
            vcpu.cpu.interrupt_shadow = 0

    def interrupt_shadow(self, vcpu: Vcpu) -> int:
        """What a client has set is known; of the guest's own, STI is taken to be the cause."""
        if not vcpu.cpu.interrupt_shadow:
            return 0
        return KVM_X86_SHADOW_INT_MOV_SS if vcpu.arch.mov_ss_rip == vcpu.cpu.rip else KVM_X86_SHADOW_INT_STI

    def shutdown(self, vcpu: Vcpu) -> None:
        """The registers stay as they were at the triple fault."""

    # ---- entry checks -------------------------------------------------------------------------------

    def entry_failure(self, vcpu: Vcpu) -> int:
        ok = self._control_ok(vcpu) and self._rip_rflags_ok(vcpu) and self._segments_ok(vcpu)
        return 0 if ok else VMX_EXIT_INVALID_STATE

    @staticmethod
    def _control_ok(vcpu: Vcpu) -> bool:
        """SDM 27.3.1.1: CR0 (PE and PG are free), CR4, CR3, EFER, DR7."""
        cpu = vcpu.cpu
        cr0, cr4, efer = cpu.cr0, cpu.cr4, cpu.efer
        if cr0 >> 32 or (cr0 & X.CR0_PG and not cr0 & X.CR0_PE) or cr4 & ~regs.CR4_KNOWN:
            return False
        lma = bool(efer & X.EFER_LMA)
        if cr0 & X.CR0_PG and lma != bool(efer & X.EFER_LME):
            return False
        return not (lma and not (cr0 & X.CR0_PG and cr4 & X.CR4_PAE)) and not effective_dr7(vcpu) >> 32

    @staticmethod
    def _rip_rflags_ok(vcpu: Vcpu) -> bool:
        """SDM 27.3.1.4."""
        cpu = vcpu.cpu
        rflags, rip = cpu.rflags, cpu.rip
        if rflags & RFLAGS_RESERVED or not rflags & 2:
            return False
        lma = cpu.efer & X.EFER_LMA
        if rflags & X86_EFLAGS_VM and (lma or not cpu.cr0 & X.CR0_PE):
            return False
        interrupt = vcpu.arch.interrupt
        if interrupt.injected and not vcpu.arch.exception.injected and not rflags & X86_EFLAGS_IF:
            return False
        if lma and cpu.segment(SEG_CS)[3] & L:
            return rip >> 47 in (0, 0x1FFFF)
        return not rip >> 32

    def _segments_ok(self, vcpu: Vcpu) -> bool:
        """SDM 27.3.1.2."""
        cpu = vcpu.cpu
        if cpu.rflags & X86_EFLAGS_VM:
            return all(self._vm86_ok(*cpu.segment(i)) for i in range(6))
        cs, ss = cpu.segment(SEG_CS), cpu.segment(SEG_SS)
        lma = bool(cpu.efer & X.EFER_LMA)
        if not self._cs_ok(cs, ss, lma, bool(cpu.cr0 & X.CR0_PE)) or not self._ss_ok(ss, cs, bool(cpu.cr0 & X.CR0_PE)):
            return False
        if not all(self._data_ok(*cpu.segment(i)) for i in (SEG_DS, SEG_ES, SEG_FS, SEG_GS)):
            return False
        return self._tr_ok(*cpu.segment(SEG_TR), lma=lma) and self._ldtr_ok(*cpu.segment(SEG_LDTR))

    @staticmethod
    def _limit_ok(limit: int, attrib: int) -> bool:
        """G must agree with the limit: low bits all ones where set, high bits zero where clear."""
        return not (limit & 0xFFF != 0xFFF and attrib & G) and not (limit >> 20 and not attrib & G)

    @staticmethod
    def _vm86_ok(selector: int, base: int, limit: int, attrib: int) -> bool:
        return base == selector << 4 and limit == 0xFFFF and attrib & 0xFF == 0xF3

    def _cs_ok(self, cs: tuple[int, int, int, int], ss: tuple[int, int, int, int], lma: bool, protected: bool) -> bool:
        _, base, limit, attrib = cs
        kind, dpl, ss_dpl = attrib & 0xF, (attrib & DPL) >> 5, (ss[3] & DPL) >> 5
        if not attrib & P or not attrib & S or base >> 32 or not self._limit_ok(limit, attrib):
            return False
        if kind == 3:                       # real mode code with unrestricted guest
            return dpl == 0 and not (lma and attrib & L and attrib & DB)
        if kind not in _CODE_TYPES or (kind in (9, 11) and protected and dpl != ss_dpl) or (
                kind in (13, 15) and dpl > ss_dpl):
            return False
        return not (lma and attrib & L and attrib & DB)

    def _ss_ok(self, ss: tuple[int, int, int, int], cs: tuple[int, int, int, int], protected: bool) -> bool:
        _, base, limit, attrib = ss
        if not protected and attrib & DPL:
            return False
        if not attrib & P:
            return True
        return bool(attrib & 0xF in (3, 7) and attrib & S and not base >> 32 and self._limit_ok(limit, attrib))

    def _data_ok(self, selector: int, base: int, limit: int, attrib: int) -> bool:
        if not attrib & P:
            return True
        kind = attrib & 0xF
        if not attrib & S or not kind & 1 or (kind & 8 and not kind & 2):
            return False
        return self._limit_ok(limit, attrib)

    def _tr_ok(self, selector: int, base: int, limit: int, attrib: int, *, lma: bool) -> bool:
        if not attrib & P or attrib & S or selector & 4 or not self._limit_ok(limit, attrib):
            return False
        return attrib & 0xF == 11 or (attrib & 0xF == 3 and not lma)

    def _ldtr_ok(self, selector: int, base: int, limit: int, attrib: int) -> bool:
        if not attrib & P:
            return True
        return attrib & 0xF == 2 and not attrib & S and not selector & 4 and self._limit_ok(limit, attrib)
