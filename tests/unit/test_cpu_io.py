# SPDX-License-Identifier: GPL-2.0-or-later
"""Port I/O: exits, register state at them, completion, permission."""

from __future__ import annotations

import pytest

from kvmfs.cpu.cpu import EXIT_IO_IN, EXIT_IO_OUT
from tests.guest import CODE, MMIO, PT, TSS, Guest

MODES = ("real", "pm32", "pm32pg", "pae", "long")
BUF = 0x20000


@pytest.mark.parametrize("mode", MODES)
def test_plain_widths(mode):
    g = Guest(
        """start: mov dx,0x3f8
        mov eax,0x12345678
        out dx,al
        out 0x80,ax
        out dx,eax
        in al,0x60
        in ax,dx
        mov ecx,eax
        in eax,dx
        hlt""",
        mode,
    )
    assert g.trace(ins=bytes(range(1, 8))) == [
        ("out", 0x3F8, 1, b"\x78"),
        ("out", 0x80, 2, b"\x78\x56"),
        ("out", 0x3F8, 4, b"\x78\x56\x34\x12"),
        ("in", 0x60, 1, 1),
        ("in", 0x3F8, 2, 1),
        ("in", 0x3F8, 4, 1),
    ]
    assert g.cpu.gpr(1) == 0x12340302
    assert g.cpu.gpr(0) == 0x07060504


def test_rip_stays_at_plain_io_until_completion():
    g = Guest("start: out 0x80,al\n in al,0x71\n hlt")
    cpu = g.cpu
    assert cpu.run() == EXIT_IO_OUT
    assert (cpu.rip, cpu.exit.string, cpu.completion_pending) == (CODE, 0, True)
    assert cpu.complete_io_out() == 0
    assert (cpu.rip, cpu.completion_pending) == (CODE + 2, False)
    assert cpu.run() == EXIT_IO_IN
    assert cpu.rip == CODE + 2
    assert cpu.complete_io_in(b"\x5a") == 0
    assert (cpu.rip, cpu.gpr(0) & 0xFF) == (CODE + 4, 0x5A)
    g.hlt()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size,suffix", [(1, "b"), (2, "w"), (4, "d")])
def test_rep_outs(mode, size, suffix):
    g = Guest(f"start: mov edx,0x10\n mov esi,0x1000\n mov ecx,3\n rep outs{suffix}\n end: hlt", mode)
    g.ram[0x1000:0x100C] = bytes(range(12))
    cpu, x = g.cpu, g.cpu.exit
    base = CODE if mode == "real" else 0
    begin = cpu.rip + (len_before := g.sym["end"] - base - cpu.rip) - (3 if suffix == "w" and mode != "real" else 2)
    assert len_before
    if mode == "real" and suffix == "d":
        begin -= 1
    for i in range(3):
        assert cpu.run() == EXIT_IO_OUT
        assert (x.port, x.size, x.count, x.string) == (0x10, size, 1, 1)
        assert bytes(cpu.data[:size]) == bytes(range(size * i, size * i + size))
        assert cpu.gpr(1) & 0xFFFF == 2 - i
        assert cpu.gpr(6) & 0xFFFF == 0x1000 + size * (i + 1)
        assert cpu.rip == begin      # also after the last one: Linux's emulator leaves that to the guest
    g.hlt()


def test_outs_backward_and_single():
    g = Guest("start: mov edx,0x10\n mov esi,0x1002\n std\n outsb\n mov ecx,2\n rep outsb\n hlt")
    g.ram[0x1000:0x1003] = b"abc"
    assert g.trace() == [("out", 0x10, 1, b"c"), ("out", 0x10, 1, b"b"), ("out", 0x10, 1, b"a")]
    assert g.cpu.gpr(6) == 0xFFF


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size,suffix", [(1, "b"), (2, "w"), (4, "d")])
def test_rep_ins(mode, size, suffix):
    g = Guest(f"start: mov edx,0x10\n mov edi,0x1000\n mov ecx,5\n rep ins{suffix}\n hlt", mode)
    cpu, x = g.cpu, g.cpu.exit
    assert cpu.run() == EXIT_IO_IN
    assert (x.port, x.size, x.count, x.string) == (0x10, size, 5, 1)
    assert (cpu.gpr(1), cpu.gpr(7)) == (5, 0x1000)
    data = bytes(range(1, 5 * size + 1))
    assert cpu.complete_io_in(data) == 0
    assert g.ram[0x1000 : 0x1000 + 5 * size] == data
    assert (cpu.gpr(1), cpu.gpr(7)) == (0, 0x1000 + 5 * size)
    g.hlt()


def test_ins_count_is_linux_page_and_buffer_bound():
    g = Guest("start: mov edx,0x10\n mov edi,0x20ffa\n mov ecx,10\n rep insb\n mov edi,0x21000\n mov ecx,2000\n rep insw\n hlt")
    assert g.trace(ins=bytes(range(10)) + bytes(4000)) == [
        ("in", 0x10, 1, 6),
        ("in", 0x10, 1, 4),
        *[("in", 0x10, 2, 512)] * 3,
        ("in", 0x10, 2, 464),
    ]
    assert g.ram[0x20FFA:0x21000] == bytes(range(6))


def test_ins_backward():
    g = Guest("start: mov edx,0x10\n mov edi,0x20002\n mov ecx,3\n std\n rep insb\n hlt")
    assert g.trace(ins=b"xyz") == [("in", 0x10, 1, 2), ("in", 0x10, 1, 1)]
    assert g.ram[0x20000:0x20003] == b"zyx"


def test_ins_zero_count_does_nothing():
    g = Guest("start: mov edx,0x10\n mov edi,0x20000\n xor ecx,ecx\n rep insb\n rep outsb\n hlt")
    assert g.trace() == []


def test_ins_into_missing_page_faults_before_the_exit():
    g = Guest("start: mov edx,0x10\n mov edi,0x50000\n insb\n hlt\nh14: mov rbx,cr2\n pop rcx\n hlt")
    g.hlt()
    assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (0x50000, 2)


def test_ins_and_outs_with_mmio():
    g = Guest(f"start: mov edx,0x10\n mov edi,{MMIO}\n insb\n mov esi,{MMIO + 4}\n outsw\n hlt")
    assert g.trace(ins=b"I", reads=b"RS") == [
        ("in", 0x10, 1, 1),
        ("w", MMIO, 1, b"I"),
        ("r", MMIO + 4, 2),
        ("out", 0x10, 2, b"RS"),
    ]


USER = """start: push 0x2b
 push 0x4f000
 push {flags}
 push 0x33
 lea rax,[rip+user]
 push rax
 iretq
user: out 0x80,al
 in al,0x90
 int 0x80
h13: pop rbx
 pop rcx
 hlt
h128: mov ebx,0x77
 hlt"""


@pytest.mark.parametrize("iopl,bitmap,expected", [(0, False, 13), (3, False, 0x77), (0, True, 0x77)])
def test_iopl_and_bitmap(iopl, bitmap, expected):
    g = Guest(USER.format(flags=2 | iopl << 12), dpl3=(128,))
    g.cpu.set_segment(7, 0x40, TSS, 0xFFF, 0x08B)
    g.ram[TSS + 0x68 : TSS + 0x68 + 0x100] = bytes([0 if bitmap else 0xFF]) * 0x100
    log = g.trace()
    if expected == 13:
        assert log == []
        assert (g.cpu.gpr(3), g.cpu.gpr(1)) == (0, g.sym["user"])
    else:
        assert log == [("out", 0x80, 1, bytes([g.sym["user"] & 0xFF])), ("in", 0x90, 1, 1)]
        assert g.cpu.gpr(3) == expected


def test_single_step_trap_after_out():
    g = Guest("start: pushfq\n or dword ptr [rsp],0x100\n popfq\n out 0x80,al\n after: nop\n hlt\nh1: pop rbx\n mov rcx,dr6\n hlt")
    assert g.trace() == [("out", 0x80, 1, b"\0")]
    assert (g.cpu.gpr(3), g.cpu.gpr(1) & 0x4000) == (g.sym["after"], 0x4000)


def test_code_on_two_pages():
    g = Guest("start: jmp 1f\n .org 0xfff\n1: out 0x80,al\n in eax,0x71\n hlt")
    assert g.trace(ins=b"\1\2\3\4") == [("out", 0x80, 1, b"\0"), ("in", 0x71, 4, 1)]
    assert g.cpu.gpr(0) == 0x04030201


def test_code_on_two_virtual_pages_that_are_not_adjacent():
    g = Guest("start: mov eax,0x5a\n jmp 1f\n .org 0xfff\n1: out 0x80,al\n hlt")
    g.put(PT + 8 * 0x11, 0x30007)
    g.ram[0x30000:0x30002] = b"\x81\xf4"  # the operand is in another frame
    assert g.trace() == [("out", 0x81, 1, b"\x5a")]
