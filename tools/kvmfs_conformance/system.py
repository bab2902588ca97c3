# SPDX-License-Identifier: GPL-2.0-or-later
"""The node itself: api.rst's system ioctls."""

from __future__ import annotations

import ctypes
import errno as E
import fcntl
import mmap
import os
import struct

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, Level
from kvmfs.abi.structs import KvmDeviceAttr

from .model import Trial, buffer, case
from .wire import BAD_POINTER, Result, ioctl, mmap_errno, sign_extended

SYSTEM = Level.SYSTEM
ENTRY = 40              # sizeof(struct kvm_cpuid_entry2)
HV_LEAVES = (*range(0x40000000, 0x40000006), *range(0x40000080, 0x40000083), 0x4000000A)


@case("KVM_GET_API_VERSION", SYSTEM, "value")
def api_version(t: Trial) -> None:
    t.ok("12", t.ioctl(t.system, "KVM_GET_API_VERSION"), 12)
    t.errno("argument 1", t.ioctl(t.system, "KVM_GET_API_VERSION", 1), E.EINVAL)
    t.errno("argument with only high bits", t.ioctl(t.system, "KVM_GET_API_VERSION", 1 << 40), E.EINVAL)


@case("KVM_GET_API_VERSION", SYSTEM, "node as a file")
def node_file(t: Trial) -> None:
    for label, call in (("read", lambda: os.read(t.system, 8)), ("write", lambda: os.write(t.system, b"x" * 8))):
        try:
            call()
            outcome = "success"
        except OSError as error:
            outcome = E.errorcode.get(error.errno or 0, "?")
        t.equal(label, outcome, "EINVAL")
    t.errno("mmap", mmap_errno(t.system, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED), E.ENODEV)
    second = t.keep(os.open(t.node.path, os.O_RDONLY | os.O_CLOEXEC))
    t.ok("ioctl on a descriptor opened read-only", t.ioctl(second, "KVM_GET_API_VERSION"), 12)


@case("KVM_GET_VCPU_MMAP_SIZE", SYSTEM, "value")
def mmap_size(t: Trial) -> None:
    result = t.ioctl(t.system, "KVM_GET_VCPU_MMAP_SIZE")
    t.ok("kvm_run, the PIO page and the coalesced ring", result, 3 * 4096)
    t.errno("argument 1", t.ioctl(t.system, "KVM_GET_VCPU_MMAP_SIZE", 1), E.EINVAL)


@case("KVM_CREATE_VM", SYSTEM, "descriptor")
def create_vm(t: Trial) -> None:
    lowest = os.dup(t.system)
    os.close(lowest)
    vm = t.fd("type 0", t.ioctl(t.system, "KVM_CREATE_VM", 0))
    t.equal("the lowest free number", vm - lowest, 0)
    t.true("close-on-exec", fcntl.fcntl(vm, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    t.true("read and write", fcntl.fcntl(vm, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR)
    t.true("named kvm-vm", "kvm-vm" in os.readlink(f"/proc/self/fd/{vm}"))
    second = t.fd("a second one", t.ioctl(t.system, "KVM_CREATE_VM", 0))
    t.true("another descriptor", second != vm)


@case("KVM_CREATE_VM", SYSTEM, "types")
def create_vm_types(t: Trial) -> None:
    """An unknown type is EINVAL; KVM_CAP_VM_TYPES says which are known."""
    types = t.has("VM_TYPES") or 1
    t.true("the default type is among KVM_CAP_VM_TYPES", types & 1)
    for number in (1, 2, 3, 4, 5, 6, 31, 63, 64, 1 << 31, 1 << 32, (1 << 64) - 1):
        if number < 32 and types >> number & 1:
            continue
        result = t.ioctl(t.system, "KVM_CREATE_VM", number)
        if result.ok:
            t.keep(result.value)
        t.errno(f"type {number:#x}", result, E.EINVAL)


@case("KVM_CREATE_VM", SYSTEM, "no descriptor left")
def create_vm_emfile(t: Trial) -> None:
    import resource

    free = os.dup(t.system)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        result = t.ioctl(t.system, "KVM_CREATE_VM", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    t.errno("RLIMIT_NOFILE reached", result, E.EMFILE)


@case("KVM_CHECK_EXTENSION", SYSTEM, "values")
def check_extension(t: Trial) -> None:
    ask = BY_NAME["KVM_CHECK_EXTENSION"].number
    for name in ("USER_MEMORY", "SET_TSS_ADDR", "EXT_CPUID", "MP_STATE", "DESTROY_MEMORY_REGION_WORKS", "USER_NMI",
                 "JOIN_MEMORY_REGIONS_WORKS", "SET_IDENTITY_MAP_ADDR", "VCPU_EVENTS", "GET_MSR_FEATURES", "IMMEDIATE_EXIT",
                 "CHECK_EXTENSION_VM", "EXT_EMUL_CPUID", "HLT", "NOP_IO_DELAY", "INTERNAL_ERROR_DATA"):
        t.equal(f"KVM_CAP_{name}", t.has(name), 1)
    for name, low, high in (("NR_VCPUS", 1, 4096), ("MAX_VCPUS", 1, 4096), ("MAX_VCPU_ID", 1, 16384), ("NR_MEMSLOTS", 32, 32767)):
        t.true(f"KVM_CAP_{name} between {low} and {high}", low <= t.has(name) <= high, t.has(name))
    t.true("NR_VCPUS is not above MAX_VCPUS", t.has("NR_VCPUS") <= t.has("MAX_VCPUS"))
    t.true("MAX_VCPU_ID is not below MAX_VCPUS", t.has("MAX_VCPU_ID") >= t.has("MAX_VCPUS"))
    for number in (max(CAPS.values()) + 1000, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 64) - 1):
        t.ok(f"unknown {number:#x}", ioctl(t.system, ask, number), 0)


@case("KVM_CHECK_EXTENSION", SYSTEM, "other architectures")
def check_extension_others(t: Trial) -> None:
    """What only other architectures have is 0 on x86."""
    for name in CAPS:
        if any(part in name for part in ("_PPC_", "_S390_", "_ARM_", "_MIPS_", "_SPAPR_", "_RISCV_", "KVM_CAP_DEVICE_IRQ")):
            t.equal(name, t.node.capability(name), 0)


# ---- lists of MSRs ------------------------------------------------------------------------------------------


def _msr_list(t: Trial, name: str) -> list[int]:
    """The list, with the checks that hold for both lists."""
    empty = buffer(4 + 4 * 4096)
    t.errno("no room", t.ioctl(t.system, name, empty), E.E2BIG)
    count, = struct.unpack_from("<I", empty)
    t.true("the count is told", 0 < count < 4096, count)
    t.true("nothing else is written", not any(bytes(empty)[4:]))
    short = buffer(4 + 4 * count, struct.pack("<I", count - 1))
    t.errno("one too few", t.ioctl(t.system, name, short), E.E2BIG)
    t.equal("the count is told again", struct.unpack_from("<I", short)[0] - count, 0)
    data = buffer(4 + 4 * count + 8, struct.pack("<I", count + 1) + b"\xa5" * (4 * count + 8))
    t.need("more room than needed", t.ioctl(t.system, name, data))
    t.equal("nmsrs is what was written", struct.unpack_from("<I", data)[0] - count, 0)
    t.equal("nothing beyond the list", bytes(data)[4 + 4 * count:], b"\xa5" * 8)
    indices = list(struct.unpack_from(f"<{count}I", data, 4))
    t.equal("no index twice", len(indices) - len(set(indices)), 0)
    t.errno("the array is unmapped", t.ioctl(t.system, name, t.before_hole(struct.pack("<I", count))), E.EFAULT)
    return indices


@case("KVM_GET_MSR_INDEX_LIST", SYSTEM, "memory that may not be accessed")
def protected_memory(t: Trial) -> None:
    """The array is in a page that the client has mapped but may not write."""
    memory = t.memory(2 * mmap.PAGESIZE)
    at = memory.address + mmap.PAGESIZE
    memory.write(mmap.PAGESIZE - 4, struct.pack("<I", 1024))
    for label, protection in (("read-only", mmap.PROT_READ), ("no access", 0)):
        protect(at, protection)
        t.errno(label, t.ioctl(t.system, "KVM_GET_MSR_INDEX_LIST", at - 4), E.EFAULT)


def protect(address: int, protection: int) -> None:
    """mprotect(2) of a page."""
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, protection)


@case("KVM_GET_MSR_INDEX_LIST", SYSTEM, "list")
def msr_index_list(t: Trial) -> None:
    indices = _msr_list(t, "KVM_GET_MSR_INDEX_LIST")
    for label, index in (("TSC", 0x10), ("SYSENTER_CS", 0x174), ("SYSENTER_ESP", 0x175), ("SYSENTER_EIP", 0x176), ("PAT", 0x277),
                         ("STAR", 0xC0000081), ("LSTAR", 0xC0000082), ("CSTAR", 0xC0000083), ("SYSCALL_MASK", 0xC0000084),
                         ("KERNEL_GS_BASE", 0xC0000102)):
        t.true(f"has {label}", index in indices)


@case("KVM_GET_MSR_FEATURE_INDEX_LIST", SYSTEM, "list", "GET_MSR_FEATURES")
def msr_feature_index_list(t: Trial) -> None:
    indices = _msr_list(t, "KVM_GET_MSR_FEATURE_INDEX_LIST")
    t.true("has IA32_BIOS_SIGN_ID", 0x8B in indices)
    t.note("has IA32_ARCH_CAPABILITIES", 0x10A in indices)


@case("KVM_GET_MSR_INDEX_LIST", SYSTEM, "sign-extended number")
def sign_extension(t: Trial) -> None:
    for name in ("KVM_GET_MSR_INDEX_LIST", "KVM_GET_SUPPORTED_CPUID"):
        data = buffer(8192)
        t.errno(name, ioctl(t.system, sign_extended(BY_NAME[name].number), data), E.E2BIG)


@case("KVM_GET_MSRS", SYSTEM, "feature msrs", "GET_MSR_FEATURES")
def system_msrs(t: Trial) -> None:
    listed = buffer(4 + 4 * 512, struct.pack("<I", 512))
    t.need("the list", t.ioctl(t.system, "KVM_GET_MSR_FEATURE_INDEX_LIST", listed))
    count, = struct.unpack_from("<I", listed)
    indices = struct.unpack_from(f"<{count}I", listed, 4)
    data = buffer(8 + 16 * count, struct.pack("<II", count, 0) + b"".join(struct.pack("<IIQ", i, 0, 0) for i in indices))
    result = t.ioctl(t.system, "KVM_GET_MSRS", data)
    t.equal("every listed one can be read", result.value - count, 0)
    unknown = b"".join(struct.pack("<IIQ", index, 0, 7) for index in (indices[0], 0xDEAD0000, indices[0]))
    stop = buffer(8 + 48, struct.pack("<II", 3, 0) + unknown)
    t.ok("stops at an unknown one", t.ioctl(t.system, "KVM_GET_MSRS", stop), 1)
    t.equal("and leaves the rest", struct.unpack_from("<Q", stop, 8 + 40)[0], 7)
    t.ok("none asked for", t.ioctl(t.system, "KVM_GET_MSRS", buffer(8)), 0)
    t.errno("256 entries", t.ioctl(t.system, "KVM_GET_MSRS", buffer(8 + 16 * 256, struct.pack("<I", 256))), E.E2BIG)
    tsc = buffer(24, struct.pack("<IIIIQ", 1, 0, 0x10, 0, 7))
    t.ok("one of vCPUs only", t.ioctl(t.system, "KVM_GET_MSRS", tsc), 1)
    t.equal("which is 0 here", struct.unpack_from("<Q", tsc, 16)[0], 0)
    t.errno("the entries are unmapped", t.ioctl(t.system, "KVM_GET_MSRS", t.before_hole(struct.pack("<II", 1, 0))), E.EFAULT)


# ---- CPUID --------------------------------------------------------------------------------------------------


def get_cpuid(t: Trial, fd: int, name: str, room: int) -> tuple[Result, list[tuple[int, ...]], int]:
    """The result, the entries (function, index, flags, eax, ebx, ecx, edx, and padding), and nent as it stands."""
    data = buffer(8 + ENTRY * max(room, 1), struct.pack("<II", room, 0))
    result = t.ioctl(fd, name, data)
    nent, = struct.unpack_from("<I", data)
    entries = [struct.unpack_from("<10I", data, 8 + ENTRY * i) for i in range(min(nent, room))] if result.ok else []
    return result, entries, nent


def _cpuid_errors(t: Trial, name: str, count: int) -> None:
    for label, room in (("no room", 0), ("one too few", count - 1)):
        result, _, nent = get_cpuid(t, t.system, name, room)
        t.errno(label, result, E.E2BIG)
        t.equal(f"{label}: nent is not written", nent - room, 0)


@case("KVM_GET_SUPPORTED_CPUID", SYSTEM, "entries", "EXT_CPUID")
def supported_cpuid(t: Trial) -> None:
    name = "KVM_GET_SUPPORTED_CPUID"
    result, entries, nent = get_cpuid(t, t.system, name, 256)
    t.need("256 entries of room", result)
    t.true("nent is told", 0 < nent < 256, nent)
    _cpuid_errors(t, name, nent)
    exact, same, _ = get_cpuid(t, t.system, name, nent)
    t.ok("exactly enough room", exact)
    # Leaf 1's APIC id, 0xb's and the like are the asking CPU's.
    t.equal("the same leaves", [entry[:3] for entry in same] == [entry[:3] for entry in entries], True)
    t.ok("more than 256 is as 256", get_cpuid(t, t.system, name, 300)[0])
    leaves = {entry[0]: entry for entry in entries}
    t.true("no padding", not any(any(entry[7:]) for entry in entries))
    for leaf in (0, 1, 0x40000000, 0x40000001, 0x80000000, 0x80000001, 0x80000008):
        t.true(f"leaf {leaf:#x}", leaf in leaves)
    t.true("leaf 0 knows all basic leaves", max(leaf for leaf in leaves if leaf < 0x40000000) <= leaves[0][3])
    if 0x40000000 in leaves:
        t.equal("KVM's signature", struct.pack("<3I", *leaves[0x40000000][4:7]), b"KVMKVMKVM\0\0\0")
    t.equal("long mode", leaves[0x80000001][6] >> 29 & 1, 1)
    t.errno("the entries are unmapped", t.ioctl(t.system, name, t.before_hole(struct.pack("<II", 256, 0))), E.EFAULT)
    t.true("indexed leaves carry the flag", all(entry[2] & 1 for entry in entries if entry[0] in (4, 7, 0xB, 0xD)))


@case("KVM_GET_EMULATED_CPUID", SYSTEM, "entries", "EXT_EMUL_CPUID")
def emulated_cpuid(t: Trial) -> None:
    name = "KVM_GET_EMULATED_CPUID"
    result, entries, nent = get_cpuid(t, t.system, name, 64)
    t.need("64 entries of room", result)
    t.true("nent is told", 0 < nent < 64, nent)
    t.errno("no room", get_cpuid(t, t.system, name, 0)[0], E.E2BIG)
    t.equal("the leaves", [entry[0] for entry in entries], [0, 1, 7], [0, 1, 7, 0x80000001], [0, 1, 7, 0x80000000, 0x80000001])
    t.true("MOVBE is emulated", entries[1][5] >> 22 & 1)
    dirty = buffer(8 + ENTRY * 64, struct.pack("<II", 64, 0) + b"\0" * 28 + b"\1")
    t.errno("an entry's padding is not 0", t.ioctl(t.system, name, dirty), E.EINVAL)


@case("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM, "entries", "SYS_HYPERV_CPUID")
def supported_hv_cpuid(t: Trial) -> None:
    name = "KVM_GET_SUPPORTED_HV_CPUID"
    result, entries, nent = get_cpuid(t, t.system, name, 64)
    t.need("64 entries of room", result)
    t.errno("no room", get_cpuid(t, t.system, name, 0)[0], E.E2BIG)
    t.errno("one too few", get_cpuid(t, t.system, name, nent - 1)[0], E.E2BIG)
    leaves = [entry[0] for entry in entries]
    t.equal("the leaves", [hex(leaf) for leaf in leaves], [hex(leaf) for leaf in HV_LEAVES])
    t.equal("the interface's signature", struct.pack("<I", entries[1][3]), b"Hv#1")


# ---- attributes and machine checks --------------------------------------------------------------------------


@case("KVM_X86_GET_MCE_CAP_SUPPORTED", SYSTEM, "value", "MCE")
def mce_cap(t: Trial) -> None:
    data = buffer(16, b"\xff" * 16)
    t.need("success", t.ioctl(t.system, "KVM_X86_GET_MCE_CAP_SUPPORTED", data))
    caps, beyond = struct.unpack("<QQ", data)
    t.note("bits", caps)
    t.true("MCG_CTL_P and MCG_SER_P", caps & 0x1000100 == 0x1000100, caps)
    t.equal("8 bytes", beyond, (1 << 64) - 1)
    t.equal("KVM_CAP_MCE is the number of banks", t.has("MCE"), 32)


@case("KVM_HAS_DEVICE_ATTR", SYSTEM, "attributes", "SYS_ATTRIBUTES")
def has_attr(t: Trial) -> None:
    name = "KVM_HAS_DEVICE_ATTR"
    t.ok("XSAVE guest support", t.ioctl(t.system, name, KvmDeviceAttr()))
    t.errno("unknown attribute", t.ioctl(t.system, name, KvmDeviceAttr(attr=1)), E.ENXIO)
    t.errno("unknown group", t.ioctl(t.system, name, KvmDeviceAttr(group=99)), E.ENXIO)


@case("KVM_GET_DEVICE_ATTR", SYSTEM, "xsave guest support", "SYS_ATTRIBUTES")
def get_attr(t: Trial) -> None:
    name, value = "KVM_GET_DEVICE_ATTR", buffer(8)
    attr = KvmDeviceAttr(addr=ctypes.addressof(value))
    t.need("success", t.ioctl(t.system, name, attr))
    supported, = struct.unpack("<Q", value)
    t.equal("x87 and SSE", supported & 3, 3)
    t.errno("unknown attribute", t.ioctl(t.system, name, KvmDeviceAttr(attr=1, addr=ctypes.addressof(value))), E.ENXIO)
    t.errno("unmapped address", t.ioctl(t.system, name, KvmDeviceAttr(addr=BAD_POINTER)), E.EFAULT)
    attr = KvmDeviceAttr(attr=1, addr=BAD_POINTER)
    t.errno("the attribute is looked at first", t.ioctl(t.system, name, attr), E.ENXIO)
