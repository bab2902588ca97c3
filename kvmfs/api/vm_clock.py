# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls for a VM's clocks."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmfs.errors import KvmError
from kvmfs.kvm import kvmclock, tsc

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vm

_CLOCK_DATA = struct.Struct("<QI4xQQ16x")       # struct kvm_clock_data: clock, flags, realtime, host_tsc
U32_MAX = (1 << 32) - 1


def get_clock(vm: Vm, req: RequestLike) -> bytes:
    """KVM_GET_CLOCK (api.rst 4.29)."""
    return _CLOCK_DATA.pack(*kvmclock.get_kvmclock(vm))


def set_clock(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_CLOCK (api.rst 4.30).  EINVAL: unknown flags."""
    kvmclock.set_kvmclock(vm, kvmclock.ClockData(*_CLOCK_DATA.unpack(req.data)))
    return 0


def set_tsc_khz(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_TSC_KHZ on a VM (api.rst 4.55): the frequency of vCPUs to come; 0: the host's.  EINVAL: too fast."""
    if req.arg & U32_MAX >= vm.vendor.tsc_scaling.max_khz:
        raise KvmError(errno.EINVAL)
    vm.arch.clock.default_tsc_khz = req.arg & U32_MAX or tsc.tsc_khz()
    return 0


def get_tsc_khz(vm: Vm, req: RequestLike) -> int:
    """KVM_GET_TSC_KHZ on a VM (api.rst 4.56)."""
    return vm.arch.clock.default_tsc_khz
