# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers of a VM's devices, in nanoseconds of CLOCK_MONOTONIC: one thread for all, which sleeps on a timerfd.

To set that is a system call, while to notify a thread would be a change of threads, between a guest's write to its timer and
its next instruction.

Functions run in that thread, or in that of a vCPU that is halted, with the interrupt controllers' lock held, as everything
that sets or cancels a timer does: a timer that was cancelled does not fire any more.
"""

from __future__ import annotations

import ctypes
import heapq
import logging
import os
import threading
import time
from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000
SLACK = 300_000                 # ns that the thread leaves to a halted vCPU that waits for the same timer
log = logging.getLogger("kvmfs.hrtimer")
now_ns = time.monotonic_ns
_TFD_TIMER_ABSTIME = 1
_libc = ctypes.PyDLL(None, use_errno=True)      # what it is used for takes less time than to give up the GIL


class Alarm:
    """A timerfd.  Raises OSError."""

    def __init__(self) -> None:
        self._spec = (ctypes.c_long * 4)()      # struct itimerspec: seconds and nanoseconds of interval and value
        self._at = -1
        self.fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_create: {os.strerror(ctypes.get_errno())}")

    def set(self, at: int) -> None:
        """``wait`` returns at ``at``, at once when that is past."""
        if at == self._at:
            return
        self._at = at
        self._spec[2], self._spec[3] = divmod(max(at, 1), NSEC_PER_SEC)
        if _libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, self._spec, None) < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def wait(self) -> None:
        """Until the time that was set; never, when none was set since the last one."""
        os.read(self.fd, 8)
        self._at = -1


class HrTimer:
    """``struct hrtimer``.  ``function`` returns when to fire again, or None.

    ``expires`` keeps its last value when the timer is cancelled or has fired.
    """

    __slots__ = ("_timers", "active", "expires", "function")

    def __init__(self, timers: HrTimers, function: Callable[[], int | None]) -> None:
        self._timers, self.function = timers, function
        self.expires, self.active = 0, False

    def start(self, expires: int) -> None:
        """Fire at ``expires``, or at once when that is past; a second start replaces the first."""
        self.expires, self.active = expires, True
        self._timers.add(self)

    def cancel(self) -> None:
        self.active = False

    def remaining(self) -> int:
        """Negative after it fired."""
        return self.expires - now_ns()


class HrTimers:
    """The timers of one VM, under ``lock``."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock, self._alarm = lock, Alarm()
        self._queue: list[tuple[int, int, HrTimer]] = []
        self._count = 0
        self._closed = False
        self._sleeper = False           # a halted vCPU waits for the first timer
        self._thread = threading.Thread(target=self._run, name="hrtimer", daemon=True)
        self._thread.start()

    def sleep(self, wake: threading.Event) -> None:
        """Wait for ``wake``, firing timers meanwhile: a halted vCPU's own tick then costs no change of threads.

        One vCPU at a time does so; returns also when a timer may have come.
        """
        with self._lock:
            wait = 0
            while not self._sleeper and wait == 0:
                left = self._fire()
                if left is None:
                    break
                wait = max(left, 0)
            if wait:
                self._sleeper = True
                self._set_alarm()
        if not wait:
            wake.wait()
            return
        try:
            wake.wait(wait / NSEC_PER_SEC)
        finally:
            with self._lock:
                self._sleeper = False
                if self._queue and self._queue[0][0] > now_ns():
                    self._set_alarm()

    def add(self, timer: HrTimer) -> None:
        self._count += 1
        heapq.heappush(self._queue, (timer.expires, self._count, timer))
        if len(self._queue) > 64 and len(self._queue) > 4 * sum(t.active for _, _, t in self._queue):
            self._queue = [entry for entry in self._queue if self._valid(entry)]
            heapq.heapify(self._queue)
        self._drop_cancelled()
        if self._queue[0][2] is timer:
            self._set_alarm()

    @staticmethod
    def _valid(entry: tuple[int, int, HrTimer]) -> bool:
        return entry[2].active and entry[2].expires == entry[0]

    def _drop_cancelled(self) -> None:
        while self._queue and not self._valid(self._queue[0]):
            heapq.heappop(self._queue)

    def _set_alarm(self) -> None:
        if not self._closed:
            self._alarm.set(self._queue[0][0] + SLACK * self._sleeper)

    def close(self) -> None:
        """No timer fires any more.  Call it without the lock."""
        with self._lock:
            if not self._closed:
                self._alarm.set(0)
            self._closed = True
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                left: int | None = 0
                while left is not None and left <= 0 and not self._closed:
                    left = self._fire()
                if left is not None:
                    self._set_alarm()
            self._alarm.wait()
        os.close(self._alarm.fd)

    def _fire(self) -> int | None:
        """Fire the first timer if it is due; how long to wait then."""
        self._drop_cancelled()
        if not self._queue:
            return None
        wait = self._queue[0][0] - now_ns()
        if wait > 0:
            return wait
        timer = heapq.heappop(self._queue)[2]
        timer.active = False
        try:
            again = timer.function()
        except Exception:
            log.exception("a timer's function failed")
            again = None
        if again is not None and not timer.active:
            timer.start(again)
        return 0
