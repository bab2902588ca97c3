# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that is written by others than the guest: what runs afterwards is the new code."""

import threading
import time

import pytest

from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_IO
from tests.guest import CODE, Guest
from tests.unit.machine import CODE as MACHINE_CODE
from tests.unit.machine import RAM, Machine

FAR = 0x200000


def again(g):
    """Run from the start as after an exit to the client; eax."""
    g.cpu.suspect_code()
    g.cpu.rip = 0 if g.mode == "real" else CODE
    g.hlt()
    return g.cpu.gpr(0)


@pytest.mark.parametrize("mode", ["real", "pm32", "pm32pg", "pae", "long"])
def test_every_new_code_is_seen(mode):
    g = Guest("start: mov eax,1\n nop\n hlt", mode)
    at = CODE + (2 if mode == "real" else 1)
    for value in range(1, 60):
        g.ram[at] = value
        assert again(g) == value


def test_without_suspicion_nothing_is_compared():
    """The test's own teeth: the translation is really there."""
    g = Guest("start: mov eax,1\n hlt")
    assert again(g) == 1
    g.ram[CODE + 1] = 2
    g.cpu.rip = CODE
    g.hlt()
    assert g.cpu.gpr(0) == 1
    assert again(g) == 2


def test_data_of_the_page_is_read_before_its_code():
    g = Guest(f"start: mov ebx,{FAR}\n mov ecx,[rbx+0x100]\n mov [rbx+0x104],ecx\n call rbx\n hlt")
    g.ram[FAR:FAR + 6] = b"\xb8\1\0\0\0\xc3"
    for value in range(1, 20):
        g.ram[FAR + 1] = value
        assert again(g) == value


def test_a_change_and_back():
    g = Guest("start: mov eax,1\n hlt")
    for value in (1, 2, 1, 3, 1, 2):
        g.ram[CODE + 1] = value
        assert again(g) == value


@pytest.mark.parametrize("pages", [2, 7, 8, 9, 40])
def test_code_in_many_pages(pages):
    g = Guest(f"start: xor eax,eax\n mov ebx,{FAR}\n jmp rbx")
    for i in range(pages):                          # add eax,imm32; add ebx,0x1000; jmp rbx
        last = i == pages - 1
        code = b"\x05\1\0\0\0\x81\xc3\0\x10\0\0" + (b"\xf4" if last else b"\xff\xe3")
        g.ram[FAR + 0x1000 * i:FAR + 0x1000 * i + len(code)] = code
    assert again(g) == pages
    expected = pages
    for i in (0, pages - 1, pages // 2, 0):
        g.ram[FAR + 0x1000 * i + 1] += 2
        expected += 2
        assert again(g) == expected


def test_the_second_page_of_an_instruction():
    """mov eax,imm32 begins in one page, its immediate is in the next; it is reached from its own page, and from afar."""
    g = Guest(f"start: mov ebx,{FAR + 0xFF0}\n jmp rbx")
    code = b"\x90" * 4 + b"\xeb\x00" + b"\x90" * 9 + b"\xb8\1\0\0\0\xf4"    # the opcode is the page's last byte
    g.ram[FAR + 0xFF0:FAR + 0xFF0 + len(code)] = code
    for value in range(1, 20):
        g.ram[FAR + 0x1000] = value
        assert again(g) == value
    g.ram[FAR + 0x1004] = 0x90
    g.ram[FAR + 0x1005] = 0xF4
    assert again(g) == 19


def test_data_beside_code():
    """The guest and the client both write into the page of code."""
    g = Guest("start: inc dword ptr [rip+count]\n mov eax,[rip+count]\n add eax,1\nadd_end: hlt\n .balign 64\ncount: .long 0")
    for i in range(1, 50):
        if i % 7 == 0:
            g.ram[g.sym["add_end"] - 1] += 1
        assert again(g) == i + 1 + i // 7


def test_an_interrupt_is_a_reason_to_look():
    """A device has written code and then says so; the vCPU never left to its client."""
    g = Guest(f"start: mov ebx,{FAR}\n call rbx\n hlt\nh48: call rbx\n hlt")
    g.ram[FAR:FAR + 6] = b"\xb8\1\0\0\0\xc3"
    g.hlt()
    assert g.cpu.gpr(0) == 1
    for value in range(2, 12):
        g.ram[FAR + 1] = value
        g.cpu.rflags |= 0x200
        g.cpu.inject_interrupt(48)
        g.hlt()
        assert g.cpu.gpr(0) == value


def test_several_cpus():
    g = Guest("start: mov eax,1\n hlt")
    other = Guest("start: mov eax,1\n hlt", engine=g.engine)
    for value in range(1, 30):
        g.ram[CODE + 1] = value
        for cpu in (g, other) if value & 1 else (other, g):
            cpu.cpu.suspect_code()
            cpu.cpu.rip = CODE
            while cpu.cpu.run() != 1:
                pass
            assert cpu.cpu.gpr(0) == value


def test_the_guest_writes_code_and_the_client_writes_it_back():
    g = Guest("""start: mov byte ptr [rip+f+1],2
 jmp 1f
1: call f
 hlt
next: call f
 hlt
 .balign 64
f: mov eax,1
 ret""")
    for _ in range(5):
        assert again(g) == 2
        g.ram[g.sym["f"] + 1] = 1
        g.cpu.suspect_code()
        g.cpu.rip = g.sym["next"]
        g.hlt()
        assert g.cpu.gpr(0) == 1


@pytest.mark.parametrize("hint", ["pause", ""])
def test_while_the_guest_runs(hint):
    """The guest looks at a word of memory and at nothing else; PAUSE only makes it see new code sooner."""
    g = Guest(f"""start: mov ebx,{FAR}
1: {hint}
 call rbx
 mov [0x20000],eax
 cmp eax,99
 jne 1b
 hlt""")
    g.ram[FAR:FAR + 6] = b"\xb8\1\0\0\0\xc3"
    thread = threading.Thread(target=g.hlt)
    thread.start()
    for value in (1, 2, 3, 2, 99):
        g.ram[FAR + 1] = value
        deadline = time.monotonic() + 20
        while g.get(0x20000, 4) != value and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert g.get(0x20000, 4) == value
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("vendor", ["amd", "intel"])
@pytest.mark.parametrize("second", ["same", "within", "after a move"])
def test_code_is_written_through_an_alias(vendor, second):
    """Two slots show the same memory; the guest writes through one what it executes through the other."""
    m = Machine(vendor, """mov cx, 200
1: mov [0x4001], cl
 call 0xc000
 cmp al, cl
 jne bad
 loop 1b
bad: hlt""")
    m.write(0x4000, b"\xb0\0\xc3")
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, 0, 0, 0xC000, 0) == 0
    if second == "within":
        assert m.region(1, 0, 0xC000, 0x2000, 0x4000) == 0
    else:
        at = 0x20000 if second == "after a move" else 0xC000
        assert m.region(1, 0, at, 0x1000, 0x4000) == 0
        assert m.region(1, 0, 0xC000, 0x1000, 0x4000) == 0
    for _ in range(2):
        m.set_regs(rip=MACHINE_CODE, rsp=0x7000)
        assert (m.run(), m.reason, m.regs()["rcx"]) == (0, KVM_EXIT_HLT, 0)
    m.close()


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_between_two_runs(vendor):
    m = Machine(vendor, "1: mov al,1; out 0x10,al; jmp 1b")
    for value in range(1, 40):
        m.write(MACHINE_CODE + 1, bytes([value]))
        assert m.run() == 0
        assert m.reason == KVM_EXIT_IO
        assert m.io()[4] == bytes([value])
    m.write(MACHINE_CODE, b"\xf4")
    assert (m.run(), m.reason) == (0, KVM_EXIT_HLT)
    m.close()


@pytest.mark.parametrize("handled", ["cpuid", "mov ecx, 0x10; rdmsr", "mov ecx, 0x1b; rdmsr"])
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_exits_that_are_handled_in_here(vendor, handled):
    """The client is not asked, and the guest never stays in for long; CPUID makes it see new code at once."""
    m = Machine(vendor, f"1: {handled}; code: mov ax, 1; cmp ax, 1; je 1b; hlt")
    patcher = threading.Timer(0.05, m.write, (m.symbols["code"] + 1, b"\x77"))
    patcher.start()
    started = time.monotonic()
    assert (m.run(), m.reason, m.regs()["rax"] & 0xFFFF) == (0, KVM_EXIT_HLT, 0x77)
    assert time.monotonic() - started < 3       # 10 ms, when it gets a CPU
    patcher.join()
    m.close()


def test_one_memory_in_two_slots():
    """What the guest or a device writes through one address is executed at the other, after an exit between."""
    m = Machine("amd", "start: inc byte ptr [0x1001 + code - start]; hlt; code: mov al, 0; hlt; jmp start")
    assert m.region(1, 0, RAM, 0x10000, 0) == 0
    sregs = m.sregs()
    sregs.ds.base = RAM + MACHINE_CODE - 0x1000
    assert m.set_sregs(sregs) == 0
    for value in (1, 2, 3):
        assert m.run() == m.run() == 0
        assert m.regs()["rax"] & 0xFF == value
    assert m.run() == 0
    m.vm.memslots.write(RAM + m.symbols["code"] + 1, b"\x63")
    assert m.run() == 0
    assert m.regs()["rax"] & 0xFF == 0x63
    m.close()
