# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots: the order of checks, and what the CPU is told."""

import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.errors import KvmError
from kvmfs.kvm.kvm_main import VM_INODE
from kvmfs.kvm.memslots import MemSlots
from tests.unit.machine import Machine

HVA = 0x7F00_0000_0000
DIRTY, READONLY = 1, 2


@dataclass
class Piece:
    hva: int
    size: int
    fd: int
    offset: int
    writable: bool = True


@pytest.fixture
def memfd():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


class Ram:
    """An engine that writes down what it is told."""

    def __init__(self):
        self.calls = []
        self.memory = mmap.mmap(-1, 1 << 22)
        self.window = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def map(self, gpa, size, host_addr, *, readonly=False, file=0, offset=0):
        self.calls.append(("map", gpa, size, host_addr, readonly))

    def unmap(self, gpa, size):
        self.calls.append(("unmap", gpa, size))

    def log(self, gpa, bitmap, touched, page, slot):
        self.calls.append(("log", gpa, bool(bitmap), page))


class Slots(MemSlots):
    def __init__(self, fd):
        self.fd = fd
        super().__init__(Ram(), 1 << 40)
        self.log = self.engine.calls

    def region(self, slot, flags, gpa, size, hva, pieces=None):
        change = self.prepare(slot, flags, gpa, size, hva)
        if change is None:
            return
        memory = None
        if change.needs_memory:
            memory = self.host_range(change.new, [Piece(hva, size, self.fd, 0)] if pieces is None else pieces)
        self.apply(change, memory)


@pytest.fixture
def slots(memfd):
    s = Slots(memfd)
    yield s
    s.close()


def fails(code, call, *args):
    with pytest.raises(KvmError) as e:
        call(*args)
    assert e.value.errno == code


@pytest.mark.parametrize("args", [
    (0, 4, 0, 4096, HVA),                   # unknown flag
    (0, 0, 0, 4095, HVA),                   # size
    (0, 0, 1, 4096, HVA),                   # gpa
    (0, 0, 0, 4096, HVA + 1),               # hva
    (0, 0, 0, 4096, 1 << 63),               # not a user address
    (32764, 0, 0, 4096, HVA),               # slot number
    (1 << 16, 0, 0, 4096, HVA),             # address space
    (0, 0, (1 << 64) - 4096, 8192, HVA),    # wraps around
    (0, 0, 1 << 40, 4096, HVA),             # beyond the address width
    (0, 0, 0, 0, HVA),                      # delete what is not there
])
def test_einval(slots, args):
    fails(errno.EINVAL, slots.region, *args)


def test_life_of_a_slot(slots):
    slots.region(0, 0, 0x10000, 0x4000, HVA)
    assert slots.log[-1][:3] == ("map", 0x10000, 0x4000)
    slots.write(0x10FFE, b"abcd")
    assert slots.read(0x10FFC, 8) == b"\0\0abcd\0\0"
    fails(errno.EINVAL, slots.region, 0, 0, 0x10000, 0x8000, HVA)       # resize
    fails(errno.EINVAL, slots.region, 0, READONLY, 0x10000, 0x4000, HVA)
    fails(errno.EEXIST, slots.region, 1, 0, 0x13000, 0x4000, HVA + 0x10000)
    slots.region(0, DIRTY, 0x10000, 0x4000, HVA)
    assert slots.log[-1] == ("log", 0x10000, True, 0)
    slots.region(0, DIRTY, 0x20000, 0x4000, HVA)
    assert [e[0] for e in slots.log[-3:]] == ["unmap", "map", "log"]
    assert slots.read(0x20FFE, 4) == b"abcd"
    fails(errno.EFAULT, slots.read, 0x10000, 1)
    slots.region(0, 0, 0, 0, 0)
    assert slots.log[-1] == ("unmap", 0x20000, 0x4000)
    assert slots.find(0x20000) is None


def test_hole_and_readonly(slots, memfd):
    slots.region(3, READONLY, 0, 0x3000, HVA, [Piece(HVA, 0x1000, memfd, 0), Piece(HVA + 0x2000, 0x1000, memfd, 0x2000)])
    assert [(e[1], e[2], e[4]) for e in slots.log] == [(0, 0x1000, True), (0x2000, 0x1000, True)]
    assert slots.read(0xFF8, 8) == bytes(8)
    fails(errno.EFAULT, slots.read, 0xFF8, 9)
    fails(errno.EFAULT, slots.write, 0, b"x")
    assert slots.find(0x1000).id == 3


def test_region2():
    m = Machine()
    try:
        def region2(flags, gpa=1 << 21):
            data = struct.pack("<IIQQQQI", 1, flags, gpa, 0x1000, 0x10000000, 0, 0).ljust(160, b"\xFF")
            return m.ioctl(VM_INODE, K.KVM_SET_USER_MEMORY_REGION2, 1, data)[0]

        assert region2(1 << 2) == -errno.EINVAL         # KVM_MEM_GUEST_MEMFD
        assert region2(1 << 3) == region2(0, 1) == -errno.EINVAL
        assert region2(0, 0x1000) == -errno.EEXIST
        assert region2(DIRTY) == region2(DIRTY) == 0
        assert region2(READONLY) == -errno.EINVAL
        assert m.vm.memslots.find(1 << 21).id == 1
    finally:
        m.close()


def test_overlap_and_order_of_many(memfd):
    s = Slots(memfd)
    for i in sorted(range(60), key=lambda n: n * 7919 % 60):
        s.region(i, 0, i << 16, 0x2000, HVA)
    assert [slot.id for slot in s] == list(range(60))
    for i in (0, 30, 59):
        fails(errno.EEXIST, s.region, 500, 0, (i << 16) + 0x1000, 0x1000, HVA)
        fails(errno.EEXIST, s.region, 500, 0, i << 16, 1 << 20, HVA)
    s.region(500, 0, 0x2000, 0xE000, HVA)
    assert s.find(0x1FFF).id == 0 and s.find(0x2000).id == 500 and s.find(0x10000).id == 1
    s.close()


@pytest.mark.parametrize("to", [0x11000, 0xF000, 0x40000])
def test_move(slots, memfd, to):
    holey = [Piece(HVA, 0x1000, memfd, 0), Piece(HVA + 0x2000, 0x2000, memfd, 0x2000)]
    slots.region(0, 0, 0x10000, 0x4000, HVA, holey)
    slots.write(0x12FFF, b"ab")
    slots.region(0, 0, to, 0x4000, HVA)
    assert slots.read(to + 0x2FFE, 4) == b"\0ab\0"
    slots.write(to, b"z")
    assert os.pread(memfd, 1, 0) == b"z"
    fails(errno.EFAULT, slots.read, to + 0x1000, 1)


def test_readonly_slot_is_not_written_through(slots, memfd):
    os.pwrite(memfd, b"rom", 0)
    slots.region(0, READONLY, 0, 0x1000, HVA)
    memory = slots.find(0).memory
    ctypes.memset(memory.address, 0x21, 1)      # as the engine's page walk
    assert os.pread(memfd, 3, 0) == b"rom"
