# SPDX-License-Identifier: GPL-2.0-or-later
"""struct kvm_run and the exits inside it (linux/kvm.h).

What a client sees when it maps a vCPU descriptor, in pages: kvm_run (0), the data of port I/O
(KVM_PIO_PAGE_OFFSET), the coalesced MMIO ring (KVM_COALESCED_MMIO_PAGE_OFFSET): KVM_VCPU_MMAP_SIZE bytes.
A dirty ring is mapped separately, at KVM_DIRTY_LOG_PAGE_OFFSET.

The client may write any of it at any time: read a field once, into a local, and check that copy.
Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint64
from typing import TYPE_CHECKING, Annotated, Final

from .cstruct import U8, U16, U32, U64, Structure, Union, layout, offset_of
from .structs_vcpu import KvmDebugExitArch, KvmRegs, KvmSregs, KvmVcpuEvents
from .structs_xen import KvmXenExit


@layout
class KvmRunHw(Structure):
    """kvm_run.hw: KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: U64


@layout
class KvmRunFailEntry(Structure):
    """kvm_run.fail_entry: KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: U64
    cpu: U32


@layout
class KvmRunEx(Structure):
    """kvm_run.ex: KVM_EXIT_EXCEPTION."""

    exception: U32
    error_code: U32


@layout
class KvmRunIo(Structure):
    """kvm_run.io: KVM_EXIT_IO; `count` items of `size` bytes at `data_offset` from the start of kvm_run."""

    direction: U8
    size: U8
    port: U16
    count: U32
    data_offset: U64


@layout
class KvmRunDebug(Structure):
    """kvm_run.debug: KVM_EXIT_DEBUG."""

    arch: KvmDebugExitArch


@layout
class KvmRunMmio(Structure):
    """kvm_run.mmio: KVM_EXIT_MMIO; `len` bytes, at most 8."""

    phys_addr: U64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: U32
    is_write: U8


@layout
class _LongmodeOrFlags(Union):
    longmode: U32
    flags: U64


@layout
class KvmRunHypercall(Structure):
    """kvm_run.hypercall: KVM_EXIT_HYPERCALL; the client answers in `ret`."""

    _anonymous_ = ("u",)
    if TYPE_CHECKING:
        longmode: int
        flags: int
    nr: U64
    args: Annotated[Array[c_uint64], c_uint64 * 6]
    ret: U64
    u: _LongmodeOrFlags


@layout
class KvmRunTprAccess(Structure):
    """kvm_run.tpr_access: KVM_EXIT_TPR_ACCESS."""

    rip: U64
    is_write: U32
    pad: U32


@layout
class KvmRunInternal(Structure):
    """kvm_run.internal: KVM_EXIT_INTERNAL_ERROR; `ndata` of the words in `data` are valid."""

    suberror: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class KvmRunEmulationFailure(Structure):
    """kvm_run.emulation_failure: KvmRunInternal as KVM_INTERNAL_ERROR_EMULATION fills it."""

    suberror: U32
    ndata: U32
    flags: U64
    insn_size: U8
    insn_bytes: Annotated[Array[c_uint8], c_uint8 * 15]


@layout
class KvmRunSystemEvent(Structure):
    """kvm_run.system_event: KVM_EXIT_SYSTEM_EVENT; data[0] was once called `flags`."""

    type: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class KvmRunEoi(Structure):
    """kvm_run.eoi: KVM_EXIT_IOAPIC_EOI."""

    vector: U8


@layout
class KvmHypervExitSynic(Structure):
    """kvm_hyperv_exit.u.synic."""

    msr: U32
    pad2: U32
    control: U64
    evt_page: U64
    msg_page: U64


@layout
class KvmHypervExitHcall(Structure):
    """kvm_hyperv_exit.u.hcall; the client answers in `result`."""

    input: U64
    result: U64
    params: Annotated[Array[c_uint64], c_uint64 * 2]


@layout
class KvmHypervExitSyndbg(Structure):
    """kvm_hyperv_exit.u.syndbg."""

    msr: U32
    pad2: U32
    control: U64
    status: U64
    send_page: U64
    recv_page: U64
    pending_page: U64


@layout
class KvmHypervExitU(Union):
    """kvm_hyperv_exit.u."""

    synic: KvmHypervExitSynic
    hcall: KvmHypervExitHcall
    syndbg: KvmHypervExitSyndbg


@layout
class KvmHypervExit(Structure):
    """struct kvm_hyperv_exit: KVM_EXIT_HYPERV; `type` (KVM_EXIT_HYPERV_*) selects the member of `u`."""

    type: U32
    pad1: U32
    u: KvmHypervExitU


@layout
class KvmRunMsr(Structure):
    """kvm_run.msr: KVM_EXIT_X86_RDMSR and _WRMSR; the client answers in `error` and, for a read, `data`."""

    error: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 7]
    reason: U32
    index: U32
    data: U64


@layout
class KvmRunNotify(Structure):
    """kvm_run.notify: KVM_EXIT_NOTIFY."""

    flags: U32


@layout
class KvmRunMemoryFault(Structure):
    """kvm_run.memory_fault: KVM_EXIT_MEMORY_FAULT."""

    flags: U64
    gpa: U64
    size: U64


@layout
class KvmRunExit(Union):
    """The union in kvm_run: `exit_reason` says which member is meant."""

    hw: KvmRunHw
    fail_entry: KvmRunFailEntry
    ex: KvmRunEx
    io: KvmRunIo
    debug: KvmRunDebug
    mmio: KvmRunMmio
    hypercall: KvmRunHypercall
    tpr_access: KvmRunTprAccess
    internal: KvmRunInternal
    emulation_failure: KvmRunEmulationFailure
    system_event: KvmRunSystemEvent
    eoi: KvmRunEoi
    hyperv: KvmHypervExit
    msr: KvmRunMsr
    xen: KvmXenExit
    notify: KvmRunNotify
    memory_fault: KvmRunMemoryFault
    padding: Annotated[Array[c_uint8], c_uint8 * 256]


@layout
class KvmSyncRegs(Structure):
    """struct kvm_sync_regs: what KVM_CAP_SYNC_REGS shares, by KVM_SYNC_X86_* bit."""

    regs: KvmRegs
    sregs: KvmSregs
    events: KvmVcpuEvents


@layout
class KvmRunS(Union):
    """kvm_run.s."""

    regs: KvmSyncRegs
    padding: Annotated[Array[c_uint8], c_uint8 * 2048]


@layout
class KvmRun(Structure):
    """struct kvm_run. The members of its unnamed union (`run.io`, `run.mmio`, …) are those of KvmRunExit."""

    _anonymous_ = ("u",)
    if TYPE_CHECKING:
        hw: KvmRunHw
        fail_entry: KvmRunFailEntry
        ex: KvmRunEx
        io: KvmRunIo
        debug: KvmRunDebug
        mmio: KvmRunMmio
        hypercall: KvmRunHypercall
        tpr_access: KvmRunTprAccess
        internal: KvmRunInternal
        emulation_failure: KvmRunEmulationFailure
        system_event: KvmRunSystemEvent
        eoi: KvmRunEoi
        hyperv: KvmHypervExit
        msr: KvmRunMsr
        xen: KvmXenExit
        notify: KvmRunNotify
        memory_fault: KvmRunMemoryFault
    request_interrupt_window: U8
    immediate_exit: U8
    padding1: Annotated[Array[c_uint8], c_uint8 * 6]
    exit_reason: U32
    ready_for_interrupt_injection: U8
    if_flag: U8
    flags: U16
    cr8: U64
    apic_base: U64
    u: KvmRunExit
    kvm_valid_regs: U64
    kvm_dirty_regs: U64
    s: KvmRunS


# Where the fields lie, in bytes, for those who pack and unpack instead of making ctypes views.
RUN_REQUEST_INTERRUPT_WINDOW: Final = offset_of(KvmRun, "request_interrupt_window")
RUN_IMMEDIATE_EXIT: Final = offset_of(KvmRun, "immediate_exit")
RUN_EXIT_REASON: Final = offset_of(KvmRun, "exit_reason")
RUN_READY_FOR_INTERRUPT_INJECTION: Final = offset_of(KvmRun, "ready_for_interrupt_injection")
RUN_IF_FLAG: Final = offset_of(KvmRun, "if_flag")
RUN_FLAGS: Final = offset_of(KvmRun, "flags")
RUN_CR8: Final = offset_of(KvmRun, "cr8")
RUN_APIC_BASE: Final = offset_of(KvmRun, "apic_base")
RUN_EXIT: Final = offset_of(KvmRun, "u")
RUN_KVM_VALID_REGS: Final = offset_of(KvmRun, "kvm_valid_regs")
RUN_KVM_DIRTY_REGS: Final = offset_of(KvmRun, "kvm_dirty_regs")
RUN_S: Final = offset_of(KvmRun, "s")
