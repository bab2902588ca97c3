# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty rings: entries, the exit when one is full, and resetting."""

import struct

import pytest

from kvmfs import vendor
from kvmfs.abi import caps as C
from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_HLT
from kvmfs.api.dispatch import VmDispatcher
from kvmfs.kvm import dirty_ring
from kvmfs.kvm.kvm_main import VM_INODE, Vm
from tests.unit.machine import RAM, Machine, error

LOG = 1
RING = 64 * 4096
SIZE = {"amd": 4096, "intel": 16384}        # bytes: 256 and 1024 entries
SOFT = {"amd": 256 - 64, "intel": 1024 - 64 - 512}


class RingMachine(Machine):
    def __init__(self, name, source, bits=16, **registers):
        self.name = name
        init = Vm.__init__

        def with_rings(vm, vendor, host):
            init(vm, vendor, host)
            self.vm, self.dispatch = vm, None
            dirty_ring.enable(vm, SIZE[name])

        Vm.__init__ = with_rings
        try:
            super().__init__(name, source, bits, **registers)
        finally:
            Vm.__init__ = init
        self.region(0, LOG, 0, RAM, 0)

    def entries(self):
        """The (slot, page) of dirty entries, which are marked as collected."""
        found, memory = [], self.vcpu.run_map
        for at in range(RING, RING + SIZE[self.name], 16):
            flags, slot, offset = struct.unpack_from("<IIQ", memory, at)
            if flags == 1:
                found.append((slot, offset))
                struct.pack_into("<I", memory, at, 2)
        return found

    def reset(self):
        return self.ioctl(VM_INODE, K.KVM_RESET_DIRTY_RINGS)[0]


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    made = []

    def make(source, kind=RingMachine, **kwargs):
        made.append(kind(request.param, source, **kwargs))
        return made[-1]

    yield make
    for m in made:
        m.close()


STORES = """
again:
    mov byte ptr [0x2000], al
    mov byte ptr [0x3000], al
    mov byte ptr [0x2001], al
    hlt
    jmp again
"""


def test_entries_and_reset(machine):
    m = machine(STORES)
    assert m.run() == 0 and m.reason == KVM_EXIT_HLT
    assert m.entries() == [(0, 2), (0, 3)]
    assert m.run() == 0
    assert m.entries() == []                    # not logged again before the reset
    assert m.reset() == 2
    assert m.reset() == 0
    assert m.run() == 0
    assert m.entries() == [(0, 2), (0, 3)]
    m.vm.memslots.write(0x5FFF, b"ab")
    assert m.entries() == [(0, 5), (0, 6)]
    assert m.reset() == 4


def test_no_bitmap(machine):
    m = machine(STORES)
    for cmd, data in ((K.KVM_GET_DIRTY_LOG, struct.pack("<IIQ", 1 << 16, 0, 0)),
                      (K.KVM_CLEAR_DIRTY_LOG, struct.pack("<IIQQ", 1 << 16, 0, 0, 0))):
        assert m.ioctl(VM_INODE, cmd, 1, data)[0] == error("ENXIO")


# In each page from 1 MiB on a word is incremented once, away from the code, which some of them show; the stores of a whole
# block go to different pages.
UNROLLED = """
again:
    .rept 40
    add dword ptr [ebp + 0xff0], 1
    add ebp, 0x1000
    .endr
    cmp ebp, esi
    jb again
    hlt
"""
PAGES = 1200


def test_full_ring(machine):
    m = machine(UNROLLED, bits=32, rbp=RAM, rsi=RAM + PAGES * 4096)
    sregs = m.sregs()
    for name in ("cs", "ds", "ss", "es"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.g, segment.db = 0, 0xFFFFFFFF, 1, 1
    sregs.cr0 |= 1
    assert m.set_sregs(sregs) == 0
    for slot in range(1, 6):                    # all of them show the same memory
        assert m.region(slot, LOG, slot * RAM, RAM, 0) == 0
    m.write(0, bytes(0x8000))
    collected = []
    while True:
        assert m.run() == 0
        if m.reason == KVM_EXIT_HLT:
            break
        assert m.reason == KVM_EXIT_DIRTY_RING_FULL
        assert m.run() == 0 and m.reason == KVM_EXIT_DIRTY_RING_FULL      # as long as nobody makes room
        new = m.entries()
        assert len(new) == SOFT[m.name]
        collected += new
        assert m.reset() == len(new)
    collected += m.entries()
    pages = [(slot - 1) * 256 + page for slot, page in collected]
    # The page at which the ring was full is written after the reset, so that it is told again.
    assert sorted(set(pages)) == list(range(PAGES))
    assert len(pages) - PAGES == (len(pages) - 1) // SOFT[m.name]
    values = [struct.unpack_from("<I", m.read((page << 12) + 0xFF0, 4))[0] for page in range(7)]
    assert values == [5] * 7                    # each in five slots, none twice


def test_enable(machine):
    other = machine("hlt", Machine)
    assert enable(other, 4096 * 4) == error("EINVAL")       # there is a vCPU

    class Empty(Machine):
        def __init__(self, name, source):
            self.vm = Vm(vendor.load(name), other.host)
            self.dispatch = VmDispatcher(self.vm)

        def close(self):
            self.vm.destroy()

    m = machine("", Empty)
    for size in (0, 5000, 2048, 1 << 32):
        assert enable(m, size) == error("EINVAL")
    assert enable(m, 1 << 21) == error("E2BIG")
    assert m.ioctl(VM_INODE, K.KVM_CHECK_EXTENSION, C.KVM_CAP_DIRTY_LOG_RING)[0] == 1 << 20
    assert m.ioctl(VM_INODE, K.KVM_RESET_DIRTY_RINGS)[0] == error("EINVAL")
    assert enable(m, 1 << 20) == 0
    assert enable(m, 1 << 20) == error("EINVAL")
    assert m.ioctl(VM_INODE, K.KVM_RESET_DIRTY_RINGS)[0] == 0


def enable(m, size):
    data = struct.pack("<IIQ88x", C.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 0, size)
    return m.ioctl(VM_INODE, K.KVM_ENABLE_CAP, 1, data)[0]
