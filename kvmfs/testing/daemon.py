# SPDX-License-Identifier: GPL-2.0-or-later
"""A private daemon, for tests and measurements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

STOP_PATIENCE = 20          # seconds for a daemon to end its VMs


class DaemonError(Exception):
    """A daemon did not start; the text is what it said."""


class Daemon:
    """A kvmd with these options on a temporary directory.  ``node`` is the path of its node.  Raises DaemonError."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvmfs-pytest-"))
        self.node = str(self.directory / "node" / "kvm")
        self._log = self.directory / "log"
        reader, writer = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvmd", "--log-level", "warning", "--mode", "600", "--ready-fd", str(writer),
                 *options, str(self.directory / "node")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer])
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            ready = file.read() == b"ready\n"
        if not ready:
            said = self.log().strip()
            self.stop()
            raise DaemonError(said)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def log(self) -> str:
        """What it said until now: warnings and errors."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it in order; nothing stays."""
        self._process.terminate()
        try:
            self._process.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
