# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls of clients under ``kvmfs run`` that a seccomp filter holds before they enter the kernel.

Of an ioctl that makes a descriptor, what it is on decides: the node (a new VM), a file of a VM (its worker carries the
ioctl out), or something of the machine's, which then goes its usual way.  A private or executable mapping of a vCPU's
dirty ring is refused, as ``kvm_vcpu_mmap`` does.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from typing import TYPE_CHECKING

from kvmd.link import Link, LinkError
from kvmd.vms import identity_of, size_of
from kvmfs.abi.ioctls import KVM_CREATE_DEVICE
from kvmfs.client.notify import Notification, Notifier
from kvmfs.client.process import Process
from kvmfs.client.syscalls import SYS_MMAP

if TYPE_CHECKING:
    from kvmd.node import Node
    from kvmd.vms import Vms

log = logging.getLogger("kvmd.notified")

_DEVICE_FD_AT = 4       # in struct kvm_create_device


class NotifiedRequest:
    """A held ioctl on the node, as the handlers of the system level see a request."""

    data = memoryview(b"")
    interrupted = False
    context: object = None

    def __init__(self, notifier: Notifier, note: Notification, inode: int) -> None:
        self.tid, self.cmd, self.arg, self.nodeid = note.tid, note.cmd, note.arg, inode
        self._notifier, self._id = notifier, note.id

    def reply(self, result: int, data: bytes | bytearray | memoryview = b"") -> None:
        """End the ioctl; nothing of these carries data."""
        self._notifier.respond(self._id, max(result, 0), max(-result, 0))

    def give(self, file: int) -> None:
        """End the ioctl with a descriptor of ``file``."""
        self.context = self._notifier.add_fd_and_return(self._id, file)


def _hung_up(notifier: Notifier) -> bool:
    """Does no process use the filter any more?"""
    poll = select.poll()
    poll.register(notifier, 0)
    return bool(poll.poll(0))


class NotifyServer:
    """Serves every listener that comes over ``link``, each in its own thread."""

    def __init__(self, link: Link, node: Node, vms: Vms) -> None:
        self._link, self._node, self._vms = link, node, vms
        threading.Thread(target=self._accept, name="listeners", daemon=True).start()

    def _accept(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                for fd in message.take_fds():
                    threading.Thread(target=self._serve, args=(Notifier(fd),), name="notifier", daemon=True).start()
        except (LinkError, OSError) as error:
            log.warning("no more listeners: %s", error)

    def _serve(self, notifier: Notifier) -> None:
        try:
            while True:
                try:
                    note = notifier.recv()
                except OSError as error:
                    if error.errno == errno.ENOENT and not _hung_up(notifier):
                        continue                # that caller died meanwhile
                    return
                try:
                    self._handle(notifier, note)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        log.info("held call %d (%#x) of thread %d: %s", note.nr, note.cmd, note.tid, error)
                    self._refuse(notifier, note, error.errno or errno.EIO)
                except Exception:
                    log.exception("held call %d (%#x) of thread %d failed; the client gets EIO", note.nr, note.cmd, note.tid)
                    self._refuse(notifier, note, errno.EIO)
        finally:
            notifier.close()

    @staticmethod
    def _refuse(notifier: Notifier, note: Notification, code: int) -> None:
        try:
            notifier.respond(note.id, 0, code)
        except OSError:
            pass                                # answered, or nobody waits any more

    def _handle(self, notifier: Notifier, note: Notification) -> None:
        try:
            process = Process.from_tid(note.tid)
            try:
                fd = process.getfd(note.fd, note.tid)
            finally:
                process.close()
        except OSError:
            notifier.cont(note.id)              # EBADF and the like are the kernel's to say
            return
        try:
            if not notifier.valid(note.id):
                return
            device, inode = identity_of(fd)
            in_file = note.nr == SYS_MMAP and note.offset < size_of(fd)
        finally:
            os.close(fd)
        if note.nr == SYS_MMAP:
            if in_file and self._vms.by_device(device) is not None:
                notifier.respond(note.id, 0, errno.EINVAL)
            else:
                notifier.cont(note.id)
            return
        if device == self._node.device:
            request = NotifiedRequest(notifier, note, inode)
            outcome = self._node.dispatcher.ioctl(request)
            if isinstance(outcome, int):
                request.reply(outcome)
            return
        broker = self._vms.by_device(device)
        if broker is None:
            notifier.cont(note.id)
            return
        result, file = broker.relay(note.tid, inode, note.cmd, note.arg)
        if file < 0:
            notifier.respond(note.id, max(result, 0), max(-result, 0))
            return
        try:
            if note.cmd == KVM_CREATE_DEVICE:
                number = notifier.add_fd(note.id, file)
                broker.process.memory.write(note.arg + _DEVICE_FD_AT, number.to_bytes(4, "little"))
                notifier.respond(note.id, 0)
            else:
                notifier.add_fd_and_return(note.id, file)
        finally:
            os.close(file)
