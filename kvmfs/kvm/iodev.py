# SPDX-License-Identifier: GPL-2.0-or-later
"""Buses of devices that the machine itself answers for (Linux: include/kvm/iodev.h, kvm_io_bus in kvm_main.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

NR_IOBUS_DEVS = 1000


class IoDevice(Protocol):
    """``struct kvm_io_device``."""

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        """Take the guest's write; False: it is not for this device."""


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


class IoBus:
    """``struct kvm_io_bus``.  Changed by one thread at a time (slots_lock), looked at by any."""

    def __init__(self) -> None:
        self.ranges: tuple[IoRange, ...] = ()
        self.ioeventfd_count = 0        # they are limited by the client's descriptors, not by NR_IOBUS_DEVS

    def register(self, addr: int, size: int, device: IoDevice) -> None:
        """``kvm_io_bus_register_dev``.  ENOSPC: too many."""
        if len(self.ranges) - self.ioeventfd_count > NR_IOBUS_DEVS - 1:
            raise KvmError(errno.ENOSPC)
        at = 0
        while at < len(self.ranges) and IoRange(addr, size, device).compare(*self.ranges[at][:2]) <= 0:
            at += 1
        self.ranges = (*self.ranges[:at], IoRange(addr, size, device), *self.ranges[at:])

    def unregister(self, device: IoDevice) -> None:
        """``kvm_io_bus_unregister_dev``."""
        self.ranges = tuple(r for r in self.ranges if r.device is not device)

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        """``kvm_io_bus_write``: has a device taken it?"""
        size = len(data)
        return any(r.compare(addr, size) == 0 and r.device.write(vcpu, addr, data) for r in self.ranges)
