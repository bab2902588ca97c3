# SPDX-License-Identifier: GPL-2.0-or-later
"""Run Linux's KVM selftests, as build.sh made them, on the fake node.

One line per test and vendor, a summary, JUnit XML.  expected.toml says what each test is to do: pass, or skip and why; a
test that does anything else, or that it does not name, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmfs.vendor import host_vendor

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "selftests" / "kvm"
EXPECTED = Path(__file__).with_name("expected.toml")
VENDORS = ("amd", "intel")
KSFT_PASS, KSFT_SKIP = 0, 4         # tools/testing/selftests/kselftest.h
TIMEOUT = 120                       # seconds, as in the tests' own "settings"


@dataclass(frozen=True)
class Expectation:
    """What expected.toml says about one test with one vendor."""

    result: str                     # "pass", "skip", "host" (pass or skip), "linux" (anything), "not run", "open", "unlisted"
    why: str = ""
    timeout: float = TIMEOUT        # seconds
    arguments: tuple[str, ...] = ()
    attempts: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one test did."""

    test: str
    vendor: str
    result: str                     # "pass", "skip", "fail", "hang" or "signal"
    seconds: float
    said: str                       # why it skipped, or the end of its output
    expectation: Expectation
    attempt: int = 1

    @property
    def as_expected(self) -> bool:
        """Whether it did what expected.toml says."""
        allowed = {"host": ("pass", "skip"), "linux": ("pass", "skip", "fail"), "not run": ("skip",)}
        return self.result in allowed.get(self.expectation.result, (self.expectation.result,))


class Expectations:
    """expected.toml: what passes, skips and why, depends on the host or still fails; the fast ones."""

    def __init__(self, path: Path = EXPECTED) -> None:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        self._pass: list[str] = table["pass"]
        self._skip: dict[str, str | dict[str, str]] = table["skip"]
        self._host: dict[str, str] = table["host"]
        self._linux: dict[str, str] = table["linux"]
        self._host_vendor: dict[str, str] = table["host_vendor"]
        self._arguments: dict[str, list[str]] = table["arguments"]
        self._open: dict[str, str] = table["open"]
        self._timeout: dict[str, float] = table["timeout"]
        self._attempts: dict[str, int] = table["attempts"]
        self.fast: list[str] = table["fast"]

    def of(self, test: str, vendor: str) -> Expectation:
        """What ``test`` is to do when the guests see a CPU of ``vendor``."""
        timeout = self._timeout.get(test, TIMEOUT)
        if test in self._host_vendor:
            if vendor != host_vendor():
                return Expectation("not run", self._host_vendor[test])
            return Expectation("pass", "", timeout)
        reason = self._skip.get(test, "")
        if isinstance(reason, dict):
            reason = reason.get(vendor, "")
        if reason:
            return Expectation("skip", reason, timeout)
        if test in self._host:
            return Expectation("host", self._host[test], timeout)
        if test in self._linux:
            return Expectation("linux", self._linux[test], timeout)
        if test in self._open:
            return Expectation("open", self._open[test], timeout)
        if test in self._pass:
            return Expectation("pass", "", timeout, tuple(self._arguments.get(test, ())), self._attempts.get(test, 1))
        return Expectation("unlisted", "expected.toml does not name it", timeout)


def built_tests() -> list[str]:
    """The tests that build.sh made, by their names below the selftests' directory."""
    return sorted((str(path.relative_to(BUILT)) for directory in (BUILT, BUILT / "x86_64") for path in directory.glob("*")
                   if path.is_file() and os.access(path, os.X_OK)), key=lambda name: ("/" in name, name))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a test and what it started: kvmfs run first, so that it takes the daemon away."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(result: str, text: str) -> str:
    if result == "skip":
        found = re.search(r"SKIP[ -]*(?:Requirement not met: )?(.*)", text)
        return found[1] if found else ""
    return "" if result == "pass" else text[-2000:]


def run_test(test: str, vendor: str, expectation: Expectation) -> Outcome:
    """Run one test on a private fake node, in a world where Linux's KVM seems to be loaded: most of them ask for its parameters."""
    if expectation.result == "not run":
        return Outcome(test, vendor, "skip", 0.0, "not run", expectation)
    log = ROOT / "build" / "selftests" / "log" / f"{test.replace('/', '-')}.{vendor}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kvmfs_cli", "run", "--vendor", vendor, "--pretend-cpu", "--", str(BUILT / test),
               *expectation.arguments]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "tools"))
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=BUILT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
        try:
            status = process.wait(expectation.timeout)
            result = {KSFT_PASS: "pass", KSFT_SKIP: "skip"}.get(status, "fail")
            if status < 0 or status > 128:
                result = "signal"
        except subprocess.TimeoutExpired:
            result = "hang"
            _end(process)
        except BaseException:
            _end(process)
            raise
    seconds = time.monotonic() - begin
    return Outcome(test, vendor, result, seconds, _said(result, log.read_text(errors="replace")), expectation)


def run_tests(tests: Sequence[str], vendors: Sequence[str], expectations: Expectations) -> Iterator[Outcome]:
    """Run each of ``tests`` with each of ``vendors``, one after the other."""
    for test in tests:
        for vendor in vendors:
            expectation = expectations.of(test, vendor)
            for attempt in range(1, expectation.attempts + 1):
                outcome = replace(run_test(test, vendor, expectation), attempt=attempt)
                if outcome.as_expected:
                    break
            yield outcome


def line(outcome: Outcome) -> str:
    """One outcome as a line, without its place in the row."""
    text = f"{outcome.test:44} {outcome.vendor:6} {outcome.result:6} {outcome.seconds:6.1f} s"
    if not outcome.as_expected:
        text += f"  NOT AS EXPECTED ({outcome.expectation.result})"
        if outcome.expectation.result == "open":
            text += f": {outcome.expectation.why}"
        elif outcome.result == "skip":
            text += f": {outcome.said}"
    elif outcome.result == "skip":
        text += f"  {outcome.expectation.why} ({outcome.said})"
    if outcome.attempt > 1:
        text += f"  (attempt {outcome.attempt})"
    return text


def junit(outcomes: Sequence[Outcome]) -> ET.ElementTree:
    """The outcomes as JUnit XML: a skip is a skip, anything unexpected a failure."""
    suite = ET.Element("testsuite", name="kvm selftests", tests=str(len(outcomes)),
                       failures=str(sum(not o.as_expected for o in outcomes)),
                       skipped=str(sum(o.as_expected and o.result == "skip" for o in outcomes)),
                       time=f"{sum(o.seconds for o in outcomes):.1f}")
    for outcome in outcomes:
        case = ET.SubElement(suite, "testcase", classname=f"selftests.{outcome.vendor}", name=outcome.test,
                             time=f"{outcome.seconds:.2f}")
        if not outcome.as_expected:
            failure = ET.SubElement(case, "failure", message=f"{outcome.result}, not {outcome.expectation.result}")
            failure.text = re.sub(r"[^\t\n\x20-\ufffd]", "?", outcome.said)
        elif outcome.result == "skip":
            ET.SubElement(case, "skipped", message=outcome.expectation.why)
    return ET.ElementTree(suite)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last lines: how many did what, for each vendor and together."""

    def counted(name: str, some: Sequence[Outcome]) -> str:
        counts = ", ".join(f"{sum(o.result == result for o in some)} {result}"
                           for result in ("pass", "skip", "fail", "hang", "signal"))
        return (f"{name:6} {len(some):3} tests: {counts}; {sum(not o.as_expected for o in some)} not as expected; "
                f"{sum(o.seconds for o in some) / 60:.0f} min")

    vendors = dict.fromkeys(o.vendor for o in outcomes)
    return "\n".join([*(counted(vendor, [o for o in outcomes if o.vendor == vendor]) for vendor in vendors),
                      counted("all", outcomes)])


def main() -> int:
    """Command line; the exit status is 0 when every test did as expected, 1 when not, 2 when there is none."""
    parser = argparse.ArgumentParser(description="Run Linux's KVM selftests on the fake node.")
    parser.add_argument("tests", nargs="*", help="names, as x86_64/cpuid_test (default: all)")
    parser.add_argument("--vendor", choices=VENDORS, action="append", help="default: both, one after the other")
    parser.add_argument("--fast", action="store_true", help="the ones that expected.toml calls fast")
    parser.add_argument("--list", action="store_true", help="only say their names")
    parser.add_argument("--junit", type=Path, default=ROOT / "build" / "selftests.xml")
    options = parser.parse_args()
    expectations = Expectations()
    tests = options.tests or (expectations.fast if options.fast else built_tests())
    vendors = options.vendor or VENDORS
    if options.list:
        print("\n".join(tests))
        return 0
    if not tests:
        print("selftests: none built; tools/selftests/build.sh", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    total = len(tests) * len(vendors)
    for outcome in run_tests(tests, vendors, expectations):
        outcomes.append(outcome)
        print(f"[{len(outcomes):3}/{total}] {line(outcome)}", flush=True)
    junit(outcomes).write(options.junit, encoding="unicode", xml_declaration=True)
    print(summary(outcomes))
    return int(any(not o.as_expected for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
