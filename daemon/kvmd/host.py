# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's host in a worker: what crosses from the VM to its client, mostly by asking the daemon's broker.

One exchange with the broker at a time: the broker holds a client thread stopped during most of them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fcntl import ioctl
from typing import TYPE_CHECKING

from kvmd.link import Link, LinkError, Message
from kvmfs.client.mirror import Mirror
from kvmfs.kvm.host import EventFd
from kvmfs.kvm.steal_time import RunDelays

if TYPE_CHECKING:
    from kvmfs.client.memory import ClientMemory
    from kvmfs.client.process import Process
    from kvmfs.fuse.channel import Channel
    from kvmfs.fuse.operations import NodeOperations
    from kvmfs.kvm.host import RequestLike

log = logging.getLogger("kvmd.worker")

VM_FILE_MODE = 0o600
PAGE_SIZE = 4096
_MAX_SEGMENTS = 1024
_PROCMAP_QUERY = 0xC0686611         # linux/fs.h, since 6.11
_PROCMAP_STRUCT = struct.Struct("<9Q4I2Q")
_PROCMAP_EXACT = 0                  # the mapping that covers query_addr, of any kind


@dataclass(slots=True)
class Segment:
    """A piece of the client's memory that is backed by ``fd``."""

    hva: int
    size: int
    fd: int
    offset: int
    writable: bool


class RelayedRequest:
    """An ioctl that the daemon passes on for a client that is held elsewhere (seccomp notification)."""

    data = memoryview(b"")
    interrupted = False
    context: object = None

    def __init__(self, control: Link, message: Message) -> None:
        self.tid, self.nodeid = message.integer("tid"), message.integer("inode")
        self.cmd, self.arg = message.integer("cmd"), message.integer("arg")
        self.result, self.name = 0, ""
        self._control = control

    def reply(self, result: int, data: bytes | bytearray | memoryview = b"") -> None:
        """Keep the result for the daemon; these ioctls return no data."""
        self.result = result

    def register(self, name: str, fds: list[int]) -> int:
        """Announce the file that the client is to get; returns its backing id (0: none)."""
        self._control.send("file", fds)
        message = self._control.receive()
        if message is None:
            os._exit(0)
        self.name = name
        return message.expect("backing").integer("backing", 0, (1 << 31) - 1)


class WorkerHost:
    """``kvmfs.kvm.host.Host`` over the link to the daemon.

    ``fuse`` is the VM's connection, ``maps`` the client's /proc/PID/maps, ``device`` the number of the VM's mount,
    ``uid`` and ``gid`` the owner of its files: the daemon, who alone opens them.
    """

    def __init__(self, link: Link, process: Process, *, fuse: int, maps: int, device: int, passthrough: bool,
                 uid: int, gid: int) -> None:
        self.process = process
        self._delays = RunDelays(process.task_fd)
        self.memory: ClientMemory = process.memory
        self.owns: Callable[[int], bool] = process.owns
        self.may_block: Callable[[], None] = lambda: None
        self.passthrough = passthrough
        self._link, self._lock = link, threading.Lock()
        self._fuse, self.uid, self.gid = fuse, uid, gid
        self._channel: Channel | None = None
        self._operations: NodeOperations | None = None
        self._copies: Callable[[int], None] = lambda inode: None
        # By id(request): what guest_memory() began and finish() is to end, and what needs no answer any more.
        self._pending: dict[int, tuple[bool, list[int]]] = {}
        self._answered: set[int] = set()
        self._views = KvmRunViews(maps, device)
        self._mirrors: dict[tuple[int, int], Mirror] = {}

    def connect(self, channel: Channel, operations: NodeOperations, copies: Callable[[int], None]) -> None:
        """The channel and file system that serve the VM's files; ``copies`` is told of inodes without passthrough."""
        self._channel, self._operations, self._copies = channel, operations, copies
        self.may_block = channel.may_block

    # ---- exchanges with the broker ------------------------------------------------------------------

    def _receive(self, *ops: str) -> Message:
        try:
            message = self._link.receive()
        except LinkError as error:
            log.critical("the daemon broke the protocol: %s", error)
            os._exit(1)
        if message is None:
            os._exit(0)                             # no daemon, no VM
        if message.op == "failed":
            raise OSError(message.integer("errno", 1, 4095), str(message.body.get("text", "")))
        return message.expect(*ops)

    @property
    def creator(self) -> int:
        """The thread that created the VM."""
        return self.process.tid

    def graft(self, req: RequestLike, name: str, inode: int, kvm_run: int | None, *,
              content: Callable[[], bytes] | None = None, store: int | None = None) -> int:
        """Open the file ``name`` of the VM's mount in the client; ``req`` is answered with its number.

        ``kvm_run`` is the memfd that the client's mmap of the file shows, ``content`` what it reads, ``store`` where the
        number goes instead of being the result (see kvmfs.kvm.host).  Raises OSError when nothing was
        opened; ``req`` is then answered with that errno.
        """
        channel, operations = self._channel, self._operations
        if channel is None or operations is None:
            raise OSError(errno.EIO, "the channel is not there yet")
        fds = [kvm_run, self._fuse] if kvm_run is not None and self.passthrough else []
        size = 0 if kvm_run is None else os.fstat(kvm_run).st_size
        answered, known = False, operations.has_node(inode)

        def add(backing: int) -> None:
            page = None
            if kvm_run is not None and backing:
                channel.set_backing(inode, backing)
            elif kvm_run is not None:
                page = bytearray(size)
                self._copies(inode)
            if not known:
                operations.add_node(inode, name, mode=VM_FILE_MODE, uid=self.uid, gid=self.gid, size=size, data=page,
                                    content=content)

        if isinstance(req, RelayedRequest):
            add(req.register(name, fds))
            return 0
        with self._lock:
            try:
                where = {} if store is None else {"store": store}
                self._link.send("graft", fds, tid=req.tid, name=name, **where)
                with self._receive("seized") as seized:
                    add(seized.integer("backing", 0, (1 << 31) - 1))
                req.reply(0)
                answered = True
                with self._receive("done") as done:
                    result = done.integer("result", -4095, (1 << 31) - 1)
                if result < 0:
                    raise OSError(-result, os.strerror(-result), name)
                req.context = result    # for who traces
                return result
            except OSError as error:
                if not known:
                    with contextlib.suppress(LookupError):
                        operations.remove_node(inode)
                if not answered:
                    req.reply(-(error.errno or errno.EIO))
                raise

    def guest_memory(self, req: RequestLike, hva: int, size: int) -> list[Segment]:
        """Files for the client's range; end with :meth:`finish`, which also gives the descriptors back."""
        self._lock.acquire()
        early = False
        try:
            self._link.send("guest_memory", tid=req.tid, hva=hva, size=size)
            message = self._receive("segments", "seized", "mirror")
            if message.op == "mirror":
                self._pending[id(req)] = (False, [])
                return [self._mirror(hva, size)]
            if message.op == "seized":
                early = True
                req.reply(0)
                message = self._receive("segments")
            with message:
                parts = message.items("segments", _MAX_SEGMENTS)
                fds = message.take_fds()
            segments = [Segment(p.integer("hva"), p.integer("size"), fds[p.integer("fd", 0, len(fds) - 1)],
                                p.integer("offset"), bool(p.integer("writable", 0, 1))) for p in parts]
        except BaseException:
            if early:
                self._answered.add(id(req))         # the broker has told the client why
            self._lock.release()
            raise
        # The lock stays taken until finish(): so long the broker holds the client's thread and waits.
        self._pending[id(req)] = (early, fds)
        return segments

    def _mirror(self, hva: int, size: int) -> Segment:
        """The client is traced by another program: its memory cannot be shared, so it is copied to and fro."""
        mirror = self._mirrors.get((hva, size))
        if mirror is None:
            mirror = self._mirrors[hva, size] = Mirror(self.memory, hva, size)
        return Segment(hva, size, mirror.fd, 0, True)

    @property
    def mirrors_memory(self) -> bool:
        """Is there guest memory that is copied at each KVM_RUN?"""
        return bool(self._mirrors)

    def mirror_in(self) -> list[tuple[int, int]]:
        """Bring what the client has changed into mirrored guest memory; returns the changed (hva, size)."""
        return [change for mirror in list(self._mirrors.values()) for change in mirror.copy_in()]

    def mirror_out(self) -> None:
        """Bring what the guest has changed into the client's memory."""
        for mirror in list(self._mirrors.values()):
            mirror.copy_out()

    def finish(self, req: RequestLike, result: int) -> None:
        """Give ``req`` its final result (a value or -errno), whether or not it was answered early."""
        req.context = result            # for who traces
        if id(req) in self._answered:
            self._answered.discard(id(req))
            return
        if id(req) not in self._pending:
            req.reply(result)
            return
        early, fds = self._pending.pop(id(req))
        try:
            for fd in fds:
                os.close(fd)
            if early:
                self._link.send("finish", result=result)
            else:
                req.reply(result)
        finally:
            self._lock.release()

    def eventfd(self, req: RequestLike, fd: int) -> EventFd:
        """A duplicate of the client's eventfd.  Raises OSError: EBADF no descriptor, EINVAL no eventfd."""
        with self._lock:
            self._link.send("eventfd", tid=req.tid, fd=fd)
            with self._receive("eventfd") as message:
                return EventFd(message.take_fds()[0], message.integer("id"))

    # ---- kvm_run without passthrough ----------------------------------------------------------------

    def kvm_run_copy_in(self, inode: int, page: memoryview) -> None:
        """Bring the client's view of kvm_run into ``page``; nothing when the client has not mapped it."""
        address = self._views.find(inode)
        if address:
            try:
                self.memory.readinto(address, page)
            except OSError:
                self._views.forget(inode)

    def kvm_run_copy_out(self, inode: int, page: memoryview) -> None:
        """Bring ``page`` into the client's view of kvm_run."""
        address = self._views.find(inode)
        if address:
            try:
                self.memory.write(address, page)
            except OSError:
                self._views.forget(inode)

    # ---- the client's threads -----------------------------------------------------------------------

    def run_delay(self, tid: int) -> int:
        """Nanoseconds for which the client's thread ``tid`` has waited for a CPU; 0 when that is not known."""
        return self._delays.of(tid)

    def signals_pending(self, tid: int, mask: int) -> bool:
        """Does thread ``tid`` have a pending signal that is not in ``mask`` (bit n-1: signal n)?"""
        pending = 0
        try:
            with open(f"/proc/{tid}/status", "rb") as file:
                for line in file:
                    if line.startswith((b"SigPnd:", b"ShdPnd:")):
                        pending |= int(line[7:], 16)
        except OSError:
            return True                             # it is gone
        return bool(pending & ~mask)


class KvmRunViews:
    """Where the client has mapped its vCPUs' files."""

    def __init__(self, maps: int, device: int) -> None:
        self._maps, self._device = maps, device
        self._known: dict[int, int] = {}
        self._query = bytearray(_PROCMAP_STRUCT.size)
        self._can_query = True

    def forget(self, inode: int) -> None:
        self._known.pop(inode, None)

    def find(self, inode: int) -> int:
        """The address of ``inode``'s first page in the client; 0: not mapped."""
        address = self._known.get(inode, 0)
        if address and self._still_there(address, inode):
            return address
        return self._search(inode)

    def _still_there(self, address: int, inode: int) -> bool:
        if not self._can_query:
            return True
        _PROCMAP_STRUCT.pack_into(self._query, 0, _PROCMAP_STRUCT.size, _PROCMAP_EXACT, address, *[0] * 12)
        try:
            ioctl(self._maps, _PROCMAP_QUERY, self._query, True)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EPERM):
                self._can_query = False
                return True
            return False
        fields = _PROCMAP_STRUCT.unpack(self._query)
        return (fields[3] == address and fields[7] == 0 and fields[8] == inode
                and os.makedev(fields[9], fields[10]) == self._device)

    def _search(self, inode: int) -> int:
        self._known.pop(inode, None)
        device = f"{os.major(self._device):02x}:{os.minor(self._device):02x}".encode()
        text = b""
        offset = 0
        while chunk := os.pread(self._maps, 65536, offset):
            text += chunk
            offset += len(chunk)
        for line in text.splitlines():
            fields = line.split(None, 5)
            if fields[3] == device and int(fields[4]) == inode and int(fields[2], 16) == 0:
                self._known[inode] = int(fields[0].partition(b"-")[0], 16)
                return self._known[inode]
        return 0
