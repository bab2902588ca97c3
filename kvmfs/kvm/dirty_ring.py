# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty rings: each vCPU tells in a ring of its own which pages it makes dirty (Linux: virt/kvm/dirty_ring.c; api.rst 8.29).

The ring lies in the vCPU's file at page KVM_DIRTY_LOG_PAGE_OFFSET, shared with the client, so there is none where the
kvm_run area is copied.  The engine writes the entries when it sets bits in the slots' bitmaps, which no client sees then.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from typing import TYPE_CHECKING

from kvmfs.abi.exits import KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_LOG_PAGE_OFFSET
from kvmfs.abi.x86 import KVM_DIRTY_RING_MAX_ENTRIES, KVM_DIRTY_RING_RSVD_ENTRIES, PAGE_SIZE
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.dirty_log import DirtyBitmap
    from kvmfs.kvm.kvm_main import Vcpu, Vm
    from kvmfs.kvm.memslots import MemSlots

_gfn = struct.Struct("<IIQ")            # struct kvm_dirty_gfn: flags, slot, offset
_set_flags = struct.Struct("<I").pack_into
PML_ENTITY_NUM = 512                    # pages that Intel's CPUs log by themselves before they exit


def reserved_entries(vm: Vm) -> int:
    """``kvm_dirty_ring_get_rsvd_entries``."""
    return KVM_DIRTY_RING_RSVD_ENTRIES + (PML_ENTITY_NUM if vm.vendor.name == "intel" else 0)


def enable(vm: Vm, size: int) -> None:
    """``kvm_vm_ioctl_enable_dirty_log_ring``: rings of ``size`` bytes for all vCPUs, once, before the first of them.

    Errors, in this order: EINVAL no power of two, too small; E2BIG; EINVAL already enabled; EINVAL there is a vCPU.
    """
    if not vm.host.passthrough or not size or size & (size - 1):
        raise KvmError(errno.EINVAL)
    if size < reserved_entries(vm) * _gfn.size or size < PAGE_SIZE:
        raise KvmError(errno.EINVAL)
    if size > KVM_DIRTY_RING_MAX_ENTRIES * _gfn.size:
        raise KvmError(errno.E2BIG)
    if vm.memslots.dirty_rings is not None:
        raise KvmError(errno.EINVAL)
    with vm.lock:
        if vm.created_vcpus:
            raise KvmError(errno.EINVAL)
        vm.memslots.dirty_rings = DirtyRings(vm, size)


def reset(vm: Vm) -> int:
    """``kvm_vm_ioctl_reset_dirty_pages``: the pages that the client has collected are logged again.  EINVAL: no rings."""
    if vm.memslots.dirty_rings is None:
        raise KvmError(errno.EINVAL)
    return sum(vcpu.dirty_ring.reset(vm.memslots) for vcpu in list(vm.vcpus) if vcpu.dirty_ring is not None)


class DirtyRings:
    """What all rings of a VM have in common: ``size`` in bytes, ``offset`` in the vCPU's file."""

    offset = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE

    def __init__(self, vm: Vm, size: int) -> None:
        self._vm, self.size = vm, size

    def open(self, vcpu: Vcpu) -> DirtyRing:
        """A new vCPU's ring."""
        return DirtyRing(vcpu, self.offset, self.size // _gfn.size, reserved_entries(self._vm))

    def machine_wrote(self, bitmap: DirtyBitmap, slot: int, first: int, count: int) -> None:
        """The page goes into the ring of the vCPU whose thread this is (``kvm_get_running_vcpu``), or the first one's."""
        thread = threading.get_ident()
        for vcpu in self._vm.vcpus:
            if vcpu.dirty_ring is not None and vcpu.dirty_ring.thread == thread:
                break
        else:
            if not self._vm.vcpus:
                return
            vcpu = self._vm.vcpus[0]
        vcpu.cpu.ring_push(bitmap.address, slot, first, count)


class DirtyRing:
    """``struct kvm_dirty_ring``."""

    def __init__(self, vcpu: Vcpu, offset: int, entries: int, reserved: int) -> None:
        self.thread = 0                 # that runs, or ran, the vCPU
        self._cpu, self._memory = vcpu.cpu, memoryview(vcpu.run_map)[offset:]
        self._entries, self._soft_limit = entries, entries - reserved
        # The mapping stays as long as this view of it.
        address = ctypes.addressof(ctypes.c_char.from_buffer(vcpu.run_map, offset))
        self._indices = vcpu.cpu.open_ring(address, entries, self._soft_limit)

    def soft_full(self) -> bool:
        """``kvm_dirty_ring_soft_full``: the guest is not entered before the client has made room."""
        written, reset = self._indices
        return (written - reset) & 0xFFFFFFFF >= self._soft_limit

    def reset(self, slots: MemSlots) -> int:
        """``kvm_dirty_ring_reset``."""
        memory, count = self._memory, 0
        pages: dict[int, list[int]] = {}
        while True:
            at = (self._indices[1] & (self._entries - 1)) * _gfn.size
            flags, slot, offset = _gfn.unpack_from(memory, at)
            if not flags & KVM_DIRTY_GFN_F_RESET:
                break
            _set_flags(memory, at, 0)
            self._indices[1] = (self._indices[1] + 1) & 0xFFFFFFFF
            count += 1
            pages.setdefault(slot, []).append(offset)
        for number, offsets in pages.items():
            _log_again(slots, number, offsets)
        return count

    def close(self) -> None:
        """The vCPU's file goes, and with it the ring."""
        self._indices = self._cpu.open_ring(0, 1, 1)
        self._memory.release()


def _log_again(slots: MemSlots, number: int, offsets: list[int]) -> None:
    """``kvm_reset_dirty_gfn``; what the client made of the entries may be anything."""
    slot = slots.by_id(number)
    if slot is None or slot.dirty_bitmap is None:
        return
    bitmap = slot.dirty_bitmap
    offsets = [offset for offset in offsets if offset < bitmap.npages]
    if not offsets:
        return
    first, last = min(offsets) // 64, max(offsets) // 64
    mask = (ctypes.c_uint64 * (last - first + 1))()
    for offset in offsets:
        mask[offset // 64 - first] |= 1 << offset % 64
    slots.engine.log_take(bitmap.address + first * 8, ctypes.addressof(mask), len(mask), mask=True)
