# SPDX-License-Identifier: GPL-2.0-or-later
"""SSE arithmetic at the edges of what the host's FPU does for the guest, against the host's CPU (IEEE 754, SDM volume 1, 11.5)."""

import ctypes
import itertools
import mmap
import random
import struct

import pytest

from tests.asm import assemble
from tests.guest import CODE, STACK, Guest

DATA, END = 0x200000, 0xF000
RSP, RCX, RDI = 4, 1, 7
DEFAULT, PE, DAZ, FTZ = 0x1F80, 0x20, 0x40, 0x8000
CONTROLS = (DEFAULT, *(DEFAULT | PE | more for more in (0, 1 << 13, 2 << 13, 3 << 13, DAZ, FTZ)))       # 13: the rounding
RECORD = struct.Struct("<QQIIQ")        # operands, MXCSR before and after, result
SOURCE = "".join(f"""
{op}{kind}: ldmxcsr [rdi + 16]
 mov{kind} xmm0, [rdi]
 {op}{kind} xmm0, [rdi + 8]
 stmxcsr [rdi + 20]
 mov{kind} [rdi + 24], xmm0
 add rdi, 32
 dec ecx
 jne {op}{kind}
 ldmxcsr [rdi + 16]
 ret
""" for op in ("add", "sub", "mul", "div") for kind in ("ss", "sd"))


class Format:
    def __init__(self, bits, fraction):
        self.sign, self.exponent = 1 << bits - 1, (1 << bits - 1 - fraction) - 1
        self.fraction = fraction

    def at(self, exponent, fraction=0):
        return exponent << self.fraction | fraction & (1 << self.fraction) - 1

    def operands(self, rng):
        one, top = self.exponent >> 1, self.exponent
        exponents = (0, 1, 2, one // 2, one - 1, one, one + 1, one + one // 2, top - 2, top - 1)
        edges = [self.at(e, f) for e in exponents for f in (0, 1, -1)]
        edges += [self.at(top), self.at(top, 1 << self.fraction - 1)]                       # infinity, a NaN
        edges += [self.at(rng.choice((one, rng.randrange(top))), rng.getrandbits(self.fraction)) for _ in range(8)]
        return [e | s for e in edges for s in (0, self.sign)]

    def rounded_up(self, values, x):
        """Unicorn flushes what is too small before it is rounded, hardware what still is then."""
        return values[2] & FTZ and x & self.sign - 1 == self.at(1)

    def both_nan(self, *values):
        return all(x & self.sign - 1 > self.at(self.exponent) for x in values)


@pytest.mark.parametrize(("kind", "form"), [("ss", Format(32, 23)), ("sd", Format(64, 52))], ids=["ss", "sd"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_arithmetic(op, kind, form):
    guest = Guest("start: mov rax, cr4; or eax, 0x600; mov cr4, rax; hlt\n" + SOURCE)
    guest.hlt()
    code, symbols = assemble(SOURCE, CODE)
    native = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    native[:len(code)] = code
    operands = form.operands(random.Random(op))
    tried = [(a, b, control) for a, b in itertools.product(operands, operands) for control in CONTROLS]
    records = b"".join(RECORD.pack(a, b, control, 0, 0) for a, b, control in tried) + RECORD.pack(0, 0, DEFAULT, 0, 0)
    here = ctypes.create_string_buffer(records, len(records))
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    address = ctypes.addressof(ctypes.c_char.from_buffer(native)) + symbols[op + kind] - CODE
    function(address)(ctypes.addressof(here), 0, 0, len(tried))         # System V: rdi, rsi, rdx, rcx
    guest.ram[DATA:DATA + len(records)] = records
    guest.ram[END] = 0xF4
    guest.put(STACK - 8, END)
    for register, value in ((RSP, STACK - 8), (RDI, DATA), (RCX, len(tried))):
        guest.cpu.set_gpr(register, value)
    guest.cpu.rip = guest.sym[op + kind]
    guest.hlt()
    found = zip(tried, RECORD.iter_unpack(here.raw), RECORD.iter_unpack(guest.ram[DATA:DATA + len(records)]), strict=False)
    wrong = [(*map(hex, values), hex(theirs[4]), hex(ours[4])) for values, theirs, ours in found
             if not (theirs[4] == ours[4] or form.both_nan(theirs[4], ours[4]) or form.rounded_up(values, theirs[4]))]
    assert not wrong, (len(wrong), wrong[:5])
