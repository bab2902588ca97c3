# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of a daemon with its VMs: proportional set sizes, so that a page that several share counts once."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from kvmfs_bench.lab import JOB_TIMEOUT, Lab
from kvmfs_bench.model import MeasureError, Subject

GUEST_RAM = "/memfd:kvmfs-guest"


def pss_beside_guest_ram(smaps: Iterable[str]) -> int:
    """KiB of PSS in the lines of a /proc/PID/smaps; mappings of guest memory do not count."""
    total, counts = 0, True
    for line in smaps:
        words = line.split()
        if not words[0].endswith(":"):
            counts = GUEST_RAM not in line
        elif words[0] == "Pss:" and counts:
            total += int(words[1])
    return total


def family(root: int) -> set[int]:
    """``root`` and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, more = set(), {root}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in more}
    return found


def total_pss(root: int) -> float:
    """MB of all processes of the daemon ``root``."""
    total = 0
    for pid in family(root):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as file:
            total += pss_beside_guest_ram(file)
    return total * 1024 / 1e6


def idle_vms(lab: Lab, count: int) -> float:
    """MB that each of ``count`` idle VMs adds to what the daemon has without any.  Raises MeasureError."""
    daemon = lab.server(Subject.OURS).process.pid
    before = total_pss(daemon)
    client = subprocess.Popen(lab.command(Subject.OURS, False, "idle", count), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        line = client.stdout.readline()
        if line != f"ready {count}\n".encode():
            raise MeasureError(f"idle {count}: {line!r}")
        return (total_pss(daemon) - before) / count
    finally:
        try:
            client.communicate(timeout=JOB_TIMEOUT)
        except subprocess.TimeoutExpired:
            client.kill()
            client.communicate()
