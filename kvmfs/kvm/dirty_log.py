# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty page logging: KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG (virt/kvm/kvm_main.c; api.rst 4.8, 4.117).

Where Linux write-protects a page until it is in the slot's bitmap, the engine does not let it become writable in
its TLB: the guest's stores, and what its page walks write, set the bit there.  What the machine writes itself
sets it in MemSlots.write().  The client's own stores are not logged, as with Linux.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from typing import TYPE_CHECKING, Protocol

from kvmfs.abi.flags import KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
from kvmfs.abi.x86 import KVM_USER_MEM_SLOTS
from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import Memory
    from kvmfs.kvm.memslots import MemSlot, MemSlots

KVM_DIRTY_LOG_MANUAL_CAPS = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
BITS_PER_LONG = 64


class LogEngine(Protocol):
    """The part of the engine that logs."""

    def log(self, gpa: int, bitmap: int, touched: int, page: int, slot: int) -> None: ...
    def log_set(self, bitmap: int, page: int, count: int) -> None: ...
    def log_sync(self) -> None: ...
    def log_take(self, bitmap: int, out: int, words: int, *, mask: bool) -> bool: ...


class DirtyBitmap:
    """``kvm_memory_slot.dirty_bitmap``: one bit for each of ``npages``; its memory appears as it is used.

    At ``touched`` is a second bitmap, of the pages that the guest has come to.  Linux maps a page at the guest's first access, a
    read, too, and where it may be written maps it writable: then it is dirty (``make_spte``).  0: all pages are mapped.
    """

    def __init__(self, npages: int, *, mapped: bool = True) -> None:
        self.npages = npages
        self.words = (npages + BITS_PER_LONG - 1) // BITS_PER_LONG
        self._map = mmap.mmap(-1, self.words * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.touched = 0
        if not mapped:
            self.zap()

    def zap(self) -> None:
        """The guest has come to none of the pages: the slot is new, or at a new place."""
        self._touched = mmap.mmap(-1, self.words * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.touched = ctypes.addressof(ctypes.c_char.from_buffer(self._touched))

    def fill(self) -> None:
        """All pages are dirty."""
        size, rest = divmod(self.npages, 8)
        ctypes.memset(self.address, 0xFF, size)
        if rest:
            self._map[size] = (1 << rest) - 1

    def __bytes__(self) -> bytes:
        return self._map[:]


def set_manual_protect(slots: MemSlots, options: int) -> None:
    """KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (api.rst 7.18).  EINVAL: an unknown option."""
    enable = options & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    allowed = KVM_DIRTY_LOG_MANUAL_CAPS if enable else KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    if options & ~allowed:
        raise KvmError(errno.EINVAL)
    slots.manual_dirty_log_protect = options


def _logged_slot(slots: MemSlots, number: int) -> tuple[MemSlot, DirtyBitmap]:
    slot = slots.by_id(number)
    if slot is None or slot.dirty_bitmap is None:
        raise KvmError(errno.ENOENT)
    return slot, slot.dirty_bitmap


def _check_number(slots: MemSlots, number: int) -> None:
    if slots.dirty_rings:
        raise KvmError(errno.ENXIO)
    if number >> 16 or number & 0xFFFF >= KVM_USER_MEM_SLOTS:
        raise KvmError(errno.EINVAL)


def get_dirty_log(slots: MemSlots, memory: Memory, number: int, address: int) -> None:
    """``kvm_get_dirty_log_protect``: the bitmap goes to ``address``; without manual protection it is clean then.

    Errors, in this order: ENXIO dirty rings are in use; EINVAL slot number; ENOENT no such slot, or it does not log; EFAULT.
    """
    _check_number(slots, number)
    _, bitmap = _logged_slot(slots, number)
    if slots.manual_dirty_log_protect:
        slots.engine.log_sync()
        snapshot = bitmap
    else:
        snapshot = DirtyBitmap(bitmap.npages)
        slots.engine.log_take(bitmap.address, snapshot.address, bitmap.words, mask=False)
    memory.write(address, bytes(snapshot))


def clear_dirty_log(slots: MemSlots, memory: Memory, number: int, first: int, count: int, address: int) -> None:
    """``kvm_clear_dirty_log_protect``: bits of ``count`` pages from ``first`` on that are set at ``address`` are cleared.

    Errors, in this order: ENXIO; EINVAL slot number or first page; ENOENT; EINVAL range; EFAULT.
    """
    _check_number(slots, number)
    if first & 63:
        raise KvmError(errno.EINVAL)
    _, bitmap = _logged_slot(slots, number)
    if first > bitmap.npages or count > bitmap.npages - first or (count < bitmap.npages - first and count & 63):
        raise KvmError(errno.EINVAL)
    words = (count + 63) // BITS_PER_LONG
    if not words:
        return
    mask = ctypes.create_string_buffer(memory.read(address, words * 8), words * 8)
    slots.engine.log_take(bitmap.address + first // 8, ctypes.addressof(mask), words, mask=True)
