# SPDX-License-Identifier: GPL-2.0-or-later
"""`make boot-matrix`: every case with both vendors, one line each, with the time to the shell beside TCG's; JUnit XML; a table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from qemu_boot import cases
from qemu_boot.guest import ROOT, GuestError
from qemu_boot.images import Missing
from qemu_boot.remains import LeftError

VENDORS = ("amd", "intel")


class Outcome(NamedTuple):
    """"pass", "skip" or "fail", the seconds of the whole case, what it said, the seconds to the shell."""

    result: str
    seconds: float
    said: str
    up: float | None = None


def run_case(name: str, vendor: str | None) -> Outcome:
    """One case."""
    begin, up = time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="boot-", dir=ROOT / "build") as directory:
        try:
            said, up = cases.cases()[name](vendor, Path(directory))
            result = "pass"
        except Missing as missing:
            result, said = "skip", str(missing)
        except (GuestError, LeftError, AssertionError, ValueError, OSError, subprocess.CalledProcessError) as error:
            line = traceback.extract_tb(error.__traceback__)
            where = next(frame for frame in reversed(line) if frame.filename.endswith("cases.py"))
            result, said = "fail", f"{where.line}: {error}"
    return Outcome(result, time.monotonic() - begin, said, up)


def with_tcg(name: str) -> bool:
    """Whether TCG is a measure: it has neither interrupt controllers in the kernel nor kvm-clock, which microvm needs to boot."""
    return name.startswith(("boot/", "devices/", "grub/", "ovmf/")) and "microvm" not in name


def group(name: str) -> str:
    """The line of the last table that a case belongs to: boot/pc and so on."""
    return "/".join(name.split("/")[:2])


def table(outcomes: dict[str, dict[str, Outcome]], ratios: dict[tuple[str, str], list[float]]) -> list[str]:
    """For each group and vendor: how many passed of how many, and the geometric mean of the ratios to TCG."""
    lines = [f"{'':16}" + "".join(f"{vendor:>10} {'x tcg':>6}" for vendor in VENDORS)]
    for name in dict.fromkeys(map(group, outcomes)):
        line = f"{name:16}"
        for vendor in VENDORS:
            found = [outcome[vendor] for case, outcome in outcomes.items() if group(case) == name and vendor in outcome]
            passed = sum(outcome.result == "pass" for outcome in found)
            ratio = ratios.get((name, vendor))
            line += f"{f'{passed}/{len(found)}':>10} {f'{geometric_mean(ratio):.2f}' if ratio else '':>6}"
        lines.append(line.rstrip())
    return lines


def main() -> int:
    """Run the cases; the exit status is 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vendor", choices=VENDORS, help="only this one")
    parser.add_argument("--junit", default=str(ROOT / "build/boot-matrix.xml"))
    parser.add_argument("--no-tcg", action="store_true", help="without the runs with -accel tcg")
    parser.add_argument("--list", action="store_true", help="the names, and nothing else")
    parser.add_argument("patterns", nargs="*", help="parts of the cases' names")
    options = parser.parse_args()
    names = cases.names(options.patterns)
    if options.list:
        print("\n".join(names))
        return 0
    (ROOT / "build").mkdir(exist_ok=True)
    suite = ET.Element("testsuite", name="boot-matrix")
    outcomes: dict[str, dict[str, Outcome]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    for name in names:
        tcg = run_case(name, None).up if with_tcg(name) and not options.no_tcg else None
        for vendor in [options.vendor] if options.vendor else VENDORS:
            outcome = outcomes.setdefault(name, {})[vendor] = run_case(name, vendor)
            result, seconds, said, up = outcome
            ratio = ""
            if up is not None and tcg is not None:
                ratios.setdefault((group(name), vendor), []).append(up / tcg)
                ratio = f"{up / tcg:4.1f} x tcg"
            print(f"{result:4} {name:32} {vendor:5} {seconds:6.1f} s {ratio:10} {said}", flush=True)
            case = ET.SubElement(suite, "testcase", name=name, classname=vendor, time=f"{seconds:.2f}")
            if result != "pass":
                ET.SubElement(case, "failure" if result == "fail" else "skipped", message=said.encode("ascii", "replace").decode())
    ET.ElementTree(suite).write(options.junit, encoding="utf-8", xml_declaration=True)
    print("\n" + "\n".join(table(outcomes, ratios)))
    return int(any(outcome.result == "fail" for found in outcomes.values() for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
