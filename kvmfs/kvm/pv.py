# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM offers to guests that know it (Documentation/virt/kvm/x86/{cpuid,msr}.rst)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.abi import para
from kvmfs.errors import KvmError
from kvmfs.kvm import kvmclock, pv_eoi, steal_time

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

KVM_MSR_ENABLED = 1
ASYNC_PF_RESERVED = 0x30

# MSR → the feature that it belongs to.
FEATURE_OF: dict[int, int] = {
    M.MSR_KVM_WALL_CLOCK: para.KVM_FEATURE_CLOCKSOURCE,
    M.MSR_KVM_SYSTEM_TIME: para.KVM_FEATURE_CLOCKSOURCE,
    M.MSR_KVM_WALL_CLOCK_NEW: para.KVM_FEATURE_CLOCKSOURCE2,
    M.MSR_KVM_SYSTEM_TIME_NEW: para.KVM_FEATURE_CLOCKSOURCE2,
    M.MSR_KVM_ASYNC_PF_EN: para.KVM_FEATURE_ASYNC_PF,
    M.MSR_KVM_STEAL_TIME: para.KVM_FEATURE_STEAL_TIME,
    M.MSR_KVM_PV_EOI_EN: para.KVM_FEATURE_PV_EOI,
    M.MSR_KVM_POLL_CONTROL: para.KVM_FEATURE_POLL_CONTROL,
    M.MSR_KVM_ASYNC_PF_INT: para.KVM_FEATURE_ASYNC_PF_INT,
    M.MSR_KVM_ASYNC_PF_ACK: para.KVM_FEATURE_ASYNC_PF_INT,
}


def guest_pv_has(vcpu: Vcpu, feature: int) -> bool:
    """May the guest use paravirtual feature number ``feature``?

    Always, unless the client has KVM_CAP_ENFORCE_PV_FEATURE_CPUID on: then what the guest's CPUID offers.
    """
    arch = vcpu.arch
    if not arch.enforce_pv_cpuid:
        return True
    base = arch.cpuid.kvm_base
    entry = arch.cpuid.find(base | para.KVM_CPUID_FEATURES & 0xFF) if base else None
    return entry is not None and bool(entry.eax >> feature & 1)


class PvMsrs:
    """KVM's own MSRs of one vCPU.

    A guest may turn asynchronous page faults on when its local APIC is here, as in Linux; none will come, since
    KVM_RUN never waits for a page of guest memory in a way that something else could be done meanwhile.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._async_pf_en = self._async_pf_int = 0
        self._poll_control = 1          # a guest that has not said otherwise lets its host poll

    def reset(self) -> None:
        """RESET and INIT end what works by the guest's memory; the poll control stays."""
        self._async_pf_en = self._async_pf_int = 0
        arch = self._vcpu.arch
        arch.steal_time.msr = arch.clock.time = 0
        arch.clock.pv_time_gpa = None
        self._vcpu.cpu.tell_preemption(0)

    def has(self, index: int) -> bool:
        """Is MSR ``index`` one of KVM's that the guest may use?"""
        return guest_pv_has(self._vcpu, FEATURE_OF[index])

    def read(self, index: int) -> int | None:
        """None: there is no such MSR for this guest."""
        if not self.has(index):
            return None
        clock = self._vcpu.arch.clock
        match index:
            case M.MSR_KVM_WALL_CLOCK | M.MSR_KVM_WALL_CLOCK_NEW:
                return self._vcpu.vm.arch.clock.wall_clock
            case M.MSR_KVM_SYSTEM_TIME | M.MSR_KVM_SYSTEM_TIME_NEW:
                return clock.time
            case M.MSR_KVM_STEAL_TIME:
                return self._vcpu.arch.steal_time.msr
            case M.MSR_KVM_PV_EOI_EN:
                return self._vcpu.arch.pv_eoi.msr
            case M.MSR_KVM_ASYNC_PF_EN:
                return self._async_pf_en
            case M.MSR_KVM_ASYNC_PF_INT:
                return self._async_pf_int
            case M.MSR_KVM_POLL_CONTROL:
                return self._poll_control
            case _:
                return 0

    def write(self, index: int, value: int, host_initiated: bool) -> bool:
        """False: #GP."""
        if not self.has(index):
            return False
        vcpu = self._vcpu
        match index:
            case M.MSR_KVM_WALL_CLOCK | M.MSR_KVM_WALL_CLOCK_NEW:
                kvmclock.write_wall_clock(vcpu.vm, value)
            case M.MSR_KVM_SYSTEM_TIME | M.MSR_KVM_SYSTEM_TIME_NEW:
                kvmclock.write_system_time(vcpu, value, old_msr=index == M.MSR_KVM_SYSTEM_TIME,
                                           host_initiated=host_initiated)
            case M.MSR_KVM_STEAL_TIME:
                return self._set_steal_time(value)
            case M.MSR_KVM_PV_EOI_EN:
                return pv_eoi.set_msr(vcpu, value)
            case M.MSR_KVM_POLL_CONTROL:
                if value >> 1:
                    return False
                self._poll_control = value
            case M.MSR_KVM_ASYNC_PF_EN:
                return self._enable_async_pf(value)
            case M.MSR_KVM_ASYNC_PF_INT:
                return self._enable_async_pf_int(value)
        return True                         # ASYNC_PF_ACK: nothing waits to be acknowledged

    def _set_steal_time(self, value: int) -> bool:
        if value & para.KVM_STEAL_RESERVED_MASK or not steal_time.available():
            return False
        self._vcpu.arch.steal_time.msr = value
        self._vcpu.cpu.tell_preemption(0)           # until the first record is written
        if value & KVM_MSR_ENABLED:
            self._vcpu.request_work(steal_time.record_steal_time)
        return True

    def _enable_async_pf(self, value: int) -> bool:
        """``kvm_pv_enable_async_pf``: bit 0 enables, bits 1 to 3 say how, the rest is the address of 64 bytes."""
        vcpu = self._vcpu
        if (value & ASYNC_PF_RESERVED
                or (value & para.KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT
                    and not guest_pv_has(vcpu, para.KVM_FEATURE_ASYNC_PF_VMEXIT))
                or (value & para.KVM_ASYNC_PF_DELIVERY_AS_INT and not guest_pv_has(vcpu, para.KVM_FEATURE_ASYNC_PF_INT))):
            return False
        if vcpu.arch.apic is None:
            return not value
        self._async_pf_en = value
        mask = para.KVM_ASYNC_PF_ENABLED | para.KVM_ASYNC_PF_DELIVERY_AS_INT
        if value & mask != mask:
            return True
        try:
            vcpu.vm.memslots.read(value & ~0x3F, 8)
        except KvmError:
            return False
        return True

    def _enable_async_pf_int(self, value: int) -> bool:
        """``kvm_pv_enable_async_pf_int``: a vector."""
        if value >> 8 or self._vcpu.arch.apic is None:
            return False
        self._async_pf_int = value
        return True
