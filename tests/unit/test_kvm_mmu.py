# SPDX-License-Identifier: GPL-2.0-or-later
"""Page tables and the rest of KVM: flushes that exit, other vCPUs, the slots that tables lie in or lead to.

The walk itself is test_cpu_mmu's, KVM's own walker test_kvm_mmu_guests'.
"""

import ctypes
import errno
import itertools
import struct
import threading

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_SHUTDOWN
from kvmfs.cpu.cpu import EXIT_SVM
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.asm import assemble
from tests.unit.machine import Machine

LEVELS = {"long": (0x10000, 0x11000, 0x12000, 0x13000), "pae": (0x11000, 0x12000, 0x13000), "legacy": (0x12000, 0x13000)}
P, RW, US, PS, G = 1, 2, 4, 0x80, 0x100
PSE, PAE, PGE, LA57 = 1 << 4, 1 << 5, 1 << 7, 1 << 12
DATA = 0x40000                  # the page under test: linear 0x40000 as well
BOX = 0x9000                    # where two vCPUs meet
HLT, PF = 0x78, 0x4E


class Paged:
    """The first 2 MiB mapped 1:1 for everybody, in small pages; each access is one run."""

    def __init__(self, mode, vendor="amd"):
        self.mode = mode
        bits, register = (64, "rbx") if mode == "long" else (32, "ebx")
        self.m = Machine(vendor, f"mov eax, [{register}]; hlt", bits=bits)
        self.cpu = self.m.vcpu.cpu
        self.size = 4 if mode == "legacy" else 8
        tables = self.tables = LEVELS[mode]
        for table, below in itertools.pairwise(tables):
            self.put(table, below | (P if (mode, table) == ("pae", tables[0]) else P | RW | US))
        for page in range(256):
            self.put(tables[-1] + page * self.size, page << 12 | P | RW | US)

    def put(self, at, value):
        self.m.write(at, value.to_bytes(self.size, "little"))

    def get(self, at):
        return int.from_bytes(self.m.read(at, self.size), "little")

    def entry(self, level=-1, gva=DATA):
        """The address of the entry for ``gva``; level -1: the last."""
        table = self.tables[level]
        shift = 12 + (10 if self.size == 4 else 9) * (len(self.tables) - 1 - self.tables.index(table))
        return table + (gva >> shift & (1023 if self.size == 4 else 511)) * self.size

    def enter(self, *, cr4=0, cpu=None):
        cpu = cpu or self.cpu
        for i in (0, 2, 3, 4, 5):
            cpu.set_segment(i, 0x18, 0, 0xFFFFFFFF, 0xC93)
        cpu.set_segment(1, 0x10, 0, 0xFFFFFFFF, 0xA9B if self.mode == "long" else 0xC9B)
        cpu.cr0 = 0x80000033
        cpu.cr3 = self.tables[0]
        cpu.cr4 = cr4 | (PSE if self.mode == "legacy" else PAE)
        cpu.efer = 0x500 if self.mode == "long" else 0
        cpu.rflags = 2
        cpu.set_exception_intercepts(1 << 14)
        cpu.commit_state()

    def load(self, gva=DATA):
        """The error code of its page fault; None: it was allowed."""
        cpu = self.cpu
        cpu.cancel_injection()
        cpu.set_gpr(3, gva)
        cpu.rip = 0x8000
        kind = cpu.run()
        code = cpu.exit.code
        assert kind == EXIT_SVM and code in (HLT, PF), (kind, hex(code))
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
    assert p.load(gva) is None
    assert p.translate(gva) == DATA
    assert p.get(0x20000 + index * p.size) == DATA | P | RW | US
    p.m.close()


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_another_vcpu_changes_an_entry(vendor, mode):
    """One vCPU has used a translation, another changes it and says so: the first one's flush shows the new page."""
    p = Paged(mode, vendor)
    m = p.m
    source = f"""mov esi, [rbx]; mov dword ptr [{BOX}], 1
        1: pause; cmp dword ptr [{BOX}], 2; jne 1b
        invlpg [rbx]; mov edx, [rbx]; hlt; .balign 64
        2: pause; cmp dword ptr [{BOX}], 1; jne 2b
        mov dword ptr [{p.entry():#x}], {0x41000 | P | RW | US:#x}; mov dword ptr [{BOX}], 2; hlt"""
    long = mode == "long"
    code, _ = assemble(source if long else source.replace("rbx", "ebx"), 0x8000, 64 if long else 32)
    m.write(0x8000, code)
    m.write(DATA, struct.pack("<I", 1))
    m.write(0x41000, struct.pack("<I", 2))
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    for vcpu, rip in zip(m.vm.vcpus, (0x8000, 0x8040), strict=True):
        p.enter(cpu=vcpu.cpu)
        vcpu.cpu.set_gpr(3, DATA)
        vcpu.cpu.rip = rip
    other = threading.Thread(target=m.ioctl, args=(VCPU_INODE + 1, K.KVM_RUN))
    other.start()
    assert (m.run(), m.reason) == (0, KVM_EXIT_HLT)
    other.join(20)
    assert not other.is_alive()
    assert (p.cpu.gpr(6), p.cpu.gpr(2)) == (1, 2)
    m.close()


@pytest.mark.parametrize("mode", LEVELS)
def test_the_slot_of_a_page_table_becomes_another(mode):
    """Its entries are those of the memory that is there now, and a translation that was used does not outlive the slot."""
    p = Paged(mode)
    gva = DATA + (1 << (22 if mode == "legacy" else 21))
    index = gva >> 12 & (1023 if mode == "legacy" else 511)
    p.put(p.entry(-2, gva), 0x400000 | P | RW | US)
    for i, table in enumerate((0x20000, 0x21000)):
        p.put(table + index * p.size, DATA + 0x1000 * i | P | RW | US)
        p.m.write(DATA + 0x1000 * i, bytes([i + 1, 0, 0, 0]))
    p.enter()
    for i in (0, 1, 0):
        assert p.m.region(1, 0, 0x400000, 0x1000, 0x20000 + 0x1000 * i) == 0
        assert p.load(gva) is None
        assert (p.cpu.gpr(0), p.translate(gva)) == (i + 1, DATA + 0x1000 * i)
        assert p.m.region(1, 0, 0x400000, 0, 0) == 0
    assert p.load(gva) in (0, 9)            # what is no memory reads as absent entries, or as ones
    assert p.translate(gva) is None
    p.m.close()


def test_pse36():
    """A 4 MiB page beyond 4 GiB, without PAE: bits 13 to 16 of its entry are bits 32 to 35 of the address."""
    p = Paged("legacy")
    gva, high = 1 << 22 | DATA, 5 << 32
    assert p.m.region(1, 0, high + DATA, 0x1000, 0x20000) == 0
    p.m.write(0x20000, b"\x11\x22\x33\x44")
    p.put(p.entry(-2, gva), 5 << 13 | P | RW | US | PS)
    p.enter()
    assert p.load(gva) is None
    assert p.cpu.gpr(0) & 0xFFFFFFFF == 0x44332211
    assert p.translate(gva) == high + DATA
    p.m.close()


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_there_are_four_levels(vendor):
    """No LA57: neither the client nor the guest can have five."""
    p = Paged("long", vendor)
    sregs = p.m.sregs()
    sregs.cr4 |= LA57
    assert p.m.set_sregs(sregs) == -errno.EINVAL
    code, _ = assemble(f"mov rax, cr4; or rax, {LA57}; mov cr4, rax; hlt", 0x8000, 64)
    p.m.write(0x8000, code)
    p.enter()
    p.cpu.rip, p.cpu.idt = 0x8000, (0, 0)
    assert (p.m.run(), p.m.reason) == (0, KVM_EXIT_SHUTDOWN)            # #GP, and no IDT
    p.m.close()


def test_a_hole_in_the_file_behind_a_slot():
    """Discarded by fallocate: the guest, which has a translation for the page, reads zeroes at once."""
    m = Machine("amd", "1: mov ax, [0x5000]; hlt; jmp 1b")
    m.write(0x5000, b"\x34\x12")
    assert (m.run(), m.regs()["rax"] & 0xFFFF) == (0, 0x1234)
    keep_size_punch_hole = 1 | 2
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(m.host.fd, keep_size_punch_hole, ctypes.c_long(0x5000), ctypes.c_long(0x1000)) == 0
    assert (m.run(), m.regs()["rax"] & 0xFFFF) == (0, 0)
    m.close()
