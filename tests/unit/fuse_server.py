# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system to test kvmfs.fuse with, run as a process of its own: a process must never open what it
serves.

    python fuse_server.py FUSE_FD MEMFD MODE [late]

FUSE_FD is mounted already. MODE: "direct" (the vCPU node is direct_io), "cache" (page-cache fallback) or
"passthrough" (the server registers MEMFD itself). late: pyfuse3 is begun only when it is needed; the ioctl
BEGUN tells whether it was. Prints one line "ready", then "end" when the connection ended; events go to stderr.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvmfs.fuse import mount
from kvmfs.fuse.channel import Channel, Outcome, Request
from kvmfs.fuse.operations import NodeOperations

KVM_INODE, VCPU_INODE, VM_INODE = 2, 3, 4
RUN_SIZE = 3 * mmap.PAGESIZE


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


NONE = _ioc(0, 0x00, 0)
VALUE = _ioc(0, 0x01, 0)
BLOCK = _ioc(0, 0x80, 0)
WAKE = _ioc(0, 0x02, 0)
THREADS = _ioc(0, 0x03, 0)
LATER = _ioc(0, 0x04, 0)
TWICE = _ioc(0, 0x05, 0)
RAISE = _ioc(0, 0x06, 0)
HUGE_RESULT = _ioc(0, 0x07, 0)
OPENS = _ioc(0, 0x08, 0)
TOUCH = _ioc(0, 0x09, 0)
ANSWER_AND_RETURN = _ioc(0, 0x0A, 0)
EXIT = _ioc(0, 0x0B, 0)
MAX_IDLE = _ioc(0, 0x0C, 0)
BEGUN = _ioc(0, 0x0D, 0)
OUT = _ioc(2, 0x81, 64)
IN = _ioc(1, 0x82, 64)
INOUT = _ioc(3, 0x83, 64)
BIG = _ioc(3, 0x84, 8)
INFO = _ioc(2, 0x85, 64)
SHORT = _ioc(3, 0x86, 64)
OVERSIZE = _ioc(2, 0x87, 8)
LARGEST = _ioc(3, 0x88, 16383)
INFO_STRUCT = struct.Struct("<QQQIIIIQ")


class Server:
    """The handlers of the ioctls above."""

    def __init__(self, fuse_fd: int, memfd: int, mode: str) -> None:
        self.fuse_fd, self.memfd, self.mode = fuse_fd, memfd, mode
        self.page = bytearray(RUN_SIZE)
        self.page[:5] = b"start"
        self.shared = mmap.mmap(memfd, RUN_SIZE) if mode == "passthrough" else None
        self.waiting: set[threading.Event] = set()
        self.opens = 0
        self.operations = NodeOperations(opened=self.opened, released=self.released)
        self.operations.add_node(KVM_INODE, "kvm", mode=0o666)
        self.operations.add_node(VM_INODE, "secret", mode=0o600)
        self.operations.add_node(
            VCPU_INODE, "vcpu", size=RUN_SIZE, mode=0o666, data=self.page if mode == "cache" else None,
        )
        self.operations.add_node(9, "refused", mode=0o666)
        self.channel = Channel(
            fuse_fd, self.ioctl, interrupt=self.interrupt, passthrough=mode == "passthrough",
            on_end=self.end,
        )
        self.ended = threading.Event()

    def opened(self, inode: int) -> None:
        if inode == 9:
            raise OSError(errno.EBUSY, "refused")
        self.opens += 1

    def released(self, _inode: int) -> None:
        self.opens -= 1

    def end(self) -> None:
        print("end", flush=True)
        self.ended.set()

    def interrupt(self, req: Request) -> None:
        if req.context is not None:
            assert isinstance(req.context, threading.Event)
            req.context.set()

    def ready(self) -> None:
        self.channel.ready.wait()
        if self.mode == "passthrough":
            self.channel.set_backing(VCPU_INODE, mount.backing_open(self.fuse_fd, self.memfd))
        print("ready", int(self.channel.passthrough), flush=True)

    def block(self, req: Request) -> Outcome:
        self.channel.may_block()
        event = threading.Event()
        req.context = event
        self.waiting.add(event)
        if not req.interrupted:
            event.wait()
        self.waiting.discard(event)
        return -errno.EINTR if req.interrupted else 42

    def ioctl(self, req: Request) -> Outcome:
        cmd = req.cmd
        if cmd == NONE:
            return 12
        if cmd == VALUE:
            return req.arg & 0x7FFFFFFF if req.arg < 1 << 63 else -errno.ERANGE
        if cmd == BLOCK:
            return self.block(req)
        if cmd == WAKE:
            waiting = list(self.waiting)
            for event in waiting:
                event.set()
            return len(waiting)
        if cmd == THREADS:
            return len(self.channel.threads())
        if cmd == MAX_IDLE:
            self.channel.max_idle = req.arg
            return 0
        if cmd == LATER:
            threading.Timer(0.05, req.reply, (5,)).start()
            return None
        if cmd == TWICE:
            req.reply(6)
            try:
                req.reply(7)
            except RuntimeError:
                print("twice refused", file=sys.stderr, flush=True)
            return None
        if cmd == ANSWER_AND_RETURN:
            req.reply(8)
            return 9
        if cmd == RAISE:
            raise ValueError("a bug")
        if cmd == HUGE_RESULT:
            return 1 << 40
        if cmd == OPENS:
            return self.opens
        if cmd == BEGUN:
            return int(any(thread.name == "kvmfs-replies" for thread in threading.enumerate()))
        if cmd == TOUCH:
            memory = self.shared if self.shared is not None else self.page
            memory[100:104] = memory[0:4]
            return memory[0]
        if cmd == EXIT:
            os._exit(3)
        return self.payload(req)

    def payload(self, req: Request) -> Outcome:
        cmd = req.cmd
        if cmd == OUT:
            return bytes(range(64))
        if cmd == IN:
            return sum(req.data)
        if cmd == INOUT:
            return 5, bytes(reversed(req.data))
        if cmd == BIG:
            return -errno.E2BIG, struct.pack("<II", 77, 0)
        if cmd == INFO:
            return INFO_STRUCT.pack(req.unique, req.nodeid, req.fh, req.tid, req.uid, req.gid, cmd, req.arg)
        if cmd == SHORT:
            return b"abc"
        if cmd == OVERSIZE:
            return bytes(64)
        if cmd == LARGEST:
            return req.data  # the reader's own buffer
        raise OSError(errno.ENOTTY, "no such ioctl")


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    server = Server(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    threading.Thread(target=server.ready, daemon=True).start()
    if sys.argv[4:] == ["late"]:
        server.channel.begin(server.operations)
        server.ended.wait()
    else:
        server.channel.run(server.operations)
    print("returned", flush=True)


if __name__ == "__main__":
    main()
