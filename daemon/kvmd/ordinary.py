# SPDX-License-Identifier: GPL-2.0-or-later
"""The zygote's help for workers whose threads yield: who is SCHED_IDLE may not end that by itself.

A worker's readers make themselves SCHED_IDLE while that serves their client (affinity.py).  Linux lets a thread come back from
there only with RLIMIT_NICE or CAP_SYS_NICE, which a worker has not.  So each one has a pipe to the zygote, and a byte in it makes
every thread of that worker ordinary again.  Nothing else can be had by it, for no other process, and not more often than
every INTERVAL.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass

from kvmd import sandbox

INTERVAL = 0.02         # seconds
_PASSES = 8             # over a worker's threads, until no new one is found


def possible() -> bool:
    """May this process make a worker's SCHED_IDLE thread ordinary?  Tried with a child."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            uid = sandbox.worker_uid(0)
            if uid is not None:
                os.setresuid(uid, uid, uid)
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.write(writer, b"\0")
            signal.pause()              # to be killed
        finally:
            os._exit(1)
    os.close(writer)
    try:
        if not os.read(reader, 1):
            return False
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def make_ordinary(pid: int) -> None:
    """Every SCHED_IDLE thread of process ``pid``."""
    for _ in range(_PASSES):            # one that is not ordinary yet may start another one meanwhile
        again = False
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    if os.sched_getscheduler(int(name)) == os.SCHED_IDLE:
                        os.sched_setscheduler(int(name), os.SCHED_OTHER, os.sched_param(0))
                        again = True
        if not again:
            return


@dataclass(slots=True)
class _Worker:
    pid: int
    until: float        # not served before that
    waits: bool         # for that, and is not polled


class Yielders:
    """The workers, by the ends of their pipes that ``poll`` has.  Used by one thread."""

    def __init__(self, poll: select.poll) -> None:
        self._poll = poll
        self._workers: dict[int, _Worker] = {}
        self.possible = possible()

    def pipe(self) -> tuple[int, int]:
        """For a worker that is about to be forked: our end and its end; -1, -1 when nobody may yield here."""
        if not self.possible:
            return -1, -1
        return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, reader: int, pid: int) -> None:
        """That pipe is worker ``pid``'s."""
        if reader >= 0:
            self._workers[reader] = _Worker(pid, 0.0, False)
            self._poll.register(reader, select.POLLIN)

    def serve(self, fds: set[int]) -> None:
        """What poll reported."""
        for fd in fds & self._workers.keys():
            worker, now = self._workers[fd], time.monotonic()
            if not worker.waits and now < worker.until:
                worker.waits = True
                self._poll.unregister(fd)
            else:
                self._serve(fd, worker, now)

    def serve_late(self) -> None:
        """Those whose turn has come meanwhile."""
        now = time.monotonic()
        for fd, worker in list(self._workers.items()):
            if worker.waits and now >= worker.until:
                worker.waits = False
                self._poll.register(fd, select.POLLIN)
                self._serve(fd, worker, now)

    def timeout(self) -> float | None:
        """Milliseconds until :meth:`serve_late` has something to do; None: nobody waits."""
        late = [worker.until for worker in self._workers.values() if worker.waits]
        return max(0.0, min(late) - time.monotonic()) * 1000 + 1 if late else None

    def _serve(self, fd: int, worker: _Worker, now: float) -> None:
        try:
            gone = os.read(fd, 4096) == b""
        except BlockingIOError:
            return
        if gone:                        # and its number may soon be another process's
            self._poll.unregister(fd)
            os.close(fd)
            del self._workers[fd]
            return
        worker.until = now + INTERVAL
        make_ordinary(worker.pid)
