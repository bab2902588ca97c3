# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers as a client reads and writes them, and control registers as anybody writes them.

Linux: arch/x86/kvm/regs.c.  Writers return False where the guest's instruction would raise #GP.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi import x86 as X
from kvmfs.abi.exits import KVM_GUESTDBG_SINGLESTEP, KVM_SREGS2_FLAGS_PDPTRS_VALID
from kvmfs.abi.structs import KvmSregs, KvmSregs2
from kvmfs.errors import KvmError
from kvmfs.kvm import events, mmu
from kvmfs.kvm.msrs import apic_base_valid
from kvmfs.vendor.ops import LARGE_LIMIT, SEG_CS, SEG_DS, SEG_ES, SEG_FS, SEG_GS, SEG_LDTR, SEG_SS, SEG_TR

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

M64 = (1 << 64) - 1
M32 = (1 << 32) - 1
X86_EFLAGS_FIXED = 2
CR0_RESERVED_BITS = M64 & ~(X.CR0_PE | X.CR0_MP | X.CR0_EM | X.CR0_TS | X.CR0_ET | X.CR0_NE | X.CR0_WP
                            | X.CR0_AM | X.CR0_NW | X.CR0_CD | X.CR0_PG)
CR8_RESERVED_BITS = M64 & ~0xF
CR4_KNOWN = (X.CR4_VME | X.CR4_PVI | X.CR4_TSD | X.CR4_DE | X.CR4_PSE | X.CR4_PAE | X.CR4_MCE | X.CR4_PGE
             | X.CR4_PCE | X.CR4_OSFXSR | X.CR4_OSXMMEXCPT | X.CR4_FSGSBASE | X.CR4_OSXSAVE
             | X.CR4_SMEP | X.CR4_SMAP)
# CR4 bits that belong to a CPUID feature: (leaf, subleaf, register, bit, CR4 bits).
_CR4_FEATURES = (
    (1, 0, "ecx", 26, X.CR4_OSXSAVE),
    (7, 0, "ebx", 0, X.CR4_FSGSBASE),
    (7, 0, "ebx", 7, X.CR4_SMEP),
    (7, 0, "ebx", 20, X.CR4_SMAP),
)
CR0_PDPTR_BITS = X.CR0_CD | X.CR0_NW | X.CR0_PG
CR4_PDPTR_BITS = X.CR4_PGE | X.CR4_PSE | X.CR4_PAE | X.CR4_SMEP
EFER_KNOWN = X.EFER_SCE | X.EFER_LME | X.EFER_LMA | X.EFER_NX | X.EFER_FFXSR

# What struct kvm_sregs and struct kvm_sregs2 have in common: eight segments, GDT, IDT, cr0 cr2 cr3 cr4 cr8 efer apic_base.
_SREGS_COMMON = struct.Struct("<" + 8 * "QIH10s" + 2 * "QH6x" + "7Q")
_SREGS2_TAIL = struct.Struct("<5Q")     # flags, pdptrs
_INTERRUPT_BITMAP_SIZE = 256 // 8
_REGS = struct.Struct("<18Q")   # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags


# ---- general registers -----------------------------------------------------------------------------------

def get_regs(vcpu: Vcpu) -> bytes:
    """KVM_GET_REGS (api.rst 4.11): a struct kvm_regs."""
    cpu = vcpu.cpu
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *rest = cpu.get_gprs()
    return _REGS.pack(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *rest, cpu.rip, get_rflags(vcpu))


def set_regs(vcpu: Vcpu, data: bytes | memoryview) -> None:
    """KVM_SET_REGS (api.rst 4.12) from a struct kvm_regs.  A pending exception is dropped."""
    cpu = vcpu.cpu
    _note_rip(vcpu)
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *rest, rip, rflags = _REGS.unpack(data)
    cpu.set_gprs((rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *rest))
    cpu.rip = rip
    set_rflags(vcpu, rflags | X86_EFLAGS_FIXED)
    vcpu.arch.exception.pending = False
    vcpu.arch.event_request = vcpu.arch.entry_check = True


def _note_rip(vcpu: Vcpu) -> None:
    """The client is about to change registers: note where an I/O instruction waits to be completed."""
    arch = vcpu.arch
    if arch.complete_userspace_io is not None and arch.pio_linear_rip is None:
        arch.pio_linear_rip = linear_rip(vcpu)


def linear_rip(vcpu: Vcpu) -> int:
    """``kvm_get_linear_rip``."""
    cpu = vcpu.cpu
    if is_64_bit_mode(vcpu):
        return int(cpu.rip)
    return int(cpu.segment(SEG_CS)[1] + cpu.rip) & M32


def get_rflags(vcpu: Vcpu) -> int:
    """``kvm_get_rflags``: RFLAGS without the TF of a debugger that single-steps the guest."""
    rflags = int(vcpu.cpu.rflags)
    return rflags & ~X.X86_EFLAGS_TF if vcpu.arch.guest_debug & KVM_GUESTDBG_SINGLESTEP else rflags


def set_rflags(vcpu: Vcpu, rflags: int) -> None:
    """``kvm_set_rflags``: the debugger's TF comes in where the guest is still where it was to be stepped."""
    arch = vcpu.arch
    if arch.guest_debug & KVM_GUESTDBG_SINGLESTEP and linear_rip(vcpu) == arch.singlestep_rip:
        rflags |= X.X86_EFLAGS_TF
    vcpu.cpu.rflags = rflags
    arch.event_request = True


# ---- modes -----------------------------------------------------------------------------------------------

def is_paging(vcpu: Vcpu) -> bool:
    return bool(vcpu.cpu.cr0 & X.CR0_PG)


def is_long_mode(vcpu: Vcpu) -> bool:
    return bool(vcpu.cpu.efer & X.EFER_LMA)


def is_64_bit_mode(vcpu: Vcpu) -> bool:
    return bool(vcpu.cpu.efer & X.EFER_LMA and vcpu.cpu.segment(SEG_CS)[3] & 1 << 9)


def is_pae_paging(vcpu: Vcpu) -> bool:
    cpu = vcpu.cpu
    return bool(cpu.cr0 & X.CR0_PG and cpu.cr4 & X.CR4_PAE and not cpu.efer & X.EFER_LMA)


# ---- control registers -----------------------------------------------------------------------------------

def is_valid_cr0(vcpu: Vcpu, cr0: int) -> bool:
    if cr0 >> 32 or (cr0 & X.CR0_NW and not cr0 & X.CR0_CD) or (cr0 & X.CR0_PG and not cr0 & X.CR0_PE):
        return False
    return vcpu.vm.vendor.is_valid_cr0(vcpu, cr0)


def cr4_guest_reserved(vcpu: Vcpu) -> int:
    """CR4 bits that this vCPU's CPUID does not have (``vcpu->arch.cr4_guest_rsvd_bits``).

    Before the client sets one, all that KVM knows may be set.
    """
    reserved = M64 & ~CR4_KNOWN
    if not vcpu.arch.cpuid_set:
        return reserved
    for leaf, subleaf, register, bit, bits in _CR4_FEATURES:
        entry = vcpu.arch.cpuid.find(leaf, subleaf)
        if entry is None or not getattr(entry, register) >> bit & 1:
            reserved |= bits
    return reserved


def is_valid_cr4(vcpu: Vcpu, cr4: int) -> bool:
    return not cr4 & cr4_guest_reserved(vcpu) and vcpu.vm.vendor.is_valid_cr4(vcpu, cr4)


def valid_efer(vcpu: Vcpu, efer: int) -> bool:
    """``kvm_valid_efer``: no unknown bits, and none that the vCPU's CPUID does not have."""
    if efer & ~EFER_KNOWN:
        return False
    entry = vcpu.arch.cpuid.find(0x80000001, 0)
    ecx_edx = entry.edx if entry is not None else 0
    needs = ((X.EFER_FFXSR, 25), (X.EFER_LME | X.EFER_LMA, 29), (X.EFER_NX, 20))
    return not any(efer & bits and not ecx_edx >> bit & 1 for bits, bit in needs)


def _load_cr0(vcpu: Vcpu, cr0: int) -> None:
    """The vendor's set_cr0: LMA follows PG where LME is set."""
    cpu = vcpu.cpu
    if cpu.efer & X.EFER_LME:
        if cr0 & X.CR0_PG and not is_paging(vcpu):
            cpu.efer |= X.EFER_LMA
        elif not cr0 & X.CR0_PG and is_paging(vcpu):
            cpu.efer &= ~X.EFER_LMA
    cpu.cr0 = cr0


def set_cr0(vcpu: Vcpu, cr0: int) -> bool:
    """``kvm_set_cr0``."""
    cpu = vcpu.cpu
    old = cpu.cr0
    if not is_valid_cr0(vcpu, cr0):
        return False
    cr0 = (cr0 | X.CR0_ET) & ~CR0_RESERVED_BITS
    if cpu.efer & X.EFER_LME and not old & X.CR0_PG and cr0 & X.CR0_PG and (
            not cpu.cr4 & X.CR4_PAE or cpu.segment(SEG_CS)[3] & 1 << 9):
        return False
    if (not cpu.efer & X.EFER_LME and cr0 & X.CR0_PG and cpu.cr4 & X.CR4_PAE and (cr0 ^ old) & CR0_PDPTR_BITS
            and not mmu.load_pdptrs(vcpu, cpu.cr3)):
        return False
    if not cr0 & X.CR0_PG and is_64_bit_mode(vcpu):
        return False
    _load_cr0(vcpu, cr0)
    cpu.commit_state()
    return True


def set_cr3(vcpu: Vcpu, cr3: int) -> bool:
    """``kvm_set_cr3``."""
    if not mmu.is_legal_cr3(vcpu, cr3) or (is_pae_paging(vcpu) and not mmu.load_pdptrs(vcpu, cr3)):
        return False
    vcpu.cpu.cr3 = cr3
    vcpu.cpu.commit_state()
    return True


def set_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """``kvm_set_cr4``."""
    cpu = vcpu.cpu
    old = cpu.cr4
    if not is_valid_cr4(vcpu, cr4):
        return False
    if is_long_mode(vcpu):
        if not cr4 & X.CR4_PAE:
            return False
    elif (is_paging(vcpu) and cr4 & X.CR4_PAE and (cr4 ^ old) & CR4_PDPTR_BITS
            and not mmu.load_pdptrs(vcpu, cpu.cr3)):
        return False
    cpu.cr4 = cr4
    cpu.commit_state()
    if (cr4 ^ old) & X.CR4_OSXSAVE:
        vcpu.arch.cpuid_changed = True
    return True


def set_cr8(vcpu: Vcpu, cr8: int) -> bool:
    """``kvm_set_cr8``."""
    if cr8 & CR8_RESERVED_BITS:
        return False
    apic = vcpu.arch.apic
    if apic is None:
        vcpu.cpu.cr8 = cr8
    else:
        with apic.chip.lock:
            apic.set_tpr(cr8 << 4)
    return True


def set_efer(vcpu: Vcpu, efer: int, *, host_initiated: bool) -> bool:
    """``set_efer``: a write of MSR_EFER; LMA keeps its value."""
    cpu = vcpu.cpu
    if efer & ~EFER_KNOWN:
        return False
    if not host_initiated and (not valid_efer(vcpu, efer)
                               or (is_paging(vcpu) and (cpu.efer ^ efer) & X.EFER_LME)):
        return False
    cpu.efer = (efer & ~X.EFER_LMA) | (cpu.efer & X.EFER_LMA)
    cpu.commit_state()
    return True


def set_apic_base(vcpu: Vcpu, value: int) -> bool:
    """``kvm_apic_set_base`` by the client."""
    arch = vcpu.arch
    if not apic_base_valid(arch.apic_base, value, arch.cpuid, host_initiated=True):
        return False
    if arch.apic is not None:
        arch.apic.set_base(value)
    elif value != arch.apic_base:
        arch.apic_base, arch.cpuid_changed = value, True
    return True


# ---- special registers -----------------------------------------------------------------------------------

_SEGMENTS = (("cs", SEG_CS), ("ds", SEG_DS), ("es", SEG_ES), ("fs", SEG_FS), ("gs", SEG_GS), ("ss", SEG_SS),
             ("tr", SEG_TR), ("ldt", SEG_LDTR))


def get_sregs(vcpu: Vcpu) -> bytes:
    """KVM_GET_SREGS (api.rst 4.13): a struct kvm_sregs."""
    interrupt = vcpu.arch.interrupt
    bitmap = 1 << interrupt.nr if interrupt.injected and not interrupt.soft else 0
    return _sregs_common(vcpu) + bitmap.to_bytes(_INTERRUPT_BITMAP_SIZE, "little")


def get_sregs2(vcpu: Vcpu) -> bytes:
    """KVM_GET_SREGS2 (api.rst 4.131): a struct kvm_sregs2, with PAE paging also the four PDPTRs."""
    pae = is_pae_paging(vcpu)
    pdptrs = mmu.pdptrs(vcpu) if pae else (0, 0, 0, 0)
    return _sregs_common(vcpu) + _SREGS2_TAIL.pack(KVM_SREGS2_FLAGS_PDPTRS_VALID if pae else 0, *pdptrs)


def _sregs_common(vcpu: Vcpu) -> bytes:
    cpu, bits_of = vcpu.cpu, vcpu.vm.vendor.segment_bits
    events.payload_quirk(vcpu)
    segments = cpu.segments()
    shown: list[int | bytes] = []
    for _, index in _SEGMENTS:
        selector, base, limit, attrib = segments[index]
        shown += base, limit, selector, bits_of(index, attrib, limit > LARGE_LIMIT)
    gdt, gdt_limit, idt, idt_limit, cr0, _, cr2, cr3, cr4 = cpu.tables_and_crs()
    return _SREGS_COMMON.pack(*shown, gdt, gdt_limit & 0xFFFF, idt, idt_limit & 0xFFFF, cr0, cr2, cr3, cr4, cpu.cr8, cpu.efer,
                              vcpu.arch.apic_base)


def is_valid_sregs(vcpu: Vcpu, sregs: KvmSregs | KvmSregs2) -> bool:
    """``kvm_is_valid_sregs``."""
    if sregs.efer & X.EFER_LME and sregs.cr0 & X.CR0_PG:
        if not sregs.cr4 & X.CR4_PAE or not sregs.efer & X.EFER_LMA or not mmu.is_legal_cr3(vcpu, sregs.cr3):
            return False
    elif sregs.efer & X.EFER_LMA or sregs.cs.l:
        return False
    return (is_valid_cr4(vcpu, sregs.cr4) and is_valid_cr0(vcpu, sregs.cr0) and valid_efer(vcpu, sregs.efer))


def set_sregs(vcpu: Vcpu, sregs: KvmSregs) -> None:
    """KVM_SET_SREGS (api.rst 4.14).  EINVAL: control registers that cannot be together, or the APIC base."""
    _set_sregs_common(vcpu, sregs, update_pdptrs=True)
    for word, bits in enumerate(sregs.interrupt_bitmap):
        if bits:
            events.queue_interrupt(vcpu, word * 64 + ((bits & -bits).bit_length() - 1))
            break


def set_sregs2(vcpu: Vcpu, sregs: KvmSregs2) -> None:
    """KVM_SET_SREGS2 (api.rst 4.132).

    EINVAL: as KVM_SET_SREGS, unknown flags, or PDPTRs without PAE paging.  Intel's guests use the PDPTRs until
    they load others from memory; AMD's CPUs walk the table in memory, whatever is given here.
    """
    valid_pdptrs = bool(sregs.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID)
    pae = bool(sregs.cr0 & X.CR0_PG and sregs.cr4 & X.CR4_PAE and not sregs.efer & X.EFER_LMA)
    if sregs.flags & ~KVM_SREGS2_FLAGS_PDPTRS_VALID or (valid_pdptrs and not pae):
        raise KvmError(errno.EINVAL)
    _set_sregs_common(vcpu, sregs, update_pdptrs=not valid_pdptrs)
    if valid_pdptrs:
        vcpu.arch.pdptrs = (vcpu.cpu.cr3, tuple(sregs.pdptrs))
        vcpu.vm.vendor.set_pdptrs(vcpu, tuple(sregs.pdptrs))


def _set_sregs_common(vcpu: Vcpu, sregs: KvmSregs | KvmSregs2, *, update_pdptrs: bool) -> None:
    if not is_valid_sregs(vcpu, sregs) or not set_apic_base(vcpu, sregs.apic_base):
        raise KvmError(errno.EINVAL)
    cpu, vendor = vcpu.cpu, vcpu.vm.vendor
    _note_rip(vcpu)
    old_cr4 = cpu.cr4
    cpu.idt = (sregs.idt.base, sregs.idt.limit)
    cpu.gdt = (sregs.gdt.base, sregs.gdt.limit)
    cpu.cr2, cpu.cr3, cpu.efer = sregs.cr2, sregs.cr3, sregs.efer
    _load_cr0(vcpu, sregs.cr0)
    cpu.cr4 = sregs.cr4
    for name, index in _SEGMENTS:
        vendor.set_segment(vcpu, index, getattr(sregs, name))
    set_cr8(vcpu, sregs.cr8)
    cpu.commit_state()
    if update_pdptrs and is_pae_paging(vcpu):
        mmu.load_pdptrs(vcpu, cpu.cr3)
    if (old_cr4 ^ sregs.cr4) & X.CR4_OSXSAVE:
        vcpu.arch.cpuid_changed = True
    vcpu.arch.entry_check = True
    if (vcpu.vcpu_id == vcpu.vm.arch.bsp_vcpu_id and cpu.rip == 0xFFF0 and sregs.cs.selector == 0xF000
            and sregs.cs.base == 0xFFFF0000 and not sregs.cr0 & X.CR0_PE):
        vcpu.arch.mp_state = 0
