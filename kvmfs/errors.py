# SPDX-License-Identifier: GPL-2.0-or-later
"""The one exception that carries an errno from any layer to the client."""

from __future__ import annotations

import os


class KvmError(OSError):
    """An ioctl's failure: ``errno`` is what the client sees, exactly as the kernel would return it."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno, os.strerror(errno))
