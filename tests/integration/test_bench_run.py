# SPDX-License-Identifier: GPL-2.0-or-later
"""`make bench --quick` measures at all, against the C server and, where there is one, the real node."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.daemon import ENVIRONMENT


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("nothing_left")
def test_quick(tmp_path):
    path = tmp_path / "bench.json"
    only = ("api_version", "set_msrs", "pio_exit", "irqfd_to_halted_guest", "ioeventfd_to_reader",
            "memory_128_mib_untouched", "idle_1_vm")
    done = subprocess.run([sys.executable, "-m", "kvmfs_bench", "--quick", "--json", str(path),
                           *(word for name in only for word in ("--only", name))],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    assert set(only) <= set(rows)
    assert all(row["ours"] > 0 for row in rows.values()), rows
    assert rows["api_version"]["ratio"] > 0 and rows["set_msrs/pinned"]["ratio"] > 0      # the C server is always there
    assert "the machine is" in done.stdout and "targets met" in done.stdout


def test_the_client_proves_which_node_it_has(tmp_path):
    from kvmfs_bench import lab

    lab.build()
    not_a_node = tmp_path / "kvm"
    not_a_node.touch()
    done = subprocess.run([str(lab.BUILD / "bench-client"), str(not_a_node), "fuse.kvmfs", "system", "1"],
                          capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode and "KVM_GET_API_VERSION" in done.stdout
    with lab.Lab(quick=True) as place:
        node = place.node(lab.Subject.OURS)
        for kind in ("real", "fuse.kvmbench"):
            done = subprocess.run([str(lab.BUILD / "bench-client"), node, kind, "system", "1"],
                                  capture_output=True, text=True, timeout=10, check=False)
            assert (done.returncode, done.stdout) == (3, f"{node} is not a node of {kind}\n")
