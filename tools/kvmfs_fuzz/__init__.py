# SPDX-License-Identifier: GPL-2.0-or-later
"""Random guests and random ioctls against a running daemon, which is to outlive them (``make fuzz``)."""
