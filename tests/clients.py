# SPDX-License-Identifier: GPL-2.0-or-later
"""The sample clients of tools/clients, built when needed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tools" / "clients"
PYTHON_CLIENT = [sys.executable, str(SOURCES / "kvm.py")]


@functools.cache
def build() -> Path:
    """The directory of hello, hello-static, modes and modes-static."""
    made = subprocess.run(["make", "-C", str(SOURCES)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / "build"


def program(name: str) -> str:
    """The path of a client in C."""
    return str(build() / name)


def public_copy(*names: str) -> tempfile.TemporaryDirectory[str]:
    """Copies of clients that every user can reach, wherever the checkout is."""
    directory = tempfile.TemporaryDirectory(prefix="clients-")
    os.chmod(directory.name, 0o755)
    for name in names:
        copy = Path(directory.name) / name
        copy.write_bytes((build() / name).read_bytes())
        copy.chmod(0o755)
    return directory


def subtests() -> list[str]:
    """The names of what ``modes`` can do."""
    return subprocess.run([program("modes"), "-l"], capture_output=True, text=True, check=True).stdout.split()


def assert_all_ok(result: subprocess.CompletedProcess[str], names: list[str] | None = None) -> None:
    """Every subtest of ``modes`` (or those named) was ok, and the exit code says so too."""
    lines = result.stdout.splitlines()
    bad = [line for line in lines if not line.startswith("ok ")]
    assert not bad and result.returncode == 0, "\n".join([*bad, f"exit code {result.returncode}", result.stderr])
    assert lines == [f"ok {name}" for name in names or subtests()]


def assert_hello(result: subprocess.CompletedProcess[str]) -> None:
    """``hello`` did all it should."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the guest wrote: Hello from a guest in real mode\n" in result.stdout
    assert "KVM_EXIT_HLT" in result.stdout
