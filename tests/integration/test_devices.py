# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CREATE_DEVICE in a real client: the descriptor comes in the struct, not as the result."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.daemon import kvmfs_run

CLIENT = """
import ctypes, errno, fcntl, os, struct, sys
kvm = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
def create(flags=0):
    data = bytearray(struct.pack("<III", 4, 77, flags))
    try:
        result = fcntl.ioctl(vm, 0xC00CAEE0, data, True)
    except OSError as error:
        return errno.errorcode[error.errno]
    assert result == 0, result
    return struct.unpack("<III", data)[1]
assert create(1) == 77
fd = create()
assert fd == vm + 1, fd
assert os.readlink(f"/proc/self/fd/{fd}").endswith("kvm-vfio")
assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR and fcntl.fcntl(fd, fcntl.F_GETFD) == 1
assert create() == "EBUSY" and create(1) == 77
for _ in range(20):                             # gone as soon as it is closed
    os.close(fd)
    assert create() == fd
number = ctypes.c_int(0)
def set_file(value, attr):
    number.value = value
    try:
        fcntl.ioctl(fd, 0x4018AEE1, struct.pack("<IIQQ", 0, 1, attr, ctypes.addressof(number)))
    except OSError as error:
        return errno.errorcode[error.errno]
assert [set_file(kvm, 1), set_file(kvm, 2), set_file(500, 1), set_file(-1, 1)] == ["EINVAL", "ENOENT", "EBADF", "EBADF"]
os.close(vm)
assert fcntl.ioctl(fd, 0x4018AEE3, struct.pack("<IIQQ", 0, 1, 1, 0)) is not None    # it keeps the VM
print("done")
"""


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_device(kvmd):
    check(subprocess.run([sys.executable, "-c", CLIENT, kvmd.node], capture_output=True, text=True, timeout=60, check=False))
    kvmd.wait_for_vms(0)


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_device_under_kvmfs_run(vendor):
    check(kvmfs_run(sys.executable, "-c", CLIENT, "/dev/kvm", options=("--vendor", vendor)))


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_device_in_a_traced_client():
    check(kvmfs_run("strace", "-f", "-o", "/dev/null", sys.executable, "-c", CLIENT, "/dev/kvm"))
