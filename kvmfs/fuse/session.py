# SPDX-License-Identifier: GPL-2.0-or-later
"""The session: what a FUSE connection is asked besides ioctls.

pyfuse3 answers, at the other end of a socketpair; INIT and OPEN replies are amended on their way. It needs an event loop
of its own, which takes a process 2 ms to begin, and two changes of threads for each request. A worker that is asked for
nothing but opening and closing files does not need it at all: `Opens` answers in the thread that read the request, and
pyfuse3 is begun when something else is asked.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from . import protocol
from .opens import Opens
from .protocol import BUFFER_SIZE, FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_INIT, FUSE_OPEN, OUT_HEADER

if TYPE_CHECKING:
    from trio.lowlevel import TrioToken

    from .operations import NodeOperations

_log = logging.getLogger(__name__)

# The largest message that pyfuse3 sends: a READ or READDIR reply of MAX_WRITE bytes with its header.
_MAX_REPLY: Final = 4 * BUFFER_SIZE


def message_buffer(size: int) -> mmap.mmap:
    """Memory that takes room where it is written only; a bytearray is written all over, and most messages are short."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Session:
    """One for each channel.

    fuse_fd      an open /dev/fuse
    passthrough  ask the kernel for it; whether it is there is `passthrough` after `ready`
    """

    def __init__(self, fuse_fd: int, passthrough: bool) -> None:
        self.passthrough = False
        self.ready = threading.Event()
        self._fd, self._want_passthrough = fuse_fd, passthrough
        self._backing: dict[int, int] = {}
        self._opening: dict[int, int] = {}  # unique of an OPEN on its way through pyfuse3 -> nodeid
        self._init_unique: int | None = None
        self._init_request = b""  # pyfuse3 gets it late, and its answer goes nowhere
        self._opens: Opens | None = None  # while that is there, pyfuse3 has not been begun
        self._late_operations: NodeOperations | None = None
        self._ended = False
        self._pair: tuple[socket.socket, int] | None = None
        self._lock = threading.Lock()
        self._trio_token: TrioToken | None = None

    # --- life -----------------------------------------------------------------------------------------------

    @property
    def pyfuse3_path(self) -> str:
        """What to give to pyfuse3.init as the mount point."""
        return f"/dev/fd/{self._ends()[1]}"

    def _ends(self) -> tuple[socket.socket, int]:
        """Our end of the connection to pyfuse3, and the number of the other one."""
        if self._pair is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # Detached: libfuse closes it with its session.
            self._pair = ours, theirs.detach()
        return self._pair

    def start(self) -> None:
        """Take pyfuse3's answers from now on."""
        self._ends()
        threading.Thread(target=self._pass_replies, name="kvmfs-replies", daemon=True).start()

    def run(self, operations: NodeOperations, start: Callable[[], None]) -> None:
        """Serve *operations* in the calling thread until `end`; *start* is called when requests can be taken."""
        pyfuse3.init(operations, self.pyfuse3_path, set(pyfuse3.default_options))
        try:
            self.start()
            start()
            trio.run(self._main)
        finally:
            pyfuse3.close(unmount=False)

    def begin(self, operations: NodeOperations) -> None:
        """Serve *operations* from now on; pyfuse3 is begun in a thread of its own when it is needed."""
        self._late_operations = operations
        self._opens = Opens(operations)

    def _run_late(self) -> None:
        assert self._late_operations is not None
        try:
            self.run(self._late_operations, lambda: None)
        except Exception:
            _log.exception("pyfuse3 failed; reading and looking at files of this connection fails from now on")

    async def _main(self) -> None:
        self._trio_token = trio.lowlevel.current_trio_token()
        # end() sets _ended before it looks for the token, so one of the two sees the other.
        if not self._ended:
            await pyfuse3.main()

    def end(self) -> None:
        """The connection has ended: pyfuse3 ends. Any thread but its own."""
        self._ended = True
        # The socketpair stays open: libfuse takes a closed one for an error, and pyfuse3.main() raises.
        if self._trio_token is not None:
            try:
                trio.from_thread.run_sync(pyfuse3.terminate, trio_token=self._trio_token)
            except trio.RunFinishedError:
                pass

    def set_backing(self, nodeid: int, backing_id: int | None) -> None:
        """See `Channel.set_backing`."""
        if backing_id is None:
            self._backing.pop(nodeid, None)
        else:
            self._backing[nodeid] = backing_id

    # --- requests -------------------------------------------------------------------------------------------

    def serve(self, opcode: int, unique: int, nodeid: int, message: memoryview) -> None:
        """Answer *message*, or pass it on. Called by the thread that read it."""
        opens = self._opens
        if opens is not None and self._serve_here(opens, opcode, unique, nodeid, message):
            return
        if opcode == FUSE_OPEN:
            self._opening[unique] = nodeid
        elif opcode == FUSE_INIT:
            self._init_unique = unique
            self.passthrough = self._want_passthrough and protocol.init_offers_passthrough(message)
        try:
            self._ends()[0].send(message)
        except OSError:
            if not self._ended:
                _log.warning("pyfuse3 is gone; FUSE operation %d is refused", opcode)
            # FORGET and the like have no reply; the kernel answers ENOENT to one and nothing is lost.
            try:
                os.write(self._fd, OUT_HEADER.pack(OUT_HEADER.size, -errno.EIO, unique))
            except OSError:
                pass

    def _serve_here(self, opens: Opens, opcode: int, unique: int, nodeid: int, message: memoryview) -> bool:
        """Without pyfuse3. False: it is needed, and has been begun."""
        if opcode in (FUSE_FORGET, FUSE_BATCH_FORGET):
            return True  # has no answer, and NodeOperations do not count
        if opcode == FUSE_INIT:
            self._init_request, self._init_unique = bytes(message), unique
            self.passthrough = self._want_passthrough and protocol.init_offers_passthrough(message)
            self._write(protocol.libfuse_init_reply(message, passthrough=self.passthrough))
            self.ready.set()
        elif opens.knows(opcode):
            answer = opens.answer(opcode, unique, nodeid, message)
            if opcode == FUSE_OPEN and len(answer) > OUT_HEADER.size and nodeid in self._backing:
                answer = protocol.amend_open_reply(answer, self._backing[nodeid])
            self._write(answer)
        else:
            with self._lock:
                if self._opens is not None:
                    self._ends()[0].send(self._init_request)
                    threading.Thread(target=self._run_late, name="kvmfs-pyfuse3", daemon=True).start()
                    self._opens = None
            return False
        return True

    def _pass_replies(self) -> None:
        """Thread: what pyfuse3 answers goes to the kernel."""
        ours = self._ends()[0]
        buffer = message_buffer(_MAX_REPLY)
        view = memoryview(buffer)
        while True:
            try:
                length = ours.recv_into(buffer)
            except OSError:
                return
            if not length:
                return
            message: memoryview | bytes = view[:length]
            (_len, error, unique) = OUT_HEADER.unpack_from(message)
            initial = False
            if unique == 0:
                pass  # a notification of pyfuse3's, not a reply
            elif unique == self._init_unique:
                self._init_unique = None
                if self._init_request:
                    continue  # the kernel has an answer already
                initial = error == 0
                if initial:
                    message = protocol.amend_init_reply(message, passthrough=self.passthrough)
            else:
                nodeid = self._opening.pop(unique, None)
                if nodeid is not None and error == 0:
                    backing_id = self._backing.get(nodeid)
                    if backing_id is not None:
                        message = protocol.amend_open_reply(message, backing_id)
            self._write(message)
            if initial:
                self.ready.set()

    def _write(self, answer: bytes | memoryview) -> None:
        try:
            os.write(self._fd, answer)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                _log.error("the kernel did not take a reply: %s", failure)
