# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V for guests that know it: synthetic MSRs, and what else a VM and a vCPU have of it (Linux: hyperv.c; TLFS).

Hypercalls are in :mod:`kvmfs.kvm.hyperv_hypercall`, SynIC and timers in :mod:`kvmfs.kvm.hyperv_synic`, the reference
time in :mod:`kvmfs.kvm.hyperv_tsc`, the CPUID that is offered in :mod:`kvmfs.kvm.hyperv_cpuid`.

A vCPU has a part of its own as soon as its CPUID shows Hyper-V or somebody touches one of the MSRs; its guest may touch
them only with that CPUID.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

from kvmfs.abi import apic as A
from kvmfs.abi import exits as kx
from kvmfs.abi import hyperv as H
from kvmfs.abi import msrs as M
from kvmfs.abi.flags import KVM_HYPERV_CONN_ID_MASK, KVM_HYPERV_EVENTFD_DEASSIGN
from kvmfs.abi.x86 import KVM_MAX_VCPUS
from kvmfs.errors import KvmError
from kvmfs.kvm import kvmclock, pv_eoi
from kvmfs.kvm.hyperv_synic import SynIc
from kvmfs.kvm.hyperv_tsc import ReferenceTsc

if TYPE_CHECKING:
    from kvmfs.kvm.cpuid import CpuidTable
    from kvmfs.kvm.host import EventFd, RequestLike
    from kvmfs.kvm.kvm_main import Vcpu, Vm

M32 = (1 << 32) - 1
NSEC_PER_SEC = 10**9
CPUID_POWER, INVARIANT_TSC = 0x80000007, 1 << 8
_UNION = 32                                                 # of kvm_run
_set_reason = struct.Struct("<I").pack_into
_set_synic_exit = struct.Struct("<II I4x QQQ").pack_into    # type, pad; msr, control, evt_page, msg_page
_set_syndbg_exit = struct.Struct("<II I4x Q8xQQQ").pack_into    # type, pad; msr, control, send, recv, pending page
_SYNDBG_STATUS = _UNION + 24

CRASH_MSRS = range(M.HV_X64_MSR_CRASH_P0, M.HV_X64_MSR_CRASH_P0 + H.HV_CRASH_PARAMS)
SYNDBG_MSRS = (*range(M.HV_X64_MSR_SYNDBG_CONTROL, M.HV_X64_MSR_SYNDBG_PENDING_BUFFER + 1), M.HV_X64_MSR_SYNDBG_OPTIONS)
SYNIC_MSRS = frozenset((*range(M.HV_X64_MSR_SCONTROL, M.HV_X64_MSR_EOM + 1), *range(M.HV_X64_MSR_SINT0, M.HV_X64_MSR_SINT15 + 1)))
STIMER_MSRS = range(M.HV_X64_MSR_STIMER0_CONFIG, M.HV_X64_MSR_STIMER3_COUNT + 1)
_APIC_REGISTERS = {M.HV_X64_MSR_EOI: A.APIC_EOI, M.HV_X64_MSR_ICR: A.APIC_ICR, M.HV_X64_MSR_TPR: A.APIC_TASKPRI}
# Plain values of the VM.
_PARTITION_VALUES = frozenset((M.HV_X64_MSR_REENLIGHTENMENT_CONTROL, M.HV_X64_MSR_TSC_EMULATION_STATUS,
                               M.HV_X64_MSR_TSC_INVARIANT_CONTROL, M.HV_X64_MSR_CRASH_CTL, *CRASH_MSRS, *SYNDBG_MSRS))

_EAX, _EDX = "features_eax", "features_edx"
# MSR → the bit of HYPERV_CPUID_FEATURES that a guest needs with KVM_CAP_HYPERV_ENFORCE_CPUID.
_NEEDS: dict[int, tuple[str, int]] = {
    **dict.fromkeys((M.HV_X64_MSR_GUEST_OS_ID, M.HV_X64_MSR_HYPERCALL), (_EAX, H.HV_MSR_HYPERCALL_AVAILABLE)),
    M.HV_X64_MSR_VP_RUNTIME: (_EAX, H.HV_MSR_VP_RUNTIME_AVAILABLE),
    M.HV_X64_MSR_TIME_REF_COUNT: (_EAX, H.HV_MSR_TIME_REF_COUNT_AVAILABLE),
    M.HV_X64_MSR_VP_INDEX: (_EAX, H.HV_MSR_VP_INDEX_AVAILABLE),
    M.HV_X64_MSR_RESET: (_EAX, H.HV_MSR_RESET_AVAILABLE),
    M.HV_X64_MSR_REFERENCE_TSC: (_EAX, H.HV_MSR_REFERENCE_TSC_AVAILABLE),
    **dict.fromkeys(SYNIC_MSRS, (_EAX, H.HV_MSR_SYNIC_AVAILABLE)),
    **dict.fromkeys(STIMER_MSRS, (_EAX, H.HV_MSR_SYNTIMER_AVAILABLE)),
    **dict.fromkeys((*_APIC_REGISTERS, M.HV_X64_MSR_VP_ASSIST_PAGE), (_EAX, H.HV_MSR_APIC_ACCESS_AVAILABLE)),
    **dict.fromkeys((M.HV_X64_MSR_TSC_FREQUENCY, M.HV_X64_MSR_APIC_FREQUENCY), (_EAX, H.HV_ACCESS_FREQUENCY_MSRS)),
    **dict.fromkeys((M.HV_X64_MSR_REENLIGHTENMENT_CONTROL, M.HV_X64_MSR_TSC_EMULATION_CONTROL,
                     M.HV_X64_MSR_TSC_EMULATION_STATUS), (_EAX, H.HV_ACCESS_REENLIGHTENMENT)),
    M.HV_X64_MSR_TSC_INVARIANT_CONTROL: (_EAX, H.HV_ACCESS_TSC_INVARIANT),
    **dict.fromkeys((*CRASH_MSRS, M.HV_X64_MSR_CRASH_CTL), (_EDX, H.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE)),
    **dict.fromkeys(SYNDBG_MSRS, (_EDX, H.HV_FEATURE_DEBUG_MSRS_AVAILABLE)),
}


class HvVm:
    """``struct kvm_hv``: what the vCPUs of a VM (Hyper-V: a partition) share, under ``lock``."""

    def __init__(self, vm: Vm) -> None:
        self.reference_tsc = ReferenceTsc(vm)
        self.lock = self.reference_tsc.lock
        self.guest_os_id = self.hypercall = 0
        self.values = dict.fromkeys(_PARTITION_VALUES, 0)
        self.connections: dict[int, EventFd] = {}       # KVM_HYPERV_EVENTFD

    def close(self) -> None:
        with self.lock:
            for eventfd in self.connections.values():
                os.close(eventfd.fd)
            self.connections.clear()

    def signal(self, connection: int) -> bool:
        """Signal the eventfd of a connection; False: there is none."""
        with self.lock:
            eventfd = self.connections.get(connection)
            if eventfd is None:
                return False
            try:
                os.write(eventfd.fd, (1).to_bytes(8, "little"))
            except BlockingIOError:
                pass                                    # as full as it can be
            return True


class HvVcpu:
    """``struct kvm_vcpu_hv``.  ``exits``: what the client is to be told before the next entry, in Linux's order."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vp_index = vcpu.index
        self.assist_page = 0                # HV_X64_MSR_VP_ASSIST_PAGE
        self.enforce_cpuid = False
        self.features_eax = self.features_ebx = self.features_edx = 0
        self.enlightenments_eax = self.enlightenments_ebx = self.syndbg_cap_eax = 0
        self.crash = self.reset = False
        self.exit: tuple[int, int] | None = None        # KVM_EXIT_HYPERV_SYNIC or _SYNDBG, MSR
        self.synic = SynIc(vcpu, lambda msr: request_exit(vcpu, kx.KVM_EXIT_HYPERV_SYNIC, msr))
        self._thread = self._thread_start = self._runtime = 0

    @property
    def exit_pending(self) -> bool:
        return self.crash or self.reset or self.exit is not None

    def runtime(self) -> int:
        """HV_X64_MSR_VP_RUNTIME: CPU time in 100 ns.  KVM_RUN may be served by one thread now and another one later."""
        thread, used = threading.get_ident(), time.thread_time_ns() // 100
        if thread == self._thread:
            self._runtime += used - self._thread_start
        elif not self._thread:
            self._runtime = used
        self._thread, self._thread_start = thread, used
        return self._runtime & (1 << 64) - 1

    def set_runtime(self, value: int) -> None:
        self.runtime()
        self._runtime = value

    @property
    def syndbg_enabled(self) -> bool:
        return bool(self.syndbg_cap_eax & H.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING)

    def may_access(self, index: int) -> bool:
        """``hv_check_msr_access``."""
        if not self.enforce_cpuid:
            return True
        need = _NEEDS.get(index)
        return need is not None and bool(getattr(self, need[0]) & need[1])


def vcpu_init(vcpu: Vcpu) -> HvVcpu:
    """``kvm_hv_vcpu_init``: the vCPU's part, made when it is first needed."""
    hv = vcpu.arch.hyperv
    if hv is None:
        hv = vcpu.arch.hyperv = HvVcpu(vcpu)
    return hv


def vp_index(vcpu: Vcpu) -> int:
    """``kvm_hv_get_vpindex``."""
    hv = vcpu.arch.hyperv
    return hv.vp_index if hv is not None else vcpu.index


def vcpu_by_vp_index(vm: Vm, index: int) -> Vcpu | None:
    """``get_vcpu_by_vpidx``."""
    return next((v for v in tuple(vm.vcpus) if vp_index(v) == index), None) if index < KVM_MAX_VCPUS else None


# ---- CPUID -----------------------------------------------------------------------------------------------

def after_set_cpuid(vcpu: Vcpu) -> None:
    """``kvm_hv_set_cpuid``: which of Hyper-V's leaves the guest sees now."""
    table, arch = vcpu.arch.cpuid, vcpu.arch
    interface = table.find(H.HYPERV_CPUID_INTERFACE)
    arch.hyperv_enabled = interface is not None and interface.eax == H.HYPERV_CPUID_SIGNATURE_EAX
    if arch.hyperv_enabled:
        vcpu_init(vcpu)
    hv = arch.hyperv
    if hv is None:
        return
    if not arch.hyperv_enabled:
        table = type(table)()
    hv.features_eax, hv.features_ebx, _, hv.features_edx = _leaf(table, H.HYPERV_CPUID_FEATURES)
    hv.enlightenments_eax, hv.enlightenments_ebx, _, _ = _leaf(table, H.HYPERV_CPUID_ENLIGHTMENT_INFO)
    hv.syndbg_cap_eax = _leaf(table, H.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES)[0]


def _leaf(table: CpuidTable, function: int) -> tuple[int, int, int, int]:
    entry = table.find(function)
    return (entry.eax, entry.ebx, entry.ecx, entry.edx) if entry is not None else (0, 0, 0, 0)


def invtsc_suppressed(vcpu: Vcpu) -> bool:
    """``kvm_hv_invtsc_suppressed``: the guest sees its invariant TSC only after it has asked for it."""
    hv = vcpu.arch.hyperv
    return (hv is not None and bool(hv.features_eax & H.HV_ACCESS_TSC_INVARIANT)
            and not vcpu.vm.arch.hyperv.values[M.HV_X64_MSR_TSC_INVARIANT_CONTROL] & H.HV_EXPOSE_INVARIANT_TSC)


def set_enforce_cpuid(vcpu: Vcpu, enforce: bool) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID."""
    if enforce or vcpu.arch.hyperv is not None:
        vcpu_init(vcpu).enforce_cpuid = enforce


def activate_synic(vcpu: Vcpu, *, dont_zero_pages: bool) -> None:
    """KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_SYNIC2.  EINVAL: the local APIC is not in here."""
    if vcpu.vm.arch.irqchip is None:
        raise KvmError(errno.EINVAL)
    vcpu_init(vcpu).synic.activate(dont_zero_pages=dont_zero_pages)


# ---- exits that a register write asks for ----------------------------------------------------------------

def _note(vcpu: Vcpu) -> None:
    """A request by which the next entry looks at what is to be told."""


def request_exit(vcpu: Vcpu, kind: int, msr: int) -> None:
    """KVM_REQ_HV_EXIT."""
    vcpu_init(vcpu).exit = kind, msr
    vcpu.request_work(_note)


def exit_to_client(vcpu: Vcpu, hv: HvVcpu) -> None:
    """Fill in the exit that comes first."""
    if hv.crash or hv.reset:
        kind = kx.KVM_SYSTEM_EVENT_CRASH if hv.crash else kx.KVM_SYSTEM_EVENT_RESET
        if hv.crash:
            hv.crash = False
        else:
            hv.reset = False
        _set_reason(vcpu.run, 8, kx.KVM_EXIT_SYSTEM_EVENT)
        struct.pack_into("<II", vcpu.run, _UNION, kind, 0)      # type, ndata
    elif hv.exit is not None:
        (kind, msr), hv.exit = hv.exit, None
        _set_reason(vcpu.run, 8, kx.KVM_EXIT_HYPERV)
        if kind == kx.KVM_EXIT_HYPERV_SYNIC:
            synic = hv.synic
            _set_synic_exit(vcpu.run, _UNION, kind, 0, msr, synic.control, synic.evt_page, synic.msg_page)
        else:
            values = vcpu.vm.arch.hyperv.values
            _set_syndbg_exit(vcpu.run, _UNION, kind, 0, msr, values[M.HV_X64_MSR_SYNDBG_CONTROL],
                             values[M.HV_X64_MSR_SYNDBG_SEND_BUFFER], values[M.HV_X64_MSR_SYNDBG_RECV_BUFFER],
                             values[M.HV_X64_MSR_SYNDBG_PENDING_BUFFER])
            vcpu.arch.complete_userspace_io = _complete_syndbg
    if hv.exit_pending:
        vcpu.request_work(_note)


def _complete_syndbg(vcpu: Vcpu) -> int:
    """``kvm_hv_syndbg_complete_userspace``: the client has done what CONTROL asked for."""
    msr, = struct.unpack_from("<I", vcpu.run, _UNION + 8)
    if msr == M.HV_X64_MSR_SYNDBG_CONTROL:
        status, = struct.unpack_from("<Q", vcpu.run, _SYNDBG_STATUS)
        vcpu.vm.arch.hyperv.values[M.HV_X64_MSR_SYNDBG_STATUS] = status
    return 1


# ---- the synthetic MSRs ----------------------------------------------------------------------------------

class HvMsrs:
    """``kvm_hv_get_msr_common`` and ``kvm_hv_set_msr_common`` of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def _hv(self, index: int, host: bool) -> HvVcpu | None:
        """None: the guest may not."""
        if not host and not self._vcpu.arch.hyperv_enabled:
            return None
        hv = vcpu_init(self._vcpu)
        return hv if host or hv.may_access(index) else None

    def read(self, index: int, host: bool) -> int | None:
        """None: #GP."""
        hv = self._hv(index, host)
        if hv is None:
            return None
        vm, arch = self._vcpu.vm.arch.hyperv, self._vcpu.arch
        if index in SYNIC_MSRS:
            return hv.synic.get_msr(index, host=host)
        if index in STIMER_MSRS:
            timer = hv.synic.timers[index - M.HV_X64_MSR_STIMER0_CONFIG >> 1]
            return timer.count if index - M.HV_X64_MSR_STIMER0_CONFIG & 1 else timer.config
        if index in _APIC_REGISTERS:
            return arch.apic.read_msr_register(_APIC_REGISTERS[index]) if arch.apic is not None else None
        if index in SYNDBG_MSRS and not host and not hv.syndbg_enabled:
            return None
        if index in _PARTITION_VALUES:
            return vm.values[index]
        return self._read_other(index, hv, vm)

    def _read_other(self, index: int, hv: HvVcpu, vm: HvVm) -> int | None:
        match index:
            case M.HV_X64_MSR_GUEST_OS_ID:
                return vm.guest_os_id
            case M.HV_X64_MSR_HYPERCALL:
                return vm.hypercall
            case M.HV_X64_MSR_VP_INDEX:
                return hv.vp_index
            case M.HV_X64_MSR_VP_RUNTIME:
                return hv.runtime()
            case M.HV_X64_MSR_VP_ASSIST_PAGE:
                return hv.assist_page
            case M.HV_X64_MSR_TIME_REF_COUNT:
                with vm.lock:
                    return vm.reference_tsc.time_ref_counter()
            case M.HV_X64_MSR_REFERENCE_TSC:
                return vm.reference_tsc.msr
            case M.HV_X64_MSR_TSC_EMULATION_CONTROL:
                return vm.reference_tsc.emulation_control
            case M.HV_X64_MSR_TSC_FREQUENCY:
                return self._vcpu.arch.clock.virtual_tsc_khz * 1000
            case M.HV_X64_MSR_APIC_FREQUENCY:
                chip = self._vcpu.vm.arch.irqchip
                return NSEC_PER_SEC // (chip.bus_cycle_ns if chip is not None else 1)
            case M.HV_X64_MSR_RESET:
                return 0
            case _:
                return None

    def write(self, index: int, value: int, host: bool) -> bool:
        """False: #GP."""
        hv = self._hv(index, host)
        if hv is None:
            return False
        arch = self._vcpu.arch
        if index in SYNIC_MSRS:
            return hv.synic.set_msr(index, value, host=host)
        if index in STIMER_MSRS:
            return self._write_stimer(hv, index, value, host)
        if index in _APIC_REGISTERS:
            return arch.apic is not None and arch.apic.write_msr_register(_APIC_REGISTERS[index], value)
        if index in SYNDBG_MSRS:
            return self._write_syndbg(hv, index, value, host)
        if index in _PARTITION_VALUES:
            return self._write_partition_value(index, value, host)
        return self._write_other(index, value, hv, host)

    def _write_stimer(self, hv: HvVcpu, index: int, value: int, host: bool) -> bool:
        timer = hv.synic.timers[index - M.HV_X64_MSR_STIMER0_CONFIG >> 1]
        if index - M.HV_X64_MSR_STIMER0_CONFIG & 1:
            return timer.set_count(value, host=host)
        direct = host or not hv.enforce_cpuid or bool(hv.features_edx & H.HV_STIMER_DIRECT_MODE_AVAILABLE)
        return timer.set_config(value, host=host, direct_allowed=direct)

    def _write_syndbg(self, hv: HvVcpu, index: int, value: int, host: bool) -> bool:
        """``syndbg_set_msr``."""
        if not hv.syndbg_enabled and not host:
            return False
        self._vcpu.vm.arch.hyperv.values[index] = value
        if not host and index in (M.HV_X64_MSR_SYNDBG_CONTROL, M.HV_X64_MSR_SYNDBG_PENDING_BUFFER):
            request_exit(self._vcpu, kx.KVM_EXIT_HYPERV_SYNDBG, index)
        return True

    def _write_partition_value(self, index: int, value: int, host: bool) -> bool:
        vm = self._vcpu.vm.arch.hyperv
        if index == M.HV_X64_MSR_CRASH_CTL:
            if host:
                vm.values[index] = value & H.HV_CRASH_CTL_CRASH_NOTIFY
            elif value & H.HV_CRASH_CTL_CRASH_NOTIFY:
                vcpu_init(self._vcpu).crash = True
                self._vcpu.request_work(_note)
            return True
        if index == M.HV_X64_MSR_TSC_EMULATION_STATUS and value and not host:
            return False
        if index == M.HV_X64_MSR_TSC_INVARIANT_CONTROL and (
                value & ~H.HV_EXPOSE_INVARIANT_TSC or (not host and vm.values[index] and not value)):
            return False
        vm.values[index] = value
        return True

    def _write_other(self, index: int, value: int, hv: HvVcpu, host: bool) -> bool:
        vcpu, vm = self._vcpu, self._vcpu.vm.arch.hyperv
        match index:
            case M.HV_X64_MSR_GUEST_OS_ID:
                with vm.lock:
                    vm.guest_os_id = value
                    if not value:
                        vm.hypercall &= ~H.HV_X64_MSR_HYPERCALL_ENABLE
            case M.HV_X64_MSR_HYPERCALL:
                return self._set_hypercall(value)
            case M.HV_X64_MSR_VP_INDEX:
                if not host or value & M32 >= KVM_MAX_VCPUS:
                    return False
                hv.vp_index = value & M32
            case M.HV_X64_MSR_VP_RUNTIME:
                if host:
                    hv.set_runtime(value)
                return host
            case M.HV_X64_MSR_VP_ASSIST_PAGE:
                return self._set_assist_page(hv, value)
            case M.HV_X64_MSR_REFERENCE_TSC:
                with vm.lock:
                    if vm.reference_tsc.set_msr(value, host=host):
                        vcpu.request_work(kvmclock.update_masterclock)
            case M.HV_X64_MSR_TSC_EMULATION_CONTROL:
                vm.reference_tsc.emulation_control = value
            case M.HV_X64_MSR_RESET:
                if value == 1:
                    hv.reset = True
                    vcpu.request_work(_note)
            case M.HV_X64_MSR_TIME_REF_COUNT | M.HV_X64_MSR_TSC_FREQUENCY | M.HV_X64_MSR_APIC_FREQUENCY:
                return host                     # read-only; a client may write back what it has read
            case _:
                return False
        return True

    def _set_hypercall(self, value: int) -> bool:
        """The hypercall page: with bit 0 its code is put there, the vendor's own instruction and RET."""
        vm, machine = self._vcpu.vm.arch.hyperv, self._vcpu.vm
        with vm.lock:
            if not vm.guest_os_id:
                return True
            if value & H.HV_X64_MSR_HYPERCALL_ENABLE:
                gpa, code = value & H.HV_X64_MSR_HYPERCALL_PAGE_ADDRESS_MASK, machine.vendor.hypercall_bytes + b"\xc3"
                try:
                    machine.memslots.write(gpa, code)
                except KvmError:
                    return False
                machine.engine.invalidate(gpa, len(code))
            vm.hypercall = value
        return True

    def _set_assist_page(self, hv: HvVcpu, value: int) -> bool:
        """The VP assist page, whose first word is the paravirtual EOI's; the rest is the guest's."""
        vcpu = self._vcpu
        if not value & H.HV_X64_MSR_VP_ASSIST_PAGE_ENABLE:
            hv.assist_page = value
            return pv_eoi.set_msr(vcpu, 0)
        gpa = value & ~0xFFF
        try:
            vcpu.vm.memslots.write(gpa, bytes(4))
        except KvmError:
            return False
        hv.assist_page = value
        return pv_eoi.set_msr(vcpu, gpa | pv_eoi.KVM_MSR_ENABLED)


# ---- KVM_HYPERV_EVENTFD ----------------------------------------------------------------------------------

def set_eventfd(vm: Vm, req: RequestLike, conn_id: int, fd: int, flags: int) -> None:
    """``kvm_vm_ioctl_hv_eventfd`` (api.rst 4.112).

    EINVAL: flags, or no connection id; ENOENT: there is none to take away; EBADF, EINVAL: descriptor; EEXIST.
    """
    if flags & ~KVM_HYPERV_EVENTFD_DEASSIGN or conn_id & ~KVM_HYPERV_CONN_ID_MASK:
        raise KvmError(errno.EINVAL)
    hv = vm.arch.hyperv
    if flags & KVM_HYPERV_EVENTFD_DEASSIGN:
        with hv.lock:
            gone = hv.connections.pop(conn_id, None)
        if gone is None:
            raise KvmError(errno.ENOENT)
        os.close(gone.fd)
        return
    if fd < 0:
        raise KvmError(errno.EBADF)
    eventfd = vm.host.eventfd(req, fd)
    with hv.lock:
        if conn_id not in hv.connections:
            hv.connections[conn_id] = eventfd
            return
    os.close(eventfd.fd)
    raise KvmError(errno.EEXIST)


def has_stimer_pending(vcpu: Vcpu) -> bool:
    """``kvm_hv_has_stimer_pending``: such a vCPU does not sleep."""
    hv = vcpu.arch.hyperv
    return hv is not None and bool(hv.synic.pending)


