# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty logging: exactly the pages that the guest, its page walks and the machine write."""

import struct
from functools import partial

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.abi.exits import KVM_EXIT_HLT, KVM_EXIT_IO
from kvmfs.kvm import dirty_log
from kvmfs.kvm.kvm_main import VM_INODE
from tests.unit.fake_client import ARG
from tests.unit.machine import CODE, RAM, error, machines

LOG = 1
PAGES = RAM >> 12


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    with machines() as make:
        yield partial(make, request.param)


def get(m, slot=0, address=ARG):
    """(errno, the dirty pages)."""
    m.host.memory.raw[:] = bytes(len(m.host.memory.raw))
    result, _ = m.ioctl(VM_INODE, K.KVM_GET_DIRTY_LOG, 1, struct.pack("<IIQ", slot, 0, address))
    bits = int.from_bytes(m.host.memory.raw, "little")
    return result, [i for i in range(bits.bit_length()) if bits >> i & 1]


def clear(m, first, count, pages=(), slot=0, address=ARG):
    m.host.memory.write(ARG, sum(1 << i - first for i in pages).to_bytes(4096, "little"))
    return m.ioctl(VM_INODE, K.KVM_CLEAR_DIRTY_LOG, 1, struct.pack("<IIQQ", slot, count, first, address))[0]


STORES = """
again:
    mov byte ptr [0x2000], al
    mov dword ptr [0x3ffe], eax     # into page 4, too
    mov bl, byte ptr [0x6000]
    inc word ptr [0x7000]
    hlt
    mov byte ptr [0x2001], al
    hlt
    jmp again
"""


def run_to_hlt(m):
    assert m.run() == 0 and m.reason == KVM_EXIT_HLT


def test_get(machine):
    m = machine(STORES)
    assert get(m) == (error("ENOENT"), [])
    run_to_hlt(m)
    assert m.region(0, LOG, 0, RAM, 0) == 0
    assert get(m) == (0, [])
    run_to_hlt(m)
    assert get(m) == (0, [2])
    assert get(m) == (0, [])
    run_to_hlt(m)
    assert get(m) == (0, [2, 3, 4, 7])
    m.write(0x9000, b"the client's")
    run_to_hlt(m)
    m.vm.memslots.write(0xAFFF, b"ab")
    assert get(m) == (0, [2, 10, 11])
    assert m.region(0, 0, 0, RAM, 0) == 0
    run_to_hlt(m)
    assert get(m) == (error("ENOENT"), [])
    assert m.region(0, LOG, 0, RAM, 0) == 0
    run_to_hlt(m)
    assert get(m) == (0, [2])


def test_first_access_in_a_new_slot(machine):
    """Linux maps what the guest comes to writable, and calls it dirty: code, and what is only read, too."""
    m = machine(STORES)
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, LOG, 0, RAM, 0) == 0
    m.vm.memslots.read(0x9000, 8)       # the machine's own reads map nothing
    run_to_hlt(m)
    assert get(m) == (0, [2, 3, 4, 6, 7, CODE >> 12])
    assert get(m) == (0, [])
    run_to_hlt(m)
    assert get(m) == (0, [2])
    run_to_hlt(m)                       # the loop again: nothing is new
    assert get(m) == (0, [2, 3, 4, 7])


def test_errors(machine):
    m = machine(STORES)
    assert get(m, 32764) == get(m, 1 << 16) == (error("EINVAL"), [])
    assert get(m, 1) == (error("ENOENT"), [])
    m.region(0, LOG, 0, RAM, 0)
    run_to_hlt(m)
    assert get(m, address=8) == (error("EFAULT"), [])
    assert get(m) == (0, [])            # what could not be told is lost, as in Linux
    assert clear(m, 0, 64, slot=1 << 16) == clear(m, 0, 64, slot=32764) == error("EINVAL")
    assert clear(m, 1, 64, slot=1) == error("EINVAL")
    assert clear(m, 0, 64, slot=1) == error("ENOENT")
    assert clear(m, PAGES + 64, 0) == clear(m, 0, PAGES + 1) == clear(m, 0, 63) == clear(m, 64, PAGES) == error("EINVAL")
    assert clear(m, 0, 64, address=8) == error("EFAULT")
    assert clear(m, PAGES, 0, address=8) == clear(m, 0, 0, address=8) == 0
    for options in (2, 4, 5):
        with pytest.raises(OSError):
            dirty_log.set_manual_protect(m.vm.memslots, options)


def test_manual_protect(machine):
    m = machine(STORES)
    dirty_log.set_manual_protect(m.vm.memslots, 1)
    m.region(0, LOG, 0, RAM, 0)
    run_to_hlt(m)
    assert get(m) == get(m) == (0, [2, 3, 4, 7])
    assert clear(m, 0, 64, [2, 3, 9]) == 0
    assert get(m) == (0, [4, 7])
    run_to_hlt(m)
    assert get(m) == (0, [2, 4, 7])
    assert clear(m, 64, PAGES - 64, [70]) == 0
    assert clear(m, 0, PAGES, range(PAGES)) == 0
    assert get(m) == (0, [])


def test_initially_set(machine):
    m = machine(STORES)
    dirty_log.set_manual_protect(m.vm.memslots, 3)
    m.region(0, LOG, 0, RAM, 0)
    assert get(m) == (0, list(range(PAGES)))
    assert clear(m, 0, PAGES, set(range(PAGES)) - {8}) == 0
    run_to_hlt(m)
    assert get(m) == (0, [2, 3, 4, 7, 8])


def test_moved_slot_keeps_its_log(machine):
    m = machine(STORES)
    assert m.region(1, LOG, RAM, 0x3000, 0) == 0
    m.vm.memslots.write(RAM + 0x1000, b"x")
    assert m.region(1, LOG, 2 * RAM, 0x3000, 0) == 0
    m.vm.memslots.write(2 * RAM + 0x2000, b"x")
    assert get(m, 1) == (0, [1, 2])


def test_holes_in_a_slot(machine):
    m = machine(holes=(0x4000,))
    assert m.region(0, LOG, 0, RAM, 0) == 0
    m.vm.memslots.write(0x5000, b"x")
    assert get(m) == (0, [5])


PAGING = """
    lgdt [gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    ljmp 8, start
    .code32
start:
    mov ax, 16
    mov ds, ax
    mov eax, 0x10000
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    hlt
    mov al, byte ptr [0x20000]      # sets A in the entry
    hlt
    mov byte ptr [0x20000], al      # sets D, writes
    hlt
    mov byte ptr [0x20001], al
    hlt
    mov al, byte ptr [0x400000]     # sets A in the directory; the table has nothing
    hlt
    .align 8
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr: .word 23
    .long gdt
"""


def test_page_walk(machine):
    m = machine(PAGING)
    entries = [(i << 12) | (0x23 if i in (8,) else 3) for i in range(1024)]
    m.write(0x11000, struct.pack("<1024I", *entries))
    m.write(0x10000, struct.pack("<2I", 0x11023, 0x12003))
    m.write(0x12000, bytes(4096))
    run_to_hlt(m)
    m.region(0, LOG, 0, RAM, 0)
    run_to_hlt(m)
    assert get(m) == (0, [0x11])
    run_to_hlt(m)
    assert get(m) == (0, [0x11, 0x20])
    run_to_hlt(m)
    assert get(m) == (0, [0x20])
    m.run()                             # a triple fault: there is no IDT, and page 0 is read to find that out
    assert get(m) == (0, [0x10, 0x11])


def test_string_io_and_stack(machine):
    m = machine("push ax; mov di, 0x5000; mov dx, 0x10; insb; hlt")
    m.region(0, LOG, 0, RAM, 0)
    assert m.run() == 0 and m.reason == KVM_EXIT_IO
    assert get(m) == (0, [5, 6])        # the engine tries the destination before it asks
    run_to_hlt(m)
    assert get(m) == (0, [5])


def test_two_vcpus(machine):
    m = machine(STORES)
    m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)
    m.region(0, LOG, 0, RAM, 0)
    run_to_hlt(m)
    assert get(m) == (0, [2, 3, 4, 7])
