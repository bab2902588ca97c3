# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on a vCPU's descriptor (Linux: kvm_vcpu_ioctl, kvm_arch_vcpu_ioctl).

The dispatcher holds the vCPU's mutex: what a handler reads and writes stands still.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmFpu, KvmSregs, KvmVcpuEvents
from kvmfs.api.stats import vcpu_stats_fd as get_stats_fd  # noqa: F401 (a handler)
from kvmfs.api.vcpu_caps import enable_cap  # noqa: F401 (a handler)
from kvmfs.api.vcpu_clock import (  # noqa: F401 (handlers)
    get_device_attr,
    get_tsc_khz,
    has_device_attr,
    kvmclock_ctrl,
    set_device_attr,
    set_tsc_khz,
    x86_set_mce,
    x86_setup_mce,
)
from kvmfs.api.vcpu_irq import get_lapic, set_lapic  # noqa: F401 (handlers)
from kvmfs.api.vcpu_state import (  # noqa: F401 (handlers)
    get_debugregs,
    get_sregs2,
    get_xcrs,
    get_xsave,
    get_xsave2,
    pre_fault_memory,
    set_debugregs,
    set_guest_debug,
    set_sregs2,
    set_vapic_addr,
    set_xcrs,
    set_xsave,
    tpr_access_reporting,
    translate,
)
from kvmfs.errors import KvmError
from kvmfs.kvm import cpuid, events, fpu, hyperv, hyperv_cpuid, irq, msr_lists, regs

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu

_U32 = struct.Struct("<I")
_CPUID_HEADER = struct.Struct("<II")         # nent, padding
KVM_NR_INTERRUPTS = 256
SIGSET_SIZE = 8
# Never blocked, whatever a mask says: SIGKILL (9), SIGSTOP (19).
_UNBLOCKABLE = 1 << 8 | 1 << 18


def get_regs(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_REGS: 16 general registers, rip, rflags."""
    return regs.get_regs(vcpu)


def set_regs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_REGS."""
    regs.set_regs(vcpu, req.data)
    return 0


def get_sregs(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_SREGS."""
    return regs.get_sregs(vcpu)


def set_sregs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_SREGS.  EINVAL: control registers that exclude each other."""
    regs.set_sregs(vcpu, KvmSregs.from_buffer_copy(req.data))
    return 0


def get_fpu(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_FPU: x87 and SSE state."""
    return bytes(fpu.get_fpu(vcpu))


def set_fpu(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_FPU."""
    fpu.set_fpu(vcpu, KvmFpu.from_buffer_copy(req.data))
    return 0


def interrupt(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_INTERRUPT (api.rst 4.16): queue a vector for the next entry.

    EINVAL: vector above 255; ENXIO: the PIC is in here; EEXIST: the last one (split irqchip) still waits.
    """
    vector, = _U32.unpack(req.data)
    if vector >= KVM_NR_INTERRUPTS:
        raise KvmError(errno.EINVAL)
    apic = vcpu.arch.apic
    if apic is not None:
        irq.interrupt(vcpu, apic, vector)
        return 0
    events.queue_interrupt(vcpu, vector)
    vcpu.arch.entry_check = True
    return 0


def nmi(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_NMI (api.rst 4.64)."""
    events.queue_nmi(vcpu)
    return 0


def smi(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SMI (api.rst 4.117).  ENOTTY: there is no SMM, as in a kernel built without it."""
    raise KvmError(errno.ENOTTY)


def get_mp_state(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_MP_STATE (api.rst 4.38)."""
    return _U32.pack(irq.get_mp_state(vcpu))


def set_mp_state(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_MP_STATE (api.rst 4.39).  Without an in-kernel APIC only RUNNABLE exists: EINVAL."""
    state, = _U32.unpack(req.data)
    irq.set_mp_state(vcpu, state)
    return 0


def get_vcpu_events(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_VCPU_EVENTS."""
    return bytes(events.get_vcpu_events(vcpu))


def set_vcpu_events(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_VCPU_EVENTS."""
    events.set_vcpu_events(vcpu, KvmVcpuEvents.from_buffer_copy(req.data))
    return 0


def set_signal_mask(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_SIGNAL_MASK (api.rst 4.21): the mask in force during KVM_RUN; a NULL argument ends that.

    EFAULT for a bad pointer, EINVAL when its length is not 8.
    """
    if not req.arg:
        vcpu.sigset = None
        return 0
    memory = vcpu.vm.host.memory
    length, = _U32.unpack(memory.read(req.arg, 4))
    if length != SIGSET_SIZE:
        raise KvmError(errno.EINVAL)
    vcpu.sigset = int.from_bytes(memory.read(req.arg + 4, SIGSET_SIZE), "little") & ~_UNBLOCKABLE
    return 0


def set_cpuid(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_CPUID (api.rst 4.20).  E2BIG: over 256 entries; EINVAL: the vCPU has run and it is another table."""
    return _set_cpuid(vcpu, cpuid.load_cpuid(vcpu.vm.host.memory, req.arg, _CPUID_HEADER.unpack(req.data)[0]))


def set_cpuid2(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_CPUID2, with the errors of KVM_SET_CPUID."""
    return _set_cpuid(vcpu, cpuid.load_cpuid2(vcpu.vm.host.memory, req.arg, _CPUID_HEADER.unpack(req.data)[0]))


def _set_cpuid(vcpu: Vcpu, entries: tuple[cpuid.CpuidEntry, ...]) -> int:
    arch = vcpu.arch
    arch.update_cpuid(vcpu)
    arch.cpuid = cpuid.set_cpuid(arch.cpuid, entries, has_run=arch.ran, **arch.cpuid_state(vcpu))
    arch.cpuid_set = True
    if arch.apic is not None:
        arch.apic.after_set_cpuid()
    hyperv.after_set_cpuid(vcpu)
    return 0


def get_cpuid2(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_CPUID2.  E2BIG: room for too few entries."""
    vcpu.arch.update_cpuid(vcpu)
    return cpuid.get_cpuid2(vcpu.arch.cpuid, vcpu.vm.host.memory, req.arg, req.data)


def get_supported_hv_cpuid(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_SUPPORTED_HV_CPUID (api.rst 4.118).  E2BIG: room for too few entries; EFAULT."""
    nent, padding = _CPUID_HEADER.unpack(req.data)
    entries = vcpu.vm.profile.hyperv_cpuid(hyperv_cpuid.supported(lapic=vcpu.arch.apic is not None))
    if nent < len(entries):
        raise KvmError(errno.E2BIG)
    cpuid.store_entries(vcpu.vm.host.memory, req.arg, entries)
    return _CPUID_HEADER.pack(len(entries), padding)


def get_msrs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_GET_MSRS: how many could be read; it stops at the first that cannot."""
    msrs = vcpu.arch.msrs
    return msr_lists.get_msrs(vcpu.vm.host.memory, req.arg, _CPUID_HEADER.unpack(req.data)[0],
                              lambda index: msr_lists.do_get_msr(msrs, index))


def set_msrs(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_MSRS: how many were written; it stops at the first that cannot be."""
    msrs, ran = vcpu.arch.msrs, vcpu.arch.ran
    return msr_lists.set_msrs(vcpu.vm.host.memory, req.arg, _CPUID_HEADER.unpack(req.data)[0],
                              lambda index, value: msr_lists.do_set_msr(msrs, index, value, has_run=ran))
