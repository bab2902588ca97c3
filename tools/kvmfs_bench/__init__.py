# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: kvmfs beside its rivals, in the same run."""
