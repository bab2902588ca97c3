# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain ioctl(2) as a C program issues it: the return value, errno and the bytes of the argument are all seen."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

PAGE = mmap.PAGESIZE
# No user mapping is ever there: the kernel's half of the address space, and the last page of ours.
KERNEL_POINTER = 0xFFFF_8000_0000_0000
BAD_POINTER = 0x7FFF_FFFF_F000 - 0x1000_0000_0000 + 0x10    # far below the stack, far above the heap

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.ioctl.restype = ctypes.c_int
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

Data = ctypes.Structure | ctypes.Array[ctypes.c_char] | ctypes._SimpleCData  # type: ignore[type-arg]
Argument = int | Data


@dataclass(frozen=True, slots=True)
class Result:
    """What ioctl(2) gave: ``value`` is -1 when ``errno`` is set."""

    value: int
    errno: int

    @property
    def ok(self) -> bool:
        return self.value != -1

    def __str__(self) -> str:
        return str(self.value) if self.ok else errno_name(self.errno)


def errno_name(number: int) -> str:
    """``EINVAL`` for 22."""
    return errno.errorcode.get(number, f"errno {number}")


def address(data: Data) -> int:
    """Where an argument is."""
    return ctypes.addressof(data)


def ioctl(fd: int, request: int, arg: Argument = 0) -> Result:
    """One call.  ``request`` goes in with all 64 bits; ``arg`` is a number, or data whose address is given."""
    ctypes.set_errno(0)
    pointer = arg if isinstance(arg, int) else ctypes.addressof(arg)
    value = _libc.ioctl(fd, request & 0xFFFF_FFFF_FFFF_FFFF, pointer & 0xFFFF_FFFF_FFFF_FFFF)
    return Result(value, ctypes.get_errno() if value == -1 else 0)


def sign_extended(request: int) -> int:
    """The number as a C library hands it over whose ioctl takes an int, where its highest bit is set."""
    return request | 0xFFFF_FFFF_0000_0000 if request & 0x8000_0000 else request


class Memory:
    """Anonymous memory of this process, at ``address``; unmapped by close()."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        view = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(view)
        del view

    def write(self, offset: int, data: bytes) -> None:
        self.map[offset:offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return self.map[offset:offset + size]

    def close(self) -> None:
        self.map.close()


class BeforeHole:
    """A page of memory with nothing mapped behind it: data of which only the beginning can be read."""

    def __init__(self) -> None:
        self.page = _libc.mmap(None, 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if self.page in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        _libc.munmap(self.page + PAGE, PAGE)

    def put(self, head: bytes) -> int:
        """The address of ``head``, after which the mapping ends."""
        at: int = self.page + PAGE - len(head)
        ctypes.memmove(at, head, len(head))
        return at

    def close(self) -> None:
        _libc.munmap(self.page, PAGE)


def mmap_errno(fd: int, size: int, protection: int, flags: int) -> Result:
    """mmap(2) of a descriptor, undone at once."""
    ctypes.set_errno(0)
    at = _libc.mmap(None, size, protection, flags, fd, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        return Result(-1, ctypes.get_errno())
    _libc.munmap(at, size)
    return Result(0, 0)


def close(fd: int) -> None:
    """Close a descriptor, which a case may have closed already."""
    try:
        os.close(fd)
    except OSError:
        pass
