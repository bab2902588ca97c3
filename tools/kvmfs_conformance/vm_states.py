# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole states, byte by byte: after creation and after SETs of odd values, noted so that two nodes can be compared."""

from __future__ import annotations

import ctypes
import struct

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmDebugregs,
    KvmIrqchip,
    KvmIrqLevel,
    KvmLapicState,
    KvmMpState,
    KvmPitConfig,
    KvmPitState2,
    KvmVcpuEvents,
    KvmXcrs,
    KvmXsave,
)

from .model import Trial, case

VM, VCPU = Level.VM, Level.VCPU
_CHIPS = ("master", "slave", "I/O APIC")
_LOAD_TIME = (16, 40, 64)                       # of the PIT's channels: the host's clock
_TMCCT = 0x390                                  # the LAPIC timer's current count
_VALID = {"NMI": 1, "SIPI": 2, "shadow": 4, "SMM": 8}


def _words(data: bytes) -> str:
    """The 32-bit words that are not 0, with their offsets."""
    words = struct.unpack(f"<{len(data) // 4}I", data[:len(data) & ~3])
    return " ".join(f"{4 * i:x}:{word:x}" for i, word in enumerate(words) if word) or "all 0"


def _note(t: Trial, fd: int, label: str, call: str, state: ctypes.Structure) -> None:
    t.need(f"get {label}", t.ioctl(fd, call, state))
    t.note(label, _words(bytes(state)))


def _chips(t: Trial, when: str) -> None:
    for number, name in enumerate(_CHIPS):
        _note(t, t.vm, f"{name} {when}", "KVM_GET_IRQCHIP", KvmIrqchip(chip_id=number))


@case("KVM_GET_IRQCHIP", VM, "every byte", "IRQCHIP")
def irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    _chips(t, "after creation")
    line = KvmIrqLevel(level=1)
    for line.irq in (1, 5, 9, 12, 20):
        t.need("raise a line", t.ioctl(t.vm, "KVM_IRQ_LINE", line))
    _chips(t, "with raised lines")
    line.level = 0
    for line.irq in (1, 9, 20):
        t.need("lower a line", t.ioctl(t.vm, "KVM_IRQ_LINE", line))
    _chips(t, "with some of them lowered")
    for number, name in enumerate(_CHIPS[:2]):
        chip = KvmIrqchip.from_buffer_copy(struct.pack("<II", number, 0) + bytes(range(0x10, 0x20)) + bytes(496))
        t.need(f"set {name}", t.ioctl(t.vm, "KVM_SET_IRQCHIP", chip))
    entries = [0x10000] * 24
    entries[3], entries[8], entries[20], entries[23] = 0xFF00000000000030, 0x31, 0x0100000000018032, 0xFFFFFFFFFFFFFFFF
    chip = KvmIrqchip.from_buffer_copy(
        struct.pack("<IIQIIII24Q", 2, 0, 0xFEC01000, 0x1F, 5, 0x100008, 7, *entries).ljust(520, b"\0"))
    t.need("set I/O APIC", t.ioctl(t.vm, "KVM_SET_IRQCHIP", chip))
    _chips(t, "after odd ones were set")


def _pit(t: Trial, when: str) -> None:
    state = KvmPitState2()
    t.need(f"get {when}", t.ioctl(t.vm, "KVM_GET_PIT2", state))
    data = bytearray(state)
    for at in _LOAD_TIME:
        data[at:at + 8] = bytes(8)
    t.note(when, _words(bytes(data)))


@case("KVM_GET_PIT2", VM, "every byte", "PIT_STATE2")
def pit2(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    t.need("a PIT", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig()))
    _pit(t, "after creation")
    state = KvmPitState2(flags=2)
    for i, channel in enumerate(state.channels):
        channel.count, channel.mode, channel.latched_count = (0, 0x10001, 77)[i], (4, 3, 0)[i], 0x1234
        channel.count_latched, channel.status_latched, channel.status = 3, 1, 0x55
        channel.read_state, channel.write_state, channel.write_latch, channel.rw_mode = 3, 4, 9, 3
        channel.bcd, channel.gate = 1, i == 2
    t.need("set", t.ioctl(t.vm, "KVM_SET_PIT2", state))
    _pit(t, "after an odd one was set")


def _lapic(t: Trial, when: str) -> None:
    state = KvmLapicState()
    t.need(f"get {when}", t.ioctl(t.vcpu, "KVM_GET_LAPIC", state))
    data = bytearray(state)
    data[_TMCCT:_TMCCT + 4] = bytes(4)
    t.note(when, _words(bytes(data)))


@case("KVM_GET_LAPIC", VCPU, "every byte", "IRQCHIP")
def lapic(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    _lapic(t, "after creation")
    data = bytearray(1024)
    for offset, value in ((0x20, 0x05000000), (0x30, 0x12345678), (0x80, 0x35), (0xA0, 0x99), (0xD0, 0x02000000),
                          (0xE0, 0xFFFFFFFF),
                          (0xF0, 0x1FF), (0x110, 1 << 5), (0x190, 1 << 5), (0x220, 1 << 9), (0x280, 0xFF), (0x300, 0x1234),
                          (0x310, 0x07000000), (0x320, 0x20031), (0x330, 0x10032), (0x350, 0x8700), (0x360, 0x400),
                          (0x370, 0xFE), (0x380, 0xFFFFFFFF), (0x3E0, 0xB)):
        struct.pack_into("<I", data, offset, value)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_LAPIC", KvmLapicState.from_buffer_copy(data)))
    _lapic(t, "after an odd one was set")


@case("KVM_SET_MP_STATE", VCPU, "every value", "MP_STATE")
def mp_state(t: Trial) -> None:
    bare = t.new_vm()
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    boot, other, alone = t.vcpu, t.new_vcpu(t.vm, 1), t.new_vcpu(bare)
    for label, vcpu in (("boot CPU", boot), ("another", other), ("without an irqchip", alone)):
        _note(t, vcpu, f"{label} after creation", "KVM_GET_MP_STATE", KvmMpState())
        for value in range(12):
            result = t.ioctl(vcpu, "KVM_SET_MP_STATE", KvmMpState(mp_state=value))
            state = KvmMpState()
            t.need("get", t.ioctl(vcpu, "KVM_GET_MP_STATE", state))
            t.note(f"{label}: {value}", f"{result}, then {state.mp_state}")


@case("KVM_SET_VCPU_EVENTS", VCPU, "every byte", "VCPU_EVENTS")
def vcpu_events(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    _note(t, t.vcpu, "after creation", "KVM_GET_VCPU_EVENTS", KvmVcpuEvents())
    for name, flag in _VALID.items():
        events = KvmVcpuEvents(flags=flag, sipi_vector=0x12)
        events.interrupt.injected, events.interrupt.nr, events.interrupt.soft, events.interrupt.shadow = 1, 0x45, 0, 3
        events.nmi.injected, events.nmi.pending, events.nmi.masked = 1, 3, 1
        events.exception.nr, events.exception.has_error_code, events.exception.error_code = 13, 1, 0x77
        events.smi.latched_init = 1
        t.note(f"set with {name}", str(t.ioctl(t.vcpu, "KVM_SET_VCPU_EVENTS", events)))
        _note(t, t.vcpu, f"after a set with {name}", "KVM_GET_VCPU_EVENTS", KvmVcpuEvents())


@case("KVM_GET_DEBUGREGS", VCPU, "every byte", "DEBUGREGS")
def debugregs(t: Trial) -> None:
    _note(t, t.vcpu, "after creation", "KVM_GET_DEBUGREGS", KvmDebugregs())
    state = KvmDebugregs(db=(1, 2, 3, 0x7FFFFFFFFFFF), dr6=0xFFFF0FF1, dr7=0x455)
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_DEBUGREGS", state))
    _note(t, t.vcpu, "after a set", "KVM_GET_DEBUGREGS", KvmDebugregs())


@case("KVM_GET_XSAVE", VCPU, "every byte", "XSAVE")
def xsave(t: Trial) -> None:
    _note(t, t.vcpu, "after creation", "KVM_GET_XSAVE", KvmXsave())
    state = KvmXsave()
    t.need("get", t.ioctl(t.vcpu, "KVM_GET_XSAVE", state))
    data = bytearray(state)
    data[32:34], data[160:176], data[512:520] = b"\x11\x22", bytes(range(16)), (3).to_bytes(8, "little")
    t.need("set", t.ioctl(t.vcpu, "KVM_SET_XSAVE", KvmXsave.from_buffer_copy(data)))
    _note(t, t.vcpu, "after a set", "KVM_GET_XSAVE", KvmXsave())
    _note(t, t.vcpu, "XCR0", "KVM_GET_XCRS", KvmXcrs())
