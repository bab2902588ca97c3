# SPDX-License-Identifier: GPL-2.0-or-later
"""irqfds: eventfds that interrupt a guest."""

import os
import resource
import select
import struct
import threading
import time

import pytest

from kvmfs.abi import caps as C
from kvmfs.abi import ioctls as K
from kvmfs.kvm import caps, irq
from tests.unit.fake_client import ARG
from tests.unit.irq_machine import APIC, APIC_ON, COUNTS, DONE, IOAPIC, PIC_EOI, PIC_INIT, eventually, handler
from tests.unit.machine import Machine, error

BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
DEASSIGN, RESAMPLE = 1, 2
EVENTS = int(os.environ.get("KVMFS_TEST_EVENTS", "2000"))     # of each ping-pong; 100000 takes minutes
IDLE = "sti; idle: hlt; jmp idle\n"
SPIN = "sti; spin: jmp spin\n"
WAIT = "wait: cli; cmp dword ptr [{}], {}; jae done; sti; {}; jmp wait; done: {}"
ROUTE = struct.Struct("<IIIIIII20x")
DOORBELL = 0x510


@pytest.fixture
def efd():
    made = []

    def make(count=0, flags=os.EFD_NONBLOCK):
        made.append(os.eventfd(count, flags))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def irqfd(m, fd, gsi, flags=0, resamplefd=0):
    return m.ioctl(2, K.KVM_IRQFD, 1, struct.pack("<iIIi16x", fd, gsi, flags, resamplefd))[0]


def route_msi(m, *vectors):
    """GSI 24, 25, ... are edge-triggered MSIs with these vectors."""
    entries = [ROUTE.pack(24 + i, 2, 0, 0, 0xFEE00000, 0, vector) for i, vector in enumerate(vectors)]
    m.host.memory.write(ARG, struct.pack("<II", len(entries), 0) + b"".join(entries))
    return m.vm_ioctl(K.KVM_SET_GSI_ROUTING, ARG, struct.pack("<II", len(entries), 0))[0]


def entry(pin, value):
    """Guest code that sets a redirection entry."""
    return f"""
        mov dword ptr [{IOAPIC:#x}], {0x10 + 2 * pin}; mov dword ptr [{IOAPIC + 16:#x}], {value:#x}
        mov dword ptr [{IOAPIC:#x}], {0x11 + 2 * pin}; mov dword ptr [{IOAPIC + 16:#x}], 0
    """


def test_capabilities():
    assert caps.SUPPORTED[C.KVM_CAP_IRQFD] == caps.SUPPORTED[C.KVM_CAP_IRQFD_RESAMPLE] == 1


def test_errors_without_an_irqchip(machine, efd):
    m = machine(cls=Machine)
    assert irqfd(m, efd(), 4) == error("EINVAL")
    assert irqfd(m, -1, 4) == error("EINVAL")
    assert irqfd(m, -1, 4, 4) == irqfd(m, efd(), 4, DEASSIGN | 8) == error("EINVAL")
    assert irqfd(m, efd(), 4, DEASSIGN) == 0
    assert irqfd(m, -1, 4, DEASSIGN) == error("EBADF")


def test_errors(machine, efd):
    m, fd = machine(), efd()
    assert irqfd(m, -1, 4) == error("EBADF")
    assert irqfd(m, m.host.fd, 4) == irqfd(m, m.host.fd, 4, DEASSIGN) == error("EINVAL")
    assert irqfd(m, fd, 4, RESAMPLE, -1) == error("EBADF")
    assert irqfd(m, fd, 4, RESAMPLE, m.host.fd) == error("EINVAL")
    assert irqfd(m, -1, 4, RESAMPLE, -1) == error("EBADF")
    assert irqfd(m, fd, 4) == 0
    assert irqfd(m, fd, 5) == irqfd(m, fd, 4) == error("EBUSY")
    same = os.dup(fd)
    assert irqfd(m, same, 4) == irqfd(m, same, 6, RESAMPLE, fd) == error("EBUSY")
    assert irqfd(m, fd, 4, RESAMPLE, -1) == error("EBADF")              # before the eventfd is found to be taken
    assert irqfd(m, fd, 5, DEASSIGN) == 0                               # that is another one
    assert irqfd(m, fd, 4) == error("EBUSY")
    assert irqfd(m, same, 4, DEASSIGN | RESAMPLE, -1) == 0              # the other descriptor does not matter then
    os.close(same)
    assert irqfd(m, fd, 4, DEASSIGN) == 0
    assert irqfd(m, fd, 0xFFFFFFFF) == 0                                # a GSI that leads nowhere
    os.eventfd_write(fd, 1)
    eventually(lambda: not select.select((fd,), (), (), 0)[0])
    assert not m.vm.arch.irqchip.resamplers


def test_no_resampling_with_a_split_irqchip(machine, efd):
    m = machine(setup=lambda vm: irq.enable_split_irqchip(vm, 24))
    assert irqfd(m, efd(), 4, RESAMPLE, efd()) == error("EINVAL")
    assert irqfd(m, efd(), 4) == 0


@BOTH
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("code", [IDLE, SPIN])
def test_msi(machine, efd, vendor, split, code):
    m = machine(vendor, APIC_ON + code + handler(0x41) + handler(0x42),
                setup=(lambda vm: irq.enable_split_irqchip(vm, 0)) if split else None)
    first, second = efd(), efd(flags=0)         # it does not matter whether the client's blocks
    assert irqfd(m, first, 24) == irqfd(m, second, 25) == 0
    assert route_msi(m, 0x41, 0x42) == 0        # after: irqfds follow the routes
    running = m.start()
    eventually(lambda: m.vcpu.arch.apic.sw_enabled)
    for i in range(1, 21):
        os.eventfd_write(first, i)
        eventually(lambda i=i: m.count(0x41) == i)
    os.eventfd_write(second, 1)
    eventually(lambda: m.count(0x42) == 1)
    assert irqfd(m, first, 24, DEASSIGN) == 0
    os.eventfd_write(first, 7)
    os.eventfd_write(second, 1)
    eventually(lambda: m.count(0x42) == 2)
    assert m.count(0x41) == 20
    assert os.eventfd_read(first) == 7          # nobody took it
    running.stop()


@BOTH
def test_pins_of_the_pic_and_the_ioapic(machine, efd, vendor):
    m = machine(vendor, PIC_INIT + "mov al, 0; out 0x21, al; out 0xa1, al\n" + APIC_ON
                + f"mov dword ptr [{APIC + 0x350:#x}], 0x700\n" + entry(20, 0x54) + IDLE + handler(0x54) + handler(0x2A, PIC_EOI))
    fds = {0x54: efd(), 0x2A: efd()}
    assert irqfd(m, fds[0x54], 20) == irqfd(m, fds[0x2A], 10) == 0
    running = m.start()
    eventually(m.halted)
    for i in range(1, 11):
        for vector, fd in fds.items():
            os.eventfd_write(fd, 1)
            eventually(lambda i=i, vector=vector: m.count(vector) == i)
    running.stop()


def test_one_that_was_signalled_before_interrupts_at_once(machine, efd):
    m, fd = machine("amd", APIC_ON + IDLE + handler(0x41)), efd(3)
    assert route_msi(m, 0x41) == 0
    running = m.start()
    eventually(m.halted)
    assert irqfd(m, fd, 24) == 0
    eventually(lambda: m.count(0x41) == 1)
    time.sleep(0.05)
    assert m.count(0x41) == 1
    assert os.eventfd_read(fd) == 3             # in Linux, too, that one only interrupts
    os.eventfd_write(fd, 1)
    eventually(lambda: m.count(0x41) == 2)
    assert not select.select((fd,), (), (), 0)[0]
    running.stop()


@BOTH
def test_resample(machine, efd, vendor):
    """A level-triggered line: up until the guest's EOI, which its client hears of, and raises it again."""
    m = machine(vendor, APIC_ON + entry(20, 0x8054) + IDLE + handler(0x54))
    fd, resamplefd, other, other_resamplefd = efd(), efd(), efd(), efd()
    assert irqfd(m, fd, 20, RESAMPLE, resamplefd) == irqfd(m, other, 20, RESAMPLE, other_resamplefd) == 0
    running = m.start()
    eventually(m.halted)
    for i in range(1, 6):
        os.eventfd_write(fd, 1)
        assert select.select((resamplefd,), (), (), 10)[0]
        assert os.eventfd_read(resamplefd) == 1
        assert m.count(0x54) == i
    eventually(m.halted)
    assert os.eventfd_read(other_resamplefd) == 5               # the line is theirs together
    ioapic = m.vm.arch.irqchip.ioapic
    assert not ioapic.irr and not ioapic.redirtbl[20] & 1 << 14
    assert irqfd(m, other, 20, DEASSIGN) == 0
    assert m.vm.arch.irqchip.resamplers
    assert irqfd(m, fd, 20, DEASSIGN) == 0
    assert not m.vm.arch.irqchip.resamplers
    running.stop()


def test_a_raised_line_falls_with_its_last_irqfd(machine, efd):
    m, fd = machine("amd", APIC_ON + IDLE + handler(0x54)), efd()
    ioapic = m.vm.arch.irqchip.ioapic
    assert irqfd(m, fd, 20, RESAMPLE, efd()) == 0
    os.eventfd_write(fd, 1)
    eventually(lambda: ioapic.irr == 1 << 20)
    assert irqfd(m, fd, 20, DEASSIGN) == 0
    assert not ioapic.irr


def test_a_pin_that_is_unmasked_resamples(machine, efd):
    m, fd, resamplefd = machine("amd", APIC_ON + entry(20, 0x8054) + DONE), efd(), efd()
    assert irqfd(m, fd, 20, RESAMPLE, resamplefd) == 0
    os.eventfd_write(fd, 1)
    eventually(lambda: m.vm.arch.irqchip.ioapic.irr == 1 << 20)
    assert m.run_within() == 0
    assert os.eventfd_read(resamplefd) == 1
    assert not m.vm.arch.irqchip.ioapic.irr


def answer(doorbell, fd, count, finished):
    """A device: each time the guest rings it interrupts."""
    for _ in range(count):
        if not select.select((doorbell,), (), (), 20)[0]:
            return
        os.eventfd_read(doorbell)
        os.eventfd_write(fd, 1)
    finished.set()


@BOTH
@pytest.mark.parametrize("halt", ["hlt", "pause"])
def test_ping_pong(machine, efd, vendor, halt):
    """The guest rings, the client interrupts, the guest rings again: nothing is lost and nothing comes twice."""
    ring = f"mov dx, {DOORBELL}; out dx, al\n"
    m = machine(vendor, APIC_ON + ring + WAIT.format(COUNTS + 4 * 0x41, EVENTS, halt, DONE)
                + f"vec_41: push eax; push edx; inc dword ptr [{COUNTS + 4 * 0x41:#x}]\n"
                f"mov dword ptr [{APIC + 0xB0:#x}], 0; {ring} pop edx; pop eax; iretd\n")
    doorbell, fd, finished = efd(), efd(), threading.Event()
    data = struct.pack("<QQIiI", 0, DOORBELL, 1, doorbell, 2).ljust(64, b"\0")
    assert m.vm_ioctl(K.KVM_IOEVENTFD, 1, data)[0] == 0
    assert route_msi(m, 0x41) == irqfd(m, fd, 24) == 0
    device = threading.Thread(target=answer, args=(doorbell, fd, EVENTS, finished))
    device.start()
    try:
        assert m.run_within(30 + EVENTS // 500) == 0
    finally:
        device.join(40)
    assert finished.is_set()
    assert m.count(0x41) == EVENTS
    assert os.eventfd_read(doorbell) == 1       # the last one's


@BOTH
def test_resample_ping_pong(machine, efd, vendor):
    """The client raises the line again when the guest has acknowledged it, each time."""
    m = machine(vendor, APIC_ON + entry(20, 0x8054) + WAIT.format(COUNTS + 4 * 0x54, EVENTS, "hlt", DONE) + handler(0x54))
    fd, resamplefd, finished = efd(), efd(), threading.Event()
    assert irqfd(m, fd, 20, RESAMPLE, resamplefd) == 0
    device = threading.Thread(target=answer, args=(resamplefd, fd, EVENTS - 1, finished))
    running = m.start()
    eventually(m.halted)
    device.start()
    os.eventfd_write(fd, 1)
    try:
        assert running.wait(30 + EVENTS // 500) == 0
    finally:
        running.stop()
        device.join(40)
    assert finished.is_set()
    assert m.count(0x54) == EVENTS


def test_waiting_costs_nothing(machine, efd):
    m = machine("amd", APIC_ON + IDLE + handler(0x41))
    for _ in range(20):
        assert irqfd(m, efd(), 24) == 0
    running = m.start()
    eventually(m.halted)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.05
    running.stop()
