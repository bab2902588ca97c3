# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows about ioctls, exits, VMs and memory: the client in C on our node, on the machine's own, on the C server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvmfs.testing.daemon import Daemon
from kvmfs_bench.model import Measure, NotMeasuredError, Plan
from kvmfs_cli.memory import pss

ROOT = Path(__file__).resolve().parents[2]
CLIENT, SERVER = ROOT / "build/bench-client", ROOT / "build/bench-server"
REAL = "/dev/kvm"
TIMEOUT = 120
MIB = 1 << 20
WORKER = "kvm-vm:"


@dataclass(slots=True)
class Contestants:
    """The nodes that run; ``real`` is None where the machine has none."""

    ours: Daemon
    server: str
    real: str | None
    cpus: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))

    def is_ours(self) -> bool:
        """The node that is measured as ours is a regular file of a kvmfs mount, and no device."""
        return os.stat(self.ours.node).st_rdev == 0


@contextmanager
def contestants() -> Iterator[Contestants]:
    """Start our daemon and the C server.  Raises DaemonError, OSError."""
    directory = tempfile.mkdtemp(prefix="kvmfs-bench-")
    server = subprocess.Popen([SERVER, directory], stdin=subprocess.DEVNULL)
    ours = Daemon()
    try:
        node = os.path.join(directory, "kvm")
        deadline = time.monotonic() + 10
        while not os.path.exists(node) and time.monotonic() < deadline:
            time.sleep(0.01)
        found = Contestants(ours, node, REAL if _is_device(REAL) else None)
        if not found.is_ours():
            raise OSError(f"{ours.node} is not ours")
        yield found
    finally:
        ours.stop()
        server.terminate()
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _is_device(path: str) -> bool:
    try:
        return os.stat(path).st_rdev != 0 and os.access(path, os.R_OK | os.W_OK)
    except OSError:
        return False


def client(node: str, *arguments: object, server: bool = False, cpu: int | None = None) -> Measure:
    """A measurement by the client; the median that it prints."""
    command = [*(["taskset", "-c", str(cpu)] if cpu is not None else []), str(CLIENT), *(["-c"] if server else []), node,
               *map(str, arguments)]

    def measure() -> float:
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise NotMeasuredError(f"no end within {TIMEOUT} s") from None
        if run.returncode:
            raise NotMeasuredError((run.stdout + run.stderr).strip().splitlines()[-1] if run.stdout + run.stderr
                                   else f"status {run.returncode}")
        return float(json.loads(run.stdout)["median"])
    return measure


def scaled(measure: Measure, factor: float) -> Measure:
    """The same in another unit."""
    return lambda: measure() * factor


def together(node: str, what: str, count: int, vms: int) -> Measure:
    """The mean of several clients that run at once."""
    def measure() -> float:
        running = [subprocess.Popen([CLIENT, node, what, str(count)], stdout=subprocess.PIPE, text=True) for _ in range(vms)]
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in running]
        if any(process.returncode for process in running):
            raise NotMeasuredError("a client failed: " + " ".join(outputs))
        return sum(float(json.loads(output)["median"]) for output in outputs) / vms
    return measure


def plans(c: Contestants, quick: bool) -> list[Plan]:
    """All rows of this kind."""
    count, reps, cpu = (500, 1, c.cpus[-1]) if quick else (10_000, 5, c.cpus[-1])
    found = []
    for pin in (cpu, None):
        how = "pinned" if pin is not None else "free"
        for what, most in (("api_version", 1.5), ("check_extension", 1.5), ("get_regs", 3), ("get_sregs", 3), ("set_msrs", 3)):
            found.append(Plan(f"{what}, {how}", "µs", client(c.ours.node, what, count, cpu=pin), "C server",
                              client(c.server, what, count, server=True, cpu=pin), most_ratio=most, repetitions=reps))
        for what in ("pio", "mmio", "hlt"):
            found.append(_beside_real(c, f"KVM_RUN {what}, {how}", (what, count), pin, reps, 1.0 if what == "pio" else None))
    found.append(Plan("KVM_RUN pio, 4 VMs at once", "µs", together(c.ours.node, "pio", count, 4), "real node",
                      together(c.real, "pio", count, 4) if c.real else None, repetitions=reps))
    found.append(_beside_real(c, "ioeventfd: OUT in the guest", ("ioeventfd", 20), None, reps, None))
    found.append(_beside_real(c, "irqfd → guest's handler → ioeventfd", ("irqfd", max(count // 10, 100)), None, reps, None))
    found.append(_milliseconds(c, "create VM and vCPU, close; pinned", ("create", 20), cpu, reps, 15))
    found.append(_milliseconds(c, "create VM and vCPU, close; free", ("create", 20), None, reps, 15))
    for size, name, most in ((128 * MIB, "128 MiB", 5), (2048 * MIB, "2 GiB", 20)):
        found.append(_milliseconds(c, f"memory slot, {name} untouched", ("memory", 3, size, 0), None, reps, most))
        if not quick:
            found.append(_milliseconds(c, f"memory slot, {name} full", ("memory", 1, size, 1), None, 2, None))
    return found + _crowds(c, quick)


def _beside_real(c: Contestants, name: str, arguments: tuple[object, ...], cpu: int | None, reps: int, most: float | None) -> Plan:
    return Plan(name, "µs", client(c.ours.node, *arguments, cpu=cpu), "real node",
                client(c.real, *arguments, cpu=cpu) if c.real else None, most_ratio=most, repetitions=reps)


def _milliseconds(c: Contestants, name: str, arguments: tuple[object, ...], cpu: int | None, reps: int, most: float | None) -> Plan:
    return Plan(name, "ms", scaled(client(c.ours.node, *arguments, cpu=cpu), 1e-3), "real node",
                scaled(client(c.real, *arguments, cpu=cpu), 1e-3) if c.real else None, most=most, repetitions=reps)


def _crowds(c: Contestants, quick: bool) -> list[Plan]:
    found = [Plan(f"memory of each of {vms} idle VMs", "MB", idle_memory(vms, c.ours.node), most=40, repetitions=1)
             for vms in ((1, 5) if quick else (1, 50))]
    alone = client(c.ours.node, "busy", 1)
    for vms in (2,) if quick else (2, 4, 16):
        cores = min(vms, len(c.cpus))
        found.append(Plan(f"{vms} busy VMs together", "M/s", client(c.ours.node, "busy", vms), "one VM", alone,
                          least_ratio=round(cores * 0.9, 2), repetitions=1 if quick else 2))
    return found


def idle_memory(vms: int, node: str) -> Measure:
    """What the workers of so many VMs take (shared pages by their share), in MB each; guest memory is not touched."""
    def measure() -> float:
        process = subprocess.Popen([CLIENT, node, "idle", str(vms)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise NotMeasuredError("the client failed")
            workers = _workers_of(process.pid)
            return sum(map(pss, workers)) / max(len(workers), 1) / 1e6
        finally:
            process.communicate(timeout=TIMEOUT)
    return measure


def _workers_of(client_pid: int) -> list[int]:
    from kvmfs_cli import daemons

    with daemons.every() as connected:
        return [int(vm["worker"]) for daemon in connected for vm in daemon.ask("state")["vms"] if vm["process"] == client_pid]
