# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_SET_GUEST_DEBUG, and the guest's own debug registers; both vendors."""

import errno
import struct
import threading
import time

import pytest

from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmDebugregs
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import CODE, Machine

MACHINE = Machine           # that the fixture makes
BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
ENABLE, STEP, SW, HW = 1, 2, 0x10000, 0x20000
INJECT_DB, INJECT_BP, BLOCKIRQ = 0x40000, 0x80000, 0x100000
LOW = 0xFFFF0FF0
BS, RF = 0x4000, 0x10000


def debug(m, control, dr7=0, addresses=()):
    db = [*addresses, 0, 0, 0, 0][:4]
    data = struct.pack("<II8Q", control, 0, *db, 0, 0, 0, dr7)
    return m.vcpu_ioctl(K.KVM_SET_GUEST_DEBUG, 1, data)[0]


def stop(m):
    """exception, pc, dr6, dr7 of the debug exit that the next KVM_RUN ends with."""
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_DEBUG
    exception, _, pc, dr6, dr7 = struct.unpack_from("<IIQQQ", m.run_page, 32)
    return exception, pc, dr6, dr7


def go_on(m):
    """Past the execution breakpoint at which the guest stands: the client sets RF."""
    data = bytearray(m.vcpu_ioctl(K.KVM_GET_REGS)[1])
    flags, = struct.unpack_from("<Q", data, 136)
    struct.pack_into("<Q", data, 136, flags | RF)
    assert m.vcpu_ioctl(K.KVM_SET_REGS, 1, bytes(data))[0] == 0


def halted(m):
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_HLT
    return m.regs()


def debugregs(m):
    return KvmDebugregs.from_buffer_copy(m.vcpu_ioctl(K.KVM_GET_DEBUGREGS)[1])


@BOTH
def test_software_breakpoint(machine, vendor):
    m = machine(vendor, "nop; int3; nop; hlt")
    assert debug(m, ENABLE | SW) == 0
    exception, pc, _, _ = stop(m)
    assert (exception, pc, m.regs()["rip"]) == (3, CODE + 1, CODE + 1)
    assert stop(m)[1] == CODE + 1                   # it stays there
    m.write(CODE + 1, b"\x90")
    halted(m)


@BOTH
def test_int3_is_the_guests_without_a_debugger(machine, vendor):
    m = machine(vendor, "mov dword ptr [12], offset handler; int3; hlt; handler: mov cl, 3; hlt")
    assert debug(m, SW) == 0                        # ENABLE is missing
    assert halted(m)["rcx"] == 3


@BOTH
def test_single_step(machine, vendor):
    m = machine(vendor, "mov al, 1; mov bl, 2; cpuid; pushf; pop ax; jmp beyond; nop; beyond: hlt; nop")
    assert debug(m, ENABLE | STEP) == 0
    seen = []
    for _ in range(6):
        exception, pc, dr6, _ = stop(m)
        assert (exception, dr6) == (1, LOW | BS)
        seen.append(pc - CODE)
        assert m.regs()["rflags"] & 0x100 == 0      # the debugger's TF is not shown
    assert seen == [2, 4, 6, 7, 8, 11]
    assert debugregs(m).dr6 == LOW                  # nor is the guest's DR6 touched
    halted(m)
    assert debug(m, 0) == 0
    m.set_regs(rip=CODE)
    halted(m)


@BOTH
def test_single_step_over_io(machine, vendor):
    m = machine(vendor, "out 0x80, al; in al, 0x81; mov al, [0x9000]; hlt")
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0x8000, 0x1000, 0x8000)
    assert debug(m, ENABLE | STEP) == 0
    m.run()
    assert (m.reason, m.io()[:3]) == (kx.KVM_EXIT_IO, (1, 1, 0x80))
    assert stop(m)[1:3] == (CODE + 2, LOW | BS)
    m.run()
    assert (m.reason, m.io()[:3]) == (kx.KVM_EXIT_IO, (0, 1, 0x81))
    m.run_page[4096] = 0x55
    assert stop(m)[1] == CODE + 4
    assert m.regs()["rax"] & 0xFF == 0x55
    m.run()
    assert m.mmio() == (0x9000, b"\0", 0)
    m.run_page[40] = 0x66
    assert stop(m)[1] == CODE + 7
    assert m.regs()["rax"] & 0xFF == 0x66


@BOTH
def test_a_client_that_moves_rip_stops_stepping(machine, vendor):
    """kvm_set_rflags gives TF only at the address where stepping was asked for."""
    m = machine(vendor, "nop; nop; there: nop; nop; hlt")
    assert debug(m, ENABLE | STEP) == 0
    assert stop(m)[1] == CODE + 1
    m.set_regs(rip=m.symbols["there"])
    halted(m)
    m.set_regs(rip=CODE)
    assert stop(m)[1] == CODE + 1


@BOTH
def test_the_guests_own_single_step(machine, vendor):
    m = machine(vendor, """
        mov dword ptr [4], offset handler
        pushf; pop ax; or ax, 0x100; push ax; popf
        inc bx
        cpuid
        inc bx
        hlt
        handler: inc di; push bp; mov bp, sp; and word ptr [bp + 6], 0xfeff; cmp di, 2; je out
        or word ptr [bp + 6], 0x100
        out: pop bp; iret""")
    regs = halted(m)
    assert regs["rdi"] == 2
    assert debugregs(m).dr6 == LOW | BS


@BOTH
def test_hardware_execution_breakpoints(machine, vendor):
    m = machine(vendor, "mov cx, 3; again: inc ax; second: loop again; hlt")
    again, second = m.symbols["again"], m.symbols["second"]
    assert debug(m, ENABLE | HW, 0x402 | 8, (again, second)) == 0
    for turn in range(3):
        assert stop(m) == (1, again, LOW | 1, 0x40A)
        assert m.regs()["rax"] == turn
        assert stop(m) == (1, again, LOW | 1, 0x40A)    # it comes again: RF is not set for it (SDM vol. 3, 18.3.1.1)
        assert not m.regs()["rflags"] & RF
        go_on(m)
        assert stop(m) == (1, second, LOW | 2, 0x40A)
        assert m.regs()["rax"] == turn + 1
        go_on(m)
    halted(m)
    assert debug(m, 0) == 0
    m.set_regs(rip=CODE)
    assert halted(m)["rax"] == 6
    assert debugregs(m).dr6 == LOW
    assert debugregs(m).dr7 == 0x400


@BOTH
def test_rf_lasts_for_one_instruction(machine, vendor):
    m = machine(vendor, "one: inc ax; two: inc ax; three: inc ax; hlt")
    s = m.symbols
    assert debug(m, ENABLE | HW, 0x400 | 2 | 8 | 0x20, (s["one"], s["two"], s["three"])) == 0
    m.set_regs(rip=s["one"], rflags=0x10002)
    assert stop(m)[1:3] == (s["two"], LOW | 2)
    m.set_regs(rip=s["two"], rax=7)                  # RF is clear: it comes again
    assert stop(m)[1:3] == (s["two"], LOW | 2)
    go_on(m)
    assert stop(m)[1:3] == (s["three"], LOW | 4)
    go_on(m)
    assert halted(m)["rax"] == 9


@BOTH
@pytest.mark.parametrize("insn,kind,hit", [
    ("mov [0x1002], ax", 1, True), ("mov [0x1002], ax", 3, True), ("mov ax, [0x1002]", 3, True),
    ("mov ax, [0x1002]", 1, False), ("mov [0x1004], ax", 3, False), ("mov [0x1000], ax", 3, False),
    ("mov dword ptr [0xfff], eax", 3, True), ("mov dword ptr [0xffe], eax", 3, False),
    ("mov eax, [0xfff]", 3, True), ("mov eax, [0xffd]", 3, False), ("inc byte ptr [0x1003]", 1, True),
    ("lock inc byte ptr [0x1003]", 1, True), ("push ax", 1, False),
])
def test_data_breakpoints(machine, vendor, insn, kind, hit):
    m = machine(vendor, f"mov bx, 1; {insn}; after: nop; hlt")
    length = 1                                       # two bytes
    dr7 = 0x400 | 2 | kind << 16 | length << 18
    assert debug(m, ENABLE | HW, dr7, (0x1002,)) == 0
    if hit:
        assert stop(m) == (1, m.symbols["after"], LOW | 1, dr7)
    halted(m)
    assert m.vcpu.cpu.dr(6) == LOW


@BOTH
def test_a_data_breakpoint_at_the_second_time(machine, vendor):
    """The page is in the TLB from accesses beside the watched bytes."""
    m = machine(vendor, "mov cx, 5; again: mov [0x1100], cx; mov ax, [0x1200]; loop again; mov [0x1300], cx; after: hlt")
    dr7 = 0x400 | 2 | 1 << 16 | 3 << 18
    assert debug(m, ENABLE | HW, dr7, (0x1300,)) == 0
    assert stop(m)[1] == m.symbols["after"]
    halted(m)


@BOTH
def test_a_data_breakpoint_on_the_stack_of_an_interrupt(machine, vendor):
    m = machine(vendor, "mov dword ptr [0x84], offset handler; int 0x21; hlt; handler: inc ax; hlt")
    dr7 = 0x400 | 2 | 1 << 16 | 1 << 18
    assert debug(m, ENABLE | HW, dr7, (0x6FFE,)) == 0
    assert stop(m)[1:3] == (m.symbols["handler"], LOW | 1)
    assert halted(m)["rax"] == 1


@BOTH
def test_data_breakpoint_in_mmio(machine, vendor):
    m = machine(vendor, "mov [0x9000], al; after: nop; hlt")
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0x8000, 0x1000, 0x8000)
    assert debug(m, ENABLE | HW, 0x400 | 2 | 1 << 16, (0x9000,)) == 0
    m.run()
    assert m.mmio() == (0x9000, b"\0", 1)
    assert stop(m)[1:3] == (m.symbols["after"], LOW | 1)
    halted(m)


@BOTH
def test_the_guests_own_breakpoints(machine, vendor):
    m = machine(vendor, """
        mov dword ptr [4], offset handler
        mov eax, 0x1000
        mov dr0, eax
        lea eax, [here]
        mov dr1, eax
        mov eax, 0x30000 + 2 + 8
        mov dr7, eax
        mov bl, [0x1000]
        nop
        here: nop
        mov eax, dr6
        mov edx, dr7
        hlt
        handler: mov esi, dr6; inc di; cmp di, 2; jne back
        xor eax, eax; mov dr7, eax
        back: xor eax, eax; mov dr6, eax; iret""")
    regs = halted(m)
    assert regs["rdi"] == 2
    assert regs["rsi"] == LOW | 2                    # the second was the one for execution
    assert (regs["rax"], regs["rdx"]) == (LOW, 0x400)


@BOTH
def test_a_debugger_hides_the_guests_breakpoints(machine, vendor):
    m = machine(vendor, """
        lea eax, [here]
        mov dr0, eax
        mov eax, 2
        mov dr7, eax
        here: nop
        mov ebx, dr0
        mov ecx, dr7
        there: hlt""")
    assert debug(m, ENABLE | HW, 0x402, (m.symbols["there"],)) == 0
    assert stop(m)[1] == m.symbols["there"]
    regs = m.regs()
    assert (regs["rbx"], regs["rcx"]) == (m.symbols["here"], 0x402)
    assert debugregs(m).db[0] == m.symbols["here"]
    assert debug(m, 0) == 0
    halted(m)


@BOTH
def test_general_detect(machine, vendor):
    m = machine(vendor, "mov dword ptr [4], offset handler; at: mov eax, dr0; hlt; handler: mov ebx, dr6; mov ecx, dr7; hlt")
    assert debug(m, ENABLE | HW, 0x2400) == 0
    assert stop(m)[:3] == (1, m.symbols["at"], LOW | 0x2000)
    assert debug(m, 0) == 0
    regs = debugregs(m)
    regs.dr7 = 0x2400
    assert m.vcpu_ioctl(K.KVM_SET_DEBUGREGS, 1, bytes(regs))[0] == 0
    regs = halted(m)
    assert (regs["rbx"], regs["rcx"]) == (LOW | 0x2000, 0x400)


@BOTH
def test_reserved_bits_of_dr6_and_dr7(machine, vendor):
    m = machine(vendor, """
        mov eax, -1; mov dr6, eax; mov ebx, dr6; xor eax, eax; mov dr6, eax; mov ecx, dr6
        mov eax, 0xffffdf00; mov dr7, eax; mov edx, dr7; hlt""")
    regs = halted(m)
    assert (regs["rbx"], regs["rcx"], regs["rdx"]) == (0xFFFFEFFF, LOW, 0xFFFF0F00)


@BOTH
def test_injection(machine, vendor):
    m = machine(vendor, """
        mov dword ptr [4], offset hdb; mov dword ptr [12], offset hbp; hlt
        start: int3; hlt
        hdb: mov cl, 1; hlt
        hbp: mov cl, 3; pop ax; hlt""")
    halted(m)
    assert debug(m, ENABLE | INJECT_DB) == 0
    assert debug(m, ENABLE | INJECT_DB) == -errno.EBUSY
    assert halted(m)["rcx"] == 1
    m.set_regs(rip=m.symbols["start"], rsp=0x7000)
    assert debug(m, ENABLE | SW) == 0
    assert stop(m)[1] == m.symbols["start"]
    assert debug(m, ENABLE | SW | INJECT_BP) == 0    # the guest's own INT3 after all
    regs = halted(m)
    assert (regs["rcx"], regs["rax"] & 0xFFFF) == (3, m.symbols["start"] + 1)


@BOTH
def test_blockirq(machine, vendor):
    m = machine(vendor, "mov dword ptr [8], offset handler; hlt; nop; hlt; handler: mov cl, 1; hlt")
    halted(m)
    assert debug(m, ENABLE | BLOCKIRQ) == 0
    m.vcpu_ioctl(K.KVM_NMI)
    assert halted(m)["rcx"] == 0
    assert debug(m, 0) == 0
    m.set_regs(rip=m.symbols["handler"] - 1)
    assert halted(m)["rcx"] == 1


@BOTH
def test_a_step_onto_a_breakpoint(machine, vendor):
    m = machine(vendor, "nop; here: nop; hlt")
    assert debug(m, ENABLE | STEP | HW, 0x402, (m.symbols["here"],)) == 0
    assert stop(m)[1:3] == (m.symbols["here"], LOW | BS)
    assert stop(m)[1:3] == (m.symbols["here"], LOW | 1)
    go_on(m)
    assert debug(m, ENABLE | STEP | HW, 0x402, (m.symbols["here"],)) == 0
    assert stop(m)[1:3] == (m.symbols["here"] + 1, LOW | BS)


@BOTH
def test_breakpoints_are_each_vcpus_own(machine, vendor):
    m = machine(vendor, "one: nop; two: nop; hlt")
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    sregs, regs = m.vcpu_ioctl(K.KVM_GET_SREGS)[1], m.vcpu_ioctl(K.KVM_GET_REGS)[1]
    m.ioctl(VCPU_INODE + 1, K.KVM_SET_SREGS, 1, sregs)
    m.ioctl(VCPU_INODE + 1, K.KVM_SET_REGS, 1, regs)
    assert debug(m, ENABLE | HW, 0x402, (m.symbols["two"],)) == 0
    assert stop(m)[1] == m.symbols["two"]
    assert m.ioctl(VCPU_INODE + 1, K.KVM_RUN)[0] == 0
    assert struct.unpack_from("<I", m.vm.vcpus[1].run, 8)[0] == kx.KVM_EXIT_HLT
    go_on(m)
    halted(m)


@BOTH
def test_single_step_over_an_mmio_write(machine, vendor):
    """As in Linux, where the emulator's write ends with the client's answer: the next step is the one reported."""
    m = machine(vendor, "mov [0x9000], al; nop; nop; hlt")
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0x8000, 0x1000, 0x8000)
    assert debug(m, ENABLE | STEP) == 0
    m.run()
    assert m.mmio() == (0x9000, b"\0", 1)
    assert m.regs()["rip"] == CODE + 3
    assert stop(m)[1:3] == (CODE + 4, LOW | BS)


@BOTH
def test_single_step_through_sti_and_hlt(machine, vendor):
    m = machine(vendor, "sti; nop; hlt; nop; hlt")
    assert debug(m, ENABLE | STEP) == 0
    assert [stop(m)[1] - CODE for _ in range(2)] == [1, 2]
    halted(m)                                        # HLT wins over the step
    assert stop(m)[1] == CODE + 4


@BOTH
def test_breakpoint_on_an_instruction_that_exits(machine, vendor):
    m = machine(vendor, "at: out 0x80, al; second: cpuid; third: mov al, [0x9000]; hlt")
    m.region(0, 0, 0, 0, 0)
    m.region(0, 0, 0x8000, 0x1000, 0x8000)
    s = m.symbols
    assert debug(m, ENABLE | HW, 0x400 | 0x2A, (s["at"], s["second"], s["third"])) == 0
    assert stop(m)[1] == s["at"]
    go_on(m)
    assert m.run() == 0
    assert m.io()[:3] == (1, 1, 0x80)
    assert stop(m)[1] == s["second"]
    go_on(m)
    assert stop(m)[1] == s["third"]
    go_on(m)
    m.run()
    assert m.mmio()[0] == 0x9000
    halted(m)


@BOTH
def test_reset_takes_the_guests_breakpoints_away(machine, vendor):
    m = machine(vendor, "lidt [none]; at: int3; none: .word 0, 0, 0")
    regs = debugregs(m)
    regs.db[0], regs.dr7 = m.symbols["none"], 0x402
    assert m.vcpu_ioctl(K.KVM_SET_DEBUGREGS, 1, bytes(regs))[0] == 0
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_SHUTDOWN
    assert debugregs(m).dr7 == (0x400 if vendor == "amd" else 0x402)


@BOTH
def test_a_dr7_that_hardware_refuses(machine, vendor):
    m = machine(vendor, "hlt")
    assert debug(m, ENABLE | HW, 1 << 32) == 0
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_FAIL_ENTRY
    assert debug(m, ENABLE | HW, 0x400) == 0
    halted(m)


@BOTH
@pytest.mark.parametrize("dr7", [0x402, 0x402 | 1 << 16 | 1 << 18])
def test_breakpoints_while_another_vcpu_runs_the_same_code(machine, vendor, dr7):
    m = machine(vendor, "again: inc dword ptr [bx]; at: nop; jmp again")
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    m.set_regs(rip=CODE, rbx=0x1008)
    other = m.vm.vcpus[1]
    m.ioctl(other.inode, K.KVM_SET_SREGS, 1, m.vcpu_ioctl(K.KVM_GET_SREGS)[1])
    m.ioctl(other.inode, K.KVM_SET_REGS, 1, m.vcpu_ioctl(K.KVM_GET_REGS)[1])
    m.set_regs(rip=CODE, rbx=0x1000)
    address = m.symbols["at"] if dr7 == 0x402 else 0x1000
    assert debug(m, ENABLE | HW, dr7, (address,)) == 0
    result = []
    thread = threading.Thread(target=lambda: result.append(m.ioctl(other.inode, K.KVM_RUN)[0]))
    thread.start()
    turn, deadline = -1, time.monotonic() + 10
    while turn < 200 or (not any(m.read(0x1008, 4)) and time.monotonic() < deadline):
        turn += 1
        assert stop(m)[1:3] == (m.symbols["at"], LOW | 1)
        go_on(m)
        assert int.from_bytes(m.read(0x1000, 4), "little") == turn + 1
    other.request.interrupted = True
    other.kick()
    thread.join(10)
    assert result == [-errno.EINTR]
    assert int.from_bytes(m.read(0x1008, 4), "little") > 0
