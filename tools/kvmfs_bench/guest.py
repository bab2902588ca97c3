# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows about Linux as a guest: the same QEMU, kernel and programs on our node with -accel kvm, and with -accel tcg."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

from kvmfs_bench.model import Measure, NotMeasuredError, Plan

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/bench-guest"
QEMU, BUSYBOX = "qemu-system-x86_64", "/bin/busybox"
TIMEOUT: Final = 180
DONE: Final = "GUEST-DONE"
# name in the table, what the guest's program calls it, the target ratio
PROGRAMS: Final = (("integer operation", "integer", 1.1), ("load", "load", 1.3), ("store", "store", 1.3), ("call", "call", 1.3),
                   ("double", "double", 2.3), ("system call", "syscall", 1.3), ("page fault", "page_fault", 1.3),
                   ("context switch", "context_switch", 1.3))
_INIT: Final = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in bench) /bench-guest ;; esac
done
echo {DONE}
/bin/busybox poweroff -f
"""


@functools.cache
def _images() -> tuple[Path, Path]:
    """The kernel and an initramfs.  Raises NotMeasuredError when something is not installed."""
    kernels = sorted(Path("/boot").glob("vmlinuz-*cloud*"))
    if not kernels or not os.path.exists(BUSYBOX) or not all(map(shutil.which, (QEMU, "cpio"))):
        raise NotMeasuredError("needs qemu-system-x86 linux-image-cloud-amd64 busybox-static cpio ('make boot' installs them)")
    result = ROOT / "build/bench.cpio"
    with tempfile.TemporaryDirectory(prefix="kvmfs-bench-") as name:
        tree = Path(name)
        (tree / "bin").mkdir()
        shutil.copy(BUSYBOX, tree / "bin")
        shutil.copy(PROGRAM, tree / "bench-guest")
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        with result.open("wb") as file:
            subprocess.run("find . | cpio -o -H newc --quiet", shell=True, cwd=tree, stdout=file, check=True)
    return kernels[-1], result


def boot(accel: str, vcpus: int, append: str = "") -> tuple[float, str]:
    """Boot to the end of init and power-off; returns the seconds from QEMU's start to its end, and the console."""
    kernel, initramfs = _images()
    wrapper = [sys.executable, "-m", "kvmfs_cli", "run", "--"] if accel == "kvm" else []
    command = [*wrapper, QEMU, "-machine", f"pc,accel={accel}", "-cpu", "qemu64", "-smp", str(vcpus), "-m", "256", "-nodefaults",
               "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-kernel", str(kernel),
               "-initrd", str(initramfs), "-append", f"console=ttyS0 quiet panic=-1 {append}"]
    began = time.monotonic()
    try:
        run = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"the guest did not power off within {TIMEOUT} s") from None
    took = time.monotonic() - began
    console = run.stdout.decode(errors="replace")
    if DONE not in console or run.returncode:
        raise NotMeasuredError(f"QEMU ended with status {run.returncode}: {run.stderr.decode(errors='replace').strip()[-200:]}")
    return took, console


class Programs:
    """One boot gives a figure for each of PROGRAMS; the rows share it."""

    def __init__(self) -> None:
        self._runs: dict[str, list[dict[str, float]]] = {"kvm": [], "tcg": []}
        self._taken: defaultdict[tuple[str, str], int] = defaultdict(int)

    def figure(self, accel: str, name: str) -> Measure:
        """The next figure of ``name``, in nanoseconds."""
        def measure() -> float:
            number = self._taken[accel, name]
            self._taken[accel, name] += 1
            if number == len(self._runs[accel]):
                self._runs[accel].append(self._run(accel))
            return self._runs[accel][number][name]
        return measure

    @staticmethod
    def _run(accel: str) -> dict[str, float]:
        found = {}
        for line in boot(accel, 1, "bench")[1].splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "BENCH":
                found[words[1]] = float(words[2])
        if missing := {name for _, name, _ in PROGRAMS} - found.keys():
            raise NotMeasuredError(f"the guest did not tell {', '.join(sorted(missing))}")
        return found


def plans(quick: bool) -> list[Plan]:
    """All rows of this kind."""
    reps, programs = (1 if quick else 3), Programs()
    found = [Plan(f"guest: {shown}", "ns", programs.figure("kvm", name), "TCG", programs.figure("tcg", name), most_ratio=most,
                  repetitions=reps) for shown, name, most in PROGRAMS]
    for vcpus in (1, 2):
        found.append(Plan(f"Linux to init and power-off, {vcpus} vCPU{'s' if vcpus > 1 else ''}", "s", _seconds("kvm", vcpus),
                          "TCG", _seconds("tcg", vcpus), most_ratio=2, repetitions=reps))
    return found


def _seconds(accel: str, vcpus: int) -> Measure:
    return lambda: boot(accel, vcpus)[0]
