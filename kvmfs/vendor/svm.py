# SPDX-License-Identifier: GPL-2.0-or-later
"""AMD's virtualization as the vendor module (Linux: arch/x86/kvm/svm/svm.c)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.abi import x86 as X
from kvmfs.abi.exits import KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI
from kvmfs.abi.structs import KvmSegment
from kvmfs.cpu.cpu import EXIT_FETCH, EXIT_UNKNOWN
from kvmfs.kvm import regs
from kvmfs.kvm.guest_debug import effective_dr7
from kvmfs.kvm.tsc import Scaling
from kvmfs.vendor import segments
from kvmfs.vendor.ops import SEG_CS, SEG_LDTR, SEG_SS, SEG_TR, KvmX86Ops

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

SVM_EXIT_NPF = 0x400
# EXITINFO1 (APM vol. 2, 15.25.6): of the final address, user.
NPF_READ, NPF_WRITE, NPF_FETCH = (1 << 32 | 1 << 2 | access for access in (0, 1 << 1, 1 << 4))
SVM_EXIT_ERR = 0xFFFFFFFF       # VMEXIT_INVALID, as kvm_run shows it: the exit code's low 32 bits
_RESET_DATA = 0x93              # present, writable, accessed
_RESET_CODE = 0x9B
_RESET_LDT, _RESET_TSS16 = 0x82, 0x83


@functools.lru_cache(maxsize=1024)
def _segment_bits(index: int, attrib: int, large: bool) -> bytes:
    """``svm_get_segment``: a VMCB has no G for CS and no "unusable", so both are made up."""
    seg = segments.from_attrib(attrib)
    seg.g = large
    if index == SEG_TR:
        seg.type |= 2
    elif index == SEG_SS:
        if seg.unusable:
            seg.db = 0
    elif index not in (SEG_CS, SEG_LDTR) and not seg.unusable:
        seg.type |= 1
    return segments.bits_of(seg)


class Svm(KvmX86Ops):
    """kvm-amd over the engine, which is SVM hardware already."""

    name, module = "amd", "svm"
    tsc_scaling = Scaling(frac_bits=32, max_ratio=(1 << 40) - 1)        # MSR C000_0104h: APM vol. 2, 15.30.5
    hypercall_bytes = b"\x0f\x01\xd9"       # VMMCALL
    passthrough_msrs = (
        M.MSR_STAR, M.MSR_LSTAR, M.MSR_CSTAR, M.MSR_SYSCALL_MASK, M.MSR_FS_BASE, M.MSR_GS_BASE,
        M.MSR_KERNEL_GS_BASE, M.MSR_IA32_SYSENTER_CS, M.MSR_IA32_SYSENTER_ESP, M.MSR_IA32_SYSENTER_EIP,
    )

    def vcpu_reset(self, vcpu: Vcpu, init_event: bool) -> None:
        cpu = vcpu.cpu
        for index in range(6):
            cpu.set_segment(index, 0, 0, 0xFFFF, _RESET_DATA)
        cpu.set_segment(SEG_CS, 0xF000, 0xFFFF0000, 0xFFFF, _RESET_CODE)
        cpu.set_segment(SEG_LDTR, 0, 0, 0xFFFF, _RESET_LDT)
        cpu.set_segment(SEG_TR, 0, 0, 0xFFFF, _RESET_TSS16)
        cpu.gdt = cpu.idt = (0, 0xFFFF)

    def segment_bits(self, index: int, attrib: int, large: bool) -> bytes:
        return _segment_bits(index, attrib, large)

    def set_segment(self, vcpu: Vcpu, index: int, segment: KvmSegment) -> None:
        vcpu.cpu.set_segment(index, segment.selector, segment.base, segment.limit, segments.to_attrib(segment))

    def entry_failure(self, vcpu: Vcpu) -> int:
        """VMRUN's consistency checks (APM vol. 2, 15.5.1)."""
        cpu = vcpu.cpu
        cr0, cr4, efer = cpu.cr0, cpu.cr4, cpu.efer
        long_paging = efer & X.EFER_LME and cr0 & X.CR0_PG
        attrib = cpu.segment(SEG_CS)[3]
        bad = (cr0 >> 32
               or cr4 & ~regs.CR4_KNOWN
               or efer & ~(regs.EFER_KNOWN | X.EFER_SVME)
               or (cpu.dr(6) | effective_dr7(vcpu)) >> 32
               or (long_paging and not cr4 & X.CR4_PAE)
               or (long_paging and not cr0 & X.CR0_PE)
               or (long_paging and attrib & segments.L and attrib & segments.DB))
        return SVM_EXIT_ERR if bad else 0

    def exit_info(self, vcpu: Vcpu) -> tuple[int, int, int, int, int]:
        """``svm_get_exit_info``; where there is no memory that is a nested page fault."""
        e = vcpu.cpu.exit
        if e.kind == EXIT_FETCH:
            return SVM_EXIT_NPF, NPF_FETCH, e.gpa, 0, 0
        if e.kind == EXIT_UNKNOWN:
            return SVM_EXIT_NPF, NPF_WRITE if e.info1 else NPF_READ, e.gpa, 0, 0
        return e.code, e.info1, e.info2, 0, 0

    def inject_irq_blocked(self, vcpu: Vcpu) -> bool:
        return False

    def interrupt_shadow(self, vcpu: Vcpu) -> int:
        """A VMCB has one bit for both."""
        return KVM_X86_SHADOW_INT_STI | KVM_X86_SHADOW_INT_MOV_SS if vcpu.cpu.interrupt_shadow else 0

    def shutdown(self, vcpu: Vcpu) -> None:
        """The VMCB is undefined after SHUTDOWN: the vCPU gets an INIT, as platforms do."""
        from kvmfs.kvm.x86 import vcpu_reset  # the machine imports its vendors

        vcpu_reset(vcpu, init_event=True)
