# SPDX-License-Identifier: GPL-2.0-or-later
"""The MSRs that are registers of the CPU: what MsrFile leaves to the vCPU (Linux: svm_get_msr, vmx_get_msr)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.abi import msrs as M
from kvmfs.kvm import kvmclock, regs
from kvmfs.kvm.msrs import CPU_ATTRIBUTES
from kvmfs.vendor.ops import SEG_FS, SEG_GS

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

_M64 = (1 << 64) - 1
_BASES = {M.MSR_FS_BASE: SEG_FS, M.MSR_GS_BASE: SEG_GS}


class VcpuMsrs:
    """``kvmfs.kvm.msrs.CpuMsrs`` for one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def read(self, index: int) -> int:
        cpu = self._vcpu.cpu
        attribute = CPU_ATTRIBUTES.get(index)
        if attribute is not None:
            return int(getattr(cpu, attribute))
        if index in _BASES:
            return int(cpu.segment(_BASES[index])[1])
        if index == M.MSR_IA32_TSC:
            return cpu.guest_tsc()
        return int(cpu.efer) if index == M.MSR_EFER else self._vcpu.arch.apic_base

    def write(self, index: int, value: int, host_initiated: bool) -> bool:
        """False: #GP."""
        vcpu, cpu = self._vcpu, self._vcpu.cpu
        attribute = CPU_ATTRIBUTES.get(index)
        if attribute is not None:
            setattr(cpu, attribute, value)
        elif index in _BASES:
            selector, _, limit, attrib = cpu.segment(_BASES[index])
            cpu.set_segment(_BASES[index], selector, value, limit, attrib)
            cpu.commit_state()
        elif index == M.MSR_IA32_TSC:
            kvmclock.synchronize_tsc(vcpu, value)
        elif index == M.MSR_EFER:
            return regs.set_efer(vcpu, value, host_initiated=host_initiated)
        elif vcpu.arch.apic is not None:
            vcpu.arch.apic.set_base(value)
        else:
            vcpu.arch.apic_base = value
            vcpu.arch.cpuid_changed = True
        return True

    def adjust_tsc(self, delta: int) -> None:
        """Add ``delta`` (modulo 2**64) to the TSC's offset."""
        cpu = self._vcpu.cpu
        cpu.tsc_offset = (cpu.tsc_offset + delta) & _M64
