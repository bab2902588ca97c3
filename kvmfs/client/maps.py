# SPDX-License-Identifier: GPL-2.0-or-later
"""A process's mappings from its /proc/PID/maps.

A client may have tens of thousands of mappings, one per memory slot, and is asked about each slot.  Since 6.11 the kernel
answers for one address (PROCMAP_QUERY, Documentation/filesystems/proc.rst); before that the whole file is read.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fcntl import ioctl
from typing import BinaryIO, Final

PROCMAP_QUERY: Final = 0xC0686611  # linux/fs.h, with struct procmap_query:
_QUERY: Final = struct.Struct("<9Q4I2Q")
_COVERING_OR_NEXT_VMA: Final = 0x10
_NAME_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of /proc/PID/maps; `start`, `end` and `offset` in bytes, `dev` as os.makedev gives it."""

    start: int
    end: int
    perms: str
    offset: int
    dev: int
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """Whether the mapping is MAP_SHARED."""
        return self.perms[3] == "s"


def read_vmas(maps: BinaryIO, lo: int, hi: int) -> list[Vma]:
    """The mappings that overlap [lo, hi), in address order, not clipped; ``maps``: the open file, at its beginning.

    OSError ESRCH when the process is gone.
    """
    try:
        return list(_query(maps.fileno(), lo, hi))
    except OSError as e:
        if e.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
    return list(_scan(maps, lo, hi))


def _query(maps: int, lo: int, hi: int) -> Iterator[Vma]:
    name = ctypes.create_string_buffer(_NAME_SIZE)
    while lo < hi:
        arg = bytearray(_QUERY.pack(_QUERY.size, _COVERING_OR_NEXT_VMA, lo, *[0] * 8, _NAME_SIZE, 0, ctypes.addressof(name), 0))
        try:
            ioctl(maps, PROCMAP_QUERY, arg, True)
        except FileNotFoundError:
            return  # nothing at or above lo
        _, _, _, start, end, flags, _, offset, inode, major, minor, length, *_ = _QUERY.unpack(arg)
        if start >= hi:
            return
        perms = "".join(letter if flags >> bit & 1 else "-" for bit, letter in enumerate("rwx")) + ("s" if flags & 8 else "p")
        yield Vma(start, end, perms, offset, os.makedev(major, minor), inode, os.fsdecode(name.value) if length else "")
        lo = end


def _scan(maps: BinaryIO, lo: int, hi: int) -> Iterator[Vma]:
    for line in maps:
        start, _, end = line[: line.index(b" ")].partition(b"-")
        if int(end, 16) <= lo:
            continue
        if int(start, 16) >= hi:
            return
        yield _parse_vma(line)


def _parse_vma(line: bytes) -> Vma:
    fields = line.rstrip(b"\n").split(None, 5)
    start, _, end = fields[0].partition(b"-")
    major, _, minor = fields[3].partition(b":")
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        perms=fields[1].decode(),
        offset=int(fields[2], 16),
        dev=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(fields[4]),
        path=os.fsdecode(fields[5]) if len(fields) > 5 else "",
    )
