# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's CPUID, and the CPUID ioctls' checks (Linux: arch/x86/kvm/cpuid.c; api.rst 4.20, 4.46, 4.47, 4.88).

What this KVM *offers* is in :mod:`kvmfs.kvm.cpuid_supported`.  Here is what a client made of it: the entries
of one vCPU, looked up as the CPUID instruction and as KVM itself look them up.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmfs.abi import cpuid as C
from kvmfs.abi.flags import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from kvmfs.abi.para import KVM_CPUID_FEATURES, KVM_FEATURE_PV_UNHALT, KVM_SIGNATURE
from kvmfs.abi.x86 import (
    KVM_MAX_CPUID_ENTRIES,
    XFEATURE_MASK_FP,
    XFEATURE_MASK_SSE,
    XSAVE_HDR_OFFSET,
    XSAVE_HDR_SIZE,
)
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import Memory

CPUID_HEADER_SIZE = 8                   # struct kvm_cpuid, kvm_cpuid2: nent, padding
SUPPORTED_XCR0 = XFEATURE_MASK_FP | XFEATURE_MASK_SSE     # all that the engine's XSAVE knows
DEFAULT_MAXPHYADDR = 36                 # of a CPU that does not say (SDM vol. 3, 5.1.4)
XFEATURE_MASK_USER_DYNAMIC = 1 << 18    # AMX tile data: only by permission

_ENTRY = struct.Struct("<6I")           # struct kvm_cpuid_entry: function eax ebx ecx edx padding
_ENTRY2 = struct.Struct("<7I12x")       # struct kvm_cpuid_entry2: function index flags eax..edx padding[3]
_HEADER = struct.Struct("<II")
_REGISTERS = ("eax", "ebx", "ecx", "edx")        # by Feature.reg
_ZERO = (0, 0, 0, 0)
_KVM_SIGNATURE = struct.unpack("<3I", KVM_SIGNATURE)
# Vendor names (EBX, EDX, ECX) of CPUs that follow AMD's rules.
_AMD_COMPATIBLE = frozenset(struct.unpack("<3I", name)
                            for name in (C.VENDOR_AMD, b"AMDisbetter!", C.VENDOR_HYGON))


@dataclass(slots=True)
class CpuidEntry:
    """``struct kvm_cpuid_entry2`` without its padding.  ``flags``: KVM_CPUID_FLAG_SIGNIFCANT_INDEX or 0."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def pack(self) -> bytes:
        """The 40 bytes of the C struct."""
        return _ENTRY2.pack(self.function, self.index, self.flags, self.eax, self.ebx, self.ecx, self.edx)

    def has(self, feature: C.Feature) -> bool:
        """Is the feature's bit set?  The caller has the right leaf and subleaf in hand."""
        return bool(getattr(self, _REGISTERS[feature.reg]) & feature.mask)

    def change(self, feature: C.Feature, on: bool) -> None:
        """Set or clear the feature's bit."""
        register = _REGISTERS[feature.reg]
        value = getattr(self, register)
        setattr(self, register, value | feature.mask if on else value & ~feature.mask)


def xstate_required_size(xcr0: int) -> int:
    """Bytes of an XSAVE area with the components of ``xcr0``.

    All of SUPPORTED_XCR0 is in the legacy region, in the standard and in the compacted format (SDM vol. 1,
    13.4).
    """
    return XSAVE_HDR_OFFSET + XSAVE_HDR_SIZE


class CpuidTable:
    """The CPUID of one vCPU: empty until the client sets it.

    What KVM asks of it often is worked out once: ``maxphyaddr`` (bits of a physical address),
    ``supported_xcr0`` (what the guest may write to XCR0), ``amd_compatible`` (the vendor is AMD or Hygon),
    ``kvm_base`` (the first leaf of KVM's own, or 0).
    """

    __slots__ = ("_by_function", "amd_compatible", "entries", "kvm_base", "maxphyaddr", "supported_xcr0")

    def __init__(self, entries: Iterable[CpuidEntry] = ()) -> None:
        self.entries = tuple(entries)
        self._by_function: dict[int, list[CpuidEntry]] = {}
        for entry in self.entries:
            self._by_function.setdefault(entry.function, []).append(entry)
        self.maxphyaddr = self._find_maxphyaddr()
        xstate = self.find(0xD, 0)
        self.supported_xcr0 = (xstate.eax | xstate.edx << 32) & SUPPORTED_XCR0 if xstate is not None else 0
        vendor = self.find(0)
        self.amd_compatible = vendor is not None and _is_amd(vendor)
        self.kvm_base = self._find_kvm_base()

    # ---- lookup -------------------------------------------------------------------------------------

    def find(self, leaf: int, subleaf: int | None = None) -> CpuidEntry | None:
        """The first entry for a leaf (``cpuid_entry2_find``).

        An entry without the significant-index flag matches every subleaf.  ``subleaf`` None: the leaf has
        none.
        """
        for entry in self._by_function.get(leaf, ()):
            if (subleaf is None or entry.index == subleaf
                    or not entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX):
                return entry
        return None

    def has(self, feature: C.Feature) -> bool:
        """``guest_cpuid_has``: does the guest see the feature?"""
        entry = self.find(feature.leaf, feature.subleaf)
        return entry is not None and entry.has(feature)

    def cpuid(self, eax: int, ecx: int) -> tuple[int, int, int, int]:
        """What the CPUID instruction gives for EAX and ECX: (eax, ebx, ecx, edx) (``kvm_cpuid``).

        Leaves out of range follow the vendor in the table: AMD has zeroes there, Intel the highest basic
        leaf.
        """
        function = eax
        entry = self.find(function, ecx)
        if entry is None:
            function, entry = self._out_of_range(function, ecx)
        if entry is not None:
            return entry.eax, entry.ebx, entry.ecx, entry.edx
        if function in (0xB, 0x1F):
            # Topology: for subleaves that do not exist CL comes back, and EDX is the x2APIC ID all the same.
            level = self.find(function, 1)
            if level is not None:
                return 0, 0, ecx & 0xFF, level.edx
        return _ZERO

    def _out_of_range(self, function: int, index: int) -> tuple[int, CpuidEntry | None]:
        """``get_out_of_range_cpuid_entry``: the leaf that answers instead, and its entry."""
        basic = self.find(0)
        if basic is None or self.amd_compatible:
            return function, None
        if 0x40000000 <= function <= 0x4FFFFFFF:
            base = self.find(function & 0xFFFFFF00)
        elif function >= 0xC0000000:
            base = self.find(0xC0000000)
        else:
            base = self.find(function & 0x80000000)
        if base is not None and function <= base.eax:
            return function, None
        return basic.eax, self.find(basic.eax, index)

    # ---- what follows the guest's state ----------------------------------------------------------------

    def update_runtime(self, *, osxsave: bool, apic_enabled: bool, xcr0: int, mwait: bool | None = None,
                       hlt_in_guest: bool = False) -> None:
        """Bring the bits that mirror the vCPU's state up to date, in place (``__kvm_update_cpuid_runtime``).

        ``osxsave``: CR4.OSXSAVE.  ``apic_enabled``: bit 11 of IA32_APIC_BASE.  ``mwait``: IA32_MISC_ENABLE's
        bit 18, None as long as KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT is in force (the default).
        """
        features = self.find(1)
        if features is not None:
            features.change(C.X86_FEATURE_OSXSAVE, osxsave)
            features.change(C.X86_FEATURE_APIC, apic_enabled)
            if mwait is not None:
                features.change(C.X86_FEATURE_MWAIT, mwait)
        xstate = self.find(0xD, 0)
        if xstate is not None:
            xstate.ebx = xstate_required_size(xcr0)
        compact = self.find(0xD, 1)
        if compact is not None and (compact.has(C.X86_FEATURE_XSAVES) or compact.has(C.X86_FEATURE_XSAVEC)):
            compact.ebx = xstate_required_size(xcr0)
        if hlt_in_guest and self.kvm_base:
            pv = self.find(self.kvm_base | KVM_CPUID_FEATURES & 0xFF)
            if pv is not None:
                pv.eax &= ~(1 << KVM_FEATURE_PV_UNHALT)

    # ---- worked out once -------------------------------------------------------------------------------

    def _find_maxphyaddr(self) -> int:
        extended = self.find(0x80000000)
        sizes = self.find(0x80000008) if extended is not None and extended.eax >= 0x80000008 else None
        return sizes.eax & 0xFF if sizes is not None else DEFAULT_MAXPHYADDR

    def _find_kvm_base(self) -> int:
        for base in range(C.CPUID_HYPERVISOR, 0x40010000, 0x100):
            entry = self.find(base)
            if entry is not None and (entry.ebx, entry.ecx, entry.edx) == _KVM_SIGNATURE:
                return base
        return 0


def _is_amd(vendor: CpuidEntry) -> bool:
    return (vendor.ebx, vendor.edx, vendor.ecx) in _AMD_COMPATIBLE


# ---- the ioctls on a vCPU ----------------------------------------------------------------------------------

def load_cpuid(memory: Memory, arg: int, nent: int) -> tuple[CpuidEntry, ...]:
    """Copy in KVM_SET_CPUID's entries, which follow the header at ``arg``.  E2BIG: over 256; EFAULT."""
    if nent > KVM_MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG)
    raw = memory.read(arg + CPUID_HEADER_SIZE, nent * _ENTRY.size) if nent else b""
    return tuple(CpuidEntry(function, 0, 0, eax, ebx, ecx, edx)
                 for function, eax, ebx, ecx, edx, _ in _ENTRY.iter_unpack(raw))


def load_cpuid2(memory: Memory, arg: int, nent: int) -> tuple[CpuidEntry, ...]:
    """Copy in KVM_SET_CPUID2's entries, which follow the header at ``arg``.  E2BIG: over 256; EFAULT."""
    if nent > KVM_MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG)
    raw = memory.read(arg + CPUID_HEADER_SIZE, nent * _ENTRY2.size) if nent else b""
    return tuple(CpuidEntry(*fields) for fields in _ENTRY2.iter_unpack(raw))


def set_cpuid(current: CpuidTable, entries: Iterable[CpuidEntry], *, has_run: bool, osxsave: bool,
              apic_enabled: bool, xcr0: int, mwait: bool | None = None, hlt_in_guest: bool = False) -> CpuidTable:
    """The table a vCPU has after KVM_SET_CPUID or SET_CPUID2 (``kvm_set_cpuid``); ``entries`` are not kept.

    EINVAL: the vCPU has run and the new table differs; or a linear address width that is not 48 or 57.
    EPERM: an XSAVE component that needs permission.
    """
    new = CpuidTable(replace(entry) for entry in entries)
    new.update_runtime(osxsave=osxsave, apic_enabled=apic_enabled, xcr0=xcr0, mwait=mwait, hlt_in_guest=hlt_in_guest)
    if has_run:
        if new.entries != current.entries:
            raise KvmError(errno.EINVAL)
        return current
    sizes = new.find(0x80000008)
    if sizes is not None and sizes.eax >> 8 & 0xFF not in (0, 48, 57):
        raise KvmError(errno.EINVAL)
    xstate = new.find(0xD, 0)
    if xstate is not None and xstate.eax & XFEATURE_MASK_USER_DYNAMIC:
        raise KvmError(errno.EPERM)
    return new


def get_cpuid2(table: CpuidTable, memory: Memory, arg: int, header: bytes | memoryview) -> bytes:
    """KVM_GET_CPUID2: write the entries after the header at ``arg``; returns the new header.

    E2BIG: its nent is too small (the client's header then stays as it is); EFAULT.
    """
    nent, padding = _HEADER.unpack(header)
    if nent < len(table.entries):
        raise KvmError(errno.E2BIG)
    store_entries(memory, arg, table.entries)
    return _HEADER.pack(len(table.entries), padding)


# ---- the ioctls on the node --------------------------------------------------------------------------------

def check_emulated_padding(memory: Memory, arg: int, nent: int) -> None:
    """KVM_GET_EMULATED_CPUID wants the padding of every entry clean: EINVAL, also where it cannot be read."""
    for i in range(nent):
        try:
            padding = memory.read(arg + CPUID_HEADER_SIZE + i * _ENTRY2.size + 28, 12)
        except OSError:
            raise KvmError(errno.EINVAL) from None
        if any(padding):
            raise KvmError(errno.EINVAL)


def store_entries(memory: Memory, arg: int, entries: Sequence[CpuidEntry]) -> None:
    """Copy out entries after the header at ``arg``.  EFAULT."""
    if entries:
        memory.write(arg + CPUID_HEADER_SIZE, b"".join(entry.pack() for entry in entries))
