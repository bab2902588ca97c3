# SPDX-License-Identifier: GPL-2.0-or-later
"""`make boot-matrix`: every case with both vendors, one line each, with the time beside that of -accel tcg, and JUnit XML."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from pathlib import Path

from qemu_boot import cases
from qemu_boot.guest import ROOT, GuestError
from qemu_boot.images import Missing

WITH_TCG = ("boot/", "devices/", "grub/", "ovmf/")      # the others wait, or TCG is no measure for them


def run_case(name: str, vendor: str | None) -> tuple[str, float, str]:
    """One case: ("pass", "skip" or "fail"), seconds, what it said."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="boot-", dir=ROOT / "build") as directory:
        try:
            result, said = "pass", cases.cases()[name](vendor, Path(directory))
        except Missing as missing:
            result, said = "skip", str(missing)
        except (GuestError, AssertionError, ValueError, OSError, subprocess.CalledProcessError) as error:
            line = traceback.extract_tb(error.__traceback__)
            where = next(frame for frame in reversed(line) if frame.filename.endswith("cases.py"))
            result, said = "fail", f"{where.line}: {error}"
    return result, time.monotonic() - begin, said


def main() -> int:
    """Run the cases; the exit status is 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vendor", choices=["amd", "intel"], help="only this one")
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
    failed = 0
    for name in names:
        tcg = None
        if not options.no_tcg and name.startswith(WITH_TCG):
            result, seconds, said = run_case(name, None)
            tcg = seconds if result == "pass" else None
        for vendor in [options.vendor] if options.vendor else ["amd", "intel"]:
            result, seconds, said = run_case(name, vendor)
            failed += result == "fail"
            ratio = "" if tcg is None else f"{seconds / tcg:4.1f} x tcg"
            print(f"{result:4} {name:32} {vendor:5} {seconds:6.1f} s {ratio:10} {said}", flush=True)
            case = ET.SubElement(suite, "testcase", name=name, classname=vendor, time=f"{seconds:.2f}")
            if result != "pass":
                ET.SubElement(case, "failure" if result == "fail" else "skipped", message=said.encode("ascii", "replace").decode())
    ET.ElementTree(suite).write(options.junit, encoding="utf-8", xml_declaration=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
