# SPDX-License-Identifier: GPL-2.0-or-later
"""ptrace(2) requests, stops and registers: what tracer.py and stop.py have in common."""

import ctypes
import errno
import os
import signal
import threading
import time
from typing import Final

from kvmfs.client.process import command_of, status_field, tracer_of
from kvmfs.client.syscalls import ptrace

PTRACE_CONT: Final = 7
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_O_TRACESYSGOOD: Final = 1
PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21
PTRACE_EVENT_STOP: Final = 128
WALL: Final = 0x40000000
SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
TIMEOUT: Final = 5.0  # seconds that any single wait for a client may take
_SPINS: Final = 300


class TracedError(PermissionError):
    """The client is traced by another program; its text is for the user."""


class ClientGoneError(ProcessLookupError):
    """The client's thread ended while it was held; it has been reaped."""


class Registers(ctypes.Structure):
    """C `struct user_regs_struct` of x86-64."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in [
            "r15",
            "r14",
            "r13",
            "r12",
            "rbp",
            "rbx",
            "r11",
            "r10",
            "r9",
            "r8",
            "rax",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "orig_rax",
            "rip",
            "cs",
            "eflags",
            "rsp",
            "ss",
            "fs_base",
            "gs_base",
            "ds",
            "es",
            "fs",
            "gs",
        ]
    )


def signed(value: int) -> int:
    """A register's 64 bits as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def wait_status(tid: int, deadline: float) -> int | None:
    """The next wait status of `tid`, or None at `deadline` (time.monotonic).

    OSError ECHILD when there is nothing to wait for. OSError ECHILD when there is nothing to wait for. A
    stop usually comes within microseconds, so it is first looked for while giving up the core, then with
    growing sleeps.
    """
    for _ in range(_SPINS):
        pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        if pid:
            return status
        os.sched_yield()
    pause = 20e-6
    while True:
        pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        if pid:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 2e-3)


def is_event_stop(status: int) -> bool:
    """Whether a stopped status is PTRACE_EVENT_STOP (our interrupt, or a group stop)."""
    return status >> 16 == PTRACE_EVENT_STOP


def attach(tid: int, options: int, deadline: float) -> int:
    """PTRACE_SEIZE and PTRACE_INTERRUPT `tid`; returns the options that the kernel allowed.

    Errors: TracedError (another program traces it), ESRCH (gone or a zombie), EPERM (no right to trace),
    EBUSY (another thread of this process kept it until the deadline).
    """
    while True:
        try:
            ptrace(PTRACE_SEIZE, tid, 0, options)
            break
        except PermissionError:
            pass
        # SUSPEND_SECCOMP wants CAP_SYS_ADMIN in the initial namespace and no seccomp filter on ourselves.
        if options & PTRACE_O_SUSPEND_SECCOMP:
            options &= ~PTRACE_O_SUSPEND_SECCOMP
            continue
        state = (status_field(tid, "State") or "X")[0]
        if state in "ZX":
            raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
        tracer = tracer_of(tid)
        if not tracer:
            # A tracer that let go just now is not an answer; ask once more before calling it a matter of
            # rights.
            try:
                ptrace(PTRACE_SEIZE, tid, 0, options)
                break
            except PermissionError:
                if tracer_of(tid) == 0:
                    raise PermissionError(
                        errno.EPERM,
                        f"may not trace thread {tid} ({command_of(tid)}): CAP_SYS_PTRACE over it is needed"
                        " (check kernel.yama.ptrace_scope and its user namespace)",
                    ) from None
                continue
        if not os.path.exists(f"/proc/self/task/{tracer}"):
            raise TracedError(
                errno.EPERM,
                f"thread {tid} ({command_of(tid)}) is traced by process {tracer} ({command_of(tracer)}),"
                " so it cannot be given descriptors from outside; start the program with `kvmfs run`"
                " to use it under a tracer",
            )
        if time.monotonic() >= deadline:
            raise OSError(errno.EBUSY, f"thread {tid} is still held by thread {tracer} of this process")
        time.sleep(200e-6)
    ptrace(PTRACE_INTERRUPT, tid)
    return options


class ClientLocks:
    """A lock per client thread group, forgotten when nobody holds or wants it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[int] = set()

    def acquire(self, tgid: int, deadline: float) -> None:
        """Take the lock of `tgid`. OSError EBUSY at the deadline (time.monotonic)."""
        with self._changed:
            while tgid in self._held:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise OSError(errno.EBUSY, f"process {tgid} is still being worked on by another thread")
            self._held.add(tgid)

    def release(self, tgid: int) -> None:
        """Give the lock of `tgid` back."""
        with self._changed:
            self._held.discard(tgid)
            self._changed.notify_all()
