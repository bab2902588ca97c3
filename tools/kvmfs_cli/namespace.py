# SPDX-License-Identifier: GPL-2.0-or-later
"""A private mount namespace in which a node stands at /dev/kvm."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NOEXEC, MS_REMOUNT = 1, 2, 8, 0x20
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x1000, 0x2000, 0x4000, 1 << 18
MNT_DETACH = 2
DEV_KVM = "/dev/kvm"

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """No private namespace could be made; the text says what to do."""


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    if _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount of {source} on {target}: {os.strerror(code)}")


def detach(target: str) -> None:
    """Unmount ``target``; what is in use of it stays until it is not.  OSError."""
    if _libc.umount2(target.encode(), MNT_DETACH) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"umount of {target}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    if _libc.unshare(flags) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def user_namespaces() -> bool:
    """Whether this user may make a user namespace: tried in a child."""
    pid = os.fork()
    if pid == 0:
        os._exit(_libc.unshare(CLONE_NEWUSER) != 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def enter() -> bool:
    """Enter a private mount namespace; without privilege also a user namespace that maps the own user only.

    Returns whether a user namespace was needed.  Raises NamespaceError.  The process must have one thread.
    """
    uid, gid = os.geteuid(), os.getegid()
    user = False
    try:
        unshare(CLONE_NEWNS)
    except PermissionError:
        user = True
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
        except OSError as error:
            raise NamespaceError(
                f"this user may not make a user namespace ({error.strerror}); run as root, or allow it: "
                "sysctl kernel.unprivileged_userns_clone=1 (Debian), "
                "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces; in a container its seccomp "
                "profile, in a chroot the kernel forbids it") from None
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1\n")
        _write("/proc/self/gid_map", f"{gid} {gid} 1\n")
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NamespaceError("/ is no mount point, as in a chroot: before entering it, mount --bind its directory over itself"
                             ) from None
    return user


def place_node(node: str) -> None:
    """Put ``node`` over /dev/kvm; where there is no /dev/kvm, in a /dev of this namespace's own."""
    if not os.path.exists(DEV_KVM):
        _private_dev()
    mount(node, DEV_KVM, None, MS_BIND)


def _private_dev() -> None:
    """A tmpfs on /dev that shows everything the old one had, and an empty file ``kvm``."""
    new = tempfile.mkdtemp(prefix="kvmfs-dev-")
    try:
        mount("kvmfs-dev", new, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=4k")
        for entry in os.scandir("/dev"):
            target = os.path.join(new, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
                continue
            directory = stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode)
            if directory:
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
            try:
                mount(entry.path, target, None, MS_BIND | MS_REC)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EACCES):
                    raise
        os.close(os.open(os.path.join(new, "kvm"), os.O_CREAT | os.O_WRONLY, 0o600))
        mount(new, "/dev", None, MS_MOVE)
    finally:
        try:
            os.rmdir(new)
        except OSError:
            pass
