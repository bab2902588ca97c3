# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_X86_SET_MSR_FILTER, and MSR accesses that the client is asked about (Linux: x86.c; api.rst 4.97, 7.21).

The filter is for the guest's RDMSR and WRMSR only; the client's KVM_GET_MSRS and KVM_SET_MSRS pass it by.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvmfs.abi import exits as kx
from kvmfs.abi import flags as F
from kvmfs.abi.structs import KvmMsrFilter
from kvmfs.errors import KvmError
from kvmfs.kvm.emulate import complete_intercepted

if TYPE_CHECKING:
    from kvmfs.kvm.host import Memory
    from kvmfs.kvm.kvm_main import Vcpu, Vm

M32 = (1 << 32) - 1
RAX, RCX, RDX = 0, 1, 2
MSR_LENGTH = 2                              # of RDMSR and WRMSR
X2APIC_MSRS = range(0x800, 0x900)           # never filtered
_UNION = 32                                 # of kvm_run
_msr_exit = struct.Struct("<B7xIIQ")        # kvm_run.msr: error, pad, reason, index, data
_set_reason = struct.Struct("<I").pack_into


class Range(NamedTuple):
    """``struct msr_bitmap_range``: bit i of ``bitmap`` set allows what ``flags`` names for MSR ``base`` + i."""

    flags: int
    base: int
    nmsrs: int
    bitmap: bytes


class MsrFilter(NamedTuple):
    """``struct kvm_x86_msr_filter``."""

    default_allow: bool
    ranges: tuple[Range, ...]

    def allows(self, index: int, access: int) -> bool:
        """``kvm_msr_allowed``.  ``access``: KVM_MSR_FILTER_READ or _WRITE."""
        if index in X2APIC_MSRS:
            return True
        for flags, base, nmsrs, bitmap in self.ranges:
            # The end wraps around at 32 bits, in Linux too: such a range is empty.
            if base <= index < (base + nmsrs & M32) and flags & access:
                bit = index - base
                return bool(bitmap[bit >> 3] >> (bit & 7) & 1)
        return self.default_allow


def set_msr_filter(vm: Vm, memory: Memory, data: KvmMsrFilter) -> None:
    """``kvm_vm_ioctl_set_msr_filter``.

    EINVAL: unknown flags, all denied by default and no range, a range without or with unknown flags or with a
    bitmap over KVM_MSR_FILTER_MAX_BITMAP_SIZE; EFAULT: a bitmap.
    """
    if data.flags & ~F.KVM_MSR_FILTER_VALID_MASK:
        raise KvmError(errno.EINVAL)
    default_allow = not data.flags & F.KVM_MSR_FILTER_DEFAULT_DENY
    used = [r for r in data.ranges if r.nmsrs]
    if not used and not default_allow:
        raise KvmError(errno.EINVAL)
    ranges = []
    for r in used:
        size = (r.nmsrs + 63) // 64 * 8
        if not r.flags or r.flags & ~F.KVM_MSR_FILTER_RANGE_VALID_MASK or size > F.KVM_MSR_FILTER_MAX_BITMAP_SIZE:
            raise KvmError(errno.EINVAL)
        ranges.append(Range(r.flags, r.base, r.nmsrs, memory.read(r.bitmap, size)))
    with vm.lock:
        vm.arch.msr_filter = MsrFilter(default_allow, tuple(ranges))
    vm.request_all(msr_filter_changed)


def msr_filter_changed(vcpu: Vcpu) -> None:
    """KVM_REQ_MSR_FILTER_CHANGED: a read that is denied must exit, the others need not; writes always do."""
    msr_filter = vcpu.vm.arch.msr_filter
    for msr in vcpu.vm.vendor.passthrough_msrs:
        read = msr_filter is None or msr_filter.allows(msr, F.KVM_MSR_FILTER_READ)
        vcpu.cpu.msr_passthrough(msr, read, False)


def emulate_rdmsr(vcpu: Vcpu) -> int:
    """``kvm_emulate_rdmsr``."""
    cpu, arch = vcpu.cpu, vcpu.vm.arch
    index = cpu.gpr(RCX) & M32
    allowed = arch.msr_filter is None or arch.msr_filter.allows(index, F.KVM_MSR_FILTER_READ)
    value = vcpu.arch.msrs.get(index, host_initiated=False) if allowed else None
    if value is not None:
        cpu.set_gpr(RAX, value & M32)
        cpu.set_gpr(RDX, value >> 32)
    elif arch.user_space_msr_mask and _ask(vcpu, kx.KVM_EXIT_X86_RDMSR, index, 0, allowed, _complete_rdmsr):
        return 0
    return complete_intercepted(vcpu, value is not None, MSR_LENGTH)


def emulate_wrmsr(vcpu: Vcpu) -> int:
    """``kvm_emulate_wrmsr``."""
    cpu, arch = vcpu.cpu, vcpu.vm.arch
    index = cpu.gpr(RCX) & M32
    data = cpu.gpr(RAX) & M32 | (cpu.gpr(RDX) & M32) << 32
    allowed = arch.msr_filter is None or arch.msr_filter.allows(index, F.KVM_MSR_FILTER_WRITE)
    ok = allowed and vcpu.arch.msrs.set(index, data, host_initiated=False)
    if not ok and arch.user_space_msr_mask and _ask(vcpu, kx.KVM_EXIT_X86_WRMSR, index, data, allowed,
                                                    _complete_wrmsr):
        return 0
    return complete_intercepted(vcpu, ok, MSR_LENGTH)


def _ask(vcpu: Vcpu, exit_reason: int, index: int, data: int, allowed: bool,
         completion: Callable[[Vcpu], int]) -> bool:
    """``kvm_msr_user_space``: fill in an exit, if the client wants to know about this kind of refusal."""
    if not allowed:
        reason = kx.KVM_MSR_EXIT_REASON_FILTER
    elif vcpu.arch.msrs.is_unknown(index, write=exit_reason == kx.KVM_EXIT_X86_WRMSR):
        reason = kx.KVM_MSR_EXIT_REASON_UNKNOWN
    else:
        reason = kx.KVM_MSR_EXIT_REASON_INVAL
    if not vcpu.vm.arch.user_space_msr_mask & reason:
        return False
    _set_reason(vcpu.run, 8, exit_reason)
    _msr_exit.pack_into(vcpu.run, _UNION, 0, reason, index, data)
    vcpu.arch.complete_userspace_io = completion
    return True


def _complete_rdmsr(vcpu: Vcpu) -> int:
    error, _, _, data = _msr_exit.unpack_from(vcpu.run, _UNION)
    if not error:
        vcpu.cpu.set_gpr(RAX, data & M32)
        vcpu.cpu.set_gpr(RDX, data >> 32)
    return complete_intercepted(vcpu, not error, MSR_LENGTH)


def _complete_wrmsr(vcpu: Vcpu) -> int:
    return complete_intercepted(vcpu, not vcpu.run[_UNION], MSR_LENGTH)
