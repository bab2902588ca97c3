# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmfs_bench``."""

from kvmfs_bench.main import main

main(prog_name="make bench")
