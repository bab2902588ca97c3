# SPDX-License-Identifier: GPL-2.0-or-later
"""One thread of a client, held by ptrace while it returns from an ioctl, and made to run system calls.

The order is: `Thread.seize(tid)` while its ioctl is unanswered, answer the ioctl, `arrive()`, work,
`finish(result)`. Seizing first means that the thread runs not one instruction of its own between the answer
and our work: the interrupt that seize leaves pending stops it on its way out of the kernel, before any
signal is delivered. All signals are then blocked; what comes meanwhile stays pending and is delivered, with
its siginfo, after `finish`.

Every method must be called by the operating system thread that called `seize`: ptrace knows its tracer by
thread.

Only one of this process's threads works on a client at a time (a lock per thread group, held from seize to
finish), so two VMs of one client cannot meet each other's stopped threads.

What was measured and rejected: blocking in waitpid has no time limit, and a limit by signal needs a handler
in a process that is not ours; PTRACE_SINGLESTEP halves the stops but resets the client's SIGTRAP action
when it is ignored.
"""

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, NoReturn, Self

from kvmfs.client.process import command_of, status_field, take_descriptor, tgid_of
from kvmfs.client.ptrace import (
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_GETREGS,
    PTRACE_GETSIGMASK,
    PTRACE_O_SUSPEND_SECCOMP,
    PTRACE_O_TRACESYSGOOD,
    PTRACE_SETREGS,
    PTRACE_SETSIGMASK,
    PTRACE_SYSCALL,
    SYSCALL_STOP,
    TIMEOUT,
    WALL,
    ClientGoneError,
    ClientLocks,
    Registers,
    TracedError,
    attach,
    is_event_stop,
    signed,
    wait_status,
)
from kvmfs.client.syscalls import (
    SYS_CLOSE,
    SYS_DUP3,
    SYS_MMAP,
    SYS_MUNMAP,
    SYS_RECVMSG,
    SYS_SOCKET,
    SYS_TGKILL,
    ptrace,
    syscall,
)

SYSCALL_INSN: Final = b"\x0f\x05"
RED_ZONE: Final = 128
SCRATCH_SIZE: Final = 256
_MAIN_STACK_NEAR: Final = 1 << 20
_MAX_ERRNO: Final = 4095
_ERESTART: Final = range(-516, -511)  # ERESTARTSYS … ERESTART_RESTARTBLOCK
_U64: Final = (1 << 64) - 1
_DEATH: Final = 0.1  # seconds in which a killed thread is gone, unless it waits for another one
_ALL_SIGNALS: Final = ctypes.c_uint64(_U64)

PROT_RW: Final = 3
MAP_PRIVATE_ANON: Final = 0x22


__all__ = ["TIMEOUT", "ClientGoneError", "Thread", "TracedError", "settle"]


_locks: Final = ClientLocks()
_left: Final = threading.local()  # .threads: tracees of this thread that did not stop or die in time


def _leftovers() -> "dict[int, Thread]":
    try:
        left: dict[int, Thread] = _left.threads
    except AttributeError:
        left = _left.threads = {}
    return left


def settle(timeout: float = 0.0) -> int:
    """Detach or reap what earlier calls of this thread had to leave behind; returns how many are still left.

    Waits up to `timeout` seconds. Call it now and then, after an answer was sent (`seize` does it too; the end of this thread
    does it for good). Leftovers exist only when a client did not come back in time or was killed while
    one of its other threads could not die yet.
    """
    left = _leftovers()
    deadline = time.monotonic() + timeout
    while True:
        for tid, thread in list(left.items()):
            if thread._try_release():
                del left[tid]
        if not left or time.monotonic() >= deadline:
            return len(left)
        time.sleep(1e-3)


class Thread:
    """A seized thread. States: seized (may still run in the kernel), arrived (stopped), done."""

    __slots__ = (
        "_dirty",
        "_locked",
        "_mask",
        "_mem_fd",
        "_regs",
        "_signals",
        "_state",
        "_work",
        "tgid",
        "tid",
        "timeout",
    )

    def __init__(self, tid: int, tgid: int, timeout: float) -> None:
        self.tid = tid
        self.tgid = tgid
        self.timeout = timeout
        self._regs = Registers()
        self._work = Registers()
        self._mask = ctypes.c_uint64()
        self._signals: list[int] = []
        self._state = "seized"
        self._locked = False
        self._dirty = False  # registers or mask are ours and must be put back
        self._mem_fd = -1  # its memory, as long as it is held

    @classmethod
    def seize(cls, tid: int, *, tgid: int | None = None, timeout: float = TIMEOUT) -> Self:
        """Seize and interrupt `tid`, which waits in an ioctl that is not answered yet. Returns at once.

        `timeout` in seconds bounds each later wait. Errors: TracedError (EPERM, another program traces it),
        OSError ESRCH, EPERM (no right), EBUSY (another thread of this process works on that client for
        longer than `timeout`).
        """
        if _leftovers():
            settle()
        deadline = time.monotonic() + timeout
        thread = cls(tid, tgid_of(tid) if tgid is None else tgid, timeout)
        _locks.acquire(thread.tgid, deadline)
        thread._locked = True
        try:
            if _leftovers().pop(tid, None) is None:
                attach(tid, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP, deadline)
        except BaseException:
            thread._done()
            raise
        return thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Abandon the thread unless it was finished."""
        self.abandon()

    def arrive(self) -> None:
        """Wait until the thread has come out of its ioctl, which must have been answered.

        Errors: ClientGoneError (ESRCH), TimeoutError (ETIMEDOUT), OSError ENOSYS (it did not enter the
        kernel by a 64-bit `syscall`). After TimeoutError call `abandon`; after ENOSYS the thread goes on by
        itself.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            status = self._wait(deadline)
            if is_event_stop(status):
                break
            # A signal stop ahead of the interrupt: keep the signal for the end, as its handler would move
            # rip.
            self._keep_signal(status)
            self._ptrace(PTRACE_CONT)
        self._state = "arrived"
        self._ptrace(PTRACE_GETREGS, 0, ctypes.addressof(self._regs))
        self._ptrace(PTRACE_GETSIGMASK, 8, ctypes.addressof(self._mask))
        try:
            code = self.read(self._regs.rip - len(SYSCALL_INSN), len(SYSCALL_INSN))
        except OSError:
            code = b""
        if not code and (status_field(self.tid, "State") or "X")[0] not in "tT":
            self._reap()  # killed: it is the address space that has gone
        if code != SYSCALL_INSN or signed(self._regs.orig_rax) < 0:
            self.abandon()
            raise OSError(
                errno.ENOSYS,
                f"thread {self.tid} did not stop at a 64-bit system call"
                f" (code {code.hex() or 'unreadable'} before rip):"
                " 32-bit programs are not supported",
            )
        self._dirty = True
        self._ptrace(PTRACE_SETSIGMASK, 8, ctypes.addressof(_ALL_SIGNALS))

    @property
    def registers(self) -> Registers:
        """The registers that the thread arrived with and will get back."""
        return self._regs

    def syscall(self, nr: int, *args: int) -> int:
        """Run system call `nr` in the arrived thread; returns what it returned (negative: -errno).

        Errors: ClientGoneError, TimeoutError, OSError EIO (a stop that this cannot explain).
        """
        work = self._work
        ctypes.memmove(ctypes.addressof(work), ctypes.addressof(self._regs), ctypes.sizeof(work))
        padded = (*(a & _U64 for a in args), 0, 0, 0, 0, 0, 0)
        work.rdi, work.rsi, work.rdx, work.r10, work.r8, work.r9 = padded[:6]
        work.rip = self._regs.rip - len(SYSCALL_INSN)
        work.orig_rax = _U64  # nothing for the kernel to restart on the way
        while True:
            work.rax = nr
            self._ptrace(PTRACE_SETREGS, 0, ctypes.addressof(work))
            deadline = time.monotonic() + self.timeout
            self._next_syscall_stop(deadline)
            self._next_syscall_stop(deadline)
            after = Registers()
            self._ptrace(PTRACE_GETREGS, 0, ctypes.addressof(after))
            result = signed(after.rax)
            # Only a stop signal gets through the mask; it makes a call say "restart", and restarting is
            # ours to do.
            if result not in _ERESTART:
                return result

    def read(self, addr: int, n: int) -> bytes:
        """`n` bytes of the client's memory. OSError EFAULT; ClientGoneError."""
        fd = self._memory()
        try:
            data = os.pread(fd, n, addr)
        except (OSError, OverflowError):
            data = b""
        if len(data) != n:
            raise OSError(errno.EFAULT, f"client memory {addr:#x}+{n:#x} is not accessible")
        return data

    def write(self, addr: int, data: bytes) -> None:
        """Write `data` into the client's memory. OSError EFAULT; ClientGoneError."""
        fd = self._memory()
        try:
            n = os.pwrite(fd, data, addr)
        except (OSError, OverflowError):
            n = 0
        if n != len(data):
            raise OSError(errno.EFAULT, f"client memory {addr:#x}+{len(data):#x} is not accessible")

    def receive(self, fd: int, *, cloexec: bool = True) -> tuple[int, int]:
        """Pass our descriptor `fd` into the client; returns its number there and a socket's, to be closed.

        An unbound datagram socket is made in the client, a duplicate of it here is bound and sends itself
        the descriptor: so the client's network namespace, root directory and user do not matter. Errors:
        OSError with the client's errno (EMFILE, ENFILE …).
        """
        sock_no = _checked(self.syscall(SYS_SOCKET, socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0), "socket")
        try:
            with socket.socket(fileno=take_descriptor(self.tid, self.tgid, sock_no)) as ours:
                ours.bind("")  # the kernel picks a free abstract name
                ours.setblocking(False)
                ours.sendmsg(
                    [b"x"],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))],
                    0,
                    ours.getsockname(),
                )
            number = self._receive_rights(sock_no, cloexec)
        except ClientGoneError:
            raise
        except OSError:
            self.close(sock_no)
            raise
        return number, sock_no

    def graft(self, fd: int, *, cloexec: bool = True) -> int:
        """Give the client a duplicate of our descriptor `fd`; returns its number, the lowest that was free.

        Errors: OSError with the client's errno (EMFILE …), ClientGoneError, TimeoutError.
        """
        number, sock_no = self.receive(fd, cloexec=cloexec)
        # The socket took the lowest free number, so the descriptor goes over it.
        result = self.syscall(SYS_DUP3, number, sock_no, os.O_CLOEXEC if cloexec else 0)
        self.close(number)
        if result < 0:
            self.close(sock_no)
        return _checked(result, "dup3")

    def mmap(self, addr: int, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        """mmap(2) in the client; returns the address. OSError with the client's errno."""
        result = self.syscall(SYS_MMAP, addr, size, prot, flags, fd, offset)
        if -_MAX_ERRNO <= result < 0:
            _checked(result, "mmap")
        return result & _U64

    def munmap(self, addr: int, size: int) -> None:
        """munmap(2) in the client. OSError with the client's errno."""
        _checked(self.syscall(SYS_MUNMAP, addr, size), "munmap")

    def close(self, fd: int) -> None:
        """close(2) in the client; its result does not matter, as on Linux the number is free in any case."""
        self.syscall(SYS_CLOSE, fd)

    def finish(self, rax: int) -> None:
        """Let the thread go on with `rax` (or -errno) as its ioctl's result. ClientGoneError when it died."""
        if self._state == "done":
            return
        self._regs.rax = rax & _U64
        self._let_go()

    def abandon(self) -> None:
        """Let the thread go on as if nothing had been done; never raises. `settle` gets one that runs."""
        if self._state == "done":
            return
        with contextlib.suppress(OSError):
            if self._state == "arrived":
                self._let_go()
                return
        if self._state != "done":
            if not self._try_release():
                _leftovers()[self.tid] = self
            self._done()

    # -- inside ------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Restore registers and mask, detach, deliver what was kept."""
        try:
            self._restore()
            self._resend_signals()
            ptrace(PTRACE_DETACH, self.tid)
        except ProcessLookupError:
            self._reap()
        self._done()

    def _restore(self) -> None:
        self._regs.orig_rax = _U64  # the ioctl is over: nothing for the kernel to restart
        ptrace(PTRACE_SETREGS, self.tid, 0, ctypes.addressof(self._regs))
        ptrace(PTRACE_SETSIGMASK, self.tid, 8, ctypes.addressof(self._mask))
        self._dirty = False

    def _resend_signals(self) -> None:
        for number in self._signals:
            with contextlib.suppress(OSError):
                syscall(SYS_TGKILL, self.tgid, self.tid, number)
        self._signals.clear()

    def _keep_signal(self, status: int) -> None:
        """Keep the signal of a signal-delivery stop; it is swallowed by going on with none."""
        number = status >> 8 & 0x7F
        if not is_event_stop(status) and number != signal.SIGTRAP:
            self._signals.append(number)

    def _next_syscall_stop(self, deadline: float) -> None:
        for _ in range(64):
            self._ptrace(PTRACE_SYSCALL)
            status = self._wait(deadline)
            if status >> 8 == SYSCALL_STOP:
                return
            # SIGSTOP passes every mask: the stop it asks for is taken after we are done.
            self._keep_signal(status)
            if status >> 8 & 0xFF in (
                signal.SIGSEGV,
                signal.SIGBUS,
                signal.SIGILL,
                signal.SIGSYS,
            ) and not is_event_stop(status):
                raise OSError(errno.EIO, f"thread {self.tid} met signal {status >> 8 & 0xFF} instead of a system call")
        raise OSError(errno.EIO, f"thread {self.tid} does not reach its system call")

    def _wait(self, deadline: float) -> int:
        """The next stop of the thread. ClientGoneError (reaped), TimeoutError."""
        status = None
        while status is None:
            now = time.monotonic()
            try:
                status = wait_status(self.tid, min(deadline, now + _DEATH))
            except ChildProcessError:
                self._gone(None)
            if status is None:
                state = status_field(self.tid, "State") or "X"
                # A killed leader whose other threads are not reaped yet is a zombie that waitpid does not report.
                if state[0] in "ZX":
                    self._reap()
                if now >= deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"thread {self.tid} ({command_of(self.tid)}) did not stop within {self.timeout:g} s (state {state})",
                    )
        if not os.WIFSTOPPED(status):
            self._gone(status)
        return status

    def _ptrace(self, request: int, addr: int = 0, data: int = 0) -> None:
        try:
            ptrace(request, self.tid, addr, data)
        except ProcessLookupError:
            # A stopped tracee disappears only by SIGKILL (or an execve of another thread).
            self._reap()

    def _reap(self) -> NoReturn:
        """Collect a tracee that is dying; raises ClientGoneError."""
        deadline = time.monotonic() + min(self.timeout, _DEATH)
        while True:
            try:
                status = wait_status(self.tid, deadline)
            except ChildProcessError:
                self._gone(None)
            if status is None:
                # A leader is reported only after its last thread, which may wait for an answer of ours.
                _leftovers()[self.tid] = self
                self._gone(None)
            elif not os.WIFSTOPPED(status):
                self._gone(status)
            else:
                with contextlib.suppress(OSError):
                    ptrace(PTRACE_CONT, self.tid)

    def _gone(self, status: int | None) -> NoReturn:
        self._done()
        how = "" if status is None else f" (wait status {status:#x})"
        raise ClientGoneError(errno.ESRCH, f"thread {self.tid} of client {self.tgid} ended{how}")

    def _try_release(self) -> bool:
        """Detach if it has stopped, reap if it has died; whether nothing is left to do. Does not wait."""
        try:
            while True:
                pid, status = os.waitpid(self.tid, WALL | os.WNOHANG)
                if not pid:
                    return False
                if not os.WIFSTOPPED(status):
                    return True
                # Detaching from a signal stop delivers that signal.
                number = 0 if is_event_stop(status) else status >> 8 & 0x7F
                try:
                    if self._dirty:
                        self._restore()
                    ptrace(PTRACE_DETACH, self.tid, 0, number if number != signal.SIGTRAP else 0)
                except ProcessLookupError:
                    continue
                self._resend_signals()
                return True
        except ChildProcessError:
            return True

    def _done(self) -> None:
        self._state = "done"
        if self._mem_fd >= 0:
            os.close(self._mem_fd)
            self._mem_fd = -1
        if self._locked:
            self._locked = False
            _locks.release(self.tgid)

    def _memory(self) -> int:
        # Once it has stopped its address space stays, or it dies.
        if self._mem_fd < 0:
            try:
                self._mem_fd = os.open(f"/proc/{self.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                self._reap()
        return self._mem_fd

    def _on_main_stack(self) -> bool:
        """Whether the stack pointer is on the process's initial stack, where there is room below it.

        Other stacks may be small and have other owners' data right below (Go's goroutine stacks).
        """
        try:
            with open(f"/proc/{self.tid}/stat", "rb") as f:
                start: int = int(f.read().rpartition(b")")[2].split()[25])  # field 28, startstack
        except (OSError, IndexError, ValueError):
            return False
        rsp: int = self._regs.rsp
        return 0 <= start - rsp < _MAIN_STACK_NEAR

    @contextlib.contextmanager
    def scratch(self) -> Iterator[int]:
        """The address of SCRATCH_SIZE bytes in the client that may be overwritten; put back afterwards.

        Below the red zone of the initial stack, otherwise a page mapped for the purpose. OSError ENOMEM,
        EFAULT.
        """
        if self._on_main_stack():
            addr = (self._regs.rsp - RED_ZONE - SCRATCH_SIZE) & ~15
            old = self.read(addr, SCRATCH_SIZE)
            try:
                yield addr
            finally:
                if self._state == "arrived":
                    self.write(addr, old)
        else:
            addr = self.mmap(0, SCRATCH_SIZE, PROT_RW, MAP_PRIVATE_ANON)
            try:
                yield addr
            finally:
                if self._state == "arrived":
                    self.munmap(addr, SCRATCH_SIZE)

    def _receive_rights(self, sock_no: int, cloexec: bool) -> int:
        """Run recvmsg on `sock_no` in the client; the number of the descriptor that came with the message."""
        with self.scratch() as base:
            iov, byte, control = base + 56, base + 72, base + 80
            message = struct.pack("<QIIQQQQII", 0, 0, 0, iov, 1, control, 24, 0, 0) + struct.pack("<QQ", byte, 1) + bytes(32)
            self.write(base, message)
            flags = socket.MSG_DONTWAIT | (socket.MSG_CMSG_CLOEXEC if cloexec else 0)
            _checked(self.syscall(SYS_RECVMSG, sock_no, base, flags), "recvmsg")
            length, _level, _kind, number = struct.unpack("<QiiI", self.read(control, 20))
        if length < 20:
            # The kernel drops a descriptor that the table has no room for and only sets MSG_CTRUNC.
            raise OSError(errno.EMFILE, "the client has no room for another descriptor")
        return int(number)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what} in the client: {os.strerror(-result)}")
    return result
