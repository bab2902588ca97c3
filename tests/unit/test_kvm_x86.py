# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN, events and registers of the machine, as the ioctls show them; both vendors."""

import errno
import os
import struct
import threading
import time

import pytest

from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi.x86 import CR4_FSGSBASE, CR4_SMEP
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import CODE, Machine

MACHINE = Machine           # that the fixture makes
BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])


@BOTH
def test_reset_state(machine, vendor):
    m = machine(vendor)
    regs, sregs = m.regs(), m.sregs()
    assert (regs["rip"], regs["rflags"], regs["rdx"], regs["rax"]) == (0xFFF0, 2, 0x600, 0)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.type, sregs.cs.present) == (0xFFFF0000, 0xF000, 11, 1)
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x60000010, 0, 0)
    assert sregs.apic_base == 0xFEE00900
    assert (sregs.tr.type, sregs.tr.present, sregs.ldt.type) == ((3 if vendor == "amd" else 11), 1, 2)
    assert (sregs.gdt.limit, sregs.idt.limit) == (0xFFFF, 0xFFFF)


@BOTH
def test_out_and_hlt_leave_rip_where_linux_does(machine, vendor):
    m = machine(vendor, "out 0x80, al; in al, 0x81; hlt; nop", rax=0x42)
    assert m.run() == 0
    assert (m.reason, m.io()) == (kx.KVM_EXIT_IO, (1, 1, 0x80, 1, b"\x42"))
    assert m.regs()["rip"] == CODE                  # not stepped over yet
    assert m.run() == 0
    assert m.io()[:4] == (0, 1, 0x81, 1)
    assert m.regs()["rip"] == CODE + 2
    m.run_page[4096] = 0x99
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT
    assert (m.regs()["rip"], m.regs()["rax"]) == (CODE + 5, 0x99)
    assert m.run_page[12:14] == b"\0\0"              # not ready for an interrupt: IF is clear


@BOTH
def test_immediate_exit_completes_io_first(machine, vendor):
    m = machine(vendor, "in al, 0x10; out 0x80, al; hlt")
    m.run()
    m.run_page[4096] = 7
    m.run_page[1] = 1
    assert m.run() == -errno.EINTR
    assert (m.regs()["rip"], m.regs()["rax"]) == (CODE + 2, 7)
    assert m.run() == -errno.EINTR
    m.run_page[1] = 0
    assert m.run() == 0
    assert m.io()[4] == b"\x07"
    m.run_page[1] = 1
    assert m.run() == -errno.EINTR
    assert m.regs()["rip"] == CODE + 4


@BOTH
def test_a_client_that_moves_rip_ends_the_io(machine, vendor):
    m = machine(vendor, "in al, 0x10; hlt; target: mov bl, 1; hlt")
    m.run()
    m.set_regs(rip=m.symbols["target"], rax=0x55)
    m.run_page[4096] = 7
    assert m.run() == 0
    assert (m.reason, m.regs()["rax"], m.regs()["rbx"]) == (kx.KVM_EXIT_HLT, 0x55, 1)


@BOTH
def test_mmio(machine, vendor):
    m = machine(vendor, "mov ax, 0xf000; mov ds, ax; add word ptr [0x8000], 3; hlt")    # 0xf8000 is RAM
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0, 0xF0000, 0)
    assert m.run() == 0
    assert (m.reason, m.mmio()) == (kx.KVM_EXIT_MMIO, (0xF8000, b"\0\0", 0))
    assert m.regs()["rip"] == CODE + 5
    m.run_page[40:42] = b"\x05\x10"
    assert m.run() == 0
    assert m.mmio() == (0xF8000, b"\x08\x10", 1)
    assert m.regs()["rip"] > CODE + 5               # a write is reported when the instruction is over
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT


@BOTH
def test_readonly_slot_and_hole(machine, vendor):
    m = machine(vendor, "mov byte ptr [0x1000], 0x77; mov al, [0x1000]; hlt")
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, 2, 0, 1 << 20, 0) == 0
    m.write(0x1000, b"\x11")
    assert m.run() == 0
    assert m.mmio() == (0x1000, b"\x77", 1)
    assert m.run() == 0
    assert (m.reason, m.regs()["rax"] & 0xFF) == (kx.KVM_EXIT_HLT, 0x11)
    m = machine(vendor, "mov al, [0x1000]; hlt", holes=(0x1000,))
    assert m.run() == -errno.EFAULT


@BOTH
def test_interrupt_window(machine, vendor):
    m = machine(vendor, "mov dword ptr [0x84], offset handler; cli; nop; hlt; sti; nop; nop; hlt; handler: mov cl, 1; iret")
    m.run()
    assert m.reason == kx.KVM_EXIT_HLT
    m.run_page[0] = 1                               # request_interrupt_window
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_IRQ_WINDOW_OPEN
    assert m.run_page[12] == 1
    assert m.run_page[13] == 1
    m.run_page[0] = 0
    assert m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x21))[0] == 0
    assert m.events().interrupt.injected == 1
    assert m.sregs().interrupt_bitmap[0] == 1 << 0x21
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT
    assert m.regs()["rcx"] & 0xFF == 1
    assert m.events().interrupt.injected == 0
    assert m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 256))[0] == -errno.EINVAL


def test_interrupt_with_if_clear(machine):
    source = "mov dword ptr [0x84], offset handler; cli; hlt; hlt; handler: mov cl, 1; hlt"
    m = machine("amd", source)
    m.run()
    m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x21))
    assert m.run() == 0
    assert (m.reason, m.regs()["rcx"]) == (kx.KVM_EXIT_HLT, 1)      # EVENTINJ does not ask for IF
    m = machine("intel", source)
    m.run()
    m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x21))
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_FAIL_ENTRY
    reason, cpu = struct.unpack_from("<QI", m.run_page, 32)
    assert reason == 0x80000021
    assert cpu in os.sched_getaffinity(0)


def test_fail_entry_tells_the_cpu(machine):
    """KVM_CAP_LAST_CPU, on whichever the thread runs."""
    allowed = os.sched_getaffinity(0)
    m = machine("intel", "hlt; hlt")
    m.run()
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x21))
            assert m.run() == 0
            assert struct.unpack_from("<QI", m.run_page, 32) == (0x80000021, cpu)
    finally:
        os.sched_setaffinity(0, allowed)


@BOTH
def test_nmi(machine, vendor):
    m = machine(vendor, "mov dword ptr [8], offset handler; hlt; hlt; handler: mov cl, 1; hlt; iret")
    m.run()
    assert m.vcpu_ioctl(K.KVM_NMI)[0] == 0
    assert m.events().nmi.pending == 1
    assert m.run() == 0
    assert m.regs()["rcx"] & 0xFF == 1
    ev = m.events()
    assert (ev.nmi.pending, ev.nmi.injected, ev.nmi.masked) == (0, 0, 1)
    m.vcpu_ioctl(K.KVM_NMI)
    m.vcpu_ioctl(K.KVM_NMI)
    assert m.events().nmi.pending == 1              # one waits while another is handled
    m.set_regs(rcx=0)
    assert m.run() == 0
    assert m.regs()["rcx"] & 0xFF == 1              # delivered after the IRET


@BOTH
def test_exception_from_the_client(machine, vendor):
    m = machine(vendor, "mov dword ptr [24], offset handler; hlt; hlt; handler: mov cl, 6; hlt")
    m.run()
    ev = m.events()
    ev.exception.injected, ev.exception.nr = 1, 6
    assert m.set_events(ev) == 0
    assert m.run() == 0
    assert m.regs()["rcx"] == 6
    ev.exception.nr = 32
    assert m.set_events(ev) == -errno.EINVAL
    ev.exception.nr = 2
    assert m.set_events(ev) == -errno.EINVAL
    ev.exception.nr, ev.flags = 6, 1 << 10
    assert m.set_events(ev) == -errno.EINVAL
    ev.flags = kx.KVM_VCPUEVENT_VALID_SMM
    ev.smi.smm = 1
    assert m.set_events(ev) == -errno.EINVAL


@BOTH
def test_triple_fault(machine, vendor):
    m = machine(vendor, "lidt [limits]; mov bx, 5; ud2; limits: .word 0, 0, 0")
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_SHUTDOWN
    assert m.regs()["rip"] == (0xFFF0 if vendor == "amd" else m.symbols["limits"] - 2)


@BOTH
def test_bad_state_fails_to_enter(machine, vendor):
    m = machine(vendor, "hlt")
    sregs = m.sregs()
    if vendor == "intel":
        sregs.tr.present = 0
        sregs.tr.unusable = 1
    else:
        sregs.efer = sregs.cr0 = 0
        sregs.cr0 = 0x10
    assert m.set_sregs(sregs) == 0
    assert m.run() == 0
    if vendor == "intel":
        assert m.reason == kx.KVM_EXIT_FAIL_ENTRY
        assert struct.unpack_from("<Q", m.run_page, 32)[0] == 0x80000021
        sregs.tr.present, sregs.tr.unusable = 1, 0
        m.set_sregs(sregs)
        assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT


@BOTH
@pytest.mark.parametrize("change", [
    {"cr0": 0x80000000}, {"cr0": 1 << 32}, {"cr0": 0x20000011}, {"cr4": 1 << 30}, {"efer": 1 << 63},
    {"efer": 1 << 10}, {"apic_base": 1}, {"apic_base": 0xFEE00400},
])
def test_sregs_that_exclude_each_other(machine, vendor, change):
    m = machine(vendor, "hlt")
    sregs = m.sregs()
    for name, value in change.items():
        setattr(sregs, name, value)
    assert m.set_sregs(sregs) == -errno.EINVAL
    assert m.run() == 0


@BOTH
def test_cr4_before_and_after_the_first_cpuid(machine, vendor):
    """Before the client sets a CPUID, all that KVM knows may be in CR4; after an empty one, none of the features."""
    m = machine(vendor, "hlt")
    sregs = m.sregs()
    sregs.cr4 |= CR4_SMEP | CR4_FSGSBASE
    assert m.set_sregs(sregs) == 0
    sregs.cr4 &= ~(CR4_SMEP | CR4_FSGSBASE)
    assert m.set_sregs(sregs) == 0
    assert m.vcpu_ioctl(K.KVM_SET_CPUID2, 0x1000, bytes(8)) == (0, b"")
    for bit in (CR4_SMEP, CR4_FSGSBASE):
        sregs.cr4 = bit
        assert m.set_sregs(sregs) == -errno.EINVAL


@BOTH
def test_xsetbv_takes_what_there_is(machine, vendor):
    """x87 and SSE; everything else raises #GP."""
    m = machine(vendor, """
        mov dword ptr [52], offset handler
        mov eax, cr4; or eax, 0x40000; mov cr4, eax
        xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv
        mov ebx, 4
        again: mov eax, ebx; or eax, 3; xsetbv; inc si
        next: shl ebx, 1; jnz again
        hlt
        handler: inc di; add sp, 6; jmp next""")
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert (m.regs()["rsi"], m.regs()["rdi"]) == (0, 30)
    assert m.vcpu.cpu.xcr0 == 3


@BOTH
def test_control_register_writes_of_the_guest(machine, vendor):
    """Reserved bits raise #GP, as the engine alone would not."""
    m = machine(vendor, """
        mov dword ptr [52], offset handler
        mov eax, 0x80000000
        mov cr0, eax
        hlt
        handler: mov cl, 13
        mov eax, cr0
        or al, 8
        mov cr0, eax
        clts
        mov bx, 0xb
        lmsw bx
        smsw dx
        hlt""")
    assert m.run() == 0
    regs = m.regs()
    assert (regs["rcx"] & 0xFF, m.sregs().cr0 & 0xF, regs["rdx"] & 0xF) == (13, 0xB, 0xB)


@BOTH
def test_msr_access_of_the_guest(machine, vendor):
    m = machine(vendor, """
        mov dword ptr [52], offset handler
        mov ecx, 0x277
        rdmsr
        mov ebx, edx
        mov ecx, 0x12345
        rdmsr
        hlt
        handler: mov si, 13; hlt""")
    assert m.run() == 0
    regs = m.regs()
    assert (regs["rbx"], regs["rsi"]) == (0x00070406, 13)


@BOTH
def test_an_address_in_an_msr_is_canonical(machine, vendor):
    m = machine(vendor, """
        mov dword ptr [52], offset handler
        mov ecx, 0xc0000082
        xor eax, eax
        mov edx, 0xffff8000
        wrmsr
        mov edx, 0x80000000
        wrmsr
        hlt
        handler: rdmsr; mov si, 13; hlt""")
    assert m.run() == 0
    assert (m.regs()["rdx"], m.regs()["rsi"]) == (0xFFFF8000, 13)


@BOTH
def test_hypercall(machine, vendor):
    m = machine(vendor, ".byte 0x0f, 0x01, 0xc1; mov ebx, eax; mov eax, 1; .byte 0x0f, 0x01, 0xd9; hlt", rax=99)
    assert m.run() == 0
    regs = m.regs()
    assert (regs["rbx"], regs["rax"]) == (2**32 - 1000, 0)
    own = b"\x0f\x01\xd9" if vendor == "amd" else b"\x0f\x01\xc1"
    assert m.read(CODE, 3) == own                   # the quirk that patches the other vendor's instruction


@BOTH
def test_cpuid_is_the_clients(machine, vendor):
    m = machine(vendor, "xor eax, eax; cpuid; hlt")
    m.run()
    assert m.regs()["rbx"] == 0                     # none was set
    m = machine(vendor, "mov eax, 1; cpuid; hlt")
    entry = struct.pack("<7I12x", 1, 0, 0, 0x123, 0, 0, 1)
    m.host.memory.write(0x1008, entry)
    assert m.vcpu_ioctl(K.KVM_SET_CPUID2, 0x1000, struct.pack("<II", 1, 0))[0] == 0
    m.run()
    assert (m.regs()["rax"], m.regs()["rdx"]) == (0x123, 0x201)     # the APIC bit follows APIC_BASE
    m.host.memory.write(0x1008, struct.pack("<7I12x", 1, 0, 0, 0x124, 0, 0, 1))
    assert m.vcpu_ioctl(K.KVM_SET_CPUID2, 0x1000, struct.pack("<II", 1, 0))[0] == -errno.EINVAL


@BOTH
def test_msrs_stop_at_the_first_bad_one(machine, vendor):
    m = machine(vendor)
    entries = [(M.MSR_STAR, 5), (0x12345, 0), (M.MSR_LSTAR, 7)]
    m.host.memory.write(0x1008, b"".join(struct.pack("<IIQ", i, 0, v) for i, v in entries))
    assert m.vcpu_ioctl(K.KVM_SET_MSRS, 0x1000, struct.pack("<II", 3, 0))[0] == 1
    assert m.vcpu_ioctl(K.KVM_GET_MSRS, 0x1000, struct.pack("<II", 3, 0))[0] == 1
    assert struct.unpack("<IIQ", m.host.memory.read(0x1008, 16))[2] == 5


@BOTH
def test_internal_error_for_code_that_is_no_memory(machine, vendor):
    m = machine(vendor, ".byte 0xea; .word 0; .word 0x8000")
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0, 0x10000, 0)
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_INTERNAL_ERROR
    assert struct.unpack_from("<I", m.run_page, 32)[0] == kx.KVM_INTERNAL_ERROR_EMULATION


@BOTH
def test_a_signal_ends_a_spinning_guest(machine, vendor):
    m = machine(vendor, "again: jmp again")

    def later():
        time.sleep(0.05)
        m.vcpu.request.interrupted = True
        m.vcpu.kick()

    thread = threading.Thread(target=later)
    thread.start()
    assert m.run() == -errno.EINTR
    assert m.reason == kx.KVM_EXIT_INTR
    thread.join()


@BOTH
def test_several_vcpus_take_turns(machine, vendor):
    m = machine(vendor, "again: inc dword ptr [bx]; jmp again")
    for i in range(1, 3):
        assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, i) == (VCPU_INODE + i, b"")
    sregs = bytes(m.sregs())
    results = {}
    for v in m.vm.vcpus:
        m.ioctl(v.inode, K.KVM_SET_SREGS, 1, sregs)
        values = [0] * 18
        values[1], values[16], values[17] = 0x100 + 8 * v.index, CODE, 2
        m.ioctl(v.inode, K.KVM_SET_REGS, 1, struct.pack("<18Q", *values))
    threads = [threading.Thread(target=lambda v=v: results.update({v.index: m.ioctl(v.inode, K.KVM_RUN)[0]}))
               for v in m.vm.vcpus]
    for t in threads:
        t.start()
    turns, deadline, before = 0, time.monotonic() + 20, (0, 0, 0)
    while turns < 20 and time.monotonic() < deadline:       # each goes on again and again, whatever else the machine does
        counts = struct.unpack("<QQQ", m.read(0x100, 24))
        if all(now > then for now, then in zip(counts, before, strict=True)):
            turns, before = turns + 1, counts
        time.sleep(0.001)
    for v in m.vm.vcpus:
        v.request.interrupted = True
        v.kick()
    for t in threads:
        t.join(5)
    assert results == {0: -errno.EINTR, 1: -errno.EINTR, 2: -errno.EINTR}
    assert turns == 20


def test_who_may_call_what(machine):
    m = machine("amd")
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1, tid=1000)[0] == -errno.EIO
    assert m.ioctl(VM_INODE, 0xAEFF)[0] == -errno.ENOTTY
    assert m.ioctl(VCPU_INODE, 0xAEFF)[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_RUN, 1)[0] == -errno.EINVAL
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 0)[0] == -errno.EEXIST
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 4096)[0] == -errno.EINVAL
    assert m.ioctl(VM_INODE, K.KVM_SET_TSS_ADDR, 0xFFFFD001)[0] == -errno.EINVAL
    assert m.ioctl(VM_INODE, K.KVM_SET_TSS_ADDR, 0xFFFFD000)[0] == 0
    assert m.ioctl(VM_INODE, K.KVM_SET_IDENTITY_MAP_ADDR, 1, bytes(8))[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_MP_STATE, 1, struct.pack("<I", 3))[0] == -errno.EINVAL
    assert m.vcpu_ioctl(K.KVM_SET_MP_STATE, 1, struct.pack("<I", 0))[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_MP_STATE) == (0, bytes(4))


def test_fpu_round_trip(machine):
    m = machine("amd")
    fpu = bytearray(m.vcpu_ioctl(K.KVM_GET_FPU)[1])
    assert struct.unpack_from("<HH", fpu, 128) == (0x37F, 0)
    assert struct.unpack_from("<I", fpu, 408) == (0,)       # Linux leaves mxcsr out, both ways
    fpu[0:10] = bytes(range(10))
    fpu[152:408] = bytes(i & 0xFF for i in range(256))
    struct.pack_into("<HHB", fpu, 128, 0x27F, 0x3800, 0x80)
    assert m.vcpu_ioctl(K.KVM_SET_FPU, 1, fpu)[0] == 0
    assert m.vcpu_ioctl(K.KVM_GET_FPU)[1] == fpu
