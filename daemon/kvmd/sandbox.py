# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker gives up before it runs guest code: its user, every capability, new privileges, most syscalls.

A guest that breaks out of the translator finds itself in a process with an own user id, no capabilities, no
way to make a socket, start a program, write a file or touch another process.  What it still holds are the
descriptors of its own VM.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import signal
import struct
from collections.abc import Sequence

import pyseccomp

WORKER_UID_BASE = 0x4B560000   # "KV": in no range that distributions or systemd hand out
WORKER_UIDS = 65536
NOBODY = 65534

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_CAPBSET_DROP = 1, 4, 15, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522
CLONE_THREAD = 0x10000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_LOG, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x7FFC0000, 0x50000
BPF_INSN, BPF_LOAD, BPF_JUMP_EQUAL, BPF_RETURN = 8, 0x20, 0x15, 0x06
SYS_KILL, SYS_TGKILL = 62, 234

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int | bytes, *rest: int) -> None:
    """prctl(2).  Raises OSError."""
    if isinstance(argument, bytes):
        first: ctypes.c_char_p | ctypes.c_ulong = ctypes.c_char_p(argument)
    else:
        first = ctypes.c_ulong(argument)
    more = [ctypes.c_ulong(value) for value in (*rest, 0, 0, 0)[:3]]
    if _libc.prctl(option, first, *more) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl({option})")


def set_name(name: str) -> None:
    """The name that ps and top show."""
    prctl(PR_SET_NAME, name.encode()[:15])


def end_with_parent(parent: int) -> None:
    """Be killed when ``parent`` ends; end at once when it already has."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def is_mapped(uid: int) -> bool:
    """Does this user namespace know ``uid``?"""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    return any(first <= uid < first + count for first, _, count in ranges)


def worker_uid(number: int) -> int | None:
    """The user of the worker in slot ``number``; None: it keeps the daemon's (which is not root then)."""
    if os.geteuid() != 0:
        return None
    uid = WORKER_UID_BASE + number % WORKER_UIDS
    if is_mapped(uid):
        return uid
    return NOBODY if is_mapped(NOBODY) else None


def close_all_but(fds: Sequence[int]) -> None:
    """Close every descriptor but 0, 1, 2 and ``fds``."""
    low = 3
    for fd in sorted(set(fds)):
        if fd > low:
            os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], low))


@functools.cache                    # what is dropped stays so, in the children, too
def drop_bounding_set() -> None:
    """No program that this process or a child starts can have a capability by its file."""
    with open("/proc/self/status", encoding="utf-8") as file:
        if any(line.startswith("CapBnd:") and int(line.split()[1], 16) == 0 for line in file):
            return                      # inherited so
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break                   # past the last one this kernel knows
            if error.errno != errno.EPERM:
                raise


def drop_privileges(uid: int | None) -> None:
    """Become ``uid`` for good, with no groups, no capabilities and no way to gain any."""
    drop_bounding_set()
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("<Ii", LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))) < 0:
        raise OSError(ctypes.get_errno(), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# What a Python process with threads, trio and the translator needs, and nothing that reaches another process.
_ALLOWED = (
    "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2", "close",
    "close_range", "lseek", "fstat", "newfstatat", "stat", "lstat", "statx", "fstatfs", "statfs", "getdents64",
    "readlink", "readlinkat", "access", "faccessat", "faccessat2", "getcwd", "dup", "dup2", "dup3", "fcntl", "poll",
    "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "pipe2",
    "eventfd2", "timerfd_create", "timerfd_settime", "timerfd_gettime", "memfd_create", "ftruncate", "fallocate",
    "socketpair", "sendmsg", "recvmsg", "sendto", "recvfrom", "shutdown", "getsockopt", "setsockopt", "getsockname",
    "mmap", "munmap", "mprotect", "mremap", "madvise", "brk", "msync", "mincore", "membarrier", "mlock", "munlock",
    "mlock2", "futex", "futex_waitv", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "rt_sigaction",
    "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigpending", "sigaltstack", "restart_syscall",
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "timer_create",
    "timer_settime", "timer_gettime", "timer_delete", "setitimer", "getitimer", "getpid", "getppid", "gettid", "getuid",
    "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups", "getpgid", "getpgrp", "getsid",
    "sched_yield", "sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_getscheduler", "getcpu",
    "sched_get_priority_max", "sched_get_priority_min", "getpriority", "getrandom", "getrlimit", "prlimit64",
    "getrusage", "sysinfo", "uname", "times", "arch_prctl", "exit", "exit_group", "prctl", "userfaultfd",
)

_READ_ONLY = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_IOCTLS = (
    0x5401, 0x5421, 0x541B, 0x5450, 0x5451,           # TCGETS (isatty), FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
    0xC0606610,                                       # PAGEMAP_SCAN
    0xC0686611,                                       # PROCMAP_QUERY
    0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC018AA06,   # UFFDIO_API, _REGISTER, _UNREGISTER, _WRITEPROTECT
    0x8010AA02,                                       # UFFDIO_WAKE
)


class _SockFprog(ctypes.Structure):
    """``struct sock_fprog``: a compiled filter."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _default_action(log: bool) -> int:
    action: int = pyseccomp.LOG if log else pyseccomp.ERRNO(errno.EPERM)
    return action


@functools.cache
def _compiled(log: bool) -> bytes:
    """The filter that is the same for all workers.  Compiling takes 2 ms, so the zygote does it for all (prepare)."""
    arg, masked = pyseccomp.Arg, pyseccomp.MASKED_EQ
    rules = pyseccomp.SyscallFilter(_default_action(log))
    for name in (*_ALLOWED, "tgkill", "kill"):        # the last two: see restrict_syscalls
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except (OSError, ValueError):
            continue                                  # a libseccomp that does not know this newer call
    rules.add_rule(pyseccomp.ALLOW, "open", arg(1, masked, _READ_ONLY, 0))
    rules.add_rule(pyseccomp.ALLOW, "openat", arg(2, masked, _READ_ONLY, 0))
    rules.add_rule(pyseccomp.ALLOW, "sched_setscheduler", arg(1, pyseccomp.EQ, os.SCHED_IDLE))
    rules.add_rule(pyseccomp.ALLOW, "clone", arg(0, masked, CLONE_THREAD, CLONE_THREAD))
    # clone3 hides its flags behind a pointer: the C library falls back to clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for request in _IOCTLS:
        rules.add_rule(pyseccomp.ALLOW, "ioctl", arg(1, masked, 0xFFFFFFFF, request))
    with os.fdopen(os.memfd_create("seccomp", os.MFD_CLOEXEC), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def prepare() -> None:
    """What can be done once, before the workers are forked.  The caller starts no programs from then on."""
    drop_bounding_set()
    _compiled(_logs())


def _logs() -> bool:
    return bool(os.environ.get("KVMFS_SANDBOX_LOG"))


def restrict_syscalls(*, log: bool = False) -> None:
    """Allow only what a worker needs; everything else fails with EPERM (``log``: and shows in the audit log)."""
    # Two filters are in force, and the stricter one decides: only the first knows this process's number.
    action = SECCOMP_RET_LOG if log else SECCOMP_RET_ERRNO | errno.EPERM
    _load(b"".join(struct.pack("<HBBI", *instruction) for instruction in (
        (BPF_LOAD, 0, 0, 0),                          # the syscall's number; no other architecture gets past the
        (BPF_JUMP_EQUAL, 2, 0, SYS_KILL),             # second filter
        (BPF_JUMP_EQUAL, 1, 0, SYS_TGKILL),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (BPF_LOAD, 0, 0, 16),                         # the first argument's two halves
        (BPF_JUMP_EQUAL, 0, 3, os.getpid()),
        (BPF_LOAD, 0, 0, 20),
        (BPF_JUMP_EQUAL, 0, 1, 0),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (BPF_RETURN, 0, 0, action),
    )))
    _load(_compiled(log))


def _load(code: bytes) -> None:
    program = _SockFprog(len(code) // BPF_INSN, code)
    if _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program)) < 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def enter(uid: int | None, fds: Sequence[int]) -> None:
    """All of it, in the order that works.  The caller has opened whatever needs a privilege, and has one thread."""
    parent = os.getppid()
    close_all_but(fds)
    drop_privileges(uid)
    end_with_parent(parent)          # after the change of user, which clears it
    restrict_syscalls(log=_logs())
