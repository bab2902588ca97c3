# SPDX-License-Identifier: GPL-2.0-or-later
"""A client whose guests execute random code, in every mode, over random tables: ``guest.py NODE SEED ROUNDS``.

It ends with 0 when each KVM_RUN came back, for an exit or the timer's signal, and the VM still answers.
"""

from __future__ import annotations

import errno
import signal
import struct
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Final

from kvmfs.abi import structs
from kvmfs.testing import Exit, Kvm, KvmCallError, Vcpu, Vm
from kvmfs_fuzz.code import number, program

RAM: Final = 1 << 20
CODE, STACK, GDT, IDT, TSS, TABLES, DATA = 0x8000, 0x7000, 0x3000, 0x4000, 0x5000, 0x10000, 0x20000
EXITS, SLICE = 40, 0.004            # of a round; seconds until the signal comes
PATIENCE = 10                       # seconds after which a KVM_RUN that a signal should have ended has hung
MODES: Final = ("real", "big real", "v86", "protected 16", "protected 32", "legacy", "pse", "pae", "compatibility", "long")
DEAD: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.EIO)
_PRESENT: Final = 7


class Round:
    """One program in one mode."""

    def __init__(self, vm: Vm, vcpu: Vcpu, rng: Random) -> None:
        self.vm, self.vcpu, self.rng, self.mode = vm, vcpu, rng, rng.choice(MODES)

    def prepare(self) -> None:
        """Memory, then registers: mostly a machine as a kernel would set it up, with something wrong about it."""
        rng, vm = self.rng, self.vm
        vm.write(CODE, program(rng, 0x400))
        vm.write(DATA, b"".join(program(rng, 0x40) for _ in range(4)))
        self._descriptors()
        self._page_tables()
        if rng.random() < 0.2:
            at = rng.choice((GDT, IDT, TSS, TABLES, TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000))
            vm.write(at + rng.randrange(0, 0xF00, 4), rng.randbytes(rng.choice((1, 4, 8, 64))))
        if rng.random() < 0.3:
            vm.write(CODE, bytes.fromhex("0fae1425") + struct.pack("<I", DATA))     # LDMXCSR: exceptions of SSE
        self._registers()

    def _descriptors(self) -> None:
        rng, entries = self.rng, [0]
        for _ in range(31):
            base = rng.choice((0, 0, TSS, DATA, number(rng, 32)))
            limit = rng.choice((0xFFFFF, 0xFFFFF, 0x67, 0x2B, number(rng, 20)))
            access = rng.choice((0x9B, 0x93, 0xFB, 0xF3, 0x9F, 0x97, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x89, 0x8B, 0x8C,
                                 0x8E, 0x8F, 0xE9, 0xEC, 0xE5, rng.getrandbits(8)))
            flags = rng.choice((0xC, 0xC, 0xA, 0x8, 0x4, 0, rng.getrandbits(4)))
            if access & 0x1F in (4, 5, 6, 7, 0xC, 0xE, 0xF):
                offset = CODE + rng.randrange(0x400)
                entries.append(offset & 0xFFFF | rng.randrange(32) << 19 | access << 40 | offset >> 16 << 48)
                continue
            entries.append(limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40 | limit >> 16 << 48 | flags << 52
                           | base >> 24 << 56)
        self.vm.write(GDT, struct.pack("<32Q", *entries))
        if self.mode in ("real", "big real"):
            self.vm.write(IDT, b"".join(struct.pack("<HH", CODE + rng.randrange(0x400), 0) for _ in range(256)))
            return
        wide = self.mode in ("compatibility", "long")
        gates = []
        for _ in range(128 if wide else 256):
            offset, kind = CODE + rng.randrange(0x400), rng.choice((0x8E, 0x8E, 0xEE, 0x8F, 0xEF, 0x86, 0x87, 0x85, 0xE5))
            gates.append(offset & 0xFFFF | rng.choice((8, 8, 16, rng.randrange(32) << 3)) << 16
                         | (rng.randrange(8) << 32 if wide else 0) | kind << 40)
            if wide:
                gates.append(0)
        self.vm.write(IDT, struct.pack("<256Q", *gates) + bytes(0x800))
        tss = bytearray(rng.choice((b"\0", rng.randbytes(1))) * 0x100)
        struct.pack_into("<IHH", tss, 4, STACK - 0x100, 16, 0)
        if wide:
            struct.pack_into("<QQQ", tss, 4, STACK - 0x100, STACK - 0x200, STACK - 0x300)
        for at in range(0x24, 0x5C, 8 if wide else 4):
            struct.pack_into("<I", tss, at, rng.choice((CODE, STACK - 0x400, rng.randrange(32) << 3, number(rng, 32))))
        self.vm.write(TSS, bytes(tss))

    def _page_tables(self) -> None:
        """The first 2 (4) MiB one to one, and some of the entries after them anything."""
        rng, write = self.rng, self.vm.write
        if self.mode in ("legacy", "pse"):
            first = TABLES + 0x1000 | _PRESENT if self.mode == "legacy" else 0x80 | _PRESENT
            write(TABLES, struct.pack("<II", first, number(rng, 32)))
            write(TABLES + 0x1000, struct.pack("<1024I", *(i << 12 | _PRESENT for i in range(1024))))
            return
        flags = 1 if self.mode == "pae" else _PRESENT
        write(TABLES, struct.pack("<QQQQ", TABLES + 0x1000 | flags, *(number(rng) for _ in range(3))))
        write(TABLES + 0x1000, struct.pack("<QQQQ", TABLES + 0x2000 | (flags if self.mode != "pae" else _PRESENT),
                                           *(number(rng) for _ in range(3))))
        write(TABLES + 0x2000, struct.pack("<QQ", TABLES + 0x3000 | _PRESENT, rng.choice((0x87, number(rng)))))
        write(TABLES + 0x3000, struct.pack("<512Q", *(i << 12 | _PRESENT for i in range(512))))
        if self.mode == "pae":
            write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x3000 | _PRESENT))

    def _registers(self) -> None:
        rng, vcpu, mode = self.rng, self.vcpu, self.mode
        sregs, regs = vcpu.sregs, structs.KvmRegs()
        wide = mode in ("compatibility", "long")
        ring = 3 if mode == "v86" else rng.choice((0, 0, 0, 3))
        protected = mode not in ("real", "big real", "v86")
        both = {"limit": 0xFFFFFFFF if protected else 0xFFFF, "present": 1, "s": 1, "dpl": ring, "g": int(protected),
                "db": int(protected and mode != "protected 16")}
        code = {"selector": 8 | ring if protected else 0, "type": 3 if mode == "v86" else 11}
        if mode == "long":
            code |= {"db": 0, "l": 1}
        sregs.cs = structs.KvmSegment(**(both | code))
        data = both | {"selector": 16 | ring if protected else 0, "type": 3}
        if mode == "big real":
            data |= {"limit": 0xFFFFFFFF, "g": 1}
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, structs.KvmSegment(**data))
        kind = rng.choice((11, 11, 11, 3)) if not wide else 11
        sregs.tr = structs.KvmSegment(base=TSS, limit=rng.choice((0x67, 0x2067, 0x2B)), selector=0x28, type=kind, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, rng.choice((0xFF, 0xFF, 0x1F))
        sregs.idt.base, sregs.idt.limit = IDT, 0x3FF if mode in ("real", "big real") else rng.choice((0xFFF, 0xFFF, 0x7F, 0))
        paging = mode in ("legacy", "pse", "pae") or wide or (mode == "v86" and rng.random() < 0.3)
        sregs.cr0 = 0x10 | (protected or mode == "v86") | paging << 31 | rng.choice((0, 0, 2, 8, 0x10000, 0x40000))
        sregs.cr3 = TABLES
        sregs.cr4 = 0x600 | (mode == "pae" or wide) << 5 | (mode == "pse") << 4 | rng.choice((0, 0, 8, 0x80, 0x40000, 0x10000))
        sregs.efer = (0x500 if wide else 0) | rng.choice((0, 1, 0x800, 0x801))
        for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r14", "r15"):
            setattr(regs, name, rng.choice((DATA, CODE, STACK, number(rng), 0xA0000 + rng.randrange(0x20000))))
        regs.rip, regs.rsp = CODE, STACK + rng.randint(-8, 0)
        regs.rflags = 2 | rng.choice((0, 0x200, 0x100, 0x3000, 0x400, 0x4000, 0x40200)) | (0x20000 if mode == "v86" else 0)
        try:
            vcpu.sregs, vcpu.regs = sregs, regs
            vcpu.events = structs.KvmVcpuEvents()
        except KvmCallError as error:
            if error.errno != errno.EINVAL:
                raise

    def run(self) -> None:
        """Until a few exits, the signal, or an exit after which there is no way on."""
        rng, vcpu = self.rng, self.vcpu
        for _ in range(EXITS):
            since = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SLICE, SLICE)
            try:
                one = vcpu.run()
            except KvmCallError as error:
                if error.errno in DEAD:
                    raise
                return
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                if time.monotonic() - since > PATIENCE:
                    raise AssertionError(f"{self.mode}: KVM_RUN took {time.monotonic() - since:.0f} s")
            self._answer(one)
            if one.name not in ("IO", "MMIO", "HLT", "IRQ_WINDOW_OPEN", "DEBUG", "INTR", "X86_RDMSR", "X86_WRMSR"):
                return
            if rng.random() < 0.1:
                self._disturb()

    def _answer(self, one: Exit) -> None:
        if one.name in ("IO", "MMIO") and not one.write:
            self.vcpu.answer(one, self.rng.randbytes(one.size))

    def _disturb(self) -> None:
        """What a client may do between two exits."""
        rng, vcpu = self.rng, self.vcpu
        calls: list[Callable[[], None]] = [
            lambda: vcpu.interrupt(rng.randrange(256)), vcpu.nmi, lambda: setattr(vcpu, "regs", vcpu.regs),
            lambda: setattr(vcpu, "sregs", vcpu.sregs), lambda: setattr(vcpu, "events", vcpu.events), self._debug,
            lambda: self.vm.write(CODE, program(rng, 0x100))]
        try:
            rng.choice(calls)()
        except KvmCallError as error:
            if error.errno in DEAD:
                raise

    def _debug(self) -> None:
        control = self.rng.choice((0, 1, 3, 0x10001, 0x20001))
        debug = structs.KvmGuestDebug(control=control)
        debug.arch.debugreg[0], debug.arch.debugreg[7] = DATA, self.rng.choice((0x1, 0x30001, 0xF0003, 0x400))
        self.vcpu.ioctl("KVM_SET_GUEST_DEBUG", debug)


def check(vcpu: Vcpu) -> None:
    """Whatever the guest did, its state can be read."""
    for call, struct_ in (("KVM_GET_REGS", structs.KvmRegs), ("KVM_GET_SREGS", structs.KvmSregs), ("KVM_GET_FPU", structs.KvmFpu),
                          ("KVM_GET_VCPU_EVENTS", structs.KvmVcpuEvents), ("KVM_GET_DEBUGREGS", structs.KvmDebugregs),
                          ("KVM_GET_XSAVE", structs.KvmXsave), ("KVM_GET_SREGS2", structs.KvmSregs2)):
        vcpu.ioctl(call, struct_())
    vcpu.ioctl("KVM_SET_GUEST_DEBUG", structs.KvmGuestDebug())


def main(node: str, seed: str, rounds: str) -> None:
    """A VM, in which programs run one after the other."""
    rng = Random(seed)
    signal.signal(signal.SIGALRM, lambda *_: None)
    with Kvm(node) as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, 0xA0000)
        vm.add_memory(0xC0000, RAM - 0xC0000, flags=rng.choice((0, 2)))        # above the hole perhaps a ROM
        if rng.random() < 0.3:
            vm.create_irqchip()
        vcpu = vm.create_vcpu()
        for index in range(int(rounds)):
            one = Round(vm, vcpu, Random(f"{seed} {index}"))      # whatever the clock did in those before
            one.prepare()
            try:
                one.run()
                check(vcpu)
            except BaseException:
                print(f"round {index}: {one.mode}", file=sys.stderr)
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
