# SPDX-License-Identifier: GPL-2.0-or-later
"""MMIO: what each kind of instruction hands out, and that it is executed exactly once."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from kvmfs.cpu.cpu import EXIT_FETCH, EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_UNKNOWN
from tests.guest import MMIO, PT, RAM, Guest

M = MMIO


def le(value: int, size: int) -> bytes:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


READS = [
    ("mov eax,[rbx]", 4, 0, 0x04030281),
    ("mov rax,[rbx]", 8, 0, 0x0807060504030281),
    ("mov ax,[rbx]", 2, 0, 0x281),
    ("mov al,[rbx]", 1, 0, 0x81),
    ("movzx eax,byte ptr [rbx]", 1, 0, 0x81),
    ("movsx rax,byte ptr [rbx]", 1, 0, 0xFFFFFFFFFFFFFF81),
    ("movzx eax,word ptr [rbx]", 2, 0, 0x281),
    ("movsxd rax,dword ptr [rbx]", 4, 0, 0x04030281),
    ("add eax,[rbx]", 4, 1, 0x04030282),
    ("cmp al,[rbx]; sete al", 1, 0x81, 1),
    ("test byte ptr [rbx],0x80; setnz al", 1, 0, 1),
    ("bt dword ptr [rbx],7; setc al", 4, 0, 1),
    ("mov rsi,rbx; lodsd", 4, 0, 0x04030281),
    ("mov rsi,rbx; lodsb", 1, 0, 0x81),
    ("imul eax,[rbx],2", 4, 0, 0x08060502),
    ("push qword ptr [rbx]; pop rax", 8, 0, 0x0807060504030281),
    ("xlatb", 1, 0, 0x81),
    ("movbe eax,[rbx]", 4, 0, 0x81020304),
    ("movbe ax,[rbx]", 2, 0, 0x8102),
    ("movbe rax,[rbx]", 8, 0, 0x8102030405060708),
    ("movsx eax,word ptr [rbx]", 2, 0, 0x281),
    ("cmovc eax,[rbx]", 4, 7, 7),
]


@pytest.mark.parametrize("offset", [0, 1, 3, 0x7FD])
@pytest.mark.parametrize("insn,size,rax,result", READS)
def test_read(insn, size, rax, result, offset):
    g = Guest(f"start: mov ebx,{M + offset}\n mov rax,{rax}\n {insn}\n hlt")
    assert g.trace(reads=b"\x81\2\3\4\5\6\7\x08") == [("r", M + offset, size)]
    assert g.cpu.gpr(0) == result


WRITES = [
    ("mov [rbx],eax", 4, 0x44332211),
    ("mov [rbx],rax", 8, 0x8877665544332211),
    ("mov [rbx],ax", 2, 0x2211),
    ("mov [rbx],al", 1, 0x11),
    ("mov dword ptr [rbx],0x12345678", 4, 0x12345678),
    ("mov rdi,rbx; stosd", 4, 0x44332211),
    ("mov rdi,rbx; stosb", 1, 0x11),
    ("movnti [rbx],eax", 4, 0x44332211),
    ("push rax; pop qword ptr [rbx]", 8, 0x8877665544332211),
    ("sete [rbx]", 1, 0),
    ("movbe [rbx],eax", 4, 0x11223344),
    ("movbe [rbx],ax", 2, 0x1122),
    ("movbe [rbx],rax", 8, 0x1122334455667788),
]


@pytest.mark.parametrize("offset", [0, 1, 6, 0x7FD])
@pytest.mark.parametrize("insn,size,value", WRITES)
def test_write(insn, size, value, offset):
    g = Guest(f"start: or esp,esp\n mov ebx,{M + offset}\n movabs rax,0x8877665544332211\n {insn}\n hlt")
    assert g.trace() == [("w", M + offset, size, le(value, size))]
    assert g.cpu.gpr(4) == 0x8000


RMW = [
    ("add [rbx],eax", 4, 7, 0x0403028A - 2),
    ("inc dword ptr [rbx]", 4, 0, 0x04030282),
    ("lock inc dword ptr [rbx]", 4, 0, 0x04030282),
    ("not byte ptr [rbx]", 1, 0, 0x7E),
    ("or qword ptr [rbx],0x10", 8, 0, 0x0807060504030291),
    ("lock xadd [rbx],eax", 4, 1, 0x04030282),
    ("xchg [rbx],ax", 2, 0x1234, 0x1234),
    ("xchg [rbx],rax", 8, 0x1234, 0x1234),
    ("bts dword ptr [rbx],1", 4, 0, 0x04030283),
    ("lock btr dword ptr [rbx],0", 4, 0, 0x04030280),
    ("shl word ptr [rbx],4", 2, 0, 0x2810),
    ("mov ecx,0x55; cmpxchg [rbx],ecx", 4, 0x04030281, 0x55),
    ("mov ecx,0x55; lock cmpxchg [rbx],cl", 1, 0x81, 0x55),
    ("mov ecx,0x55; lock cmpxchg [rbx],ecx", 4, 1, 0x04030281),
    ("lock neg dword ptr [rbx]", 4, 0, -0x04030281),
    ("stc; lock adc [rbx],eax", 4, 1, 0x04030283),
    ("lock sub qword ptr [rbx],1", 8, 0, 0x0807060504030280),
    ("rol byte ptr [rbx],1", 1, 0, 0x03),
    ("xor edx,edx; mov eax,1; lock cmpxchg8b [rbx]", 8, 0, 0x0807060504030281),
]


@pytest.mark.parametrize("offset", [0, 1, 0x7FD])
@pytest.mark.parametrize("insn,size,rax,stored", RMW)
def test_read_modify_write(insn, size, rax, stored, offset):
    g = Guest(f"start: mov ebx,{M + offset}\n mov eax,{rax}\n {insn}\n hlt")
    assert g.trace(reads=b"\x81\2\3\4\5\6\7\x08") == [("r", M + offset, size), ("w", M + offset, size, le(stored, size))]


UNKNOWN = [      # to Linux's emulator
    ("movq xmm0,[rbx]", 0), ("movd xmm0,[rbx]", 0), ("pinsrb xmm0,[rbx],0", 0), ("popcnt eax,[rbx]", 0),
    ("cvtsi2sd xmm0,dword ptr [rbx]", 0), ("fld dword ptr [rbx]", 0), ("paddd xmm0,[rbx]", 0),
    ("ldmxcsr [rbx]", 0), ("crc32 eax,byte ptr [rbx]", 0),
    ("movq [rbx],xmm0", 1), ("movss [rbx],xmm0", 1), ("movlpd [rbx],xmm0", 1), ("pextrb [rbx],xmm0,1", 1),
    ("fist word ptr [rbx]", 1),
]


@pytest.mark.parametrize("offset", [0, 0x7FF])
@pytest.mark.parametrize("insn,write", UNKNOWN)
def test_unknown_instruction(insn, write, offset):
    g = Guest(f"start: mov ebx,{M + offset}\n at: {insn}\n end: mov eax,[rbx]\n hlt")
    cpu = g.cpu
    assert cpu.run() == EXIT_UNKNOWN
    assert (cpu.exit.gpa, cpu.exit.info1, cpu.rip) == (M + offset, write, g.sym["at"])
    cpu.rip = g.sym["end"]
    assert g.trace(reads=b"abcd") == [("r", M + offset, 4)]


def test_register_state_at_exits():
    g = Guest(f"start: mov ebx,{M}\n at: add [rbx],ebx\n end: hlt")
    cpu = g.cpu
    flags = cpu.rflags
    assert cpu.run() == EXIT_MMIO_READ
    assert (cpu.rip, cpu.rflags) == (g.sym["at"], flags)
    assert cpu.complete_mmio_read(le(1, 4)) == EXIT_MMIO_WRITE
    assert cpu.rip == g.sym["end"]
    assert cpu.exit.gpa == M
    assert cpu.complete() == 0
    g.hlt()


def test_sse_in_two_fragments():
    g = Guest(f"start: mov ebx,{M}\n movups xmm1,[rbx+4]\n movaps [rbx+0x20],xmm1\n movdqu [rbx+0x101],xmm1\n hlt")
    data = bytes(range(16))
    assert g.trace(reads=data) == [
        ("r", M + 4, 8), ("r", M + 12, 8),
        ("w", M + 0x20, 8, data[:8]), ("w", M + 0x28, 8, data[8:]),
        ("w", M + 0x101, 8, data[:8]), ("w", M + 0x109, 8, data[8:]),
    ]  # fmt: skip


def test_string_instructions():
    g = Guest(
        f"""start: mov esi,0x20000
        mov edi,{M}
        mov ecx,2
        rep movsd
        mov esi,{M + 0x100}
        mov edi,0x20100
        mov ecx,3
        rep movsb
        mov esi,{M + 0x200}
        mov edi,{M + 0x1300}
        movsw
        std
        mov edi,{M + 0x401}
        mov ecx,2
        mov eax,0x6162
        rep stosw
        cld
        mov edi,{M}
        mov ecx,5
        mov al,3
        repne scasb
        mov edx,ecx
        hlt"""
    )
    g.ram[0x20000:0x20008] = b"abcdefgh"
    assert g.trace(reads=b"xyz" + b"12" + b"\1\2\3") == [
        ("w", M, 4, b"abcd"), ("w", M + 4, 4, b"efgh"),
        ("r", M + 0x100, 1), ("r", M + 0x101, 1), ("r", M + 0x102, 1),
        ("r", M + 0x200, 2), ("w", M + 0x1300, 2, b"12"),
        ("w", M + 0x401, 2, b"ba"), ("w", M + 0x3FF, 2, b"ba"),
        ("r", M, 1), ("r", M + 1, 1), ("r", M + 2, 1),
    ]  # fmt: skip
    assert g.ram[0x20100:0x20103] == b"xyz"
    assert g.cpu.gpr(2) == 2


def test_rip_stays_at_rep_movs():
    g = Guest(f"start: mov esi,0x20000\n mov edi,{M}\n mov ecx,2\n at: rep movsb\n end: hlt")
    for i in range(2):          # also after the last element: Linux's emulator leaves that to the guest
        assert g.cpu.run() == EXIT_MMIO_WRITE
        assert (g.cpu.rip, g.cpu.gpr(1), g.cpu.gpr(7)) == (g.sym["at"], 1 - i, M + 1 + i)


def test_crossing_pages_of_mmio():
    g = Guest(f"start: mov ebx,{M + 0xFFD}\n mov rax,[rbx]\n mov [rbx],eax\n hlt")
    data = bytes(range(1, 9))
    assert g.trace(reads=data) == [
        ("r", M + 0xFFD, 3), ("r", M + 0x1000, 5),
        ("w", M + 0xFFD, 3, data[:3]), ("w", M + 0x1000, 1, data[3:4]),
    ]  # fmt: skip
    assert g.cpu.gpr(0) == int.from_bytes(data, "little")


def test_crossing_from_memory_into_mmio_and_back():
    top = RAM  # memory ends here, and the page tables map what follows 1:1
    g = Guest(f"start: mov ebx,{top - 2}\n movabs rax,0x8877665544332211\n mov [rbx],rax\n mov [rbx-4],rax\n hlt")
    assert g.trace() == [("w", top, 6, bytes.fromhex("334455667788")), ("w", top, 2, bytes.fromhex("7788"))]
    assert g.ram[top - 6 :] == bytes.fromhex("112233445566")
    g = Guest("start: mov ebx,0x5effe\n movabs rax,0x8877665544332211\n mov [rbx],rax\n mov rcx,[rbx]\n hlt")
    g.put(PT + 8 * 0x5E, MMIO | 7)
    assert g.trace(reads=b"\xaa\xbb") == [("w", MMIO + 0xFFE, 2, b"\x11\x22"), ("r", MMIO + 0xFFE, 2)]
    assert g.ram[0x5F000:0x5F006] == bytes.fromhex("334455667788")
    assert g.cpu.gpr(1) == 0x887766554433BBAA


@pytest.mark.parametrize("mode", ["real", "pm32", "pm32pg", "pae"])
def test_other_modes(mode):
    base = 0xC0000 if mode == "real" else MMIO
    setup = "mov ax,0xc000\n mov ds,ax\n mov ebx,0" if mode == "real" else f"mov ebx,{base}"
    g = Guest(f"start: {setup}\n mov eax,[ebx+2]\n mov [ebx+8],ax\n push dword ptr [ebx]\n pop dword ptr [ebx+4]\n hlt", mode)
    if mode == "real":
        g.engine.unmap(0, RAM)
        g.engine.map(0, base, g.host)
    assert g.trace(reads=b"abcdefgh") == [
        ("r", base + 2, 4), ("w", base + 8, 2, b"ab"), ("r", base, 4), ("w", base + 4, 4, b"efgh"),
    ]  # fmt: skip


def test_readonly_region():
    g = Guest(f"start: mov ebx,{RAM}\n mov eax,[rbx]\n mov [rbx+4],eax\n inc dword ptr [rbx]\n mov edx,[rbx]\n call rbx\n hlt")
    rom = mmap.mmap(-1, 0x2000)
    rom[:8] = b"\xc3\0\0\0\0\0\0\0"
    g.engine.map(RAM, 0x2000, ctypes.addressof(ctypes.c_char.from_buffer(rom)), readonly=True)
    assert g.trace() == [("w", RAM + 4, 4, b"\xc3\0\0\0"), ("w", RAM, 4, b"\xc4\0\0\0")]
    assert (rom[:8], g.cpu.gpr(2)) == (b"\xc3\0\0\0\0\0\0\0", 0xC3)


def test_readonly_crossing_into_memory():
    g = Guest(f"start: mov ebx,{RAM + 0xFFE}\n mov eax,0x44332211\n mov [rbx],eax\n hlt")
    rom, ram = mmap.mmap(-1, 0x1000), mmap.mmap(-1, 0x1000)
    g.engine.map(RAM, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(rom)), readonly=True)
    g.engine.map(RAM + 0x1000, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    assert g.trace() == [("w", RAM + 0xFFE, 2, b"\x11\x22")]
    assert (rom[0xFFE:], ram[:2]) == (b"\0\0", b"\x33\x44")


def test_fetch_from_nowhere():
    g = Guest(f"start: mov ebx,{M + 8}\n jmp rbx")
    assert g.cpu.run() == EXIT_FETCH
    assert (g.cpu.exit.gpa, g.cpu.rip) == (M + 8, M + 8)
    g.cpu.rip = g.sym["h_def"]
    g.hlt()


def test_call_and_jump_through_mmio():
    g = Guest(f"start: mov ebx,{M}\n call [rbx]\n jmp [rbx+8]\nf: inc ecx\n ret\nout: hlt")
    assert g.trace(reads=le(g.sym["f"], 8) + le(g.sym["out"], 8)) == [("r", M, 8), ("r", M + 8, 8)]
    assert (g.cpu.gpr(1), g.cpu.gpr(4), g.cpu.rip) == (1, 0x8000, g.sym["out"])


def test_fault_in_the_second_half():
    g = Guest(f"start: mov esi,{M}\n mov edi,0x51000\n mov ax,cs\n movsb\n hlt\nh14: mov rbx,cr2\n pop rcx\n hlt")
    assert g.trace() == [("r", M, 1)]
    assert (g.cpu.gpr(3), g.cpu.gpr(1), g.cpu.gpr(6)) == (0x51000, 3, M)


def test_pending_interrupt_comes_after_the_instruction():
    g = Guest(f"start: mov ebx,{M}\n sti\n nop\n at: inc dword ptr [rbx]\n next: nop\n hlt\nh32: pop rcx\n hlt")
    assert g.cpu.run() == EXIT_MMIO_READ
    g.cpu.inject_interrupt(32)
    assert g.cpu.complete_mmio_read(le(1, 4)) == EXIT_MMIO_WRITE
    assert g.trace() == []
    assert g.cpu.gpr(1) == g.sym["next"]


def test_loop_of_mixed_accesses_counts_once():
    g = Guest(
        f"""start: mov ebx,{M}
        mov ecx,100
     1: mov eax,[rbx]
        add rdx,rax
        mov [rbx+4],ecx
        out 0x80,al
        dec ecx
        jnz 1b
        hlt"""
    )
    log = g.trace(reads=b"\1\0\0\0" * 100)
    assert len(log) == 300
    assert g.cpu.gpr(2) == 100
    assert [e[3] for e in log if e[0] == "w"] == [le(100 - i, 4) for i in range(100)]
