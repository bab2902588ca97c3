# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker's readers follow the host CPU that their client runs on.

Client and worker never run at the same time: one waits for the other.  A wake-up on the same CPU is a change of
threads; on another one it is an interrupt and, worse, the end of that CPU's sleep, which makes an exit of a guest
four times as long.  Left alone the scheduler sees two idle CPUs and parts them again and again.

To be bound does not help while the scheduler wakes the client on an idle CPU at each answer, because its own is the worker's at
that moment.  It does not count a CPU as taken where nobody but SCHED_IDLE threads run, so the readers become such threads
then, for as long as nobody else wants that CPU (_yielding.c).  A worker may not end that by itself: the zygote does it
(ordinary.py), for which the daemon needs CAP_SYS_NICE; without it such a client is left alone.

Only a vCPU with many exits is followed.  One that computes must be free to go where there is room, so what was
bound is set free as soon as the exits get rare; several vCPUs at once are never bound at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmfs.fuse.channel import Channel, Request

# Seconds within which `Channel.watch` must come again (after 64 exits, or 256 quick ones), or the readers are set free.
PERIOD = 0.05
# Who follows a client that is woken elsewhere at each answer is always a step behind, which is worse than not to be
# bound: after so many moves in a row the readers yield.  Where they may not, or others want that CPU, the client is left
# alone for a while, each time longer (seconds).
MOVES, PAUSE, LONGEST_PAUSE = 4, 1.0, 32.0
CALM = 64               # looks without a move that end the row
LOOK_NS = 5_000_000     # between two looks whether somebody else wants the CPU of readers that yield
CONTENDED = 1           # yd_watch saw that somebody does

_PROCESSOR = 36         # field of /proc/TID/stat, counted after the command's name (proc(5): 39)
_MAX_FILES = 16


@functools.cache
def load() -> ctypes.CDLL | None:
    """The native part; None: it is not built.  It needs no more files once it is loaded."""
    spec = importlib.util.find_spec("kvmd._yielding")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


class Follower:
    """Binds the threads of ``channel``; ``tasks`` is the client's /proc/TGID/task.

    ``ordinary`` is a pipe where a byte makes all threads of this process ordinary; -1: none may yield.
    """

    def __init__(self, channel: Channel, tasks: int, ordinary: int = -1) -> None:
        self._channel, self._tasks, self._ordinary = channel, tasks, ordinary
        self._files: dict[int, int] = {}        # client thread -> its stat file
        self._seen: dict[int, float] = {}       # client thread -> when it last had many exits
        self._cpu = -1                          # where the readers are bound; -1: free
        self._moves = self._calm = 0
        self._tid = 0                           # the client thread that is followed
        self._yielding = False                  # the readers are SCHED_IDLE
        self._may_yield = ordinary >= 0 and load() is not None
        self._pause, self._until = PAUSE, 0.0   # nothing is bound until then
        self._lock = threading.Lock()
        self._bound = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, request: Request) -> None:
        """For ``Channel.watch``: the client thread has made a number of calls that ran its guest."""
        if not self._lock.acquire(blocking=False):
            return                              # another reader is at it
        try:
            tid, now = request.tid, time.monotonic()
            self._seen[tid] = now
            if len(self._seen) > 1:
                self._forget(now - PERIOD)
            if len(self._seen) > 1:
                self._release()
            elif now >= self._until:
                self._tid = tid
                self._follow(self._processor(tid), now)
        finally:
            self._lock.release()

    def _follow(self, cpu: int, now: float) -> None:
        if cpu == self._cpu:
            self._calm += 1
            if self._calm == CALM:
                self._moves, self._pause = 0, PAUSE
            return
        self._calm = 0
        self._moves += self._cpu >= 0 and not self._yielding
        if self._moves == MOVES:
            if not self._may_yield:
                self._leave_alone(now)
                return
            self._moves, self._yielding = 0, True
            self._channel.make_idle()
        self._bind(cpu)

    def _leave_alone(self, now: float) -> None:
        self._moves = 0
        self._until, self._pause = now + self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._release()

    def cpu_offline(self, cpu: int) -> None:
        """That host CPU is gone."""
        with self._lock:
            if self._cpu == cpu:
                self._release()

    def _processor(self, tid: int) -> int:
        """The CPU that ``tid`` runs on, or ran on last; -1 when it is gone."""
        try:
            file = self._files.get(tid)
            if file is None:
                if len(self._files) >= _MAX_FILES:
                    for old in self._files.values():
                        os.close(old)
                    self._files.clear()
                file = self._files[tid] = os.open(f"{tid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._tasks)
            text = os.pread(file, 1024, 0)
            return int(text[text.rindex(b")") + 2:].split(None, _PROCESSOR + 1)[_PROCESSOR])
        except (OSError, ValueError, IndexError):
            return -1

    def _bind(self, cpu: int) -> None:
        # The main thread is never bound: it shows what the administrator allows.
        if cpu not in os.sched_getaffinity(os.getpid()):
            self._release()
            return
        try:
            self._channel.set_affinity({cpu})
        except OSError:                         # it goes offline just now
            self._release()
            return
        self._cpu = cpu
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch_pace, name="affinity", daemon=True)
            self._thread.start()
        elif self._thread.native_id is not None:
            # Each time that it went to sleep on the other CPU the scheduler would look for something to do there: the client.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self._thread.native_id, {cpu})
        self._bound.set()

    def _release(self) -> None:
        if self._cpu < 0:
            return
        self._cpu = -1
        yielding, self._yielding = self._yielding, False
        if yielding:
            with contextlib.suppress(BlockingIOError):      # it is asked to already
                os.write(self._ordinary, b"\0")
        # OSError: a thread has just ended, or the CPUs went offline, and then the kernel moves the threads.
        with contextlib.suppress(OSError):
            allowed = os.sched_getaffinity(os.getpid())
            self._channel.set_affinity(allowed)
            # A thread that a bound one has started meanwhile is bound, too.
            for name in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(name), allowed)

    def _forget(self, limit: float) -> None:
        for tid in [tid for tid, seen in self._seen.items() if seen < limit]:
            del self._seen[tid]

    def _watch_pace(self) -> None:
        """Thread: what is bound is set free when its exits get rare.  It sleeps while nothing is bound."""
        while True:
            self._bound.wait()
            verdict = 0
            if self._yielding:
                verdict = self._watch_contention(load())
            else:
                time.sleep(PERIOD)
            with self._lock:
                now = time.monotonic()
                self._forget(now - PERIOD)
                if verdict:
                    self._may_yield = verdict == CONTENDED
                    self._leave_alone(now)
                if not self._seen:
                    self._release()
                if self._cpu < 0:
                    self._bound.clear()

    def _watch_contention(self, native: ctypes.CDLL | None) -> int:
        """For PERIOD, or until somebody else wants the readers' CPU: then not 0, and they are ordinary threads."""
        assert native is not None
        threads = self._channel.threads()
        client = -1
        with contextlib.suppress(OSError):
            client = os.open(f"{self._tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._tasks)
        try:
            return int(native.yd_watch((ctypes.c_int * len(threads))(*threads), len(threads), client, self._ordinary,
                                       ctypes.c_long(LOOK_NS), int(PERIOD * 1e9 / LOOK_NS)))
        finally:
            if client >= 0:
                os.close(client)
