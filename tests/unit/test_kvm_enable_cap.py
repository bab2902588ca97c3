# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_ENABLE_CAP: what can be enabled, and what it then changes; both vendors."""

import errno
import os
import struct
import threading
import time

import pytest

from kvmfs.abi import caps as C
from kvmfs.abi import cpuid as CP
from kvmfs.abi import exits as kx
from kvmfs.abi import flags as F
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.kvm import caps, enable_cap
from kvmfs.kvm.cpuid import CpuidEntry, CpuidTable
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import CODE, Machine

MACHINE = Machine           # that the fixture makes
BOTH = pytest.mark.parametrize("vendor", ["amd", "intel"])
VMCALL = {"amd": "vmmcall", "intel": "vmcall"}


def enable(m, cap, argument=0, flags=0, node=VM_INODE):
    return m.ioctl(node, K.KVM_ENABLE_CAP, 1, struct.pack("<II4Q64x", cap, flags, argument, 0, 0, 0))[0]


def guest_cpuid(m, *features):
    """Give the guest a CPUID with just these features of leaf 1."""
    ecx = sum(f.mask for f in features)
    m.vcpu.arch.cpuid = CpuidTable([CpuidEntry(0, 0, 0, 1, 0, 0, 0), CpuidEntry(1, 0, 0, 0, 0, ecx, 0)])


def test_what_is_advertised_can_be_enabled():
    for cap in enable_cap.VM_CAPS:
        assert cap in caps.SUPPORTED, cap
    assert caps.SUPPORTED[C.KVM_CAP_DISABLE_QUIRKS2] == enable_cap.SUPPORTED_QUIRKS


def test_refusals(machine):
    m = machine()
    assert enable(m, C.KVM_CAP_EXCEPTION_PAYLOAD, 1, flags=1) == -errno.EINVAL
    assert enable(m, 9999) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, 8) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_EXIT_HYPERCALL, 1 << 5) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_X86_DISABLE_EXITS, 1 << 4) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_X86_DISABLE_EXITS, F.KVM_X86_DISABLE_EXITS_PAUSE) == 0
    assert enable(m, C.KVM_CAP_DISABLE_QUIRKS2, 1 << 63) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_DISABLE_QUIRKS, 1 << 63) == 0
    assert m.vm.arch.disabled_quirks == 0
    assert enable(m, C.KVM_CAP_EXCEPTION_PAYLOAD, 1, node=VCPU_INODE) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1, flags=1, node=VCPU_INODE) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1, node=VCPU_INODE) == 0


def test_max_vcpu_id():
    from tests.unit.test_kvm_x86 import Machine as _M
    m = _M()
    try:
        # The first vCPU has settled it.
        assert enable(m, C.KVM_CAP_MAX_VCPU_ID, 4097) == -errno.EINVAL
        assert enable(m, C.KVM_CAP_MAX_VCPU_ID, 2) == -errno.EINVAL
        assert enable(m, C.KVM_CAP_MAX_VCPU_ID, 4096) == 0
        m.vm.arch.max_vcpu_ids = 2
        assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 2)[0] == -errno.EINVAL
        assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
        assert m.ioctl(VM_INODE, K.KVM_SET_BOOT_CPU_ID, 0)[0] == -errno.EBUSY
    finally:
        m.close()


def test_boot_cpu_id_and_mmu_pages(machine):
    m = machine()
    m.vm.created_vcpus = 0
    assert m.ioctl(VM_INODE, K.KVM_SET_BOOT_CPU_ID, 4097)[0] == -errno.EINVAL
    assert m.ioctl(VM_INODE, K.KVM_SET_BOOT_CPU_ID, 1)[0] == 0
    m.vm.created_vcpus = 1
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    assert [v.arch.apic_base >> 8 & 1 for v in m.vm.vcpus] == [1, 1]
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 2)[0] == VCPU_INODE + 2
    assert not m.vm.vcpus[2].arch.apic_base >> 8 & 1
    assert m.ioctl(VM_INODE, K.KVM_SET_NR_MMU_PAGES, 63)[0] == -errno.EINVAL
    assert m.ioctl(VM_INODE, K.KVM_SET_NR_MMU_PAGES, 64)[0] == 0


@BOTH
def test_exception_payload(machine, vendor):
    m = machine(vendor)
    events = m.events()
    assert not events.flags & kx.KVM_VCPUEVENT_VALID_PAYLOAD
    events.flags = kx.KVM_VCPUEVENT_VALID_PAYLOAD
    assert m.set_events(events) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_EXCEPTION_PAYLOAD, 1) == 0
    events.exception.pending, events.exception.nr = 1, 14
    events.exception.has_error_code, events.exception.error_code = 1, 2
    events.exception_has_payload, events.exception_payload = 1, 0x1234
    assert m.set_events(events) == 0
    got = m.events()
    assert (got.exception.pending, got.exception.injected, got.exception_has_payload) == (1, 0, 1)
    assert (got.exception_payload, m.sregs().cr2) == (0x1234, 0)


@BOTH
def test_triple_fault_event(machine, vendor):
    m = machine(vendor, "hlt")
    events = m.events()
    events.flags, events.triple_fault.pending = kx.KVM_VCPUEVENT_VALID_TRIPLE_FAULT, 1
    assert m.set_events(events) == -errno.EINVAL
    assert enable(m, C.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1) == 0
    assert m.set_events(events) == 0
    assert m.events().triple_fault.pending == 1
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_SHUTDOWN)


@BOTH
def test_quirk_out_7e(machine, vendor):
    m = machine(vendor, "out 0x7e, al; out 0x7e, al; hlt")
    assert (m.run(), m.regs()["rip"]) == (0, CODE + 2)
    assert enable(m, C.KVM_CAP_DISABLE_QUIRKS2, F.KVM_X86_QUIRK_OUT_7E_INC_RIP) == 0
    assert (m.run(), m.reason, m.regs()["rip"]) == (0, kx.KVM_EXIT_IO, CODE + 2)
    assert (m.run(), m.reason, m.regs()["rip"]) == (0, kx.KVM_EXIT_HLT, CODE + 5)


IVT = "mov word ptr [{v}*4], offset handler; mov word ptr [{v}*4+2], 0;"


@BOTH
def test_quirk_fix_hypercall_insn(machine, vendor):
    other = VMCALL["intel" if vendor == "amd" else "amd"]
    source = IVT.format(v=6) + f"mov eax, 1; call_: {other}; hlt; handler: hlt"
    m = machine(vendor, source)
    assert enable(m, C.KVM_CAP_DISABLE_QUIRKS, F.KVM_X86_QUIRK_FIX_HYPERCALL_INSN) == 0
    before = m.read(m.symbols["call_"], 3)
    assert m.run() == 0
    assert m.regs()["rip"] == m.symbols["handler"] + 1
    assert m.read(m.symbols["call_"], 3) == before
    m = machine(vendor, source)
    assert m.run() == 0
    assert (m.regs()["rip"], m.regs()["rax"]) == (m.symbols["handler"], 0)


@BOTH
def test_quirk_mwait(machine, vendor):
    source = IVT.format(v=6) + "monitor; hlt; handler: hlt"
    m = machine(vendor, source)
    assert (m.run(), m.regs()["rip"]) == (0, m.symbols["handler"])
    m = machine(vendor, source)
    assert enable(m, C.KVM_CAP_DISABLE_QUIRKS, F.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS) == 0
    assert (m.run(), m.regs()["rip"]) == (0, m.symbols["handler"] + 1)
    m = machine(vendor, source)
    enable(m, C.KVM_CAP_DISABLE_QUIRKS, F.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    guest_cpuid(m, CP.X86_FEATURE_MWAIT)
    assert (m.run(), m.regs()["rip"]) == (0, m.symbols["handler"])


@BOTH
def test_quirk_misc_enable(machine, vendor):
    m = machine(vendor)
    msrs, host = m.vcpu.arch.msrs, {"host_initiated": True}
    old = msrs.get(M.MSR_IA32_MISC_ENABLE, **host)
    enable(m, C.KVM_CAP_DISABLE_QUIRKS, F.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    assert not msrs.set(M.MSR_IA32_MISC_ENABLE, old | M.MSR_IA32_MISC_ENABLE_MWAIT, **host)
    guest_cpuid(m, CP.X86_FEATURE_XMM3)
    assert msrs.set(M.MSR_IA32_MISC_ENABLE, old | M.MSR_IA32_MISC_ENABLE_MWAIT, **host)
    m.vcpu.arch.update_cpuid(m.vcpu)
    assert m.vcpu.arch.cpuid.has(CP.X86_FEATURE_MWAIT)
    assert msrs.set(M.MSR_IA32_MISC_ENABLE, old, **host)
    m.vcpu.arch.update_cpuid(m.vcpu)
    assert not m.vcpu.arch.cpuid.has(CP.X86_FEATURE_MWAIT)


@BOTH
def test_quirk_stuff_feature_msrs(machine, vendor):
    m = machine(vendor)
    enable(m, C.KVM_CAP_DISABLE_QUIRKS2, F.KVM_X86_QUIRK_STUFF_FEATURE_MSRS)
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    for index in (M.MSR_IA32_UCODE_REV, M.MSR_PLATFORM_INFO):
        values = [v.arch.msrs.get(index, host_initiated=True) for v in m.vm.vcpus]
        assert values[0] and not values[1]


@BOTH
def test_msr_platform_info(machine, vendor):
    m = machine(vendor, IVT.format(v=13) + f"mov ecx, {M.MSR_PLATFORM_INFO}; rdmsr; hlt; handler: hlt")
    assert enable(m, C.KVM_CAP_MSR_PLATFORM_INFO, 0) == 0
    assert (m.run(), m.regs()["rip"]) == (0, m.symbols["handler"] + 1)
    assert m.vcpu.arch.msrs.get(M.MSR_PLATFORM_INFO, host_initiated=True)


@BOTH
def test_exit_hypercall(machine, vendor):
    source = f"mov eax, 12; mov ebx, 0x3000; mov ecx, 2; mov edx, 0x10; {VMCALL[vendor]}; hlt"
    m = machine(vendor, source)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert m.regs()["rax"] == 2**32 - 1000
    m = machine(vendor, source)
    assert enable(m, C.KVM_CAP_EXIT_HYPERCALL, enable_cap.HYPERCALL_EXITS) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HYPERCALL)
    fields = struct.unpack_from("<7QQQ", m.run_page, 32)
    assert (fields[:4], fields[8]) == ((12, 0x3000, 2, 0x10), 0)
    struct.pack_into("<Q", m.run_page, 88, 0xFFFF_FFFF_FFFF_FFEA)
    assert (m.run(), m.reason, m.regs()["rax"]) == (0, kx.KVM_EXIT_HLT, 0xFFFFFFEA)


@BOTH
def test_exit_hypercall_arguments(machine, vendor):
    m = machine(vendor, f"mov eax, 12; mov ebx, 0x3001; mov ecx, 2; {VMCALL[vendor]}; hlt")
    enable(m, C.KVM_CAP_EXIT_HYPERCALL, enable_cap.HYPERCALL_EXITS)
    assert (m.run(), m.reason, m.regs()["rax"]) == (0, kx.KVM_EXIT_HLT, 2**32 - 22)


@BOTH
def test_hlt_without_exit(machine, vendor):
    m = machine(vendor, "hlt; mov al, 7; out 0x10, al; hlt; hlt")
    assert enable(m, C.KVM_CAP_X86_DISABLE_EXITS, F.KVM_X86_DISABLE_EXITS_HLT) == 0
    results = []
    runner = threading.Thread(target=lambda: results.append(m.run()))
    runner.start()
    time.sleep(0.05)
    assert runner.is_alive()
    assert m.vcpu.request is not None
    m.vcpu.kick()                       # the guest goes on
    runner.join(10)
    assert results == [0]
    assert m.io()[:3] == (1, 1, 0x10)
    # A signal ends a halted guest's KVM_RUN.
    runner = threading.Thread(target=lambda: results.append(m.run()))
    runner.start()
    time.sleep(0.05)
    m.vcpu.request.interrupted = True
    m.vcpu.kick()
    runner.join(10)
    assert results == [0, -errno.EINTR]
    assert m.regs()["rip"] == CODE + 6


@BOTH
def test_interrupt_wakes_a_halted_guest(machine, vendor):
    """The interrupt is given in the KVM_RUN after: the guest has been woken for it already."""
    m = machine(vendor, IVT.format(v=0x20) + "sti; hlt; out 0x10, al; hlt; handler: mov al, 9; iret")
    enable(m, C.KVM_CAP_X86_DISABLE_EXITS, F.KVM_X86_DISABLE_EXITS_HLT)
    m.run_page[0] = 1                   # request_interrupt_window: nothing halts while the client waits for it
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_IRQ_WINDOW_OPEN)
    m.run_page[0] = 0
    assert m.vcpu_ioctl(K.KVM_INTERRUPT, 1, struct.pack("<I", 0x20)) == (0, b"")
    assert m.run() == 0
    assert m.io() == (1, 1, 0x10, 1, b"\x09")


@BOTH
def test_exit_on_emulation_failure(machine, vendor):
    m = machine(vendor, "ljmp 0xf000, 0x0")
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, 0, 0, 0x80000, 0) == 0
    assert enable(m, C.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_INTERNAL_ERROR)
    assert not m.events().exception.injected
    suberror, ndata, flags, *info = struct.unpack_from("<IIQ5Q", m.run_page, 32)
    assert (suberror, ndata, flags) == (kx.KVM_INTERNAL_ERROR_EMULATION, 6, 0)      # there are no bytes to show
    assert info == ([0x400, 0x100000014, 0xF0000, 0, 0] if vendor == "amd" else [48, 0x184, 0, 0, 0])


@BOTH
@pytest.mark.parametrize("source", ["fld dword ptr [0xf000]", "fstp dword ptr [0xf000]", "movss xmm1, dword ptr [0xf000]",
                                    "movd dword ptr [0xf000], xmm1", "ldmxcsr dword ptr [0xf000]"])
def test_mmio_by_an_instruction_that_kvm_does_not_emulate(machine, vendor, source):
    """Linux's emulator has no FPU loads and stores and few of SSE: KVM_EXIT_INTERNAL_ERROR, rip at the instruction."""
    write = source.startswith(("fstp", "movd "))
    m = machine(vendor, f"mov eax, cr4; or eax, 0x200; mov cr4, eax; at: {source}; out 0x10, al; hlt")
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, 0, 0, 0xF000, 0) == 0
    assert enable(m, C.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_INTERNAL_ERROR)
    suberror, ndata, flags, size, code = struct.unpack_from("<IIQB15s", m.run_page, 32)
    assert (suberror, ndata, flags, size) == (kx.KVM_INTERNAL_ERROR_EMULATION, 8, 1, 15)
    at = m.symbols["at"]
    assert code == os.pread(m.host.fd, 15, at) and m.regs()["rip"] == at
    info = struct.unpack_from("<5Q", m.run_page, 64)
    assert info == ((0x400, 0x100000006 if write else 0x100000004, 0xF000, 0, 0) if vendor == "amd"
                    else (48, 0x182 if write else 0x181, 0, 0, 0))


@BOTH
@pytest.mark.parametrize(("source", "size", "is_write"), [
    ("fnstcw word ptr [0xf000]", 2, 1), ("movups xmmword ptr [0xf000], xmm0", 8, 1), ("movdqu xmm0, xmmword ptr [0xf000]", 8, 0),
    ("mov ax, word ptr [0xf000]", 2, 0), ("add word ptr [0xf000], 5", 2, 0),
    ("movnti dword ptr [0xf000], eax", 4, 1), ("bts word ptr [0xf000], 1", 2, 0), ("call word ptr [0xf000]", 2, 0)])
def test_mmio_by_an_instruction_that_kvm_emulates(machine, vendor, source, size, is_write):
    m = machine(vendor, f"mov eax, cr4; or eax, 0x200; mov cr4, eax; {source}; out 0x10, al; hlt")
    assert m.region(0, 0, 0, 0, 0) == 0
    assert m.region(0, 0, 0, 0xF000, 0) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_MMIO)
    gpa, length, written = struct.unpack_from("<Q8xIB", m.run_page, 32)
    assert (gpa, length, written) == (0xF000, size, is_write)
