# SPDX-License-Identifier: GPL-2.0-or-later
"""What /proc and pidfds tell about a client process, and the descriptors taken from it."""

import contextlib
import errno
import os
import select
import time
from typing import Final, Self

from kvmfs.client.maps import Vma, read_vmas
from kvmfs.client.memory import ClientMemory, open_memory
from kvmfs.client.syscalls import SYS_PIDFD_GETFD, SYS_PIDFD_OPEN, syscall

PIDFD_THREAD: Final = os.O_EXCL  # 6.9: the pidfd of one thread, not of its group
_OWNED_FOR: Final = 1.0  # seconds that a thread id is trusted; ids are not reused within that


def status_field(tid: int, name: str) -> str | None:
    """The value of one line of /proc/TID/status, or None when the thread is gone or has no such line."""
    prefix = name.encode() + b":"
    try:
        with open(f"/proc/{tid}/status", "rb") as f:
            for line in f:
                if line.startswith(prefix):
                    return line[len(prefix) :].strip().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def tgid_of(tid: int) -> int:
    """The thread group of `tid`. OSError ESRCH when it is gone."""
    value = status_field(tid, "Tgid")
    if value is None:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
    return int(value)


def tracer_of(tid: int) -> int:
    """The thread that traces `tid`, 0 for none (or when `tid` is gone)."""
    return int(status_field(tid, "TracerPid") or 0)


def command_of(pid: int) -> str:
    """The command name of `pid` for messages: comm, or "?" when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return "?"


def pidfd_open(pid: int, flags: int = 0) -> int:
    """pidfd_open(2); close-on-exec. OSError ESRCH, EINVAL (flags unknown, or a mere thread)."""
    return syscall(SYS_PIDFD_OPEN, pid, flags)


def take_descriptor(tid: int, tgid: int, fd: int) -> int:
    """A duplicate, close-on-exec, of descriptor number `fd` of thread `tid`.

    Threads nearly always share their descriptor table, so before 6.9 the thread group's leader is asked.
    Errors: OSError EBADF (no such descriptor), ESRCH (gone), EPERM (not allowed to trace).
    """
    try:
        pidfd = pidfd_open(tid, PIDFD_THREAD)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        pidfd = pidfd_open(tgid)
    try:
        return syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)


class Process:
    """A client process, known by one of its threads. Holds a pidfd, its memory and its /proc/PID/task."""

    __slots__ = ("_owned", "_poll", "_task_fd", "memory", "pidfd", "tgid", "tid")

    def __init__(self, tid: int, tgid: int, *, pidfd: int, mem_fd: int, task_fd: int) -> None:
        """Take over three descriptors: the group's pidfd, /proc/TGID/mem and the directory /proc/TGID/task.

        None of the methods that a worker needs (owns, alive, memory) asks for privilege after that.
        """
        self.tid = tid
        self.tgid = tgid
        self.pidfd = pidfd
        self.memory = ClientMemory(mem_fd)
        self._task_fd = task_fd
        self._owned: dict[int, float] = {}
        self._poll = select.poll()
        self._poll.register(pidfd, select.POLLIN)

    @classmethod
    def from_tid(cls, tid: int) -> Self:
        """Open the process that thread `tid` belongs to.

        Errors: OSError ESRCH (gone), EACCES or EPERM (not allowed to trace it).
        """
        tgid = tgid_of(tid)
        with contextlib.ExitStack() as stack:
            pidfd = pidfd_open(tgid)
            stack.callback(os.close, pidfd)
            mem_fd = open_memory(tid)
            stack.callback(os.close, mem_fd)
            try:
                task_fd = os.open(f"/proc/{tgid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise ProcessLookupError(errno.ESRCH, f"process {tgid} is gone") from None
            stack.callback(os.close, task_fd)
            # The pidfd pins tgid from here on; the answer before it could have been about an older process.
            try:
                os.stat(str(tid), dir_fd=task_fd)
            except FileNotFoundError:
                raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone") from None
            process = cls(tid, tgid, pidfd=pidfd, mem_fd=mem_fd, task_fd=task_fd)
            stack.pop_all()
        return process

    @property
    def mem_fd(self) -> int:
        """The descriptor of /proc/TGID/mem, to be handed to a worker."""
        return self.memory.fd

    @property
    def task_fd(self) -> int:
        """The descriptor of /proc/TGID/task, to be handed to a worker."""
        return self._task_fd

    def owns(self, tid: int) -> bool:
        """Whether `tid` is a thread of this process (a forked child's is not); cheap."""
        now = time.monotonic()
        if now < self._owned.get(tid, 0.0):
            return True
        try:
            os.stat(str(tid), dir_fd=self._task_fd)
        except OSError:
            self._owned.pop(tid, None)
            return False
        if len(self._owned) > 1024:
            self._owned.clear()
        self._owned[tid] = now + _OWNED_FOR
        return True

    def alive(self) -> bool:
        """Whether the process still runs (a zombie does not)."""
        return not self._poll.poll(0)

    def threads(self) -> list[int]:
        """The thread ids of this process, zombies included; empty when it is gone."""
        try:
            return [int(name) for name in os.listdir(self._task_fd)]
        except OSError:
            return []

    def proc(self, name: str) -> str:
        """The path of /proc/…/NAME of a living thread: an exited leader shows no maps and no descriptors."""
        if self.owns(self.tid):
            return f"/proc/{self.tgid}/task/{self.tid}/{name}"
        for tid in self.threads():
            if (status_field(tid, "State") or "Z")[0] not in "ZX":
                self.tid = tid
                return f"/proc/{self.tgid}/task/{tid}/{name}"
        raise ProcessLookupError(errno.ESRCH, f"process {self.tgid} is gone")

    def vmas(self, lo: int = 0, hi: int = 1 << 64) -> list[Vma]:
        """The mappings that overlap [lo, hi), in address order, not clipped. OSError ESRCH."""
        try:
            with open(self.proc("maps"), "rb") as f:
                return read_vmas(f, lo, hi)
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError(errno.ESRCH, f"process {self.tgid} is gone") from None

    def tracer(self, tid: int | None = None) -> int:
        """The thread id that traces `tid` (default: the thread this object was made from), 0 for none."""
        return tracer_of(self.tid if tid is None else tid)

    def getfd(self, fd: int, tid: int | None = None) -> int:
        """A duplicate, close-on-exec, of the client's descriptor `fd`. OSError EBADF, ESRCH, EPERM."""
        return take_descriptor(self.tid if tid is None else tid, self.tgid, fd)

    def close(self) -> None:
        """Close all descriptors; harmless when they are closed already."""
        self.memory.close()
        for fd in (self.pidfd, self._task_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.pidfd = self._task_fd = -1
