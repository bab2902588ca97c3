# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for the eventfds of a VM: one epoll set, one thread that is started with the first of them and otherwise sleeps.

Linux's KVM hooks into an eventfd's wait queue (fs/eventfd.c); this is the nearest that a process can do.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

log = logging.getLogger("kvmfs.eventpoll")
_MAX_EVENTS = 64


class EventPoll:
    """Calls a function for each descriptor that was signalled, with ``lock`` held.

    Edge-triggered: a function that does not read its descriptor is called again only when that is signalled again.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._functions: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None
        self._end = -1

    def add(self, fd: int, function: Callable[[], None]) -> None:
        """``fd`` stays the caller's, who removes it before closing it.  A descriptor that is readable already counts."""
        with self._lock:
            if self._epoll is None:
                self._epoll, self._end = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._epoll.register(self._end, select.EPOLLIN)
                threading.Thread(target=self._run, name="eventpoll", daemon=True).start()
            self._functions[fd] = function
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def remove(self, fd: int) -> None:
        """The function is not called any more once this has returned."""
        with self._lock:
            del self._functions[fd]
            if self._epoll is not None:
                self._epoll.unregister(fd)

    def close(self) -> None:
        """The thread ends."""
        with self._lock:
            self._functions.clear()
            if self._epoll is not None:
                os.eventfd_write(self._end, 1)

    def _run(self) -> None:
        epoll, end, functions = self._epoll, self._end, self._functions
        if epoll is None:
            return
        poll = epoll.poll
        while True:
            for fd, _ in poll(-1, _MAX_EVENTS):
                if fd == end:
                    epoll.close()
                    os.close(end)
                    return
                with self._lock:
                    function = functions.get(fd)
                    if function is not None:
                        try:
                            function()
                        except Exception:
                            log.exception("an eventfd's function failed")
