# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests with many vCPUs: starting them, what they see of each other, whose turn it is."""

import resource
import struct
import time

import pytest

from kvmfs.abi import ioctls as K
from tests.unit.irq_machine import APIC, COUNTS, DONE, eventually, handler
from tests.unit.test_kvm_irq_guests import smp

BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
STARTED = "lock inc dword ptr [0x2f04]\n"       # an AP that works on before it is idle says so itself
UNDONE = "lock dec dword ptr [0x2f04]\n"


def run(machine, vendor, vcpus, body, ap="", extra=""):
    """All vCPUs but the first do ``ap`` and then halt; the first does ``body``."""
    m = machine(vendor, smp(vcpus, body + DONE + extra, STARTED + ap + UNDONE if ap else ""), vcpus=vcpus)
    with m.others(vcpus):
        assert m.run_within(40) == 0
    assert m.io()[2] == 0xF4
    return m


def word(m, address):
    return struct.unpack("<I", m.read(address, 4))[0]


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("vendor, vcpus", [("amd", 16), ("intel", 32), ("amd", 64)])
def test_many_start_take_ipis_and_rest(machine, vendor, vcpus):
    """INIT, SIPI and IPIs to all; exact counts of locked increments; halted they cost nothing."""
    body = "".join(f"mov dword ptr [{APIC + 0x300:#x}], 0xc4055\n"
                   f"w{i}: pause; cmp dword ptr [{COUNTS + 4 * 0x55:#x}], {i * (vcpus - 1)}; jb w{i}\n" for i in (1, 2, 3))
    loop = "mov ecx, 5000; again: lock inc dword ptr [0x2f20]; loop again\n"
    m = machine(vendor, smp(vcpus, body + "sti; idle: hlt; jmp idle\n" + handler(0x55), STARTED + loop + UNDONE), vcpus=vcpus)
    with m.others(vcpus):
        running = m.start()
        eventually(lambda: m.count(0x55) == 3 * (vcpus - 1), 40)
        eventually(lambda: all(m.halted(i) for i in range(vcpus)), 20)
        before = cpu_seconds()
        time.sleep(0.3)
        assert cpu_seconds() - before < 0.05
        running.stop()
    assert word(m, 0x2F20) == 5000 * (vcpus - 1)


@BOTH
def test_a_lock_that_two_cpus_spin_for(machine, vendor):
    """What is counted under a test-and-set lock is exact, with PAUSE and without."""
    def work(tag, pause):
        return f"""
            mov ecx, 3000
        take_{tag}: mov eax, 1; xchg eax, [0x2f14]; test eax, eax; jz got_{tag}
        spin_{tag}: {pause}; cmp dword ptr [0x2f14], 0; jne spin_{tag}; jmp take_{tag}
        got_{tag}: inc dword ptr [0x2f18]; mov dword ptr [0x2f14], 0; loop take_{tag}
            lock inc dword ptr [0x2f1c]
        """
    body = work("boot", "pause") + "end: pause; cmp dword ptr [0x2f1c], 4; jb end\n"
    assert word(run(machine, vendor, 4, body, work("ap", "nop")), 0x2F18) == 4 * 3000


def passing(wait, times):
    """Two CPUs pass a flag to and fro; [0x2f50] and [0x2f54] count how often they looked at it in the last 400 rounds."""
    def ping(tag, mine, other):
        looks = f"dword ptr [{0x2F50 + 4 * mine}]"
        return f"""
            mov esi, {times}
        p_{tag}: inc {looks}; {wait}; cmp dword ptr [0x2f28], {mine}; jne p_{tag}
            cmp esi, 400; jne on_{tag}; mov {looks}, 0
        on_{tag}: mov dword ptr [0x2f28], {other}; dec esi; jnz p_{tag}; lock inc dword ptr [0x2f24]
        """
    return ping("boot", 0, 1) + "end: pause; cmp dword ptr [0x2f24], 2; jb end\n", ping("ap", 1, 0)


@BOTH
def test_pause_gives_the_turn_away(machine, vendor):
    """They hardly look at it in vain; in one slice they would 100,000 times."""
    m = run(machine, vendor, 2, *passing("pause", 500))
    assert word(m, 0x2F50) < 25_000
    assert word(m, 0x2F54) < 25_000


@BOTH
def test_mwait_does_not_wait(machine, vendor):
    """As in KVM; each is an exit, and whoever waits has its turn meanwhile."""
    run(machine, vendor, 2, *passing("mov ebx, eax; xor ecx, ecx; xor edx, edx; mov eax, 0x2f28; monitor; mwait", 20))


@BOTH
def test_the_tsc_never_goes_back_between_cpus(machine, vendor):
    def work(tag):
        return f"""
            mov esi, 2000
        take_{tag}: mov eax, 1; xchg eax, [0x2f14]; test eax, eax; jz got_{tag}
            pause; jmp take_{tag}
        got_{tag}: rdtsc; mov ebx, eax; mov ecx, edx
            sub eax, [0x2f30]; sbb edx, [0x2f34]; jnc fine_{tag}; inc dword ptr [0x2f38]
        fine_{tag}: mov [0x2f30], ebx; mov [0x2f34], ecx
            mov dword ptr [0x2f14], 0; dec esi; jnz take_{tag}; lock inc dword ptr [0x2f1c]
        """
    m = run(machine, vendor, 4, work("boot") + "end: pause; cmp dword ptr [0x2f1c], 4; jb end\n", work("ap"))
    assert word(m, 0x2F38) == 0


@BOTH
def test_code_that_another_cpu_changes(machine, vendor):
    """The AP calls a function whose immediate the boot CPU changes, and shows what it returned."""
    body = """
        mov esi, 1
    next: mov [patched + 1], esi
    seen: pause; cmp [0x2f40], esi; jne seen
        inc esi; cmp esi, 200; jb next
    """
    ap = """
        jmp ap_loop
    .balign 64
    patched: mov eax, 0; ret
    .balign 64
    ap_loop: call patched; mov [0x2f40], eax; pause; cmp eax, 199; jne ap_loop
    """
    m = run(machine, vendor, 2, body, ap)
    assert word(m, 0x2F40) == 199


@BOTH
def test_run_of_a_cpu_that_waits_for_init(machine, vendor):
    """KVM_RUN sleeps; a signal ends it with EINTR, INIT with EAGAIN."""
    m = machine(vendor, vcpus=2)
    running = m.start(1)
    time.sleep(0.05)
    assert running.waits
    assert running.stop() == -4
    running = m.start(1)
    init = struct.pack("<IIIII12x", 0xFEE00000 | 1 << 12, 0, 0xC500, 0, 0)
    assert m.vm_ioctl(K.KVM_SIGNAL_MSI, 1, init)[0] == 1
    assert running.wait() == -11
