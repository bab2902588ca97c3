# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that issues random ioctls at every level: ``calls.py NODE SEED ROUNDS``.

It ends with 0 when each came back and the VM still answers at the end.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import sys
import time
from random import Random
from typing import Final

from kvmfs.abi.ioctls import BY_NAME, TABLE, Ioctl, Level, Payload
from kvmfs.abi.structs import KvmRegs, KvmUserspaceMemoryRegion
from kvmfs_fuzz.code import number, program

PAGE: Final = mmap.PAGESIZE
AREA: Final = 64 * PAGE             # arguments, and what pointers in them point to
RAM: Final = 32 * PAGE
SLICE: Final = 0.002
PATIENCE: Final = 10
DEAD: Final = (errno.ENOTCONN, errno.ECONNABORTED)
BAD_POINTERS: Final = (0, 0x10, 0xFFFF800000000000, (1 << 64) - 8)
VCPUS = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class Client:
    """The node, a VM, its vCPUs and whatever other descriptors come up."""

    def __init__(self, node: str, rng: Random) -> None:
        self.rng = rng
        self.area, self.ram = mmap.mmap(-1, AREA), mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        kvm = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        self.fds: dict[Level, list[int]] = {Level.SYSTEM: [kvm], Level.VM: [self.must(kvm, "KVM_CREATE_VM")], Level.VCPU: [],
                                            Level.DEVICE: []}
        vm = self.fds[Level.VM][0]
        region = KvmUserspaceMemoryRegion(slot=0, memory_size=RAM, userspace_addr=self.hva)
        self.must(vm, "KVM_SET_USER_MEMORY_REGION", ctypes.addressof(region))
        if rng.random() < 0.5:
            self.must(vm, "KVM_CREATE_IRQCHIP")
        for index in range(rng.randint(1, VCPUS)):
            self.fds[Level.VCPU].append(self.must(vm, "KVM_CREATE_VCPU", index))
        self.ram[:] = program(rng, RAM)
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]

    def call(self, fd: int, number_: int, argument: int) -> int:
        """The result, or -errno."""
        result = _libc.ioctl(fd, number_, argument & (1 << 64) - 1)
        return int(result) if result >= 0 else -ctypes.get_errno()

    def must(self, fd: int, name: str, argument: int = 0) -> int:
        """A call that cannot fail."""
        result = self.call(fd, BY_NAME[name].number, argument)
        if result < 0:
            raise OSError(-result, name)
        return result

    # ---- arguments ----------------------------------------------------------------------------------

    def word(self) -> int:
        """A number of 32 bits that means something to somebody."""
        rng = self.rng
        return rng.choice([number(rng, 32), rng.randrange(8), rng.randrange(256), *self.events, *self.fds[Level.VM],
                           *self.fds[Level.VCPU], *self.fds[Level.DEVICE]])

    def quad(self) -> int:
        """A number of 64 bits, or a pointer."""
        rng = self.rng
        return rng.choice([number(rng), self.word(), self.at + rng.randrange(0, AREA, 8), self.hva + rng.randrange(0, RAM, PAGE),
                           rng.choice(BAD_POINTERS), rng.randrange(64) * PAGE])

    def fill(self, size: int) -> None:
        """Change the argument: what the last call left there, all new, or something between."""
        rng = self.rng
        if rng.random() < 0.3:
            self.area[:size] = bytes(size)
        for _ in range(rng.choice((0, 1, 2, 4, size // 4))):
            at = rng.randrange(0, max(size - 7, 1), 4)
            wide = at % 8 == 0 and rng.random() < 0.5
            self.area[at:at + (8 if wide else 4)] = self.quad().to_bytes(8, "little") if wide else self.word().to_bytes(4, "little")

    def argument(self, one: Ioctl) -> int:
        """For that ioctl; what it points to is filled."""
        rng = self.rng
        if one.payload in (Payload.NONE, Payload.VALUE) or rng.random() < 0.03:
            return rng.choice((0, 0, self.word(), self.quad()))
        if rng.random() < 0.03:
            return rng.choice(BAD_POINTERS)
        size = ctypes.sizeof(one.struct) if one.struct else 8
        if one.payload is Payload.FIXED:
            self.fill(size)
        else:
            self.fill(size + rng.choice((0, 64, 1024)))
            if rng.random() < 0.8:
                self.area[:4] = rng.randrange(20).to_bytes(4, "little")
        return self.at

    # ---- one call -----------------------------------------------------------------------------------

    def step(self) -> str:
        """A random one; its name."""
        rng = self.rng
        one = rng.choice(TABLE) if rng.random() < 0.8 else BY_NAME["KVM_RUN"]
        levels = [level for level in Level if level in one.levels]
        level = rng.choice(levels) if rng.random() < 0.97 else rng.choice(list(Level))
        fds = self.fds[level] or self.fds[Level.VM]
        if one.name == "KVM_CREATE_VM" or (one.name == "KVM_GET_STATS_FD" and len(self.fds[Level.DEVICE]) > 20):
            return one.name
        argument = 0 if one.name == "KVM_RUN" and rng.random() < 0.95 else self.argument(one)
        fd, name, since = rng.choice(fds), one.name, time.monotonic()
        if name == "KVM_RUN":
            signal.setitimer(signal.ITIMER_REAL, SLICE, SLICE)
        try:
            result = self.call(fd, one.number, argument)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - since > PATIENCE:
            raise AssertionError(f"{name} took {time.monotonic() - since:.0f} s")
        if -result in DEAD:
            raise OSError(-result, name)
        if name == "KVM_SET_SIGNAL_MASK" and result == 0:      # it may have blocked the signal that is to end KVM_RUN
            self.area[:12] = (8).to_bytes(4, "little") + bytes(8)
            self.must(fd, name, self.at)
        self.keep(name, result)
        return name

    def keep(self, name: str, result: int) -> None:
        """New descriptors, as long as there are not many."""
        if name == "KVM_CREATE_DEVICE" and result == 0:
            self.fds[Level.DEVICE].append(int.from_bytes(self.area[4:8], "little"))
        if name in ("KVM_CREATE_VCPU", "KVM_GET_STATS_FD") and result > 2:
            self.fds[Level.VCPU if name == "KVM_CREATE_VCPU" else Level.DEVICE].append(result)


def main(node: str, seed: str, rounds: str) -> None:
    """One VM, one call after the other."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    client = Client(node, Random(seed))
    name = ""
    try:
        for _ in range(int(rounds)):
            name = client.step()
        client.must(client.fds[Level.VCPU][0], "KVM_GET_REGS", ctypes.addressof(KvmRegs()))
    except BaseException:
        print(f"after {name}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
