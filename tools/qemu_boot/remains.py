# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left of kvmfs when a QEMU has ended: processes, mounts, directories; in a daemon that goes on, descriptors, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "tools"))}
PATIENCE = 15       # seconds in which everything is to be gone


class LeftError(Exception):
    """Something is left; the text names it."""


def settle(left: Callable[[], Counter[str]]) -> None:
    """Wait until ``left`` counts nothing any more.  Raises LeftError."""
    deadline = time.monotonic() + PATIENCE
    while found := left():
        if time.monotonic() > deadline:
            raise LeftError(f"left after {PATIENCE} s: {', '.join(sorted(found.elements()))}")
        time.sleep(0.05)


def marked(marker: str) -> list[int]:
    """The processes whose environment has ``marker``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def private(marker: str, temporary: Path) -> Counter[str]:
    """What is there of a `kvmfs run` that was started with ``marker`` in its environment and ``temporary`` as TMPDIR."""
    found: Counter[str] = Counter()
    for pid in marked(marker):
        try:
            found[f"process {pid} {Path(f'/proc/{pid}/comm').read_text().strip()}"] += 1
        except OSError:
            continue
    found.update(f"directory {path}" for path in temporary.glob("kvmfs-*"))
    found.update(f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {temporary}/" in line)
    return found


def _kind(target: str) -> str:
    """A descriptor's target without what differs from one to the next of its kind."""
    return target.partition("[")[0] if target.startswith(("socket:", "pipe:")) else target


class Node:
    """A daemon of its own with a node that many programs use, one after the other.  A context manager."""

    def __init__(self, vendor: str, directory: Path) -> None:
        self._directory = directory / "node"
        self._directory.mkdir(exist_ok=True)
        self.path = self._directory / "kvm"
        self._marker = f"KVMFS_NODE={uuid.uuid4()}"
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvmd", "--log-level", "warning", "--vendor", vendor, "--ready-fd", str(writer),
             str(self._directory)],
            env={**ENVIRONMENT, **dict([self._marker.split("=")])}, stdin=subprocess.DEVNULL, pass_fds=[writer])
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            if file.read() != b"ready\n":
                raise LeftError("the daemon did not start")

    def census(self) -> Counter[str]:
        """The daemon's VMs, processes, descriptors (memfds among them) and mounts, each kind with its number."""
        found: Counter[str] = Counter()
        vms = json.loads((self._directory / "state").read_text())["vms"]
        found["VM"] += len(vms)
        for process in marked(self._marker):
            try:
                found["process"] += 1
                for descriptor in os.listdir(f"/proc/{process}/fd"):
                    found[_kind(os.readlink(f"/proc/{process}/fd/{descriptor}"))] += 1
            except OSError:
                continue
        found.update(f"mount {line}" for line in Path(f"/proc/{self._process.pid}/mountinfo").read_text().splitlines()
                     if f" {self._directory}" in line)
        return found

    def settle(self, before: Counter[str]) -> None:
        """Wait until nothing is there that was not ``before``.  Raises LeftError."""
        settle(lambda: self.census() - before)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            subprocess.run(["umount", "-l", str(self._directory)], stderr=subprocess.DEVNULL, check=False)
            raise LeftError("the daemon did not end") from None
