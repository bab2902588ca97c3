# SPDX-License-Identifier: GPL-2.0-or-later
"""Malformed ioctls of every level are answered as Linux answers them (virt/kvm/kvm_main.c, arch/x86/kvm/x86.c).

``try_ioctl`` returns the result or -errno.  Each test has a VM of its own; the last call of each shows that the VM is
still good.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvmfs.abi import ioctls as I
from kvmfs.abi import structs as S

PAGE = 4096
BAD_POINTER = 0x10                      # never mapped
KERNEL_POINTER = 0xFFFF_8000_0000_0000
MAX_VCPU_IDS = 4096
MAX_IO_MSRS = 256
MAX_CPUID_ENTRIES = 256
UNKNOWN_MSR = 0x0DEAD000
READONLY, UNKNOWN_FLAG = 2, 1 << 31

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def try_ioctl(fd: int, number: int, argument: Any = 0) -> int:
    """Issue an ioctl; ``argument`` is a number, an address, or a ctypes object to point at."""
    pointer = ctypes.addressof(argument) if isinstance(argument, ctypes.Structure | ctypes.Array) else argument
    result = _libc.ioctl(fd, number, pointer)
    return int(result) if result >= 0 else -ctypes.get_errno()


def buffer(head: bytes, size: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(head, max(size, len(head)))


def count_of(array: ctypes.Array[ctypes.c_char]) -> int:
    """The u32 that begins a flexible array."""
    return int(struct.unpack_from("<I", array)[0])


class Vm:
    """A VM with 16 pages in slot 0 and one vCPU."""

    def __init__(self, kvm: int) -> None:
        self.kvm = kvm
        self.fd = try_ioctl(kvm, I.KVM_CREATE_VM)
        assert self.fd >= 0
        self.memory = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert self.region() == 0
        self.vcpu = try_ioctl(self.fd, I.KVM_CREATE_VCPU)
        assert self.vcpu >= 0

    def region(self, slot: int = 0, flags: int = 0, gpa: int = 0, size: int = 16 * PAGE, hva: int | None = None) -> int:
        region = S.KvmUserspaceMemoryRegion(slot, flags, gpa, size, self.hva if hva is None else hva)
        return try_ioctl(self.fd, I.KVM_SET_USER_MEMORY_REGION, region)

    def close(self) -> None:
        os.close(self.vcpu)
        os.close(self.fd)


@pytest.fixture
def kvm(node):
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def vm(kvm):
    machine = Vm(kvm)
    yield machine
    assert try_ioctl(machine.vcpu, I.KVM_GET_REGS, S.KvmRegs()) == 0
    machine.close()


# ---- numbers that are not this level's ----------------------------------------------------------------------

FOREIGN = [0xAEFF, 0x4004AEFE, 0xC00CAEFD, 0x5401, 0x12345678, 0]


@pytest.mark.parametrize("number", [*FOREIGN, I.KVM_CREATE_VCPU, I.KVM_RUN, I.KVM_GET_REGS, I.KVM_SET_DEVICE_ATTR])
def test_unknown_to_the_node(kvm, number):
    target = buffer(b"", PAGE)
    assert try_ioctl(kvm, number, target) == -errno.EINVAL


@pytest.mark.parametrize("number", [*FOREIGN, I.KVM_GET_API_VERSION, I.KVM_CREATE_VM, I.KVM_RUN, I.KVM_GET_REGS])
def test_unknown_to_a_vm(vm, number):
    assert try_ioctl(vm.fd, number, buffer(b"", PAGE)) == -errno.ENOTTY


@pytest.mark.parametrize("number", [*FOREIGN, I.KVM_GET_API_VERSION, I.KVM_CREATE_VM, I.KVM_CREATE_VCPU,
                                    I.KVM_SET_USER_MEMORY_REGION])
def test_unknown_to_a_vcpu(vm, number):
    assert try_ioctl(vm.vcpu, number, buffer(b"", PAGE)) == -errno.EINVAL


# ---- the node -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [I.KVM_GET_API_VERSION, I.KVM_GET_VCPU_MMAP_SIZE])
def test_an_argument_where_none_belongs(kvm, number):
    assert try_ioctl(kvm, number, 1) == -errno.EINVAL


@pytest.mark.parametrize("kind", [99, 1 << 31, 1 << 62])
def test_vm_types(kvm, kind):
    assert try_ioctl(kvm, I.KVM_CREATE_VM, kind) == -errno.EINVAL


@pytest.mark.parametrize("capability", [100000, 1 << 40, (1 << 64) - 1])
def test_unknown_capabilities(kvm, vm, capability):
    assert try_ioctl(kvm, I.KVM_CHECK_EXTENSION, capability) == 0
    assert try_ioctl(vm.fd, I.KVM_CHECK_EXTENSION, capability) == 0


def test_supported_cpuid(kvm):
    for room in (0, 1, 2):
        assert try_ioctl(kvm, I.KVM_GET_SUPPORTED_CPUID, buffer(struct.pack("<II", room, 0), PAGE)) == -errno.E2BIG
    many = buffer(struct.pack("<II", 1 << 31, 0), 8 + 40 * MAX_CPUID_ENTRIES)
    assert try_ioctl(kvm, I.KVM_GET_SUPPORTED_CPUID, many) == 0
    assert 0 < count_of(many) <= MAX_CPUID_ENTRIES


@pytest.mark.parametrize("number", [I.KVM_GET_MSR_INDEX_LIST, I.KVM_GET_MSR_FEATURE_INDEX_LIST])
def test_msr_lists_say_how_many(kvm, number):
    """Too little room: E2BIG, and still the number that is needed."""
    small = buffer(bytes(4), 4)
    assert try_ioctl(kvm, number, small) == -errno.E2BIG
    enough = buffer(struct.pack("<I", count_of(small)), 4 + 4 * count_of(small))
    assert try_ioctl(kvm, number, enough) == 0


@pytest.mark.parametrize("number", [I.KVM_GET_SUPPORTED_CPUID, I.KVM_GET_MSR_INDEX_LIST, I.KVM_GET_MSRS])
@pytest.mark.parametrize("pointer", [0, BAD_POINTER, KERNEL_POINTER])
def test_pointers_given_to_the_node(kvm, number, pointer):
    assert try_ioctl(kvm, number, pointer) == -errno.EFAULT


def test_read_write_and_mmap(kvm, vm):
    for fd in (kvm, vm.fd, vm.vcpu):
        for action in (lambda fd=fd: os.read(fd, 1), lambda fd=fd: os.write(fd, b"x")):
            with pytest.raises(OSError) as raised:
                action()
            assert raised.value.errno == errno.EINVAL
    _libc.mmap.restype = ctypes.c_void_p        # Python's own mmap looks at the size first
    assert _libc.mmap(None, ctypes.c_size_t(PAGE), 3, mmap.MAP_SHARED, vm.fd, ctypes.c_long(0)) == (1 << 64) - 1
    assert ctypes.get_errno() == errno.ENODEV


# ---- a VM ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {"size": PAGE + 1}, {"size": 1}, {"gpa": 1}, {"hva": 1}, {"hva": KERNEL_POINTER}, {"flags": UNKNOWN_FLAG},
    {"flags": 4}, {"slot": 0x7FFF}, {"slot": 1 << 16}, {"slot": 9 << 16}, {"gpa": -PAGE & (1 << 64) - 1, "size": 2 * PAGE},
    {"size": 0}, {"size": 1 << 44}])
def test_memory_regions_that_cannot_be(vm, wrong):
    region = {"slot": 5, "gpa": 1 << 30, "size": PAGE, **wrong}
    assert vm.region(**region) == -errno.EINVAL


def test_memory_regions_that_overlap(vm):
    for gpa, size in ((0, PAGE), (15 * PAGE, PAGE), (15 * PAGE, 4 * PAGE), (0, 64 * PAGE)):
        assert vm.region(slot=1, gpa=gpa, size=size) == -errno.EEXIST
    assert vm.region(slot=1, gpa=16 * PAGE, size=PAGE) == 0
    assert vm.region(slot=1, gpa=8 * PAGE, size=PAGE) == -errno.EEXIST      # a move
    assert vm.region(slot=1, gpa=16 * PAGE, size=PAGE) == 0                 # no change
    assert vm.region(slot=1, size=0) == 0
    assert vm.region(slot=1, size=0) == -errno.EINVAL                       # it is gone


def test_memory_regions_change_only_in_place_and_flags(vm):
    assert vm.region(size=8 * PAGE) == -errno.EINVAL
    assert vm.region(hva=vm.hva + PAGE) == -errno.EINVAL
    assert vm.region(flags=READONLY) == -errno.EINVAL
    assert vm.region(flags=1) == 0                                          # dirty logging
    assert vm.region() == 0


@pytest.mark.parametrize("pointer", [0, BAD_POINTER, KERNEL_POINTER])
def test_pointers_given_to_a_vm(vm, pointer):
    assert try_ioctl(vm.fd, I.KVM_SET_USER_MEMORY_REGION, pointer) == -errno.EFAULT


def test_vcpu_ids(vm):
    assert try_ioctl(vm.fd, I.KVM_CREATE_VCPU, 0) == -errno.EEXIST
    for index in (MAX_VCPU_IDS, 1 << 31, (1 << 64) - 1, 1 << 32):
        assert try_ioctl(vm.fd, I.KVM_CREATE_VCPU, index) == -errno.EINVAL


def test_addresses_for_intel(vm):
    assert try_ioctl(vm.fd, I.KVM_SET_TSS_ADDR, (1 << 32) - 2 * PAGE) == -errno.EINVAL
    assert try_ioctl(vm.fd, I.KVM_SET_IDENTITY_MAP_ADDR, BAD_POINTER) == -errno.EFAULT
    address = (ctypes.c_uint64 * 1)(0xFFFBC000)
    assert try_ioctl(vm.fd, I.KVM_SET_IDENTITY_MAP_ADDR, address) == -errno.EINVAL      # there is a vCPU


# ---- a vCPU -------------------------------------------------------------------------------------------------

READ_BY_KVM = ["SET_REGS", "SET_SREGS", "SET_FPU", "SET_CPUID2", "SET_MSRS", "INTERRUPT", "SET_MP_STATE",
               "SET_VCPU_EVENTS", "SET_SIGNAL_MASK"]
WRITTEN_BY_KVM = ["GET_REGS", "GET_SREGS", "GET_FPU", "GET_CPUID2", "GET_MSRS", "GET_MP_STATE", "GET_VCPU_EVENTS"]


@pytest.mark.parametrize("pointer", [BAD_POINTER, KERNEL_POINTER])
@pytest.mark.parametrize("name", [*READ_BY_KVM, *WRITTEN_BY_KVM])
def test_pointers_given_to_a_vcpu(vm, name, pointer):
    assert try_ioctl(vm.vcpu, getattr(I, f"KVM_{name}"), pointer) == -errno.EFAULT


def test_run_takes_no_argument(vm):
    assert try_ioctl(vm.vcpu, I.KVM_RUN, 1) == -errno.EINVAL


def _change(**fields: int) -> Callable[[S.KvmSregs], None]:
    def change(sregs: S.KvmSregs) -> None:
        for name, value in fields.items():
            setattr(sregs, name, value)
    return change


def _code_is_long(sregs: S.KvmSregs) -> None:
    sregs.cs.l = 1


@pytest.mark.parametrize("change", [
    _change(cr0=0x80000010), _change(cr0=0x20000010), _change(cr0=1 << 32 | 0x10), _change(efer=0x400),
    _change(efer=0x500, cr0=0x80000011, cr4=0), _change(efer=1 << 40), _change(cr4=1 << 63), _change(cr4=1 << 15),
    _code_is_long, _change(apic_base=1 << 60)])
def test_special_registers_that_cannot_be(vm, change):
    sregs, after = S.KvmSregs(), S.KvmSregs()
    assert try_ioctl(vm.vcpu, I.KVM_GET_SREGS, sregs) == 0
    before = bytes(sregs)
    change(sregs)
    assert try_ioctl(vm.vcpu, I.KVM_SET_SREGS, sregs) == -errno.EINVAL
    assert try_ioctl(vm.vcpu, I.KVM_GET_SREGS, after) == 0
    assert bytes(after) == before


def test_cpuid_counts(vm):
    too_many = buffer(struct.pack("<II", MAX_CPUID_ENTRIES + 1, 0), 8 + 40 * (MAX_CPUID_ENTRIES + 1))
    assert try_ioctl(vm.vcpu, I.KVM_SET_CPUID2, too_many) == -errno.E2BIG
    supported = buffer(struct.pack("<II", MAX_CPUID_ENTRIES, 0), 8 + 40 * MAX_CPUID_ENTRIES)
    assert try_ioctl(vm.kvm, I.KVM_GET_SUPPORTED_CPUID, supported) == 0
    assert try_ioctl(vm.vcpu, I.KVM_SET_CPUID2, supported) == 0
    small = buffer(struct.pack("<II", count_of(supported) - 1, 0), len(supported))
    assert try_ioctl(vm.vcpu, I.KVM_GET_CPUID2, small) == -errno.E2BIG


def test_cpuid_array_that_runs_out_of_memory(vm):
    """The entries lie beyond the end of a mapping: only the handler can notice."""
    area = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert _libc.munmap(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(PAGE)) == 0
    try:
        ctypes.memmove(start + PAGE - 8, struct.pack("<II", 4, 0), 8)
        assert try_ioctl(vm.vcpu, I.KVM_SET_CPUID2, start + PAGE - 8) == -errno.EFAULT
        assert try_ioctl(vm.vcpu, I.KVM_SET_MSRS, start + PAGE - 8) == -errno.EFAULT
        assert try_ioctl(vm.vcpu, I.KVM_GET_MSRS, start + PAGE - 8) == -errno.EFAULT
    finally:
        # Give the range back: the mmap object unmaps all of it when it goes.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        _libc.mmap.restype = ctypes.c_void_p
        _libc.mmap(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(PAGE), 3, flags, -1, ctypes.c_long(0))


def test_msr_counts(vm):
    for number in (I.KVM_GET_MSRS, I.KVM_SET_MSRS):
        full = buffer(struct.pack("<II", MAX_IO_MSRS, 0), 8 + 16 * MAX_IO_MSRS)
        assert try_ioctl(vm.vcpu, number, full) == -errno.E2BIG
        assert try_ioctl(vm.vcpu, number, buffer(struct.pack("<II", 1 << 31, 0), PAGE)) == -errno.E2BIG
        assert try_ioctl(vm.vcpu, number, buffer(bytes(8), PAGE)) == 0


def test_unknown_msrs_end_the_list(vm):
    """The result is how many were done before."""
    star = 0xC0000081
    entries = b"".join(struct.pack("<IIQ", index, 0, 0) for index in (star, UNKNOWN_MSR, star))
    for number in (I.KVM_GET_MSRS, I.KVM_SET_MSRS):
        assert try_ioctl(vm.vcpu, number, buffer(struct.pack("<II", 3, 0) + entries, 0)) == 1


def test_interrupt_vectors(vm):
    for vector in (256, 1 << 31):
        assert try_ioctl(vm.vcpu, I.KVM_INTERRUPT, (ctypes.c_uint32 * 1)(vector)) == -errno.EINVAL


@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 9, 10, 1 << 31])
def test_mp_states_without_an_irqchip(vm, state):
    assert try_ioctl(vm.vcpu, I.KVM_SET_MP_STATE, (ctypes.c_uint32 * 1)(state)) == -errno.EINVAL


@pytest.mark.parametrize("length", [0, 4, 16, 1 << 31])
def test_signal_mask_lengths(vm, length):
    assert try_ioctl(vm.vcpu, I.KVM_SET_SIGNAL_MASK, buffer(struct.pack("<I", length), 64)) == -errno.EINVAL


def test_vcpu_events(vm):
    events = S.KvmVcpuEvents()
    assert try_ioctl(vm.vcpu, I.KVM_GET_VCPU_EVENTS, events) == 0
    events.flags = 1 << 20
    assert try_ioctl(vm.vcpu, I.KVM_SET_VCPU_EVENTS, events) == -errno.EINVAL
    for vector in (2, 32, 255):
        events = S.KvmVcpuEvents()
        events.exception.injected, events.exception.nr = 1, vector
        assert try_ioctl(vm.vcpu, I.KVM_SET_VCPU_EVENTS, events) == -errno.EINVAL


# ---- another process ----------------------------------------------------------------------------------------


def test_a_forked_child_may_use_the_node_only(kvm, vm):
    child = os.fork()
    if child == 0:
        good = (try_ioctl(kvm, I.KVM_GET_API_VERSION) == 12
                and try_ioctl(vm.fd, I.KVM_CHECK_EXTENSION, 0) == -errno.EIO
                and try_ioctl(vm.fd, 0xAEFF) == -errno.EIO
                and try_ioctl(vm.vcpu, I.KVM_GET_REGS, S.KvmRegs()) == -errno.EIO
                and try_ioctl(vm.vcpu, I.KVM_RUN) == -errno.EIO)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
