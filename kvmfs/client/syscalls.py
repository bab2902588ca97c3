# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python does not wrap, and the numbers used in clients (x86-64, asm/unistd_64.h).

Two handles on libc: calls that may sleep release the GIL; ptrace requests do not sleep, and giving up the
GIL around each one would cost another thread's time slice.
"""

import ctypes
import os
from typing import Final, NoReturn

SYS_CLOSE: Final = 3
SYS_MMAP: Final = 9
SYS_MUNMAP: Final = 11
SYS_IOCTL: Final = 16
SYS_SOCKET: Final = 41
SYS_RECVMSG: Final = 47
SYS_SEMOP: Final = 65
SYS_RT_SIGTIMEDWAIT: Final = 128
SYS_IO_GETEVENTS: Final = 208
SYS_SEMTIMEDOP: Final = 220
SYS_EPOLL_WAIT: Final = 232
SYS_TGKILL: Final = 234
SYS_EPOLL_PWAIT: Final = 281
SYS_DUP3: Final = 292
SYS_PROCESS_VM_READV: Final = 310
SYS_SECCOMP: Final = 317
SYS_IO_PGETEVENTS: Final = 333
SYS_IO_URING_ENTER: Final = 426
SYS_PIDFD_OPEN: Final = 434
SYS_PIDFD_GETFD: Final = 438
SYS_EPOLL_PWAIT2: Final = 441

_sleeping: Final = ctypes.CDLL(None, use_errno=True)
_brief: Final = ctypes.PyDLL(None, use_errno=True)
_sleeping.syscall.restype = ctypes.c_long
_brief.ptrace.restype = ctypes.c_long
_brief.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_PAD: Final = (ctypes.c_long(0),) * 6


def raise_errno(what: str) -> NoReturn:
    """Raise the OSError of the errno that the last call here left, with `what` in its text."""
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def syscall(number: int, *args: int) -> int:
    """System call `number` with integer arguments. OSError with the kernel's errno."""
    padded = (*(ctypes.c_ulong(a & 0xFFFFFFFFFFFFFFFF) for a in args), *_PAD)[:6]
    result: int = _sleeping.syscall(ctypes.c_long(number), *padded)
    if result < 0:
        raise_errno(f"system call {number}")
    return result


def ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> None:
    """ptrace(2) by this thread. OSError ESRCH when `tid` is not stopped, not ours or gone."""
    if _brief.ptrace(request, tid, addr, data) < 0:
        raise_errno(f"ptrace {request:#x} of thread {tid}")


def prctl(option: int, *args: int) -> int:
    """prctl(2). OSError with the kernel's errno."""
    padded = (*(ctypes.c_ulong(a) for a in args), *(ctypes.c_ulong(0),) * 4)[:4]
    result: int = _sleeping.prctl(ctypes.c_int(option), *padded)
    if result < 0:
        raise_errno(f"prctl {option}")
    return result


class Iovec(ctypes.Structure):
    """C `struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_sleeping.process_vm_readv.restype = ctypes.c_ssize_t
_sleeping.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)


def process_vm_readv(tid: int, local: "ctypes.Array[Iovec]", remote: "ctypes.Array[Iovec]", n: int) -> int:
    """process_vm_readv(2) of the first `n` pairs (at most 1024); the bytes read, 0 on any failure."""
    got: int = _sleeping.process_vm_readv(tid, ctypes.addressof(local), n, ctypes.addressof(remote), n, 0)
    return max(got, 0)
