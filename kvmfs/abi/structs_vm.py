# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs of the system, VM and device ioctls (linux/kvm.h, asm/kvm.h), named after their C structs.

Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint32, c_uint64
from typing import TYPE_CHECKING, Annotated

from .cstruct import S16, S32, S64, U8, U16, U32, U64, Structure, Union, layout


@layout
class KvmUserspaceMemoryRegion(Structure):
    """struct kvm_userspace_memory_region; sizes and addresses in bytes, `memory_size` 0 deletes the slot."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


@layout
class KvmUserspaceMemoryRegion2(Structure):
    """struct kvm_userspace_memory_region2."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64
    guest_memfd_offset: U64
    guest_memfd: U32
    pad1: U32
    pad2: Annotated[Array[c_uint64], c_uint64 * 14]


@layout
class KvmMemoryAttributes(Structure):
    """struct kvm_memory_attributes."""

    address: U64
    size: U64
    attributes: U64
    flags: U64


@layout
class KvmCreateGuestMemfd(Structure):
    """struct kvm_create_guest_memfd."""

    size: U64
    flags: U64
    reserved: Annotated[Array[c_uint64], c_uint64 * 6]


@layout
class KvmEncRegion(Structure):
    """struct kvm_enc_region: a range of the client's memory."""

    addr: U64
    size: U64


@layout
class KvmDirtyLog(Structure):
    """struct kvm_dirty_log; `dirty_bitmap` is the client's, one bit per page, in whole __u64."""

    slot: U32
    padding1: U32
    dirty_bitmap: U64


@layout
class KvmClearDirtyLog(Structure):
    """struct kvm_clear_dirty_log; `dirty_bitmap` is the client's, one bit per page from `first_page`."""

    slot: U32
    num_pages: U32
    first_page: U64
    dirty_bitmap: U64


@layout
class KvmDirtyGfn(Structure):
    """struct kvm_dirty_gfn."""

    flags: U32
    slot: U32
    offset: U64


@layout
class KvmCoalescedMmioZone(Structure):
    """struct kvm_coalesced_mmio_zone."""

    addr: U64
    size: U32
    pio: U32


@layout
class KvmCoalescedMmio(Structure):
    """struct kvm_coalesced_mmio."""

    phys_addr: U64
    len: U32
    pio: U32
    data: Annotated[Array[c_uint8], c_uint8 * 8]


@layout
class KvmCoalescedMmioRing(Structure):
    """struct kvm_coalesced_mmio_ring, followed by KVM_COALESCED_MMIO_MAX of KvmCoalescedMmio."""

    first: U32
    last: U32


@layout
class _IrqOrStatus(Union):
    irq: U32
    status: S32


@layout
class KvmIrqLevel(Structure):
    """struct kvm_irq_level: `irq` in, `status` out (KVM_IRQ_LINE_STATUS)."""

    _anonymous_ = ("u",)
    if TYPE_CHECKING:
        irq: int
        status: int
    u: _IrqOrStatus
    level: U32


@layout
class KvmPicState(Structure):
    """struct kvm_pic_state."""

    last_irr: U8
    irr: U8
    imr: U8
    isr: U8
    priority_add: U8
    irq_base: U8
    read_reg_select: U8
    poll: U8
    special_mask: U8
    init_state: U8
    auto_eoi: U8
    rotate_on_auto_eoi: U8
    special_fully_nested_mode: U8
    init4: U8
    elcr: U8
    elcr_mask: U8


@layout
class KvmIoapicState(Structure):
    """struct kvm_ioapic_state; `redirtbl` has the redirection entries as the guest writes them."""

    base_address: U64
    ioregsel: U32
    id: U32
    irr: U32
    pad: U32
    redirtbl: Annotated[Array[c_uint64], c_uint64 * 24]


@layout
class KvmIrqchipChip(Union):
    """kvm_irqchip.chip."""

    dummy: Annotated[Array[c_uint8], c_uint8 * 512]
    pic: KvmPicState
    ioapic: KvmIoapicState


@layout
class KvmIrqchip(Structure):
    """struct kvm_irqchip; `chip_id` (KVM_IRQCHIP_*) says which member of `chip` is meant."""

    chip_id: U32
    pad: U32
    chip: KvmIrqchipChip


@layout
class KvmIrqRoutingIrqchip(Structure):
    """struct kvm_irq_routing_irqchip."""

    irqchip: U32
    pin: U32


@layout
class KvmIrqRoutingMsi(Structure):
    """struct kvm_irq_routing_msi."""

    address_lo: U32
    address_hi: U32
    data: U32
    devid: U32


@layout
class KvmIrqRoutingS390Adapter(Structure):
    """struct kvm_irq_routing_s390_adapter."""

    ind_addr: U64
    summary_addr: U64
    ind_offset: U64
    summary_offset: U32
    adapter_id: U32


@layout
class KvmIrqRoutingHvSint(Structure):
    """struct kvm_irq_routing_hv_sint."""

    vcpu: U32
    sint: U32


@layout
class KvmIrqRoutingXenEvtchn(Structure):
    """struct kvm_irq_routing_xen_evtchn."""

    port: U32
    vcpu: U32
    priority: U32


@layout
class KvmIrqRoutingEntryU(Union):
    """kvm_irq_routing_entry.u."""

    irqchip: KvmIrqRoutingIrqchip
    msi: KvmIrqRoutingMsi
    adapter: KvmIrqRoutingS390Adapter
    hv_sint: KvmIrqRoutingHvSint
    xen_evtchn: KvmIrqRoutingXenEvtchn
    pad: Annotated[Array[c_uint32], c_uint32 * 8]


@layout
class KvmIrqRoutingEntry(Structure):
    """struct kvm_irq_routing_entry; `type` (KVM_IRQ_ROUTING_*) says which member of `u` is meant."""

    gsi: U32
    type: U32
    flags: U32
    pad: U32
    u: KvmIrqRoutingEntryU


@layout
class KvmIrqRouting(Structure):
    """struct kvm_irq_routing, followed by `nr` of KvmIrqRoutingEntry."""

    nr: U32
    flags: U32


@layout
class KvmIrqfd(Structure):
    """struct kvm_irqfd."""

    fd: U32
    gsi: U32
    flags: U32
    resamplefd: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 16]


@layout
class KvmMsi(Structure):
    """struct kvm_msi."""

    address_lo: U32
    address_hi: U32
    data: U32
    flags: U32
    devid: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 12]


@layout
class KvmIoeventfd(Structure):
    """struct kvm_ioeventfd."""

    datamatch: U64
    addr: U64
    len: U32
    fd: S32
    flags: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 36]


@layout
class KvmHypervEventfd(Structure):
    """struct kvm_hyperv_eventfd."""

    conn_id: U32
    fd: S32
    flags: U32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@layout
class KvmPitConfig(Structure):
    """struct kvm_pit_config."""

    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 15]


@layout
class KvmPitChannelState(Structure):
    """struct kvm_pit_channel_state."""

    count: U32
    latched_count: U16
    count_latched: U8
    status_latched: U8
    status: U8
    read_state: U8
    write_state: U8
    write_latch: U8
    rw_mode: U8
    mode: U8
    bcd: U8
    gate: U8
    count_load_time: S64


@layout
class KvmPitState(Structure):
    """struct kvm_pit_state."""

    channels: Annotated[Array[KvmPitChannelState], KvmPitChannelState * 3]


@layout
class KvmPitState2(Structure):
    """struct kvm_pit_state2."""

    channels: Annotated[Array[KvmPitChannelState], KvmPitChannelState * 3]
    flags: U32
    reserved: Annotated[Array[c_uint32], c_uint32 * 9]


@layout
class KvmReinjectControl(Structure):
    """struct kvm_reinject_control."""

    pit_reinject: U8
    reserved: Annotated[Array[c_uint8], c_uint8 * 31]


@layout
class KvmClockData(Structure):
    """struct kvm_clock_data."""

    clock: U64
    flags: U32
    pad0: U32
    realtime: U64
    host_tsc: U64
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


@layout
class KvmMsrFilterRange(Structure):
    """struct kvm_msr_filter_range; `bitmap` is the client's, one bit per MSR, 1 allows."""

    flags: U32
    nmsrs: U32
    base: U32
    bitmap: U64


@layout
class KvmMsrFilter(Structure):
    """struct kvm_msr_filter."""

    flags: U32
    ranges: Annotated[Array[KvmMsrFilterRange], KvmMsrFilterRange * 16]


@layout
class KvmPmuEventFilter(Structure):
    """struct kvm_pmu_event_filter, followed by `nevents` __u64 events."""

    action: U32
    nevents: U32
    fixed_counter_bitmap: U32
    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


@layout
class KvmCreateDevice(Structure):
    """struct kvm_create_device."""

    type: U32
    fd: U32
    flags: U32


@layout
class KvmDeviceAttr(Structure):
    """struct kvm_device_attr; `addr` is where the client has the value."""

    flags: U32
    group: U32
    attr: U64
    addr: U64


@layout
class KvmVfioSpaprTce(Structure):
    """struct kvm_vfio_spapr_tce."""

    groupfd: S32
    tablefd: S32


@layout
class KvmStatsHeader(Structure):
    """struct kvm_stats_header."""

    flags: U32
    name_size: U32
    num_desc: U32
    id_offset: U32
    desc_offset: U32
    data_offset: U32


@layout
class KvmStatsDesc(Structure):
    """struct kvm_stats_desc, followed by the name: KvmStatsHeader.name_size bytes with its NUL."""

    flags: U32
    exponent: S16
    size: U16
    offset: U32
    bucket_size: U32
