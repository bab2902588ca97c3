# SPDX-License-Identifier: GPL-2.0-or-later
"""The PIT against Intel's 8254 data sheet, with a clock of our own."""

import threading

import pytest

from kvmfs.kvm import hrtimer, i8254
from kvmfs.kvm.i8254 import PIT_FREQ, Pit, Speaker


class Chip:
    """What a PIT needs of the irqchip; its timers fire when :meth:`pass_time` says so."""

    def __init__(self):
        self.lock, self.timers = threading.RLock(), self
        self.ack_notifiers, self.mask_notifiers, self.ticks, self.armed = {}, {}, 0, []
        self.now = 1_000_000

    def request_irq_source(self):
        return 2

    def add_ack_notifier(self, gsi, notify):
        self.ack_notifiers.setdefault(gsi, []).append(notify)

    def remove_ack_notifier(self, gsi, notify):
        self.ack_notifiers[gsi].remove(notify)

    def set_irq(self, source, gsi, level, **_):
        assert (source, gsi) == (2, 0)
        self.ticks += level

    def deliver_pit_nmi(self):
        pass

    def add(self, timer):
        self.armed.append(timer)

    def ack(self):
        for notify in self.ack_notifiers.get(0, ()):
            notify()

    def pass_time(self, ns):
        end = self.now + ns
        while True:
            due = [t for t in self.armed if t.active and t.expires <= end]
            if not due:
                break
            timer = min(due, key=lambda t: t.expires)
            self.now = max(self.now, timer.expires)
            timer.active = False
            again = timer.function()
            if again is not None and not timer.active:
                timer.start(again)
        self.now = end


@pytest.fixture
def chip(monkeypatch):
    c = Chip()
    for module in (hrtimer, i8254):
        monkeypatch.setattr(module, "now_ns", lambda: c.now)
    return c


@pytest.fixture
def pit(chip):
    return Pit(chip)


def out(pit, port, *values):
    for value in values:
        pit.write(None, port, bytes((value,)))


def inb(pit, port):
    return pit.read(None, port, 1)[0]


def program(pit, channel, mode, count):
    out(pit, 0x43, channel << 6 | 0x30 | mode << 1)
    out(pit, 0x40 + channel, count & 0xFF, count >> 8)


def ns(counts):
    return counts * 1_000_000_000 // PIT_FREQ + 1


def test_nothing_runs_after_reset(chip, pit):
    chip.pass_time(10**9)
    assert chip.ticks == 0
    assert [c.gate for c in pit.channels] == [1, 1, 0]
    assert [c.count for c in pit.channels] == [0x10000] * 3


def test_rate_generator(chip, pit):
    program(pit, 0, 2, 11932)
    pit.set_reinject(False)
    chip.pass_time(10**9)
    assert chip.ticks in (99, 100)


def test_one_shot(chip, pit):
    program(pit, 0, 0, 1000)
    chip.pass_time(ns(999) - 1000)
    assert chip.ticks == 0
    chip.pass_time(10**9)
    assert chip.ticks == 1


def test_ticks_that_are_not_acknowledged_come_later(chip, pit):
    program(pit, 0, 2, 11932)
    chip.pass_time(105 * 10**6)
    assert chip.ticks == 1                      # the guest has not acknowledged the first one
    for i in range(9):
        chip.ack()
        chip.pass_time(1)
        assert chip.ticks == 2 + i
    chip.ack()
    chip.pass_time(1)
    assert chip.ticks == 10


def test_unmasking_forgets_lost_ticks(chip, pit):
    program(pit, 0, 2, 11932)
    chip.pass_time(105 * 10**6)
    chip.mask_notifiers[0][0](False)
    chip.ack()
    chip.pass_time(1)
    assert chip.ticks == 1


def test_short_periods_are_stretched(chip, pit):
    pit.set_reinject(False)
    program(pit, 0, 2, 2)
    chip.pass_time(10**7)
    assert chip.ticks in (50, 51)               # 200 us each


def test_counting_and_latch(chip, pit):
    program(pit, 2, 2, 1000)
    chip.pass_time(ns(300))
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 == 700
    out(pit, 0x43, 0x80)                        # latch channel 2
    chip.pass_time(ns(100))
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 == 700
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 in (599, 600)
    chip.pass_time(ns(1000))
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 in (598, 599, 600)


def test_square_wave_counts_by_two(chip, pit):
    program(pit, 2, 3, 1000)
    chip.pass_time(ns(300))
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 in (398, 400)
    assert pit.read_speaker() & 0x20
    chip.pass_time(ns(300))
    assert not pit.read_speaker() & 0x20


def test_read_back(chip, pit):
    program(pit, 2, 0, 1000)
    out(pit, 0x43, 0xE8)                        # status of channel 2
    assert inb(pit, 0x42) == 0x30
    chip.pass_time(ns(1000))
    out(pit, 0x43, 0xC8)                        # count and status
    assert inb(pit, 0x42) == 0xB0               # OUT is high
    assert inb(pit, 0x42) | inb(pit, 0x42) << 8 in (0, 0xFFFF)


def test_single_byte_access(chip, pit):
    out(pit, 0x43, 0x90)                        # channel 2, LSB only, mode 0
    out(pit, 0x42, 200)
    assert pit.channels[2].count == 200
    out(pit, 0x43, 0xA0)                        # MSB only
    out(pit, 0x42, 2)
    assert pit.channels[2].count == 0x200
    assert inb(pit, 0x42) == 2
    assert pit.read(None, 0x43, 1) == b"\0"


def test_speaker_port(chip, pit):
    speaker = Speaker(pit)
    program(pit, 2, 1, 1000)
    speaker.write(None, 0x61, b"\x03")
    assert speaker.read(None, 0x61, 1)[0] & 0x23 == 0x23        # one-shot: OUT is... high while it counts
    assert pit.flags == 2
    chip.pass_time(ns(1000))
    assert not speaker.read(None, 0x61, 1)[0] & 0x20
    speaker.write(None, 0x61, b"\x00")
    speaker.write(None, 0x61, b"\x01")          # a rising gate starts it again
    assert speaker.read(None, 0x61, 1)[0] & 0x20
    assert speaker.read(None, 0x62, 1) is None
    assert not speaker.write(None, 0x64, b"\0")


def test_state(chip, pit):
    program(pit, 0, 2, 11932)
    other = Pit(chip)
    pit._timer.cancel()
    other.set_reinject(False)
    before = chip.ticks
    other.set_channels(pit.get_channels())
    chip.pass_time(10**8)
    assert chip.ticks - before in (9, 10)
    other.set_state2(pit.get_channels(), 1)     # HPET takes over
    before = chip.ticks
    chip.pass_time(10**8)
    assert chip.ticks == before
    assert other.channels[0].mode == 2
