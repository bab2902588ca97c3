# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmfs version``: what this installation is, and what the daemons of this machine do."""

from __future__ import annotations

import json
import os
import platform
import threading
from importlib import metadata
from typing import Any

PACKAGES = ("kvmfs", "unicorn", "pyfuse3", "trio")
FILESYSTEM = "fuse.kvmfs"
PATIENCE = 3            # seconds for a daemon to tell its state


def collect() -> dict[str, Any]:
    """All facts as one JSON-able object."""
    from kvmd.init import STEPS
    from kvmfs import vendor
    from kvmfs.kvm import caps, profile

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "(run from its sources)"
    return {
        "versions": {**versions, "python": platform.python_version(), "kernel": platform.release()},
        "host": _host(),
        "capabilities": {"supported": len(caps.SUPPORTED), "absent": len(caps.ABSENT)},
        "vendor": vendor.load("auto").name,
        "profiles": profile.names(),
        "steps": [getattr(step, "__name__", "?") for step in STEPS],
        "nodes": [node for path in _mountpoints() if (node := _state(path)) is not None],
    }


def _host() -> dict[str, bool | str]:
    """What this user can have on this machine; a string says what is missing and what to do."""
    from kvmfs.fuse import mount
    from kvmfs_cli import namespace

    fuse: bool | str = True
    try:
        os.close(mount.open_dev_fuse())
    except OSError as error:
        fuse = error.strerror or str(error)
    return {"fuse": fuse, "passthrough": mount.passthrough_supported(), "user_namespaces": namespace.user_namespaces()}


def _mountpoints() -> list[str]:
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields = before.split()
            if after.split()[0] == FILESYSTEM and fields[3] == "/":
                found.append(fields[4].encode().decode("unicode_escape"))
    return found


def _state(mountpoint: str) -> dict[str, Any] | None:
    """What that node's daemon says; None: nothing, it is dead.

    One that hangs must not hang this program: it is asked in a thread that may stay behind.
    """
    answers: list[dict[str, Any] | None] = []
    thread = threading.Thread(target=lambda: answers.append(_read_state(mountpoint)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers[0] if answers else {"node": mountpoint, "hangs": f"no answer within {PATIENCE} s; 'umount -l' takes it away"}


def _read_state(mountpoint: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(mountpoint, "state"), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in facts["versions"].items():
        table.add_row(name, value)
    host, capabilities = facts["host"], facts["capabilities"]
    table.add_row("vendor", f"{facts['vendor']} (what --vendor auto means here)")
    table.add_row("profiles", f"{', '.join(facts['profiles'])} (--profile; the last one is the default)")
    table.add_row("capabilities", f"{capabilities['supported']} of the {sum(capabilities.values())} that Linux has on x86")
    table.add_row("/dev/fuse", "can be opened" if host["fuse"] is True else host["fuse"])
    table.add_row("passthrough", "yes" if host["passthrough"] else "no: kvm_run is copied at each exit")
    table.add_row("user namespaces", "yes" if host["user_namespaces"] else "no: kvmfs run needs root")
    table.add_row("start-up", " → ".join(facts["steps"]))
    console.print(table)
    for node in facts["nodes"]:
        table = Table(title=str(node.get("node")), show_header=False, title_justify="left")
        for name in ("hangs", "vendor", "module", "profile", "engine", "passthrough", "cpus", "steps", "vms_created"):
            if name in node:
                value = node[name]
                table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for vm in node.get("vms", []):
            table.add_row(f"VM {vm['vm']}", f"process {vm['process']}, worker {vm['worker']}")
        console.print(table)
    if not facts["nodes"]:
        console.print("No node is mounted: 'kvmfs run -- PROGRAM' brings its own, 'kvmfs mount DIRECTORY' makes one.")


def as_json(facts: dict[str, Any]) -> str:
    """The facts as JSON."""
    return json.dumps(facts, indent=2)
