# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that is measured, started when first asked for and gone at the end: nodes, the client, QEMU's guests."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvmfs_bench.model import AbsentError, MeasureError, Subject

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
REAL_NODE = "/dev/kvm"
# How the client calls a node when it proves which one it has.
KINDS = {Subject.OURS: "fuse.kvmfs", Subject.SERVER: "fuse.kvmbench", Subject.REAL: "real"}
START_TIMEOUT, STOP_TIMEOUT, JOB_TIMEOUT = 60, 20, 120
EXIT_ABSENT = 4         # of bench-client
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "tools"))}
READY_ON_STDOUT = ["sh", "-c", 'exec "$0" "$@" 3>&1 1>&2']
# The node is whose, and when the program begins: starting `kvmfs run` is not the program's time.
ANNOUNCED = ["sh", "-c", 'echo "start $(stat -c %F /dev/kvm 2>&1)"; exec "$0" "$@"']


def build() -> None:
    """The programs in C.  Raises MeasureError."""
    made = subprocess.run(["make", "-s", "-C", str(ROOT / "tools/bench")], capture_output=True, text=True, check=False)
    if made.returncode:
        raise MeasureError(f"make -C tools/bench: {made.stdout}{made.stderr}")


class Node:
    """A server of a node, on a directory of its own."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        """``command`` ends with what comes before the directory; it says "ready" on its standard output."""
        directory.mkdir()
        self.directory, self.path = directory, str(directory / "kvm")
        self._log = tempfile.TemporaryFile()        # noqa: SIM115 - as long as the node
        self.process = subprocess.Popen([*command, str(directory)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self._log, env=ENVIRONMENT)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self.stop()
            self._log.seek(0)
            raise MeasureError(f"{command[-1]} did not start: {self._log.read().decode(errors='replace')[-400:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            subprocess.run(["umount", "-l", str(self.directory)], stderr=subprocess.DEVNULL, check=False)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


class Lab:
    """A context manager."""

    def __init__(self, *, quick: bool, vendor: str = "auto") -> None:
        self.quick, self.vendor = quick, vendor
        self.cpus = len(os.sched_getaffinity(0))
        self._cpu = max(os.sched_getaffinity(0))
        self._directory = Path(tempfile.mkdtemp(prefix="kvmfs-bench-"))
        self._nodes: dict[tuple[Subject, bool], Node] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for node in self._nodes.values():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                node.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def pin(self, pinned: bool) -> list[str]:
        """What starts a command on the one host CPU where client and server are together."""
        return ["taskset", "-c", str(self._cpu)] if pinned else []

    def count(self, number: int) -> int:
        """How often something is done: less with --quick."""
        return max(number // 20, 10) if self.quick else number

    # ---- nodes ----------------------------------------------------------------------------------------------

    def server(self, subject: Subject, pinned: bool = False) -> Node:
        """The daemon or the C server, started now if it is not running.  Raises MeasureError."""
        if (subject, pinned) not in self._nodes:
            if subject is Subject.OURS:
                command = [*READY_ON_STDOUT, sys.executable, "-m", "kvmd", "--log-level", "warning", "--ready-fd", "3",
                           "--vendor", self.vendor]
            else:
                command = [str(BUILD / "bench-server")]
            directory = self._directory / f"{subject.name.lower()}{'-pinned' * pinned}"
            self._nodes[subject, pinned] = Node([*self.pin(pinned), *command], directory)
        return self._nodes[subject, pinned]

    def node(self, subject: Subject, pinned: bool = False) -> str:
        """The path of that subject's node.  Raises AbsentError, MeasureError."""
        if subject is Subject.REAL:
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.stat(REAL_NODE).st_mode) and os.access(REAL_NODE, os.R_OK | os.W_OK):
                    return REAL_NODE
            raise AbsentError(f"no {REAL_NODE} here")
        return self.server(subject, pinned).path

    def command(self, subject: Subject, pinned: bool, *job: str | float) -> list[str]:
        """The client on that node."""
        return [*self.pin(pinned), str(BUILD / "bench-client"), self.node(subject, pinned), KINDS[subject], *map(str, job)]

    def client(self, subject: Subject, pinned: bool, *job: str | float) -> dict[str, float]:
        """Run the client's job; its figures.  Raises AbsentError, MeasureError."""
        command = self.command(subject, pinned, *job)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=JOB_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise MeasureError(f"{' '.join(map(str, job))}: not done within {JOB_TIMEOUT} s") from error
        text = (done.stdout + done.stderr).strip()
        if done.returncode == EXIT_ABSENT:
            raise AbsentError(text)
        if done.returncode:
            raise MeasureError(f"{' '.join(map(str, job))}: {text or f'exit code {done.returncode}'}")
        return figures(done.stdout)

    # ---- QEMU -----------------------------------------------------------------------------------------------

    def qemu(self, subject: Subject, *arguments: str, timeout: float = JOB_TIMEOUT) -> list[tuple[float, str]]:
        """Run QEMU with -accel tcg, or kvm on our node: (seconds since its start, line) of its standard output, its end
        as the empty line.  Raises MeasureError."""
        accel = "tcg" if subject is Subject.TCG else "kvm"
        wrapper: list[str] = []
        if subject is Subject.OURS:
            wrapper = [sys.executable, "-m", "kvmfs_cli", "run", "--node", self.node(subject), "--"]
        command = [*wrapper, *ANNOUNCED, "timeout", "-k", "1", str(timeout), qemu_path(), "-machine", f"pc,accel={accel}",
                   "-cpu", "qemu64", "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot", *arguments]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                       env=ENVIRONMENT, cwd=ROOT)
            assert process.stdout is not None
            lines, begin = [], 0.0
            for raw in process.stdout:
                now, line = time.monotonic(), raw.decode(errors="replace").strip()
                if not begin:
                    begin = now
                    if subject is Subject.OURS and "regular" not in line:
                        process.kill()
                        raise MeasureError(f"QEMU would not get our node: {line}")
                else:
                    lines.append((now - begin, line))
            process.wait()
            lines.append((time.monotonic() - begin, ""))
            if len(lines) == 1:
                errors.seek(0)
                raise MeasureError(f"QEMU said nothing: {errors.read().decode(errors='replace').strip()[-400:]}")
            return lines


@functools.cache
def qemu_path() -> str:
    """Raises MeasureError."""
    linux_image()
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise MeasureError("there is no qemu-system-x86_64")
    return path


@functools.cache
def linux_image() -> tuple[str, str]:
    """Kernel and initramfs of `make boot`; they and QEMU are installed when they are missing.  Raises MeasureError."""
    made = subprocess.run(["sh", "-euc", '. tools/linux_image.sh >&2; printf "%s\n" "$kernel" "$initrd"'],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        raise MeasureError(made.stderr.strip()[-400:])
    kernel, initrd = made.stdout.splitlines()
    return kernel, initrd


def figures(text: str) -> dict[str, float]:
    """Lines of "NAME VALUE".  Raises MeasureError."""
    try:
        return {name: float(value) for name, value in (line.split() for line in text.splitlines())}
    except ValueError as error:
        raise MeasureError(f"no figures: {text[-200:]!r}") from error
