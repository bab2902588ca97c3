# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of one VM: what its worker may ask for, and what the daemon does for it.

Everything that reaches into the client's process happens here, in this VM's own thread, because ptrace binds a
traced thread to the tracing one.  The worker counts as hostile: it can only touch the process that created its
VM, with requests that are checked field by field, and a worker that breaks the protocol or hangs is killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvmd.deadvms import Connection
from kvmd.link import Link, LinkError, Message, failure
from kvmd.watchdog import Watchdog
from kvmfs.client.process import Process, command_of, status_field
from kvmfs.client.takeover import Segment, close_segments, resolve, take_over
from kvmfs.client.tracer import ClientGoneError, Thread, TracedError, settle
from kvmfs.fuse.mount import backing_open

log = logging.getLogger("kvmd.broker")

PATIENCE = 10.0         # seconds that a worker may take for its part of an exchange
FUSE_DEVICE = os.makedev(10, 229)
MAX_TID = (1 << 31) - 1
PAGE_SIZE = 4096
MAX_ADDRESS = (1 << 64) - 1     # of what a client passes; its memory says whether that is one
TASK_SIZE = 1 << 47
FILE_NAME = r"(kvm-[a-z]{1,16}(-stats)?|anon_inode:[a-z-]{1,16})(:[0-9]{1,10})?(:[a-z]{1,16})?"

SYS_OPENAT2 = 437
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def open_on_mount(mount: int, name: str) -> int:
    """Open a worker's file: whatever the worker answers, this is a regular file of its own mount.

    Raises OSError; EIO when it is something else.
    """
    access = os.O_RDONLY if "-stats" in name else os.O_RDWR
    how = (ctypes.c_uint64 * 3)(access | os.O_CLOEXEC | os.O_NOCTTY, 0,
                                RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH)
    fd = int(_libc.syscall(SYS_OPENAT2, mount, ctypes.c_char_p(name.encode()), how, ctypes.c_size_t(24)))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EIO, "the worker's file is no regular file", name)
    return fd


def uid_of(pid: int) -> int:
    """The real user id of a process; -1: it is gone."""
    field = status_field(pid, "Uid")
    return int(field.split()[0]) if field else -1


class Broker:
    """One VM as the daemon sees it.  ``closed`` is called once, in the broker's thread, when the VM is gone."""

    def __init__(self, number: int, process: Process, watchdog: Watchdog, passthrough: bool) -> None:
        self.number, self.process = number, process
        self.uid, self.command, self.since = uid_of(process.tgid), command_of(process.tgid), time.time()
        self.pid = 0
        self.mount = -1         # the VM's detached mount
        self.device = 0         # its device number
        self._pidfd = -1
        self._connection: Connection | None = None
        self._requests, worker_requests = Link.pair()
        self._control, worker_control = Link.pair()
        self.worker_ends = (worker_requests, worker_control)
        self._control_lock = threading.Lock()
        self._watchdog, self._passthrough = watchdog, passthrough
        self._thread: threading.Thread | None = None
        self._ending = False
        self._said: set[str] = set()

    # ---- life ---------------------------------------------------------------------------------------

    def attach_worker(self, pid: int, pidfd: int, connection: Connection) -> None:
        """From now on this is the VM's worker, and that its connection."""
        self.pid, self._pidfd, self._connection = pid, pidfd, connection

    def wait_until_ready(self) -> None:
        """Raises OSError when the worker does not get ready."""
        try:
            message = self._requests.receive(PATIENCE)
        except LinkError as error:
            raise OSError(errno.EIO, str(error)) from error
        if message is None:
            raise OSError(errno.EIO, f"worker {self.pid} of VM {self.number} ended while it started")
        with message:
            if message.op == "failed":
                raise OSError(message.integer("errno", 1, 4095), message.body.get("text", ""))
            message.expect("ready")

    def open_file(self, name: str) -> int:
        """Open a file of the VM's mount; the worker is killed when it does not serve it in time."""
        with self._watchdog.limit(PATIENCE, self._overdue):
            return open_on_mount(self.mount, name)

    def start(self, closed: Callable[[Broker], None]) -> None:
        """Start to serve the worker's requests."""
        self._thread = threading.Thread(target=self._run, args=(closed,), name=f"broker-{self.number}", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """End the worker at once.  The client's calls on the VM fail from then on."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except (ProcessLookupError, OSError):
                pass
            if self._connection is not None:
                self._connection.take()

    def join(self, timeout: float) -> bool:
        """Wait until the VM is gone."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def close(self) -> None:
        """Give back everything; also for a VM that never got to :meth:`start`."""
        self.kill()
        for link in self.worker_ends:
            link.close()
        with self._control_lock:
            self._control.close()
        self._requests.close()
        if self.mount >= 0:
            os.close(self.mount)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self.mount = self._pidfd = -1
        if self._connection is not None:
            self._connection.answer()       # and let go of it when no client has a descriptor of the VM
        self.process.close()

    def control(self, op: str, fds: Sequence[int] = (), *, patience: float = PATIENCE, **fields: Any) -> Message | None:
        """Tell the worker something and wait for its answer; None when it is gone, or does not answer and is killed."""
        with self._control_lock:
            try:
                self._control.send(op, fds, **fields)
                return self._control.receive(patience)
            except (TimeoutError, BlockingIOError):
                self._overdue(patience)
            except (OSError, LinkError, ValueError) as error:
                if not self._ending:
                    log.debug("VM %d: %s not delivered: %s", self.number, op, error)
            return None

    def ping(self, seconds: float) -> None:
        """The worker answers within that time, or is killed."""
        answer = self.control("ping", patience=seconds)
        if answer is not None:
            answer.close()

    def relay(self, tid: int, inode: int, cmd: int, arg: int) -> tuple[int, int]:
        """Have the worker carry out an ioctl for a client that is held elsewhere.

        Returns its result (or -errno) and the file that the client is to get as its result (-1: none).
        """
        with self._control_lock:
            try:
                self._control.send("ioctl", tid=tid, inode=inode, cmd=cmd, arg=arg)
                while True:
                    message = self._control.receive(PATIENCE)
                    if message is None:
                        return -errno.EIO, -1
                    with message:
                        if message.expect("file", "answer").op == "answer":
                            result = message.integer("result", -4095, MAX_TID)
                            name = message.text("name", FILE_NAME) if result >= 0 and message.body.get("name") else ""
                            break
                        backing = self._register_backing(message) if message.fds else 0
                    self._control.send("backing", backing=backing)
            except TimeoutError:
                self._overdue()
                return -errno.EIO, -1
            except LinkError as error:
                log.error("VM %d: worker %d breaks the protocol, it is killed: %s", self.number, self.pid, error)
                self.kill()
                return -errno.EIO, -1
        return result, self.open_file(name) if name else -1

    def _overdue(self, patience: float = PATIENCE) -> None:
        log.error("VM %d: worker %d does not answer within %g s; it is killed", self.number, self.pid, patience)
        self.kill()

    def _run(self, closed: Callable[[Broker], None]) -> None:
        try:
            while (message := self._requests.receive()) is not None:
                with message:
                    self._serve(message)
                if settle():
                    log.debug("VM %d: a client thread is still to be detached", self.number)
        except LinkError as error:
            log.error("VM %d: worker %d breaks the protocol, it is killed: %s", self.number, self.pid, error)
        except OSError as error:
            log.debug("VM %d: link ended: %s", self.number, error)
        except Exception:
            log.exception("VM %d: the broker failed; its worker %d is killed", self.number, self.pid)
        finally:
            self._ending = True
            self.close()
            settle()
            closed(self)

    # ---- requests of the worker ---------------------------------------------------------------------

    def _serve(self, message: Message) -> None:
        handlers = {"graft": self._graft, "guest_memory": self._guest_memory, "eventfd": self._eventfd}
        if message.op != "graft":
            message.close()         # nothing else comes with descriptors, and they may be the connection's
        handler = handlers.get(message.op)
        if handler is None:
            raise LinkError(f"unknown request {message.op!r:.40}")
        try:
            handler(message)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError as error:
            self._say_once(message.op, error)
            self._requests.send("failed", **failure(error))

    def _say_once(self, op: str, error: OSError) -> None:
        if isinstance(error, ClientGoneError):
            return
        text = f"VM {self.number} of process {self.process.tgid}: {op}: {error.strerror or error}"
        if text not in self._said and len(self._said) < 100:
            self._said.add(text)
            log.log(logging.WARNING if isinstance(error, TracedError) else logging.INFO, text)

    def _client_thread(self, message: Message) -> int:
        tid = message.integer("tid", 1, MAX_TID)
        if not self.process.owns(tid):
            raise OSError(errno.EPERM, f"thread {tid} is not one of the process that created the VM")
        return tid

    def _answer_from_worker(self, op: str) -> Message:
        try:
            answer = self._requests.receive(PATIENCE)
        except TimeoutError:
            self._overdue()
            answer = None
        if answer is None:
            raise BrokenPipeError(errno.EPIPE, f"the worker ended where {op} was due")
        return answer.expect(op)

    def _graft(self, message: Message) -> None:
        """Open a file of the VM's mount in the client: seized -> (the worker answers the ioctl) -> done."""
        tid = self._client_thread(message)
        name = message.text("name", FILE_NAME)
        store = message.integer("store", 0, MAX_ADDRESS) if "store" in message.body else None
        backing = self._register_backing(message) if message.fds else 0
        thread = Thread.seize(tid, tgid=self.process.tgid, timeout=PATIENCE)
        try:
            self._requests.send("seized", backing=backing)
            thread.arrive()
            try:
                result = self._graft_file(thread, name)
                if store is not None:
                    self.process.memory.write(store, result.to_bytes(4, "little"))
                    result = 0
            except ClientGoneError:
                raise
            except OSError as error:
                log.info("VM %d: %s: %s", self.number, name, error)
                result = -(error.errno or errno.EIO)
            thread.finish(result)
        except BaseException:
            thread.abandon()
            raise
        self._requests.send("done", result=result)

    def _graft_file(self, thread: Thread, name: str) -> int:
        fd = self.open_file(name)
        try:
            return thread.graft(fd)
        finally:
            os.close(fd)

    def _register_backing(self, message: Message) -> int:
        """Make the worker's memfd the backing file of a vCPU; returns the backing id (0: no passthrough).

        Both descriptors are closed when this returns: a connection that somebody holds does not end.
        """
        try:
            return self._checked_backing(message)
        finally:
            message.close()

    def _checked_backing(self, message: Message) -> int:
        if len(message.fds) != 2:
            raise LinkError("graft: kvm_run takes two descriptors")
        if not self._passthrough:
            return 0
        memfd, fuse = message.fds
        info = os.fstat(fuse)
        if not stat.S_ISCHR(info.st_mode) or info.st_rdev != FUSE_DEVICE:
            raise LinkError("graft: the second descriptor is not /dev/fuse")
        if not stat.S_ISREG(os.fstat(memfd).st_mode):
            raise LinkError("graft: the first descriptor is not a memfd")
        try:
            fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        except OSError:
            raise LinkError("graft: the first descriptor is not a memfd") from None
        return backing_open(fuse, memfd)

    def _guest_memory(self, message: Message) -> None:
        """Files for a range of the client: segments at once, or seized -> segments -> finish."""
        tid = self._client_thread(message)
        hva = message.integer("hva", 0, TASK_SIZE)
        size = message.integer("size", PAGE_SIZE, TASK_SIZE - hva)
        if (hva | size) % PAGE_SIZE:
            raise LinkError("guest_memory: not on page boundaries")
        segments = resolve(self.process, hva, size)
        if segments is not None:
            self._send_segments(segments)
            return
        try:
            thread = Thread.seize(tid, tgid=self.process.tgid, timeout=PATIENCE)
        except TracedError:
            # Nobody else can make it map a file.  The worker can read and write its memory all the same.
            log.info("VM %d: process %d is traced, so its guest memory is copied at each KVM_RUN, which is slow",
                     self.number, self.process.tgid)
            self._requests.send("mirror")
            return
        try:
            self._requests.send("seized")
            thread.arrive()
            try:
                segments = take_over(self.process, thread, hva, size)
            except ClientGoneError:
                raise
            except OSError as error:
                thread.finish(-(error.errno or errno.EFAULT))
                raise
            self._send_segments(segments)
            with self._answer_from_worker("finish") as answer:
                thread.finish(answer.integer("result", -4095, MAX_TID))
        except BaseException:
            thread.abandon()
            raise

    def _send_segments(self, segments: Sequence[Segment]) -> None:
        """Holes are left out; segments of one file share a descriptor."""
        files: dict[tuple[int, int, bool], int] = {}
        parts = []
        try:
            for s in segments:
                if s.fd < 0:
                    continue
                index = list(files).index(key) if (key := (s.dev, s.inode, s.writable)) in files else len(files)
                files.setdefault(key, s.fd)
                parts.append({"hva": s.hva, "size": s.size, "fd": index, "offset": s.offset,
                              "writable": int(s.writable)})
            self._requests.send("segments", list(files.values()), segments=parts)
        finally:
            close_segments(list(segments))

    def _eventfd(self, message: Message) -> None:
        """A duplicate of the client's eventfd; EBADF for no descriptor, EINVAL for one that is no eventfd."""
        tid = self._client_thread(message)
        fd = self.process.getfd(message.integer("fd", 0, MAX_TID), tid)
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
                raise OSError(errno.EINVAL, "not an eventfd")
            with open(f"/proc/self/fdinfo/{fd}") as file:
                ids = [line.split()[1] for line in file if line.startswith("eventfd-id:")]
            self._requests.send("eventfd", [fd], id=int(ids[0]))
        finally:
            os.close(fd)
