# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests for the CPU's tests: 4 MiB of memory, page tables and descriptor tables, a mode, a program."""

from __future__ import annotations

import ctypes
import mmap
import struct

from kvmfs.cpu.cpu import EXIT_IO_IN, EXIT_IO_OUT, EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_NONE, EXIT_SVM, Cpu
from kvmfs.cpu.engine import Engine
from tests.asm import assemble

RAM = 4 << 20
CODE, STACK, USER_STACK = 0x10000, 0x8000, 0x4F800
GDT, IDT, TSS = 0x5000, 0x6000, 0x7000
PML4, PDPT, PD, PT = 0x100000, 0x101000, 0x102000, 0x103000
FLAT32, FLAT16 = 0xC93, 0x093
MMIO = 0xFEE00000  # mapped (identity) by the page tables below
ERROR_CODE_VECTORS = (8, 10, 11, 12, 13, 14, 17)


class Guest:
    """A vCPU with a program at 0x10000 in mode "real", "pm32", "pm32pg" (4 MiB pages), "pae" or "long".

    Interrupt vector v goes to the symbol h<v> (decimal) where there is one, else to h_def, where the guest halts.
    In long mode 0x50000 is not present, 0x51000 read-only, 0x52000 supervisor, 0x53000 NX; all else of the first 4 MiB
    is mapped 1:1 for user and supervisor.
    """

    def __init__(self, src: str, mode: str = "long", *, engine: Engine | None = None, dpl3: tuple[int, ...] = ()) -> None:
        self.mode = mode
        own = engine is None
        self.engine = engine or Engine()
        code, self.sym = assemble(src + "\nh_def: hlt\n", CODE, {"real": 16, "long": 64}.get(mode, 32))
        if own:
            self.ram = mmap.mmap(-1, RAM)
            self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
            self.engine.map(0, RAM, self.host)
            self.ram[CODE : CODE + len(code)] = code
            getattr(self, "_tables_" + ("prot" if mode != "real" else "real"))(dpl3)
        self.cpu = self.engine.create_cpu(len(self.engine.cpus))
        self._enter(mode)

    def put(self, at: int, value: int, size: int = 8) -> None:
        self.ram[at : at + size] = value.to_bytes(size, "little")

    def get(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.ram[at : at + size], "little")

    def _tables_real(self, _dpl3: tuple[int, ...]) -> None:
        for v in range(256):
            address = self.sym.get(f"h{v}", self.sym["h_def"])
            self.put(4 * v, (CODE >> 4) << 16 | (address - CODE), 4)

    def _tables_prot(self, dpl3: tuple[int, ...]) -> None:
        long = self.mode == "long"
        gdt = [0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
               0x00CF9B000000FFFF, 0x00008B0000000067 | TSS << 16, 0]  # fmt: skip
        self.ram[GDT : GDT + 8 * len(gdt)] = struct.pack(f"<{len(gdt)}Q", *gdt)
        code_selector = 0x10 if long else 0x38
        for v in range(256):
            address = self.sym.get(f"h{v}", self.sym["h_def"])
            gate = address & 0xFFFF | code_selector << 16 | (0xEE if v in dpl3 else 0x8E) << 40 | (address >> 16) << 48
            self.put(IDT + v * (16 if long else 8), gate)
            if long:
                self.put(IDT + v * 16 + 8, 0)
        if long:
            self.put(TSS + 4, 0x9000)
            self.put(TSS + 0x24, 0xA000)
        else:
            self.put(TSS + 4, 0x9000, 4)
            self.put(TSS + 8, 0x18, 4)
        self.put(TSS + 0x66, 0x68, 2)
        self._page_tables()

    def _page_tables(self) -> None:
        long = self.mode == "long"
        if self.mode in ("long", "pae"):
            if long:
                self.put(PML4, PDPT | 7)
            flags = 7 if long else 1
            self.put(PDPT, PD | flags)
            self.put(PDPT + 8 * 3, 0x104000 | flags)
            for i in range(1, 512):
                self.put(PD + 8 * i, i << 21 | 0x87)
            self.put(PD, PT | 7)
            for i in range(512):
                self.put(PT + 8 * i, i << 12 | 7)
            self.put(0x104000 + 8 * (MMIO >> 21 & 511), MMIO & ~0x1FFFFF | 0x87)
        if long:
            for page, entry in ((0x50, 0), (0x51, 0x51005), (0x52, 0x52003), (0x53, 0x53007 | 1 << 63)):
                self.put(PT + 8 * page, entry)
        if self.mode == "pm32pg":
            for i in range(1024):
                self.put(PML4 + 4 * i, i << 22 | 0x87, 4)

    def _enter(self, mode: str) -> None:
        cpu = self.cpu
        if mode == "real":
            for i in (0, 2, 3):
                cpu.set_segment(i, 0, 0, 0xFFFF, 0x093)
            cpu.set_segment(1, CODE >> 4, CODE, 0xFFFF, 0x09B)
            cpu.cr0 = 0x10
            cpu.idt = (0, 0x3FF)
            cpu.rip = self.sym["start"] - CODE
        else:
            code = (0x10, 0xA9B) if mode == "long" else (0x38, 0xC9B)
            for i in (0, 2, 3, 4, 5):
                cpu.set_segment(i, 0x18, 0, 0xFFFFFFFF, FLAT32)
            cpu.set_segment(1, code[0], 0, 0xFFFFFFFF, code[1])
            cpu.set_segment(7, 0x40, TSS, 0x6F, 0x08B)
            cpu.gdt = (GDT, 0x4F)
            cpu.idt = (IDT, 0xFFF if mode == "long" else 0x7FF)
            cpu.rip = self.sym["start"]
            cpu.cr0 = {"pm32": 0x33}.get(mode, 0x80010033)
            cpu.cr3 = PDPT if mode == "pae" else PML4
            cpu.cr4 = 0x610 if mode == "pm32pg" else 0x6B0
            cpu.efer = 0xD01 if mode == "long" else 0
        cpu.set_gpr(4, STACK)
        cpu.rflags = 2
        cpu.commit_state()

    # --- running ---

    def hlt(self) -> Cpu:
        """Run to HLT."""
        kind = self.cpu.run()
        x = self.cpu.exit
        assert (kind, x.code) == (EXIT_SVM, 0x78), f"{kind} {x.code:#x} gpa {x.gpa:#x} rip {self.cpu.rip:#x}"
        return self.cpu

    def trace(self, reads: bytes = b"", ins: bytes = b"") -> list[tuple[object, ...]]:
        """Run to HLT; the exits on the way. reads, ins: what reads and IN get, byte after byte (a counter when empty)."""
        log: list[tuple[object, ...]] = []
        at = 0x10
        cpu, x = self.cpu, self.cpu.exit
        while True:
            kind = cpu.run()
            if kind == EXIT_SVM and x.code == 0x78:
                return log
            n = x.size * (x.count if kind in (EXIT_IO_IN, EXIT_IO_OUT) else 1)
            data = bytes(cpu.data[:n])
            if kind in (EXIT_IO_IN, EXIT_MMIO_READ):
                given = reads if kind == EXIT_MMIO_READ else ins
                if given:
                    data = given[:n]
                    reads, ins = (given[n:], ins) if kind == EXIT_MMIO_READ else (reads, given[n:])
                else:
                    data = bytes((at + i) & 0xFF for i in range(n))
                    at += n
                cpu.data[:n] = data
            if kind == EXIT_IO_IN:
                log.append(("in", x.port, x.size, x.count))
            elif kind == EXIT_IO_OUT:
                log.append(("out", x.port, x.size, data))
            elif kind == EXIT_MMIO_READ:
                log.append(("r", x.gpa, x.size))
            elif kind == EXIT_MMIO_WRITE:
                log.append(("w", x.gpa, x.size, data))
            elif kind == EXIT_NONE:
                log.append(("kick",))
            else:
                log.append(("svm" if kind == EXIT_SVM else "fetch", x.code, x.gpa, cpu.rip))
                return log
            assert len(log) < 1000
