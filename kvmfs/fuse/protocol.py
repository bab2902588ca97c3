# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the FUSE wire protocol that the channel speaks itself.

Numbers and layouts are those of <linux/fuse.h>, protocol 7.x, little-endian x86-64. Everything that is not
named here passes through the channel unread.
"""

from __future__ import annotations

import struct
from typing import Final

# --- operations ---------------------------------------------------------------------------------------------
FUSE_LOOKUP: Final = 1
FUSE_FORGET: Final = 2
FUSE_GETATTR: Final = 3
FUSE_OPEN: Final = 14
FUSE_RELEASE: Final = 18
FUSE_FLUSH: Final = 25
FUSE_INIT: Final = 26
FUSE_INTERRUPT: Final = 36
FUSE_IOCTL: Final = 39
FUSE_BATCH_FORGET: Final = 42
# A message from the server that answers nothing: fuse_out_header with this as its error and unique 0
FUSE_NOTIFY_RESEND: Final = 7

# --- struct fuse_in_header: len opcode unique nodeid uid gid pid total_extlen padding -----------------------
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
# struct fuse_ioctl_in: fh flags cmd arg in_size out_size; it follows the header directly, so one unpack reads
# both.
IOCTL_REQUEST: Final = struct.Struct("<IIQQIIIHHQIIQII")
# struct fuse_interrupt_in: unique
INTERRUPT_IN: Final = struct.Struct("<Q")
# struct fuse_init_in: major minor max_readahead flags flags2
INIT_IN: Final = struct.Struct("<IIIII")
# struct fuse_release_in: fh flags release_flags lock_owner
RELEASE_IN: Final = struct.Struct("<QIIQ")

# --- struct fuse_out_header: len error unique ---------------------------------------------------------------
OUT_HEADER: Final = struct.Struct("<IiQ")
# fuse_out_header and struct fuse_ioctl_out (result flags in_iovs out_iovs) in one
IOCTL_REPLY: Final = struct.Struct("<IiQiIII")
# struct fuse_init_out: major minor max_readahead flags max_background congestion_threshold max_write
# time_gran
#                       max_pages map_alignment flags2 max_stack_depth, then 24 bytes more up to 64
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHII")
INIT_OUT_SIZE: Final = 64
# struct fuse_open_out: fh open_flags backing_id
OPEN_OUT: Final = struct.Struct("<QIi")
# struct fuse_attr: ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize
# flags
ATTR: Final = struct.Struct("<6Q10I")
# What goes before it: struct fuse_entry_out (nodeid generation entry_valid attr_valid and both's nanoseconds)
# and struct fuse_attr_out (attr_valid attr_valid_nsec dummy)
ENTRY_OUT: Final = struct.Struct("<4Q2I")
ATTR_OUT: Final = struct.Struct("<QII")

# --- INIT flags; those of flags2 are numbered from 32 in the header -----------------------------------------
FUSE_ASYNC_READ: Final = 1 << 0
FUSE_ATOMIC_O_TRUNC: Final = 1 << 3
FUSE_EXPORT_SUPPORT: Final = 1 << 4
FUSE_BIG_WRITES: Final = 1 << 5
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_DO_READDIRPLUS: Final = 1 << 13
FUSE_ASYNC_DIO: Final = 1 << 15
FUSE_MAX_PAGES: Final = 1 << 22
FUSE_INIT_EXT: Final = 1 << 30
FUSE2_PASSTHROUGH: Final = 1 << (37 - 32)

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_PASSTHROUGH: Final = 1 << 7

# --- ioctls of /dev/fuse itself -----------------------------------------------------------------------------
FUSE_DEV_IOC_BACKING_OPEN: Final = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE: Final = 0x4004E502
# struct fuse_backing_map: fd flags padding
BACKING_MAP: Final = struct.Struct("<iIQ")

PAGE_SIZE: Final = 4096
# A message must fit one SOCK_SEQPACKET packet; the default socket buffer takes 64 KiB of data easily, not
# more than 200.
MAX_WRITE: Final = 16 * PAGE_SIZE
# read(2) on /dev/fuse answers EINVAL to a buffer that could not take the largest WRITE with its headers.
BUFFER_SIZE: Final = MAX_WRITE + PAGE_SIZE


def init_offers_passthrough(request: bytes | bytearray | memoryview) -> bool:
    """Whether the INIT *request* (a whole message) says that this kernel can do passthrough (Linux 6.9)."""
    if len(request) < IN_HEADER.size + INIT_IN.size:
        return False
    _major, _minor, _readahead, flags, flags2 = INIT_IN.unpack_from(request, IN_HEADER.size)
    return bool(flags & FUSE_INIT_EXT and flags2 & FUSE2_PASSTHROUGH)


def init_reply(unique: int, *, passthrough: bool) -> bytes:
    """A whole INIT reply for a server that wants nothing but *passthrough* (used to probe)."""
    flags = FUSE_INIT_EXT if passthrough else 0
    flags2 = FUSE2_PASSTHROUGH if passthrough else 0
    body = INIT_OUT.pack(7, 31, PAGE_SIZE, flags, 0, 0, PAGE_SIZE, 1, 0, 0, flags2, int(passthrough))
    body = body.ljust(INIT_OUT_SIZE, b"\0")
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


# What libfuse 3.14 asks for by itself with pyfuse3's operations, but for what amend_init_reply takes away.
_LIBFUSE_WANTS: Final = (FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_EXPORT_SUPPORT | FUSE_BIG_WRITES
                         | FUSE_DO_READDIRPLUS | FUSE_ASYNC_DIO | FUSE_MAX_PAGES)


def libfuse_init_reply(request: bytes | memoryview, *, passthrough: bool) -> bytes:
    """The reply to the INIT *request* that libfuse would give and `amend_init_reply` leave, without asking it."""
    unique: int = IN_HEADER.unpack_from(request)[2]
    (_major, _minor, max_readahead, flags, _flags2) = INIT_IN.unpack_from(request, IN_HEADER.size)
    flags = flags & _LIBFUSE_WANTS | (FUSE_INIT_EXT if passthrough else 0)
    body = INIT_OUT.pack(7, 31, min(max_readahead, MAX_WRITE), flags, 0, 0, MAX_WRITE, 1, MAX_WRITE // PAGE_SIZE, 0,
                         FUSE2_PASSTHROUGH if passthrough else 0, int(passthrough)).ljust(INIT_OUT_SIZE, b"\0")
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def amend_init_reply(message: bytes | memoryview, *, passthrough: bool) -> bytes:
    """libfuse's INIT reply as the channel needs it.

    - max_write (and with it every message) is clamped to MAX_WRITE.
    - FUSE_AUTO_INVAL_DATA is taken away: a changed size or time must not drop the page that a client has
      mapped.
    - Of flags2 only passthrough is left: the others (direct-io mmap, io_uring, …) would change what a client
      sees or bypass the channel, whatever a later libfuse thinks of them.
    """
    body = bytes(message[OUT_HEADER.size :]).ljust(INIT_OUT_SIZE, b"\0")
    (major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
     map_alignment, _flags2, _depth) = INIT_OUT.unpack_from(body)
    flags &= ~(FUSE_AUTO_INVAL_DATA | FUSE_INIT_EXT)
    if passthrough:
        flags |= FUSE_INIT_EXT
    body = INIT_OUT.pack(
        major, minor, min(max_readahead, MAX_WRITE), flags, max_background, congestion_threshold,
        min(max_write, MAX_WRITE), time_gran, min(max_pages, MAX_WRITE // PAGE_SIZE), map_alignment,
        FUSE2_PASSTHROUGH if passthrough else 0, int(passthrough),
    ) + body[INIT_OUT.size :]
    (_length, error, unique) = OUT_HEADER.unpack_from(message)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body


def amend_open_reply(message: bytes | memoryview, backing_id: int) -> bytes:
    """libfuse's OPEN reply with passthrough to *backing_id*.

    The flags are set, not added to: the kernel answers EIO to passthrough with the flags of a cached open.
    DIRECT_IO beside it keeps read(2) and write(2) with the server; only mmap goes to the backing file.
    """
    (fh, _flags, _backing) = OPEN_OUT.unpack_from(message, OUT_HEADER.size)
    return bytes(message[: OUT_HEADER.size]) + OPEN_OUT.pack(fh, FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO, backing_id)
