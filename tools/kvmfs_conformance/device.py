# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices made by KVM_CREATE_DEVICE; on x86 there is one, kvm-vfio."""

from __future__ import annotations

import ctypes
import errno as E
import os

from kvmfs.abi.ioctls import Level
from kvmfs.abi.structs import KvmCreateDevice, KvmDeviceAttr

from .model import Trial, case
from .wire import BAD_POINTER

VM, DEVICE = Level.VM, Level.DEVICE
VFIO, TEST = 4, 1
FILE, ADD, DEL = 1, 1, 2


@case("KVM_CREATE_DEVICE", VM, "vfio and errors", "DEVICE_CTRL")
def create_device(t: Trial) -> None:
    name = "KVM_CREATE_DEVICE"
    probe = KvmCreateDevice(type=VFIO, fd=77, flags=TEST)
    t.ok("test", t.ioctl(t.vm, name, probe))
    t.equal("which makes no descriptor", probe.fd, 77)
    for kind in (0, 1, 2, 3, 5, 100, 0xFFFFFFFF):
        t.errno(f"type {kind}", t.ioctl(t.vm, name, KvmCreateDevice(type=kind)), E.ENODEV)
    t.errno("test of type 1", t.ioctl(t.vm, name, KvmCreateDevice(type=1, flags=TEST)), E.ENODEV)
    made = KvmCreateDevice(type=VFIO)
    t.need("make it", t.ioctl(t.vm, name, made))
    t.keep(made.fd)
    t.true("named kvm-vfio", "kvm-vfio" in os.readlink(f"/proc/self/fd/{made.fd}"))
    t.errno("a second one", t.ioctl(t.vm, name, KvmCreateDevice(type=VFIO)), E.EBUSY)
    t.ok("test is still fine", t.ioctl(t.vm, name, KvmCreateDevice(type=VFIO, flags=TEST)))


def _device(t: Trial) -> int:
    made = KvmCreateDevice(type=VFIO)
    t.need("kvm-vfio", t.ioctl(t.vm, "KVM_CREATE_DEVICE", made))
    return t.keep(made.fd)


@case("KVM_HAS_DEVICE_ATTR", DEVICE, "vfio", "DEVICE_CTRL")
def has_attr(t: Trial) -> None:
    fd, name = _device(t), "KVM_HAS_DEVICE_ATTR"
    t.ok("add", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=ADD)))
    t.ok("delete", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=DEL)))
    t.errno("attribute 0", t.ioctl(fd, name, KvmDeviceAttr(group=FILE)), E.ENXIO)
    t.errno("group 0", t.ioctl(fd, name, KvmDeviceAttr(attr=ADD)), E.ENXIO)


@case("KVM_GET_DEVICE_ATTR", DEVICE, "vfio", "DEVICE_CTRL")
def get_attr(t: Trial) -> None:
    t.errno("nothing can be read", t.ioctl(_device(t), "KVM_GET_DEVICE_ATTR", KvmDeviceAttr(group=FILE, attr=ADD)), E.EPERM)


@case("KVM_SET_DEVICE_ATTR", DEVICE, "vfio", "DEVICE_CTRL")
def set_attr(t: Trial) -> None:
    fd, name = _device(t), "KVM_SET_DEVICE_ATTR"
    number = ctypes.c_int32(-1)
    at = ctypes.addressof(number)
    t.errno("no descriptor", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=ADD, addr=at)), E.EBADF)
    number.value = t.system
    t.errno("no VFIO file", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=ADD, addr=at)), E.EINVAL)
    t.errno("delete what is not there", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=DEL, addr=at)), E.ENOENT)
    t.errno("unmapped address", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=ADD, addr=BAD_POINTER)), E.EFAULT)
    t.errno("unknown attribute", t.ioctl(fd, name, KvmDeviceAttr(group=FILE, attr=9, addr=at)), E.ENXIO)
    t.errno("unknown group", t.ioctl(fd, name, KvmDeviceAttr(group=9, attr=ADD, addr=at)), E.ENXIO)
