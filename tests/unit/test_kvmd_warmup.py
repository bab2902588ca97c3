# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMs that the zygote plays, and what they leave behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import gc, os, sys, threading
sys.path[:0] = [{root!r}, {root!r} + "/daemon"]
from kvmd import warmup, worker
from kvmfs.kvm.profile import DEFAULT
found = []
for _ in range(4):
    assert warmup.play({vendor!r}, DEFAULT) == 0
    assert threading.active_count() == 1
    gc.collect()
    found.append(len(os.listdir("/proc/self/fd")))
assert found[1] == found[3], found
warmup.preload({vendor!r}, DEFAULT)
assert [*worker._ahead] == [({vendor!r}, DEFAULT)]
warmup.preload("none", DEFAULT)         # for the daemon to complain about
print("well")
"""


@pytest.mark.parametrize("vendor", ["amd", "intel"])
@pytest.mark.timeout(60)
def test_vms_of_the_warm_up_get_their_vcpu_and_leave_nothing(vendor):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(root=str(ROOT), vendor=vendor)], capture_output=True, text=True,
                          timeout=50)
    assert (done.stdout, done.stderr) == ("well\n", "")
