# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that take interrupts of every source of the in-kernel controllers, on one and several vCPUs."""

import resource
import struct
import time

import pytest

from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from tests.unit.fake_client import ARG
from tests.unit.irq_machine import (
    AP_START,
    APIC,
    APIC_ON,
    COUNTS,
    DONE,
    IOAPIC,
    PIC_EOI,
    PIC_INIT,
    X2APIC_EOI,
    eventually,
    handler,
)

BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
IDLE = "sti; idle: hlt; jmp idle\n"


def until(vector, count, then=DONE):
    """Halt until interrupt ``vector`` was counted ``count`` times."""
    return (f"cli; again_{vector}: cmp dword ptr [{COUNTS + 4 * vector:#x}], {count}; jae done_{vector}; "
            f"sti; hlt; cli; jmp again_{vector}; done_{vector}: {then}")


@BOTH
def test_pic(machine, vendor):
    m = machine(vendor, PIC_INIT + "mov al, 0; out 0x21, al; out 0xa1, al\n" + until(0x23, 50, until(0x2A, 50))
                + handler(0x23, PIC_EOI) + handler(0x2A, PIC_EOI))
    running = m.start()
    eventually(m.halted)
    for gsi, vector in ((3, 0x23), (10, 0x2A)):
        for i in range(50):
            m.irq_line(gsi, 1)
            m.irq_line(gsi, 0)
            eventually(lambda i=i, vector=vector: m.count(vector) == i + 1)
    assert running.wait() == 0
    assert (m.reason, m.io()[2]) == (kx.KVM_EXIT_IO, 0xF4)
    assert (m.count(0x23), m.count(0x2A)) == (50, 50)


@BOTH
def test_a_halted_guest_burns_no_time_and_a_signal_ends_it(machine, vendor):
    m = machine(vendor, IDLE)
    running = m.start()
    time.sleep(0.1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert running.waits
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.03
    assert running.stop() == -4
    assert m.reason == kx.KVM_EXIT_INTR
    assert m.vcpu_of(0, K.KVM_GET_MP_STATE)[1] == struct.pack("<I", kx.KVM_MP_STATE_HALTED)


IOAPIC_ENTRY = """
    mov dword ptr [{reg:#x}], {select:#x}; mov dword ptr [{win:#x}], {high:#x}
    mov dword ptr [{reg:#x}], {select_low:#x}; mov dword ptr [{win:#x}], {low:#x}
"""


def redirect(pin, low, high=0):
    return IOAPIC_ENTRY.format(reg=IOAPIC, win=IOAPIC + 0x10, select=0x11 + 2 * pin, select_low=0x10 + 2 * pin,
                               high=high, low=low)


@BOTH
def test_ioapic_edge_and_level(machine, vendor):
    m = machine(vendor, APIC_ON + redirect(20, 0x34) + redirect(21, 0x8035) + until(0x34, 20, until(0x35, 20))
                + handler(0x34) + handler(0x35, f"out 0xf5, al; mov dword ptr [{APIC + 0xB0:#x}], 0"))
    running = m.start()
    for i in range(20):
        eventually(lambda: m.irq_line(20, 0) == 1 and m.irq_line(20, 1) == 1)
        eventually(lambda i=i: m.count(0x34) >= i + 1)
    # Level: the interrupt comes again as long as the line is up; the device hears of it by a port.
    eventually(lambda: m.irq_line(21, 1) == 1)
    for i in range(20):
        assert running.wait() == 0
        assert (m.io()[2], m.count(0x35)) == (0xF5, i + 1)
        if i == 19:
            m.irq_line(21, 0)
        running = m.start()
    assert running.wait() == 0
    assert m.io()[2] == 0xF4
    assert m.count(0x35) == 20


@BOTH
@pytest.mark.parametrize("vcpus", [1, 2])
def test_msi(machine, vendor, vcpus):
    m = machine(vendor, APIC_ON + until(0x44, 200) + handler(0x44), vcpus=vcpus)
    assert m.msi(0x44) == 0                            # the APIC is not enabled yet
    running = m.start()
    for i in range(200):
        eventually(lambda: m.msi(0x44) == 1)
        eventually(lambda i=i: m.count(0x44) >= i + 1)
    assert running.wait() == 0
    assert m.count(0x44) >= 200


@BOTH
def test_self_ipi_and_priorities(machine, vendor):
    """The higher one is taken first, whatever came first; TPR (and CR8) holds the lower ones off."""
    order = "push eax; mov eax, [0x2ffc]; mov byte ptr [0x2e00 + eax], {v}; inc dword ptr [0x2ffc]; pop eax;"
    source = APIC_ON + "".join(f"mov dword ptr [{APIC + 0x300:#x}], {0x40000 | v:#x}\n" for v in (0x41, 0x52, 0x63))
    source += f"mov dword ptr [{APIC + 0x80:#x}], 0x50; sti; nop; nop; nop; cli\n"
    source += f"mov dword ptr [{APIC + 0x80:#x}], 0; sti; nop; nop; nop; cli\n" + DONE
    for v in (0x41, 0x52, 0x63):
        source += handler(v, order.format(v=v) + f"mov dword ptr [{APIC + 0xB0:#x}], 0")
    m = machine(vendor, source)
    assert m.run_within() == 0
    assert m.read(0x2E00, 3) == bytes((0x63, 0x52, 0x41))


@BOTH
@pytest.mark.parametrize("lvt, count", [(0x20031, 20), (0x31, 1)])
def test_lapic_timer(machine, vendor, lvt, count):
    source = (APIC_ON + f"mov dword ptr [{APIC + 0x3E0:#x}], 0xb; mov dword ptr [{APIC + 0x320:#x}], {lvt:#x}; "
              f"mov dword ptr [{APIC + 0x380:#x}], 5000000\n" + until(0x31, count) + handler(0x31))
    m = machine(vendor, source)
    start = time.monotonic()
    assert m.run_within() == 0
    took = time.monotonic() - start
    assert count * 0.005 <= took < count * 0.005 + 0.1
    assert m.count(0x31) == count


@BOTH
def test_a_timer_that_fires_while_the_client_has_the_vcpu(machine, vendor):
    source = (APIC_ON + f"mov dword ptr [{APIC + 0x3E0:#x}], 0xb; mov dword ptr [{APIC + 0x320:#x}], 0x31; "
              f"mov dword ptr [{APIC + 0x380:#x}], 5000000; mov dx, 0x510; out dx, al; sti\n"
              f"spin: cmp dword ptr [{COUNTS + 4 * 0x31:#x}], 1; jne spin; {DONE}\n" + handler(0x31))
    m = machine(vendor, source)
    assert m.start().wait() == 0
    time.sleep(0.02)
    running = m.start()
    try:
        eventually(lambda: not running.waits)
    finally:
        running.stop()
    assert running.result == 0
    assert m.count(0x31) == 1


@BOTH
def test_tsc_deadline(machine, vendor):
    m = machine(vendor, APIC_ON + f"mov dword ptr [{APIC + 0x320:#x}], 0x40031\n"
                + "mov esi, 10; more: rdtsc; mov ebx, eax; add eax, [0x2ff0]; adc edx, 0; mov ecx, 0x6e0; wrmsr\n"
                + "sti; hlt; cli; rdtsc; sub eax, ebx; cmp eax, [0x2ff0]; jb early; dec esi; jnz more\n" + DONE
                + "early: out 0xf6, al\n" + handler(0x31))
    m.write(0x2FF0, struct.pack("<I", 10_000_000))
    start = time.monotonic()
    assert m.run_within() == 0
    assert m.io()[2] == 0xF4, "an interrupt came before its deadline"
    assert m.count(0x31) == 10
    assert time.monotonic() - start < 1


@BOTH
def test_pit_through_the_pic_and_the_ioapic(machine, vendor):
    pit = "mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al\n"      # about 1 kHz
    m = machine(vendor, PIC_INIT + "mov al, 0xfe; out 0x21, al\n" + pit + until(0x20, 100) + handler(0x20, PIC_EOI), pit=True)
    start = time.monotonic()
    assert m.run_within() == 0
    assert 0.095 < time.monotonic() - start < 1
    m = machine(vendor, APIC_ON + "mov al, 0xff; out 0x21, al\n" + redirect(0, 0x30) + pit + until(0x30, 100) + handler(0x30),
                pit=True)
    assert m.run_within() == 0


@BOTH
def test_lost_ticks_are_made_up_for(machine, vendor):
    pit = "mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al\n"
    m = machine(vendor, PIC_INIT + "mov al, 0xfe; out 0x21, al\n" + pit + "out 0xf5, al; " + until(0x20, 300)
                + handler(0x20, PIC_EOI), pit=True)
    assert m.run_within() == 0
    assert m.io()[2] == 0xF5
    time.sleep(0.4)
    start = time.monotonic()
    assert m.run_within() == 0
    assert time.monotonic() - start < 0.25          # 300 ticks of a millisecond


@BOTH
def test_nmi_by_ipi_msi_and_lint0(machine, vendor):
    nmi = "vec_02: inc dword ptr [0x2ff0]; iretd\n"
    m = machine(vendor, APIC_ON + f"mov dword ptr [{APIC + 0x300:#x}], 0x40400\n"
                + "cmp dword ptr [0x2ff0], 1; jne bad; hlt; cmp dword ptr [0x2ff0], 2; jne bad\n"
                + DONE + "bad: out 0xf6, al\n" + nmi)
    running = m.start()
    eventually(lambda: m.read(0x2FF0, 1) == b"\x01")
    time.sleep(0.02)
    assert running.waits
    assert m.msi(0, data=0x400) == 1
    assert running.wait() == 0
    assert m.io()[2] == 0xF4
    pit = "mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al\n"
    m = machine(vendor, APIC_ON + "mov al, 0xff; out 0x21, al\n" + f"mov dword ptr [{APIC + 0x350:#x}], 0x400\n" + pit
                + "wait: cmp dword ptr [0x2ff0], 20; jae out_; hlt; jmp wait; out_: " + DONE + nmi, pit=True)
    m.host.memory.write(ARG, bytes(32))                 # nobody acknowledges these ticks
    assert m.vm_ioctl(K.KVM_REINJECT_CONTROL, ARG) == (0, b"")
    assert m.run_within() == 0


AP_CODE = f"""
.org {AP_START - 0x8000:#x}
.code16
    cli
    lgdtd [cs:gdtr - ap_base]
    mov eax, cr0; or al, 1; mov cr0, eax
    .byte 0x66, 0xea; .long ap32; .word 8
gdtr: .word 31; .long 0x500
.set ap_base, {AP_START:#x}
.code32
ap32:
    mov ax, 16; mov ds, ax; mov es, ax; mov ss, ax
    mov eax, 1
    lock xadd [0x2f00], eax
    inc eax
    shl eax, 8
    lea esp, [eax + 0x20000]
    lidt [idtr]
    mov dword ptr [{APIC + 0xF0:#x}], 0x1ff
    {{enable}}
    lock inc dword ptr [0x2f04]
    sti
ap_idle: hlt; jmp ap_idle
idtr: .word 0x7ff; .long 0x1000
"""
START_APS = f"""
    mov dword ptr [{APIC + 0x310:#x}], 0
    mov dword ptr [{APIC + 0x300:#x}], 0xc4500
    mov dword ptr [{APIC + 0x300:#x}], 0xc4600 + {AP_START >> 12}
    mov dword ptr [{APIC + 0x300:#x}], 0xc4600 + {AP_START >> 12}
waitap: pause; cmp dword ptr [0x2f04], {{aps}}; jb waitap
"""


def smp(vcpus, body, enable=""):
    return (APIC_ON + START_APS.format(aps=vcpus - 1) + body + AP_CODE.replace("{enable}", enable))


@BOTH
@pytest.mark.parametrize("vcpus", [2, 8])
def test_aps_start_and_take_ipis(machine, vendor, vcpus):
    aps = vcpus - 1
    rounds = 25
    body = f"""
    mov esi, {rounds}
next:
    mov dword ptr [{APIC + 0x300:#x}], 0xc4055
    mov edi, [0x2f08]; add edi, {aps}; mov [0x2f08], edi
w1: pause; cmp [{COUNTS + 4 * 0x55:#x}], edi; jb w1
    dec esi; jnz next
    """ + "".join(f"""
    mov dword ptr [{APIC + 0x310:#x}], {i << 24:#x}; mov dword ptr [{APIC + 0x300:#x}], 0x4056
p{i}: pause; cmp dword ptr [{COUNTS + 4 * 0x56:#x}], {i}; jb p{i}
    """ for i in range(1, vcpus)) + DONE + handler(0x55) + handler(0x56)
    m = machine(vendor, smp(vcpus, body), vcpus=vcpus)
    states = [struct.unpack("<I", m.vcpu_of(i, K.KVM_GET_MP_STATE)[1])[0] for i in range(vcpus)]
    assert states == [kx.KVM_MP_STATE_RUNNABLE] + [kx.KVM_MP_STATE_UNINITIALIZED] * aps
    with m.others(vcpus):
        assert m.run_within(30) == 0
    assert (m.reason, m.io()[2]) == (kx.KVM_EXIT_IO, 0xF4)
    assert (m.count(0x55), m.count(0x56)) == (rounds * aps, aps)
    states = [struct.unpack("<I", m.vcpu_of(i, K.KVM_GET_MP_STATE)[1])[0] for i in range(1, vcpus)]
    assert set(states) <= {kx.KVM_MP_STATE_HALTED, kx.KVM_MP_STATE_RUNNABLE}


@BOTH
def test_devices_interrupt_another_cpu(machine, vendor):
    """MSI, I/O APIC, PIT and NMI to the second CPU, while the first one spins."""
    pit = "mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al\n"
    body = "mov al, 0xff; out 0x21, al\n" + redirect(20, 0x60, 1 << 24) + redirect(0, 0x61, 1 << 24) + pit
    body += f"spin: pause; cmp dword ptr [{COUNTS + 4 * 0x62:#x}], 20; jb spin\n" + DONE
    body += handler(0x60) + handler(0x61) + handler(0x62) + "vec_02: inc dword ptr [0x2ff0]; iretd\n"
    m = machine(vendor, smp(2, body), vcpus=2, pit=True)
    with m.others(2):
        running = m.start()
        eventually(lambda: m.read(0x2F04, 1) == b"\x01")
        eventually(lambda: m.irq_line(20, 0) == 1 and m.irq_line(20, 1) == 1)
        eventually(lambda: m.count(0x60) >= 1)
        eventually(lambda: m.count(0x61) >= 50)
        assert m.msi(0, dest=1, data=0x400) == 1
        eventually(lambda: m.read(0x2FF0, 1) == b"\x01")
        for i in range(20):
            assert m.msi(0x62, dest=1) == 1
            eventually(lambda i=i: m.count(0x62) == i + 1)
        assert running.wait() == 0


X2APIC_ON = "mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr; mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr\n"


@BOTH
@pytest.mark.parametrize("vcpus", [2, 8])
def test_x2apic(machine, vendor, vcpus):
    ap = X2APIC_ON
    body = X2APIC_ON + """
    mov ecx, 0x802; rdmsr; cmp eax, 0; jne bad
    mov ecx, 0x80d; rdmsr; cmp eax, 1; jne bad
    mov ecx, 0x83f; mov eax, 0x57; xor edx, edx; wrmsr; sti; nop; cli
    """ + f"cmp dword ptr [{COUNTS + 4 * 0x57:#x}], 1; jne bad\n" + f"""
    mov esi, 25; xor edi, edi
next: mov ecx, 0x830; mov edx, {vcpus - 1}; mov eax, 0x4055; wrmsr
    inc edi
w1: pause; cmp [{COUNTS + 4 * 0x55:#x}], edi; jb w1
    dec esi; jnz next
    mov ecx, 0x830; mov edx, 0xffff; mov eax, 0xc4056; wrmsr
w2: pause; cmp dword ptr [{COUNTS + 4 * 0x56:#x}], {vcpus - 1}; jb w2
    mov ecx, 0x830; mov edx, {(1 << vcpus) - 2}; mov eax, 0x4858; wrmsr
w3: pause; cmp dword ptr [{COUNTS + 4 * 0x58:#x}], {vcpus - 1}; jb w3
    """ + DONE + "bad: out 0xf6, al\n" + "".join(handler(v, X2APIC_EOI) for v in (0x55, 0x56, 0x57, 0x58))
    source = smp(vcpus, body, enable=ap)
    m = machine(vendor, source, vcpus=vcpus)
    with m.others(vcpus):
        assert m.run_within(30) == 0
    assert m.io()[2] == 0xF4
    assert (m.count(0x55), m.count(0x56), m.count(0x58)) == (25, vcpus - 1, vcpus - 1)


@BOTH
def test_init_of_a_running_cpu(machine, vendor):
    """An AP in an endless loop is reset by INIT, and starts again."""
    body = f"""
    mov dword ptr [{APIC + 0x310:#x}], 0x1000000
    mov dword ptr [{APIC + 0x300:#x}], 0x4500
    mov dword ptr [{APIC + 0x300:#x}], 0x4600 + {AP_START >> 12}
again: pause; cmp dword ptr [0x2f04], 2; jb again
    """ + DONE
    m = machine(vendor, smp(2, body).replace("ap_idle: hlt;", "ap_idle: pause;"), vcpus=2)
    with m.others(2):
        assert m.run_within(20) == 0
    assert m.read(0x2F00, 1) == b"\x02"


@BOTH
def test_timers_go_on_after_a_suspend(machine, vendor):
    """The daemon's machine sleeps: the guest stands still, and then gets its ticks again."""
    pit = "mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al\n"
    m = machine(vendor, PIC_INIT + "mov al, 0xfe; out 0x21, al\n" + pit + APIC_ON + f"mov dword ptr [{APIC + 0x350:#x}], 0x700\n"
                + f"mov dword ptr [{APIC + 0x3E0:#x}], 0xb; mov dword ptr [{APIC + 0x320:#x}], 0x20031\n"
                + f"mov dword ptr [{APIC + 0x380:#x}], 1000000\n" + IDLE + handler(0x20, PIC_EOI) + handler(0x31), pit=True)
    running = m.start()
    eventually(lambda: m.count(0x20) >= 10 and m.count(0x31) >= 10)
    m.vm.suspend()
    time.sleep(0.1)
    before = m.count(0x20), m.count(0x31)
    time.sleep(0.1)
    assert (m.count(0x20), m.count(0x31)) == before
    m.vm.resume(200_000_000)
    eventually(lambda: m.count(0x20) >= before[0] + 20 and m.count(0x31) >= before[1] + 20)
    running.stop()
