# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_PRE_FAULT_MEMORY, and what EFAULT of KVM_RUN leaves in kvm_run (KVM_CAP_MEMORY_FAULT_INFO)."""

import os
import struct

import pytest

from kvmfs.abi import exits as kx
from kvmfs.abi import ioctls as K
from kvmfs.kvm import pre_fault
from kvmfs.kvm.kvm_main import VCPU_INODE
from tests.unit.machine import RAM, Machine, Req, error

PAGE = 4096


@pytest.fixture
def machine():
    """1 MiB at 0 without its page 16, and 1 MiB at 2 MiB."""
    m = Machine("amd", holes=(16 * PAGE,))
    assert m.region(1, 0, 2 << 20, 1 << 20, 0) == 0
    yield m
    m.close()


def left(machine, gpa, size, flags=0):
    result, data = machine.vcpu_ioctl(K.KVM_PRE_FAULT_MEMORY, 1, struct.pack("<8Q", gpa, size, flags, 1, 2, 3, 4, 5))
    assert result or struct.unpack("<8Q", data)[2:] == (flags, 1, 2, 3, 4, 5)
    return result or struct.unpack("<8Q", data)[:2]


@pytest.mark.parametrize(("gpa", "size", "flags", "outcome"), [
    (0x5000, 0, 0, "EINVAL"), (0x5000, PAGE, 1, "EINVAL"), (0x5001, PAGE, 0, "EINVAL"), (0x5000, 100, 0, "EINVAL"),
    (-PAGE & (1 << 64) - 1, PAGE, 0, "EINVAL"), (-PAGE & (1 << 64) - 1, 2 * PAGE, 0, "EINVAL"),
    (RAM, PAGE, 0, "ENOENT"), (1 << 52, PAGE, 0, "ENOENT"), (1 << 60, PAGE, 1, "EINVAL"),
    (16 * PAGE, PAGE, 0, "EFAULT"), (16 * PAGE, 4 * PAGE, 0, "EFAULT"),
    (0, 4 * PAGE, 0, (4 * PAGE, 0)), (14 * PAGE, 4 * PAGE, 0, (16 * PAGE, 2 * PAGE)),
    (RAM - PAGE, 3 * PAGE, 0, (RAM, 2 * PAGE)), (2 << 20, 1 << 20, 0, ((2 << 20) + 16 * PAGE, (1 << 20) - 16 * PAGE))])
def test_ranges(machine, gpa, size, flags, outcome):
    assert left(machine, gpa, size, flags) == (error(outcome) if isinstance(outcome, str) else outcome)


def test_pages_are_there_afterwards(machine):
    before = os.fstat(machine.host.fd).st_blocks
    left(machine, 0x40000, 0x20000)
    assert (os.fstat(machine.host.fd).st_blocks - before) * 512 >= 0x20000


def test_slots_beside_each_other(machine):
    assert machine.region(2, 0, 3 << 20, 1 << 20, 0) == 0
    assert left(machine, (3 << 20) - PAGE, 2 * PAGE) == ((3 << 20) + PAGE, 0)


def test_a_signal(machine, monkeypatch):
    req = Req(VCPU_INODE, K.KVM_PRE_FAULT_MEMORY)
    monkeypatch.setattr(pre_fault, "CHUNK", PAGE)
    real = pre_fault._populate

    def and_signal(*arguments):
        req.interrupted = True
        return real(*arguments)

    monkeypatch.setattr(pre_fault, "_populate", and_signal)
    assert pre_fault.pre_fault_memory(machine.vcpu, req, 0, 4 * PAGE, 0) == (PAGE, 3 * PAGE)
    with pytest.raises(OSError, match="Interrupted"):
        pre_fault.pre_fault_memory(machine.vcpu, req, 0, 4 * PAGE, 0)


@pytest.mark.parametrize("vendor", ["amd", "intel"])
@pytest.mark.parametrize("source", ["mov al, [0xa000]", "mov [0xa000], al"])
def test_what_efault_says(vendor, source):
    """A plain VM's fault has no KVM_EXIT_MEMORY_FAULT: that is for private memory."""
    m = Machine(vendor, source, holes=(0xa000,))
    try:
        struct.pack_into("<I", m.run_page, 8, kx.KVM_EXIT_HLT)
        assert (m.run(), m.reason) == (error("EFAULT"), kx.KVM_EXIT_UNKNOWN)
    finally:
        m.close()
