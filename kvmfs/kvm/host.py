# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine asks of the process that it lives in.

The machine knows no FUSE and no client process.  Whatever crosses that border is one of these few calls; the
worker implements them with its link to the daemon, the tests with a stand-in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

_libc = ctypes.CDLL(None)


def current_cpu() -> int:
    """Number of the host's CPU that this thread runs on (KVM_CAP_LAST_CPU)."""
    return int(_libc.sched_getcpu())


class Segment(Protocol):
    """A piece of the client's memory that is backed by a file the worker can map."""

    @property
    def hva(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def writable(self) -> bool: ...


class EventFd(NamedTuple):
    """A descriptor of one of the client's eventfds; ``id`` is the same for all descriptors of one eventfd."""

    fd: int
    id: int


class RequestLike(Protocol):
    """The part of a channel's request that handlers use."""

    tid: int
    cmd: int
    arg: int
    nodeid: int
    interrupted: bool
    context: object

    @property
    def data(self) -> memoryview: ...

    def reply(self, result: int, data: bytes | bytearray | memoryview = b"") -> None: ...


class Memory(Protocol):
    """The client's address space."""

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None: ...


class Host(Protocol):
    """The worker, as its machine sees it."""

    @property
    def memory(self) -> Memory:
        """The address space of the process that created the VM."""

    @property
    def creator(self) -> int:
        """The thread id of who created the VM."""

    def owns(self, tid: int) -> bool:
        """Is thread ``tid`` one of the process that created the VM?  (Linux: ``kvm->mm == current->mm``.)"""

    def may_block(self) -> None:
        """The calling thread is about to wait or to run a guest: see that another one serves requests."""

    def graft(self, req: RequestLike, name: str, inode: int, kvm_run: int | None, *,
              content: Callable[[], bytes] | None = None, store: int | None = None) -> int:
        """Open the file ``name`` of the VM's mount in the client; ``req`` is answered with its number.

        ``kvm_run`` is the memfd that the client's mmap of the file shows; ``content`` is what it reads, at each read,
        and makes the descriptor read-only; the file may be there already.  With ``store`` the number goes, as 4 bytes, to
        that address of the client, and ``req`` is answered with 0.  Raises OSError when nothing was opened; ``req`` is
        then answered with that errno.
        """

    def guest_memory(self, req: RequestLike, hva: int, size: int) -> Sequence[Segment]:
        """Files for the client's range; what is private to the client is made shared first.

        Ranges that the client has not mapped are left out.  ``req`` may have been answered when this returns:
        end with :meth:`finish`.
        """

    @property
    def mirrors_memory(self) -> bool:
        """Is there guest memory that is copied at each KVM_RUN, because the client is traced?"""

    def mirror_in(self) -> Sequence[tuple[int, int]]:
        """Before a KVM_RUN: take over what the client has changed; the changed ranges as (hva, size)."""

    def mirror_out(self) -> None:
        """After a KVM_RUN: give the client what the guest has changed."""

    def finish(self, req: RequestLike, result: int) -> None:
        """Give ``req`` its final result (a value or -errno), whether or not it was answered early."""

    @property
    def passthrough(self) -> bool:
        """Are kvm_run areas shared with the client (FUSE passthrough), not copied?"""

    def eventfd(self, req: RequestLike, fd: int) -> EventFd:
        """A descriptor of the client's eventfd ``fd``, for the caller to close.  EBADF; EINVAL: it is none."""

    def kvm_run_copy_in(self, inode: int, page: memoryview) -> None:
        """Without passthrough: bring the client's view of kvm_run into ``page``."""

    def kvm_run_copy_out(self, inode: int, page: memoryview) -> None:
        """Without passthrough: bring ``page`` into the client's view of kvm_run."""

    def run_delay(self, tid: int) -> int:
        """Nanoseconds for which the client's thread ``tid`` has waited for a CPU; 0 when that is not known."""

    def signals_pending(self, tid: int, mask: int) -> bool:
        """Does thread ``tid`` have a pending signal that is not in ``mask`` (bit n-1: signal n)?"""
