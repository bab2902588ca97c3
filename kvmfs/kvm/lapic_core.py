# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC of a vCPU: identity, priorities, messages (Linux: arch/x86/kvm/lapic.c; SDM vol. 3, chapter 11).

What the guest and the client see of it, registers and state, is in :mod:`kvmfs.kvm.lapic`.  Everything here
runs with the irqchip's lock held, but for what says that it takes it.  Methods that another thread than the
vCPU's may call say so.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi import cpuid as C
from kvmfs.abi.flags import KVM_X86_QUIRK_LINT0_REENABLED
from kvmfs.abi.msrs import (
    MCG_CMCI_P,
    MSR_IA32_APICBASE_BASE,
    MSR_IA32_APICBASE_BSP,
    MSR_IA32_APICBASE_ENABLE,
    X2APIC_ENABLE,
)
from kvmfs.abi.x86 import APIC_DEFAULT_PHYS_BASE, KVM_APIC_REG_SIZE
from kvmfs.kvm import pv_eoi
from kvmfs.kvm.apic_map import ApicMessage
from kvmfs.kvm.lapic_timer import LapicTimer

if TYPE_CHECKING:
    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu

_get, _put = struct.Struct("<I").unpack_from, struct.Struct("<I").pack_into
PENDING_INIT, PENDING_SIPI = 1, 2
LVT_ENTRIES, LVT_ENTRIES_CMCI = 6, 7
LVT_REGISTERS = (A.APIC_LVTT, A.APIC_LVTTHMR, A.APIC_LVTPC, A.APIC_LVT0, A.APIC_LVT1, A.APIC_LVTERR, A.APIC_LVTCMCI)


def x2apic_ldr(apic_id: int) -> int:
    """The logical ID that follows from an x2APIC ID (SDM 11.12.10.2)."""
    return (apic_id >> 4) << 16 & 0xFFFFFFFF | 1 << (apic_id & 0xF)


class LapicCore:
    """``struct kvm_lapic``.

    ``irr``, ``isr`` and ``tmr`` are bitmaps of vectors; all other registers are in the page.  ``handled``:
    vectors whose end an I/O APIC, here or in the client, wants to know.
    """

    def __init__(self, vcpu: Vcpu, chip: Irqchip) -> None:
        self.vcpu, self.chip = vcpu, chip
        self._regs = bytearray(KVM_APIC_REG_SIZE)
        self.irr = self.isr = self.tmr = 0
        self.highest_isr_cache = -1     # the vector taken last, until something is ended
        self.sw_enabled = False
        self.lvt_entries = self._count_lvt_entries()
        self.pending_events = self.sipi_vector = 0
        self.scan_request, self.handled = True, 0
        self.eoi_exit: int | None = None        # a vector for KVM_EXIT_IOAPIC_EOI
        self.external_vector: int | None = None  # KVM_INTERRUPT with a split irqchip
        self.nmi_watchdog = False
        self.wake = threading.Event()
        self.in_guest, self.thread = False, 0
        self.timer = LapicTimer(self, vcpu.cpu)

    # ---- waking the vCPU (any thread) ---------------------------------------------------------------

    def request_event(self) -> None:
        """KVM_REQ_EVENT and kick: the vCPU looks at its events before it goes on."""
        self.vcpu.arch.event_request = True
        self.request_unblock()

    def request_unblock(self) -> None:
        self.wake.set()
        if self.in_guest:
            if self.thread != threading.get_ident():
                self.vcpu.cpu.kick()
            return
        lane = self.vcpu.lane
        lane.stop()                     # it may be armed at this moment
        if lane.words[0]:               # and perhaps runs
            self.vcpu.cpu.kick()

    # ---- registers ----------------------------------------------------------------------------------

    def reg(self, offset: int) -> int:
        value: int = _get(self._regs, offset)[0]
        return value

    def set_reg(self, offset: int, value: int) -> None:
        _put(self._regs, offset, value & 0xFFFFFFFF)

    @property
    def hw_enabled(self) -> bool:
        return bool(self.vcpu.arch.apic_base & MSR_IA32_APICBASE_ENABLE)

    @property
    def enabled(self) -> bool:
        return self.sw_enabled and self.hw_enabled

    @property
    def x2apic_mode(self) -> bool:
        return bool(self.vcpu.arch.apic_base & X2APIC_ENABLE)

    @property
    def x2apic_id(self) -> int:
        return self.vcpu.vcpu_id

    @property
    def xapic_id(self) -> int:
        return self.reg(A.APIC_ID) >> 24

    @property
    def base_address(self) -> int:
        return self.vcpu.arch.apic_base & MSR_IA32_APICBASE_BASE

    def _count_lvt_entries(self) -> int:
        return LVT_ENTRIES_CMCI if self.vcpu.arch.msrs.mcg_cap & MCG_CMCI_P else LVT_ENTRIES

    def set_version(self) -> None:
        version = A.APIC_VERSION | (self.lvt_entries - 1) << 16
        if self.chip.split and self.vcpu.arch.cpuid.has(C.X86_FEATURE_X2APIC):
            version |= A.APIC_LVR_DIRECTED_EOI      # our own I/O APIC has no EOI register
        self.set_reg(A.APIC_LVR, version)

    def after_set_cpuid(self) -> None:
        """The timer's modes and the version follow the guest's CPUID.  Takes the lock."""
        with self.chip.lock:
            deadline = self.vcpu.arch.cpuid.has(C.X86_FEATURE_TSC_DEADLINE_TIMER)
            self.timer.mode_mask = 3 << 17 if deadline else 1 << 17
            self.set_version()

    def after_set_mcg_cap(self) -> None:
        """``kvm_apic_after_set_mcg_cap``: the CMCI entry comes and goes.  Takes the lock."""
        with self.chip.lock:
            count = self._count_lvt_entries()
            for offset in LVT_REGISTERS[self.lvt_entries:count]:
                self.set_reg(offset, A.APIC_LVT_MASKED)
            if count != self.lvt_entries:
                self.lvt_entries = count
                self.set_version()

    def _set_xapic_id(self, apic_id: int) -> None:
        self.set_reg(A.APIC_ID, apic_id << 24)
        self.chip.map_changed()

    def _set_spiv(self, value: int) -> None:
        self.set_reg(A.APIC_SPIV, value)
        enabled = bool(value & A.APIC_SPIV_APIC_ENABLED)
        if enabled != self.sw_enabled:
            self.sw_enabled = enabled
            self.chip.map_changed()

    def set_base(self, value: int) -> None:
        """``kvm_apic_set_base`` after its checks: IA32_APIC_BASE changes.  Takes the lock."""
        arch = self.vcpu.arch
        self.vcpu.lane.stop()           # its page may be one that was the client's
        with self.chip.lock:
            changed, arch.apic_base = arch.apic_base ^ value, value
            if changed & MSR_IA32_APICBASE_ENABLE:
                arch.cpuid_changed = True
                if value & MSR_IA32_APICBASE_ENABLE:
                    self._set_xapic_id(self.vcpu.vcpu_id)
            if changed & X2APIC_ENABLE:
                if value & X2APIC_ENABLE:
                    self.set_reg(A.APIC_ID, self.x2apic_id)
                    self.set_reg(A.APIC_LDR, x2apic_ldr(self.x2apic_id))
                elif value & MSR_IA32_APICBASE_ENABLE:
                    self._set_xapic_id(self.vcpu.vcpu_id)
            self.chip.map_changed()

    def reset(self, *, init_event: bool) -> None:
        """``kvm_lapic_reset``.  Takes the lock."""
        arch, boot = self.vcpu.arch, self.vcpu.vcpu_id == self.vcpu.vm.arch.bsp_vcpu_id
        with self.chip.lock:
            if not init_event:
                self.set_base(APIC_DEFAULT_PHYS_BASE | MSR_IA32_APICBASE_ENABLE | (MSR_IA32_APICBASE_BSP if boot else 0))
            self.timer.stop()
            if not init_event:
                self._set_xapic_id(self.vcpu.vcpu_id)
            self.set_version()
            for offset in LVT_REGISTERS[:self.lvt_entries]:
                self.set_reg(offset, A.APIC_LVT_MASKED)
            self.timer.lvtt_changed()
            if boot and not self.vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_LINT0_REENABLED:
                self.set_reg(A.APIC_LVT0, A.APIC_DM_EXTINT)
            self._manage_nmi_watchdog()
            self.set_reg(A.APIC_DFR, A.APIC_DFR_FLAT)
            self._set_spiv(0xFF)
            for offset in (A.APIC_TASKPRI, A.APIC_ESR, A.APIC_ICR, A.APIC_TDCR, A.APIC_TMICT):
                self.set_reg(offset, 0)
            if not self.x2apic_mode:
                self.set_reg(A.APIC_LDR, 0)
                self.set_reg(A.APIC_ICR2, 0)
            self.set_reg(A.APIC_ICR + 4, 0)
            self.irr = self.isr = self.tmr = 0
            self.highest_isr_cache = -1
            pv_eoi.reset(self.vcpu)
            self.timer.update_divide_count()
            self.timer.pending = False
            self.vcpu.cpu.cr8 = 0
            self.update_ppr()
            self.chip.map_changed()
            arch.event_request = True

    # ---- priorities ---------------------------------------------------------------------------------

    def _compute_ppr(self) -> int:
        tpr = self.reg(A.APIC_TASKPRI) & 0xFF
        isrv = self.isr.bit_length() - 1 & 0xF0 if self.isr else 0
        ppr = tpr if tpr & 0xF0 >= isrv else isrv
        self.set_reg(A.APIC_PROCPRI, ppr)
        return ppr

    def _deliverable(self, ppr: int) -> int:
        """The highest requested vector above ``ppr``, or -1."""
        highest = self.irr.bit_length() - 1
        return highest if highest >= 0 and highest & 0xF0 > ppr else -1

    def has_interrupt(self) -> int:
        """``kvm_apic_has_interrupt``: the vector to be taken next, or -1."""
        return self._deliverable(self._compute_ppr()) if self.irr and self.hw_enabled else -1

    def update_ppr(self) -> None:
        old = self.reg(A.APIC_PROCPRI)
        ppr = self._compute_ppr()
        if ppr < old and self._deliverable(ppr) >= 0:
            self.vcpu.arch.event_request = True

    def set_tpr(self, tpr: int) -> None:
        """The task priority, which is CR8 in other units."""
        self.set_reg(A.APIC_TASKPRI, tpr)
        self.vcpu.cpu.cr8 = tpr >> 4 & 0xF
        self.update_ppr()

    def ack_interrupt(self, vector: int) -> None:
        """The CPU takes ``vector``."""
        self.irr &= ~(1 << vector)
        hv = self.vcpu.arch.hyperv
        if hv is not None and hv.synic.auto_eoi >> vector & 1:
            self.update_ppr()               # it is over already
            return
        self.isr |= 1 << vector
        self.highest_isr_cache = vector
        self._compute_ppr()

    # ---- what the CPU takes, from here or from a PIC ------------------------------------------------

    def has_extint(self) -> bool:
        """``kvm_cpu_has_extint``: one from the PIC, or from the client when the irqchip is split."""
        pic = self.chip.pic
        waiting = pic.output if pic is not None else self.external_vector is not None
        return waiting and self.accepts_pic_intr()

    def cpu_has_interrupt(self) -> bool:
        """``kvm_cpu_has_interrupt``."""
        return self.has_extint() or self.has_interrupt() >= 0

    def cpu_get_interrupt(self) -> int:
        """``kvm_cpu_get_interrupt``: acknowledge the vector to be taken now; -1: there is none."""
        if self.has_extint():
            if self.chip.pic is not None:
                return self.chip.pic.read_irq()
            external, self.external_vector = self.external_vector, None
            return -1 if external is None else external
        vector = self.has_interrupt()
        if vector >= 0:
            self.ack_interrupt(vector)
        return vector

    def accepts_dm_intr(self) -> bool:
        """Does a client's KVM_INTERRUPT make sense now: is the PIC its own, and is there a place to wait in?"""
        return self.chip.pic is None and not self.has_extint() and self.accepts_pic_intr()

    def pending_eoi(self, vector: int) -> bool:
        return bool((self.isr | self.irr) >> vector & 1)

    def eoi(self) -> None:
        """``apic_set_eoi``."""
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        self.highest_isr_cache = -1
        self.update_ppr()
        hv = self.vcpu.arch.hyperv
        if hv is not None and hv.synic.vectors >> vector & 1:
            hv.synic.send_eoi(vector)
        self.scan()
        if self.handled >> vector & 1:
            if self.chip.split:
                self.eoi_exit = vector
            else:
                self.chip.eoi(self.vcpu, vector, bool(self.tmr >> vector & 1))
        self.vcpu.arch.event_request = True

    def scan(self) -> None:
        """``vcpu_scan_ioapic``: which vectors' ends matter, when that may have changed."""
        if self.scan_request and self.hw_enabled:
            self.scan_request = False
            chip = self.chip
            self.handled = chip.ioapic.scan(self) if chip.ioapic is not None else chip.scan_routes(self)

    # ---- messages -----------------------------------------------------------------------------------

    def matches(self, source: LapicCore | None, message: ApicMessage) -> bool:
        """``kvm_apic_match_dest``."""
        if message.shorthand == A.APIC_DEST_NOSHORT:
            mda = message.dest_id
            if (source is None and mda == A.APIC_BROADCAST and self.x2apic_mode
                    and not self.vcpu.vm.arch.x2apic_broadcast_quirk_disabled):
                mda = A.X2APIC_BROADCAST
            if mda == (A.X2APIC_BROADCAST if self.x2apic_mode else A.APIC_BROADCAST):
                return True
            return self._matches_logical(mda) if message.logical else self._matches_physical(mda)
        if message.shorthand == A.APIC_DEST_SELF:
            return source is self
        return message.shorthand == A.APIC_DEST_ALLINC or source is not self

    def _matches_physical(self, mda: int) -> bool:
        return mda == (self.x2apic_id if self.x2apic_mode or mda > 0xFF else self.xapic_id)

    def _matches_logical(self, mda: int) -> bool:
        ldr = self.reg(A.APIC_LDR)
        if self.x2apic_mode:
            return ldr >> 16 == mda >> 16 and bool(ldr & mda & 0xFFFF)
        ldr >>= 24
        dfr = self.reg(A.APIC_DFR)
        if dfr == A.APIC_DFR_FLAT:
            return bool(ldr & mda)
        return dfr == A.APIC_DFR_CLUSTER and ldr >> 4 == mda >> 4 and bool(ldr & mda & 0xF)

    def accept(self, message: ApicMessage, dest: dict[int, int] | None = None) -> int:
        """``__apic_accept_irq``, from any thread: 1 when it was taken, 0 when it was dropped."""
        mode, vector, arch = message.delivery_mode, message.vector, self.vcpu.arch
        if mode in (A.APIC_DM_FIXED, A.APIC_DM_LOWEST):
            if (message.level_triggered and not message.level) or not self.enabled:
                return 0
            if dest is not None:
                dest[self.vcpu.vcpu_id] = vector
            bit = 1 << vector
            self.tmr = self.tmr | bit if message.level_triggered else self.tmr & ~bit
            self.irr |= bit
        elif mode == A.APIC_DM_NMI:
            arch.nmi_queued += 1
        elif mode == A.APIC_DM_INIT:
            if message.level_triggered and not message.level:
                return 0
            self.pending_events = PENDING_INIT
        elif mode == A.APIC_DM_STARTUP:
            self.sipi_vector = vector
            self.pending_events |= PENDING_SIPI
        elif mode == A.APIC_DM_REMRD:
            arch.pv_unhalted = True
        else:
            return 0                            # SMI: there is no SMM; ExtINT comes from LINT0 only
        self.request_event()
        return 1

    def local_deliver(self, offset: int) -> int:
        """``kvm_apic_local_deliver``: an entry of the local vector table fires."""
        value = self.reg(offset)
        if not self.hw_enabled or value & A.APIC_LVT_MASKED:
            return 0
        return self.accept(ApicMessage(0, value & A.APIC_VECTOR_MASK, value & A.APIC_MODE_MASK,
                                       level_triggered=bool(value & A.APIC_LVT_LEVEL_TRIGGER)))

    def accepts_pic_intr(self) -> bool:
        """Does the PIC's output reach this CPU: the APIC is off, or LINT0 is ExtINT?"""
        lvt0 = self.reg(A.APIC_LVT0)
        return not self.hw_enabled or (not lvt0 & A.APIC_LVT_MASKED and lvt0 & A.APIC_MODE_MASK == A.APIC_DM_EXTINT)

    def send_ipi(self, low: int, high: int) -> None:
        """The interrupt command register was written (``kvm_apic_send_ipi``)."""
        self.chip.deliver(self, ApicMessage(
            high if self.x2apic_mode else high >> 24, low & A.APIC_VECTOR_MASK, low & A.APIC_MODE_MASK,
            bool(low & A.APIC_DEST_LOGICAL), bool(low & A.APIC_INT_ASSERT), bool(low & A.APIC_INT_LEVELTRIG),
            low & A.APIC_SHORT_MASK))

    def _manage_nmi_watchdog(self) -> None:
        on = self.reg(A.APIC_LVT0) & (A.APIC_MODE_MASK | A.APIC_LVT_MASKED) == A.APIC_DM_NMI
        self.chip.nmi_watchdogs += on - self.nmi_watchdog
        self.nmi_watchdog = on
