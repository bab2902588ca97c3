# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine checks: setup, logging and injection; both vendors."""

import errno
import struct

from test_kvm_enable_cap import BOTH, IVT

from kvmfs import vendor as vendors
from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.abi import msrs as M
from kvmfs.abi.structs import KvmX86Mce
from kvmfs.abi.x86 import CR4_MCE
from kvmfs.api.dispatch import SystemDispatcher
from kvmfs.kvm.kvm_main import Kvm
from kvmfs.kvm.mce import MCI_STATUS_AR, MCI_STATUS_S
from tests.unit.irq_machine import APIC, APIC_ON, IrqMachine, handler
from tests.unit.machine import Machine, Req

MACHINE = Machine           # that the fixture makes
ALL = (1 << 64) - 1
VAL, UC, EN, OVER = M.MCI_STATUS_VAL, M.MCI_STATUS_UC, M.MCI_STATUS_EN, M.MCI_STATUS_OVER
FATAL = VAL | UC | EN | M.MCI_STATUS_PCC


def setup(m, mcg_cap):
    return m.vcpu_ioctl(K.KVM_X86_SETUP_MCE, 1, struct.pack("<Q", mcg_cap))[0]


def inject(m, status, bank=0, mcg_status=0, addr=0x1000, misc=0x2000):
    mce = KvmX86Mce()
    mce.status, mce.bank, mce.mcg_status, mce.addr, mce.misc = status, bank, mcg_status, addr, misc
    return m.vcpu_ioctl(K.KVM_X86_SET_MCE, 1, bytes(mce))[0]


def msr(m, index):
    return m.vcpu.arch.msrs.get(index, host_initiated=True)


def bank(m, number=0):
    return tuple(msr(m, M.MSR_IA32_MC0_CTL + 4 * number + i) for i in range(4))


def supported(vendor):
    result = SystemDispatcher(Kvm(vendors.load(vendor), None), None).ioctl(Req(1, K.KVM_X86_GET_MCE_CAP_SUPPORTED))
    return struct.unpack("<Q", result)[0]


@BOTH
def test_setup(machine, vendor):
    m = machine(vendor)
    cap = supported(vendor)
    assert cap == M.MCG_CTL_P | M.MCG_SER_P | (M.MCG_CMCI_P | M.MCG_LMCE_P if vendor == "intel" else 0)
    assert msr(m, M.MSR_IA32_MCG_CAP) == 32
    assert bank(m)[0] == 0
    assert setup(m, cap) == -errno.EINVAL               # no bank
    assert setup(m, 33) == -errno.EINVAL
    assert setup(m, 10 | M.MCG_EXT_P) == -errno.EINVAL
    assert setup(m, 10 | cap | 0x0F0000) == 0
    assert msr(m, M.MSR_IA32_MCG_CAP) == 10 | cap | 0x0F0000
    assert msr(m, M.MSR_IA32_MCG_CTL) == ALL
    assert bank(m, 9)[0] == ALL
    assert msr(m, M.MSR_IA32_MC0_CTL + 40) is None


@BOTH
def test_refusals(machine, vendor):
    m = machine(vendor)
    assert setup(m, 4) == 0
    assert inject(m, FATAL, bank=4) == -errno.EINVAL
    assert inject(m, FATAL & ~VAL) == -errno.EINVAL


@BOTH
def test_uncorrected_error_is_taken(machine, vendor):
    m = machine(vendor, IVT.format(v=18) + "hlt; hlt; handler: hlt")
    assert setup(m, 4 | M.MCG_CTL_P) == 0
    m.vcpu.cpu.cr4 |= CR4_MCE
    assert m.run() == 0
    assert inject(m, FATAL, bank=1, mcg_status=M.MCG_STATUS_MCIP) == 0
    assert bank(m, 1) == (ALL, FATAL, 0x1000, 0x2000)
    assert msr(m, M.MSR_IA32_MCG_STATUS) == M.MCG_STATUS_MCIP
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert m.regs()["rip"] == m.symbols["handler"] + 1
    # Another one while the first is being handled: the machine is lost.
    assert inject(m, FATAL, bank=1, mcg_status=M.MCG_STATUS_MCIP) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_SHUTDOWN)


@BOTH
def test_guest_without_mce_shuts_down(machine, vendor):
    m = machine(vendor, "hlt")
    assert setup(m, 4) == 0
    assert inject(m, FATAL) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_SHUTDOWN)


@BOTH
def test_reporting_that_is_off(machine, vendor):
    m = machine(vendor, "hlt")
    assert setup(m, 4 | M.MCG_CTL_P) == 0
    msrs = m.vcpu.arch.msrs
    assert msrs.set(M.MSR_IA32_MCG_CTL, 0, host_initiated=True)
    assert inject(m, FATAL) == 0
    assert msrs.set(M.MSR_IA32_MCG_CTL, ALL, host_initiated=True)
    assert msrs.set(M.MSR_IA32_MC0_CTL, 0, host_initiated=True)
    assert inject(m, FATAL) == 0
    assert bank(m)[1:] == (0, 0, 0)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)


@BOTH
def test_corrected_and_ucna(machine, vendor):
    m = machine(vendor, "hlt")
    assert setup(m, 4) == 0
    assert inject(m, VAL | EN) == 0
    assert bank(m) == (ALL, VAL | EN, 0x1000, 0x2000)
    assert inject(m, VAL | EN, addr=0x3000) == 0
    assert bank(m) == (ALL, VAL | EN | OVER, 0x3000, 0x2000)
    assert inject(m, VAL | UC | EN, addr=0x4000) == 0       # UCNA: logged, no exception
    assert bank(m) == (ALL, VAL | UC | EN, 0x4000, 0x2000)
    assert inject(m, VAL | EN, addr=0x5000) == 0            # the uncorrected one stays
    assert bank(m) == (ALL, VAL | UC | EN | OVER, 0x4000, 0x2000)
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_HLT)
    assert inject(m, VAL | UC | EN | MCI_STATUS_S | MCI_STATUS_AR) == 0
    assert (m.run(), m.reason) == (0, kx.KVM_EXIT_SHUTDOWN)


def test_ucna_raises_the_interrupt_that_the_bank_asks_for():
    """CMCI: the entry of the local vector table is there once IA32_MCG_CAP says so, and each bank has its own enable."""
    m = IrqMachine("intel", APIC_ON + f"mov dword ptr [{APIC + 0x2F0:#x}], 0xa9; mov ecx, 0x287; mov eax, 0x40000000\n"
                   "xor edx, edx; wrmsr; sti; out 0xf4, al; nop; xor eax, eax; wrmsr; out 0xf4, al; nop; out 0xf4, al\n"
                   + handler(0xA9))
    try:
        assert setup(m, 10 | M.MCG_CMCI_P) == 0
        for count in (0, 1, 1):
            assert (m.run_within(), m.reason) == (0, kx.KVM_EXIT_IO)
            assert m.count(0xA9) == count
            assert inject(m, VAL | UC | EN, 7) == 0
        assert bank(m, 7)[1] == VAL | UC | EN
    finally:
        m.close()


def test_lmce_needs_the_capability(machine):
    for cap, allowed in ((0, False), (M.MCG_LMCE_P, True)):
        m = machine("intel")
        assert setup(m, 4 | cap) == 0
        msrs = m.vcpu.arch.msrs
        assert msrs.set(M.MSR_IA32_FEAT_CTL, M.FEAT_CTL_LMCE_ENABLED, host_initiated=False) is allowed
