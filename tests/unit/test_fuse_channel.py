# SPDX-License-Identifier: GPL-2.0-or-later
"""The channel against a kernel played by a socketpair, and the amended messages: orders of events that a real kernel
shows only by chance."""

from __future__ import annotations

import errno
import socket
import threading
import time

import pytest

from kvmfs.fuse import protocol
from kvmfs.fuse.channel import Channel
from tests.unit.fuse_wire import KernelSide

BLOCK, SHORT, WAKE = 0xAE80, 0xAE00, 0xAE02


class Kernel(KernelSide):
    """The other side of /dev/fuse."""

    def __init__(self):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(10)
        self.events = []
        self.interrupts = []
        self.wake = threading.Event()
        # The descriptor is never closed: its readers stay in read(2) until the tests end.
        self.channel = Channel(theirs.detach(), self.handle, interrupt=self.interrupt)
        self.channel.start()

    def handle(self, req):
        if req.cmd == BLOCK:
            self.channel.may_block()
            event = threading.Event()
            req.context = event
            if not req.interrupted:
                event.wait(10)
            return -errno.EINTR if req.interrupted else 1
        if req.cmd == WAKE:
            for other in list(self.channel.inflight.values()):
                if other.context is not None:
                    other.context.set()
            return 0
        return 12

    def interrupt(self, req):
        self.interrupts.append((req.unique, req.context is not None))
        if req.context is not None:
            req.context.set()



@pytest.fixture
def kernel():
    return Kernel()


def test_early_interrupt(kernel):
    for unique in range(2, 400, 2):
        kernel.send_interrupt(unique)
        kernel.send_ioctl(unique, BLOCK)
        assert kernel.reply() == (unique, -errno.EINTR)
    assert not kernel.channel._early
    assert kernel.interrupts[0] == (2, False)


def test_late_interrupt(kernel):
    for unique in range(2, 200, 2):
        kernel.send_ioctl(unique, BLOCK)
        kernel.send_interrupt(unique)
        assert kernel.reply() == (unique, -errno.EINTR)
    assert not kernel.channel.inflight


def test_interrupts_nobody_asks_for_are_bounded(kernel):
    for unique in range(2, 6000, 2):
        kernel.send_interrupt(unique)
    kernel.send_ioctl(6000, SHORT)
    assert kernel.reply() == (6000, 12)
    assert len(kernel.channel._early) <= 1024


def test_interrupt_is_for_its_request_only(kernel):
    kernel.send_ioctl(2, BLOCK)
    kernel.send_ioctl(4, BLOCK)
    kernel.send_interrupt(4)
    assert kernel.reply() == (4, -errno.EINTR)
    kernel.send_ioctl(6, WAKE)
    replies = {kernel.reply(), kernel.reply()}
    assert replies == {(6, 0), (2, 1)}


def test_a_reader_is_always_left(kernel):
    for unique in range(2, 18, 2):
        kernel.send_ioctl(unique, BLOCK)
    kernel.send_ioctl(100, SHORT)
    assert kernel.reply() == (100, 12)
    deadline = time.monotonic() + 10
    pending = 8
    while pending and time.monotonic() < deadline:
        kernel.send_ioctl(200, WAKE)
        time.sleep(0.05)
        while pending:
            unique, _result = kernel.reply()
            if unique == 200:
                break
            pending -= 1
        while kernel.channel._blocked:
            time.sleep(0.01)
        pending = len(kernel.channel.inflight)
    deadline = time.monotonic() + 5
    while len(kernel.channel.threads()) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 1 <= len(kernel.channel.threads()) <= 2


def _init_reply(flags, max_write):
    body = protocol.INIT_OUT.pack(7, 31, 1 << 20, flags, 12, 9, max_write, 1, 256, 0, 0xFFFFFFFF, 3)
    body = body.ljust(protocol.INIT_OUT_SIZE, b"\0")
    return protocol.OUT_HEADER.pack(16 + len(body), 0, 2) + body


@pytest.mark.parametrize("passthrough", [False, True])
def test_init_reply(passthrough):
    amended = protocol.amend_init_reply(
        _init_reply(protocol.FUSE_AUTO_INVAL_DATA | protocol.FUSE_INIT_EXT | 1, 1 << 20), passthrough=passthrough)
    assert protocol.OUT_HEADER.unpack_from(amended) == (len(amended), 0, 2)
    (_major, _minor, readahead, flags, _bg, _ct, max_write, _gran, pages, _align, flags2, depth
     ) = protocol.INIT_OUT.unpack_from(amended, 16)
    assert max_write == readahead == protocol.MAX_WRITE and pages == 16
    assert flags == (protocol.FUSE_INIT_EXT | 1 if passthrough else 1)
    assert (flags2, depth) == ((protocol.FUSE2_PASSTHROUGH, 1) if passthrough else (0, 0))


def test_open_reply():
    message = protocol.OUT_HEADER.pack(32, 0, 8) + protocol.OPEN_OUT.pack(77, 2, 0)
    amended = protocol.amend_open_reply(message, 5)
    assert protocol.OUT_HEADER.unpack_from(amended) == (32, 0, 8)
    assert protocol.OPEN_OUT.unpack_from(amended, 16) == (77, 129, 5)
