# SPDX-License-Identifier: GPL-2.0-or-later
"""`exchange`: an answer to FUSE and the next request in one call, native where that is built."""

from __future__ import annotations

import os


def python_exchange(fd: int, reply: bytes | None, buffer: bytearray) -> int:
    """Write an answer, if there is one, and read the next message; its length. OSError: nothing can be read.

    Negative: the answer was refused with that -errno, and nothing was read.
    """
    if reply is not None:
        try:
            os.write(fd, reply)
        except OSError as error:
            return -(error.errno or 5)
    return os.readv(fd, [buffer])


try:
    from ._exchange import exchange
except ImportError:             # the package was not built anew since that part is there
    exchange = python_exchange

__all__ = ["exchange", "python_exchange"]
