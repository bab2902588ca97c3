# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM and its Hyper-V part offer to guests that know them: registers, hypercalls, exits."""

from __future__ import annotations

import errno as E
import os
import struct

from kvmfs.abi import hyperv as H
from kvmfs.abi import msrs as M
from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import KvmHypervEventfd, KvmRun

from .model import Trial, case
from .system import get_cpuid
from .vcpu_cpuid import msrs, set_cpuid2, set_supported_cpuid
from .vcpu_run import EXIT_HLT, real_mode, registers
from .vm import enable
from .wire import Memory

VM, VCPU = Level.VM, Level.VCPU
EXIT_SYSTEM_EVENT, EXIT_HYPERV = 24, 27
CRASH, RESET = 3, 2
HYPERV_SYNIC_EXIT, HYPERV_HCALL_EXIT = 1, 2
OS_ID = 0x8100 << 48
PAGE_GPA = 0x3000
KVM_LEAVES = range(0x40000000, 0x40000100)


def _set(t: Trial, index: int, value: int) -> int:
    """How many KVM_SET_MSRS has written: 1, or 0 where the value is refused."""
    return msrs(t, t.vcpu, "KVM_SET_MSRS", [(index, value)])[0].value


def _get(t: Trial, index: int) -> int | None:
    result, values = msrs(t, t.vcpu, "KVM_GET_MSRS", [(index, 0)])
    return values[0] if result.value == 1 else None


def _memory(t: Trial) -> Memory:
    memory = t.memory(16 * 4096)
    t.need("memory", t.slot(t.vm, 0, 0, memory))
    return memory


def _vcpu_with_irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    set_supported_cpuid(t, t.vcpu)


def show_hyperv(t: Trial) -> None:
    """The vCPU gets CPUID with Hyper-V's leaves in the place of KVM's."""
    result, entries, _ = get_cpuid(t, t.system, "KVM_GET_SUPPORTED_CPUID", 256)
    t.need("KVM_GET_SUPPORTED_CPUID", result)
    result, leaves, _ = get_cpuid(t, t.vcpu, "KVM_GET_SUPPORTED_HV_CPUID", 64)
    t.need("KVM_GET_SUPPORTED_HV_CPUID", result)
    t.need("KVM_SET_CPUID2", set_cpuid2(t, t.vcpu, [e for e in entries if e[0] not in KVM_LEAVES] + list(leaves)))


# ---- KVM's own ----------------------------------------------------------------------------------------------


@case("KVM_SET_MSRS", VCPU, "async page faults", "ASYNC_PF", "ASYNC_PF_INT", "IRQCHIP")
def async_pf(t: Trial) -> None:
    _vcpu_with_irqchip(t)
    _memory(t)
    t.equal("a vector", _set(t, M.MSR_KVM_ASYNC_PF_INT, 0xF3), 1)
    t.equal("which is read back", _get(t, M.MSR_KVM_ASYNC_PF_INT), 0xF3)
    t.equal("no vector", _set(t, M.MSR_KVM_ASYNC_PF_INT, 0x100), 0)
    t.equal("enable, by interrupt", _set(t, M.MSR_KVM_ASYNC_PF_EN, PAGE_GPA | 9), 1)
    t.equal("which is read back", _get(t, M.MSR_KVM_ASYNC_PF_EN), PAGE_GPA | 9)
    t.equal("reserved bits", _set(t, M.MSR_KVM_ASYNC_PF_EN, PAGE_GPA | 0x10), 0)
    t.equal("where no memory is", _set(t, M.MSR_KVM_ASYNC_PF_EN, 0x40000000 | 9), 0)
    t.equal("acknowledge", (_set(t, M.MSR_KVM_ASYNC_PF_ACK, 1), _get(t, M.MSR_KVM_ASYNC_PF_ACK)), (1, 0))


@case("KVM_SET_MSRS", VCPU, "async page faults without a lapic", "ASYNC_PF", "ASYNC_PF_INT")
def async_pf_no_lapic(t: Trial) -> None:
    set_supported_cpuid(t, t.vcpu)
    t.equal("off", _set(t, M.MSR_KVM_ASYNC_PF_EN, 0), 1)
    t.equal("on", _set(t, M.MSR_KVM_ASYNC_PF_EN, PAGE_GPA | 1), 0)
    t.equal("a vector", _set(t, M.MSR_KVM_ASYNC_PF_INT, 0xF3), 0)


@case("KVM_SET_MSRS", VCPU, "paravirtual eoi", "IRQCHIP")
def pv_eoi(t: Trial) -> None:
    _vcpu_with_irqchip(t)
    _memory(t)
    t.equal("enable", _set(t, M.MSR_KVM_PV_EOI_EN, PAGE_GPA | 1), 1)
    t.equal("which is read back", _get(t, M.MSR_KVM_PV_EOI_EN), PAGE_GPA | 1)
    t.equal("not aligned", _set(t, M.MSR_KVM_PV_EOI_EN, PAGE_GPA | 3), 0)
    t.equal("where no memory is", _set(t, M.MSR_KVM_PV_EOI_EN, 0x40000001), 0)
    t.equal("it stays as it was", _get(t, M.MSR_KVM_PV_EOI_EN), PAGE_GPA | 1)
    t.equal("off", _set(t, M.MSR_KVM_PV_EOI_EN, 0), 1)


@case("KVM_SET_MSRS", VCPU, "poll control")
def poll_control(t: Trial) -> None:
    set_supported_cpuid(t, t.vcpu)
    t.equal("at reset", _get(t, M.MSR_KVM_POLL_CONTROL), 1)
    t.equal("off", (_set(t, M.MSR_KVM_POLL_CONTROL, 0), _get(t, M.MSR_KVM_POLL_CONTROL)), (1, 0))
    t.equal("reserved bits", _set(t, M.MSR_KVM_POLL_CONTROL, 2), 0)


@case("KVM_RUN", VCPU, "ipis by hypercall", "IRQCHIP", guest=True)
def ipis_by_hypercall(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    # mov $10,%ax; mov $1,%bx; xor %cx,%cx; xor %dx,%dx; mov $0x40041,%si (a shorthand); vmcall; out %al,$0x10
    code = (b"\x66\xb8\x0a\x00\x00\x00\x66\xbb\x01\x00\x00\x00\x66\x31\xc9\x66\x31\xd2\x66\xbe\x41\x00\x04\x00"
            b"\x0f\x01\xc1\xe6\x10")
    run, _ = real_mode(t, code)
    set_supported_cpuid(t, t.vcpu)
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("a shorthand is invalid", registers(t).rax & 0xFFFFFFFF, -22 & 0xFFFFFFFF)
    t.equal("exit", run.exit_reason, 2)


# ---- Hyper-V ------------------------------------------------------------------------------------------------


@case("KVM_SET_MSRS", VCPU, "hyperv hypercall page", "HYPERV")
def hypercall_page(t: Trial) -> None:
    memory = _memory(t)
    t.equal("before the guest has named itself", _set(t, M.HV_X64_MSR_HYPERCALL, PAGE_GPA | 1), 1)
    t.equal("nothing happens", _get(t, M.HV_X64_MSR_HYPERCALL), 0)
    t.equal("its name", (_set(t, M.HV_X64_MSR_GUEST_OS_ID, OS_ID), _get(t, M.HV_X64_MSR_GUEST_OS_ID)), (1, OS_ID))
    t.equal("where no memory is", _set(t, M.HV_X64_MSR_HYPERCALL, 0x40000001), 0)
    t.equal("enable", (_set(t, M.HV_X64_MSR_HYPERCALL, PAGE_GPA | 1), _get(t, M.HV_X64_MSR_HYPERCALL)), (1, PAGE_GPA | 1))
    t.equal("VMCALL or VMMCALL, and RET", memory.read(PAGE_GPA, 4), b"\x0f\x01\xc1\xc3", b"\x0f\x01\xd9\xc3")
    t.equal("no name any more", _set(t, M.HV_X64_MSR_GUEST_OS_ID, 0), 1)
    t.equal("disables it", _get(t, M.HV_X64_MSR_HYPERCALL), PAGE_GPA)


@case("KVM_SET_MSRS", VCPU, "hyperv values", "HYPERV", "HYPERV_TIME", "HYPERV_VP_INDEX")
def hyperv_values(t: Trial) -> None:
    t.equal("VP_INDEX", _get(t, M.HV_X64_MSR_VP_INDEX), 0)
    t.equal("another one", (_set(t, M.HV_X64_MSR_VP_INDEX, 5), _get(t, M.HV_X64_MSR_VP_INDEX)), (1, 5))
    t.equal("one that is too large", _set(t, M.HV_X64_MSR_VP_INDEX, 0xFFFFFFFF), 0)
    first, second = _get(t, M.HV_X64_MSR_TIME_REF_COUNT), _get(t, M.HV_X64_MSR_TIME_REF_COUNT)
    t.true("time goes on", None not in (first, second) and (first or 0) <= (second or 0), (first, second))
    khz = t.ioctl(t.vcpu, "KVM_GET_TSC_KHZ")
    t.equal("the TSC's frequency", _get(t, M.HV_X64_MSR_TSC_FREQUENCY) == khz.value * 1000, True)
    t.equal("the APIC timer's", _get(t, M.HV_X64_MSR_APIC_FREQUENCY), 10**9)
    for index in (M.HV_X64_MSR_TIME_REF_COUNT, M.HV_X64_MSR_TSC_FREQUENCY, M.HV_X64_MSR_APIC_FREQUENCY):
        t.equal(f"a client's write to {index:#x} is dropped", _set(t, index, 5), 1)
    t.equal("crash parameters", (_set(t, M.HV_X64_MSR_CRASH_P0, 0x77), _get(t, M.HV_X64_MSR_CRASH_P0)), (1, 0x77))
    t.equal("crash control", (_set(t, M.HV_X64_MSR_CRASH_CTL, (1 << 64) - 1), _get(t, M.HV_X64_MSR_CRASH_CTL)), (1, 1 << 63))
    t.equal("reset", _get(t, M.HV_X64_MSR_RESET), 0)
    t.equal("unknown bits of TSC_INVARIANT_CONTROL", _set(t, M.HV_X64_MSR_TSC_INVARIANT_CONTROL, 2), 0)
    t.equal("an MSR that does not exist", _get(t, 0x40000004), None)


@case("KVM_SET_MSRS", VCPU, "hyperv assist page", "HYPERV_VAPIC", "IRQCHIP")
def assist_page(t: Trial) -> None:
    _vcpu_with_irqchip(t)
    memory = _memory(t)
    memory.write(PAGE_GPA, b"\xff" * 8)
    t.equal("where no memory is", _set(t, M.HV_X64_MSR_VP_ASSIST_PAGE, 0x40000001), 0)
    t.equal("enable", _set(t, M.HV_X64_MSR_VP_ASSIST_PAGE, PAGE_GPA | 1), 1)
    t.equal("its first word", memory.read(PAGE_GPA, 8), b"\0\0\0\0\xff\xff\xff\xff")
    t.equal("is the paravirtual EOI's", _get(t, M.MSR_KVM_PV_EOI_EN), PAGE_GPA | 1)
    t.equal("EOI cannot be read", _get(t, M.HV_X64_MSR_EOI), None)
    t.equal("TPR", (_set(t, M.HV_X64_MSR_TPR, 0x30), _get(t, M.HV_X64_MSR_TPR)), (1, 0x30))


@case("KVM_ENABLE_CAP", VCPU, "synic", "HYPERV_SYNIC", "HYPERV_SYNIC2", "IRQCHIP")
def synic(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    t.equal("before: a control register of 0", (_get(t, M.HV_X64_MSR_SCONTROL), _set(t, M.HV_X64_MSR_SCONTROL, 0)), (0, 1))
    t.equal("that cannot be set", _set(t, M.HV_X64_MSR_SCONTROL, 1), 0)
    t.errno("an argument", enable(t, t.vcpu, "HYPERV_SYNIC2", 1), E.EINVAL)
    t.ok("enable", enable(t, t.vcpu, "HYPERV_SYNIC2"))
    t.equal("control", _get(t, M.HV_X64_MSR_SCONTROL), 1)
    t.equal("version", _get(t, M.HV_X64_MSR_SVERSION), 1)
    t.equal("sources are masked", _get(t, M.HV_X64_MSR_SINT0), 1 << 16)
    t.equal("a source", (_set(t, M.HV_X64_MSR_SINT0 + 3, 0x51), _get(t, M.HV_X64_MSR_SINT0 + 3)), (1, 0x51))
    t.equal("the message page", (_set(t, M.HV_X64_MSR_SIMP, PAGE_GPA | 1), _get(t, M.HV_X64_MSR_SIMP)), (1, PAGE_GPA | 1))
    t.equal("a timer", (_set(t, M.HV_X64_MSR_STIMER0_COUNT, 100), _get(t, M.HV_X64_MSR_STIMER0_COUNT)), (1, 100))


@case("KVM_HYPERV_EVENTFD", VM, "assign", "HYPERV_EVENTFD")
def hyperv_eventfd(t: Trial) -> None:
    name, fd = "KVM_HYPERV_EVENTFD", t.keep(os.eventfd(0, os.EFD_CLOEXEC))
    t.ok("assign", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=fd)))
    t.errno("again", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=fd)), E.EEXIST)
    t.ok("another connection", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=2, fd=fd)))
    t.ok("deassign", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=-1, flags=1)))
    t.errno("again", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=-1, flags=1)), E.ENOENT)
    t.errno("no eventfd", t.ioctl(t.vm, name, KvmHypervEventfd(conn_id=1, fd=t.system)), E.EINVAL)


def _wrmsr(index: int, value: int) -> bytes:
    """In 16-bit code."""
    return (b"\x66\xb9" + struct.pack("<I", index) + b"\x66\xb8" + struct.pack("<I", value & 0xFFFFFFFF)
            + b"\x66\xba" + struct.pack("<I", value >> 32) + b"\x0f\x30")


def _hyperv_guest(t: Trial, code: bytes) -> KvmRun:
    run, _ = real_mode(t, code)
    show_hyperv(t)
    return run


@case("KVM_RUN", VCPU, "hyperv crash and reset", "HYPERV", "HYPERV_CPUID", guest=True)
def crash_and_reset(t: Trial) -> None:
    run = _hyperv_guest(t, _wrmsr(M.HV_X64_MSR_CRASH_P0, 0x55) + _wrmsr(M.HV_X64_MSR_CRASH_CTL, H.HV_CRASH_CTL_CRASH_NOTIFY)
                        + _wrmsr(M.HV_X64_MSR_RESET, 1) + b"\xf4")
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("a crash", (run.exit_reason, run.system_event.type, run.system_event.ndata), (EXIT_SYSTEM_EVENT, CRASH, 0))
    t.equal("its parameter", _get(t, M.HV_X64_MSR_CRASH_P0), 0x55)
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("a reset", (run.exit_reason, run.system_event.type, run.system_event.ndata), (EXIT_SYSTEM_EVENT, RESET, 0))
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    t.equal("and on", run.exit_reason, EXIT_HLT)


@case("KVM_RUN", VCPU, "hyperv synic pages", "HYPERV_SYNIC", "HYPERV_CPUID", "IRQCHIP", guest=True)
def synic_pages(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    run, memory = real_mode(t, _wrmsr(M.HV_X64_MSR_SIMP, PAGE_GPA | 1) + b"\xe6\x10")
    show_hyperv(t)
    t.need("enable", enable(t, t.vcpu, "HYPERV_SYNIC"))
    memory.write(PAGE_GPA, b"\xff" * 8)
    t.need("run", t.ioctl(t.vcpu, "KVM_RUN"))
    page = run.hyperv.u.synic
    t.equal("exit", (run.exit_reason, run.hyperv.type), (EXIT_HYPERV, HYPERV_SYNIC_EXIT))
    t.equal("register, control, pages", (page.msr, page.control, page.evt_page, page.msg_page),
            (M.HV_X64_MSR_SIMP, 1, 0, PAGE_GPA | 1))
    t.equal("the page is cleared", memory.read(PAGE_GPA, 8), bytes(8))
