# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that is nothing but some memory, for handlers that read and write it."""

import errno

ARG = 0x1000


class FakeMemory:
    """``size`` bytes from address ARG on; all else is EFAULT; a write that does not fit does nothing."""

    def __init__(self, size=16384):
        self.raw = bytearray(size)

    def _range(self, address, size):
        start = address - ARG
        if start < 0 or start + size > len(self.raw):
            raise OSError(errno.EFAULT, "bad address")
        return slice(start, start + size)

    def read(self, address, size):
        return bytes(self.raw[self._range(address, size)])

    def write(self, address, data):
        self.raw[self._range(address, len(data))] = data
