# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU, under `kvmfs run` or with TCG: its serial console and its monitor."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qemu_boot import remains
from qemu_boot.images import QEMU

ROOT = remains.ROOT
KVMFS = (sys.executable, "-m", "kvmfs_cli")
# What QEMU says when it is told to end; always with kernel-irqchip=off; with more vCPUs than the host has CPUs. On any KVM.
EXPECTED_STDERR = ("terminating on signal", "Userspace local APIC is deprecated for KVM",
                   "Do not use kernel-irqchip except for the -M isapc machine type",
                   "exceeds the recommended cpus supported by KVM")


class GuestError(Exception):
    """The guest did not do what it should; the text has the end of what it wrote."""


class Guest:
    """A running QEMU.  A context manager: at its end the process is gone, or was killed, and nothing of kvmfs is left."""

    def __init__(self, vendor: str | None, arguments: Sequence[str], *, machine: str = "pc",
                 node: remains.Node | None = None, terminal: int | None = None) -> None:
        """``vendor``: "amd" or "intel" under `kvmfs run` with -accel kvm; None is TCG without kvmfs.

        ``node``: the daemon whose node QEMU gets, of that vendor; otherwise it gets a daemon of its own.
        ``terminal``: a descriptor of the terminal that is to be QEMU's standard input and its session's.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="qemu-boot-")
        self._qmp_path = os.path.join(self._directory.name, "qmp")
        self._stderr = tempfile.TemporaryFile()      # noqa: SIM115 - closed by __exit__
        accel = "tcg" if vendor is None else "kvm"
        options = ["--vendor", str(vendor)] if node is None else ["--node", str(node.path)]
        wrapper = [] if vendor is None else [*KVMFS, "run", *options, "--"]
        command = [*wrapper, QEMU, "-machine", f"{machine},accel={accel}", "-nodefaults", "-display", "none", "-serial", "stdio",
                   "-qmp", f"unix:{self._qmp_path},server=on,wait=off", *arguments]
        self._marker = f"KVMFS_QEMU_BOOT={uuid.uuid4()}"
        environment = {**remains.ENVIRONMENT, **dict([self._marker.split("=")]), "TMPDIR": self._directory.name}
        if terminal is not None:
            command = ["setsid", "--ctty", "--wait", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE if terminal is None else terminal,
                                        stdout=subprocess.PIPE, stderr=self._stderr, env=environment,
                                        start_new_session=terminal is None)
        self.console = b""              # all that came
        self._seen = 0                  # how much of it expect() has passed
        self._monitor: socket.socket | None = None
        self._buffer = b""

    # ---- serial console -------------------------------------------------------------------------------------

    def stderr(self) -> str:
        """What QEMU and kvmfs said, without the messages of an ordered end."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.strip() and not any(text in line for text in EXPECTED_STDERR))

    def _fail(self, text: str) -> GuestError:
        # QEMU says why a KVM_RUN failed before it dumps the registers.
        return GuestError(f"{text}; the console ended with {self.console[-400:]!r}, stderr: {self.stderr()[:1200]!r}")

    def read(self, seconds: float) -> bool:
        """Take what the console has within ``seconds``; False at its end."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], max(seconds, 0))[0]:
            data = os.read(self.process.stdout.fileno(), 65536)
            self.console += data
            return bool(data)
        return True

    def expect(self, text: str, seconds: float = 60, *, line: bool = False) -> str:
        """Wait until the console shows ``text``, after what was expected before.  Raises GuestError.

        With ``line`` the rest of its line is waited for, too, and returned with it.
        """
        deadline = time.monotonic() + seconds
        encoded = text.encode()
        while (at := self.console.find(encoded, self._seen)) < 0 or (line and b"\n" not in self.console[at:]):
            if time.monotonic() > deadline:
                raise self._fail(f"no {text!r} within {seconds:.0f} s")
            if not self.read(0.2):
                raise self._fail(f"QEMU ended before {text!r}")
        text = self.console[at:].partition(b"\n")[0].decode(errors="replace")
        self._seen = self.console.index(b"\n", at) + 1 if line else at + len(encoded)
        return text.strip()

    def send(self, text: str) -> None:
        """Type ``text``."""
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), text.encode())

    def shell(self, command: str, seconds: float = 30) -> str:
        """Run ``command`` in the guest's shell; returns its output.  Raises GuestError, also when it fails."""
        # The marker is put together by the guest: an echo of the command does not look like it.
        start = self._seen
        self.send(f"{command}; echo END-OF''-COMMAND $?\n")
        line = self.expect("END-OF-COMMAND", seconds, line=True)
        output = self.console[start:self._seen].decode(errors="replace").replace("\r", "")
        self.expect("guest# ", seconds)
        if line.split()[-1] != "0":
            raise self._fail(f"{command!r} failed with {line!r}")
        return output.rpartition("END-OF-COMMAND")[0].strip()

    def up(self, seconds: float = 60) -> str:
        """Wait for the guest's shell; returns its line with kernel, CPUs and clock source."""
        line = self.expect("GUEST-UP", seconds, line=True)
        self.expect("guest# ", seconds)
        return line

    # ---- monitor --------------------------------------------------------------------------------------------

    def qmp(self, command: str, seconds: float = 60, **arguments: object) -> object:
        """One QMP command; its "return".  Raises GuestError."""
        if self._monitor is None:
            self._monitor = socket.socket(socket.AF_UNIX)
            deadline = time.monotonic() + 20
            while self._monitor.connect_ex(self._qmp_path):
                if time.monotonic() > deadline:
                    raise self._fail("no monitor")
                time.sleep(0.05)
            self.qmp("qmp_capabilities")
        self._monitor.settimeout(seconds)
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            while b"\n" not in self._buffer:
                try:
                    data = self._monitor.recv(65536)
                except OSError as error:
                    raise self._fail(f"{command}: {error}") from error
                if not data:
                    if command == "quit":
                        return None
                    raise self._fail(f"{command}: the monitor closed")
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\n")
            answer = json.loads(line)
            if "error" in answer:
                raise self._fail(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def hmp(self, line: str, seconds: float = 60) -> str:
        """One line for the human monitor; what it says."""
        return str(self.qmp("human-monitor-command", seconds, **{"command-line": line})).strip()

    # ---- end ------------------------------------------------------------------------------------------------

    def qemu(self) -> int:
        """QEMU's own pid: `kvmfs run` is between it and us.  Raises GuestError."""
        for pid in remains.marked(self._marker):
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                return pid
        raise self._fail("QEMU is gone")

    def wait(self, seconds: float = 30) -> int:
        """Wait for QEMU's end; its exit status.  Raises GuestError."""
        deadline = time.monotonic() + seconds
        while self.read(0.2) and time.monotonic() < deadline:
            pass
        try:
            return self.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise self._fail(f"QEMU did not end within {seconds:.0f} s") from None

    def power_off(self, seconds: float = 60) -> None:
        """The guest's own poweroff; QEMU ends with status 0.  Raises GuestError."""
        self.send("poweroff -f\n")
        if status := self.wait(seconds):
            raise self._fail(f"QEMU ended with status {status}")

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._stderr):
            if file is not None:
                file.close()
        try:
            if kind is None:
                remains.settle(lambda: remains.private(self._marker, Path(self._directory.name)))
        finally:
            self._directory.cleanup()
