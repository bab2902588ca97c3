# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run found, as data: written by --json, read by --compare, recorded from real kernels in facts/."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvmfs.abi.caps import CAPS

from .model import Node, Outcome, Status


@dataclass
class Facts:
    """One node: what it is, what it announces, and the outcome of each check by case and label."""

    node: dict[str, str]
    capabilities: dict[int, int]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)     # id: status, reason, checks {label: outcome}, …

    @property
    def kind(self) -> str:
        return self.node["kind"]

    def failures(self) -> list[str]:
        """The checks (``case id: label``) that came out otherwise than the suite expects, known or not."""
        return [f"{case}: {failure['check']}" for case, result in self.cases.items() for failure in result["failures"]]

    @property
    def title(self) -> str:
        """How a table calls it."""
        return self.kind if self.kind == "kvmfs" else f"{self.kind}, Linux {self.node['kernel']}"


def collect(node: Node, outcomes: Iterable[Outcome]) -> Facts:
    """What a run on ``node`` found."""
    facts = Facts(identity(node), {number: value for number, value in node.caps.items() if value})
    for outcome in outcomes:
        facts.cases[outcome.case.id] = {
            "status": outcome.status.value, "reason": outcome.reason,
            "checks": {check.label: check.outcome for check in outcome.checks},
            "failures": [{"check": check.label, "outcome": check.outcome, "expected": check.expected}
                         for check in outcome.failures]}
    return facts


def identity(node: Node) -> dict[str, str]:
    """Kind, kernel and CPU vendor of a node."""
    vendor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            vendor = line.partition(":")[2].strip()
            break
    return {"path": os.path.abspath(node.path), "kind": node.kind, "kernel": platform.release(), "host_vendor": vendor,
            "suite": "1"}


def dumps(facts: Facts) -> str:
    """As JSON."""
    names = {number: name for name, number in CAPS.items()}
    counts = {status.value: sum(case["status"] == status.value for case in facts.cases.values()) for status in Status}
    return json.dumps({
        "node": facts.node, "summary": counts,
        "capabilities": {f"{number} {names.get(number, 'unknown')}": value for number, value in sorted(facts.capabilities.items())},
        "cases": facts.cases}, indent=1, ensure_ascii=False) + "\n"


def loads(text: str) -> Facts:
    """From JSON.  ValueError: it is something else."""
    try:
        data = json.loads(text)
        return Facts(data["node"], {int(key.split()[0]): value for key, value in data["capabilities"].items()}, data["cases"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"these are not the facts of a node: {error!r}") from error


def recorded() -> list[str]:
    """The names of the facts that come with this package."""
    return sorted(entry.name.removesuffix(".json") for entry in files(__package__).joinpath("facts").iterdir()
                  if entry.name.endswith(".json"))


def load(name: str) -> Facts:
    """Facts from a file, or those of this package by their name.  OSError, ValueError."""
    if name in recorded():
        return loads(files(__package__).joinpath("facts", f"{name}.json").read_text("utf-8"))
    return loads(Path(name).read_text("utf-8"))
