# SPDX-License-Identifier: GPL-2.0-or-later
"""The public mount: a directory with the node ``kvm`` in it, served by the daemon."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3
import trio

from kvmd.debugfs import StatsTree
from kvmd.options import Options
from kvmfs.api.dispatch import SystemDispatcher
from kvmfs.api.faults import Faults
from kvmfs.client.memory import ClientMemory, open_memory
from kvmfs.fuse import mount
from kvmfs.fuse.channel import Channel
from kvmfs.fuse.operations import Node as Entry
from kvmfs.fuse.operations import NodeOperations
from kvmfs.kvm.kvm_main import Kvm
from kvmfs.vendor.ops import KvmX86Ops

if TYPE_CHECKING:
    from kvmd.vms import Vms
    from kvmfs.kvm.host import RequestLike

log = logging.getLogger("kvmd.node")
T = TypeVar("T")

NODE = "kvm"
NODE_INODE = 2
STATE_INODE = 3
STATE = "state"         # JSON: what `kvmfs version` shows
STATS_INODE = 4
STATS = "stats"
MAX_IDLE = 2


def _mounted_at(mountpoint: str) -> list[str]:
    """The fields of /proc/self/mountinfo for what is mounted there, on top of others; without asking it.  []: nothing."""
    found: list[str] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split()
            if fields[4].encode().decode("unicode_escape") == mountpoint:
                found = fields                                  # the last one is on top
    return found


def device_at(mountpoint: str) -> int:
    """The device number of the file system that is mounted there, 0: there is none."""
    fields = _mounted_at(mountpoint)
    if not fields:
        return 0
    major, _, minor = fields[2].partition(":")
    return os.makedev(int(major), int(minor))


def type_at(mountpoint: str) -> str:
    """The type of the file system that is mounted there, "": there is none."""
    fields = _mounted_at(mountpoint)
    return fields[fields.index("-") + 1] if fields else ""


class Node:
    """Mounted from construction to :meth:`unregister`; :meth:`serve` runs the main loop."""

    def __init__(self, options: Options, ops: KvmX86Ops, vms: Vms) -> None:
        self.mountpoint = os.path.realpath(options.mountpoint)      # as mountinfo has it
        self.path = os.path.join(self.mountpoint, NODE)
        self.vms_passthrough = vms.passthrough
        self._vms = vms
        self._facts: dict[str, Any] = {}
        uid, gid = options.owner_id(), options.group_id()
        os.makedirs(self.mountpoint, exist_ok=True)
        if mount.clear_stale(self.mountpoint):
            log.warning("a stale mount on %s was removed", self.mountpoint)
        if type_at(self.mountpoint) == mount.FS_TYPE:
            raise OSError(errno.EBUSY, f"another daemon serves {self.mountpoint} ('kvmfs version' shows it): end that one, or "
                          "choose another directory")
        self._operations = PublicOperations(self._state, StatsTree(vms.brokers), os.geteuid(), os.getegid())
        self._operations.add_node(STATE_INODE, STATE, mode=0o444, uid=uid, gid=gid)
        self._operations.add_node(NODE_INODE, NODE, mode=options.mode, uid=uid, gid=gid, size=0, data=None)
        kvm = Kvm(ops, self._memory_of, shares_run=vms.passthrough, profile=options.profile)
        self.dispatcher = SystemDispatcher(kvm, create_vm=vms.create)
        if options.faults:
            self.dispatcher.tap([Faults(options.faults)])
        fuse = mount.open_dev_fuse()
        try:
            mount.mount_path(fuse, self.mountpoint)
        except BaseException:
            os.close(fuse)
            raise
        self._mounted = True
        self.device = device_at(self.mountpoint)
        self._mount_lock = threading.Lock()
        try:
            self._channel = Channel(fuse, self.dispatcher.ioctl, max_idle=MAX_IDLE)
            vms.may_block = self._channel.may_block
        except BaseException:
            self.unregister()
            raise

    @staticmethod
    def _memory_of(req: RequestLike) -> ClientMemory:
        """The caller's address space, for system ioctls with pointers; closed when the request is forgotten."""
        return _OwnedMemory(open_memory(req.tid))

    def serve(self) -> None:
        """Main thread: until the mount or the daemon ends."""
        self._channel.run(self._operations)

    def stop(self) -> None:
        """End :meth:`serve`, also when clients still hold the node.  Any thread but the main one."""
        token = pyfuse3.trio_token
        if token is not None:           # otherwise the loop is over
            try:
                trio.from_thread.run_sync(pyfuse3.terminate, trio_token=token)
            except trio.RunFinishedError:
                pass

    def unregister(self) -> None:
        """The node goes from the file system; descriptors of it stay usable until the daemon ends."""
        with self._mount_lock:
            if not self._mounted:
                return
            self._mounted = False
        try:
            mount.umount(self.mountpoint, lazy=True)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):     # somebody else has unmounted it
                log.warning("%s", error)

    # ---- facts --------------------------------------------------------------------------------------

    def publish(self, facts: dict[str, Any]) -> None:
        """Show ``facts`` in the state file, together with the VMs."""
        self._facts = facts

    def _state(self) -> bytes:
        vms = [{"vm": b.number, "process": b.process.tgid, "worker": b.pid} for b in self._vms.brokers()]
        return json.dumps({**self._facts, "vms": vms, "vms_created": self._vms.created}).encode() + b"\n"


class PublicOperations(NodeOperations):
    """The node, the state file and the statistics: each open of a text shows how things are just then.

    What must be asked of workers is asked in another thread: this one answers the kernel.
    """

    def __init__(self, state: Callable[[], bytes], stats: StatsTree, uid: int, gid: int) -> None:
        super().__init__(uid=uid, gid=gid)
        self._state, self._stats = state, stats
        self._texts: dict[int, bytes] = {}
        self.add_directory(STATS_INODE, STATS, uid=uid, gid=gid)

    def _path(self, inode: int) -> tuple[str, ...] | None:
        return () if inode == STATS_INODE else self._stats.path(inode)

    async def _entry(self, path: tuple[str, ...]) -> pyfuse3.EntryAttributes:
        mode = await _elsewhere(self._stats.mode, path)
        return self._attributes(Entry(self._stats.inode(path), path[-1], mode, os.geteuid(), os.getegid(), 0, None))

    async def lookup(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT,
                     ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        path = self._path(parent_inode)
        if path is None or name in (b".", b".."):
            return await super().lookup(parent_inode, name, ctx)
        entry = await self._entry((*path, name.decode(errors="replace")))
        self._stats.looked_up(entry.st_ino)
        return entry

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._stats.forget(inode, count)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        path = self._path(inode)
        return await (self._entry(path) if path else super().getattr(inode, ctx))

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        path = self._path(fh)
        if path is None:
            await super().readdir(fh, start_id, token)
            return
        names = await _elsewhere(self._stats.children, path)
        for position, name in enumerate(names[start_id:], start_id + 1):
            entry = await self._entry((*path, name))
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name.encode()), entry, position):
                return
            self._stats.looked_up(entry.st_ino)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        path = self._path(inode)
        text: bytes | None = None
        if path:
            text = await _elsewhere(self._stats.content, path)
            info = self.open_other()
        else:
            info = await super().open(inode, flags, ctx)
            text = self._state() if inode == STATE_INODE else None
        if text is not None:
            self._texts[info.fh] = text
        return info

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        text = self._texts.get(fh)
        return await super().read(fh, off, size) if text is None else text[off:off + size]

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._texts.pop(fh, None)
        await super().release(fh)


async def _elsewhere(function: Callable[[tuple[str, ...]], T], path: tuple[str, ...]) -> T:
    try:
        return await trio.to_thread.run_sync(function, path)
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None


class _OwnedMemory(ClientMemory):
    """Closes its descriptor when nobody refers to it."""

    __slots__ = ()

    def __del__(self) -> None:
        self.close()
