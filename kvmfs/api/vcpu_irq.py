# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on a vCPU for its local APIC."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmfs.errors import KvmError

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu
    from kvmfs.kvm.lapic import Lapic


def _apic(vcpu: Vcpu) -> Lapic:
    apic = vcpu.arch.apic
    if apic is None:
        raise KvmError(errno.EINVAL)
    return apic


def get_lapic(vcpu: Vcpu, req: RequestLike) -> bytes:
    """KVM_GET_LAPIC (api.rst 4.57): 1 KiB of registers.  EINVAL: no local APIC in here."""
    return _apic(vcpu).get_state()


def set_lapic(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_SET_LAPIC (api.rst 4.58).  EINVAL: no local APIC in here, or (32-bit IDs) another x2APIC ID."""
    _apic(vcpu).set_state(bytes(req.data))
    return 0
