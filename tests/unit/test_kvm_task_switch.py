# SPDX-License-Identifier: GPL-2.0-or-later
"""Hardware task switches (SDM vol. 3, chapter 8): jumps, calls, task gates, IRET, and what is refused."""

import struct

import pytest

from kvmfs.abi import exits as kx
from tests.unit.irq_machine import GDT, IDT, IrqMachine

TSS_A, TSS_B, TABLES = 0x600, 0x700, 0x20000
A, B, GATE, ABSENT, SHORT, BUSY = 0x18, 0x20, 0x28, 0x30, 0x38, 0x40
TS, NP, GP = 10, 11, 13
NT, BUSY_BIT = 1 << 14, 1 << 41
FIELDS = [
    "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp",
    "ebp", "esi", "edi", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap"]
STOP = "out 0xf4, al; hlt\n"
SOURCE = f"""
jump: mov eax, 0x11; mov ebx, 0x22; stc
      .byte 0xea; .long 0; .word {B}
back: {STOP}
call_: mov eax, 0x11; .byte 0x9a; .long 0; .word {B}
called: {STOP}
by_gate: .byte 0xea; .long 0; .word {GATE}
interrupt: int 0x40
after_interrupt: {STOP}
fault: ud2
error: mov eax, 0xfff8; mov ds, eax
absent: .byte 0xea; .long 0; .word {ABSENT}
short: .byte 0xea; .long 0; .word {SHORT}
busy: .byte 0xea; .long 0; .word {BUSY}
itself: .byte 0xea; .long 0; .word {A}
no_link: pushfd; or dword ptr [esp], {NT}; popfd; iretd
other: {STOP}
returns: mov eax, 0xCC; iretd
after_iret: {STOP}
other_jumps: .byte 0xea; .long 0; .word {A}
vec_0a: pop ebx; mov ebp, 10; {STOP}
vec_0b: pop ebx; mov ebp, 11; {STOP}
vec_0d: pop ebx; mov ebp, 13; {STOP}
"""


class Tasks(IrqMachine):
    def load(self, source):
        super().load(source)
        descriptors = [0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF,
                       *(base << 16 | limit | kind << 40 for base, limit, kind in (
                           (TSS_A, 0x67, 0x8B), (TSS_B, 0x67, 0x89))),
                       B << 16 | 0x85 << 40, TSS_B << 16 | 0x67 | 0x09 << 40, TSS_B << 16 | 0x66 | 0x89 << 40,
                       TSS_B << 16 | 0x67 | 0x8B << 40]
        self.write(GDT, struct.pack(f"<{len(descriptors)}Q", *descriptors))
        self.write(IDT + 8 * 0x40, struct.pack("<Q", B << 16 | 0x85 << 40))
        self.put(TSS_B, eip=self.symbols["other"], esp=0x6000, eflags=2, cs=8, eax=0xBB, ebp=0xB0,
                 **dict.fromkeys(("ds", "es", "ss", "fs", "gs"), 0x10))
        sregs = self.sregs()
        sregs.gdt.limit = 8 * len(descriptors) - 1
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector, sregs.tr.type, sregs.tr.present = TSS_A, 0x67, A, 11, 1
        assert self.set_sregs(sregs) == 0

    def put(self, tss, **values):
        for name, value in values.items():
            self.write(tss + 4 * FIELDS.index(name), struct.pack("<I", value))

    def field(self, tss, name):
        return struct.unpack("<I", self.read(tss + 4 * FIELDS.index(name), 4))[0]

    def busy(self, selector):
        return bool(struct.unpack("<Q", self.read(GDT + selector, 8))[0] & BUSY_BIT)

    def go(self, label):
        """Run from there to the next OUT: the registers then."""
        if label is not None:
            self.set_regs(rip=self.symbols[label], rsp=0x7000)
        assert self.run_within() == 0
        assert self.reason == kx.KVM_EXIT_IO
        return self.regs()


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    m = Tasks(request.param, SOURCE)
    yield m
    m.close()


def state(m):
    sregs = m.sregs()
    return sregs.tr.selector, sregs.tr.base, m.busy(A), m.busy(B), bool(sregs.cr0 & 8), bool(m.regs()["rflags"] & NT)


def test_jump(machine):
    m = machine
    regs = m.go("jump")
    assert (regs["rip"], regs["rax"], regs["rbx"], regs["rsp"], regs["rbp"]) == (m.symbols["other"], 0xBB, 0, 0x6000, 0xB0)
    assert state(m) == (B, TSS_B, False, True, True, False)
    saved = {name: m.field(TSS_A, name) for name in ("eip", "eax", "ebx", "esp", "cs", "ss", "eflags")}
    assert saved == {"eip": m.symbols["back"], "eax": 0x11, "ebx": 0x22, "esp": 0x7000, "cs": 8, "ss": 0x10, "eflags": 3}


def test_jump_and_back(machine):
    m = machine
    m.put(TSS_B, eip=m.symbols["other_jumps"])
    regs = m.go("jump")
    assert (regs["rip"], regs["rax"], regs["rbx"], regs["rflags"] & 1) == (m.symbols["back"], 0x11, 0x22, 1)
    assert state(m) == (A, TSS_A, True, False, True, False)


def test_call(machine):
    m = machine
    m.go("call_")
    assert state(m) == (B, TSS_B, True, True, True, True)
    assert (m.field(TSS_B, "link"), m.field(TSS_A, "eip")) == (A, m.symbols["called"])


def test_call_and_iret(machine):
    m = machine
    m.put(TSS_B, eip=m.symbols["returns"])
    regs = m.go("call_")
    assert (regs["rip"], regs["rax"]) == (m.symbols["called"], 0x11)
    assert state(m) == (A, TSS_A, True, False, True, False)
    assert [m.field(TSS_B, name) for name in ("eip", "eax", "eflags")] == [m.symbols["after_iret"], 0xCC, 2]


@pytest.mark.parametrize("label", ["by_gate", "interrupt"])
def test_gates(machine, label):
    m = machine
    regs = m.go(label)
    nested = label == "interrupt"
    assert (regs["rip"], regs["rax"]) == (m.symbols["other"], 0xBB)
    assert state(m) == (B, TSS_B, nested, True, True, nested)
    if nested:
        assert (m.field(TSS_B, "link"), m.field(TSS_A, "eip")) == (A, m.symbols["after_interrupt"])


def test_fault_through_a_gate(machine):
    m = machine
    m.write(IDT + 8 * 6, struct.pack("<Q", B << 16 | 0x85 << 40))
    assert m.go("fault")["rsp"] == 0x6000
    assert m.field(TSS_A, "eip") == m.symbols["fault"]
    assert state(m) == (B, TSS_B, True, True, True, True)


def test_error_code_goes_to_the_new_stack(machine):
    m = machine
    m.write(IDT + 8 * GP, struct.pack("<Q", B << 16 | 0x85 << 40))
    assert m.go("error")["rsp"] == 0x5FFC
    assert struct.unpack("<I", m.read(0x5FFC, 4))[0] == 0xFFF8


@pytest.mark.parametrize(("label", "vector", "code"), [
    ("absent", NP, ABSENT), ("short", TS, SHORT), ("busy", GP, BUSY), ("itself", GP, A), ("no_link", TS, 0)])
def test_refused(machine, label, vector, code):
    m = machine
    regs = m.go(label)
    assert (regs["rbp"], regs["rbx"]) == (vector, code)
    assert m.sregs().tr.selector == A


def test_bad_segment_in_the_new_task(machine):
    """#TS comes in the new task's context."""
    m = machine
    m.put(TSS_B, ds=0x7B)
    regs = m.go("jump")
    assert (regs["rbp"], regs["rbx"], m.sregs().tr.selector) == (TS, 0x78, B)


def test_cr3_comes_from_the_tss(machine):
    m = machine
    m.write(TABLES, struct.pack("<1024I", *(i << 22 | 0x87 for i in range(1024))))
    m.write(TABLES + 0x1000, struct.pack("<1024I", *(i << 22 | 0x87 for i in range(1024))))
    sregs = m.sregs()
    sregs.cr0, sregs.cr3, sregs.cr4 = sregs.cr0 | 1 << 31, TABLES, sregs.cr4 | 0x10
    assert m.set_sregs(sregs) == 0
    m.put(TSS_B, cr3=TABLES + 0x1000)
    m.go("jump")
    assert (m.sregs().cr3, m.sregs().tr.selector) == (TABLES + 0x1000, B)
