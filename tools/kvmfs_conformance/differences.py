# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of known differences, differences.toml: what a node answers otherwise, and why."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from .model import Check


@dataclass(frozen=True, slots=True)
class Difference:
    """On nodes of this kind (a glob) the checks that match (``case id: label``, globs) have these outcomes (globs)."""

    node: str
    checks: tuple[str, ...]
    outcomes: tuple[str, ...]
    reason: str


class Differences:
    """The list; ``capabilities`` says of KVM_CAP_* why the nodes answer CHECK_EXTENSION differently."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.entries = [Difference(entry["node"], tuple(entry["checks"]), tuple(entry.get("outcomes", ("*",))), entry["reason"])
                        for entry in data.get("difference", ())]
        self.capabilities = {name: entry["reason"] for entry in data.get("capability", ()) for name in entry["names"]}

    def reason(self, kind: str, case: str, check: Check) -> str | None:
        """Why a node of this kind may have this outcome; None: there is no reason."""
        return self.explain(kind, f"{case}: {check.label}", check.outcome)

    def stale(self, node: str, failures: Iterable[str]) -> list[str]:
        """Patterns for exactly this kind of node that match none of the checks (``case id: label``) that failed or differed."""
        failed = list(failures)
        return [pattern for entry in self.entries if entry.node == node for pattern in entry.checks
                if not any(fnmatchcase(key, pattern) for key in failed)]

    def explain(self, kind: str, key: str, outcome: str) -> str | None:
        """As reason(), for ``case id: label``."""
        for entry in self.entries:
            if fnmatchcase(kind, entry.node) and any(fnmatchcase(key, pattern) for pattern in entry.checks) and any(
                    fnmatchcase(outcome, pattern) for pattern in entry.outcomes):
                return entry.reason
        return None


def load() -> Differences:
    """The list that is installed with this package."""
    return Differences(tomllib.loads(files(__package__).joinpath("differences.toml").read_text("utf-8")))
