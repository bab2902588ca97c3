# SPDX-License-Identifier: GPL-2.0-or-later
"""The readers of a worker follow their client's CPU, and are set free again."""

from __future__ import annotations

import os
import threading
import time

import pytest

from kvmd.affinity import MOVES, PERIOD, Follower
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
        self.cpus = set(CPUS)

    def set_affinity(self, cpus):
        self.cpus = set(cpus)


@pytest.fixture
def follower():
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    yield Follower(Readers(), tasks)
    os.close(tasks)


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
