# SPDX-License-Identifier: GPL-2.0-or-later
"""Page tables as software walks them, and what is legal in CR3 (Linux: arch/x86/kvm/mmu, x86.c).

The guest's own accesses are translated by the CPU.  This walker serves KVM's: fetching an instruction that is
emulated, KVM_TRANSLATE, PDPTRs.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmfs.abi import x86 as X
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

PT_PRESENT, PT_PSE = 1, 1 << 7
_M64 = INVALID_GPA = (1 << 64) - 1
_ADDRESS_64 = 0x000F_FFFF_FFFF_F000
_HIGH = 0xFFFF << 48
_NX = 1 << 63
_PDPTRS = struct.Struct("<4Q")


def is_legal_cr3(vcpu: Vcpu, cr3: int) -> bool:
    """``kvm_vcpu_is_legal_cr3``: no bit beyond the physical address width."""
    return not cr3 >> vcpu.arch.cpuid.maxphyaddr


def load_pdptrs(vcpu: Vcpu, cr3: int) -> bool:
    """``load_pdptrs``: can PAE paging use the four entries at CR3?"""
    try:
        table = vcpu.vm.memslots.read(cr3 & 0xFFFFFFE0, 32)
    except KvmError:
        return False
    reserved = 0x1E6 | (_M64 << vcpu.arch.cpuid.maxphyaddr) & _M64
    if any(entry & PT_PRESENT and entry & reserved for entry in _PDPTRS.unpack(table)):
        return False
    if vcpu.arch.pdptrs is not None:
        vcpu.arch.pdptrs = None
        vcpu.cpu.set_pdptrs(None)
    return True


def pdptrs(vcpu: Vcpu) -> tuple[int, ...]:
    """The PDPTRs in force: those of KVM_SET_SREGS2 until CR3 is another, else the table in memory."""
    given, cr3 = vcpu.arch.pdptrs, vcpu.cpu.cr3
    if given is not None and given[0] == cr3:
        return given[1]
    try:
        return _PDPTRS.unpack(vcpu.vm.memslots.read(cr3 & 0xFFFFFFE0, _PDPTRS.size))
    except KvmError:
        return (0, 0, 0, 0)


def translate(vcpu: Vcpu, gva: int) -> int | None:
    """``kvm_mmu_gva_to_gpa_system``: without paging an address is its own translation, all 64 bits of it.

    The one that is INVALID_GPA means that there is none.  In long mode the bits above those that the page tables
    use are not looked at.
    """
    if not vcpu.cpu.cr0 & X.CR0_PG:
        return gva if gva != INVALID_GPA else None
    if vcpu.cpu.efer & X.EFER_LMA:
        gva = gva & (1 << 48) - 1 | (_HIGH if gva >> 47 & 1 else 0)
    return gva_to_gpa(vcpu, gva)


def gva_to_gpa(vcpu: Vcpu, gva: int) -> int | None:
    """Translate a linear address by the vCPU's mode; None where no translation exists."""
    cpu = vcpu.cpu
    if not cpu.cr0 & X.CR0_PG:
        return gva & 0xFFFFFFFF
    if cpu.efer & X.EFER_LMA:
        top = gva >> 47
        if top not in (0, 0x1FFFF):
            return None
        return _walk(vcpu, cpu.cr3 & _ADDRESS_64, gva, (39, 30, 21, 12), 8, 9)
    if cpu.cr4 & X.CR4_PAE:
        gva &= 0xFFFFFFFF
        entry = pdptrs(vcpu)[gva >> 30]
        if not entry & PT_PRESENT or _reserved_bits(vcpu, entry, 30, pae=True):
            return None
        return _walk(vcpu, entry & _ADDRESS_64, gva, (21, 12), 8, 9)
    return _walk(vcpu, cpu.cr3 & 0xFFFFF000, gva & 0xFFFFFFFF, (22, 12), 4, 10)


def _walk(vcpu: Vcpu, table: int, gva: int, shifts: tuple[int, ...], size: int, bits: int) -> int | None:
    pse, pae = size == 8 or vcpu.cpu.cr4 & X.CR4_PSE, len(shifts) < 4
    for shift in shifts:
        index = gva >> shift & ((1 << bits) - 1)
        try:
            entry = int.from_bytes(vcpu.vm.memslots.read(table + index * size, size), "little")
        except KvmError:
            return None
        if not entry & PT_PRESENT or (size == 8 and _reserved_bits(vcpu, entry, shift, pae)):
            return None
        large = shift in ((30, 21) if size == 8 else (22,)) and entry & PT_PSE and pse
        if large or shift == 12:
            mask = (1 << shift) - 1
            if size == 4 and shift == 22:      # PSE-36: bits 13-16 are address bits 32-35, for KVM the rest is reserved
                if entry & 0x3E0000:
                    return None
                base = entry & 0xFFC00000 | (entry >> 13 & 0xF) << 32
            else:
                base = entry & (_ADDRESS_64 if size == 8 else 0xFFFFF000) & ~mask
            return base | (gva & mask)
        table = entry & (_ADDRESS_64 if size == 8 else 0xFFFFF000)
    return None


def _reserved_bits(vcpu: Vcpu, entry: int, shift: int, pae: bool) -> bool:
    """``is_rsvd_bits_set`` for an entry of 8 bytes that maps ``1 << shift`` bytes."""
    reserved = (_M64 << vcpu.arch.cpuid.maxphyaddr) & _ADDRESS_64
    if shift == 30 and pae:
        return bool(entry & (reserved | 0x1E6 | 0x7FF << 52 | _NX))
    if not vcpu.cpu.efer & X.EFER_NX:
        reserved |= _NX
    if pae:
        reserved |= 0x7FF << 52
    if shift == 39:
        reserved |= PT_PSE
    elif shift > 12 and entry & PT_PSE:
        reserved |= ((1 << shift) - 1) & ~0x1FFF
    return bool(entry & reserved)


def read_virtual(vcpu: Vcpu, gva: int, size: int) -> bytes:
    """Up to ``size`` bytes at a linear address; fewer where a page is missing."""
    data = b""
    while len(data) < size:
        at = gva + len(data)
        gpa = gva_to_gpa(vcpu, at)
        take = min(size - len(data), 0x1000 - (at & 0xFFF))
        if gpa is None:
            break
        try:
            data += vcpu.vm.memslots.read(gpa, take)
        except KvmError:
            break
    return data


def write_virtual(vcpu: Vcpu, gva: int, data: bytes) -> bool:
    """Write to a linear address with the rights of the machine; False where there is no writable memory."""
    done = 0
    while done < len(data):
        gpa = gva_to_gpa(vcpu, gva + done)
        take = min(len(data) - done, 0x1000 - (gva + done & 0xFFF))
        if gpa is None:
            return False
        try:
            vcpu.vm.memslots.write(gpa, data[done:done + take])
        except KvmError:
            return False
        vcpu.vm.engine.invalidate(gpa, take)
        done += take
    return True
