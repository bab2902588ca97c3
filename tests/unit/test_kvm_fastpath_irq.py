# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN without Python where the interrupt controllers are in here: their accesses and their interrupts are not the client's."""

from __future__ import annotations

import threading
import time

import pytest

from kvmfs.abi import exits as kx
from kvmfs.kvm.kvm_main import VCPU_INODE
from tests.unit.irq_machine import APIC, APIC_ON, COUNTS, DONE, IOAPIC, PIC_INIT, IrqMachine, handler
from tests.unit.machine import BEGUN, Req, ask_shortcut

TIMER = f"mov dword ptr [{APIC + 0x3E0:#x}], 0xb; mov dword ptr [{APIC + 0x320:#x}], 0x31; "
START_TIMER = f"mov dword ptr [{APIC + 0x380:#x}], 30000000; "     # 30 ms
WARM = "mov dx, 0x510; out dx, al; out dx, al; out dx, al; out dx, al; "
MIXED = APIC_ON + PIC_INIT + f"""
l:  mov dx, 0x510
    out dx, al
    in al, dx
    in al, 0x21
    out 0x21, al
    out 0x80, al
    mov ebx, dword ptr [{IOAPIC:#x}]
    mov dword ptr [{IOAPIC + 0x800:#x}], ebx
    mov ecx, dword ptr [{APIC + 0x30:#x}]
    mov dword ptr [0xd0000000], ecx
    mov edx, dword ptr [0xd0000008]
    jmp l
"""


@pytest.fixture(params=("amd", "intel"))
def make(request):
    machines = []

    def make(source, **how):
        machines.append(IrqMachine(request.param, source, **how))
        return machines[-1]

    yield make
    for m in machines:
        m.close()


def run_to(m, port, limit=100):
    """KVM_RUNs until the guest's OUT to ``port``; how many."""
    for turn in range(limit):
        assert m.run() == 0
        assert m.reason == kx.KVM_EXIT_IO
        if int.from_bytes(m.run_page[34:36], "little") == port:
            return turn
    raise AssertionError(f"no OUT to {port:#x}")


def test_the_client_sees_the_same(make):
    plain, quick = make(MIXED), make(MIXED)
    plain.with_shortcut = False
    for turn in range(120):
        for m in (plain, quick):
            assert m.run() == 0
        assert bytes(plain.run_page[:304]) == bytes(quick.run_page[:304]), turn
        assert bytes(plain.run_page[4096:4104]) == bytes(quick.run_page[4096:4104]), turn
        for m in (plain, quick):
            m.run_page[4096 if m.reason == kx.KVM_EXIT_IO else 40] = turn
    assert plain.regs() == quick.regs()
    assert quick.answered > 50


def test_a_timer_that_fires_while_the_vcpu_is_armed(make):
    m = make(APIC_ON + TIMER + START_TIMER + WARM + f"sti\nspin: out dx, al; cmp dword ptr [{COUNTS + 4 * 0x31:#x}], 1; jne spin\n"
             + DONE + "\n" + handler(0x31))
    for _ in range(5):
        assert m.run() == 0
    assert m.answered
    time.sleep(0.05)
    assert run_to(m, 0xF4) <= 2         # the next one is Python's, and takes the interrupt with it
    assert m.count(0x31) == 1


def spinning(m):
    """The guest is in a loop; the request that it got there with, and where the verdict will be."""
    request, verdicts = Req(VCPU_INODE, 0xAE80), []
    runner = threading.Thread(target=lambda: verdicts.append(ask_shortcut(m.vm, request)[0]), daemon=True)
    runner.start()
    deadline = time.monotonic() + 10
    while not m.vcpu.mutex.running() and time.monotonic() < deadline:
        time.sleep(0.001)
    return request, runner, verdicts


@pytest.mark.parametrize("event", ["timer", "pic", "msi"])
def test_an_event_while_the_guest_runs(make, event):
    timer = START_TIMER if event == "timer" else ""
    m = make(APIC_ON + PIC_INIT + "mov al, 0xef; out 0x21, al; " + TIMER + WARM + timer
             + "out dx, al; sti\nspin: jmp spin\nvec_24: vec_31: mov al, 1; " + DONE)
    for _ in range(5):
        assert m.run() == 0
    request, runner, verdicts = spinning(m)
    if event == "pic":
        m.irq_line(4, 1)
    elif event == "msi":
        assert m.msi(0x31) == 1
    runner.join(10)
    assert verdicts == [BEGUN]
    assert m.dispatch.go_on(request) == 0
    assert int.from_bytes(m.run_page[34:36], "little") == 0xF4


def test_a_page_that_becomes_the_apics(make):
    """Its MMIO was the client's as long as the APIC was elsewhere."""
    move = "mov ecx, 0x1b; rdmsr; and eax, 0xfff; or eax, {base:#x}; wrmsr; "
    access = "mov dx, 0x510; mov ebx, dword ptr [0xd0000030]; out dx, al; " * 4
    m = make(APIC_ON + access + move.format(base=0xD0000000) + "mov ebx, dword ptr [0xd0000030]; mov eax, ebx; " + DONE)
    reads = 0
    while True:
        assert m.run() == 0
        if m.reason != kx.KVM_EXIT_MMIO:
            if int.from_bytes(m.run_page[34:36], "little") == 0xF4:
                break
            continue
        reads += 1
        m.run_page[40:44] = b"\xff\xff\xff\xff"
    assert reads == 4
    assert m.answered
    assert m.regs()["rbx"] & 0xFF == 0x14       # the version of KVM's APIC


def test_no_interrupt_is_lost(make):
    """A guest that leaves all the time, and interrupts at any moment of it."""
    m = make(APIC_ON + f"mov dx, 0x510; sti\nl: out dx, al; cmp dword ptr [{COUNTS + 4 * 0x41:#x}], 500; jb l; {DONE}\n"
             + handler(0x41))
    done = threading.Event()

    def client():
        while not done.is_set():
            assert m.run() == 0
            if int.from_bytes(m.run_page[34:36], "little") == 0xF4:
                done.set()

    assert m.run() == 0                 # the APIC is on
    runner = threading.Thread(target=client, daemon=True)
    runner.start()
    for sent in range(500):
        assert m.msi(0x41) == 1
        deadline = time.monotonic() + 10
        while m.count(0x41) == sent:
            time.sleep(0.0001)
            assert time.monotonic() < deadline, sent
    assert done.wait(10)
    runner.join(10)
    assert m.answered
