# SPDX-License-Identifier: GPL-2.0-or-later
"""What the interrupt controllers of a VM share: routing, delivery to local APICs, notifiers.

Linux: arch/x86/kvm/irq_comm.c, virt/kvm/irqchip.c.  Every state of every controller of a VM is under one
lock, :attr:`Irqchip.lock`; Linux has one for each of them.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi.flags import (
    KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
)
from kvmfs.abi.hyperv import HV_SYNIC_SINT_COUNT
from kvmfs.abi.x86 import KVM_IOAPIC_NUM_PINS, KVM_MAX_IRQ_ROUTES
from kvmfs.errors import KvmError
from kvmfs.kvm import hyperv
from kvmfs.kvm.apic_map import ApicMap, ApicMessage, build_map
from kvmfs.kvm.eventpoll import EventPoll
from kvmfs.kvm.hrtimer import HrTimers
from kvmfs.kvm.i8254 import Pit
from kvmfs.kvm.i8259 import PIC_NUM_PINS, Pic
from kvmfs.kvm.ioapic import IoApic

if TYPE_CHECKING:
    from kvmfs.kvm.eventfd import Resampler
    from kvmfs.kvm.hyperv_synic import SynIc
    from kvmfs.kvm.kvm_main import Vcpu, Vm
    from kvmfs.kvm.lapic_core import LapicCore

USERSPACE_IRQ_SOURCE, RESAMPLE_IRQ_SOURCE = 0, 1
MAX_IRQ_SOURCES = 64
APIC_BUS_CYCLE_NS_DEFAULT = 1


@dataclass(frozen=True, slots=True)
class Route:
    """``struct kvm_kernel_irq_routing_entry``: a pin of a controller, an MSI, or a SynIC's source.

    That source is ``pin`` of the virtual processor with index ``irqchip``.
    """

    gsi: int
    type: int
    irqchip: int = 0
    pin: int = 0
    address_lo: int = 0
    address_hi: int = 0
    data: int = 0


class RoutingTable:
    """GSI → routes, and (controller, pin) → GSI.  EINVAL for what cannot be together."""

    def __init__(self, routes: Iterable[Route] = (), highest_gsi: int = 0) -> None:
        self.by_gsi: dict[int, list[Route]] = {}
        self.gsi_of: dict[tuple[int, int], int] = {}
        self.size = highest_gsi + 1
        for route in routes:
            there = self.by_gsi.setdefault(route.gsi, [])
            if any(other.type != KVM_IRQ_ROUTING_IRQCHIP or route.type != other.type
                   or other.irqchip == route.irqchip for other in there):
                raise KvmError(errno.EINVAL)
            there.append(route)
            if route.type == KVM_IRQ_ROUTING_IRQCHIP:
                self.gsi_of[route.irqchip, route.pin] = route.gsi


def default_routing() -> RoutingTable:
    """GSI n is pin n of the I/O APIC, and below 16 of the PICs."""
    routes: list[Route] = []
    for gsi in range(KVM_IOAPIC_NUM_PINS):
        routes.append(Route(gsi, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, gsi))
        if gsi < PIC_NUM_PINS:
            chip = KVM_IRQCHIP_PIC_SLAVE if gsi >= 8 else KVM_IRQCHIP_PIC_MASTER
            routes.append(Route(gsi, KVM_IRQ_ROUTING_IRQCHIP, chip, gsi))
    return RoutingTable(routes, KVM_IOAPIC_NUM_PINS - 1)


class Irqchip:
    """The in-kernel interrupt controllers of one VM.

    ``split``: only the local APICs are here.  ``ack_notifiers`` and ``mask_notifiers``: what wants to know
    when a GSI is acknowledged, or masked and unmasked at its controller.  ``resamplers``: GSI → its
    level-triggered irqfds.
    """

    def __init__(self, vm: Vm, *, split: bool, reserved_pins: int = 0) -> None:
        self.vm, self.split, self.nr_reserved_ioapic_pins = vm, split, reserved_pins
        self.lock = threading.RLock()
        self.timers = HrTimers(self.lock)
        self.eventpoll = EventPoll(self.lock)
        self.bus_cycle_ns = APIC_BUS_CYCLE_NS_DEFAULT
        self.ack_notifiers: dict[int, list[Callable[[], None]]] = {}
        self.mask_notifiers: dict[int, list[Callable[[bool], None]]] = {}
        self.resamplers: dict[int, Resampler] = {}
        self._sources = 1 << USERSPACE_IRQ_SOURCE | 1 << RESAMPLE_IRQ_SOURCE
        self.nmi_watchdogs = 0              # local APICs whose LINT0 delivers NMIs
        self._map: ApicMap | None = None
        self.pit: Pit | None = None
        self.pic: Pic | None = None
        self.ioapic: IoApic | None = None
        if split:
            self.routing = RoutingTable()
        else:
            self.pic = Pic(self, self._wake_for_pic, self._pic_is_wired)
            self.ioapic = IoApic(self)
            self.routing = default_routing()

    def close(self) -> None:
        self.timers.close()
        self.eventpoll.close()

    @property
    def apics(self) -> Iterable[LapicCore]:
        for vcpu in self.vm.vcpus:
            if vcpu.arch.apic is not None:
                yield vcpu.arch.apic

    # ---- sources and notifiers ----------------------------------------------------------------------

    def request_irq_source(self) -> int:
        """A number by which a device's level is told from others' on the same line.  EFAULT: none is left."""
        with self.lock:
            for source in range(MAX_IRQ_SOURCES):
                if not self._sources & 1 << source:
                    self._sources |= 1 << source
                    return source
        raise KvmError(errno.EFAULT)

    def free_irq_source(self, source: int) -> None:
        with self.lock:
            self._sources &= ~(1 << source)
            if self.pic is not None and self.ioapic is not None:
                self.ioapic.clear_all(source)
                self.pic.clear_all(source)

    def add_ack_notifier(self, gsi: int, notify: Callable[[], None]) -> None:
        """``kvm_register_irq_ack_notifier``."""
        with self.lock:
            self.ack_notifiers.setdefault(gsi, []).append(notify)
            self.request_scan()

    def remove_ack_notifier(self, gsi: int, notify: Callable[[], None]) -> None:
        with self.lock:
            self.ack_notifiers[gsi].remove(notify)
            self.request_scan()

    def notify_acked(self, irqchip: int, pin: int) -> None:
        """``kvm_notify_acked_irq``."""
        gsi = self.routing.gsi_of.get((irqchip, pin))
        if gsi is not None:
            self.notify_acked_gsi(gsi)

    def notify_acked_gsi(self, gsi: int) -> None:
        """``kvm_notify_acked_gsi``."""
        for notify in tuple(self.ack_notifiers.get(gsi, ())):
            notify()

    def has_notifier(self, irqchip: int, pin: int) -> bool:
        """``kvm_irq_has_notifier``."""
        gsi = self.routing.gsi_of.get((irqchip, pin))
        return gsi is not None and bool(self.ack_notifiers.get(gsi))

    def fire_mask_notifiers(self, irqchip: int, pin: int, masked: bool) -> None:
        gsi = self.routing.gsi_of.get((irqchip, pin))
        if gsi is not None:
            for notify in tuple(self.mask_notifiers.get(gsi, ())):
                notify(masked)

    def notify_resampler(self, irqchip: int, pin: int) -> bool:
        """``kvm_notify_irqfd_resampler``: is there one for this pin?"""
        gsi = self.routing.gsi_of.get((irqchip, pin))
        resampler = self.resamplers.get(gsi) if gsi is not None else None
        if resampler is None:
            return False
        resampler.notify()
        return True

    # ---- the PIC's output ---------------------------------------------------------------------------

    def _pic_is_wired(self) -> bool:
        return any(apic.accepts_pic_intr() for apic in self.apics)

    def _wake_for_pic(self) -> None:
        for apic in self.apics:
            if apic.accepts_pic_intr():
                apic.request_event()
                return

    def deliver_pit_nmi(self) -> None:
        """The timer's line at LINT0, for those that made an NMI watchdog of it."""
        if self.nmi_watchdogs:
            for apic in self.apics:
                apic.local_deliver(A.APIC_LVT0)

    # ---- routing ------------------------------------------------------------------------------------

    def set_routing(self, entries: Iterable[tuple[int, int, int, tuple[int, int, int]]]) -> None:
        """KVM_SET_GSI_ROUTING from (gsi, type, flags, first three words of the union).  EINVAL."""
        entries = tuple(entries)
        if any(gsi >= KVM_MAX_IRQ_ROUTES for gsi, *_ in entries):
            raise KvmError(errno.EINVAL)
        highest = max((gsi for gsi, *_ in entries), default=0)
        table = RoutingTable((self._route(*entry) for entry in entries), highest)
        with self.lock:
            self.routing = table
            self._update_sints(table)
            if self.split:
                self.request_scan()

    def _update_sints(self, table: RoutingTable) -> None:
        """``kvm_hv_irq_routing_update``: which GSI a SynIC's source belongs to."""
        for gsi, routes in table.by_gsi.items():
            for route in routes:
                if route.type == KVM_IRQ_ROUTING_HV_SINT:
                    synic = self._synic(route)
                    if synic is not None and route.pin < HV_SYNIC_SINT_COUNT:
                        synic.sint_to_gsi[route.pin] = gsi

    def _synic(self, route: Route) -> SynIc | None:
        """``synic_get``: the active SynIC of a route's virtual processor."""
        vcpu = hyperv.vcpu_by_vp_index(self.vm, route.irqchip)
        hv = vcpu.arch.hyperv if vcpu is not None else None
        return hv.synic if hv is not None and hv.synic.active else None

    def _route(self, gsi: int, kind: int, flags: int, words: tuple[int, int, int]) -> Route:
        allowed = KVM_MSI_VALID_DEVID if kind == KVM_IRQ_ROUTING_MSI else 0
        if flags & ~allowed:
            raise KvmError(errno.EINVAL)
        if kind == KVM_IRQ_ROUTING_MSI:
            route = Route(gsi, kind, address_lo=words[0], address_hi=words[1], data=words[2])
            if self._invalid_msi(route):
                raise KvmError(errno.EINVAL)
            return route
        if kind == KVM_IRQ_ROUTING_HV_SINT:
            return Route(gsi, kind, irqchip=words[0], pin=words[1])
        if kind != KVM_IRQ_ROUTING_IRQCHIP or self.split:
            raise KvmError(errno.EINVAL)
        irqchip, pin, _ = words
        pins = {KVM_IRQCHIP_PIC_MASTER: 8, KVM_IRQCHIP_PIC_SLAVE: 8, KVM_IRQCHIP_IOAPIC: KVM_IOAPIC_NUM_PINS}
        if pin >= pins.get(irqchip, 0):
            raise KvmError(errno.EINVAL)
        return Route(gsi, kind, irqchip, pin + 8 if irqchip == KVM_IRQCHIP_PIC_SLAVE else pin)

    def set_irq(self, source: int, gsi: int, level: bool, *, line_status: bool = False) -> int:
        """``kvm_set_irq``: to how many CPUs it went; 0: coalesced; -1: masked, or nobody wanted it."""
        result = -1
        with self.lock:
            for route in self.routing.by_gsi.get(gsi, ()):     # a table never changes, it is replaced
                got = self._set_route(route, source, level, line_status)
                if got >= 0:
                    result = max(result, 0) + got
        return result

    def pulse(self, source: int, gsi: int) -> None:
        """The line rises and falls; an MSI has no line that could fall."""
        routes = self.routing.by_gsi.get(gsi)
        if routes is not None and len(routes) == 1 and routes[0].type == KVM_IRQ_ROUTING_MSI:
            self.set_msi(routes[0], True)
        else:
            self.set_irq(source, gsi, True)
            self.set_irq(source, gsi, False)

    def _set_route(self, route: Route, source: int, level: bool, line_status: bool) -> int:
        if route.type == KVM_IRQ_ROUTING_MSI:
            return self.set_msi(route, level)
        if route.type == KVM_IRQ_ROUTING_HV_SINT:
            if not level:
                return -1
            synic = self._synic(route)
            return synic.set_irq(route.pin) if synic is not None else -errno.EINVAL
        if route.irqchip == KVM_IRQCHIP_IOAPIC:
            return self.ioapic.set_irq(route.pin, source, level, line_status) if self.ioapic is not None else -1
        return self.pic.set_irq(route.pin, source, level) if self.pic is not None else -1

    # ---- MSI ----------------------------------------------------------------------------------------

    def _invalid_msi(self, route: Route) -> bool:
        return self.vm.arch.x2apic_format and bool(route.address_hi & 0xFF)

    def msi_message(self, route: Route) -> ApicMessage:
        """``kvm_set_msi_irq`` (SDM 11.11); with 32-bit IDs the rest of the ID is in address_hi."""
        low, data = route.address_lo, route.data
        dest = low >> A.MSI_ADDR_DEST_SHIFT & 0xFF
        if self.vm.arch.x2apic_format:
            dest |= route.address_hi & 0xFFFFFF00
        return ApicMessage(dest, data & 0xFF, data & A.APIC_MODE_MASK, bool(low & A.MSI_ADDR_DEST_LOGICAL), True,
                           bool(data & A.MSI_DATA_LEVEL), redirect_hint=bool(low & A.MSI_ADDR_REDIRECT_HINT))

    def set_msi(self, route: Route, level: bool) -> int:
        """``kvm_set_msi``: as set_irq; -EINVAL for an address that cannot be."""
        if self._invalid_msi(route):
            return -errno.EINVAL
        if not level:
            return -1
        with self.lock:
            return self.deliver(None, self.msi_message(route))

    # ---- delivery -----------------------------------------------------------------------------------

    def request_scan(self) -> None:
        """``kvm_make_scan_ioapic_request``: which vectors' EOIs matter is to be found out again."""
        for apic in self.apics:
            apic.scan_request = True

    def map_changed(self) -> None:
        """An APIC's ID, mode or destination registers changed."""
        self._map = None
        self.request_scan()

    @property
    def apic_map(self) -> ApicMap:
        count = len(self.vm.vcpus)
        current = self._map
        if current is None or current.vcpus != count:
            self._map = current = build_map(self.vm, count)
        return current

    def deliver(self, source: LapicCore | None, message: ApicMessage, dest: dict[int, int] | None = None) -> int:
        """``kvm_irq_delivery_to_apic``: how many APICs accepted it; -1: it found none.

        ``source``: whose IPI it is.  ``dest``: collects vCPU id → vector of those that accepted it.
        """
        if message.shorthand == A.APIC_DEST_SELF:
            return source.accept(message, dest) if source is not None else 0
        targets = self.apic_map.targets(source, message, self.vm.arch.x2apic_broadcast_quirk_disabled)
        if targets is not None:
            return sum(apic.accept(message, dest) for apic in targets)
        return self._deliver_slow(source, message, dest)

    def _deliver_slow(self, source: LapicCore | None, message: ApicMessage, dest: dict[int, int] | None) -> int:
        """Ask every APIC: broadcasts, shorthands, and IDs that are not unique."""
        if not message.logical and message.dest_id == A.APIC_BROADCAST and message.lowest_priority:
            message = message._replace(delivery_mode=A.APIC_DM_FIXED)
        found = [apic for apic in self.apics if apic.hw_enabled and apic.matches(source, message)]
        if not message.lowest_priority:
            return sum(apic.accept(message, dest) for apic in found) if found else -1
        candidates = [apic for apic in found if apic.sw_enabled]
        if not candidates:
            return -1
        return candidates[message.vector % len(candidates)].accept(message, dest)

    # ---- level-triggered MSIs of a userspace I/O APIC ---------------------------------------------

    def scan_routes(self, apic: LapicCore) -> int:
        """``kvm_scan_ioapic_routes``: the bitmap of vectors whose EOI the client wants to see."""
        handled = 0
        for gsi in range(min(self.routing.size, self.nr_reserved_ioapic_pins)):
            for route in self.routing.by_gsi.get(gsi, ()):
                if route.type != KVM_IRQ_ROUTING_MSI:
                    continue
                message = self.msi_message(route)
                if message.level_triggered and (apic.matches(None, message) or apic.pending_eoi(message.vector)):
                    handled |= 1 << message.vector
        return handled

    def eoi(self, vcpu: Vcpu, vector: int, level_triggered: bool) -> None:
        if self.ioapic is not None:
            self.ioapic.update_eoi(vcpu, vector, level_triggered)
