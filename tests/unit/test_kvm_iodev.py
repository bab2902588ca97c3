# SPDX-License-Identifier: GPL-2.0-or-later
"""Coalesced zones and ioeventfds: writes that do not exit."""

import contextlib
import os
import struct

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO
from kvmfs.abi.x86 import KVM_COALESCED_MMIO_MAX
from kvmfs.kvm.iodev import NR_IOBUS_DEVS, IoBus
from kvmfs.kvm.kvm_main import VM_INODE
from tests.unit.machine import Machine, error

RING = 0x2000
MATCH, PIO, DEASSIGN = 1, 2, 4
# Real mode reaches MMIO above 1 MiB only through a segment whose base the test sets.
STORE = "again: mov dword ptr [0x100], eax; hlt; mov word ptr [0x104], bx; hlt; mov byte ptr [0xffe], cl; hlt; jmp again"
OUTS = "again: mov dx, 0x80; out dx, al; hlt; out dx, ax; hlt; mov dx, 0x81; out dx, eax; hlt; jmp again"


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    made = []

    def make(source):
        m = Machine(request.param, source, rax=0x44332211, rbx=0x6655, rcx=0x77)
        made.append(m)
        sregs = m.sregs()
        sregs.ds.base = 0x200000
        m.set_sregs(sregs)
        return m

    yield make
    for m in made:
        m.close()


@pytest.fixture
def efd():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def count(fd):
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


def zone(m, register, addr, size, pio=0):
    cmd = K.KVM_REGISTER_COALESCED_MMIO if register else K.KVM_UNREGISTER_COALESCED_MMIO
    return m.ioctl(VM_INODE, cmd, 1, struct.pack("<QII", addr, size, pio))[0]


def ioeventfd(m, fd, addr, length, flags=0, match=0):
    data = struct.pack("<QQIiI", match, addr, length, fd, flags).ljust(64, b"\0")
    return m.ioctl(VM_INODE, K.KVM_IOEVENTFD, 1, data)[0]


def step(m):
    assert m.run() == 0
    return m.reason


def ring(m):
    """first, last, entries as (address, length, pio, data)."""
    first, last = struct.unpack_from("<II", m.run_page, RING)
    entries = []
    for i in range(first, last):
        addr, length, pio, data = struct.unpack_from("<QII8s", m.run_page, RING + 8 + 24 * i)
        entries.append((addr, length, pio, data[:length]))
    return first, last, entries


def test_coalesced_mmio(machine):
    m = machine(STORE)
    assert zone(m, True, 0x200000, 0x108) == 0
    assert step(m) == KVM_EXIT_HLT
    assert step(m) == KVM_EXIT_HLT
    assert ring(m) == (0, 2, [(0x200100, 4, 0, b"\x11\x22\x33\x44"), (0x200104, 2, 0, b"\x55\x66")])
    assert step(m) == KVM_EXIT_MMIO and m.mmio() == (0x200FFE, b"\x77", 1)
    assert step(m) == KVM_EXIT_HLT
    assert zone(m, False, 0x200100, 4) == 0         # the zone that contains it goes
    assert step(m) == KVM_EXIT_MMIO and m.mmio()[0] == 0x200100


def test_a_full_ring_exits(machine):
    m = machine(STORE)
    assert zone(m, True, 0x200100, 4) == 0
    struct.pack_into("<II", m.run_page, RING, 5, 4)
    assert step(m) == KVM_EXIT_MMIO
    assert step(m) == KVM_EXIT_HLT
    struct.pack_into("<II", m.run_page, RING, 5, KVM_COALESCED_MMIO_MAX)        # the client's mischief
    for _ in range(5):
        m.run()
    assert m.reason == KVM_EXIT_MMIO or step(m) == KVM_EXIT_MMIO
    struct.pack_into("<II", m.run_page, RING, 5, KVM_COALESCED_MMIO_MAX - 1)
    for _ in range(6):
        m.run()
    assert struct.unpack_from("<II", m.run_page, RING) == (5, 0)


def test_coalesced_pio(machine):
    m = machine(OUTS)
    assert zone(m, True, 0x80, 2, 2) == zone(m, False, 0x80, 2, 2) == error("EINVAL")
    assert zone(m, True, 0x80, 2, 1) == 0
    assert step(m) == KVM_EXIT_HLT
    assert step(m) == KVM_EXIT_HLT
    assert ring(m) == (0, 2, [(0x80, 1, 1, b"\x11"), (0x80, 2, 1, b"\x11\x22")])
    assert step(m) == KVM_EXIT_IO and m.io()[1:3] == (4, 0x81)
    assert zone(m, False, 0x80, 1, 0) == 0          # another bus
    assert len(m.vm.pio_bus.ranges) == 1
    assert zone(m, False, 0x80, 3, 1) == 0          # not contained in it
    assert len(m.vm.pio_bus.ranges) == 1


def test_only_the_first_vcpu_has_a_ring(machine):
    m = machine(STORE)
    zone(m, True, 0x200100, 4)
    m.vcpu.index = 1
    assert step(m) == KVM_EXIT_MMIO


def test_ioeventfd_mmio(machine, efd):
    m = machine(STORE)
    assert ioeventfd(m, efd, 0x200100, 4) == 0
    assert ioeventfd(m, efd, 0x200104, 4) == 0      # the guest writes two bytes there
    assert ioeventfd(m, efd, 0x200FFE, 0) == 0      # any length
    assert step(m) == KVM_EXIT_HLT and count(efd) == 1
    assert step(m) == KVM_EXIT_MMIO and count(efd) == 0
    assert step(m) == KVM_EXIT_HLT
    assert step(m) == KVM_EXIT_HLT and count(efd) == 1
    assert ioeventfd(m, efd, 0x200100, 4, DEASSIGN) == 0
    assert ioeventfd(m, efd, 0x200100, 4, DEASSIGN) == error("ENOENT")
    assert step(m) == KVM_EXIT_MMIO and count(efd) == 0


def test_ioeventfd_pio_with_datamatch(machine, efd):
    m = machine(OUTS)
    assert ioeventfd(m, efd, 0x80, 1, PIO | MATCH, 0x11) == 0
    assert ioeventfd(m, efd, 0x80, 2, PIO | MATCH, 0x2212) == 0
    assert ioeventfd(m, efd, 0x81, 4, PIO) == 0
    assert step(m) == KVM_EXIT_HLT and count(efd) == 1
    assert step(m) == KVM_EXIT_IO and m.io()[1:3] == (2, 0x80)
    assert step(m) == KVM_EXIT_HLT
    assert step(m) == KVM_EXIT_HLT and count(efd) == 1
    assert ioeventfd(m, efd, 0x80, 1, PIO | DEASSIGN, 0x11) == error("ENOENT")      # that is the wildcard
    assert ioeventfd(m, efd, 0x80, 1, MATCH | DEASSIGN, 0x11) == error("ENOENT")    # that is MMIO's
    other = os.eventfd(0)
    assert ioeventfd(m, other, 0x80, 1, PIO | MATCH | DEASSIGN, 0x11) == error("ENOENT")
    os.close(other)
    same = os.dup(efd)
    assert ioeventfd(m, same, 0x80, 1, PIO | MATCH | DEASSIGN, 0x11) == 0
    os.close(same)
    assert step(m) == KVM_EXIT_IO


def test_ioeventfd_errors(machine, efd):
    m = machine(STORE)
    for args in ((0x1000, 3), (0x1000, 16), ((1 << 64) - 1, 8), (0x1000, 4, 1 << 5), (0x1000, 0, MATCH)):
        assert ioeventfd(m, efd, *args) == error("EINVAL")
    assert ioeventfd(m, -1, 0x1000, 4) == ioeventfd(m, -1, 0x1000, 4, DEASSIGN) == error("EBADF")
    assert ioeventfd(m, m.host.fd, 0x1000, 4) == error("EINVAL")
    assert ioeventfd(m, efd, 0x1000, 4, MATCH, 7) == 0
    assert ioeventfd(m, efd, 0x1000, 4, MATCH, 8) == 0
    assert ioeventfd(m, efd, 0x1000, 2) == 0
    for args in ((0x1000, 4, MATCH, 7), (0x1000, 4), (0x1000, 0)):
        assert ioeventfd(m, efd, *args) == error("EEXIST")
    assert ioeventfd(m, efd, 0x1000, 4, PIO) == 0
    assert len(m.vm.mmio_bus.ranges) == 3


def test_the_first_on_the_bus_takes_it(machine, efd):
    m = machine(STORE)
    zone(m, True, 0x200000, 0x1000)
    ioeventfd(m, efd, 0x200100, 4)
    assert step(m) == KVM_EXIT_HLT
    assert (count(efd), ring(m)[1]) == (0, 1)


def test_bus_limit():
    bus = IoBus()
    for i in range(NR_IOBUS_DEVS):
        bus.register(i, 1, None)
    with pytest.raises(OSError, match="space"):
        bus.register(5000, 1, None)
    bus.ioeventfd_count = 1
    bus.register(5000, 1, None)
    assert [r.addr for r in bus.ranges] == [*range(NR_IOBUS_DEVS), 5000]


def test_which_addresses_a_bus_covers():
    class Doorbell:
        taken = ()

        def write(self, vcpu, addr, data):
            self.taken = (*self.taken, addr)
            return True

        def read(self, vcpu, addr, size):
            return bytes(size)

    bus, one, two, any_size = IoBus(), Doorbell(), Doorbell(), Doorbell()
    assert not bus.may_write(0) and not bus.may_read(0)
    bus.register_readable(0x20, 2, one)
    bus.register(0x22, 4, two)          # next to it
    bus.register(0x21, 1, two)          # within it
    bus.register(0x80, 0, any_size)
    assert [a for a in range(0x100) if bus.may_write(a)] == [*range(0x20, 0x26), 0x80]
    assert [a for a in range(0x100) if bus.may_read(a)] == [0x20, 0x21]
    assert bus.write(None, 0x80, b"1234") and any_size.taken == (0x80,)
    assert not bus.write(None, 0x81, b"1")
    assert bus.read(None, 0x20, 1) == b"\0" and bus.read(None, 0x22, 1) is None
    bus.unregister(one)
    assert [a for a in range(0x100) if bus.may_write(a)] == [*range(0x21, 0x26), 0x80]
    assert not bus.may_read(0x20)
