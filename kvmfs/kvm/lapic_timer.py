# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC's timer: one-shot, periodic, TSC deadline (Linux: arch/x86/kvm/lapic.c; SDM vol. 3, 11.5.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.kvm.hrtimer import HrTimer, now_ns
from kvmfs.kvm.tsc import tsc_khz

if TYPE_CHECKING:
    from kvmfs.cpu.cpu import Cpu
    from kvmfs.kvm.lapic_core import LapicCore

MIN_TIMER_PERIOD = 200_000      # kvm.min_timer_period_us, in ns


def tsc_to_ns(ticks: int) -> int:
    """How long ``ticks`` of the TSC are."""
    return ticks * 1_000_000 // tsc_khz()


class LapicTimer:
    """``struct kvm_timer``.  ``pending``: it expired, and the vCPU has not been told yet."""

    def __init__(self, apic: LapicCore, cpu: Cpu) -> None:
        self._apic, self._cpu = apic, cpu
        self._timer = HrTimer(apic.chip.timers, self._fired)
        self.mode = A.APIC_LVT_TIMER_ONESHOT
        self.mode_mask = 0                      # which modes the guest's CPUID has
        self.period = 0                         # ns
        self.target_expiration = 0              # CLOCK_MONOTONIC
        self.tscdeadline = 0
        self._host_deadline = 0                 # the same by the host's TSC
        self.divide_count = 2
        self.pending = False

    @property
    def one_shot(self) -> bool:
        return self.mode == A.APIC_LVT_TIMER_ONESHOT

    @property
    def periodic(self) -> bool:
        return self.mode == A.APIC_LVT_TIMER_PERIODIC

    @property
    def deadline_mode(self) -> bool:
        return self.mode == A.APIC_LVT_TIMER_TSCDEADLINE

    # ---- registers ----------------------------------------------------------------------------------

    def stop(self) -> None:
        self._timer.cancel()

    def cancel(self) -> None:
        """``cancel_apic_timer``: what has expired already is forgotten, too."""
        self._timer.cancel()
        self.pending = False

    def lvtt_changed(self) -> None:
        """``apic_update_lvtt``: going to or from TSC deadline mode disarms the timer."""
        mode = self._apic.reg(A.APIC_LVTT) & self.mode_mask
        if self.mode == mode:
            return
        if self.deadline_mode != (mode == A.APIC_LVT_TIMER_TSCDEADLINE):
            self.cancel()
            self._apic.set_reg(A.APIC_TMICT, 0)
            self.period = self.tscdeadline = 0
        self.mode = mode
        self._limit_frequency()

    def update_divide_count(self) -> None:
        tdcr = self._apic.reg(A.APIC_TDCR)
        self.divide_count = 1 << ((tdcr & 3 | tdcr >> 1 & 4) + 1 & 7)

    def divisor_changed(self) -> None:
        """A write of TDCR: what is left runs at the new speed."""
        old = self.divide_count
        self.update_divide_count()
        if self.divide_count == old or not self.period:
            return
        self._timer.cancel()
        self.period = self._to_ns(self._apic.reg(A.APIC_TMICT))
        self._limit_frequency()
        now = now_ns()
        left = max(self.target_expiration - now, 0)
        self.target_expiration = now + left * self.divide_count // old
        self._restart()

    def current_count(self) -> int:
        """The register TMCCT."""
        if self.deadline_mode or not self._apic.reg(A.APIC_TMICT) or not self.period:
            return 0
        left = max(self.target_expiration - now_ns(), 0)
        return left % self.period // (self._apic.chip.bus_cycle_ns * self.divide_count)

    def start(self, count_register: int = A.APIC_TMICT) -> None:
        """``__start_apic_timer``: from the initial count, or (a restored state) the current one."""
        self.pending = False
        if not self.deadline_mode and not self._set_target(count_register):
            return
        self._restart()

    # ---- TSC deadline -------------------------------------------------------------------------------

    def read_deadline(self) -> int:
        """IA32_TSC_DEADLINE."""
        return self.tscdeadline if self._apic.hw_enabled and self.deadline_mode else 0

    def write_deadline(self, value: int) -> None:
        """0 disarms; a time that is past fires at once."""
        if not self._apic.hw_enabled or not self.deadline_mode:
            return
        self._timer.cancel()
        self.tscdeadline = value
        self.start()

    # ---- time ---------------------------------------------------------------------------------------

    def _to_ns(self, count: int) -> int:
        return count * self._apic.chip.bus_cycle_ns * self.divide_count

    def _limit_frequency(self) -> None:
        if self.periodic and self.period:
            self.period = max(self.period, MIN_TIMER_PERIOD)

    def _set_target(self, count_register: int) -> bool:
        """``set_target_expiration``; False: the initial count is 0, so there is nothing to wait for."""
        apic = self._apic
        self.period = self._to_ns(apic.reg(A.APIC_TMICT))
        if not self.period:
            self.tscdeadline = 0
            return False
        self._limit_frequency()
        wait = self.period
        if count_register != A.APIC_TMICT:
            wait = self._to_ns(apic.reg(count_register))
            if wait <= 0:
                wait = self.period if self.periodic else 0
            elif wait > self.period:
                apic.set_reg(count_register, 0)
                wait = self.period
        self.target_expiration = now_ns() + wait
        return True

    def _restart(self) -> None:
        """``start_sw_timer``."""
        if not self.periodic and self.pending:
            return
        if self.deadline_mode:
            self._start_deadline()
        elif self.period:
            if now_ns() > self.target_expiration:
                self._expired()
                if self.one_shot:
                    return
                self._advance()
            self._timer.start(self.target_expiration)

    def _start_deadline(self) -> None:
        if not self.tscdeadline:
            return
        host_tsc = self._cpu.host_tsc()
        left = self.tscdeadline - self._cpu.guest_tsc(host_tsc)
        if left > 0:
            left = self._cpu.unscale_tsc(left)
            self._host_deadline = host_tsc + left
            self._timer.start(min(now_ns() + tsc_to_ns(left), 1 << 62))
        else:
            self._expired()

    def _advance(self) -> None:
        """Periods that are past already are not made up for."""
        self.target_expiration = max(self.target_expiration + self.period, now_ns())

    def _fired(self) -> int | None:
        if self.deadline_mode:
            left = self._host_deadline - self._cpu.host_tsc()
            if left > 0:                    # by the clock it is time, by the TSC not yet
                return now_ns() + tsc_to_ns(left) + 1
        self._expired()
        if self.periodic and self.period:
            self._advance()
            return self.target_expiration
        return None

    def _expired(self) -> None:
        """``apic_timer_expired``."""
        if not self.pending:
            self.pending = True
            self._apic.request_unblock()

    # ---- the vCPU's side ----------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """``apic_has_pending_timer``."""
        apic = self._apic
        return self.pending and apic.enabled and not apic.reg(A.APIC_LVTT) & A.APIC_LVT_MASKED

    def inject(self) -> None:
        """``kvm_inject_apic_timer_irqs``: the timer's entry of the local vector table delivers."""
        if not self.pending:
            return
        self._apic.local_deliver(A.APIC_LVTT)
        if not self.periodic:
            self.tscdeadline = 0
            if self.one_shot:
                self.target_expiration = 0
        self.pending = False
