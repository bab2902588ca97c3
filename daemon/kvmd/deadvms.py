# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM answers when its worker is dead: EIO, as Linux's VMs do once something in KVM went wrong (``kvm->vm_dead``).

The daemon holds each VM's connection beside its worker.  When that has ended, the kernel is asked to send what it had not answered
once more (FUSE_NOTIFY_RESEND, Linux 6.9; without it the connection ends here, and the client gets ENOTCONN), and all
that comes is answered, until the client has closed its last descriptor and with that ended the connection.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from typing import Final

from kvmfs.fuse import protocol

log = logging.getLogger("kvmd.deadvms")

_NO_REPLY: Final = (protocol.FUSE_FORGET, protocol.FUSE_BATCH_FORGET, protocol.FUSE_INTERRUPT)
_CLOSING: Final = (protocol.FUSE_FLUSH, protocol.FUSE_RELEASE)      # as close(2) of a VM that lives


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Connection:
    """A VM's connection, held beside its worker."""

    def __init__(self, fuse: int, pidfd: int, epoll: select.epoll, by_fd: dict[int, Connection]) -> None:
        self._fuse, self._pidfd, self._epoll, self._by_fd = fuse, os.dup(pidfd), epoll, by_fd
        self._lock = threading.Lock()
        self._taken = False
        by_fd[fuse] = by_fd[self._pidfd] = self
        epoll.register(self._pidfd, select.EPOLLIN)

    def take(self) -> None:
        """The worker has ended, or was killed and is not to answer any more: from now on this does.  Any thread.

        Once more when one that was killed has ended: it may have taken a request meanwhile.
        """
        with self._lock:
            if self._fuse < 0:
                return
            try:
                os.set_blocking(self._fuse, False)      # not before: the worker's descriptor is the same open file
                os.write(self._fuse, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, protocol.FUSE_NOTIFY_RESEND, 0))
                if not self._taken:
                    self._epoll.register(self._fuse, select.EPOLLIN)
                    self._taken = True
            except OSError as error:
                self._end(error)

    def event(self, fd: int) -> None:
        """The worker has ended, or there are requests; or that was another one's, whose descriptor had this number."""
        if fd == self._pidfd:
            with self._lock:
                if self._pidfd < 0 or not _readable(self._pidfd):
                    return
                self._forget_worker()
            self.take()
        else:
            self.answer()

    def answer(self) -> None:
        """Answer what there is, after :meth:`take`."""
        with self._lock:
            try:
                while self._taken and self._fuse >= 0:
                    self._answer_one()
            except BlockingIOError:
                pass
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        # ENODEV: nobody has a descriptor of the VM any more.
        log.log(logging.DEBUG if error.errno == errno.ENODEV else logging.INFO, "a dead VM ends: %s", error)
        del self._by_fd[self._fuse]
        os.close(self._fuse)            # and out of the epoll set
        self._fuse = -1
        self._forget_worker()

    def _forget_worker(self) -> None:
        if self._pidfd >= 0:
            del self._by_fd[self._pidfd]
            self._epoll.unregister(self._pidfd)     # closing is not enough: others have the same open file
            os.close(self._pidfd)
            self._pidfd = -1

    def _answer_one(self) -> None:
        try:
            _, opcode, unique, *_ = protocol.IN_HEADER.unpack_from(os.read(self._fuse, protocol.BUFFER_SIZE))
            if opcode not in _NO_REPLY:
                code = 0 if opcode in _CLOSING else -errno.EIO
                os.write(self._fuse, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, code, unique))
        except FileNotFoundError:       # its caller has given it up
            pass


class DeadVms:
    """One thread, which sleeps until a worker ends."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._by_fd: dict[int, Connection] = {}     # by a worker's pidfd and by its /dev/fuse
        self._thread: threading.Thread | None = None

    def add(self, pidfd: int, fuse: int) -> Connection:
        """Follow a worker; ``fuse``, its connection's /dev/fuse, belongs to this from now on, ``pidfd`` does not."""
        connection = Connection(fuse, pidfd, self._epoll, self._by_fd)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="deadvms", daemon=True)
            self._thread.start()
        return connection

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                try:
                    connection = self._by_fd.get(fd)
                    if connection is not None:
                        connection.event(fd)
                except Exception:
                    log.exception("a dead VM")
