# SPDX-License-Identifier: GPL-2.0-or-later
"""The two 8259A interrupt controllers of a PC (Linux: arch/x86/kvm/i8259.c; Intel's 8259A data sheet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi.flags import KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from kvmfs.abi.structs import KvmPicState

if TYPE_CHECKING:
    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu

PIC_NUM_PINS = 16
CASCADE = 2                     # the master's input that the slave drives
NO_PRIORITY = 8
ELCR_MASKS = (0xF8, 0xDE)       # inputs that can be level-triggered: not 0-2, 8, 13
_FIELDS = ("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll",
           "special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode",
           "init4", "elcr", "elcr_mask")


class I8259:
    """One controller (``struct kvm_kpic_state``); ``index`` 0 is the master.

    ``init_state`` says which initialization word comes next: 0 none, 1 ICW2, 2 ICW3, 3 ICW4.
    """

    __slots__ = (*_FIELDS, "_pair", "index")

    def __init__(self, pair: Pic, index: int) -> None:
        self._pair, self.index = pair, index
        for name in _FIELDS:
            setattr(self, name, 0)
        self.elcr_mask = ELCR_MASKS[index]

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int

    # ---- inputs and priorities ----------------------------------------------------------------------

    def set_irq(self, irq: int, level: bool) -> int:
        """1: a new request; 0: it was there already; -1: masked."""
        mask, result = 1 << irq, 1
        if self.elcr & mask:
            if level:
                result = int(not self.irr & mask)
                self.irr |= mask
                self.last_irr |= mask
            else:
                self.irr &= ~mask
                self.last_irr &= ~mask
        elif level:
            if not self.last_irr & mask:
                result = int(not self.irr & mask)
                self.irr |= mask
            self.last_irr |= mask
        else:
            self.last_irr &= ~mask
        return -1 if self.imr & mask else result

    def priority(self, mask: int) -> int:
        """The highest priority among the inputs in ``mask``: 0 is the highest, NO_PRIORITY when empty."""
        if not mask:
            return NO_PRIORITY
        priority = 0
        while not mask & 1 << (priority + self.priority_add & 7):
            priority += 1
        return priority

    def get_irq(self) -> int:
        """The input to be served now, or -1."""
        priority = self.priority(self.irr & ~self.imr)
        if priority == NO_PRIORITY:
            return -1
        in_service = self.isr
        if self.special_fully_nested_mode and self.index == 0:
            in_service &= ~(1 << CASCADE)
        return priority + self.priority_add & 7 if priority < self.priority(in_service) else -1

    def intack(self, irq: int) -> None:
        """The CPU takes ``irq``."""
        self.isr |= 1 << irq
        if not self.elcr & 1 << irq:
            self.irr &= ~(1 << irq)
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = irq + 1 & 7
            self.clear_isr(irq)

    def clear_isr(self, irq: int) -> None:
        self.isr &= ~(1 << irq)
        self._pair.acked(self.index, irq)

    # ---- the guest's accesses -----------------------------------------------------------------------

    def _reset(self) -> None:
        """ICW1."""
        edges = self.irr & ~self.elcr
        self.last_irr = 0
        self.irr &= self.elcr
        self.imr = self.priority_add = self.special_mask = self.read_reg_select = 0
        if not self.init4:
            self.special_fully_nested_mode = self.auto_eoi = 0
        self.init_state = 1
        if self._pair.is_wired():
            for irq in range(8):
                if edges & 1 << irq:
                    self.clear_isr(irq)

    def write_command(self, value: int) -> None:
        """ICW1, OCW2 or OCW3, at the even port."""
        if value & 0x10:
            self.init4 = value & 1
            self._reset()
        elif value & 0x08:
            if value & 0x04:
                self.poll = 1
            if value & 0x02:
                self.read_reg_select = value & 1
            if value & 0x40:
                self.special_mask = value >> 5 & 1
        else:
            self._ocw2(value >> 5, value & 7)

    def _ocw2(self, command: int, irq: int) -> None:
        """Rotate (4), specific (2), EOI (1) in the combinations of the data sheet's table."""
        if command in (0, 4):
            self.rotate_on_auto_eoi = command >> 2
        elif command in (1, 5):
            priority = self.priority(self.isr)
            if priority == NO_PRIORITY:
                return
            irq = priority + self.priority_add & 7
            if command == 5:
                self.priority_add = irq + 1 & 7
            self.clear_isr(irq)
            self._pair.update_irq()
        elif command in (3, 7):
            if command == 7:
                self.priority_add = irq + 1 & 7
            self.clear_isr(irq)
            self._pair.update_irq()
        elif command == 6:
            self.priority_add = irq + 1 & 7
            self._pair.update_irq()

    def write_data(self, value: int) -> None:
        """OCW1 (the mask), or the next of ICW2 to ICW4, at the odd port."""
        if self.init_state == 0:
            changed, self.imr = self.imr ^ value, value
            for irq in range(8):
                if changed & 1 << irq:
                    self._pair.masked(self.index, irq, bool(value & 1 << irq))
            self._pair.update_irq()
        elif self.init_state == 1:
            self.irq_base, self.init_state = value & 0xF8, 2
        elif self.init_state == 2:
            self.init_state = 3 if self.init4 else 0
        else:
            self.special_fully_nested_mode, self.auto_eoi = value >> 4 & 1, value >> 1 & 1
            self.init_state = 0

    def read(self, address: int) -> int:
        if self.poll:
            self.poll = 0
            return self._poll_read()
        if address & 1:
            return self.imr
        return self.isr if self.read_reg_select else self.irr

    def _poll_read(self) -> int:
        """Reading after OCW3's poll command acknowledges the highest request."""
        irq = self.get_irq()
        if irq < 0:
            self._pair.update_irq()
            return 0x07
        if self.index:
            master = self._pair.pics[0]
            master.isr &= ~(1 << CASCADE)
            master.irr &= ~(1 << CASCADE)
        self.irr &= ~(1 << irq)
        self.clear_isr(irq)
        if self.index or irq != CASCADE:
            self._pair.update_irq()
        return irq | 0x80

    # ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP -----------------------------------------------------------

    def get_state(self) -> KvmPicState:
        return KvmPicState(**{name: getattr(self, name) for name in _FIELDS})

    def set_state(self, state: KvmPicState) -> None:
        for name in _FIELDS:
            setattr(self, name, getattr(state, name))


class Pic:
    """Master and slave (``struct kvm_pic``), and their ports 0x20, 0xA0, 0x4D0.

    ``wake`` is called when the output rises: somebody has to take an interrupt.
    """

    PORTS = ((0x20, 2), (0xA0, 2), (0x4D0, 2))

    def __init__(self, chip: Irqchip, wake: Callable[[], None], wired: Callable[[], bool]) -> None:
        self._chip, self._wake = chip, wake
        self.is_wired = wired               # does any vCPU listen to the output?
        self.pics = (I8259(self, 0), I8259(self, 1))
        self.output = False
        self._irq_states = [0] * PIC_NUM_PINS

    def acked(self, index: int, irq: int) -> None:
        self._chip.notify_acked(KVM_IRQCHIP_PIC_SLAVE if index else KVM_IRQCHIP_PIC_MASTER, irq + 8 * index)

    def masked(self, index: int, irq: int, mask: bool) -> None:
        self._chip.fire_mask_notifiers(KVM_IRQCHIP_PIC_SLAVE if index else KVM_IRQCHIP_PIC_MASTER,
                                       irq + 8 * index, mask)

    def update_irq(self) -> None:
        """The output after any change."""
        master, slave = self.pics
        if slave.get_irq() >= 0:
            master.set_irq(CASCADE, True)
            master.set_irq(CASCADE, False)
        before, self.output = self.output, master.get_irq() >= 0
        if self.output and not before:
            self._wake()

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """Drive input ``pin`` (0-15) for one of its sources; the result is I8259.set_irq's."""
        states, pic, mask = self._irq_states, self.pics[pin >> 3], 1 << (pin & 7)
        # Clients lower a line again with each access to its device: what was low and nowhere latched changes nothing.
        if not level and not states[pin] and not (pic.last_irr | pic.irr & pic.elcr) & mask:
            return -1 if pic.imr & mask else 1
        states[pin] = states[pin] | 1 << source if level else states[pin] & ~(1 << source)
        result = pic.set_irq(pin & 7, bool(states[pin]))
        self.update_irq()
        return result

    def clear_all(self, source: int) -> None:
        self._irq_states = [state & ~(1 << source) for state in self._irq_states]

    def read_irq(self) -> int:
        """The CPU acknowledges: the vector; spurious ones are the controllers' input 7."""
        self.output = False
        master, slave = self.pics
        irq = master.get_irq()
        if irq < 0:
            vector = master.irq_base + 7
        else:
            master.intack(irq)
            vector = master.irq_base + irq
            if irq == CASCADE:
                irq = slave.get_irq()
                if irq >= 0:
                    slave.intack(irq)
                vector = slave.irq_base + (irq if irq >= 0 else 7)
        self.update_irq()
        return vector

    # ---- ports --------------------------------------------------------------------------------------

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        if size != 1:
            return bytes(size)
        with self._chip.lock:
            if address >= 0x4D0:
                return bytes((self.pics[address & 1].elcr,))
            return bytes((self.pics[address >> 7].read(address) & 0xFF,))

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        if len(data) != 1:
            return True
        value = data[0]
        with self._chip.lock:
            if address >= 0x4D0:
                pic = self.pics[address & 1]
                pic.elcr = value & pic.elcr_mask
            elif address & 1:
                self.pics[address >> 7].write_data(value)
            else:
                self.pics[address >> 7].write_command(value)
        return True
