# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypercalls: VMCALL and VMMCALL (Linux: kvm_emulate_hypercall; Documentation/virt/kvm/x86/hypercalls.rst)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi import exits as kx
from kvmfs.abi import para
from kvmfs.abi.flags import KVM_X86_QUIRK_FIX_HYPERCALL_INSN
from kvmfs.kvm import events, hyperv_hypercall, kvmclock, mmu, regs
from kvmfs.kvm.apic_map import ApicMessage
from kvmfs.kvm.emulate import fetch, skip_emulated_instruction
from kvmfs.kvm.pv import guest_pv_has

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6
HYPERCALL_LENGTH = 3
_UNION, _RET = 32, 88                       # of kvm_run: hypercall.nr, hypercall.ret
_set_reason = struct.Struct("<I").pack_into
_set_hypercall = struct.Struct("<4Q24xQQ").pack_into        # nr, args[0..2], args[3..5], ret, flags
_u64 = struct.Struct("<Q").unpack_from


def emulate_hypercall(vcpu: Vcpu) -> int:
    """``kvm_emulate_hypercall``; the other vendor's instruction is patched first.

    That is KVM_X86_QUIRK_FIX_HYPERCALL_INSN; without it the guest gets #UD.
    """
    cpu, own = vcpu.cpu, vcpu.vm.vendor.hypercall_bytes
    if fetch(vcpu)[:3] != own:                      # VMCALL, too, leaves the engine as VMMCALL
        if vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_FIX_HYPERCALL_INSN:
            events.inject_ud(vcpu)
            return 1
        mmu.write_virtual(vcpu, regs.linear_rip(vcpu), own)
    if hyperv_hypercall.enabled(vcpu):
        return hyperv_hypercall.hypercall(vcpu)
    wide = regs.is_64_bit_mode(vcpu)
    mask = M64 if wide else M32
    number, a0, a1, a2 = (cpu.gpr(r) & mask for r in (RAX, RBX, RCX, RDX))
    if vcpu.vm.vendor.get_cpl(vcpu) != 0:
        result = -para.KVM_EPERM
    elif number == para.KVM_HC_MAP_GPA_RANGE:
        reply = _map_gpa_range(vcpu, a0, a1, a2, wide)
        if reply is None:
            return 0
        result = reply
    else:
        result = _call(vcpu, number, a0, a1, a2, wide)
    vcpu.arch.stat.hypercalls += 1
    cpu.set_gpr(RAX, result & mask)
    return skip_emulated_instruction(vcpu, HYPERCALL_LENGTH)


def _call(vcpu: Vcpu, number: int, a0: int, a1: int, a2: int, wide: bool) -> int:
    if number == para.KVM_HC_VAPIC_POLL_IRQ:
        return 0
    if number == para.KVM_HC_CLOCK_PAIRING:
        return kvmclock.clock_pairing(vcpu, a0, a1)
    if number == para.KVM_HC_SEND_IPI and guest_pv_has(vcpu, para.KVM_FEATURE_PV_SEND_IPI):
        a3 = vcpu.cpu.gpr(RSI) & (M64 if wide else M32)
        return pv_send_ipi(vcpu.vm, a0, a1, a2 & M32, a3, wide)
    if number == para.KVM_HC_KICK_CPU and guest_pv_has(vcpu, para.KVM_FEATURE_PV_UNHALT):
        _kick_cpu(vcpu.vm, a1 & M32)
        _sched_yield(vcpu)
        return 0
    if number == para.KVM_HC_SCHED_YIELD and guest_pv_has(vcpu, para.KVM_FEATURE_PV_SCHED_YIELD):
        _sched_yield(vcpu)
        return 0
    return -para.KVM_ENOSYS


def _sched_yield(vcpu: Vcpu) -> None:
    """``kvm_sched_yield``: the exit itself has let those have the engine that wait for it."""
    vcpu.arch.stat.directed_yield_attempted += 1


def _kick_cpu(vm: Vm, apic_id: int) -> None:
    """``kvm_pv_kick_cpu_op``: end the halt of the vCPU with this APIC ID, or its next one."""
    chip = vm.arch.irqchip
    if chip is not None:
        with chip.lock:
            chip.deliver(None, ApicMessage(apic_id, 0, A.APIC_DM_REMRD))


def pv_send_ipi(vm: Vm, low: int, high: int, first: int, icr: int, wide: bool) -> int:
    """``kvm_pv_send_ipi``: one IPI to each APIC of a bitmap; how many have taken it, or a negative error.

    Bit i of ``low`` is the APIC with ID ``first`` + i; ``high`` goes on from there, 64 or (not ``wide``) 32 further on.
    """
    if icr & (A.APIC_DEST_MASK | A.APIC_SHORT_MASK):
        return -para.KVM_EINVAL
    chip = vm.arch.irqchip
    ids = chip.apic_map.physical if chip is not None else None
    if chip is None or ids is None:
        return -errno.EOPNOTSUPP
    message = ApicMessage(0, icr & A.APIC_VECTOR_MASK, icr & A.APIC_MODE_MASK, level=bool(icr & A.APIC_INT_ASSERT),
                          level_triggered=bool(icr & A.APIC_INT_LEVELTRIG))
    count = 0
    with chip.lock:
        for start, bits in ((first, low), (first + (64 if wide else 32) & M32, high)):
            for i in range(bits.bit_length()):
                apic = ids.get(start + i) if bits >> i & 1 else None
                if apic is not None:
                    count += apic.accept(message)
    return count


def _map_gpa_range(vcpu: Vcpu, gpa: int, pages: int, attributes: int, wide: bool) -> int | None:
    """KVM_HC_MAP_GPA_RANGE is the client's, if it wants it (KVM_CAP_EXIT_HYPERCALL); None: it is asked."""
    if not vcpu.vm.arch.hypercall_exit_enabled & 1 << para.KVM_HC_MAP_GPA_RANGE:
        return -para.KVM_ENOSYS
    if gpa & 0xFFF or not pages or (gpa >> 12) + pages > M64:
        return -para.KVM_EINVAL
    flags = kx.KVM_EXIT_HYPERCALL_LONG_MODE if wide else 0
    _set_reason(vcpu.run, 8, kx.KVM_EXIT_HYPERCALL)
    ret, = _u64(vcpu.run, _RET)
    _set_hypercall(vcpu.run, _UNION, para.KVM_HC_MAP_GPA_RANGE, gpa, pages, attributes, ret, flags)
    vcpu.arch.complete_userspace_io = _complete_hypercall
    return None


def _complete_hypercall(vcpu: Vcpu) -> int:
    ret, = _u64(vcpu.run, _RET)
    vcpu.arch.stat.hypercalls += 1
    vcpu.cpu.set_gpr(RAX, ret if regs.is_64_bit_mode(vcpu) else ret & M32)
    return skip_emulated_instruction(vcpu, HYPERCALL_LENGTH)
