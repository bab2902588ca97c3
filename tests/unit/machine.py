# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM in this process, driven through the ioctl dispatcher: the machine without FUSE and without a client."""

import contextlib
import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from kvmfs import vendor
from kvmfs.abi import ioctls as K
from kvmfs.abi.structs import KvmSregs, KvmVcpuEvents
from kvmfs.api.dispatch import VmDispatcher
from kvmfs.kvm.host import EventFd
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE, Vm
from tests.asm import assemble
from tests.unit.fake_client import FakeMemory

RAM = 1 << 20
CODE = 0x8000


@dataclass
class Piece:
    hva: int
    size: int
    fd: int
    offset: int
    writable: bool = True


class Req:
    """A channel's request; ``result`` is what the client's ioctl returns."""

    def __init__(self, nodeid, cmd, arg=0, data=b"", tid=1):
        self.nodeid, self.cmd, self.arg, self.tid = nodeid, cmd, arg, tid
        self.data = memoryview(bytes(data))
        self.interrupted, self.context = False, None
        self.result, self.out = None, b""

    def reply(self, result, data=b""):
        assert self.result is None, "answered twice"
        self.result, self.out = result, bytes(data)


class FakeHost:
    """The worker, with guest memory in one memfd."""

    def __init__(self, memory, holes=()):
        self.memory = memory
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, RAM)
        self.holes = holes

    mirrors_memory = False
    passthrough = True

    def owns(self, tid):
        return tid < 100

    def may_block(self):
        pass

    creator = 1

    def graft(self, req, name, inode, kvm_run, content=None, store=None):
        self.content = content
        if store is not None:
            self.memory.write(store, inode.to_bytes(4, "little"))
            req.reply(0)
            return 0
        req.reply(inode)
        return inode

    def guest_memory(self, req, hva, size):
        return [Piece(a, 0x1000, self.fd, a - 0x10000000) for a in range(hva, hva + size, 0x1000)
                if a - 0x10000000 not in self.holes] if self.holes else [Piece(hva, size, self.fd, hva - 0x10000000)]

    def eventfd(self, req, fd):
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
            raise OSError(errno.EINVAL, "no eventfd")
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return EventFd(os.dup(fd), next(int(line.split()[1]) for line in file if line.startswith("eventfd-id")))

    def finish(self, req, result):
        req.reply(result)

    client_delay = 0

    def run_delay(self, tid):
        return self.client_delay

    def signals_pending(self, tid, mask):
        return False


_SERVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64,
                          ctypes.POINTER(ctypes.c_int32))
NOT_MINE, ANSWERED, BEGUN = range(3)            # kvmfs/fuse/shortcut.h


def ask_shortcut(vm, req):
    """What the VM's shortcut says to a request, and the result if it answers."""
    if not vm.lanes.address:
        return NOT_MINE, 0
    own, serve = (ctypes.c_uint64 * 2).from_address(vm.lanes.address)
    result = ctypes.c_int32()
    return _SERVE(serve)(own, req.nodeid, req.tid, req.cmd, req.arg, ctypes.byref(result)), result.value


class Machine:
    """A VM of ``vendor`` with 1 MiB at 0 and one vCPU in real mode at CODE."""

    def __init__(self, name="amd", source=None, bits=16, holes=(), **registers):
        self.host = FakeHost(FakeMemory(), holes)
        self.vm = Vm(vendor.load(name), self.host)
        self.dispatch = VmDispatcher(self.vm)
        self.region(0, 0, 0, RAM, 0)
        self.prepare()
        assert self.ioctl(VM_INODE, K.KVM_CREATE_VCPU) == (VCPU_INODE, b"")
        self.vcpu = self.vm.vcpus[0]
        self.run_page = self.vcpu.run
        if source is not None:
            code, self.symbols = assemble(source, CODE, bits)
            os.pwrite(self.host.fd, code, CODE)
            sregs = self.sregs()
            sregs.cs.base, sregs.cs.selector = 0, 0
            self.set_sregs(sregs)
            self.set_regs(rip=CODE, rsp=0x7000, **registers)

    with_shortcut = True
    answered = 0                # KVM_RUNs that Python has not seen

    def prepare(self):
        """What a VM gets before its first vCPU."""

    def close(self):
        self.vm.destroy()
        os.close(self.host.fd)

    def ioctl(self, node, cmd, arg=0, data=b"", tid=1):
        """(result, payload); an error is (-errno, payload)."""
        req = Req(node, cmd, arg, data, tid)
        verdict, result = ask_shortcut(self.vm, req) if self.with_shortcut and cmd == K.KVM_RUN else (NOT_MINE, 0)
        if verdict == ANSWERED:
            self.answered += 1
            return result, b""
        try:
            outcome = self.dispatch.go_on(req) if verdict == BEGUN else self.dispatch.ioctl(req)
        except OSError as e:
            return -e.errno, b""
        if outcome is None:
            return req.result, req.out
        if isinstance(outcome, tuple):
            return outcome
        return (outcome, b"") if isinstance(outcome, int) else (0, bytes(outcome))

    def region(self, slot, flags, gpa, size, offset):
        return self.ioctl(VM_INODE, K.KVM_SET_USER_MEMORY_REGION, 1,
                          struct.pack("<IIQQQ", slot, flags, gpa, size, 0x10000000 + offset))[0]

    def vcpu_ioctl(self, cmd, arg=0, data=b""):
        return self.ioctl(VCPU_INODE, cmd, arg, data)

    def regs(self):
        names = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
        values = struct.unpack("<18Q", self.vcpu_ioctl(K.KVM_GET_REGS)[1])
        return dict(zip(names.split(), values, strict=True))

    def set_regs(self, **changes):
        values = self.regs() | {"rflags": 2} | changes
        assert self.vcpu_ioctl(K.KVM_SET_REGS, 1, struct.pack("<18Q", *values.values())) == (0, b"")

    def sregs(self):
        return KvmSregs.from_buffer_copy(self.vcpu_ioctl(K.KVM_GET_SREGS)[1])

    def set_sregs(self, sregs):
        return self.vcpu_ioctl(K.KVM_SET_SREGS, 1, bytes(sregs))[0]

    def events(self):
        return KvmVcpuEvents.from_buffer_copy(self.vcpu_ioctl(K.KVM_GET_VCPU_EVENTS)[1])

    def set_events(self, events):
        return self.vcpu_ioctl(K.KVM_SET_VCPU_EVENTS, 1, bytes(events))[0]

    def run(self):
        """KVM_RUN: its result; the reason is then in :attr:`reason`."""
        return self.vcpu_ioctl(K.KVM_RUN)[0]

    @property
    def reason(self):
        return struct.unpack_from("<I", self.run_page, 8)[0]

    def io(self):
        """direction, size, port, count, data of the exit."""
        direction, size, port, count, offset = struct.unpack_from("<BBHIQ", self.run_page, 32)
        return direction, size, port, count, bytes(self.run_page[offset:offset + size * count])

    def mmio(self):
        """gpa, data, is_write of the exit."""
        gpa, data, length, is_write = struct.unpack_from("<Q8sIB", self.run_page, 32)
        return gpa, data[:length], is_write

    def read(self, gpa, size):
        return os.pread(self.host.fd, size, gpa)

    def write(self, gpa, data):
        os.pwrite(self.host.fd, data, gpa)


@contextlib.contextmanager
def machines(kind=Machine):
    """A function that makes machines (of another kind: ``cls``), which are closed at the end."""
    made = []

    def make(*args, cls=kind, **kwargs):
        made.append(cls(*args, **kwargs))
        return made[-1]

    try:
        yield make
    finally:
        for m in made:
            m.close()


def error(code):
    return -getattr(errno, code)
