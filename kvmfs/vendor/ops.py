# SPDX-License-Identifier: GPL-2.0-or-later
"""What a vendor module provides: the part of Linux's ``struct kvm_x86_ops`` that this KVM needs.

``svm`` and ``vmx`` run guests on the same engine, which behaves like SVM hardware.  They differ in what a
client and a guest can see: CPUID and MSRs, the form of segment state, what makes an entry fail and how that is
reported, what SHUTDOWN leaves behind, which instructions exit.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from kvmfs.abi.msrs import MSR_CSTAR, MSR_IA32_CR_PAT, MSR_TSC_AUX
from kvmfs.abi.structs import KvmSegment
from kvmfs.abi.x86 import CR4_PCIDE, CR4_VMXE, X86_EFLAGS_IF
from kvmfs.vendor import segments

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm
    from kvmfs.kvm.tsc import Scaling

# Intercept numbers are bits of the VMCB's intercept vectors (APM vol. 2, 15.9 and table B-1).
INTERCEPT_VINTR = 4
INTERCEPT_RDPMC = 15
INTERCEPT_CPUID = 18
INTERCEPT_INVD = 22
INTERCEPT_HLT = 24
INTERCEPT_INVLPGA = 26
INTERCEPT_IOIO_PROT = 27
INTERCEPT_MSR_PROT = 28
INTERCEPT_SHUTDOWN = 31
INTERCEPT_VMRUN = 32
INTERCEPT_VMMCALL = 33
INTERCEPT_VMLOAD = 34
INTERCEPT_VMSAVE = 35
INTERCEPT_STGI = 36
INTERCEPT_CLGI = 37
INTERCEPT_SKINIT = 38
INTERCEPT_WBINVD = 41
INTERCEPT_MONITOR = 42
INTERCEPT_MWAIT = 43
INTERCEPT_XSETBV = 45

COMMON_INTERCEPTS = (
    INTERCEPT_RDPMC, INTERCEPT_CPUID, INTERCEPT_INVD, INTERCEPT_HLT, INTERCEPT_INVLPGA,
    INTERCEPT_MSR_PROT, INTERCEPT_SHUTDOWN, INTERCEPT_VMRUN, INTERCEPT_VMMCALL, INTERCEPT_VMLOAD,
    INTERCEPT_VMSAVE, INTERCEPT_STGI, INTERCEPT_CLGI, INTERCEPT_SKINIT, INTERCEPT_WBINVD,
    INTERCEPT_MONITOR, INTERCEPT_MWAIT, INTERCEPT_XSETBV,
)

# Segment indices, in the order of the hardware's encoding, then the two system segments.
LARGE_LIMIT = 0xFFFFF           # the last limit that needs no granularity bit
SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_LDTR, SEG_TR = range(8)


class KvmX86Ops(abc.ABC):
    """One vendor's half of the machine."""

    name: str                   # "amd" or "intel": what --vendor takes
    module: str                 # "svm" or "vmx": the kernel module's name
    tsc_scaling: Scaling

    # ---- load time ----------------------------------------------------------------------------------

    def hardware_setup(self) -> None:
        """Find what this host's engine can do.  Raises OSError with the reason when it cannot be used."""

    # ---- life of a vCPU -----------------------------------------------------------------------------

    def vcpu_precreate(self, vm: Vm) -> None:
        """A vCPU is about to be created in ``vm``; may refuse with KvmError."""

    def vcpu_create(self, vcpu: Vcpu) -> None:
        """Set up what stays for the vCPU's life: intercepts and the MSRs that need none."""
        vcpu.cpu.set_intercept(*COMMON_INTERCEPTS)
        vcpu.cpu.set_register_intercepts(cr_write=1 << 0 | 1 << 4 | 1 << 8)
        for msr in self.passthrough_msrs:
            # Writes exit: the engine would take an address that is not canonical.
            vcpu.cpu.msr_passthrough(msr, True, False)
        for msr in (MSR_IA32_CR_PAT, MSR_TSC_AUX, *(() if MSR_CSTAR in self.passthrough_msrs else (MSR_CSTAR,))):
            vcpu.cpu.msr_passthrough(msr, False, False)

    passthrough_msrs: tuple[int, ...] = ()

    def vcpu_reset(self, vcpu: Vcpu, init_event: bool) -> None:
        """Registers that only this vendor's reset touches (SDM 10.1.1, APM 14.1.3)."""

    def vcpu_load(self, vcpu: Vcpu) -> None:
        """The vCPU's thread starts to run it: a time slice begins."""

    def vcpu_put(self, vcpu: Vcpu) -> None:
        """The time slice ends."""

    # ---- register state -----------------------------------------------------------------------------

    def set_pdptrs(self, vcpu: Vcpu, pdptrs: tuple[int, ...]) -> None:
        """PAE paging's four entries from the client.  With nested paging AMD's CPUs have no place for them (APM 15.25.10)."""

    @abc.abstractmethod
    def segment_bits(self, index: int, attrib: int, large: bool) -> bytes:
        """A segment register's bits as this vendor's KVM shows them: struct kvm_segment from ``type`` on.

        ``attrib``: the VMCB's 12 bits; ``large``: the limit is above 1 MiB.
        """

    def get_segment(self, vcpu: Vcpu, index: int) -> KvmSegment:
        """A segment register in the form this vendor's KVM shows it."""
        selector, base, limit, attrib = vcpu.cpu.segment(index)
        bits = self.segment_bits(index, attrib, limit > LARGE_LIMIT)
        return KvmSegment.from_buffer_copy(segments.SEGMENT.pack(base, limit, selector, bits))

    @abc.abstractmethod
    def set_segment(self, vcpu: Vcpu, index: int, segment: KvmSegment) -> None:
        """Load a segment register from a client's description."""

    def get_cpl(self, vcpu: Vcpu) -> int:
        """The current privilege level, 0-3."""
        attrib: int = vcpu.cpu.segment(SEG_SS)[3]
        return attrib >> 5 & 3

    def get_if_flag(self, vcpu: Vcpu) -> bool:
        return bool(vcpu.cpu.rflags & X86_EFLAGS_IF)

    def is_valid_cr0(self, vcpu: Vcpu, cr0: int) -> bool:
        return True

    def is_valid_cr4(self, vcpu: Vcpu, cr4: int) -> bool:
        return True

    cr4_vendor_reserved = CR4_VMXE | CR4_PCIDE

    # ---- entry and exit -----------------------------------------------------------------------------

    @abc.abstractmethod
    def entry_failure(self, vcpu: Vcpu) -> int:
        """0 when the guest's state can be entered, else the hardware's failure reason for FAIL_ENTRY."""

    @abc.abstractmethod
    def exit_info(self, vcpu: Vcpu) -> tuple[int, int, int, int, int]:
        """The last exit as this hardware tells it: reason, two words about it, event and error code under way."""

    @abc.abstractmethod
    def inject_irq_blocked(self, vcpu: Vcpu) -> bool:
        """Does this hardware refuse to enter with an external interrupt when IF is clear?"""

    def prepare_debugged_entry(self, vcpu: Vcpu) -> None:
        """What an entry needs while KVM_SET_GUEST_DEBUG is in force."""

    @abc.abstractmethod
    def interrupt_shadow(self, vcpu: Vcpu) -> int:
        """``get_interrupt_shadow``: KVM_X86_SHADOW_INT_STI and _MOV_SS as this hardware tells them apart."""

    @abc.abstractmethod
    def shutdown(self, vcpu: Vcpu) -> None:
        """A triple fault is about to be reported: what it leaves in the registers."""

    hypercall_bytes: bytes      # the vendor's own VMMCALL or VMCALL
