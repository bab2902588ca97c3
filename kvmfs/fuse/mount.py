# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting FUSE without libfuse or fusermount, detached mounts, and what else is asked of /dev/fuse and the
kernel.

Every failure is an OSError whose text says what failed, why, and what to do; its errno is the kernel's.

In a user namespace /dev/fuse must be opened after unshare(2): the kernel compares the namespace of whoever
opened it with that of whoever mounts.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from . import protocol

FUSE_DEVICE: Final = "/dev/fuse"
FS_TYPE: Final = "fuse.kvmfs"  # what /proc/mounts shows; "fuse." and a free subtype

# <linux/mount.h>, <sys/mount.h>
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOUNT_ATTR_NOSUID: Final = 0x2
_MOUNT_ATTR_NODEV: Final = 0x4
_MOUNT_ATTR_NOEXEC: Final = 0x8
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
# System call numbers of x86-64: glibc has wrappers only since 2.36.
_SYS_STATX: Final = 332
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_STALE: Final = (errno.ENOTCONN, errno.ECONNABORTED)


def _error(number: int, what: str, advice: str = "") -> OSError:
    text = f"{what}: {os.strerror(number)}"
    return OSError(number, f"{text}. {advice}" if advice else text)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """The result, or -errno."""
    converted = [ctypes.c_long(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    return -ctypes.get_errno() if result == -1 else result


# --- /dev/fuse and mounting ---------------------------------------------------------------------------------


_NO_FUSE: Final = ("The kernel has no FUSE (CONFIG_FUSE_FS), or its module is not loaded: try 'modprobe fuse' "
                   "(modprobe is in the package kmod)")


def open_dev_fuse() -> int:
    """A new /dev/fuse descriptor (close-on-exec), good for one mount. OSError: ENOENT, EACCES, ENODEV, …"""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = {
            errno.ENOENT: f"{_NO_FUSE}; in a container, pass the device in (--device /dev/fuse)",
            errno.ENODEV: _NO_FUSE,
            errno.EACCES: "The user may not open it: try 'chmod 666 /dev/fuse', which is the usual mode",
            errno.EPERM: "A device cgroup forbids it: in a container, pass the device in (--device /dev/fuse)",
        }.get(error.errno or 0, "")
        raise _error(error.errno or errno.EIO, f"cannot open {FUSE_DEVICE}", advice) from None


def _advice(number: int) -> str:
    return {
        errno.EPERM: "Mounting needs CAP_SYS_ADMIN: be root, or use a user namespace (unshare -rm; 'kvmfs run' makes one)",
        errno.EINVAL: "In a user namespace /dev/fuse must be opened after unshare, and the ids of the caller mapped",
        errno.ENODEV: _NO_FUSE,
        errno.ENOENT: "The directory does not exist: make it first",
        errno.ENOTDIR: "FUSE mounts on a directory: give one",
        errno.EBUSY: "Something is mounted there and in use: choose another directory",
        errno.ENOTCONN: "A dead FUSE mount is there: umount -l it (clear_stale does)",
        errno.ENOSYS: "The kernel has no fsopen(2) (Linux 5.2)",
    }.get(number, "")


def mount_path(
    fd: int, path: str, *, source: str = "kvmfs", uid: int | None = None, gid: int | None = None,
) -> None:
    """Mount the /dev/fuse descriptor *fd* on the directory *path*, for all users, with the kernel checking
    mode bits.

    uid, gid  the owner in the kernel's eyes (mapped in the user namespace; default: the caller's effective
              ids).
    A dead mount that is there already is no error, it is mounted over: clear_stale first.
    OSError: EPERM without CAP_SYS_ADMIN over the mount namespace, EINVAL, ENOENT, ENOTDIR, …
    """
    options = (
        f"fd={fd},rootmode=40000,user_id={os.geteuid() if uid is None else uid},"
        f"group_id={os.getegid() if gid is None else gid},allow_other,default_permissions"
    )
    result: int = _libc.mount(
        source.encode(), os.fsencode(path), FS_TYPE.encode(), ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC),
        options.encode(),
    )
    if result:
        number = ctypes.get_errno()
        raise _error(number, f"cannot mount FUSE on {path}", _advice(number))


def detached_mount(fd: int, source: str, *, uid: int | None = None, gid: int | None = None) -> int:
    """Mount the /dev/fuse descriptor *fd* without a path.

    → an O_PATH descriptor (close-on-exec) of the mount's root, for openat(2) and `attach`. The mount ends with the
    last of it and of the files opened on it; the server's read then gets ENODEV. OSError: as mount_path,
    ENOSYS before Linux 5.2.
    """
    context = _syscall(_SYS_FSOPEN, b"fuse", _FSOPEN_CLOEXEC)
    if context < 0:
        raise _error(-context, "cannot make a detached FUSE mount (fsopen)", _advice(-context))
    try:
        strings = {
            "source": source, "subtype": FS_TYPE.partition(".")[2], "fd": str(fd), "rootmode": "40000",
            "user_id": str(os.geteuid() if uid is None else uid),
            "group_id": str(os.getegid() if gid is None else gid),
        }
        for key, value in strings.items():
            _fsconfig(context, _FSCONFIG_SET_STRING, key, value)
        for key in ("allow_other", "default_permissions"):
            _fsconfig(context, _FSCONFIG_SET_FLAG, key, None)
        _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None)
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        mount = _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        if mount < 0:
            raise _error(-mount, "cannot make a detached FUSE mount (fsmount)", _advice(-mount))
        return mount
    finally:
        os.close(context)


def _fsconfig(context: int, command: int, key: str | None, value: str | None) -> None:
    result = _syscall(
        _SYS_FSCONFIG, context, command, None if key is None else key.encode(),
        None if value is None else value.encode(), 0,
    )
    if result < 0:
        what = "create" if key is None else key
        raise _error(-result, f"cannot make a detached FUSE mount (fsconfig {what}{_kernel_log(context)})",
                     _advice(-result))


def _kernel_log(context: int) -> str:
    """What the kernel wrote into the file-system context about a failure."""
    try:
        return ": " + os.read(context, 1024).decode(errors="replace").strip()
    except OSError:
        return ""


def attach(mount_fd: int, path: str) -> None:
    """Put a detached mount at *path*, a directory. OSError: EPERM, ENOENT, ENOTDIR, …"""
    result = _syscall(_SYS_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)
    if result < 0:
        raise _error(-result, f"cannot attach the FUSE mount at {path}", _advice(-result))


def umount(path: str, *, lazy: bool = False) -> None:
    """Unmount *path*. lazy: it vanishes now and ends when its last file is closed. OSError: EBUSY, EINVAL,
    EPERM, …"""
    if _libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)):
        number = ctypes.get_errno()
        advice = {
            errno.EBUSY: "Files on it are open: end their users (fuser -vm shows them), or unmount lazily",
            errno.EINVAL: "It is no mount point",
            errno.EPERM: "Unmounting needs CAP_SYS_ADMIN: be root",
        }.get(number, "")
        raise _error(number, f"cannot unmount {path}", advice)


def is_stale(path: str) -> bool:
    """Whether *path* is a FUSE mount whose server is gone.

    Asks the server of a living mount (so never call it in the serving process). Attributes do not tell: the
    kernel answers those of a dead mount from its cache.
    """
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in _STALE
    return False


def clear_stale(path: str) -> bool:
    """Unmount dead FUSE mounts from *path*, also several over each other. → whether there was one."""
    found = False
    while is_stale(path):
        umount(path, lazy=True)
        found = True
    return found


# --- connections --------------------------------------------------------------------------------------------


def connection_number(fd: int) -> int:
    """The number of the FUSE connection behind *fd* (a detached mount's or a file's descriptor), as fusectl
    names it.

    Never asks the server. OSError as statx(2).
    """
    buffer = ctypes.create_string_buffer(256)
    result = _syscall(_SYS_STATX, fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, ctypes.addressof(buffer))
    if result < 0:
        raise _error(-result, f"cannot find the FUSE connection of descriptor {fd}")
    # struct statx: stx_dev_minor at 140. The number is the super block's device, whose major is 0.
    return int.from_bytes(buffer.raw[140:144], "little")


def abort_connection(number: int, control: str = "/sys/fs/fuse/connections") -> None:
    """End a FUSE connection by force: every call that waits for its server returns. For a server that hangs.

    OSError: ENOENT when there is no such connection or fusectl is not mounted, EACCES.
    """
    try:
        Path(control, str(number), "abort").write_text("1")
    except OSError as error:
        advice = ""
        if error.errno == errno.ENOENT:
            advice = f"It has ended already, or the control file system is missing: mount -t fusectl none {control}"
        raise _error(error.errno or errno.EIO, f"cannot abort FUSE connection {number}", advice) from None


# --- passthrough --------------------------------------------------------------------------------------------


def backing_open(fuse_fd: int, fd: int) -> int:
    """Register the file *fd* as a backing file of the connection *fuse_fd*, after its INIT. → the id for
    set_backing.

    Whoever calls this keeps the connection open as long as it keeps *fuse_fd*: close it when the server dies,
    or the clients of a dead server wait for ever.
    OSError: EPERM without CAP_SYS_ADMIN in the initial user namespace or when INIT did not agree on
    passthrough, ENOTTY before Linux 6.9, EBADF, EOPNOTSUPP, ELOOP (a stacked file system).
    """
    argument = bytearray(protocol.BACKING_MAP.pack(fd, 0, 0))
    try:
        backing_id: int = fcntl.ioctl(fuse_fd, protocol.FUSE_DEV_IOC_BACKING_OPEN, argument, True)
        return backing_id
    except OSError as error:
        advice = {
            errno.EPERM: "Passthrough needs CAP_SYS_ADMIN in the initial user namespace and an INIT that agreed on it: "
                         "use the copying fallback",
            errno.ENOTTY: "The kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH): use the copying "
                          "fallback",
        }.get(error.errno or 0, "")
        raise _error(error.errno or errno.EIO, f"cannot register descriptor {fd} for passthrough", advice) from None


def backing_close(fuse_fd: int, backing_id: int) -> None:
    """Give *backing_id* back. Files that are open on it stay as they are. OSError: ENOENT, EPERM."""
    try:
        fcntl.ioctl(fuse_fd, protocol.FUSE_DEV_IOC_BACKING_CLOSE, backing_id.to_bytes(4, "little", signed=True))
    except OSError as error:
        raise _error(error.errno or errno.EIO, f"cannot give the passthrough id {backing_id} back") from None


def passthrough_supported() -> bool:
    """Whether this process can register backing files on this kernel: tried on a mount of its own that has no
    path."""
    try:
        fd = open_dev_fuse()
    except OSError:
        return False
    memfd = os.memfd_create("kvmfs-probe", os.MFD_CLOEXEC)
    mount = -1
    try:
        mount = detached_mount(fd, "kvmfs-probe")
        # The kernel has queued INIT by now; nothing else can come, as nobody opens anything on the mount.
        request = os.read(fd, protocol.BUFFER_SIZE)
        (_length, opcode, unique, *_rest) = protocol.IN_HEADER.unpack_from(request)
        if opcode != protocol.FUSE_INIT or not protocol.init_offers_passthrough(request):
            return False
        os.write(fd, protocol.init_reply(unique, passthrough=True))
        backing_close(fd, backing_open(fd, memfd))
    except OSError:
        return False
    else:
        return True
    finally:
        for descriptor in (mount, fd, memfd):
            if descriptor >= 0:
                os.close(descriptor)
