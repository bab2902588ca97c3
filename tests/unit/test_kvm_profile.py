# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles: this KVM as an older kernel."""

import ctypes
import struct

import pytest

from kvmfs import vendor as vendors
from kvmfs.abi import caps as C
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi.structs import KvmClockData, KvmEnableCap
from kvmfs.api.dispatch import SystemDispatcher, VmDispatcher
from kvmfs.kvm import caps, profile
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE, Kvm
from tests.unit.fake_client import ARG, FakeMemory
from tests.unit.machine import Machine, Req, error

OLD, NEW = "linux-5.15", "linux-6.12"


def ask(name, cap):
    return caps.check_extension(profile.load(name), getattr(C, f"KVM_CAP_{cap}"))


@pytest.mark.parametrize(("cap", "values"), [       # of 5.15, 6.1, 6.6, 6.12
    ("XSAVE2", (0, 4096, 4096, 4096)), ("SYS_ATTRIBUTES", (0, 1, 1, 1)), ("VCPU_ATTRIBUTES", (0, 1, 1, 1)),
    ("X86_TRIPLE_FAULT_EVENT", (0, 1, 1, 1)), ("DIRTY_LOG_RING_ACQ_REL", (0, 1 << 20, 1 << 20, 1 << 20)),
    ("USER_MEMORY2", (0, 0, 0, 1)), ("VM_TYPES", (0, 0, 0, 1)), ("X86_APIC_BUS_CYCLES_NS", (0, 0, 0, 1)),
    ("ADJUST_CLOCK", (2, 14, 14, 14)), ("MAX_VCPU_ID", (4096,) * 4), ("NESTED_STATE", (0,) * 4)])
def test_capabilities(cap, values):
    assert tuple(ask(name, cap) for name in profile.names()) == values


def test_masks_and_limits():
    assert [ask(name, "DISABLE_QUIRKS2") & 0xFF for name in profile.names()] == [0, 0x7F, 0x7F, 0xFF]
    assert ask(OLD, "NR_VCPUS") == 710
    assert ask("linux-6.1", "NR_VCPUS") == caps.online_cpus()


def test_the_default_is_the_newest():
    assert profile.DEFAULT == NEW
    newest = profile.load(NEW)
    assert not (newest.without or newest.cannot_enable or newest.values or newest.no_msrs or newest.no_hyperv)
    assert not any(newest.no_ioctls.values())
    with pytest.raises(ValueError, match=r"no profile 'linux-2.6': use one of linux-5.15"):
        profile.load("linux-2.6")


class Older(Machine):
    def __init__(self, name, as_kernel):
        super().__init__(name)
        self.vm.profile = profile.load(as_kernel)
        self.dispatch = VmDispatcher(self.vm)


@pytest.fixture(params=["amd", "intel"])
def older(request):
    machines = []

    def make(as_kernel):
        machines.append(Older(request.param, as_kernel))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


def enable(machine, cap, argument, nodeid=VM_INODE):
    return machine.ioctl(nodeid, K.KVM_ENABLE_CAP, ARG, bytes(KvmEnableCap(cap=cap, args=(argument,))))[0]


def test_ioctls(older):
    """Those that were not there have the errno of an unknown number."""
    old, new = older(OLD), older(NEW)
    for number in (K.KVM_GET_TSC_KHZ, K.KVM_SET_TSC_KHZ, K.KVM_SET_USER_MEMORY_REGION2):
        assert old.ioctl(VM_INODE, number, 0, bytes(256))[0] == error("ENOTTY")
    assert new.ioctl(VM_INODE, K.KVM_GET_TSC_KHZ)[0] > 0
    assert old.ioctl(VCPU_INODE, K.KVM_GET_TSC_KHZ)[0] > 0
    attr = struct.pack("<IIQQ", 0, 0, 0, 0)
    for number in (K.KVM_GET_XSAVE2, K.KVM_HAS_DEVICE_ATTR):
        assert old.ioctl(VCPU_INODE, number, ARG, attr)[0] == error("EINVAL")
        assert new.ioctl(VCPU_INODE, number, ARG, attr)[0] in (0, 4096)


def test_enable_cap(older):
    old, middle, new = older(OLD), older("linux-6.1"), older(NEW)
    for cap in (C.KVM_CAP_DISABLE_QUIRKS2, C.KVM_CAP_X86_TRIPLE_FAULT_EVENT, C.KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
        assert enable(old, cap, 0 if cap != C.KVM_CAP_DIRTY_LOG_RING_ACQ_REL else 4096) == error("EINVAL")
    assert enable(old, C.KVM_CAP_MAX_VCPU_ID, 4096) == error("EINVAL")
    assert enable(middle, C.KVM_CAP_MAX_VCPU_ID, 4096) == enable(new, C.KVM_CAP_MAX_VCPU_ID, 4096) == 0
    assert enable(middle, C.KVM_CAP_DISABLE_QUIRKS2, 0x7F) == enable(new, C.KVM_CAP_DISABLE_QUIRKS2, 0x80) == 0
    assert enable(middle, C.KVM_CAP_DISABLE_QUIRKS2, 0x80) == error("EINVAL")


def test_clock_flags(older):
    """Before 5.16 KVM_GET_CLOCK had no host times, and KVM_SET_CLOCK took no flag."""
    for name, known, taken in ((OLD, 2, 0), (NEW, 14, 14)):
        m = older(name)
        clock = KvmClockData.from_buffer_copy(m.ioctl(VM_INODE, K.KVM_GET_CLOCK)[1])
        assert clock.flags in (0, known) and bool(clock.realtime) == (clock.flags == 14)
        for flags in (0, 2, 4, 8, 1):
            data = KvmClockData(clock=1, flags=flags, realtime=clock.realtime)
            result = m.ioctl(VM_INODE, K.KVM_SET_CLOCK, ARG, bytes(data))[0]
            assert result == (error("EINVAL") if flags & ~taken else 0)


def test_the_node():
    memory = FakeMemory()

    def node(name):
        return SystemDispatcher(Kvm(vendors.load("amd"), lambda req: memory, profile=name), lambda req, kind: 0)

    def ioctl(dispatcher, cmd, arg, data=b""):
        try:
            return dispatcher.ioctl(Req(1, cmd, arg, data))
        except OSError as failure:
            return -failure.errno

    def msrs(name):
        _, header = ioctl(node(name), K.KVM_GET_MSR_INDEX_LIST, ARG, struct.pack("<I", 1000))
        count, = struct.unpack("<I", header)
        return struct.unpack(f"<{count}I", memory.read(ARG + 4, 4 * count))

    def hyperv(name, leaf):
        header = ioctl(node(name), K.KVM_GET_SUPPORTED_HV_CPUID, ARG, struct.pack("<II", 100, 0))
        entries = memory.read(ARG + 8, 40 * struct.unpack_from("<I", header)[0])
        return next(struct.unpack_from("<4I", entries, i + 12) for i in range(0, len(entries), 40)
                    if struct.unpack_from("<I", entries, i)[0] == leaf)

    assert ioctl(node(OLD), K.KVM_HAS_DEVICE_ATTR, ARG, struct.pack("<IIQQ", 0, 0, 0, 0)) == error("EINVAL")
    assert ioctl(node(NEW), K.KVM_HAS_DEVICE_ATTR, ARG, struct.pack("<IIQQ", 0, 0, 0, 0)) == 0
    assert set(msrs(NEW)) - set(msrs(OLD)) == {M.HV_X64_MSR_TSC_INVARIANT_CONTROL}
    old, new = hyperv(OLD, 0x40000003), hyperv(NEW, 0x40000003)
    assert [a ^ b for a, b in zip(old, new, strict=True)] == [1 << 15, 1 << 20, 0, 1 << 14]
    assert ctypes.sizeof(KvmEnableCap) == 104
