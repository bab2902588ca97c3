# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's CPUID table and MSRs."""

from __future__ import annotations

import errno as E
import struct
from collections.abc import Sequence

from kvmfs.abi.ioctls import Level

from .model import Trial, buffer, case
from .system import ENTRY, HV_LEAVES, get_cpuid
from .wire import Result

VCPU = Level.VCPU
ASYNC_PF_INT = 0x4B564D06
Entry = tuple[int, ...]         # function, index, flags, eax, ebx, ecx, edx, padding


def set_cpuid2(t: Trial, vcpu: int, entries: Sequence[Entry], nent: int | None = None) -> Result:
    """KVM_SET_CPUID2."""
    body = b"".join(struct.pack("<10I", *entry) for entry in entries)
    head = struct.pack("<II", len(entries) if nent is None else nent, 0)
    return t.ioctl(vcpu, "KVM_SET_CPUID2", buffer(8 + max(len(body), ENTRY), head + body))


def set_supported_cpuid(t: Trial, vcpu: int) -> list[Entry]:
    """Give ``vcpu`` what KVM_GET_SUPPORTED_CPUID says."""
    result, entries, _ = get_cpuid(t, t.system, "KVM_GET_SUPPORTED_CPUID", 256)
    t.need("KVM_GET_SUPPORTED_CPUID", result)
    t.need("KVM_SET_CPUID2", set_cpuid2(t, vcpu, entries))
    return entries


@case("KVM_SET_CPUID2", VCPU, "round trip", "EXT_CPUID")
def cpuid2(t: Trial) -> None:
    entries = set_supported_cpuid(t, t.vcpu)
    result, again, _ = get_cpuid(t, t.vcpu, "KVM_GET_CPUID2", 256)
    t.need("get", result)
    t.equal("as many", len(again) - len(entries), 0)
    # Leaf 1 (OSXSAVE, APIC), 7 and 0xd follow the vCPU's state.
    fixed = [entry for entry in entries if entry[0] not in (1, 7, 0xD)]
    t.equal("the same leaves", [entry for entry in again if entry[0] not in (1, 7, 0xD)] == fixed, True)


@case("KVM_SET_CPUID2", VCPU, "errors", "EXT_CPUID")
def cpuid2_errors(t: Trial) -> None:
    vcpu = t.vcpu
    t.ok("an empty table", set_cpuid2(t, vcpu, ()))
    t.errno("257 entries", set_cpuid2(t, vcpu, [(i, 0, 0, 0, 0, 0, 0, 0, 0, 0) for i in range(257)]), E.E2BIG)
    t.errno("2^32-1 entries", set_cpuid2(t, vcpu, (), nent=0xFFFFFFFF), E.E2BIG)
    t.errno("a linear address width that is neither 48 nor 57", set_cpuid2(
        t, vcpu, [(0x80000008, 0, 0, 47 << 8 | 40, 0, 0, 0, 0, 0, 0)]), E.EINVAL)
    t.ok("48", set_cpuid2(t, vcpu, [(0x80000008, 0, 0, 48 << 8 | 40, 0, 0, 0, 0, 0, 0)]))
    t.errno("the entries are unmapped", t.ioctl(vcpu, "KVM_SET_CPUID2", t.before_hole(struct.pack("<II", 1, 0))), E.EFAULT)


@case("KVM_GET_CPUID2", VCPU, "room", "EXT_CPUID")
def get_cpuid2(t: Trial) -> None:
    name, vcpu = "KVM_GET_CPUID2", t.vcpu
    result, _, nent = get_cpuid(t, vcpu, name, 4)
    t.ok("before any was set", result)
    t.equal("it is empty", nent, 0)
    t.need("three entries", set_cpuid2(t, vcpu, [(i, 0, 0, i, 2, 3, 4, 0, 0, 0) for i in (0, 2, 4)]))
    result, _, nent = get_cpuid(t, vcpu, name, 2)
    t.errno("room for two", result, E.E2BIG)
    t.note("nent then", nent)
    result, entries, nent = get_cpuid(t, vcpu, name, 3)
    t.ok("room for three", result)
    t.equal("the entries", [entry[:4] for entry in entries], [(0, 0, 0, 0), (2, 0, 0, 2), (4, 0, 0, 4)])
    t.ok("more room", get_cpuid(t, vcpu, name, 300)[0])


@case("KVM_SET_CPUID", VCPU, "the old struct")
def set_cpuid(t: Trial) -> None:
    vcpu, name = t.vcpu, "KVM_SET_CPUID"
    body = b"".join(struct.pack("<6I", leaf, 0x11, 0x22, 0x33, 0x44, 0xFFFFFFFF) for leaf in (0, 2))
    t.need("two entries", t.ioctl(vcpu, name, buffer(8 + len(body), struct.pack("<II", 2, 0) + body)))
    result, entries, _ = get_cpuid(t, vcpu, "KVM_GET_CPUID2", 8)
    t.need("get", result)
    t.equal("index, flags and padding are 0", entries, [(leaf, 0, 0, 0x11, 0x22, 0x33, 0x44, 0, 0, 0) for leaf in (0, 2)])
    t.errno("257 entries", t.ioctl(vcpu, name, buffer(8 + 24 * 257, struct.pack("<II", 257, 0))), E.E2BIG)
    t.ok("none", t.ioctl(vcpu, name, buffer(8)))


@case("KVM_GET_SUPPORTED_HV_CPUID", VCPU, "entries", "HYPERV_CPUID")
def hv_cpuid(t: Trial) -> None:
    name = "KVM_GET_SUPPORTED_HV_CPUID"
    result, entries, nent = get_cpuid(t, t.vcpu, name, 64)
    t.need("64 entries of room", result)
    t.errno("one too few", get_cpuid(t, t.vcpu, name, nent - 1)[0], E.E2BIG)
    t.equal("the leaves", [hex(entry[0]) for entry in entries], [hex(leaf) for leaf in HV_LEAVES])


# ---- MSRs ---------------------------------------------------------------------------------------------------


def msrs(t: Trial, vcpu: int, name: str, entries: Sequence[tuple[int, int]], nmsrs: int | None = None) -> tuple[Result, list[int]]:
    """KVM_GET_MSRS or KVM_SET_MSRS; the values afterwards."""
    body = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in entries)
    data = buffer(8 + max(16, len(body)), struct.pack("<II", len(entries) if nmsrs is None else nmsrs, 0) + body)
    result = t.ioctl(vcpu, name, data)
    return result, [struct.unpack_from("<Q", data, 16 + 16 * i)[0] for i in range(len(entries))]


@case("KVM_GET_MSRS", VCPU, "every listed one")
def get_every_msr(t: Trial) -> None:
    """The list is true: what KVM_GET_MSR_INDEX_LIST names can be read, and the value written back."""
    if t.has("IRQCHIP"):
        t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    set_supported_cpuid(t, t.vcpu)
    listed = buffer(4 + 4 * 1024, struct.pack("<I", 1024))
    t.need("the list", t.ioctl(t.system, "KVM_GET_MSR_INDEX_LIST", listed))
    count, = struct.unpack_from("<I", listed)
    for index in struct.unpack_from(f"<{count}I", listed, 4):
        result, values = msrs(t, t.vcpu, "KVM_GET_MSRS", [(index, 0)])
        if result.value != 1:
            t.equal(f"read {index:#x}", result.value, 1)
            continue
        result, _ = msrs(t, t.vcpu, "KVM_SET_MSRS", [(index, values[0])])
        # Page-ready interrupts need an in-kernel APIC.
        if result.value != 1 and (index != ASYNC_PF_INT or t.has("IRQCHIP")):
            t.equal(f"write back {index:#x}", result.value, 1)
    t.true("there are some", count > 10, count)


@case("KVM_GET_MSRS", VCPU, "counts and errors")
def get_msrs(t: Trial) -> None:
    vcpu, name = t.vcpu, "KVM_GET_MSRS"
    t.ok("none", msrs(t, vcpu, name, [])[0], 0)
    t.errno("256 entries", msrs(t, vcpu, name, [(0x10, 0)] * 256)[0], E.E2BIG)
    t.ok("255 entries", msrs(t, vcpu, name, [(0x10, 0)] * 255)[0], 255)
    result, values = msrs(t, vcpu, name, [(0x174, 5), (0xDEAD0000, 6), (0x174, 7)])
    t.ok("stops at the first unknown one", result, 1)
    t.equal("the failed one is 0, those after it stay", values[1:], [0, 7])
    t.ok("an unknown one alone", msrs(t, vcpu, name, [(0xDEAD0000, 0)])[0], 0)
    t.errno("the entries are unmapped", t.ioctl(vcpu, name, t.before_hole(struct.pack("<II", 1, 0))), E.EFAULT)
    t.errno("the count is looked at before", t.ioctl(vcpu, name, t.before_hole(struct.pack("<II", 300, 0))), E.E2BIG)


# Index, a value that is taken as it is, a value that is refused or None.
_PLAIN: tuple[tuple[str, int, int, int | None], ...] = (
    ("SYSENTER_CS", 0x174, 0x10, None), ("SYSENTER_ESP", 0x175, 0x1000, None), ("SYSENTER_EIP", 0x176, 0x2000, None),
    ("STAR", 0xC0000081, 0x0023001000000000, None), ("LSTAR", 0xC0000082, 0xFFFFFFFF81000000, 1 << 60),
    ("CSTAR", 0xC0000083, 0xFFFFFFFF81000100, 1 << 60), ("SYSCALL_MASK", 0xC0000084, 0x47700, None),
    ("KERNEL_GS_BASE", 0xC0000102, 0x7FFF00001000, 1 << 60), ("FS_BASE", 0xC0000100, 0x123000, 1 << 60),
    ("GS_BASE", 0xC0000101, 0x456000, 1 << 60), ("PAT", 0x277, 0x0007040600070406, 0x02), ("EFER", 0xC0000080, 1, 1 << 9),
    ("MTRR_DEF_TYPE", 0x2FF, 0xC06, 0x02), ("MTRR_PHYS_BASE0", 0x200, 0x80000006, None),
    ("MTRR_FIX64K", 0x250, 0x0606060606060606, 2),
)


@case("KVM_SET_MSRS", VCPU, "round trip", "EXT_CPUID")
def set_msrs(t: Trial) -> None:
    vcpu = t.vcpu
    set_supported_cpuid(t, vcpu)
    for label, index, value, bad in _PLAIN:
        result, _ = msrs(t, vcpu, "KVM_SET_MSRS", [(index, value)])
        t.ok(f"{label}: write", result, 1)
        result, values = msrs(t, vcpu, "KVM_GET_MSRS", [(index, 0)])
        t.ok(f"{label}: read", result, 1)
        t.equal(f"{label}: value", values[0], value)
        if bad is not None:
            t.ok(f"{label}: {bad:#x} is refused", msrs(t, vcpu, "KVM_SET_MSRS", [(index, bad)])[0], 0)
            t.equal(f"{label}: and changes nothing", msrs(t, vcpu, "KVM_GET_MSRS", [(index, 0)])[1][0], value)


@case("KVM_SET_MSRS", VCPU, "counts and errors")
def set_msrs_errors(t: Trial) -> None:
    vcpu, name = t.vcpu, "KVM_SET_MSRS"
    t.ok("none", msrs(t, vcpu, name, [])[0], 0)
    t.errno("256 entries", msrs(t, vcpu, name, [(0x174, 0)] * 256)[0], E.E2BIG)
    t.ok("stops at the first unknown one", msrs(t, vcpu, name, [(0x174, 8), (0xDEAD0000, 0), (0x174, 16)])[0], 1)
    t.equal("what came before was written", msrs(t, vcpu, "KVM_GET_MSRS", [(0x174, 0)])[1][0], 8)
    t.errno("far too many, no entry", msrs(t, vcpu, name, [], nmsrs=0xFFFFFFFF)[0], E.E2BIG)


@case("KVM_SET_MSRS", VCPU, "tsc")
def set_tsc(t: Trial) -> None:
    vcpu = t.vcpu
    t.ok("write", msrs(t, vcpu, "KVM_SET_MSRS", [(0x10, 10**15)])[0], 1)
    first = msrs(t, vcpu, "KVM_GET_MSRS", [(0x10, 0)])[1][0]
    second = msrs(t, vcpu, "KVM_GET_MSRS", [(0x10, 0)])[1][0]
    t.true("it goes on from there", 10**15 <= first < second < 10**15 + 10**12)
