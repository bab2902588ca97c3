# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast ones of Linux's own KVM selftests, unmodified, on the fake node; `make selftests` runs all of them."""

from __future__ import annotations

import tomllib

import pytest

from kvmfs.vendor import host_vendor
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


@pytest.mark.timeout(130)
@pytest.mark.parametrize("name", EXPECTATIONS.fast)
def test_selftest(name: str, vendor: str, nothing_left: None) -> None:
    if not (BUILT / name).exists():
        pytest.skip("not built; tools/selftests/build.sh needs Debian's linux-source-6.12")
    outcome = run_test(name, vendor, EXPECTATIONS.of(name, vendor))
    assert outcome.as_expected, f"{outcome.result}: {outcome.said}"
