# SPDX-License-Identifier: GPL-2.0-or-later
"""Slots with a guest's page tables, and with the stack that its interrupts use: the CPU's own accesses follow."""

import random
import struct
from functools import partial

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_IO
from kvmfs.kvm.kvm_main import VM_INODE
from tests.unit.fake_client import ARG
from tests.unit.machine import RAM, machines
from tests.unit.test_kvm_instructions_long import TABLES, LongMachine

LOG, READONLY = 1, 2
# Guest physical, physical, linear.  Page 0, with the GDT, has another place in the TLB.
TABLE, STACK, LOOKED_AT = 0x200000, 0x403000, 0x605000
ENTRY = LOOKED_AT >> 9 & 0xFF8
TABLE_SLOT, STACK_SLOT, OTHERS = 1, 2, range(10, 60)
MEMORY = {0xAAAA: 0x40000, 0xBBBB: 0x50000, 0xCCCC: 0x60000}   # what the page has that the table there leads to
STACKS = (0x70000, 0x71000)
ACCESSED = 0x20
SEEN, FAULT = 1, 2

# rbx: what the TLB has goes first.
SOURCE = f"""
again: test ebx, ebx
 je 1f
 mov rax, cr3
 mov cr3, rax
1: int 0x80
 mov eax, [{LOOKED_AT:#x}]
 mov ebp, {SEEN}
 out 0xf4, al
 jmp again
over_code: mov rdx, rsp
 mov rsp, rbx
 int 0x80
 mov rsp, rdx
 mov dword ptr [{STACK + 0xAA:#x}], 0xc30704    # add al, 7; ret
 mov eax, 0x3000
 call {STACK + 0xAA:#x}
 mov ecx, eax
 mov rsp, rbx
 int 0x80                                       # its frame makes that add [rax], al, three times, before the saved rsp: ret
 mov rsp, rdx
 mov eax, 0x3000
 call {STACK + 0xAA:#x}
 out 0xf4, al
over_two: mov byte ptr [r8], 0                  # both pages are in the TLB
 mov byte ptr [r8 + 0x1ff0], 0
1: .byte 0x48, 0xff, 0x1c, 0x25; .long target   # call far [target], of 64 bits
returned: inc ecx
 cmp ecx, 3
 jne 1b
 mov ebp, 1
 out 0xf4, al
back: .byte 0x48, 0xcb                          # retf
target: .quad back
 .word 8
vec_80: iretq
vec_0e: mov ebp, {FAULT}
 out 0xf4, al
 hlt
"""


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    with machines() as make:
        m = make(request.param, SOURCE, cls=LongMachine)
        m.write(TABLES + 0x2000 + 8 * (LOOKED_AT >> 21), struct.pack("<Q", TABLE | 7))
        for value, at in MEMORY.items():
            m.write(at + ENTRY, struct.pack("<Q", at + 0x1000 | 3 | ACCESSED))
            m.write(at + 0x1000, struct.pack("<I", value))
        yield m


def look(m, flush=True):
    """rax, or None for a page fault; and where the interrupt's frame was."""
    for at in STACKS:
        m.write(at, bytes(4096))
    m.set_regs(rip=m.symbols["again"], rsp=STACK + 0x1000, rbx=int(flush))
    assert m.run_within() == 0 and m.reason == KVM_EXIT_IO
    regs = m.regs()
    frames = [at for at in STACKS if any(m.read(at, 4096))]
    return regs["rax"] if regs["rbp"] == SEEN else None, frames


def dirty(m, slot):
    m.host.memory.raw[:] = bytes(len(m.host.memory.raw))
    assert m.ioctl(VM_INODE, K.KVM_GET_DIRTY_LOG, 1, struct.pack("<IIQ", slot, 0, ARG))[0] == 0
    return int.from_bytes(m.host.memory.raw, "little")


def test_slots_come_go_and_move(machine):
    """Page walks and frames, among slots that are put in the order of their addresses before and behind."""
    m, rng = machine, random.Random(1)
    there, log, value, stack = {}, False, 0xAAAA, STACKS[0]
    assert m.region(TABLE_SLOT, 0, TABLE, 0x1000, MEMORY[value]) == m.region(STACK_SLOT, 0, STACK, 0x1000, stack) == 0
    for _ in range(120):
        match rng.randrange(5):
            case 0:                     # another table in its place
                if value:
                    assert m.region(TABLE_SLOT, 0, 0, 0, 0) == 0
                value, log = rng.choice([*MEMORY, None]), rng.choice([0, LOG, READONLY])
                if value:
                    assert m.region(TABLE_SLOT, log, TABLE, 0x1000, MEMORY[value]) == 0
            case 1 if value:            # it moves away, and back
                assert m.region(TABLE_SLOT, log, TABLE + RAM, 0x1000, MEMORY[value]) == 0
                assert look(m) == (None, [stack])
                assert m.region(TABLE_SLOT, log, TABLE, 0x1000, MEMORY[value]) == 0
            case 2:
                stack = rng.choice(STACKS)
                assert m.region(STACK_SLOT, 0, 0, 0, 0) == 0
                assert m.region(STACK_SLOT, 0, STACK, 0x1000, stack) == 0
            case _:
                for slot in rng.sample(OTHERS, 8):
                    gpa = RAM + 0x2000 * rng.randrange(0x400)
                    if there.pop(slot, None) is not None:
                        assert m.region(slot, 0, 0, 0, 0) == 0
                    elif gpa not in (TABLE, TABLE + RAM, STACK, *there.values()):
                        assert m.region(slot, 0, gpa, 0x1000, 0xF0000) == 0
                        there[slot] = gpa
        assert look(m, flush=rng.random() < 0.5) == (value, [stack])
    assert len(there) > 10


def test_the_tables_slot_is_logged(machine):
    """Each accessed bit that a walk sets makes its page dirty, and where it is one already a walk writes nothing."""
    m, at = machine, MEMORY[0xAAAA]
    entry = partial(m.read, at + ENTRY, 1)
    assert m.region(STACK_SLOT, 0, STACK, 0x1000, STACKS[0]) == 0
    assert m.region(TABLE_SLOT, LOG, TABLE, 0x1000, at) == 0
    assert look(m)[0] == 0xAAAA and dirty(m, TABLE_SLOT) in (0, 1)      # the first look at a page of a slot
    for clear in (True, False, True):
        m.write(at + ENTRY, bytes([3 if clear else 3 | ACCESSED]))
        assert look(m)[0] == 0xAAAA
        assert (entry(), dirty(m, TABLE_SLOT)) == (bytes([3 | ACCESSED]), int(clear))


def test_the_stacks_slot_is_logged(machine):
    """The frame is a store like others, also where the TLB has the page."""
    m = machine
    assert m.region(TABLE_SLOT, 0, TABLE, 0x1000, MEMORY[0xBBBB]) == 0
    assert m.region(STACK_SLOT, LOG, STACK, 0x1000, STACKS[0]) == 0
    for flush in (True, False, False, True, False):
        assert look(m, flush) == (0xBBBB, [STACKS[0]])
        assert dirty(m, STACK_SLOT) == 1
    assert dirty(m, STACK_SLOT) == 0
    assert m.region(STACK_SLOT, 0, STACK, 0x1000, STACKS[0]) == 0       # no more
    assert look(m, False) == (0xBBBB, [STACKS[0]])


def test_a_frame_does_not_go_into_a_read_only_slot(machine):
    m = machine
    assert m.region(TABLE_SLOT, 0, TABLE, 0x1000, MEMORY[0xBBBB]) == 0
    assert m.region(STACK_SLOT, 0, STACK, 0x1000, STACKS[0]) == 0
    assert look(m) == (0xBBBB, [STACKS[0]])
    assert m.region(STACK_SLOT, 0, 0, 0, 0) == 0
    assert m.region(STACK_SLOT, READONLY, STACK, 0x1000, STACKS[1]) == 0
    for at in STACKS:
        m.write(at, bytes(4096))
    m.set_regs(rip=m.symbols["again"], rsp=STACK + 0x1000, rbx=0)
    assert m.run_within() in (0, -5) and m.reason != KVM_EXIT_IO
    assert not any(any(m.read(at, 4096)) for at in STACKS)


def test_a_frame_over_code(machine):
    """What was translated of the stack's page is not executed once a frame is there."""
    m = machine
    assert m.region(STACK_SLOT, 0, STACK, 0x1000, STACKS[0]) == 0
    m.set_regs(rip=m.symbols["over_code"], rsp=0x7000, rbx=STACK + 0xC3)
    assert m.run_within() == 0 and m.reason == KVM_EXIT_IO
    regs = m.regs()
    assert (regs["rcx"], regs["rax"]) == (0x3007, 0x3000)


def test_a_frame_over_two_pages(machine):
    """Neighbours for the guest only: a far call's and a far return's words may have a half in each."""
    m = machine
    first, second = (MEMORY[value] + 0x1000 for value in (0xBBBB, 0xCCCC))
    assert m.region(TABLE_SLOT, 0, TABLE, 0x1000, MEMORY[0xBBBB]) == 0
    m.write(MEMORY[0xBBBB] + ENTRY, struct.pack("<2Q", first | 3, second | 3))
    for at in (first, second, first + 0x1000):
        m.write(at, b"\xff" * 4096)
    m.set_regs(rip=m.symbols["over_two"], rsp=LOOKED_AT + 0x1004, rcx=0, r8=LOOKED_AT, rbp=0)
    assert m.run_within() == 0 and m.reason == KVM_EXIT_IO
    regs = m.regs()
    assert (regs["rbp"], regs["rcx"]) == (SEEN, 3)
    assert m.read(first + 0xFF4, 12) == struct.pack("<QI", m.symbols["returned"], 8)
    assert (m.read(second, 8), m.read(first + 0x1000, 8)) == (b"\0\0\0\0\xff\xff\xff\xff", b"\xff" * 8)
