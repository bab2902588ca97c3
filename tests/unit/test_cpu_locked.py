# SPDX-License-Identifier: GPL-2.0-or-later
"""LOCK: against a thread of the client that stores into the same bytes; operands that no host instruction does atomically."""

from __future__ import annotations

import threading
import time

import pytest

from tests.guest import MMIO, Guest

FLAG, STOP, COUNT = 0x200000, 0x200040, 0x200080
ROUNDS = 2000


def test_a_clients_store_is_not_lost():
    """The guest takes the flag by CMPXCHG, which writes also when it fails, as often as it was given."""
    guest = Guest(f"""
    start:
        mov al, 1
        xor ecx, ecx
        lock cmpxchg [{FLAG}], cl
        jne again
        inc dword ptr [{COUNT}]
    again:
        cmp byte ptr [{STOP}], 0
        je start
        hlt
    """)
    runner = threading.Thread(target=guest.hlt)
    runner.start()
    try:
        deadline = time.monotonic() + 60
        for _ in range(ROUNDS):
            guest.ram[FLAG] = 1
            while guest.ram[FLAG] and time.monotonic() < deadline:
                pass
    finally:
        guest.ram[STOP] = 1
        runner.join(60)
    assert not runner.is_alive() and guest.get(COUNT, 4) == ROUNDS


OPERATIONS = {
    "add": ("lock add [{at}], rax", 5 + 3), "or": ("lock or [{at}], rax", 5 | 3), "and": ("lock and [{at}], rax", 5 & 3),
    "xor": ("lock xor [{at}], rax", 5 ^ 3), "sub": ("lock sub [{at}], rax", 5 - 3), "inc": ("lock inc qword ptr [{at}]", 6),
    "dec": ("lock dec qword ptr [{at}]", 4), "neg": ("lock neg qword ptr [{at}]", -5), "not": ("lock not qword ptr [{at}]", ~5),
    "xadd": ("lock xadd [{at}], rax", 8), "xchg": ("xchg [{at}], rax", 3), "bts": ("lock bts qword ptr [{at}], 3", 13),
    "btr": ("lock btr qword ptr [{at}], 0", 4), "btc": ("lock btc qword ptr [{at}], 1", 7),
    "cmpxchg": ("mov rbx, rax; mov eax, 5; lock cmpxchg [{at}], rbx", 3),
}


@pytest.mark.parametrize("at", [FLAG, FLAG + 1, FLAG + 0x3E, FLAG + 0xFFB], ids=["aligned", "unaligned", "two lines", "two pages"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operands(operation, at):
    code, expected = OPERATIONS[operation]
    guest = Guest(f"start: mov eax, 3; mov qword ptr [{at}], 5; {code.format(at=at)}; hlt")
    guest.hlt()
    assert guest.get(at) == expected & (1 << 64) - 1


@pytest.mark.parametrize("operation", ["add", "xadd", "xchg", "bts", "cmpxchg"])
def test_mmio(operation):
    """The client is asked for what is there, and told what becomes of it."""
    code, expected = OPERATIONS[operation]
    guest = Guest(f"start: mov eax, 3; mov ebx, {MMIO}; {code.format(at='rbx')}; hlt" if operation != "cmpxchg" else
                  f"start: mov ecx, 3; mov eax, 5; mov ebx, {MMIO}; lock cmpxchg [rbx], rcx; hlt")
    log = guest.trace(reads=(5).to_bytes(8, "little"))
    assert (expected & (1 << 64) - 1).to_bytes(8, "little") in [field for entry in log for field in entry], log
