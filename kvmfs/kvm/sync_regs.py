# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers in kvm_run: KVM_CAP_SYNC_REGS (api.rst 5, ``kvm_valid_regs``; Linux: sync_regs, store_regs)."""

from __future__ import annotations

import errno
import struct
from ctypes import sizeof
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi.structs import KvmRegs, KvmSregs, KvmVcpuEvents
from kvmfs.errors import KvmError
from kvmfs.kvm import events, regs

if TYPE_CHECKING:
    from kvmfs.kvm.kvm_main import Vcpu

_DIRTY = 296                    # in struct kvm_run
_REGS = _DIRTY + 8              # kvm_run.s.regs
_REGS_SIZE = sizeof(KvmRegs)
_SREGS = _REGS + _REGS_SIZE
_EVENTS = _SREGS + sizeof(KvmSregs)
_u64 = struct.Struct("<Q")


def sync_regs(vcpu: Vcpu, dirty: int) -> int:
    """Take over the parts of kvm_run.s.regs that ``dirty`` names, and clear their bits.

    0, or -EINVAL when one cannot be taken: its bit and those after it stay.
    """
    run = vcpu.run
    if dirty & kx.KVM_SYNC_X86_REGS:
        regs.set_regs(vcpu, bytes(run[_REGS:_SREGS]))
        dirty &= ~kx.KVM_SYNC_X86_REGS
        _u64.pack_into(run, _DIRTY, dirty)
    try:
        if dirty & kx.KVM_SYNC_X86_SREGS:
            regs.set_sregs(vcpu, KvmSregs.from_buffer_copy(run, _SREGS))
            dirty &= ~kx.KVM_SYNC_X86_SREGS
            _u64.pack_into(run, _DIRTY, dirty)
        if dirty & kx.KVM_SYNC_X86_EVENTS:
            events.set_vcpu_events(vcpu, KvmVcpuEvents.from_buffer_copy(run, _EVENTS))
            _u64.pack_into(run, _DIRTY, dirty & ~kx.KVM_SYNC_X86_EVENTS)
    except KvmError:
        return -errno.EINVAL
    return 0


def store_regs(vcpu: Vcpu, valid: int) -> None:
    """Leave the parts of kvm_run.s.regs that ``valid`` names for the client."""
    run = vcpu.run
    if valid & kx.KVM_SYNC_X86_REGS:
        run[_REGS:_SREGS] = regs.get_regs(vcpu)
    if valid & kx.KVM_SYNC_X86_SREGS:
        run[_SREGS:_EVENTS] = regs.get_sregs(vcpu)
    if valid & kx.KVM_SYNC_X86_EVENTS:
        state = bytes(events.get_vcpu_events(vcpu))
        run[_EVENTS:_EVENTS + len(state)] = state
