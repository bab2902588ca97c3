# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions of 16-bit code in real mode, with what hardware does (see test_kvm_instructions)."""

import re
import struct

import pytest

from kvmfs.abi import exits as kx
from tests.unit.machine import Machine

DONE, DATA, STACK = 1, 0x4000, 0x7000
DE, BP, OF, BR, UD, GP = 0, 3, 4, 5, 6, 13

FINE = {                                        # → eax
    "pusha": ("mov ax, 7; pusha; xor ax, ax; popa; movzx eax, ax", 7),
    "pushad": ("mov eax, 0x12345678; pushad; xor eax, eax; popad", 0x12345678),
    "enter": (f"mov bp, 0x6000; mov sp, {STACK}; enter 16, 2; movzx eax, sp; leave", STACK - 22),
    "bound": (f"mov dword ptr [{DATA}], 0x00090001; mov ax, 5; bound ax, [{DATA}]; movzx eax, ax", 5),
    "xlat": (f"mov bx, {DATA}; mov byte ptr [{DATA + 5}], 0x7e; mov eax, 5; xlatb", 0x7E),
    "lds": (f"mov dword ptr [{DATA}], 0x00101234; lds si, [{DATA}]; mov eax, ds; shl eax, 16; mov ax, si", 0x00101234),
    "les, segment override": (f"mov ax, 0x400; mov fs, ax; mov dword ptr [{DATA}], 0x00205678; les di, fs:[0]\n"
                              "mov eax, es; shl eax, 16; mov ax, di", 0x00205678),
    "segment is 16 times": ("mov ax, 0x400; mov ds, ax; mov byte ptr [0x10], 9; mov ax, 0x401; mov ds, ax\n"
                            "movzx eax, byte ptr [0]", 9),
    "far call": ("call 0:there; jmp past; there: mov eax, 0x77; retf; past: nop", 0x77),
    "far jump": ("jmp 0x800:there - 0x8000; there: mov eax, cs", 0x800),
    "far return, 4 bytes more": ("push 0; push 0; push 0; push offset past; retf 4; past: movzx eax, sp", STACK),
    "int and iret": ("mov word ptr [0x200], offset there; mov word ptr [0x202], 0; stc; int 0x80; jmp past\n"
                     "there: mov bp, sp; and byte ptr [bp + 4], 0xfe; iret; past: setc al; movzx eax, al", 0),
    "loop": ("mov ecx, 0x10003; xor eax, eax; there: inc ax; loop there; shr ecx, 16; add ax, cx", 4),
    "loop with ECX": ("mov ecx, 3; xor eax, eax; there: inc ax; addr32 loop there", 3),
    "jcxz": ("mov ecx, 0x10000; xor eax, eax; jcxz past; inc ax; past: nop", 0),
    "jecxz": ("mov ecx, 0x10000; xor eax, eax; jecxz past; inc ax; past: nop", 1),
    "rep movsb": (f"mov dword ptr [{DATA}], 0x44332211; mov si, {DATA}; mov di, {DATA + 8}; mov ecx, 0x50004; cld; rep movsb\n"
                  f"mov eax, [{DATA + 8}]; add eax, ecx", 0x44382211),
    "backwards": (f"mov word ptr [{DATA}], 0x2211; mov si, {DATA + 1}; std; lodsb; lodsb; cld\n"
                  "movzx eax, al; add ax, si", 0x11 + DATA - 1),
    "si wraps": ("mov esi, 0x1ffff; cld; lodsb; mov eax, esi", 0x10000),
    "address wraps": (f"mov byte ptr [{DATA}], 9; mov bx, 0xfff0; movzx eax, byte ptr [bx + {DATA + 16}]", 9),
    "32-bit address": (f"mov byte ptr [{DATA}], 9; mov ebx, {DATA // 2}; movzx eax, byte ptr [ebx * 2]", 9),
    "scasb": (f"mov byte ptr [{DATA + 3}], 9; mov di, {DATA}; mov al, 9; mov ecx, 8; cld; repne scasb; mov eax, ecx", 4),
    "cmpsw": (f"mov dword ptr [{DATA}], 0; mov si, {DATA}; mov di, {DATA + 2}; cld; cmpsw; sete al; movzx eax, al", 1),
    "daa": ("mov eax, 0x9b; daa", 1), "das": ("mov eax, 0x0a; das", 4),
    "aaa": ("mov eax, 0x0b; aaa", 0x101), "aam": ("mov eax, 25; aam", 0x205),
    "aad": ("mov eax, 0x0205; aad", 25), "salc": ("xor eax, eax; stc; .byte 0xd6", 0xFF),
    "pushf": ("stc; pushf; pop ax; and eax, 0xffff", 0x3), "popfd": ("push 0; push 0x41; popfd; lahf; movzx eax, ah", 0x43),
    "push sp": ("push sp; pop ax; movzx eax, ax", STACK), "push fs": ("mov ax, 9; mov fs, ax; push fs; pop ax; movzx eax, ax", 9),
    "mov of a segment, 32 bits": ("mov ax, 9; mov fs, ax; mov eax, -1; mov eax, fs", 9),
    "shld": ("mov ax, 1; mov bx, 0x8000; shld ax, bx, 1; movzx eax, ax", 3),
    "shift by 17": ("mov eax, 0x10001; shl ax, 17", 0x10000),
    "rcl by 17": ("stc; mov eax, 5; rcl ax, 17", 5), "imul": ("mov ax, 300; imul ax, ax, 300; movzx eax, ax", 24464),
    "bsf": ("mov bx, 0x100; bsf ax, bx; movzx eax, ax", 8),
    "bt": ("mov bx, 100; bts word ptr [0x4000], bx; movzx eax, word ptr [0x400c]", 0x10),
    "bswap": ("mov eax, 0x11223344; bswap eax", 0x44332211), "cwde": ("mov ax, 0x8000; cwde", 0xFFFF8000),
    "smsw": ("smsw ax; and eax, 1", 0), "lmsw": ("smsw ax; or al, 2; lmsw ax; smsw ax; and eax, 3", 2),
    "sgdt": (f"sgdt [{DATA}]; movzx eax, word ptr [{DATA}]", 0xFFFF),
    "lidt": (f"mov word ptr [{DATA}], 0x3ff; mov dword ptr [{DATA + 2}], 0; lidt [{DATA}]\n"
             f"sidt [{DATA + 8}]; movzx eax, word ptr [{DATA + 8}]", 0x3FF),
    "fpu": (f"fninit; fld1; fistp word ptr [{DATA}]; movzx eax, word ptr [{DATA}]", 1),
    "fpu environment": (f"fninit; fnstenv [{DATA}]; movzx eax, word ptr [{DATA}]", 0x37F),
    "in and out of protected mode": ("mov eax, cr0; or al, 1; mov cr0, eax; jmp past; past: and al, 0xfe; mov cr0, eax\n"
                                     "and eax, 1", 0),
    "cmpxchg8b": (f"mov dword ptr [{DATA}], 0; mov dword ptr [{DATA + 4}], 0; xor eax, eax; xor edx, edx; mov ebx, 7; mov ecx, 8\n"
                  f"lock cmpxchg8b [{DATA}]; mov eax, [{DATA + 4}]", 8),
}
FAULTS = {
    "div": ("xor bx, bx; div bx", DE), "aam 0": ("aam 0", DE), "int3": ("int3", BP), "into": ("mov al, 0x7f; add al, 1; into", OF),
    "bound": (f"mov dword ptr [{DATA}], 0x00090001; mov ax, 15; bound ax, [{DATA}]", BR),
    "sysenter": ("sysenter", GP),
    **{name: (code, UD) for name, code in {
        "sldt": "sldt ax", "str": "str ax", "lldt": "lldt ax", "ltr": "ltr ax", "lar": "lar ax, bx", "lsl": "lsl ax, bx",
        "verr": "verr ax",
        "arpl": ".byte 0x63, 0xd8", "mov cs": ".byte 0x8e, 0xc8", "lock nop": ".byte 0xf0, 0x90", "syscall": "syscall",
        "rsm": "rsm",
        "vmlaunch": "vmlaunch"}.items()}}
CASES = [code for code, _ in (*FINE.values(), *FAULTS.values())]
VECTORS = sorted({vector for _, vector in FAULTS.values()})


def source():
    cases = "".join(f"case_{i}: " + re.sub(r"\b(past|there)\b", rf"\1_{i}", code) + f"\nmov ebp, {DONE}; out 0xf4, al; hlt\n"
                    for i, code in enumerate(CASES))
    return "hlt\n" + cases + "".join(f"vec_{v}: mov ebp, {0x100 + v}; out 0xf4, al; hlt\n" for v in VECTORS)


@pytest.fixture(scope="module", params=["amd", "intel"])
def machine(request):
    m = Machine(request.param, source())
    for vector in VECTORS:
        m.write(4 * vector, struct.pack("<HH", m.symbols[f"vec_{vector}"], 0))
    m.before = (m.sregs(), m.read(0, 0x8000))
    yield m
    m.close()


def after(m, code):
    sregs, memory = m.before
    m.write(0, memory)
    assert m.set_sregs(sregs) == 0
    zero = dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), 0)
    m.set_regs(rip=m.symbols[f"case_{CASES.index(code)}"], rsp=STACK, **zero)
    assert m.run() == 0
    assert m.reason == kx.KVM_EXIT_IO, m.reason
    values = m.regs()
    return values["rbp"], values["rax"]


@pytest.mark.parametrize("name", FINE)
def test_it_works(machine, name):
    code, value = FINE[name]
    assert after(machine, code) == (DONE, value)


@pytest.mark.parametrize("name", FAULTS)
def test_it_faults(machine, name):
    code, vector = FAULTS[name]
    assert after(machine, code)[0] == 0x100 + vector
