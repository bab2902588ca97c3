# SPDX-License-Identifier: GPL-2.0-or-later
"""Suspend and resume: the machine's (seen by its clocks) and the daemon's (SIGTSTP, SIGCONT).

While the daemon is suspended all vCPUs are out of their guests.  When the machine was suspended nobody could
act before; afterwards the VMs learn for how long.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvmd.power")

TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
FAR_FUTURE = (1 << 62) // 10**9
SLEPT = 0.05        # seconds of difference between the clocks that count as a suspend
_libc = ctypes.CDLL(None, use_errno=True)


def asleep() -> int:
    """Nanoseconds that this machine was suspended since it was started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class SuspendWatch:
    """Calls ``resumed(nanoseconds)`` in its own thread after the machine was suspended.

    A timer on the real-time clock is cancelled when that clock is set, which a resume does; so nothing polls.
    """

    def __init__(self, resumed: Callable[[int], None]) -> None:
        self._resumed = resumed
        self._timer = int(_libc.timerfd_create(time.CLOCK_REALTIME, os.O_CLOEXEC))
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._stop, self._wake = os.pipe2(os.O_CLOEXEC)
        self._before = asleep()
        self._arm()
        self._thread = threading.Thread(target=self._run, name="suspend-watch", daemon=True)
        self._thread.start()

    def _arm(self) -> None:
        setting = struct.pack("<4q", 0, 0, FAR_FUTURE, 0)
        if _libc.timerfd_settime(self._timer, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, setting, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._timer, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            if any(fd == self._stop for fd, _ in poll.poll()):
                return
            try:
                os.read(self._timer, 8)
            except OSError as error:
                if error.errno != errno.ECANCELED:
                    raise
            self._arm()
            now = asleep()
            slept, self._before = now - self._before, now
            if slept > SLEPT * 1e9:
                log.info("the machine was suspended for %.3f s", slept / 1e9)
                self._resumed(slept)

    def close(self) -> None:
        """Stop watching."""
        os.write(self._wake, b"x")
        self._thread.join()
        for fd in (self._timer, self._stop, self._wake):
            os.close(fd)


class JobControl:
    """SIGTSTP suspends all VMs and then this process; SIGCONT lets both go on.  Main thread only."""

    def __init__(self, suspend: Callable[[], None], resume: Callable[[int], None]) -> None:
        self._suspend, self._resume = suspend, resume
        self._stopped_at = 0
        self._old = (signal.signal(signal.SIGTSTP, self._tstp), signal.signal(signal.SIGCONT, self._cont))

    def _tstp(self, *_: object) -> None:
        def work() -> None:
            log.info("suspending all VMs")
            self._suspend()
            self._stopped_at = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            os.kill(os.getpid(), signal.SIGSTOP)

        threading.Thread(target=work, name="suspend").start()

    def _cont(self, *_: object) -> None:
        if not self._stopped_at:
            return
        slept = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._stopped_at
        self._stopped_at = 0
        log.info("resuming all VMs after %.3f s", slept / 1e9)
        threading.Thread(target=self._resume, args=(slept,), name="resume").start()

    def close(self) -> None:
        """Give the signals back."""
        signal.signal(signal.SIGTSTP, self._old[0])
        signal.signal(signal.SIGCONT, self._old[1])
