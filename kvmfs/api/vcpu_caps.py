# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_ENABLE_CAP on a vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfs.api.vm_caps import ENABLE_CAP
from kvmfs.kvm import enable_cap as _enable_cap

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vcpu


def enable_cap(vcpu: Vcpu, req: RequestLike) -> int:
    """KVM_ENABLE_CAP on a vCPU (api.rst 4.37).  EINVAL: flags, or a capability that cannot be enabled."""
    cap, flags, argument = ENABLE_CAP.unpack(req.data)
    _enable_cap.vcpu_enable_cap(vcpu, cap, flags, argument)
    return 0
