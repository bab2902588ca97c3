# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs conformance``: the suite on a node, and the comparison with another."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvmfs_cli.nodes import NodeError, check_node
from kvmfs_conformance import compare, differences, facts, report, runner
from kvmfs_conformance.model import LEVELS, Case, Node, Status

PASSED, FAILED, UNUSABLE = 0, 1, 2


def _console() -> Console:
    # A log or a pipe has no width of its own: 80 columns would fold every line.
    return Console(width=None if sys.stdout.isatty() else 140)


class ConformanceError(Exception):
    """The suite could not run; the text says why."""


def _open(path: str) -> Node:
    try:
        check_node(path)
        return Node(path)
    except (NodeError, OSError) as error:
        raise ConformanceError(f"{error}; 'kvmfs run -- kvmfs conformance' checks this package's own") from error


def conformance(patterns: Sequence[str], *, device: str, level: str | None, junit: str | None, json: str | None,
                compare_with: str | None, guests: str) -> int:
    """Run and report; returns the exit status.  Raises ConformanceError."""
    console, known, began = _console(), differences.load(), time.monotonic()
    cases = runner.select(patterns, LEVELS[level] if level else None)
    if not cases:
        raise ConformanceError(f"no case matches {' '.join(patterns)}")
    other = _other(compare_with) if compare_with else None
    node = _open(device)
    try:
        console.print(f"{node.path}: {node.kind}", highlight=False)
        outcomes = report.run_and_show(console, node, cases, known, guests=_guests(guests, node))
        report.show_summary(console, outcomes, time.monotonic() - began)
        found = facts.collect(node, outcomes)
        if json:
            Path(json).write_text(facts.dumps(found), "utf-8")
        if junit:
            Path(junit).write_text(report.junit(outcomes, node, known), "utf-8")
    finally:
        node.close()
    passed = not any(outcome.status is Status.FAIL for outcome in outcomes)
    if other is not None:
        theirs = _run_quietly(other, cases, known) if isinstance(other, Node) else other
        lines = compare.compare(found, theirs, known)
        report.show_comparison(console, found, theirs, lines)
        passed &= all(line.reason for line in lines)
    return PASSED if passed else FAILED


def _guests(choice: str, node: Node) -> bool:
    """PVM runs only guests that were made for it."""
    return choice == "yes" or (choice == "auto" and node.kind != "kvm_pvm")


def _other(name: str) -> Node | facts.Facts:
    """A node, a file that --json wrote, or recorded facts by their name."""
    try:
        if name in facts.recorded() or _is_file_of_facts(name):
            return facts.load(name)
    except (OSError, ValueError) as error:
        raise ConformanceError(f"{name}: {error}") from error
    if not os.path.exists(name):
        raise ConformanceError(f"{name}: neither a node nor a file of facts; recorded are: {', '.join(facts.recorded())}")
    return _open(name)


def _is_file_of_facts(name: str) -> bool:
    # Our own node is a regular file too, an empty one.
    try:
        status = os.stat(name)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def _run_quietly(node: Node, cases: Sequence[Case], known: differences.Differences) -> facts.Facts:
    try:
        return facts.collect(node, runner.run(node, cases, known, guests=_guests("auto", node)))
    finally:
        node.close()
