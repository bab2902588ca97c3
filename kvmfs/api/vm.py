# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls on a VM's descriptor (Linux: kvm_vm_ioctl, kvm_arch_vm_ioctl).

A handler copies in, checks, acts and copies out, in the kernel's order; KvmError carries the errno.
"""

from __future__ import annotations

import errno
import struct
from ctypes import sizeof
from typing import TYPE_CHECKING

from kvmfs.abi.structs import KvmEncRegion
from kvmfs.api.device import create_device  # noqa: F401 (a handler)
from kvmfs.api.stats import vm_stats_fd as get_stats_fd  # noqa: F401 (a handler)
from kvmfs.api.vm_caps import enable_cap, set_boot_cpu_id, set_nr_mmu_pages, x86_set_msr_filter  # noqa: F401 (handlers)
from kvmfs.api.vm_clock import get_clock, get_tsc_khz, set_clock, set_tsc_khz  # noqa: F401 (handlers)
from kvmfs.api.vm_irq import (  # noqa: F401 (handlers)
    create_irqchip,
    create_pit,
    create_pit2,
    get_irqchip,
    get_pit,
    get_pit2,
    hyperv_eventfd,
    irq_line,
    irq_line_status,
    reinject_control,
    set_gsi_routing,
    set_irqchip,
    set_pit,
    set_pit2,
    signal_msi,
)
from kvmfs.errors import KvmError
from kvmfs.kvm import caps, coalesced_mmio, dirty_log, dirty_ring, eventfd

if TYPE_CHECKING:
    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.kvm_main import Vm

_MEMORY_REGION = struct.Struct("<IIQQQ")        # slot, flags, guest_phys_addr, memory_size, userspace_addr
_COALESCED_ZONE = struct.Struct("<QII")         # addr, size, pio
_IRQFD = struct.Struct("<iIIi")                 # fd, gsi, flags, resamplefd
_IOEVENTFD = struct.Struct("<QQIiI")            # datamatch, addr, len, fd, flags
_DIRTY_LOG = struct.Struct("<IIQ")              # slot, -, dirty_bitmap
_CLEAR_DIRTY_LOG = struct.Struct("<IIQQ")       # slot, num_pages, first_page, dirty_bitmap
TSS_ADDR_MAX = (1 << 32) - 3 * 4096


def check_extension(vm: Vm, req: RequestLike) -> int:
    """KVM_CHECK_EXTENSION on a VM (KVM_CAP_CHECK_EXTENSION_VM): what this VM can do; unknown: 0."""
    return caps.check_extension_vm(vm.profile, req.arg, shares_run=vm.host.passthrough)


def create_vcpu(vm: Vm, req: RequestLike) -> None:
    """KVM_CREATE_VCPU (api.rst 4.7): the vCPU's descriptor.  EINVAL: id or number too large; EEXIST."""
    vm.host.may_block()
    with vm.create_lock:
        vcpu = vm.create_vcpu(req.arg)
        vcpu.creator = req.tid
        vm.online_vcpu(vcpu)
        try:
            vm.host.graft(req, f"kvm-vcpu:{req.arg}", vcpu.inode, vcpu.run_fd)
        except OSError:         # the client has been told
            vm.vcpus.remove(vcpu)
            vm.drop_vcpu(vcpu)


def set_user_memory_region(vm: Vm, req: RequestLike) -> None:
    """KVM_SET_USER_MEMORY_REGION (api.rst 4.35).  EINVAL, EEXIST (MemSlots.prepare), ENOMEM."""
    _set_memory_region(vm, req)


def set_user_memory_region2(vm: Vm, req: RequestLike) -> None:
    """KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140): the same; KVM_MEM_GUEST_MEMFD is EINVAL, there is no private memory."""
    _set_memory_region(vm, req)


def _set_memory_region(vm: Vm, req: RequestLike) -> None:
    host, result = vm.host, 0
    host.may_block()
    with vm.slots_lock:
        try:
            _set_region(vm, req, *_MEMORY_REGION.unpack_from(req.data))
        except OSError as e:
            result = -(e.errno or errno.EIO)
        except BaseException:
            host.finish(req, -errno.EIO)
            raise
        host.finish(req, result)


def _set_region(vm: Vm, req: RequestLike, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
    slots = vm.memslots
    change = slots.prepare(slot, flags, gpa, size, hva)
    if change is None:
        return
    memory = None
    if change.needs_memory and change.new is not None:
        # Not while holding the engine: the client's threads are stopped for this, also those in KVM_RUN.
        memory = slots.host_range(change.new, vm.host.guest_memory(req, hva, size))
        vm.mirrored = vm.host.mirrors_memory
    try:
        slots.apply(change, memory)
    except BaseException:
        if memory is not None:
            memory.close()
        raise


def get_dirty_log(vm: Vm, req: RequestLike) -> int:
    """KVM_GET_DIRTY_LOG (api.rst 4.8).  EINVAL, ENOENT, EFAULT."""
    slot, _, address = _DIRTY_LOG.unpack(req.data)
    vm.host.may_block()
    with vm.slots_lock:
        dirty_log.get_dirty_log(vm.memslots, vm.host.memory, slot, address)
    return 0


def clear_dirty_log(vm: Vm, req: RequestLike) -> int:
    """KVM_CLEAR_DIRTY_LOG (api.rst 4.117).  EINVAL, ENOENT, EFAULT."""
    slot, count, first, address = _CLEAR_DIRTY_LOG.unpack(req.data)
    vm.host.may_block()
    with vm.slots_lock:
        dirty_log.clear_dirty_log(vm.memslots, vm.host.memory, slot, first, count, address)
    return 0


def reset_dirty_rings(vm: Vm, req: RequestLike) -> int:
    """KVM_RESET_DIRTY_RINGS (api.rst 8.29): the number of entries that may be used again.  EINVAL: no rings."""
    vm.host.may_block()
    with vm.slots_lock:
        return dirty_ring.reset(vm)


def register_coalesced_mmio(vm: Vm, req: RequestLike) -> int:
    """KVM_REGISTER_COALESCED_MMIO (api.rst 4.116).  EINVAL, ENOSPC."""
    coalesced_mmio.register(vm, *_COALESCED_ZONE.unpack(req.data))
    return 0


def unregister_coalesced_mmio(vm: Vm, req: RequestLike) -> int:
    """KVM_UNREGISTER_COALESCED_MMIO (api.rst 4.116).  EINVAL."""
    coalesced_mmio.unregister(vm, *_COALESCED_ZONE.unpack(req.data))
    return 0


def ioeventfd(vm: Vm, req: RequestLike) -> int:
    """KVM_IOEVENTFD (api.rst 4.59): a guest's write signals an eventfd."""
    vm.host.may_block()
    eventfd.ioeventfd(vm, req, *_IOEVENTFD.unpack_from(req.data))
    return 0


def irqfd(vm: Vm, req: RequestLike) -> int:
    """KVM_IRQFD (api.rst 4.75): an eventfd interrupts the guest."""
    vm.host.may_block()
    eventfd.irqfd(vm, req, *_IRQFD.unpack_from(req.data))
    return 0


def set_tss_addr(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_TSS_ADDR (api.rst 4.22): accepted; the engine enters real mode without such a TSS."""
    if req.arg > TSS_ADDR_MAX:
        raise KvmError(errno.EINVAL)
    return 0


def set_identity_map_addr(vm: Vm, req: RequestLike) -> int:
    """KVM_SET_IDENTITY_MAP_ADDR (api.rst 4.40): accepted before the first vCPU, EINVAL after."""
    with vm.lock:
        if vm.created_vcpus:
            raise KvmError(errno.EINVAL)
    return 0


def memory_encrypt_reg_region(vm: Vm, req: RequestLike) -> int:
    """KVM_MEMORY_ENCRYPT_REG_REGION (api.rst 4.111).  EFAULT: the pointer; else ENOTTY: no encrypted guests.

    The number says that data only comes back, so the pointer is looked at here.
    """
    vm.host.memory.read(req.arg, sizeof(KvmEncRegion))
    raise KvmError(errno.ENOTTY)


memory_encrypt_unreg_region = memory_encrypt_reg_region
