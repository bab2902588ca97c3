# SPDX-License-Identifier: GPL-2.0-or-later
"""Seccomp user notification: what FUSE alone cannot do for a client.

`kvmfs run` installs a filter in its child before execve. The KVM ioctls that make a descriptor then do not
enter the kernel: they come to whoever holds the listener, which carries them out and adds the descriptor
natively (seccomp_unotify(2)), also for a client that another program traces. So do private and executable
mappings at the place of a vCPU's dirty ring, which kvm_vcpu_mmap refuses: FUSE hands the mmap of a passthrough
file to the backing file without asking the server. All other system calls pass at the cost of the filter.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Final

from kvmfs.abi.exits import KVM_DIRTY_LOG_PAGE_OFFSET
from kvmfs.abi.x86 import KVM_DIRTY_RING_MAX_ENTRIES, PAGE_SIZE
from kvmfs.client.syscalls import SYS_IOCTL, SYS_MMAP, SYS_SECCOMP, prctl, syscall

KVMIO: Final = 0xAE
# _IOC_NR of KVM_CREATE_VM, _VCPU, _DEVICE, KVM_GET_STATS_FD, KVM_CREATE_GUEST_MEMFD.
DESCRIPTOR_IOCTLS: Final = (0x01, 0x41, 0xE0, 0xCE, 0xD4)

MAP_TYPE: Final = 0x0F
MAP_FIXED: Final = 0x10

# Where the rings lie in a vCPU's file, in bytes; an entry (struct kvm_dirty_gfn) has 16.
RING_START: Final = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
RING_END: Final = RING_START + KVM_DIRTY_RING_MAX_ENTRIES * 16
# Mappings of dynamic linkers have one of the latter two.
_NOT_OF_A_RING: Final = mmap.MAP_ANONYMOUS | mmap.MAP_DENYWRITE | MAP_FIXED

SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5  # 5.19
SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_IOCTL_NOTIF_RECV: Final = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND: Final = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID: Final = 0x40082102
SECCOMP_IOCTL_NOTIF_ADDFD: Final = 0x40182103
SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1
SECCOMP_ADDFD_FLAG_SEND: Final = 2  # 5.14
AUDIT_ARCH_X86_64: Final = 0xC000003E
PR_SET_NO_NEW_PRIVS: Final = 38

_BPF_LD: Final = 0x20  # 32-bit word at an offset of struct seccomp_data
_BPF_AND: Final = 0x54
_BPF_JEQ: Final = 0x15
_BPF_JGE: Final = 0x35
_BPF_RET: Final = 0x06
_NR: Final = 0
_ARCH: Final = 4

_NOTIF: Final = struct.Struct("<QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE: Final = struct.Struct("<QqiI")  # struct seccomp_notif_resp
_ADDFD: Final = struct.Struct("<QIIII")  # struct seccomp_notif_addfd


def _arg(index: int) -> int:
    """Where the low half of an argument lies in struct seccomp_data; the high one lies 4 after it."""
    return 16 + 8 * index


@dataclass(frozen=True, slots=True)
class Notification:
    """A held system call of thread `tid` (0: not in our pid namespace), its number and its six arguments."""

    id: int
    tid: int
    nr: int
    args: tuple[int, ...]

    @property
    def fd(self) -> int:
        """The descriptor that the call is about."""
        return self.args[4 if self.nr == SYS_MMAP else 0] & 0xFFFFFFFF

    @property
    def cmd(self) -> int:
        """An ioctl's number."""
        return self.args[1] & 0xFFFFFFFF

    @property
    def arg(self) -> int:
        """An ioctl's argument."""
        return self.args[2]

    @property
    def offset(self) -> int:
        """Where an mmap begins in its file, in bytes."""
        return self.args[5]


class _Program:
    """A BPF program whose jumps name labels; `allow` and `notify` end it."""

    def __init__(self) -> None:
        self._code: list[tuple[int, str, str, int]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def load(self, offset: int, mask: int | None = None) -> None:
        self._code.append((_BPF_LD, "", "", offset))
        if mask is not None:
            self._code.append((_BPF_AND, "", "", mask))

    def jump(self, value: int, *, yes: str = "", no: str = "", kind: int = _BPF_JEQ) -> None:
        """Compare the loaded word with `value`; the side that is not named goes on behind this instruction."""
        self._code.append((kind, yes, no, value))

    def always(self, name: str) -> None:
        self._code.append((_BPF_JGE, name, name, 0))

    def build(self) -> bytes:
        for name, verdict in (("allow", SECCOMP_RET_ALLOW), ("notify", SECCOMP_RET_USER_NOTIF)):
            self.label(name)
            self._code.append((_BPF_RET, "", "", verdict))

        def distance(name: str, index: int) -> int:
            return self._labels[name] - index - 1 if name else 0

        return b"".join(struct.pack("<HBBI", kind, distance(yes, index), distance(no, index), value)
                        for index, (kind, yes, no, value) in enumerate(self._code))


def filter_program() -> bytes:
    """The BPF program (struct sock_filter[]): notify for DESCRIPTOR_IOCTLS and forbidden mappings of a ring."""
    program = _Program()
    # x32 calls have another number (bit 30), 32-bit ones another architecture: neither is notified.
    program.load(_ARCH)
    program.jump(AUDIT_ARCH_X86_64, no="allow")
    program.load(_NR)
    program.jump(SYS_MMAP, yes="mmap")
    program.jump(SYS_IOCTL, no="allow")
    program.load(_arg(1), 0xFFFF)
    for nr in DESCRIPTOR_IOCTLS:
        program.jump(KVMIO << 8 | nr, yes="notify")
    program.always("allow")
    program.label("mmap")
    program.load(_arg(3), _NOT_OF_A_RING)
    program.jump(0, no="allow")
    program.load(_arg(5) + 4)
    program.jump(0, no="allow")
    program.load(_arg(5))
    program.jump(RING_START, no="allow", kind=_BPF_JGE)
    program.jump(RING_END, yes="allow", kind=_BPF_JGE)
    program.load(_arg(3), MAP_TYPE)
    program.jump(mmap.MAP_PRIVATE, yes="notify")
    program.load(_arg(2), mmap.PROT_EXEC)
    program.jump(0, no="notify")
    return program.build()


def install_filter() -> int:
    """Put the filter on this thread and return the listener, close-on-exec. It stays over fork and execve.

    Sets no_new_privs only when the caller has no CAP_SYS_ADMIN in its user namespace (set-user-ID programs
    then gain nothing). An interrupted client waits on, killable, once its call was received
    (WAIT_KILLABLE_RECV, 5.19). Errors: OSError EBUSY (a filter with a listener is there already), EINVAL (a
    kernel before 5.0), EACCES.
    """
    program = ctypes.create_string_buffer(filter_program())
    length = (len(program) - 1) // 8
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", length, ctypes.addressof(program)))

    def install(flags: int) -> int:
        return syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(header))

    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    for _ in range(3):
        try:
            listener = install(flags)
        except OSError as e:
            if e.errno == errno.EACCES:
                prctl(PR_SET_NO_NEW_PRIVS, 1)
            elif e.errno == errno.EINVAL and flags & SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV:
                flags &= ~SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
            else:
                raise
        else:
            os.set_inheritable(listener, False)
            return listener
    raise OSError(errno.EACCES, "the seccomp filter of `kvmfs run` was refused, also with no_new_privs")


class Notifier:
    """The supervisor's side. A held call must get exactly one of add_fd_and_return, respond, cont.

    OSError ENOENT from those: the caller is gone or its call was interrupted, there is nothing to answer.
    """

    def __init__(self, listener: int) -> None:
        """Take over `listener`, which install_filter returned."""
        self.listener = listener

    def fileno(self) -> int:
        """For select and poll: readable when recv has something, hung up when nobody uses the filter."""
        return self.listener

    def recv(self) -> Notification:
        """Wait for the next held call. OSError ENOENT: its caller died, or nobody uses the filter any more."""
        buffer = bytearray(_NOTIF.size)  # the kernel insists on zeros
        fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_RECV, buffer, True)
        ident, tid, _flags, nr, _arch, _ip, *args = _NOTIF.unpack(buffer)
        return Notification(ident, tid, nr, tuple(args))

    def add_fd_and_return(self, ident: int, fd: int, *, cloexec: bool = True) -> int:
        """Give the caller a duplicate of `fd` as its ioctl's result; returns the number, its lowest free one.

        Errors: OSError ENOENT (gone), EMFILE (its table is full; not answered, respond still must be
        called).
        """
        flags = os.O_CLOEXEC if cloexec else 0
        try:
            return self._add(_ADDFD.pack(ident, SECCOMP_ADDFD_FLAG_SEND, fd, 0, flags))
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        # Before 5.14 in two steps; a caller that is interrupted between them keeps a descriptor that it
        # does not know.
        number = self.add_fd(ident, fd, cloexec=cloexec)
        self.respond(ident, number)
        return number

    def add_fd(self, ident: int, fd: int, *, cloexec: bool = True) -> int:
        """Give the caller a duplicate of `fd`, and let it wait on; returns the number.  Errors as above."""
        return self._add(_ADDFD.pack(ident, 0, fd, 0, os.O_CLOEXEC if cloexec else 0))

    def respond(self, ident: int, result: int, error: int = 0) -> None:
        """Let the call return `result`, or -1 with errno `error` when that is not 0."""
        self._send(_RESPONSE.pack(ident, 0 if error else result, -error, 0))

    def cont(self, ident: int) -> None:
        """Let the kernel carry the call out after all: it was on a descriptor that is none of ours."""
        self._send(_RESPONSE.pack(ident, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE))

    def valid(self, ident: int) -> bool:
        """Whether the caller still waits. Ask after opening something of /proc/TID: was it that thread's?"""
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("<Q", ident))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the listener: calls that are held, and later ones, end with ENOSYS."""
        fd, self.listener = self.listener, -1
        if fd >= 0:
            os.close(fd)

    def _add(self, request: bytes) -> int:
        # The ioctl returns the new number; a read-only buffer makes fcntl return bytes instead.
        number: int = fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_ADDFD, bytearray(request), True)
        return number

    def _send(self, response: bytes) -> None:
        fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_SEND, bytearray(response), True)
