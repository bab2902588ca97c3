# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V: CPUID, synthetic MSRs, exits, reference time; both vendors where they differ."""

import errno
import os
import struct
import time

import pytest
from fake_client import ARG
from irq_machine import APIC_ON, DONE, IrqMachine, eventually, handler
from test_kvm_enable_cap import BOTH, enable
from test_kvm_kvmclock import NS, get_clock, get_msr, set_clock, set_msr

from kvmfs.abi import caps as C
from kvmfs.abi import exits as kx
from kvmfs.abi import hyperv as H
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.kvm import hyperv, hyperv_cpuid, hyperv_tsc, msr_lists, tsc
from kvmfs.kvm.cpuid import CpuidTable
from kvmfs.kvm.cpuid_supported import supported
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import Machine

OS_ID = 0x8100 << 48
PAGE = 0x3000


def show_hyperv(vcpu, *, features=None, **changes):
    """The guest sees Hyper-V's leaves: all that are offered, or with these words of HYPERV_CPUID_FEATURES (eax, ebx, edx)."""
    entries = [e for e in supported(vcpu.vm.vendor.name) if e.function >> 28 != 4]
    for entry in hyperv_cpuid.supported(lapic=True):
        if features is not None and entry.function == H.HYPERV_CPUID_FEATURES:
            entry.eax, entry.ebx, entry.edx = features
        if entry.function == H.HYPERV_CPUID_ENLIGHTMENT_INFO:
            for name, value in changes.items():
                setattr(entry, name, value)
        entries.append(entry)
    vcpu.arch.cpuid = CpuidTable(entries)
    hyperv.after_set_cpuid(vcpu)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(tsc, "host_clock_is_tsc", lambda: True)
    made = []

    def make(*args, kind=IrqMachine, **kwargs):
        m = kind(*args, **kwargs)
        for vcpu in m.vm.vcpus:
            show_hyperv(vcpu)
        made.append(m)
        return m

    yield make
    for m in made:
        m.close()


def rdmsr(msr, to):
    return f"mov ecx, {msr:#x}; rdmsr; mov [{to:#x}], eax; mov [{to + 4:#x}], edx\n"


def wrmsr(msr, value):
    return f"mov ecx, {msr:#x}; mov eax, {value & 0xFFFFFFFF:#x}; mov edx, {value >> 32:#x}; wrmsr\n"


def u64(m, gpa):
    return struct.unpack("<Q", m.read(gpa, 8))[0]


# ---- CPUID -----------------------------------------------------------------------------------------------

@BOTH
def test_supported_cpuid(machine, vendor):
    for kind, direct in ((IrqMachine, True), (Machine, False)):
        m = machine(vendor, kind=kind)
        m.host.memory.write(ARG, bytes(8 + 16 * 40))
        assert m.vcpu_ioctl(K.KVM_GET_SUPPORTED_HV_CPUID, ARG, struct.pack("<II", 9, 0)) == (-errno.E2BIG, b"")
        assert m.vcpu_ioctl(K.KVM_GET_SUPPORTED_HV_CPUID, ARG, struct.pack("<II", 16, 0)) == (0, struct.pack("<II", 10, 0))
        raw = m.host.memory.read(ARG + 8, 400)
        leaves = {words[0]: words for words in struct.iter_unpack("<10I", raw)}
        assert [words[0] for words in struct.iter_unpack("<10I", raw)] == [
            0x40000000, 0x40000001, 0x40000002, 0x40000003, 0x40000004, 0x40000005, 0x40000080, 0x40000081, 0x40000082,
            0x4000000A]
        assert leaves[0x40000000][3:7] == (0x40000082, *struct.unpack("<3I", b"Linux KVM Hv"))
        assert leaves[0x40000001][3] == 0x31237648
        assert bool(leaves[0x40000003][6] & H.HV_STIMER_DIRECT_MODE_AVAILABLE) is direct
        assert bool(leaves[0x40000004][3] & H.HV_X64_CLUSTER_IPI_RECOMMENDED) is direct
        assert not any(words[1] or words[2] or any(words[7:]) for words in leaves.values())


@BOTH
def test_invariant_tsc_is_shown_on_demand(machine, vendor):
    m = machine(vendor, f"""
        mov eax, 0x80000007; cpuid; mov [0x3e00], edx
        {wrmsr(M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)}
        mov eax, 0x80000007; cpuid; mov [0x3e04], edx
        {DONE}""")
    m.vcpu.arch.cpuid.find(0x80000007).edx = 1 << 8
    assert m.run_within() == 0
    assert struct.unpack("<II", m.read(0x3E00, 8)) == (0, 1 << 8)
    assert get_msr(m, M.HV_X64_MSR_TSC_INVARIANT_CONTROL) == 1
    assert set_msr(m, M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 2) == 0


# ---- MSRs ------------------------------------------------------------------------------------------------

@BOTH
def test_listed_msrs_can_be_read_and_written_back(machine, vendor):
    for kind in (IrqMachine, Machine):
        m = machine(vendor, kind=kind)
        listed = [i for i in msr_lists.index_list(vendor) if 0x40000000 <= i < 0x40000200]
        assert len(listed) == 28
        for index in listed:
            value = get_msr(m, index)
            assert value is not None, hex(index)
            assert set_msr(m, index, value) == 1, hex(index)


@BOTH
def test_hypercall_page(machine, vendor):
    m = machine(vendor)
    assert set_msr(m, M.HV_X64_MSR_HYPERCALL, PAGE | 1) == 1         # nothing happens before the guest says who it is
    assert get_msr(m, M.HV_X64_MSR_HYPERCALL) == 0
    assert set_msr(m, M.HV_X64_MSR_GUEST_OS_ID, OS_ID) == 1
    assert set_msr(m, M.HV_X64_MSR_HYPERCALL, 0x40000001) == 0       # no memory there
    assert set_msr(m, M.HV_X64_MSR_HYPERCALL, PAGE | 1) == 1
    assert m.read(PAGE, 4) == {"amd": b"\x0f\x01\xd9\xc3", "intel": b"\x0f\x01\xc1\xc3"}[vendor]
    assert get_msr(m, M.HV_X64_MSR_HYPERCALL) == PAGE | 1
    assert set_msr(m, M.HV_X64_MSR_GUEST_OS_ID, 0) == 1
    assert get_msr(m, M.HV_X64_MSR_HYPERCALL) == PAGE


@BOTH
def test_a_guest_without_the_leaves_has_no_such_msrs(machine, vendor):
    """... and its client has."""
    m = machine(vendor, wrmsr(M.HV_X64_MSR_GUEST_OS_ID, OS_ID) + DONE)
    m.vcpu.arch.cpuid = CpuidTable(supported(vendor))
    hyperv.after_set_cpuid(m.vcpu)
    assert m.run_within() == 0
    assert m.reason == kx.KVM_EXIT_SHUTDOWN             # #GP, for which it has no handler
    assert set_msr(m, M.HV_X64_MSR_GUEST_OS_ID, OS_ID) == 1


@pytest.mark.parametrize(("msr", "word", "bit"), [
    (M.HV_X64_MSR_GUEST_OS_ID, 0, H.HV_MSR_HYPERCALL_AVAILABLE), (M.HV_X64_MSR_VP_INDEX, 0, H.HV_MSR_VP_INDEX_AVAILABLE),
    (M.HV_X64_MSR_VP_RUNTIME, 0, H.HV_MSR_VP_RUNTIME_AVAILABLE), (M.HV_X64_MSR_RESET, 0, H.HV_MSR_RESET_AVAILABLE),
    (M.HV_X64_MSR_TIME_REF_COUNT, 0, H.HV_MSR_TIME_REF_COUNT_AVAILABLE),
    (M.HV_X64_MSR_REFERENCE_TSC, 0, H.HV_MSR_REFERENCE_TSC_AVAILABLE),
    (M.HV_X64_MSR_TSC_FREQUENCY, 0, H.HV_ACCESS_FREQUENCY_MSRS), (M.HV_X64_MSR_ICR, 0, H.HV_MSR_APIC_ACCESS_AVAILABLE),
    (M.HV_X64_MSR_TSC_EMULATION_STATUS, 0, H.HV_ACCESS_REENLIGHTENMENT),
    (M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0, H.HV_ACCESS_TSC_INVARIANT),
    (M.HV_X64_MSR_STIMER0_CONFIG, 0, H.HV_MSR_SYNTIMER_AVAILABLE),
    (M.HV_X64_MSR_CRASH_P0, 2, H.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE),
    (M.HV_X64_MSR_SYNDBG_OPTIONS, 2, H.HV_FEATURE_DEBUG_MSRS_AVAILABLE)])
def test_enforced_cpuid(machine, msr, word, bit):
    m = machine("amd")
    assert enable(m, C.KVM_CAP_HYPERV_ENFORCE_CPUID, 1, node=VCPU_INODE) == 0
    read = m.vcpu.arch.msrs.get
    everything = [0xFFFFFFFF] * 3
    everything[word] &= ~bit
    show_hyperv(m.vcpu, features=everything)
    assert read(msr, host_initiated=False) is None
    assert read(msr, host_initiated=True) is not None
    only = [0, 0, 0]
    only[word] = bit
    show_hyperv(m.vcpu, features=only)
    assert read(msr, host_initiated=False) is not None
    assert enable(m, C.KVM_CAP_HYPERV_ENFORCE_CPUID, 0, node=VCPU_INODE) == 0
    show_hyperv(m.vcpu, features=everything)
    assert read(msr, host_initiated=False) is not None


def test_what_a_guest_may_not_write(machine):
    m = machine("amd")
    write = m.vcpu.arch.msrs.set
    for msr in (M.HV_X64_MSR_VP_INDEX, M.HV_X64_MSR_VP_RUNTIME, M.HV_X64_MSR_TIME_REF_COUNT, M.HV_X64_MSR_TSC_FREQUENCY,
                M.HV_X64_MSR_APIC_FREQUENCY, M.HV_X64_MSR_TSC_EMULATION_STATUS):
        assert not write(msr, 1, host_initiated=False)
        assert write(msr, 1, host_initiated=True)
    assert write(M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1, host_initiated=False)
    assert not write(M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0, host_initiated=False)
    assert not write(0x40000004, 0, host_initiated=True)            # no such MSR
    assert get_msr(m, M.HV_X64_MSR_EOI) is None                     # write-only


def test_values(machine):
    m = machine("intel", vcpus=2)
    assert get_msr(m, M.HV_X64_MSR_VP_INDEX, node=VCPU_INODE + 1) == 1
    assert set_msr(m, M.HV_X64_MSR_VP_INDEX, 1024) == 0
    assert set_msr(m, M.HV_X64_MSR_VP_INDEX, 7) == 1
    assert hyperv.vcpu_by_vp_index(m.vm, 7) is m.vcpu
    assert hyperv.vcpu_by_vp_index(m.vm, 0) is None
    assert get_msr(m, M.HV_X64_MSR_TSC_FREQUENCY) == tsc.tsc_khz() * 1000
    assert get_msr(m, M.HV_X64_MSR_APIC_FREQUENCY) == 10**9
    used = get_msr(m, M.HV_X64_MSR_VP_RUNTIME)
    assert get_msr(m, M.HV_X64_MSR_VP_RUNTIME) >= used > 0
    assert set_msr(m, M.HV_X64_MSR_VP_RUNTIME, 1 << 40) == 1
    assert 1 << 40 <= get_msr(m, M.HV_X64_MSR_VP_RUNTIME) < (1 << 40) + 10**8


@BOTH
def test_crash_reset_and_their_order(machine, vendor):
    m = machine(vendor, wrmsr(M.HV_X64_MSR_CRASH_P0, 0x1122) + wrmsr(M.HV_X64_MSR_CRASH_CTL, 1 << 63)
                + wrmsr(M.HV_X64_MSR_RESET, 0) + wrmsr(M.HV_X64_MSR_RESET, 1) + DONE)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_SYSTEM_EVENT)
    assert struct.unpack_from("<II", m.run_page, 32) == (kx.KVM_SYSTEM_EVENT_CRASH, 0)
    assert get_msr(m, M.HV_X64_MSR_CRASH_P0) == 0x1122
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_SYSTEM_EVENT)
    assert struct.unpack_from("<II", m.run_page, 32) == (kx.KVM_SYSTEM_EVENT_RESET, 0)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_IO)
    assert set_msr(m, M.HV_X64_MSR_CRASH_CTL, (1 << 64) - 1) == 1
    assert get_msr(m, M.HV_X64_MSR_CRASH_CTL) == 1 << 63


def test_apic_msrs(machine):
    m = machine("amd", APIC_ON + wrmsr(M.HV_X64_MSR_TPR, 0x30) + rdmsr(M.HV_X64_MSR_TPR, 0x3E00)
                + wrmsr(M.HV_X64_MSR_ICR, 0x40041) + "sti; nop; nop; cli\n"
                + rdmsr(M.HV_X64_MSR_ICR, 0x3E08) + DONE
                + handler(0x41, "pushad; " + wrmsr(M.HV_X64_MSR_EOI, 0) + "popad"))
    assert m.run_within() == 0
    assert m.count(0x41) == 1
    assert (u64(m, 0x3E00), u64(m, 0x3E08)) == (0x30, 0x40041)
    assert m.vcpu.arch.apic.isr == 0


def test_assist_page(machine):
    """Its first word is the paravirtual EOI's; the rest of the page is left alone."""
    m = machine("amd")
    m.write(PAGE, b"\xff" * 16)
    assert set_msr(m, M.HV_X64_MSR_VP_ASSIST_PAGE, 0x40000001) == 0
    assert set_msr(m, M.HV_X64_MSR_VP_ASSIST_PAGE, PAGE | 1) == 1
    assert get_msr(m, M.HV_X64_MSR_VP_ASSIST_PAGE) == PAGE | 1
    assert get_msr(m, M.MSR_KVM_PV_EOI_EN) == PAGE | 1
    assert m.read(PAGE, 8) == b"\0\0\0\0\xff\xff\xff\xff"
    assert set_msr(m, M.HV_X64_MSR_VP_ASSIST_PAGE, PAGE) == 1
    assert get_msr(m, M.MSR_KVM_PV_EOI_EN) == 0


# ---- reference time --------------------------------------------------------------------------------------

def page_time(m):
    """sequence, and the time that a guest works out now."""
    sequence, _, scale, offset = struct.unpack("<IIQQ", m.read(PAGE, 24))
    guest_tsc = tsc.rdtsc() + m.vcpu.cpu.tsc_offset & (1 << 64) - 1
    return sequence, (guest_tsc * scale >> 64) + offset & (1 << 64) - 1


@BOTH
def test_reference_time(machine, vendor):
    m = machine(vendor, rdmsr(M.HV_X64_MSR_TIME_REF_COUNT, 0x3E00) + wrmsr(M.HV_X64_MSR_REFERENCE_TSC, PAGE | 1)
                + rdmsr(M.HV_X64_MSR_TIME_REF_COUNT, 0x3E08) + DONE)
    set_clock(m, 1000 * NS)
    assert m.run_within() == 0
    assert 1000 * 10**7 <= u64(m, 0x3E00) <= u64(m, 0x3E08) + 10 < 1100 * 10**7
    assert m.vm.arch.hyperv.reference_tsc.status == hyperv_tsc.SET
    sequence, now = page_time(m)
    assert sequence == 1
    assert now == pytest.approx(get_clock(m).clock // 100, abs=10**6)
    assert get_msr(m, M.HV_X64_MSR_TIME_REF_COUNT) == pytest.approx(page_time(m)[1], abs=10**6)
    # Another clock: another sequence number.
    set_clock(m, 5000 * NS)
    m.start().stop()
    sequence, now = page_time(m)
    assert sequence == 2
    assert now == pytest.approx(5000 * 10**7, abs=10**8)
    assert set_msr(m, M.HV_X64_MSR_REFERENCE_TSC, PAGE) == 1
    assert m.vm.arch.hyperv.reference_tsc.status == hyperv_tsc.UNSET


def test_reference_page_stays_while_the_guest_emulates_its_tsc(machine):
    m = machine("amd", DONE)
    set_clock(m, NS)
    assert set_msr(m, M.HV_X64_MSR_TSC_EMULATION_CONTROL, 1) == 1
    m.write(PAGE, struct.pack("<IIQQ", 5, 0, 1 << 60, 77))
    assert set_msr(m, M.HV_X64_MSR_REFERENCE_TSC, PAGE | 1) == 1        # as after a migration
    m.start().stop()
    assert struct.unpack("<IIQQ", m.read(PAGE, 24)) == (5, 0, 1 << 60, 77)
    set_clock(m, 99 * NS)
    m.start().stop()
    assert struct.unpack("<IIQQ", m.read(PAGE, 24)) == (5, 0, 1 << 60, 77)


def test_reference_page_without_a_stable_clock(machine, monkeypatch):
    monkeypatch.setattr(tsc, "host_clock_is_tsc", lambda: False)
    m = machine("amd", DONE)
    m.write(PAGE, struct.pack("<I", 9))
    assert set_msr(m, M.HV_X64_MSR_REFERENCE_TSC, PAGE | 1) == 1
    m.start().stop()
    assert m.read(PAGE, 4) == bytes(4)
    assert m.vm.arch.hyperv.reference_tsc.status == hyperv_tsc.BROKEN


# ---- SynIC and timers ------------------------------------------------------------------------------------

SIMP, SIEFP = 0x5000, 0x6000


def test_synic_is_off_until_it_is_enabled(machine):
    m = machine("amd")
    plain = machine("amd", kind=Machine)
    assert enable(plain, C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == -errno.EINVAL
    write, read = m.vcpu.arch.msrs.set, m.vcpu.arch.msrs.get
    assert not write(M.HV_X64_MSR_SCONTROL, 1, host_initiated=False)
    assert not write(M.HV_X64_MSR_SCONTROL, 1, host_initiated=True)
    assert write(M.HV_X64_MSR_SCONTROL, 0, host_initiated=True)
    assert read(M.HV_X64_MSR_SCONTROL, host_initiated=False) is None
    assert read(M.HV_X64_MSR_SINT0, host_initiated=True) == H.HV_SYNIC_SINT_MASKED
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC2, 1, node=VCPU_INODE) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC2, node=VCPU_INODE) == 0
    assert read(M.HV_X64_MSR_SCONTROL, host_initiated=False) == 1
    assert read(M.HV_X64_MSR_SVERSION, host_initiated=False) == 1
    assert not write(M.HV_X64_MSR_SVERSION, 1, host_initiated=False)
    assert not write(M.HV_X64_MSR_SINT0, 5, host_initiated=False)       # no vector for a SINT
    assert write(M.HV_X64_MSR_SINT0, H.HV_SYNIC_SINT_MASKED, host_initiated=False)
    for cap in (C.KVM_CAP_HYPERV_ENLIGHTENED_VMCS, C.KVM_CAP_HYPERV_DIRECT_TLBFLUSH):
        assert enable(m, cap, node=VCPU_INODE) == -errno.ENOTTY


@pytest.mark.parametrize("synic2", [False, True])
def test_pages_are_told_to_the_client(machine, synic2):
    m = machine("amd", wrmsr(M.HV_X64_MSR_SIMP, SIMP | 1) + DONE)
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC2 if synic2 else C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == 0
    m.write(SIMP, b"\xff" * 4096)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_HYPERV)
    assert struct.unpack_from("<IIIIQQQ", m.run_page, 32) == (kx.KVM_EXIT_HYPERV_SYNIC, 0, M.HV_X64_MSR_SIMP, 0, 1, 0, SIMP | 1)
    assert m.read(SIMP, 4096) == (b"\xff" if synic2 else b"\0") * 4096
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_IO)


def synic_guest(vector=0x51):
    return (APIC_ON + wrmsr(M.HV_X64_MSR_SIMP, SIMP | 1) + wrmsr(M.HV_X64_MSR_SINT0 + 2, vector))


def run_past_synic_exits(m, index=0):
    while True:
        assert m.run_within(index=index) == 0
        if m.reason != kx.KVM_EXIT_HYPERV:
            return


def test_a_sint_is_an_interrupt_with_a_route(machine):
    m = machine("amd", synic_guest() + "out 0xf0, al; sti; idle: hlt; jmp idle\n" + handler(0x51))
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == 0
    route = struct.pack("<IIII", 33, 4, 0, 0) + struct.pack("<II", 0, 2).ljust(32, b"\0")
    m.host.memory.write(ARG, struct.pack("<II", 1, 0) + route)
    assert m.vm_ioctl(K.KVM_SET_GSI_ROUTING, ARG, struct.pack("<II", 1, 0)) == (0, b"")
    acked = []
    m.vm.arch.irqchip.add_ack_notifier(33, lambda: acked.append(1))
    run_past_synic_exits(m)
    running = m.start()
    for n in range(1, 4):
        assert m.irq_line(33, 1) == 1
        eventually(lambda n=n: m.count(0x51) == n)
        eventually(lambda n=n: len(acked) == n)
    assert m.irq_line(33, 0) == -1
    running.stop()


def test_an_interrupt_that_ends_by_itself(machine):
    m = machine("amd", synic_guest(0x51 | H.HV_SYNIC_SINT_AUTO_EOI) + "out 0xf0, al; sti; nop; nop; cli\n" + DONE
                + handler(0x51, ""))
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == 0
    run_past_synic_exits(m)
    apic = m.vcpu.arch.apic
    with apic.chip.lock:
        assert m.vcpu.arch.hyperv.synic.set_irq(2) == 1
    assert m.run_within() == 0
    assert m.count(0x51) == 1
    assert (apic.irr, apic.isr) == (0, 0)


ONE_SHOT = 2 << H.HV_STIMER_SINT_SHIFT | H.HV_STIMER_AUTO_ENABLE
PERIODIC = ONE_SHOT | H.HV_STIMER_PERIODIC
DIRECT = H.HV_STIMER_DIRECT_MODE | 0x51 << H.HV_STIMER_VECTOR_SHIFT | H.HV_STIMER_AUTO_ENABLE
MESSAGE = SIMP + 2 * H.HV_MESSAGE_SIZE
READ_MESSAGE = (f"pushad; mov dword ptr [{MESSAGE:#x}], 0; {wrmsr(M.HV_X64_MSR_EOM, 0)}"
                f"{wrmsr(M.HV_X64_MSR_EOI, 0)} popad")


@BOTH
@pytest.mark.parametrize(("config", "count", "ticks"), [
    (ONE_SHOT, 1, 1), (PERIODIC, 20_000, 5), (DIRECT | H.HV_STIMER_PERIODIC, 20_000, 5)])
def test_timers(machine, vendor, config, count, ticks):
    loop = f"again: cmp dword ptr [{0x3000 + 4 * 0x51:#x}], {ticks}; jae over; sti; hlt; cli; jmp again; over: {DONE}"
    m = machine(vendor, synic_guest() + "out 0xf0, al; cli\n" + wrmsr(M.HV_X64_MSR_STIMER0_CONFIG + 2, config)
                + wrmsr(M.HV_X64_MSR_STIMER0_COUNT + 2, count) + loop + handler(0x51, READ_MESSAGE))
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == 0
    run_past_synic_exits(m)
    start = time.monotonic()
    assert m.run_within() == 0
    assert m.count(0x51) >= ticks
    assert time.monotonic() - start >= (ticks - 1) * count * 100e-9
    enabled = bool(get_msr(m, M.HV_X64_MSR_STIMER0_CONFIG + 2) & H.HV_STIMER_ENABLE)
    assert enabled is bool(config & H.HV_STIMER_PERIODIC)


def test_a_message_that_was_not_read(machine):
    m = machine("amd", synic_guest() + "out 0xf0, al\n" + DONE + "out 0xf1, al\n" + DONE)
    assert enable(m, C.KVM_CAP_HYPERV_SYNIC, node=VCPU_INODE) == 0
    run_past_synic_exits(m)
    m.write(MESSAGE, struct.pack("<I", 1))
    write = m.vcpu.arch.msrs.set
    assert write(M.HV_X64_MSR_STIMER0_CONFIG, ONE_SHOT, host_initiated=False)
    assert write(M.HV_X64_MSR_STIMER0_COUNT, 1, host_initiated=False)
    assert m.run_within() == 0
    assert m.read(MESSAGE + 5, 1) == b"\x01"                # the guest is to say when it has read
    timer = m.vcpu.arch.hyperv.synic.timers[0]
    assert timer.msg_pending
    m.write(MESSAGE, bytes(8))
    assert write(M.HV_X64_MSR_EOM, 0, host_initiated=False)
    assert m.run_within() == 0
    kind, size, flags, sender, index, _, expired, delivered = struct.unpack("<IBB2xQIIQQ", m.read(MESSAGE, 40))
    assert (kind, size, flags, sender, index, expired) == (H.HVMSG_TIMER_EXPIRED, 24, 0, 0, 0, 1)
    assert delivered > 1
    assert not timer.msg_pending
    assert m.vcpu.arch.apic.irr == 1 << 0x51


# ---- synthetic debugger ----------------------------------------------------------------------------------

def test_debugger_exits(machine):
    m = machine("amd", wrmsr(M.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0x7000) + wrmsr(M.HV_X64_MSR_SYNDBG_CONTROL, 3)
                + rdmsr(M.HV_X64_MSR_SYNDBG_STATUS, 0x3E00) + DONE)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_HYPERV)
    kind, _, msr, _, control, _, send = struct.unpack_from("<IIIIQQQ", m.run_page, 32)
    assert (kind, msr, control, send) == (kx.KVM_EXIT_HYPERV_SYNDBG, M.HV_X64_MSR_SYNDBG_CONTROL, 3, 0x7000)
    struct.pack_into("<Q", m.run_page, 56, 0x55)
    assert m.run_within() == 0
    assert u64(m, 0x3E00) == 0x55


# ---- KVM_HYPERV_EVENTFD ----------------------------------------------------------------------------------

def test_eventfd(machine):
    m = machine("amd")

    def eventfd(conn_id, fd, flags=0):
        return m.ioctl(VM_INODE, K.KVM_HYPERV_EVENTFD, 1, struct.pack("<IiI12x", conn_id, fd, flags))[0]

    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert eventfd(1 << 24, fd) == eventfd(1, fd, 2) == -errno.EINVAL
        assert eventfd(1, -1) == -errno.EBADF
        assert eventfd(1, m.host.fd) == -errno.EINVAL
        assert eventfd(1, fd, 1) == -errno.ENOENT
        assert eventfd(1, fd) == 0
        assert eventfd(1, fd) == -errno.EEXIST
        assert m.vm.arch.hyperv.signal(1)
        assert os.eventfd_read(fd) == 1
        assert eventfd(1, -1, 1) == 0
        assert not m.vm.arch.hyperv.signal(1)
    finally:
        os.close(fd)
