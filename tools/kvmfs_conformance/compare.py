# SPDX-License-Identifier: GPL-2.0-or-later
"""Where two nodes differ, side by side, and which of the differences are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvmfs.abi.caps import CAPS

from .differences import Differences
from .facts import Facts

_NAMES = {number: name for name, number in CAPS.items()}
RUN = ("pass", "fail", "known")


@dataclass(frozen=True, slots=True)
class Line:
    """One difference; ``reason`` is empty when nobody has given one."""

    subject: str
    ours: str
    theirs: str
    reason: str


def compare(ours: Facts, theirs: Facts, differences: Differences) -> list[Line]:
    """All differences: of the capabilities, then of the checks that both nodes answered."""
    return [*_capabilities(ours, theirs, differences), *_checks(ours, theirs, differences)]


def _capabilities(ours: Facts, theirs: Facts, differences: Differences) -> Iterator[Line]:
    for number in sorted({*ours.capabilities, *theirs.capabilities}):
        a, b = ours.capabilities.get(number, 0), theirs.capabilities.get(number, 0)
        if a != b:
            name = _NAMES.get(number, f"capability {number}")
            yield Line(name, str(a), str(b), differences.capabilities.get(name, ""))


def _checks(ours: Facts, theirs: Facts, differences: Differences) -> Iterator[Line]:
    """A case that only one of them could run follows from a capability, and that difference is told there."""
    for case, a in ours.cases.items():
        b = theirs.cases.get(case)
        if b is None or a["status"] not in RUN or b["status"] not in RUN:
            continue
        for label, outcome in a["checks"].items():
            other = b["checks"].get(label, outcome)
            if other != outcome:
                key = f"{case}: {label}"
                reason = (differences.explain(ours.kind, key, outcome) or differences.explain(theirs.kind, key, other)
                          or differences.explain("compare", key, outcome))
                yield Line(key, outcome, other, reason or "")
