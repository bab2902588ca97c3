# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that are served here before an access goes to the client (Linux: struct kvm_io_bus)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu


class IoDevice(Protocol):
    """A device on a bus.  It may decline an access in its range: the next one, or the client, gets it."""

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        """``size`` bytes, or None: not mine."""

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        """False: not mine."""


class IoBus:
    """Port or physical address ranges and their devices.  Changed under the VM's slots lock."""

    def __init__(self) -> None:
        self._ranges: tuple[tuple[int, int, IoDevice], ...] = ()

    def register(self, address: int, size: int, device: IoDevice) -> None:
        self._ranges = tuple(sorted((*self._ranges, (address, address + size, device)), key=lambda r: r[:2]))

    def unregister(self, device: IoDevice) -> None:
        self._ranges = tuple(r for r in self._ranges if r[2] is not device)

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        """The bytes of the first device that has the whole access in its range and takes it."""
        for start, end, device in self._ranges:
            if start <= address and address + size <= end:
                data = device.read(vcpu, address, size)
                if data is not None:
                    return data
        return None

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        end_of_access = address + len(data)
        return any(start <= address and end_of_access <= end and device.write(vcpu, address, data)
                   for start, end, device in self._ranges)
