# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with timers and pending interrupts that goes on in a fresh VM of another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.daemon import ENVIRONMENT

CLIENT = Path(__file__).with_name("migrate.py")


def migrate(node: str, what: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CLIENT), node, what, str(path)], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=60, check=False)


def test_a_guest_goes_on_in_a_fresh_vm(kvmd, tmp_path):
    saved = migrate(kvmd.node, "save", tmp_path / "state")
    assert saved.returncode == -9, saved.stderr             # it kills itself
    assert saved.stdout.startswith("saved ") and saved.stdout.endswith(" 0\n")
    kvmd.wait_for_vms(0)
    restored = migrate(kvmd.node, "restore", tmp_path / "state")
    assert restored.stdout == "restored IO 0xf4 write 01 1\n", restored.stdout + restored.stderr
    assert os.path.getsize(tmp_path / "state") > 1 << 20
