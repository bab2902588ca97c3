# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs stat``: what VMs do, in numbers; like kvm_stat."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmfs.abi.ioctls import BY_NUMBER
from kvmfs_cli import daemons
from kvmfs_cli.daemons import DaemonError
from kvmfs_cli.memory import pss

_TICK = os.sysconf("SC_CLK_TCK")
Numbers = dict[str, float]


def snapshot(pid: int | None, vm: int | None) -> dict[str, Numbers]:
    """Statistic by statistic, by "daemon/VM": Linux's names, ioctls, CPU seconds and bytes of the worker."""
    found: dict[str, Numbers] = {}
    with daemons.every() as connected:
        for daemon in connected:
            if pid not in (None, daemon.pid):
                continue
            for one in daemon.ask("state")["vms"]:
                if vm not in (None, one["vm"]):
                    continue
                try:
                    found[f"{daemon.pid}/{one['vm']}"] = _numbers(daemon.ask("statistics", vm=one["vm"]), one["worker"])
                except DaemonError:
                    continue            # it has just ended
    return found


def _numbers(answer: dict[str, Any], worker: int) -> Numbers:
    numbers: Counter[str] = Counter()
    for vcpu in answer["vcpus"]:
        for name, value in vcpu.items():
            if name != "id" and isinstance(value, int):
                numbers[name] += value
    for number, count in answer["ioctls"].items():
        entry = BY_NUMBER.get(int(number))
        numbers[entry.name if entry else f"ioctl {int(number):#x}"] += count
    return {**numbers, "worker_cpu_seconds": _cpu_seconds(worker), "worker_memory_bytes": pss(worker)}


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
            numbers[name] += value
    return numbers


def _table(title: str, now: Numbers, before: Numbers | None, seconds: float) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("statistic")
    table.add_column("total", justify="right")
    if before is not None:
        table.add_column("per second", justify="right")
    for name, value in sorted(now.items(), key=lambda item: (item[0].startswith("worker"), item[0].startswith("KVM_"), -item[1])):
        if value:
            rate = [] if before is None else [f"{(value - before.get(name, 0)) / seconds:,.0f}"]
            table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}", *rate)
    return table


def _view(now: dict[str, Numbers], before: dict[str, Numbers] | None, seconds: float) -> Group | Text:
    if not now:
        return Text("No VM runs.")
    parts = [_table(f"VM {name.partition('/')[2]} of daemon {name.partition('/')[0]}", numbers,
                    None if before is None else before.get(name, {}), seconds) for name, numbers in now.items()]
    if len(now) > 1:
        parts.append(_table("all VMs", total(now), None if before is None else total(before), seconds))
    return Group(*parts)


def stat(*, pid: int | None, vm: int | None, once: bool, interval: float, as_json: bool) -> None:
    """Show the numbers once, or again and again until ^C."""
    console = Console(width=None if Console().is_terminal else 120)
    now = snapshot(pid, vm)
    if once:
        if as_json:
            print(json.dumps({"vms": now, "total": total(now)}, indent=2))
        else:
            console.print(_view(now, None, 1))
        return
    then = time.monotonic()
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                before, now, elapsed = now, snapshot(pid, vm), time.monotonic() - then
                then += elapsed
                if as_json:
                    print(json.dumps({"vms": now, "total": total(now)}), flush=True)
                elif console.is_terminal:
                    live.update(_view(now, before, elapsed), refresh=True)
                else:
                    console.print(_view(now, before, elapsed))
    except KeyboardInterrupt:
        pass
