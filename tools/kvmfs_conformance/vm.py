# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM: vCPUs, capabilities, clock, MSR filter, statistics, coalesced zones, and what only special guests have."""

from __future__ import annotations

import ctypes
import errno as E
import fcntl
import os
import struct

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmClockData,
    KvmCoalescedMmioZone,
    KvmEnableCap,
    KvmEncRegion,
    KvmHypervEventfd,
    KvmMsrFilter,
    KvmMsrFilterRange,
    KvmPmuEventFilter,
    KvmXenHvmAttr,
    KvmXenHvmConfig,
)

from .model import Skip, Trial, buffer, case
from .wire import BAD_POINTER, Result

VM = Level.VM


@case("KVM_CREATE_VCPU", VM, "descriptor")
def create_vcpu(t: Trial) -> None:
    vm = t.vm
    lowest = os.dup(vm)
    os.close(lowest)
    vcpu = t.fd("id 0", t.ioctl(vm, "KVM_CREATE_VCPU", 0))
    t.equal("the lowest free number", vcpu - lowest, 0)
    t.true("close-on-exec", fcntl.fcntl(vcpu, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    t.true("named kvm-vcpu:0", "kvm-vcpu:0" in os.readlink(f"/proc/self/fd/{vcpu}"))
    t.fd("id 7", t.ioctl(vm, "KVM_CREATE_VCPU", 7))
    run = t.kvm_run(vcpu)
    t.equal("exit reason at first", run.exit_reason, 0)
    run.immediate_exit = 1
    t.equal("the mapping can be written", run.immediate_exit, 1)


@case("KVM_CREATE_VCPU", VM, "errors")
def create_vcpu_errors(t: Trial) -> None:
    name, limit = "KVM_CREATE_VCPU", t.has("MAX_VCPU_ID")
    t.errno("id at the limit", t.ioctl(t.vm, name, limit), E.EINVAL)
    t.errno("id of 32 bits", t.ioctl(t.vm, name, 0xFFFFFFFF), E.EINVAL)
    t.errno("id above 32 bits", t.ioctl(t.vm, name, 1 << 32), E.EINVAL)
    t.fd("id 3", t.ioctl(t.vm, name, 3))
    t.errno("id 3 again", t.ioctl(t.vm, name, 3), E.EEXIST)
    t.fd("the highest id", t.ioctl(t.vm, name, limit - 1))


@case("KVM_CREATE_VCPU", VM, "descriptors outlive the vm's")
def vcpu_outlives(t: Trial) -> None:
    vm = t.new_vm()
    vcpu = t.new_vcpu(vm)
    os.close(vm)
    t.ok("the vCPU answers", t.ioctl(vcpu, "KVM_GET_REGS", buffer(144)))


@case("KVM_CREATE_VCPU", VM, "another process")
def other_process(t: Trial) -> None:
    """Another address space than the one that made the VM: EIO."""
    vm, vcpu = t.vm, t.vcpu
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answers = [t.ioctl(vm, "KVM_CREATE_VCPU", 1), t.ioctl(vcpu, "KVM_GET_REGS", buffer(144)),
                       t.ioctl(vm, "KVM_CHECK_EXTENSION", 0), t.ioctl(vcpu, 0xAEFF)]
            os.write(writer, struct.pack("<8i", *(x for a in answers for x in (a.value, a.errno))))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    numbers = struct.unpack("<8i", data) if len(data) == 32 else (0,) * 8
    for i, label in enumerate(("VM", "vCPU", "CHECK_EXTENSION too", "unknown number too")):
        t.errno(label, Result(*numbers[2 * i:2 * i + 2]), E.EIO)
    t.ok("the owner goes on", t.ioctl(vcpu, "KVM_GET_REGS", buffer(144)))


@case("KVM_CHECK_EXTENSION", VM, "as the node", "CHECK_EXTENSION_VM")
def vm_check_extension(t: Trial) -> None:
    for name, number in CAPS.items():
        answer = t.ioctl(t.vm, "KVM_CHECK_EXTENSION", number)
        if answer.value != t.node.caps[number]:
            t.equal(name, answer.value, t.node.caps[number])
    t.ok("unknown", t.ioctl(t.vm, "KVM_CHECK_EXTENSION", 100000), 0)


@case("KVM_SET_BOOT_CPU_ID", VM, "before and after a vcpu", "SET_BOOT_CPU_ID")
def boot_cpu_id(t: Trial) -> None:
    name = "KVM_SET_BOOT_CPU_ID"
    t.ok("1", t.ioctl(t.vm, name, 1))
    t.errno("too large", t.ioctl(t.vm, name, t.has("MAX_VCPU_ID") + 1), E.EINVAL)
    t.ok("0", t.ioctl(t.vm, name, 0))
    t.need("a vCPU", t.ioctl(t.vcpu, "KVM_GET_MP_STATE", buffer(4)))
    t.errno("after the first vCPU", t.ioctl(t.vm, name, 0), E.EBUSY)
    t.errno("which is looked at first", t.ioctl(t.vm, name, 1 << 20), E.EBUSY)


# ---- clock --------------------------------------------------------------------------------------------------


@case("KVM_GET_CLOCK", VM, "it goes on", "ADJUST_CLOCK")
def get_clock(t: Trial) -> None:
    first, second = KvmClockData(), KvmClockData()
    t.need("once", t.ioctl(t.vm, "KVM_GET_CLOCK", first))
    t.need("twice", t.ioctl(t.vm, "KVM_GET_CLOCK", second))
    t.true("never backwards", second.clock >= first.clock, (first.clock, second.clock))
    t.true("below a second after the VM was made", first.clock < 1_000_000_000, first.clock)
    t.true("only known flags", not first.flags & ~0xE)
    t.true("the flags that KVM_CAP_ADJUST_CLOCK announces", not first.flags & ~t.has("ADJUST_CLOCK"))


@case("KVM_SET_CLOCK", VM, "set and errors", "ADJUST_CLOCK")
def set_clock(t: Trial) -> None:
    hour = 3600 * 10**9
    t.ok("an hour", t.ioctl(t.vm, "KVM_SET_CLOCK", KvmClockData(clock=hour)))
    now = KvmClockData()
    t.need("read", t.ioctl(t.vm, "KVM_GET_CLOCK", now))
    t.true("it is read back", hour <= now.clock < hour + 10**10, now.clock)
    t.ok("what was read is accepted", t.ioctl(t.vm, "KVM_SET_CLOCK", now))
    t.errno("unknown flag", t.ioctl(t.vm, "KVM_SET_CLOCK", KvmClockData(flags=1 << 5)), E.EINVAL)
    t.errno("flag 1", t.ioctl(t.vm, "KVM_SET_CLOCK", KvmClockData(flags=1)), E.EINVAL)


@case("KVM_SET_TSC_KHZ", VM, "default of later vcpus", "VM_TSC_CONTROL")
def vm_set_tsc_khz(t: Trial) -> None:
    t.ok("1 GHz", t.ioctl(t.vm, "KVM_SET_TSC_KHZ", 1_000_000))
    t.ok("read back", t.ioctl(t.vm, "KVM_GET_TSC_KHZ"), 1_000_000)
    t.errno("too fast", t.ioctl(t.vm, "KVM_SET_TSC_KHZ", 0xFFFFFFFF), E.EINVAL)
    t.ok("0 is the host's", t.ioctl(t.vm, "KVM_SET_TSC_KHZ", 0))


@case("KVM_GET_TSC_KHZ", VM, "the host's at first", "VM_TSC_CONTROL")
def vm_get_tsc_khz(t: Trial) -> None:
    khz = t.ioctl(t.vm, "KVM_GET_TSC_KHZ")
    t.ok("success", khz, None)
    t.true("above 100 MHz", khz.value > 100_000, khz.value)


# ---- capabilities -------------------------------------------------------------------------------------------


def enable(t: Trial, fd: int, cap: str, arg: int = 0, flags: int = 0) -> Result:
    """KVM_ENABLE_CAP."""
    argument = KvmEnableCap(cap=CAPS[f"KVM_CAP_{cap}"], flags=flags)
    argument.args[0] = arg
    return t.ioctl(fd, "KVM_ENABLE_CAP", argument)


@case("KVM_ENABLE_CAP", VM, "errors", "ENABLE_CAP_VM")
def enable_cap_errors(t: Trial) -> None:
    t.errno("unknown capability", t.ioctl(t.vm, "KVM_ENABLE_CAP", KvmEnableCap(cap=99999)), E.EINVAL)
    t.errno("one that cannot be enabled", enable(t, t.vm, "USER_MEMORY"), E.EINVAL)
    t.errno("flags", enable(t, t.vm, "EXCEPTION_PAYLOAD", 1, flags=1), E.EINVAL)
    t.errno("one of vCPUs", enable(t, t.vm, "HYPERV_SYNIC"), E.EINVAL)


HAS = -1            # the value that CHECK_EXTENSION gives: all of it
# Capability, values that are accepted, values that are not (where it is announced).
_ENABLE: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("EXCEPTION_PAYLOAD", (1, 0), ()),
    ("X86_TRIPLE_FAULT_EVENT", (1, 0), ()),
    ("MSR_PLATFORM_INFO", (0, 1), ()),
    ("DISABLE_QUIRKS", (0, 1, 1 << 40), ()),
    ("DISABLE_QUIRKS2", (0, HAS), (1 << 40,)),
    ("X2APIC_API", (1, 3), (4, 1 << 32)),
    ("X86_DISABLE_EXITS", (0, 2), (1 << 8, 1 << 32)),
    ("X86_USER_SPACE_MSR", (1, 7, 0), (8, 1 << 32)),
    ("EXIT_HYPERCALL", (1 << 12, 0), (1, 1 << 32)),
    ("EXIT_ON_EMULATION_FAILURE", (1, 0), (2,)),
    ("HALT_POLL", (0, 1000), (1 << 32,)),
    ("X86_BUS_LOCK_EXIT", (1, 2), (3, 4)),
    ("VM_DISABLE_NX_HUGE_PAGES", (0,), (1,)),
    ("PMU_CAPABILITY", (0, 1), (2,)),
)


def _enable_one(cap: str, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    @case("KVM_ENABLE_CAP", VM, cap.lower().replace("_", " "), "ENABLE_CAP_VM", cap)
    def run(t: Trial) -> None:
        for value in good:
            if value == HAS:
                t.ok("all that is announced", enable(t, t.vm, cap, t.has(cap)))
            else:
                t.ok(f"{value:#x}", enable(t, t.vm, cap, value))
        for value in bad:
            t.errno(f"{value:#x}", enable(t, t.vm, cap, value), E.EINVAL)
        t.errno("flags", enable(t, t.vm, cap, good[0], flags=1), E.EINVAL)


for _row in _ENABLE:
    _enable_one(*_row)


@case("KVM_ENABLE_CAP", VM, "max vcpu id", "ENABLE_CAP_VM")
def enable_max_vcpu_id(t: Trial) -> None:
    t.errno("above KVM_CAP_MAX_VCPU_ID", enable(t, t.vm, "MAX_VCPU_ID", t.has("MAX_VCPU_ID") + 1), E.EINVAL)
    if not t.has("X86_TRIPLE_FAULT_EVENT"):
        raise Skip("kernels before 6.0 do not let it be set")       # both came with that one
    t.ok("8", enable(t, t.vm, "MAX_VCPU_ID", 8))
    t.ok("8 again", enable(t, t.vm, "MAX_VCPU_ID", 8))
    t.errno("only once", enable(t, t.vm, "MAX_VCPU_ID", 9), E.EINVAL)
    t.errno("vCPU 8", t.ioctl(t.vm, "KVM_CREATE_VCPU", 8), E.EINVAL)
    t.fd("vCPU 7", t.ioctl(t.vm, "KVM_CREATE_VCPU", 7))


@case("KVM_ENABLE_CAP", VM, "split irqchip", "ENABLE_CAP_VM", "SPLIT_IRQCHIP")
def enable_split_irqchip(t: Trial) -> None:
    t.errno("too many pins", enable(t, t.vm, "SPLIT_IRQCHIP", 4097), E.EINVAL)
    t.ok("24 pins", enable(t, t.vm, "SPLIT_IRQCHIP", 24))
    t.errno("again", enable(t, t.vm, "SPLIT_IRQCHIP", 24), E.EEXIST)
    t.errno("KVM_CREATE_IRQCHIP", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"), E.EEXIST)
    t.errno("there is no PIC", t.ioctl(t.vm, "KVM_CREATE_PIT"), E.ENOENT)


# ---- MSR filter ---------------------------------------------------------------------------------------------


def _filter(t: Trial, flags: int, *ranges: tuple[int, int, int, int]) -> Result:
    argument = KvmMsrFilter(flags=flags)
    for i, (range_flags, base, count, bitmap) in enumerate(ranges):
        argument.ranges[i] = KvmMsrFilterRange(flags=range_flags, base=base, nmsrs=count, bitmap=bitmap)
    return t.ioctl(t.vm, "KVM_X86_SET_MSR_FILTER", argument)


@case("KVM_X86_SET_MSR_FILTER", VM, "filters", "X86_MSR_FILTER")
def msr_filter(t: Trial) -> None:
    data = buffer(0x600)
    bitmap = ctypes.addressof(data)
    t.ok("all allowed", _filter(t, 0))
    t.ok("one range", _filter(t, 0, (3, 0x174, 3, bitmap)))
    t.ok("denied but for a range", _filter(t, 1, (1, 0x174, 3, bitmap)))
    t.ok("16 ranges", _filter(t, 0, *((3, 0x1000 * i, 64, bitmap) for i in range(16))))
    t.ok("the largest range", _filter(t, 0, (3, 0, 0x600 * 8, bitmap)))
    t.errno("unknown flag", _filter(t, 2), E.EINVAL)
    t.errno("denied and no range", _filter(t, 1), E.EINVAL)
    t.errno("range without read or write", _filter(t, 0, (0, 0, 1, bitmap)), E.EINVAL)
    t.errno("unknown flag of a range", _filter(t, 0, (4, 0, 1, bitmap)), E.EINVAL)
    t.errno("range too large", _filter(t, 0, (3, 0, 0x600 * 8 + 1, bitmap)), E.EINVAL)
    t.errno("unmapped bitmap", _filter(t, 0, (3, 0, 1, BAD_POINTER)), E.EFAULT)
    t.errno("flags before bitmap", _filter(t, 0, (4, 0, 1, BAD_POINTER)), E.EINVAL)
    t.ok("an empty range's flags are not looked at", _filter(t, 0, (4, 0, 0, BAD_POINTER)))


# ---- statistics ---------------------------------------------------------------------------------------------


def check_stats(t: Trial, fd: int, prefix: str) -> None:
    """The descriptor of KVM_GET_STATS_FD: header, id, descriptors, data (api.rst 4.133)."""
    stats = t.fd("descriptor", t.ioctl(fd, "KVM_GET_STATS_FD"))
    flags, name_size, count, id_offset, desc_offset, data_offset = struct.unpack("<6I", os.pread(stats, 24, 0))
    t.equal("flags", flags, 0)
    t.true("there are statistics", 0 < count < 1000, count)
    t.equal("name size", name_size, 48)
    identity = os.pread(stats, name_size, id_offset).rstrip(b"\0").decode()
    t.true(f"id begins with {prefix}", identity.startswith(prefix), identity)
    size = 16 + name_size
    block = os.pread(stats, size * count, desc_offset)
    t.equal("all descriptors can be read", len(block) - size * count, 0)
    total, names = 0, []
    for i in range(count):
        _, _, length, offset, _ = struct.unpack_from("<IhHII", block, size * i)
        names.append(block[size * i + 16:size * (i + 1)].rstrip(b"\0").decode())
        total = max(total, offset + 8 * length)
    t.equal("no name twice", len(names) - len(set(names)), 0)
    t.equal("all data can be read", len(os.pread(stats, total, data_offset)) - total, 0)
    t.equal("nothing beyond it", os.pread(stats, 8, data_offset + total), b"")
    t.true("read(2) goes on by itself", os.read(stats, 4) + os.read(stats, 4) == os.pread(stats, 8, 0))
    try:
        os.write(stats, b"x")
        outcome = "success"
    except OSError as error:
        outcome = E.errorcode.get(error.errno or 0, "?")
    t.true("it cannot be written", outcome in ("EBADF", "EINVAL"), outcome)


@case("KVM_GET_STATS_FD", VM, "contents", "BINARY_STATS_FD")
def vm_stats(t: Trial) -> None:
    check_stats(t, t.vm, "kvm-")


# ---- coalesced zones ----------------------------------------------------------------------------------------


@case("KVM_REGISTER_COALESCED_MMIO", VM, "zones", "COALESCED_MMIO")
def coalesced(t: Trial) -> None:
    name = "KVM_REGISTER_COALESCED_MMIO"
    t.equal("KVM_CAP_COALESCED_MMIO is the ring's page", t.has("COALESCED_MMIO"), 2)
    t.ok("MMIO", t.ioctl(t.vm, name, KvmCoalescedMmioZone(addr=0xB8000, size=0x1000)))
    t.ok("the same again", t.ioctl(t.vm, name, KvmCoalescedMmioZone(addr=0xB8000, size=0x1000)))
    if t.has("COALESCED_PIO"):
        t.ok("ports", t.ioctl(t.vm, name, KvmCoalescedMmioZone(addr=0x80, size=1, pio=1)))
    t.errno("neither", t.ioctl(t.vm, name, KvmCoalescedMmioZone(addr=0x80, size=1, pio=2)), E.EINVAL)


@case("KVM_UNREGISTER_COALESCED_MMIO", VM, "zones", "COALESCED_MMIO")
def coalesced_off(t: Trial) -> None:
    name, zone = "KVM_UNREGISTER_COALESCED_MMIO", KvmCoalescedMmioZone(addr=0xB8000, size=0x1000)
    t.ok("what was never registered", t.ioctl(t.vm, name, zone))
    t.need("register", t.ioctl(t.vm, "KVM_REGISTER_COALESCED_MMIO", zone))
    t.ok("unregister", t.ioctl(t.vm, name, zone))
    t.ok("again", t.ioctl(t.vm, name, zone))
    t.errno("neither MMIO nor ports", t.ioctl(t.vm, name, KvmCoalescedMmioZone(addr=0x80, size=1, pio=2)), E.EINVAL)


# ---- special guests -----------------------------------------------------------------------------------------


@case("KVM_SET_PMU_EVENT_FILTER", VM, "errors", "PMU_EVENT_FILTER")
def pmu_filter(t: Trial) -> None:
    name = "KVM_SET_PMU_EVENT_FILTER"
    t.errno("unknown action", t.ioctl(t.vm, name, KvmPmuEventFilter(action=2)), E.EINVAL)
    t.errno("unknown flag", t.ioctl(t.vm, name, KvmPmuEventFilter(flags=2)), E.EINVAL)
    t.errno("over 300 events", t.ioctl(t.vm, name, KvmPmuEventFilter(nevents=301)), E.E2BIG)
    t.ok("none allowed", t.ioctl(t.vm, name, KvmPmuEventFilter()))


@case("KVM_HYPERV_EVENTFD", VM, "errors", "HYPERV_EVENTFD")
def hyperv_eventfd(t: Trial) -> None:
    name = "KVM_HYPERV_EVENTFD"
    t.errno("unknown flag", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=-1, flags=2)), E.EINVAL)
    t.errno("connection id too large", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1 << 24, fd=-1)), E.EINVAL)
    t.errno("no descriptor", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=-1)), E.EBADF)
    t.errno("deassign what is not", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=-1, flags=1)), E.ENOENT)


@case("KVM_XEN_HVM_CONFIG", VM, "errors", "XEN_HVM")
def xen_config(t: Trial) -> None:
    t.errno("unknown flag", t.ioctl(t.vm, "KVM_XEN_HVM_CONFIG", KvmXenHvmConfig(flags=1 << 31)), E.EINVAL)
    t.ok("empty", t.ioctl(t.vm, "KVM_XEN_HVM_CONFIG", KvmXenHvmConfig()))


@case("KVM_XEN_HVM_GET_ATTR", VM, "errors", "XEN_HVM")
def xen_get(t: Trial) -> None:
    t.errno("unknown type", t.ioctl(t.vm, "KVM_XEN_HVM_GET_ATTR", KvmXenHvmAttr(type=0x77)), E.ENOENT)


@case("KVM_XEN_HVM_SET_ATTR", VM, "errors", "XEN_HVM")
def xen_set(t: Trial) -> None:
    t.errno("unknown type", t.ioctl(t.vm, "KVM_XEN_HVM_SET_ATTR", KvmXenHvmAttr(type=0x77)), E.ENOENT)


@case("KVM_XEN_HVM_EVTCHN_SEND", VM, "errors", "XEN_HVM")
def xen_send(t: Trial) -> None:
    t.errno("port 0", t.ioctl(t.vm, "KVM_XEN_HVM_EVTCHN_SEND", buffer(12)), E.EINVAL)


@case("KVM_MEMORY_ENCRYPT_OP", VM, "in a plain vm")
def encrypt_op(t: Trial) -> None:
    """Without SEV: ENOTTY; with it a plain VM is EINVAL, and a bad pointer EFAULT."""
    t.errno("an unknown command", t.ioctl(t.vm, "KVM_MEMORY_ENCRYPT_OP", buffer(64, b"\xff" * 4)), E.ENOTTY, E.EINVAL)
    t.errno("NULL", t.ioctl(t.vm, "KVM_MEMORY_ENCRYPT_OP", 0), E.ENOTTY, E.EINVAL, E.EFAULT)


@case("KVM_MEMORY_ENCRYPT_REG_REGION", VM, "in a plain vm")
def encrypt_region(t: Trial) -> None:
    """The pointer is looked at before it is known that there is no such operation."""
    region = KvmEncRegion(addr=0x1000, size=0x1000)
    t.errno("register", t.ioctl(t.vm, "KVM_MEMORY_ENCRYPT_REG_REGION", region), E.ENOTTY, E.EINVAL)
    t.equal("the caller's struct is unchanged", (region.addr, region.size), (0x1000, 0x1000))


@case("KVM_MEMORY_ENCRYPT_UNREG_REGION", VM, "in a plain vm")
def encrypt_unregion(t: Trial) -> None:
    region = KvmEncRegion(addr=0x1000, size=0x1000)
    t.errno("unregister", t.ioctl(t.vm, "KVM_MEMORY_ENCRYPT_UNREG_REGION", region), E.ENOTTY, E.EINVAL)
    t.equal("the caller's struct is unchanged", (region.addr, region.size), (0x1000, 0x1000))
