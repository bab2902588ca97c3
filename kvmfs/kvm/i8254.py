# SPDX-License-Identifier: GPL-2.0-or-later
"""The 8254 interval timer and port 0x61 (Linux: arch/x86/kvm/i8254.c; Intel's 8254 data sheet).

As in Linux only channel 0 has an interrupt, GSI 0; the others only count.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kvmfs.abi.flags import KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON
from kvmfs.abi.structs import KvmPitChannelState
from kvmfs.kvm.hrtimer import NSEC_PER_SEC, HrTimer, now_ns

if TYPE_CHECKING:
    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu

PIT_FREQ = 1193181              # Hz, as Linux rounds it
PIT_PORT, PIT_PORTS = 0x40, 4
SPEAKER_PORT, SPEAKER_PORTS = 0x61, 4
PIT_GSI = 0
MIN_TIMER_PERIOD = 200_000      # kvm.min_timer_period_us, in ns
MODE_OFF = 0xFF                 # no mode was programmed
LSB, MSB, WORD0, WORD1 = 1, 2, 3, 4     # rw_mode, read_state, write_state
_M64 = (1 << 64) - 1


class Pit:
    """``struct kvm_pit``; channels are struct kvm_pit_channel_state, what KVM_GET_PIT2 copies."""

    def __init__(self, chip: Irqchip) -> None:
        self._chip = chip
        self.lock = chip.lock
        self.source = chip.request_irq_source()
        self.channels = (KvmPitChannelState * 3)()
        self.flags = 0
        self._period, self._is_periodic = 0, False
        self._timer = HrTimer(chip.timers, self._fired)
        self._work = HrTimer(chip.timers, self._expired)
        self._reinject = False
        self._pending, self._irq_ack = 0, True
        for i, channel in enumerate(self.channels):
            channel.mode, channel.gate = MODE_OFF, i != 2
            self._load_count(i, 0)
        self.set_reinject(True)

    # ---- counting -----------------------------------------------------------------------------------

    def _elapsed(self, index: int) -> int:
        """Counts since the counter was loaded."""
        if index:
            ns = now_ns() - self.channels[index].count_load_time
        else:
            ns = self._period - self._timer.remaining() if self._period else 0
        return (ns & _M64) * PIT_FREQ // NSEC_PER_SEC & _M64

    def _count(self, index: int) -> int:
        channel, d = self.channels[index], self._elapsed(index)
        count = channel.count
        if channel.mode in (0, 1, 4, 5):
            return (count - d) & 0xFFFF
        return count - (2 * d if channel.mode == 3 else d) % count

    def _out(self, index: int) -> bool:
        channel, d = self.channels[index], self._elapsed(index)
        count, mode = channel.count, channel.mode
        if mode == 1:
            return d < count
        if mode == 2:
            return d % count == 0 and d != 0
        if mode == 3:
            return d % count < count + 1 >> 1
        if mode in (4, 5):
            return d == count
        return d >= count

    def _latch_count(self, index: int) -> None:
        channel = self.channels[index]
        if not channel.count_latched:
            channel.latched_count = self._count(index) & 0xFFFF
            channel.count_latched = channel.rw_mode

    def _latch_status(self, index: int) -> None:
        channel = self.channels[index]
        if not channel.status_latched:
            channel.status = (self._out(index) << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd) & 0xFF
            channel.status_latched = 1

    def _load_count(self, index: int, value: int) -> None:
        channel = self.channels[index]
        channel.count = value or 0x10000
        if index:
            channel.count_load_time = now_ns()
        elif channel.mode in (0, 1, 4):
            self._start_timer(channel.count, periodic=False)
        elif channel.mode in (2, 3):
            self._start_timer(channel.count, periodic=True)
        else:
            self._timer.cancel()

    # ---- channel 0's interrupt ----------------------------------------------------------------------

    def _start_timer(self, count: int, *, periodic: bool) -> None:
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            return
        interval = count * NSEC_PER_SEC // PIT_FREQ
        self._work.cancel()
        self._period, self._is_periodic = interval, periodic
        self._reset_reinject()
        if periodic:
            self._period = max(interval, MIN_TIMER_PERIOD)
        self._timer.start(now_ns() + interval)

    def _fired(self) -> int | None:
        if self._reinject:
            self._pending += 1
        self._expired()
        return self._timer.expires + self._period if self._is_periodic else None

    def _expired(self) -> None:
        """``pit_do_work``: with reinjection a tick waits until the last one was acknowledged."""
        if self._reinject:
            acked, self._irq_ack = self._irq_ack, False
            if not acked:
                return
        chip = self._chip
        chip.set_irq(self.source, PIT_GSI, True)
        chip.set_irq(self.source, PIT_GSI, False)
        chip.deliver_pit_nmi()

    def _acked(self) -> None:
        """The guest has acknowledged GSI 0: the next tick that was missed can come."""
        self._irq_ack = True
        if self._pending > 0:
            self._pending -= 1
            if self._pending:
                self._work.start(now_ns())      # not here: the controller is in the middle of its EOI

    def _mask_changed(self, masked: bool) -> None:
        if not masked:
            self._reset_reinject()

    def _reset_reinject(self) -> None:
        self._pending, self._irq_ack = 0, True

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: are ticks that the guest was too slow for made up for?"""
        if self._reinject == reinject:
            return
        chip = self._chip
        if reinject:
            self._reset_reinject()
            chip.add_ack_notifier(PIT_GSI, self._acked)
            chip.mask_notifiers.setdefault(PIT_GSI, []).append(self._mask_changed)
        else:
            chip.remove_ack_notifier(PIT_GSI, self._acked)
            chip.mask_notifiers[PIT_GSI].remove(self._mask_changed)
        self._reinject = reinject

    # ---- KVM_GET_PIT2, KVM_SET_PIT2 -----------------------------------------------------------------

    def get_channels(self) -> bytes:
        return bytes(self.channels)

    def set_channels(self, data: bytes) -> None:
        """KVM_SET_PIT: every counter starts again with its count."""
        ctypes.memmove(self.channels, data, ctypes.sizeof(self.channels))
        for i, channel in enumerate(self.channels):
            self._load_count(i, channel.count)

    def set_state2(self, data: bytes, flags: int) -> None:
        """KVM_SET_PIT2; entering HPET legacy mode stops channel 0's timer."""
        entering = flags & ~self.flags & KVM_PIT_FLAGS_HPET_LEGACY
        ctypes.memmove(self.channels, data, ctypes.sizeof(self.channels))
        self.flags = flags
        for i, channel in enumerate(self.channels):
            if entering and i == 0:
                mode, channel.mode = channel.mode, MODE_OFF
                self._load_count(0, channel.count)
                channel.mode = mode
            else:
                self._load_count(i, channel.count)

    # ---- ports --------------------------------------------------------------------------------------

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        value, index = data[0], address & 3
        with self.lock:
            if index == 3:
                self._command(value)
                return True
            channel = self.channels[index]
            if channel.write_state == MSB:
                self._load_count(index, value << 8)
            elif channel.write_state == WORD0:
                channel.write_latch, channel.write_state = value, WORD1
            elif channel.write_state == WORD1:
                self._load_count(index, channel.write_latch | value << 8)
                channel.write_state = WORD0
            else:
                self._load_count(index, value)
        return True

    def _command(self, value: int) -> None:
        """The control word, or the read-back command."""
        index, access = value >> 6, value >> 4 & 3
        if index == 3:
            for i in range(3):
                if value & 2 << i:
                    if not value & 0x20:
                        self._latch_count(i)
                    if not value & 0x10:
                        self._latch_status(i)
        elif access == 0:
            self._latch_count(index)
        else:
            channel = self.channels[index]
            channel.rw_mode = channel.read_state = channel.write_state = access
            mode = value >> 1 & 7
            channel.mode = mode - 4 if mode > 5 else mode
            channel.bcd = value & 1

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        index = address & 3
        if index == 3:
            return bytes(size)
        with self.lock:
            return self._read_counter(index).to_bytes(4, "little")[:size].ljust(size, b"\0")

    def _read_counter(self, index: int) -> int:
        channel = self.channels[index]
        if channel.status_latched:
            channel.status_latched = 0
            return channel.status
        if channel.count_latched:
            latched, count = channel.count_latched, channel.latched_count
            channel.count_latched = MSB if latched == WORD0 else 0
            return count >> 8 if latched == MSB else count & 0xFF
        state, count = channel.read_state, self._count(index)
        if state in (WORD0, WORD1):
            channel.read_state = WORD1 if state == WORD0 else WORD0
        return count >> 8 & 0xFF if state in (MSB, WORD1) else count & 0xFF

    # ---- port 0x61 ----------------------------------------------------------------------------------

    def write_speaker(self, value: int) -> None:
        """Bit 0: channel 2's gate; bit 1: the speaker's data."""
        if value & 2:
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON
        else:
            self.flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON
        channel = self.channels[2]
        if channel.mode in (1, 2, 3, 5) and channel.gate < value & 1:
            channel.count_load_time = now_ns()      # a rising edge starts the count again
        channel.gate = value & 1

    def read_speaker(self) -> int:
        """Gate, data, the refresh clock (about 15 us), channel 2's output."""
        return (bool(self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON) << 1 | self.channels[2].gate
                | self._out(2) << 5 | (now_ns() & 0xFFFFFFFF) >> 14 << 4 & 0x10)


class Speaker:
    """Port 0x61 of a PIT that was made with KVM_PIT_SPEAKER_DUMMY."""

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes | None:
        if address != SPEAKER_PORT:
            return None
        with self._pit.lock:
            return self._pit.read_speaker().to_bytes(4, "little")[:size].ljust(size, b"\0")

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> bool:
        if address != SPEAKER_PORT:
            return False
        with self._pit.lock:
            self._pit.write_speaker(data[0])
        return True
