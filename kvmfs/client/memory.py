# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading and writing a client's memory through an open /proc/PID/mem.

The kernel checks the right to trace when the file is opened, not at each access, so the daemon opens it and
hands the descriptor to an unprivileged worker. The descriptor stays with the address space that it was
opened on: after the client's execve or exit every access fails.

proc_mem writes are forced (FOLL_FORCE): unlike copy_to_user they also succeed on a private mapping without
PROT_WRITE.
"""

import errno
import os

Buffer = bytes | bytearray | memoryview


def open_memory(tid: int) -> int:
    """Open /proc/TID/mem for reading and writing, close-on-exec.

    Needs the right to trace TID (ptrace(2), PTRACE_MODE_ATTACH). Errors: OSError ESRCH when the thread is
    gone, EACCES.
    """
    try:
        return os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone") from None
    except PermissionError as e:
        raise PermissionError(
            e.errno, f"may not open the memory of thread {tid}: CAP_SYS_PTRACE or the same user is needed"
        ) from None


class ClientMemory:
    """One client's address space. Every failure is OSError(EFAULT), as with copy_from_user."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        """Take over `fd`, an open /proc/PID/mem."""
        self.fd = fd

    def read(self, addr: int, n: int) -> bytes:
        """Return exactly `n` bytes from `addr`."""
        if n <= 0:
            return b""
        try:
            data = os.pread(self.fd, n, addr)
        except (OSError, OverflowError):
            raise _fault(addr, n) from None
        if len(data) == n:
            return data
        # One read may end early (the kernel bounds a single transfer at 2 GiB); an unmapped page ends it
        # for good.
        whole = bytearray(n)
        whole[: len(data)] = data
        if data:
            self.readinto(addr + len(data), memoryview(whole)[len(data) :])
            return bytes(whole)
        raise _fault(addr, n)

    def readinto(self, addr: int, buffer: Buffer) -> None:
        """Fill the whole writable `buffer` from `addr`."""
        # Released in any case: the frame of a fault would keep the caller's buffer exported.
        with memoryview(buffer) as plain, plain.cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    with view[done:] as rest:
                        got = os.preadv(self.fd, [rest], addr + done)
                except (OSError, OverflowError):
                    got = 0
                if got <= 0:
                    raise _fault(addr + done, len(view) - done)
                done += got

    def write(self, addr: int, data: Buffer) -> None:
        """Write all of `data` at `addr`. On a fault a beginning of it may have been written."""
        try:
            put = os.pwrite(self.fd, data, addr)
        except (OSError, OverflowError):
            raise _fault(addr, memoryview(data).nbytes) from None
        total = memoryview(data).nbytes
        while put < total:
            try:
                more = os.pwrite(self.fd, memoryview(data).cast("B")[put:], addr + put)
            except (OSError, OverflowError):
                more = 0
            if more <= 0:
                raise _fault(addr + put, total - put)
            put += more

    def close(self) -> None:
        """Close the descriptor; harmless when it is closed already."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _fault(addr: int, n: int) -> OSError:
    return OSError(errno.EFAULT, f"client memory {addr:#x}+{n:#x} is not accessible")
