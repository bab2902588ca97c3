# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN: from the client's ioctl to the guest and back (Linux: arch/x86/kvm/x86.c).

Functions that handle an exit return 1 to go on with the guest, 0 to return to the client with kvm_run filled
in, or -errno.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from kvmfs.abi import exits as kx
from kvmfs.abi.flags import KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
from kvmfs.abi.x86 import CR4_OSXSAVE, KVM_MAX_VCPU_IDS
from kvmfs.errors import KvmError
from kvmfs.kvm import events, guest_debug, hyperv, irq, kvmclock, msr_filter, pv_eoi, sync_regs, vapic
from kvmfs.kvm.cpu_msrs import VcpuMsrs
from kvmfs.kvm.cpuid import CpuidTable
from kvmfs.kvm.host import current_cpu
from kvmfs.kvm.hyperv import HvMsrs, HvVcpu, HvVm
from kvmfs.kvm.msrs import MsrFile
from kvmfs.kvm.pv import PvMsrs
from kvmfs.kvm.pv_eoi import PvEoi
from kvmfs.kvm.stats import VcpuStat
from kvmfs.kvm.steal_time import StealTime, record_steal_time
from kvmfs.kvm.x86_exits import EXIT_REASON, HANDLERS, UNION, complete_io_out, set_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmfs.kvm.host import RequestLike
    from kvmfs.kvm.irq_comm import Irqchip
    from kvmfs.kvm.kvm_main import Vcpu, Vm
    from kvmfs.kvm.lapic import Lapic
    from kvmfs.kvm.msr_filter import MsrFilter

MP_STATE_RUNNABLE = 0
APIC_BASE_RESET = 0xFEE00000 | 1 << 11
SIGSET_POLL = 0.002             # seconds between looks at a client's blocked signals

# Offsets in struct kvm_run.
_REQUEST_WINDOW, _READY, _VALID_REGS = 0, 12, 288
_set_saved = struct.Struct("<BBHQQ").pack_into          # from _READY: ready, if_flag, flags, cr8, apic_base
# request_interrupt_window, immediate_exit; cr8; kvm_valid_regs, kvm_dirty_regs
_get_request = struct.Struct("<BB14xQ264xQQ").unpack_from
_set_fail = struct.Struct("<QI").pack_into              # hardware_entry_failure_reason, cpu


class CpuidState(TypedDict):
    """What CPUID mirrors of a vCPU's state."""

    osxsave: bool
    apic_enabled: bool
    xcr0: int
    mwait: bool | None
    hlt_in_guest: bool


class VmArch:
    """``struct kvm_arch``, as far as it exists."""

    def __init__(self, vm: Vm) -> None:
        self.resumed = threading.Event()
        self.resumed.set()
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.bsp_vcpu_id = 0
        self.max_vcpu_ids = 0               # KVM_CAP_MAX_VCPU_ID; 0: not set yet
        self.disabled_quirks = 0
        self.guest_can_read_msr_platform_info = True
        self.user_space_msr_mask = 0        # KVM_MSR_EXIT_REASON_*
        self.hypercall_exit_enabled = 0     # bit n: hypercall n exits
        self.exit_on_emulation_error = False
        self.msr_filter: MsrFilter | None = None
        self.max_halt_poll_ns = 0           # KVM_CAP_HALT_POLL
        self.hlt_in_guest = False           # KVM_X86_DISABLE_EXITS_HLT
        self.clock = kvmclock.VmClock()
        self.hyperv = HvVm(vm)
        self.irqchip: Irqchip | None = None
        self.x2apic_format = self.x2apic_broadcast_quirk_disabled = False      # KVM_CAP_X2APIC_API


class VcpuArch:
    """``struct kvm_vcpu_arch``: what is not in the CPU's registers."""

    def __init__(self) -> None:
        self.mp_state = MP_STATE_RUNNABLE
        self.apic: Lapic | None = None      # where the VM has an irqchip
        self.pv_unhalted = False            # KVM_HC_KICK_CPU
        self.exception = events.QueuedException()
        self.interrupt = events.QueuedInterrupt()
        self.nmi_injected = False
        self.nmi_window = False             # the CPU holds a pending NMI until the guest can take it
        self.nmi_pending = self.nmi_queued = 0
        self.triple_fault = False
        self.mov_ss_rip: int | None = None  # where a client set a MOV SS shadow: the CPU has one kind only
        self.given = False                  # an event was given to the CPU for the entry under way
        self.event_request = True           # KVM_REQ_EVENT
        self.entry_check = True             # a client changed state: is it one that can be entered?
        self.cpuid_changed = True
        self.apic_base = APIC_BASE_RESET
        self.tpr_access_reporting = self.tpr_access_pending = False
        self.vapic_addr = 0                 # of the client's virtual APIC word, 0: none
        self.pv_eoi = PvEoi()
        self.apic_attention = False         # one of these two is in use (Linux: a bit for each)
        self.cr8_before = 0                 # to see the guest lower it
        self.complete_userspace_io: Callable[[Vcpu], int] | None = None
        self.pio_linear_rip: int | None = None  # where the guest was, once the client changes registers
        self.ran = False                    # has been in the guest: CPUID is fixed
        self.last_vmentry_cpu = 0xFFFFFFFF
        self.cpuid: CpuidTable = CpuidTable()
        self.cpuid_set = False              # KVM_SET_CPUID or KVM_SET_CPUID2 has succeeded
        self.guest_debug = 0                # KVM_SET_GUEST_DEBUG's control, 0 without KVM_GUESTDBG_ENABLE
        self.debug_db: tuple[int, ...] = (0, 0, 0, 0)   # its breakpoints
        self.debug_dr7 = self.singlestep_rip = 0
        self.pdptrs: tuple[int, tuple[int, ...]] | None = None   # a client's own PDPTRs, and the CR3 they are for
        self.enforce_pv_cpuid = False       # KVM_CAP_ENFORCE_PV_FEATURE_CPUID
        self.pv: PvMsrs
        self.msrs: MsrFile
        self.clock = kvmclock.VcpuClock()
        self.steal_time = StealTime()
        self.hyperv: HvVcpu | None = None   # see kvmfs.kvm.hyperv
        self.hyperv_enabled = False         # the guest's CPUID shows Hyper-V
        # kvm_make_request: what is to be done before the next entry; appended to from any thread.
        self.requests: deque[Callable[[Vcpu], None]] = deque()
        self.stat = VcpuStat()

    def cpuid_state(self, vcpu: Vcpu) -> CpuidState:
        """The state that CPUID mirrors, as arguments of kvmfs.kvm.cpuid."""
        quirk = not vcpu.vm.arch.disabled_quirks & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
        return {"osxsave": bool(vcpu.cpu.cr4 & CR4_OSXSAVE), "apic_enabled": bool(self.apic_base & 1 << 11),
                "xcr0": vcpu.cpu.xcr0, "mwait": None if quirk else self.msrs.mwait_enabled,
                "hlt_in_guest": vcpu.vm.arch.hlt_in_guest}

    def update_apic_attention(self) -> None:
        """Must be looked after each exit at what the guest's memory says to its local APIC?"""
        self.apic_attention = bool(self.vapic_addr) or self.pv_eoi.enabled or self.pv_eoi.pending

    def mirror_cpuid(self) -> None:
        """Something has changed that CPUID mirrors."""
        self.cpuid_changed = True

    def update_cpuid(self, vcpu: Vcpu) -> None:
        """``kvm_update_cpuid_runtime``, when something has changed that it mirrors."""
        if self.cpuid_changed:
            self.cpuid_changed = False
            self.cpuid.update_runtime(**self.cpuid_state(vcpu))


# ---- creation and reset ----------------------------------------------------------------------------------

def vcpu_precreate(vm: Vm, vcpu_id: int) -> None:
    """``kvm_arch_vcpu_precreate``.  EINVAL: an id that KVM_CAP_MAX_VCPU_ID has ruled out.  Caller has kvm->lock."""
    arch = vm.arch
    if not arch.max_vcpu_ids:
        arch.max_vcpu_ids = KVM_MAX_VCPU_IDS
    if vcpu_id >= arch.max_vcpu_ids:
        raise KvmError(errno.EINVAL)
    vm.vendor.vcpu_precreate(vm)


def vcpu_create(vcpu: Vcpu) -> None:
    """``kvm_arch_vcpu_create``."""
    vendor, arch = vcpu.vm.vendor, vcpu.arch
    if vcpu.vcpu_id == vcpu.vm.arch.bsp_vcpu_id:
        arch.apic_base |= 1 << 8
    arch.pv = PvMsrs(vcpu)
    arch.msrs = MsrFile(vendor.name, lambda: arch.cpuid, VcpuMsrs(vcpu), vcpu.vm.arch, arch.pv, HvMsrs(vcpu))
    arch.msrs.cpuid_mirror_changed = arch.mirror_cpuid
    irq.create_lapic(vcpu)
    vendor.vcpu_create(vcpu)
    if vcpu.vm.arch.msr_filter is not None:
        msr_filter.msr_filter_changed(vcpu)
    kvmclock.set_tsc_khz(vcpu, vcpu.vm.arch.clock.default_tsc_khz)
    vcpu.request_work(kvmclock.guest_time_update)
    vcpu_reset(vcpu, init_event=False)


def vcpu_postcreate(vcpu: Vcpu) -> None:
    """``kvm_arch_vcpu_postcreate``: others can find the vCPU now; its TSC is that of the VM."""
    kvmclock.synchronize_tsc(vcpu, None)


def vcpu_reset(vcpu: Vcpu, *, init_event: bool) -> None:
    """``kvm_vcpu_reset``: the registers after RESET, or after INIT."""
    cpu, arch = vcpu.cpu, vcpu.arch
    old_cr0 = cpu.cr0
    if arch.apic is not None:
        arch.apic.reset(init_event=init_event)
    arch.nmi_queued = arch.nmi_pending = 0
    arch.nmi_injected = arch.nmi_window = arch.interrupt.injected = arch.given = False
    arch.exception.clear()
    arch.event_request = arch.entry_check = True
    arch.pv.reset()
    cpu.cancel_injection()
    cpu.interrupt_shadow = 0
    cpu.nmi_masked = False
    for i in range(4):
        cpu.set_dr(i, 0)
    cpu.set_dr(6, 0xFFFF0FF0)
    cpu.set_dr(7, 0x400)
    guest_debug.update_breakpoints(vcpu)
    cpu.cr2 = 0
    entry = arch.cpuid.find(1, 0)
    cpu.set_gprs((0, 0, entry.eax if entry is not None else 0x600) + (0,) * 13)
    vcpu.vm.vendor.vcpu_reset(vcpu, init_event)
    cpu.rflags, cpu.rip = 2, 0xFFF0
    cpu.cr3 = cpu.cr4 = cpu.efer = 0
    cpu.cr0 = 0x10 | (old_cr0 & 0x60000000 if init_event else 0x60000000)
    if not init_event:
        cpu.xcr0 = 1
        cpu.fxrstor(_FPU_RESET)
        cpu.cr8 = 0
    cpu.commit_state()


_FPU_RESET = struct.pack("<HHBBHQQII", 0x37F, 0, 0, 0, 0, 0, 0, 0x1F80, 0xFFFF).ljust(512, b"\0")


# ---- KVM_RUN ---------------------------------------------------------------------------------------------

def ioctl_run(vcpu: Vcpu, req: RequestLike, begun: Callable[[Vcpu], int] | None = None) -> int:
    """``kvm_arch_vcpu_ioctl_run`` (api.rst 4.10): 0, or -EINTR, -EINVAL, -EFAULT, -EAGAIN.

    ``begun``: the guest has run already (kvmfs.kvm.fastpath), and this handles why it stopped.
    """
    run, host = vcpu.run, vcpu.vm.host
    host.may_block()
    if vcpu.copy_run:
        host.kvm_run_copy_in(vcpu.inode, run)
    mirrored = vcpu.vm.mirrored
    if mirrored:
        vcpu.vm.mirror_in()
    vcpu.request = req
    if vcpu.dirty_ring is not None:
        vcpu.dirty_ring.thread = threading.get_ident()
    vendor = vcpu.vm.vendor
    vendor.vcpu_load(vcpu)
    try:
        return _run(vcpu, req) if begun is None else _vcpu_run(vcpu, req, begun)
    finally:
        if run[_VALID_REGS]:
            sync_regs.store_regs(vcpu, run[_VALID_REGS])
        _post_run_save(vcpu)
        vendor.vcpu_put(vcpu)
        vcpu.request = None
        if mirrored:
            host.mirror_out()
        if vcpu.copy_run:
            host.kvm_run_copy_out(vcpu.inode, run)


def _run(vcpu: Vcpu, req: RequestLike) -> int:
    run, arch = vcpu.run, vcpu.arch
    _window, immediate_exit, cr8, valid, dirty = _get_request(run)
    wants_to_run = not immediate_exit
    apic = arch.apic
    if apic is not None and arch.mp_state == kx.KVM_MP_STATE_UNINITIALIZED:
        return _run_uninitialized(vcpu, req, apic)
    if valid or dirty:
        if (valid | dirty) & ~kx.KVM_SYNC_X86_VALID_FIELDS:
            return -errno.EINVAL
        if dirty and sync_regs.sync_regs(vcpu, dirty):
            return -errno.EINVAL
    if cr8 != vcpu.cpu.cr8 and apic is None:
        if cr8 & ~0xF:
            return -errno.EINVAL
        vcpu.cpu.cr8 = cr8
    vcpu.cpu.suspect_code()     # its client, and all whom that talks to, could write memory meanwhile
    complete = arch.complete_userspace_io
    if complete is not None:
        arch.complete_userspace_io = None
        # Entering the guest completes an OUT, too: only who does not go there needs a call of its own.
        if complete is not complete_io_out or arch.pio_linear_rip is not None or not wants_to_run:
            result = complete(vcpu)
            arch.pio_linear_rip = None
            if result <= 0:
                return result
    if not wants_to_run:
        return -errno.EINTR
    arch.ran = True
    if arch.steal_time.msr:
        vcpu.request_work(record_steal_time)
    if vcpu.sigset is None:
        return _vcpu_run(vcpu, req)
    with _SigsetWatch(vcpu, req):
        return _vcpu_run(vcpu, req)


def _vcpu_run(vcpu: Vcpu, req: RequestLike, begun: Callable[[Vcpu], int] | None = None) -> int:
    run, arch, resumed = vcpu.run, vcpu.arch, vcpu.vm.arch.resumed
    apic = arch.apic
    if apic is not None:
        stop, enter = partial(_must_stop, vcpu, req), partial(_enter_guest, vcpu, run, arch)
    set_reason(run, EXIT_REASON, kx.KVM_EXIT_UNKNOWN)
    while True:
        if begun is not None:
            result, begun = begun(vcpu), None
        elif req.interrupted and signal_pending(vcpu, req):
            set_reason(run, EXIT_REASON, kx.KVM_EXIT_INTR)
            arch.stat.signal_exits += 1
            return -errno.EINTR
        else:
            result = (_enter_guest(vcpu, run, arch) if apic is None
                      else irq.enter_or_block(vcpu, apic, stop, enter))
        if result <= 0:
            return result
        if run[_REQUEST_WINDOW] and events.ready_for_interrupt_injection(vcpu):
            set_reason(run, EXIT_REASON, kx.KVM_EXIT_IRQ_WINDOW_OPEN)
            arch.stat.request_irq_exits += 1
            return 0
        if vcpu.vm.dead:
            return -errno.EIO
        if not resumed.is_set():
            _wait_for_resume(vcpu, req)


def _must_stop(vcpu: Vcpu, req: RequestLike) -> bool:
    """Must a vCPU that waits in here be let out?"""
    return (vcpu.vm.dead or not vcpu.vm.arch.resumed.is_set()
            or (req.interrupted and signal_pending(vcpu, req)))


def _run_uninitialized(vcpu: Vcpu, req: RequestLike, apic: Lapic) -> int:
    def stop() -> bool:
        return vcpu.vm.dead or (req.interrupted and signal_pending(vcpu, req))

    if vcpu.sigset is None:
        return irq.run_uninitialized(vcpu, apic, req, stop)
    with _SigsetWatch(vcpu, req):
        return irq.run_uninitialized(vcpu, apic, req, stop)


def _enter_guest(vcpu: Vcpu, run: memoryview, arch: VcpuArch) -> int:
    """``vcpu_enter_guest``."""
    cpu = vcpu.cpu
    if vcpu.dirty_ring is not None and vcpu.dirty_ring.soft_full():
        set_reason(run, EXIT_REASON, kx.KVM_EXIT_DIRTY_RING_FULL)
        return 0
    if arch.triple_fault:
        arch.triple_fault = False
        set_reason(run, EXIT_REASON, kx.KVM_EXIT_SHUTDOWN)
        return 0
    if arch.requests and process_requests(vcpu):
        return 0
    if arch.event_request:
        arch.stat.req_event += 1
        events.check_and_inject_events(vcpu)
        if arch.pv_eoi.msr and arch.apic is not None:
            pv_eoi.sync_to_guest(vcpu, arch.apic)
    if arch.entry_check:
        reason = vcpu.vm.vendor.entry_failure(vcpu)
        if reason:
            cpu.cancel_injection()
            set_reason(run, EXIT_REASON, kx.KVM_EXIT_FAIL_ENTRY)
            _set_fail(run, UNION, reason, current_cpu())
            return 0
        arch.entry_check = False
    if run[_REQUEST_WINDOW] and (arch.apic is None or arch.apic.accepts_dm_intr()):
        cpu.set_interrupt_window(True)
    if arch.guest_debug:
        vcpu.vm.vendor.prepare_debugged_entry(vcpu)
    if arch.vapic_addr:
        vapic.sync_to_guest(vcpu)
    kind = cpu.run()
    arch.stat.exits[kind] += 1
    if arch.given:
        events.complete_events(vcpu)
    if arch.apic_attention:
        vapic.sync_from_guest(vcpu)
    return HANDLERS[kind](vcpu)


def process_requests(vcpu: Vcpu) -> bool:
    """Requests in the order in which they were made; one may make another.  True: the client is to be told something."""
    requests = vcpu.arch.requests
    while requests:
        requests.popleft()(vcpu)
    if kvmclock.needs_refresh(vcpu):
        requests.append(kvmclock.refresh_guest_time)
    if vcpu.arch.tpr_access_pending:
        vapic.exit_tpr_access(vcpu)
        return True
    hv = vcpu.arch.hyperv
    if hv is None or not hv.exit_pending:
        return False
    hyperv.exit_to_client(vcpu, hv)
    return True


def _post_run_save(vcpu: Vcpu) -> None:
    """``post_kvm_run_save``."""
    arch = vcpu.arch
    allowed, if_flag, cr8 = vcpu.cpu.run_state()
    ready = allowed and not events.needs_reinjection(vcpu) and not arch.exception.pending
    apic = arch.apic
    if apic is not None:
        ready = apic.chip.pic is not None or (ready and apic.accepts_dm_intr())
    _set_saved(vcpu.run, _READY, ready, if_flag, 0, cr8, arch.apic_base)


def _wait_for_resume(vcpu: Vcpu, req: RequestLike) -> None:
    vcpu.vm.vendor.vcpu_put(vcpu)
    while not vcpu.vm.arch.resumed.wait(0.05) and not req.interrupted:
        pass
    vcpu.vm.vendor.vcpu_load(vcpu)


# ---- signals ---------------------------------------------------------------------------------------------

def signal_pending(vcpu: Vcpu, req: RequestLike) -> bool:
    """Has the client's thread a signal that its KVM_SET_SIGNAL_MASK lets through?"""
    if vcpu.sigset is None:
        return True
    return vcpu.vm.host.signals_pending(req.tid, vcpu.sigset)


class _SigsetWatch:
    """While a mask of KVM_SET_SIGNAL_MASK is in force.

    FUSE tells of signals that the thread does not block, and only once for each request.  Which of the blocked
    ones the mask lets through can only be looked up, so this looks.
    """

    def __init__(self, vcpu: Vcpu, req: RequestLike) -> None:
        self._vcpu, self._req, self._done = vcpu, req, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sigset", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            if signal_pending(self._vcpu, self._req):
                self._req.interrupted = True
                self._vcpu.kick()
            if self._done.wait(SIGSET_POLL):
                return
