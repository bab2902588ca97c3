# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUID: what is offered, how a table answers, and the ioctls' checks."""

import errno
import struct
from dataclasses import replace

import pytest
from fake_client import ARG, FakeMemory

from kvmfs.abi import cpuid as C
from kvmfs.errors import KvmError
from kvmfs.kvm import cpuid_supported as offer
from kvmfs.kvm.cpuid import (
    CpuidEntry,
    CpuidTable,
    check_emulated_padding,
    get_cpuid2,
    load_cpuid,
    load_cpuid2,
    set_cpuid,
    store_entries,
)

INDEXED = 1
STATE = {"has_run": False, "osxsave": False, "apic_enabled": True, "xcr0": 1}


def errno_of(call, *args, **kwargs):
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    return caught.value.errno


def vendor_entry(name, highest):
    ebx, edx, ecx = struct.unpack("<3I", name)
    return CpuidEntry(0, 0, 0, highest, ebx, ecx, edx)


# ---- what is offered ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_leaves_come_in_the_kernels_order(vendor):
    entries = offer.supported(vendor)
    leaves = list(dict.fromkeys(e.function for e in entries))
    assert leaves == [*range(0xE), *range(0x80000000, 0x80000009), 0x40000000, 0x40000001]
    assert len({(e.function, e.index) for e in entries}) == len(entries)
    assert entries[0].eax == 0xD and len(entries) <= 256
    for entry in entries:
        assert entry.flags == (INDEXED if entry.function in offer.INDEXED_LEAVES else 0)


@pytest.mark.parametrize(("vendor", "name", "family"),
                         [("intel", b"GenuineIntel", 6), ("amd", b"AuthenticAMD", 0x17)])
def test_vendor_and_family(vendor, name, family):
    table = CpuidTable(offer.supported(vendor))
    leaf = table.find(0)
    assert struct.pack("<3I", leaf.ebx, leaf.edx, leaf.ecx) == name
    eax = table.find(1).eax
    base = eax >> 8 & 0xF
    assert (base + (eax >> 20 & 0xFF) if base == 0xF else base) == family
    assert table.amd_compatible == (vendor == "amd")
    brand = b"".join(struct.pack("<4I", *table.cpuid(0x80000002 + i, 0)) for i in range(3))
    assert b"kvmfs" in brand and len(brand.rstrip(b"\0")) < 48


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_every_offered_feature_is_seen_and_no_other(vendor):
    table = CpuidTable(offer.supported(vendor))
    for feature in offer.FEATURES[vendor]:
        assert table.has(feature)
    for name in ("AVX", "FMA", "F16C", "ERMS", "FSRM", "MWAIT", "VMX", "SVM", "PDCM", "PCID", "VME",
                 "TSC_DEADLINE_TIMER", "OSXSAVE", "HYPERVISOR", "SPEC_CTRL", "XSAVES"):
        assert not table.has(getattr(C, f"X86_FEATURE_{name}")), name
    assert table.maxphyaddr == 40
    assert table.supported_xcr0 == 3
    assert table.kvm_base == 0x40000000
    assert table.cpuid(0x40000001, 0) == (offer.kvm_features(), 0, 0, 0)


def test_what_only_one_vendor_has():
    intel, amd = (CpuidTable(offer.supported(v)) for v in ("intel", "amd"))
    for feature in (C.X86_FEATURE_MMXEXT, C.X86_FEATURE_FXSR_OPT,
                    C.X86_FEATURE_CR8_LEGACY):
        assert amd.has(feature) and not intel.has(feature)
    assert intel.has(C.X86_FEATURE_ARCH_CAPABILITIES) and amd.has(C.X86_FEATURE_ARCH_CAPABILITIES)    # emulated
    # Intel's leaf 0x80000001 does not repeat leaf 1's bits; AMD's does.
    assert intel.find(0x80000001).edx & 1 == 0 and amd.find(0x80000001).edx & 1
    assert amd.find(0x80000001).edx & 1 << 11 and intel.find(0x80000001).edx & 1 << 11
    # Linux counts cache leaves until one is empty.
    assert [intel.find(4, i).eax & 0x1F for i in range(5)] == [1, 2, 3, 3, 0]


def test_emulated():
    entries = offer.emulated("amd")
    assert [(e.function, e.index, e.flags) for e in entries] == [(0, 0, 0), (1, 0, 0), (7, 0, INDEXED)]
    assert entries[0].eax == 7 and entries[1].ecx == 1 << 22


# ---- a table -----------------------------------------------------------------------------------------------

def test_an_empty_table_knows_nothing():
    table = CpuidTable()
    assert table.find(0) is None
    assert table.cpuid(1, 0) == (0, 0, 0, 0)
    assert (table.maxphyaddr, table.supported_xcr0, table.kvm_base, table.amd_compatible) == (36, 0, 0, False)
    assert not table.has(C.X86_FEATURE_LM)


def test_lookup_by_index():
    table = CpuidTable([CpuidEntry(7, 0, INDEXED, 1), CpuidEntry(7, 1, INDEXED, 2), CpuidEntry(2, 0, 0, 3),
                        CpuidEntry(2, 1, 0, 4)])
    assert table.find(7, 0).eax == 1
    assert table.find(7, 1).eax == 2
    assert table.find(7, 2) is None
    assert table.find(7).eax == 1           # no index given: the first
    assert table.find(2, 77).eax == 3       # not indexed: any, and the first of duplicates


def test_out_of_range_on_intel_is_the_highest_basic_leaf():
    table = CpuidTable([vendor_entry(b"GenuineIntel", 5), CpuidEntry(1, eax=0x11), CpuidEntry(5, eax=0x55),
                        CpuidEntry(0x80000000, eax=0x80000001), CpuidEntry(0x80000001, eax=0x81),
                        CpuidEntry(0x40000000, eax=0x40000001)])
    assert table.cpuid(6, 0)[0] == 0x55
    assert table.cpuid(0x3FFFFFFF, 0)[0] == 0x55
    assert table.cpuid(0x80000002, 0)[0] == 0x55
    assert table.cpuid(0x40000002, 0)[0] == 0x55
    assert table.cpuid(0x40000100, 0)[0] == 0x55    # a class without a base leaf
    assert table.cpuid(0xC0000000, 0)[0] == 0x55
    # In range without an entry: zeroes.
    assert table.cpuid(3, 0) == (0, 0, 0, 0)
    assert table.cpuid(0x40000001, 0) == (0, 0, 0, 0)
    assert table.cpuid(0x80000001, 0)[0] == 0x81


def test_out_of_range_on_intel_keeps_the_index():
    table = CpuidTable([vendor_entry(b"GenuineIntel", 0xD), CpuidEntry(0xD, 0, INDEXED, 1),
                        CpuidEntry(0xD, 1, INDEXED, 2)])
    assert table.cpuid(0x20, 1)[0] == 2
    assert table.cpuid(0x20, 5) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", [b"AuthenticAMD", b"AMDisbetter!", b"HygonGenuine"])
def test_out_of_range_on_amd_is_zero(name):
    table = CpuidTable([vendor_entry(name, 5), CpuidEntry(5, eax=0x55)])
    assert table.amd_compatible
    for leaf in (6, 0x3FFFFFFF, 0x40000000, 0x80000000, 0xC0000000):
        assert table.cpuid(leaf, 0) == (0, 0, 0, 0)


@pytest.mark.parametrize("leaf", [0xB, 0x1F])
def test_topology_of_subleaves_that_do_not_exist(leaf):
    levels = [CpuidEntry(leaf, 0, INDEXED, 1, 1, 0x100, 7), CpuidEntry(leaf, 1, INDEXED, 4, 4, 0x201, 7)]
    assert CpuidTable([vendor_entry(b"GenuineIntel", 0x1F), *levels]).cpuid(leaf, 0x305) == (0, 0, 5, 7)
    assert CpuidTable([vendor_entry(b"GenuineIntel", 0x1F), levels[0]]).cpuid(leaf, 5) == (0, 0, 0, 0)


def test_out_of_range_that_ends_in_the_topology_leaf():
    """The redirected leaf's rule for CL and EDX holds too."""
    table = CpuidTable([vendor_entry(b"GenuineIntel", 0xB), CpuidEntry(0xB, 1, INDEXED, 4, 4, 0x201, 7)])
    assert table.cpuid(0x50, 9) == (0, 0, 9, 7)


def test_maxphyaddr_needs_the_leaf_in_range():
    size = CpuidEntry(0x80000008, eax=0x3027)
    assert CpuidTable([size]).maxphyaddr == 36
    assert CpuidTable([CpuidEntry(0x80000000, eax=0x80000007), size]).maxphyaddr == 36
    assert CpuidTable([CpuidEntry(0x80000000, eax=0x80000008), size]).maxphyaddr == 0x27


def test_kvm_base_behind_hyperv():
    kvm = struct.unpack("<3I", b"KVMKVMKVM\0\0\0")
    table = CpuidTable([CpuidEntry(0x40000000, 0, 0, 0x40000005, 1, 2, 3),
                        CpuidEntry(0x40000100, 0, 0, 0x40000101, *kvm)])
    assert table.kvm_base == 0x40000100


def test_runtime_bits():
    table = CpuidTable(replace(e) for e in offer.supported("amd"))
    table.update_runtime(osxsave=True, apic_enabled=False, xcr0=3)
    assert table.has(C.X86_FEATURE_OSXSAVE) and not table.has(C.X86_FEATURE_APIC)
    assert table.find(0xD, 0).ebx == 576
    table.update_runtime(osxsave=False, apic_enabled=True, xcr0=1, mwait=True)
    assert not table.has(C.X86_FEATURE_OSXSAVE) and table.has(C.X86_FEATURE_APIC)
    assert table.has(C.X86_FEATURE_MWAIT)
    table.update_runtime(osxsave=False, apic_enabled=True, xcr0=1)
    assert table.has(C.X86_FEATURE_MWAIT)       # the quirk leaves it alone


def test_xsave_sizes_are_ours_and_not_the_clients():
    table = set_cpuid(CpuidTable(), [CpuidEntry(0xD, 0, INDEXED, 7, 9999, 9999, 0),
                                     CpuidEntry(0xD, 1, INDEXED, 2, 9999, 0, 0)], **STATE)
    assert (table.find(0xD, 0).ebx, table.find(0xD, 0).ecx) == (576, 9999)
    assert table.find(0xD, 1).ebx == 576        # XSAVEC
    assert table.supported_xcr0 == 3            # AVX, which the client gave, is not ours to give


# ---- the ioctls --------------------------------------------------------------------------------------------

def test_set_cpuid2_round_trip():
    memory = FakeMemory()
    store_entries(memory, ARG, offer.supported("intel"))
    loaded = load_cpuid2(memory, ARG, len(offer.supported("intel")))
    assert loaded == offer.supported("intel")
    table = set_cpuid(CpuidTable(), loaded, **STATE)
    assert table.entries == loaded              # at reset the runtime bits are as offered
    memory.raw[:] = bytes(len(memory.raw))
    header = get_cpuid2(table, memory, ARG, struct.pack("<II", 200, 7))
    assert header == struct.pack("<II", len(loaded), 7)
    assert load_cpuid2(memory, ARG, len(loaded)) == loaded


def test_get_cpuid2_errors():
    table = CpuidTable(offer.supported("amd"))
    count = len(table.entries)
    assert errno_of(get_cpuid2, table, FakeMemory(), ARG, struct.pack("<II", count - 1, 0)) == errno.E2BIG
    assert errno_of(get_cpuid2, table, FakeMemory(64), ARG, struct.pack("<II", count, 0)) == errno.EFAULT
    assert get_cpuid2(CpuidTable(), FakeMemory(0), ARG, struct.pack("<II", 0, 0)) == bytes(8)


@pytest.mark.parametrize(("load", "size"), [(load_cpuid, 24), (load_cpuid2, 40)])
def test_load_errors(load, size):
    assert errno_of(load, FakeMemory(0), ARG, 257) == errno.E2BIG      # before the entries are looked at
    assert errno_of(load, FakeMemory(8 + 3 * size - 1), ARG, 3) == errno.EFAULT
    assert load(FakeMemory(0), ARG, 0) == ()
    assert len(load(FakeMemory(8 + 256 * size), ARG, 256)) == 256


def test_load_cpuid_has_no_index():
    memory = FakeMemory()
    memory.write(ARG + 8, struct.pack("<6I", 7, 1, 2, 3, 4, 0xDEAD))
    assert load_cpuid(memory, ARG, 1) == (CpuidEntry(7, 0, 0, 1, 2, 3, 4),)


@pytest.mark.parametrize(("bits", "ok"),
                         [(0, True), (48, True), (57, True), (47, False), (49, False), (64, False)])
def test_linear_address_width(bits, ok):
    entries = [CpuidEntry(0x80000008, eax=bits << 8 | 40)]
    if ok:
        assert set_cpuid(CpuidTable(), entries, **STATE).entries
    else:
        assert errno_of(set_cpuid, CpuidTable(), entries, **STATE) == errno.EINVAL


def test_a_component_that_needs_permission():
    entries = [CpuidEntry(0xD, 0, INDEXED, 3 | 1 << 18)]
    assert errno_of(set_cpuid, CpuidTable(), entries, **STATE) == errno.EPERM


def test_after_the_vcpu_has_run_only_the_same_table():
    ran = STATE | {"has_run": True}
    current = set_cpuid(CpuidTable(), offer.supported("amd"), **STATE)
    assert set_cpuid(current, offer.supported("amd"), **ran) is current
    other = [replace(e) for e in offer.supported("amd")]
    other[1].ecx ^= 1
    assert errno_of(set_cpuid, current, other, **ran) == errno.EINVAL
    assert errno_of(set_cpuid, current, other[:-1], **ran) == errno.EINVAL
    # The runtime bits are brought up to date before the comparison.
    current.update_runtime(osxsave=True, apic_enabled=True, xcr0=3)
    assert set_cpuid(current, offer.supported("amd"), **(ran | {"osxsave": True, "xcr0": 3})) is current


def test_the_clients_entries_are_not_shared():
    table = set_cpuid(CpuidTable(), offer.supported("amd"), **(STATE | {"osxsave": True}))
    assert table.has(C.X86_FEATURE_OSXSAVE)
    assert not CpuidTable(offer.supported("amd")).has(C.X86_FEATURE_OSXSAVE)


def test_emulated_padding():
    memory = FakeMemory(8 + 3 * 40)
    check_emulated_padding(memory, ARG, 3)
    assert errno_of(check_emulated_padding, memory, ARG, 4) == errno.EINVAL       # not EFAULT
    memory.raw[8 + 2 * 40 + 39] = 1
    check_emulated_padding(memory, ARG, 2)
    assert errno_of(check_emulated_padding, memory, ARG, 3) == errno.EINVAL


def test_kvm_error_is_an_oserror():
    assert isinstance(KvmError(errno.E2BIG), OSError)
