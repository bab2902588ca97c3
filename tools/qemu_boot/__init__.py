# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified QEMU on the fake node: images, a QEMU to talk to, the cases of `make boot-matrix`."""
