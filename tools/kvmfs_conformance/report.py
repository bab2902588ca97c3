# SPDX-License-Identifier: GPL-2.0-or-later
"""What people read: progress, one line for each ioctl, the summary by level, the comparison; and JUnit for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmfs.abi.ioctls import TABLE

from .compare import Line
from .differences import Differences
from .facts import Facts
from .model import LEVEL_NAMES, Case, Node, Outcome, Status
from .runner import run, unlisted

_MARK = {Status.PASS: "[green]✓[/]", Status.FAIL: "[red]✗[/]", Status.KNOWN: "[yellow]~[/]", Status.ABSENT: "[dim]–[/]",
         Status.SKIP: "[dim]·[/]"}
_ORDER = {entry.name: i for i, entry in enumerate(TABLE)}


def run_and_show(console: Console, node: Node, cases: Sequence[Case], differences: Differences, *, guests: bool) -> list[Outcome]:
    """Run the cases; as soon as all of an ioctl's are done, its line is printed."""
    outcomes: list[Outcome] = []
    group: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for outcome in run(node, cases, differences, guests=guests):
            if group and _key(group[-1].case) != _key(outcome.case):
                _show_ioctl(console, node, group, differences)
                group = []
            group.append(outcome)
            outcomes.append(outcome)
            progress.update(task, advance=1, description=f"{LEVEL_NAMES[outcome.case.level]} {outcome.case.ioctl}")
        if group:
            _show_ioctl(console, node, group, differences)
    return outcomes


def _key(case: Case) -> tuple[object, str]:
    return case.level, case.ioctl


def of_ioctl(outcomes: Iterable[Outcome]) -> Status:
    """How an ioctl did as a whole."""
    statuses = {outcome.status for outcome in outcomes}
    for status in (Status.FAIL, Status.KNOWN):
        if status in statuses:
            return status
    if Status.ABSENT in statuses and not any(
            outcome.status is Status.PASS and not outcome.case.absence for outcome in outcomes):
        return Status.ABSENT
    return Status.PASS if Status.PASS in statuses else Status.SKIP


def _show_ioctl(console: Console, node: Node, group: Sequence[Outcome], differences: Differences) -> None:
    status = of_ioctl(group)
    case = group[0].case
    done = [outcome for outcome in group if outcome.status not in (Status.SKIP, Status.ABSENT)]
    good = sum(outcome.status is Status.PASS for outcome in done)
    text = f"{good}/{len(done)}" if done else ""
    note = next((outcome.reason for outcome in group if outcome.status is Status.ABSENT), "") if status is Status.ABSENT else ""
    if status is Status.SKIP:
        note = next((outcome.reason for outcome in group if not outcome.case.absence), "")
    line = f"{_MARK[status]} {LEVEL_NAMES[case.level]:<6} {case.ioctl:<34} {text:>6}  [dim]{escape(note)}[/]"
    console.print(line, highlight=False)
    for outcome in group:
        title = escape(outcome.case.title)
        if outcome.status is Status.FAIL:
            for check in unlisted(outcome, node, differences):
                seen = escape(f"{check.label}: {check.outcome}, expected {check.expected}")
                console.print(f"    [red]{title}[/]: {seen}", highlight=False)
        elif outcome.status is Status.KNOWN:
            console.print(f"    [yellow]{title}[/]: [dim]{escape(outcome.reason)}[/]", highlight=False)


def show_summary(console: Console, outcomes: Sequence[Outcome], seconds: float) -> None:
    """The table by level."""
    table = Table(title=f"{len(outcomes)} cases in {seconds:.1f} s", title_justify="left")
    table.add_column("level")
    for title in ("ioctls", "pass", "fail", "known", "absent", "not run", "checks"):
        table.add_column(title, justify="right")
    for level, name in LEVEL_NAMES.items():
        chosen = [outcome for outcome in outcomes if outcome.case.level is level]
        if chosen:
            table.add_row(name, *_numbers(chosen))
    table.add_section()
    table.add_row("all", *_numbers(outcomes))
    console.print(table)


def _numbers(outcomes: Sequence[Outcome]) -> list[str]:
    counts = Counter(outcome.status for outcome in outcomes)
    ioctls = {outcome.case.ioctl for outcome in outcomes}
    failed = counts[Status.FAIL]
    return [str(len(ioctls)), str(counts[Status.PASS]), f"[red]{failed}[/]" if failed else "0", str(counts[Status.KNOWN]),
            str(counts[Status.ABSENT]), str(counts[Status.SKIP]), str(sum(len(outcome.checks) for outcome in outcomes))]


def show_comparison(console: Console, ours: Facts, theirs: Facts, lines: Sequence[Line]) -> None:
    """Side by side where two nodes differ; those without a reason last, where they are seen."""
    if not lines:
        console.print(f"No difference between {ours.title} and {theirs.title}.")
        return
    table = Table(title="Differences", title_justify="left", show_lines=False)
    table.add_column("what", overflow="fold")
    table.add_column(f"{ours.title}", overflow="fold")
    table.add_column(f"{theirs.title}", overflow="fold")
    table.add_column("why", overflow="fold")
    for line in sorted(lines, key=lambda line: not line.reason):
        style = "" if line.reason else "red"
        table.add_row(escape(line.subject), escape(line.ours), escape(line.theirs), escape(line.reason or "?"), style=style)
    console.print(table)
    unknown = sum(not line.reason for line in lines)
    console.print(f"{len(lines)} differences, {unknown} of them without a reason.")


def junit(outcomes: Sequence[Outcome], node: Node, differences: Differences) -> str:
    """JUnit XML: one suite for each level, one test case for each case."""
    root = ElementTree.Element("testsuites", name=f"kvmfs conformance {node.path}")
    for level, name in LEVEL_NAMES.items():
        chosen = [outcome for outcome in outcomes if outcome.case.level is level]
        if not chosen:
            continue
        counts = Counter(outcome.status for outcome in chosen)
        suite = ElementTree.SubElement(
            root, "testsuite", name=name, tests=str(len(chosen)), failures=str(counts[Status.FAIL]), errors="0",
            skipped=str(counts[Status.ABSENT] + counts[Status.SKIP] + counts[Status.KNOWN]),
            time=f"{sum(outcome.seconds for outcome in chosen):.3f}")
        for outcome in chosen:
            element = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{outcome.case.ioctl}", name=outcome.case.title,
                                             time=f"{outcome.seconds:.3f}")
            if outcome.status is Status.FAIL:
                checks = unlisted(outcome, node, differences)
                ElementTree.SubElement(element, "failure", message=f"{len(checks)} checks").text = "\n".join(
                    f"{check.label}: {check.outcome}, expected {check.expected}" for check in checks)
            elif outcome.status is not Status.PASS:
                ElementTree.SubElement(element, "skipped", message=f"{outcome.status.value}: {outcome.reason}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
