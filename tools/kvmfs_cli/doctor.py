# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs doctor``: does this host have what kvmfs needs, and how to get what it lacks."""

from __future__ import annotations

import json
import sys
from typing import Final

from rich.console import Console

from kvmfs_cli.checks import CHECKS, Result, Status, run

EXIT_STATUS: Final = {Status.OK: 0, Status.DEGRADED: 1, Status.MISSING: 3}     # 2 is a wrong command line
_STYLE: Final = {Status.OK: "green", Status.DEGRADED: "yellow", Status.MISSING: "red"}


def doctor(*, as_json: bool) -> int:
    """All checks, each shown when it is done; returns the exit status, that of the worst."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(name) for name, _ in CHECKS)
    results: dict[str, Result] = {}
    for name, check in CHECKS:
        if sys.stderr.isatty() and not as_json:
            print(f"{name} …", end="\r", file=sys.stderr, flush=True)
        result = results[name] = run(check)
        if not as_json:
            _show(console, name.ljust(width), result)
    worst = max(result.status for result in results.values())
    if as_json:
        print(json.dumps({"worst": worst.name.lower(), "checks": [
            {"name": name, "status": result.status.name.lower(), "detail": result.detail, "advice": result.advice}
            for name, result in results.items()]}, indent=2))
    else:
        console.print({Status.OK: "\nEverything is there.",
                       Status.DEGRADED: "\nkvmfs works here, with the limits above.",
                       Status.MISSING: "\nkvmfs does not work here until what is missing is there."}[worst])
    return EXIT_STATUS[worst]


def _show(console: Console, name: str, result: Result) -> None:
    console.print(f"{name}  [{_STYLE[result.status]}]{result.status.name.lower():<8}[/]  ", end="")
    console.print(result.detail, markup=False)
    if result.advice:
        console.print(f"{'':{len(name)}}            → {result.advice}", markup=False)
