# SPDX-License-Identifier: GPL-2.0-or-later
"""The PICs against Intel's 8259A data sheet."""

import pytest

from kvmfs.kvm.i8259 import Pic


class Chip:
    """What a PIC needs of the irqchip."""

    def __init__(self):
        import threading

        self.lock, self.acked, self.masks = threading.RLock(), [], []

    def notify_acked(self, irqchip, pin):
        self.acked.append((irqchip, pin))

    def fire_mask_notifiers(self, irqchip, pin, masked):
        self.masks.append((irqchip, pin, masked))


@pytest.fixture
def pic():
    chip, wakes = Chip(), []
    p = Pic(chip, lambda: wakes.append(1), lambda: True)
    p.chip, p.wakes = chip, wakes
    init(p)
    chip.acked.clear()
    return p


def out(p, port, *values):
    for value in values:
        assert p.write(None, port, bytes((value,)))


def inb(p, port):
    return p.read(None, port, 1)[0]


def init(p, icw4=1, icw1=0x11):
    out(p, 0x20, icw1)
    out(p, 0x21, 0x20, 4, icw4)
    out(p, 0xA0, icw1)
    out(p, 0xA1, 0x28, 2, icw4)


def pulse(p, pin):
    result = p.set_irq(pin, 0, True)
    p.set_irq(pin, 0, False)
    return result


def test_edge_and_eoi(pic):
    assert not pic.output
    assert pulse(pic, 3) == 1
    assert pic.output and pic.wakes
    assert inb(pic, 0x20) == 8                  # IRR
    assert pulse(pic, 3) == 0                   # coalesced
    assert pic.read_irq() == 0x23
    out(pic, 0x20, 0x0B)
    assert inb(pic, 0x20) == 8                  # ISR
    assert not pic.output
    pulse(pic, 5)
    assert not pic.output                       # lower than what is in service
    pulse(pic, 1)
    assert pic.output and pic.read_irq() == 0x21
    out(pic, 0x20, 0x20)                        # unspecific EOI ends the highest
    assert pic.chip.acked == [(0, 1)]
    assert not pic.output
    out(pic, 0x20, 0x63)                        # specific
    assert pic.output and pic.read_irq() == 0x25


def test_mask(pic):
    out(pic, 0x21, 0xFF)
    assert (0, 3, True) in pic.chip.masks
    assert pulse(pic, 3) == -1
    assert not pic.output and inb(pic, 0x21) == 0xFF
    out(pic, 0x21, 0xF7)
    assert pic.output and pic.chip.masks[-1] == (0, 3, False)


def test_slave_and_spurious(pic):
    pulse(pic, 12)
    assert pic.read_irq() == 0x2C
    assert (pic.pics[0].isr, pic.pics[1].isr) == (4, 0x10)
    out(pic, 0xA0, 0x20)
    out(pic, 0x20, 0x20)
    assert pic.chip.acked == [(1, 12), (0, 2)]
    assert pic.read_irq() == 0x27               # nothing there: the master's input 7
    assert pic.pics[0].isr == 0
    pulse(pic, 9)
    out(pic, 0xA1, 0xFF)                        # gone before the acknowledge: the slave's
    assert pic.read_irq() == 0x2F


def test_level_and_elcr(pic):
    out(pic, 0x4D0, 0xFF)
    out(pic, 0x4D1, 0xFF)
    assert (inb(pic, 0x4D0), inb(pic, 0x4D1)) == (0xF8, 0xDE)
    pic.set_irq(5, 0, True)
    assert pic.read_irq() == 0x25
    out(pic, 0x20, 0x20)
    assert pic.output                           # the line is up still
    pic.set_irq(5, 1, True)                     # two devices share it
    pic.set_irq(5, 0, False)
    assert pic.output
    pic.set_irq(5, 1, False)
    assert not pic.output


def test_rotation(pic):
    for pin in (0, 1, 6):
        pulse(pic, pin)
    out(pic, 0x20, 0xC5)                        # lowest priority: 5
    assert pic.read_irq() == 0x26
    out(pic, 0x20, 0xA0)                        # EOI, and 6 becomes the lowest
    assert pic.pics[0].priority_add == 7
    assert pic.read_irq() == 0x20
    out(pic, 0x20, 0xE0)                        # specific EOI of 0 with rotation
    assert pic.read_irq() == 0x21


def test_auto_eoi(pic):
    init(pic, icw4=3)
    out(pic, 0x20, 0x80)                        # rotate in automatic EOI mode
    pulse(pic, 4)
    assert pic.read_irq() == 0x24
    assert (pic.pics[0].isr, pic.pics[0].priority_add) == (0, 5)
    assert pic.chip.acked[-1] == (0, 4)


def test_special_fully_nested(pic):
    init(pic, icw4=0x11)
    pulse(pic, 12)
    assert pic.read_irq() == 0x2C
    pulse(pic, 8)
    assert pic.output and pic.read_irq() == 0x28        # the slave's higher one gets through


def test_poll(pic):
    pulse(pic, 10)
    out(pic, 0xA0, 0x0C)
    assert inb(pic, 0xA0) == 0x82
    assert (pic.pics[1].irr, pic.pics[0].irr) == (0, 0)
    out(pic, 0x20, 0x0C)
    assert inb(pic, 0x20) == 0x07


def test_icw1_clears(pic):
    pulse(pic, 3)
    out(pic, 0x21, 0xF0)
    out(pic, 0x20, 0x11)
    assert (pic.pics[0].irr, pic.pics[0].imr, pic.pics[0].init_state) == (0, 0, 1)
    assert pic.chip.acked == [(0, 3)]


def test_other_sizes_do_nothing(pic):
    assert pic.write(None, 0x20, b"\x11\x20")
    assert pic.read(None, 0x20, 2) == b"\0\0"
    assert pic.pics[0].init_state == 0


def test_state(pic):
    pulse(pic, 3)
    state = pic.pics[0].get_state()
    assert (state.irr, state.irq_base, state.elcr_mask) == (8, 0x20, 0xF8)
    other = Pic(Chip(), lambda: None, lambda: True)
    other.pics[0].set_state(state)
    other.update_irq()
    assert other.output and other.read_irq() == 0x23


def test_a_line_that_is_low_stays_as_it_is(pic):
    out(pic, 0x21, 0)
    pic.wakes.clear()
    assert pic.set_irq(4, 0, False) == 1 and not pic.wakes and not pic.output
    out(pic, 0x21, 0x10)
    assert pic.set_irq(4, 0, False) == -1           # masked
    out(pic, 0x21, 0)
    pic.set_irq(4, 1, True)
    assert pic.set_irq(4, 0, False) == 1 and pic.output     # another source holds it
    assert pic.set_irq(4, 1, False) == 1 and pic.output     # an edge stays latched
    assert pic.pics[0].last_irr == 0
    assert pulse(pic, 4) == 0


def test_low_ends_what_was_latched_from_outside(pic):
    """After KVM_SET_IRQCHIP a chip can remember a line that no source holds."""
    state = pic.pics[0].get_state()
    state.last_irr = state.elcr = state.irr = 0x20
    pic.pics[0].set_state(state)
    pic.update_irq()
    assert pic.output
    assert pic.set_irq(5, 0, False) == 1
    assert not pic.output and pic.pics[0].irr == pic.pics[0].last_irr == 0
