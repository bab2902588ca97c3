# SPDX-License-Identifier: GPL-2.0-or-later
"""A small assembler for guests: binutils' as and ld."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def assemble(src: str, org: int = 0, bits: int = 64) -> tuple[bytes, dict[str, int]]:
    """Intel syntax without prefixes, starting in 16-, 32- or 64-bit code (.code16 … switch); (the bytes from org on, symbols)."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "a.s").write_text(f".code{bits}\n.intel_syntax noprefix\n{src}\n")
        subprocess.run(["as", "--64", "a.s", "-o", "a.o"], cwd=path, check=True, capture_output=True)
        ld = ["ld", "-Ttext", hex(org), "-e", "0", "a.o"]
        subprocess.run([*ld, "-o", "a.elf"], cwd=path, check=True, capture_output=True)
        subprocess.run([*ld, "--oformat", "binary", "-o", "a.bin"], cwd=path, check=True, capture_output=True)
        lines = subprocess.run(["nm", "a.elf"], cwd=path, check=True, capture_output=True, text=True).stdout.splitlines()
        symbols = {f[2]: int(f[0], 16) for f in (line.split() for line in lines) if len(f) == 3}
        return (path / "a.bin").read_bytes(), symbols
