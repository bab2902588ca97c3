# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on the node: results, errnos in the kernel's order, what is written back."""

import errno
import struct
from types import SimpleNamespace

import pytest
from fake_client import ARG, FakeMemory

from kvmfs.abi import caps as K
from kvmfs.abi import msrs as M
from kvmfs.abi.ioctls import TABLE, Level
from kvmfs.api import system
from kvmfs.kvm import caps, cpuid_supported, msr_lists, profile
from kvmfs.kvm.cpuid import load_cpuid2

# What kvm_vm_ioctl_check_extension of Linux 6.12 has a case for on x86, with every option compiled in.
LINUX_X86_CAPS = frozenset((
    *range(5), *range(6, 13), 14, 15, 16, *range(21, 27), *range(30, 42), 44, 45, 46, 47, 50, 51, 54, 55, 56, 59,
    60, 61, 66, 72, 74, 76, 77, 81, 82, 89, 95, 96, 97, 98, 100, 105, 116, 117, 118, 121, 122, 123, 127, 128, 129,
    136, 143, 148, 149, 153, 154, 155, 157, 159, 161, 162, 163, 164, 167, 168, 173, 175, *range(182, 186),
    *range(187, 194), 195, 196, 197, 199, 200, 201, 203, 204, 206, 208, 209, *range(212, 216), 218, 219, 220, 223, 225, 226,
    *range(231, 239)))


@pytest.fixture(params=["intel", "amd"])
def kvm(request):
    memory = FakeMemory()
    return SimpleNamespace(vendor=SimpleNamespace(name=request.param), memory=memory,
                           memory_of=lambda req: memory, shares_run=True, profile=profile.load(profile.DEFAULT))


def request(arg=ARG, *words):
    return SimpleNamespace(arg=arg, data=memoryview(struct.pack(f"<{len(words)}I", *words)))


def errno_of(call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    return caught.value.errno


def test_every_handler_is_in_the_table():
    names = {e.handler for e in TABLE if Level.SYSTEM in e.levels}
    for name in ("get_api_version", "check_extension", "get_vcpu_mmap_size", "get_supported_cpuid",
                 "get_emulated_cpuid", "get_msr_index_list", "get_msr_feature_index_list", "get_msrs"):
        assert name in names
        assert callable(getattr(system, name))


def test_get_api_version(kvm):
    assert system.get_api_version(kvm, request(0)) == 12
    assert errno_of(system.get_api_version, kvm, request(1)) == errno.EINVAL


def test_get_vcpu_mmap_size(kvm):
    assert system.get_vcpu_mmap_size(kvm, request(0)) == 12288
    assert errno_of(system.get_vcpu_mmap_size, kvm, request(1)) == errno.EINVAL


# ---- capabilities ------------------------------------------------------------------------------------------

def test_every_x86_capability_is_decided_once():
    assert not caps.SUPPORTED.keys() & caps.ABSENT.keys()
    assert caps.SUPPORTED.keys() | caps.ABSENT.keys() == LINUX_X86_CAPS - {K.KVM_CAP_PV_MMU}
    assert all(caps.ABSENT.values())


def test_check_extension(kvm):
    def check(cap):
        return system.check_extension(kvm, request(cap))

    assert check(K.KVM_CAP_USER_MEMORY) == 1
    assert check(K.KVM_CAP_NR_MEMSLOTS) == 32764
    assert check(K.KVM_CAP_MAX_VCPUS) == 1024
    assert check(K.KVM_CAP_MAX_VCPU_ID) == 4096
    assert check(K.KVM_CAP_NR_VCPUS) >= 1
    assert check(K.KVM_CAP_IRQCHIP) == 1
    assert check(K.KVM_CAP_IRQ_ROUTING) == 4096
    for unknown in (5, 1000, 1 << 31, (1 << 32) + K.KVM_CAP_USER_MEMORY, (1 << 64) - 1):
        assert check(unknown) == 0
    for cap in range(300):
        assert check(cap) == caps.check_extension_vm(kvm.profile, cap) >= 0
    assert check(K.KVM_CAP_DIRTY_LOG_RING) == 1 << 20
    kvm.shares_run = False
    assert check(K.KVM_CAP_DIRTY_LOG_RING) == check(K.KVM_CAP_DIRTY_LOG_RING_ACQ_REL) == 0


# ---- CPUID -------------------------------------------------------------------------------------------------

def test_get_supported_cpuid(kvm):
    entries = cpuid_supported.supported(kvm.vendor.name)
    for nent in (len(entries), len(entries) + 1, 0xFFFFFFFF):
        kvm.memory.raw[:] = bytes(len(kvm.memory.raw))
        assert system.get_supported_cpuid(kvm, request(ARG, nent, 5)) == struct.pack("<II", len(entries), 5)
        assert load_cpuid2(kvm.memory, ARG, len(entries)) == entries


def test_get_supported_cpuid_errors(kvm):
    count = len(cpuid_supported.supported(kvm.vendor.name))
    for nent in (0, 1, count - 1):
        assert errno_of(system.get_supported_cpuid, kvm, request(ARG, nent, 0)) == errno.E2BIG
        assert errno_of(system.get_supported_cpuid, kvm, request(0, nent, 0)) == errno.E2BIG
    assert errno_of(system.get_supported_cpuid, kvm, request(0, count, 0)) == errno.EFAULT
    assert not any(kvm.memory.raw)


def test_get_emulated_cpuid(kvm):
    assert system.get_emulated_cpuid(kvm, request(ARG, 4, 0)) == struct.pack("<II", 3, 0)
    assert load_cpuid2(kvm.memory, ARG, 3) == cpuid_supported.emulated(kvm.vendor.name)


def test_get_emulated_cpuid_errors(kvm):
    call = system.get_emulated_cpuid
    assert errno_of(call, kvm, request(0, 0, 0)) == errno.E2BIG
    assert errno_of(call, kvm, request(ARG, 3, 0)) == errno.E2BIG          # as the kernel: one to spare
    assert errno_of(call, kvm, request(0, 3, 0)) == errno.EINVAL           # padding comes before the count
    kvm.memory.raw[8 + 2 * 40 + 28] = 1
    assert errno_of(call, kvm, request(ARG, 3, 0)) == errno.EINVAL
    assert errno_of(call, kvm, request(ARG, 2, 0)) == errno.E2BIG
    kvm.memory.raw[8 + 2 * 40 + 28] = 0
    kvm.memory.raw[8 + 256 * 40 + 28] = 1                                  # beyond the 256 that count
    assert call(kvm, request(ARG, 1000, 0)) == struct.pack("<II", 3, 0)


# ---- MSRs --------------------------------------------------------------------------------------------------

def lists(kvm):
    vendor = kvm.vendor.name
    return ((system.get_msr_index_list, msr_lists.index_list(vendor)),
            (system.get_msr_feature_index_list, tuple(msr_lists.FEATURE_VALUES[vendor])))


def test_msr_lists(kvm):
    for call, expected in lists(kvm):
        header = struct.pack("<I", len(expected))
        for room in (len(expected), 100, 0xFFFFFFFF):
            assert call(kvm, request(ARG, room)) == (0, header)
            assert struct.unpack(f"<{len(expected)}I",
                                 kvm.memory.read(ARG + 4, 4 * len(expected))) == expected


def test_msr_list_errors_still_give_the_count(kvm):
    for call, expected in lists(kvm):
        header = struct.pack("<I", len(expected))
        for room in (0, len(expected) - 1):
            assert call(kvm, request(0, room)) == (-errno.E2BIG, header)
        assert not any(kvm.memory.raw)
        assert call(kvm, request(0, len(expected))) == (-errno.EFAULT, header)


def test_get_feature_msrs(kvm):
    values = msr_lists.FEATURE_VALUES[kvm.vendor.name]
    wanted = (*values, M.MSR_STAR, 0x12345, M.MSR_IA32_UCODE_REV)
    for i, index in enumerate(wanted):
        kvm.memory.write(ARG + 8 + 16 * i, struct.pack("<IIQ", index, 0xABCD, 99))
    assert system.get_msrs(kvm, request(ARG, len(wanted), 0)) == len(values) + 1
    got = list(struct.iter_unpack("<IIQ", kvm.memory.read(ARG + 8, 16 * len(wanted))))
    assert got == [*((i, 0xABCD, v) for i, v in values.items()), (M.MSR_STAR, 0xABCD, 0),
                   (0x12345, 0xABCD, 0),
                   (M.MSR_IA32_UCODE_REV, 0xABCD, 99)]


def test_get_feature_msrs_errors(kvm):
    assert errno_of(system.get_msrs, kvm, request(0, 256, 0)) == errno.E2BIG
    assert errno_of(system.get_msrs, kvm, request(0, 255, 0)) == errno.EFAULT
    assert system.get_msrs(kvm, request(0, 0, 0)) == 0
