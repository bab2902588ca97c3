# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmd``."""

from kvmd.main import main

main()
