# SPDX-License-Identifier: GPL-2.0-or-later
"""Random instructions, more often than by chance such as reach deep into a CPU."""

from __future__ import annotations

from random import Random
from typing import Final

# Opcodes that change modes, tables and stacks, deliver events, or move much memory.
_SYSTEM_HEX: Final = """
    0f00 0f01 0f02 0f03 0f05 0f06 0f07 0f08 0f09 0f0b 0f20 0f21 0f22 0f23 0f30 0f31 0f32 0f33 0f34 0f35 0fa2 0faa 0fae 0fc7
    0f01c1 0f01c8 0f01c9 0f01ca 0f01cb 0f01d0 0f01d1 0f01d8 0f01d9 0f01da 0f01db 0f01dc 0f01dd 0f01de 0f01df 0f01f8 0f01f9
    0f01fb 0fa0 0fa1 0fa8 0fa9 0fb2 0fb4 0fb5 07 17 1f 8e 8c c4 c5 9a ea ff c2 c3 ca cb cc cd ce cf c8 c9 f1 f4 fa fb 9c 9d 61
    60 62 63 d6 d7 6c 6d 6e 6f a4 a5 a6 a7 aa ab ac ad ae af e4 e5 e6 e7 ec ed ee ef 9b d8 d9 da db dc dd de df 0fc0 0fc1 0fb0
    0fb1 0f38f0 0f38f1 0f3882 0f3880 0f50 0f10 0f11 0f28 0f29 0f6f 0f7f 0fe7 0ff0 0ff7 0f2b 0f77 0fba 0fab 0fb3 0fbb f6 f7 fe 8f
    86 87 80 81 83 d0 d3
"""
_SYSTEM: Final = [bytes.fromhex(text) for text in _SYSTEM_HEX.split()]
_PREFIXES: Final = bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3 40 48 49 4c 41")
_MODRMS: Final = bytes.fromhex("00 04 05 06 08 0d 10 15 18 1d 20 25 28 2d 30 35 38 3d 44 45 84 85 c0 c1 c8 d0 d8 e0 e8 f0 f8")
INTERESTING: Final = (0, 1, 2, 8, 0x10, 0x18, 0x20, 0x28, 0x30, 0x40, 0x7F, 0x80, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF,
                      0x10000, 0xFFFFF, 0x7FFFFFFF, 0x80000000, 0xFEE00000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, 1 << 39, 1 << 40,
                      1 << 46, 0x7FFFFFFFFFFF, 1 << 47, 0xFFFF800000000000, 1 << 63, (1 << 64) - 1)


def number(rng: Random, bits: int = 64) -> int:
    """A number near an edge, or any."""
    value = rng.choice(INTERESTING) + rng.randint(-8, 8) if rng.random() < 0.6 else rng.getrandbits(rng.randint(1, 64))
    return value & (1 << bits) - 1


def instruction(rng: Random) -> bytes:
    """The bytes of one, or what looks like the beginning of one."""
    if rng.random() < 0.15:
        return rng.randbytes(rng.randint(1, 15))
    prefixes = bytes(rng.choice(_PREFIXES) for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))))
    kind = rng.random()
    if kind < 0.55:
        opcode = rng.choice(_SYSTEM)
    elif kind < 0.75:
        opcode = bytes([rng.getrandbits(8)])
    elif kind < 0.95:
        opcode = bytes([0x0F, rng.getrandbits(8)])
    else:
        opcode = bytes([0x0F, rng.choice((0x38, 0x3A)), rng.getrandbits(8)])
    modrm = rng.choice(_MODRMS) if rng.random() < 0.6 else rng.getrandbits(8)
    rest = bytes([modrm]) + number(rng).to_bytes(8, "little")[:rng.choice((0, 1, 2, 4, 5, 8))]
    return prefixes + opcode + rest


def program(rng: Random, size: int) -> bytes:
    """So many bytes of instructions."""
    code = b""
    while len(code) < size:
        code += instruction(rng)
    return code[:size]
