# SPDX-License-Identifier: GPL-2.0-or-later
"""The instructions that CPUID offers, against the host's CPU: the same code with the same operands in a guest and here.

What an operation leaves undefined (a flag, mostly) is not looked at, nor are MXCSR's exception flags, which NaN comes of two,
and DPPD's sign of zero.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from pathlib import Path

import pytest

from tests.asm import assemble
from tests.guest import CODE, STACK, Guest

IN, OUT, END = 0x200000, 0x200100, 0x200200
RSP, RSI, RDI = 4, 6, 7
SAMPLES = 12
CPUINFO = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("flags", 1)[-1].split("\n", 1)[0].split()
NEEDED = {"ssse3", "sse4_1", "sse4_2", "aes", "pclmulqdq", "popcnt", "abm", "movbe", "adx"}
ALL, LOGIC, SHIFT, CARRY, MUL, ZERO = 0x8D5, 0x8C5, 0x0C5, 0x001, 0x801, 0x041

_VECTOR = """
pand pandn por pxor paddb paddw paddd paddq paddsb paddsw paddusb paddusw psubb psubw psubd psubq psubsb psubsw psubusb psubusw
pmullw pmulhw pmulhuw pmuludq pmaddwd pavgb pavgw pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd pmaxsw pmaxub pminsw pminub
psadbw packsswb packssdw packuswb punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw punpckhwd punpckhdq punpckhqdq psllw pslld
psllq psrlw psrld psrlq psraw psrad pshufb phaddw phaddd phaddsw phsubw phsubd phsubsw pmaddubsw pmulhrsw psignb psignw psignd
pabsb pabsw pabsd pblendvb blendvps blendvpd pmulld pmuldq pminsb pminsd pminuw pminud pmaxsb pmaxsd pmaxuw pmaxud packusdw
pcmpeqq pcmpgtq phminposuw ptest pmovsxbw pmovsxbd pmovsxbq pmovsxwd pmovsxwq pmovsxdq pmovzxbw pmovzxbd pmovzxbq pmovzxwd
pmovzxwq pmovzxdq aesenc aesenclast aesdec aesdeclast aesimc andps andnps orps xorps unpcklps unpckhpd movshdup movsldup movddup
"""
_FLOAT = """
addps addpd addss addsd subps subpd mulps mulpd mulss divps divpd divsd minps maxpd sqrtps sqrtpd haddps haddpd hsubps addsubps
addsubpd comiss comisd ucomiss ucomisd cvtdq2ps cvtps2dq cvttps2dq cvtdq2pd cvtpd2dq cvttpd2dq cvtpd2ps cvtps2pd cvtss2sd cvtsd2ss
"""
_IMMEDIATE = {
    "pshufd pshufhw pshuflw shufps shufpd palignr pblendw blendps blendpd mpsadbw insertps pclmulqdq aeskeygenassist":
        (0, 1, 0x1B, 0x4E, 0x7F, 0x80, 0xE4, 0xFF),
    "pcmpestri pcmpistri pcmpestrm pcmpistrm": range(0, 128, 3),
    "psllw pslld psllq psrlw psrld psrlq psraw psrad pslldq psrldq": (0, 1, 7, 8, 15, 16, 31, 32, 64, 255),
}
_FLOAT_IMMEDIATE = {"dpps": (0x31, 0x7F, 0xFF), "cmpps cmppd cmpss": range(8), "roundps roundpd roundsd": range(8)}
_SIZES = {8: ("al", "dl", "cl"), 16: ("ax", "dx", "cx"), 32: ("eax", "edx", "ecx"), 64: ("rax", "rdx", "rcx")}


def _integer() -> dict[str, tuple[str, int]]:
    cases: dict[str, tuple[str, int]] = {}
    for size, (a, d, c) in _SIZES.items():
        for op in ("add", "sub", "adc", "sbb", "cmp", "xadd"):
            cases[f"{op} {a}, {d}"] = f"{op} {a}, {d}", ALL
        for op in ("and", "or", "xor", "test"):
            cases[f"{op} {a}, {d}"] = f"{op} {a}, {d}", LOGIC
        for op in ("inc", "dec", "neg", "not"):
            cases[f"{op} {a}"] = f"{op} {a}", ALL
        cases[f"mul {d}"], cases[f"imul {d}"] = (f"mul {d}", MUL), (f"imul {d}", MUL)
        cases[f"cmpxchg {d}"] = f"cmpxchg byte ptr [rsi], {c}" if size == 8 else f"cmpxchg [rsi], {c}", ALL
        for op in ("rol", "ror", "rcl", "rcr"):
            cases[f"{op} {a}"] = f"{op} {a}, cl", CARRY
        if size < 32:
            continue
        for op in ("shl", "shr", "sar"):
            cases[f"{op} {a}"] = f"{op} {a}, cl", SHIFT
        cases[f"shld {a}"], cases[f"shrd {a}"] = (f"shld {a}, {d}, cl", SHIFT), (f"shrd {a}, {d}, 7", SHIFT)
        cases[f"imul {a}, {d}"] = f"imul {a}, {d}, 0x55", MUL
        masks = {"bt": CARRY, "bts": CARRY, "btr": CARRY, "btc": CARRY, "popcnt": ALL, "lzcnt": ZERO, "adcx": ALL, "adox": ALL}
        for op, mask in masks.items():
            cases[f"{op} {a}, {d}"] = f"{op} {a}, {d}", mask
        cases[f"crc32 {a}"] = f"crc32 {a}, {d}", ALL
        cases[f"movbe {a}"] = f"movbe {a}, [rsi]", ALL
        cases[f"bswap {a}"] = f"bswap {a}", ALL
        for op in ("cvtss2si", "cvttss2si", "cvtsd2si", "cvttsd2si"):
            cases[f"{op} {a}"] = f"{op} {a}, xmm2", ALL
        for op in ("cvtsi2ss", "cvtsi2sd"):
            cases[f"{op} {a}"] = f"{op} xmm1, {a}", ALL
    return cases


def _cases() -> dict[str, tuple[str, int, bool]]:
    """name → the instruction, the flags that it defines, whether its operands are numbers of floating point."""
    cases: dict[str, tuple[str, int, bool]] = {}
    for ops, floats in ((_VECTOR, False), (_FLOAT, True)):
        for op in ops.split():
            for source in ("xmm2", "[rsi]"):
                cases[f"{op} {source}"] = f"{op} xmm1, {source}", ALL, floats
    for table, floats in ((_IMMEDIATE, False), (_FLOAT_IMMEDIATE, True)):
        for names, values in table.items():
            for op in names.split():
                for value in values:
                    source = "" if names.startswith("psllw") else "xmm2, "
                    cases[f"{op} {value:#x}"] = f"{op} xmm1, {source}{value}", ALL, floats
    cases.update({name: (text, mask, False) for name, (text, mask) in _integer().items()})
    for op in ("fadd", "fsub", "fmul", "fdiv", "fsubr", "fdivr"):
        text = f"fninit; fld qword ptr [rsi]; fld qword ptr [rsi + 8]; {op} st(0), st(1); fstp qword ptr [rdi + 64]; fninit"
        cases[op] = text, ALL, True
    return cases


CASES = _cases()
_BODY = """
t{index}:
    movups xmm0, [rsi + 32]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi]
    mov rax, [rsi + 16]
    mov rdx, [rsi + 24]
    mov rcx, [rsi + 8]
    push 0x{flags:x}
    popfq
    {text}
    pushfq
    pop r8
    mov [rdi], rax
    mov [rdi + 8], rdx
    mov [rdi + 16], rcx
    mov [rdi + 24], r8
    movups [rdi + 32], xmm1
    movups [rdi + 48], xmm0
    ret
"""


_EDGES = (0, 1, 0x7F, 0x80, 0xFFFF, 0x8000, 0x7FFFFFFF, 0x80000000, 1 << 63, (1 << 64) - 1, 0x0001000200030004, 0x61626300646566FF)


def _operands(rng: random.Random, floats: bool) -> bytes:
    if floats:
        form, n = rng.choice((("<12f", 12), ("<6d", 6)))
        return struct.pack(form, *(rng.choice((0.0, 1.0, -2.5, rng.uniform(-1e3, 1e3))) for _ in range(n)))
    return struct.pack("<6Q", *(rng.choice(_EDGES) if rng.random() < 0.4 else rng.getrandbits(64) for _ in range(6)))


@pytest.mark.skipif(not set(CPUINFO) >= NEEDED, reason="the host's CPU has not all of: " + ", ".join(sorted(NEEDED)))
def test_every_instruction():
    source = "".join(_BODY.format(index=i, text=text, flags=(0x2, 0x8D7)[i % 2]) for i, (text, *_) in enumerate(CASES.values()))
    guest = Guest("start: mov rax, cr4; or eax, 0x600; mov cr4, rax; hlt\n" + source)        # OSFXSR, OSXMMEXCPT
    guest.hlt()
    code, symbols = assemble(source, CODE)
    native = mmap.mmap(-1, (len(code) + 4095) & ~4095, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    native[:len(code)] = code
    start = ctypes.addressof(ctypes.c_char.from_buffer(native))
    page = mmap.mmap(-1, 4096)
    here = ctypes.addressof(ctypes.c_char.from_buffer(page))
    rng, wrong = random.Random(1), []
    guest.ram[END] = 0xF4
    for i, (name, (_, mask, floats)) in enumerate(CASES.items()):
        function = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(start + symbols[f"t{i}"] - CODE)
        for _ in range(SAMPLES):
            operands = _operands(rng, floats)
            page[:48], page[256:384] = operands, bytes(128)
            function(here + 256, here)
            guest.ram[IN:IN + 48], guest.ram[OUT:OUT + 128] = operands, bytes(128)
            guest.put(STACK - 8, END)
            for register, value in ((RSP, STACK - 8), (RSI, IN), (RDI, OUT)):
                guest.cpu.set_gpr(register, value)
            guest.cpu.rip = guest.sym[f"t{i}"]
            guest.hlt()
            theirs, ours = bytearray(page[256:384]), bytearray(guest.ram[OUT:OUT + 128])
            for result in (theirs, ours):
                result[24:32] = (int.from_bytes(result[24:32], "little") & mask).to_bytes(8, "little")
            if theirs != ours or page[:48] != guest.ram[IN:IN + 48]:
                wrong.append((name, operands.hex(" ", 8), theirs.hex(" ", 8), ours.hex(" ", 8)))
                break
    assert not wrong
