# SPDX-License-Identifier: GPL-2.0-or-later
"""Breakpoints of the debug registers in the engine."""

import random

import pytest

from kvmfs.cpu.cpu import EXIT_SVM
from tests.guest import CODE, USER_STACK, Guest

DR7 = 0x400
MODES = pytest.mark.parametrize("mode", ["pm32", "pae", "long"])


def stop(g):
    """rip and cause of the #DB that the run ends with; None: HLT."""
    assert g.cpu.run() == EXIT_SVM
    x = g.cpu.exit
    if x.code == 0x78:
        return None
    assert x.code == 0x41, hex(x.code)
    return g.cpu.rip, x.info2


@MODES
def test_rf_from_iret_is_for_one_instruction(mode):
    """The handler returns with RF set; the next instruction of the same block has a breakpoint, too."""
    iret = "iretq" if mode == "long" else "iretd"
    g = Guest(f"start: nop\none: inc eax\ntwo: inc eax\nthree: inc eax\n hlt\nh1: inc ecx\n {iret}", mode)
    s = g.sym
    g.cpu.set_breakpoints(DR7 | 2 | 8 | 0x20, (s["one"], s["two"], s["three"], 0))
    for i, name in enumerate(("one", "two", "three")):
        assert stop(g) == (s[name], 1 << i)
        assert g.cpu.rflags & 0x10000
        assert g.cpu.gpr(0) == i
        g.cpu.inject_exception(1)
    assert stop(g) is None
    assert (g.cpu.gpr(0), g.cpu.gpr(1)) == (3, 3)
    assert not g.cpu.rflags & 0x10000


@MODES
def test_execution_breakpoint_in_a_loop(mode):
    g = Guest("start: mov ecx,1000\nagain: dec ecx\nhere: test ecx,ecx\n jnz again\n hlt", mode)
    g.cpu.set_breakpoints(DR7 | 2, (g.sym["here"], 0, 0, 0))
    hits = 0
    while stop(g):
        hits += 1
    assert hits == 1000
    g.cpu.set_breakpoints(DR7, (g.sym["here"], 0, 0, 0))
    g.cpu.rip = g.sym["start"]
    assert stop(g) is None


def test_a_breakpoint_of_another_page_of_the_same_code():
    """A linear address hits, whichever physical page is behind it; another mapping of it does not."""
    g = Guest("start: nop\n call there\n hlt\nthere: ret")
    alias = 0x60000 | (g.sym["there"] & 0xFFF)
    g.put(0x103000 + 8 * 0x60, CODE | 7)
    g.cpu.set_breakpoints(DR7 | 2, (alias, 0, 0, 0))
    assert stop(g) is None


def test_user_code_and_its_system_calls():
    src = f"""start: push 0x2b
 push {USER_STACK}
 push 0x202
 push 0x33
 lea rax,[user]
 push rax
 iretq
user: inc ebx
 int 0x30
here: inc ebx
 int 0x30
 ud2
h48: inc ecx
 cmp ecx,2
 je end
 iretq
end: hlt"""
    g = Guest(src, dpl3=(48,))
    g.cpu.set_breakpoints(DR7 | 2 | 8, (g.sym["here"], g.sym["h48"], 0, 0))
    assert stop(g) == (g.sym["h48"], 2)
    assert stop(g) == (g.sym["here"], 1)
    assert stop(g) == (g.sym["h48"], 2)
    assert stop(g) is None
    assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (2, 2)


@MODES
@pytest.mark.parametrize("insn,kinds", [
    ("movs byte ptr [edi],byte ptr [esi]", (1, 3)), ("push 1", ()), ("lock xadd [edi],eax", (1, 3)), ("cmp [edi],eax", (3,)),
    ("movups [edi-8],xmm0", (1, 3)), ("movups xmm0,[edi-12]", (3,)), ("movups xmm0,[edi-16]", ()),
    ("fstp tbyte ptr [edi-9]", (1, 3)),
    ("cmpxchg8b [edi-4]", (1, 3)), ("fxsave [edi-164]", (1, 3)), ("bts dword ptr [edi],1", (1, 3)), ("nop dword ptr [edi]", ()),
    ("prefetcht0 [edi]", ()), ("lea eax,[edi]", ()),
])
def test_what_counts_as_an_access(mode, insn, kinds):
    for kind in (1, 3):
        g = Guest(f"start: mov esi,0x20100\n mov edi,0x20404\n fldz\n {insn}\nafter: nop\n hlt", mode)
        g.cpu.cr4 |= 0x600
        g.cpu.commit_state()
        g.cpu.set_breakpoints(DR7 | 2 | kind << 16 | 3 << 18, (0x20404, 0, 0, 0))
        assert stop(g) == ((g.sym["after"], 1) if kind in kinds else None)
        if kind in kinds:
            assert stop(g) is None


def test_a_repeated_string_store_stops_at_each_hit():
    g = Guest("start: mov edi,0x20400\n mov ecx,8\n cld\nat: rep stosb\nafter: hlt")
    g.cpu.set_breakpoints(DR7 | 2 | 1 << 16 | 1 << 18, (0x20402, 0, 0, 0))
    assert stop(g) == (g.sym["at"], 1)
    assert (g.cpu.gpr(1), g.cpu.gpr(7)) == (5, 0x20403)
    assert stop(g) == (g.sym["at"], 1)
    assert stop(g) is None
    assert g.cpu.gpr(1) == 0


def test_an_access_that_faults_is_no_hit():
    g = Guest("start: mov rsi,0x20000\n mov rdi,0x50000\n movsb\n hlt\nh14: mov ebx,1\n hlt")
    g.cpu.set_breakpoints(DR7 | 2 | 3 << 16, (0x20000, 0, 0, 0))
    assert stop(g) is None
    assert g.cpu.gpr(3) == 1


def test_hits_of_several_at_once():
    g = Guest("start: mov edi,0x20400\n mov [edi],eax\nafter: hlt")
    g.cpu.set_breakpoints(DR7 | 0xAA | 0x1D11 << 16, (0x20400, 0x20402, 0x20404, 0x20401))
    x = stop(g)
    assert x == (g.sym["after"], 0b1011)


def test_execution_and_data_breakpoint_at_one_instruction():
    g = Guest("start: mov edi,0x20400\nat: mov [edi],eax\nafter: hlt")
    g.cpu.set_breakpoints(DR7 | 2 | 8 | 0xD << 20, (g.sym["at"], 0x20400, 0, 0))
    assert stop(g) == (g.sym["at"], 1)
    assert stop(g) == (g.sym["after"], 2)
    assert stop(g) is None


def test_random_accesses_hit_exactly_when_they_overlap():
    rng = random.Random(5)
    lines, expect, at = ["start: nop"], [], 0x20FF8
    sizes = {1: "mov byte ptr [{}],al", 2: "mov word ptr [{}],ax", 4: "mov eax,[{}]", 8: "mov rbx,[{}]"}
    low, high = at, at + 8
    for i in range(200):
        size = rng.choice((1, 2, 4, 8))
        address = low + rng.randrange(-12, 24)
        lines += [" " + sizes[size].format(hex(address)), f"a{i}: nop"]
        if address < high and low < address + size:
            expect.append(f"a{i}")
    g = Guest("\n".join([*lines, " hlt"]))
    g.cpu.set_breakpoints(DR7 | 2 | 3 << 16 | 2 << 18, (at, 0, 0, 0))
    names = {v: k for k, v in g.sym.items() if k[1:].isdigit()}
    got = []
    while (hit := stop(g)) is not None:
        got.append(names[hit[0]])
    assert got == expect
