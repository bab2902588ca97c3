# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process takes."""

from __future__ import annotations


def pss(pid: int) -> int:
    """A process's proportional set size in bytes: shared pages count by their share; 0: it cannot be seen."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0
