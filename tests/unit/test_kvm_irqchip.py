# SPDX-License-Identifier: GPL-2.0-or-later
"""The irqchip's ioctls: errors, states, routing, destinations, what IRQ_LINE_STATUS tells."""

import errno
import struct

import pytest

from kvmfs.abi import apic as A
from kvmfs.abi import caps as C
from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmIoapicState, KvmIrqchip, KvmPicState, KvmVcpuEvents
from kvmfs.kvm import irq, vapic
from kvmfs.kvm.irq_comm import Irqchip
from kvmfs.kvm.kvm_main import VM_INODE
from tests.unit.fake_client import ARG
from tests.unit.irq_machine import APIC, APIC_ON, DONE, IOAPIC, eventually, handler
from tests.unit.machine import Machine

BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
ENTRY = struct.Struct("<IIII32s")
MASTER, SLAVE, IOAPIC_CHIP = 0, 1, 2


def get_chip(m, number):
    result, data = m.vm_ioctl(K.KVM_GET_IRQCHIP, 1, bytes(KvmIrqchip(chip_id=number)))
    assert result == 0
    return KvmIrqchip.from_buffer_copy(data).chip


def set_chip(m, number, state):
    data = bytearray(bytes(KvmIrqchip(chip_id=number)))
    data[8:8 + len(bytes(state))] = bytes(state)
    m.host.memory.write(ARG, bytes(data))
    result, back = m.vm_ioctl(K.KVM_SET_IRQCHIP, ARG)
    assert back == bytes(data)
    return result


def lapic(m, index=0):
    result, data = m.vcpu_of(index, K.KVM_GET_LAPIC)
    assert (result, len(data)) == (0, 0x400)
    return bytearray(data)


def reg(state, offset):
    return struct.unpack_from("<I", state, offset)[0]


def change_lapic(m, index=0, **changes):
    state = lapic(m, index)
    for name, value in changes.items():
        struct.pack_into("<I", state, getattr(A, name), value)
    assert m.vcpu_of(index, K.KVM_SET_LAPIC, 1, bytes(state)) == (0, b"")


def irr(m, index=0):
    state = lapic(m, index)
    return [32 * i + b for i in range(8) for b in range(32) if reg(state, A.APIC_IRR + 16 * i) >> b & 1]


def routing(m, *entries, nr=None, flags=0):
    m.host.memory.write(ARG + 8, b"".join(ENTRY.pack(*entry) for entry in entries))
    return m.vm_ioctl(K.KVM_SET_GSI_ROUTING, ARG, struct.pack("<II", len(entries) if nr is None else nr, flags))[0]


def pin(gsi, chip, number, flags=0):
    return gsi, 1, flags, 0, struct.pack("<II", chip, number).ljust(32, b"\0")


def msi(gsi, low, data, high=0, flags=0):
    return gsi, 2, flags, 0, struct.pack("<III", low, high, data).ljust(32, b"\0")


def redirect(m, number, entry):
    state = get_chip(m, IOAPIC_CHIP).ioapic
    state.redirtbl[number] = entry
    assert set_chip(m, IOAPIC_CHIP, state) == 0


# ---- without and with ------------------------------------------------------------------------------------

def test_without_an_irqchip(machine):
    m = machine("amd", cls=Machine)
    for cmd, size, expected in ((K.KVM_IRQ_LINE, 8, errno.ENXIO), (K.KVM_IRQ_LINE_STATUS, 8, errno.ENXIO),
                                (K.KVM_GET_IRQCHIP, 520, errno.ENXIO), (K.KVM_SIGNAL_MSI, 32, errno.EINVAL),
                                (K.KVM_SET_GSI_ROUTING, 8, errno.EINVAL), (K.KVM_CREATE_PIT2, 64, errno.ENOENT),
                                (K.KVM_CREATE_PIT, 0, errno.ENOENT), (K.KVM_GET_PIT, 72, errno.ENXIO),
                                (K.KVM_SET_PIT, 0, errno.ENXIO), (K.KVM_GET_PIT2, 0, errno.ENXIO),
                                (K.KVM_SET_PIT2, 112, errno.ENXIO), (K.KVM_SET_IRQCHIP, 0, errno.ENXIO),
                                (K.KVM_REINJECT_CONTROL, 0, errno.ENXIO),
                                (K.KVM_CREATE_IRQCHIP, 0, errno.EINVAL)):       # there is a vCPU
        assert m.ioctl(VM_INODE, cmd, ARG, bytes(size))[0] == -expected, hex(cmd)
    assert m.ioctl(VM_INODE, K.KVM_SET_IRQCHIP, 1)[0] == -errno.EFAULT
    assert m.vcpu_ioctl(K.KVM_GET_LAPIC)[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_LAPIC, 1, bytes(0x400))[0] == -errno.EINVAL
    for state in range(1, 11):
        assert m.vcpu_ioctl(K.KVM_SET_MP_STATE, 1, struct.pack("<I", state))[0] == -errno.EINVAL


@BOTH
def test_errors_with_one(machine, vendor):
    m = machine(vendor)
    assert m.vm_ioctl(K.KVM_CREATE_IRQCHIP)[0] == -errno.EEXIST
    assert m.vm_ioctl(K.KVM_GET_IRQCHIP, 1, bytes(KvmIrqchip(chip_id=3)))[0] == -errno.EINVAL
    assert set_chip(m, 3, b"") == -errno.EINVAL
    assert m.vm_ioctl(K.KVM_CREATE_PIT2, 1, bytes(64)) == (0, b"")
    assert m.vm_ioctl(K.KVM_CREATE_PIT)[0] == -errno.EEXIST
    assert m.vcpu_of(0, K.KVM_INTERRUPT, 1, struct.pack("<I", 256))[0] == -errno.EINVAL
    assert m.vcpu_of(0, K.KVM_INTERRUPT, 1, struct.pack("<I", 32))[0] == -errno.ENXIO
    assert m.vm_ioctl(K.KVM_SIGNAL_MSI, 1, struct.pack("<IIIII12x", 0xFEE00000, 0, 0x40, 2, 0))[0] == -errno.EINVAL
    assert m.irq_line(100, 1) == -1                    # no such GSI


@BOTH
def test_reset_state(machine, vendor):
    m = machine(vendor, vcpus=2)
    for index in range(2):
        state = lapic(m, index)
        assert reg(state, A.APIC_ID) == index << 24
        assert reg(state, A.APIC_LVR) == 0x50014
        assert reg(state, A.APIC_SPIV) == 0xFF
        assert reg(state, A.APIC_DFR) == 0xFFFFFFFF
        assert reg(state, A.APIC_LVTT) == reg(state, A.APIC_LVT1) == 0x10000
        assert reg(state, A.APIC_LVT0) == (0x10000 if index else 0x700)
    pic = get_chip(m, MASTER).pic
    assert (pic.elcr_mask, pic.imr, pic.irq_base) == (0xF8, 0, 0)
    ioapic = get_chip(m, IOAPIC_CHIP).ioapic
    assert ioapic.base_address == 0xFEC00000
    assert list(ioapic.redirtbl) == [0x10000] * 24
    assert m.run_page[12] == 0


@BOTH
def test_mp_states(machine, vendor):
    m = machine(vendor, vcpus=2)
    get = lambda i: struct.unpack("<I", m.vcpu_of(i, K.KVM_GET_MP_STATE)[1])[0]     # noqa: E731
    put = lambda i, s: m.vcpu_of(i, K.KVM_SET_MP_STATE, 1, struct.pack("<I", s))[0]     # noqa: E731
    assert (get(0), get(1)) == (kx.KVM_MP_STATE_RUNNABLE, kx.KVM_MP_STATE_UNINITIALIZED)
    for state in (3, 9, 2, 1, 0):
        assert put(1, state) == 0
        assert get(1) == state
    for state in (5, 6, 7, 8, 10, 11):
        assert put(1, state) == -errno.EINVAL
    m.vm.vcpus[1].arch.apic.sipi_vector = 0x12
    assert put(1, kx.KVM_MP_STATE_SIPI_RECEIVED) == 0
    assert get(1) == kx.KVM_MP_STATE_RUNNABLE           # asking for it accepts what is pending
    sregs = m.vcpu_of(1, K.KVM_GET_SREGS)[1]
    assert struct.unpack_from("<QIH", sregs) == (0x12000, 0xFFFF, 0x1200)


@BOTH
def test_run_of_an_uninitialized_vcpu(machine, vendor):
    m = machine(vendor, vcpus=2)
    m.vm.vcpus[1].run[1] = 1
    assert m.vcpu_of(1, K.KVM_RUN)[0] == -errno.EINTR
    m.vm.vcpus[1].run[1] = 0
    running = m.start(1)
    eventually(lambda: m.vm.vcpus[1].mutex.locked())
    assert running.stop() == -errno.EINTR
    running = m.start(1)
    eventually(lambda: m.vm.vcpus[1].mutex.locked())
    m.msi(0, dest=1, data=A.APIC_DM_INIT)
    assert running.wait() == -errno.EAGAIN
    assert m.vcpu_of(1, K.KVM_GET_MP_STATE)[1] == struct.pack("<I", kx.KVM_MP_STATE_INIT_RECEIVED)


@BOTH
def test_latched_init(machine, vendor):
    m = machine(vendor)
    ev = m.events()
    ev.flags |= kx.KVM_VCPUEVENT_VALID_SMM | kx.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    ev.smi.latched_init, ev.sipi_vector = 1, 0x55
    assert m.set_events(ev) == 0
    assert m.vm.vcpus[0].arch.apic.sipi_vector == 0x55
    again = KvmVcpuEvents.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_VCPU_EVENTS)[1])
    assert again.smi.latched_init == 1
    m.vcpu_ioctl(K.KVM_GET_MP_STATE)                    # the boot CPU takes its INIT and goes on
    assert m.regs()["rip"] == 0xFFF0


# ---- routing ---------------------------------------------------------------------------------------------

@BOTH
def test_routing_errors(machine, vendor):
    m = machine(vendor)
    good = [pin(5, MASTER, 5), pin(5, IOAPIC_CHIP, 7), msi(40, 0xFEE00000, 0x41)]
    assert routing(m, *good) == 0
    assert routing(m, nr=4097) == routing(m, flags=1) == -errno.EINVAL
    for bad in (pin(4096, MASTER, 0), pin(0, MASTER, 8), pin(0, SLAVE, 8), pin(0, IOAPIC_CHIP, 24), pin(0, 3, 0),
                pin(0, MASTER, 0, flags=1), msi(0, 0, 0, flags=2), (0, 0, 0, 0, bytes(32)), (0, 3, 0, 0, bytes(32))):
        assert routing(m, bad) == -errno.EINVAL
    assert routing(m, pin(5, MASTER, 5), pin(5, MASTER, 6)) == -errno.EINVAL
    assert routing(m, pin(5, MASTER, 5), msi(5, 0, 0)) == -errno.EINVAL
    assert routing(m, msi(5, 0, 0), msi(5, 0, 0)) == -errno.EINVAL
    assert m.vm_ioctl(K.KVM_SET_GSI_ROUTING, 1, struct.pack("<II", 1, 0))[0] == -errno.EFAULT
    assert m.vm.arch.irqchip.routing.gsi_of[IOAPIC_CHIP, 7] == 5        # nothing of that has changed it
    assert routing(m) == 0
    assert m.irq_line(5, 1) == -1


@BOTH
def test_msi_route(machine, vendor):
    m = machine(vendor)
    change_lapic(m, APIC_SPIV=0x1FF)
    assert routing(m, msi(40, 0xFEE00000, 0x41)) == 0
    assert m.irq_line(40, 1) == 1
    assert m.irq_line(40, 0) == -1
    assert irr(m) == [0x41]


def test_32_bit_ids(machine):
    m = machine("amd")
    assert m.vm_ioctl(K.KVM_ENABLE_CAP, 1, struct.pack("<IIQ88x", C.KVM_CAP_X2APIC_API, 0, 4))[0] == -errno.EINVAL
    assert m.vm_ioctl(K.KVM_ENABLE_CAP, 1, struct.pack("<IIQ88x", C.KVM_CAP_X2APIC_API, 0, 3))[0] == 0
    assert routing(m, msi(40, 0xFEE00000, 0x41, high=1)) == -errno.EINVAL
    message = struct.pack("<IIIII12x", 0xFEE00000, 1, 0x40, 0, 0)
    assert m.vm_ioctl(K.KVM_SIGNAL_MSI, 1, message)[0] == -errno.EINVAL


# ---- destinations ----------------------------------------------------------------------------------------

@BOTH
def test_destinations(machine, vendor):
    m = machine(vendor, vcpus=4)
    for i in range(4):
        change_lapic(m, i, APIC_SPIV=0x1FF, APIC_LDR=1 << 24 + i)
    assert m.msi(0x40, dest=2) == 1
    assert m.msi(0x41, dest=9) == 0                     # nobody
    assert m.msi(0x42, dest=0xFF) == 4
    assert m.msi(0x43, dest=0b0101, low=4) == 2         # logical, flat
    assert m.msi(0x44, dest=0xFF, low=4) == 4
    # Lowest priority is by hash: the vector picks among those that are meant.
    for vector in range(0x50, 0x54):
        assert m.msi(vector, dest=0b0110, low=4, data=0x100) == 1
    assert [irr(m, i) for i in range(4)] == [
        [0x42, 0x43, 0x44], [0x42, 0x44, 0x50, 0x52], [0x40, 0x42, 0x43, 0x44, 0x51, 0x53], [0x42, 0x44]]
    # Cluster model: two clusters of two.
    for i in range(4):
        change_lapic(m, i, APIC_DFR=0x0FFFFFFF, APIC_LDR=(i // 2 << 4 | 1 << i % 2) << 24)
    assert m.msi(0x60, dest=0x13, low=4) == 2
    assert m.msi(0x61, dest=0x02, low=4) == 1
    assert [0x60 in irr(m, i) for i in range(4)] == [False, False, True, True]
    assert [0x61 in irr(m, i) for i in range(4)] == [False, True, False, False]
    # Not all in one mode: every APIC is asked.
    change_lapic(m, 0, APIC_DFR=0xFFFFFFFF, APIC_LDR=0x80000000)
    assert m.msi(0x62, dest=0x80, low=4) == 1
    assert m.msi(0x63, dest=0x70, low=4) == -1
    # The same ID twice: both get it.
    change_lapic(m, 3, APIC_ID=2 << 24)
    assert m.msi(0x64, dest=2) == 2


@BOTH
def test_disabled_apics_take_nothing(machine, vendor):
    m = machine(vendor)
    assert m.msi(0x40) == 0
    change_lapic(m, APIC_SPIV=0x1FF)
    assert m.msi(0x40) == 1
    sregs = m.sregs()
    sregs.apic_base &= ~(1 << 11)
    assert m.set_sregs(sregs) == 0
    assert m.msi(0x41) == 0
    assert irr(m) == [0x40]


# ---- the I/O APIC ----------------------------------------------------------------------------------------

@BOTH
def test_ioapic_status(machine, vendor):
    m = machine(vendor)
    change_lapic(m, APIC_SPIV=0x1FF)
    assert m.irq_line(20, 1) == -1                      # masked
    assert m.irq_line(20, 0) == 1
    redirect(m, 20, 0x40)
    assert m.irq_line(20, 1) == 1
    assert m.irq_line(20, 1) == 0                       # no new edge
    assert m.irq_line(20, 0) == 1
    redirect(m, 21, 0x8041)
    assert m.irq_line(21, 1) == 1
    assert get_chip(m, IOAPIC_CHIP).ioapic.redirtbl[21] == 0xC041        # remote IRR
    assert m.irq_line(21, 1) == -1
    assert reg(lapic(m), A.APIC_TMR + 0x20) == 2


@BOTH
def test_rtc_tells_whether_it_was_acknowledged(machine, vendor):
    m = machine(vendor, APIC_ON + "sti; again: hlt; jmp again\n" + handler(0x48))
    change_lapic(m, APIC_SPIV=0x1FF)
    assert routing(m, pin(8, IOAPIC_CHIP, 8)) == 0
    redirect(m, 8, 0x48)
    for expected in (1, 0, 0):
        assert m.irq_line(8, 1) == expected
        m.irq_line(8, 0)
    running = m.start()
    eventually(lambda: m.count(0x48) == 1 and m.halted())
    assert m.irq_line(8, 1) == 1
    eventually(lambda: m.count(0x48) == 2)
    running.stop()


@BOTH
def test_pending_interrupts_survive_set_irqchip(machine, vendor):
    m = machine(vendor)
    change_lapic(m, APIC_SPIV=0x1FF)
    state = KvmIoapicState(base_address=0xFEC00000, irr=1 << 4)
    for i in range(24):
        state.redirtbl[i] = 0x10000
    state.redirtbl[4] = 0x8045
    assert set_chip(m, IOAPIC_CHIP, state) == 0
    assert irr(m) == [0x45]
    again = get_chip(m, IOAPIC_CHIP).ioapic
    assert (again.irr, again.redirtbl[4]) == (1 << 4, 0xC045)


@BOTH
def test_ioapic_registers(machine, vendor):
    read = lambda index, to: f"mov dword ptr [{IOAPIC:#x}], {index}; mov eax, [{IOAPIC + 0x10:#x}]; mov [{to:#x}], eax\n"   # noqa: E731
    m = machine(vendor, f"mov dword ptr [{IOAPIC:#x}], 0; mov dword ptr [{IOAPIC + 0x10:#x}], 0xff000000\n"
                + read(0, 0x2E00) + read(1, 0x2E04) + read(2, 0x2E08) + read(0x3F, 0x2E0C) + read(0x40, 0x2E10)
                + f"mov dword ptr [{IOAPIC:#x}], 0x12; mov dword ptr [{IOAPIC + 0x10:#x}], 0xffffffff\n" + read(0x12, 0x2E14)
                + f"mov al, [{IOAPIC:#x}]; mov [0x2e18], al\n" + DONE)
    assert m.run_within() == 0
    assert struct.unpack("<6I", m.read(0x2E00, 24)) == (0x0F000000, 0x00170011, 0x0F000000, 0, 0xFFFFFFFF, 0xFFFFAFFF)
    assert m.read(0x2E18, 1) == b"\x12"


# ---- the local APIC --------------------------------------------------------------------------------------

@BOTH
def test_lapic_state_round_trip(machine, vendor):
    m = machine(vendor)
    change_lapic(m, APIC_SPIV=0x1FF, APIC_TASKPRI=0x45, APIC_LVT1=0x400, APIC_TDCR=0xB, APIC_TMICT=0)
    assert m.sregs().cr8 == 4
    assert m.msi(0x77) == 1
    state = bytes(lapic(m))
    other = machine("intel" if vendor == "amd" else "amd")
    assert other.vcpu_of(0, K.KVM_SET_LAPIC, 1, state) == (0, b"")
    assert bytes(lapic(other)) == state
    assert irr(other) == [0x77]


@BOTH
def test_timer_goes_on_after_restore(machine, vendor):
    m = machine(vendor, APIC_ON + f"mov dword ptr [{APIC + 0x320:#x}], 0x31; mov dword ptr [{APIC + 0x3e0:#x}], 0xb\n"
                f"mov dword ptr [{APIC + 0x380:#x}], 4000000000; " + DONE)
    assert m.run_within() == 0
    state = lapic(m)
    left = reg(state, A.APIC_TMCCT)
    assert 3_000_000_000 < left < 4_000_000_000
    struct.pack_into("<I", state, A.APIC_TMCCT, 20_000_000)
    other = machine(vendor, "sti; hlt; " + DONE + handler(0x31))
    assert other.vcpu_of(0, K.KVM_SET_LAPIC, 1, bytes(state)) == (0, b"")
    assert other.run_within(2) == 0
    assert other.count(0x31) == 1


@BOTH
def test_page_accesses(machine, vendor):
    m = machine(vendor, APIC_ON + f"mov al, [{APIC + 0xF1:#x}]; mov [0x2e00], al; mov ax, [{APIC + 0x32:#x}]; mov [0x2e02], ax\n"
                f"mov byte ptr [{APIC + 0x80:#x}], 0x50; mov eax, [{APIC + 0x80:#x}]; mov [0x2e04], eax\n"
                f"mov eax, [{APIC + 0x10:#x}]; mov [0x2e08], eax; mov eax, [{APIC + 0xf2:#x}]; mov [0x2e0c], eax\n"
                f"mov dword ptr [{APIC + 0x320:#x}], 0xffffffff; mov eax, [{APIC + 0x320:#x}]; mov [0x2e10], eax\n"
                f"mov dword ptr [{APIC + 0x350:#x}], 0xffffffff; mov eax, [{APIC + 0x350:#x}]; mov [0x2e14], eax\n" + DONE)
    assert m.run_within() == 0
    assert m.read(0x2E00, 4) == b"\x01\x00\x05\x00"
    assert struct.unpack("<5I", m.read(0x2E04, 20)) == (0, 0, 0, 0x710FF, 0x1F7FF)


@BOTH
def test_base_can_move_and_go(machine, vendor):
    move = "mov ecx, 0x1b; rdmsr; mov ebx, eax; and eax, 0xfff; or eax, 0xfed00000; wrmsr\n"
    m = machine(vendor, move + f"mov eax, [{0xFED00030:#x}]; mov [0x2e00], eax\n"
                "mov eax, ebx; and eax, ~0x800; wrmsr; mov eax, [0xfee00030]; mov [0x2e04], eax\n"
                "mov eax, 1; cpuid; mov [0x2e08], edx; mov eax, [0xfed00030]; " + DONE)
    assert m.run_within() == 0
    assert struct.unpack("<2I", m.read(0x2E00, 8)) == (0x50014, 0xFFFFFFFF)
    assert not m.read(0x2E09, 1)[0] & 2                 # CPUID's APIC bit is off
    assert (m.reason, m.mmio()[0]) == (kx.KVM_EXIT_MMIO, 0xFED00030)


@BOTH
def test_cr8_and_tpr_are_one(machine, vendor):
    m = machine(vendor, f"mov dword ptr [{APIC + 0x80:#x}], 0x73; " + DONE)
    assert m.run_within() == 0
    assert m.sregs().cr8 == 7
    assert struct.unpack_from("<Q", m.run_page, 16)[0] == 7
    m.run_page[16] = 3                                  # with an APIC in here this says nothing
    sregs = m.sregs()
    sregs.cr8 = 9
    assert m.set_sregs(sregs) == 0
    assert reg(lapic(m), A.APIC_TASKPRI) == 0x90


@BOTH
def test_x2apic_state(machine, vendor):
    on = "mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr\n"
    m = machine(vendor, on + "mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr\n"
                "mov ecx, 0x830; mov eax, 0x40041; mov edx, 0x1234; wrmsr; rdmsr; mov [0x2e00], edx\n" + DONE)
    assert m.run_within() == 0
    state = lapic(m)
    assert reg(state, A.APIC_ID) == 0
    assert reg(state, A.APIC_LDR) == 1
    assert (reg(state, A.APIC_ICR), reg(state, A.APIC_ICR2)) == (0x40041, 0x1234)
    assert m.read(0x2E00, 2) == b"\x34\x12"
    assert m.vcpu_of(0, K.KVM_SET_LAPIC, 1, bytes(state)) == (0, b"")
    assert lapic(m)[0x300:0x320] == state[0x300:0x320]
    assert irr(m) == [0x41]


@BOTH
@pytest.mark.parametrize("msr", [0x80E, 0x831, 0x809, 0x840, 0x8FF])
def test_x2apic_msrs_that_are_none(machine, vendor, msr):
    m = machine(vendor, "mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr\n" + f"mov ecx, {msr:#x}; rdmsr; out 0xf6, al\n"
                "vec_0d: " + DONE)
    assert m.run_within() == 0
    assert m.io()[2] == 0xF4


# ---- PIC and PIT -----------------------------------------------------------------------------------------

@BOTH
def test_pic_state(machine, vendor):
    m = machine(vendor)
    state = KvmPicState(irr=2, irq_base=0x30, elcr=0x08, elcr_mask=0xF8, imr=0x80)
    assert set_chip(m, MASTER, state) == 0
    assert bytes(get_chip(m, MASTER).pic) == bytes(state)
    assert m.vm.arch.irqchip.pic.output
    assert m.run_page[12] == 0


@BOTH
def test_pit_state(machine, vendor):
    m = machine(vendor, pit=True)
    result, data = m.vm_ioctl(K.KVM_GET_PIT2)
    assert (result, len(data)) == (0, 112)
    changed = bytearray(data)
    struct.pack_into("<I", changed, 0, 0x1234)
    changed[13:18] = bytes((3, 3, 3, 3, 2))
    assert m.vm_ioctl(K.KVM_SET_PIT2, 1, bytes(changed)) == (0, b"")
    again = m.vm_ioctl(K.KVM_GET_PIT2)[1]
    assert struct.unpack_from("<I", again)[0] == 0x1234
    result, channels = m.vm_ioctl(K.KVM_GET_PIT, 1, bytes(72))
    assert (result, channels[:16]) == (0, again[:16])
    m.host.memory.write(ARG, channels)
    assert m.vm_ioctl(K.KVM_SET_PIT, ARG) == (0, channels)


# ---- split irqchip ---------------------------------------------------------------------------------------

def split(vm):
    irq.enable_split_irqchip(vm, 24)


def test_split_errors(machine):
    def setup(vm):
        enable = lambda pins: m_enable(vm, pins)        # noqa: E731
        assert enable(4097) == errno.EINVAL
        assert enable(24) == 0
        assert enable(24) == errno.EEXIST

    def m_enable(vm, pins):
        try:
            irq.enable_split_irqchip(vm, pins)
        except OSError as e:
            return e.errno
        return 0

    m = machine("amd", setup=setup)
    assert isinstance(m.vm.arch.irqchip, Irqchip)
    assert m.vm_ioctl(K.KVM_CREATE_IRQCHIP)[0] == -errno.EEXIST
    assert m.vm_ioctl(K.KVM_CREATE_PIT)[0] == -errno.ENOENT
    assert m.vm_ioctl(K.KVM_GET_IRQCHIP, 1, bytes(520))[0] == -errno.ENXIO
    assert routing(m, pin(0, IOAPIC_CHIP, 0)) == -errno.EINVAL
    assert m.irq_line(3, 1) == -1
    assert reg(lapic(m), A.APIC_LVR) == 0x1050014       # directed EOI


@BOTH
def test_split_eoi_exit_and_extint(machine, vendor):
    m = machine(vendor, APIC_ON + "sti; again: hlt; jmp again\n" + handler(0x51) + handler(0x52)
                + "vec_61: inc dword ptr [0x2ff0]; out 0xf4, al; iretd\n", setup=split)
    assert routing(m, msi(3, 0xFEE00000, 0x8051), msi(30, 0xFEE00000, 0x8052)) == 0
    running = m.start()
    eventually(m.halted)
    assert m.irq_line(30, 1) == 1                       # not one of the client's I/O APIC: no exit
    eventually(lambda: m.count(0x52) == 1)
    assert m.irq_line(3, 1) == 1
    assert running.wait() == 0
    assert (m.reason, m.run_page[32]) == (kx.KVM_EXIT_IOAPIC_EOI, 0x51)
    # The PIC is the client's: it asks for a window, and the interrupt comes by KVM_INTERRUPT.
    m.run_page[0] = 1
    assert m.run_within() == 0
    assert (m.reason, m.run_page[12]) == (kx.KVM_EXIT_IRQ_WINDOW_OPEN, 1)
    m.run_page[0] = 0
    inject = struct.pack("<I", 0x61)
    assert m.vcpu_of(0, K.KVM_INTERRUPT, 1, inject)[0] == 0
    assert m.vcpu_of(0, K.KVM_INTERRUPT, 1, inject)[0] == -errno.EEXIST
    assert m.run_within() == 0
    assert (m.reason, m.io()[2], m.read(0x2FF0, 1)) == (kx.KVM_EXIT_IO, 0xF4, b"\x01")


# ---- what needs no client any more -----------------------------------------------------------------------

@BOTH
def test_ports_of_the_devices_do_not_exit(machine, vendor):
    m = machine(vendor, "in al, 0x21; in al, 0x40; in al, 0x61; in ax, 0x20; mov dx, 0x4d0; in al, dx; in al, 0x62; " + DONE)
    assert m.vm_ioctl(K.KVM_CREATE_PIT) == (0, b"")
    assert m.run_within() == 0
    assert m.io()[:3] == (0, 1, 0x62)                   # within the speaker's range, but not its port


@BOTH
def test_suspend_and_destroy_let_a_halted_vcpu_out(machine, vendor):
    m = machine(vendor, "sti; again: hlt; jmp again")
    running = m.start()
    eventually(m.halted)
    m.vm.suspend()
    m.vm.resume()
    assert running.waits
    m.vm.dead = True
    m.vm.kick_all()
    assert running.wait() == -errno.EIO
    m.vm.dead = False
    assert m.vcpu_of(0, K.KVM_GET_REGS)[0] == 0


@BOTH
def test_virtual_apic_word(machine, vendor):
    """KVM_SET_VAPIC_ADDR: the guest finds its priorities in its own memory and sets its task priority there."""
    m = machine(vendor)

    def set_address(gpa):
        return m.vcpu_ioctl(K.KVM_SET_VAPIC_ADDR, 1, struct.pack("<Q", gpa))[0]

    assert set_address(0x40000000) == -errno.EINVAL
    assert set_address(0x3000) == 0
    m.write(0x3000, b"\x20\0\0\0")
    assert m.vcpu.arch.vapic_addr == 0x3000
    vapic.sync_from_guest(m.vcpu)
    assert m.vcpu.arch.apic.reg(0x80) == 0x20
    m.vcpu.arch.apic.irr = 1 << 0x41
    vapic.sync_to_guest(m.vcpu)
    assert m.read(0x3000, 4) == b"\x20\0\0\x41"
    m.vcpu.arch.apic.irr = 0
    assert set_address(0) == 0


def test_the_padding_of_the_ioapic_comes_back(machine):
    m = machine()
    state = get_chip(m, IOAPIC_CHIP).ioapic
    assert state.pad == 0
    state.pad = 7
    assert set_chip(m, IOAPIC_CHIP, state) == 0
    assert get_chip(m, IOAPIC_CHIP).ioapic.pad == 7


@pytest.mark.parametrize("vendor, shown", [("amd", {0: 0, 1: 3, 2: 3, 3: 3}), ("intel", {0: 0, 1: 1, 2: 2, 3: 1})])
def test_interrupt_shadows_are_those_of_the_hardware(machine, vendor, shown):
    m = machine(vendor)
    for value, expected in shown.items():
        state = KvmVcpuEvents(flags=4)
        state.interrupt.shadow = value
        assert m.set_events(state) == 0
        assert m.events().interrupt.shadow == expected
