# SPDX-License-Identifier: GPL-2.0-or-later
"""An answer and the next request in one call, and a shortcut that answers some of them."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
import time

import pytest

from kvmfs.fuse import exchange as module
from kvmfs.fuse.channel import Channel, Shortcut
from tests.unit.fuse_wire import KernelSide

NOT_MINE, ANSWERED, BEGUN = range(3)
SERVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64,
                         ctypes.POINTER(ctypes.c_int32))
INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
QUICK, BEGIN, WAIT, OTHER = range(0x100, 0x104)


@pytest.fixture(params=("native", "python"))
def exchange_class(request):
    if request.param == "python":
        return module.PythonExchange
    return pytest.importorskip("kvmfs.fuse._exchange").Exchange


def test_answer_goes_out_before_the_next_is_read(exchange_class):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        exchange = exchange_class(ours.fileno()).exchange
        buffer = bytearray(64)
        theirs.send(b"one")
        assert exchange(None, buffer) == 3 and buffer[:3] == b"one"
        theirs.send(b"two!")
        assert exchange(b"answer", buffer) == 4 and buffer[:4] == b"two!"
        assert theirs.recv(64) == b"answer"


def test_a_refused_answer_reads_nothing(exchange_class):
    reader, writer = os.pipe()
    try:
        os.write(writer, b"next")
        buffer = bytearray(8)
        exchange = exchange_class(reader).exchange
        assert exchange(b"answer", buffer) == -errno.EBADF     # not open for writing
        assert exchange(None, buffer) == 4
        with pytest.raises(OSError, match="Bad file") as error:
            exchange_class(writer).exchange(None, buffer)
        assert error.value.errno == errno.EBADF
    finally:
        os.close(reader)
        os.close(writer)


class Kernel(KernelSide):
    """The other side of /dev/fuse, and a shortcut for QUICK (42), BEGIN and WAIT (until it is interrupted, or told so)."""

    def __init__(self):
        pytest.importorskip("kvmfs.fuse._exchange")
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(10)
        self.seen, self.looks, self.interrupted = [], [], threading.Event()
        self.inside = threading.Event()
        self._functions = SERVE(self.serve), INTERRUPT(lambda _self, _inode: self.interrupted.set())
        self._struct = struct.pack("<QQQ", 0, *(ctypes.cast(f, ctypes.c_void_p).value for f in self._functions))
        self._buffer = ctypes.create_string_buffer(self._struct)
        self.channel = Channel(theirs.detach(), self.handle, interrupt=lambda req: self.interrupted.set(),
                               watch=lambda req: self.looks.append(req.tid),
                               shortcut=Shortcut(ctypes.addressof(self._buffer), self.go_on))
        self.channel.start()
        # A shortcut is used only while a second thread reads.
        self.channel._start_reader()
        deadline = time.monotonic() + 10
        while self.call(2, QUICK) != 42:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.seen.clear()

    def serve(self, _self, _inode, _tid, cmd, arg, result):
        if cmd == QUICK:
            result[0] = 42
            return ANSWERED
        if cmd == WAIT:
            self.inside.set()
            self.interrupted.wait(10)
        return BEGUN if cmd in (BEGIN, WAIT) else NOT_MINE

    def handle(self, req):
        self.seen.append(("ioctl", req.cmd))
        if req.cmd == WAIT:
            self.channel.may_block()
            self.interrupted.wait(10)
        return -errno.EINTR if req.interrupted else 1

    def go_on(self, req):
        self.seen.append(("go_on", req.cmd))
        return -errno.EINTR if req.interrupted else 2

    def call(self, unique, cmd):
        self.send_ioctl(unique, cmd)
        answered, result = self.reply()
        assert answered == unique
        return result


def test_the_shortcut_comes_first():
    kernel = Kernel()
    answers = [kernel.call(unique, QUICK) for unique in range(4, 600, 2)]
    assert answers.count(42) > 250          # the others came when the second reader was not there yet
    assert len(kernel.seen) == answers.count(1)
    assert kernel.looks and set(kernel.looks) == {7}        # every 64th time it was looked where the calls come from
    assert kernel.call(1000, OTHER) == 1
    assert kernel.call(1002, BEGIN) == (2 if kernel.seen[-1][0] == "go_on" else 1)
    assert kernel.seen[-2:] in ([("ioctl", OTHER), ("go_on", BEGIN)], [("ioctl", OTHER), ("ioctl", BEGIN)])


def test_somebody_reads_while_the_shortcut_takes_long():
    kernel = Kernel()
    for unique in range(4, 200, 2):
        kernel.call(unique, QUICK)          # the second reader is parked by now
    kernel.send_ioctl(1000, WAIT)
    quick = kernel.inside.wait(1)
    assert kernel.call(1002, OTHER) == 1
    assert not quick or kernel.call(1004, QUICK) == 1   # not by the shortcut: nobody else would read
    kernel.send_interrupt(1000)
    assert kernel.reply() == (1000, -errno.EINTR)


def test_an_interrupt_may_be_read_first():
    kernel = Kernel()
    for unique in range(1000, 1200, 2):
        kernel.interrupted.clear()
        kernel.send_interrupt(unique)
        kernel.send_ioctl(unique, WAIT)
        assert kernel.reply() == (unique, -errno.EINTR)


def test_an_interrupt_may_come_later():
    kernel = Kernel()
    for unique in range(1000, 1200, 2):
        kernel.interrupted.clear()
        kernel.send_ioctl(unique, WAIT)
        kernel.send_interrupt(unique)
        assert kernel.reply() == (unique, -errno.EINTR)
