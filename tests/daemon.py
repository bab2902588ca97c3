# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons and `kvmfs run` for the tests that need them, and a count of what is left afterwards."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT, END_TIMEOUT = 60, 15
# Everything that the tests start carries this, so that other kvmfs on the same machine is not taken for theirs.
SESSION = f"KVMFS_TEST_SESSION={os.getpid()}"
os.environ.update([SESSION.split("=")])
TEMPORARY = Path(tempfile.gettempdir(), f"kvmfs-tests-{os.getpid()}")       # where `kvmfs run` puts its directories
if not TEMPORARY.exists():
    TEMPORARY.mkdir()
    TEMPORARY.chmod(0o1777)
    atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
ENVIRONMENT = {**os.environ, "TMPDIR": str(TEMPORARY),
               "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "tools"))}
KVMFS = [sys.executable, "-m", "kvmfs_cli"]


def skip_without_fuse(items: list[pytest.Item], directory: Path) -> None:
    """The tests below ``directory`` need root and /dev/fuse."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        for item in items:
            if directory in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))


# ---- what there is ------------------------------------------------------------------------------------------


def ours(pid: str) -> bool:
    """Whether the tests started that process, directly or not.  OSError when it is gone."""
    return SESSION.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def census() -> set[str]:
    """Every process, memfd, mount and directory of kvmfs that the tests made, by name."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if not ours(pid):       # a zombie has no environment: whoever waits for it may be long about it
                continue
            if name.startswith(("kvmd", "kvm-vm", "kvmfs")):
                found.add(f"process {pid} {name}")
            for fd in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith(("/memfd:kvm", "/memfd:kvmfs")):
                    found.add(f"memfd {target} {os.stat(f'/proc/{pid}/fd/{fd}').st_ino}")
        except OSError:
            continue
    found |= {f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines()
              if " fuse.kvmfs " in line and line.split()[4] in Kvmd.mountpoints}
    return found | {f"directory {path}" for path in TEMPORARY.glob("kvmfs-*")}


def settle(before: set[str], seconds: float = 5) -> None:
    """Assert that nothing is there, within ``seconds``, that was not there before."""
    deadline = time.monotonic() + seconds
    while (left := census() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test leaves no process, mount, memfd or directory."""
    before = census()
    yield
    settle(before)


# ---- the daemon ---------------------------------------------------------------------------------------------


class Kvmd:
    """A running daemon."""

    mountpoints: ClassVar[set[str]] = set()

    def __init__(self, directory: Path, *options: str) -> None:
        self.mountpoint = directory
        self.mountpoints.add(str(directory))
        self.node = str(directory / "kvm")
        self.log_path = directory.with_suffix(".log")
        reader, writer = os.pipe()
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvmd", "--log-level", "info", "--ready-fd", str(writer), *options, str(directory)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT, pass_fds=[writer])
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            self.ready = file.read() == b"ready\n"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def prove(self) -> None:
        """The path is kvmfs and not the machine's own node."""
        entry = [line for line in Path("/proc/self/mountinfo").read_text().splitlines()
                 if line.split()[4] == str(self.mountpoint)]
        assert entry and " fuse.kvmfs " in entry[-1], self.log
        # The answer comes from our server: KVM_GET_API_VERSION works on a regular file only here.
        assert not os.stat(self.node).st_rdev
        with open(self.node, "rb+", buffering=0) as file:
            assert os.fstat(file.fileno()).st_dev == os.stat(self.mountpoint).st_dev

    def state(self) -> dict[str, object]:
        """What the state file says."""
        result: dict[str, object] = json.loads((self.mountpoint / "state").read_text())
        return result

    def workers(self) -> list[int]:
        """The pids of the workers, in the order of the VMs' numbers."""
        vms = self.state()["vms"]
        assert isinstance(vms, list)
        return [vm["worker"] for vm in vms]

    def wait_for_vms(self, count: int, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while len(self.workers()) != count and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.workers()) == count, self.log

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """End it in order; by force when it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            subprocess.run(["umount", "-l", str(self.mountpoint)], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def start_kvmd(tmp_path: Path) -> Iterator[Callable[..., Kvmd]]:
    """A function that starts a daemon with the given options; all are ended after the test, and nothing is left."""
    before = census()
    started: list[Kvmd] = []

    def start(*options: str, name: str = "dev") -> Kvmd:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        kvmd = Kvmd(directory, *options)
        started.append(kvmd)
        assert kvmd.ready, kvmd.log
        kvmd.prove()
        return kvmd

    yield start
    for kvmd in started:
        kvmd.stop()
        assert "Traceback" not in kvmd.log, kvmd.log
    settle(before)


@pytest.fixture(params=["amd", "intel"])
def vendor(request: pytest.FixtureRequest) -> str:
    """Both vendors, one after the other."""
    return str(request.param)


@pytest.fixture
def kvmd(start_kvmd: Callable[..., Kvmd], vendor: str) -> Kvmd:
    """A daemon of that vendor."""
    return start_kvmd("--vendor", vendor)


@pytest.fixture
def node(kvmd: Kvmd) -> str:
    """The path of that daemon's node."""
    return kvmd.node


@pytest.fixture(params=["auto", "off"])
def passthrough(request: pytest.FixtureRequest) -> str:
    """kvm_run shared (where the kernel can), and copied."""
    return str(request.param)


# ---- kvmfs run, as whoever ----------------------------------------------------------------------------------


def kvmfs(*arguments: str, wrapper: Sequence[str] = (), timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """``kvmfs arguments``, optionally started by ``wrapper``."""
    return subprocess.run([*wrapper, *KVMFS, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False,
                          timeout=timeout, stdin=subprocess.DEVNULL, cwd="/")


def kvmfs_run(*command: str, options: Sequence[str] = (), wrapper: Sequence[str] = (), timeout: float = 60,
              ) -> subprocess.CompletedProcess[str]:
    """``kvmfs run options -- command``, optionally started by ``wrapper``."""
    return kvmfs("run", *options, "--", *command, wrapper=wrapper, timeout=timeout)


# Runs "$@" as user and group 1000 without capabilities in a mount namespace where /dev/fuse may be opened by all, as it
# is on other machines, and where that user can reach the checkout and Python, wherever they are.
_AS_USER = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755,dev kvmfs-test /mnt
mknod -m 666 /mnt/fuse c 10 229
mkdir /mnt/root
mount --rbind /root /mnt/root
mount -t tmpfs -o mode=755 kvmfs-test /root
for path in $REACHABLE; do
    mkdir -p "$path"
    mount --rbind "/mnt$path" "$path"
done
mount --bind /mnt/fuse /dev/fuse
exec setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all "$@"
"""


def ordinary_user() -> list[str]:
    """A wrapper that runs a command as an ordinary user."""
    paths = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, str(ROOT))} | {sys.prefix}
    below_root = " ".join(sorted(path for path in paths if path.startswith("/root/")))
    return ["env", f"REACHABLE={below_root}", "unshare", "--mount", "sh", "-c", _AS_USER, "sh"]
