# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's memory: slots, dirty logs, special addresses, private memory."""

from __future__ import annotations

import ctypes
import errno as E

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmClearDirtyLog,
    KvmCreateGuestMemfd,
    KvmDirtyLog,
    KvmEnableCap,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
)

from .model import Trial, buffer, case
from .wire import BAD_POINTER, KERNEL_POINTER, PAGE, Memory, Result

VM = Level.VM
LOG_DIRTY, READONLY, GUEST_MEMFD = 1, 2, 4
SET = "KVM_SET_USER_MEMORY_REGION"
MAX_PAGES = (1 << 31) - 1
Region = type[KvmUserspaceMemoryRegion] | type[KvmUserspaceMemoryRegion2]


def _region(t: Trial, name: str, slot: int, flags: int, gpa: int, size: int, hva: int) -> Result:
    kind: Region = KvmUserspaceMemoryRegion2 if name.endswith("2") else KvmUserspaceMemoryRegion
    return t.ioctl(t.vm, name, kind(slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva))


def _life(t: Trial, name: str) -> None:
    """Create, again, move, flag, delete."""
    memory = t.memory(16 * PAGE)
    hva, size = memory.address, memory.size
    t.ok("create", _region(t, name, 0, 0, 0x10000, size, hva))
    t.ok("the same again", _region(t, name, 0, 0, 0x10000, size, hva))
    t.ok("move", _region(t, name, 0, 0, 0x100000, size, hva))
    t.ok("another slot where it was, on the same memory", _region(t, name, 1, 0, 0x10000, size, hva))
    t.ok("dirty logging on", _region(t, name, 0, LOG_DIRTY, 0x100000, size, hva))
    t.ok("dirty logging off", _region(t, name, 0, 0, 0x100000, size, hva))
    t.ok("delete", _region(t, name, 0, 0, 0, 0, 0))
    t.errno("delete again", _region(t, name, 0, 0, 0, 0, 0), E.EINVAL)
    t.ok("delete the other, its fields ignored", _region(t, name, 1, 0, 0x5000, 0, hva + PAGE))


def _errors(t: Trial, name: str) -> None:
    memory = t.memory(16 * PAGE)
    hva, size, slots = memory.address, memory.size, t.has("NR_MEMSLOTS")
    for label, arguments in (
            ("size is not whole pages", (0, 0, 0, size + 1, hva)),
            ("guest address inside a page", (0, 0, 0x800, size, hva)),
            ("client address inside a page", (0, 0, 0, size, hva + 8)),
            ("client address in the kernel's half", (0, 0, 0, size, KERNEL_POINTER)),
            ("slot number one too large", (max(slots, 32764) + 3, 0, 0, size, hva)),
            ("address space 2", (2 << 16, 0, 0, size, hva)),
            ("unknown flag", (0, 1 << 3, 0, size, hva)),
            ("high flag", (0, 1 << 31, 0, size, hva)),
            ("the end wraps around", (0, 0, (1 << 64) - PAGE, 2 * PAGE, hva)),
            ("delete an absent slot", (5, 0, 0, 0, 0)),
            ("delete, misaligned address", (5, 0, 0x10, 0, 0))):
        t.errno(label, _region(t, name, *arguments), E.EINVAL)
    if not t.has("MULTI_ADDRESS_SPACE"):
        t.errno("address space 1", _region(t, name, 1 << 16, 0, 0, size, hva), E.EINVAL)
    t.ok("the last slot", _region(t, name, slots - 1, 0, 0x10000000, size, hva))
    t.need("create", _region(t, name, 0, 0, 0x100000, size, hva))
    t.errno("resize", _region(t, name, 0, 0, 0x100000, size - PAGE, hva), E.EINVAL)
    t.errno("other client memory", _region(t, name, 0, 0, 0x100000, size, hva + PAGE), E.EINVAL)
    t.errno("make read-only", _region(t, name, 0, READONLY, 0x100000, size, hva), E.EINVAL)
    t.errno("overlap from below", _region(t, name, 1, 0, 0x100000 - PAGE, 2 * PAGE, hva), E.EEXIST)
    t.errno("overlap at its end", _region(t, name, 1, 0, 0x100000 + size - PAGE, 2 * PAGE, hva), E.EEXIST)
    t.errno("overlap inside", _region(t, name, 1, 0, 0x102000, PAGE, hva), E.EEXIST)
    t.ok("right below", _region(t, name, 1, 0, 0x100000 - PAGE, PAGE, hva))
    t.ok("right above", _region(t, name, 2, 0, 0x100000 + size, PAGE, hva))
    t.errno("move onto another", _region(t, name, 2, 0, 0x100000, PAGE, hva), E.EEXIST)
    t.ok("and everything still stands", _region(t, name, 0, 0, 0x100000, size, hva))


@case(SET, VM, "life of a slot", "USER_MEMORY")
def slots_life(t: Trial) -> None:
    _life(t, SET)


@case(SET, VM, "errors", "USER_MEMORY")
def slots_errors(t: Trial) -> None:
    _errors(t, SET)


@case(SET, VM, "read-only", "USER_MEMORY", "READONLY_MEM")
def slots_readonly(t: Trial) -> None:
    memory = t.memory(PAGE)
    t.ok("create", t.slot(t.vm, 0, 0, memory, READONLY))
    t.errno("make writable", t.slot(t.vm, 0, 0, memory), E.EINVAL)
    t.ok("dirty logging too", t.slot(t.vm, 0, 0, memory, READONLY | LOG_DIRTY))


@case(SET, VM, "private memory is refused", "USER_MEMORY")
def slots_memfd_v1(t: Trial) -> None:
    memory = t.memory(PAGE)
    t.errno("KVM_MEM_GUEST_MEMFD in the old struct", t.slot(t.vm, 0, 0, memory, GUEST_MEMFD), E.EINVAL)


@case(SET, VM, "unmapped client memory", "USER_MEMORY")
def slots_unmapped(t: Trial) -> None:
    """Linux does not look at the memory when the slot is made."""
    hva = BAD_POINTER & ~(PAGE - 1)
    t.ok("a range where nothing is mapped", _region(t, SET, 0, 0, 0, PAGE, hva))


@case(SET, VM, "memory stays the client's", "USER_MEMORY")
def slots_contents(t: Trial) -> None:
    memory = t.memory(4 * PAGE)
    memory.write(0, b"before")
    memory.write(3 * PAGE, b"\x5a" * PAGE)
    t.need("create", t.slot(t.vm, 0, 0, memory))
    t.equal("what was there", memory.read(0, 6), b"before")
    t.true("all of it", memory.read(3 * PAGE, PAGE) == b"\x5a" * PAGE)
    memory.write(PAGE, b"after")
    t.equal("it can be written", memory.read(PAGE, 5), b"after")
    t.need("delete", _region(t, SET, 0, 0, 0, 0, 0))
    t.equal("and is there when the slot is gone", memory.read(PAGE, 5) + memory.read(0, 6), b"afterbefore")


@case("KVM_SET_USER_MEMORY_REGION2", VM, "life of a slot", "USER_MEMORY2")
def slots2_life(t: Trial) -> None:
    _life(t, "KVM_SET_USER_MEMORY_REGION2")


@case("KVM_SET_USER_MEMORY_REGION2", VM, "errors", "USER_MEMORY2")
def slots2_errors(t: Trial) -> None:
    _errors(t, "KVM_SET_USER_MEMORY_REGION2")
    memory = t.memory(PAGE)
    if not t.has("GUEST_MEMFD"):
        t.errno("private memory in a VM that has none", _region(t, "KVM_SET_USER_MEMORY_REGION2", 9, GUEST_MEMFD, 1 << 32,
                                                                PAGE, memory.address), E.EINVAL)


# ---- dirty log ----------------------------------------------------------------------------------------------


def _logged(t: Trial, pages: int = 70) -> Memory:
    """Slot 3 with dirty logging."""
    memory = t.memory(pages * PAGE)
    t.need("a slot with dirty logging", t.slot(t.vm, 3, 0x100000, memory, LOG_DIRTY))
    return memory


@case("KVM_GET_DIRTY_LOG", VM, "clean slot")
def dirty_log(t: Trial) -> None:
    memory = _logged(t)
    memory.write(0, b"the client's own stores are not logged")
    bitmap = buffer(24, b"\xff" * 24)
    t.ok("success", t.ioctl(t.vm, "KVM_GET_DIRTY_LOG", KvmDirtyLog(slot=3, dirty_bitmap=ctypes.addressof(bitmap))))
    t.equal("two clean words, nothing beyond", bytes(bitmap), bytes(16) + b"\xff" * 8)


@case("KVM_GET_DIRTY_LOG", VM, "errors")
def dirty_log_errors(t: Trial) -> None:
    name, bitmap = "KVM_GET_DIRTY_LOG", buffer(64)
    at = ctypes.addressof(bitmap)
    t.errno("no such slot", t.ioctl(t.vm, name, KvmDirtyLog(slot=3, dirty_bitmap=at)), E.ENOENT)
    plain = t.memory(PAGE)
    t.need("a slot without dirty logging", t.slot(t.vm, 1, 0, plain))
    t.errno("not logged", t.ioctl(t.vm, name, KvmDirtyLog(slot=1, dirty_bitmap=at)), E.ENOENT)
    t.errno("slot number too large", t.ioctl(t.vm, name, KvmDirtyLog(slot=0x7FFF, dirty_bitmap=at)), E.EINVAL)
    t.errno("address space 2", t.ioctl(t.vm, name, KvmDirtyLog(slot=2 << 16, dirty_bitmap=at)), E.EINVAL)
    _logged(t)
    t.errno("unmapped bitmap", t.ioctl(t.vm, name, KvmDirtyLog(slot=3, dirty_bitmap=BAD_POINTER)), E.EFAULT)
    t.errno("slot before bitmap", t.ioctl(t.vm, name, KvmDirtyLog(slot=1, dirty_bitmap=BAD_POINTER)), E.ENOENT)


def _manual(t: Trial, value: int) -> Result:
    cap = KvmEnableCap(cap=168)
    cap.args[0] = value
    return t.ioctl(t.vm, "KVM_ENABLE_CAP", cap)


@case("KVM_CLEAR_DIRTY_LOG", VM, "clear and errors", "MANUAL_DIRTY_LOG_PROTECT2")
def clear_dirty_log(t: Trial) -> None:
    name, bitmap = "KVM_CLEAR_DIRTY_LOG", buffer(64)
    at = ctypes.addressof(bitmap)

    def clear(slot: int, first: int, count: int, address: int = at) -> Result:
        return t.ioctl(t.vm, name, KvmClearDirtyLog(slot=slot, num_pages=count, first_page=first, dirty_bitmap=address))

    t.ok("manual protection", _manual(t, 1))
    t.errno("no such slot", clear(3, 0, 64), E.ENOENT)
    _logged(t)
    t.ok("the whole slot", clear(3, 0, 70))
    t.ok("its first 64 pages", clear(3, 0, 64))
    t.ok("its last 6", clear(3, 64, 6))
    t.ok("nothing", clear(3, 0, 0))
    for label, slot, first, count in (("first page not a multiple of 64", 3, 1, 63), ("pages not a multiple of 64", 3, 0, 63),
                                      ("beyond the end", 3, 0, 71), ("begins beyond the end", 3, 128, 0),
                                      ("slot number too large", 0x7FFF, 0, 64), ("address space 2", 2 << 16, 0, 64)):
        t.errno(label, clear(slot, first, count), E.EINVAL)
    t.errno("unmapped bitmap", clear(3, 0, 64, BAD_POINTER), E.EFAULT)
    t.errno("alignment before slot", clear(9, 1, 1), E.EINVAL)


@case("KVM_CLEAR_DIRTY_LOG", VM, "options of manual protection", "MANUAL_DIRTY_LOG_PROTECT2")
def manual_protect(t: Trial) -> None:
    options = t.has("MANUAL_DIRTY_LOG_PROTECT2")
    t.note("options", options)
    t.errno("INITIALLY_SET alone", _manual(t, 2), E.EINVAL)
    t.errno("unknown", _manual(t, 5), E.EINVAL)
    t.ok("off", _manual(t, 0))
    t.ok("all", _manual(t, options))
    if options & 2:
        _logged(t)
        bitmap = buffer(16)
        t.ok("the log", t.ioctl(t.vm, "KVM_GET_DIRTY_LOG", KvmDirtyLog(slot=3, dirty_bitmap=ctypes.addressof(bitmap))))
        t.equal("everything is dirty at first", int.from_bytes(bytes(bitmap), "little") & (1 << 70) - 1, (1 << 70) - 1)


@case("KVM_RESET_DIRTY_RINGS", VM, "without rings", "DIRTY_LOG_RING")
def reset_rings_off(t: Trial) -> None:
    t.errno("rings are off", t.ioctl(t.vm, "KVM_RESET_DIRTY_RINGS"), E.EINVAL)


@case("KVM_RESET_DIRTY_RINGS", VM, "empty rings", "DIRTY_LOG_RING")
def reset_rings(t: Trial) -> None:
    largest = t.has("DIRTY_LOG_RING")

    def enable(size: int, cap: int = 192) -> Result:
        argument = KvmEnableCap(cap=cap)
        argument.args[0] = size
        return t.ioctl(t.vm, "KVM_ENABLE_CAP", argument)

    t.errno("size 0", enable(0), E.EINVAL)
    t.errno("size is not a power of two", enable(3 * PAGE), E.EINVAL)
    t.errno("too small", enable(16), E.EINVAL)
    t.errno("too large", enable(2 * largest), E.E2BIG)
    t.need("enable", enable(16 * PAGE))         # with PML over 9 KiB are reserved
    t.errno("twice", enable(16 * PAGE), E.EINVAL)
    t.need("a vCPU", t.ioctl(t.vcpu, "KVM_GET_MP_STATE", buffer(4)))
    t.ok("nothing to recycle", t.ioctl(t.vm, "KVM_RESET_DIRTY_RINGS"), 0)
    _logged(t)
    bitmap = buffer(64)
    log = KvmDirtyLog(slot=3, dirty_bitmap=ctypes.addressof(bitmap))
    t.errno("the bitmap is off", t.ioctl(t.vm, "KVM_GET_DIRTY_LOG", log), E.ENXIO)


# ---- the rest -----------------------------------------------------------------------------------------------


@case("KVM_SET_TSS_ADDR", VM, "addresses", "SET_TSS_ADDR")
def tss_addr(t: Trial) -> None:
    t.ok("where QEMU has it", t.ioctl(t.vm, "KVM_SET_TSS_ADDR", 0xFEFFD000))
    t.ok("0", t.ioctl(t.vm, "KVM_SET_TSS_ADDR", 0))
    t.ok("the highest", t.ioctl(t.vm, "KVM_SET_TSS_ADDR", 0xFFFFD000))
    t.errno("too high", t.ioctl(t.vm, "KVM_SET_TSS_ADDR", 0xFFFFD001), E.EINVAL)
    t.errno("4 GiB - 1", t.ioctl(t.vm, "KVM_SET_TSS_ADDR", 0xFFFFFFFF), E.EINVAL)


@case("KVM_SET_IDENTITY_MAP_ADDR", VM, "addresses", "SET_IDENTITY_MAP_ADDR")
def identity_map(t: Trial) -> None:
    name = "KVM_SET_IDENTITY_MAP_ADDR"
    t.ok("where QEMU has it", t.ioctl(t.vm, name, ctypes.c_uint64(0xFEFFC000)))
    t.ok("0", t.ioctl(t.vm, name, ctypes.c_uint64(0)))
    t.need("a vCPU", t.ioctl(t.vcpu, "KVM_GET_MP_STATE", buffer(4)))
    t.errno("after the first vCPU", t.ioctl(t.vm, name, ctypes.c_uint64(0xFEFFC000)), E.EINVAL)
    t.errno("which is looked at before the pointer", t.ioctl(t.vm, name, BAD_POINTER), E.EINVAL)


@case("KVM_SET_NR_MMU_PAGES", VM, "limits", "MMU_SHADOW_CACHE_CONTROL")
def nr_mmu_pages(t: Trial) -> None:
    name = "KVM_SET_NR_MMU_PAGES"
    t.errno("63", t.ioctl(t.vm, name, 63), E.EINVAL)
    t.errno("0", t.ioctl(t.vm, name, 0), E.EINVAL)
    t.ok("64", t.ioctl(t.vm, name, 64))
    t.ok("1024", t.ioctl(t.vm, name, 1024))


@case("KVM_SET_MEMORY_ATTRIBUTES", VM, "errors", "MEMORY_ATTRIBUTES")
def memory_attributes(t: Trial) -> None:
    name = "KVM_SET_MEMORY_ATTRIBUTES"
    for label, at, size, attributes, flags in (("flags", 0, PAGE, 0, 1), ("unknown attribute", 0, PAGE, 1, 0),
                                               ("size 0", 0, 0, 0, 0), ("misaligned", 8, PAGE, 0, 0)):
        argument = KvmMemoryAttributes(address=at, size=size, attributes=attributes, flags=flags)
        t.errno(label, t.ioctl(t.vm, name, argument), E.EINVAL)


@case("KVM_CREATE_GUEST_MEMFD", VM, "errors", "GUEST_MEMFD")
def guest_memfd(t: Trial) -> None:
    name = "KVM_CREATE_GUEST_MEMFD"
    for label, argument in (("size 0", KvmCreateGuestMemfd()), ("not whole pages", KvmCreateGuestMemfd(size=100)),
                            ("unknown flag", KvmCreateGuestMemfd(size=PAGE, flags=1 << 40))):
        t.errno(label, t.ioctl(t.vm, name, argument), E.EINVAL)
    t.fd("a page", t.ioctl(t.vm, name, KvmCreateGuestMemfd(size=PAGE)))
