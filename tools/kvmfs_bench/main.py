# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``make bench``."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmfs.testing.daemon import DaemonError
from kvmfs_bench import node
from kvmfs_bench.model import Plan, Row, measure, select

RESULT = Path("build/bench.json")
BUSY = 0.5              # a load average from which on the machine is not idle


def _figure(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(rows: list[Row]) -> Table:
    """All rows, for people."""
    shown = Table(box=None, pad_edge=False)
    for name in ("what", "ours", "rival", "", "unit", "ratio", "spread", "target", ""):
        shown.add_column(name, justify="left" if name in ("what", "unit", "target") else "right", no_wrap=True)
    for row in rows:
        mark = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.met]
        shown.add_row(row.name, _figure(row.ours), _figure(row.rival), row.rival_name if row.rival is not None else "", row.unit,
                      f"{row.ratio:.2f}" if row.ratio is not None else "", f"{row.spread:.0%}" if row.spread is not None else "",
                      row.target, mark)
    return shown


def _plans(contestants: node.Contestants, quick: bool, guests: bool) -> list[Plan]:
    plans = node.plans(contestants, quick)
    if guests:
        from kvmfs_bench import guest

        plans += guest.plans(quick)
    return plans


def _run(plans: list[Plan]) -> list[Row]:
    rows = []
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True,
                  console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=sum(plan.repetitions for plan in plans))
        for plan in plans:
            progress.update(task, description=plan.name)
            rows.append(measure(plan, lambda: progress.advance(task)))
            if not sys.stderr.isatty():
                print(f"{plan.name}: {_figure(rows[-1].ours)} {plan.unit}", file=sys.stderr, flush=True)
    return rows


def _result(rows: list[Row], load: float) -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "kernel": platform.release(), "cpus": os.cpu_count(), "load_before": load,
            "rows": [row.as_json() for row in rows]}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few repetitions: whether it works, not how fast it is.")
@click.option("--only", "patterns", multiple=True, metavar="TEXT", help="Only rows whose name contains TEXT; may be repeated.")
@click.option("--guests/--no-guests", default=True, show_default=True, help="The rows that boot Linux in QEMU.")
@click.option("--list", "only_list", is_flag=True, help="Show the names of the rows.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True,
              help="Where the figures go.")
def main(quick: bool, patterns: tuple[str, ...], guests: bool, only_list: bool, path: Path) -> None:
    """Measure kvmfs beside its rivals, in one run: a libfuse server in C, the machine's own /dev/kvm, QEMU's TCG.

    Each figure is the median of repetitions that ours and the rival take in turn; the spread is from the lowest to the highest.
    Run it on an idle machine, as root.  The exit status is 1 when something could not be measured.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    load = os.getloadavg()[0]
    if load > BUSY:
        console.print(f"[yellow]The machine is not idle (load {load:.1f}): figures will be too high, ratios less so.[/]")
    try:
        with node.contestants() as contestants:
            plans = select(_plans(contestants, quick, guests), patterns)
            if only_list:
                console.print("\n".join(plan.name for plan in plans))
                return
            rows = _run(plans)
    except (DaemonError, OSError) as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)
    console.print(table(rows))
    for row in rows:
        if row.remark:
            console.print(f"{row.name}: {row.remark}", markup=False, highlight=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_result(rows, load), indent=1) + "\n", "utf-8")
    console.print(f"\n{sum(row.met is True for row in rows)} targets met, {sum(row.met is False for row in rows)} missed; {path}")
    sys.exit(any(row.ours is None for row in rows))
