# SPDX-License-Identifier: GPL-2.0-or-later
"""What else a vCPU answers: capabilities, TSC, attributes, statistics, and what only special guests have."""

from __future__ import annotations

import ctypes
import errno as E
import struct

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import KvmDeviceAttr, KvmEnableCap, KvmOneReg, KvmPreFaultMemory, KvmXenVcpuAttr

from .model import Trial, buffer, case
from .vm import check_stats, enable
from .wire import BAD_POINTER, PAGE

VCPU = Level.VCPU


@case("KVM_ENABLE_CAP", VCPU, "errors", "ENABLE_CAP")
def enable_cap(t: Trial) -> None:
    t.errno("unknown capability", t.ioctl(t.vcpu, "KVM_ENABLE_CAP", KvmEnableCap(cap=99999)), E.EINVAL)
    t.errno("one of the VM", enable(t, t.vcpu, "EXCEPTION_PAYLOAD", 1), E.EINVAL)
    t.errno("flags", enable(t, t.vcpu, "ENFORCE_PV_FEATURE_CPUID", 1, flags=1), E.EINVAL)
    t.errno("SynIC without an irqchip", enable(t, t.vcpu, "HYPERV_SYNIC"), E.EINVAL)


@case("KVM_ENABLE_CAP", VCPU, "enforce pv feature cpuid", "ENABLE_CAP", "ENFORCE_PV_FEATURE_CPUID")
def enforce_pv(t: Trial) -> None:
    t.ok("on", enable(t, t.vcpu, "ENFORCE_PV_FEATURE_CPUID", 1))
    t.ok("off", enable(t, t.vcpu, "ENFORCE_PV_FEATURE_CPUID", 0))


@case("KVM_GET_TSC_KHZ", VCPU, "value", "GET_TSC_KHZ")
def get_tsc_khz(t: Trial) -> None:
    result = t.ioctl(t.vcpu, "KVM_GET_TSC_KHZ")
    t.ok("success", result, None)
    t.true("above 100 MHz", result.value > 100_000, result.value)


@case("KVM_SET_TSC_KHZ", VCPU, "value", "TSC_CONTROL")
def set_tsc_khz(t: Trial) -> None:
    t.ok("0 is the host's", t.ioctl(t.vcpu, "KVM_SET_TSC_KHZ", 0))
    t.ok("1 GHz", t.ioctl(t.vcpu, "KVM_SET_TSC_KHZ", 1_000_000))
    t.ok("read back", t.ioctl(t.vcpu, "KVM_GET_TSC_KHZ"), 1_000_000)
    t.errno("too fast", t.ioctl(t.vcpu, "KVM_SET_TSC_KHZ", 0xFFFFFFFF), E.EINVAL)


# ---- attributes ---------------------------------------------------------------------------------------------


@case("KVM_HAS_DEVICE_ATTR", VCPU, "tsc offset", "VCPU_ATTRIBUTES")
def has_attr(t: Trial) -> None:
    name = "KVM_HAS_DEVICE_ATTR"
    t.ok("TSC offset", t.ioctl(t.vcpu, name, KvmDeviceAttr()))
    t.errno("unknown attribute", t.ioctl(t.vcpu, name, KvmDeviceAttr(attr=1)), E.ENXIO)
    t.errno("unknown group", t.ioctl(t.vcpu, name, KvmDeviceAttr(group=1)), E.ENXIO)


@case("KVM_GET_DEVICE_ATTR", VCPU, "tsc offset", "VCPU_ATTRIBUTES")
def get_attr(t: Trial) -> None:
    value = buffer(8)
    at = ctypes.addressof(value)
    t.ok("success", t.ioctl(t.vcpu, "KVM_GET_DEVICE_ATTR", KvmDeviceAttr(addr=at)))
    t.errno("unmapped address", t.ioctl(t.vcpu, "KVM_GET_DEVICE_ATTR", KvmDeviceAttr(addr=BAD_POINTER)), E.EFAULT)
    t.errno("unknown attribute", t.ioctl(t.vcpu, "KVM_GET_DEVICE_ATTR", KvmDeviceAttr(attr=5, addr=at)), E.ENXIO)
    t.errno("unknown group", t.ioctl(t.vcpu, "KVM_GET_DEVICE_ATTR", KvmDeviceAttr(group=5, addr=BAD_POINTER)), E.ENXIO)


@case("KVM_SET_DEVICE_ATTR", VCPU, "tsc offset", "VCPU_ATTRIBUTES")
def set_attr(t: Trial) -> None:
    value = buffer(8, struct.pack("<q", -123456789))
    attr = KvmDeviceAttr(addr=ctypes.addressof(value))
    t.ok("set", t.ioctl(t.vcpu, "KVM_SET_DEVICE_ATTR", attr))
    struct.pack_into("<q", value, 0, 0)
    t.ok("get", t.ioctl(t.vcpu, "KVM_GET_DEVICE_ATTR", attr))
    t.equal("read back", struct.unpack("<q", value)[0], -123456789)
    t.errno("unmapped address", t.ioctl(t.vcpu, "KVM_SET_DEVICE_ATTR", KvmDeviceAttr(addr=BAD_POINTER)), E.EFAULT)
    t.errno("unknown attribute", t.ioctl(t.vcpu, "KVM_SET_DEVICE_ATTR", KvmDeviceAttr(attr=5, addr=BAD_POINTER)), E.ENXIO)


@case("KVM_GET_STATS_FD", VCPU, "contents", "BINARY_STATS_FD")
def stats(t: Trial) -> None:
    check_stats(t, t.vcpu, "kvm-")


# ---- special guests -----------------------------------------------------------------------------------------


@case("KVM_GET_NESTED_STATE", VCPU, "size", "NESTED_STATE")
def get_nested(t: Trial) -> None:
    small = buffer(128, struct.pack("<HHI", 0, 0, 0))
    t.errno("no room", t.ioctl(t.vcpu, "KVM_GET_NESTED_STATE", small), E.E2BIG)
    needed, = struct.unpack_from("<I", small, 4)
    t.true("the size that is needed", 128 <= needed <= t.has("NESTED_STATE"), needed)
    data = buffer(t.has("NESTED_STATE"), struct.pack("<HHI", 0, 0, t.has("NESTED_STATE")))
    t.ok("room", t.ioctl(t.vcpu, "KVM_GET_NESTED_STATE", data))


@case("KVM_SET_NESTED_STATE", VCPU, "errors", "NESTED_STATE")
def set_nested(t: Trial) -> None:
    t.errno("size below the header", t.ioctl(t.vcpu, "KVM_SET_NESTED_STATE", buffer(128, struct.pack("<HHI", 0, 0, 64))), E.EINVAL)
    t.errno("unknown flag", t.ioctl(t.vcpu, "KVM_SET_NESTED_STATE", buffer(128, struct.pack("<HHI", 1 << 15, 0, 128))), E.EINVAL)


@case("KVM_GET_ONE_REG", VCPU, "errors", "ONE_REG")
def get_one_reg(t: Trial) -> None:
    value = buffer(16)
    t.errno("id 0", t.ioctl(t.vcpu, "KVM_GET_ONE_REG", KvmOneReg(addr=ctypes.addressof(value))), E.EINVAL, E.ENOENT)


@case("KVM_SET_ONE_REG", VCPU, "errors", "ONE_REG")
def set_one_reg(t: Trial) -> None:
    value = buffer(16)
    t.errno("id 0", t.ioctl(t.vcpu, "KVM_SET_ONE_REG", KvmOneReg(addr=ctypes.addressof(value))), E.EINVAL, E.ENOENT)


@case("KVM_GET_REG_LIST", VCPU, "room", "ONE_REG")
def reg_list(t: Trial) -> None:
    data = buffer(8 + 8 * 64, struct.pack("<Q", 64))
    t.ok("room for 64", t.ioctl(t.vcpu, "KVM_GET_REG_LIST", data))
    t.true("the count", struct.unpack_from("<Q", data)[0] <= 64)


@case("KVM_XEN_VCPU_GET_ATTR", VCPU, "errors", "XEN_HVM")
def xen_get(t: Trial) -> None:
    t.errno("unknown type", t.ioctl(t.vcpu, "KVM_XEN_VCPU_GET_ATTR", KvmXenVcpuAttr(type=0x77)), E.ENOENT, E.EINVAL)


@case("KVM_XEN_VCPU_SET_ATTR", VCPU, "errors", "XEN_HVM")
def xen_set(t: Trial) -> None:
    t.errno("unknown type", t.ioctl(t.vcpu, "KVM_XEN_VCPU_SET_ATTR", KvmXenVcpuAttr(type=0x77)), E.ENOENT, E.EINVAL)


@case("KVM_PRE_FAULT_MEMORY", VCPU, "errors", "PRE_FAULT_MEMORY")
def pre_fault(t: Trial) -> None:
    name = "KVM_PRE_FAULT_MEMORY"
    for label, gpa, size, flags in (("flags", 0, PAGE, 1), ("size 0", 0, 0, 0), ("inside a page", 8, PAGE, 0),
                                    ("size inside a page", 0, 100, 0)):
        t.errno(label, t.ioctl(t.vcpu, name, KvmPreFaultMemory(gpa=gpa, size=size, flags=flags)), E.EINVAL)
    t.errno("a range that wraps", t.ioctl(t.vcpu, name, KvmPreFaultMemory(gpa=(1 << 64) - PAGE, size=PAGE)), E.EINVAL)
    t.errno("no memory", t.ioctl(t.vcpu, name, KvmPreFaultMemory(size=PAGE)), E.ENOENT)


@case("KVM_PRE_FAULT_MEMORY", VCPU, "ranges", "PRE_FAULT_MEMORY")
def pre_fault_ranges(t: Trial) -> None:
    """What is left is told, and an error only when nothing was done."""
    name = "KVM_PRE_FAULT_MEMORY"
    t.need("slot", t.slot(t.vm, 0, 2 * PAGE, t.memory(4 * PAGE)))
    for label, gpa, size, left in (("all of it", 2, 4, 0), ("inside", 3, 1, 0), ("beyond the end", 4, 3, 1)):
        request = KvmPreFaultMemory(gpa=gpa * PAGE, size=size * PAGE)
        t.ok(label, t.ioctl(t.vcpu, name, request))
        t.equal(f"{label}: what is left", (request.gpa, request.size), ((gpa + size - left) * PAGE, left * PAGE))
    request = KvmPreFaultMemory(gpa=PAGE, size=2 * PAGE)
    t.errno("from before the slot", t.ioctl(t.vcpu, name, request), E.ENOENT)
    t.equal("from before the slot: what is left", (request.gpa, request.size), (PAGE, 2 * PAGE))


@case("KVM_MEMORY_ENCRYPT_OP", VCPU, "in a plain vm")
def encrypt_op(t: Trial) -> None:
    """Kernels before TDX do not know it on a vCPU."""
    t.errno("any command", t.ioctl(t.vcpu, "KVM_MEMORY_ENCRYPT_OP", buffer(64, b"\xff" * 4)), E.EINVAL, E.ENOTTY)
