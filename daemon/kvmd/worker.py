# SPDX-License-Identifier: GPL-2.0-or-later
"""The process of one VM: forked by the zygote, serves the VM's files, runs its guest.

It gets everything it will ever need as descriptors, gives up all rights, and ends by itself when the last of
the VM's files is closed, when its client or the daemon is gone, or when its connection is.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from kvmd import link as _link
from kvmd import sandbox
from kvmd.affinity import Follower
from kvmd.host import VM_FILE_MODE, RelayedRequest, WorkerHost
from kvmd.link import Link, LinkError, Message
from kvmd.window import OPS, Window
from kvmfs import vendor as vendors
from kvmfs.api.dispatch import VmDispatcher
from kvmfs.client.process import Process
from kvmfs.fuse.channel import Channel, Shortcut
from kvmfs.fuse.operations import NodeOperations
from kvmfs.kvm.kvm_main import DEVICE_INODE, VCPU_INODE, VM_INODE, Vm

log = logging.getLogger("kvmd.worker")

VM_FILE = "kvm-vm"
MAX_IDLE = 2            # reader threads that stay when nothing is to be read
# What spawn() passes, in this order; the zygote adds "ordinary", its pipe for threads that yield, or -1.
FDS = ("fuse", "requests", "control", "pidfd", "memory", "tasks", "maps")

_ahead: dict[tuple[str, str], VmDispatcher] = {}
NOBODY: Any = None      # the host of a VM that was made ahead


def keep(vendor: str, profile: str, made: VmDispatcher) -> None:
    """In the zygote: a VM that its workers find, each in its own copy of the zygote's memory."""
    _ahead[vendor, profile] = made


def main(message: Message, fds: list[int]) -> None:
    """The worker's life.  ``message`` is the daemon's spawn request."""
    _fuse, requests, control, *_ = fds
    sandbox.set_name(f"kvm-vm:{message.integer('number')}")
    link = Link.from_fd(requests)
    try:
        uid = message.body.get("uid")
        sandbox.enter(uid if isinstance(uid, int) else None, fds)
        worker = make(message, fds, link, Link.from_fd(control))
    except OSError as error:
        link.send("failed", **_link.failure(error))
        return
    worker.run(link)


def make(message: Message, fds: list[int], link: Link, control: Link) -> Worker:
    """The worker that the spawn request asks for.  Raises OSError, LinkError."""
    fuse, _requests, _control, pidfd, memory, tasks, maps, ordinary = fds
    process = Process(message.integer("tid"), message.integer("tgid"), pidfd=pidfd, mem_fd=memory, task_fd=tasks)
    host = WorkerHost(link, process, fuse=fuse, maps=maps, device=message.integer("device"),
                      passthrough=bool(message.integer("passthrough", 0, 1)),
                      uid=message.integer("owner_uid"), gid=message.integer("owner_gid"))
    worker = Worker(message.text("vendor", r"[a-z]+"), message.text("profile", r"[a-z0-9.-]+"), host, fuse, control,
                    message.integer("number"), ordinary)
    worker.window.set_faults(message.texts("faults"))
    return worker


class Worker:
    """Puts the VM, its channel and its file system together."""

    def __init__(self, vendor: str, profile: str, host: WorkerHost, fuse: int, control: Link, number: int,
                 ordinary: int = -1) -> None:
        self._host, self._control = host, control
        made = _ahead.pop((vendor, profile), None)
        if made is None:
            made = VmDispatcher(Vm(vendors.load(vendor), host, profile))
        else:
            made.vm.adopt(host)
        self.dispatcher, self.vm = made, made.vm
        self.window = Window(self.vm, self.dispatcher, number)
        self.channel = Channel(fuse, self.dispatcher.ioctl, interrupt=self.dispatcher.interrupt,
                               passthrough=host.passthrough, max_idle=MAX_IDLE, on_end=lambda: os._exit(0),
                               shortcut=Shortcut(self.vm.lanes.address, self.dispatcher.go_on))
        self.operations = NodeOperations(opened=self._opened, released=self._released, uid=host.uid, gid=host.gid)
        self.operations.add_node(VM_INODE, VM_FILE, mode=VM_FILE_MODE, uid=host.uid, gid=host.gid)
        self.follower = Follower(self.channel, host.process.task_fd, ordinary)
        self.channel.watch = self.follower.watch
        host.connect(self.channel, self.operations, self._copies)
        self._open_files, self._files_lock = 0, threading.Lock()

    def run(self, link: Link) -> None:
        """Serve until the VM ends, and the process with it: nothing of its other threads is left to be done then."""
        self.channel.begin(self.operations)
        link.send("ready")
        self._serve_control()

    def _copies(self, inode: int) -> None:
        """There is no passthrough: this vCPU's kvm_run is copied at each KVM_RUN."""
        self.vm.vcpus[inode - VCPU_INODE].copy_run = True

    # ---- end of life --------------------------------------------------------------------------------

    def _opened(self, inode: int) -> None:
        with self._files_lock:
            self._open_files += 1

    def _released(self, inode: int) -> None:
        if inode == DEVICE_INODE:
            self.vm.vfio.release()
        with self._files_lock:
            self._open_files -= 1
            last = self._open_files == 0
        if last:
            os._exit(0)                 # nobody can ask for anything any more, and what there is goes with the process

    # ---- the daemon's wishes ------------------------------------------------------------------------

    def _serve_control(self) -> None:
        try:
            while (message := self._control.receive()) is not None:
                with message:
                    self._control.send("answer", **self._obey(message))
        except (OSError, LinkError) as error:
            log.debug("control link: %s", error)
        os._exit(0)                     # no daemon, no VM

    def _relayed(self, message: Message) -> dict[str, Any]:
        """An ioctl on behalf of a client that cannot be stopped."""
        req = RelayedRequest(self._control, message)
        try:
            outcome = self.dispatcher.ioctl(req)
            if isinstance(outcome, int):
                req.result = outcome
        except OSError as error:
            return {"result": -(error.errno or 5)}
        except Exception:
            log.exception("ioctl %#x failed; the client gets EIO", req.cmd)
            return {"result": -5}
        return {"result": req.result, "name": req.name}

    def _obey(self, message: Message) -> dict[str, Any]:
        match message.op:
            case "suspend":
                self.vm.suspend()
            case "resume":
                self.vm.resume(message.integer("slept", 0, 1 << 62) if "slept" in message.body else 0)
            case "cpu_offline":
                cpu = message.integer("cpu", 0, 65535)
                self.follower.cpu_offline(cpu)
                self._leave_cpu(cpu)
            case "stop":
                os._exit(0)
            case "ioctl":
                return self._relayed(message)
            case "ping":
                pass
            case op if op in OPS:
                try:
                    return self.window.obey(message)
                except OSError as error:
                    return dict(_link.failure(error))
            case _:
                return {"errno": 38}
        return {}

    @staticmethod
    def _leave_cpu(cpu: int) -> None:
        """No thread stays bound to a host CPU that goes offline."""
        allowed = os.sched_getaffinity(0) - {cpu}
        for name in os.listdir("/proc/self/task"):
            try:
                if os.sched_getaffinity(int(name)) <= {cpu}:
                    os.sched_setaffinity(int(name), allowed)
            except OSError:
                continue                # that thread has just ended
