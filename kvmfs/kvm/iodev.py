# SPDX-License-Identifier: GPL-2.0-or-later
"""Buses of devices that the machine itself answers for (Linux: include/kvm/iodev.h, kvm_io_bus in kvm_main.c)."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

NR_IOBUS_DEVS = 1000


class IoDevice(Protocol):
    """``struct kvm_io_device``."""

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        """Take the guest's write; False: it is not for this device."""


class ReadableDevice(IoDevice, Protocol):
    """A device with registers, not only a doorbell."""

    def read(self, vcpu: Vcpu, addr: int, size: int) -> bytes | None:
        """``size`` bytes for the guest; None: it is not for this device."""


class IoRange(NamedTuple):
    """``struct kvm_io_range``; of size 0: every access that starts at ``addr``."""

    addr: int
    size: int
    device: IoDevice

    def compare(self, addr: int, size: int) -> int:
        """``kvm_io_bus_cmp`` of an access with this range: -1 before it, 0 in it, 1 after it."""
        if addr < self.addr:
            return -1
        if self.size:
            return 1 if addr + size > self.addr + self.size else 0
        return 1 if addr > self.addr else 0


def _edges(ranges: Iterable[IoRange]) -> list[int]:
    """Where what the ranges cover together begins, ends, begins, ..."""
    edges: list[int] = []
    for start, end in sorted((r.addr, r.addr + max(r.size, 1)) for r in ranges):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], end)
        else:
            edges += (start, end)
    return edges


class IoBus:
    """``struct kvm_io_bus``.  Changed by one thread at a time (slots_lock), looked at by any.

    Most accesses are for the client: whether any range covers their address is known without a look at each.
    """

    def __init__(self) -> None:
        self.ranges: tuple[IoRange, ...] = ()
        self.readable: tuple[tuple[IoRange, ReadableDevice], ...] = ()
        self._write_edges: list[int] = []
        self._read_edges: list[int] = []
        self.ioeventfd_count = 0        # they are limited by the client's descriptors, not by NR_IOBUS_DEVS

    def register(self, addr: int, size: int, device: IoDevice) -> None:
        """``kvm_io_bus_register_dev``.  ENOSPC: too many."""
        if len(self.ranges) - self.ioeventfd_count > NR_IOBUS_DEVS - 1:
            raise KvmError(errno.ENOSPC)
        at = 0
        while at < len(self.ranges) and IoRange(addr, size, device).compare(*self.ranges[at][:2]) <= 0:
            at += 1
        self.ranges = (*self.ranges[:at], IoRange(addr, size, device), *self.ranges[at:])
        self._write_edges = _edges(self.ranges)

    def register_readable(self, addr: int, size: int, device: ReadableDevice) -> None:
        """The same for a device with registers."""
        self.register(addr, size, device)
        self.readable = (*self.readable, (IoRange(addr, size, device), device))
        self._read_edges = _edges(r for r, _ in self.readable)

    def unregister(self, device: IoDevice) -> None:
        """``kvm_io_bus_unregister_dev``."""
        self.ranges = tuple(r for r in self.ranges if r.device is not device)
        self.readable = tuple(r for r in self.readable if r[1] is not device)
        self._write_edges = _edges(self.ranges)
        self._read_edges = _edges(r for r, _ in self.readable)

    def may_read(self, addr: int) -> bool:
        """False: no device has registers there."""
        return bool(bisect_right(self._read_edges, addr) & 1)

    def may_write(self, addr: int) -> bool:
        """False: no device is there."""
        return bool(bisect_right(self._write_edges, addr) & 1)

    def read(self, vcpu: Vcpu, addr: int, size: int) -> bytes | None:
        """``kvm_io_bus_read``: what a device answers; None: none has taken it."""
        if not self.may_read(addr):
            return None
        for where, device in self.readable:
            if where.compare(addr, size) == 0:
                data = device.read(vcpu, addr, size)
                if data is not None:
                    return data
        return None

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        """``kvm_io_bus_write``: has a device taken it?"""
        size = len(data)
        return self.may_write(addr) and any(r.compare(addr, size) == 0 and r.device.write(vcpu, addr, data) for r in self.ranges)


def read_ports(vcpu: Vcpu, port: int, size: int, count: int) -> bytes | None:
    """``kernel_pio``: IN or INS from a device that is here; None: it is the client's."""
    bus = vcpu.vm.pio_bus
    data = bus.read(vcpu, port, size)
    if data is None or count == 1:
        return data
    for _ in range(count - 1):
        more = bus.read(vcpu, port, size)
        if more is None:
            break
        data += more
    return data.ljust(size * count, b"\0")


def read_mmio(vcpu: Vcpu, gpa: int, size: int) -> bytes | None:
    """``vcpu_mmio_read``: the local APIC, then the bus; None: it is the client's."""
    apic = vcpu.arch.apic
    data = apic.read(vcpu, gpa, size) if apic is not None else None
    return vcpu.vm.mmio_bus.read(vcpu, gpa, size) if data is None else data
