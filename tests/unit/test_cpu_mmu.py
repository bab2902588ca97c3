# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's page tables: who may do what, what the walker writes, and when a change is seen (SDM volume 3, chapter 4)."""

import itertools

import pytest

from tests.asm import assemble
from tests.guest import CODE, PD, PML4, PT, Guest

TABLE, DATA = 0x200000, 0x300000        # the page table and the page that are tried
P, RW, US, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
WP, SMEP, SMAP, AC = 1 << 16, 1 << 20, 1 << 21, 1 << 18
READ, WRITE, EXEC = "read", "write", "exec"
PAGING = pytest.mark.parametrize("mode", ["long", "pae", "pm32pg"])


def program(mode):
    di, bp = ("rdi", "rbp") if mode == "long" else ("edi", "ebp")
    return f"""start: hlt
read: mov al,[{di}]
 hlt
write: mov [{di}],bl
 hlt
exec: jmp {di}
h13: mov esi,13
 hlt
h14: pop {bp}
 mov esi,14
 hlt"""


class Paged(Guest):
    """All of memory is the supervisor's; it is the user's, too, at ``user``; the entry under test maps ``va``."""

    def __init__(self, mode):
        super().__init__(program(mode), mode)
        self.size, self.pd = (4, PML4) if mode == "pm32pg" else (8, PD)
        span = 22 if self.size == 4 else 21
        self.user, self.va = 4 << span, 5 << span
        if mode != "pm32pg":
            for i in range(512):
                self.put(PT + 8 * i, i << 12 | RW | P)
        else:
            self.put(self.pd, PS | RW | P, 4)
        self.put(self.pd + 4 * self.size, PS | US | RW | P, self.size)
        self.pde, self.pte = self.pd + 5 * self.size, TABLE
        self.ram[DATA:DATA + 2] = b"\xf4\xf4"
        self.cr0, self.cr4 = self.cpu.cr0, self.cpu.cr4
        if mode == "pae":
            self.cpu.efer = 0x800

    def map(self, pde, pte):
        self.put(self.pde, TABLE | pde, self.size)
        self.put(self.pte, DATA | pte, self.size)
        self.cpu.flush_tlb()

    def privilege(self, user):
        cpu = self.cpu
        data = (0x2B, 0, 0xFFFFFFFF, 0xCF3) if user else (0x18, 0, 0xFFFFFFFF, 0xC93)
        code = {True: (0x33, 0xAFB) if self.mode == "long" else (0x23, 0xCFB),
                False: (0x10, 0xA9B) if self.mode == "long" else (0x38, 0xC9B)}[user]
        for i in (0, 2, 3):
            cpu.set_segment(i, *data)
        cpu.set_segment(1, code[0], 0, 0xFFFFFFFF, code[1])

    def attempt(self, access, user, *, flags=2, gva=None):
        """None, or the error code of the page fault."""
        cpu = self.cpu
        cpu.rflags, cpu.cr2 = flags, 0
        self.privilege(user)
        cpu.set_gpr(4, 0x8800)
        cpu.set_gpr(6, 0)
        cpu.set_gpr(3, 0xF4)
        gva = self.va if gva is None else gva
        cpu.set_gpr(7, gva)
        cpu.rip = self.sym[access] + (self.user if user else 0)
        cpu.commit_state()
        self.hlt()
        if cpu.gpr(6) != 14:
            assert cpu.gpr(6) == (13 if user else 0)        # HLT is the supervisor's
            return None
        assert cpu.cr2 == gva
        return cpu.gpr(5)


def expected(access, user, pde, pte, wp, smep, smap, nxe):
    """The error code, or None."""
    code = (access == WRITE) * 2 | user * 4 | (access == EXEC and bool(nxe or smep)) * 16
    if not pde & pte & P:
        return code
    writable, usable, runnable = bool(pde & pte & RW), bool(pde & pte & US), not (pde | pte) & NX
    if user:
        good = usable and {READ: True, WRITE: writable, EXEC: runnable}[access]
    elif access == EXEC:
        good = runnable and not (usable and smep)
    else:
        good = not (usable and smap) and (access == READ or writable or not wp)
    return None if good else code | 1


@PAGING
def test_permissions(mode):
    g = Paged(mode)
    nx = (0, NX) if g.size == 8 else (0,)
    rights = [0, *(P | rw | us | x for rw in (0, RW) for us in (0, US) for x in nx)]
    wrong = []
    for wp, smep, smap in itertools.product((0, WP), (0, SMEP), (0, SMAP, SMAP | AC)):
        g.cpu.cr0 = g.cr0 & ~WP | wp
        g.cpu.cr4 = g.cr4 & ~(SMEP | SMAP) | smep | smap & SMAP
        for pde, pte, access, user in itertools.product(rights, rights, (READ, WRITE, EXEC), (False, True)):
            if access == EXEC and smap:
                continue
            g.map(pde, pte)
            got = g.attempt(access, user, flags=2 | smap & AC)
            want = expected(access, user, pde, pte, wp, smep, smap == SMAP, g.size == 8)
            seen = (g.get(g.pde, g.size) ^ pde) & (A | D), (g.get(g.pte, g.size) ^ pte) & (A | D)
            used = (A if pde & P else 0, 0) if want is not None else (A, A | D if access == WRITE else A)
            if got != want or seen != used:
                wrong.append((wp, smep, smap, pde, pte, access, user, got, want, seen, used))
    assert not wrong, (len(wrong), wrong[:5])


@PAGING
def test_dirty_is_set_by_the_first_store_only(mode):
    g = Paged(mode)
    g.map(P | RW, P | RW)
    assert g.attempt(READ, False) is None
    assert g.get(g.pte, g.size) & (A | D) == A
    assert g.attempt(WRITE, False) is None
    assert g.get(g.pte, g.size) & (A | D) == A | D
    g.map(P | RW | A, P | RW | A)
    assert g.attempt(WRITE, False) is None
    assert g.get(g.pte, g.size) & (A | D) == A | D


RESERVED = [("long", "pte", 1 << 45), ("long", "pde", 1 << 45), ("pae", "pte", 1 << 45), ("pae", "pde", 1 << 51),
            ("long", "large", 1 << 13), ("long", "large", 1 << 20), ("pae", "large", 1 << 20), ("pm32pg", "large", 1 << 21),
            ("pae", "pte", 1 << 52), ("pae", "pde", 1 << 62)]


@pytest.mark.parametrize(("mode", "level", "bit"), RESERVED)
@pytest.mark.parametrize("access", [READ, WRITE, EXEC])
def test_reserved_bits(mode, level, bit, access):
    g = Paged(mode)
    g.map(P | RW | US | (bit if level == "pde" else 0), P | RW | US | (bit if level == "pte" else 0))
    if level == "large":
        g.put(g.pde, P | RW | US | PS | bit, g.size)
    code = 9 | (access == WRITE) * 2 | (access == EXEC and g.size == 8) * 16
    assert g.attempt(access, False) == code
    assert g.attempt(access, True) == code | 4


@PAGING
def test_nx_is_reserved_without_nxe(mode):
    if mode == "pm32pg":
        return
    g = Paged(mode)
    g.cpu.efer &= ~0x800
    g.map(P | RW, P | RW | NX)
    assert g.attempt(READ, False) == 9
    g.map(P | RW | NX, P | RW)
    assert g.attempt(EXEC, False) == 9


@PAGING
def test_large_pages(mode):
    g = Paged(mode)
    span = 1 << (22 if g.size == 4 else 21)
    if mode == "pm32pg":
        g.put(g.pde, P | RW | PS, 4)                    # PSE-36 would lead to memory that is not there
        at = 0x300000
    else:
        g.put(g.pde, span | P | RW | PS, 8)
        at = span + 0x100000
    g.cpu.flush_tlb()
    g.ram[at] = 0x5A
    assert g.attempt(READ, False, gva=g.va + at % span) is None
    assert g.cpu.gpr(0) & 0xFF == 0x5A
    assert g.get(g.pde, g.size) & (A | D) == A
    assert g.attempt(WRITE, False, gva=g.va + span - 1) is None
    assert g.get(g.pde, g.size) & (A | D) == A | D
    assert g.attempt(READ, True) == 5


CHANGES = {
    "invlpg": "invlpg [{di}]",
    "mov cr3": "mov {ax},cr3\n mov cr3,{ax}",
    "mov cr4, pge": "mov {ax},cr4\n xor {ax},0x80\n mov cr4,{ax}\n xor {ax},0x80\n mov cr4,{ax}",
}


@PAGING
@pytest.mark.parametrize("how", CHANGES)
def test_changes_are_seen_at_once(mode, how):
    """The guest maps one page, then another, and takes the old translation away; global pages survive MOV to CR3."""
    long = mode == "long"
    names = {"di": "rdi" if long else "edi", "ax": "rax" if long else "eax"}
    change = CHANGES[how].format(**names)
    g = Paged(mode)
    code, sym = assemble(f"""again: mov cl,[{names['di']}]
 mov dword ptr [{TABLE}],0x301003
 {change}
 mov ch,[{names['di']}]
 mov dword ptr [{TABLE}],0x300003
 {change}
 mov dl,[{names['di']}]
 hlt""", CODE + 0x800, 64 if long else 32)
    g.ram[CODE + 0x800:CODE + 0x800 + len(code)] = code
    g.ram[DATA], g.ram[DATA + 0x1000] = 1, 2
    for _ in range(3):
        g.map(P | RW, P | RW)
        g.cpu.set_gpr(7, g.va)
        g.cpu.rip = sym["again"]
        g.cpu.commit_state()
        while True:                                     # MOV to CR4 is KVM's
            kind = g.cpu.run()
            if g.cpu.exit.code == 0x78:
                break
            assert (kind, g.cpu.exit.code) == (1, 0x14)
            g.cpu.cr4 = g.cpu.gpr(0)
            g.cpu.skip_instruction(3)
            g.cpu.commit_state()
        assert (g.cpu.gpr(1) & 0xFFFF, g.cpu.gpr(2) & 0xFF) == (0x0201, 1)


@PAGING
def test_tables_in_no_memory(mode):
    g = Paged(mode)
    g.map(P | RW, P | RW)
    g.put(g.pde, 0x8000000 | P | RW, g.size)
    for user in (False, True):
        for access, bits in ((READ, 0), (WRITE, 2)):
            assert g.attempt(access, user) == bits | user * 4


@pytest.mark.parametrize("bit", [40, 46, 51, 52, 62, 63])
@pytest.mark.parametrize("register", ["rax", "r8", "r9"])
def test_reserved_bits_of_cr3(register, bit):
    """#GP(0) at the MOV, which changes nothing; the same bits may be anything in CR2 and the register."""
    g = Guest(f"""start: mov {register},{1 << bit | PML4:#x}
 mov cr2,{register}
 mov rbx,cr3
there: mov cr3,{register}
 hlt
h13: pop rdi
 pop rsi
 mov rdx,cr3
 mov ecx,13
 hlt""")
    g.hlt()
    assert (g.cpu.gpr(1), g.cpu.gpr(7), g.cpu.gpr(6)) == (13, 0, g.sym["there"])
    assert g.cpu.gpr(2) == g.cpu.gpr(3) == g.cpu.cr3 == PML4


def test_a_guests_cr3_does_not_lead_out_of_memory():
    """There is memory of ours beyond the guest's physical addresses."""
    g = Guest("start: mov eax,7\n hlt")
    g.cpu.cr3 = 0x400000000000 | PML4
    g.cpu.commit_state()
    g.hlt()
    assert g.cpu.gpr(0) == 7


@PAGING
def test_tables_changed_from_outside(mode):
    """The client writes a present entry where there was none: no TLB may have kept the absence."""
    g = Paged(mode)
    for _ in range(3):
        g.map(P | RW, 0)
        assert g.attempt(READ, False) == 0
        g.put(g.pte, DATA | P | RW, g.size)
        assert g.attempt(READ, False) is None
