# SPDX-License-Identifier: GPL-2.0-or-later
"""The control-word table is complete and consistent."""

from ctypes import sizeof

import pytest

from kvmfs.abi import caps, ioctls
from kvmfs.abi.ioctls import BY_NAME, BY_NUMBER, TABLE, Level, Payload


def test_complete() -> None:
    assert len(TABLE) == len(BY_NUMBER) == len(BY_NAME) == 106


def test_constants_are_the_table() -> None:
    constants = {name: value for name, value in vars(ioctls).items() if name.startswith("KVM_")}
    assert constants == {entry.name: entry.number for entry in TABLE}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_GET_API_VERSION", 0x0000AE00),
        ("KVM_RUN", 0x0000AE80),
        ("KVM_GET_REGS", 0x8090AE81),
        ("KVM_SET_SREGS", 0x4138AE84),
        ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        ("KVM_SET_IRQCHIP", 0x8208AE63),
        ("KVM_GET_NESTED_STATE", 0xC080AEBE),
        ("KVM_MEMORY_ENCRYPT_OP", 0xC008AEBA),
    ],
)
def test_numbers_that_strace_prints(name: str, number: int) -> None:
    assert BY_NAME[name].number == number
    assert BY_NUMBER[number].name == name


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_entry(entry: ioctls.Ioctl) -> None:
    assert entry.handler == entry.name[len("KVM_") :].lower()
    assert entry.levels
    assert all(name in caps.CAPS for name in entry.capability.split())
    moved = max(entry.in_size, entry.out_size)
    if entry.payload in (Payload.FIXED, Payload.FLEX):
        assert entry.struct is not None
        assert moved == sizeof(entry.struct) > 0
    else:
        assert moved == 0
        assert (entry.struct is not None) == (entry.payload is Payload.POINTER)
    assert entry.nr == entry.number & 0xFF


def test_input_that_does_not_arrive() -> None:
    assert {entry.name for entry in TABLE if entry.backwards} == {
        "KVM_SET_IRQCHIP",
        "KVM_SET_PIT",
        "KVM_MEMORY_ENCRYPT_REG_REGION",
        "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    }
    assert all(entry.in_size == 0 for entry in TABLE if entry.backwards)
    assert {entry.name for entry in TABLE if entry.payload is Payload.POINTER} == {"KVM_REINJECT_CONTROL"}


def test_levels() -> None:
    shared = {entry.name: entry.levels for entry in TABLE if entry.levels not in tuple(Level)}
    device = Level.VCPU | Level.DEVICE
    assert shared == {
        "KVM_CHECK_EXTENSION": Level.SYSTEM | Level.VM,
        "KVM_GET_MSRS": Level.SYSTEM | Level.VCPU,
        "KVM_GET_SUPPORTED_HV_CPUID": Level.SYSTEM | Level.VCPU,
        "KVM_GET_DEVICE_ATTR": Level.SYSTEM | device,
        "KVM_HAS_DEVICE_ATTR": Level.SYSTEM | device,
        "KVM_SET_DEVICE_ATTR": device,
        "KVM_SET_TSC_KHZ": Level.VM | Level.VCPU,
        "KVM_GET_TSC_KHZ": Level.VM | Level.VCPU,
        "KVM_ENABLE_CAP": Level.VM | Level.VCPU,
        "KVM_MEMORY_ENCRYPT_OP": Level.VM | Level.VCPU,
        "KVM_GET_STATS_FD": Level.VM | Level.VCPU,
    }
    # KVM_GET_TSC_KHZ and KVM_ENABLE_CAP share nr 0xa3, KVM_SET_PIT2 and KVM_SET_VCPU_EVENTS 0xa0, …
    assert len({entry.nr for entry in TABLE}) < len(TABLE)
