# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on a VM for its interrupt controllers and the PIT (Linux: kvm_arch_vm_ioctl)."""

from __future__ import annotations

import errno
import struct
from ctypes import sizeof
from typing import TYPE_CHECKING

from kvmfs.abi.flags import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
    KVM_PIT_SPEAKER_DUMMY,
)
from kvmfs.abi.structs import (
    KvmIoapicState,
    KvmIrqchip,
    KvmIrqRouting,
    KvmIrqRoutingEntry,
    KvmMsi,
    KvmPicState,
    KvmPitConfig,
    KvmPitState,
    KvmPitState2,
    KvmReinjectControl,
)
from kvmfs.abi.x86 import KVM_MAX_IRQ_ROUTES
from kvmfs.errors import KvmError
from kvmfs.kvm import hyperv, irq
from kvmfs.kvm.irq_comm import USERSPACE_IRQ_SOURCE, Irqchip, Route

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.i8254 import Pit
    from kvmfs.kvm.kvm_main import Vm

_LEVEL = struct.Struct("<II")                   # struct kvm_irq_level: irq, level
_STATUS = struct.Struct("<iI")
_ROUTE = struct.Struct("<IIIIIII20x")           # gsi, type, flags, pad, the union's first three words
_HYPERV_EVENTFD = struct.Struct("<IiI12x")      # conn_id, fd, flags
_CHIP_OFFSET = 8                                # of struct kvm_irqchip's union
MSI_ROUTE = 2


def _chip(vm: Vm, error: int = errno.ENXIO) -> Irqchip:
    chip = vm.arch.irqchip
    if chip is None:
        raise KvmError(error)
    return chip


def _pit(vm: Vm) -> Pit:
    chip = vm.arch.irqchip
    if chip is None or chip.pit is None:
        raise KvmError(errno.ENXIO)
    return chip.pit


def create_irqchip(vm: Vm, req: RequestLike) -> int:
    """KVM_CREATE_IRQCHIP (api.rst 4.24).  EEXIST: there is one; EINVAL: there are vCPUs already."""
    irq.create_irqchip(vm)
    return 0


def irq_line(vm: Vm, req: RequestLike) -> int:
    """KVM_IRQ_LINE (api.rst 4.25): drive a GSI.  ENXIO: no irqchip."""
    gsi, level = _LEVEL.unpack(req.data)
    _chip(vm).set_irq(USERSPACE_IRQ_SOURCE, gsi, bool(level))
    return 0


def irq_line_status(vm: Vm, req: RequestLike) -> bytes:
    """KVM_IRQ_LINE_STATUS: as KVM_IRQ_LINE, and tells what became of it (-1 masked, 0 coalesced, n CPUs)."""
    gsi, level = _LEVEL.unpack(req.data)
    status = _chip(vm).set_irq(USERSPACE_IRQ_SOURCE, gsi, bool(level), line_status=True)
    return _STATUS.pack(status, level)


def get_irqchip(vm: Vm, req: RequestLike) -> bytes:
    """KVM_GET_IRQCHIP (api.rst 4.26).  ENXIO: no PIC and I/O APIC in here; EINVAL: no such chip."""
    chip = _chip(vm)
    pic, ioapic = chip.pic, chip.ioapic
    if pic is None or ioapic is None:
        raise KvmError(errno.ENXIO)
    data = bytearray(req.data)
    number = int.from_bytes(data[:4], "little")
    if number > KVM_IRQCHIP_IOAPIC:
        raise KvmError(errno.EINVAL)
    with chip.lock:
        state = bytes(ioapic.get_state() if number == KVM_IRQCHIP_IOAPIC else pic.pics[number].get_state())
    data[_CHIP_OFFSET:_CHIP_OFFSET + len(state)] = state
    return bytes(data)


def set_irqchip(vm: Vm, req: RequestLike) -> tuple[int, bytes]:
    """KVM_SET_IRQCHIP (api.rst 4.27), whose number is declared the wrong way round.  EFAULT, ENXIO, EINVAL."""
    data = vm.host.memory.read(req.arg, sizeof(KvmIrqchip))
    chip = vm.arch.irqchip
    if chip is None or chip.pic is None or chip.ioapic is None:
        return -errno.ENXIO, data
    number = int.from_bytes(data[:4], "little")
    with chip.lock:
        if number <= KVM_IRQCHIP_PIC_SLAVE:
            chip.pic.pics[number].set_state(KvmPicState.from_buffer_copy(data, _CHIP_OFFSET))
        elif number == KVM_IRQCHIP_IOAPIC:
            chip.ioapic.set_state(KvmIoapicState.from_buffer_copy(data, _CHIP_OFFSET))
        chip.pic.update_irq()
    return (0 if number <= KVM_IRQCHIP_IOAPIC else -errno.EINVAL), data


def set_gsi_routing(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_GSI_ROUTING (api.rst 4.52).  EINVAL: no irqchip, too many, flags, or routes that cannot be; EFAULT."""
    chip = _chip(vm, errno.EINVAL)
    header = KvmIrqRouting.from_buffer_copy(req.data)
    if header.nr > KVM_MAX_IRQ_ROUTES or header.flags:
        raise KvmError(errno.EINVAL)
    size = header.nr * sizeof(KvmIrqRoutingEntry)
    raw = vm.host.memory.read(req.arg + sizeof(KvmIrqRouting), size) if size else b""
    chip.set_routing((gsi, kind, flags, (a, b, c)) for gsi, kind, flags, _, a, b, c in _ROUTE.iter_unpack(raw))
    return 0


def signal_msi(vm: Vm, req: RequestLike) -> int:
    """KVM_SIGNAL_MSI (api.rst 4.70): how many CPUs got it.  EINVAL: no irqchip, flags, address; EPERM: nobody."""
    msi = KvmMsi.from_buffer_copy(req.data)
    chip = _chip(vm, errno.EINVAL)
    if msi.flags & ~KVM_MSI_VALID_DEVID:
        raise KvmError(errno.EINVAL)
    return chip.set_msi(Route(0, MSI_ROUTE, address_lo=msi.address_lo, address_hi=msi.address_hi, data=msi.data), True)


def hyperv_eventfd(vm: Vm, req: RequestLike) -> int:
    """KVM_HYPERV_EVENTFD (api.rst 4.112): what signals a connection of Hyper-V's HvSignalEvent.

    EINVAL: flags, id, or no eventfd; EBADF; EEXIST: the connection has one; ENOENT: it has none.
    """
    hyperv.set_eventfd(vm, req, *_HYPERV_EVENTFD.unpack(req.data))
    return 0


# ---- the PIT ---------------------------------------------------------------------------------------------

def create_pit(vm: Vm, req: RequestLike) -> int:
    """KVM_CREATE_PIT: KVM_CREATE_PIT2 with the speaker port."""
    irq.create_pit(vm, KVM_PIT_SPEAKER_DUMMY)
    return 0


def create_pit2(vm: Vm, req: RequestLike) -> int:
    """KVM_CREATE_PIT2 (api.rst 4.71).  EEXIST: there is one; ENOENT: no PIC in here."""
    irq.create_pit(vm, KvmPitConfig.from_buffer_copy(req.data).flags)
    return 0


def get_pit(vm: Vm, req: RequestLike) -> bytes:
    """KVM_GET_PIT.  ENXIO: no PIT."""
    pit = _pit(vm)
    with pit.lock:
        return pit.get_channels()


def set_pit(vm: Vm, req: RequestLike) -> tuple[int, bytes]:
    """KVM_SET_PIT, whose number is declared the wrong way round.  EFAULT; ENXIO: no PIT."""
    data = vm.host.memory.read(req.arg, sizeof(KvmPitState))
    chip = vm.arch.irqchip
    if chip is None or chip.pit is None:
        return -errno.ENXIO, data
    with chip.lock:
        chip.pit.set_channels(data)
    return 0, data


def get_pit2(vm: Vm, req: RequestLike) -> bytes:
    """KVM_GET_PIT2 (api.rst 4.72).  ENXIO: no PIT."""
    pit = _pit(vm)
    with pit.lock:
        return (pit.get_channels() + struct.pack("<I", pit.flags)).ljust(sizeof(KvmPitState2), b"\0")


def set_pit2(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_PIT2 (api.rst 4.73).  ENXIO: no PIT."""
    pit, data = _pit(vm), bytes(req.data)
    state = KvmPitState2.from_buffer_copy(data)
    with pit.lock:
        pit.set_state2(data, state.flags)
    return 0


def reinject_control(vm: Vm, req: RequestLike) -> int:
    """KVM_REINJECT_CONTROL: are the PIT's missed ticks made up for?  EFAULT; ENXIO: no PIT."""
    control = KvmReinjectControl.from_buffer_copy(vm.host.memory.read(req.arg, sizeof(KvmReinjectControl)))
    pit = _pit(vm)
    with pit.lock:
        pit.set_reinject(bool(control.pit_reinject))
    return 0
