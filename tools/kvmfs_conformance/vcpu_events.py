# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of a vCPU: interrupts, NMIs, SMIs, machine checks, debugging, its activity state."""

from __future__ import annotations

import ctypes
import errno as E
import struct

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmGuestDebug,
    KvmInterrupt,
    KvmMpState,
    KvmSregs,
    KvmTprAccessCtl,
    KvmVapicAddr,
    KvmVcpuEvents,
    KvmX86Mce,
)

from .model import Trial, buffer, case
from .vcpu_cpuid import msrs
from .vm import enable
from .wire import BAD_POINTER

VCPU = Level.VCPU
RUNNABLE, UNINITIALIZED, INIT_RECEIVED, HALTED, SIPI_RECEIVED, STOPPED = range(6)
V_NMI, V_SIPI, V_SHADOW, V_SMM, V_PAYLOAD, V_TRIPLE = 1, 2, 4, 8, 16, 32


def events(t: Trial, vcpu: int) -> KvmVcpuEvents:
    """KVM_GET_VCPU_EVENTS."""
    result = KvmVcpuEvents()
    t.need("the events", t.ioctl(vcpu, "KVM_GET_VCPU_EVENTS", result))
    return result


@case("KVM_INTERRUPT", VCPU, "without irqchip")
def interrupt(t: Trial) -> None:
    name = "KVM_INTERRUPT"
    t.errno("vector 256", t.ioctl(t.vcpu, name, KvmInterrupt(irq=256)), E.EINVAL)
    t.errno("vector -1", t.ioctl(t.vcpu, name, KvmInterrupt(irq=0xFFFFFFFF)), E.EINVAL)
    t.ok("vector 0x81", t.ioctl(t.vcpu, name, KvmInterrupt(irq=0x81)))
    state = events(t, t.vcpu).interrupt
    t.equal("it is in the events", (state.injected, state.nr, state.soft), (1, 0x81, 0))
    sregs = KvmSregs()
    t.need("the registers", t.ioctl(t.vcpu, "KVM_GET_SREGS", sregs))
    t.equal("and in the bitmap", list(sregs.interrupt_bitmap), [0, 0, 2, 0])
    t.ok("another takes its place", t.ioctl(t.vcpu, name, KvmInterrupt(irq=255)))
    t.equal("which is seen", events(t, t.vcpu).interrupt.nr, 255)


@case("KVM_INTERRUPT", VCPU, "with irqchip", "IRQCHIP")
def interrupt_irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    t.errno("the PIC has them", t.ioctl(t.vcpu, "KVM_INTERRUPT", KvmInterrupt(irq=0x20)), E.ENXIO)
    t.errno("the vector is looked at first", t.ioctl(t.vcpu, "KVM_INTERRUPT", KvmInterrupt(irq=256)), E.EINVAL)


@case("KVM_INTERRUPT", VCPU, "with split irqchip", "SPLIT_IRQCHIP")
def interrupt_split(t: Trial) -> None:
    t.need("a split irqchip", enable(t, t.vm, "SPLIT_IRQCHIP", 24))
    t.ok("one", t.ioctl(t.vcpu, "KVM_INTERRUPT", KvmInterrupt(irq=0x20)))
    t.errno("two", t.ioctl(t.vcpu, "KVM_INTERRUPT", KvmInterrupt(irq=0x21)), E.EEXIST)


@case("KVM_NMI", VCPU, "pending", "USER_NMI")
def nmi(t: Trial) -> None:
    for count, pending in ((1, 1), (2, 2), (3, 2)):
        t.ok(f"NMI {count}", t.ioctl(t.vcpu, "KVM_NMI"))
        t.equal(f"pending after {count}", events(t, t.vcpu).nmi.pending, pending)


@case("KVM_SMI", VCPU, "pending", "X86_SMM")
def smi(t: Trial) -> None:
    t.ok("once", t.ioctl(t.vcpu, "KVM_SMI"))
    t.note("pending", events(t, t.vcpu).smi.pending)


# ---- kvm_vcpu_events ----------------------------------------------------------------------------------------


@case("KVM_GET_VCPU_EVENTS", VCPU, "at reset", "VCPU_EVENTS")
def get_events(t: Trial) -> None:
    state = events(t, t.vcpu)
    t.equal("flags", state.flags, V_NMI | V_SHADOW | V_SMM)
    state.flags = 0
    t.equal("everything else is 0", any(bytes(state)), False)


@case("KVM_GET_VCPU_EVENTS", VCPU, "flags of what is enabled", "VCPU_EVENTS", "EXCEPTION_PAYLOAD", "X86_TRIPLE_FAULT_EVENT")
def get_events_flags(t: Trial) -> None:
    t.need("payloads", enable(t, t.vm, "EXCEPTION_PAYLOAD", 1))
    t.need("triple faults", enable(t, t.vm, "X86_TRIPLE_FAULT_EVENT", 1))
    t.equal("flags", events(t, t.vcpu).flags, V_NMI | V_SHADOW | V_SMM | V_PAYLOAD | V_TRIPLE)
    state = KvmVcpuEvents(flags=V_PAYLOAD, exception_has_payload=1, exception_payload=0x4000)
    state.exception.pending, state.exception.nr = 1, 1
    t.ok("a pending #DB with a payload", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", state))
    again = events(t, t.vcpu)
    t.equal("it is read back", (again.exception.pending, again.exception.injected, again.exception.nr,
                                again.exception_has_payload, again.exception_payload), (1, 0, 1, 1, 0x4000))
    state = KvmVcpuEvents(flags=V_TRIPLE)
    state.triple_fault.pending = 1
    t.ok("a pending triple fault", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", state))
    t.equal("it is read back too", events(t, t.vcpu).triple_fault.pending, 1)


@case("KVM_SET_VCPU_EVENTS", VCPU, "round trip", "VCPU_EVENTS")
def set_events(t: Trial) -> None:
    state = KvmVcpuEvents(flags=V_NMI | V_SHADOW)
    state.exception.injected, state.exception.nr, state.exception.has_error_code, state.exception.error_code = 1, 13, 1, 0x18
    state.nmi.pending, state.nmi.masked, state.interrupt.shadow = 1, 1, 1
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", state))
    again = events(t, t.vcpu)
    exception = again.exception
    t.equal("exception", (exception.injected, exception.nr, exception.has_error_code, exception.error_code), (1, 13, 1, 0x18))
    t.equal("nmi", (again.nmi.injected, again.nmi.pending, again.nmi.masked), (0, 1, 1))
    t.true("interrupt shadow", again.interrupt.shadow)
    state = KvmVcpuEvents()
    state.interrupt.injected, state.interrupt.nr = 1, 0x40
    t.need("another", t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", state))
    again = events(t, t.vcpu)
    t.equal("no exception, an interrupt", (again.exception.injected, again.interrupt.injected, again.interrupt.nr), (0, 1, 0x40))
    t.equal("without its flag the NMI stays pending", again.nmi.pending, 1)


@case("KVM_SET_VCPU_EVENTS", VCPU, "what is refused", "VCPU_EVENTS")
def set_events_refused(t: Trial) -> None:
    name = "KVM_SET_VCPU_EVENTS"
    t.errno("unknown flag", t.ioctl(t.vcpu, name, KvmVcpuEvents(flags=1 << 6)), E.EINVAL)
    t.errno("payload that was not enabled", t.ioctl(t.vcpu, name, KvmVcpuEvents(flags=V_PAYLOAD)), E.EINVAL)
    t.errno("triple fault that was not enabled", t.ioctl(t.vcpu, name, KvmVcpuEvents(flags=V_TRIPLE)), E.EINVAL)
    for label, vector in (("vector 32", 32), ("NMI as an exception", 2)):
        state = KvmVcpuEvents()
        state.exception.injected, state.exception.nr = 1, vector
        t.errno(label, t.ioctl(t.vcpu, name, state), E.EINVAL)
    state = KvmVcpuEvents()
    state.exception.nr = 200
    t.ok("a vector that is not meant", t.ioctl(t.vcpu, name, state))


# ---- activity state -----------------------------------------------------------------------------------------


def _mp_state(t: Trial, vcpu: int) -> int:
    state = KvmMpState(mp_state=99)
    t.need("the state", t.ioctl(vcpu, "KVM_GET_MP_STATE", state))
    return state.mp_state


@case("KVM_GET_MP_STATE", VCPU, "at reset", "MP_STATE")
def get_mp_state(t: Trial) -> None:
    t.equal("vCPU 0", _mp_state(t, t.vcpu), RUNNABLE)
    t.equal("vCPU 1 too, without an irqchip", _mp_state(t, t.new_vcpu(t.vm, 1)), RUNNABLE)


@case("KVM_GET_MP_STATE", VCPU, "at reset with irqchip", "MP_STATE", "IRQCHIP")
def get_mp_state_irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    t.equal("vCPU 0", _mp_state(t, t.vcpu), RUNNABLE)
    t.equal("vCPU 1", _mp_state(t, t.new_vcpu(t.vm, 1)), UNINITIALIZED)


@case("KVM_SET_MP_STATE", VCPU, "without irqchip", "MP_STATE")
def set_mp_state(t: Trial) -> None:
    t.ok("runnable", t.ioctl(t.vcpu, "KVM_SET_MP_STATE", KvmMpState(mp_state=RUNNABLE)))
    for state in (UNINITIALIZED, INIT_RECEIVED, HALTED, SIPI_RECEIVED, STOPPED, 9, 10, 99, 0xFFFFFFFF):
        t.errno(f"state {state}", t.ioctl(t.vcpu, "KVM_SET_MP_STATE", KvmMpState(mp_state=state)), E.EINVAL)
    t.equal("still runnable", _mp_state(t, t.vcpu), RUNNABLE)


@case("KVM_SET_MP_STATE", VCPU, "with irqchip", "MP_STATE", "IRQCHIP")
def set_mp_state_irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    for state in (HALTED, UNINITIALIZED, INIT_RECEIVED, RUNNABLE):
        t.ok(f"state {state}", t.ioctl(t.vcpu, "KVM_SET_MP_STATE", KvmMpState(mp_state=state)))
        t.equal(f"state {state} read back", _mp_state(t, t.vcpu), state)
    t.errno("state 99", t.ioctl(t.vcpu, "KVM_SET_MP_STATE", KvmMpState(mp_state=99)), E.EINVAL)


# ---- machine checks -----------------------------------------------------------------------------------------


@case("KVM_X86_SETUP_MCE", VCPU, "banks", "MCE")
def setup_mce(t: Trial) -> None:
    name = "KVM_X86_SETUP_MCE"
    t.errno("no bank", t.ioctl(t.vcpu, name, ctypes.c_uint64(0x100)), E.EINVAL)
    t.errno("33 banks", t.ioctl(t.vcpu, name, ctypes.c_uint64(33)), E.EINVAL)
    t.errno("unknown bit", t.ioctl(t.vcpu, name, ctypes.c_uint64(1 << 40 | 10)), E.EINVAL)
    t.ok("10 banks, MCG_CTL", t.ioctl(t.vcpu, name, ctypes.c_uint64(0x10A)))
    for label, index, value in (("MCG_CAP", 0x179, 0x10A), ("MCG_CTL", 0x17B, (1 << 64) - 1), ("MC9_CTL", 0x424, (1 << 64) - 1)):
        result, values = msrs(t, t.vcpu, "KVM_GET_MSRS", [(index, 0)])
        t.ok(f"{label}: read", result, 1)
        t.equal(label, values[0], value)


@case("KVM_X86_SET_MCE", VCPU, "injection", "MCE")
def set_mce(t: Trial) -> None:
    name, valid, uncorrected = "KVM_X86_SET_MCE", 1 << 63, 1 << 61 | 1 << 57
    t.need("10 banks", t.ioctl(t.vcpu, "KVM_X86_SETUP_MCE", ctypes.c_uint64(0x10A)))
    t.errno("bank 10", t.ioctl(t.vcpu, name, KvmX86Mce(status=valid, bank=10)), E.EINVAL)
    t.errno("not valid", t.ioctl(t.vcpu, name, KvmX86Mce(status=1, bank=1)), E.EINVAL)
    t.ok("a corrected error", t.ioctl(t.vcpu, name, KvmX86Mce(status=valid | 0x55, addr=0x1000, misc=7, bank=1)))
    result, values = msrs(t, t.vcpu, "KVM_GET_MSRS", [(0x405, 0), (0x406, 0), (0x407, 0)])
    t.ok("the bank", result, 3)
    t.equal("its status, address, miscellany", values, [valid | 0x55, 0x1000, 7])
    t.ok("uncorrected while CR4.MCE is off", t.ioctl(t.vcpu, name, KvmX86Mce(status=valid | uncorrected, bank=2)))
    t.equal("it was not stored: the vCPU shuts down", msrs(t, t.vcpu, "KVM_GET_MSRS", [(0x409, 0)])[1][0], 0)


# ---- debugging ----------------------------------------------------------------------------------------------


@case("KVM_SET_GUEST_DEBUG", VCPU, "controls", "SET_GUEST_DEBUG")
def guest_debug(t: Trial) -> None:
    name, on, step, sw, hw = "KVM_SET_GUEST_DEBUG", 1, 2, 0x10000, 0x20000
    for label, control in (("software breakpoints", on | sw), ("single step", on | step), ("hardware breakpoints", on | hw),
                           ("off", 0)):
        debug = KvmGuestDebug(control=control)
        debug.arch.debugreg[0], debug.arch.debugreg[7] = 0x1000, 0x401
        t.ok(label, t.ioctl(t.vcpu, name, debug))
    rflags = buffer(144)
    t.need("single step", t.ioctl(t.vcpu, name, KvmGuestDebug(control=on | step)))
    t.need("registers", t.ioctl(t.vcpu, "KVM_GET_REGS", rflags))
    t.equal("TF is not seen", struct.unpack_from("<Q", rflags, 136)[0] & 0x100, 0)


@case("KVM_SET_GUEST_DEBUG", VCPU, "injection", "SET_GUEST_DEBUG")
def guest_debug_inject(t: Trial) -> None:
    name, inject_db, inject_bp = "KVM_SET_GUEST_DEBUG", 0x40000, 0x80000
    t.ok("#BP", t.ioctl(t.vcpu, name, KvmGuestDebug(control=1 | inject_bp)))
    t.equal("it is pending", events(t, t.vcpu).exception.nr, 3)
    t.errno("#DB while another is", t.ioctl(t.vcpu, name, KvmGuestDebug(control=1 | inject_db)), E.EBUSY)


# ---- the rest -----------------------------------------------------------------------------------------------


@case("KVM_SET_SIGNAL_MASK", VCPU, "lengths")
def signal_mask(t: Trial) -> None:
    name = "KVM_SET_SIGNAL_MASK"
    t.ok("NULL: the thread's own mask", t.ioctl(t.vcpu, name, 0))
    t.ok("8 bytes", t.ioctl(t.vcpu, name, buffer(12, struct.pack("<IQ", 8, 0))))
    for length in (0, 4, 9, 16, 128, 0xFFFFFFFF):
        t.errno(f"{length} bytes", t.ioctl(t.vcpu, name, buffer(256, struct.pack("<I", length))), E.EINVAL)
    t.errno("the mask is unmapped", t.ioctl(t.vcpu, name, t.before_hole(struct.pack("<I", 8))), E.EFAULT)
    t.errno("the length is looked at before", t.ioctl(t.vcpu, name, t.before_hole(struct.pack("<I", 7))), E.EINVAL)


@case("KVM_TPR_ACCESS_REPORTING", VCPU, "on and off", "VAPIC")
def tpr_reporting(t: Trial) -> None:
    name, control = "KVM_TPR_ACCESS_REPORTING", KvmTprAccessCtl(enabled=1)
    t.ok("on", t.ioctl(t.vcpu, name, control))
    t.equal("the struct comes back", (control.enabled, control.flags), (1, 0))
    t.errno("flags", t.ioctl(t.vcpu, name, KvmTprAccessCtl(enabled=1, flags=1)), E.EINVAL)
    t.ok("off", t.ioctl(t.vcpu, name, KvmTprAccessCtl()))


@case("KVM_SET_VAPIC_ADDR", VCPU, "needs a lapic", "VAPIC")
def vapic(t: Trial) -> None:
    without = t.new_vcpu(t.new_vm())
    t.errno("without an irqchip", t.ioctl(without, "KVM_SET_VAPIC_ADDR", KvmVapicAddr()), E.EINVAL)
    t.errno("which is looked at before the pointer", t.ioctl(without, "KVM_SET_VAPIC_ADDR", BAD_POINTER), E.EINVAL)
    if t.has("IRQCHIP"):
        t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
        t.ok("none", t.ioctl(t.vcpu, "KVM_SET_VAPIC_ADDR", KvmVapicAddr()))
        t.errno("no memory there", t.ioctl(t.vcpu, "KVM_SET_VAPIC_ADDR", KvmVapicAddr(vapic_addr=0x1000)), E.EINVAL)


@case("KVM_KVMCLOCK_CTRL", VCPU, "no clock", "KVMCLOCK_CTRL")
def kvmclock_ctrl(t: Trial) -> None:
    t.errno("the guest has not enabled kvmclock", t.ioctl(t.vcpu, "KVM_KVMCLOCK_CTRL"), E.EINVAL)
