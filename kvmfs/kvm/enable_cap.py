# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_ENABLE_CAP: what a client can switch on or off (Linux: kvm_vm_ioctl_enable_cap, kvm_vcpu_ioctl_enable_cap).

Only capabilities that then have an effect are here; all others are EINVAL, as on a kernel without them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import caps as K
from kvmfs.abi import exits as kx
from kvmfs.abi import flags as F
from kvmfs.abi.para import KVM_HC_MAP_GPA_RANGE
from kvmfs.abi.x86 import KVM_MAX_VCPU_IDS
from kvmfs.errors import KvmError
from kvmfs.kvm import dirty_log, dirty_ring, hyperv, irq

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu, Vm

# Caching modes and shadow pages do not exist here, so that a guest with CD_NW_CLEARED or SLOT_ZAP_ALL off is as
# one with them on.  Linux's last quirk belongs to nested guests.
SUPPORTED_QUIRKS = (F.KVM_X86_QUIRK_LINT0_REENABLED | F.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
                    | F.KVM_X86_QUIRK_CD_NW_CLEARED | F.KVM_X86_QUIRK_OUT_7E_INC_RIP
                    | F.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT | F.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
                    | F.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | F.KVM_X86_QUIRK_SLOT_ZAP_ALL
                    | F.KVM_X86_QUIRK_STUFF_FEATURE_MSRS)
# PAUSE never exits: a vCPU that spins gives way inside the engine.
SUPPORTED_DISABLE_EXITS = F.KVM_X86_DISABLE_EXITS_PAUSE | F.KVM_X86_DISABLE_EXITS_HLT
DISABLE_VALID_EXITS = (F.KVM_X86_DISABLE_EXITS_MWAIT | F.KVM_X86_DISABLE_EXITS_HLT | F.KVM_X86_DISABLE_EXITS_PAUSE
                       | F.KVM_X86_DISABLE_EXITS_CSTATE)
HYPERCALL_EXITS = 1 << KVM_HC_MAP_GPA_RANGE


def vm_enable_cap(vm: Vm, cap: int, flags: int, argument: int) -> None:
    """On a VM (api.rst 4.37).  EINVAL: flags, a capability that cannot be enabled, an argument it does not take."""
    handler = VM_CAPS.get(cap)
    if handler is None or cap in vm.profile.cannot_enable or (flags and handler is not _dirty_ring):
        raise KvmError(errno.EINVAL)
    handler(vm, argument)


def vcpu_enable_cap(vcpu: Vcpu, cap: int, flags: int, argument: int) -> None:
    """On a vCPU.  EINVAL: flags, or a capability that cannot be enabled here; ENOTTY: nested Hyper-V."""
    handler = VCPU_CAPS.get(cap)
    if flags or handler is None:
        raise KvmError(errno.EINVAL)
    handler(vcpu, argument)


def _enforce_pv_cpuid(vcpu: Vcpu, argument: int) -> None:
    vcpu.arch.enforce_pv_cpuid = bool(argument)


def _hyperv_enforce_cpuid(vcpu: Vcpu, argument: int) -> None:
    hyperv.set_enforce_cpuid(vcpu, bool(argument))


def _hyperv_synic(vcpu: Vcpu, argument: int) -> None:
    hyperv.activate_synic(vcpu, dont_zero_pages=False)


def _hyperv_synic2(vcpu: Vcpu, argument: int) -> None:
    _only(argument, 0)
    hyperv.activate_synic(vcpu, dont_zero_pages=True)


def _no_nested_hyperv(vcpu: Vcpu, argument: int) -> None:
    raise KvmError(errno.ENOTTY)


def _only(argument: int, valid: int) -> None:
    if argument & ~valid:
        raise KvmError(errno.EINVAL)


def _disable_quirks2(vm: Vm, argument: int) -> None:
    _only(argument, vm.profile.mask(K.KVM_CAP_DISABLE_QUIRKS2, SUPPORTED_QUIRKS))
    _disable_quirks(vm, argument)


def _disable_quirks(vm: Vm, argument: int) -> None:
    with vm.lock:
        vm.arch.disabled_quirks |= argument & SUPPORTED_QUIRKS


def _disable_exits(vm: Vm, argument: int) -> None:
    """Linux, too, takes what it knows and the host cannot do, without doing it."""
    _only(argument, DISABLE_VALID_EXITS)
    if argument & F.KVM_X86_DISABLE_EXITS_HLT:
        vm.arch.hlt_in_guest = True


def _msr_platform_info(vm: Vm, argument: int) -> None:
    vm.arch.guest_can_read_msr_platform_info = bool(argument)


def _exception_payload(vm: Vm, argument: int) -> None:
    vm.arch.exception_payload_enabled = bool(argument)


def _triple_fault_event(vm: Vm, argument: int) -> None:
    vm.arch.triple_fault_event = bool(argument)


def _user_space_msr(vm: Vm, argument: int) -> None:
    _only(argument, kx.KVM_MSR_EXIT_REASON_VALID_MASK)
    vm.arch.user_space_msr_mask = argument


def _exit_hypercall(vm: Vm, argument: int) -> None:
    _only(argument, HYPERCALL_EXITS)
    vm.arch.hypercall_exit_enabled = argument


def _exit_on_emulation_failure(vm: Vm, argument: int) -> None:
    _only(argument, 1)
    vm.arch.exit_on_emulation_error = bool(argument)


def _max_vcpu_id(vm: Vm, argument: int) -> None:
    """It can be set once, before the first vCPU, which would settle it."""
    if argument > KVM_MAX_VCPU_IDS:
        raise KvmError(errno.EINVAL)
    arch = vm.arch
    with vm.lock:
        if arch.bsp_vcpu_id > argument or (arch.max_vcpu_ids and arch.max_vcpu_ids != argument):
            raise KvmError(errno.EINVAL)
        arch.max_vcpu_ids = argument


def _halt_poll(vm: Vm, argument: int) -> None:
    """The most nanoseconds that a halted vCPU may poll for: here it sleeps at once, which is within every limit."""
    _only(argument, (1 << 32) - 1)
    vm.arch.max_halt_poll_ns = argument


def _manual_dirty_log_protect(vm: Vm, argument: int) -> None:
    dirty_log.set_manual_protect(vm.memslots, argument)


def _dirty_ring(vm: Vm, argument: int) -> None:
    dirty_ring.enable(vm, argument & 0xFFFFFFFF)


VM_CAPS: dict[int, Callable[[Vm, int], None]] = {
    K.KVM_CAP_DISABLE_QUIRKS: _disable_quirks,
    K.KVM_CAP_MAX_VCPU_ID: _max_vcpu_id,
    K.KVM_CAP_X86_DISABLE_EXITS: _disable_exits,
    K.KVM_CAP_MSR_PLATFORM_INFO: _msr_platform_info,
    K.KVM_CAP_EXCEPTION_PAYLOAD: _exception_payload,
    K.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: _manual_dirty_log_protect,
    K.KVM_CAP_X86_USER_SPACE_MSR: _user_space_msr,
    K.KVM_CAP_EXIT_HYPERCALL: _exit_hypercall,
    K.KVM_CAP_EXIT_ON_EMULATION_FAILURE: _exit_on_emulation_failure,
    K.KVM_CAP_DIRTY_LOG_RING: _dirty_ring,
    K.KVM_CAP_DISABLE_QUIRKS2: _disable_quirks2,
    K.KVM_CAP_X86_TRIPLE_FAULT_EVENT: _triple_fault_event,
    K.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: _dirty_ring,
    K.KVM_CAP_HALT_POLL: _halt_poll,
    K.KVM_CAP_SPLIT_IRQCHIP: irq.enable_split_irqchip,
    K.KVM_CAP_X2APIC_API: irq.enable_x2apic_api,
    K.KVM_CAP_X86_APIC_BUS_CYCLES_NS: irq.set_apic_bus_cycle,
}
"""capability → what enabling it on a VM does with the first argument."""

VCPU_CAPS: dict[int, Callable[[Vcpu, int], None]] = {
    K.KVM_CAP_HYPERV_SYNIC: _hyperv_synic,
    K.KVM_CAP_HYPERV_SYNIC2: _hyperv_synic2,
    K.KVM_CAP_HYPERV_ENLIGHTENED_VMCS: _no_nested_hyperv,
    K.KVM_CAP_HYPERV_DIRECT_TLBFLUSH: _no_nested_hyperv,
    K.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: _enforce_pv_cpuid,
    K.KVM_CAP_HYPERV_ENFORCE_CPUID: _hyperv_enforce_cpuid,
}
"""capability → what enabling it on a vCPU does with the first argument."""
