# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V's hypercalls: those that KVM does itself, those that the client is asked, and what the rest gets.

Linux: kvm_hv_hypercall in hyperv.c; TLFS, "Hypercall interface".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmfs.abi import exits as kx
from kvmfs.abi import hyperv as H
from kvmfs.abi.flags import KVM_HYPERV_CONN_ID_MASK
from kvmfs.abi.msrs import HV_X64_MSR_SYNDBG_OPTIONS
from kvmfs.abi.x86 import CR0_PE, KVM_MAX_VCPUS
from kvmfs.errors import KvmError
from kvmfs.kvm import events, hyperv, regs
from kvmfs.kvm.apic_map import ApicMessage
from kvmfs.kvm.emulate import skip_emulated_instruction

if TYPE_CHECKING:
    from kvmfs.kvm.hyperv import HvVcpu
    from kvmfs.kvm.kvm_main import Vcpu

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
RAX, RCX, RDX, RBX, RSI, RDI, R8 = 0, 1, 2, 3, 6, 7, 8
HYPERCALL_LENGTH = 3
SPARSE_BANKS = KVM_MAX_VCPUS // H.HV_VCPUS_PER_SPARSE_BANK      # those that can name a vCPU
TLB_FLUSH_ENTRIES = 15                  # with more of them the whole TLB goes, and they are not read
PAGE_SIZE = 4096
_UNION, _RESULT, _FXSAVE_XMM = 32, 48, 160
_set_reason = struct.Struct("<I").pack_into
_u64 = struct.Struct("<Q").unpack_from
_set_exit = struct.Struct("<IIQ").pack_into                     # type, pad, input
_set_params = struct.Struct("<QQ").pack_into
_FLUSH = struct.Struct("<QQQ")          # struct hv_tlb_flush: address_space, flags, processor_mask
_FLUSH_EX = struct.Struct("<QQQQ")      # struct hv_tlb_flush_ex: address_space, flags, format, valid_bank_mask
_IPI = struct.Struct("<I4xQ")           # struct hv_send_ipi: vector, cpu_mask
_IPI_EX = struct.Struct("<I4xQQ")       # struct hv_send_ipi_ex: vector, format, valid_bank_mask

_FLUSH_LISTS = frozenset((H.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, H.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX))
_FLUSH_SPACES = frozenset((H.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, H.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX))
_EX = frozenset((H.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX, H.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, H.HVCALL_SEND_IPI_EX))
_XMM = _FLUSH_LISTS | _FLUSH_SPACES | {H.HVCALL_SEND_IPI_EX}
_IPIS = frozenset((H.HVCALL_SEND_IPI, H.HVCALL_SEND_IPI_EX))
_DEBUG = frozenset((H.HVCALL_POST_DEBUG_DATA, H.HVCALL_RETRIEVE_DEBUG_DATA, H.HVCALL_RESET_DEBUG_SESSION))
EXTENDED = range(H.HV_EXT_CALL_QUERY_CAPABILITIES, H.HV_EXT_CALL_MAX + 1)


class InvalidInput(Exception):
    """HV_STATUS_INVALID_HYPERCALL_INPUT."""


class Hypercall:
    """``struct kvm_hv_hcall``: ``param`` is the control word; ``ingpa``, ``outgpa``: parameters, or (``fast``) values."""

    def __init__(self, vcpu: Vcpu) -> None:
        cpu, self.vcpu = vcpu.cpu, vcpu
        gpr = cpu.gpr
        if regs.is_64_bit_mode(vcpu):
            self.param, self.ingpa, self.outgpa = gpr(RCX), gpr(RDX), gpr(R8)
        else:
            self.param = (gpr(RDX) << 32 | gpr(RAX) & M32) & M64
            self.ingpa = (gpr(RBX) << 32 | gpr(RCX) & M32) & M64
            self.outgpa = (gpr(RDI) << 32 | gpr(RSI) & M32) & M64
        param = self.param
        self.code = param & 0xFFFF
        self.fast = bool(param & H.HV_HYPERCALL_FAST_BIT)
        self.var_cnt = (param & H.HV_HYPERCALL_VARHEAD_MASK) >> H.HV_HYPERCALL_VARHEAD_OFFSET
        self.rep_cnt = param >> H.HV_HYPERCALL_REP_COMP_OFFSET & H.HV_HYPERCALL_REP_MASK
        self.rep_idx = param >> H.HV_HYPERCALL_REP_START_OFFSET & H.HV_HYPERCALL_REP_MASK
        self.xmm: tuple[int, ...] = ()      # in halves
        self._used = 0                      # halves, or bytes from ingpa, that were parameters

    @property
    def rep(self) -> bool:
        return bool(self.rep_cnt or self.rep_idx)

    def read_xmm(self) -> None:
        self.xmm = struct.unpack_from(f"<{2 * H.HV_HYPERCALL_MAX_XMM_REGISTERS}Q", self.vcpu.cpu.fxsave(), _FXSAVE_XMM)

    def header(self, layout: struct.Struct, from_registers: tuple[int, ...], halves: int) -> tuple[int, ...]:
        """The fixed parameters, from memory or (fast) as the registers have them, ``halves`` of XMM among them."""
        if self.fast:
            self._used = halves
            return from_registers
        self._used = layout.size
        return layout.unpack(self._read(0, layout.size))

    def further(self, count: int, limit: int) -> tuple[int, ...]:
        """``kvm_hv_get_hc_data``: the 64-bit values that follow, ``limit`` of them at most; ``count`` is their number."""
        wanted = min(count, limit)
        if self.fast:
            if count > len(self.xmm) - self._used:
                raise InvalidInput
            return self.xmm[self._used:self._used + wanted]
        return struct.unpack(f"<{wanted}Q", self._read(self._used, 8 * wanted))

    def skip(self, count: int) -> None:
        self._used += count * (1 if self.fast else 8)

    def _read(self, offset: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            return self.vcpu.vm.memslots.read(self.ingpa + offset & M64, size)
        except KvmError:
            raise InvalidInput from None

    def sparse_banks(self) -> tuple[int, ...]:
        """``kvm_get_sparse_vp_set``."""
        if self.var_cnt > H.HV_MAX_SPARSE_VCPU_BANKS:
            raise InvalidInput
        return self.further(self.var_cnt, SPARSE_BANKS)


def in_sparse_set(index: int, valid_bank_mask: int, banks: tuple[int, ...]) -> bool:
    """``hv_is_vp_in_sparse_set``: the banks that are valid lie one after the other in ``banks``."""
    bank, bit = divmod(index, H.HV_VCPUS_PER_SPARSE_BANK)
    if bank >= H.HV_MAX_SPARSE_VCPU_BANKS or not valid_bank_mask >> bank & 1:
        return False
    at = (valid_bank_mask & (1 << bank) - 1).bit_count()
    return at < len(banks) and bool(banks[at] >> bit & 1)


# ---- TLB flush, IPIs -------------------------------------------------------------------------------------

def _flush_tlb(vcpu: Vcpu, hc: Hypercall) -> int:
    """``kvm_hv_flush_tlb``: whatever address space and pages are meant, those vCPUs' TLBs are emptied."""
    banks: tuple[int, ...]
    if hc.code in _EX:
        _, _, kind, valid = hc.header(_FLUSH_EX, (hc.ingpa, hc.outgpa, *hc.xmm[:2]), 2)
        everybody = kind != H.HV_GENERIC_SET_SPARSE_4K
        if hc.var_cnt != valid.bit_count():
            raise InvalidInput
        if not everybody and not hc.var_cnt:
            return _completed(hc)
        banks = () if everybody else hc.sparse_banks()
        hc.skip(hc.var_cnt)
    else:
        _, flags, mask = hc.header(_FLUSH, (hc.ingpa, hc.outgpa, *hc.xmm[:1]), 1)
        # Windows Server 2012 asks for nobody and means everybody.
        everybody, valid, banks = bool(flags & H.HV_FLUSH_ALL_PROCESSORS) or not mask, 1, (mask,)
    if hc.code in _FLUSH_LISTS and hc.rep_cnt <= TLB_FLUSH_ENTRIES:
        hc.further(hc.rep_cnt, hc.rep_cnt)
    for other in tuple(vcpu.vm.vcpus):
        if everybody or in_sparse_set(hyperv.vp_index(other), valid, banks):
            other.cpu.flush_tlb()
            if other is not vcpu:
                other.cpu.kick()
    return _completed(hc)


def _completed(hc: Hypercall) -> int:
    return H.HV_STATUS_SUCCESS | hc.rep_cnt << H.HV_HYPERCALL_REP_COMP_OFFSET


def _send_ipi(vcpu: Vcpu, hc: Hypercall) -> int:
    """``kvm_hv_send_ipi``."""
    if vcpu.arch.apic is None:
        raise InvalidInput
    everybody = False
    banks: tuple[int, ...]
    if hc.code == H.HVCALL_SEND_IPI:
        if hc.fast and hc.ingpa >> 32:
            raise InvalidInput
        vector, mask = hc.header(_IPI, (hc.ingpa & M32, hc.outgpa), 0)
        valid, banks = 1, (mask,)
    else:
        vector, kind, valid = hc.header(_IPI_EX, (hc.ingpa & M32, hc.outgpa, *hc.xmm[:1]), 1)
        everybody = kind == H.HV_GENERIC_SET_ALL
        if hc.var_cnt != valid.bit_count():
            raise InvalidInput
        if not everybody and not hc.var_cnt:
            return H.HV_STATUS_SUCCESS
        banks = () if everybody else hc.sparse_banks()
    if not H.HV_IPI_LOW_VECTOR <= vector <= H.HV_IPI_HIGH_VECTOR:
        raise InvalidInput
    message = ApicMessage(0, vector)
    with vcpu.arch.apic.chip.lock:
        for other in tuple(vcpu.vm.vcpus):
            apic = other.arch.apic
            if apic is not None and (everybody or in_sparse_set(hyperv.vp_index(other), valid, banks)):
                apic.accept(message)
    return H.HV_STATUS_SUCCESS


# ---- events ----------------------------------------------------------------------------------------------

def _signal_event(vcpu: Vcpu, hc: Hypercall) -> int:
    """``kvm_hvcall_signal_event``: the eventfd of a connection (KVM_HYPERV_EVENTFD)."""
    connection = hc.ingpa
    if not hc.fast:
        if connection & 7 or connection % PAGE_SIZE + 8 > PAGE_SIZE:
            return H.HV_STATUS_INVALID_ALIGNMENT
        try:
            connection = int.from_bytes(vcpu.vm.memslots.read(connection, 8), "little")
        except KvmError:
            return H.HV_STATUS_INVALID_ALIGNMENT
        hc.ingpa = connection               # so the client sees it
    if connection & 0xFFFF00000000:         # a flag number, which nobody uses
        return H.HV_STATUS_INVALID_PORT_ID
    if connection & ~KVM_HYPERV_CONN_ID_MASK:
        return H.HV_STATUS_INVALID_HYPERCALL_INPUT
    return H.HV_STATUS_SUCCESS if vcpu.vm.arch.hyperv.signal(connection) else H.HV_STATUS_INVALID_PORT_ID


# ---- the call --------------------------------------------------------------------------------------------

def enabled(vcpu: Vcpu) -> bool:
    """``kvm_hv_hypercall_enabled``: the guest sees Hyper-V, and has said who it is."""
    return vcpu.arch.hyperv_enabled and bool(vcpu.vm.arch.hyperv.guest_os_id)


def hypercall(vcpu: Vcpu) -> int:
    """``kvm_hv_hypercall``."""
    hv = hyperv.vcpu_init(vcpu)
    if vcpu.vm.vendor.get_cpl(vcpu) or not vcpu.cpu.cr0 & CR0_PE:
        events.inject_ud(vcpu)
        return 1
    hc = Hypercall(vcpu)
    if not _allowed(hv, hc.code):
        return _complete(vcpu, H.HV_STATUS_ACCESS_DENIED)
    if hc.param & H.HV_HYPERCALL_RSVD_MASK:
        return _complete(vcpu, H.HV_STATUS_INVALID_HYPERCALL_INPUT)
    if hc.fast and hc.code in _XMM:
        if hv.enforce_cpuid and not hv.features_edx & H.HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE:
            events.inject_ud(vcpu)
            return 1
        hc.read_xmm()
    try:
        result = _dispatch(vcpu, hv, hc)
    except InvalidInput:
        result = H.HV_STATUS_INVALID_HYPERCALL_INPUT
    if result is None:
        return _ask_client(vcpu, hc)
    return _complete(vcpu, result)


def _allowed(hv: HvVcpu, code: int) -> bool:
    """``hv_check_hypercall_access``."""
    if not hv.enforce_cpuid:
        return True
    if code in _EX and not hv.enlightenments_eax & H.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED:
        return False
    if code in _FLUSH_LISTS or code in _FLUSH_SPACES:
        return bool(hv.enlightenments_eax & H.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED)
    if code in _IPIS:
        return bool(hv.enlightenments_eax & H.HV_X64_CLUSTER_IPI_RECOMMENDED)
    if code == H.HVCALL_NOTIFY_LONG_SPIN_WAIT:
        return hv.enlightenments_ebx not in (0, M32)
    if code in _DEBUG:
        return not hv.syndbg_enabled or bool(hv.features_ebx & H.HV_DEBUGGING)
    need = {H.HVCALL_POST_MESSAGE: H.HV_POST_MESSAGES, H.HVCALL_SIGNAL_EVENT: H.HV_SIGNAL_EVENTS}.get(code)
    if code in EXTENDED:
        need = H.HV_ENABLE_EXTENDED_HYPERCALLS
    return need is None or bool(hv.features_ebx & need)


def _dispatch(vcpu: Vcpu, hv: HvVcpu, hc: Hypercall) -> int | None:
    """The status, or None: it is the client's."""
    code = hc.code
    if code in _FLUSH_LISTS:
        if (hc.var_cnt and code not in _EX) or not hc.rep_cnt or hc.rep_idx:
            raise InvalidInput
        return _flush_tlb(vcpu, hc)
    if code in _FLUSH_SPACES or code in _IPIS:
        if (hc.var_cnt and code not in _EX) or hc.rep:
            raise InvalidInput
        return _send_ipi(vcpu, hc) if code in _IPIS else _flush_tlb(vcpu, hc)
    if code == H.HVCALL_NOTIFY_LONG_SPIN_WAIT:
        if hc.rep or hc.var_cnt:
            raise InvalidInput
        return H.HV_STATUS_SUCCESS          # the exit itself has let the others have the engine
    if code in (H.HVCALL_SIGNAL_EVENT, H.HVCALL_POST_MESSAGE):
        return _event_or_message(vcpu, hv, hc)
    if code in _DEBUG:
        if hc.fast and code != H.HVCALL_RESET_DEBUG_SESSION:
            return H.HV_STATUS_INVALID_PARAMETER
        if not hv.syndbg_enabled:
            return H.HV_STATUS_INVALID_HYPERCALL_CODE
        options = vcpu.vm.arch.hyperv.values[HV_X64_MSR_SYNDBG_OPTIONS]
        return None if options & H.HV_X64_SYNDBG_OPTION_USE_HCALLS else H.HV_STATUS_OPERATION_DENIED
    if code in EXTENDED:
        return H.HV_STATUS_INVALID_PARAMETER if hc.fast else None
    return H.HV_STATUS_INVALID_HYPERCALL_CODE


def _event_or_message(vcpu: Vcpu, hv: HvVcpu, hc: Hypercall) -> int | None:
    if hc.rep or hc.var_cnt:
        raise InvalidInput
    if hc.code == H.HVCALL_SIGNAL_EVENT:
        status = _signal_event(vcpu, hc)
        if status != H.HV_STATUS_INVALID_PORT_ID:
            return status
    if not hv.synic.active:
        raise InvalidInput
    return None


def _complete(vcpu: Vcpu, result: int) -> int:
    """``kvm_hv_hypercall_complete``."""
    cpu = vcpu.cpu
    if regs.is_64_bit_mode(vcpu):
        cpu.set_gpr(RAX, result)
    else:
        cpu.set_gpr(RDX, result >> 32)
        cpu.set_gpr(RAX, result & M32)
    vcpu.arch.stat.hypercalls += 1
    return skip_emulated_instruction(vcpu, HYPERCALL_LENGTH)


def _ask_client(vcpu: Vcpu, hc: Hypercall) -> int:
    run = vcpu.run
    _set_reason(run, 8, kx.KVM_EXIT_HYPERV)
    _set_exit(run, _UNION, kx.KVM_EXIT_HYPERV_HCALL, 0, hc.param)
    _set_params(run, _RESULT + 8, hc.ingpa, hc.outgpa)
    vcpu.arch.complete_userspace_io = _complete_by_client
    return 0


def _complete_by_client(vcpu: Vcpu) -> int:
    return _complete(vcpu, _u64(vcpu.run, _RESULT)[0])
