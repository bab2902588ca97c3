# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CREATE_DEVICE and kvm-vfio."""

import os
import struct

import pytest

from kvmfs.abi import ioctls as K
from kvmfs.kvm.kvm_main import DEVICE_INODE, VM_INODE
from tests.unit.fake_client import ARG
from tests.unit.machine import Machine, error

VFIO, TEST = 4, 1
FILE, ADD, DEL = 1, 1, 2


@pytest.fixture(params=["amd", "intel"])
def machine(request):
    machine = Machine(request.param)
    yield machine
    machine.close()


def create(machine, kind=VFIO, flags=0, data=True):
    raw = struct.pack("<III", kind, 77, flags)
    machine.host.memory.write(ARG, raw)
    return machine.ioctl(VM_INODE, K.KVM_CREATE_DEVICE, ARG, raw if data else b"")[0]


def attr(machine, cmd, group=FILE, attr=ADD, address=ARG + 64, tid=1):
    return machine.ioctl(DEVICE_INODE, cmd, ARG, struct.pack("<IIQQ", 0, group, attr, address), tid)[0]


@pytest.mark.parametrize("data", [True, False])     # as kvmfs run passes it on: without
def test_create(machine, data):
    for kind in (0, 1, 2, 3, 5, 1 << 31):
        assert create(machine, kind, data=data) == create(machine, kind, TEST, data) == error("ENODEV")
    assert create(machine, flags=TEST, data=data) == 0
    assert machine.host.memory.read(ARG + 4, 4) == struct.pack("<I", 77)
    assert create(machine, data=data) == 0
    assert machine.host.memory.read(ARG + 4, 4) == struct.pack("<I", DEVICE_INODE)
    assert create(machine, data=data) == error("EBUSY") and create(machine, flags=TEST) == 0
    machine.vm.vfio.release()                       # closed
    assert create(machine, data=data) == 0


def test_bad_pointer(machine):
    assert machine.ioctl(VM_INODE, K.KVM_CREATE_DEVICE, 8)[0] == error("EFAULT")


def test_attributes(machine):
    assert attr(machine, K.KVM_HAS_DEVICE_ATTR) == attr(machine, K.KVM_HAS_DEVICE_ATTR, attr=DEL) == 0
    for cmd in (K.KVM_HAS_DEVICE_ATTR, K.KVM_SET_DEVICE_ATTR):
        assert attr(machine, cmd, group=0) == attr(machine, cmd, attr=0) == attr(machine, cmd, attr=3) == error("ENXIO")
    assert attr(machine, K.KVM_GET_DEVICE_ATTR) == attr(machine, K.KVM_GET_DEVICE_ATTR, group=9) == error("EPERM")
    assert attr(machine, K.KVM_SET_DEVICE_ATTR, address=8) == error("EFAULT")
    eventfd, file = os.eventfd(0), os.open("/", os.O_RDONLY)
    for fd in (eventfd, file):
        machine.host.memory.write(ARG + 64, struct.pack("<i", fd))
        assert attr(machine, K.KVM_SET_DEVICE_ATTR) == error("EINVAL")
        assert attr(machine, K.KVM_SET_DEVICE_ATTR, attr=DEL) == error("ENOENT")
        os.close(fd)
    machine.host.memory.write(ARG + 64, struct.pack("<i", -1))
    assert attr(machine, K.KVM_SET_DEVICE_ATTR) == attr(machine, K.KVM_SET_DEVICE_ATTR, attr=DEL) == error("EBADF")


def test_other_ioctls(machine):
    for cmd in (K.KVM_RUN, K.KVM_CREATE_VCPU, K.KVM_CHECK_EXTENSION, 0xAE55):
        assert machine.ioctl(DEVICE_INODE, cmd)[0] == error("ENOTTY")
    assert attr(machine, K.KVM_HAS_DEVICE_ATTR, tid=1000) == error("EIO")
