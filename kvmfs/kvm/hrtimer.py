# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers of a VM's devices, in nanoseconds of CLOCK_MONOTONIC: one thread for all, started by the first.

Functions run in that thread, or in that of a vCPU that is halted, with the interrupt controllers' lock held, as everything
that sets or cancels a timer does: a timer that was cancelled does not fire any more.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000
NEVER = 1 << 63
SLACK = 300_000                 # ns that the thread leaves to a halted vCPU that waits for the same timer
log = logging.getLogger("kvmfs.hrtimer")
now_ns = time.monotonic_ns


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
        self._changed = threading.Condition(lock)
        self._queue: list[tuple[int, int, HrTimer]] = []
        self._count = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._sleeper = False           # a halted vCPU waits for the first timer
        self._wakes_at = NEVER          # when the thread looks again by itself

    def sleep(self, wake: threading.Event) -> None:
        """Wait for ``wake``, firing timers meanwhile: a halted vCPU's own tick then costs no change of threads.

        One vCPU at a time does so; returns also when a timer may have come.
        """
        with self._changed:
            wait = 0
            while not self._sleeper and wait == 0:
                left = self._fire()
                if left is None:
                    break
                wait = max(left, 0)
            if wait:
                self._sleeper = True
        if not wait:
            wake.wait()
            return
        try:
            wake.wait(wait / NSEC_PER_SEC)
        finally:
            with self._changed:
                self._sleeper = False

    def add(self, timer: HrTimer) -> None:
        self._count += 1
        heapq.heappush(self._queue, (timer.expires, self._count, timer))
        if len(self._queue) > 64 and len(self._queue) > 4 * sum(t.active for _, _, t in self._queue):
            self._queue = [entry for entry in self._queue if self._valid(entry)]
            heapq.heapify(self._queue)
        if self._thread is None:
            if self._closed:
                return
            self._thread = threading.Thread(target=self._run, name="hrtimer", daemon=True)
            self._thread.start()
        elif timer.expires < self._wakes_at:    # a guest that puts its timer off costs no change of threads
            self._wakes_at = timer.expires
            self._changed.notify()

    @staticmethod
    def _valid(entry: tuple[int, int, HrTimer]) -> bool:
        return entry[2].active and entry[2].expires == entry[0]

    def close(self) -> None:
        """No timer fires any more.  Call it without the lock."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                wait = self._fire()
                if wait is None:
                    self._wakes_at = NEVER
                    self._changed.wait()
                elif wait > 0:
                    wait += SLACK * self._sleeper
                    self._wakes_at = now_ns() + wait
                    self._changed.wait(wait / NSEC_PER_SEC)

    def _fire(self) -> int | None:
        """Fire the first timer if it is due; how long to wait then."""
        queue = self._queue
        while queue and not self._valid(queue[0]):
            heapq.heappop(queue)
        if not queue:
            return None
        wait = queue[0][0] - now_ns()
        if wait > 0:
            return wait
        timer = heapq.heappop(queue)[2]
        timer.active = False
        try:
            again = timer.function()
        except Exception:
            log.exception("a timer's function failed")
            again = None
        if again is not None and not timer.active:
            timer.start(again)
        return 0
