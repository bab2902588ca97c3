# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmfs_cli``."""

from kvmfs_cli.main import main

main(prog_name="kvmfs")
