# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening and closing files, answered by the thread that read the request.

pyfuse3 needs an event loop of its own, which takes a process 2 ms to begin, and two changes of threads for each
request. A process that lives as long as a VM and is asked for nothing but INIT, LOOKUP, OPEN and RELEASE does
not need it at all. `Channel.begin` serves so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from pyfuse3 import FUSEError

from . import protocol
from .operations import ATTR_TIMEOUT, ROOT, Node, NodeOperations
from .protocol import IN_HEADER, OUT_HEADER

_BODY: Final = IN_HEADER.size


class Opens:
    """Answers for the files of *operations*, whose methods must be NodeOperations' own."""

    def __init__(self, operations: NodeOperations) -> None:
        self._operations = operations
        self._handlers: dict[int, Callable[[int, memoryview], bytes]] = {
            protocol.FUSE_LOOKUP: self._lookup, protocol.FUSE_GETATTR: self._getattr, protocol.FUSE_OPEN: self._open,
            protocol.FUSE_RELEASE: self._release, protocol.FUSE_FLUSH: self._flush,
        }

    def knows(self, opcode: int) -> bool:
        """Is that a request for :meth:`answer`?"""
        return opcode in self._handlers

    def answer(self, opcode: int, unique: int, nodeid: int, message: memoryview) -> bytes:
        """The whole reply to *message*."""
        try:
            body, error = self._handlers[opcode](nodeid, message), 0
        except FUSEError as failure:
            body, error = b"", failure.errno
        return OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body

    def _lookup(self, parent: int, message: memoryview) -> bytes:
        node = self._operations.find(parent, bytes(message[_BODY:-1]))
        return protocol.ENTRY_OUT.pack(node.inode, 0, 0, ATTR_TIMEOUT, 0, 0) + _attributes(node)

    def _getattr(self, inode: int, message: memoryview) -> bytes:
        return protocol.ATTR_OUT.pack(ATTR_TIMEOUT, 0, 0) + _attributes(self._operations.node(inode))

    def _open(self, inode: int, message: memoryview) -> bytes:
        fh, cached = self._operations.open_node(inode)
        return protocol.OPEN_OUT.pack(fh, protocol.FOPEN_KEEP_CACHE if cached else protocol.FOPEN_DIRECT_IO, 0)

    def _release(self, inode: int, message: memoryview) -> bytes:
        self._operations.release_file(protocol.RELEASE_IN.unpack_from(message, _BODY)[0])
        return b""

    def _flush(self, inode: int, message: memoryview) -> bytes:
        raise FUSEError(errno.ENOSYS)   # as NodeOperations.flush


def _attributes(node: Node) -> bytes:
    links = 2 if node.inode == ROOT else 1
    return protocol.ATTR.pack(node.inode, node.size, 0, 0, 0, 0, 0, 0, 0, node.mode, links, node.uid, node.gid, 0,
                              protocol.PAGE_SIZE, 0)
