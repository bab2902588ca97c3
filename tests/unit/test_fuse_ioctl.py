# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctl(2) through the channel, as a client sees it: payloads, results, errors, signals, blocked calls."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import fuse_server as S
import pytest
from fuse_rig import Served, ioctl, needs_fuse, served

pytestmark = [needs_fuse, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as it:
        yield it


@pytest.fixture
def fd(server: Served) -> Iterator[int]:
    it = server.open("kvm")
    yield it
    server.files.remove(it)
    os.close(it)


def test_result(fd):
    assert ioctl(fd, S.NONE) == (12, 0)


def test_argument_by_value(fd):
    assert ioctl(fd, S.VALUE, 0x1234567) == (0x1234567, 0)
    assert ioctl(fd, S.VALUE, 1 << 63) == (-1, errno.ERANGE)


def test_out_payload(fd):
    buffer = ctypes.create_string_buffer(64)
    assert ioctl(fd, S.OUT, buffer) == (0, 0)
    assert buffer.raw == bytes(range(64))


def test_in_payload(fd):
    assert ioctl(fd, S.IN, ctypes.create_string_buffer(bytes([3]) * 64, 64)) == (192, 0)


def test_in_out_payload_with_a_result(fd):
    buffer = ctypes.create_string_buffer(bytes(range(64)), 64)
    assert ioctl(fd, S.INOUT, buffer) == (5, 0)
    assert buffer.raw == bytes(reversed(range(64)))


def test_largest_payload(fd):
    content = os.urandom(16383)
    buffer = ctypes.create_string_buffer(content, len(content))
    assert ioctl(fd, S.LARGEST, buffer) == (0, 0)
    assert buffer.raw == content


def test_answer_shorter_than_the_struct(fd):
    buffer = ctypes.create_string_buffer(b"x" * 64, 64)
    assert ioctl(fd, S.SHORT, buffer) == (0, 0)
    assert buffer.raw == b"abc" + b"x" * 61


def test_error_with_data(fd):
    buffer = ctypes.create_string_buffer(8)
    assert ioctl(fd, S.BIG, buffer) == (-1, errno.E2BIG)
    assert buffer.raw[:4] == (77).to_bytes(4, "little")


def test_bad_pointer(fd):
    assert ioctl(fd, S.OUT, 8) == (-1, errno.EFAULT)
    assert ioctl(fd, S.IN, 8) == (-1, errno.EFAULT)


def test_unknown(fd):
    assert ioctl(fd, 0xAEFE) == (-1, errno.ENOTTY)


def test_request_fields(server, fd):
    vcpu = server.open("vcpu")
    buffer = ctypes.create_string_buffer(64)
    seen = []
    for file in (fd, vcpu):
        assert ioctl(file, S.INFO, buffer) == (0, 0)
        seen.append(S.INFO_STRUCT.unpack_from(buffer))
    (unique, inode, fh, tid, uid, gid, cmd, arg), second = seen
    assert (inode, tid, uid, gid, cmd) == (S.KVM_INODE, threading.get_native_id(), os.geteuid(), os.getegid(), S.INFO)
    assert arg == ctypes.addressof(buffer)
    assert second[1] == S.VCPU_INODE and second[2] != fh and second[0] > unique


def test_tid_is_the_thread(fd):
    found = []

    def ask():
        buffer = ctypes.create_string_buffer(64)
        ioctl(fd, S.INFO, buffer)
        found.append((S.INFO_STRUCT.unpack_from(buffer)[3], threading.get_native_id()))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found[0][0] == found[0][1] != os.getpid()


def test_answered_later(fd):
    assert ioctl(fd, S.LATER) == (5, 0)


def test_handler_errors_do_not_end_the_channel():
    with served(quiet=False) as server:
        fd = server.open("kvm")
        for _ in range(3):
            assert ioctl(fd, S.RAISE) == (-1, errno.EIO)
        assert ioctl(fd, S.HUGE_RESULT) == (-1, errno.EIO)
        assert ioctl(fd, S.OVERSIZE, ctypes.create_string_buffer(64)) == (-1, errno.EIO)
        assert ioctl(fd, S.TWICE) == (6, 0)
        assert ioctl(fd, S.ANSWER_AND_RETURN) == (8, 0)
        assert ioctl(fd, S.NONE) == (12, 0)
        output, complaints = server.close()
        assert complaints.count("Traceback") == 2, complaints  # one bug, one result that does not fit: once each
        assert "twice refused" in complaints
        assert "once more" in complaints
        server.close = lambda: (output, complaints)  # what `served` will look at


def test_signal_interrupts(fd):
    """Every blocked call ends with EINTR, also when the signal comes before the handler has begun to wait."""
    hits = 0

    def handler(_signal, _frame):
        nonlocal hits
        hits += 1

    rng = random.Random(1)
    before = signal.signal(signal.SIGALRM, handler)
    signal.siginterrupt(signal.SIGALRM, True)
    try:
        for _ in range(1500):
            # Again and again: the first may come before the system call.
            signal.setitimer(signal.ITIMER_REAL, rng.choice((20e-6, 60e-6, 200e-6)) * (0.5 + rng.random()), 2e-3)
            assert ioctl(fd, S.BLOCK) == (-1, errno.EINTR)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits >= 1500
    assert ioctl(fd, S.NONE) == (12, 0)


def test_blocked_and_short_calls(fd):
    results = []

    def block():
        results.append(ioctl(fd, S.BLOCK))

    for _ in range(5):
        threads = [threading.Thread(target=block, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        woken = 0
        while woken < 6 and time.monotonic() < deadline:
            for _ in range(50):
                assert ioctl(fd, S.NONE) == (12, 0)
            woken += ioctl(fd, S.WAKE)[0]
            for thread in threads:
                thread.join(0.01)
            if not any(thread.is_alive() for thread in threads):
                break
        assert not any(thread.is_alive() for thread in threads)
    assert results == [(42, 0)] * 30
    # No more stay than may be idle (2), and a reader is never missing.
    for _ in range(3):
        ioctl(fd, S.NONE)
    assert 1 <= ioctl(fd, S.THREADS)[0] <= 2


def test_sequential_blocking_calls_start_no_threads(fd):
    stop = threading.Event()

    def wake():
        while not stop.wait(0.0005):
            ioctl(fd, S.WAKE)

    ioctl(fd, S.MAX_IDLE, 3)
    waker = threading.Thread(target=wake)
    waker.start()
    try:
        for _ in range(200):
            assert ioctl(fd, S.BLOCK) == (42, 0)
    finally:
        stop.set()
        waker.join()
    assert ioctl(fd, S.THREADS)[0] <= 3


def test_server_death_ends_blocked_calls():
    server = Served("direct")
    try:
        fd = server.open("kvm")
        results = []
        thread = threading.Thread(target=lambda: results.append(ioctl(fd, S.BLOCK)), daemon=True)
        thread.start()
        time.sleep(0.2)
        server.process.kill()
        server.process.wait(15)
        thread.join(10)
        assert results in ([(-1, errno.ENOTCONN)], [(-1, errno.ECONNABORTED)])
        assert ioctl(fd, S.NONE)[0] == -1
    finally:
        server.kill()
