# SPDX-License-Identifier: GPL-2.0-or-later
"""A dirty ring is mapped shared and not executable, or not at all (kvm_vcpu_mmap), for a client under `kvmfs run`."""

from __future__ import annotations

import sys

from tests.daemon import kvmfs_run

CLIENT = """
import ctypes, errno, fcntl, os, struct, tempfile
from mmap import MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE
kvm = os.open("/dev/kvm", os.O_RDWR)
RING = 64 * 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

def mapping(fd, flags, protection, offset=RING, size=4096):
    at = libc.mmap(None, size, protection, flags, fd, offset)
    return errno.errorcode[ctypes.get_errno()] if at == ctypes.c_void_p(-1).value else "mapped"

def vcpu_of(vm):
    return fcntl.ioctl(vm, 0xAE41, 0)

vm = fcntl.ioctl(kvm, 0xAE01, 0)
fcntl.ioctl(vm, 0x4068AEA3, struct.pack("<IIQ", 192, 0, 64 << 10) + bytes(88))      # KVM_CAP_DIRTY_LOG_RING, 16 pages
vcpu = vcpu_of(vm)
print(mapping(vcpu, MAP_PRIVATE, PROT_READ), mapping(vcpu, MAP_PRIVATE, PROT_READ | PROT_EXEC),
      mapping(vcpu, MAP_SHARED, PROT_READ | PROT_EXEC), mapping(vcpu, MAP_PRIVATE, PROT_READ, RING + 15 * 4096))
print(mapping(vcpu, MAP_SHARED, PROT_READ | PROT_WRITE, RING, 64 << 10),
      mapping(vcpu, MAP_PRIVATE, PROT_READ, RING + (64 << 10)),
      mapping(vcpu, MAP_PRIVATE, PROT_READ, 0))
print(mapping(vcpu_of(fcntl.ioctl(kvm, 0xAE01, 0)), MAP_PRIVATE, PROT_READ))        # a VM without rings
with tempfile.TemporaryFile() as file:                                              # no file of a VM
    file.truncate(RING + 4096)
    print(*(mapping(fd, MAP_PRIVATE, PROT_READ) for fd in (file.fileno(), 99)))
"""


def test_private_and_executable_mappings_of_a_ring(vendor, nothing_left):
    result = kvmfs_run(sys.executable, "-c", CLIENT, options=("--vendor", vendor))
    assert result.stdout.splitlines() == ["EINVAL EINVAL EINVAL EINVAL", "mapped mapped mapped", "mapped",
                                          "mapped EBADF"], result.stderr
