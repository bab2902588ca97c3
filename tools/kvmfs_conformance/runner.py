# SPDX-License-Identifier: GPL-2.0-or-later
"""Choosing cases, running them on a node, and telling from the list of differences what a failure means."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import FrameType

from kvmfs.abi.ioctls import TABLE, Level

from . import (
    device,
    generic,
    system,
    vcpu,
    vcpu_cpuid,
    vcpu_events,
    vcpu_guests,
    vcpu_para,
    vcpu_regs,
    vcpu_run,
    vm,
    vm_irq,
    vm_memory,
    vm_states,
)
from .differences import Differences
from .model import CASES, LEVEL_NAMES, Case, Check, Node, Outcome, Skip, Status, Stop, Trial

PATIENCE = 20       # seconds for one case
_MODULES = (system, vm, vm_memory, vm_irq, vm_states, vcpu_regs, vcpu_cpuid, vcpu_events, vcpu, vcpu_run, vcpu_guests,
            vcpu_para, device)
_ORDER = {entry.name: i for i, entry in enumerate(TABLE)}
_LEVELS = list(LEVEL_NAMES)


def all_cases() -> list[Case]:
    """Every case, by level and in the order of linux/kvm.h."""
    if not any(case.absence for case in CASES):
        generic.register()
    return sorted(CASES, key=lambda case: (_LEVELS.index(case.level), _ORDER[case.ioctl], case.absence))


def select(patterns: Sequence[str] = (), level: Level | None = None) -> list[Case]:
    """The cases of a level whose id matches one of the patterns: a glob, or a part of the id in any case."""
    def matches(case: Case) -> bool:
        low = case.id.lower()
        return not patterns or any(fnmatchcase(low, pattern.lower()) or pattern.lower() in low for pattern in patterns)

    return [case for case in all_cases() if matches(case) and (level is None or case.level is level)]


def run(node: Node, cases: Iterable[Case], differences: Differences, *, guests: bool = True) -> Iterator[Outcome]:
    """Run them one after the other."""
    for case in cases:
        yield _run_one(node, case, differences, guests)


def _run_one(node: Node, case: Case, differences: Differences, guests: bool) -> Outcome:
    missing = [cap for cap in case.caps if not node.capability(cap)]
    # Several capabilities announce an ioctl together; its absence case is for a node that has none of them.
    if case.absence:
        if len(missing) < len(case.caps):
            return Outcome(case, Status.SKIP, reason="the capability is there")
    elif missing:
        return Outcome(case, Status.ABSENT, reason=f"{missing[0]} is 0")
    if case.guest and not guests:
        return Outcome(case, Status.SKIP, reason="guests are not run here")
    trial, began = Trial(node), time.monotonic()
    outcome = Outcome(case, Status.PASS, trial.checks)
    try:
        with_patience(lambda: case.run(trial))
    except Skip as skip:
        outcome.status, outcome.reason = Status.SKIP, str(skip)
    except Stop:
        pass
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        trial.failed("the case", f"{type(error).__name__}: {error} ({where.name}:{where.lineno})", "no exception")
    finally:
        trial.close()
    outcome.seconds = time.monotonic() - began
    _judge(outcome, node, differences)
    return outcome


def _judge(outcome: Outcome, node: Node, differences: Differences) -> None:
    failures = outcome.failures
    if not failures:
        return
    reasons = [differences.reason(node.kind, outcome.case.id, check) for check in failures]
    if all(reasons):
        outcome.status, outcome.reason = Status.KNOWN, "; ".join(dict.fromkeys(filter(None, reasons)))
    else:
        outcome.status = Status.FAIL


class Hung(Exception):
    """The case took too long."""


def with_patience(call: Callable[[], None]) -> None:
    """Call it; Hung when it does not return in time (a signal ends the ioctl that hangs)."""
    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise Hung(f"no answer within {PATIENCE} s")

    old = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def unlisted(outcome: Outcome, node: Node, differences: Differences) -> list[Check]:
    """The failures of a case that the list of differences has no reason for."""
    return [check for check in outcome.failures if not differences.reason(node.kind, outcome.case.id, check)]
