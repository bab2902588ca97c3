# SPDX-License-Identifier: GPL-2.0-or-later
"""Random programs do the same on MMIO, served access by access, as on memory.

CMPXCHG8B is followed by a comparison: in memory, the engine leaves wrong arithmetic flags but ZF.
"""

from __future__ import annotations

import random

import pytest

from kvmfs.cpu.cpu import EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_SVM
from tests.guest import MMIO, PT, Guest

SIZE = 0x3000
REGS = {1: ("al", "cl", "dl", "r8b"), 2: ("ax", "cx", "dx", "r8w"), 4: ("eax", "ecx", "edx", "r8d"), 8: ("rax", "rcx", "rdx", "r8")}
WIDTH = {1: "byte", 2: "word", 4: "dword", 8: "qword"}
ONE = ("inc", "dec", "not", "neg", "lock inc", "lock dec")
TWO = ("add", "sub", "adc", "sbb", "and", "or", "xor", "cmp", "mov", "test", "lock add", "lock xor")
SSE = ("movups", "movdqu", "movupd")


def instruction(rnd: random.Random, base: str) -> str:
    size = rnd.choice((1, 2, 4, 8))
    spot = rnd.choice((rnd.randrange(64), 0x1000 - rnd.randrange(20), 0x2000 - rnd.randrange(20), rnd.randrange(SIZE - 32)))
    mem = f"[{base}+{spot}]"
    reg = rnd.choice(REGS[size])
    kind = rnd.randrange(12)
    if kind == 0:
        return f"{rnd.choice(ONE)} {WIDTH[size]} ptr {mem}"
    if kind <= 2:
        return f"{rnd.choice(TWO)} {mem},{reg}"
    if kind == 3:
        return f"{rnd.choice(TWO[:8])} {reg},{mem}"
    if kind == 4:
        return f"xchg {reg},{mem}"
    if kind == 5:
        return f"lock cmpxchg {mem},{reg}"
    if kind == 6:
        return f"lock xadd {mem},{reg}"
    if kind == 7:
        return f"{rnd.choice(SSE)} xmm{rnd.randrange(4)},{mem}"
    if kind == 8:
        return f"{rnd.choice(SSE)} {mem},xmm{rnd.randrange(4)}"
    if kind == 9:
        move = f"mov r9,rcx\n mov ecx,5\n rep movs{'bwdq'[(1, 2, 4, 8).index(size)]}\n mov rcx,r9"
        return f"lea rsi,{mem}\n lea rdi,[{base}+{rnd.randrange(SIZE - 64)}]\n {move}"
    if kind == 10:
        return f"movzx edx,byte ptr {mem}\n push qword ptr {mem}\n pop qword ptr [{base}+{rnd.randrange(SIZE - 8)}]"
    return rnd.choice((f"rol {WIDTH[size]} ptr {mem},3", f"movnti {mem},rdx", f"cmpxchg8b [{base}+{spot & ~7}]\n cmp eax,edx"))


def state(g: Guest) -> tuple[object, ...]:
    registers = list(g.cpu.get_gprs())
    del registers[6:8], registers[3]  # rsi, rdi, rbx: addresses
    return tuple(registers), g.cpu.rflags, g.cpu.fxsave()[160:416]


@pytest.mark.parametrize("seed", range(25))
def test_same_as_memory(seed):
    rnd = random.Random(seed)
    body = "\n".join(instruction(rnd, "rbx") for _ in range(40))
    content = rnd.randbytes(SIZE)
    prologue = "\n".join(f"movabs {r},{rnd.getrandbits(63)}" for r in ("rax", "rcx", "rdx", "r8"))
    results = []
    for base in (0x20000, MMIO, 0x60000):
        g = Guest(f"start: mov ebx,{base}\n {prologue}\n {body}\n mov esi,0\n mov edi,0\n hlt")
        device = bytearray(content)
        pages = [base + 0x1000 * i for i in range(3)]
        if base == 0x60000:  # memory, MMIO, memory
            g.put(PT + 8 * 0x61, MMIO | 7)
            pages = [base, MMIO, base + 0x2000]
        for i, page in enumerate(pages):
            if page < MMIO:
                g.ram[page : page + 0x1000] = content[i * 0x1000 : (i + 1) * 0x1000]
        offset = {page: i * 0x1000 for i, page in enumerate(pages)}
        cpu, x = g.cpu, g.cpu.exit
        while (kind := cpu.run()) != EXIT_SVM:
            at = offset[x.gpa & ~0xFFF] + (x.gpa & 0xFFF)
            assert (x.gpa & 0xFFF) + x.size <= 0x1000
            if kind == EXIT_MMIO_READ:
                cpu.data[: x.size] = device[at : at + x.size]
            else:
                assert kind == EXIT_MMIO_WRITE
                device[at : at + x.size] = cpu.data[: x.size]
        assert x.code == 0x78, hex(x.code)
        for i, page in enumerate(pages):
            if page < MMIO:
                device[i * 0x1000 : (i + 1) * 0x1000] = g.ram[page : page + 0x1000]
        results.append((state(g), bytes(device)))
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert other[1] == results[0][1]
