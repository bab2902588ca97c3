# SPDX-License-Identifier: GPL-2.0-or-later
"""The zygote's memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = f"""
import re, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "daemon")!r}]
from kvmd import zygote

def large():
    return int(re.search("AnonHugePages: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1])

kept = [str(number) * 8 for number in range(200_000)]
before = large()
zygote._collapse()
assert kept == [str(number) * 8 for number in range(200_000)]
print(large() - before)
"""


@pytest.mark.timeout(60)
def test_pythons_memory_moves_into_large_pages_and_stays_as_it_is():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    if int(done.stdout) == 0:
        pytest.skip("no large pages: Linux before 6.1, or none is free")
    assert int(done.stdout) > 0
