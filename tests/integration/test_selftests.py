# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast ones of Linux's own KVM selftests, unmodified, on the fake node; `make selftests` runs all of them."""

from __future__ import annotations

import tomllib

import pytest

from kvmfs.vendor import host_vendor
from selftests import run
from selftests.run import BUILT, EXPECTED, Expectations, run_test

EXPECTATIONS = Expectations()


def test_each_test_is_named_once() -> None:
    """No test is named twice, but for one that passes with one vendor and skips with the other; the fast ones pass."""
    table = tomllib.loads(EXPECTED.read_text())
    names = [*table["pass"], *(name for name, why in table["skip"].items() if isinstance(why, str)), *table["host"],
             *table["host_vendor"], *table["linux"], *table["open"]]
    assert len(names) == len(set(names))
    for name in EXPECTATIONS.fast:
        assert {EXPECTATIONS.of(name, vendor).result for vendor in ("amd", "intel")} == {"pass"}
    assert len(EXPECTATIONS.fast) == len(set(EXPECTATIONS.fast))


def test_what_asks_the_host_for_its_vendor() -> None:
    """It passes with that vendor, and is not run with the other."""
    results = {vendor: EXPECTATIONS.of("x86_64/xapic_state_test", vendor).result for vendor in ("amd", "intel")}
    assert results.pop(host_vendor()) == "pass" and list(results.values()) == ["not run"]


def test_a_measure_of_time_gets_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says so; others get none."""
    results = iter(("fail", "pass", "fail"))
    monkeypatch.setattr(run, "run_test", lambda test, vendor, expected: run.Outcome(test, vendor, next(results), 1, "", expected))
    timed, other = run.run_tests(["x86_64/apic_bus_clock_test", "x86_64/cpuid_test"], ["amd"], EXPECTATIONS)
    assert (timed.result, timed.attempt, other.result, other.attempt) == ("pass", 2, "fail", 1)
    assert "attempt 2" in run.line(timed) and "NOT AS EXPECTED" in run.line(other)
    assert run.summary([timed, other]).splitlines()[-1].startswith("all      2 tests: 1 pass, 0 skip, 1 fail")


@pytest.mark.timeout(130)
@pytest.mark.parametrize("name", EXPECTATIONS.fast)
def test_selftest(name: str, vendor: str, nothing_left: None) -> None:
    if not (BUILT / name).exists():
        pytest.skip("not built; tools/selftests/build.sh needs Debian's linux-source-6.12")
    outcome = run_test(name, vendor, EXPECTATIONS.of(name, vendor))
    assert outcome.as_expected, f"{outcome.result}: {outcome.said}"
