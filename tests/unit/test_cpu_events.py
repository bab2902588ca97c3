# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of the SVM kind, exceptions, interrupts, NMIs, injection."""

from __future__ import annotations

import pytest

from kvmfs.cpu.cpu import EXIT_IO_IN, EXIT_NONE, EXIT_SVM, Injection
from tests.guest import CODE, GDT, IDT, PT, TSS, Guest

PROTECTED = ("pm32", "pm32pg", "pae", "long")
MODES = ("real", *PROTECTED)


def svm(g: Guest) -> tuple[int, int]:
    kind = g.cpu.run()
    assert kind == EXIT_SVM, (kind, hex(g.cpu.exit.gpa))
    return g.cpu.exit.code, g.cpu.exit.info1


@pytest.mark.parametrize("mode", MODES)
def test_intercepted_instructions(mode):
    g = Guest("start: cpuid\n mov ecx,0x10\n rdmsr\n wrmsr\n vmmcall\n vmcall\n rdpmc\n hlt", mode)
    expected = [(0x72, None), (0x7C, 0), (0x7C, 1), (0x81, 0), (0x81, 1), (0x6F, None), (0x78, None)]
    lengths = [2, 2, 2, 3, 3, 2, 1]
    for (code, info), length in zip(expected, lengths, strict=True):
        got = svm(g)
        assert got[0] == code
        assert info is None or got[1] == info
        g.cpu.skip_instruction(length)
    assert g.cpu.rip == g.sym["h_def"] - (CODE if mode == "real" else 0)


def test_msr_passthrough_and_efer():
    g = Guest("start: mov ecx,0xc0000082\n mov eax,0x1234\n xor edx,edx\n wrmsr\n mov ecx,0xc0000080\n rdmsr\n hlt")
    assert svm(g) == (0x7C, 0)
    assert (g.cpu.lstar, g.cpu.efer, g.cpu.gpr(1)) == (0x1234, 0xD01, 0xC0000080)
    g.cpu.msr_passthrough(0xC0000082, False, False)
    g.cpu.rip = CODE
    assert svm(g) == (0x7C, 1)
    with pytest.raises(ValueError, match="MSR"):
        g.cpu.msr_passthrough(0x40000000, True, True)


def test_register_and_exception_intercepts():
    g = Guest("start: mov rax,cr0\n mov cr3,rax\n mov rax,dr6\n mov dr7,rax\n ud2\n mov rax,[0x50008]\n bp: int3\n hlt")
    g.cpu.set_register_intercepts(cr_read=1, cr_write=8, dr_read=0x40)
    g.cpu.set_exception_intercepts(1 << 6 | 1 << 14 | 1 << 3)
    g.cpu.cr2 = 0x77
    for code, length in ((0x00, 3), (0x13, 3), (0x26, 3), (0x37, 3), (0x46, 2)):
        assert svm(g)[0] == code
        g.cpu.skip_instruction(length)
    assert svm(g) == (0x4E, 0)
    assert (g.cpu.exit.info2, g.cpu.cr2) == (0x50008, 0x77)
    g.cpu.rip = g.sym["bp"]
    assert svm(g) == (0x43, 0)
    assert g.cpu.rip == g.sym["bp"]


@pytest.mark.parametrize("mode", PROTECTED)
def test_exceptions_without_error_code(mode):
    pop = "pop rbx" if mode == "long" else "pop ebx"
    g = Guest(f"start: xor ecx,ecx\n mov eax,1\n cdq\n at: div ecx\n hlt\nh0: {pop}\n hlt", mode)
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["at"]
    g = Guest(f"start: nop\n at: ud2\n hlt\nh6: {pop}\n hlt", mode)
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["at"]
    g = Guest(f"start: int3\n next: hlt\nh3: {pop}\n hlt", mode, dpl3=(3,))
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["next"]
    g = Guest(f"start: .byte 0xf1\n next: hlt\nh1: {pop}\n hlt", mode)
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["next"]


def test_exceptions_in_real_mode():
    g = Guest("start: xor cx,cx\n at: div cx\n hlt\nh0: pop bx\n pop dx\n mov eax,5\n hlt", "real")
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(2), g.cpu.gpr(0)) == (g.sym["at"] - CODE, CODE >> 4, 5)


CODES = [
    ("mov rax,[0x50008]", 14, 0),
    ("mov byte ptr [0x51000],1", 14, 3),
    ("mov eax,0x53000; call rax", 14, 0x11),
    ("mov eax,0xfff8; mov ds,eax", 13, 0xFFF8),
    ("mov rax,0x8000000000000000; mov rax,[rax]", 13, 0),
    ("mov eax,0x3b; ltr ax", 13, 0x38),
    ("int 0x90", 13, 0x90 * 8 + 2),
    ("lldt ax; mov eax,0x0c; mov es,eax", 13, 0x0C),
]


@pytest.mark.parametrize("insn,vector,code", CODES)
def test_error_codes(insn, vector, code):
    g = Guest(f"start: xor eax,eax\n {insn}\n hlt\nh{vector}: pop rbx\n pop rcx\n mov edx,1\n hlt")
    g.cpu.idt = (IDT, 0x8FF)  # up to vector 0x8f
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(2)) == (code, 1)


def test_page_fault_address_and_user_bit():
    src = """start: push 0x2b
 push 0x4f000
 push 2
 push 0x33
 lea rax,[rip+user]
 push rax
 iretq
user: mov rax,[0x52008]
h14: pop rbx
 pop rcx
 mov rdx,cr2
 hlt"""
    g = Guest(src)
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1), g.cpu.gpr(2)) == (5, g.sym["user"], 0x52008)
    assert g.cpu.gpr(4) == 0x9000 - 32


def test_user_mode_privileged_instruction_and_syscall():
    src = """start: push 0x2b
 push 0x4f000
 push 0x202
 push 0x33
 lea rax,[rip+user]
 push rax
 iretq
user: mov eax,7
 syscall
 after: cmp eax,8
 jne bad
 at: hlt
bad: ud2
sysent: mov r14,rcx
 add eax,1
 sysretq
h13: pop rbx
 pop rcx
 hlt"""
    g = Guest(src)
    g.cpu.star, g.cpu.lstar, g.cpu.fmask = 0x23 << 48 | 0x10 << 32, g.sym["sysent"], 0x200
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1), g.cpu.gpr(14)) == (0, g.sym["at"], g.sym["after"])


def test_syscall_without_sce_is_ud():
    g = Guest("start: nop\n at: syscall\n hlt\nh6: pop rbx\n hlt")
    g.cpu.efer = 0xD00
    g.cpu.commit_state()
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["at"]


@pytest.mark.parametrize("mode", MODES)
def test_triple_fault(mode):
    g = Guest("start: ud2\n hlt", mode)
    g.cpu.idt = (0, 0)
    assert svm(g)[0] == 0x7F


def test_double_fault_and_its_error_code():
    g = Guest("start: mov rax,[0x50000]\nh8: pop rbx\n pop rcx\n hlt")
    g.put(IDT + 14 * 16, 0)
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (0, CODE)
    g.put(IDT + 8 * 16, 0)
    g.cpu.rip = CODE
    assert svm(g)[0] == 0x7F


def test_fault_while_delivering_has_ext_bit_and_gate_number():
    g = Guest("start: ud2\nh13: pop rbx\n pop rcx\n hlt")
    g.put(IDT + 6 * 16, 0x8E << 40)  # a null selector
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (1, CODE)
    g = Guest("start: ud2\nh11: pop rbx\n pop rcx\n hlt")
    g.put(IDT + 6 * 16, 0x0E << 40 | 0x10 << 16)  # a gate that is not present
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (6 * 8 + 3, CODE)


# --- interrupts ---


@pytest.mark.parametrize("mode", MODES)
def test_interrupt_window_and_delivery(mode):
    pop = {"real": "pop cx", "long": "pop rcx"}.get(mode, "pop ecx")
    g = Guest(f"start: cli\n mov edx,3\n sti\n inc edx\n next: inc edx\n hlt\nh32: {pop}\n hlt", mode)
    cpu = g.cpu
    base = CODE if mode == "real" else 0
    assert not cpu.interrupt_allowed
    cpu.set_interrupt_window(True)
    assert svm(g)[0] == 0x64
    assert cpu.interrupt_allowed
    assert (cpu.gpr(2), cpu.rip) == (4, g.sym["next"] - base)  # after the shadow of STI
    cpu.inject_interrupt(32)
    assert cpu.pending_injection() == [Injection("interrupt", 32, None)]
    g.hlt()
    assert cpu.gpr(1) & 0xFFFF == (g.sym["next"] - base) & 0xFFFF
    assert cpu.pending_injection() == []
    assert not cpu.rflags & 0x200


def test_interrupt_then_window():
    g = Guest("start: sti\n nop\n nop\n hlt\nh32: inc ebx\n iretq\nh33: inc ecx\n iretq")
    cpu = g.cpu
    cpu.rflags = 0x202
    cpu.inject_interrupt(32)
    cpu.set_interrupt_window(True)
    assert svm(g)[0] == 0x64
    assert (cpu.gpr(3), cpu.rip) == (1, CODE)
    cpu.inject_interrupt(33)
    g.hlt()
    assert (cpu.gpr(3), cpu.gpr(1)) == (1, 1)


def test_shadow():
    g = Guest("start: sti\n hlt\n mov eax,ss\n mov ss,eax\n hlt")
    assert svm(g)[0] == 0x78
    assert g.cpu.interrupt_shadow
    assert not g.cpu.interrupt_allowed
    g.cpu.skip_instruction(1)
    assert g.cpu.interrupt_allowed
    assert svm(g)[0] == 0x78
    assert g.cpu.interrupt_shadow
    g.cpu.interrupt_shadow = 0
    assert g.cpu.interrupt_allowed


def test_hlt_wakes_by_interrupt():
    g = Guest("start: sti\n hlt\n after: hlt\nh32: inc ebx\n iretq")
    g.hlt()
    for i in range(100):
        g.cpu.rip = g.sym["after"]
        g.cpu.interrupt_shadow = 0
        g.cpu.inject_interrupt(32)
        g.hlt()
        assert g.cpu.gpr(3) == i + 1


def test_nmi_and_its_blocking():
    g = Guest("start: nop\n hlt\n again: hlt\nh2: inc ebx\n hlt\n iretq")
    cpu = g.cpu
    cpu.inject_nmi()
    g.hlt()
    assert (cpu.gpr(3), cpu.nmi_masked) == (1, True)
    cpu.inject_nmi()
    cpu.set_intercept(24, 20)  # IRET
    cpu.skip_instruction(1)
    assert svm(g)[0] == 0x74
    assert cpu.pending_injection() == [Injection("nmi", 2, None)]
    cpu.set_intercept(24)
    g.hlt()  # IRET, and the second NMI at once
    assert (cpu.gpr(3), cpu.nmi_masked, cpu.pending_injection()) == (2, True, [])
    cpu.nmi_masked = False
    assert not cpu.nmi_masked


# --- exceptions from outside ---


@pytest.mark.parametrize("mode", PROTECTED)
def test_inject_exception(mode):
    r = "r" if mode == "long" else "e"
    g = Guest(f"start: nop\n at: mov edx,5\n hlt\nh14: pop {r}bx\n pop {r}cx\n mov {r}si,cr2\n hlt", mode)
    cpu = g.cpu
    cpu.rip = g.sym["at"]
    cpu.cr2 = 0xDEAD000
    cpu.inject_exception(14, 6)
    assert cpu.pending_injection() == [Injection("exception", 14, 6)]
    g.hlt()
    assert (cpu.gpr(3), cpu.gpr(1), cpu.gpr(6), cpu.gpr(2)) == (6, g.sym["at"], 0xDEAD000, 0)
    assert cpu.pending_injection() == []


def test_inject_exception_that_faults_is_a_double_fault():
    g = Guest("start: nop\nh8: mov ebx,8\n hlt")
    g.put(IDT + 13 * 16, 0)
    g.cpu.inject_exception(13, 0)
    g.hlt()
    assert g.cpu.gpr(3) == 8
    g.cpu.rip = CODE
    g.put(IDT + 8 * 16, 0)
    g.cpu.inject_exception(8, 0)
    assert svm(g)[0] == 0x7F


def test_inject_soft_interrupt():
    g = Guest("start: int3\n next: hlt\nh3: pop rbx\n hlt")
    g.cpu.set_exception_intercepts(1 << 3)
    g.cpu.rip = g.sym["next"]
    g.cpu.inject_exception(3, soft=True)
    g.hlt()
    assert g.cpu.gpr(3) == g.sym["next"]


def test_exception_goes_before_interrupt_and_survives_a_kick():
    g = Guest("start: hlt\nh6: inc ebx\n iretq\nh32: inc ecx\n hlt")
    cpu = g.cpu
    cpu.rflags = 0x202
    cpu.inject_exception(6)
    cpu.inject_interrupt(32)
    cpu.kick()
    assert cpu.run() == EXIT_NONE
    assert [i.kind for i in cpu.pending_injection()] == ["exception", "interrupt"]
    g.hlt()
    assert cpu.gpr(1) == 1
    cpu.inject_exception(6)
    cpu.cancel_injection()
    cpu.rip = CODE
    g.hlt()
    assert cpu.gpr(1) == 1


def test_single_step():
    g = Guest("start: mov ecx,1\n mov ecx,2\n cpuid\n mov ecx,3\n hlt")
    cpu = g.cpu
    cpu.set_exception_intercepts(1 << 1)
    cpu.rflags |= 0x100
    steps = []
    for _ in range(4):
        code, _info = svm(g)
        steps.append((code, cpu.gpr(1)))
        if code == 0x72:
            cpu.skip_instruction(2)
    assert steps == [(0x41, 1), (0x41, 2), (0x72, 2), (0x41, 2)] or steps[3] == (0x41, 3)


def test_virtual_8086():
    src = """start: push 0
 push 0
 push 0
 push 0
 push 0x3000
 push 0x100
 push 0x23202
 push 0x1000
 push offset v86 - 0x10000
 iretd
v86: .code16
 mov ax,0x1234
 out 0x80,ax
 int 0x30
 .code32
h48: pop ebx
 mov edx,[esp+4]
 hlt"""
    g = Guest(src, "pm32", dpl3=(48,))
    g.cpu.set_segment(7, 0x40, TSS, 0xFFF, 0x08B)  # a bitmap of zeros: IOPL does not matter in this mode
    assert g.trace() == [("out", 0x80, 2, b"\x34\x12")]
    assert g.cpu.gpr(2) & 0x20000
    g = Guest(src + "\nh13: mov esi,[esp+4]\n hlt", "pm32", dpl3=(48,))
    assert g.trace() == []  # beyond TR's limit
    assert g.cpu.gpr(6) == g.sym["v86"] - CODE + 3


def test_mode_switch_real_to_long():
    src = f"""start: lgdt [cs:gdtr-0x10000]
 mov eax,cr4
 or eax,0x20
 mov cr4,eax
 mov eax,0x100000
 mov cr3,eax
 mov ecx,0xc0000080
 mov eax,0x100
 xor edx,edx
 wrmsr
 mov eax,0x80000011
 mov cr0,eax
 .byte 0x66,0xea
 .long long
 .word 0x10
long: .code64
 mov rax,0x1122334455667788
 hlt
gdtr: .word 0x4f
 .long {GDT}"""
    long = Guest("start: hlt")
    g = Guest(src, "real")
    for lo, hi in ((GDT, IDT), (0x100000, 0x105000)):
        g.ram[lo:hi] = long.ram[lo:hi]
    assert svm(g) == (0x7C, 1)
    g.cpu.efer = g.cpu.gpr(0)
    g.cpu.commit_state()
    g.cpu.skip_instruction(2)
    g.hlt()
    assert g.cpu.gpr(0) == 0x1122334455667788
    assert g.cpu.efer == 0x500
    assert g.cpu.segment(1)[3] & 0x200  # L
    assert PT


@pytest.mark.parametrize("mode", ["pm32", "long"])
def test_no_tss_is_a_shutdown_not_an_abort(mode):
    r, code = ("rax", 0x33) if mode == "long" else ("eax", 0x23)
    iret = "iretq" if mode == "long" else "iretd"
    frame = f"push 0x2b\n push 0x4f000\n push 2\n push {code}\n lea {r},[user]\n push {r}"
    g = Guest(f"start: {frame}\n {iret}\nuser: ud2", mode)
    g.cpu.set_segment(7, 0, 0, 0, 0)
    assert svm(g)[0] == 0x7F


def test_an_intercepted_single_step_leaves_dr6_alone():
    g = Guest("start: in al,0x10\n mov ecx,1\n hlt")
    g.cpu.set_exception_intercepts(2)
    g.cpu.rflags |= 0x100
    assert g.cpu.run() == EXIT_IO_IN
    assert g.cpu.complete_io_in(b"\1") == EXIT_SVM
    assert (g.cpu.exit.code, g.cpu.exit.info2, g.cpu.rip, g.cpu.dr(6)) == (0x41, 0x4000, CODE + 2, 0xFFFF0FF0)
    assert svm(g)[0] == 0x41
    assert (g.cpu.exit.info2, g.cpu.rip, g.cpu.dr(6)) == (0x4000, CODE + 7, 0xFFFF0FF0)
