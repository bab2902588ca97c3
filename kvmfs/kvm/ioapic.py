# SPDX-License-Identifier: GPL-2.0-or-later
"""The I/O APIC (Linux: arch/x86/kvm/ioapic.c; Intel's 82093AA data sheet)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi.flags import KVM_IRQCHIP_IOAPIC
from kvmfs.abi.structs import KvmIoapicState
from kvmfs.abi.x86 import IO_APIC_DEFAULT_PHYS_BASE, KVM_IOAPIC_NUM_PINS
from kvmfs.kvm.apic_map import ApicMessage
from kvmfs.kvm.hrtimer import HrTimer, now_ns

if TYPE_CHECKING:
    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu
    from kvmfs.kvm.lapic_core import LapicCore

RTC_GSI = 8
SUCCESSIVE_IRQ_MAX = 10000      # level interrupts in a row until one is delayed
STORM_DELAY = 10_000_000        # ns
_M32, _M64 = (1 << 32) - 1, (1 << 64) - 1
_READ_ONLY = A.IOAPIC_REMOTE_IRR | A.IOAPIC_DELIVERY_STATUS


class IoApic:
    """``struct kvm_ioapic``: 24 redirection entries, as the guest writes them."""

    def __init__(self, chip: Irqchip) -> None:
        self._chip = chip
        self.base_address = IO_APIC_DEFAULT_PHYS_BASE
        self.ioregsel = self.id = 0
        self._pad = 0                               # struct kvm_ioapic_state's, which comes back as it was set
        self.irr = self.irr_delivered = 0
        self.redirtbl = [A.IOAPIC_MASKED] * KVM_IOAPIC_NUM_PINS
        self._irq_states = [0] * KVM_IOAPIC_NUM_PINS
        self._eois = [0] * KVM_IOAPIC_NUM_PINS      # EOIs in a row that found the line active still
        self._inject_later = HrTimer(chip.timers, self._inject_delayed)
        # The RTC's interrupt is edge-triggered, and yet whoever raises it is told when it is not acknowledged.
        self._rtc_pending_eoi = 0
        self._rtc_dest: dict[int, int] = {}         # vCPU id → vector

    # ---- inputs -------------------------------------------------------------------------------------

    def set_irq(self, pin: int, source: int, level: bool, line_status: bool) -> int:
        """Drive ``pin`` for one of its sources: CPUs that got it; 0: coalesced; -1: masked."""
        states = self._irq_states
        states[pin] = states[pin] | 1 << source if level else states[pin] & ~(1 << source)
        return self._set_level(pin, bool(states[pin]), line_status)

    def clear_all(self, source: int) -> None:
        self._irq_states = [state & ~(1 << source) for state in self._irq_states]

    def _set_level(self, pin: int, level: bool, line_status: bool) -> int:
        mask = 1 << pin
        if not level:
            self.irr &= ~mask
            return 1
        if pin == RTC_GSI and line_status and self._rtc_pending_eoi > 0:
            return 0
        before = self.irr
        self.irr |= mask
        if not self.redirtbl[pin] & A.IOAPIC_LEVEL:
            self.irr_delivered &= ~mask
            if before & mask:
                return 0
        return self._service(pin, line_status)

    def message(self, pin: int) -> ApicMessage:
        """What a redirection entry sends."""
        entry = self.redirtbl[pin]
        return ApicMessage(entry >> A.IOAPIC_DEST_SHIFT, entry & A.IOAPIC_VECTOR, entry & A.IOAPIC_DELIVERY_MODE,
                           bool(entry & A.IOAPIC_DEST_LOGICAL), True, bool(entry & A.IOAPIC_LEVEL))

    def _service(self, pin: int, line_status: bool) -> int:
        """``ioapic_service``: send the interrupt, unless it is masked or not acknowledged yet."""
        entry = self.redirtbl[pin]
        level = entry & A.IOAPIC_LEVEL
        if entry & A.IOAPIC_MASKED or (level and entry & A.IOAPIC_REMOTE_IRR):
            return -1
        if not level:
            self.irr_delivered |= 1 << pin
        if pin == RTC_GSI and line_status:
            result = self._chip.deliver(None, self.message(pin), self._rtc_dest)
            self._rtc_pending_eoi = max(result, 0)
        else:
            result = self._chip.deliver(None, self.message(pin))
        if result and level:
            self.redirtbl[pin] |= A.IOAPIC_REMOTE_IRR
        return result

    # ---- EOI ----------------------------------------------------------------------------------------

    def update_eoi(self, vcpu: Vcpu, vector: int, level_triggered: bool) -> None:
        """``kvm_ioapic_update_eoi``: a local APIC broadcasts the end of an interrupt."""
        if self._rtc_dest.get(vcpu.vcpu_id) == vector:
            del self._rtc_dest[vcpu.vcpu_id]
            self._rtc_pending_eoi = max(self._rtc_pending_eoi - 1, 0)
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if self.redirtbl[pin] & A.IOAPIC_VECTOR == vector:
                self._update_eoi_one(vcpu, pin, level_triggered)

    def _update_eoi_one(self, vcpu: Vcpu, pin: int, level_triggered: bool) -> None:
        self._chip.notify_acked(KVM_IRQCHIP_IOAPIC, pin)
        apic = vcpu.arch.apic
        if not level_triggered or apic is None or apic.reg(A.APIC_SPIV) & A.APIC_SPIV_DIRECTED_EOI:
            return
        self.redirtbl[pin] &= ~A.IOAPIC_REMOTE_IRR
        if self.redirtbl[pin] & A.IOAPIC_MASKED or not self.irr & 1 << pin:
            self._eois[pin] = 0
            return
        self._eois[pin] += 1
        if self._eois[pin] == SUCCESSIVE_IRQ_MAX:
            # A guest that does not silence the device gets to run between two interrupts all the same.
            self._eois[pin] = 0
            self._inject_later.start(now_ns() + STORM_DELAY)
        else:
            self._service(pin, False)

    def _inject_delayed(self) -> None:
        for pin in range(KVM_IOAPIC_NUM_PINS):
            entry = self.redirtbl[pin]
            if entry & A.IOAPIC_LEVEL and self.irr & 1 << pin and not entry & A.IOAPIC_REMOTE_IRR:
                self._service(pin, False)

    def scan(self, apic: LapicCore) -> int:
        """``kvm_ioapic_scan_entry``: the bitmap of vectors whose EOI must come here from ``apic``."""
        handled = 0
        rtc_vector = self._rtc_dest.get(apic.vcpu.vcpu_id)
        if rtc_vector is not None:
            handled |= 1 << rtc_vector
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if (pin == RTC_GSI or self.redirtbl[pin] & A.IOAPIC_LEVEL
                    or self._chip.has_notifier(KVM_IRQCHIP_IOAPIC, pin)):
                message = self.message(pin)
                if apic.matches(None, message) or apic.pending_eoi(message.vector):
                    handled |= 1 << message.vector
        return handled

    def restore_rtc(self, apic: LapicCore) -> None:
        """``kvm_rtc_eoi_tracking_restore_one``: an APIC's state was replaced."""
        message = self.message(RTC_GSI)
        if not apic.matches(None, message):
            return
        vcpu_id = apic.vcpu.vcpu_id
        pending, known = apic.pending_eoi(message.vector), vcpu_id in self._rtc_dest
        if pending and not known:
            self._rtc_dest[vcpu_id] = message.vector
            self._rtc_pending_eoi += 1
        elif known and not pending:
            del self._rtc_dest[vcpu_id]
            self._rtc_pending_eoi = max(self._rtc_pending_eoi - 1, 0)

    # ---- registers ----------------------------------------------------------------------------------

    def read_register(self) -> int:
        select = self.ioregsel
        if select == A.IOAPIC_REG_VERSION:
            return (KVM_IOAPIC_NUM_PINS - 1) << 16 | A.IOAPIC_VERSION_ID
        if select in (A.IOAPIC_REG_ID, A.IOAPIC_REG_ARB_ID):
            return (self.id & 0xF) << 24
        index = select - 0x10 >> 1
        entry = self.redirtbl[index] if 0 <= index < KVM_IOAPIC_NUM_PINS else _M64
        return entry >> 32 if select & 1 else entry & _M32

    def write_register(self, value: int) -> None:
        select = self.ioregsel
        if select == A.IOAPIC_REG_ID:
            self.id = value >> 24 & 0xF
        index = select - 0x10 >> 1
        if not 0 <= index < KVM_IOAPIC_NUM_PINS:
            return
        old = self.redirtbl[index]
        entry = old & _M32 | value << 32 if select & 1 else old & ~_M32 | value
        entry = entry & ~_READ_ONLY | old & _READ_ONLY
        if not entry & A.IOAPIC_LEVEL:
            entry &= ~A.IOAPIC_REMOTE_IRR       # guests without an EOI register clear it by this
        self.redirtbl[index] = entry
        if (old ^ entry) & A.IOAPIC_MASKED:
            self._chip.fire_mask_notifiers(KVM_IRQCHIP_IOAPIC, index, bool(entry & A.IOAPIC_MASKED))
        if (entry & A.IOAPIC_LEVEL and self.irr & 1 << index
                and not entry & (A.IOAPIC_MASKED | A.IOAPIC_REMOTE_IRR)):
            # The line may have fallen while it was masked: whoever can look is asked.
            if self._chip.notify_resampler(KVM_IRQCHIP_IOAPIC, index):
                self.irr &= ~(1 << index)
            else:
                self._service(index, False)
        self._chip.request_scan()

    # ---- memory -------------------------------------------------------------------------------------

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        if not self.base_address <= address < self.base_address + A.IOAPIC_MEM_LENGTH:
            return None
        with self._chip.lock:
            offset = address & 0xFF
            value = (self.ioregsel if offset == A.IOAPIC_REG_SELECT
                     else self.read_register() if offset == A.IOAPIC_REG_WINDOW else 0)
        return value.to_bytes(8, "little")[:size]

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        if not self.base_address <= address < self.base_address + A.IOAPIC_MEM_LENGTH:
            return False
        if len(data) not in (1, 2, 4, 8):
            return True
        value, offset = int.from_bytes(data[:4], "little"), address & 0xFF
        with self._chip.lock:
            if offset == A.IOAPIC_REG_SELECT:
                self.ioregsel = value & 0xFF
            elif offset == A.IOAPIC_REG_WINDOW:
                self.write_register(value)
        return True

    # ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP -----------------------------------------------------------

    def get_state(self) -> KvmIoapicState:
        state = KvmIoapicState(self.base_address, self.ioregsel, self.id, self.irr & ~self.irr_delivered, self._pad)
        for pin, entry in enumerate(self.redirtbl):
            state.redirtbl[pin] = entry
        return state

    def set_state(self, state: KvmIoapicState) -> None:
        self.base_address, self.ioregsel, self.id, self._pad = state.base_address, state.ioregsel, state.id, state.pad
        self.redirtbl = [int(entry) for entry in state.redirtbl]
        self.irr = self.irr_delivered = 0
        self._chip.request_scan()
        self._rtc_pending_eoi = 0
        self._rtc_dest.clear()
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if state.irr & 1 << pin:
                self._set_level(pin, True, True)
        self._rtc_pending_eoi = 0
        self._rtc_dest.clear()
        for apic in self._chip.apics:
            self.restore_rtc(apic)
