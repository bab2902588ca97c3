# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CREATE_VM in the daemon: a detached mount, a worker that serves it, a descriptor in the client."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvmd import sandbox
from kvmd.broker import PATIENCE, Broker
from kvmd.deadvms import DeadVms
from kvmd.hangs import HangWatch
from kvmd.link import Message
from kvmd.watchdog import Watchdog
from kvmd.worker import VM_FILE
from kvmd.zygote import Zygote, ZygoteGoneError
from kvmfs.client.process import Process
from kvmfs.client.tracer import ClientGoneError, Thread, TracedError, settle
from kvmfs.errors import KvmError
from kvmfs.fuse.mount import detached_mount, open_dev_fuse
from kvmfs.kvm.profile import DEFAULT

if TYPE_CHECKING:
    from kvmfs.fuse.channel import Request

log = logging.getLogger("kvmd.vms")

AT_EMPTY_PATH, AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_INODE, _STATX_INODE_AT = struct.Struct("<Q"), 32
_STATX_SIZED, _STATX_SIZED_AT = struct.Struct("<Q"), 40
_STATX_DEVICE, _STATX_DEVICE_AT = struct.Struct("<II"), 136
_STATX_SIZE = 256
_libc = ctypes.CDLL(None, use_errno=True)


def _statx(fd: int) -> ctypes.Array[ctypes.c_char]:
    """What the kernel knows.  Nothing is asked of a server, which may not run yet, or be this process."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, buffer) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "statx")
    return buffer


def size_of(fd: int) -> int:
    """Size in bytes of a descriptor's file, as the kernel knows it: a vCPU's file ends with its dirty ring."""
    size: int = _STATX_SIZED.unpack_from(_statx(fd), _STATX_SIZED_AT)[0]
    return size


def identity_of(fd: int) -> tuple[int, int]:
    """Device and inode of a descriptor, as the kernel knows them."""
    buffer = _statx(fd)
    inode, = _STATX_INODE.unpack_from(buffer, _STATX_INODE_AT)
    return os.makedev(*_STATX_DEVICE.unpack_from(buffer, _STATX_DEVICE_AT)), inode


@runtime_checkable
class Receiver(Protocol):
    """A request that takes a descriptor by itself: the client need not be stopped for it."""

    def give(self, file: int) -> None: ...


class Vms:
    """All VMs of this daemon."""

    def __init__(self, zygote: Zygote, vendor: str, passthrough: bool, faults: Sequence[str] = (),
                 profile: str = DEFAULT) -> None:
        self._zygote, self._vendor, self._profile, self.passthrough = zygote, vendor, profile, passthrough
        self.faults = list(faults)      # rules that new VMs get
        self._watchdog = Watchdog()
        self._hangs = HangWatch(self.brokers)
        self._dead = DeadVms()
        self._lock = threading.Lock()
        self._brokers: dict[int, Broker] = {}
        self.closing = False
        self._warned: set[int] = set()
        self.may_block: Callable[[], None] = lambda: None
        self.created_hooks: list[Callable[[Broker], None]] = []     # told of each VM before its client has it
        self.created = 0

    # ---- KVM_CREATE_VM ------------------------------------------------------------------------------

    def create(self, req: Request, vm_type: int) -> None:
        """Answer ``req`` with a descriptor of a new VM.

        Raises KvmError while nothing was answered: EPERM for a client that is traced by another program, ENOMEM
        when no worker could be made, ENODEV while the daemon ends.
        """
        self.may_block()
        if settle():
            log.debug("a client thread is still to be detached")
        try:
            process = Process.from_tid(req.tid)
        except OSError as error:
            log.warning("KVM_CREATE_VM of thread %d refused: %s", req.tid, error)
            raise KvmError(errno.EPERM) from error
        broker = self._reserve(process)
        try:
            self._start_worker(broker)
            file = broker.open_file(VM_FILE)
        except (OSError, ZygoteGoneError) as error:
            log.error("VM %d of process %d: no worker: %s", broker.number, process.tgid, error)
            broker.close()
            self._closed(broker)
            raise KvmError(error.errno if error.errno in (errno.ENFILE, errno.EMFILE) else errno.ENOMEM) from error
        for hook in self.created_hooks:
            hook(broker)
        # From here on the VM ends by itself when nobody holds its file.
        tgid = process.tgid
        broker.start(self._closed)
        self._hangs.wake()
        try:
            if isinstance(req, Receiver):
                req.give(file)
            else:
                self._hand_over(req, tgid, file, broker)
        finally:
            os.close(file)

    def _hand_over(self, req: Request, tgid: int, file: int, broker: Broker) -> None:
        try:
            thread = Thread.seize(req.tid, tgid=tgid, timeout=PATIENCE)
        except TracedError as error:
            if tgid not in self._warned:
                self._warned.add(tgid)
                log.warning("KVM_CREATE_VM of process %d refused: %s", tgid, error.strerror or error)
            raise KvmError(errno.EPERM) from error
        try:
            req.reply(0)
            thread.arrive()
            try:
                result = thread.graft(file)
            except ClientGoneError:
                raise
            except OSError as error:
                log.info("VM %d: no descriptor for process %d: %s", broker.number, tgid, error)
                result = -(error.errno or errno.EIO)
            req.context = result        # for who traces
            thread.finish(result)
        except OSError as error:
            thread.abandon()
            log.info("VM %d: process %d did not get its descriptor: %s", broker.number, tgid, error)
            return
        log.info("VM %d: process %d, worker %d", broker.number, tgid, broker.pid)

    def _reserve(self, process: Process) -> Broker:
        with self._lock:
            if self.closing:
                raise KvmError(errno.ENODEV)
            number = next(n for n in range(len(self._brokers) + 1) if n not in self._brokers)
            broker = self._brokers[number] = Broker(number, process, self._watchdog, self.passthrough)
        return broker

    def _start_worker(self, broker: Broker) -> None:
        """Mount, fork, wait until the worker serves."""
        process = broker.process
        requests, control = broker.worker_ends
        fuse = maps = -1
        try:
            fuse = open_dev_fuse()
            broker.mount = detached_mount(fuse, "kvmfs-vm")
            broker.device, _ = identity_of(broker.mount)
            maps = os.open(process.proc("maps"), os.O_RDONLY | os.O_CLOEXEC)
            pid, pidfd = self._zygote.spawn(
                broker.number, [fuse, requests.fileno(), control.fileno(), process.pidfd, process.mem_fd,
                                process.task_fd, maps],
                uid=sandbox.worker_uid(broker.number), tid=process.tid, tgid=process.tgid,
                device=broker.device, passthrough=int(self.passthrough), vendor=self._vendor,
                profile=self._profile, faults=self.faults,
                owner_uid=os.geteuid(), owner_gid=os.getegid())
            broker.attach_worker(pid, pidfd, self._dead.add(pidfd, fuse))
            fuse = -1
        finally:
            for fd in (fuse, maps):
                if fd >= 0:
                    os.close(fd)
            requests.close()
            control.close()
        broker.wait_until_ready()
        self.created += 1

    def _closed(self, broker: Broker) -> None:
        with self._lock:
            self._brokers.pop(broker.number, None)

    # ---- all of them --------------------------------------------------------------------------------

    def brokers(self) -> list[Broker]:
        """Those that live, in the order of their numbers."""
        with self._lock:
            return [self._brokers[number] for number in sorted(self._brokers)]

    def by_device(self, device: int) -> Broker | None:
        """The VM whose mount has this device number."""
        return next((broker for broker in self.brokers() if broker.device == device), None)

    def tell(self, op: str, **fields: Any) -> None:
        """Send an order to all workers and wait until they have followed it."""
        for broker in self.brokers():
            answer: Message | None = broker.control(op, **fields)
            if answer is not None:
                answer.close()

    def stop(self) -> None:
        """End all VMs in order; no new one is made.  Clients get errors from then on."""
        with self._lock:
            self.closing = True
        brokers = self.brokers()
        self.tell("stop")
        for broker in brokers:
            if not broker.join(2):
                broker.kill()
                broker.join(PATIENCE)
