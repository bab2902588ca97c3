# SPDX-License-Identifier: GPL-2.0-or-later
"""The table for people and the file for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmfs_bench.model import Row
from kvmfs_bench.runner import Load

_MET = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}


def figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(rows: Sequence[Row], title: str) -> Table:
    """One line for each row; notes below their rows."""
    result = Table(title=title, title_justify="left")
    result.add_column("what", no_wrap=True)
    for name in ("kvmfs", "spread", "rival", "spread"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("unit")
    result.add_column("rival's name")
    for name in ("ratio", "target", "met"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found = row.as_json()
        result.add_row(row.name, figure(row.ours), percent(found["spread"]), figure(row.theirs), percent(found["rival_spread"]),
                       row.spec.unit, found["rival_name"] or "", "" if row.ratio is None else f"{row.ratio:.2f} ×",
                       found["target"] or "", _MET[row.met])
    return result


def notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name}: {row.note}" for row in rows if row.note]


def show(console: Console, rows: Sequence[Row], before: Load, after: Load, seconds: float) -> None:
    console.print(table(rows, f"{len(rows)} rows in {seconds:.0f} s, less is better"))
    for note in notes(rows):
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    judged = [row for row in rows if row.met is not None]
    console.print(f"{sum(row.met is True for row in judged)} of {len(judged)} targets met.  "
                  f"Before: {before.text()}; after: {after.text()}.", highlight=False)


def write_json(path: Path, rows: Sequence[Row], before: Load, after: Load, *, quick: bool) -> None:
    document = {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version(),
                    "before": vars(before) | {"idle": before.idle}, "after": vars(after) | {"idle": after.idle}},
        "quick": quick,
        "rows": [row.as_json() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
