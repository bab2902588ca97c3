# SPDX-License-Identifier: GPL-2.0-or-later
"""All threads of a client but one, stopped for a moment, without the client noticing.

The other threads are seized by a thread of their own that lives as long as the stop. That is the one way to
be rid of a tracee that cannot be stopped: when its tracer's thread ends, the kernel detaches it in any
state, takes back the interrupt that was pending, and reaps what has died.

A thread inside another KVM ioctl than KVM_RUN may wait for an answer that waits for us. It runs no code of
its own until then, and the interrupt that is pending stops it on its way out, so it counts as stopped. A
thread in KVM_RUN is answered with EINTR by its worker (FUSE sends it the interrupt) and is set back to
before its system call.
"""

import contextlib
import ctypes
import errno
import os
import threading
import time
from types import TracebackType
from typing import Final, Self

from kvmfs.client.process import Process, command_of, status_field
from kvmfs.client.ptrace import (
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_GETREGS,
    PTRACE_SETREGS,
    TIMEOUT,
    WALL,
    Registers,
    attach,
    is_event_stop,
    signed,
)
from kvmfs.client.syscalls import (
    SYS_EPOLL_PWAIT,
    SYS_EPOLL_PWAIT2,
    SYS_EPOLL_WAIT,
    SYS_IO_GETEVENTS,
    SYS_IO_PGETEVENTS,
    SYS_IO_URING_ENTER,
    SYS_IOCTL,
    SYS_RT_SIGTIMEDWAIT,
    SYS_SEMOP,
    SYS_SEMTIMEDOP,
    ptrace,
)

KVM_RUN: Final = 0xAE80
KVMIO: Final = 0xAE
_HELD_AFTER: Final = 5e-3  # seconds before an unstopped thread is asked what it is doing

# These return EINTR after any stop, also without a signal (signal(7)); everything else the kernel restarts
# itself.
_NOT_RESTARTED: Final = frozenset(
    {
        SYS_EPOLL_WAIT,
        SYS_EPOLL_PWAIT,
        SYS_EPOLL_PWAIT2,
        SYS_SEMOP,
        SYS_SEMTIMEDOP,
        SYS_RT_SIGTIMEDWAIT,
        SYS_IO_GETEVENTS,
        SYS_IO_PGETEVENTS,
        SYS_IO_URING_ENTER,
    }
)


class StoppedProcess:
    """Context manager: every thread of `process` except `keep` is stopped inside the `with`.

    `keep` is a thread that the caller holds itself (an arrived tracer.Thread), or None. Entering raises
    TracedError (EPERM), TimeoutError (ETIMEDOUT, its text names the thread and what it does) or OSError
    EPERM; all threads then run as before.
    """

    def __init__(self, process: Process, keep: int | None, *, timeout: float = TIMEOUT) -> None:
        self.process = process
        self.keep = keep
        self.timeout = timeout
        self.stopped: set[int] = set()
        self.held: set[int] = set()  # inside a KVM ioctl that is not answered yet
        self._running: set[int] = set()
        self._ready = threading.Event()
        self._release = threading.Event()
        self._error: BaseException | None = None
        self._tracer = threading.Thread(target=self._trace, name=f"stop-{process.tgid}", daemon=True)

    def __enter__(self) -> Self:
        if self.keep is not None and self.process.threads() == [self.keep]:
            return self  # stopped already, and nobody is there to make another thread
        self._tracer.start()
        self._ready.wait()
        if self._error is not None:
            self._tracer.join()
            raise self._error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release.set()
        if self._tracer.ident is not None:
            self._tracer.join()

    # -- in the tracing thread ---------------------------------------------------------------------

    def _trace(self) -> None:
        try:
            self._stop_all(time.monotonic() + self.timeout)
        except BaseException as e:
            self._error = e
            self._release.set()
        finally:
            self._ready.set()
        self._release.wait()
        for tid in self.stopped:
            with contextlib.suppress(OSError):
                _rewind(tid)
                ptrace(PTRACE_DETACH, tid)
        # The end of this thread detaches the rest.

    def _stop_all(self, deadline: float) -> None:
        """Seize and stop until no listing shows a new thread: a running one may make more."""
        known: set[int] = {self.keep} if self.keep is not None else set()
        while True:
            fresh = [tid for tid in self.process.threads() if tid not in known]
            if not fresh:
                return
            for tid in fresh:
                known.add(tid)
                try:
                    attach(tid, 0, deadline)
                except ProcessLookupError:
                    continue
                self._running.add(tid)
            self._collect(deadline)

    def _collect(self, deadline: float) -> None:
        """Wait until every thread of `_running` is stopped, gone, or known to be held."""
        look_at = time.monotonic() + _HELD_AFTER
        spins = 0
        while True:
            for tid in list(self._running):
                if self._poll(tid):
                    self._running.discard(tid)
            if not self._running:
                return
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _HELD_AFTER
                for tid in list(self._running):
                    if _in_held_ioctl(tid):
                        self._running.discard(tid)
                        self.held.add(tid)
            if now >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, _why_not(self._running.pop(), self.timeout))
            spins += 1
            if spins < 100:
                os.sched_yield()
            else:
                time.sleep(100e-6)

    def _poll(self, tid: int) -> bool:
        """Look at `tid` once; whether it needs no more waiting for."""
        try:
            pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        except ChildProcessError:
            return True
        if not pid:
            return False
        if not os.WIFSTOPPED(status):
            return True
        if is_event_stop(status):
            self.stopped.add(tid)
            return True
        # A signal that was on its way before the interrupt: it is delivered now, its handler starts after
        # the stop.
        with contextlib.suppress(ProcessLookupError):
            ptrace(PTRACE_CONT, tid, 0, status >> 8 & 0x7F)
        return False


def _rewind(tid: int) -> None:
    """Set a stopped thread back to before its system call if only the stop made that return EINTR.

    With a signal pending EINTR is right and stays. A signal that comes after this look meets the client as
    if it had come just before the call was made.
    """
    regs = Registers()
    ptrace(PTRACE_GETREGS, tid, 0, ctypes.addressof(regs))
    if signed(regs.rax) != -errno.EINTR:
        return
    run = regs.orig_rax == SYS_IOCTL and regs.rsi & 0xFFFFFFFF == KVM_RUN
    if not run and regs.orig_rax not in _NOT_RESTARTED:
        return
    if _signal_pending(tid):
        return
    regs.rax = regs.orig_rax
    regs.orig_rax = (1 << 64) - 1
    regs.rip -= 2
    ptrace(PTRACE_SETREGS, tid, 0, ctypes.addressof(regs))


def _signal_pending(tid: int) -> bool:
    sets = [int(status_field(tid, name) or "0", 16) for name in ("SigPnd", "ShdPnd", "SigBlk")]
    return bool((sets[0] | sets[1]) & ~sets[2])


def _in_held_ioctl(tid: int) -> bool:
    """Whether `tid` sits in a KVM ioctl other than KVM_RUN."""
    try:
        with open(f"/proc/{tid}/syscall", "rb") as f:
            fields = f.read().split()
        number, cmd = int(fields[0]), int(fields[2], 16) & 0xFFFFFFFF
    except (OSError, IndexError, ValueError):
        return False
    return number == SYS_IOCTL and cmd >> 8 & 0xFF == KVMIO and cmd != KVM_RUN


def _why_not(tid: int, timeout: float) -> str:
    try:
        with open(f"/proc/{tid}/syscall", encoding="ascii", errors="replace") as f:
            doing = f.read().strip()
    except OSError:
        doing = "unknown"
    state = status_field(tid, "State") or "gone"
    return (
        f"thread {tid} ({command_of(tid)}) of the client could not be stopped within {timeout:g} s:"
        f" state {state}, system call {doing}"
    )
