# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel writes to and reads from /dev/fuse, for tests that stand in for it with a socket, ``ours``."""

import socket
import struct

from kvmfs.fuse import protocol


class KernelSide:
    """Requests of thread 7 on inode 2, and their answers."""

    ours: socket.socket

    def send_ioctl(self, unique, cmd):
        body = struct.pack("<QIIQII", 1, 0, cmd, 0, 0, 0)
        self.ours.send(protocol.IN_HEADER.pack(40 + len(body), protocol.FUSE_IOCTL, unique, 2, 0, 0, 7, 0, 0) + body)

    def send_interrupt(self, unique):
        header = protocol.IN_HEADER.pack(48, protocol.FUSE_INTERRUPT, unique | 1, 0, 0, 0, 0, 0, 0)
        self.ours.send(header + struct.pack("<Q", unique))

    def reply(self):
        (_length, error, unique, result, _flags, _in, _out) = protocol.IOCTL_REPLY.unpack_from(self.ours.recv(4096))
        assert error == 0
        return unique, result
