# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmfs_bench``: `make bench`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvmfs_bench import lab, report, runner
from kvmfs_bench.model import Bench, MeasureError, Row
from kvmfs_bench.suite import SUITE


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Each figure once, and nothing that takes long: does it run at all?")
@click.option("--only", "patterns", multiple=True, metavar="PATTERN",
              help="Only rows with this in their name, or whose name this glob matches; may be given more than once.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=lab.BUILD / "bench.json",
              help="Where the figures go as JSON (default: build/bench.json).")
@click.option("--vendor", type=click.Choice(["auto", "intel", "amd"]), default="auto", show_default=True, help="kvmd's.")
@click.option("--list", "only_list", is_flag=True, help="Say the rows' names and do nothing.")
def main(quick: bool, patterns: tuple[str, ...], json_path: Path, vendor: str, only_list: bool) -> None:
    """Measure kvmfs beside its rivals: a FUSE server in C, the machine's own node, QEMU's TCG.

    Rivals are built, and QEMU with a kernel installed when a row needs them.  The subjects take turns, figures are medians;
    "pinned" is client and server on one host CPU.  The exit status is 0, also when targets are missed; 1 when something could
    not be measured; 2 for a wrong command line.
    """
    benches = runner.plan(SUITE, patterns, quick=quick)
    if only_list:
        click.echo("\n".join(row.name for bench in benches for row in bench.chosen(patterns)))
        return
    if not benches:
        raise click.UsageError(f"no row matches {' '.join(patterns)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))     # what was started is ended, too
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        rows, failed = measure(console, benches, patterns, json_path, vendor=vendor, quick=quick)
    except MeasureError as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)
    sys.exit(1 if failed or not rows else 0)


def measure(console: Console, benches: list[Bench], patterns: tuple[str, ...], json_path: Path, *, vendor: str,
            quick: bool) -> tuple[list[Row], bool]:
    """Do it and report it; the rows, and whether something is missing.  Raises MeasureError."""
    lab.build()
    before, began = runner.load(), time.monotonic()
    console.print(f"{len(benches)} measurements; {before.text()}", highlight=False)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with lab.Lab(quick=quick, vendor=vendor) as place, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=runner.steps(benches, quick=quick))
        found = runner.run(place, benches, patterns, quick=quick,
                           progress=lambda name: progress.update(task, advance=1, description=name))
        for part in found:
            rows += part
            for row in part:
                ratio = "" if row.ratio is None else f"  {row.ratio:.2f} × {row.rival.value if row.rival else ''}"
                console.print(f"{row.name}: {report.figure(row.ours)} {row.spec.unit}{ratio}", highlight=False)
    seconds = time.monotonic() - began
    after = runner.load()
    report.show(console, rows, before, after, seconds)
    report.write_json(json_path, rows, before, after, quick=quick)
    return rows, any(row.failed for row in rows)


if __name__ == "__main__":
    main(prog_name="kvmfs_bench")
