# SPDX-License-Identifier: GPL-2.0-or-later
"""The zygote: a copy of the daemon from before it had threads, which forks the workers.

Forking a process with threads is not safe, and starting Python anew for each VM costs a third of a second.  The
zygote has everything imported, has one thread, and does nothing but fork on request and collect what ended.
Everything that a worker might import later is loaded here, because a worker may not be able to read the files.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pkgutil
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import kvmfs
from kvmd import sandbox
from kvmd.link import Link, LinkError, Message
from kvmd.ordinary import Yielders

_LARGE_PAGE, _MADV_COLLAPSE = 2 << 20, 25
_LARGEST = 64 << 20     # bytes: what is larger is the translator's, and hardly used
SPAWN_TIMEOUT = 10      # seconds for a fork; a machine out of memory may take long

WorkerMain = Callable[[Message, list[int]], None]


class ZygoteGoneError(OSError):
    """There is no zygote any more, so no VM can be made."""


class Zygote:
    """The daemon's side.  :meth:`spawn` may be called by any thread."""

    def __init__(self, pid: int, requests: Link, reports: Link) -> None:
        self.pid = pid
        self._requests = requests
        self.reports = reports          # messages "exited": read by the daemon's main loop
        self._lock = threading.Lock()

    @classmethod
    def start(cls, worker_main: WorkerMain, preload: Callable[[], None]) -> Zygote:
        """Fork the zygote.  The calling process must have one thread."""
        requests, theirs = Link.pair()
        reports, their_reports = Link.pair()
        daemon = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                requests.close()
                reports.close()
                _Server(theirs, their_reports, worker_main).run(daemon, preload)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        their_reports.close()
        zygote = cls(pid, requests, reports)
        ready = requests.receive(timeout=60)
        if ready is None or ready.op != "ready":
            raise ZygoteGoneError(5, "the zygote did not start")
        return zygote

    def spawn(self, number: int, fds: Sequence[int], **settings: object) -> tuple[int, int]:
        """Fork a worker that gets ``fds`` and ``settings``; returns its pid and a pidfd.

        Raises ZygoteGoneError, or OSError with fork's errno.
        """
        with self._lock:
            try:
                answer = self._requests.call("spawn", fds, timeout=SPAWN_TIMEOUT, number=number, **settings)
            except (OSError, LinkError) as error:
                raise ZygoteGoneError(5, f"the zygote does not answer: {error}") from error
        with answer:
            if answer.op == "failed":
                code = answer.integer("errno", 1, 4095)
                raise OSError(code, os.strerror(code), "fork of a worker")
            pid = answer.expect("spawned").integer("pid", 1)
            return pid, answer.take_fds()[0]

    def stop(self) -> None:
        """End it and wait until it is gone; workers that still live end with it."""
        self._requests.close()
        self.reports.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def _import_all() -> None:
    """Every module of the library, also those that are imported late: the checkout may be below a 0700 /root."""
    for module in pkgutil.walk_packages(kvmfs.__path__, "kvmfs."):
        # A native part is loaded by who uses it; kvmfs.testing is for clients.
        if not module.name.rpartition(".")[2].startswith("_") and not module.name.startswith("kvmfs.testing."):
            importlib.import_module(module.name)


def _collapse() -> None:
    """Have Python's memory in large pages.

    fork(2) and the end of a worker then take one instead of its 512 small pages, until one of those is written after a fork; that
    one is copied alone.  Before Linux 6.1 this does nothing.
    """
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        maps = [line.split(None, 5) for line in file]
    for addresses, access, _offset, _device, _inode, *name in maps:
        start, end = (int(address, 16) for address in addresses.split("-"))
        if access != "rw-p" or name not in ([], ["[heap]\n"]) or end - start > _LARGEST:
            continue
        for address in range(-(-start // _LARGE_PAGE) * _LARGE_PAGE, end - _LARGE_PAGE + 1, _LARGE_PAGE):
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(_LARGE_PAGE), _MADV_COLLAPSE)


class _Server:
    """The zygote itself."""

    def __init__(self, requests: Link, reports: Link, worker_main: WorkerMain) -> None:
        self._requests, self._reports, self._worker_main = requests, reports, worker_main
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()

    def run(self, daemon: int, preload: Callable[[], None]) -> NoReturn:
        # A ^C at the daemon's terminal is the daemon's.  No session of its own: the scheduler would part the workers from
        # clients that share the daemon's (autogroups), and each change between them cost a microsecond more.
        os.setpgid(0, 0)
        sandbox.set_name("kvmd-zygote")
        sandbox.end_with_parent(daemon)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)
        sandbox.close_all_but([self._requests.fileno(), self._reports.fileno(), self._wake, self._woken])
        _import_all()
        preload()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # it ends with the daemon, after the daemon is done with it
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        if threading.active_count() != 1:
            raise RuntimeError("something that was preloaded started a thread")
        self._yielders = Yielders(self._poll)
        gc.collect()
        _collapse()
        gc.freeze()                     # what is here now is shared with all workers; do not touch it to count it
        self._requests.send("ready")
        self._poll.register(self._requests, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        while True:
            events = {fd for fd, _ in self._poll.poll(self._yielders.timeout())}
            self._yielders.serve_late()
            self._yielders.serve(events)
            if self._wake in events:
                os.read(self._wake, 4096)
                self._reap()
            if self._requests.fileno() in events:
                message = self._requests.receive()
                if message is None:
                    os._exit(0)
                with message:
                    self._spawn(message)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            try:
                self._reports.send("exited", pid=pid, status=os.waitstatus_to_exitcode(status))
            except OSError:
                os._exit(0)

    def _spawn(self, message: Message) -> None:
        ours, theirs = -1, -1
        try:
            ours, theirs = self._yielders.pipe()
            pid = os.fork()
        except OSError as error:
            self._requests.send("failed", errno=error.errno)
            for fd in (ours, theirs):
                if fd >= 0:
                    os.close(fd)
            return
        if pid == 0:
            self._become_worker(message, theirs)
        if theirs >= 0:
            os.close(theirs)
        self._yielders.add(ours, pid)
        pidfd = os.pidfd_open(pid)      # before it can have been reaped
        try:
            self._requests.send("spawned", [pidfd], pid=pid)
        finally:
            os.close(pidfd)

    def _become_worker(self, message: Message, ordinary: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self._worker_main(message, [*message.take_fds(), ordinary])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
