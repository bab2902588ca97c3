# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's virtual APIC page, and KVM_EXIT_TPR_ACCESS."""

import struct
from functools import partial

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_IO, KVM_EXIT_TPR_ACCESS
from kvmfs.abi.structs import KvmRun
from kvmfs.kvm.kvm_main import VCPU_INODE
from tests.unit.fake_client import ARG
from tests.unit.irq_machine import APIC, APIC_ON, IrqMachine, handler
from tests.unit.machine import Machine, error, machines

WORD = 0x4000
TPR = APIC + 0x80


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    with machines(IrqMachine) as make:
        yield partial(make, request.param)


def report(m, enabled=1, flags=0):
    return m.ioctl(VCPU_INODE, K.KVM_TPR_ACCESS_REPORTING, ARG, struct.pack("<II32x", enabled, flags))


def vapic(m, address):
    return m.ioctl(VCPU_INODE, K.KVM_SET_VAPIC_ADDR, ARG, struct.pack("<Q", address))[0]


def run(m):
    assert m.run_within() == 0
    return KvmRun.from_buffer_copy(m.run_page[:4096])


def access(m, name):
    """The next exit is an access at this label; where and how."""
    r = run(m)
    assert r.exit_reason == KVM_EXIT_TPR_ACCESS, r.exit_reason
    assert r.tpr_access.rip == m.symbols[name], name
    return r.tpr_access.is_write


def test_accesses_are_reported(machine):
    m = machine(APIC_ON + f"""
        a: mov dword ptr [{TPR:#x}], 0x20
        b: mov eax, [{TPR:#x}]
        mov ecx, [{APIC + 0xA0:#x}]
        mov edi, {TPR:#x}
        c: mov [edi], ebx
        d: or dword ptr [edi], 0x30
        mov edx, [{TPR:#x}]
        e: out 0xf4, al
    """)
    assert report(m, 1, 1)[0] == error("EINVAL")
    assert report(m) == (0, struct.pack("<II32x", 1, 0))
    assert access(m, "a") == 1
    assert m.regs()["rip"] == m.symbols["b"]               # it is done
    assert access(m, "b") == 0
    assert m.regs()["rax"] == 0x20
    assert (access(m, "c"), access(m, "d")) == (1, 1)   # of the two accesses of the last one the client sees the second
    assert report(m, 0)[0] == 0
    assert run(m).exit_reason == KVM_EXIT_IO
    assert (m.regs()["rdx"], m.regs()["rcx"]) == (0x30, 0x20)


def test_x2apic_registers_are_reported(machine):
    m = machine("""
        mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr
        mov ecx, 0x808; mov eax, 0x50; xor edx, edx
        a: wrmsr
        xor eax, eax
        b: rdmsr
        out 0xf4, al
    """)
    report(m)
    assert (access(m, "a"), access(m, "b")) == (1, 0)
    assert run(m).exit_reason == KVM_EXIT_IO
    assert m.regs()["rax"] == 0x50


def test_not_asked_for(machine):
    m = machine(APIC_ON + f"mov dword ptr [{TPR:#x}], 0x20; out 0xf4, al")
    assert run(m).exit_reason == KVM_EXIT_IO


def test_without_an_apic_nothing_is_reported():
    m = Machine("amd")
    try:
        assert report(m)[0] == 0 and vapic(m, 0) == vapic(m, WORD) == error("EINVAL")
    finally:
        m.close()


def test_the_guest_s_word(machine):
    """The guest changes its priority in memory: the APIC follows at the next exit, and interrupts obey."""
    m = machine(APIC_ON + f"""
        mov byte ptr [{WORD:#x}], 0x60
        out 0xf4, al
        mov eax, [{WORD:#x}]
        sti
        nop
        mov byte ptr [{WORD:#x}], 0x10
        out 0xf4, al
        nop
        mov ebx, [{WORD:#x}]
        out 0xf4, al
        hlt
    """ + handler(0x55))
    assert vapic(m, 1 << 30) == error("EINVAL")
    assert vapic(m, WORD) == 0
    assert run(m).exit_reason == KVM_EXIT_IO
    assert m.msi(0x55) == 1
    assert run(m).exit_reason == KVM_EXIT_IO
    assert m.count(0x55) == 0                           # 0x55 is not above 0x60
    assert m.regs()["rax"] == 0x55000060                   # the word shows what is requested
    assert run(m).exit_reason == KVM_EXIT_IO
    assert m.count(0x55) == 1
    assert m.regs()["rbx"] == 0x10
    assert vapic(m, 0) == 0


def test_machine_checks_bring_the_cmci_entry(machine):
    """KVM_X86_SETUP_MCE after the APIC was made: its version and its LVT follow MCG_CMCI_P (bit 10)."""
    m = machine()

    def version():
        return struct.unpack_from("<I", m.ioctl(VCPU_INODE, K.KVM_GET_LAPIC, ARG)[1], 0x30)[0] >> 16 & 0xFF

    assert version() == 5
    cmci = m.vm.vendor.name == "intel"
    assert m.ioctl(VCPU_INODE, K.KVM_X86_SETUP_MCE, ARG, struct.pack("<Q", 1 | cmci << 10))[0] == 0
    assert version() == 5 + cmci
    assert m.ioctl(VCPU_INODE, K.KVM_X86_SETUP_MCE, ARG, struct.pack("<Q", 1))[0] == 0
    assert version() == 5
