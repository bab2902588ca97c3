# SPDX-License-Identifier: GPL-2.0-or-later
"""Page tables in every mode: who may do what, what the walk writes, what is seen at once (Intel SDM 3A 4.6, 4.7; AMD APM 2 5.6)."""

import itertools
import struct

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_HLT
from kvmfs.cpu.cpu import EXIT_SVM
from tests.asm import assemble
from tests.unit.machine import Machine

LEVELS = {"long": (0x10000, 0x11000, 0x12000, 0x13000), "pae": (0x11000, 0x12000, 0x13000), "legacy": (0x12000, 0x13000)}
P, RW, US, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
WP, PSE, PAE, PGE, SMEP, SMAP, NXE, AC = 1 << 16, 1 << 4, 1 << 5, 1 << 7, 1 << 20, 1 << 21, 1 << 11, 1 << 18
DATA = 0x40000                  # the page under test: linear 0x40000 as well
LOAD, STORE, FETCH = range(3)
PROGRAM = "mov eax, [{0}]; hlt; .balign 16; mov [{0}], eax; hlt; .balign 16; jmp {0}"
HLT, GP, PF = 0x78, 0x4D, 0x4E


class Paged:
    """The first 2 MiB mapped 1:1 for everybody, in small pages; each access is one run."""

    def __init__(self, mode, vendor="amd"):
        self.mode = mode
        bits, register = (64, "rbx") if mode == "long" else (32, "ebx")
        self.m = Machine(vendor, PROGRAM.format(register), bits=bits)
        self.cpu = self.m.vcpu.cpu
        self.size = 4 if mode == "legacy" else 8
        tables = self.tables = LEVELS[mode]
        for table, below in itertools.pairwise(tables):
            self.put(table, below | (P if (mode, table) == ("pae", tables[0]) else P | RW | US))
        for page in range(256):
            self.put(tables[-1] + page * self.size, page << 12 | P | RW | US)
        self.m.write(DATA, b"\xf4")

    def put(self, at, value):
        self.m.write(at, value.to_bytes(self.size, "little"))

    def get(self, at):
        return int.from_bytes(self.m.read(at, self.size), "little")

    def entry(self, level=-1, gva=DATA):
        """The address of the entry for ``gva``; level -1: the last."""
        table = self.tables[level]
        shift = 12 + (10 if self.size == 4 else 9) * (len(self.tables) - 1 - self.tables.index(table))
        return table + (gva >> shift & (1023 if self.size == 4 else 511)) * self.size

    def enter(self, *, user=False, wp=True, nx=True, cr4=0, flags=0):
        cpu = self.cpu
        ring = 3 if user else 0
        code = (0xA9B if self.mode == "long" else 0xC9B) | ring << 5
        for i in (0, 2, 3, 4, 5):
            cpu.set_segment(i, 0x18 | ring, 0, 0xFFFFFFFF, 0xC93 | ring << 5)
        cpu.set_segment(1, 0x10 | ring, 0, 0xFFFFFFFF, code)
        cpu.cr0 = 0x80000033 | (WP if wp else 0)
        cpu.cr3 = self.tables[0]
        cpu.cr4 = cr4 | (PSE if self.mode == "legacy" else PAE)
        cpu.efer = (0x500 if self.mode == "long" else 0) | (NXE if nx and self.mode != "legacy" else 0)
        cpu.rflags = 2 | flags
        cpu.set_exception_intercepts(1 << 14 | 1 << 13)
        cpu.commit_state()

    def access(self, what, gva=DATA):
        """The error code of its page fault; None: it was allowed."""
        cpu = self.cpu
        cpu.cancel_injection()
        cpu.set_gpr(3, gva)
        cpu.rip = 0x8000 + 16 * what
        kind = cpu.run()
        code = cpu.exit.code
        assert kind == EXIT_SVM and code in (HLT, GP, PF), (kind, hex(code))
        if code == PF:
            assert cpu.exit.info2 == gva
            return cpu.exit.info1 & 0xFFFFFFFF
        return None

    def translate(self, gva):
        """KVM_TRANSLATE: the guest physical address, None when it is not valid."""
        result, data = self.m.vcpu_ioctl(K.KVM_TRANSLATE, 1, struct.pack("<QQBBB5x", gva, 0, 0, 0, 0))
        assert result == 0
        _, physical, valid, _, _ = struct.unpack_from("<QQBBB", data)
        return physical if valid else None


@pytest.fixture(params=LEVELS)
def paged(request):
    p = Paged(request.param)
    yield p
    p.m.close()


def expected(entry, upper, what, user, wp, nx, cr4, flags):
    """The error code, None: allowed."""
    both = entry & upper
    code = (2 if what == STORE else 0) | (4 if user else 0) | (16 if what == FETCH and (nx or cr4 & SMEP) else 0)
    if not both & P:
        return code
    forbidden = ((user and not both & US)
                 or (what == STORE and not both & RW and (user or wp))
                 or (what == FETCH and nx and entry & NX)
                 or (what == FETCH and not user and both & US and cr4 & SMEP)
                 or (what != FETCH and not user and both & US and cr4 & SMAP and not flags & AC))
    if entry & NX and not nx:
        return code | 9
    return code | 1 if forbidden else None


@pytest.mark.parametrize("upper", [P | RW | US, P | US, P | RW, RW | US])
@pytest.mark.parametrize("user", [False, True])
def test_permissions(paged, user, upper):
    legacy = paged.mode == "legacy"
    # A range of its own: the entry above the leaf is not to restrict the program.
    table = 0x14000
    gva = DATA + (1 << (22 if legacy else 21))
    paged.put(paged.entry(-2, gva), table | upper)
    at = table + (gva >> 12 & (1023 if legacy else 511)) * paged.size
    checked = 0
    for entry, wp, nx, cr4, flags in itertools.product(
            [P | w | u | x for w in (0, RW) for u in (0, US) for x in ((0,) if legacy else (0, NX))] + [0],
            (False, True), (False,) if legacy else (False, True), (0, SMEP, SMAP, SMEP | SMAP), (0, AC)):
        if not user and cr4:
            paged.put(paged.entry(-1, 0x8000), 0x8000 | P | RW)         # else SMEP forbids the program itself
        else:
            paged.put(paged.entry(-1, 0x8000), 0x8000 | P | RW | US)
        paged.put(at, DATA | entry)
        paged.enter(user=user, wp=wp, nx=nx, cr4=cr4, flags=flags)
        for what in (LOAD, STORE, FETCH):
            got = paged.access(what, gva)
            assert got == expected(entry, upper, what, user, wp, nx, cr4, flags), (hex(entry), what, wp, nx, hex(cr4), hex(flags))
            if what == STORE:
                paged.m.write(DATA, b"\xf4")
            checked += 1
    assert checked > 100


def test_accessed_and_dirty(paged):
    levels = range(len(paged.tables)) if paged.mode != "pae" else range(1, 3)      # a PDPTR has no such bits
    for what in (LOAD, STORE, FETCH):
        for i in levels:
            paged.put(paged.entry(i), paged.get(paged.entry(i)) & ~(A | D))
        paged.enter()
        assert paged.access(what) is None
        assert all(paged.get(paged.entry(i)) & A for i in levels)
        assert bool(paged.get(paged.entry()) & D) == (what == STORE)
        assert not any(paged.get(paged.entry(i)) & D for i in list(levels)[:-1])
        paged.m.write(DATA, b"\xf4")


def test_a_clean_page_that_was_read_becomes_dirty(paged):
    paged.enter()
    assert paged.access(LOAD) is None
    assert not paged.get(paged.entry()) & D
    assert paged.access(STORE) is None
    assert paged.get(paged.entry()) & D


def test_translate_agrees_with_the_guest(paged):
    paged.enter()
    present = paged.get(paged.entry())
    for entry in (present, present | G, present & ~P, 0x41000 | P, present & ~US):
        paged.put(paged.entry(), entry)
        paged.enter()
        assert paged.translate(DATA + 0x123) == ((entry & 0xFFFFF000) + 0x123 if paged.access(LOAD) is None else None)


@pytest.mark.parametrize("bit", [40, 45, 51])
def test_reserved_address_bits(paged, bit):
    """Beyond MAXPHYADDR, which is 40 at most here."""
    if paged.mode == "legacy":
        pytest.skip("entries have 32 bits")
    paged.put(paged.entry(), paged.get(paged.entry()) | 1 << bit)
    paged.enter()
    assert paged.access(LOAD) == 9
    assert paged.access(STORE) == 11
    assert paged.translate(DATA) is None


def test_large_pages(paged):
    """2 MiB (4 MiB without PAE): the offset, and the bits that must be zero."""
    shift = 22 if paged.mode == "legacy" else 21
    gva = 1 << shift | DATA
    at = paged.entry(-2, gva)
    paged.put(at, P | RW | US | PS)
    paged.enter()
    paged.m.write(DATA, b"\x11\x22\x33\x44")
    assert paged.access(LOAD, gva) is None
    assert paged.cpu.gpr(0) & 0xFFFFFFFF == 0x44332211
    assert paged.translate(gva) == DATA
    assert paged.get(at) & (A | D) == A
    paged.put(at, P | RW | US | PS | 1 << (21 if paged.mode == "legacy" else 13))
    paged.enter()
    assert paged.access(LOAD, gva) == 9
    assert paged.translate(gva) is None


def test_tables_that_are_no_memory(paged):
    """Where a table should be there is nothing: all entries are read as absent, or as ones."""
    gva = DATA + (1 << (22 if paged.mode == "legacy" else 21))
    paged.put(paged.entry(-2, gva), 0x3000000 | P | RW | US)
    paged.enter()
    assert paged.access(LOAD, gva) in (0, 9)
    assert paged.translate(gva) is None


def test_the_client_changes_the_tables(paged):
    """From outside, between two runs, with the flush that a new CR3 is."""
    paged.enter()
    paged.m.write(0x41000, b"\xaa\xbb\xcc\xdd")
    assert paged.access(LOAD) is None
    paged.put(paged.entry(), 0x41000 | P | RW | US)
    paged.enter()
    assert paged.access(LOAD) is None
    assert paged.cpu.gpr(0) & 0xFFFFFFFF == 0xDDCCBBAA


CHANGES = {
    "invlpg": "invlpg [{0}]",
    "cr3": "mov rax, cr3; mov cr3, rax",
    "cr4.pge": "mov rax, cr4; xor rax, 0x80; mov cr4, rax; xor rax, 0x80; mov cr4, rax",
}


@pytest.mark.parametrize("change", ["invlpg", "cr3", "cr4.pge"])
@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("kind", ["data", "code"])
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_the_guest_changes_an_entry(vendor, mode, change, kind):
    """A translation that was used (a global one, but for CR3) is another one directly after the flush."""
    p = Paged(mode, vendor)
    long = mode == "long"
    flush = CHANGES[change].format("rbx")
    look = "mov edx, [rbx]" if kind == "data" else "call rbx"
    entry = p.entry()
    source = f"""{look}; mov esi, edx
        mov dword ptr [{entry:#x}], {0x41000 | P | RW | US | G:#x}
        {flush}
        {look}; hlt"""
    if not long:
        source = source.replace("rbx", "ebx").replace("rax", "eax")
    code, _ = assemble(source, 0x8000, 64 if long else 32)
    p.m.write(0x8000, code)
    for at, value in ((0x40000, 1), (0x41000, 2)):
        p.m.write(at, struct.pack("<I", value) if kind == "data" else b"\xba" + struct.pack("<I", value) + b"\xc3")
    p.put(entry, DATA | P | RW | US | (0 if change == "cr3" else G))
    p.enter(cr4=PGE)
    p.cpu.rip = 0x8000
    p.cpu.set_gpr(3, DATA)
    assert (p.m.run(), p.m.reason) == (0, KVM_EXIT_HLT)
    assert (p.cpu.gpr(6), p.cpu.gpr(2)) == (1, 2)
    p.m.close()


@pytest.mark.parametrize("mode", LEVELS)
def test_tables_in_memory_that_cannot_be_written(mode):
    """As an option ROM's slot: the walk reads them; accessed bits that it cannot set stay as they are in the client's memory."""
    p = Paged(mode)
    gva = DATA + (1 << (22 if mode == "legacy" else 21))
    assert p.m.region(1, 2, 0x400000, 0x1000, 0x20000) == 0           # KVM_MEM_READONLY
    p.put(p.entry(-2, gva), 0x400000 | P | RW | US)
    index = gva >> 12 & (1023 if mode == "legacy" else 511)
    p.put(0x20000 + index * p.size, DATA | P | RW | US)
    p.enter()
    assert p.access(LOAD, gva) is None
    assert p.translate(gva) == DATA
    assert p.get(0x20000 + index * p.size) == DATA | P | RW | US
    p.m.close()
