# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker whose threads yield can have that ended, and nothing else."""

from __future__ import annotations

import os
import select
import signal

import pytest

from kvmd import ordinary, sandbox
from kvmd.ordinary import Yielders

pytestmark = pytest.mark.skipif(not ordinary.possible(), reason="needs CAP_SYS_NICE")


@pytest.fixture
def worker():
    """The pid of a SCHED_IDLE process of another user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        uid = sandbox.worker_uid(3)
        if uid is not None:
            os.setresuid(uid, uid, uid)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.write(writer, b"x")
        signal.pause()
    assert os.read(reader, 1) == b"x"
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)


def served(yielders, poll):
    """One round of the zygote's loop."""
    fds = {fd for fd, _ in poll.poll(yielders.timeout() or 0)}
    yielders.serve_late()
    yielders.serve(fds)
    return fds


def test_on_request_and_not_too_often(worker):
    poll = select.poll()
    yielders = Yielders(poll)
    ours, theirs = yielders.pipe()
    yielders.add(ours, worker)
    assert served(yielders, poll) == set()
    assert os.sched_getscheduler(worker) == os.SCHED_IDLE
    os.write(theirs, b"x" * 1000)
    served(yielders, poll)
    assert os.sched_getscheduler(worker) == os.SCHED_OTHER

    os.sched_setscheduler(worker, os.SCHED_IDLE, os.sched_param(0))
    yielders._workers[ours].until += 0.2
    os.write(theirs, b"x")
    assert served(yielders, poll) == {ours}
    assert os.sched_getscheduler(worker) == os.SCHED_IDLE       # later: it has just been served
    assert 0 < yielders.timeout() < 300
    assert served(yielders, poll) == set()
    assert os.sched_getscheduler(worker) == os.SCHED_OTHER
    assert yielders.timeout() is None

    os.close(theirs)
    served(yielders, poll)
    assert served(yielders, poll) == set()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)


def test_a_worker_that_ends_while_it_waits(worker):
    poll = select.poll()
    yielders = Yielders(poll)
    ours, theirs = yielders.pipe()
    yielders.add(ours, worker)
    os.write(theirs, b"x")
    served(yielders, poll)
    os.write(theirs, b"x")
    served(yielders, poll)
    os.close(theirs)
    while yielders._workers:
        served(yielders, poll)


def test_nothing_where_it_cannot_be(monkeypatch):
    monkeypatch.setattr(ordinary, "possible", lambda: False)
    poll = select.poll()
    yielders = Yielders(poll)
    assert yielders.pipe() == (-1, -1)
    yielders.add(-1, 1)
    assert served(yielders, poll) == set()
