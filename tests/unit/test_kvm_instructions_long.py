# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions of 64-bit code, of both rings, with what hardware does (see test_kvm_instructions)."""

import re
import struct

import pytest

from kvmfs.abi import exits as kx
from tests.asm import assemble
from tests.unit.irq_machine import IrqMachine
from tests.unit.machine import CODE

DONE, DATA, STACK, USER_STACK = 1, 0x4000, 0x7000, 0x6000
GDT, TSS, IDT, TABLES = 0x500, 0x600, 0x1000, 0x20000
DE, DB, BP, OF, BR, UD, NM, TS, NP, SS, GP, PF = 0, 1, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14
CODE64, DATA32, USER32, USERDATA, USER64, TR = 8, 0x10, 0x18, 0x20, 0x28, 0x30
FSGS = "mov rax, cr4; or rax, 0x10000; mov cr4, rax\n"
MSR = "mov ecx, {:#x}; mov eax, {}; xor edx, edx; wrmsr\n"
SCE = "mov ecx, 0xc0000080; rdmsr; or eax, 1; wrmsr\n"
STAR = f"mov ecx, 0xc0000081; xor eax, eax; mov edx, {(USER32 | 3) << 16 | CODE64}; wrmsr\n"
TO_USER = f"push {USERDATA | 3}; push {USER_STACK}; push 2; push {USER64 | 3}; push offset user\niretq\nuser: "
SYSENTER = MSR.format(0x174, CODE64) + MSR.format(0x175, STACK) + MSR.format(0x176, "offset there")

FINE = {                                        # → rax
    "cmpxchg16b": (f"mov qword ptr [{DATA}], 5; mov qword ptr [{DATA + 8}], 6; mov eax, 5; mov edx, 6; mov ebx, 7; mov ecx, 8\n"
                   f"lock cmpxchg16b [{DATA}]; mov rax, [{DATA}]; add rax, [{DATA + 8}]", 15),
    "cmpxchg16b, another value": (f"mov qword ptr [{DATA}], 5; mov qword ptr [{DATA + 8}], 6; xor eax, eax; xor edx, edx\n"
                                  f"cmpxchg16b [{DATA}]; lea rax, [rax + rdx]; jnz past; xor eax, eax; past: nop", 11),
    "cmpxchg8b, unaligned": (f"mov qword ptr [{DATA + 4}], 0; xor eax, eax; xor edx, edx; mov ebx, 7; xor ecx, ecx\n"
                             f"lock cmpxchg8b [{DATA + 4}]; mov rax, [{DATA + 4}]", 7),
    "fs base": (FSGS + "mov rax, 0x123456789; wrfsbase rax; xor eax, eax; rdfsbase rax", 0x123456789),
    "gs base, 32 bits": (FSGS + "mov rax, 0x723456789; wrgsbase rax; wrgsbase eax; rdgsbase rax", 0x23456789),
    "swapgs": (MSR.format(0xC0000102, 0x1234) + "swapgs; mov ecx, 0xc0000101; rdmsr; swapgs", 0x1234),
    "syscall": (SCE + STAR + MSR.format(0xC0000082, "offset there") + MSR.format(0xC0000084, 0x300) + TO_USER
                + "syscall; hlt; there: mov eax, cs; shl eax, 16; mov ax, ss", CODE64 << 16 | DATA32),
    "syscall, what it saves": (SCE + STAR + MSR.format(0xC0000082, "offset there") + "stc; syscall; past: hlt\n"
                               "there: xor eax, eax; cmp rcx, offset past; sete al; and r11d, 1; lea eax, [rax + r11 * 2]", 3),
    "sysret": (SCE + STAR + MSR.format(0xC0000082, "offset there") + "mov rcx, offset user; mov r11d, 2; sysretq; hlt\n"
               "user: mov ebx, cs; mov edi, ss; syscall; hlt; there: mov eax, ebx; shl eax, 16; or eax, edi",
               (USER64 | 3) << 16 | USERDATA | 3),
    "sysret to 32 bits": (SCE + STAR + MSR.format(0xC0000082, "offset there") + MSR.format(0xC0000083, "offset there")
                          + "mov rcx, offset user; mov r11d, 2; sysretd; hlt; .code32\n"
                          "user: mov ebx, cs; syscall; hlt; .code64; there: mov eax, ebx", USER32 | 3),
    "movbe": (f"mov rbx, 0x1122334455667788; movbe [{DATA}], rbx; mov rax, [{DATA}]", 0x8877665544332211),
    "movbe, load": (f"mov rbx, 0x1122334455667788; mov [{DATA}], rbx; xor eax, eax; movbe ax, [{DATA}]", 0x8877),
    "lahf": ("xor eax, eax; stc; lahf", 0x4700), "sahf": ("mov eax, 0x100; sahf; setc al; movzx eax, al", 1),
    "movsxd": ("mov ebx, 0x80000000; movsxd rax, ebx", 0xFFFFFFFF80000000),
    "32-bit result": ("mov rax, -1; mov eax, eax", 0xFFFFFFFF), "16-bit result": ("mov rax, -1; xor ax, ax", (1 << 64) - 0x10000),
    "push of 16 bits": (f"mov rsp, {STACK}; push ax; mov rax, rsp", STACK - 2),
    "enter": (f"mov rsp, {STACK}; enter 16, 0; mov rax, rsp; leave", STACK - 24),
    "rip-relative": ("mov rax, [rip + there]; jmp past; there: .quad 0x55; past: nop", 0x55),
    "mov moffs": (f"mov qword ptr [{DATA}], 9; movabs rax, [{DATA}]", 9),
    "bswap": ("mov rax, 0x1122334455667788; bswap rax", 0x8877665544332211),
    "shld": ("mov rax, 1; mov rbx, 1 << 63; shld rax, rbx, 1", 3),
    "imul": ("mov rax, -2; mov rbx, 3; imul rbx; mov rax, rdx", (1 << 64) - 1),
    "bit string": (f"mov rbx, 200; mov qword ptr [{DATA + 24}], 0; bts qword ptr [{DATA}], rbx; mov rax, [{DATA + 24}]", 0x100),
    "xadd": (f"mov qword ptr [{DATA}], 3; mov rax, 1 << 40; lock xadd [{DATA}], rax", 3),
    "far jump": (f"push {CODE64}; push offset past; retfq; hlt; past: mov eax, 6", 6),
    "crc32": ("xor eax, eax; mov rbx, 1; crc32 rax, rbx", 0x493C7D27), "popcnt": ("mov rbx, -1; popcnt rax, rbx", 64),
    "adcx": ("mov rax, 1; mov rbx, 2; stc; adcx rax, rbx", 4),
    "fxsave": (f"fxsave64 [{DATA}]; fxrstor64 [{DATA}]; mov eax, [{DATA + 24}]", 0x1F80),
    "mov cr8": ("mov eax, 5; mov cr8, rax; xor eax, eax; mov rax, cr8", 5),
    "compatibility mode": (f"push {USERDATA | 3}; push {USER_STACK}; push 2; push {USER32 | 3}; push offset user; iretq\n"
                           ".code32; user: dec eax; inc eax; int 0x80; .code64", 0x80),
}
FAULTS = {
    "cmpxchg16b, unaligned": (f"cmpxchg16b [{DATA + 8}]", GP),
    "address that is not canonical": ("mov rax, 1 << 47; mov rax, [rax]", GP),
    "jump that is not canonical": ("mov rax, 1 << 47; jmp rax", GP),
    "rdfsbase without CR4": ("rdfsbase rax", UD), "wrgsbase without CR4": ("wrgsbase rax", UD),
    "swapgs in user code": (TO_USER + "swapgs", GP), "hlt in user code": (TO_USER + "hlt", GP),
    "mov cr in user code": (TO_USER + "mov rax, cr0", GP), "rdmsr in user code": (TO_USER + "rdmsr", GP),
    "in in user code": (TO_USER + "in al, dx", GP), "cli in user code": (TO_USER + "cli", GP),
    "invlpg in user code": (TO_USER + f"invlpg [{DATA}]", GP), "wbinvd in user code": (TO_USER + "wbinvd", GP),
    "lgdt in user code": (TO_USER + f"lgdt [{DATA}]", GP), "sysret in user code": (SCE + TO_USER + "sysretq", GP),
    "clts in user code": (TO_USER + "clts", GP),
    "mov dr in user code": (TO_USER + "mov rax, dr7", GP), "int 3": ("int3", BP),
    "sysret without SCE": ("sysretq", UD), "syscall without SCE": ("syscall", UD),
    "div": ("xor ebx, ebx; div rbx", DE), "mov ss": ("mov eax, 0x78; mov ss, eax", GP),
    "segment that is not present": ("mov eax, 0x40; mov ds, eax", NP),
    **{name: (code, UD) for name, code in {
        "push es": ".byte 0x06", "pop ds": ".byte 0x1f", "daa": ".byte 0x27", "das": ".byte 0x2f", "aaa": ".byte 0x37",
        "aas": ".byte 0x3f", "pusha": ".byte 0x60", "popa": ".byte 0x61", "82": ".byte 0x82, 0xc0, 1",
        "far call": ".byte 0x9a, 0, 0, 0, 0, 8, 0", "into": ".byte 0xce", "aam": ".byte 0xd4, 10", "aad": ".byte 0xd5, 10",
        "salc": ".byte 0xd6", "far jump": ".byte 0xea, 0, 0, 0, 0, 8, 0", "les": ".byte 0xc4, 0x00", "bound": ".byte 0x62, 0x00",
        "mov cr9": ".byte 0x44, 0x0f, 0x20, 0xc8", "lock inc of a register": ".byte 0xf0, 0x48, 0xff, 0xc0",
        "ud2": "ud2", "lock mov cr": "mov rax, cr4; .byte 0xf0; mov cr4, rax"}.items()},
    "umip, which CPUID does not offer": ("mov rax, cr4; or rax, 0x800; mov cr4, rax", GP),
    "xgetbv 1, which CPUID does not offer": ("mov rax, cr4; or rax, 0x40000; mov cr4, rax; mov ecx, 1; xgetbv", GP),
}
BY_VENDOR = {                                   # name → code, (AMD's, Intel's)
    "lock mov cr0": ("xor eax, eax; .byte 0xf0; mov cr0, rax; mov eax, 3", ((DONE, 3), (0x100 + UD, None))),
    "sysenter": (SYSENTER + TO_USER + "sysenter; hlt; there: mov eax, cs; shl eax, 16; mov ax, ss",
                 ((0x100 + UD, None), (DONE, CODE64 << 16 | DATA32))),
    "sysenter of 32-bit code": (SYSENTER + TO_USER.replace(f"{USER64 | 3}", f"{USER32 | 3}") + ".code32; sysenter; hlt; .code64\n"
                                "there: mov eax, cs; mov rbx, 1 << 40; cmp rsp, rbx; adc eax, 0",
                                ((0x100 + UD, None), (DONE, CODE64 + 1))),
    "sysexit to 64 bits": (SYSENTER + "mov rdx, offset user; mov rcx, 0x6000; .byte 0x48, 0x0f, 0x35\n"
                           "user: mov eax, cs; sysenter; there: nop", ((0x100 + UD, None), (DONE, CODE64 + 32 | 3))),
    "sysenter without a selector": (MSR.format(0x174, 3) + "sysenter", ((0x100 + UD, None), (0x100 + GP, None))),
    "sysexit": (SYSENTER + "mov rdx, offset user; mov rcx, 0x6000; .byte 0x0f, 0x35\n"
                ".code32; user: mov ebx, cs; int 0x80; .code64; there: nop",
                ((0x100 + UD, None), (DONE, 0x80))),
}
TABLES_IN_USER_CODE = {
    "sgdt": f"sgdt [{DATA}]", "sidt": f"sidt [{DATA}]", "sldt": "sldt ax", "str": "str ax", "smsw": "smsw ax"}
CASES = [code for code, *_ in (*FINE.values(), *FAULTS.values(), *BY_VENDOR.values())]
CASES += [TO_USER + code for code in TABLES_IN_USER_CODE.values()]
VECTORS = sorted({vector for _, vector in FAULTS.values()} | {8, 10, 11, 12, 13, 14, 16, 17, 19})


def source():
    cases = ""
    for i, code in enumerate(CASES):
        code = re.sub(r"\b(past|there|user)\b", rf"\1_{i}", code)
        ring3 = "iretq" in code and "there" not in code and "int 0x80" not in code
        end = "int 0x81" if ring3 else f"mov ebp, {DONE}; out 0xf4, al"
        cases += f"case_{i}: {code}\n{end}; hlt\n"
    handlers = "".join(f"vec_{v:02x}: mov ebp, {0x100 + v}; out 0xf4, al; hlt\n" for v in VECTORS)
    return f"hlt\n{cases}{handlers}vec_80: mov eax, 0x80; mov ebp, {DONE}; out 0xf4, al\nvec_81: mov ebp, {DONE}; out 0xf4, al\n"


class LongMachine(IrqMachine):
    """64-bit code at CPL 0, the first GiB mapped 1:1 for everyone."""

    def load(self, source):
        code, self.symbols = assemble(source, CODE, 64)
        assert CODE + len(code) < TABLES
        self.write(CODE, code)
        self.write(GDT, struct.pack("<9Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF,
                                    0x00AFFB000000FFFF, TSS << 16 | 0x00008B0000000067, 0, 0x00CF13000000FFFF))
        self.write(TSS + 4, struct.pack("<Q", STACK))
        for name, address in self.symbols.items():
            if name.startswith("vec_"):
                vector = int(name[4:], 16)
                gate = address & 0xFFFF | CODE64 << 16 | (0xEE if vector >= 0x80 else 0x8E) << 40 | address >> 16 << 48
                self.write(IDT + 16 * vector, struct.pack("<QQ", gate, 0))
        self.write(TABLES, struct.pack("<Q", TABLES + 0x1007))
        self.write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2007))
        self.write(TABLES + 0x2000, struct.pack("<512Q", *(i << 21 | 0x87 for i in range(512))))
        sregs = self.sregs()
        data = [(getattr(sregs, name), DATA32, 3) for name in ("ds", "es", "ss", "fs", "gs")]
        for segment, selector, kind in ((sregs.cs, CODE64, 11), *data):
            segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
            segment.present = segment.s = segment.g = 1
            segment.db, segment.l, segment.dpl = kind == 3, kind == 11, 0
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector, sregs.tr.type, sregs.tr.present = TSS, 0x67, TR, 11, 1
        sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = GDT, 9 * 8 - 1, IDT, 0xFFF
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000033, TABLES, 0x6A0 & ~0x80, 0x500
        assert self.set_sregs(sregs) == 0
        self.set_regs(rip=CODE, rsp=STACK)


@pytest.fixture(scope="module", params=["amd", "intel"])
def machine(request):
    m = LongMachine(request.param, source())
    m.vendor, m.before = request.param, (m.sregs(), m.read(0, 0x8000))
    yield m
    m.close()


def after(machine, code):
    """(DONE, rax) or (0x100 + vector, None)."""
    sregs, memory = machine.before
    machine.write(0, memory)
    assert machine.set_sregs(sregs) == 0
    machine.set_regs(rip=machine.symbols[f"case_{CASES.index(code)}"], rsp=STACK, rbp=0)
    assert machine.run_within() == 0
    assert machine.reason == kx.KVM_EXIT_IO, machine.reason
    values = machine.regs()
    return values["rbp"], values["rax"] if values["rbp"] == DONE else None


@pytest.mark.parametrize("name", FINE)
def test_it_works(machine, name):
    code, value = FINE[name]
    assert after(machine, code) == (DONE, value)


@pytest.mark.parametrize("name", FAULTS)
def test_it_faults(machine, name):
    code, vector = FAULTS[name]
    assert after(machine, code)[0] == 0x100 + vector


@pytest.mark.parametrize("name", BY_VENDOR)
def test_by_vendor(machine, name):
    code, (amd, intel) = BY_VENDOR[name]
    assert after(machine, code) == (intel if machine.vendor == "intel" else amd)


@pytest.mark.parametrize("name", TABLES_IN_USER_CODE)
def test_tables_in_user_code(machine, name):
    assert after(machine, TO_USER + TABLES_IN_USER_CODE[name])[0] == DONE
