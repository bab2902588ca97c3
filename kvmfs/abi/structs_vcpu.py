# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs of the vCPU ioctls (asm/kvm.h, linux/kvm.h), named after their C structs.

Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated

from .cstruct import U8, U16, U32, U64, Structure, Union, layout


@layout
class KvmRegs(Structure):
    """struct kvm_regs."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@layout
class KvmSegment(Structure):
    """struct kvm_segment: selector and hidden part; `limit` in bytes, whatever `g` says."""

    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8  # noqa: E741 - the name of the bit
    g: U8
    avl: U8
    unusable: U8
    padding: U8


@layout
class KvmDtable(Structure):
    """struct kvm_dtable."""

    base: U64
    limit: U16
    padding: Annotated[Array[c_uint16], c_uint16 * 3]


@layout
class KvmSregs(Structure):
    """struct kvm_sregs."""

    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class KvmSregs2(Structure):
    """struct kvm_sregs2: KvmSregs with the PDPTRs in the place of the interrupt bitmap."""

    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    flags: U64
    pdptrs: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class KvmFpu(Structure):
    """struct kvm_fpu."""

    fpr: Annotated[Array[c_uint8], c_uint8 * 16 * 8]
    fcw: U16
    fsw: U16
    ftwx: U8
    pad1: U8
    last_opcode: U16
    last_ip: U64
    last_dp: U64
    xmm: Annotated[Array[c_uint8], c_uint8 * 16 * 16]
    mxcsr: U32
    pad2: U32


@layout
class KvmDebugregs(Structure):
    """struct kvm_debugregs."""

    db: Annotated[Array[c_uint64], c_uint64 * 4]
    dr6: U64
    dr7: U64
    flags: U64
    reserved: Annotated[Array[c_uint64], c_uint64 * 9]


@layout
class KvmXsave(Structure):
    """struct kvm_xsave, the legacy 4 KiB image; KVM_CAP_XSAVE2 says how much really follows (never less)."""

    region: Annotated[Array[c_uint32], c_uint32 * 1024]


@layout
class KvmXcr(Structure):
    """struct kvm_xcr."""

    xcr: U32
    reserved: U32
    value: U64


@layout
class KvmXcrs(Structure):
    """struct kvm_xcrs."""

    nr_xcrs: U32
    flags: U32
    xcrs: Annotated[Array[KvmXcr], KvmXcr * 16]
    padding: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class KvmLapicState(Structure):
    """struct kvm_lapic_state: the first KiB of the APIC's register page."""

    regs: Annotated[Array[c_uint8], c_uint8 * 0x400]


@layout
class KvmMpState(Structure):
    """struct kvm_mp_state."""

    mp_state: U32


@layout
class KvmVcpuEventsException(Structure):
    """kvm_vcpu_events.exception."""

    injected: U8
    nr: U8
    has_error_code: U8
    pending: U8
    error_code: U32


@layout
class KvmVcpuEventsInterrupt(Structure):
    """kvm_vcpu_events.interrupt."""

    injected: U8
    nr: U8
    soft: U8
    shadow: U8


@layout
class KvmVcpuEventsNmi(Structure):
    """kvm_vcpu_events.nmi."""

    injected: U8
    pending: U8
    masked: U8
    pad: U8


@layout
class KvmVcpuEventsSmi(Structure):
    """kvm_vcpu_events.smi."""

    smm: U8
    pending: U8
    smm_inside_nmi: U8
    latched_init: U8


@layout
class KvmVcpuEventsTripleFault(Structure):
    """kvm_vcpu_events.triple_fault."""

    pending: U8


@layout
class KvmVcpuEvents(Structure):
    """struct kvm_vcpu_events; which parts are meant is in `flags`, KVM_VCPUEVENT_VALID_*."""

    exception: KvmVcpuEventsException
    interrupt: KvmVcpuEventsInterrupt
    nmi: KvmVcpuEventsNmi
    sipi_vector: U32
    flags: U32
    smi: KvmVcpuEventsSmi
    triple_fault: KvmVcpuEventsTripleFault
    reserved: Annotated[Array[c_uint8], c_uint8 * 26]
    exception_has_payload: U8
    exception_payload: U64


@layout
class KvmInterrupt(Structure):
    """struct kvm_interrupt."""

    irq: U32


@layout
class KvmTranslation(Structure):
    """struct kvm_translation."""

    linear_address: U64
    physical_address: U64
    valid: U8
    writeable: U8
    usermode: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 5]


@layout
class KvmGuestDebugArch(Structure):
    """struct kvm_guest_debug_arch."""

    debugreg: Annotated[Array[c_uint64], c_uint64 * 8]


@layout
class KvmGuestDebug(Structure):
    """struct kvm_guest_debug."""

    control: U32
    pad: U32
    arch: KvmGuestDebugArch


@layout
class KvmDebugExitArch(Structure):
    """struct kvm_debug_exit_arch."""

    exception: U32
    pad: U32
    pc: U64
    dr6: U64
    dr7: U64


@layout
class KvmMsrEntry(Structure):
    """struct kvm_msr_entry."""

    index: U32
    reserved: U32
    data: U64


@layout
class KvmMsrs(Structure):
    """struct kvm_msrs, followed by `nmsrs` of KvmMsrEntry."""

    nmsrs: U32
    pad: U32


@layout
class KvmMsrList(Structure):
    """struct kvm_msr_list, followed by `nmsrs` __u32 indices."""

    nmsrs: U32


@layout
class KvmCpuidEntry(Structure):
    """struct kvm_cpuid_entry."""

    function: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: U32


@layout
class KvmCpuid(Structure):
    """struct kvm_cpuid, followed by `nent` of KvmCpuidEntry."""

    nent: U32
    padding: U32


@layout
class KvmCpuidEntry2(Structure):
    """struct kvm_cpuid_entry2."""

    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@layout
class KvmCpuid2(Structure):
    """struct kvm_cpuid2, followed by `nent` of KvmCpuidEntry2."""

    nent: U32
    padding: U32


@layout
class KvmSignalMask(Structure):
    """struct kvm_signal_mask, followed by `len` bytes of the kernel's sigset (8)."""

    len: U32


@layout
class KvmTprAccessCtl(Structure):
    """struct kvm_tpr_access_ctl."""

    enabled: U32
    flags: U32
    reserved: Annotated[Array[c_uint32], c_uint32 * 8]


@layout
class KvmVapicAddr(Structure):
    """struct kvm_vapic_addr."""

    vapic_addr: U64


@layout
class KvmX86Mce(Structure):
    """struct kvm_x86_mce."""

    status: U64
    addr: U64
    misc: U64
    mcg_status: U64
    bank: U8
    pad1: Annotated[Array[c_uint8], c_uint8 * 7]
    pad2: Annotated[Array[c_uint64], c_uint64 * 3]


@layout
class KvmOneReg(Structure):
    """struct kvm_one_reg; `addr` is where the client has the value."""

    id: U64
    addr: U64


@layout
class KvmRegList(Structure):
    """struct kvm_reg_list, followed by `n` __u64 register ids."""

    n: U64


@layout
class KvmEnableCap(Structure):
    """struct kvm_enable_cap."""

    cap: U32
    flags: U32
    args: Annotated[Array[c_uint64], c_uint64 * 4]
    pad: Annotated[Array[c_uint8], c_uint8 * 64]


@layout
class KvmPreFaultMemory(Structure):
    """struct kvm_pre_fault_memory."""

    gpa: U64
    size: U64
    flags: U64
    padding: Annotated[Array[c_uint64], c_uint64 * 5]


@layout
class KvmVmxNestedStateHdrSmm(Structure):
    """kvm_vmx_nested_state_hdr.smm."""

    flags: U16


@layout
class KvmVmxNestedStateHdr(Structure):
    """struct kvm_vmx_nested_state_hdr."""

    vmxon_pa: U64
    vmcs12_pa: U64
    smm: KvmVmxNestedStateHdrSmm
    pad: U16
    flags: U32
    preemption_timer_deadline: U64


@layout
class KvmVmxNestedStateData(Structure):
    """struct kvm_vmx_nested_state_data."""

    vmcs12: Annotated[Array[c_uint8], c_uint8 * 0x1000]
    shadow_vmcs12: Annotated[Array[c_uint8], c_uint8 * 0x1000]


@layout
class KvmSvmNestedStateHdr(Structure):
    """struct kvm_svm_nested_state_hdr."""

    vmcb_pa: U64


@layout
class KvmSvmNestedStateData(Structure):
    """struct kvm_svm_nested_state_data."""

    vmcb12: Annotated[Array[c_uint8], c_uint8 * 0x1000]


@layout
class KvmNestedStateHdr(Union):
    """kvm_nested_state.hdr."""

    vmx: KvmVmxNestedStateHdr
    svm: KvmSvmNestedStateHdr
    pad: Annotated[Array[c_uint8], c_uint8 * 120]


@layout
class KvmNestedState(Structure):
    """struct kvm_nested_state, followed by KvmVmxNestedStateData or KvmSvmNestedStateData (see `format`).

    `size` counts header and data, in bytes.
    """

    flags: U16
    format: U16
    size: U32
    hdr: KvmNestedStateHdr
