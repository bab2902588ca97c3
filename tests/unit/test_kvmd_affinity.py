# SPDX-License-Identifier: GPL-2.0-or-later
"""The readers of a worker follow their client's CPU, and are set free again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import threading
import time

import pytest

from kvmd import affinity
from kvmd.affinity import CONTENDED, LOOK_NS, MOVES, PERIOD, Follower
from tests.unit.test_fuse_channel import BLOCK, WAKE, Kernel

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing to follow")


class Client:
    """A thread that is on a CPU of our choice."""

    interrupted = False

    def __init__(self) -> None:
        self._cpu, self._go, self._done = CPUS[0], threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while self._thread.native_id is None:
            time.sleep(0.001)
        self.tid = self._thread.native_id

    def _run(self):
        while True:
            self._go.acquire()
            os.sched_setaffinity(0, {self._cpu})
            self._done.release()

    def move(self, cpu):
        self._cpu = cpu
        self._go.release()
        self._done.acquire()


class Readers:
    """What the follower sees of a channel."""

    def __init__(self):
        self.cpus, self.idle, self._client = set(CPUS), False, Client()

    def threads(self):
        return [self._client.tid]       # a thread that sleeps

    def set_affinity(self, cpus):
        self.cpus = set(cpus)

    def make_idle(self):
        self.idle = True


@pytest.fixture
def tasks():
    fd = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def follower(tasks):
    return Follower(Readers(), tasks)


@pytest.fixture
def pipe():
    """Where the zygote would be asked."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_follows_the_client_and_lets_go(follower):
    client = Client()
    for cpu in (CPUS[0], CPUS[1], CPUS[0]):
        client.move(cpu)
        follower.watch(client)
        assert follower._channel.cpus == {cpu}
    wait_until(lambda: follower._channel.cpus == set(CPUS))
    client.move(CPUS[1])
    follower.watch(client)
    assert follower._channel.cpus == {CPUS[1]}


def test_a_client_that_runs_away_is_left_alone(follower, monkeypatch):
    monkeypatch.setattr(follower, "_pause", 0.2)
    client, bound = Client(), []
    for i in range(12):
        client.move(CPUS[i % 2])
        follower.watch(client)
        bound.append(len(follower._channel.cpus) == 1)
    assert bound == [True] * MOVES + [False] * (12 - MOVES)
    time.sleep(0.3)
    follower.watch(client)
    assert len(follower._channel.cpus) == 1


def test_the_readers_yield_to_a_client_that_runs_away(tasks, pipe):
    follower, client = Follower(Readers(), tasks, pipe[1]), Client()
    for i in range(4 * MOVES):
        client.move(CPUS[i % 2])
        follower.watch(client)
        assert follower._channel.cpus == {CPUS[i % 2]}
        assert follower._channel.idle == (i >= MOVES)
    wait_until(lambda: follower._channel.cpus == set(CPUS))
    assert os.read(pipe[0], 10) == b"\0"


def test_others_want_the_cpu(tasks, pipe, monkeypatch):
    """Then the readers are ordinary again, and the client is left alone for a while."""
    monkeypatch.setattr(affinity, "load", lambda: None)
    monkeypatch.setattr(Follower, "_watch_contention", lambda self, native: time.sleep(0.01) or CONTENDED)
    follower, client = Follower(Readers(), tasks, pipe[1]), Client()
    follower._may_yield = True
    for i in range(MOVES + 1):
        client.move(CPUS[i % 2])
        follower.watch(client)
    wait_until(lambda: follower._channel.cpus == set(CPUS))
    assert os.read(pipe[0], 10) == b"\0"
    follower.watch(client)
    assert follower._channel.cpus == set(CPUS)


class Computing(threading.Thread):
    """A SCHED_IDLE thread on the last CPU, which does not hold Python's lock."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended = False
        self.start()
        wait_until(lambda: self.native_id is not None and os.sched_getscheduler(self.native_id) == os.SCHED_IDLE)

    def run(self):
        os.sched_setaffinity(0, {CPUS[-1]})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while not self.ended:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000)


def watch(tid, writer, rounds):
    return affinity.load().yd_watch((ctypes.c_int * 1)(tid), 1, -1, writer, ctypes.c_long(LOOK_NS), rounds)


def test_contention_is_seen(pipe):
    # More than one, as the scheduler could take a single one elsewhere; each is ordinary.
    hogs = [subprocess.Popen(["taskset", "-c", str(CPUS[-1]), "sh", "-c", "while :; do :; done"]) for _ in range(2)]
    computing = Computing()
    try:
        assert watch(computing.native_id, pipe[1], 1000) == CONTENDED
        assert os.read(pipe[0], 10) == b"\0"
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        computing.ended = True


def test_a_thread_that_sleeps_wants_no_cpu(pipe):
    done = threading.Event()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    assert watch(thread.native_id, pipe[1], 5) in (0, -1)       # -1: it has never run for a whole nanosecond
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)
    done.set()


def test_several_vcpus_are_free(follower):
    first, second = Client(), Client()
    first.move(CPUS[0])
    second.move(CPUS[0])
    follower.watch(first)
    follower.watch(second)
    assert follower._channel.cpus == set(CPUS)
    follower.watch(first)
    assert follower._channel.cpus == set(CPUS)
    time.sleep(2 * PERIOD)              # the second one has stopped
    follower.watch(first)
    assert follower._channel.cpus == {CPUS[0]}


def test_a_cpu_that_goes_offline_is_left(follower):
    client = Client()
    client.move(CPUS[1])
    follower.watch(client)
    follower.cpu_offline(CPUS[0])
    assert follower._channel.cpus == {CPUS[1]}
    follower.cpu_offline(CPUS[1])
    assert follower._channel.cpus == set(CPUS)


def test_a_client_that_is_gone(follower):
    client = Client()
    client.tid = 0
    follower.watch(client)
    assert follower._channel.cpus == set(CPUS)


def test_new_readers_are_bound_too():
    kernel = Kernel()
    wait_until(lambda: len(kernel.channel.threads()) == 1)
    kernel.channel.set_affinity({CPUS[1]})
    for unique in range(2, 10, 2):
        kernel.send_ioctl(unique, BLOCK)
    wait_until(lambda: len(kernel.channel.threads()) == 5)
    wait_until(lambda: all(os.sched_getaffinity(tid) == {CPUS[1]} for tid in kernel.channel.threads()))
    kernel.channel.set_affinity(CPUS)
    assert all(os.sched_getaffinity(tid) == set(CPUS) for tid in kernel.channel.threads())
    wait_until(lambda: all(r.context is not None for r in kernel.channel.inflight.values()))
    kernel.send_ioctl(100, WAKE)


def test_watch_comes_for_every_64th():
    kernel, seen = Kernel(), []
    kernel.channel.watch = lambda request: seen.append(request.unique)
    kernel.channel.may_block()          # not a reader: nothing
    for unique in range(2, 2 + 2 * 640, 2):
        kernel.send_ioctl(unique, BLOCK)
        kernel.send_interrupt(unique)
        kernel.reply()
    wait_until(lambda: len(seen) >= 640 // 64 - len(kernel.channel.threads()))
    assert len(seen) <= 10
