# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controllers and the timer of a VM, routing, and eventfds."""

from __future__ import annotations

import ctypes
import errno as E
import os
import struct

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import (
    KvmIoeventfd,
    KvmIrqchip,
    KvmIrqfd,
    KvmIrqLevel,
    KvmIrqRoutingEntry,
    KvmMsi,
    KvmPitConfig,
    KvmPitState,
    KvmPitState2,
    KvmReinjectControl,
)

from .model import Trial, buffer, case
from .wire import BAD_POINTER, Result

VM = Level.VM
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
MAX_ROUTES = 4096


def _irqchip(t: Trial) -> None:
    t.need("an irqchip", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))


def _pit(t: Trial) -> None:
    _irqchip(t)
    t.need("a PIT", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig()))


@case("KVM_CREATE_IRQCHIP", VM, "once and before the vcpus", "IRQCHIP")
def create_irqchip(t: Trial) -> None:
    t.ok("success", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"))
    t.errno("again", t.ioctl(t.vm, "KVM_CREATE_IRQCHIP"), E.EEXIST)
    late = t.new_vm()
    t.new_vcpu(late)
    t.errno("after a vCPU", t.ioctl(late, "KVM_CREATE_IRQCHIP"), E.EINVAL)


@case("KVM_GET_IRQCHIP", VM, "reset state", "IRQCHIP")
def get_irqchip(t: Trial) -> None:
    chip = KvmIrqchip(chip_id=PIC_MASTER)
    t.errno("without one", t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip), E.ENXIO)
    t.errno("which is looked at before its number", t.ioctl(t.vm, "KVM_GET_IRQCHIP", KvmIrqchip(chip_id=9)), E.ENXIO)
    _irqchip(t)
    t.errno("no such chip", t.ioctl(t.vm, "KVM_GET_IRQCHIP", KvmIrqchip(chip_id=3)), E.EINVAL)
    for label, number, elcr in (("master", PIC_MASTER, 0xF8), ("slave", PIC_SLAVE, 0xDE)):
        chip = KvmIrqchip(chip_id=number)
        t.ok(label, t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip))
        pic = chip.chip.pic
        t.equal(f"{label}: irr, imr, isr", (pic.irr, pic.imr, pic.isr), (0, 0, 0))
        t.equal(f"{label}: elcr_mask", pic.elcr_mask, elcr)
    chip = KvmIrqchip(chip_id=IOAPIC)
    t.ok("I/O APIC", t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip))
    t.equal("its address", chip.chip.ioapic.base_address, 0xFEC00000)
    entries = [int(struct.unpack("<Q", bytes(entry)[:8])[0]) if not isinstance(entry, int) else entry
               for entry in chip.chip.ioapic.redirtbl]
    t.equal("every pin is masked", [entry >> 16 & 1 for entry in entries], [1] * 24)


@case("KVM_SET_IRQCHIP", VM, "round trip", "IRQCHIP")
def set_irqchip(t: Trial) -> None:
    """Declared as a read, yet it is input: the caller's struct must not change."""
    t.errno("without one", t.ioctl(t.vm, "KVM_SET_IRQCHIP", KvmIrqchip()), E.ENXIO)
    _irqchip(t)
    t.errno("no such chip", t.ioctl(t.vm, "KVM_SET_IRQCHIP", KvmIrqchip(chip_id=3)), E.EINVAL)
    for label, number in (("master", PIC_MASTER), ("slave", PIC_SLAVE)):
        chip = KvmIrqchip(chip_id=number)
        t.need(f"get {label}", t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip))
        chip.chip.pic.imr, chip.chip.pic.irq_base, chip.chip.pic.elcr = 0xA5, 0x20, 0x08
        written = bytes(chip)
        t.ok(f"set {label}", t.ioctl(t.vm, "KVM_SET_IRQCHIP", chip))
        t.equal(f"{label}: the caller's struct is unchanged", bytes(chip) == written, True)
        again = KvmIrqchip(chip_id=number)
        t.need(f"get {label} again", t.ioctl(t.vm, "KVM_GET_IRQCHIP", again))
        t.equal(f"{label}: it was taken", (again.chip.pic.imr, again.chip.pic.irq_base, again.chip.pic.elcr), (0xA5, 0x20, 8))
    chip = KvmIrqchip(chip_id=IOAPIC)
    t.need("get the I/O APIC", t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip))
    at = 8 + 24                                 # chip.ioapic.redirtbl
    data = buffer(520, bytes(chip))
    struct.pack_into("<Q", data, at + 8 * 5, 0x0100000000010030)
    t.ok("set the I/O APIC", t.ioctl(t.vm, "KVM_SET_IRQCHIP", data))
    again = KvmIrqchip(chip_id=IOAPIC)
    t.need("get it again", t.ioctl(t.vm, "KVM_GET_IRQCHIP", again))
    t.equal("pin 5", struct.unpack_from("<Q", bytes(again), at + 40)[0], 0x0100000000010030)


@case("KVM_IRQ_LINE", VM, "with and without irqchip", "IRQCHIP")
def irq_line(t: Trial) -> None:
    t.errno("without one", t.ioctl(t.vm, "KVM_IRQ_LINE", KvmIrqLevel(level=1)), E.ENXIO)
    _irqchip(t)
    line = KvmIrqLevel(level=1)
    line.irq = 4
    t.ok("raise", t.ioctl(t.vm, "KVM_IRQ_LINE", line))
    t.equal("nothing comes back", (line.irq, line.level), (4, 1))
    chip = KvmIrqchip(chip_id=PIC_MASTER)
    t.need("the PIC", t.ioctl(t.vm, "KVM_GET_IRQCHIP", chip))
    t.equal("irr", chip.chip.pic.irr & 0x10, 0x10)
    line.level = 0
    t.ok("lower", t.ioctl(t.vm, "KVM_IRQ_LINE", line))
    line.irq = 9999
    t.ok("a GSI without route", t.ioctl(t.vm, "KVM_IRQ_LINE", line))


@case("KVM_IRQ_LINE_STATUS", VM, "with and without irqchip", "IRQ_INJECT_STATUS")
def irq_line_status(t: Trial) -> None:
    t.errno("without one", t.ioctl(t.vm, "KVM_IRQ_LINE_STATUS", KvmIrqLevel(level=1)), E.ENXIO)
    _irqchip(t)
    line = KvmIrqLevel(level=1)
    line.irq = 4
    t.ok("raise", t.ioctl(t.vm, "KVM_IRQ_LINE_STATUS", line))
    t.note("status", ctypes.c_int32(line.status).value)
    line.irq = 9999
    t.ok("a GSI without route", t.ioctl(t.vm, "KVM_IRQ_LINE_STATUS", line))
    t.equal("its status", ctypes.c_int32(line.status).value, -1)


# ---- PIT ----------------------------------------------------------------------------------------------------


@case("KVM_CREATE_PIT", VM, "needs a pic", "PIT")
def create_pit(t: Trial) -> None:
    t.errno("without a PIC", t.ioctl(t.vm, "KVM_CREATE_PIT"), E.ENOENT)
    _irqchip(t)
    t.ok("success", t.ioctl(t.vm, "KVM_CREATE_PIT"))
    t.errno("again", t.ioctl(t.vm, "KVM_CREATE_PIT"), E.EEXIST)
    t.errno("KVM_CREATE_PIT2 too", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig()), E.EEXIST)


@case("KVM_CREATE_PIT2", VM, "needs a pic", "PIT2")
def create_pit2(t: Trial) -> None:
    t.errno("without a PIC", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig()), E.ENOENT)
    _irqchip(t)
    t.ok("with the speaker", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig(flags=1)))
    t.errno("again", t.ioctl(t.vm, "KVM_CREATE_PIT2", KvmPitConfig()), E.EEXIST)


@case("KVM_GET_PIT", VM, "reset state", "PIT")
def get_pit(t: Trial) -> None:
    t.errno("without one", t.ioctl(t.vm, "KVM_GET_PIT", KvmPitState()), E.ENXIO)
    _pit(t)
    state = KvmPitState()
    t.ok("success", t.ioctl(t.vm, "KVM_GET_PIT", state))
    t.equal("counts of the channels", [channel.count for channel in state.channels], [0x10000] * 3)
    t.equal("gates", [channel.gate for channel in state.channels], [1, 1, 0])


@case("KVM_GET_PIT2", VM, "reset state", "PIT_STATE2")
def get_pit2(t: Trial) -> None:
    t.errno("without one", t.ioctl(t.vm, "KVM_GET_PIT2", KvmPitState2()), E.ENXIO)
    t.errno("which is looked at before the pointer", t.ioctl(t.vm, "KVM_GET_PIT2", BAD_POINTER), E.ENXIO)
    _pit(t)
    state = KvmPitState2()
    t.ok("success", t.ioctl(t.vm, "KVM_GET_PIT2", state))
    t.equal("flags", state.flags, 0)
    t.equal("mode of the channels", [channel.mode for channel in state.channels], [0xFF] * 3)


@case("KVM_SET_PIT", VM, "round trip", "PIT")
def set_pit(t: Trial) -> None:
    """Declared as a read, yet it is input: the caller's struct must not change."""
    t.errno("without one", t.ioctl(t.vm, "KVM_SET_PIT", KvmPitState()), E.ENXIO)
    _pit(t)
    state = KvmPitState()
    state.channels[2].count, state.channels[2].mode, state.channels[2].gate = 0x1234, 3, 1
    written = bytes(state)
    t.ok("set", t.ioctl(t.vm, "KVM_SET_PIT", state))
    t.equal("the caller's struct is unchanged", bytes(state) == written, True)
    again = KvmPitState()
    t.ok("get", t.ioctl(t.vm, "KVM_GET_PIT", again))
    t.equal("channel 2", (again.channels[2].count, again.channels[2].mode), (0x1234, 3))


@case("KVM_SET_PIT2", VM, "round trip", "PIT_STATE2")
def set_pit2(t: Trial) -> None:
    t.errno("without one", t.ioctl(t.vm, "KVM_SET_PIT2", KvmPitState2()), E.ENXIO)
    _pit(t)
    state = KvmPitState2(flags=1)
    state.channels[2].count, state.channels[2].mode = 0x4321, 2
    t.ok("set", t.ioctl(t.vm, "KVM_SET_PIT2", state))
    again = KvmPitState2()
    t.ok("get", t.ioctl(t.vm, "KVM_GET_PIT2", again))
    t.equal("channel 2 and the HPET flag", (again.channels[2].count, again.channels[2].mode, again.flags), (0x4321, 2, 1))


@case("KVM_REINJECT_CONTROL", VM, "a pointer without size", "REINJECT_CONTROL")
def reinject(t: Trial) -> None:
    name = "KVM_REINJECT_CONTROL"
    t.errno("without a PIT", t.ioctl(t.vm, name, KvmReinjectControl()), E.ENXIO)
    _pit(t)
    for value in (0, 1):
        t.ok(str(value), t.ioctl(t.vm, name, KvmReinjectControl(pit_reinject=value)))


# ---- routing ------------------------------------------------------------------------------------------------


def _routes(t: Trial, *entries: tuple[int, int, int, bytes], nr: int | None = None, flags: int = 0) -> Result:
    """KVM_SET_GSI_ROUTING; an entry is (gsi, type, flags, union)."""
    size = ctypes.sizeof(KvmIrqRoutingEntry)
    body = b"".join((struct.pack("<IIII", gsi, kind, entry_flags, 0) + union).ljust(size, b"\0")
                    for gsi, kind, entry_flags, union in entries)
    head = struct.pack("<II", len(entries) if nr is None else nr, flags)
    return t.ioctl(t.vm, "KVM_SET_GSI_ROUTING", buffer(8 + len(body), head + body))


_MSI = struct.pack("<III", 0xFEE00000, 0, 0x30)


@case("KVM_SET_GSI_ROUTING", VM, "tables", "IRQ_ROUTING")
def gsi_routing(t: Trial) -> None:
    t.errno("without an irqchip", _routes(t), E.EINVAL)
    _irqchip(t)
    t.ok("empty", _routes(t))
    t.ok("an MSI", _routes(t, (24, 2, 0, _MSI)))
    t.ok("a pin of the PIC and one of the I/O APIC on the same GSI", _routes(
        t, (4, 1, 0, struct.pack("<II", PIC_MASTER, 4)), (4, 1, 0, struct.pack("<II", IOAPIC, 4))))
    t.errno("flags of the table", _routes(t, flags=1), E.EINVAL)
    t.errno("over 4096 entries", _routes(t, nr=MAX_ROUTES + 1), E.EINVAL)
    t.errno("GSI too large", _routes(t, (MAX_ROUTES, 2, 0, _MSI)), E.EINVAL)
    t.errno("type 0", _routes(t, (1, 0, 0, _MSI)), E.EINVAL)
    t.errno("flags of an entry", _routes(t, (1, 1, 1, struct.pack("<II", IOAPIC, 4))), E.EINVAL)
    t.errno("no such chip", _routes(t, (1, 1, 0, struct.pack("<II", 3, 4))), E.EINVAL)
    t.errno("no such pin", _routes(t, (1, 1, 0, struct.pack("<II", IOAPIC, 24))), E.EINVAL)
    t.errno("two MSIs on one GSI", _routes(t, (24, 2, 0, _MSI), (24, 2, 0, _MSI)), E.EINVAL)


@case("KVM_SIGNAL_MSI", VM, "errors", "SIGNAL_MSI")
def signal_msi(t: Trial) -> None:
    t.errno("without an irqchip", t.ioctl(t.vm, "KVM_SIGNAL_MSI", KvmMsi(address_lo=0xFEE00000, data=0x30)), E.EINVAL)
    _irqchip(t)
    t.need("a vCPU", t.ioctl(t.vcpu, "KVM_GET_MP_STATE", buffer(4)))
    t.errno("flags", t.ioctl(t.vm, "KVM_SIGNAL_MSI", KvmMsi(address_lo=0xFEE00000, data=0x30, flags=2)), E.EINVAL)
    t.ok("an APIC that is off at reset", t.ioctl(t.vm, "KVM_SIGNAL_MSI", KvmMsi(address_lo=0xFEE00000, data=0x30)), None)


# ---- eventfds -----------------------------------------------------------------------------------------------


@case("KVM_IRQFD", VM, "assign and errors", "IRQFD")
def irqfd(t: Trial) -> None:
    name, event = "KVM_IRQFD", t.keep(os.eventfd(0))
    t.errno("without an irqchip", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=4)), E.EINVAL)
    t.errno("flags are looked at before", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=4, flags=4)), E.EINVAL)
    _irqchip(t)
    t.errno("no descriptor", t.ioctl(t.vm, name, KvmIrqfd(fd=0xFFFFFFFF, gsi=4)), E.EBADF)
    t.errno("no eventfd", t.ioctl(t.vm, name, KvmIrqfd(fd=t.system, gsi=4)), E.EINVAL)
    t.ok("assign", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=4)))
    t.errno("assigned already", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=5)), E.EBUSY)
    t.ok("deassign", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=4, flags=1)))
    t.ok("deassign again", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=4, flags=1)))
    t.errno("deassign no descriptor", t.ioctl(t.vm, name, KvmIrqfd(fd=0xFFFFFFFF, gsi=4, flags=1)), E.EBADF)
    t.ok("on another GSI then", t.ioctl(t.vm, name, KvmIrqfd(fd=event, gsi=5)))
    if t.has("IRQFD_RESAMPLE"):
        other = t.keep(os.eventfd(0))
        t.errno("resample without its descriptor", t.ioctl(t.vm, name, KvmIrqfd(fd=other, gsi=6, flags=2, resamplefd=0xFFFFFFFF)),
                E.EBADF)
        t.ok("resample", t.ioctl(t.vm, name, KvmIrqfd(fd=other, gsi=6, flags=2, resamplefd=t.keep(os.eventfd(0)))))


@case("KVM_IOEVENTFD", VM, "assign and errors", "IOEVENTFD")
def ioeventfd(t: Trial) -> None:
    name, event = "KVM_IOEVENTFD", t.keep(os.eventfd(0))
    match, pio, deassign = 1, 2, 4
    at = 0xFE000000
    t.ok("MMIO", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event)))
    t.errno("the same again", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event)), E.EEXIST)
    t.errno("a match where everything matches already", t.ioctl(
        t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event, datamatch=1, flags=match)), E.EEXIST)
    t.ok("a port, matching 1", t.ioctl(t.vm, name, KvmIoeventfd(addr=0x510, len=2, fd=event, datamatch=1, flags=match | pio)))
    t.ok("and matching 2", t.ioctl(t.vm, name, KvmIoeventfd(addr=0x510, len=2, fd=event, datamatch=2, flags=match | pio)))
    if t.has("IOEVENTFD_NO_LENGTH"):
        t.ok("any length", t.ioctl(t.vm, name, KvmIoeventfd(addr=at + 8, len=0, fd=event)))
        t.errno("any length with a match", t.ioctl(t.vm, name, KvmIoeventfd(addr=at + 16, len=0, fd=event, flags=match)), E.EINVAL)
    t.errno("length 3", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=3, fd=event)), E.EINVAL)
    t.errno("length 16", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=16, fd=event)), E.EINVAL)
    t.errno("the end wraps around", t.ioctl(t.vm, name, KvmIoeventfd(addr=(1 << 64) - 1, len=4, fd=event)), E.EINVAL)
    t.errno("unknown flag", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event, flags=1 << 5)), E.EINVAL)
    t.errno("no descriptor", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=-1)), E.EBADF)
    t.errno("no eventfd", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=t.system)), E.EINVAL)
    t.ok("deassign", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event, flags=deassign)))
    t.errno("deassign again", t.ioctl(t.vm, name, KvmIoeventfd(addr=at, len=4, fd=event, flags=deassign)), E.ENOENT)
    t.errno("deassign another value", t.ioctl(
        t.vm, name, KvmIoeventfd(addr=0x510, len=2, fd=event, datamatch=3, flags=match | pio | deassign)), E.ENOENT)
    t.ok("deassign that value", t.ioctl(
        t.vm, name, KvmIoeventfd(addr=0x510, len=2, fd=event, datamatch=1, flags=match | pio | deassign)))
