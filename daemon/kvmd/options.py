# SPDX-License-Identifier: GPL-2.0-or-later
"""What the operator of a daemon can choose."""

from __future__ import annotations

import grp
import logging
import os
import pwd
from dataclasses import dataclass

from kvmfs.kvm.profile import DEFAULT

log = logging.getLogger("kvmd")

NODE_MODE = 0o660
NODE_GROUP = "kvm"


@dataclass(frozen=True, slots=True)
class Options:
    """See ``kvmd --help``."""

    mountpoint: str
    vendor: str = "auto"
    mode: int = NODE_MODE
    owner: str | None = None
    group: str | None = None
    passthrough: str = "auto"
    pid_file: str | None = None
    ready_fd: int | None = None
    faults: tuple[str, ...] = ()        # rules of kvmfs.api.faults
    profile: str = DEFAULT              # of kvmfs.kvm.profile: the kernel that guests and clients see
    listeners_fd: int | None = None     # a link over which seccomp listeners come (kvmfs run)

    def owner_id(self) -> int:
        """The node's user: as asked for, else who runs the daemon.  ValueError when there is no such user."""
        if self.owner is None:
            return os.getuid()
        if self.owner.isdecimal():
            return int(self.owner)
        try:
            return pwd.getpwnam(self.owner).pw_uid
        except KeyError:
            raise ValueError(f"there is no user {self.owner!r}") from None

    def group_id(self) -> int:
        """The node's group: as asked for, else group kvm, else group 0 (or the daemon's own)."""
        if self.group is not None:
            if self.group.isdecimal():
                return int(self.group)
            try:
                return grp.getgrnam(self.group).gr_gid
            except KeyError:
                raise ValueError(f"there is no group {self.group!r} ('groupadd --system {self.group}' makes it)") from None
        if os.getuid() != 0:
            return os.getgid()
        try:
            return grp.getgrnam(NODE_GROUP).gr_gid
        except KeyError:
            log.info("there is no group %s: the node belongs to group 0", NODE_GROUP)
            return 0
