# SPDX-License-Identifier: GPL-2.0-or-later
"""An example for users: tests of guests with kvmfs's pytest plugin.  ``pytest tools/examples`` runs it.

The fixtures ``kvm`` and ``kvm_node`` come from the plugin, which pytest finds when kvmfs is installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmfs.testing import Exit, Kvm

PORT = 0xE9
DEVICE = 0xA0000
MONITOR = Path(__file__).with_name("monitor.py")


def test_a_guest_writes_to_a_port(kvm: Kvm) -> None:
    """The smallest guest: real mode, one page of memory."""
    with kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, bytes.fromhex("b0 48 e6 e9 f4"))       # mov al, 'H'; out PORT, al; hlt
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        assert vcpu.run_to("HLT").written(PORT) == b"H"


@pytest.mark.kvm_vendor("intel")
def test_the_guest_sees_an_intel_cpu(kvm: Kvm) -> None:
    """CPUID 0: the vendor's name is in EBX, EDX, ECX."""
    with kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, bytes.fromhex("66 31 c0 0f a2 f4"))    # xor eax, eax; cpuid; hlt
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        vcpu.run_to("HLT")
        regs = vcpu.regs
        assert b"".join(part.to_bytes(4, "little") for part in (regs.rbx, regs.rdx, regs.rcx)) == b"GenuineIntel"


def test_a_device_of_ours(kvm: Kvm) -> None:
    """In long mode the guest doubles what an MMIO register holds."""
    register = [21]

    def device(access: Exit) -> bytes | None:
        assert access.address == DEVICE
        if access.write:
            register[0] = int.from_bytes(access.data, "little")
            return None
        return register[0].to_bytes(access.size, "little")

    with kvm.create_vm() as vm:
        vm.add_memory(0, DEVICE)
        # mov eax, [DEVICE]; add eax, eax; mov [DEVICE], eax; hlt
        vm.write(0x1000, bytes.fromhex("8b 04 25 00 00 0a 00  01 c0  89 04 25 00 00 0a 00  f4"))
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(start=0x1000, tables=0x10000)
        vcpu.run_to("HLT", device=device)
        assert register == [42]


def test_a_program_on_the_node(kvm_node: str) -> None:
    """A program of one's own, given the node's path."""
    run = subprocess.run([sys.executable, str(MONITOR), kvm_node], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout == "Hello from a guest\n", run.stderr

@pytest.mark.kvm_fault("KVM_CREATE_VCPU:ENOMEM")
def test_the_program_says_why_there_is_no_vcpu(kvm_node: str) -> None:
    """What no hardware gives on demand: the kernel has no memory for a vCPU."""
    run = subprocess.run([sys.executable, str(MONITOR), kvm_node], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (1, "monitor: KVM_CREATE_VCPU: Cannot allocate memory\n")
