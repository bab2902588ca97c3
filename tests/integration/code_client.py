# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that changes its guest's code by every way there is to memory: ``code_client.py NODE``, see test_code.py."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from client import EXIT_HLT, EXIT_IO, RUN, Guest

SET_GUEST_DEBUG, EXIT_DEBUG, ENABLE_SW = 0x4048AE9B, 4, 0x10001
FUNCTION, MAILBOX = 0x2000, 0x3000
LOOP = b"\xe8\xfd\x1f\xa2\x00\x30\xeb\xf8"      # 1: call FUNCTION; mov [MAILBOX], al; jmp 1b
EXITS = b"\xe8\xfd\x1f\xe6\x10\xeb\xf9"         # 1: call FUNCTION; out 0x10, al; jmp 1b
RETURNS = b"\xb0\x00\xc3"                       # mov al, 0; ret


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def in_a_child(write: Callable[[int], None]) -> None:
    """As another process does it; ``write`` gets our pid."""
    us = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            write(us)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


class Ways:
    """Each method writes bytes to an address in guest memory."""

    def __init__(self, guest: Guest) -> None:
        self.memory = guest.memory
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(guest.memory))

    def store(self, at: int, data: bytes) -> None:
        self.memory[at:at + len(data)] = data

    def read(self, at: int, data: bytes) -> None:
        """The kernel's stores: a read from a pipe."""
        reader, writer = os.pipe()
        os.write(writer, data)
        assert os.readv(reader, [memoryview(self.memory)[at:at + len(data)]]) == len(data)
        os.close(reader)
        os.close(writer)

    def page_from_a_file(self, at: int, data: bytes) -> None:
        """As a disk's DMA: the whole page, from a file."""
        page = bytearray(self.memory[at & ~0xFFF:(at & ~0xFFF) + 0x1000])
        page[at & 0xFFF:(at & 0xFFF) + len(data)] = data
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(page)
            assert os.preadv(file.fileno(), [memoryview(self.memory)[at & ~0xFFF:(at & ~0xFFF) + 0x1000]], 0) == 0x1000

    def proc_mem(self, at: int, data: bytes) -> None:
        def write(pid: int) -> None:
            fd = os.open(f"/proc/{pid}/mem", os.O_RDWR)
            assert os.pwrite(fd, data, self.base + at) == len(data)
        in_a_child(write)

    def process_vm_writev(self, at: int, data: bytes) -> None:
        def write(pid: int) -> None:
            here = ctypes.create_string_buffer(data, len(data))
            local, remote = IoVec(ctypes.addressof(here), len(data)), IoVec(self.base + at, len(data))
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == len(data)
        in_a_child(write)

    def all(self) -> list[Callable[[int, bytes], None]]:
        return [self.store, self.read, self.page_from_a_file, self.proc_mem, self.process_vm_writev]


def while_it_runs(node: int) -> None:
    """The guest never leaves KVM_RUN."""
    guest = Guest(node, LOOP)
    ways = Ways(guest)
    ways.store(FUNCTION, RETURNS)
    thread = threading.Thread(target=fcntl.ioctl, args=(guest.vcpu, RUN, 0))
    thread.start()
    for value, way in enumerate(ways.all() * 3, 1):
        way(FUNCTION + 1, bytes([value]))
        deadline = time.monotonic() + 20
        while guest.memory[MAILBOX] != value:
            assert time.monotonic() < deadline, (way.__name__, value, guest.memory[MAILBOX])
            time.sleep(0.0005)
    ways.store(FUNCTION, b"\xf4")
    thread.join(20)
    assert not thread.is_alive() and struct.unpack_from("<I", guest.run, 8)[0] == EXIT_HLT
    guest.close()


def between_runs(node: int) -> None:
    """At once: the entry after the write runs the new code."""
    guest = Guest(node, EXITS)
    ways = Ways(guest)
    ways.store(FUNCTION, RETURNS)
    for value, way in enumerate(ways.all() * 10, 1):
        way(FUNCTION + 1, bytes([value]))
        fcntl.ioctl(guest.vcpu, RUN, 0)
        reason, = struct.unpack_from("<I", guest.run, 8)
        offset, = struct.unpack_from("<Q", guest.run, 40)
        assert (reason, guest.run[offset]) == (EXIT_IO, value), (way.__name__, value, reason, guest.run[offset])
    fcntl.ioctl(guest.vcpu, SET_GUEST_DEBUG, struct.pack("<II64x", ENABLE_SW, 0))
    for _ in range(3):                          # a debugger's breakpoint, and away with it
        for way in (ways.store, ways.proc_mem):
            way(FUNCTION, b"\xcc")
            fcntl.ioctl(guest.vcpu, RUN, 0)
            assert struct.unpack_from("<I", guest.run, 8)[0] == EXIT_DEBUG
            assert struct.unpack_from("<Q", guest.run, 40)[0] == FUNCTION
            way(FUNCTION, RETURNS[:1])
            fcntl.ioctl(guest.vcpu, RUN, 0)
            assert struct.unpack_from("<I", guest.run, 8)[0] == EXIT_IO
    guest.close()


def main() -> None:
    node = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
    while_it_runs(node)
    between_runs(node)
    print("seen")


if __name__ == "__main__":
    main()
