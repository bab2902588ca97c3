# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that hold for every ioctl alike, made from the table: bad pointers, absent capabilities, the wrong descriptor."""

from __future__ import annotations

import errno as E
from collections.abc import Callable

from kvmfs.abi.ioctls import TABLE, Ioctl, Level, Payload
from kvmfs.abi.structs import KvmCreateDevice

from .model import CASES, Case, Stop, Trial, buffer
from .wire import BAD_POINTER, KERNEL_POINTER

UNKNOWN = {Level.SYSTEM: E.EINVAL, Level.VM: E.ENOTTY, Level.VCPU: E.EINVAL, Level.DEVICE: E.ENOTTY}
"""What a descriptor answers to a number that it does not know."""

_BY_LEVEL = {
    ("KVM_SET_TSC_KHZ", Level.VM): ("VM_TSC_CONTROL",), ("KVM_SET_TSC_KHZ", Level.VCPU): ("TSC_CONTROL",),
    ("KVM_GET_TSC_KHZ", Level.VM): ("VM_TSC_CONTROL",), ("KVM_GET_TSC_KHZ", Level.VCPU): ("GET_TSC_KHZ",),
    ("KVM_CHECK_EXTENSION", Level.SYSTEM): (), ("KVM_GET_MSRS", Level.VCPU): (),
    ("KVM_ENABLE_CAP", Level.VM): ("ENABLE_CAP_VM",), ("KVM_ENABLE_CAP", Level.VCPU): ("ENABLE_CAP",),
    ("KVM_GET_SUPPORTED_HV_CPUID", Level.SYSTEM): ("SYS_HYPERV_CPUID",),
    ("KVM_GET_SUPPORTED_HV_CPUID", Level.VCPU): ("HYPERV_CPUID",),
    ("KVM_SET_XSAVE", Level.VCPU): ("XSAVE",),
    ("KVM_RESET_DIRTY_RINGS", Level.VM): ("DIRTY_LOG_RING", "DIRTY_LOG_RING_ACQ_REL"),
}
_ATTRIBUTES = {Level.SYSTEM: ("SYS_ATTRIBUTES",), Level.VCPU: ("VCPU_ATTRIBUTES",), Level.DEVICE: ("DEVICE_CTRL",)}

_ABSENT_TOO: dict[tuple[str, Level], tuple[int, ...]] = {
    # Linux handles these whatever it says of the capability, or a part that was not compiled in has its own errno.
    ("KVM_SMI", Level.VCPU): (E.ENOTTY,),
    ("KVM_TPR_ACCESS_REPORTING", Level.VCPU): (0,),
    ("KVM_RESET_DIRTY_RINGS", Level.VM): (E.EINVAL,),
    ("KVM_PRE_FAULT_MEMORY", Level.VCPU): (E.EOPNOTSUPP,),
    ("KVM_MEMORY_ENCRYPT_OP", Level.VCPU): (E.ENOTTY,),
    ("KVM_SET_TSC_KHZ", Level.VCPU): (0,),
    ("KVM_SET_TSC_KHZ", Level.VM): (0,),
    ("KVM_GET_TSC_KHZ", Level.VM): (0,),
    ("KVM_SET_PMU_EVENT_FILTER", Level.VM): (0,),
    ("KVM_GET_DEVICE_ATTR", Level.SYSTEM): (E.ENXIO,), ("KVM_HAS_DEVICE_ATTR", Level.SYSTEM): (E.ENXIO,),
    # Without a PIC or a PIT that exists.
    ("KVM_IRQFD", Level.VM): (E.EAGAIN, E.EINVAL),
}


def capabilities(entry: Ioctl, level: Level) -> tuple[str, ...]:
    """The capabilities that announce ``entry`` on ``level``; empty: it is always there."""
    names = _BY_LEVEL.get((entry.name, level))
    if names is None and "DEVICE_ATTR" in entry.name:
        names = _ATTRIBUTES[level]
    if names is None:
        return tuple(entry.capability.split())
    return tuple(f"KVM_CAP_{name}" for name in names)


def descriptor(t: Trial, level: Level) -> int:
    """This case's descriptor of that level."""
    if level is Level.DEVICE:
        device = KvmCreateDevice(type=4)
        t.need("the VFIO device", t.ioctl(t.vm, "KVM_CREATE_DEVICE", device))
        return t.keep(device.fd)
    return {Level.SYSTEM: lambda: t.system, Level.VM: lambda: t.vm, Level.VCPU: lambda: t.vcpu}[level]()


# ---- bad pointers -------------------------------------------------------------------------------------------


def _irqchip(t: Trial) -> None:
    t.ioctl(t.vm, "KVM_CREATE_IRQCHIP")


def _pit(t: Trial) -> None:
    t.ioctl(t.vm, "KVM_CREATE_IRQCHIP")
    t.ioctl(t.vm, "KVM_CREATE_PIT")


# What must exist before Linux looks at the pointer.
_BEFORE: dict[str, Callable[[Trial], None]] = {
    "KVM_GET_LAPIC": _irqchip, "KVM_SET_LAPIC": _irqchip, "KVM_SET_VAPIC_ADDR": _irqchip,
    "KVM_GET_PIT": _pit, "KVM_GET_PIT2": _pit, "KVM_SET_PIT": _pit, "KVM_SET_PIT2": _pit, "KVM_REINJECT_CONTROL": _pit,
    "KVM_GET_IRQCHIP": _irqchip, "KVM_SET_IRQCHIP": _irqchip,
}
# The pointer is not looked at: the vendor may lack the operation; NULL has a meaning.
_NO_POINTER = frozenset(("KVM_MEMORY_ENCRYPT_OP",))
_NULL_MEANS = frozenset(("KVM_SET_SIGNAL_MASK",))


def _bad_pointer(entry: Ioctl, level: Level) -> Callable[[Trial], None]:
    expected = E.EPERM if (entry.name, level) == ("KVM_GET_DEVICE_ATTR", Level.DEVICE) else E.EFAULT    # kvm-vfio has none

    def run(t: Trial) -> None:
        if entry.name in _BEFORE:
            _BEFORE[entry.name](t)
        fd = descriptor(t, level)
        for label, pointer in (("NULL", 0), ("unmapped", BAD_POINTER), ("kernel address", KERNEL_POINTER)):
            if pointer or entry.name not in _NULL_MEANS:
                t.errno(label, t.ioctl(fd, entry.name, pointer), expected)

    return run


# ---- absence ------------------------------------------------------------------------------------------------


def _absence(entry: Ioctl, level: Level) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        for cap in capabilities(entry, level):
            t.equal(f"CHECK_EXTENSION {cap}", t.node.capability(cap), 0)
        if level is Level.DEVICE:
            created = t.ioctl(t.vm, "KVM_CREATE_DEVICE", KvmCreateDevice(type=4))
            t.errno("no device to ask", created, E.ENOTTY, E.ENODEV)
            return
        arg = 0 if entry.payload in (Payload.NONE, Payload.VALUE) else buffer(8192)
        result = t.ioctl(descriptor(t, level), entry.name, arg)
        allowed = (UNKNOWN[level], *_ABSENT_TOO.get((entry.name, level), ()))
        if result.ok and 0 in allowed:
            t.note("answered without the capability", "success")
        else:
            t.errno("errno of a kernel without it", result, *allowed)

    return run


# ---- the wrong descriptor -----------------------------------------------------------------------------------


def _wrong_level(level: Level) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        fd, data = descriptor(t, level), buffer(8192)
        for entry in TABLE:
            if level not in entry.levels:
                pointer = entry.payload not in (Payload.NONE, Payload.VALUE)
                t.errno(entry.name, t.ioctl(fd, entry.name, data if pointer else 0), UNKNOWN[level])

    return run


def _unknown_number(level: Level) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        fd, data = descriptor(t, level), buffer(8192)
        for label, number in (("free nr", 0xAEFF), ("a terminal's", 0x5401), ("other size", 0x8091AE81),
                              ("other direction", 0x4001AE00), ("32 bits set", 0xFFFFFFFF), ("other architecture", 0xAE06),
                              ("gone from Linux", 0xAE45)):
            t.errno(label, t.ioctl(fd, number, data), UNKNOWN[level])

    return run


def _guarded(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def guarded(t: Trial) -> None:
        try:
            run(t)
        except KeyError as error:
            t.failed("the suite", repr(error), "a capability's name")
            raise Stop from error

    return guarded


def register() -> None:
    """Add these cases to the list."""
    for entry in TABLE:
        for level in entry.levels:
            caps = capabilities(entry, level)
            pointer = entry.payload in (Payload.FIXED, Payload.FLEX, Payload.POINTER)
            if pointer and entry.name not in _NO_POINTER:
                CASES.append(Case(entry.name, level, "bad pointer", _bad_pointer(entry, level), caps))
            if caps:
                CASES.append(Case(entry.name, level, "absence", _guarded(_absence(entry, level)), caps, absence=True))
    for name, level in (("KVM_GET_API_VERSION", Level.SYSTEM), ("KVM_CHECK_EXTENSION", Level.VM), ("KVM_RUN", Level.VCPU),
                        ("KVM_HAS_DEVICE_ATTR", Level.DEVICE)):
        caps = ("KVM_CAP_DEVICE_CTRL",) if level is Level.DEVICE else ()
        CASES.append(Case(name, level, "ioctls of other levels", _wrong_level(level), caps))
        CASES.append(Case(name, level, "unknown numbers", _unknown_number(level), caps))
