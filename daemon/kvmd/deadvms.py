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


class Connection:
    """A VM's connection, held beside its worker."""

    def __init__(self, fuse: int, epoll: select.epoll) -> None:
        self._fuse, self._epoll = fuse, epoll
        self._lock = threading.Lock()
        self._taken = False

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

    def answer(self) -> None:
        """Answer what there is."""
        with self._lock:
            try:
                while self._fuse >= 0:
                    self._answer_one()
            except BlockingIOError:
                pass
            except OSError as error:
                self._end(error)

    @property
    def ended(self) -> bool:
        """Nothing comes of it any more."""
        return self._fuse < 0

    def _end(self, error: OSError) -> None:
        # ENODEV: nobody has a descriptor of the VM any more.
        log.log(logging.DEBUG if error.errno == errno.ENODEV else logging.INFO, "a dead VM ends: %s", error)
        os.close(self._fuse)            # and out of the epoll set
        self._fuse = -1

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
        self._by_pidfd: dict[int, Connection] = {}
        self._by_fuse: dict[int, Connection] = {}
        self._thread: threading.Thread | None = None

    def add(self, pidfd: int, fuse: int) -> Connection:
        """Follow a worker; ``fuse``, its connection's /dev/fuse, belongs to this from now on, ``pidfd`` does not."""
        own = os.dup(pidfd)
        connection = self._by_fuse[fuse] = self._by_pidfd[own] = Connection(fuse, self._epoll)
        self._epoll.register(own, select.EPOLLIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="deadvms", daemon=True)
            self._thread.start()
        return connection

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                try:
                    self._serve(fd)
                except Exception:
                    log.exception("a dead VM")

    def _serve(self, fd: int) -> None:
        connection = self._by_pidfd.pop(fd, None)
        if connection is not None:
            self._epoll.unregister(fd)
            os.close(fd)
            connection.take()
            return
        connection = self._by_fuse[fd]
        connection.answer()
        if connection.ended and self._by_fuse[fd] is connection:    # else another one has the number already
            del self._by_fuse[fd]
