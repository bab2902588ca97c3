# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V's synthetic interrupt controller and timers of one vCPU (Linux: synic_* and stimer_* in hyperv.c; TLFS).

The SynIC has 16 interrupt sources (SINTs), each with a vector, and two pages in guest memory, for messages and for
event flags, which the client fills; only the timers' messages come from here.  All state is under the interrupt
controllers' lock; there is no active SynIC without them.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi import hyperv as H
from kvmfs.abi import msrs as M
from kvmfs.errors import KvmError
from kvmfs.kvm.apic_map import ApicMessage
from kvmfs.kvm.hrtimer import HrTimer, now_ns

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu

PAGE_SIZE, PAGE_MASK = 4096, ((1 << 64) - 1) & ~0xFFF
KTIME_MAX = (1 << 63) - 1
_FLAGS_OFFSET, _MSG_PENDING = 5, 1
# struct hv_message with a timer's payload: type, payload_size, flags, sender; timer_index, expiration, delivery
_TIMER_MESSAGE = struct.Struct("<IBB2xQIIQQ")
_TIMER_PAYLOAD = 24
SINT_MSRS = range(M.HV_X64_MSR_SINT0, M.HV_X64_MSR_SINT15 + 1)
_PAGES = {M.HV_X64_MSR_SIEFP: "evt_page", M.HV_X64_MSR_SIMP: "msg_page"}


class SynIc:
    """``struct kvm_vcpu_hv_synic``.  ``changed(msr)``: the guest has written a register that the client wants to know of.

    ``vectors`` and ``auto_eoi`` are bitmaps: vectors that a SINT has, and those whose interrupt ends by itself.
    """

    def __init__(self, vcpu: Vcpu, changed: Callable[[int], None]) -> None:
        self._vcpu, self._changed = vcpu, changed
        self.active = self.dont_zero_pages = False
        self.control = self.evt_page = self.msg_page = 0
        self.version = H.HV_SYNIC_VERSION_1
        self.sint = [H.HV_SYNIC_SINT_MASKED] * H.HV_SYNIC_SINT_COUNT
        self.sint_to_gsi: dict[int, int] = {}
        self.vectors = self.auto_eoi = 0
        self.timers = tuple(SynTimer(vcpu, self, i) for i in range(H.HV_SYNIC_STIMER_COUNT))
        self.pending = 0                # bitmap of timers to be looked at

    @property
    def chip(self) -> Irqchip:
        chip = self._vcpu.vm.arch.irqchip
        assert chip is not None
        return chip

    def activate(self, *, dont_zero_pages: bool) -> None:
        """``kvm_hv_activate_synic``."""
        self.active, self.dont_zero_pages = True, dont_zero_pages
        self.control = H.HV_SYNIC_CONTROL_ENABLE

    # ---- registers ----------------------------------------------------------------------------------

    def get_msr(self, index: int, *, host: bool) -> int | None:
        """``synic_get_msr``; None: #GP."""
        if not self.active and not host:
            return None
        if index in SINT_MSRS:
            return self.sint[index - M.HV_X64_MSR_SINT0]
        match index:
            case M.HV_X64_MSR_SCONTROL:
                return self.control
            case M.HV_X64_MSR_SVERSION:
                return self.version
            case M.HV_X64_MSR_SIEFP:
                return self.evt_page
            case M.HV_X64_MSR_SIMP:
                return self.msg_page
            case _:
                return 0                # EOM

    def set_msr(self, index: int, value: int, *, host: bool) -> bool:
        """``synic_set_msr``; False: #GP."""
        if not self.active and (not host or value):
            return False
        if index in SINT_MSRS:
            return self._set_sint(index - M.HV_X64_MSR_SINT0, value, host=host)
        if index in _PAGES:
            return self._set_page(index, value, host=host)
        if index == M.HV_X64_MSR_SCONTROL:
            self.control = value
            if not host:
                self._changed(index)
        elif index == M.HV_X64_MSR_SVERSION:
            if not host:
                return False
            self.version = value
        elif self.active:               # EOM
            with self.chip.lock:
                for sint in range(H.HV_SYNIC_SINT_COUNT):
                    self._notify_acked(sint)
        return True

    def _set_page(self, index: int, value: int, *, host: bool) -> bool:
        """SIMP or SIEFP: bit 0 enables, the rest is the page's address; the guest finds it cleared."""
        if value & H.HV_SYNIC_SIMP_ENABLE and not host and not self.dont_zero_pages:
            gpa, vm = value & PAGE_MASK, self._vcpu.vm
            try:
                vm.memslots.write(gpa, bytes(PAGE_SIZE))
            except KvmError:
                return False
            vm.engine.invalidate(gpa, PAGE_SIZE)
        setattr(self, _PAGES[index], value)
        if not host:
            self._changed(index)
        return True

    def _set_sint(self, sint: int, value: int, *, host: bool) -> bool:
        vector = value & H.HV_SYNIC_SINT_VECTOR_MASK
        if vector < H.HV_SYNIC_FIRST_VALID_VECTOR and not host and not value & H.HV_SYNIC_SINT_MASKED:
            return False
        self.sint[sint] = value
        vectors = auto_eoi = 0
        for other in self.sint:
            bit = 1 << (other & H.HV_SYNIC_SINT_VECTOR_MASK)
            if not other & H.HV_SYNIC_SINT_MASKED and bit >> H.HV_SYNIC_FIRST_VALID_VECTOR:
                vectors |= bit
                auto_eoi |= bit if other & H.HV_SYNIC_SINT_AUTO_EOI else 0
        self.vectors, self.auto_eoi = vectors, auto_eoi
        return True

    # ---- interrupts (with the lock) -----------------------------------------------------------------

    def vector_of(self, sint: int) -> int:
        """``synic_get_sint_vector``; -1: masked."""
        value = self.sint[sint]
        return -1 if value & H.HV_SYNIC_SINT_MASKED else value & H.HV_SYNIC_SINT_VECTOR_MASK

    def set_irq(self, sint: int) -> int:
        """``synic_set_irq``: 1, 0 when the APIC is off, or -EINVAL, -ENOENT (masked)."""
        if sint >= H.HV_SYNIC_SINT_COUNT:
            return -errno.EINVAL
        vector = self.vector_of(sint)
        if vector < 0:
            return -errno.ENOENT
        return self.chip.deliver(self._vcpu.arch.apic, ApicMessage(0, vector, shorthand=A.APIC_DEST_SELF))

    def send_eoi(self, vector: int) -> None:
        """``kvm_hv_synic_send_eoi``: an interrupt has ended."""
        for sint in range(H.HV_SYNIC_SINT_COUNT):
            if self.vector_of(sint) == vector:
                self._notify_acked(sint)

    def _notify_acked(self, sint: int) -> None:
        """``kvm_hv_notify_acked_sint``: timers' messages that found the slot full have a chance now."""
        for timer in self.timers:
            config = timer.config
            if (timer.msg_pending and config & H.HV_STIMER_ENABLE and not config & H.HV_STIMER_DIRECT_MODE
                    and timer.sint == sint):
                timer.mark_pending()
        gsi = self.sint_to_gsi.get(sint)
        if gsi is not None:
            self.chip.notify_acked_gsi(gsi)

    def deliver_timer_message(self, sint: int, message: bytes, *, retry: bool) -> bool:
        """``synic_deliver_msg``; False: it has to be tried again, the guest has not read the last one."""
        if not self.msg_page & H.HV_SYNIC_SIMP_ENABLE:
            return False
        slots, gpa = self._vcpu.vm.memslots, (self.msg_page & PAGE_MASK) + sint * H.HV_MESSAGE_SIZE
        try:
            if slots.read(gpa, 4) != bytes(4):
                if not retry:
                    return True
                slots.write(gpa + _FLAGS_OFFSET, bytes((_MSG_PENDING,)))
                return False
            slots.write(gpa, message)
        except KvmError:
            return False
        return self.set_irq(sint) > 0

    # ---- timers -------------------------------------------------------------------------------------

    def process_timers(self) -> None:
        """``kvm_hv_process_stimers``: KVM_REQ_HV_STIMER."""
        with self.chip.lock:
            for timer in self.timers:
                if self.pending >> timer.index & 1:
                    self.pending &= ~(1 << timer.index)
                    timer.process()


class SynTimer:
    """``struct kvm_vcpu_hv_stimer``: times are in units of 100 ns of the reference time."""

    def __init__(self, vcpu: Vcpu, synic: SynIc, index: int) -> None:
        self._vcpu, self._synic, self.index = vcpu, synic, index
        self.config = self.count = self.exp_time = 0
        self.msg_pending = False
        self._timer: HrTimer | None = None

    @property
    def sint(self) -> int:
        return self.config >> H.HV_STIMER_SINT_SHIFT & 0xF

    def mark_pending(self, *, kick: bool = False) -> None:
        """``stimer_mark_pending``."""
        self._synic.pending |= 1 << self.index
        self._vcpu.request_work(process_stimers)
        if kick:
            self._vcpu.kick()

    def _cleanup(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._synic.pending &= ~(1 << self.index)
        self.msg_pending, self.exp_time = False, 0

    def set_config(self, value: int, *, host: bool, direct_allowed: bool) -> bool:
        """``stimer_set_config``; False: #GP."""
        if not self._synic.active:
            return host and not value
        if not direct_allowed and value & H.HV_STIMER_DIRECT_MODE:
            return False
        with self._synic.chip.lock:
            self._cleanup()
            old, self.config = self.config, value
            if old & H.HV_STIMER_ENABLE and not value & H.HV_STIMER_DIRECT_MODE and not self.sint:
                self.config &= ~H.HV_STIMER_ENABLE
            if self.config & H.HV_STIMER_ENABLE:
                self.mark_pending()
        return True

    def set_count(self, value: int, *, host: bool) -> bool:
        """``stimer_set_count``; False: #GP."""
        if not self._synic.active:
            return host and not value
        with self._synic.chip.lock:
            self._cleanup()
            self.count = value
            if not host:
                if not value:
                    self.config &= ~H.HV_STIMER_ENABLE
                elif self.config & H.HV_STIMER_AUTO_ENABLE:
                    self.config |= H.HV_STIMER_ENABLE
            if self.config & H.HV_STIMER_ENABLE:
                self.mark_pending()
        return True

    def process(self) -> None:
        """Something may be due: expire, and start again."""
        if not self.config & H.HV_STIMER_ENABLE:
            return
        if self.exp_time and self._now() >= self.exp_time:
            self._expire()
        if self.config & H.HV_STIMER_ENABLE and self.count:
            if not self.msg_pending:
                self._start()
        else:
            self._cleanup()

    def _now(self) -> int:
        return self._vcpu.vm.arch.hyperv.reference_tsc.time_ref_counter()

    def _start(self) -> None:
        """``stimer_start``."""
        now = self._now()
        if self.config & H.HV_STIMER_PERIODIC:
            if not self.exp_time:
                self.exp_time = now + self.count
            elif now >= self.exp_time:
                self.exp_time = now + self.count - (now - self.exp_time) % self.count
        else:
            self.exp_time = self.count
            if now >= self.count:
                self.mark_pending()
                return
        if self._timer is None:
            self._timer = HrTimer(self._synic.chip.timers, self._fired)
        self._timer.start(min(now_ns() + 100 * (self.exp_time - now), KTIME_MAX))

    def _fired(self) -> None:
        self.mark_pending(kick=True)

    def _expire(self) -> None:
        """``stimer_expiration``."""
        self.msg_pending = True
        if self.config & H.HV_STIMER_DIRECT_MODE:
            done = self._notify_direct()
        else:
            message = _TIMER_MESSAGE.pack(H.HVMSG_TIMER_EXPIRED, _TIMER_PAYLOAD, 0, 0, self.index, 0, self.exp_time,
                                          self._now())
            # Ticks of a periodic timer do not pile up.
            done = self._synic.deliver_timer_message(self.sint, message, retry=not self.config & H.HV_STIMER_PERIODIC)
        if done:
            self.msg_pending = False
            if not self.config & H.HV_STIMER_PERIODIC:
                self.config &= ~H.HV_STIMER_ENABLE

    def _notify_direct(self) -> bool:
        apic = self._vcpu.arch.apic
        vector = self.config >> H.HV_STIMER_VECTOR_SHIFT & 0xFF
        return apic is None or bool(apic.accept(ApicMessage(0, vector)))


def process_stimers(vcpu: Vcpu) -> None:
    """The request; it may come after what it was made for."""
    hv = vcpu.arch.hyperv
    if hv is not None and hv.synic.pending:
        hv.synic.process_timers()
