# SPDX-License-Identifier: GPL-2.0-or-later
"""`make boot`: Linux from an initramfs and from a virtio disk, to a shell and power-off, with -accel tcg and both vendors; a table.

TCG comes before and after the vendors, and the mean of its times is what theirs are compared with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from qemu_boot import cases, images
from qemu_boot.guest import ROOT, Guest, GuestError
from qemu_boot.remains import LeftError

VENDORS = ("amd", "intel")


class Times(NamedTuple):
    """Seconds from QEMU's start to the guest's shell, and to QEMU's end after its power-off."""

    up: float
    end: float


def power_cycle(vendor: str | None, directory: Path, *, cpus: int, disk: bool) -> Times:
    """One boot.  Raises GuestError, AssertionError, LeftError."""
    devices = cases.virtio("pc", images.disk(directory)) if disk else []
    arguments = [*cases.linux(directory), *devices, "-smp", str(cpus)]
    begin = time.monotonic()
    with Guest(vendor, arguments) as guest:
        line = guest.up(180)
        up = time.monotonic() - begin
        assert f" {cpus} CPUs" in line and line.endswith(", disk") == disk, line
        assert vendor is None or "kvm-clock" in line, line
        guest.power_off()
        return Times(up, time.monotonic() - begin)


def row(image: str, subject: str, times: Times, tcg: Times | None = None) -> str:
    """A line of the table."""
    ratios = "" if tcg is None else f"{times.up / tcg.up:10.2f} {times.end / tcg.end:12.2f}"
    return f"{image:10} {subject:6} {times.up:9.1f} s {times.end:9.1f} s {ratios}".rstrip()


def measure(image: str, *, cpus: int, disk: bool) -> list[str]:
    """All boots of one image; its part of the table."""
    found: list[tuple[str, Times]] = []
    for subject in ("tcg", *VENDORS, "tcg"):
        with tempfile.TemporaryDirectory(prefix="boot-", dir=ROOT / "build") as directory:
            times = power_cycle(None if subject == "tcg" else subject, Path(directory), cpus=cpus, disk=disk)
        found.append((subject, times))
        print(f"{image}, {subject}: to the shell {times.up:.1f} s, to power-off {times.end:.1f} s", flush=True)
    tcg = Times(*map(mean, zip(*(times for subject, times in found if subject == "tcg"), strict=True)))
    return [row(image, "tcg", tcg), *(row(image, subject, times, tcg) for subject, times in found if subject != "tcg")]


def main() -> int:
    """Boot everything, print the table; the exit status is 1 when a boot failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    try:
        lines = [line for image, disk in (("initramfs", False), ("disk", True))
                 for line in measure(image, cpus=options.cpus, disk=disk)]
    except (images.Missing, GuestError, LeftError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        print(f"boot: {error}", file=sys.stderr)
        return 1
    print(f"\nQEMU, machine pc, {options.cpus} vCPUs\n"
          f"{'image':10} {'accel':6} {'to the shell':>11} {'power-off':>10} {'shell/tcg':>11} {'power-off/tcg':>13}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
