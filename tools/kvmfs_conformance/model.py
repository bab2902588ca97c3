# SPDX-License-Identifier: GPL-2.0-or-later
"""What a case is: a function about one ioctl on one kind of descriptor, which makes checks and tells each one's outcome."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, Level
from kvmfs.abi.structs import KvmRun, KvmUserspaceMemoryRegion

from . import wire
from .wire import Argument, BeforeHole, Memory, Result, errno_name

LEVELS = {"system": Level.SYSTEM, "vm": Level.VM, "vcpu": Level.VCPU, "device": Level.DEVICE}
LEVEL_NAMES = {level: name for name, level in LEVELS.items()}


class Status(Enum):
    """How a case ended."""

    PASS = "pass"
    FAIL = "fail"
    KNOWN = "known"         # failed, and the list of differences has the reason
    ABSENT = "absent"       # the node says that it lacks the capability; cases of absence look at what follows
    SKIP = "skip"           # not run here


@dataclass(frozen=True, slots=True)
class Check:
    """One outcome; ``expected`` is empty where everything is allowed and it is only recorded."""

    label: str
    outcome: str
    expected: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Case:
    """``ioctl`` on ``level``; ``caps`` are the capabilities that must be there; ``guest``: guest code runs."""

    ioctl: str
    level: Level
    title: str
    run: Callable[[Trial], None]
    caps: tuple[str, ...] = ()
    guest: bool = False
    absence: bool = False

    @property
    def id(self) -> str:
        return f"{LEVEL_NAMES[self.level]}/{self.ioctl}/{self.title.replace(' ', '-')}"


@dataclass
class Outcome:
    """A case that ended: its checks, and why not all of them were made."""

    case: Case
    status: Status
    checks: list[Check] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]


class Skip(Exception):
    """The case cannot say anything here; the text tells why."""


class Stop(Exception):
    """The case cannot go on after what failed."""


CASES: list[Case] = []


def case(ioctl: str, level: Level, title: str, *caps: str, guest: bool = False) -> Callable[
        [Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a case; ``caps`` without their KVM_CAP_."""
    assert level in BY_NAME[ioctl].levels, ioctl

    def register(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CASES.append(Case(ioctl, level, title, run, tuple(f"KVM_CAP_{cap}" for cap in caps), guest))
        return run

    return register


# ---- the node -----------------------------------------------------------------------------------------------


class Node:
    """A node that can be opened, and what it says of itself."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.mmap_size = max(wire.ioctl(self.fd, BY_NAME["KVM_GET_VCPU_MMAP_SIZE"].number).value, mmap.PAGESIZE)
        self.caps = {number: wire.ioctl(self.fd, BY_NAME["KVM_CHECK_EXTENSION"].number, number).value
                     for number in range(max(CAPS.values()) + 17)}
        self.kind = _kind(os.fstat(self.fd))

    def capability(self, name: str) -> int:
        """CHECK_EXTENSION's answer for KVM_CAP_x."""
        return self.caps[CAPS[name]]

    def close(self) -> None:
        os.close(self.fd)


def _kind(status: os.stat_result) -> str:
    """``kvmfs``, or the kernel module that answers (kvm_intel, kvm_amd, …), ``kvm`` where it is not told."""
    if not status.st_rdev:
        return "kvmfs"
    names = sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm_"))
    return names[0] if names else "kvm"


# ---- a case that runs ---------------------------------------------------------------------------------------


class Trial:
    """A case's hands: a VM and vCPUs of its own, ioctl, and checks.  All is closed when it ends."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.checks: list[Check] = []
        self._fds: list[int] = []
        self._memories: list[Memory | BeforeHole | mmap.mmap] = []
        self._vm: int | None = None
        self._vcpu: int | None = None

    # -- objects

    @property
    def system(self) -> int:
        return self.node.fd

    @property
    def vm(self) -> int:
        """This case's VM, made when first asked for."""
        if self._vm is None:
            self._vm = self.new_vm()
        return self._vm

    @property
    def vcpu(self) -> int:
        """Its vCPU 0."""
        if self._vcpu is None:
            self._vcpu = self.new_vcpu(self.vm)
        return self._vcpu

    def new_vm(self) -> int:
        return self.keep(self._make(self.system, "KVM_CREATE_VM", 0))

    def new_vcpu(self, vm: int, index: int = 0) -> int:
        return self.keep(self._make(vm, "KVM_CREATE_VCPU", index))

    def _make(self, fd: int, name: str, arg: int) -> int:
        result = self.ioctl(fd, name, arg)
        if not result.ok:
            self.failed(f"{name} for this case", str(result), "a descriptor")
            raise Stop
        return result.value

    def keep(self, fd: int) -> int:
        """Close ``fd`` at the end."""
        self._fds.append(fd)
        return fd

    def memory(self, size: int) -> Memory:
        memory = Memory(size)
        self._memories.append(memory)
        return memory

    def before_hole(self, head: bytes) -> int:
        """The address of ``head`` at the very end of what is mapped."""
        hole = BeforeHole()
        self._memories.append(hole)
        return hole.put(head)

    def slot(self, vm: int, slot: int, gpa: int, memory: Memory, flags: int = 0) -> Result:
        """KVM_SET_USER_MEMORY_REGION."""
        region = KvmUserspaceMemoryRegion(slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=memory.size,
                                          userspace_addr=memory.address)
        return self.ioctl(vm, "KVM_SET_USER_MEMORY_REGION", region)

    def kvm_run(self, vcpu: int) -> KvmRun:
        """The vCPU's shared area."""
        area = mmap.mmap(vcpu, self.node.mmap_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memories.append(area)
        return KvmRun.from_buffer(area)

    def close(self) -> None:
        for fd in reversed(self._fds):
            wire.close(fd)
        for memory in self._memories:
            try:
                memory.close()
            except BufferError:
                pass            # a case's struct still points in; it goes with that

    # -- acting

    def ioctl(self, fd: int, name: str | int, arg: Argument = 0) -> Result:
        """One ioctl by its name or its number."""
        return wire.ioctl(fd, BY_NAME[name].number if isinstance(name, str) else name, arg)

    def has(self, cap: str) -> int:
        """The value of KVM_CAP_x on the node."""
        return self.node.capability(f"KVM_CAP_{cap}")

    # -- checking

    def note(self, label: str, outcome: object) -> None:
        """Record what may be anything, to be compared between nodes."""
        self.checks.append(Check(label, _text(outcome), "", True))

    def failed(self, label: str, outcome: str, expected: str) -> None:
        self.checks.append(Check(label, outcome, expected, False))

    def errno(self, label: str, result: Result, *allowed: int) -> None:
        """The call failed with one of these."""
        ok = not result.ok and result.errno in allowed
        self.checks.append(Check(label, str(result), " or ".join(map(errno_name, allowed)), ok))

    def ok(self, label: str, result: Result, value: int | None = 0) -> None:
        """The call succeeded and returned ``value`` (None: anything)."""
        outcome = "success" if result.ok and value is None else str(result)
        ok = result.ok and value in (None, result.value)
        self.checks.append(Check(label, outcome, "success" if value is None else str(value), ok))

    def need(self, label: str, result: Result, value: int | None = 0) -> None:
        """As ok(); without it the case ends."""
        self.ok(label, result, value)
        if not self.checks[-1].ok:
            raise Stop

    def fd(self, label: str, result: Result) -> int:
        """The call made a descriptor; it is closed at the end."""
        self.need(label, result, None)
        return self.keep(result.value)

    def equal(self, label: str, outcome: object, *expected: object) -> None:
        """It is one of these."""
        self.checks.append(Check(label, _text(outcome), " or ".join(map(_text, expected)), outcome in expected))

    def true(self, label: str, condition: object, outcome: object = None) -> None:
        """It holds; ``outcome`` is what is shown when it does not."""
        shown = "yes" if condition else "no" if outcome is None else _text(outcome)
        self.checks.append(Check(label, shown, "yes", bool(condition)))


def _text(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return value.hex() if len(value) <= 32 else f"{value[:32].hex()}… ({len(value)} bytes)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if -4096 <= value < 65536 else hex(value)
    return str(value)


def buffer(size: int, data: bytes = b"") -> ctypes.Array[ctypes.c_char]:
    """``size`` bytes that begin with ``data``; the rest is 0."""
    return (ctypes.c_char * size).from_buffer_copy(data.ljust(size, b"\0"))
