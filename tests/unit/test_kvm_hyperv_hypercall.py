# SPDX-License-Identifier: GPL-2.0-or-later
"""Hyper-V's hypercalls, from 32-bit guests that call the hypercall page's instruction."""

import os
import struct

import pytest
from irq_machine import APIC_ON, DONE, IrqMachine
from test_kvm_enable_cap import BOTH, VMCALL, enable
from test_kvm_hyperv import OS_ID, show_hyperv

from kvmfs.abi import caps as C
from kvmfs.abi import exits as kx
from kvmfs.abi import hyperv as H
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.kvm import hyperv
from kvmfs.kvm.hyperv_hypercall import in_sparse_set
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import Machine

INPUT = 0x4000
FAST, VAR, REP = H.HV_HYPERCALL_FAST_BIT, 1 << H.HV_HYPERCALL_VARHEAD_OFFSET, 1 << H.HV_HYPERCALL_REP_COMP_OFFSET
INVALID = H.HV_STATUS_INVALID_HYPERCALL_INPUT
FLUSH_SPACE, FLUSH_LIST = H.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, H.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST
FLUSH_SPACE_EX, FLUSH_LIST_EX = H.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, H.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX


def call(vendor, control, first=INPUT, second=0):
    """edx:eax control word, ebx:ecx and edi:esi parameters; the result is stored at 0x3e00."""
    halves = [(value >> 32, value & 0xFFFFFFFF) for value in (control, first, second)]
    registers = zip(("edx", "eax", "ebx", "ecx", "edi", "esi"), (half for pair in halves for half in pair), strict=True)
    moves = "".join(f"mov {name}, {value:#x}\n" for name, value in registers)
    return f"{moves}{VMCALL[vendor]}\nmov [0x3e00], eax; mov [0x3e04], edx\n"


@pytest.fixture
def machine():
    made = []

    def make(vendor, source, *args, vcpus=1, os_id=OS_ID, **kwargs):
        m = IrqMachine(vendor, source, *args, vcpus=vcpus, **kwargs)
        for vcpu in m.vm.vcpus:
            show_hyperv(vcpu)
        m.vm.arch.hyperv.guest_os_id = os_id
        made.append(m)
        return m

    yield make
    for m in made:
        m.close()


def result(m):
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_IO)
    return struct.unpack("<Q", m.read(0x3E00, 8))[0]


def set_xmm(m, *halves):
    image = bytearray(m.vcpu.cpu.fxsave())
    struct.pack_into(f"<{len(halves)}Q", image, 160, *halves)
    m.vcpu.cpu.fxrstor(bytes(image))


@BOTH
@pytest.mark.parametrize(("control", "status"), [
    (0x7FFF, H.HV_STATUS_INVALID_HYPERCALL_CODE),
    (H.HVCALL_NOTIFY_LONG_SPIN_WAIT, H.HV_STATUS_SUCCESS),
    (H.HVCALL_NOTIFY_LONG_SPIN_WAIT | REP, INVALID),
    (H.HVCALL_NOTIFY_LONG_SPIN_WAIT | 1 << 27, INVALID),            # a reserved bit
    (H.HVCALL_POST_MESSAGE, INVALID),                               # there is no SynIC
    (H.HVCALL_SIGNAL_EVENT | FAST, INVALID),
    (H.HVCALL_POST_DEBUG_DATA, H.HV_STATUS_OPERATION_DENIED),
    (H.HVCALL_POST_DEBUG_DATA | FAST, H.HV_STATUS_INVALID_PARAMETER),
    (H.HV_EXT_CALL_QUERY_CAPABILITIES | FAST, H.HV_STATUS_INVALID_PARAMETER),
    (FLUSH_SPACE | VAR, INVALID), (FLUSH_SPACE | REP, INVALID), (FLUSH_LIST, INVALID), (FLUSH_SPACE_EX | REP, INVALID),
    (FLUSH_LIST_EX, INVALID), (FLUSH_SPACE_EX | VAR, INVALID), (H.HVCALL_SEND_IPI | VAR, INVALID),
    (H.HVCALL_SEND_IPI_EX | REP, INVALID), (H.HVCALL_SEND_IPI, INVALID)])
def test_statuses(machine, vendor, control, status):
    assert result(machine(vendor, call(vendor, control) + DONE)) == status


def test_who_may_not_call(machine):
    m = machine("amd", call("amd", H.HVCALL_NOTIFY_LONG_SPIN_WAIT) + DONE, os_id=0)
    assert result(m) & 0xFFFFFFFF == -1000 & 0xFFFFFFFF     # a KVM hypercall, as long as nobody says it is Hyper-V's
    plain = Machine("amd", "vmmcall; out 0xf0, al; .org 0x100; hlt")     # real mode
    show_hyperv(plain.vcpu)
    plain.vm.arch.hyperv.guest_os_id = OS_ID
    plain.write(4 * 6, struct.pack("<HH", 0x8100, 0))
    assert (plain.run(), plain.reason) == (0, kx.KVM_EXIT_HLT)          # #UD
    plain.close()


@pytest.mark.parametrize(("code", "changes"), [
    (H.HVCALL_NOTIFY_LONG_SPIN_WAIT, {"ebx": 0}), (H.HVCALL_NOTIFY_LONG_SPIN_WAIT, {"ebx": 0xFFFFFFFF}),
    (FLUSH_SPACE, {"eax": 0xFFFFFFFF & ~H.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED}),
    (FLUSH_LIST_EX, {"eax": 0xFFFFFFFF & ~H.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED}),
    (H.HVCALL_SEND_IPI, {"eax": 0xFFFFFFFF & ~H.HV_X64_CLUSTER_IPI_RECOMMENDED}),
    (H.HVCALL_SEND_IPI_EX, {"eax": 0xFFFFFFFF & ~H.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED}),
    (H.HVCALL_POST_MESSAGE, {"features": (0, 0xFFFFFFFF & ~H.HV_POST_MESSAGES, 0)}),
    (H.HVCALL_SIGNAL_EVENT, {"features": (0, 0xFFFFFFFF & ~H.HV_SIGNAL_EVENTS, 0)}),
    (H.HVCALL_RESET_DEBUG_SESSION, {"features": (0, 0xFFFFFFFF & ~H.HV_DEBUGGING, 0)}),
    (H.HV_EXT_CALL_QUERY_CAPABILITIES, {"features": (0, 0xFFFFFFFF & ~H.HV_ENABLE_EXTENDED_HYPERCALLS, 0)})])
def test_enforced_cpuid(machine, code, changes):
    m = machine("amd", call("amd", code) + DONE)
    show_hyperv(m.vcpu, **changes)
    assert enable(m, C.KVM_CAP_HYPERV_ENFORCE_CPUID, 1, node=VCPU_INODE) == 0
    assert result(m) == H.HV_STATUS_ACCESS_DENIED


def test_xmm_input_must_be_offered(machine):
    m = machine("amd", call("amd", FLUSH_SPACE | FAST, 0, H.HV_FLUSH_ALL_PROCESSORS) + DONE)
    show_hyperv(m.vcpu, features=(0, 0, 0))
    m.vcpu.arch.hyperv.enforce_cpuid = True
    assert m.run_within() == 0
    assert m.reason == kx.KVM_EXIT_SHUTDOWN                 # #UD without a handler


# ---- TLB flush -------------------------------------------------------------------------------------------

def flushed(m, parameters=b"", xmm=()):
    """Which vCPUs' TLBs the guest's call has flushed, and its result."""
    m.write(INPUT, parameters)
    set_xmm(m, *xmm)
    for vcpu in m.vm.vcpus:
        vcpu.cpu._info.flush = 0
    done = []
    for vcpu in m.vm.vcpus:
        vcpu.cpu.flush_tlb = lambda vcpu=vcpu: done.append(vcpu.index)
    status = result(m)
    return done, status


@BOTH
def test_flush_by_mask(machine, vendor):
    source = call(vendor, FLUSH_SPACE) + DONE
    for flags, mask, expected in ((0, 0b101, [0, 2]), (0, 0, [0, 1, 2]), (H.HV_FLUSH_ALL_PROCESSORS, 0b10, [0, 1, 2])):
        m = machine(vendor, source, vcpus=3)
        assert flushed(m, struct.pack("<QQQ", 0, flags, mask)) == (expected, 0)
    m = machine(vendor, call(vendor, FLUSH_SPACE | FAST, 0, 0) + DONE, vcpus=3)
    assert flushed(m, xmm=(0b110,)) == ([1, 2], 0)


@BOTH
def test_flush_of_a_list(machine, vendor):
    m = machine(vendor, call(vendor, FLUSH_LIST | 2 * REP) + DONE, vcpus=2)
    assert flushed(m, struct.pack("<QQQQQ", 0, 0, 0b10, 0x1000, 0x2003)) == ([1], 2 * REP)
    m = machine(vendor, call(vendor, FLUSH_LIST | FAST | 12 * REP, 0, 0) + DONE, vcpus=2)
    assert flushed(m, xmm=(0b10,)) == ([], INVALID)         # as many do not fit into the registers
    m = machine(vendor, call(vendor, FLUSH_LIST | 3 * REP, (1 << 20) - 24) + DONE)
    assert result(m) == INVALID                             # and here memory ends


@BOTH
def test_flush_of_a_sparse_set(machine, vendor):
    m = machine(vendor, call(vendor, FLUSH_SPACE_EX | 2 * VAR) + DONE, vcpus=3)
    m.vm.vcpus[2].arch.hyperv.vp_index = 65
    assert flushed(m, struct.pack("<QQQQQQ", 0, 0, H.HV_GENERIC_SET_SPARSE_4K, 0b11, 0b10, 0b10)) == ([1, 2], 0)
    m = machine(vendor, call(vendor, FLUSH_LIST_EX | FAST | VAR | REP, 0, 0) + DONE, vcpus=2)
    assert flushed(m, xmm=(H.HV_GENERIC_SET_SPARSE_4K, 1, 0b10, 0x5000)) == ([1], REP)
    m = machine(vendor, call(vendor, FLUSH_SPACE_EX) + DONE, vcpus=2)
    assert flushed(m, struct.pack("<QQQQ", 0, 0, H.HV_GENERIC_SET_ALL, 0)) == ([0, 1], 0)
    m = machine(vendor, call(vendor, FLUSH_SPACE_EX) + DONE, vcpus=2)
    assert flushed(m, struct.pack("<QQQQ", 0, 0, H.HV_GENERIC_SET_SPARSE_4K, 0)) == ([], 0)


def test_sparse_sets():
    assert in_sparse_set(65, 0b110, (0b10, 0))
    assert not in_sparse_set(1, 0b110, (0b10, 0))
    assert in_sparse_set(128, 0b110, (0, 1))
    assert not in_sparse_set(64 * 64, (1 << 64) - 1, (1,) * 64)


# ---- IPIs ------------------------------------------------------------------------------------------------

def requested(m):
    return [vcpu.arch.apic.irr for vcpu in m.vm.vcpus]


def enable_apics(m):
    for vcpu in m.vm.vcpus:
        with vcpu.arch.apic.chip.lock:
            vcpu.arch.apic.write_register(0xF0, 0x1FF)


BIT = 1 << 0x41


@BOTH
@pytest.mark.parametrize(("control", "first", "second", "parameters", "xmm", "expected", "status"), [
    (H.HVCALL_SEND_IPI, INPUT, 0, struct.pack("<IIQ", 0x41, 0, 0b110), (), [0, BIT, BIT], 0),
    (H.HVCALL_SEND_IPI | FAST, 0x41, 0b10, b"", (), [0, BIT, 0], 0),
    (H.HVCALL_SEND_IPI | FAST, 1 << 32 | 0x41, 0b10, b"", (), [0, 0, 0], INVALID),
    (H.HVCALL_SEND_IPI | FAST, 0xF, 0b10, b"", (), [0, 0, 0], INVALID),
    (H.HVCALL_SEND_IPI_EX | VAR, INPUT, 0, struct.pack("<IIQQQ", 0x41, 0, 0, 1, 0b101), (), [BIT, 0, BIT], 0),
    (H.HVCALL_SEND_IPI_EX | FAST | VAR, 0x41, 0, b"", (1, 0b100), [0, 0, BIT], 0),
    (H.HVCALL_SEND_IPI_EX | FAST, 0x41, H.HV_GENERIC_SET_ALL, b"", (0,), [BIT, BIT, BIT], 0),
    (H.HVCALL_SEND_IPI_EX | FAST, 0x41, 0, b"", (0,), [0, 0, 0], 0),
    (H.HVCALL_SEND_IPI_EX | FAST | 2 * VAR, 0x41, 0, b"", (1, 1), [0, 0, 0], INVALID)])
def test_ipis(machine, vendor, control, first, second, parameters, xmm, expected, status):
    m = machine(vendor, APIC_ON + call(vendor, control, first, second) + DONE, vcpus=3)
    enable_apics(m)
    m.write(INPUT, parameters)
    set_xmm(m, *xmm)
    assert result(m) == status
    assert requested(m) == expected


# ---- what the client does --------------------------------------------------------------------------------

@BOTH
def test_the_client_is_asked(machine, vendor):
    m = machine(vendor, call(vendor, H.HV_EXT_CALL_QUERY_CAPABILITIES, INPUT, 0x5000) + DONE)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_HYPERV)
    kind, _, control, _, first, second = struct.unpack_from("<IIQQQQ", m.run_page, 32)
    assert (kind, control, first, second) == (kx.KVM_EXIT_HYPERV_HCALL, H.HV_EXT_CALL_QUERY_CAPABILITIES, INPUT, 0x5000)
    struct.pack_into("<Q", m.run_page, 48, 0x700000005)
    assert result(m) == 0x700000005


def test_signals_and_messages(machine):
    for control, first in ((H.HVCALL_SIGNAL_EVENT | FAST, 77), (H.HVCALL_SIGNAL_EVENT, INPUT)):
        m = machine("amd", call("amd", control, first) + DONE + call("amd", control, first) + DONE)
        m.write(INPUT, struct.pack("<Q", 77))
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            assert m.ioctl(VM_INODE, K.KVM_HYPERV_EVENTFD, 1, struct.pack("<IiI12x", 77, fd, 0)) == (0, b"")
            assert result(m) == 0
            assert os.eventfd_read(fd) == 1
            assert m.ioctl(VM_INODE, K.KVM_HYPERV_EVENTFD, 1, struct.pack("<IiI12x", 77, -1, 1)) == (0, b"")
        finally:
            os.close(fd)
        hyperv.activate_synic(m.vcpu, dont_zero_pages=True)
        assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_HYPERV)    # a connection that the client may know
        assert struct.unpack_from("<Q", m.run_page, 56)[0] == 77
        assert result(m) == 0
    for address in (INPUT + 1, 0x40000000):
        m = machine("amd", call("amd", H.HVCALL_SIGNAL_EVENT, address) + DONE)
        assert result(m) == H.HV_STATUS_INVALID_ALIGNMENT


def test_debugger_by_hypercalls(machine):
    m = machine("amd", call("amd", H.HVCALL_RESET_DEBUG_SESSION) + DONE)
    assert m.vcpu.arch.msrs.set(M.HV_X64_MSR_SYNDBG_OPTIONS, H.HV_X64_SYNDBG_OPTION_USE_HCALLS, host_initiated=True)
    assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_HYPERV)
    assert result(m) == 0
    show_hyperv(m.vcpu)
    m.vcpu.arch.hyperv.syndbg_cap_eax = 0
    m.set_regs(rip=0x8000)
    assert result(m) == H.HV_STATUS_INVALID_HYPERCALL_CODE
