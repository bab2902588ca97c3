# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast ones of Linux's own KVM selftests, unmodified, on the fake node; `make selftests` runs all of them."""

from __future__ import annotations

import pytest

from selftests.run import BUILT, Expectations, run_test

EXPECTATIONS = Expectations()


def test_each_test_is_named_once() -> None:
    """Nothing that is to pass also skips, and the fast ones are among those that pass."""
    for name in EXPECTATIONS.fast:
        assert {EXPECTATIONS.of(name, vendor).result for vendor in ("amd", "intel")} == {"pass"}
    assert len(EXPECTATIONS.fast) == len(set(EXPECTATIONS.fast))


@pytest.mark.timeout(130)
@pytest.mark.parametrize("name", EXPECTATIONS.fast)
def test_selftest(name: str, vendor: str, nothing_left: None) -> None:
    if not (BUILT / name).exists():
        pytest.skip("not built; tools/selftests/build.sh needs Debian's linux-source-6.12")
    outcome = run_test(name, vendor, EXPECTATIONS.of(name, vendor))
    assert outcome.as_expected, f"{outcome.result}: {outcome.said}"
