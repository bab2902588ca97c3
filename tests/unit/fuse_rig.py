# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts fuse_server.py on a mount that this process made, as the daemon does it for a worker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_server import RUN_SIZE

from kvmfs.fuse import mount

SERVER = Path(__file__).with_name("fuse_server.py")
PATIENCE = 15.0

_libc = ctypes.CDLL(None, use_errno=True)


def _usable() -> bool:
    try:
        fd = mount.open_dev_fuse()
        try:
            os.close(mount.detached_mount(fd, "kvmfs-test"))
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


needs_fuse = pytest.mark.skipif(not _usable(), reason="cannot mount FUSE here (/dev/fuse, CAP_SYS_ADMIN)")


def ioctl(fd: int, cmd: int, arg: object = 0) -> tuple[int, int]:
    """The bare system call, not retried by Python: (result, errno)."""
    ctypes.set_errno(0)
    given = ctypes.c_ulong(arg) if isinstance(arg, int) else arg
    result = _libc.ioctl(fd, ctypes.c_ulong(cmd), given)
    return result, ctypes.get_errno()


class Served:
    """A serving process, and a mount descriptor to open its files on."""

    def __init__(self, mode: str, path: str | None = None, *, late: bool = False) -> None:
        fuse = mount.open_dev_fuse()
        memfd = os.memfd_create("kvmfs-test")
        os.ftruncate(memfd, RUN_SIZE)
        if path is None:
            self.root = mount.detached_mount(fuse, "kvmfs-test")
        else:
            mount.mount_path(fuse, path, source="kvmfs-test")
            self.root = -1
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(fuse), str(memfd), mode, *["late"] * late], pass_fds=[fuse, memfd],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        # A connection lives as long as any descriptor of it: only the server may have one.
        os.close(fuse)
        os.close(memfd)
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        if path is not None:
            self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.files: list[int] = []

    def open(self, name: str) -> int:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self.root)
        self.files.append(fd)
        return fd

    def close(self) -> tuple[str, str]:
        """Close everything; the server must end by itself. → its output and its complaints."""
        for fd in self.files:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.files.clear()
        if self.root >= 0:
            os.close(self.root)
            self.root = -1
        if self.path is not None:
            mount.umount(self.path)
            self.path = None
        return self.process.communicate(timeout=PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)
        for fd in self.files:
            with contextlib.suppress(OSError):
                os.close(fd)
        if self.root >= 0:
            os.close(self.root)
        if self.path is not None:
            with contextlib.suppress(OSError):
                mount.umount(self.path, lazy=True)


@contextlib.contextmanager
def served(mode: str = "direct", path: str | None = None, *, quiet: bool = True, late: bool = False) -> Iterator[Served]:
    """A server for the block; at its end it must leave cleanly, and without a complaint when *quiet*."""
    server = Served(mode, path, late=late)
    try:
        yield server
        output, complaints = server.close()
        assert output.split() == ["end", "returned"], complaints
        assert server.process.returncode == 0
        assert not quiet or not complaints, complaints
    finally:
        server.kill()
