# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_CHECK_EXTENSION answers (Linux: kvm_vm_ioctl_check_extension; api.rst 4.4).

Every capability for which Linux on x86 answers something is in exactly one of two tables: :data:`SUPPORTED`
with its value, or :data:`ABSENT` with the reason why this KVM says 0.  Capabilities of other architectures
and unknown numbers are in neither: 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmfs.abi import caps as K
from kvmfs.abi.exits import KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_SYNC_X86_VALID_FIELDS
from kvmfs.abi.flags import KVM_X86_DEFAULT_VM
from kvmfs.abi.x86 import (
    KVM_DIRTY_RING_MAX_ENTRIES,
    KVM_MAX_IRQ_ROUTES,
    KVM_MAX_MCE_BANKS,
    KVM_MAX_VCPU_IDS,
    KVM_MAX_VCPUS,
    KVM_USER_MEM_SLOTS,
)
from kvmfs.kvm import steal_time
from kvmfs.kvm.dirty_log import KVM_DIRTY_LOG_MANUAL_CAPS
from kvmfs.kvm.enable_cap import HYPERCALL_EXITS, SUPPORTED_DISABLE_EXITS, SUPPORTED_QUIRKS
from kvmfs.kvm.guest_debug import GUESTDBG_VALID_MASK
from kvmfs.kvm.irq import X2APIC_API_VALID_FLAGS
from kvmfs.kvm.irq_comm import APIC_BUS_CYCLE_NS_DEFAULT
from kvmfs.kvm.kvmclock import VALID_FLAGS as KVM_CLOCK_VALID_FLAGS
from kvmfs.kvm.xsave import XSAVE_SIZE

if TYPE_CHECKING:
    from kvmfs.kvm.profile import Profile

DIRTY_RING_BYTES = KVM_DIRTY_RING_MAX_ENTRIES * 16
VM_TYPES = 1 << KVM_X86_DEFAULT_VM


def online_cpus() -> int:
    """KVM_CAP_NR_VCPUS: the recommended number of vCPUs is the host's number of CPUs."""
    return min(os.cpu_count() or 1, KVM_MAX_VCPUS)


SUPPORTED: dict[int, int | Callable[[], int]] = {
    K.KVM_CAP_HLT: 1,
    K.KVM_CAP_IRQCHIP: 1,
    K.KVM_CAP_PIT: 1,
    K.KVM_CAP_PIT2: 1,
    K.KVM_CAP_PIT_STATE2: 1,
    K.KVM_CAP_REINJECT_CONTROL: 1,
    K.KVM_CAP_IRQ_ROUTING: KVM_MAX_IRQ_ROUTES,
    K.KVM_CAP_IRQ_INJECT_STATUS: 1,
    K.KVM_CAP_SIGNAL_MSI: 1,
    K.KVM_CAP_IOAPIC_POLARITY_IGNORED: 1,
    K.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    K.KVM_CAP_X86_APIC_BUS_CYCLES_NS: APIC_BUS_CYCLE_NS_DEFAULT,
    K.KVM_CAP_X2APIC_API: X2APIC_API_VALID_FLAGS,
    K.KVM_CAP_SPLIT_IRQCHIP: 1,
    K.KVM_CAP_BINARY_STATS_FD: 1,
    K.KVM_CAP_DEVICE_CTRL: 1,
    K.KVM_CAP_VAPIC: 1,
    K.KVM_CAP_USER_MEMORY: 1,
    K.KVM_CAP_SET_TSS_ADDR: 1,
    K.KVM_CAP_EXT_CPUID: 1,
    K.KVM_CAP_NR_VCPUS: online_cpus,
    K.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    K.KVM_CAP_NOP_IO_DELAY: 1,
    K.KVM_CAP_MP_STATE: 1,
    K.KVM_CAP_COALESCED_MMIO: KVM_COALESCED_MMIO_PAGE_OFFSET,
    K.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    K.KVM_CAP_USER_NMI: 1,
    K.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    K.KVM_CAP_IOEVENTFD: 1,
    K.KVM_CAP_IRQFD: 1,
    K.KVM_CAP_IRQFD_RESAMPLE: 1,
    K.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    K.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    K.KVM_CAP_VCPU_EVENTS: 1,
    K.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    K.KVM_CAP_READONLY_MEM: 1,
    K.KVM_CAP_EXT_EMUL_CPUID: 1,
    K.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    K.KVM_CAP_CHECK_EXTENSION_VM: 1,
    K.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    K.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    K.KVM_CAP_IMMEDIATE_EXIT: 1,
    K.KVM_CAP_GET_MSR_FEATURES: 1,
    K.KVM_CAP_COALESCED_PIO: 1,
    K.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_DIRTY_LOG_MANUAL_CAPS,
    K.KVM_CAP_DIRTY_LOG_RING: DIRTY_RING_BYTES,
    K.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: DIRTY_RING_BYTES,
    K.KVM_CAP_USER_MEMORY2: 1,
    K.KVM_CAP_VM_TYPES: VM_TYPES,
    K.KVM_CAP_DEBUGREGS: 1,
    K.KVM_CAP_SET_GUEST_DEBUG: 1,
    K.KVM_CAP_SET_GUEST_DEBUG2: GUESTDBG_VALID_MASK,
    K.KVM_CAP_X86_ROBUST_SINGLESTEP: 1,
    K.KVM_CAP_SYNC_REGS: KVM_SYNC_X86_VALID_FIELDS,
    K.KVM_CAP_XSAVE: 1,
    K.KVM_CAP_XCRS: 1,
    K.KVM_CAP_SREGS2: 1,
    K.KVM_CAP_XSAVE2: XSAVE_SIZE,
    K.KVM_CAP_SYS_ATTRIBUTES: 1,
    K.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
    K.KVM_CAP_SET_BOOT_CPU_ID: 1,
    K.KVM_CAP_ENABLE_CAP: 1,
    K.KVM_CAP_ENABLE_CAP_VM: 1,
    K.KVM_CAP_DISABLE_QUIRKS: 1,
    K.KVM_CAP_X86_DISABLE_EXITS: SUPPORTED_DISABLE_EXITS,
    K.KVM_CAP_MSR_PLATFORM_INFO: 1,
    K.KVM_CAP_EXCEPTION_PAYLOAD: 1,
    K.KVM_CAP_X86_USER_SPACE_MSR: 1,
    K.KVM_CAP_X86_MSR_FILTER: 1,
    K.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: 1,
    K.KVM_CAP_EXIT_HYPERCALL: HYPERCALL_EXITS,
    K.KVM_CAP_EXIT_ON_EMULATION_FAILURE: 1,
    K.KVM_CAP_DISABLE_QUIRKS2: SUPPORTED_QUIRKS,
    K.KVM_CAP_X86_TRIPLE_FAULT_EVENT: 1,
    K.KVM_CAP_CLOCKSOURCE: 1,
    K.KVM_CAP_ADJUST_CLOCK: KVM_CLOCK_VALID_FLAGS,
    K.KVM_CAP_GET_TSC_KHZ: 1,
    K.KVM_CAP_KVMCLOCK_CTRL: 1,
    K.KVM_CAP_HYPERV: 1,
    K.KVM_CAP_HYPERV_VAPIC: 1,
    K.KVM_CAP_HYPERV_SPIN: 1,
    K.KVM_CAP_HYPERV_TIME: 1,
    K.KVM_CAP_HYPERV_SYNIC: 1,
    K.KVM_CAP_HYPERV_SYNIC2: 1,
    K.KVM_CAP_HYPERV_VP_INDEX: 1,
    K.KVM_CAP_HYPERV_EVENTFD: 1,
    K.KVM_CAP_HYPERV_TLBFLUSH: 1,
    K.KVM_CAP_HYPERV_SEND_IPI: 1,
    K.KVM_CAP_HYPERV_CPUID: 1,
    K.KVM_CAP_SYS_HYPERV_CPUID: 1,
    K.KVM_CAP_HYPERV_ENFORCE_CPUID: 1,
    K.KVM_CAP_SYSTEM_EVENT_DATA: 1,
    K.KVM_CAP_ASYNC_PF: 1,
    K.KVM_CAP_ASYNC_PF_INT: 1,
    K.KVM_CAP_VCPU_ATTRIBUTES: 1,
    K.KVM_CAP_STEAL_TIME: lambda: int(steal_time.available()),
    K.KVM_CAP_MCE: KVM_MAX_MCE_BANKS,
    K.KVM_CAP_PCI_SEGMENT: 1,            # Linux's answer, though the device assignment that it spoke of is gone
    K.KVM_CAP_HALT_POLL: 1,
    K.KVM_CAP_LAST_CPU: 1,
    # Linux 6.12 fills kvm_run.memory_fault for private memory only: in a plain VM EFAULT comes with KVM_EXIT_UNKNOWN.
    K.KVM_CAP_MEMORY_FAULT_INFO: 1,
    K.KVM_CAP_PRE_FAULT_MEMORY: 1,
    K.KVM_CAP_TSC_CONTROL: 1,
    K.KVM_CAP_VM_TSC_CONTROL: 1,
}
"""number → value, or what computes it."""

_ENABLE = "KVM_ENABLE_CAP has no effect for it"
_EVMCS = "no nested guests, whose hypervisor could be enlightened"
_SEV = "no encrypted guests"
_PMU = "no PMU"

ABSENT: dict[int, str] = {
    K.KVM_CAP_SYNC_MMU: "a client's later mmap or munmap in a slot's range is not followed",
    K.KVM_CAP_XEN_HVM: "no Xen guests",
    K.KVM_CAP_X86_SMM: "no system management mode",
    K.KVM_CAP_MULTI_ADDRESS_SPACE: "the second address space is SMM's",
    K.KVM_CAP_NESTED_STATE: "no nested guests",
    K.KVM_CAP_HYPERV_ENLIGHTENED_VMCS: _EVMCS,
    K.KVM_CAP_PMU_EVENT_FILTER: _PMU,
    K.KVM_CAP_HYPERV_DIRECT_TLBFLUSH: _EVMCS,
    K.KVM_CAP_SMALLER_MAXPHYADDR: "reserved bits of guest page tables follow the engine's width",
    K.KVM_CAP_X86_BUS_LOCK_EXIT: "split locks are not noticed",
    K.KVM_CAP_SGX_ATTRIBUTE: "no SGX",
    K.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: _SEV,
    K.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: _SEV,
    K.KVM_CAP_PMU_CAPABILITY: _PMU,
    K.KVM_CAP_X86_NOTIFY_VMEXIT: _ENABLE,
    K.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: _ENABLE,
    K.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: "only for architectures whose devices write without a vCPU; x86 says 0, too",
    K.KVM_CAP_PMU_EVENT_MASKED_EVENTS: _PMU,
    K.KVM_CAP_MEMORY_ATTRIBUTES: "no private memory",
    K.KVM_CAP_GUEST_MEMFD: "no private memory",
    K.KVM_CAP_X86_GUEST_MODE: "no nested guests",
}
"""number → why Linux on x86 says yes (on some host at least) and this KVM 0."""


NEEDS_SHARED_RUN = frozenset((K.KVM_CAP_DIRTY_LOG_RING, K.KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
"""What is absent where kvm_run areas are copied, not shared (no FUSE passthrough)."""


def check_extension(profile: Profile, cap: int, *, shares_run: bool = True) -> int:
    """The answer on the node: capability ``cap``'s value, 0 where it is absent or unknown.  Never fails."""
    if cap in NEEDS_SHARED_RUN and not shares_run:
        return 0
    value = SUPPORTED.get(cap, 0)
    return profile.extension(cap, value if isinstance(value, int) else value())


def check_extension_vm(profile: Profile, cap: int, *, shares_run: bool = True) -> int:
    """The answer on a VM's descriptor.

    In Linux it differs from the node's for protected and confidential VMs and where SMM was switched off;
    none of these exist here.
    """
    return check_extension(profile, cap, shares_run=shares_run)
