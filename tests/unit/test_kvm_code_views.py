# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that its guest writes through another view of the memory than the one that it executes, again and again."""

import struct

import pytest

from tests.unit.machine import machines
from tests.unit.test_kvm_instructions_long import TABLES, LongMachine

LINEAR, TABLE, CODE = 0x605000, 0x40000, 0x51000        # its entries, and the memory that both pages show
VIEW = LINEAR + 0x1000
P, RW, NX = 1, 2, 1 << 63
WRITE = """mov byte ptr [{at}], 0xb8
 mov dword ptr [{at} + 1], {value}                      # mov eax, value; ret
 mov byte ptr [{at} + 5], 0xc3"""
CALLS = "\n".join([f"call {LINEAR:#x}; add ebx, eax"] * 3)
# rbx: of each of 40 values three times; a call is translated for the first of them, or the next, to stay.
SOURCE = f"""
start: mov r8, {VIEW:#x}
 xor ebx, ebx
 mov ecx, 40
1: {WRITE.format(at="r8", value="ecx")}
 {CALLS}
 loop 1b
 out 0xf4, al
"""
SUM = 3 * sum(range(1, 41))


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    with machines() as make:
        m = make(request.param, SOURCE, cls=LongMachine)
        m.write(TABLES + 0x2000 + 8 * (LINEAR >> 21), struct.pack("<Q", TABLE | 7))
        sregs = m.sregs()
        sregs.efer |= 0x800
        assert m.set_sregs(sregs) == 0
        yield m


def run(m, executed, written):
    m.write(TABLE + (LINEAR >> 9 & 0xFF8), struct.pack("<2Q", executed, written))
    m.set_regs(rip=m.symbols["start"], rsp=0x7000)
    assert m.run_within() == 0
    return m.regs()["rbx"]


@pytest.mark.parametrize("executed", [P | RW, P], ids=["rwx", "rx"])
@pytest.mark.parametrize("written", [P | RW | NX, P | RW], ids=["rw", "rwx"])
def test_two_linear_addresses(machine, executed, written):
    assert run(machine, CODE | executed, CODE | written) == SUM


@pytest.mark.parametrize("executed", [P | RW, P], ids=["rwx", "rx"])
@pytest.mark.parametrize("written", [P | RW | NX, P | RW], ids=["rw", "rwx"])
def test_two_slots(machine, executed, written):
    assert machine.region(1, 0, 0x300000, 0x1000, CODE) == machine.region(2, 0, 0x310000, 0x1000, CODE) == 0
    assert run(machine, 0x300000 | executed, 0x310000 | written) == SUM
