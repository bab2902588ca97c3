# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_IOEVENTFD: a guest's write signals an eventfd; KVM_IRQFD: an eventfd interrupts the guest (Linux: virt/kvm/eventfd.c).

The worker has descriptors of its own for the client's eventfds.  So an irqfd does not end, as it does in Linux, when the
client closes the last descriptor without having deassigned it: it stays, and cannot be signalled any more, until the VM ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmfs.abi import flags as F
from kvmfs.errors import KvmError
from kvmfs.kvm.irq_comm import RESAMPLE_IRQ_SOURCE, USERSPACE_IRQ_SOURCE

if TYPE_CHECKING:
    from kvmfs.kvm.host import EventFd, RequestLike
    from kvmfs.kvm.iodev import IoBus
    from kvmfs.kvm.irq_comm import Irqchip
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


# ---- KVM_IRQFD -------------------------------------------------------------------------------------------


class Resampler:
    """``struct kvm_kernel_irqfd_resampler``: the level-triggered irqfds of one GSI, which share its line."""

    def __init__(self, chip: Irqchip, gsi: int) -> None:
        self._chip, self._gsi = chip, gsi
        self.irqfds: list[Irqfd] = []
        chip.resamplers[gsi] = self
        chip.add_ack_notifier(gsi, self._acked)

    def notify(self) -> None:
        """``irqfd_resampler_notify``: the clients are to look at their devices' lines again."""
        for irqfd in self.irqfds:
            if irqfd.resamplefd is not None:
                with contextlib.suppress(BlockingIOError):          # as full as it can be
                    os.write(irqfd.resamplefd.fd, _ONE)

    def _acked(self) -> None:
        """The guest has acknowledged the interrupt: the line falls once for all of them, before any can raise it again."""
        self._chip.set_irq(RESAMPLE_IRQ_SOURCE, self._gsi, False)
        self.notify()

    def remove(self, irqfd: Irqfd) -> None:
        """``irqfd_resampler_shutdown``."""
        self.irqfds.remove(irqfd)
        if not self.irqfds:
            del self._chip.resamplers[self._gsi]
            self._chip.remove_ack_notifier(self._gsi, self._acked)
            self._chip.set_irq(RESAMPLE_IRQ_SOURCE, self._gsi, False)


@dataclass(eq=False, slots=True)
class Irqfd:
    """``struct kvm_kernel_irqfd``; with ``resamplefd`` it is level-triggered.  Its methods run with the irqchip's lock held."""

    chip: Irqchip
    gsi: int
    eventfd: EventFd
    resamplefd: EventFd | None
    resampler: Resampler | None = None
    _found_signalled: bool = False

    def start(self) -> None:
        """From now on signals are interrupts; one that came before counts, and the counter then keeps it, as in Linux."""
        self._found_signalled = bool(select.select((self.eventfd.fd,), (), (), 0)[0])
        self.chip.eventpoll.add(self.eventfd.fd, self._signalled)

    def _signalled(self) -> None:
        """``irqfd_wakeup``."""
        if self._found_signalled:
            self._found_signalled = False
        else:
            try:        # the client decides whether its eventfd blocks, and may be reading it itself
                os.preadv(self.eventfd.fd, (bytearray(8),), -1, os.RWF_NOWAIT)
            except BlockingIOError:
                return
        if self.resamplefd is None:
            self.chip.pulse(USERSPACE_IRQ_SOURCE, self.gsi)
        else:
            self.chip.set_irq(RESAMPLE_IRQ_SOURCE, self.gsi, True)

    def shutdown(self) -> None:
        """``irqfd_shutdown``: no interrupt comes any more."""
        self.chip.eventpoll.remove(self.eventfd.fd)
        if self.resampler is not None:
            self.resampler.remove(self)
        self.close()

    def close(self) -> None:
        os.close(self.eventfd.fd)
        if self.resamplefd is not None:
            os.close(self.resamplefd.fd)


def irqfd(vm: Vm, req: RequestLike, fd: int, gsi: int, flags: int, resamplefd: int) -> None:
    """``kvm_irqfd`` (api.rst 4.75).

    EINVAL: unknown flags; no irqchip, or with resampling none whose I/O APIC is here; EBADF, EINVAL: the
    descriptors; EBUSY: the eventfd has an irqfd.  A GSI without a route is none of these: it interrupts nobody.
    """
    if flags & ~(F.KVM_IRQFD_FLAG_DEASSIGN | F.KVM_IRQFD_FLAG_RESAMPLE):
        raise KvmError(errno.EINVAL)
    if flags & F.KVM_IRQFD_FLAG_DEASSIGN:
        _irqfd_deassign(vm, req, fd, gsi)
        return
    chip, resample = vm.arch.irqchip, flags & F.KVM_IRQFD_FLAG_RESAMPLE
    if chip is None or (resample and chip.split):
        raise KvmError(errno.EINVAL)
    eventfd = _take(vm, req, fd)
    try:
        new = Irqfd(chip, gsi, eventfd, _take(vm, req, resamplefd) if resample else None)
    except OSError:
        os.close(eventfd.fd)
        raise
    with chip.lock:
        if eventfd.id in vm.irqfds:
            new.close()
            raise KvmError(errno.EBUSY)
        if resample:
            new.resampler = chip.resamplers.get(gsi) or Resampler(chip, gsi)
            new.resampler.irqfds.append(new)
        vm.irqfds[eventfd.id] = new
        new.start()


def _irqfd_deassign(vm: Vm, req: RequestLike, fd: int, gsi: int) -> None:
    """``kvm_irqfd_deassign``: one that is not there is no error."""
    eventfd, chip = _take(vm, req, fd), vm.arch.irqchip
    os.close(eventfd.fd)
    if chip is not None:
        with chip.lock:
            there = vm.irqfds.get(eventfd.id)
            if there is not None and there.gsi == gsi:
                del vm.irqfds[eventfd.id]
                there.shutdown()


def release(vm: Vm) -> None:
    """The VM ends."""
    for p in vm.ioeventfds:
        p.close()
    vm.ioeventfds.clear()
    for irqfd in vm.irqfds.values():
        with irqfd.chip.lock:
            irqfd.shutdown()
    vm.irqfds.clear()
