# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host must have, each thing tried rather than guessed: the checks of ``kvmfs doctor``.

A check returns a :class:`Result`.  Whatever changes the process (namespaces, being traced) happens in a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvmfs.client import notify, process
from kvmfs.client.maps import PROCMAP_QUERY
from kvmfs.client.takeover import PAGEMAP_SCAN
from kvmfs.client.tracer import Thread
from kvmfs.fuse import mount

OLDEST_KERNEL = (5, 6)
OLDEST_PYTHON = (3, 11)
CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21
PR_CAPBSET_READ = 23
VM_MEMORY = 40 << 20            # bytes that a VM takes beside its guest's memory
GUEST_SECONDS = 60
_CHILD_FAILED = 120
_libc = ctypes.CDLL(None, use_errno=True)


class Status(enum.IntEnum):
    """How a check ended, the worst last."""

    OK = 0
    DEGRADED = 1
    MISSING = 2


@dataclass(frozen=True, slots=True)
class Result:
    """``detail`` says what was found, and for what is not ok, what that costs; ``advice`` how to get it."""

    status: Status
    detail: str
    advice: str = ""


def ok(detail: str) -> Result:
    return Result(Status.OK, detail)


def degraded(detail: str, advice: str = "") -> Result:
    return Result(Status.DEGRADED, detail, advice)


def missing(detail: str, advice: str = "") -> Result:
    return Result(Status.MISSING, detail, advice)


# ---- the machine --------------------------------------------------------------------------------------------


def check_machine() -> Result:
    """x86-64."""
    machine = platform.machine()
    return ok(machine) if machine == "x86_64" else missing(f"{machine}: the engine's layout is known for x86_64 only")


def check_kernel() -> Result:
    """pidfd_getfd is the newest call without which nothing works."""
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if version < OLDEST_KERNEL:
        return missing(f"Linux {release}", "Linux 5.6 is the oldest that can work")
    return ok(f"Linux {release}" + (f", in {where}" if (where := container()) else ""))


def container() -> str:
    """What this process is confined in, as far as it shows: "Docker", "Podman", … or ""."""
    if os.path.exists("/.dockerenv"):
        return "Docker"
    if os.path.exists("/run/.containerenv"):
        return "Podman"
    with contextlib.suppress(OSError):
        for entry in Path("/proc/1/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"container="):
                return entry.partition(b"=")[2].decode(errors="replace")
    return ""


def check_memory() -> Result:
    """Memory that is free now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    text = f"{free >> 20} MiB available; a VM takes about {VM_MEMORY >> 20} MiB and its guest's memory"
    if free < 4 * VM_MEMORY:
        return degraded(text, "few VMs will fit; guests may be ended by the out-of-memory killer")
    return ok(text)


# ---- Python -------------------------------------------------------------------------------------------------


def check_python() -> Result:
    """The interpreter."""
    text = f"Python {platform.python_version()}"
    return ok(text) if sys.version_info >= OLDEST_PYTHON else missing(text, "Python 3.11 is the oldest that can work")


def check_packages() -> Result:
    """pyfuse3, trio, unicorn, capstone and the rest, of the pinned versions."""
    wrong, found = [], []
    for requirement in metadata.requires("kvmfs") or ():
        if ";" in requirement:
            continue
        name, _, pinned = requirement.partition("==")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} {pinned} is not installed")
            continue
        found.append(f"{name} {version}")
        if pinned and version != pinned:
            wrong.append(f"{name} {version} is installed, {pinned} was tested")
    if wrong:
        return degraded("; ".join(wrong), "make setup, or pip install the pinned versions")
    return ok(", ".join(found))


def check_engine() -> Result:
    """The native helper loads, and Unicorn is the build whose layout it knows: an engine is made, in a child."""
    program = "from kvmfs.cpu.engine import Engine; e = Engine(); e.create_cpu(0); e.close()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=GUEST_SECONDS)
    if run.returncode == 0:
        return ok("Unicorn's layout is the known one")
    why = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    return missing(why, "make setup builds the helper and installs the pinned Unicorn")


# ---- FUSE ---------------------------------------------------------------------------------------------------


def check_fuse() -> Result:
    """/dev/fuse can be opened."""
    try:
        os.close(mount.open_dev_fuse())
    except OSError as error:
        return missing(*_split(error.strerror or str(error)))
    return ok("/dev/fuse can be opened")


def check_mounting() -> Result:
    """A FUSE mount without a path, as each VM has one; in a user namespace when this user needs that."""
    def make() -> None:
        from kvmfs_cli import namespace

        namespace.enter()
        fuse = mount.open_dev_fuse()
        os.close(mount.detached_mount(fuse, "kvmfs-doctor"))

    why = _in_child(make)
    return ok("fsopen, fsmount") if why is None else missing(*_split(why))


def check_passthrough() -> Result:
    """kvm_run is one page that both sides map."""
    if mount.passthrough_supported():
        return ok("kvm_run is shared")
    return degraded("kvm_run is copied at each KVM_RUN, which takes a few µs",
                    "needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH, and root outside a user namespace")


# ---- reaching into clients ----------------------------------------------------------------------------------


def check_namespaces() -> Result:
    """A mount namespace, directly or through a user namespace."""
    from kvmfs_cli import namespace

    direct = _in_child(lambda: namespace.unshare(namespace.CLONE_NEWNS)) is None
    if direct:
        return ok("mount namespaces")
    if namespace.user_namespaces():
        return ok("mount namespaces within user namespaces")
    return missing("neither mount nor user namespaces: 'kvmfs run' cannot work",
                   "be root; or a kernel with CONFIG_USER_NS, and sysctl kernel.unprivileged_userns_clone=1 (Debian), "
                   "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in Docker: --privileged, or --cap-add SYS_ADMIN "
                   "with --security-opt seccomp=unconfined --security-opt apparmor=unconfined")


def check_capabilities() -> Result:
    """CAP_SYS_ADMIN and CAP_SYS_PTRACE."""
    effective = int(process.status_field(os.getpid(), "CapEff") or "0", 16)
    lacking = [name for name, bit in (("CAP_SYS_ADMIN", CAP_SYS_ADMIN), ("CAP_SYS_PTRACE", CAP_SYS_PTRACE))
               if not effective >> bit & 1]
    if not lacking:
        return ok("CAP_SYS_ADMIN, CAP_SYS_PTRACE")
    bounded = [name for name, bit in (("CAP_SYS_ADMIN", CAP_SYS_ADMIN), ("CAP_SYS_PTRACE", CAP_SYS_PTRACE))
               if _libc.prctl(PR_CAPBSET_READ, bit, 0, 0, 0) != 1]
    text = f"no {' and '.join(lacking)}: " + (
        "programs of other users cannot be served" if lacking == ["CAP_SYS_PTRACE"] else
        "'kvmfs run' works within a user namespace and serves this user's programs; 'kvmfs mount' needs root")
    if os.geteuid() == 0 and bounded:
        return degraded(text, "in Docker: " + " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in bounded))
    return degraded(text)


def check_ptrace() -> Result:
    """Descriptors are put into the client's thread by ptrace, once for each VM and vCPU."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        with Thread.seize(child):
            pass
    except OSError as error:
        return missing(f"a child cannot be traced: {error.strerror or error}",
                       "sysctl kernel.yama.ptrace_scope below 3; in Docker: --cap-add SYS_PTRACE")
    finally:
        for fd in (reader, writer):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return ok("a process can be traced")


def check_pidfd() -> Result:
    """Eventfds of clients are taken by pidfd_getfd."""
    try:
        fd = process.take_descriptor(os.getpid(), os.getpid(), 2)
    except OSError as error:
        return missing(f"pidfd_getfd: {error.strerror}",
                       "Linux 5.6; a container's seccomp profile may forbid it: in Docker --cap-add SYS_PTRACE allows it")
    os.close(fd)
    return ok("pidfd_open, pidfd_getfd")


def check_notification() -> Result:
    """Without it strace and gdb cannot be used on a client."""
    def install() -> None:
        os.close(notify.install_filter())

    why = _in_child(install)
    if why is None:
        return ok("clients may be run under strace and gdb")
    if process.status_field(os.getpid(), "Seccomp") == "2":
        return degraded(f"seccomp notification: {why}; under strace and gdb a client gets EPERM",
                        "this process is itself under a seccomp filter with a listener, or its filter forbids another")
    return degraded(f"seccomp notification: {why}; under strace and gdb a client gets EPERM",
                    "needs Linux 5.14 with CONFIG_SECCOMP_FILTER")


def check_memory_of_clients() -> Result:
    """What the kernel tells of a process's memory, beside what every kernel does."""
    cost, advice = [], []
    if not _knows("/proc/self/pagemap", PAGEMAP_SCAN):
        cost.append("guest memory is taken over more slowly (no PAGEMAP_SCAN)")
        advice.append("Linux 6.7 with CONFIG_PROC_PAGE_MONITOR")
    if not _knows("/proc/self/maps", PROCMAP_QUERY):
        cost.append("a client that moves its kvm_run mapping is noticed later (no PROCMAP_QUERY)")
        advice.append("Linux 6.11")
    try:
        name = os.listdir("/proc/self/map_files")[0]
        os.close(os.open(f"/proc/self/map_files/{name}", os.O_PATH | os.O_CLOEXEC))
    except (OSError, IndexError):
        cost.append("guest memory must not be a shared mapping without a descriptor (/proc/PID/map_files may not be used)")
        advice.append("root outside a user namespace; in Docker --cap-add SYS_ADMIN")
    if cost:
        return degraded("; ".join(cost), "; ".join(advice))
    return ok("PAGEMAP_SCAN, PROCMAP_QUERY, map_files")


def _knows(path: str, request: int) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.ioctl(file, request, bytes(104))      # a struct without a size: EINVAL where the request is known
        except OSError as error:
            return error.errno != errno.ENOTTY
    return True


# ---- all together -------------------------------------------------------------------------------------------


def check_guest() -> Result:
    """The whole way: `kvmfs run`, a VM, a guest that halts."""
    program = Path(__file__).with_name("probe_guest.py")
    command = [sys.executable, "-m", "kvmfs_cli", "run", "--", sys.executable, str(program)]
    with tempfile.TemporaryFile("w+") as out:
        try:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False,
                                    timeout=GUEST_SECONDS).returncode
        except subprocess.TimeoutExpired:
            return missing(f"a guest did not halt within {GUEST_SECONDS} s", "kvmfs run --log-level debug -- PROGRAM may show why")
        out.seek(0)
        lines = out.read().strip().splitlines() or [f"exit status {status}"]
    if status:
        return missing(lines[-1], "what is missing above is the likely cause")
    return ok(lines[-1])


def _split(text: str) -> tuple[str, str]:
    """What failed, and the advice that follows it in the texts of kvmfs.fuse.mount and of kvmfs_cli.namespace."""
    what, *advice = re.split(r"(?:\.|;) ", text, maxsplit=1)
    return what, "".join(advice)


def _in_child(action: Callable[[], None]) -> str | None:
    """Do it in a child; returns None, or the text of what was raised."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        status = _CHILD_FAILED
        try:
            action()
            status = 0
        except OSError as error:
            text = error.strerror or str(error) or errno.errorcode.get(error.errno or 0, "?")
            os.write(writer, text.encode()[:4096])
        except Exception as error:
            os.write(writer, str(error).encode()[:4096])
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        return None
    return text or (f"signal {-code}" if code < 0 else f"status {code}")


CHECKS: tuple[tuple[str, Callable[[], Result]], ...] = (
    ("machine", check_machine), ("kernel", check_kernel), ("memory", check_memory), ("python", check_python),
    ("packages", check_packages), ("engine", check_engine), ("fuse", check_fuse), ("mounting", check_mounting),
    ("passthrough", check_passthrough), ("namespaces", check_namespaces), ("capabilities", check_capabilities),
    ("ptrace", check_ptrace), ("pidfd", check_pidfd), ("seccomp notification", check_notification),
    ("client memory", check_memory_of_clients), ("guest", check_guest),
)


def run(check: Callable[[], Result]) -> Result:
    """The check's result; an exception that it did not expect counts as missing."""
    try:
        return check()
    except Exception as error:
        return missing(f"{type(error).__name__}: {error}", "this is an error in kvmfs: please report it")
