# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that touches a client process: its memory, descriptors and registers."""
