# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine: kicks, several vCPUs, changing memory and code, state."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmfs.cpu import layout
from kvmfs.cpu.cpu import EXIT_IO_OUT, EXIT_MMIO_READ, EXIT_NONE, EXIT_SVM
from kvmfs.cpu.engine import Engine
from tests.guest import CODE, MMIO, PT, RAM, Guest

LOOP = "start: mov rbx,0x20000\n1: lea rcx,[rcx+1]\n call f\n jmp 1b\n" + (
    "f: add qword ptr [rbx],1\n lock inc qword ptr [rbx+8]\n inc r8\n ret"
)


def test_1000_kicks_none_lost_none_doubled():
    g = Guest(LOOP)
    go = threading.Semaphore(0)
    late: list[float] = []

    def kicker() -> None:
        for i in range(1000):
            go.acquire()
            if i % 3:
                time.sleep(0.0002 * (i % 3))
            late.append(time.perf_counter())
            g.cpu.kick()

    thread = threading.Thread(target=kicker)
    thread.start()
    took = []
    for _ in range(1000):
        go.release()
        assert g.cpu.run() == EXIT_NONE
        took.append(time.perf_counter() - late[-1])
    thread.join()
    assert g.get(0x20000) == g.get(0x20008)
    assert g.cpu.gpr(8) - g.get(0x20000) in (0, -1)
    assert sorted(took)[500] < 0.01


def test_kick_before_run_and_clear():
    g = Guest("start: hlt")
    g.cpu.kick()
    g.cpu.kick()
    assert g.cpu.run() == EXIT_NONE
    g.hlt()
    g.cpu.rip = CODE
    g.cpu.kick()
    g.cpu.clear_kick()
    g.hlt()


def test_kick_completes_io_first():
    g = Guest("start: out 0x80,al\n hlt")
    assert g.cpu.run() == EXIT_IO_OUT
    g.cpu.kick()
    assert g.cpu.run() == EXIT_NONE
    assert g.cpu.rip == CODE + 2


def test_kicks_while_mmio_is_completed():
    g = Guest(f"start: mov ebx,{MMIO}\n1: mov eax,[rbx]\n add rdx,rax\n inc ecx\n jmp 1b")
    stop = False

    def kicker() -> None:
        while not stop:
            g.cpu.kick()
            time.sleep(0)

    thread = threading.Thread(target=kicker)
    thread.start()
    reads = 0
    while reads < 3000:
        if g.cpu.run() == EXIT_MMIO_READ:
            reads += 1
            g.cpu.data[:4] = b"\1\0\0\0"
    stop = True
    thread.join()
    g.cpu.complete()
    g.cpu.clear_kick()
    assert g.cpu.run() == EXIT_MMIO_READ
    assert g.cpu.gpr(2) == g.cpu.gpr(1) == 3000


def test_a_tight_loop_is_kicked_soon():
    g = Guest("start: jmp start")
    took = []
    for _ in range(20):
        at: list[float] = []
        timer = threading.Timer(0.002, lambda at=at: (at.append(time.perf_counter()), g.cpu.kick()))
        timer.start()
        assert g.cpu.run() == EXIT_NONE
        took.append(time.perf_counter() - at[0])
        timer.join()
    assert sorted(took)[10] < 0.005


_FIRST_ENGINE = """
import threading
from kvmfs.cpu.cpu import EXIT_IO_OUT, EXIT_NONE
from tests.guest import Guest

def heads():
    # Translations are the one memory that is writable and executable.
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            if " rwx" in line:
                memory.seek(int(line.split("-")[0], 16))
                found += memory.read(1 << 20).count(bytes.fromhex("837df000790be8"))
    return found

g = Guest("start: mov ecx, 1000\\n 1: dec ecx\\n jnz 1b\\n out 0x10, al\\n 2: jmp 2b")
assert g.cpu.run() == EXIT_IO_OUT
assert heads() > 0, "no block begins with cmpl $0,ICOUNT_DECR(%rbp); jns; call"
threading.Timer(0.05, g.cpu.kick).start()
assert g.cpu.run() == EXIT_NONE         # out of a loop that is nothing but such a block
"""


def test_blocks_look_themselves_whether_they_are_to_be_left():
    """In a process of its own: only the first engine's translations are within a near call of the helper."""
    done = subprocess.run([sys.executable, "-c", _FIRST_ENGINE], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_two_cpus_take_turns():
    g = Guest(LOOP + "\nother: mov rbx,0x21000\n2: inc qword ptr [rbx]\n lock inc qword ptr [0x20008]\n inc r8\n jmp 2b")
    other = Guest("start: hlt", engine=g.engine)
    a, b = g.cpu, other.cpu
    b.rip = g.sym["other"]
    assert (a.rip, a.gpr(4)) == (CODE, 0x8000)  # its state moved

    def run(cpu: object) -> None:
        assert cpu.run() == EXIT_NONE  # type: ignore[attr-defined]

    threads = [threading.Thread(target=run, args=(cpu,)) for cpu in (a, b)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert a.gpr(4) in (0x8000, 0x7FF8)  # readable meanwhile
    for cpu in (a, b):
        cpu.kick()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert g.get(0x20000) + g.get(0x21000) == g.get(0x20008) or abs(g.get(0x20000) + g.get(0x21000) - g.get(0x20008)) <= 2
    assert min(g.get(0x20000), g.get(0x21000)) > 1000
    assert b.gpr(8) - g.get(0x21000) in (0, -1)


def test_two_cpus_have_their_own_page_tables_and_io():
    g = Guest("start: mov rax,[0x30000]\n out 0x80,al\n in al,0x81\n hlt")
    other = Guest("start: hlt", engine=g.engine)
    for at in range(0x100000, 0x105000, 0x1000):
        g.ram[at + 0x10000 : at + 0x11000] = g.ram[at : at + 0x1000]
    for table in (0x110000, 0x111000, 0x112000):
        g.put(table, g.get(table) + 0x10000)
    g.put(PT + 0x10000 + 8 * 0x30, 0x31007)
    g.ram[0x30000], g.ram[0x31000] = 1, 2
    other.cpu.rip = CODE
    other.cpu.cr3 = 0x110000
    other.cpu.commit_state()
    for _ in range(20):
        for guest, value in ((g, 1), (other, 2)):
            guest.cpu.rip = CODE
            assert guest.cpu.run() == EXIT_IO_OUT
            assert guest.cpu.data[0] == value
        for guest, value in ((g, 3), (other, 4)):
            guest.cpu.run()
            guest.cpu.complete_io_in(bytes([value]))
        for guest, value in ((g, 3), (other, 4)):
            guest.hlt()
            assert guest.cpu.gpr(0) & 0xFF == value


def test_memory_can_change_while_a_cpu_runs():
    g = Guest(LOOP)
    more = mmap.mmap(-1, 0x1000)
    thread = threading.Thread(target=g.cpu.run)
    thread.start()
    for _ in range(20):
        g.engine.map(RAM, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(more)))
        g.engine.unmap(RAM, 0x1000)
        with g.engine.lock:
            before = g.get(0x20000)
            time.sleep(0.001)
            assert g.get(0x20000) == before
    g.cpu.kick()
    thread.join(5)
    assert not thread.is_alive()
    assert g.get(0x20000) > 0


def test_unmapped_memory_is_mmio_again_and_new_code_is_seen():
    g = Guest(f"start: mov ebx,{RAM}\n call rbx\n mov ecx,eax\n hlt")
    first, second = mmap.mmap(-1, 0x1000), mmap.mmap(-1, 0x1000)
    first[:6], second[:6] = b"\xb8\1\0\0\0\xc3", b"\xb8\2\0\0\0\xc3"
    for memory, value in ((first, 1), (second, 2), (first, 1)):
        g.cpu.rip = CODE
        g.cpu.cr2 = 0x1234
        g.engine.map(RAM, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        g.hlt()
        assert g.cpu.gpr(1) == value
        g.engine.unmap(RAM, 0x1000)
        assert g.cpu.cr2 == 0x1234
    g.cpu.rip = CODE
    assert g.trace()[-1][0] == "fetch"


def test_regions_are_checked():
    engine = Engine()
    memory = mmap.mmap(-1, 0x2000)
    host = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    engine.map(0, 0x2000, host)
    for gpa, size in ((0, 0x1000), (0x1000, 0x1000), (0x10, 0x1000), (0x4000, 0), (1 << 40, 0x1000)):
        with pytest.raises(ValueError, match="guest memory"):
            engine.map(gpa, size, host)
    with pytest.raises(ValueError, match="no region"):
        engine.unmap(0, 0x1000)
    engine.unmap(0, 0x2000)
    engine.map(0, 0x1000, host)
    engine.close()


def test_code_changed_from_outside():
    g = Guest("start: mov eax,1\n hlt")
    g.hlt()
    assert g.engine.is_code_page(CODE)
    assert not g.engine.is_code_page(0x20000)
    for value in range(2, 30):
        g.ram[CODE + 1] = value
        g.engine.invalidate(CODE, 1)
        g.cpu.rip = CODE
        g.hlt()
        assert g.cpu.gpr(0) == value
    second = mmap.mmap(-1, 0x1000)  # ram addresses are not guest addresses here
    second[:6] = b"\xb8\x41\0\0\0\xf4"
    g.engine.map(RAM + 0x100000, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(second)))
    for value in range(0x41, 0x50):
        second[1] = value
        g.engine.invalidate(RAM + 0x100000, 8)
        g.cpu.rip = RAM + 0x100000
        g.hlt()
        assert g.cpu.gpr(0) == value


def test_self_modifying_code():
    g = Guest(
        """start: mov edi,0x60000
 xor edx,edx
 mov ecx,50
1: mov byte ptr [rip+p+1],cl
p: mov eax,1
 add edx,eax
 mov byte ptr [rdi+q-0x10000+1],cl
 call q
 add edx,eax
 dec ecx
 jnz 1b
 hlt
q: mov eax,1
 ret"""
    )
    g.put(PT + 8 * 0x60, CODE | 7)  # an alias
    g.hlt()
    assert g.cpu.gpr(2) == 2 * sum(range(1, 51))


def test_stores_to_data_beside_code_work():
    g = Guest("start: xor ecx,ecx\n1: inc dword ptr [rip+d]\n inc ecx\n cmp ecx,20000\n jb 1b\n mov eax,[rip+d]\n hlt\nd: .long 0")
    g.hlt()
    assert g.cpu.gpr(0) == 20000


# --- state ---


def test_state_round_trip():
    g = Guest("start: hlt")
    cpu = g.cpu
    cpu.set_gprs(range(100, 116))
    assert cpu.get_gprs() == tuple(range(100, 116))
    for name in ("rip", "cr2", "cr3", "star", "lstar", "cstar", "fmask", "kernel_gs_base", "sysenter_esp", "sysenter_eip", "pat"):
        setattr(cpu, name, 0x123456789ABC)
        assert getattr(cpu, name) == 0x123456789ABC, name
    cpu.cr8, cpu.tsc_offset, cpu.tsc_aux = 9, -5, 7
    assert (cpu.cr8, cpu.tsc_offset, cpu.tsc_aux) == (9, (1 << 64) - 5, 7)
    for i in range(8):
        cpu.set_segment(i, 8 * i, 0x1000 * i, 0xFFFF + i, 0xA9B)
        assert cpu.segment(i) == (8 * i, 0x1000 * i, 0xFFFF + i, 0xA9B)
        cpu.set_dr(i, i)
        assert cpu.dr(i) == i
    cpu.gdt, cpu.idt = (0x1234, 0x77), (0x4321, 0x88)
    assert (cpu.gdt, cpu.idt) == ((0x1234, 0x77), (0x4321, 0x88))
    cpu.rflags = 0xED7
    assert cpu.rflags == 0xED7


def test_reset_state():
    cpu = Engine().create_cpu(0)
    assert (cpu.rip, cpu.rflags, cpu.cr0, cpu.efer, cpu.dr(6), cpu.dr(7)) == (0xFFF0, 2, 0x60000010, 0, 0xFFFF0FF0, 0x400)
    assert cpu.segment(1) == (0xF000, 0xFFFF0000, 0xFFFF, 0x9B)
    assert cpu.segment(7) == (0, 0, 0xFFFF, 0x8B)


def test_flags_are_folded_and_taken():
    g = Guest("start: mov eax,1\n cmp eax,2\n std\n hlt\n setc bl\n setz cl\n std\n cld\n hlt")
    g.hlt()
    assert g.cpu.rflags & 0xCD5 == 0x495 & 0xCD5
    g.cpu.rflags = 0x42  # ZF
    g.cpu.skip_instruction(1)
    g.hlt()
    assert (g.cpu.gpr(3) & 1, g.cpu.gpr(1) & 1) == (0, 1)


def test_fxsave_is_what_the_guest_sees():
    g = Guest(
        """start: fninit
 fld1
 fldpi
 mov dword ptr [0x20200],0x7f80
 ldmxcsr [0x20200]
 movabs rax,0x1122334455667788
 movq xmm3,rax
 movq xmm12,rax
 fxsave64 [0x20000]
 hlt
 fxrstor64 [0x21000]
 fstp qword ptr [0x20300]
 movq rbx,xmm3
 mov eax,3
 cvtsi2sd xmm0,eax
 stmxcsr [0x20208]
 hlt"""
    )
    g.hlt()
    image = bytearray(g.ram[0x20000:0x20200])
    mine = bytearray(g.cpu.fxsave())
    image[8:24] = mine[8:24] = bytes(16)  # addresses of the last x87 instruction: the engine's FXSAVE writes zeros
    assert bytes(mine)[:288] == bytes(image)[:288]
    g.cpu.fxrstor(bytes(mine))
    assert g.cpu.fxsave()[32:416] == mine[32:416]
    g.ram[0x21000:0x21200] = g.cpu.fxsave()
    g.cpu.skip_instruction(1)
    g.hlt()
    assert g.cpu.gpr(3) == 0x1122334455667788
    assert g.get(0x20208, 4) == 0x7F80
    with pytest.raises(ValueError, match="512"):
        g.cpu.fxrstor(b"")


def test_insn_bytes_and_translate():
    g = Guest("start: nop\n mov eax,5\n hlt")
    assert g.cpu.insn_bytes(4) == b"\x90\xb8\x05\x00"
    g.put(PT + 8 * 0x60, 0x23007)
    assert g.cpu.translate(0x60123) == 0x23123
    assert g.cpu.translate(0x50000) is None
    Guest("start: hlt", engine=g.engine)
    assert g.cpu.insn_bytes(4) == b"\x90\xb8\x05\x00"
    assert g.cpu.translate(0x60123) == 0x23123


def test_tsc_offset():
    g = Guest("start: rdtsc\n hlt")
    g.hlt()
    first = g.cpu.gpr(2) << 32 | g.cpu.gpr(0)
    g.cpu.tsc_offset = 1 << 50
    g.cpu.rip = CODE
    g.hlt()
    assert (1 << 50) < (g.cpu.gpr(2) << 32 | g.cpu.gpr(0)) - first < (1 << 50) + 10**11


def test_another_unicorn_is_refused(monkeypatch):
    monkeypatch.setattr(layout.importlib.metadata, "version", lambda _name: "2.2.0")
    with pytest.raises(layout.LayoutError, match=r"2\.1\.4.*2\.2\.0"):
        layout.load.__wrapped__()


def test_many_engines():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        engine = Engine()
        engine.create_cpu(0)
        engine.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    g = Guest("start: cpuid\n hlt")
    assert g.cpu.run() == EXIT_SVM


def test_spinning_with_pause_gives_the_engine_away():
    g = Guest("start: pause\n cmp byte ptr [0x20000],0\n je start\n hlt\nother: mov byte ptr [0x20000],1\n hlt")
    other = Guest("start: hlt", engine=g.engine)
    other.cpu.rip = g.sym["other"]
    thread = threading.Thread(target=g.hlt)
    thread.start()
    time.sleep(0.05)
    other.hlt()
    thread.join(5)
    assert not thread.is_alive()


def test_second_cpu_is_created_while_the_first_runs():
    g = Guest(LOOP)
    thread = threading.Thread(target=g.cpu.run)
    thread.start()
    time.sleep(0.02)
    other = Guest("start: hlt", engine=g.engine)
    other.cpu.rip = g.sym["h_def"]
    other.hlt()
    g.cpu.kick()
    thread.join(5)
    assert not thread.is_alive()
    assert g.cpu.gpr(8) - g.get(0x20000) in (0, -1)
    assert g.cpu.gpr(8) > 100


def test_an_engine_made_ahead_works_in_each_fork():
    ours = Engine()
    ours.make_ahead()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                page = mmap.mmap(-1, 4096)
                page[:3] = b"\xe6\x80\xf4"                      # out 0x80, al
                ours.map(0, 4096, ctypes.addressof(ctypes.c_char.from_buffer(page)))
                cpu = ours.create_cpu(0)
                cpu.set_segment(1, 0, 0, 0xFFFF, 0x9B)
                cpu.rip = 0
                cpu.commit_state()
                status = 0 if cpu.run() == EXIT_IO_OUT and cpu.exit.port == 0x80 and ours.create_cpu(1) is not cpu else 2
            os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert ours.create_cpu(0) is not ours.create_cpu(1)


@pytest.mark.parametrize("instruction", ["0xdd, 0xcb", "0xd9, 0xe8", "0x0f, 0xae, 0xf0"])
def test_pages_full_of_instructions_with_temporaries(instruction):
    """The translator does not give all of them back; a block ends before it has too many."""
    g = Guest(f"start: .rept 1500\n .byte {instruction}\n .endr\n mov eax,7\n hlt")
    g.hlt()
    assert g.cpu.gpr(0) == 7
