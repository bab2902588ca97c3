# SPDX-License-Identifier: GPL-2.0-or-later
"""Is a path a KVM node, and if not, what to do."""

from __future__ import annotations

import errno
import fcntl
import os

from kvmfs.abi.exits import KVM_API_VERSION
from kvmfs.abi.ioctls import KVM_GET_API_VERSION


class NodeError(Exception):
    """It is none, or may not be used; the text says what to do."""


def check_node(path: str) -> None:
    """Open it and ask for its version.  Raises NodeError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NodeError(f"cannot open {path}: {error.strerror}{_advice(path, error.errno)}") from None
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
    except OSError as error:
        raise NodeError(f"{path} is no KVM node (KVM_GET_API_VERSION: {error.strerror}); the node of 'kvmfs mount DIRECTORY' is "
                        "DIRECTORY/kvm") from None
    finally:
        os.close(fd)
    if version != KVM_API_VERSION:
        raise NodeError(f"{path} has KVM's API version {version}: {KVM_API_VERSION} is the only one that ever was in use")


def _advice(path: str, number: int | None) -> str:
    directory = os.path.dirname(path) or "."
    return {
        errno.ENOENT: f"; 'kvmfs mount {directory}' would make it, 'kvmfs run -- PROGRAM' has one for PROGRAM",
        errno.ENOTDIR: "; the node of 'kvmfs mount DIRECTORY' is DIRECTORY/kvm",
        errno.EISDIR: f"; the node of a daemon on that directory is {os.path.join(path, 'kvm')}",
        errno.EACCES: "; its mode and group say who may, mostly group kvm: usermod -aG kvm USER, and log in again",
        errno.ENOTCONN: f"; its daemon is dead: start 'kvmfs mount {directory}' again",
        errno.ENODEV: "; its driver is gone (modprobe kvm_intel or kvm_amd)",
    }.get(number or 0, "")
