# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls that decide what a VM is like: capabilities, MSR filter, boot CPU, shadow pages."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmMsrFilter
from kvmfs.abi.x86 import KVM_MAX_VCPU_IDS
from kvmfs.errors import KvmError
from kvmfs.kvm import enable_cap as _enable_cap
from kvmfs.kvm import msr_filter

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vm

ENABLE_CAP = struct.Struct("<IIQ88x")           # cap, flags, args[0], the rest
KVM_MIN_ALLOC_MMU_PAGES = 64


def enable_cap(vm: Vm, req: RequestLike) -> int:
    """KVM_ENABLE_CAP on a VM (api.rst 4.37).  EINVAL: see kvmfs.kvm.enable_cap."""
    cap, flags, argument = ENABLE_CAP.unpack(req.data)
    _enable_cap.vm_enable_cap(vm, cap, flags, argument)
    return 0


def x86_set_msr_filter(vm: Vm, req: RequestLike) -> int:
    """KVM_X86_SET_MSR_FILTER (api.rst 4.97).  EINVAL, EFAULT: see kvmfs.kvm.msr_filter."""
    msr_filter.set_msr_filter(vm, vm.host.memory, KvmMsrFilter.from_buffer_copy(req.data))
    return 0


def set_boot_cpu_id(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_BOOT_CPU_ID (api.rst 4.41).  EBUSY: there is a vCPU; EINVAL: no vCPU can have this id."""
    arch = vm.arch
    with vm.lock:
        if vm.created_vcpus:
            raise KvmError(errno.EBUSY)
        if req.arg > KVM_MAX_VCPU_IDS or (arch.max_vcpu_ids and req.arg > arch.max_vcpu_ids):
            raise KvmError(errno.EINVAL)
        arch.bsp_vcpu_id = req.arg
    return 0


def set_nr_mmu_pages(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_NR_MMU_PAGES (api.rst 4.44).  EINVAL: under 64.  There are no shadow pages that it could limit."""
    if req.arg < KVM_MIN_ALLOC_MMU_PAGES:
        raise KvmError(errno.EINVAL)
    return 0
