# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs stat``: what VMs do, in numbers; like kvm_stat."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from typing import Any

from kvmfs.abi.ioctls import BY_NUMBER
from kvmfs_cli import daemons, exits
from kvmfs_cli.daemons import DaemonError
from kvmfs_cli.memory import pss

_TICK = os.sysconf("SC_CLK_TCK")
_PARTS = ("id", "reasons", "wrmsr_exits")       # of a vCPU's statistics: no numbers of their own
Numbers = dict[str, float]


def snapshot(pid: int | None, vm: int | None) -> dict[str, Numbers]:
    """Statistic by statistic, by "daemon/VM": Linux's names, exits by reason, ioctls, translation, times and memory."""
    found: dict[str, Numbers] = {}
    with daemons.chosen(pid) as connected:
        for daemon in connected:
            for one in daemon.ask("state")["vms"]:
                if vm not in (None, one["vm"]):
                    continue
                try:
                    found[f"{daemon.pid}/{one['vm']}"] = _numbers(daemon.ask("statistics", vm=one["vm"]), one["worker"])
                except (DaemonError, KeyError, TypeError, ValueError, AttributeError):
                    continue            # it has just ended; or says nonsense: workers are not trusted
    return found


def _numbers(answer: dict[str, Any], worker: int) -> Numbers:
    numbers: Counter[str] = Counter()
    for vcpu in answer["vcpus"]:
        for name, value in vcpu.items():
            if name not in _PARTS and isinstance(value, int):
                numbers[name] += value
                if name == "guest_time_ns":
                    numbers[f"vcpu{vcpu['id']}_guest_time_ns"] = value
        for reason, count in exits.by_reason(vcpu, answer["vendor"]).items():
            numbers[f"kvm_exit({reason})"] += count
    for number, count in answer["ioctls"].items():
        entry = BY_NUMBER.get(int(number))
        numbers[entry.name if entry else f"KVM_ ioctl {int(number):#x}"] += count
    return {**numbers, **answer["translation"], "guest_memory_bytes": answer["memory"],
            "worker_cpu_seconds": _cpu_seconds(worker), "worker_memory_bytes": pss(worker)}


def _cpu_seconds(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICK


def total(by_vm: dict[str, Numbers]) -> Numbers:
    """All VMs together."""
    numbers: defaultdict[str, float] = defaultdict(int)
    for one in by_vm.values():
        for name, value in one.items():
            if not name.startswith("vcpu"):
                numbers[name] += value
    return numbers


def stat(*, pid: int | None, vm: int | None, once: bool, interval: float, as_json: bool) -> None:
    """Show the numbers once, or again and again until ^C.  Raises DaemonError when that VM, or daemon, is not there."""
    from kvmfs_cli.stat_table import Screen

    if vm is not None:
        daemons.find_vm(vm, pid)
    now = snapshot(pid, vm)
    if once:
        if as_json:
            print(json.dumps({"vms": now, "total": total(now)}, indent=2))
        else:
            with Screen(live=False) as screen:
                screen.show(now, None, 1)
        return
    then = time.monotonic()
    try:
        with Screen(live=not as_json) as screen:
            while True:
                time.sleep(interval)
                before, now, elapsed = now, snapshot(pid, vm), time.monotonic() - then
                then += elapsed
                if as_json:
                    print(json.dumps({"vms": now, "total": total(now)}), flush=True)
                else:
                    screen.show(now, before, elapsed)
    except KeyboardInterrupt:
        pass
