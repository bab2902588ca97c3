# SPDX-License-Identifier: GPL-2.0-or-later
"""Read-only slots as their guest and its client see them, and KVM_TRANSLATE beside the guest's own accesses."""

import errno
import random
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_MMIO, KVM_MEM_READONLY
from kvmfs.cpu.cpu import EXIT_MMIO_READ, EXIT_SVM
from kvmfs.errors import KvmError
from kvmfs.kvm import mmu
from tests.asm import assemble
from tests.guest import CODE, PDPT, PML4
from tests.unit.machine import Machine
from tests.unit.test_cpu_mmu import Paged

BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])


@BOTH
def test_code_of_a_read_only_slot_is_the_clients_to_change(vendor):
    """While the guest runs, which reads data of the same page."""
    m = Machine(vendor, """mov ax, 0x2000
 mov ds, ax
1: mov al, [0]
 call 0x2000:0x10
 mov es:[0x5000], ax
 cmp byte ptr es:[0x5008], 0
 je 1b
 hlt""")
    m.write(0x20000, b"\5")
    m.write(0x20010, bytes([0xB4, 1, 0xCB]))            # mov ah, 1; retf
    assert m.region(0, 0, 0, 0, 0) == m.region(0, 0, 0, 0x10000, 0) == 0
    assert m.region(1, KVM_MEM_READONLY, 0x20000, 0x1000, 0x20000) == 0
    thread = threading.Thread(target=m.run)
    thread.start()
    seen = []
    for value in range(2, 12):
        m.write(0x20011, bytes([value]))
        deadline = time.monotonic() + 10
        while m.read(0x5000, 2) != bytes([5, value]) and time.monotonic() < deadline:
            time.sleep(0.0005)
        seen.append(m.read(0x5001, 1)[0])
    m.write(0x5008, b"\1")
    thread.join(20)
    assert not thread.is_alive() and m.reason == KVM_EXIT_HLT
    assert seen == list(range(2, 12))
    m.close()


@BOTH
def test_a_store_to_a_read_only_slot_is_mmio(vendor):
    m = Machine(vendor, "mov ax, 0x2000; mov ds, ax; mov byte ptr [0], 9; mov al, [0]; inc byte ptr [0]; mov bl, [0]; hlt")
    m.write(0x30000, b"\5")
    assert m.region(0, 0, 0, 0, 0) == m.region(0, 0, 0, 0x10000, 0) == 0
    assert m.region(1, KVM_MEM_READONLY, 0x20000, 0x1000, 0x30000) == 0
    for value in (9, 6):
        assert (m.run(), m.reason, m.mmio()) == (0, KVM_EXIT_MMIO, (0x20000, bytes([value]), 1))
    assert (m.run(), m.reason) == (0, KVM_EXIT_HLT)
    regs = m.regs()
    assert (regs["rax"] & 0xFF, regs["rbx"] & 0xFF, m.read(0x30000, 1)) == (5, 5, b"\5")
    m.close()


# ---- KVM_TRANSLATE -----------------------------------------------------------------------------------------

TABLES = tuple(range(0x180000, 0x186000, 0x1000))
FILL = range(0x200000, 0x400000)            # each dword of it is its own address
BITS = (1, 2, 4, 8, 0x20, 0x40, 0x80, 0x200, 1 << 12, 1 << 13, 1 << 20, 1 << 21)


class Tables(Paged):
    """The entries beside those that :class:`Paged` needs lead to random tables."""

    def __init__(self, mode, rng):
        super().__init__(mode)
        self.rng = rng
        self.ram[FILL.start:FILL.stop] = b"".join(i.to_bytes(4, "little") for i in FILL[::4])
        di, bits = ("rdi", 64) if mode == "long" else ("edi", 32)
        code, sym = assemble(f"load: mov eax,[{di}]\n hlt", CODE + 0x800, bits)
        self.ram[CODE + 0x800:CODE + 0x800 + len(code)] = code
        self.sym["load"] = sym["load"]

    def entry(self, leads):
        rng = self.rng
        entry = rng.choice(TABLES) if leads and rng.random() < 0.8 else rng.choice(FILL[::4096])
        entry |= 7 if rng.random() < 0.95 else rng.choice((0, 2, 6))
        if rng.random() < 0.15:
            entry |= rng.choice(BITS if self.size == 8 else BITS[:-6])       # KVM takes fewer bits of PSE-36 than CPUs
        if self.size == 8 and rng.random() < 0.1:
            entry |= 1 << rng.choice((39, 40, 45, 51, 52, 58, 62, 63))
        return entry

    def shuffle(self):
        tables = {t: (0, i > 1) for i, t in enumerate(TABLES)} | {self.pd: (5, True)}
        if self.mode == "long":
            tables |= {PML4: (1, True), PDPT: (1, True)}
        for table, (first, leads) in tables.items():
            count = 4096 // self.size - first
            data = b"".join(self.entry(leads).to_bytes(self.size, "little") for _ in range(count))
            self.ram[table + first * self.size:table + 4096] = data

    def address(self):
        rng = self.rng
        gva = rng.getrandbits(48 if self.mode == "long" else 32)
        if self.mode == "long":
            low = rng.choice((12, 21, 30, 39))      # as often through the first entries of the upper tables
            gva = gva & (1 << rng.choice((low + 9, 48))) - 1
        if self.mode == "pae":
            gva &= 0x3FFFFFFF
        gva = max(gva & ~3, 5 << 22)
        return gva | 0xFFFF << 48 if gva >> 47 else gva

    def load(self, gva):
        """The physical address that the guest reads at gva, None: a page fault."""
        cpu = self.cpu
        self.privilege(False)
        cpu.set_gpr(4, 0x8800)
        cpu.set_gpr(6, 0)
        cpu.set_gpr(7, gva)
        cpu.rip = self.sym["load"]
        cpu.flush_tlb()
        cpu.commit_state()
        kind = cpu.run()
        if kind == EXIT_MMIO_READ:
            gpa = cpu.exit.gpa
            cpu.forget_io()
            return gpa
        assert (kind, cpu.exit.code) == (EXIT_SVM, 0x78)
        return None if cpu.gpr(6) == 14 else cpu.gpr(0)


@pytest.mark.parametrize("mode", ["long", "pae", "pm32pg"])
def test_translate_agrees_with_the_guests_own_accesses(mode):
    """Random page tables: KVM's walker and the CPU's find the same address, or both none."""
    g = Tables(mode, random.Random(f"{mode} 1"))

    def read(gpa, size):
        if gpa + size > len(g.ram):
            raise KvmError(errno.EFAULT)
        return g.ram[gpa:gpa + size]

    vcpu = SimpleNamespace(cpu=g.cpu, arch=SimpleNamespace(cpuid=SimpleNamespace(maxphyaddr=40), pdptrs=None),
                           vm=SimpleNamespace(memslots=SimpleNamespace(read=read)))
    found = absent = 0
    for _ in range(40):
        g.shuffle()
        for _ in range(30):
            gva = g.address()
            gpa = mmu.gva_to_gpa(vcpu, gva)
            if gpa is not None and gpa < FILL.start:
                continue
            assert g.load(gva) == gpa, (hex(gva), gpa)
            found += gpa is not None
            absent += gpa is None
    assert found > 50 and absent > 50


def test_translate_ioctl_is_that_walker():
    m = Machine("intel", "hlt")
    m.write(0x40000, struct.pack("<1024I", *([0x41007] * 1024)))
    m.write(0x41000, struct.pack("<1024I", *((i & 0xFF) << 12 | 7 for i in range(1024))))
    sregs = m.sregs()
    sregs.cr0, sregs.cr3 = 0x80000011, 0x40000
    assert m.set_sregs(sregs) == 0
    for gva in (0x123, CODE, 0x12345678, 0xFFFFFFFF):
        data = m.vcpu_ioctl(K.KVM_TRANSLATE, 1, struct.pack("<QQBBB5x", gva, 0, 0, 0, 0))[1]
        assert struct.unpack_from("<QQB", data) == (gva, (gva >> 12 & 0xFF) << 12 | gva & 0xFFF, 1)
    m.close()
