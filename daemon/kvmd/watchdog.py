# SPDX-License-Identifier: GPL-2.0-or-later
"""Deadlines for calls into the kernel that wait for a worker.

The daemon opens files that a worker serves.  Such a call cannot be given a timeout, but it ends when the worker
dies: so a call that takes too long is ended by killing the worker.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """One thread, started with the first deadline, that calls what was not done in time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[int, tuple[float, Callable[[], None]]] = {}
        self._tickets = itertools.count()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, seconds: float, overdue: Callable[[], None]) -> Iterator[None]:
        """Call ``overdue`` from another thread when the body takes longer than ``seconds``."""
        ticket = next(self._tickets)
        with self._changed:
            self._deadlines[ticket] = (time.monotonic() + seconds, overdue)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()
            if len(self._deadlines) == 1:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadlines.pop(ticket, None)

    def _run(self) -> None:
        while True:
            late: list[Callable[[], None]] = []
            with self._changed:
                if not self._deadlines:
                    self._changed.wait()
                    continue
                now = time.monotonic()
                for ticket, (deadline, overdue) in list(self._deadlines.items()):
                    if deadline <= now:
                        late.append(overdue)
                        del self._deadlines[ticket]
                if not late:
                    # A deadline that is added meanwhile is never nearer than a second: look once a second.
                    nearest = min(deadline for deadline, _ in self._deadlines.values())
                    self._changed.wait(min(nearest - now, 1.0))
            for overdue in late:
                overdue()
