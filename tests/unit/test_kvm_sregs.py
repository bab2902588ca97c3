# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_GET_SREGS puts the state together field by field; what each vendor's KVM makes up of a segment's bits."""

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmSregs, KvmSregs2
from tests.unit.machine import Machine

NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    machine = Machine(request.param)
    yield machine
    machine.close()


def test_every_field_is_where_it_belongs(machine):
    cpu, arch = machine.vcpu.cpu, machine.vcpu.arch
    for i in range(8):
        cpu.set_segment(i, 0x1000 + i, 0xFFFF_8000_0000_0000 + i, 0x10000 + i, 0x893)
    cpu.gdt, cpu.idt = (1 << 63 | 1, 0x1234), (1 << 62 | 2, 0xFFFF)
    cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.cr8, cpu.efer = 0x31, 1 << 63 | 3, 0x5000, 0x20, 7, 0x500
    arch.interrupt.injected, arch.interrupt.soft, arch.interrupt.nr = True, False, 0x83
    sregs = machine.sregs()
    for i, name in enumerate(NAMES):
        segment = getattr(sregs, name)
        assert (segment.selector, segment.base, segment.limit) == (0x1000 + i, 0xFFFF_8000_0000_0000 + i, 0x10000 + i)
        assert cpu.segments()[i] == cpu.segment(i)
    assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) == (1 << 63 | 1, 0x1234, 1 << 62 | 2, 0xFFFF)
    assert (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer) == (0x31, 1 << 63 | 3, 0x5000, 0x20, 7, 0x500)
    assert sregs.apic_base == arch.apic_base and list(sregs.interrupt_bitmap) == [0, 0, 1 << 3, 0]
    sregs2 = KvmSregs2.from_buffer_copy(machine.vcpu_ioctl(K.KVM_GET_SREGS2)[1])
    common = KvmSregs.interrupt_bitmap.offset
    assert bytes(sregs2)[:common] == bytes(sregs)[:common] and (sregs2.flags, list(sregs2.pdptrs)) == (0, [0] * 4)


def test_a_soft_interrupt_is_not_shown(machine):
    interrupt = machine.vcpu.arch.interrupt
    interrupt.injected, interrupt.soft, interrupt.nr = True, True, 3
    assert not any(machine.sregs().interrupt_bitmap)


def test_bits_that_svm_makes_up():
    machine = Machine("amd")
    cpu = machine.vcpu.cpu
    for i in range(8):
        cpu.set_segment(i, 0, 0, 0x100000, 0x012 | 0x400)       # not present, without the accessed bit
    sregs = machine.sregs()
    assert (sregs.ds.g, sregs.ds.unusable, sregs.ds.type, sregs.ds.db) == (1, 1, 2, 1)
    assert (sregs.ss.unusable, sregs.ss.db, sregs.tr.type) == (1, 0, 2)
    cpu.set_segment(3, 0, 0, 0xFFFFF, 0x892)
    assert (machine.sregs().ds.g, machine.sregs().ds.type) == (0, 3)
    machine.close()


def test_bits_of_vmx_are_the_hardwares():
    machine = Machine("intel")
    machine.vcpu.cpu.set_segment(3, 0, 0, 0xFFFFF, 0x892)
    ds = machine.sregs().ds
    assert (ds.g, ds.type, ds.present, ds.unusable) == (1, 2, 1, 0)
    machine.close()
