# SPDX-License-Identifier: GPL-2.0-or-later
"""MSRs: the lists are true, and writes are refused where Linux's KVM refuses them."""

import errno
import struct

import pytest
from fake_client import ARG, FakeMemory

from kvmfs.abi import cpuid as C
from kvmfs.abi import msrs as M
from kvmfs.kvm import cpuid_supported, msr_lists, mtrr
from kvmfs.kvm.cpuid import CpuidEntry, CpuidTable
from kvmfs.kvm.msrs import CPU_STATE_MSRS, HV_MSRS, M64, PV_MSRS, MsrFile, apic_base_valid, canonical

NON_CANONICAL = 1 << 47
GUEST = {"host_initiated": False}
HOST = {"host_initiated": True}


class FakeCpu:
    """The MSRs in CPU state, as plain values."""

    def __init__(self):
        self.values = dict.fromkeys(CPU_STATE_MSRS, 0) | {M.MSR_IA32_APICBASE: 0xFEE00900,
                                                          M.MSR_IA32_TSC: 1000}

    def read(self, index):
        return self.values[index]

    def write(self, index, value, host_initiated):
        self.values[index] = value
        return True

    def adjust_tsc(self, delta):
        self.values[M.MSR_IA32_TSC] = self.values[M.MSR_IA32_TSC] + delta & M64


class FakePv:
    """KVM's own MSRs, as plain values."""

    def __init__(self):
        self.values = dict.fromkeys(PV_MSRS, 0)

    def has(self, index):
        return True

    def read(self, index):
        return self.values[index]

    def write(self, index, value, host_initiated):
        self.values[index] = value
        return True


def make(vendor, table=None):
    cpu = FakeCpu()
    if table is None:
        table = CpuidTable(cpuid_supported.supported(vendor))
    return MsrFile(vendor, lambda: table, cpu, pv=FakePv()), cpu


def bare(vendor, *features):
    """An MSR file whose guest has just these features, and the vendor's name."""
    entries = {}
    for feature in features:
        entry = entries.setdefault((feature.leaf, feature.subleaf),
                                   CpuidEntry(feature.leaf, feature.subleaf, 1))
        entry.change(feature, True)
    name = C.VENDOR_AMD if vendor == "amd" else C.VENDOR_INTEL
    ebx, edx, ecx = struct.unpack("<3I", name)
    return make(vendor, CpuidTable([CpuidEntry(0, 0, 0, 1, ebx, ecx, edx), *entries.values()]))


@pytest.fixture(params=["intel", "amd"])
def vendor(request):
    return request.param


@pytest.fixture
def msrs(vendor):
    return make(vendor)[0]


def check(msrs, index, value, ok, read=None, **who):
    """Write ``value``: taken or refused, as ``ok`` says, and then read as ``read`` or as that implies."""
    before = msrs.get(index, **HOST)
    assert msrs.set(index, value, **who) is ok
    assert msrs.get(index, **HOST) == (read if read is not None else value if ok else before)


# ---- the lists ---------------------------------------------------------------------------------------------

def test_every_listed_msr_can_be_read_and_written_back(vendor, msrs):
    listed = msr_lists.index_list(vendor)
    assert len(set(listed)) == len(listed)
    for index in listed:
        if index in HV_MSRS:
            continue                        # test_kvm_hyperv.py
        value = msrs.get(index, **HOST)
        assert value is not None, hex(index)
        assert msrs.set(index, value, **HOST), hex(index)
        assert msrs.get(index, **HOST) == value, hex(index)


def test_every_cpu_state_msr_goes_to_the_cpu(vendor):
    msrs, cpu = make(vendor)
    for index in CPU_STATE_MSRS:
        value = 0xFEE00900 if index == M.MSR_IA32_APICBASE else 0x12345
        assert msrs.set(index, value, **HOST), hex(index)
        assert cpu.values[index] == value
        assert msrs.get(index, **HOST) == value


def test_feature_msrs(vendor, msrs):
    for index, value in msr_lists.FEATURE_VALUES[vendor].items():
        assert msr_lists.get_feature_msr(vendor, index) == value
        assert msrs.get(index, **HOST) is not None
        assert msrs.set(index, value, **HOST)       # a client copies them from the node to the vCPU
    assert msr_lists.get_feature_msr(vendor, M.MSR_STAR) == 0      # listed, but no feature
    assert msr_lists.get_feature_msr(vendor, 0x12345) is None


def test_vendors_own():
    assert M.MSR_IA32_FEAT_CTL in msr_lists.index_list("intel")
    assert M.MSR_VM_HSAVE_PA in msr_lists.index_list("amd")
    for vendor, other in (("intel", "amd"), ("amd", "intel")):
        msrs, _ = make(vendor)
        mine, others = (set(msr_lists.index_list(v)) for v in (vendor, other))
        for index in others - mine - {M.MSR_VM_HSAVE_PA}:
            assert msrs.get(index, **HOST) is None, hex(index)
            assert not msrs.set(index, 0, **HOST), hex(index)
            assert not msrs.set(index, 0, **GUEST), hex(index)


@pytest.mark.parametrize("index",
                         [0x12345, M.MSR_IA32_SMBASE, M.MSR_IA32_SPEC_CTRL, M.MSR_KVM_MIGRATION_CONTROL,
                                   M.MSR_CORE_PERF_GLOBAL_CTRL, M.MSR_IA32_VMX_BASIC, 0x800, 0x40000000])
def test_unknown_msrs(msrs, index):
    for who in (HOST, GUEST):
        assert msrs.get(index, **who) is None
        assert not msrs.set(index, 0, **who)


# ---- addresses ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("index",
                         [M.MSR_FS_BASE, M.MSR_GS_BASE, M.MSR_KERNEL_GS_BASE, M.MSR_LSTAR, M.MSR_CSTAR])
def test_non_canonical_addresses_are_refused(msrs, index):
    check(msrs, index, NON_CANONICAL, False, **GUEST)
    check(msrs, index, NON_CANONICAL, False, **HOST)
    check(msrs, index, 0xFFFF800000000000, True, **GUEST)
    check(msrs, index, (1 << 47) - 1, True, **GUEST)


@pytest.mark.parametrize("index", [M.MSR_IA32_SYSENTER_ESP, M.MSR_IA32_SYSENTER_EIP])
def test_sysenter_addresses(index):
    intel, amd = make("intel")[0], make("amd")[0]
    check(intel, index, NON_CANONICAL | 5, True, canonical(NON_CANONICAL | 5), **GUEST)
    check(amd, index, 0xFFFF812345678, True, 0x12345678, **GUEST)
    # An AMD machine whose guest believes in an Intel keeps the high half.
    check(make("amd", CpuidTable(cpuid_supported.supported("intel")))[0], index, 0x712345678, True, **GUEST)


def test_canonical():
    assert canonical(1 << 47) == 0xFFFF800000000000
    assert canonical((1 << 47) - 1) == (1 << 47) - 1
    assert canonical(0xFFFF000000000000) == 0


def test_tsc_aux():
    intel, amd = make("intel")[0], make("amd")[0]
    check(intel, M.MSR_TSC_AUX, 1 << 32, False, **HOST)
    check(amd, M.MSR_TSC_AUX, 1 << 32 | 7, True, 7, **GUEST)
    assert not bare("intel")[0].set(M.MSR_TSC_AUX, 1, **GUEST)
    assert bare("intel")[0].set(M.MSR_TSC_AUX, 1, **HOST)
    assert bare("intel", C.X86_FEATURE_RDPID)[0].set(M.MSR_TSC_AUX, 1, **GUEST)


@pytest.mark.parametrize(("old", "new", "guest", "host"), [
    (0xFEE00900, 0xFEE00800, True, True),
    (0xFEE00900, 0x100, True, True),                # off
    (0xFEE00900, 0xFEE00400, False, False),         # x2APIC without enable
    (0xFEE00900, 0xFEE00D00, True, True),           # x2APIC
    (0xFEE00900, 0xFEE00901, False, False),
    (0xFEE00900, 1 << 40 | 0x900, False, False),    # beyond 40 bits
    (0xFEE00900, 1 << 39 | 0x900, True, True),
])
def test_apic_base(old, new, guest, host):
    table = CpuidTable(cpuid_supported.supported("amd"))
    assert apic_base_valid(old, new, table, False) is guest
    assert apic_base_valid(old, new, table, True) is host
    msrs, cpu = make("amd")
    cpu.values[M.MSR_IA32_APICBASE] = old
    check(msrs, M.MSR_IA32_APICBASE, new, guest, **GUEST)


def test_x2apic_transitions():
    entry = CpuidEntry(1)
    entry.change(C.X86_FEATURE_X2APIC, True)
    table = CpuidTable([entry])
    x2apic, xapic, off = 0xFEE00C00, 0xFEE00800, 0xFEE00000
    for old, new, guest in ((xapic, x2apic, True), (x2apic, xapic, False), (off, x2apic, False),
                            (x2apic, off, True)):
        assert apic_base_valid(old, new, table, False) is guest
        assert apic_base_valid(old, new, table, True)
    assert not apic_base_valid(xapic, x2apic, CpuidTable([CpuidEntry(1)]), True)     # not in the guest's CPUID


# ---- time --------------------------------------------------------------------------------------------------

def test_tsc_written_by_the_guest_shows_in_tsc_adjust(vendor):
    msrs, cpu = make(vendor)
    assert msrs.set(M.MSR_IA32_TSC, 400, **GUEST)
    assert cpu.values[M.MSR_IA32_TSC] == 400
    assert msrs.get(M.MSR_IA32_TSC_ADJUST, **GUEST) == -600 & M64
    assert msrs.set(M.MSR_IA32_TSC_ADJUST, 0, **GUEST)
    assert cpu.values[M.MSR_IA32_TSC] == 1000


def test_tsc_written_by_the_client_does_not(vendor):
    msrs, cpu = make(vendor)
    assert msrs.set(M.MSR_IA32_TSC, 400, **HOST)
    assert msrs.get(M.MSR_IA32_TSC_ADJUST, **HOST) == 0
    assert msrs.set(M.MSR_IA32_TSC_ADJUST, 77, **HOST)
    assert cpu.values[M.MSR_IA32_TSC] == 400


def test_tsc_adjust_without_the_feature_is_dropped():
    msrs, cpu = bare("intel")
    check(msrs, M.MSR_IA32_TSC_ADJUST, 5, True, 0, **GUEST)
    assert cpu.values[M.MSR_IA32_TSC] == 1000


def test_tsc_ratio():
    msrs, _ = make("amd")
    check(msrs, M.MSR_AMD64_TSC_RATIO, 0, True, 1 << 32, **HOST)
    check(msrs, M.MSR_AMD64_TSC_RATIO, 2 << 32, False, **HOST)
    assert msrs.get(M.MSR_AMD64_TSC_RATIO, **GUEST) is None
    assert not msrs.set(M.MSR_AMD64_TSC_RATIO, 1 << 32, **GUEST)


# ---- memory types ------------------------------------------------------------------------------------------

def test_pat(msrs):
    assert msrs.get(M.MSR_IA32_CR_PAT, **GUEST) == 0x0007040600070406
    check(msrs, M.MSR_IA32_CR_PAT, 0x0001040500070406, True, **GUEST)
    for bad in (2, 3, 8, 0x80, 0xFF << 56):
        check(msrs, M.MSR_IA32_CR_PAT, bad, False, **HOST)


@pytest.mark.parametrize(("index", "value", "ok"), [
    (M.MSR_MTRRdefType, 0xC06, True), (M.MSR_MTRRdefType, 0x1006, False), (M.MSR_MTRRdefType, 0xC02, False),
    (M.MSR_MTRRdefType, 0xC07, False), (M.MSR_MTRRdefType, 0xC16, False),
    (M.MSR_MTRRfix64K_00000, 0x0606060606060606, True), (M.MSR_MTRRfix64K_00000, 0x0606060602060606, False),
    (M.MSR_MTRRfix4K_F8000, 0x0504010006060606, True),
    (0x200, 0xC0000006, True), (0x200, 0xC0000106, False), (0x200, 0xC0000002, False), (0x200, 1 << 40,
                                                                                        False),
    (0x201, 0xFFC0000800, True), (0x201, 0xFFC0000400, False), (0x201, 1 << 40, False),
    (0x20F, 0, True),
])
def test_mtrr(msrs, index, value, ok):
    check(msrs, index, value, ok, **GUEST)
    check(msrs, index, value, ok, **HOST)


def test_mtrr_limits(msrs):
    assert msrs.get(M.MSR_MTRRcap, **GUEST) == 0x508
    for index in (0x210, 0x24F, 0x251):
        assert msrs.get(index, **HOST) is None and not msrs.set(index, 0, **HOST)
    assert not msrs.set(M.MSR_MTRRcap, 0x508, **GUEST)
    assert len(mtrr.ALL_MSRS) == 16 + 11 + 1


# ---- machine checks ----------------------------------------------------------------------------------------

def test_machine_check_banks(msrs):
    assert msrs.get(M.MSR_IA32_MCG_CAP, **GUEST) == 32
    assert not msrs.set(M.MSR_IA32_MCG_CAP, 32, **HOST)
    check(msrs, M.MSR_IA32_MCG_STATUS, 5, True, **GUEST)
    check(msrs, 0x400, M64, True, **GUEST)
    check(msrs, 0x400, M64 ^ 1 << 10, True, **GUEST)
    check(msrs, 0x400, 6, False, **GUEST)
    check(msrs, 0x401, 1, False, **GUEST)           # MCi_STATUS
    check(msrs, 0x401, 1, True, **HOST)
    check(msrs, 0x401, 0, True, **GUEST)
    check(msrs, 0x402, 0x1234, True, **GUEST)
    check(msrs, 0x47F, 1, True, **GUEST)
    assert msrs.get(0x480, **HOST) is None


def test_fewer_banks(msrs):
    msrs.mcg_cap = 10
    assert msrs.get(0x427, **HOST) == 0
    assert msrs.get(0x428, **HOST) is None and not msrs.set(0x428, 0, **HOST)
    assert msrs.get(0x289, **HOST) == 0
    assert msrs.get(0x28A, **HOST) is None and not msrs.set(0x28A, 0, **HOST)


def test_mci_status_on_amd_follows_hwcr():
    msrs, _ = make("amd")
    assert not msrs.set(0x401, 1, **GUEST)
    assert msrs.set(M.MSR_K7_HWCR, 1 << 18, **GUEST)
    assert msrs.set(0x401, 1, **GUEST)
    msrs, _ = make("intel")
    assert msrs.set(M.MSR_K7_HWCR, 1 << 18, **GUEST)
    assert not msrs.set(0x401, 1, **GUEST)


def test_mcg_ctl_needs_its_capability(msrs):
    assert msrs.get(M.MSR_IA32_MCG_CTL, **GUEST) is None
    assert msrs.set(M.MSR_IA32_MCG_CTL, 0, **HOST) and not msrs.set(M.MSR_IA32_MCG_CTL, 0, **GUEST)
    msrs.mcg_cap |= M.MCG_CTL_P
    check(msrs, M.MSR_IA32_MCG_CTL, M64, True, **GUEST)
    check(msrs, M.MSR_IA32_MCG_CTL, 1, False, **HOST)


def test_mci_ctl2_needs_cmci(msrs):
    assert msrs.get(0x280, **GUEST) is None and msrs.get(0x280, **HOST) == 0
    assert not msrs.set(0x280, 0, **GUEST) and not msrs.set(0x280, 1, **HOST) and msrs.set(0x280, 0, **HOST)
    msrs.mcg_cap |= M.MCG_CMCI_P
    check(msrs, 0x280, 1 << 30 | 0x7FFF, True, **GUEST)
    check(msrs, 0x280, 1 << 31, False, **GUEST)


def test_mcg_ext_ctl():
    msrs, _ = make("intel")
    assert msrs.get(M.MSR_IA32_MCG_EXT_CTL, **GUEST) is None
    check(msrs, M.MSR_IA32_MCG_EXT_CTL, 1, True, **HOST)
    check(msrs, M.MSR_IA32_MCG_EXT_CTL, 2, False, **HOST)
    assert msrs.set(M.MSR_IA32_FEAT_CTL, M.FEAT_CTL_LMCE_ENABLED | M.FEAT_CTL_LOCKED, **HOST)
    check(msrs, M.MSR_IA32_MCG_EXT_CTL, 0, True, **GUEST)


# ---- control -----------------------------------------------------------------------------------------------

def test_misc_enable(msrs):
    assert msrs.get(M.MSR_IA32_MISC_ENABLE, **GUEST) == 0x1800
    check(msrs, M.MSR_IA32_MISC_ENABLE, 0x1801, True, **GUEST)
    check(msrs, M.MSR_IA32_MISC_ENABLE, 0x1000, False, **GUEST)
    check(msrs, M.MSR_IA32_MISC_ENABLE, 0x1880, True, 0x1800, **GUEST)      # EMON is read-only, not a fault
    check(msrs, M.MSR_IA32_MISC_ENABLE, 0x81, True, **HOST)


def test_cpuid_fault(msrs):
    assert msrs.get(M.MSR_PLATFORM_INFO, **GUEST) == 1 << 31
    assert not msrs.set(M.MSR_PLATFORM_INFO, 0, **GUEST)
    check(msrs, M.MSR_MISC_FEATURES_ENABLES, 2, False, **GUEST)
    assert not msrs.cpuid_fault_enabled
    check(msrs, M.MSR_MISC_FEATURES_ENABLES, 1, True, **GUEST)
    assert msrs.cpuid_fault_enabled
    check(msrs, M.MSR_PLATFORM_INFO, 0, False, **HOST)                       # in use
    check(msrs, M.MSR_MISC_FEATURES_ENABLES, 0, True, **GUEST)
    check(msrs, M.MSR_PLATFORM_INFO, 0, True, **HOST)
    check(msrs, M.MSR_MISC_FEATURES_ENABLES, 1, False, **GUEST)


def test_hwcr(msrs):
    check(msrs, M.MSR_K7_HWCR, 0x148, True, 0, **GUEST)
    check(msrs, M.MSR_K7_HWCR, 1 << 18 | 1 << 24, True, **GUEST)
    check(msrs, M.MSR_K7_HWCR, 1, False, **HOST)


def test_ucode_rev(vendor, msrs):
    value = 1 << 32 if vendor == "intel" else 0x01000065
    check(msrs, M.MSR_IA32_UCODE_REV, 5, True, value, **GUEST)      # dropped
    check(msrs, M.MSR_IA32_UCODE_REV, 5, True, **HOST)
    assert msrs.set(M.MSR_IA32_UCODE_WRITE, 5, **GUEST)


def test_arch_capabilities():
    msrs, _ = make("intel")
    check(msrs, M.MSR_IA32_ARCH_CAPABILITIES, 1, False, **GUEST)
    check(msrs, M.MSR_IA32_ARCH_CAPABILITIES, 1, True, **HOST)
    assert msrs.get(M.MSR_IA32_ARCH_CAPABILITIES, **GUEST) == 1
    assert bare("intel")[0].get(M.MSR_IA32_ARCH_CAPABILITIES, **GUEST) is None


def test_feat_ctl():
    msrs, _ = make("intel")
    check(msrs, M.MSR_IA32_FEAT_CTL, 4, False, **GUEST)
    check(msrs, M.MSR_IA32_FEAT_CTL, 1, True, **GUEST)
    check(msrs, M.MSR_IA32_FEAT_CTL, 1, False, **GUEST)            # locked
    check(msrs, M.MSR_IA32_FEAT_CTL, 0x100007, True, **HOST)
    check(msrs, M.MSR_IA32_FEAT_CTL, 0x100, False, **HOST)


def test_debugctl():
    intel, amd = make("intel")[0], make("amd")[0]
    check(intel, M.MSR_IA32_DEBUGCTLMSR, 3, True, 0, **GUEST)
    check(intel, M.MSR_IA32_DEBUGCTLMSR, 4, False, **GUEST)
    check(amd, M.MSR_IA32_DEBUGCTLMSR, M64, True, 0, **GUEST)


def test_hsave_pa():
    amd, intel = make("amd")[0], make("intel")[0]
    check(amd, M.MSR_VM_HSAVE_PA, 0x12345000, True, **GUEST)
    check(amd, M.MSR_VM_HSAVE_PA, 0x12345001, False, **GUEST)
    check(amd, M.MSR_VM_HSAVE_PA, 1 << 40, False, **GUEST)
    check(amd, M.MSR_VM_HSAVE_PA, 0x12345678, True, 0x12345000, **HOST)
    check(intel, M.MSR_VM_HSAVE_PA, 0x12345001, True, 0, **GUEST)   # ignored


def test_vm_cr():
    msrs, _ = make("amd")
    check(msrs, M.MSR_VM_CR, 0x20, False, **GUEST)
    check(msrs, M.MSR_VM_CR, 0x11, True, **GUEST)
    check(msrs, M.MSR_VM_CR, 0x0A, True, 0x12, **GUEST)             # SVMDIS and LOCK stay


def test_de_cfg():
    msrs, _ = make("amd")
    check(msrs, M.MSR_AMD64_DE_CFG, 2, True, **GUEST)
    check(msrs, M.MSR_AMD64_DE_CFG, 4, False, **HOST)


def test_osvw_follows_cpuid():
    msrs, _ = make("amd")
    assert msrs.get(M.MSR_AMD64_OSVW_STATUS, **HOST) is None and not msrs.set(M.MSR_AMD64_OSVW_STATUS, 0,
                                                                              **HOST)
    msrs, _ = bare("amd", C.X86_FEATURE_OSVW)
    assert msrs.get(M.MSR_AMD64_OSVW_ID_LENGTH, **GUEST) == 3
    check(msrs, M.MSR_AMD64_OSVW_STATUS, 4, True, **GUEST)


def test_perf_capabilities(msrs):
    check(msrs, M.MSR_IA32_PERF_CAPABILITIES, 1, False, **HOST)
    check(msrs, M.MSR_IA32_PERF_CAPABILITIES, 0, True, **HOST)
    assert msrs.get(M.MSR_IA32_PERF_CAPABILITIES, **GUEST) is None


def test_xss(msrs):
    assert msrs.get(M.MSR_IA32_XSS, **GUEST) is None and not msrs.set(M.MSR_IA32_XSS, 0, **GUEST)
    check(msrs, M.MSR_IA32_XSS, 0, True, **HOST)
    check(msrs, M.MSR_IA32_XSS, 1 << 8, False, **HOST)


@pytest.mark.parametrize(("index", "value"), [
    (M.MSR_IA32_PLATFORM_ID, 0), (M.MSR_K7_EVNTSEL0, 0), (M.MSR_P6_PERFCTR1, 0), (0xCD, 3),
    (M.MSR_EBC_FREQUENCY_ID, 1 << 24), (M.MSR_IA32_PERF_STATUS, 1000 | 4 << 40), (M.MSR_AMD64_NB_CFG, 0),
    (M.MSR_RAPL_POWER_UNIT, 0), (M.MSR_K7_CLK_CTL, 0x20000000),
])
def test_constants(msrs, index, value):
    assert msrs.get(index, **GUEST) == value
    msrs.set(index, 0x55, **GUEST)
    assert msrs.get(index, **GUEST) == value


def test_legacy_pmu_writes_are_dropped_and_platform_ids_refused(msrs):
    assert msrs.set(M.MSR_K7_EVNTSEL0, 0x55, **GUEST)
    assert not msrs.set(M.MSR_IA32_PLATFORM_ID, 0, **GUEST)
    assert msrs.set(M.MSR_FAM10H_MMIO_CONF_BASE, 0, **GUEST)
    assert not msrs.set(M.MSR_FAM10H_MMIO_CONF_BASE, 1, **GUEST)


def test_efer_is_the_cpus_to_judge(vendor):
    msrs, cpu = make(vendor)
    cpu.write = lambda index, value, host_initiated: host_initiated
    assert not msrs.set(M.MSR_EFER, 1, **GUEST)
    assert msrs.set(M.MSR_EFER, 1, **HOST)


# ---- KVM_GET_MSRS, KVM_SET_MSRS ----------------------------------------------------------------------------

def fill(memory, *entries):
    for i, (index, data) in enumerate(entries):
        memory.write(ARG + 8 + 16 * i, struct.pack("<IIQ", index, 0, data))


def data_of(memory, i):
    return struct.unpack("<Q", memory.read(ARG + 16 + 16 * i, 8))[0]


def test_get_msrs_stops_at_the_first_bad_one(msrs):
    memory = FakeMemory()
    fill(memory, (M.MSR_IA32_CR_PAT, 1), (0x12345, 2), (M.MSR_IA32_CR_PAT, 3))
    assert msr_lists.get_msrs(memory, ARG, 3, lambda i: msr_lists.do_get_msr(msrs, i)) == 1
    assert [data_of(memory, i) for i in range(3)] == [0x0007040600070406, 0, 3]


def test_set_msrs_stops_at_the_first_bad_one(msrs):
    memory = FakeMemory()
    fill(memory, (M.MSR_IA32_CR_PAT, 0), (M.MSR_IA32_CR_PAT, 2), (M.MSR_IA32_CR_PAT, 6))

    def write(index, value):
        return msr_lists.do_set_msr(msrs, index, value, has_run=False)

    assert msr_lists.set_msrs(memory, ARG, 3, write) == 1
    assert msrs.get(M.MSR_IA32_CR_PAT, **HOST) == 0


@pytest.mark.parametrize("call", [msr_lists.get_msrs, msr_lists.set_msrs])
def test_msr_io_errors(call):
    def never(*_):
        raise AssertionError

    for nmsrs, size, expected in ((256, 0, errno.E2BIG), (2, 8 + 31, errno.EFAULT)):
        with pytest.raises(OSError) as caught:
            call(FakeMemory(size), ARG, nmsrs, never)
        assert caught.value.errno == expected
    assert call(FakeMemory(0), ARG, 0, never) == 0


def test_feature_msrs_are_fixed_once_the_vcpu_has_run(msrs, vendor):
    index = M.MSR_IA32_ARCH_CAPABILITIES if vendor == "intel" else M.MSR_AMD64_DE_CFG
    assert msr_lists.do_set_msr(msrs, index, 2, has_run=False)
    assert msr_lists.do_set_msr(msrs, index, 2, has_run=True)
    assert not msr_lists.do_set_msr(msrs, index, 0, has_run=True)
    assert msr_lists.do_set_msr(msrs, M.MSR_IA32_UCODE_REV, 9, has_run=True)
    assert not msr_lists.do_set_msr(msrs, M.MSR_IA32_VMX_BASIC, 0, has_run=True)
