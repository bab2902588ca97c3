# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM offers its guests beside the clock: EOI in memory, IPIs and kicks by hypercall, async page faults, steal time."""

import struct
from types import SimpleNamespace

import pytest
from irq_machine import APIC, APIC_ON, COUNTS, DONE, eventually, handler
from test_kvm_enable_cap import BOTH
from test_kvm_kvmclock import get_msr, set_msr

from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi import para
from kvmfs.kvm import steal_time
from kvmfs.kvm.cpuid_supported import supported
from kvmfs.kvm.kvm_main import VCPU_INODE
from tests.unit.machine import Machine

FLAG, BY_MEMORY, BY_REGISTER = 0x3F00, COUNTS + 4 * 0xF0, COUNTS + 4 * 0xF1
PV_EOI_ON = f"mov ecx, {M.MSR_KVM_PV_EOI_EN}; mov eax, {FLAG | 1}; xor edx, edx; wrmsr\n"
PV_EOI = f"""
    btr dword ptr [{FLAG}], 0
    jc 1f
    lock inc dword ptr [{BY_REGISTER}]
    mov dword ptr [{APIC + 0xB0}], 0
    jmp 2f
1:  lock inc dword ptr [{BY_MEMORY}]
2:
"""
CALL = "mov eax, {nr}; mov ebx, {a0}; mov ecx, {a1}; mov edx, {a2}; mov esi, {a3}; vmmcall\n"
BUSY = "busy: lock inc dword ptr [0x3e00]; jmp busy\n"


@pytest.fixture
def plain():
    made = []

    def make(*args, **kwargs):
        made.append(Machine(*args, **kwargs))
        return made[-1]

    yield make
    for m in made:
        m.close()


def count(m, address):
    return struct.unpack("<I", m.read(address, 4))[0]


# ---- PV EOI ----------------------------------------------------------------------------------------------

@BOTH
def test_interrupts_end_in_memory(machine, vendor):
    m = machine(vendor, f"{APIC_ON}{PV_EOI_ON} sti\n{BUSY}" + handler(0x41, PV_EOI))
    running = m.start()
    for n in range(1, 51):
        eventually(lambda: m.msi(0x41) == 1)
        eventually(lambda n=n: m.count(0x41) == n)
    running.stop()
    assert count(m, BY_MEMORY) + count(m, BY_REGISTER) == 50
    assert count(m, BY_MEMORY) > 0
    apic = m.vcpu.arch.apic
    assert (apic.isr, apic.irr) == (0, 0)
    assert m.read(FLAG, 1) == b"\0"


def test_it_is_not_offered_when_another_interrupt_waits_for_the_end(machine):
    # Both come at once: the lower one can only be taken when the higher one's end exits.
    m = machine("amd", f"{APIC_ON}{PV_EOI_ON} out 0xf0, al; sti\nnop; nop\ncli\n{DONE}"
                + handler(0x41, PV_EOI) + handler(0x51, PV_EOI))
    assert m.run_within() == 0
    assert m.msi(0x41) == m.msi(0x51) == 1
    assert m.run_within() == 0
    assert (m.count(0x51), m.count(0x41)) == (1, 1)
    assert count(m, BY_REGISTER) == 1
    assert count(m, BY_MEMORY) == 1


def test_an_exit_takes_the_offer_back(machine):
    m = machine("amd", f"{APIC_ON}{PV_EOI_ON} out 0xf0, al; sti\nnop; nop\ncli\n{DONE}"
                + handler(0x41, "out 0xf1, al" + PV_EOI))
    assert m.run_within() == 0
    assert m.msi(0x41) == 1
    assert m.run_within() == 0              # in the handler
    assert m.read(FLAG, 1) == b"\0"
    state = m.vcpu_ioctl(K.KVM_GET_LAPIC)[1]
    assert struct.unpack_from("<I", state, 0x120)[0] == 1 << 1      # ISR: 0x41 is in service, the client sees it
    assert m.run_within() == 0
    assert (count(m, BY_MEMORY), count(m, BY_REGISTER)) == (0, 1)


def test_not_for_what_an_io_apic_wants_to_know_of(machine):
    m = machine("amd", f"{APIC_ON}{PV_EOI_ON}"
                "mov dword ptr [0xfec00000], 0x38; mov dword ptr [0xfec00010], 0x8041\n"      # pin 20, level
                f"out 0xf0, al; sti\nnop; nop\ncli\n{DONE}" + handler(0x41, PV_EOI + "out 0xf1, al"))
    assert m.run_within() == 0
    assert m.irq_line(20, 1) == 1
    assert m.run_within() == 0
    assert (count(m, BY_MEMORY), count(m, BY_REGISTER)) == (0, 1)


def test_pv_eoi_register(machine):
    m = machine()
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, FLAG | 3) == 0
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, 0x40000001) == 0
    assert set_msr(m, M.MSR_KVM_PV_EOI_EN, FLAG | 1) == 1
    assert get_msr(m, M.MSR_KVM_PV_EOI_EN) == FLAG | 1
    m.vcpu.arch.apic.reset(init_event=True)
    assert get_msr(m, M.MSR_KVM_PV_EOI_EN) == 0


# ---- hypercalls ------------------------------------------------------------------------------------------

@BOTH
def test_ipis_to_many(machine, vendor):
    """vCPUs 1 to 3 wait with interrupts on; one hypercall reaches two of them, another one nobody."""
    m = machine(vendor, f"""
        {APIC_ON}
        {CALL.format(nr=para.KVM_HC_SEND_IPI, a0=0b110, a1=0b1, a2=0, a3=0x41)}
        mov [0x3e04], eax
        {CALL.format(nr=para.KVM_HC_SEND_IPI, a0=0b1, a1=0, a2=3, a3=0x42)}
        mov [0x3e08], eax
        {CALL.format(nr=para.KVM_HC_SEND_IPI, a0=0, a1=0b1000, a2=200, a3=0x42)}
        mov [0x3e0c], eax
        {CALL.format(nr=para.KVM_HC_SEND_IPI, a0=1, a1=0, a2=0, a3=0x40041)}
        mov [0x3e10], eax
        {DONE}
    """, vcpus=4)
    for i in range(1, 4):
        apic = m.vm.vcpus[i].arch.apic
        with apic.chip.lock:
            apic.write_register(0xF0, 0x1FF)
    assert m.run_within() == 0
    assert struct.unpack("<4i", m.read(0x3E04, 16)) == (2, 1, 0, -para.KVM_EINVAL)
    assert [bool(m.vm.vcpus[i].arch.apic.irr >> 0x41 & 1) for i in range(4)] == [False, True, True, False]
    assert m.vm.vcpus[3].arch.apic.irr == 1 << 0x42


def test_ipis_without_an_apic_map(plain):
    m = plain("amd", f"{CALL.format(nr=para.KVM_HC_SEND_IPI, a0=1, a1=0, a2=0, a3=0x41)} hlt".replace("eax", "ax")
              .replace("ebx", "bx").replace("ecx", "cx").replace("edx", "dx").replace("esi", "si"))
    assert m.run() == 0
    assert m.regs()["rax"] & 0xFFFFFFFF == -para.KVM_EOPNOTSUPP & 0xFFFFFFFF


@BOTH
def test_kick_ends_a_halt(machine, vendor):
    call = "vmcall" if vendor == "intel" else "vmmcall"
    m = machine(vendor, f"""
        mov eax, {para.KVM_HC_KICK_CPU}; xor ebx, ebx; mov ecx, 1; {call}
        mov [0x3e04], eax
        mov eax, {para.KVM_HC_SCHED_YIELD}; mov ebx, 1; {call}
        mov [0x3e08], eax
        {DONE}
    """, vcpus=2)
    second = m.vm.vcpus[1]
    m.write(0xA000, b"\xfa\xf4\xe6\xf4")                    # cli; hlt; out 0xf4, al
    second.arch.mp_state = 0
    second.cpu.set_segment(1, 0, 0, 0xFFFF, 0x9B)
    second.cpu.rip = 0xA000
    second.cpu.commit_state()
    waiting = m.start(1)
    eventually(lambda: m.halted(1))
    assert m.run_within() == 0
    assert m.read(0x3E04, 8) == bytes(8)
    assert waiting.wait() == 0
    assert second.run[8] == 2                               # KVM_EXIT_IO: it went on behind its HLT


@BOTH
def test_features_that_are_enforced(machine, vendor):
    m = machine(vendor, "".join(f"{CALL.format(nr=nr, a0=1, a1=0, a2=0, a3=0x41)} mov [{0x3E00 + 4 * nr}], eax\n"
                                for nr in (para.KVM_HC_SEND_IPI, para.KVM_HC_KICK_CPU, para.KVM_HC_SCHED_YIELD)) + DONE)
    entry = m.vcpu.arch.cpuid.find(para.KVM_CPUID_FEATURES)
    entry.eax = 1 << para.KVM_FEATURE_CLOCKSOURCE
    m.vcpu.arch.enforce_pv_cpuid = True
    assert m.run_within() == 0
    for nr in (para.KVM_HC_SEND_IPI, para.KVM_HC_KICK_CPU, para.KVM_HC_SCHED_YIELD):
        assert count(m, 0x3E00 + 4 * nr) == -para.KVM_ENOSYS & 0xFFFFFFFF
    for msr in (M.MSR_KVM_PV_EOI_EN, M.MSR_KVM_ASYNC_PF_EN, M.MSR_KVM_ASYNC_PF_INT, M.MSR_KVM_ASYNC_PF_ACK):
        assert get_msr(m, msr) is None
        assert set_msr(m, msr, 0) == 0


# ---- async page faults -----------------------------------------------------------------------------------

@BOTH
def test_async_pf_registers(machine, plain, vendor):
    m = machine(vendor)
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_INT, 0xF3) == 1
    assert get_msr(m, M.MSR_KVM_ASYNC_PF_INT) == 0xF3
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_INT, 0x100) == 0
    for value in (0x3000 | 9, 0x3000 | 0xF, 0x40000000 | 1, 0):
        assert set_msr(m, M.MSR_KVM_ASYNC_PF_EN, value) == 1
        assert get_msr(m, M.MSR_KVM_ASYNC_PF_EN) == value
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_EN, 0x3000 | 0x10) == 0
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_EN, 0x40000000 | 9) == 0       # no memory there
    assert set_msr(m, M.MSR_KVM_ASYNC_PF_ACK, 1) == 1
    assert get_msr(m, M.MSR_KVM_ASYNC_PF_ACK) == 0
    assert get_msr(m, M.MSR_KVM_MIGRATION_CONTROL) is None              # Linux leaves that one to the client
    without = plain(vendor)
    assert set_msr(without, M.MSR_KVM_ASYNC_PF_EN, 0) == 1
    assert set_msr(without, M.MSR_KVM_ASYNC_PF_EN, 0x3001) == 0
    assert set_msr(without, M.MSR_KVM_ASYNC_PF_INT, 0) == 0


@BOTH
def test_cpuid_offers_what_linux_does(vendor):
    leaf, = (e for e in supported(vendor) if e.function == para.KVM_CPUID_FEATURES)
    assert leaf.eax & ~(1 << para.KVM_FEATURE_STEAL_TIME) == 0x01007EDB
    assert (leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0)


# ---- steal time ------------------------------------------------------------------------------------------

@pytest.mark.skipif(not steal_time.available(), reason="this kernel does not count")
def test_waiting_for_another_vcpu_is_stolen_time(machine):
    m = machine("amd", f"{BUSY}", vcpus=2)
    second = m.vm.vcpus[1]
    m.write(0xA000, b"\xeb\xfe")                            # jmp .
    second.arch.mp_state = 0
    second.cpu.set_segment(1, 0, 0, 0xFFFF, 0x9B)
    second.cpu.rip = 0xA000
    second.cpu.commit_state()
    for i in range(2):
        assert set_msr(m, M.MSR_KVM_STEAL_TIME, 0x3800 + 64 * i | 1, node=VCPU_INODE + i) == 1
    others = m.start(1)
    mine = m.start()
    eventually(lambda: second.cpu.waited > 5_000_000)
    eventually(lambda: m.vcpu.cpu.waited > 5_000_000)
    mine.stop()
    others.stop()
    for i in range(2):
        m.vm.vcpus[i].arch.steal_time.recorded_ns = 0
        m.start(i).stop()
        assert struct.unpack("<Q", m.read(0x3800 + 64 * i, 8))[0] >= 5_000_000


@pytest.mark.skipif(not steal_time.available(), reason="this kernel does not count")
def test_what_the_client_waited_for_is_recorded_at_once(machine):
    """Less than a millisecond after the last record, and only when it is worth it."""
    m = machine("amd", DONE)
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, 0x3801) == 1
    m.vcpu.request = SimpleNamespace(tid=1)
    records = []
    for waited in (0, steal_time.NOTICEABLE_NS, steal_time.NOTICEABLE_NS - 1):
        m.host.client_delay += waited
        steal_time.record_steal_time(m.vcpu)
        m.vcpu.arch.steal_time.recorded_ns = 1 << 62        # no time passes
        records.append(struct.unpack("<QI", m.read(0x3800, 12)))
    (before, version), (after, next_version), last = records
    assert (next_version, after - before >= steal_time.NOTICEABLE_NS, last) == (version + 2, True, (after, next_version))


@pytest.mark.skipif(not steal_time.available(), reason="this kernel does not count")
def test_a_vcpu_sees_that_another_one_waits(machine):
    """... and leaves a TLB flush to the host, which is done before that one goes on."""
    m = machine("amd", """
        again: mov al, [0x3850]; cmp al, 1; jne again
        lock inc dword ptr [0x3e00]
        lock or byte ptr [0x3850], 2
        jmp again
    """, vcpus=2)
    second = m.vm.vcpus[1]
    m.write(0xA000, b"\xeb\xfe")                            # jmp .
    second.arch.mp_state = 0
    second.cpu.set_segment(1, 0, 0, 0xFFFF, 0x9B)
    second.cpu.rip = 0xA000
    second.cpu.commit_state()
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, 0x3841, node=VCPU_INODE + 1) == 1
    others, mine = m.start(1), m.start()
    eventually(lambda: count(m, 0x3E00) > 20)               # each time that the other one's slice ends
    mine.stop()
    eventually(lambda: m.read(0x3850, 1) == b"\0")          # alone it always has its turn
    others.stop()
    # The memory goes: nothing is written there any more.
    assert second.cpu._info.preempted_gpa == 0x3850
    assert m.region(0, 0, 0, 0, 0) == 0
    assert second.cpu._info.preempted_gpa == 0


def test_a_flush_that_was_left_to_the_host(machine):
    m = machine("amd", DONE)
    assert set_msr(m, M.MSR_KVM_STEAL_TIME, 0x3801) == 1
    m.write(0x3810, bytes((para.KVM_VCPU_FLUSH_TLB,)))
    m.vcpu.cpu._info.flush = 0
    steal_time.record_steal_time(m.vcpu)
    assert m.vcpu.cpu._info.flush == 1
    assert m.read(0x3810, 1) == b"\0"
