# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_GET_STATS_FD (api.rst 4.133): a read-only descriptor of a VM's or a vCPU's statistics.

It keeps the VM alive, and any process that has it may read: only the ioctls ask whose VM this is.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from kvmfs.kvm import stats
from kvmfs.kvm.kvm_main import VCPU_STATS_INODE, VM_STATS_INODE

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu, Vm


def vm_stats_fd(vm: Vm, req: RequestLike) -> None:
    """KVM_GET_STATS_FD on a VM.  EMFILE, ENFILE."""
    vm.host.may_block()
    with vm.create_lock, contextlib.suppress(OSError):      # the client has been told
        vm.host.graft(req, "kvm-vm-stats", VM_STATS_INODE, None, content=partial(stats.read_vm, vm))


def vcpu_stats_fd(vcpu: Vcpu, req: RequestLike) -> None:
    """KVM_GET_STATS_FD on a vCPU.  EMFILE, ENFILE."""
    vcpu.vm.host.may_block()
    with vcpu.vm.create_lock, contextlib.suppress(OSError):
        vcpu.vm.host.graft(req, f"kvm-vcpu-stats:{vcpu.vcpu_id}", VCPU_STATS_INODE + vcpu.index, None,
                           content=partial(stats.read_vcpu, vcpu))
