# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_X86_SET_MSR_FILTER and the exits of KVM_CAP_X86_USER_SPACE_MSR; both vendors."""

import errno
import struct

import pytest
from fake_client import ARG
from test_kvm_enable_cap import BOTH, IVT, enable

from kvmfs.abi import caps as C
from kvmfs.abi import exits as kx
from kvmfs.abi import flags as F
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi.structs import KvmMsrFilter
from kvmfs.kvm.kvm_main import VCPU_INODE, VM_INODE
from tests.unit.machine import Machine

MACHINE = Machine           # that the fixture makes

READ, WRITE = F.KVM_MSR_FILTER_READ, F.KVM_MSR_FILTER_WRITE
UNKNOWN_MSR = 0x1234567


def set_filter(m, flags, *ranges):
    """ranges: (flags, base, nmsrs, bitmap bytes or the client's address)."""
    data = KvmMsrFilter()
    data.flags = flags
    at = ARG
    for r, (range_flags, base, nmsrs, bitmap) in zip(data.ranges, ranges, strict=False):
        r.flags, r.base, r.nmsrs, r.bitmap = range_flags, base, nmsrs, at
        if isinstance(bitmap, int):
            r.bitmap = bitmap
        else:
            m.host.memory.write(at, bitmap.ljust((nmsrs + 63) // 64 * 8, b"\0"))
            at += 0x800
    return m.ioctl(VM_INODE, K.KVM_X86_SET_MSR_FILTER, 1, bytes(data))[0]


def msr_exit(m):
    """error, reason, index, data of the exit."""
    return struct.unpack_from("<B7xIIQ", m.run_page, 32)


def answer(m, data=0, error=0):
    m.run_page[32] = error
    struct.pack_into("<Q", m.run_page, 48, data)


def test_refusals(machine):
    m = machine()
    assert set_filter(m, 2) == -errno.EINVAL
    assert set_filter(m, F.KVM_MSR_FILTER_DEFAULT_DENY) == -errno.EINVAL
    assert set_filter(m, 0) == 0
    assert set_filter(m, 0, (0, 0x10, 1, b"\0")) == -errno.EINVAL
    assert set_filter(m, 0, (4, 0x10, 1, b"\0")) == -errno.EINVAL
    assert set_filter(m, 0, (READ, 0x10, 0x600 * 8 + 1, b"\0")) == -errno.EINVAL
    assert set_filter(m, 0, (READ, 0x10, 0x600 * 8, b"\0")) == 0
    assert set_filter(m, 0, (READ, 0x10, 1, 0)) == -errno.EFAULT
    assert set_filter(m, 0, (0xFF, 0x10, 0, 0)) == 0        # a range of none is not looked at


RDMSR = "mov ecx, {msr}; rdmsr; hlt; handler: hlt"
WRMSR = "mov ecx, {msr}; mov eax, {low}; mov edx, {high}; wrmsr; hlt; handler: hlt"


@BOTH
def test_denied_without_the_capability(machine, vendor):
    m = machine(vendor, IVT.format(v=13) + RDMSR.format(msr=M.MSR_IA32_CR_PAT))
    assert set_filter(m, 0, (READ, M.MSR_IA32_CR_PAT, 1, b"\0")) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert m.regs()["rip"] == m.symbols["handler"] + 1


@BOTH
@pytest.mark.parametrize("msr", [M.MSR_IA32_CR_PAT, M.MSR_LSTAR])     # the second is read without an exit otherwise
def test_read_that_is_denied(machine, vendor, msr):
    m = machine(vendor, RDMSR.format(msr=msr))
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_FILTER)
    assert set_filter(m, 0, (READ | WRITE, msr - 1, 2, b"\x01")) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_X86_RDMSR)
    assert msr_exit(m) == (0, kx.KVM_MSR_EXIT_REASON_FILTER, msr, 0)
    answer(m, 0x1122334455667788)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    regs = m.regs()
    assert (regs["rax"], regs["rdx"]) == (0x55667788, 0x11223344)


@BOTH
def test_write_that_is_denied(machine, vendor):
    m = machine(vendor, WRMSR.format(msr=M.MSR_LSTAR, low=0x1000, high=0))
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_VALID_MASK)
    assert set_filter(m, F.KVM_MSR_FILTER_DEFAULT_DENY, (READ, M.MSR_LSTAR, 1, b"\x01")) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_X86_WRMSR)
    assert msr_exit(m) == (0, kx.KVM_MSR_EXIT_REASON_FILTER, M.MSR_LSTAR, 0x1000)
    answer(m)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert m.vcpu.cpu.lstar == 0


@BOTH
def test_error_makes_it_a_gp(machine, vendor):
    for source in (RDMSR.format(msr=UNKNOWN_MSR), WRMSR.format(msr=UNKNOWN_MSR, low=1, high=2)):
        m = machine(vendor, IVT.format(v=13) + source)
        enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_UNKNOWN)
        assert m.run() == 0
        assert msr_exit(m)[1:3] == (kx.KVM_MSR_EXIT_REASON_UNKNOWN, UNKNOWN_MSR)
        answer(m, error=1)
        assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
        assert m.regs()["rip"] == m.symbols["handler"] + 1


@BOTH
def test_reasons(machine, vendor):
    """A value that is not taken is INVAL, an MSR that nobody has UNKNOWN; only those asked for exit."""
    bad_pat = WRMSR.format(msr=M.MSR_IA32_CR_PAT, low=0xFF, high=0)
    m = machine(vendor, IVT.format(v=13) + bad_pat)
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_INVAL)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_X86_WRMSR)
    assert msr_exit(m) == (0, kx.KVM_MSR_EXIT_REASON_INVAL, M.MSR_IA32_CR_PAT, 0xFF)
    m = machine(vendor, IVT.format(v=13) + bad_pat)
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_UNKNOWN)
    assert (m.run(), m.regs()["rip"]) == (0, m.symbols["handler"] + 1)
    other = M.MSR_VM_CR if vendor == "intel" else M.MSR_IA32_FEAT_CTL
    m = machine(vendor, RDMSR.format(msr=other))
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_VALID_MASK)
    assert (m.run(), msr_exit(m)[1]) == (0, kx.KVM_MSR_EXIT_REASON_UNKNOWN)


@BOTH
def test_client_and_x2apic_are_not_filtered(machine, vendor):
    m = machine(vendor, RDMSR.format(msr=0x801))
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_FILTER | kx.KVM_MSR_EXIT_REASON_INVAL)
    assert set_filter(m, F.KVM_MSR_FILTER_DEFAULT_DENY, (READ, 0x10, 1, b"\0")) == 0
    assert (m.run(), msr_exit(m)[1]) == (0, kx.KVM_MSR_EXIT_REASON_INVAL)
    m.host.memory.write(ARG, struct.pack("<IIIIQ", 1, 0, M.MSR_IA32_CR_PAT, 0, 0))
    assert m.vcpu_ioctl(K.KVM_GET_MSRS, ARG, struct.pack("<II", 1, 0))[0] == 1


@BOTH
def test_second_vcpu_and_lifting(machine, vendor):
    m = machine(vendor, RDMSR.format(msr=M.MSR_LSTAR))
    enable(m, C.KVM_CAP_X86_USER_SPACE_MSR, kx.KVM_MSR_EXIT_REASON_FILTER)
    assert set_filter(m, 0, (READ, M.MSR_LSTAR, 1, b"\0")) == 0
    assert m.ioctl(VM_INODE, K.KVM_CREATE_VCPU, 1)[0] == VCPU_INODE + 1
    second = m.vm.vcpus[1]
    sregs = m.ioctl(VCPU_INODE, K.KVM_GET_SREGS)[1]
    assert m.ioctl(VCPU_INODE + 1, K.KVM_SET_SREGS, 1, sregs)[0] == 0
    assert m.ioctl(VCPU_INODE + 1, K.KVM_SET_REGS, 1, m.ioctl(VCPU_INODE, K.KVM_GET_REGS)[1])[0] == 0
    assert m.ioctl(VCPU_INODE + 1, K.KVM_RUN)[0] == 0
    assert struct.unpack_from("<I", second.run, 8)[0] == kx.KVM_EXIT_X86_RDMSR
    assert set_filter(m, 0) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
