# SPDX-License-Identifier: GPL-2.0-or-later
"""The channel: this process's end of a FUSE connection.

pyfuse3 has no ioctl and no interrupt handler, and no handler of its own would be as fast as a KVM_RUN needs
it. So the channel owns /dev/fuse. It answers FUSE_IOCTL and FUSE_INTERRUPT itself and leaves everything else
to its session: stock pyfuse3, which is given one end of a socketpair as the "mount point" /dev/fd/N and never
knows.

Why it is as it is (figures: one core, Linux 6.18, CPython 3.11):

- An ioctl is answered in the thread that read it. Any hand-over to another thread costs 5 to 70 µs.
- All reader threads share the one descriptor: the kernel wakes one of them per request. A cloned one
  (FUSE_DEV_IOC_CLONE) would bind an answer to the descriptor that its request came from.
- One reader is fastest, but a thread that runs a guest reads nothing. `may_block` makes sure that another one
  does. That one waits in read(2), not for a word of ours: the change of threads then costs 1 µs, not a wakeup.
- FUSE_INTERRUPT may be read by another thread before its request was looked at by the one that read it. Such
  early interrupts are remembered; `Request.interrupted` is set before the handler sees the request.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from .exchange import BEGUN, LOOK, Exchange
from .protocol import (
    BUFFER_SIZE,
    FUSE_INTERRUPT,
    FUSE_IOCTL,
    IN_HEADER,
    INTERRUPT_IN,
    IOCTL_REPLY,
    IOCTL_REQUEST,
)
from .session import Session, message_buffer

if TYPE_CHECKING:
    from .operations import NodeOperations

_log = logging.getLogger(__name__)

Payload: TypeAlias = bytes | bytearray | memoryview
Outcome: TypeAlias = int | Payload | tuple[int, Payload] | None

_NO_DATA: Final = memoryview(b"")
_IOCTL_REPLY_SIZE: Final = IOCTL_REPLY.size
# Early interrupts live for the microseconds until the other thread looks at its request; those of requests
# that were answered meanwhile are never asked for and fall out here.
_MAX_EARLY: Final = 1024
_WATCH_EVERY: Final = 64


class Request:
    """One FUSE_IOCTL.

    unique    the kernel's number for it, never used twice on a connection
    nodeid    the inode that it was issued on; fh the open file (pyfuse3's fh of `open`)
    tid       the calling *thread* in the pid namespace of whoever mounted; 0 when it has no number there
    uid, gid  the caller's fsuid and fsgid, in the mount's user namespace
    cmd, arg  the ioctl's number and its third argument, as given (32 and 64 bits)
    data      what the kernel copied in: _IOC_SIZE bytes when the number says _IOC_WRITE, else empty. A view
              of the reader's buffer: valid until the handler returns, copy what is needed longer
    out_size  how many bytes the kernel can copy out; more data in the answer is EIO for the client
    interrupted  a signal is pending for the caller (at most one such notice comes per request)
    context   for the handler's own use. To block without losing an interrupt: set context, then look at
              interrupted; the interrupt callback comes after interrupted was set and looks at context
    """

    __slots__ = (
        "_channel", "arg", "cmd", "context", "data", "fh", "gid", "interrupted", "nodeid", "out_size", "tid", "uid",
        "unique",
    )

    # Made by Channel._serve alone, which sets all of them: a call of __init__ costs more than the rest of a request.
    _channel: Channel
    unique: int
    nodeid: int
    fh: int
    tid: int
    uid: int
    gid: int
    cmd: int
    arg: int
    data: memoryview
    out_size: int
    interrupted: bool
    context: object | None

    def reply(self, result: int, data: Payload = b"") -> None:
        """Answer now, from any thread; the handler then returns None.

        *result* is what ioctl(2) returns, negative: -errno. *data* is copied out in both cases.
        RuntimeError: it was answered already.
        """
        channel = self._channel
        if channel.inflight.pop(self.unique, None) is None:
            raise RuntimeError(f"ioctl {self.cmd:#x} (request {self.unique}) was answered already")
        channel._send(self, result, data)

    def __repr__(self) -> str:
        return f"<ioctl {self.cmd:#x} arg {self.arg:#x} inode {self.nodeid} tid {self.tid} unique {self.unique}>"


IoctlHandler: TypeAlias = Callable[[Request], Outcome]


class Shortcut(NamedTuple):
    """What answers some ioctls without Python; see shortcut.h.

    address  of its struct shortcut, which lives as long as the channel; 0: there is none
    go_on    called instead of the channel's handler for a request that it has begun and not answered
    """

    address: int
    go_on: IoctlHandler


class Channel:
    """Serves one connection.

    fuse_fd      an open /dev/fuse that was mounted (kvmfs.fuse.mount). It must stay open until the process
                 ends: a handler that is late would otherwise answer into whatever has that number by then
    ioctl        called in a reader thread for every FUSE_IOCTL; what it returns is the answer: an int the
                 result, bytes result 0 with that payload, a tuple both, None: it answered by `Request.reply`
                 or somebody will. An OSError becomes -errno; any other exception is logged once and becomes
                 EIO
    interrupt    called in a reader thread when a signal came for the caller of a request in flight (and, when
                 the connection ends, for all of them). The request may have been answered meanwhile
    passthrough  ask the kernel for passthrough; whether it is there is `passthrough` after `ready`
    max_idle     how many threads may wait for requests. One more than there are handlers that block at a time
                 never starts a thread on the way of an ioctl. May be changed at any time
    watch        called in a reader thread, after the answer, for every 64th request whose handler had called
                 `may_block`, and of those that the shortcut has answered: the place to look now and then at
                 where such calls come from
    shortcut     asked first about every ioctl without data
    on_end       called once, in a reader thread, when the kernel ended the connection (unmounted, the last
                 file of a detached mount closed, aborted); after that pyfuse3's main loop is stopped
    """

    def __init__(
        self, fuse_fd: int, ioctl: IoctlHandler, *, interrupt: Callable[[Request], None] | None = None,
        passthrough: bool = False, max_idle: int = 2, watch: Callable[[Request], None] | None = None,
        on_end: Callable[[], None] | None = None, shortcut: Shortcut | None = None,
    ) -> None:
        self.max_idle = max_idle
        self.watch = watch
        self.on_end = on_end
        self.inflight: dict[int, Request] = {}
        self.ended = threading.Event()
        self._fd = fuse_fd
        self._ioctl = ioctl
        self._session = Session(fuse_fd, passthrough)
        self._exchange = Exchange(fuse_fd)
        self._go_on = ioctl
        if shortcut is not None:
            self._go_on = shortcut.go_on
            self._exchange.set_shortcut(shortcut.address)
        self._interrupt = interrupt
        self._early: OrderedDict[int, bool] = OrderedDict()
        self._reported: set[tuple[int, str, int]] = set()
        self._lock = threading.Lock()
        self._readers: dict[int, int] = {}  # thread ident -> native thread id
        self._reader_count = 0  # those that are being started included
        self._cpus: frozenset[int] = frozenset()  # where readers may run; empty: as the process
        self._blocked: set[int] = set()  # idents of readers that are in a handler which may block
        self._end_seen = False

    # --- life -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> threading.Event:
        """Set when INIT was answered: backing files can be registered, and `passthrough` is known."""
        return self._session.ready

    @property
    def passthrough(self) -> bool:
        """Does the kernel do passthrough?"""
        return self._session.passthrough

    @property
    def pyfuse3_path(self) -> str:
        """What to give to pyfuse3.init as the mount point."""
        return self._session.pyfuse3_path

    def start(self) -> None:
        """Begin to read requests. pyfuse3 must be initialised on `pyfuse3_path` by now or soon: INIT waits
        for it."""
        self._session.start()
        self._start_reader()

    def run(self, operations: NodeOperations) -> None:
        """Serve *operations* in the calling (main) thread until the connection ends. Includes `start`.

        pyfuse3 has one session per process, so only one channel of a process can be run at a time.
        """
        self._session.run(operations, self._start_reader)

    def begin(self, operations: NodeOperations) -> None:
        """Serve *operations*, in other threads, from now on. `on_end` tells when that is over.

        pyfuse3 is begun only when something is asked that `Opens` does not answer. The methods of *operations* must be
        NodeOperations' own.
        """
        self._session.begin(operations)
        self._start_reader()

    def _end(self) -> None:
        with self._lock:
            if self._end_seen:
                return
            self._end_seen = True
        self.ended.set()
        # Nobody waits for these answers any more; whoever works on one should stop.
        for request in list(self.inflight.values()):
            self._deliver_interrupt(request)
        if self.on_end is not None:
            try:
                self.on_end()
            except Exception:
                _log.exception("on_end of the FUSE channel failed")
        self._session.end()

    # --- passthrough ----------------------------------------------------------------------------------------

    def set_backing(self, nodeid: int, backing_id: int | None) -> None:
        """From now on an open of *nodeid* is a passthrough open of *backing_id* (mount.backing_open); None
        ends that.

        All opens of an inode that overlap must have the same backing: the kernel answers EIO to others.
        """
        self._session.set_backing(nodeid, backing_id)

    # --- threads --------------------------------------------------------------------------------------------

    def threads(self) -> list[int]:
        """The native ids of the threads that read requests."""
        return list(self._readers.values())

    def set_affinity(self, cpus: Iterable[int]) -> None:
        """Bind the threads that read requests to these CPUs, also those that are started later.

        All of them, because the kernel wakes now one and now another. OSError: none of the CPUs can be used.
        """
        with self._lock:
            self._cpus = frozenset(cpus)
            for tid in self._readers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(tid, self._cpus)

    def make_idle(self) -> None:
        """Give the threads that read requests the scheduling policy SCHED_IDLE; who they start has it, too."""
        with self._lock:
            for tid in self._readers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))

    def may_block(self) -> None:
        """The calling handler may take long: make sure that somebody else reads meanwhile.

        Call it once per request, before blocking. A thread is started when none is idle. Does nothing in a
        thread that is not a reader. RuntimeError: no thread could be started.
        """
        ident, blocked = get_ident(), self._blocked
        if ident in blocked or ident not in self._readers:
            return
        # Without the lock, which nearly every exit of a guest would pay for: it is noted before it is looked, here
        # as in _returned, so of two threads that give up reading at a time at least one sees the other.
        blocked.add(ident)
        if len(blocked) + self._exchange.about_to_block() < self._reader_count:
            return
        self._start_reader()

    def _start_reader(self) -> None:
        with self._lock:
            self._reader_count += 1
        try:
            threading.Thread(target=self._reader, name="kvmfs-reader", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._reader_count -= 1
            raise

    def _returned(self, ident: int) -> bool:
        """A handler that had called may_block returned. True: there are enough readers, this thread shall end."""
        self._blocked.discard(ident)
        # Staying is never wrong, so this look needs no lock; two that leave at a time would leave nobody.
        exchange, idle = self._exchange, max(1, self.max_idle)
        if self._reader_count - len(self._blocked) - exchange.running <= idle:
            return False
        with self._lock:
            if self._reader_count - len(self._blocked) - exchange.running <= idle:
                return False
            self._reader_count -= 1
            if self._reader_count <= len(self._blocked) + exchange.running:
                self._reader_count += 1
                return False
            del self._readers[ident]
            return True

    def _reader(self) -> None:
        ident = get_ident()
        with self._lock:
            self._readers[ident] = threading.get_native_id()
            if self._cpus:
                with contextlib.suppress(OSError):  # they went offline; nobody is bound there any more
                    os.sched_setaffinity(0, self._cpus)
        try:
            self._serve(ident)
        except Exception:
            _log.exception("FUSE channel: the reader failed; the connection is given up")
            self._end()

    def _serve(self, ident: int) -> None:
        # The hot path: everything a local, one unpack, one pack, one call for the answer and the next request.
        fd, exchange = self._fd, self._exchange.exchange
        unpack, pack = IOCTL_REQUEST.unpack_from, IOCTL_REPLY.pack
        handle, inflight, early, blocked = self._ioctl, self.inflight, self._early, self._blocked
        claim = inflight.pop
        request_class, operation, header_size = Request, FUSE_IOCTL, IOCTL_REQUEST.size
        reply_size, eio = _IOCTL_REPLY_SIZE, errno.EIO
        no_data = _NO_DATA
        buffer = message_buffer(BUFFER_SIZE)
        view = memoryview(buffer)
        plain, begun = handle, self._go_on
        outcome: Outcome
        answered: Request | None = None
        answer: bytes | None = None
        until_watch = _WATCH_EVERY
        while True:
            try:
                length = exchange(answer, buffer)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self._end()
                    return
                # ENOENT: the request was taken back while it was read.
                if error.errno in (errno.ENOENT, errno.EAGAIN, errno.EINTR):
                    answer = None
                    continue
                raise
            answer = None
            if length < 0:
                if answered is not None:
                    self._send_failed(answered, OSError(-length, os.strerror(-length)))
                continue
            handle = plain
            if length >= LOOK:
                if length & LOOK:
                    self._look(buffer)
                    continue
                handle = begun
                length -= BEGUN
            request = request_class()
            (_len, opcode, unique, nodeid, request.uid, request.gid, request.tid, _ext, _pad, request.fh, _flags,
             request.cmd, request.arg, in_size, request.out_size) = unpack(buffer)
            if opcode != operation:
                self._other(opcode, unique, nodeid, view[:length])
                continue
            request._channel, request.unique, request.nodeid = self, unique, nodeid
            request.data = view[header_size : header_size + in_size] if in_size else no_data
            request.interrupted, request.context = False, None
            inflight[unique] = request
            if early and early.pop(unique, False):
                self._deliver_interrupt(request)
            try:
                outcome = handle(request)
            except OSError as error:
                outcome = -(error.errno or eio)
            except Exception as error:
                self._report(request, error)
                outcome = -eio
            # Before the answer: the client's next request may be read before this thread comes on, and must
            # find it idle, or it would start a thread each time.
            leave = look = False
            if ident in blocked:
                leave = self._returned(ident)
                until_watch -= 1
                look = until_watch == 0
            if outcome is not None:
                if claim(unique, None) is None:
                    _log.error("%r was answered by its handler and then once more with %r", request, outcome)
                else:
                    try:
                        if outcome.__class__ is int:
                            answer = pack(reply_size, 0, unique, outcome, 0, 0, 0)
                        elif isinstance(outcome, tuple):
                            answer = self._message(request, *outcome)
                        elif isinstance(outcome, int):
                            answer = self._message(request, outcome, no_data)
                        else:
                            answer = self._message(request, 0, outcome)
                        if leave or look:
                            os.write(fd, answer)
                            answer = None
                    except (OSError, struct.error, TypeError) as error:
                        answer = None
                        self._send_failed(request, error)
                    answered = request
            if leave:
                return
            if look:
                until_watch = _WATCH_EVERY
                if self.watch is not None:
                    self.watch(request)

    def _look(self, buffer: mmap.mmap) -> None:
        """The shortcut has answered this request."""
        if self.watch is None:
            return
        request = Request()
        (_len, _opcode, request.unique, request.nodeid, request.uid, request.gid, request.tid, _ext, _pad, request.fh, _flags,
         request.cmd, request.arg, _in_size, request.out_size) = IOCTL_REQUEST.unpack_from(buffer)
        request._channel, request.data, request.interrupted, request.context = self, _NO_DATA, False, None
        self.watch(request)

    # --- answers --------------------------------------------------------------------------------------------

    @staticmethod
    def _message(request: Request, result: int, data: Payload) -> bytes:
        return IOCTL_REPLY.pack(_IOCTL_REPLY_SIZE + len(data), 0, request.unique, result, 0, 0, 0) + data

    def _send(self, request: Request, result: int, data: Payload) -> None:
        try:
            os.write(self._fd, self._message(request, result, data))
        except (OSError, struct.error, TypeError) as error:
            self._send_failed(request, error)

    def _send_failed(self, request: Request, error: Exception) -> None:
        """The kernel did not take an answer, or it could not be built."""
        if isinstance(error, OSError):
            # ENOENT, ENODEV, ENOTCONN, ECONNABORTED: the connection ended and nobody waits.
            if error.errno == errno.EINVAL:
                # It has ended the request with EIO.
                _log.error("the answer to %r is not acceptable to the kernel (out_size %d)", request, request.out_size)
            return
        self._report(request, error)
        try:
            os.write(self._fd, IOCTL_REPLY.pack(_IOCTL_REPLY_SIZE, 0, request.unique, -errno.EIO, 0, 0, 0))
        except OSError:
            pass

    def _report(self, request: Request, error: BaseException) -> None:
        """Log an unexpected exception with its traceback, the same one only once: a client could fill the
        disk."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        key = (request.cmd, type(error).__name__, place.tb_lineno if place is not None else 0)
        if key not in self._reported:
            self._reported.add(key)
            _log.error("%r failed; the client gets EIO", request, exc_info=error)

    # --- everything that is no ioctl ------------------------------------------------------------------------

    def _other(self, opcode: int, unique: int, nodeid: int, message: memoryview) -> None:
        if opcode == FUSE_INTERRUPT:
            self._interrupted(INTERRUPT_IN.unpack_from(message, IN_HEADER.size)[0])
            return
        self._session.serve(opcode, unique, nodeid, message)

    def _interrupted(self, unique: int) -> None:
        inflight, early = self.inflight, self._early
        request = inflight.get(unique)
        if request is None:
            early[unique] = True
            # The request may have been entered between the look and the note. The note is then taken back by
            # exactly one of the two threads, and that one delivers.
            request = inflight.get(unique)
            if request is None:
                self._exchange.interrupt(unique)
                while len(early) > _MAX_EARLY:
                    early.popitem(last=False)
                return
            if not early.pop(unique, False):
                return
        self._deliver_interrupt(request)

    def _deliver_interrupt(self, request: Request) -> None:
        request.interrupted = True
        if self._interrupt is not None:
            try:
                self._interrupt(request)
            except Exception as error:
                self._report(request, error)
