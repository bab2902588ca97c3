# SPDX-License-Identifier: GPL-2.0-or-later
"""An answer and the next request in one call."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from kvmfs.fuse import exchange as module


@pytest.fixture(params=("native", "python"))
def exchange(request):
    if request.param == "python":
        return module.python_exchange
    return pytest.importorskip("kvmfs.fuse._exchange").exchange


def test_answer_goes_out_before_the_next_is_read(exchange):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        buffer = bytearray(64)
        theirs.send(b"one")
        assert exchange(ours.fileno(), None, buffer) == 3 and buffer[:3] == b"one"
        theirs.send(b"two!")
        assert exchange(ours.fileno(), b"answer", buffer) == 4 and buffer[:4] == b"two!"
        assert theirs.recv(64) == b"answer"


def test_a_refused_answer_reads_nothing(exchange):
    reader, writer = os.pipe()
    try:
        os.write(writer, b"next")
        buffer = bytearray(8)
        assert exchange(reader, b"answer", buffer) == -errno.EBADF     # not open for writing
        assert exchange(reader, None, buffer) == 4
        with pytest.raises(OSError, match="Bad file") as error:
            exchange(writer, None, buffer)
        assert error.value.errno == errno.EBADF
    finally:
        os.close(reader)
        os.close(writer)
