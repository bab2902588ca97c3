# SPDX-License-Identifier: GPL-2.0-or-later
"""`Exchange`: what a connection's reader threads do between two requests, native where that is built."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

BEGUN: Final = 1 << 30          # beside a message's length: the shortcut has begun it
LOOK: Final = 1 << 29           # the shortcut has answered it; the buffer has it still, for `Channel.watch`


class PythonExchange:
    """One for each connection, used by all of its readers."""

    running = 0                 # threads that are in the shortcut

    def __init__(self, fd: int, /) -> None:
        self._fd = fd

    def exchange(self, reply: bytes | None, buffer: bytearray | mmap.mmap, /) -> int:
        """Write an answer, if there is one, and read the next message; its length.  OSError: nothing can be read.

        Negative: the answer was refused with that -errno, and nothing was read.  The length may have BEGUN or LOOK beside it.
        """
        if reply is not None:
            try:
                os.write(self._fd, reply)
            except OSError as error:
                return -(error.errno or 5)
        length = os.readv(self._fd, [buffer])
        if not length:              # a socket in the place of the kernel was closed
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return length

    def about_to_block(self) -> int:
        """The caller will not read for a while: another thread does.  Returns ``running``."""
        return 0

    def interrupt(self, unique: int, /) -> None:
        """A signal came for the caller of a request that Python has not seen (yet)."""

    def set_shortcut(self, address: int, /) -> None:
        """``address``: a struct shortcut (shortcut.h) that lives as long as this; here it is never asked."""


try:
    from ._exchange import Exchange
except ImportError:             # the package was not built anew since that part is there
    Exchange = PythonExchange   # type: ignore[assignment,misc]

__all__ = ["BEGUN", "LOOK", "Exchange", "PythonExchange"]
