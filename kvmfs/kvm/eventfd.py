# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_IOEVENTFD: a guest's write signals an eventfd instead of leaving to the client (Linux: virt/kvm/eventfd.c)."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmfs.abi import flags as F
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import EventFd, RequestLike
    from kvmfs.kvm.iodev import IoBus
    from kvmfs.kvm.kvm_main import Vcpu, Vm

_ONE = (1).to_bytes(8, "little")
_M64 = (1 << 64) - 1


@dataclass(eq=False, slots=True)
class IoEventFd:
    """``struct _ioeventfd``; ``datamatch`` None: any value (wildcard)."""

    bus: IoBus
    addr: int
    length: int
    eventfd: EventFd
    datamatch: int | None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        """``ioeventfd_write``: signal, when ``ioeventfd_in_range``."""
        if addr != self.addr:
            return False
        if self.length:
            if len(data) != self.length:
                return False
            if self.datamatch is not None and int.from_bytes(data, "little") != self.datamatch:
                return False
        with self._lock, contextlib.suppress(BlockingIOError):      # as full as it can be
            if not self._closed:
                os.write(self.eventfd.fd, _ONE)
        return True

    def close(self) -> None:
        """It is on no bus any more; a vCPU that has just found it there may still come to write()."""
        with self._lock:
            self._closed = True
            os.close(self.eventfd.fd)

    def collides(self, other: IoEventFd) -> bool:
        """``ioeventfd_check_collision``."""
        if self.bus is not other.bus or self.addr != other.addr:
            return False
        if not self.length or not other.length:
            return True
        return self.length == other.length and (
            self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch)


def _bus(vm: Vm, flags: int) -> IoBus:
    if flags & F.KVM_IOEVENTFD_FLAG_PIO:
        return vm.pio_bus
    return vm.ccw_bus if flags & F.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY else vm.mmio_bus


def _take(vm: Vm, req: RequestLike, fd: int) -> EventFd:
    if fd < 0:
        raise KvmError(errno.EBADF)
    return vm.host.eventfd(req, fd)


def ioeventfd(vm: Vm, req: RequestLike, datamatch: int, addr: int, length: int, fd: int, flags: int) -> None:
    """``kvm_ioeventfd`` (api.rst 4.59).

    Assigning, in this order: EINVAL length, range, flags, no length with a datamatch; EBADF, EINVAL descriptor;
    EEXIST; ENOSPC.  Deassigning: EBADF, EINVAL descriptor; ENOENT.
    """
    match = datamatch if flags & F.KVM_IOEVENTFD_FLAG_DATAMATCH else None
    if flags & F.KVM_IOEVENTFD_FLAG_DEASSIGN:
        _deassign(vm, req, match, addr, length, fd, flags)
        return
    if (length not in (0, 1, 2, 4, 8) or addr + length > _M64 or flags & ~F.KVM_IOEVENTFD_VALID_FLAG_MASK
            or (not length and match is not None)):
        raise KvmError(errno.EINVAL)
    new = IoEventFd(_bus(vm, flags), addr, length, _take(vm, req, fd), match)
    try:
        with vm.slots_lock:
            if any(new.collides(p) for p in vm.ioeventfds):
                raise KvmError(errno.EEXIST)
            new.bus.register(addr, length, new)
            new.bus.ioeventfd_count += 1
            vm.ioeventfds.append(new)
    except OSError:
        new.close()
        raise


def _deassign(vm: Vm, req: RequestLike, match: int | None, addr: int, length: int, fd: int, flags: int) -> None:
    eventfd, bus = _take(vm, req, fd), _bus(vm, flags)
    try:
        with vm.slots_lock:
            for p in vm.ioeventfds:
                if (p.bus is bus and p.eventfd.id == eventfd.id and (p.addr, p.length) == (addr, length)
                        and p.datamatch == match):
                    bus.unregister(p)
                    bus.ioeventfd_count -= 1
                    vm.ioeventfds.remove(p)
                    break
            else:
                raise KvmError(errno.ENOENT)
    finally:
        os.close(eventfd.fd)
    p.close()


def release(vm: Vm) -> None:
    """The VM ends."""
    for p in vm.ioeventfds:
        p.close()
    vm.ioeventfds.clear()
