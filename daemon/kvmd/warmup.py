# SPDX-License-Identifier: GPL-2.0-or-later
"""What the zygote does once before it forks the first worker, so that no worker has to.

A worker shares the zygote's memory until it writes, and each page that it is the first to write costs it 2 µs.  Python
writes a good deal into code that it runs for the first eight times, and where it looks something up for the first
time.  So the zygote plays the life of some VMs that nobody has, from the spawn request to the closing of a file, with a socket
in the place of the kernel and of the daemon.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import socket
import struct
import threading
from typing import Final

import trio

from kvmd import affinity, sandbox, worker
from kvmd.link import Link
from kvmfs import vendor as vendors
from kvmfs.api.dispatch import VmDispatcher
from kvmfs.fuse import protocol
from kvmfs.kvm import fastpath, hyperv_cpuid, tsc
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE, Vm

log = logging.getLogger("kvmd.warmup")

ROUNDS: Final = 12              # more than the eight calls after which Python specialises code
PATIENCE: Final = 30.0          # seconds
_KVM_CREATE_VCPU: Final = 0xAE41
_ROOT: Final = 1
_INIT: Final = struct.pack("<IIIII", 7, 45, 131072, 0x73FFFFFB, protocol.FUSE2_PASSTHROUGH).ljust(64, b"\0")
_GETATTR: Final = bytes(16)
_OPEN: Final = struct.pack("<II", os.O_RDWR, 0)


def preload(vendor: str, profile: str) -> None:
    """Make Python import what a worker would import at its first use, and do what is the same in each of them.

    ``vendor`` and ``profile`` are the daemon's options; wrong ones are the daemon's to complain about.
    """
    trio.run(trio.lowlevel.checkpoint)
    for name in ("ascii", "idna", "latin-1"):
        codecs.lookup(name)
    fastpath.load()
    affinity.load()
    sandbox.prepare()
    tsc.tsc_khz()                   # takes a tenth of a second, and privileges
    tsc.host_clock_is_tsc()
    hyperv_cpuid.smt_possible()
    with contextlib.suppress(ValueError):
        name = vendors.load(vendor).name
        for _ in range(ROUNDS):
            play(name, profile)
        vm = Vm(vendors.load(name), worker.NOBODY, profile)
        vm.engine.make_ahead()
        worker.keep(name, profile, VmDispatcher(vm))
    log.debug("the zygote is warm")


class _Kernel:
    """The other end of a worker's connection."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours = ours
        self._unique = 0
        ours.settimeout(PATIENCE)

    def ask(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        """Send a request; returns the answer."""
        self._unique += 2
        size = protocol.IN_HEADER.size + len(body)
        self._ours.send(protocol.IN_HEADER.pack(size, opcode, self._unique, nodeid, 0, 0, os.getpid(), 0, 0) + body)
        return self._ours.recv(protocol.BUFFER_SIZE)

    def open(self, name: str, inode: int) -> None:
        """What open(2) asks."""
        self.ask(protocol.FUSE_LOOKUP, _ROOT, name.encode() + b"\0")
        self.ask(protocol.FUSE_OPEN, inode, _OPEN)

    def ioctl(self, inode: int, cmd: int) -> int:
        """Returns the result, or -errno."""
        answer = self.ask(protocol.FUSE_IOCTL, inode, struct.pack("<QIIQII", 1, 0, cmd, 0, 0, 0))
        result: int = protocol.IOCTL_REPLY.unpack_from(answer)[3]
        return result


def play(vendor: str, profile: str) -> int:
    """The life of one VM; returns the result of its KVM_CREATE_VCPU.  The process must have one thread."""
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        broker, link = (stack.enter_context(contextlib.closing(end)) for end in Link.pair())
        tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, tasks)
        fds = [tasks if name == "tasks" else theirs.fileno() for name in (*worker.FDS, "ordinary")]
        broker.send("spawn", number=0, uid=None, tid=os.getpid(), tgid=os.getpid(), device=0, passthrough=1, vendor=vendor,
                    profile=profile, faults=[], owner_uid=0, owner_gid=0)
        request = link.receive(PATIENCE)
        assert request is not None
        # A duplicate each of what the worker makes sockets of, as it keeps them.
        vm = worker.make(request, fds, link, Link.from_fd(os.dup(link.fileno())))
        vm.channel.on_end = None        # the worker's is the end of the process
        vm.channel.begin(vm.operations)
        kernel = _Kernel(ours)
        kernel.ask(protocol.FUSE_INIT, 0, _INIT)
        kernel.ask(protocol.FUSE_GETATTR, _ROOT, _GETATTR)
        kernel.open(worker.VM_FILE, VM_INODE)
        kernel.ask(protocol.FUSE_FLUSH, VM_INODE, bytes(24))
        broker.send("seized", backing=0)
        broker.send("done", result=0)
        result = kernel.ioctl(VM_INODE, _KVM_CREATE_VCPU)
        kernel.open("kvm-vcpu:0", VCPU_INODE)
        kernel.ask(protocol.FUSE_RELEASE, VCPU_INODE, struct.pack("<QIIQ", 2, os.O_RDWR, 0, 0))
        ours.shutdown(socket.SHUT_RDWR)
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(PATIENCE)
        vm.vm.destroy()
    return result
