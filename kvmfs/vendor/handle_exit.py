# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of the engine that the machine handles itself, by SVM exit code (APM vol. 2, appendix C).

Both vendors' guests run on the same engine and so leave it in the same way; where they must differ, a handler
asks the vendor.  Each returns 1 to go on, 0 to return to the client.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi.cpuid import X86_FEATURE_MWAIT
from kvmfs.abi.flags import KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
from kvmfs.abi.x86 import CR4_OSXSAVE
from kvmfs.kvm import events, hyperv, irq, msr_filter, regs, xsave
from kvmfs.kvm.emulate import (
    complete_insn_gp,
    complete_intercepted,
    decode,
    fetch,
    prepare_emulation_failure,
    read_operand16,
    skip_emulated_instruction,
    skip_intercepted,
)
from kvmfs.kvm.hypercall import emulate_hypercall
from kvmfs.vendor.debug_exits import DEBUG_EXITS

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

M32 = (1 << 32) - 1
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6

EXIT_READ_CR0, EXIT_WRITE_CR0, EXIT_WRITE_CR3, EXIT_WRITE_CR4, EXIT_WRITE_CR8 = 0x00, 0x10, 0x13, 0x14, 0x18
EXIT_VINTR, EXIT_RDPMC, EXIT_CPUID, EXIT_INVD, EXIT_HLT = 0x64, 0x6F, 0x72, 0x76, 0x78
EXIT_INVLPGA, EXIT_MSR, EXIT_SHUTDOWN = 0x7A, 0x7C, 0x7F
EXIT_VMRUN, EXIT_VMMCALL, EXIT_SKINIT = 0x80, 0x81, 0x86
EXIT_WBINVD, EXIT_MONITOR, EXIT_MWAIT, EXIT_MWAIT_COND, EXIT_XSETBV = 0x89, 0x8A, 0x8B, 0x8C, 0x8D


_set_reason = struct.Struct("<I").pack_into


def _window(vcpu: Vcpu) -> int:
    vcpu.arch.stat.irq_window_exits += 1
    vcpu.cpu.set_interrupt_window(False)
    vcpu.arch.event_request = True
    return 1


def _hlt(vcpu: Vcpu) -> int:
    result = skip_intercepted(vcpu, 1)
    if vcpu.arch.apic is not None:
        vcpu.arch.stat.halt_exits += 1
        irq.emulate_halt(vcpu, vcpu.arch.apic)
        return result
    if vcpu.vm.arch.hlt_in_guest:
        if result > 0:
            vcpu.halt()
        return result
    vcpu.arch.stat.halt_exits += 1
    _set_reason(vcpu.run, 8, kx.KVM_EXIT_HLT)
    return 0


def _cpuid(vcpu: Vcpu) -> int:
    cpu = vcpu.cpu
    vcpu.arch.update_cpuid(vcpu)
    leaf = cpu.gpr(RAX) & M32
    values = vcpu.arch.cpuid.cpuid(leaf, cpu.gpr(RCX) & M32)
    if leaf == hyperv.CPUID_POWER and hyperv.invtsc_suppressed(vcpu):
        values = (*values[:3], values[3] & ~hyperv.INVARIANT_TSC)
    for index, value in zip((RAX, RBX, RCX, RDX), values, strict=True):
        cpu.set_gpr(index, value)
    cpu.suspect_code()              # it serializes: with it a CPU asks for the code that another one has written
    return skip_intercepted(vcpu, 2)


def _msr(vcpu: Vcpu) -> int:
    if not vcpu.cpu.exit.info1:
        return msr_filter.emulate_rdmsr(vcpu)
    vcpu.arch.stat.wrmsr_exits += 1
    return msr_filter.emulate_wrmsr(vcpu)


def _monitor_mwait(vcpu: Vcpu) -> int:
    """``kvm_emulate_monitor_mwait``: they do nothing, or are unknown to the guest."""
    if (vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
            and not vcpu.arch.cpuid.has(X86_FEATURE_MWAIT)):
        return _undefined(vcpu)
    vcpu.cpu.suspect_code()         # the guest waits for somebody's store
    return skip_intercepted(vcpu, 3)


def _rdpmc(vcpu: Vcpu) -> int:
    events.inject_gp(vcpu)          # there is no PMU, so no counter has this number
    return 1


def _undefined(vcpu: Vcpu) -> int:
    events.inject_ud(vcpu)          # nested virtualization is absent
    return 1


def _shutdown(vcpu: Vcpu) -> int:
    vcpu.vm.vendor.shutdown(vcpu)
    _set_reason(vcpu.run, 8, kx.KVM_EXIT_SHUTDOWN)
    return 0


def _skip(length: int) -> Callable[[Vcpu], int]:
    def handler(vcpu: Vcpu) -> int:
        return skip_intercepted(vcpu, length)
    return handler


def _xsetbv(vcpu: Vcpu) -> int:
    cpu = vcpu.cpu
    if not cpu.cr4 & CR4_OSXSAVE:
        return _undefined(vcpu)
    value = (cpu.gpr(RAX) & M32) | (cpu.gpr(RDX) & M32) << 32
    ok = vcpu.vm.vendor.get_cpl(vcpu) == 0 and xsave.set_xcr(vcpu, cpu.gpr(RCX) & M32, value)
    return complete_intercepted(vcpu, ok, 3)


def _write_cr(vcpu: Vcpu) -> int:
    """MOV to CR0, CR4 or CR8, CLTS, LMSW: the engine does not check what hardware checks."""
    cpu = vcpu.cpu
    code = fetch(vcpu)
    op = decode(vcpu, code)
    if op.opcode == b"\x0f\x06":                                        # CLTS
        ok, length = regs.set_cr0(vcpu, cpu.cr0 & ~8), op.prefix_length + 2
    elif op.opcode == b"\x0f\x22":
        cr = op.modrm >> 3 & 7 | (op.rex & 4) << 1
        value = cpu.gpr(op.modrm & 7 | (op.rex & 1) << 3)
        if not regs.is_64_bit_mode(vcpu):
            value &= M32
        if 0xF0 in code[:op.prefix_length]:
            if cr or vcpu.vm.vendor.name != "amd":
                return _undefined(vcpu)
            cr = 8                                                      # LOCK MOV CR0: AMD's CR8 in 32-bit code
        ok, length = _SET_CR[cr](vcpu, value), op.prefix_length + 3
        if ok and cr == 8:
            return _wrote_cr8(vcpu, length)
    else:
        return _lmsw(vcpu, code)
    return complete_insn_gp(vcpu, ok, length)


def _wrote_cr8(vcpu: Vcpu, length: int) -> int:
    """A client that emulates the APIC wants to know when the task priority sinks (KVM_EXIT_SET_TPR)."""
    result = skip_emulated_instruction(vcpu, length)
    lowered = vcpu.arch.cr8_before > vcpu.cpu.cr8
    vcpu.arch.cr8_before = vcpu.cpu.cr8
    if not lowered or vcpu.arch.apic is not None:
        return result
    _set_reason(vcpu.run, 8, kx.KVM_EXIT_SET_TPR)
    return 0


_SET_CR: dict[int, Callable[[Vcpu, int], bool]] = {
    0: regs.set_cr0, 3: regs.set_cr3, 4: regs.set_cr4, 8: regs.set_cr8,
}


def _lmsw(vcpu: Vcpu, code: bytes) -> int:
    """``kvm_lmsw``: LMSW sets MP, EM and TS, and can set PE but not clear it."""
    operand = read_operand16(vcpu, code)
    if operand is None:
        return prepare_emulation_failure(vcpu)
    msw, length = operand
    vcpu.arch.stat.insn_emulation += vcpu.vm.vendor.name == "amd"   # VMX says which operand it was
    cr0 = vcpu.cpu.cr0
    return complete_insn_gp(vcpu, regs.set_cr0(vcpu, cr0 & ~0xE | msw & 0xF), length)


EXIT_HANDLERS: dict[int, Callable[[Vcpu], int]] = {
    EXIT_WRITE_CR0: _write_cr,
    EXIT_WRITE_CR3: _write_cr,      # only while PDPTRs are the client's
    EXIT_WRITE_CR4: _write_cr,
    EXIT_WRITE_CR8: _write_cr,
    **DEBUG_EXITS,
    EXIT_VINTR: _window,
    EXIT_RDPMC: _rdpmc,
    EXIT_CPUID: _cpuid,
    EXIT_INVD: _skip(2),
    EXIT_HLT: _hlt,
    EXIT_INVLPGA: _undefined,
    EXIT_MSR: _msr,
    EXIT_SHUTDOWN: _shutdown,
    EXIT_WBINVD: _skip(2),
    EXIT_MONITOR: _monitor_mwait,
    EXIT_MWAIT: _monitor_mwait,
    EXIT_MWAIT_COND: _monitor_mwait,
    EXIT_XSETBV: _xsetbv,
    **dict.fromkeys(range(EXIT_VMRUN, EXIT_SKINIT + 1), _undefined),
    EXIT_VMMCALL: emulate_hypercall,
}
