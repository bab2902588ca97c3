# SPDX-License-Identifier: GPL-2.0-or-later
"""`make bench`: what kvmfs costs, beside what others cost in the same run."""
