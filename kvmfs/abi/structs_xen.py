# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs of the Xen ioctls and exit (linux/kvm.h, asm/kvm.h).

Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated

from .cstruct import S32, U8, U16, U32, U64, Structure, Union, layout


@layout
class KvmXenHvmConfig(Structure):
    """struct kvm_xen_hvm_config."""

    flags: U32
    msr: U32
    blob_addr_32: U64
    blob_addr_64: U64
    blob_size_32: U8
    blob_size_64: U8
    pad2: Annotated[Array[c_uint8], c_uint8 * 30]


@layout
class KvmXenHvmAttrSharedInfo(Union):
    """kvm_xen_hvm_attr.u.shared_info."""

    gfn: U64
    hva: U64


@layout
class KvmXenHvmAttrEvtchnPort(Structure):
    """kvm_xen_hvm_attr.u.evtchn.deliver.port."""

    port: U32
    vcpu: U32
    priority: U32


@layout
class KvmXenHvmAttrEvtchnEventfd(Structure):
    """kvm_xen_hvm_attr.u.evtchn.deliver.eventfd."""

    port: U32
    fd: S32


@layout
class KvmXenHvmAttrEvtchnDeliver(Union):
    """kvm_xen_hvm_attr.u.evtchn.deliver."""

    port: KvmXenHvmAttrEvtchnPort
    eventfd: KvmXenHvmAttrEvtchnEventfd
    padding: Annotated[Array[c_uint32], c_uint32 * 4]


@layout
class KvmXenHvmAttrEvtchn(Structure):
    """kvm_xen_hvm_attr.u.evtchn."""

    send_port: U32
    type: U32
    flags: U32
    deliver: KvmXenHvmAttrEvtchnDeliver


@layout
class KvmXenHvmAttrU(Union):
    """kvm_xen_hvm_attr.u."""

    long_mode: U8
    vector: U8
    runstate_update_flag: U8
    shared_info: KvmXenHvmAttrSharedInfo
    evtchn: KvmXenHvmAttrEvtchn
    xen_version: U32
    pad: Annotated[Array[c_uint64], c_uint64 * 8]


@layout
class KvmXenHvmAttr(Structure):
    """struct kvm_xen_hvm_attr; `type` (KVM_XEN_ATTR_TYPE_*) says which member of `u` is meant."""

    type: U16
    pad: Annotated[Array[c_uint16], c_uint16 * 3]
    u: KvmXenHvmAttrU


@layout
class KvmXenVcpuAttrRunstate(Structure):
    """kvm_xen_vcpu_attr.u.runstate; times in nanoseconds."""

    state: U64
    state_entry_time: U64
    time_running: U64
    time_runnable: U64
    time_blocked: U64
    time_offline: U64


@layout
class KvmXenVcpuAttrTimer(Structure):
    """kvm_xen_vcpu_attr.u.timer."""

    port: U32
    priority: U32
    expires_ns: U64


@layout
class KvmXenVcpuAttrU(Union):
    """kvm_xen_vcpu_attr.u."""

    gpa: U64
    hva: U64
    pad: Annotated[Array[c_uint64], c_uint64 * 8]
    runstate: KvmXenVcpuAttrRunstate
    vcpu_id: U32
    timer: KvmXenVcpuAttrTimer
    vector: U8


@layout
class KvmXenVcpuAttr(Structure):
    """struct kvm_xen_vcpu_attr; `type` (KVM_XEN_VCPU_ATTR_TYPE_*) says which member of `u` is meant."""

    type: U16
    pad: Annotated[Array[c_uint16], c_uint16 * 3]
    u: KvmXenVcpuAttrU


@layout
class KvmXenExitHcall(Structure):
    """kvm_xen_exit.u.hcall; the client answers in `result`."""

    longmode: U32
    cpl: U32
    input: U64
    result: U64
    params: Annotated[Array[c_uint64], c_uint64 * 6]


@layout
class KvmXenExitU(Union):
    """kvm_xen_exit.u."""

    hcall: KvmXenExitHcall


@layout
class KvmXenExit(Structure):
    """struct kvm_xen_exit: KVM_EXIT_XEN, `type` is KVM_EXIT_XEN_HCALL."""

    type: U32
    u: KvmXenExitU
