# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts and what is no ioctl: files, mappings, attributes, stale mounts, the end of a connection."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fuse_server as S
import pytest
from fuse_rig import PATIENCE, Served, ioctl, needs_fuse, served

from kvmfs.fuse import mount

pytestmark = [needs_fuse, pytest.mark.timeout(60)]
ROOT = Path(__file__).resolve().parents[2]

needs_passthrough = pytest.mark.skipif(not mount.passthrough_supported(), reason="no FUSE passthrough here")


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "mount"
    path.mkdir()
    yield str(path)
    for _ in range(3):
        try:
            mount.umount(str(path), lazy=True)
        except OSError:
            break


def error_of(call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


both_ways = pytest.mark.parametrize("late", [False, True], ids=["pyfuse3", "late"])


def shared_mmap(fd):
    """errno of mmap(2) itself: Python's would refuse a file of size 0 before it asks the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    result = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert result == ctypes.c_void_p(-1).value
    return ctypes.get_errno()


@both_ways
def test_files(place, late):
    with served("direct", place, late=late):
        assert sorted(os.listdir(place)) == ["kvm", "refused", "secret", "vcpu"]
        info = os.stat(f"{place}/kvm")
        assert stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o666
        assert (info.st_ino, info.st_size, info.st_nlink, info.st_uid) == (S.KVM_INODE, 0, 1, 0)
        assert stat.S_IMODE(os.stat(place).st_mode) == 0o555
        assert os.stat(f"{place}/vcpu").st_size == S.RUN_SIZE
        assert os.statvfs(place).f_namemax == 255
        assert error_of(os.stat, f"{place}/none") == errno.ENOENT
        assert error_of(os.open, f"{place}/refused", os.O_RDWR) == errno.EBUSY
        assert error_of(os.open, f"{place}/new", os.O_RDWR | os.O_CREAT) == errno.EPERM
        assert error_of(os.unlink, f"{place}/kvm") == errno.EPERM
        assert error_of(os.mkdir, f"{place}/dir") == errno.EPERM
        os.chmod(f"{place}/kvm", 0o660)
        os.chown(f"{place}/kvm", 0, 36)
        info = os.stat(f"{place}/kvm")
        assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o660, 36)
        assert any(place in line and "fuse.kvmfs" in line for line in Path("/proc/mounts").read_text().splitlines())


def test_opening_and_closing_need_no_pyfuse3():
    """Nor do they look different without it."""
    answers = []
    for late in (False, True):
        with served(late=late) as server:
            fd = server.open("kvm")
            info = os.stat("kvm", dir_fd=server.root)
            os.close(server.open("vcpu"))
            server.files.pop()
            answers.append([tuple(getattr(info, name) for name in dir(info) if name.startswith("st_") and name != "st_dev"),
                            error_of(server.open, "none"), error_of(server.open, "refused")])
            assert ioctl(fd, S.BEGUN)[0] == (not late)
            assert error_of(os.read, fd, 10) == errno.EINVAL
            assert ioctl(fd, S.BEGUN)[0] == 1
    assert answers[0] == answers[1]


def test_mode_bits_are_checked():
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        program = f"import os; os.setuid(65534); os.open({place!r} + '/kvm', 2); os.open({place!r} + '/secret', 2)"
        with served("direct", place):
            done = subprocess.run(["python3", "-c", program], capture_output=True, text=True, timeout=PATIENCE)
        assert "PermissionError" in done.stderr and "secret" in done.stderr, done.stderr


@both_ways
def test_node_as_a_device(late):
    with served(late=late) as server:
        fd = server.open("kvm")
        assert error_of(os.read, fd, 10) == errno.EINVAL
        assert error_of(os.pread, fd, 10, 4096) == errno.EINVAL
        assert error_of(os.write, fd, b"x") == errno.EINVAL
        assert shared_mmap(fd) == errno.ENODEV
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]
        os.close(os.open("kvm", os.O_RDWR | os.O_TRUNC, dir_fd=server.root))
        assert ioctl(fd, S.NONE) == (12, 0)
        assert ioctl(fd, S.OPENS)[0] in (1, 2)  # release is asynchronous


@needs_passthrough
@both_ways
def test_passthrough_node(late):
    with served("passthrough", late=late) as server:
        assert server.ready == "ready 1\n"
        fd, second = server.open("vcpu"), server.open("vcpu")
        with mmap.mmap(fd, S.RUN_SIZE) as page, mmap.mmap(second, S.RUN_SIZE) as other:
            page[0:4] = b"Kvm!"
            assert ioctl(fd, S.TOUCH) == (ord("K"), 0)
            assert page[100:104] == other[100:104] == b"Kvm!"
        # read and write stay the server's
        assert error_of(os.read, fd, 10) == errno.EINVAL
        assert error_of(os.write, fd, b"x") == errno.EINVAL
        assert shared_mmap(server.open("kvm")) == errno.ENODEV


@both_ways
def test_page_cache_fallback(late):
    with served("cache", late=late) as server:
        fd = server.open("vcpu")
        with mmap.mmap(fd, S.RUN_SIZE) as page:
            assert page[:5] == b"start"
            page[0:4] = b"Kvm!"
            page[S.RUN_SIZE - 1] = 7
            os.close(server.open("vcpu"))  # does not drop the mapped page
            assert page[0:4] == b"Kvm!"
            page.flush()
            assert ioctl(fd, S.TOUCH) == (ord("K"), 0)
        assert os.pread(fd, 1, S.RUN_SIZE - 1) == b"\x07"
        assert error_of(os.pwrite, fd, b"x", S.RUN_SIZE + 10) == errno.EINVAL


def test_stale_mount(place):
    server = Served("direct", place)
    try:
        assert not mount.is_stale(place)
        os.stat(place)
        os.close(server.root)
        server.root = -1
        server.process.kill()
        server.process.wait(PATIENCE)
        assert mount.is_stale(place)
        # Nothing keeps one from mounting over it; that server is dead from the start.
        second = mount.open_dev_fuse()
        mount.mount_path(second, place)
        os.close(second)
        assert mount.clear_stale(place)
        assert not mount.is_stale(place) and not mount.clear_stale(place)
        assert os.listdir(place) == []
    finally:
        server.kill()


def test_busy_umount(place):
    with served("direct", place) as server:
        fd = server.open("kvm")
        with pytest.raises(OSError, match="Files on it are open"):
            mount.umount(place)
        os.close(server.root)
        server.root = -1
        mount.umount(place, lazy=True)
        server.path = None
        assert ioctl(fd, S.NONE) == (12, 0)


@both_ways
def test_detached_mount_ends_with_its_last_descriptor(late):
    server = Served("direct", late=late)
    try:
        fd = server.open("kvm")
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("/kvm")
        os.close(server.root)
        server.root = -1
        copy = os.dup(fd)
        os.close(fd)
        server.files.clear()
        assert ioctl(copy, S.NONE) == (12, 0)
        assert server.process.poll() is None
        begin = time.monotonic()
        os.close(copy)
        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - begin < 5
    finally:
        server.kill()


def test_attach(place):
    with served() as server:
        mount.attach(server.root, place)
        server.path = place
        os.close(os.open(f"{place}/kvm", os.O_RDWR))


def test_connection_number_asks_nobody():
    with served() as server:
        number = mount.connection_number(server.root)
        assert number == os.fstat(server.open("kvm")).st_dev
        assert error_of(mount.abort_connection, 1 << 30) in (errno.ENOENT, errno.EACCES)


def test_user_namespace(tmp_path):
    """The same in a user namespace: /dev/fuse opened there, both ways of mounting, the copying fallback."""
    place = tmp_path / "mount"
    place.mkdir()
    program = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/unit")!r}]
from fuse_rig import served, ioctl
from kvmfs.fuse import mount
import fuse_server as S, mmap
assert not mount.passthrough_supported()
for path in (None, {str(place)!r}):
    with served("cache", path) as server:
        assert ioctl(server.open("kvm"), S.NONE) == (12, 0)
        with mmap.mmap(server.open("vcpu"), S.RUN_SIZE) as page:
            assert page[:5] == b"start"
print("well")
"""
    done = subprocess.run(["unshare", "-rm", sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=40)
    if "unshare failed" in done.stderr or "uid_map" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout == "well\n", done.stderr


def test_foreign_namespace_is_explained(tmp_path):
    fuse = mount.open_dev_fuse()
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from kvmfs.fuse import mount
for call in (lambda: mount.mount_path({fuse}, {str(tmp_path)!r}), lambda: mount.detached_mount({fuse}, "x")):
    try:
        call()
    except OSError as error:
        print(error.errno, "after unshare" in str(error))
"""
    try:
        done = subprocess.run(["unshare", "-rm", sys.executable, "-c", program], pass_fds=[fuse], capture_output=True,
                              text=True, timeout=PATIENCE)
    finally:
        os.close(fuse)
    if "unshare failed" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout == f"{errno.EINVAL} True\n" * 2, done.stderr


def test_errors_say_what_to_do(tmp_path):
    fd = mount.open_dev_fuse()
    try:
        with pytest.raises(FileNotFoundError, match="make it first"):
            mount.mount_path(fd, str(tmp_path / "none"))
        with pytest.raises(OSError, match="no mount point"):
            mount.umount(str(tmp_path))
        with pytest.raises(OSError, match="register descriptor 0") as caught:
            mount.backing_open(fd, 0)
        assert caught.value.errno
    finally:
        os.close(fd)
