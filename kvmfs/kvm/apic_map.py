# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages to local APICs, and which APIC a destination means, worked out once for all of them (Linux: struct kvm_apic_map).

Only where IDs are unique and all APICs are in the same logical mode; whoever asks otherwise is told None and
has to ask every APIC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmfs.abi import apic as A

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vm
    from kvmfs.kvm.lapic_core import LapicCore

class ApicMessage(NamedTuple):
    """``struct kvm_lapic_irq``; modes and shorthand as they are in the ICR."""

    dest_id: int
    vector: int
    delivery_mode: int = A.APIC_DM_FIXED
    logical: bool = False
    level: bool = True
    level_triggered: bool = False
    shorthand: int = A.APIC_DEST_NOSHORT
    redirect_hint: bool = False

    @property
    def lowest_priority(self) -> bool:
        return self.delivery_mode == A.APIC_DM_LOWEST or self.redirect_hint


OFF, X2APIC, FLAT, CLUSTER, MIXED = "off", "x2apic", "flat", "cluster", "mixed"


class ApicMap:
    """``physical``: ID → APIC, None when IDs are not unique; ``logical``: (cluster, bit) → APIC by ``mode``."""

    def __init__(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self.physical: dict[int, LapicCore] | None = {}
        self.mode = OFF
        self.logical: dict[tuple[int, int], LapicCore] = {}

    def add(self, apic: LapicCore, x2apic_format: bool) -> None:
        self._add_physical(apic, x2apic_format)
        if self.physical is not None:
            self._add_logical(apic)

    def _add_physical(self, apic: LapicCore, x2apic_format: bool) -> None:
        ids = self.physical
        if ids is None:
            return
        x2apic, wide, narrow = apic.x2apic_mode, apic.x2apic_id, apic.xapic_id
        if x2apic_format:
            if x2apic or wide > 0xFF:
                ids[wide] = apic
            if not x2apic:
                ids.setdefault(narrow, apic)
            return
        own = wide if x2apic else narrow
        if own in ids:
            self.physical = None
        else:
            ids[own] = apic

    def _add_logical(self, apic: LapicCore) -> None:
        ldr = apic.reg(A.APIC_LDR)
        if self.mode == MIXED or not apic.sw_enabled or not ldr:
            return
        flat = apic.reg(A.APIC_DFR) == A.APIC_DFR_FLAT
        mode = X2APIC if apic.x2apic_mode else FLAT if flat else CLUSTER
        if self.mode == OFF:
            self.mode = mode
        elif self.mode != mode:
            self.mode = MIXED
            return
        if mode == X2APIC:
            return
        cluster, bits = self._split(ldr >> 24)
        if not bits:
            return
        key = (cluster, bits.bit_length() - 1)
        if bits & bits - 1 or key in self.logical:
            self.mode = MIXED
        else:
            self.logical[key] = apic

    def _split(self, dest: int) -> tuple[int, int]:
        """A logical destination as cluster and bits."""
        if self.mode == X2APIC:
            return dest >> 16, dest & 0xFFFF
        return (0, dest & 0xFF) if self.mode == FLAT else (dest >> 4 & 0xF, dest & 0xF)

    def targets(self, source: LapicCore | None, message: ApicMessage, no_quirk: bool) -> list[LapicCore] | None:
        """``kvm_apic_map_get_dest_lapic``: the APICs meant, or None: ask every one."""
        if message.shorthand or self.physical is None or self._broadcast(source, message, no_quirk):
            return None
        if not message.logical:
            apic = self.physical.get(message.dest_id)
            return [apic] if apic is not None else []
        if self.mode == MIXED:
            return None
        if self.mode == OFF:
            return []
        cluster, bits = self._split(message.dest_id)
        if message.lowest_priority:
            chosen = [i for i in range(16) if bits >> i & 1]
            if not chosen:
                return []
            bits = 1 << chosen[message.vector % len(chosen)]
        found = (self._logical(cluster, i) for i in range(16) if bits >> i & 1)
        return [apic for apic in found if apic is not None]

    def _logical(self, cluster: int, bit: int) -> LapicCore | None:
        if self.mode == X2APIC:
            return (self.physical or {}).get(cluster * 16 + bit)
        return self.logical.get((cluster, bit))

    def _broadcast(self, source: LapicCore | None, message: ApicMessage, no_quirk: bool) -> bool:
        dest = message.dest_id
        if no_quirk:
            return dest == A.X2APIC_BROADCAST or (dest == A.APIC_BROADCAST and self.mode != X2APIC)
        wide = source is not None and source.x2apic_mode
        return dest == (A.X2APIC_BROADCAST if wide else A.APIC_BROADCAST)


def build_map(vm: Vm, vcpus: int) -> ApicMap:
    """``kvm_recalculate_apic_map``."""
    result = ApicMap(vcpus)
    for vcpu in vm.vcpus[:vcpus]:
        apic = vcpu.arch.apic
        if apic is not None and apic.hw_enabled:
            result.add(apic, vm.arch.x2apic_format)
    return result
