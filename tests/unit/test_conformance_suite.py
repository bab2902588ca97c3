# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance suite itself: it covers the table, its data are sound, and it finds what is wrong."""

from __future__ import annotations

import errno
from fnmatch import fnmatchcase

import pytest

from kvmfs.abi.caps import CAPS
from kvmfs.abi.ioctls import BY_NAME, TABLE, Level
from kvmfs.kvm import caps
from kvmfs_conformance import compare, differences, facts, report, runner, wire
from kvmfs_conformance.model import CASES, Case, Node, Outcome, Status

GENERIC = ("bad pointer", "absence", "ioctls of other levels", "unknown numbers")


class FakeNode(Node):
    """A node without a kernel: every capability is 0 but those given."""

    def __init__(self, kind="kvmfs", **caps):
        self.path, self.fd, self.mmap_size, self.kind = "/fake", -1, 12288, kind
        self.caps = {number: caps.get(name.removeprefix("KVM_CAP_"), 0) for name, number in CAPS.items()}


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_every_control_word_has_a_case(entry):
    """On each kind of descriptor that answers it, one that was written for it."""
    runner.all_cases()
    for level in entry.levels:
        written = [case for case in CASES if case.ioctl == entry.name and case.level is level and case.title not in GENERIC]
        assert written, f"{entry.name} on {level.name}"


def test_every_capability_has_its_absence():
    """For an ioctl that a capability announces there is a case for nodes that lack it."""
    cases = runner.all_cases()
    for case in cases:
        if case.caps and not case.absence and BY_NAME[case.ioctl].capability and case.title == "bad pointer":
            assert any(other.absence and (other.ioctl, other.level) == (case.ioctl, case.level) for other in cases), case.id


def test_ids_are_unique():
    ids = [case.id for case in runner.all_cases()]
    assert len(ids) == len(set(ids))


def test_capabilities_exist():
    assert {cap for case in runner.all_cases() for cap in case.caps} <= CAPS.keys()
    assert differences.load().capabilities.keys() <= CAPS.keys()


def test_differences_name_existing_cases():
    """A line that matches nothing any more is to be taken out."""
    ids = [case.id for case in runner.all_cases()]
    for entry in differences.load().entries:
        assert entry.reason.endswith(".")
        for pattern in entry.checks:
            case = pattern.partition(": ")[0]
            assert any(fnmatchcase(name, case) for name in ids), pattern


@pytest.mark.parametrize("name", facts.recorded())
def test_recorded_facts(name):
    """They know their kernel, cover every ioctl, and the suite had nothing to object to."""
    recorded = facts.load(name)
    assert recorded.node["kernel"].startswith(name.split("-")[1])
    assert recorded.kind in name or name.endswith(recorded.kind.removeprefix("kvm_"))
    assert recorded.capabilities[CAPS["KVM_CAP_USER_MEMORY"]] == 1
    assert {case.split("/")[1] for case in recorded.cases} == BY_NAME.keys()
    assert not [case for case, result in recorded.cases.items() if result["status"] == "fail"]
    assert facts.loads(facts.dumps(recorded)) == recorded


def test_no_difference_is_stale():
    """What a recorded kernel's line excuses is to be seen there; a capability's line needs something to differ."""
    known, recorded = differences.load(), [facts.load(name) for name in facts.recorded()]
    for kernel in recorded:
        assert not known.stale(kernel.kind, kernel.failures())
    always = {name for name in known.capabilities if caps.SUPPORTED.get(CAPS[name]) == 1
              and all(kernel.capabilities.get(CAPS[name]) == 1 for kernel in recorded)}
    assert always <= {"KVM_CAP_VM_TYPES"}       # a mask, which has one bit on these


def test_stale_lines_are_found():
    known = differences.Differences({"difference": [
        {"node": "kvmfs", "checks": ["vm/KVM_X/t: a", "vm/KVM_X/*: b"], "reason": "So."},
        {"node": "kvm_amd", "checks": ["vm/KVM_X/t: c"], "reason": "So."}]})
    assert known.stale("kvmfs", ["vm/KVM_X/t: b", "vm/KVM_X/t: c"]) == ["vm/KVM_X/t: a"]


# ---- it finds what is wrong ---------------------------------------------------------------------------------


def outcome_of(run, *, node=None, known=None, **kind):
    case = Case("KVM_GET_API_VERSION", Level.SYSTEM, "a case", run, **kind)
    return next(iter(runner.run(node or FakeNode(), [case], known or differences.Differences({}))))


def test_statuses():
    assert outcome_of(lambda t: t.equal("x", 1, 1)).status is Status.PASS
    assert outcome_of(lambda t: t.equal("x", 1, 2)).status is Status.FAIL
    assert outcome_of(lambda t: 1 / 0).failures[0].outcome.startswith("ZeroDivisionError")
    assert outcome_of(lambda t: None, caps=("KVM_CAP_IRQCHIP",)).status is Status.ABSENT
    assert outcome_of(lambda t: None, caps=("KVM_CAP_IRQCHIP",), absence=True).status is Status.PASS
    there = FakeNode(IRQCHIP=1)
    assert outcome_of(lambda t: None, node=there, caps=("KVM_CAP_IRQCHIP",)).status is Status.PASS
    assert outcome_of(lambda t: None, node=there, caps=("KVM_CAP_IRQCHIP",), absence=True).status is Status.SKIP


def test_known_failures():
    known = differences.Differences({"difference": [
        {"node": "kvmfs", "checks": ["system/*/a-case: x"], "outcomes": ["EFAULT"], "reason": "Because."}]})
    refused, wrong = wire.Result(-1, errno.EFAULT), wire.Result(-1, errno.EIO)
    assert outcome_of(lambda t: t.errno("x", refused, errno.EINVAL), known=known).status is Status.KNOWN
    assert outcome_of(lambda t: t.errno("x", wrong, errno.EINVAL), known=known).status is Status.FAIL
    assert outcome_of(lambda t: t.errno("y", refused, errno.EINVAL), known=known).status is Status.FAIL
    other = FakeNode("kvm_amd")
    assert outcome_of(lambda t: t.errno("x", refused, errno.EINVAL), known=known, node=other).status is Status.FAIL

    def both(t):
        t.errno("x", refused, errno.EINVAL)
        t.errno("y", refused, errno.EINVAL)

    assert outcome_of(both, known=known).status is Status.FAIL


def test_a_lying_node_is_found(monkeypatch):
    """Each errno and value of a case is looked at: a node that says yes to everything fails them."""
    monkeypatch.setattr(wire, "ioctl", lambda fd, request, arg=0: wire.Result(0, 0))
    titles = ("value", "bad pointer", "types")
    cases = [case for case in runner.select(level=Level.SYSTEM) if not case.caps and case.title in titles]
    outcomes = list(runner.run(FakeNode(), cases, differences.Differences({})))
    assert len(outcomes) > 3
    assert all(outcome.status is Status.FAIL for outcome in outcomes)


def test_a_case_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE", 0.05)
    failure = outcome_of(lambda t: __import__("time").sleep(5)).failures[0]
    assert "no answer" in failure.outcome


def test_compare():
    def node(kind, caps, **checks):
        return facts.Facts({"kind": kind, "kernel": "6.12"}, caps, {"vm/KVM_X/t": {"status": "pass", "checks": checks}})

    known = differences.Differences({
        "difference": [{"node": "kvm_amd", "checks": ["vm/KVM_X/t: a"], "reason": "It is so."}],
        "capability": [{"names": ["KVM_CAP_IRQCHIP"], "reason": "Not yet."}]})
    lines = compare.compare(node("kvmfs", {0: 1}, a="0", b="0", c="0"), node("kvm_amd", {1: 4}, a="1", b="1", c="0"), known)
    assert [(line.subject, line.ours, line.theirs, line.reason) for line in lines] == [
        ("KVM_CAP_IRQCHIP", "1", "0", "Not yet."), ("KVM_CAP_HLT", "0", "4", ""),
        ("vm/KVM_X/t: a", "0", "1", "It is so."), ("vm/KVM_X/t: b", "0", "1", "")]


def test_status_of_an_ioctl():
    def outcome(status, **kind):
        return Outcome(Case("KVM_RUN", Level.VCPU, "x", lambda t: None, **kind), status)

    absence = outcome(Status.PASS, absence=True)
    assert report.of_ioctl([outcome(Status.PASS), outcome(Status.SKIP)]) is Status.PASS
    assert report.of_ioctl([outcome(Status.PASS), outcome(Status.ABSENT), absence]) is Status.PASS
    assert report.of_ioctl([outcome(Status.ABSENT), absence]) is Status.ABSENT
    assert report.of_ioctl([outcome(Status.KNOWN), outcome(Status.FAIL)]) is Status.FAIL
    assert report.of_ioctl([outcome(Status.SKIP)]) is Status.SKIP
