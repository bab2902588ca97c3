# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors of KVM_GET_STATS_FD in a real client."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmfs.testing import Kvm
from tests.daemon import kvmfs_run

CLIENT = """
import errno, fcntl, os, subprocess, sys
def fails(call, *args):
    try:
        call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
kvm = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
vcpu = fcntl.ioctl(vm, 0xAE41, 7)
files = [fcntl.ioctl(fd, 0xAECE, 0) for fd in (vm, vcpu, vcpu)]
assert files == list(range(vcpu + 1, vcpu + 4)), files
for fd, name in zip(files, ("kvm-vm-stats", "kvm-vcpu-stats:7", "kvm-vcpu-stats:7")):
    assert os.readlink(f"/proc/self/fd/{fd}").endswith(name)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert fails(os.write, fd, b"x") == "EBADF"
    assert fails(fcntl.ioctl, fd, 0xAE80, 0) == "ENOTTY"
    assert fails(fcntl.ioctl, fd, 0xAECE, 0) == "ENOTTY"
    whole = os.pread(fd, 1 << 20, 0)
    assert os.read(fd, 30) + os.read(fd, 1 << 20) == whole and os.read(fd, 8) == b""
    assert os.pread(fd, 7, 101) == whole[101:108] and os.pread(fd, 10, len(whole) - 3) == whole[-3:]
os.close(vm), os.close(vcpu), os.close(files[1])
child = f"import os; print(os.pread({files[2]}, 48, 24).strip(bytes(1)).decode(), len(os.pread({files[0]}, 9999, 0)))"
print(subprocess.check_output([sys.executable, "-c", child], pass_fds=files[:1] + files[2:], text=True), end="")
"""


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    name, size = result.stdout.split()
    assert name.startswith("kvm-") and name.endswith("/vcpu-7") and int(size) == 1152


def test_stats(kvmd):
    check(subprocess.run([sys.executable, "-c", CLIENT, kvmd.node], capture_output=True, text=True, timeout=60, check=False))
    kvmd.wait_for_vms(0)


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_stats_under_kvmfs_run(vendor):
    check(kvmfs_run(sys.executable, "-c", CLIENT, "/dev/kvm", options=("--vendor", vendor)))


def test_the_files_of_debugfs(kvmd):
    """stats/ in the mount: sums, a directory for each VM, one for each vCPU; gone with the VM."""
    stats = kvmd.mountpoint / "stats"
    with Kvm(kvmd.node) as kvm:
        with kvm.create_vm() as vm:
            vm.add_memory(0, 0x10000)
            vm.write(0x1000, bytes.fromhex("e6 80 e6 80 f4"))       # out 0x80, al, twice; hlt
            for _ in range(2):
                vcpu = vm.create_vcpu()
                vcpu.set_real_mode(start=0x1000)
                vcpu.run_to("HLT")
            directory, = (entry for entry in stats.iterdir() if entry.is_dir())
            assert directory.name == f"{os.getpid()}-0"
            assert {entry.name for entry in directory.iterdir() if entry.is_dir()} == {"vcpu0", "vcpu1"}
            assert [(directory / where / "io_exits").read_text() for where in ("vcpu0", "vcpu1", ".")] == ["2\n", "2\n", "4\n"]
            assert (stats / "io_exits").read_text() == "4\n"
            times = [int((directory / where / "guest_time_ns").read_text()) for where in ("vcpu0", "vcpu1", ".")]
            assert all(times) and times[0] + times[1] == times[2]
            assert int((directory / "tb_translated").read_text()) == int((stats / "tb_translated").read_text()) > 0
            assert (directory / "remote_tlb_flush").read_text() == "0\n"
            assert not (directory / "vcpu0/tb_translated").exists()
            for wrong in ("nothing", f"{directory.name}/vcpu7", f"{directory.name}/vcpu0/nothing", "1-5"):
                assert not (stats / wrong).exists()
            with pytest.raises(OSError, match=r"denied|not permitted"):
                (stats / "exits").unlink()
        kvmd.wait_for_vms(0)
        assert (stats / "io_exits").read_text() == "0\n"
        assert not directory.exists()
