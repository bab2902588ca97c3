# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kvmfs mount looks like to everything but ioctl(2): one directory with a few nodes in it.

The nodes are regular files to stat(2): for an inode of type S_IFCHR the kernel would open its own driver
instead. Most are opened with direct_io: read(2) and write(2) reach us and get EINVAL, as from the real node,
and a shared mmap gets ENODEV from the kernel. A node with `data` (the fallback for a vCPU's kvm_run page
where there is no passthrough) is opened through the page cache, so that it can be mapped; its bytearray is
what the cache is filled from and written back to. A node with `content` is read only: each read(2) shows what
that function returns just then.
"""

from __future__ import annotations

import errno
import itertools
import stat
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from .protocol import PAGE_SIZE

# Names come and go (remove_node), so the kernel asks for each; sizes and modes change only through us.
_ENTRY_TIMEOUT: Final = 0
ATTR_TIMEOUT: Final = 3600
_NAME_MAX: Final = 255

ROOT: Final = int(pyfuse3.ROOT_INODE)


@dataclass(slots=True)
class Node:
    """One inode. size in bytes; data, when there, is the content for page-cache opens."""

    inode: int
    name: str
    mode: int
    uid: int
    gid: int
    size: int
    data: bytearray | None
    content: Callable[[], bytes] | None = None


class NodeOperations(pyfuse3.Operations):
    """The inode table and pyfuse3's view of it.

    opened(inode)    called for every open(2) that is about to succeed; an OSError becomes the client's errno.
                     Must not block
    released(inode)  called when the last descriptor of one open(2) was closed

    Two threads may be in either at a time (`Channel.begin`).
    """

    supports_dot_lookup = True
    enable_writeback_cache = False  # passthrough and writeback exclude each other in the kernel

    def __init__(
        self, *, opened: Callable[[int], None] | None = None,
        released: Callable[[int], None] | None = None, root_mode: int = 0o555, uid: int = 0, gid: int = 0,
    ) -> None:
        super().__init__()
        self._opened = opened
        self._released = released
        self._nodes: dict[int, Node] = {ROOT: Node(ROOT, "", stat.S_IFDIR | root_mode, uid, gid, 0, None)}
        self._names: dict[bytes, Node] = {}
        self._files: dict[int, Node] = {}
        self._handles = itertools.count(1)

    # --- the table; any thread ------------------------------------------------------------------------------

    def add_node(
        self, inode: int, name: str, *, mode: int = 0o600, uid: int = 0, gid: int = 0, size: int = 0,
        data: bytearray | None = None, content: Callable[[], bytes] | None = None,
    ) -> None:
        """Add a file *name* to the directory.

        inode  > 1, new; mode  permission bits; size  st_size in bytes (of *data*, when given; a mapping past
               it is
        SIGBUS for the client). ValueError: inode or name is taken or not valid.
        """
        raw = name.encode()
        if inode in self._nodes or raw in self._names:
            raise ValueError(f"inode {inode} or name {name!r} is in use")
        if inode <= ROOT or not 0 < len(raw) <= _NAME_MAX or b"/" in raw or b"\0" in raw:
            raise ValueError(f"inode {inode} with name {name!r} cannot be")
        node = Node(inode, name, stat.S_IFREG | mode & 0o7777, uid, gid, size if data is None else len(data), data, content)
        self._nodes[inode] = node
        self._names[raw] = node

    def add_directory(self, inode: int, name: str, *, uid: int = 0, gid: int = 0) -> None:
        """Add a directory *name*; what is in it the subclass says.  ValueError: inode or name is taken or not valid."""
        self.add_node(inode, name, uid=uid, gid=gid)
        self._nodes[inode].mode = stat.S_IFDIR | 0o555

    def open_other(self) -> FileInfo:
        """A file handle for a file that a subclass has by itself, and reads."""
        return FileInfo(fh=FileHandleT(next(self._handles)), direct_io=True)

    def remove_node(self, inode: int) -> None:
        """Take the file out of the directory. Files that are open stay usable. KeyError: there is none."""
        node = self._nodes[inode]
        if inode == ROOT:
            raise KeyError(inode)
        self._names.pop(node.name.encode())
        del self._nodes[inode]

    def has_node(self, inode: int) -> bool:
        """Is there a file of that inode in the directory?"""
        return inode in self._nodes

    def node(self, inode: int) -> Node:
        """That inode, also when it has no name any more.  FUSEError: there is none."""
        node = self._nodes.get(inode)
        if node is None:
            # An open file keeps its inode after remove_node.
            node = next((file for file in list(self._files.values()) if file.inode == inode), None)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return node

    def find(self, parent: int, name: bytes) -> Node:
        """The file of that name.  FUSEError: there is none."""
        if name in (b".", b".."):
            return self.node(ROOT)
        node = self._names.get(name) if parent == ROOT else None
        if node is None:
            raise FUSEError(errno.ENOENT)
        return node

    def open_node(self, inode: int) -> tuple[int, bool]:
        """Open a file; its handle, and whether it is read through the page cache.  FUSEError."""
        node = self.node(inode)
        if self._opened is not None:
            try:
                self._opened(node.inode)
            except OSError as error:
                raise FUSEError(error.errno or errno.EIO) from None
        fh = next(self._handles)
        self._files[fh] = node
        return fh, node.data is not None

    def release_file(self, fh: int) -> None:
        """The last descriptor of that handle is closed."""
        node = self._files.pop(fh, None)
        if node is not None and self._released is not None:
            self._released(node.inode)

    @staticmethod
    def _attributes(node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.inode)
        entry.generation = 0
        entry.entry_timeout = _ENTRY_TIMEOUT
        entry.attr_timeout = ATTR_TIMEOUT
        entry.st_mode = ModeT(node.mode)
        entry.st_nlink = 2 if stat.S_ISDIR(node.mode) else 1
        entry.st_uid = node.uid
        entry.st_gid = node.gid
        entry.st_size = node.size
        entry.st_blksize = PAGE_SIZE
        entry.st_blocks = 0
        return entry

    # --- names and attributes -------------------------------------------------------------------------------

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self.find(parent_inode, name))

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self.node(inode))

    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """chmod and chown work (udev rules and administrators use them; the kernel has checked who may).

        A size is ignored: O_TRUNC means nothing to a device node. So are times.
        """
        node = self.node(inode)
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        return self._attributes(node)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_SIZE
        data.f_blocks = data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._nodes)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = _NAME_MAX
        return data

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if inode != ROOT:
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(0)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        # The inode number is the position: it stays right when nodes come and go between two calls.
        for inode in sorted(self._nodes):
            if inode == ROOT or inode <= start_id:
                continue
            node = self._nodes.get(inode)
            if node is None:
                continue
            if not pyfuse3.readdir_reply(token, FileNameT(node.name.encode()), self._attributes(node), inode):
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        return

    # --- files ----------------------------------------------------------------------------------------------

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        fh, cached = self.open_node(inode)
        if not cached:
            return FileInfo(fh=FileHandleT(fh), direct_io=True)
        # Without keep_cache every open would throw away the pages that others have mapped.
        return FileInfo(fh=FileHandleT(fh), keep_cache=True)

    async def release(self, fh: FileHandleT) -> None:
        self.release_file(fh)

    async def flush(self, fh: FileHandleT) -> None:
        raise FUSEError(errno.ENOSYS)  # the kernel then stops asking at every close(2)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        node = self._files.get(fh)
        if node is not None and node.content is not None:
            return node.content()[off : off + size]
        if node is None or node.data is None:
            raise FUSEError(errno.EINVAL)
        return bytes(node.data[off : off + size])

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        node = self._files.get(fh)
        if node is None or node.data is None or off >= len(node.data):
            raise FUSEError(errno.EINVAL)
        # Never past the end: growing would replace the memory that the machine works on.
        count = min(len(buf), len(node.data) - off)
        node.data[off : off + count] = buf[:count]
        return count

    # access, poll, fsync and xattrs keep pyfuse3's ENOSYS: the kernel remembers it and answers by itself,
    # access by the mode bits (default_permissions), poll with "ready", as for a file without a poll
    # operation.


async def _refuse(*_arguments: Any) -> Any:
    raise FUSEError(errno.EPERM)


def _refuse_changes(methods: Sequence[str]) -> None:
    # With pyfuse3's ENOSYS root would see "Function not implemented" from touch(1).
    refuse: Callable[..., Coroutine[Any, Any, Any]] = _refuse
    for method in methods:
        setattr(NodeOperations, method, refuse)


_refuse_changes(("create", "link", "mkdir", "mknod", "rename", "rmdir", "symlink", "unlink"))
