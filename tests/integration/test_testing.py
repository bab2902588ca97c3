# SPDX-License-Identifier: GPL-2.0-or-later
"""kvmfs.testing: the pytest plugin as its users have it, and the client object on our node."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmfs.testing import Kvm, KvmCallError
from tests.daemon import ENVIRONMENT, ROOT, kvmfs_run, ordinary_user

EXAMPLES = ROOT / "tools" / "examples"


def pytest_in(directory: Path, *options: str, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A test run of its own."""
    return subprocess.run([*wrapper, sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider",
                           "--rootdir", str(directory), *options, str(directory)],
                          env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100,
                          stdin=subprocess.DEVNULL, cwd="/")


def write(directory: Path, text: str) -> Path:
    (directory / "test_it.py").write_text(text)
    return directory


def test_the_example_project(nothing_left):
    result = pytest_in(EXAMPLES)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


NODE_TEST = """
import os

def test_node(kvm_node):
    print("NODE", kvm_node, os.stat(kvm_node).st_rdev)
"""


def test_the_node_is_private(tmp_path, nothing_left):
    """Neither the machine's own, nor one that others can see for long."""
    result = pytest_in(write(tmp_path, NODE_TEST), "-s")
    assert "/kvmfs-pytest-" in result.stdout and "/node/kvm 0\n" in result.stdout, result.stdout


def test_under_kvmfs_run(tmp_path, nothing_left):
    """An ordinary user's way: the node is then /dev/kvm, and it is ours."""
    write(tmp_path, NODE_TEST)
    result = kvmfs_run(sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path))
    assert "NODE /dev/kvm 0\n" in result.stdout, result.stdout + result.stderr


MARKED = """
import pytest
from kvmfs.abi.structs import KvmCpuidEntry2

def name(kvm):
    leaf = next(entry for entry in kvm.supported_cpuid() if entry.function == 0)
    return b"".join(part.to_bytes(4, "little") for part in (leaf.ebx, leaf.edx, leaf.ecx))

@pytest.mark.kvm_vendor("amd")
class TestAmd:
    def test_amd(self, kvm):
        assert name(kvm) == b"AuthenticAMD"

    @pytest.mark.kvm_vendor("intel")
    def test_the_closest_marker_counts(self, kvm):
        assert name(kvm) == b"GenuineIntel"

@pytest.mark.kvm_profile("linux-5.15")
def test_an_older_kernel(kvm):
    assert kvm.check_extension("KVM_CAP_EXIT_HYPERCALL") and not kvm.check_extension("KVM_CAP_X86_NOTIFY_VMEXIT")
    assert not kvm.check_extension("KVM_CAP_USER_MEMORY2")
"""


def test_markers(tmp_path, nothing_left):
    result = pytest_in(write(tmp_path, MARKED))
    assert "3 passed" in result.stdout, result.stdout


def test_markers_and_a_given_node(tmp_path, node):
    result = pytest_in(write(tmp_path, MARKED), "--kvm-node", node)
    assert "3 skipped" in result.stdout and node in result.stdout, result.stdout


def test_where_there_can_be_no_node(tmp_path):
    """The tests are skipped, and the reason is the doctor's."""
    write(tmp_path, NODE_TEST)
    os.chmod(tmp_path.parent, 0o755)
    result = pytest_in(tmp_path, wrapper=["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse; exec "$@"', "sh"])
    assert result.returncode == 0 and "1 skipped" in result.stdout, result.stdout
    assert "no KVM node: " in result.stdout and "kvmfs doctor" in result.stdout


def test_an_ordinary_user_is_told_the_way():
    with tempfile.TemporaryDirectory(prefix="user-", dir="/tmp") as name:       # wherever this run's own directories are
        Path(name).chmod(0o755)
        result = pytest_in(write(Path(name), NODE_TEST), wrapper=ordinary_user())
    assert "1 skipped" in result.stdout and "kvmfs run -- pytest" in result.stdout, result.stdout + result.stderr


# ---- the client object --------------------------------------------------------------------------------------


@pytest.fixture
def kvm(node):
    with Kvm(node) as client:
        yield client


def test_errors_name_the_call(kvm):
    with kvm.create_vm() as vm, pytest.raises(KvmCallError, match="KVM_CREATE_VCPU: Invalid argument") as caught:
        vm.create_vcpu(1 << 20)
    assert caught.value.errno == errno.EINVAL and caught.value.call == "KVM_CREATE_VCPU"


def test_no_kvm_at_all(tmp_path):
    (tmp_path / "kvm").touch()
    with pytest.raises(RuntimeError, match="is no KVM"):
        Kvm(tmp_path / "kvm")


def test_msrs(kvm):
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.set_msr(0x174, 0x10)
        assert vcpu.get_msr(0x174) == 0x10
        with pytest.raises(KvmCallError, match="0x12345"):
            vcpu.get_msr(0x12345)
        with pytest.raises(KvmCallError):
            vcpu.set_msr(0x12345, 1)


def test_another_end_than_awaited(kvm):
    with kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, bytes.fromhex("0f 0b"))        # ud2 in real mode: without an IVT a triple fault is near
        vm.write(0x18, bytes.fromhex("00 20 00 00"))    # the vector of #UD
        vm.write(0x2000, b"\xf4")
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        with pytest.raises(AssertionError, match="the guest ended with HLT at rip 0x2001, not with SHUTDOWN"):
            vcpu.run_to("SHUTDOWN")


def test_protected_mode_and_memory(kvm):
    with kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.add_memory(0x100000, 0x1000)
        # mov eax, 0x12345678; mov [0x100000], eax; hlt
        vm.write(0x1000, bytes.fromhex("b8 78 56 34 12 a3 00 00 10 00 f4"))
        vcpu = vm.create_vcpu()
        vcpu.set_protected_mode(start=0x1000)
        assert [str(one) for one in vcpu.run_to("HLT")] == ["HLT"]
        assert vm.read(0x100000, 4) == bytes.fromhex("78 56 34 12")
        vm.remove_memory(1)
        vcpu.set_protected_mode(start=0x1000)
        assert [str(one) for one in vcpu.run_to("HLT")] == ["MMIO 0x100000 write 78 56 34 12", "HLT"]
        with pytest.raises(IndexError):
            vm.read(0x100000, 4)


def test_a_guest_that_does_not_end(kvm):
    with kvm.create_vm() as vm:
        vm.add_memory(0, 0x10000)
        vm.write(0x1000, bytes.fromhex("e6 80 eb fc"))      # again: out 0x80, al; jmp again
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(start=0x1000)
        with pytest.raises(AssertionError, match="10 exits and no HLT; the last was IO 0x80 write 00"):
            vcpu.run_to("HLT", limit=10)
