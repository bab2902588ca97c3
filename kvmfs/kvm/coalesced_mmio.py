# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes that wait in a ring until the client has time for them (Linux: virt/kvm/coalesced_mmio.c; api.rst 4.116).

In Linux all vCPUs' kvm_run areas show the same ring page.  Here each vCPU's file has pages of its own: a mapping through FUSE
shows its backing file at the offset that the client gives, and no two regular files have a page in common.  So only the
first vCPU's writes go into its ring, the one that clients look at; the others exit, as they do when the ring is full.
The same goes for a kvm_run area that is copied at each KVM_RUN: the client may look at the ring at any time.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmfs.abi.exits import KVM_COALESCED_MMIO_PAGE_OFFSET
from kvmfs.abi.x86 import KVM_COALESCED_MMIO_MAX, PAGE_SIZE
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.iodev import IoBus
    from kvmfs.kvm.kvm_main import Vcpu, Vm

_RING = KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE
_ENTRIES = _RING + 8
_indices = struct.Struct("<II").unpack_from             # first, last
_set_last = struct.Struct("<I").pack_into
_set_entry = struct.Struct("<QII8s").pack_into          # phys_addr, len, pio, data
_ENTRY_SIZE = 24
_INT_MAX = (1 << 31) - 1


@dataclass(eq=False, slots=True)
class CoalescedZone:
    """``struct kvm_coalesced_mmio_dev``."""

    addr: int
    size: int
    pio: int

    def covers(self, addr: int, size: int) -> bool:
        """``coalesced_mmio_in_range``."""
        return size <= _INT_MAX and self.addr <= addr and addr + size <= self.addr + self.size

    def write(self, vcpu: Vcpu, addr: int, data: bytes) -> bool:
        if vcpu.index or vcpu.copy_run or not self.covers(addr, len(data)):
            return False
        run = vcpu.run
        first, last = _indices(run, _RING)
        following = (last + 1) % KVM_COALESCED_MMIO_MAX
        if last >= KVM_COALESCED_MMIO_MAX or following == first:
            return False
        _set_entry(run, _ENTRIES + last * _ENTRY_SIZE, addr, len(data), self.pio, data)
        _set_last(run, _RING + 4, following)
        return True


def _bus(vm: Vm, pio: int) -> IoBus:
    if pio not in (0, 1):
        raise KvmError(errno.EINVAL)
    return vm.pio_bus if pio else vm.mmio_bus


def register(vm: Vm, addr: int, size: int, pio: int) -> None:
    """``kvm_vm_ioctl_register_coalesced_mmio``.  EINVAL: pio; ENOSPC."""
    bus = _bus(vm, pio)
    zone = CoalescedZone(addr, size, pio)
    with vm.slots_lock:
        bus.register(addr, size, zone)
        vm.coalesced_zones.append(zone)


def unregister(vm: Vm, addr: int, size: int, pio: int) -> None:
    """``kvm_vm_ioctl_unregister_coalesced_mmio``: every zone that contains this one goes.  EINVAL: pio."""
    bus = _bus(vm, pio)
    with vm.slots_lock:
        for zone in [z for z in vm.coalesced_zones if z.pio == pio and z.covers(addr, size)]:
            bus.unregister(zone)
            vm.coalesced_zones.remove(zone)
