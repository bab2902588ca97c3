# SPDX-License-Identifier: GPL-2.0-or-later
"""TSC, kvmclock, steal time and KVM's other MSRs; both vendors."""

import errno
import os
import struct
import threading
import time

import pytest
from fake_client import ARG
from test_kvm_enable_cap import BOTH, VMCALL, enable

from kvmfs.abi import caps as C
from kvmfs.abi import exits as kx
from kvmfs.abi import flags as F
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi.para import KVM_FEATURE_CLOCKSOURCE, PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE_BIT
from kvmfs.kvm import kvmclock, msr_lists, steal_time, tsc
from kvmfs.kvm.cpuid import CpuidEntry, CpuidTable
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import CODE, machines

PAGE = 0x3000
NS = 10**9


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(tsc, "host_clock_is_tsc", lambda: True)
    with machines() as make:
        yield make


def set_msr(m, index, value, node=VCPU_INODE):
    m.host.memory.write(ARG, struct.pack("<IIIIQ", 1, 0, index, 0, value))
    return m.ioctl(node, K.KVM_SET_MSRS, ARG, struct.pack("<II", 1, 0))[0]


def get_msr(m, index, node=VCPU_INODE):
    m.host.memory.write(ARG, struct.pack("<IIIIQ", 1, 0, index, 0, 0))
    if m.ioctl(node, K.KVM_GET_MSRS, ARG, struct.pack("<II", 1, 0))[0] != 1:
        return None
    return struct.unpack("<Q", m.host.memory.read(ARG + 16, 8))[0]


def again(m):
    """Let the guest run from its first instruction."""
    m.set_regs(rip=CODE)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)


def time_info(m, gpa=PAGE):
    """version, tsc_timestamp, system_time, mul, shift, flags."""
    version, _, *rest = struct.unpack("<IIQQIbB2x", m.read(gpa, 32))
    return (version, *rest)


def guest_ns(info, guest_tsc):
    """pvclock_clocksource_read."""
    _, timestamp, system_time, mul, shift, _ = info
    delta = guest_tsc - timestamp
    delta = delta >> -shift if shift < 0 else delta << shift
    return system_time + (delta * mul >> 32)


def get_clock(m):
    result, data = m.ioctl(VM_INODE, K.KVM_GET_CLOCK)
    assert result == 0
    assert len(data) == 48
    return kvmclock.ClockData(*struct.unpack("<QI4xQQ16x", data))


def set_clock(m, clock, flags=0, realtime=0):
    return m.ioctl(VM_INODE, K.KVM_SET_CLOCK, 1, struct.pack("<QI4xQQ16x", clock, flags, realtime, 0))[0]


# ---- the TSC ---------------------------------------------------------------------------------------------

def test_frequency_agrees_with_the_clock():
    ns, cycles = tsc.clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
    time.sleep(0.05)
    ns2, cycles2 = tsc.clock_and_tsc(time.CLOCK_MONOTONIC_RAW)
    assert (cycles2 - cycles) * 10**6 / (ns2 - ns) == pytest.approx(tsc.tsc_khz(), rel=1e-4)


@pytest.mark.parametrize("khz", [1, 1000, 999_999, 1_000_000, 2_596_148, 5_000_000])
def test_time_scale(khz):
    scale = tsc.time_scale(NS, khz * 1000)
    assert 0 < scale.mult < 1 << 32
    assert scale.apply(khz * 1000) == pytest.approx(NS, abs=2)
    back = tsc.time_scale(khz * 1000, NS)
    assert back.apply(NS) == pytest.approx(khz * 1000, abs=2)


@BOTH
def test_tsc_khz(machine, vendor):
    m = machine(vendor)
    host = tsc.tsc_khz()
    for node in (VM_INODE, VCPU_INODE):
        assert m.ioctl(node, K.KVM_GET_TSC_KHZ)[0] == host
    for node in (VM_INODE, VCPU_INODE):
        limit = min(0x7FFFFFFF, host * 256 if vendor == "amd" else 1 << 32)
        assert m.ioctl(node, K.KVM_SET_TSC_KHZ, limit)[0] == m.ioctl(node, K.KVM_SET_TSC_KHZ, 0xFFFFFFFF)[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, 0)[0] == 0
    near = host + host // 10**4
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, near)[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_TSC_KHZ)[0] == near
    assert m.ioctl(VM_INODE, K.KVM_SET_TSC_KHZ, host // 2)[0] == 0
    assert m.ioctl(VM_INODE, K.KVM_GET_TSC_KHZ)[0] == host // 2
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    assert m.ioctl(VCPU_INODE + 1, K.KVM_GET_TSC_KHZ)[0] == host // 2
    assert m.ioctl(VM_INODE, K.KVM_SET_TSC_KHZ, 0)[0] == 0
    assert m.ioctl(VM_INODE, K.KVM_GET_TSC_KHZ)[0] == host


SCALES = {"half": (1, 2), "twice": (2, 1), "100 times": (100, 1), "1 kHz": None}


@BOTH
@pytest.mark.parametrize("instruction", ["rdtsc", "rdtscp"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scaled_tsc(machine, vendor, instruction, scale):
    """The guest reads a TSC of that speed, between two readings of it from outside."""
    m = machine(vendor, f"{instruction}; hlt")
    khz = tsc.tsc_khz() * scale[0] // scale[1] if scale else 1
    assert set_msr(m, M.MSR_TSC_AUX, 0x1234) == 1
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, khz)[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_TSC_KHZ)[0] == khz
    assert set_msr(m, M.MSR_IA32_TSC, 1 << 40) == 1
    begin, first = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), get_msr(m, M.MSR_IA32_TSC)
    assert 1 << 40 <= first < (1 << 40) + khz * 10_000
    time.sleep(0.05)
    again(m)
    regs, after = m.regs(), get_msr(m, M.MSR_IA32_TSC)
    assert first <= (regs["rax"] | regs["rdx"] << 32) <= after
    assert regs["rcx"] == (0x1234 if instruction == "rdtscp" else 0)
    passed = (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - begin) * khz // 10**6
    assert after - first <= passed + 1 and after - first >= khz * 50
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, 0)[0] == 0
    assert m.vcpu.cpu.scale_tsc(12345) == 12345


@BOTH
@pytest.mark.parametrize("by", ["guest", "client"])
def test_single_steps_over_a_scaled_rdtsc(machine, vendor, by):
    """With TF set the guest gets its #DB, a client that steps its exit, right after it."""
    m = machine(vendor, """
        mov word ptr [4], offset trap       # the vector of #DB
        mov word ptr [6], 0
        push 0x102
        popf
        rdtsc
    after:
        nop
        hlt
    trap:
        pop bx
        hlt
    """ if by == "guest" else "rdtscp; after: hlt")
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, tsc.tsc_khz() // 2)[0] == 0
    if by == "guest":
        again(m)
        assert m.regs()["rbx"] == m.symbols["after"] and m.regs()["rax"] | m.regs()["rdx"]
        return
    m.vcpu_ioctl(K.KVM_SET_GUEST_DEBUG, 1, struct.pack("<2I8Q", 3, 0, *[0] * 8))      # enable, single step
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_DEBUG)
    assert m.regs()["rip"] == m.symbols["after"]


@BOTH
def test_scaled_tsc_of_vcpus_together(machine, vendor):
    """vCPUs of the same frequency have the same TSC."""
    m = machine(vendor)
    khz = tsc.tsc_khz() * 3 // 7
    assert m.ioctl(VM_INODE, K.KVM_SET_TSC_KHZ, khz)[0] == 0
    for i in (1, 2):
        assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, i)[0] == VCPU_INODE + i
    _, first, second = m.vm.vcpus
    assert first.cpu.tsc_offset == second.cpu.tsc_offset
    assert first.cpu.guest_tsc(10**15) == second.cpu.guest_tsc(10**15)
    assert first.cpu.scale_tsc(10**9) == pytest.approx(3 * 10**9 / 7, rel=1e-5)
    assert first.cpu.unscale_tsc(first.cpu.scale_tsc(10**9)) == pytest.approx(10**9, abs=3)


@BOTH
def test_scaled_kvmclock(machine, vendor):
    """It tells the time whatever the TSC's speed."""
    m = machine(vendor, "hlt")
    assert m.vcpu_ioctl(K.KVM_SET_TSC_KHZ, tsc.tsc_khz() // 3)[0] == 0
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    again(m)
    before = get_clock(m).clock
    guest = guest_ns(time_info(m), m.vcpu.cpu.guest_tsc())
    assert before - 2000 <= guest <= get_clock(m).clock + 2000


@BOTH
def test_tsc_starts_at_zero_and_is_the_same_on_all_vcpus(machine, vendor):
    m = machine(vendor)
    assert get_msr(m, M.MSR_IA32_TSC) < tsc.tsc_khz() * 1000 * 5
    time.sleep(0.01)
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    first, second = m.vm.vcpus
    assert first.cpu.tsc_offset == second.cpu.tsc_offset
    # Values written one after the other within a second mean the same.
    ahead = get_msr(m, M.MSR_IA32_TSC) + 10**13
    assert set_msr(m, M.MSR_IA32_TSC, ahead) == 1
    assert first.cpu.tsc_offset != second.cpu.tsc_offset
    time.sleep(0.01)
    assert set_msr(m, M.MSR_IA32_TSC, ahead, VCPU_INODE + 1) == 1
    assert first.cpu.tsc_offset == second.cpu.tsc_offset
    assert set_msr(m, M.MSR_IA32_TSC, ahead + 10**13, VCPU_INODE + 1) == 1
    assert first.cpu.tsc_offset != second.cpu.tsc_offset


@BOTH
def test_tsc_offset_attribute(machine, vendor):
    m = machine(vendor, "rdtsc; hlt")

    def attr(cmd, group=0, which=0, address=ARG):
        return m.vcpu_ioctl(cmd, 1, struct.pack("<IIQQ", 0, group, which, address))[0]

    assert attr(K.KVM_HAS_DEVICE_ATTR) == 0
    for cmd in (K.KVM_HAS_DEVICE_ATTR, K.KVM_GET_DEVICE_ATTR, K.KVM_SET_DEVICE_ATTR):
        assert attr(cmd, group=1) == attr(cmd, which=1) == -errno.ENXIO
    assert attr(K.KVM_GET_DEVICE_ATTR, address=0) == attr(K.KVM_SET_DEVICE_ATTR, address=0) == -errno.EFAULT
    assert attr(K.KVM_GET_DEVICE_ATTR) == 0
    assert struct.unpack("<Q", m.host.memory.read(ARG, 8))[0] == m.vcpu.cpu.tsc_offset
    m.host.memory.write(ARG, struct.pack("<Q", 1 << 62))
    assert attr(K.KVM_SET_DEVICE_ATTR) == 0
    again(m)
    assert m.regs()["rdx"] >> 30 == 1


# ---- KVM_GET_CLOCK, KVM_SET_CLOCK ------------------------------------------------------------------------

def test_clock_of_a_vm_made_ahead_begins_when_somebody_gets_it(machine):
    m = machine("amd", "hlt")
    time.sleep(0.05)
    before = get_clock(m).clock
    m.vm.adopt(m.host)
    assert get_clock(m).clock < before


@BOTH
def test_clock(machine, vendor):
    m = machine(vendor, "hlt")
    before = get_clock(m)
    assert before.flags == 0                # no vCPU has run: there is no master clock yet
    assert before.clock < 5 * NS
    assert set_clock(m, 0, flags=1) == -errno.EINVAL
    assert set_clock(m, 1000 * NS) == 0     # makes the master clock
    now = get_clock(m)
    assert 1000 * NS <= now.clock < 1001 * NS
    assert now.flags == F.KVM_CLOCK_TSC_STABLE | F.KVM_CLOCK_REALTIME | F.KVM_CLOCK_HOST_TSC
    assert now.realtime == pytest.approx(time.time_ns(), abs=NS)
    assert now.host_tsc == pytest.approx(tsc.rdtsc(), abs=tsc.tsc_khz() * 1000)
    again(m)
    assert get_clock(m).clock >= now.clock
    # An hour of real time has passed since the clock was read.
    assert set_clock(m, 5 * NS, F.KVM_CLOCK_REALTIME, time.time_ns() - 3600 * NS) == 0
    assert get_clock(m).clock == pytest.approx(3605 * NS, abs=NS)
    assert set_clock(m, 5 * NS, F.KVM_CLOCK_REALTIME, time.time_ns() + 3600 * NS) == 0
    assert get_clock(m).clock == pytest.approx(5 * NS, abs=NS)


def test_clock_never_goes_back(machine):
    m = machine("amd", "hlt")
    again(m)
    last = 0
    for i in range(200):
        if i % 20 == 0:
            m.vcpu.request_work(kvmclock.update_masterclock)
            again(m)
        now = get_clock(m).clock
        assert now >= last - 200            # the two clocks of a new pair are read within this
        last = now


# ---- what guests see -------------------------------------------------------------------------------------

WRMSR = "mov ecx, {msr}; mov eax, {low}; mov edx, 0; wrmsr;"


@BOTH
@pytest.mark.parametrize("msr", [M.MSR_KVM_SYSTEM_TIME_NEW, M.MSR_KVM_SYSTEM_TIME])
def test_kvmclock(machine, vendor, msr):
    m = machine(vendor, WRMSR.format(msr=msr, low=PAGE | 1) + "mov al, 1; out 0x10, al; rdtsc; hlt")
    assert m.run() == 0
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT
    info, regs, clock = time_info(m), m.regs(), get_clock(m)
    assert info[0] % 2 == 0
    assert info[0]
    stable = msr == M.MSR_KVM_SYSTEM_TIME_NEW       # a boot CPU with the old MSR is no master
    assert info[5] == (PVCLOCK_TSC_STABLE_BIT if stable else 0)
    assert bool(clock.flags & F.KVM_CLOCK_TSC_STABLE) is stable
    guest = guest_ns(info, regs["rax"] | regs["rdx"] << 32)
    assert guest == pytest.approx(clock.clock, abs=NS // 10)
    assert guest <= clock.clock
    assert get_msr(m, msr) == PAGE | 1
    assert set_msr(m, msr, 0) == 1
    old = time_info(m)
    m.set_regs(rip=m.regs()["rip"] - 1)
    assert (m.run(), time_info(m)) == (0, old)


@BOTH
def test_clock_follows_set_clock_and_stopped_flag(machine, vendor):
    m = machine(vendor, "hlt")
    assert m.vcpu_ioctl(K.KVM_KVMCLOCK_CTRL)[0] == -errno.EINVAL
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    again(m)
    first = time_info(m)
    assert m.vcpu_ioctl(K.KVM_KVMCLOCK_CTRL)[0] == 0
    again(m)
    assert time_info(m)[5] == PVCLOCK_TSC_STABLE_BIT | PVCLOCK_GUEST_STOPPED
    assert set_clock(m, 77 * NS) == 0
    again(m)
    info = time_info(m)
    assert info[5] & PVCLOCK_GUEST_STOPPED              # until the guest clears it
    assert info[2] >= 77 * NS
    assert info[0] > first[0]
    m.write(PAGE + 29, b"\0")
    set_clock(m, 78 * NS)
    again(m)
    assert not time_info(m)[5] & PVCLOCK_GUEST_STOPPED


@BOTH
def test_clock_page_that_is_no_memory_or_crosses_pages(machine, vendor):
    m = machine(vendor, "hlt")
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, 0x40000001) == 1
    again(m)
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, 0x3FF1) == 1
    again(m)
    assert m.read(0x3FF0, 32) == bytes(32)
    assert set_msr(m, M.MSR_KVM_WALL_CLOCK_NEW, 0x40000000) == 1


@BOTH
def test_without_a_master_clock(machine, vendor, monkeypatch):
    monkeypatch.setattr(tsc, "host_clock_is_tsc", lambda: False)
    m = machine(vendor, "hlt")
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    again(m)
    first = time_info(m)
    time.sleep(0.005)
    again(m)
    second = time_info(m)
    assert first[5] == second[5] == 0
    assert second[2] - first[2] >= 4_000_000
    assert get_clock(m).flags == 0


@BOTH
def test_wall_clock(machine, vendor):
    for msr in (M.MSR_KVM_WALL_CLOCK_NEW, M.MSR_KVM_WALL_CLOCK):
        m = machine(vendor, WRMSR.format(msr=msr, low=PAGE) + "hlt")
        set_clock(m, 50 * NS)
        again(m)
        version, sec, nsec = struct.unpack("<III", m.read(PAGE, 12))
        assert version == 2
        assert sec * NS + nsec == pytest.approx(time.time_ns() - get_clock(m).clock, abs=NS // 100)
        assert get_msr(m, msr) == PAGE
        again(m)
        assert m.read(PAGE, 4) == struct.pack("<I", 4)


@BOTH
def test_clock_pairing(machine, vendor):
    m = machine(vendor, f"mov eax, 9; mov ebx, {PAGE}; mov ecx, 0; {VMCALL[vendor]}; hlt")
    again(m)
    assert m.regs()["rax"] == 0
    sec, nsec, cycles, flags = struct.unpack("<qqQI", m.read(PAGE, 28))
    assert sec * NS + nsec == pytest.approx(time.time_ns(), abs=NS)
    assert cycles == pytest.approx(get_msr(m, M.MSR_IA32_TSC), abs=tsc.tsc_khz() * 1000)
    assert flags == 0
    m = machine(vendor, f"mov eax, 9; mov ebx, {PAGE}; mov ecx, 1; {VMCALL[vendor]}; hlt")
    again(m)
    assert m.regs()["rax"] == 2**32 - 95


@BOTH
def test_two_vcpus_share_a_master_clock(machine, vendor):
    m = machine(vendor, "hlt")
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    sregs, regs = m.vcpu_ioctl(K.KVM_GET_SREGS)[1], m.vcpu_ioctl(K.KVM_GET_REGS)[1]
    second = VCPU_INODE + 1
    assert m.ioctl(second, K.KVM_SET_SREGS, 1, sregs)[0] == 0
    assert m.ioctl(second, K.KVM_SET_REGS, 1, regs)[0] == 0
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE + 64 | 1, second) == 1
    again(m)
    assert m.ioctl(second, K.KVM_RUN)[0] == 0
    again(m)                                # the second one's first entry has made a new pair
    a, b = time_info(m), time_info(m, PAGE + 64)
    assert a[1:] == b[1:]
    assert a[5] == PVCLOCK_TSC_STABLE_BIT
    # TSCs that differ have no common clock.
    assert set_msr(m, M.MSR_IA32_TSC, 10**15, second) == 1
    again(m)
    assert m.ioctl(second, K.KVM_RUN)[0] == 0
    again(m)
    assert time_info(m)[5] == 0


# ---- suspend ---------------------------------------------------------------------------------------------

@BOTH
def test_suspend_of_a_running_guest(machine, vendor):
    """The guest spins; it is held while suspended and then sees that it was stopped."""
    m = machine(vendor, f"again: test byte ptr [{PAGE + 29}], 2; jz again; hlt")
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    results = []
    runner = threading.Thread(target=lambda: results.append(m.run()))
    runner.start()
    time.sleep(0.05)
    m.vm.suspend()
    time.sleep(0.1)
    assert runner.is_alive()
    held = time_info(m)
    m.vm.resume(100_000_000)
    runner.join(10)
    assert results == [0]
    assert m.reason == kx.KVM_EXIT_HLT
    info = time_info(m)
    assert info[5] & PVCLOCK_GUEST_STOPPED
    assert info[2] >= held[2]


@BOTH
def test_tsc_set_back_by_a_suspend(machine, vendor, monkeypatch):
    m = machine(vendor, "hlt")
    assert set_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1) == 1
    again(m)
    before = get_msr(m, M.MSR_IA32_TSC)
    lost = tsc.tsc_khz() * 1000 * 60
    real = tsc.clock_and_tsc

    def set_back(clock):
        ns, cycles = real(clock)
        return ns, cycles - lost

    monkeypatch.setattr(tsc, "clock_and_tsc", set_back)
    m.vm.resume(60 * NS)
    again(m)
    assert get_msr(m, M.MSR_IA32_TSC) - before >= lost      # the host's own TSC went on here
    info = time_info(m)
    assert info[5] == PVCLOCK_GUEST_STOPPED                 # no master clock any more
    monkeypatch.setattr(tsc, "clock_and_tsc", real)


# ---- other MSRs ------------------------------------------------------------------------------------------

@BOTH
def test_steal_time(machine, vendor):
    if not steal_time.available():
        pytest.skip("this kernel does not count")
    m = machine(vendor, "hlt")
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, PAGE | 3) == 0
    m.write(PAGE, struct.pack("<QIIB", 5, 7, 0, 1))
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, PAGE | 1) == 1
    assert get_msr(m, M.MSR_KVM_STEAL_TIME) == PAGE | 1
    again(m)
    steal, version, flags, preempted = struct.unpack("<QIIB", m.read(PAGE, 17))
    assert steal >= 5
    assert version in range(10, 100, 2)
    assert (flags, preempted) == (0, 0)
    tid, last = m.vcpu.arch.steal_time._last["own"]
    m.vcpu.arch.steal_time._last["own"] = tid, last - 1000
    m.vcpu.arch.steal_time.recorded_ns = 0
    again(m)
    assert struct.unpack("<Q", m.read(PAGE, 8))[0] >= steal + 1000
    steal = struct.unpack("<Q", m.read(PAGE, 8))[0]
    m.host.client_delay += 10**9            # the client's thread has waited, too
    m.vcpu.arch.steal_time.recorded_ns = 0
    again(m)
    assert struct.unpack("<Q", m.read(PAGE, 8))[0] >= steal + 10**9


@BOTH
def test_index_list_is_true(machine, vendor):
    m = machine(vendor)
    for index in msr_lists.KVM_MSRS + msr_lists.KVM_MSRS_LAST:
        assert index in msr_lists.index_list(vendor)
        if index == M.MSR_KVM_ASYNC_PF_INT:
            continue                        # only where the local APIC is in here
        value = get_msr(m, index)
        assert value is not None, hex(index)
        assert set_msr(m, index, value) == 1, hex(index)


@BOTH
def test_poll_control_async_pf_and_eoi(machine, vendor):
    m = machine(vendor)
    assert get_msr(m, M.MSR_KVM_POLL_CONTROL) == 1
    assert set_msr(m, M.MSR_KVM_POLL_CONTROL, 0) == 1
    assert set_msr(m, M.MSR_KVM_POLL_CONTROL, 2) == 0
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_EN, PAGE | 1) == 0
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_INT, 0xF3) == 0
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, PAGE | 3) == 0
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, PAGE | 1) == 1
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, 0x40000001) == 0


@BOTH
def test_enforced_pv_features(machine, vendor):
    m = machine(vendor)
    m.vcpu.arch.cpuid = CpuidTable([CpuidEntry(0x40000000, 0, 0, 0x40000001, *struct.unpack("<3I", b"KVMKVMKVM\0\0\0")),
                                    CpuidEntry(0x40000001, 0, 0, 1 << KVM_FEATURE_CLOCKSOURCE)])
    assert get_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW) == 0
    assert enable(m, C.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1, node=VCPU_INODE) == 0
    assert get_msr(m, M.MSR_KVM_SYSTEM_TIME_NEW) is None
    assert get_msr(m, M.MSR_KVM_SYSTEM_TIME) == 0
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, PAGE | 1) == 0


def test_run_delays_of_many_threads_at_once(monkeypatch):
    """A vCPU's threads share the open files, of which each may close all."""
    monkeypatch.setattr(steal_time, "_MAX_FILES", 3)
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    done, failures = threading.Event(), []
    sleepers = [threading.Thread(target=done.wait, daemon=True) for _ in range(8)]
    for thread in sleepers:
        thread.start()
    delays = steal_time.RunDelays(tasks)

    def read():
        try:
            for i in range(1500):
                delays.of(sleepers[i % 8].native_id if i % 5 else 1 << 22)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(6)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    os.close(tasks)
    assert not failures
