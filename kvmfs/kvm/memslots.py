# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots: KVM_SET_USER_MEMORY_REGION's checks in Linux's order, and guest physical memory.

In Linux this is the memslot half of virt/kvm/kvm_main.c.  A slot's memory is mapped into this process at one
contiguous address; where the client has mapped nothing there is nothing here either, and an access is the
client's EFAULT, as it is with hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmfs.abi.exits import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvmfs.abi.flags import KVM_DIRTY_LOG_INITIALLY_SET
from kvmfs.errors import KvmError
from kvmfs.kvm.dirty_log import DirtyBitmap, LogEngine
from kvmfs.kvm.host import Segment

if TYPE_CHECKING:
    from kvmfs.kvm.dirty_ring import DirtyRings

PAGE_SIZE = 4096
PAGE_MASK = PAGE_SIZE - 1
NR_MEMSLOTS = 32764            # KVM_USER_MEM_SLOTS: 32767 less three internal ones
MAX_NR_PAGES = (1 << 31) - 1   # KVM_MEM_MAX_NR_PAGES
TASK_SIZE_MAX = (1 << 47) - PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]   # and where to
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4


def _map(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address, size, prot, flags, fd, offset)
    if result == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mmap of guest memory")
    return int(result)


def _reserve(at: int | None, size: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (0 if at is None else _MAP_FIXED)
    try:
        return _map(at, size, mmap.PROT_READ, flags, -1, 0)
    except OSError:
        if at is None:
            raise
        _libc.munmap(at, size)      # vm.max_map_count is reached: one mapping less
        return _map(at, size, mmap.PROT_READ, flags, -1, 0)


@contextlib.contextmanager
def _temporary(size: int) -> Iterator[int]:
    at = _reserve(None, size)
    try:
        yield at
    finally:
        _libc.munmap(at, size)


def _remap(address: int, size: int, to: int) -> None:
    # Without a hole, which another thread's mmap could fill, where the kernel can do that with shared mappings (5.13).
    for more in (_MREMAP_DONTUNMAP, 0):
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | more
        if _libc.mremap(address, size, size, flags, ctypes.c_void_p(to)) != _MAP_FAILED:
            break
    else:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mremap of guest memory")


class MappedPiece(NamedTuple):
    """A part of a slot: bytes ``at`` to ``at + size`` of it, which are those from ``offset`` on of a file.

    ``file`` is the same number, not 0, for each descriptor of it.
    """

    at: int
    size: int
    writable: bool
    file: int
    offset: int


def _file_number(fd: int) -> int:
    info = os.fstat(fd)
    return (info.st_dev << 48 ^ info.st_ino) & (1 << 64) - 1 or 1


class HostRange:
    """The mapping of one slot's memory in this process; closed when the slot goes.

    ``at`` is its place in the engine's window, which reads as zeroes where nothing is mapped.  What the guest must
    not change is a private mapping: the engine sets accessed bits in page tables there, too, which nobody else sees.
    """

    def __init__(self, hva: int, size: int, segments: Sequence[Segment], at: int | None = None,
                 *, readonly: bool = False) -> None:
        self.size = size
        self.pieces: list[MappedPiece] = []
        self._in_window = at is not None
        self.address = _reserve(None, size) if at is None else at
        try:
            for segment in segments:
                shared = segment.writable and not readonly
                flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE)
                offset = segment.hva - hva
                _map(self.address + offset, segment.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, segment.fd,
                     segment.offset)
                self.pieces.append(MappedPiece(offset, segment.size, segment.writable, _file_number(segment.fd),
                                               segment.offset))
        except BaseException:
            self.close()
            raise

    def move(self, to: int) -> None:
        """To another place in the window, which may overlap with this one."""
        if abs(to - self.address) < self.size:
            with _temporary(self.size) as between:
                self._move(between)
                self._move(to)
        else:
            self._move(to)

    def _move(self, to: int) -> None:
        for offset, size, *_ in self.pieces:
            _remap(self.address + offset, size, to + offset)
        _reserve(self.address, self.size)
        self.address = to

    def close(self) -> None:
        if self.address and self._in_window:
            _reserve(self.address, self.size)
        elif self.address:
            _libc.munmap(self.address, self.size)
        self.address = 0


class MemSlot:
    """``struct kvm_memory_slot``: ``size`` bytes at guest physical ``gpa``, the client's ``hva``."""

    __slots__ = ("dirty_bitmap", "flags", "gpa", "hva", "id", "memory", "size")

    def __init__(self, id_: int, flags: int, gpa: int, size: int, hva: int) -> None:
        self.id, self.flags, self.gpa, self.size, self.hva = id_, flags, gpa, size, hva
        self.memory: HostRange | None = None        # set as long as the slot is in use
        self.dirty_bitmap: DirtyBitmap | None = None

    @property
    def readonly(self) -> bool:
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def backed(self, gpa: int, *, write: bool = False) -> bool:
        """Has the client mapped memory there (that may be written)?"""
        at = gpa - self.gpa
        return self.memory is not None and any(
            start <= at < start + size and (writable or not write) for start, size, writable, *_ in self.memory.pieces)


class Change(NamedTuple):
    """What a KVM_SET_USER_MEMORY_REGION does: ``old`` goes, ``new`` comes; ``needs_memory``: from the client."""

    old: MemSlot | None
    new: MemSlot | None
    needs_memory: bool


class RamEngine(LogEngine, Protocol):
    """The CPU, which is told about every piece of memory that appears at or goes from a guest physical address."""

    window: int

    def map(self, gpa: int, size: int, host_addr: int, *, readonly: bool = False, file: int = 0,
            offset: int = 0) -> None: ...
    def unmap(self, gpa: int, size: int) -> None: ...


class MemSlots:
    """All slots of a VM."""

    def __init__(self, engine: RamEngine, max_gpa: int) -> None:
        self._slots: dict[int, MemSlot] = {}
        # By address; replaced as a whole, so that who looks sees all of a change or nothing.
        self._by_gpa: tuple[array[int], list[MemSlot]] = (array("Q"), [])
        self.engine, self._max_gpa = engine, max_gpa
        # Memory moves or goes, after its slot, while nobody reads or writes what he found.
        self._access = threading.Lock()
        self.dirty_rings: DirtyRings | None = None
        self.manual_dirty_log_protect = 0       # options of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2

    def __iter__(self) -> Iterator[MemSlot]:
        return iter(self._by_gpa[1])

    def host_range(self, slot: MemSlot, segments: Sequence[Segment]) -> HostRange:
        """Map the client's memory where a new slot will be."""
        return HostRange(slot.hva, slot.size, segments, self.engine.window + slot.gpa, readonly=slot.readonly)

    def by_id(self, number: int) -> MemSlot | None:
        """``id_to_memslot``."""
        return self._slots.get(number)

    # ---- KVM_SET_USER_MEMORY_REGION ---------------------------------------------------------------

    def prepare(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> Change | None:
        """All checks of ``__kvm_set_memory_region``; None when nothing changes.

        Errors, in this order: EINVAL for flags, alignment, slot number, wrap-around, size, deleting what is
        not there, resizing; EEXIST for an overlap; EINVAL beyond the physical address width.
        """
        self._check(slot, flags, gpa, size, hva)
        old = self._slots.get(slot & 0xFFFF)
        if not size:
            if old is None:
                raise KvmError(errno.EINVAL)
            return Change(old, None, False)
        if old is not None:
            if hva != old.hva or size != old.size or (flags ^ old.flags) & KVM_MEM_READONLY:
                raise KvmError(errno.EINVAL)
            if gpa == old.gpa and flags == old.flags:
                return None
        moved = old is None or gpa != old.gpa
        if moved and self._overlaps(gpa, size, old):
            raise KvmError(errno.EEXIST)
        if moved and gpa + size > self._max_gpa:
            raise KvmError(errno.EINVAL)
        return Change(old, MemSlot(slot & 0xFFFF, flags, gpa, size, hva), old is None)

    def apply(self, change: Change, memory: HostRange | None) -> None:
        """Carry out a prepared change; ``memory`` is the new slot's, if it is new."""
        old, new = change.old, change.new
        if new is None:
            assert old is not None and old.memory is not None
            self._remove(old)
            with self._access:
                old.memory.close()
            return
        bitmap = self._bitmap(old, new)
        if old is None:
            new.memory, new.dirty_bitmap = memory, bitmap
            self._insert(new)
        elif new.gpa == old.gpa:
            old.flags, old.dirty_bitmap = new.flags, bitmap
            self._log(old)
        else:
            new.memory, new.dirty_bitmap = old.memory, bitmap
            self._remove(old)
            if old.memory is not None:
                with self._access:
                    old.memory.move(old.memory.address + new.gpa - old.gpa)
            self._insert(new)

    def _bitmap(self, old: MemSlot | None, new: MemSlot) -> DirtyBitmap | None:
        if not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
            return None
        if old is not None and old.dirty_bitmap is not None:
            if old.gpa != new.gpa:
                old.dirty_bitmap.zap()
            return old.dirty_bitmap
        bitmap = DirtyBitmap(new.size // PAGE_SIZE, mapped=old is not None and old.gpa == new.gpa)
        if self.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET:
            bitmap.fill()
        return bitmap

    def _overlaps(self, gpa: int, size: int, but: MemSlot | None) -> bool:
        starts, slots = self._by_gpa
        i = max(bisect_right(starts, gpa) - 1, 0)
        while i < len(slots) and slots[i].gpa < gpa + size:
            if slots[i] is not but and gpa < slots[i].end:
                return True
            i += 1
        return False

    @staticmethod
    def _check(slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        bad = (flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
               or size & PAGE_MASK
               or gpa & PAGE_MASK
               or hva & PAGE_MASK or hva + size > TASK_SIZE_MAX
               or slot >> 16 or slot & 0xFFFF >= NR_MEMSLOTS
               or gpa + size >= 1 << 64
               or size // PAGE_SIZE > MAX_NR_PAGES)
        if bad:
            raise KvmError(errno.EINVAL)

    def _insert(self, slot: MemSlot) -> None:
        self._show(slot)
        self._slots[slot.id] = slot
        starts, slots = self._by_gpa[0][:], self._by_gpa[1][:]
        i = bisect_right(starts, slot.gpa)
        starts.insert(i, slot.gpa)
        slots.insert(i, slot)
        self._by_gpa = (starts, slots)

    def _remove(self, slot: MemSlot) -> None:
        self._hide(slot)
        del self._slots[slot.id]
        starts, slots = self._by_gpa[0][:], self._by_gpa[1][:]
        i = bisect_right(starts, slot.gpa) - 1
        del starts[i], slots[i]
        self._by_gpa = (starts, slots)

    def _show(self, slot: MemSlot) -> None:
        assert slot.memory is not None
        base = slot.memory.address
        for at, size, writable, file, offset in slot.memory.pieces:
            self.engine.map(slot.gpa + at, size, base + at, readonly=slot.readonly or not writable, file=file, offset=offset)
        if slot.dirty_bitmap is not None:
            self._log(slot)

    def _log(self, slot: MemSlot) -> None:
        """The engine logs, or does not log any more, as the slot's bitmap says."""
        assert slot.memory is not None
        bitmap, touched = (0, 0) if slot.dirty_bitmap is None else (slot.dirty_bitmap.address, slot.dirty_bitmap.touched)
        for at, *_ in slot.memory.pieces:
            self.engine.log(slot.gpa + at, bitmap, touched, at // PAGE_SIZE, slot.id)

    def _hide(self, slot: MemSlot) -> None:
        assert slot.memory is not None
        for at, size, *_ in slot.memory.pieces:
            self.engine.unmap(slot.gpa + at, size)

    @contextlib.contextmanager
    def hidden(self, slot: MemSlot) -> Iterator[None]:
        """The CPU does not see the slot's memory for a moment."""
        self._hide(slot)
        try:
            yield
        finally:
            self._show(slot)

    def close(self) -> None:
        """Give all memory back."""
        slots, self._slots, self._by_gpa = list(self), {}, (array("Q"), [])
        for slot in reversed(slots):
            if slot.memory is not None:
                self._hide(slot)
                slot.memory.close()

    # ---- access by guest physical address -----------------------------------------------------------

    def find(self, gpa: int) -> MemSlot | None:
        """The slot that covers ``gpa`` (``gfn_to_memslot``)."""
        starts, slots = self._by_gpa
        i = bisect_right(starts, gpa) - 1
        if i < 0:
            return None
        slot = slots[i]
        return slot if gpa < slot.end else None

    def _runs(self, gpa: int, size: int, write: bool) -> Iterator[tuple[int, int, MemSlot]]:
        while size:
            slot = self.find(gpa)
            if slot is None or slot.memory is None or (write and slot.readonly):
                raise KvmError(errno.EFAULT)
            offset = gpa - slot.gpa
            for at, length, writable, *_ in slot.memory.pieces:
                if at <= offset < at + length and (writable or not write):
                    take = min(size, at + length - offset)
                    yield slot.memory.address + offset, take, slot
                    gpa += take
                    size -= take
                    break
            else:
                raise KvmError(errno.EFAULT)

    def read(self, gpa: int, size: int) -> bytes:
        """``kvm_read_guest``: EFAULT where there is no memory."""
        with self._access:
            return b"".join(ctypes.string_at(at, n) for at, n, _ in self._runs(gpa, size, False))

    def write(self, gpa: int, data: bytes) -> None:
        """``kvm_write_guest``: EFAULT where there is no writable memory."""
        done = 0
        logged: list[tuple[MemSlot, int, int]] = []
        with self._access:
            for at, n, slot in self._runs(gpa, len(data), True):
                ctypes.memmove(at, data[done:done + n], n)
                if slot.dirty_bitmap is not None:
                    logged.append((slot, gpa + done - slot.gpa, n))
                done += n
        for one in logged:              # may wait for the engine
            self._wrote(*one)

    def _wrote(self, slot: MemSlot, offset: int, size: int) -> None:
        bitmap = slot.dirty_bitmap
        if bitmap is None:
            return
        first, last = offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE
        if self.dirty_rings is None:
            self.engine.log_set(bitmap.address, first, last - first + 1)
        else:
            self.dirty_rings.machine_wrote(bitmap, slot.id, first, last - first + 1)
