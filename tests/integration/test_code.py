# SPDX-License-Identifier: GPL-2.0-or-later
"""A client, and processes beside it, write code that its guest executes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).with_name("code_client.py")


def test_the_guest_executes_what_was_written_last(node, nothing_left):
    result = subprocess.run([sys.executable, CLIENT, node], capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stdout) == (0, "seen\n"), result.stderr
