# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmfs_fuzz``: random clients, one after the other, each a process of its own; what goes wrong can be repeated."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from typing import Final, NamedTuple

from kvmfs.testing.daemon import Daemon

ROUNDS: Final = {"guest": 200, "calls": 1000}
PATIENCE: Final = 120           # seconds for a client; its guests and ioctls have limits of their own
TROUBLE: Final = ("Traceback", "ended of signal", "does not answer", "cannot die")


class Case(NamedTuple):
    """One client."""

    kind: str
    vendor: str
    seed: str

    def __str__(self) -> str:
        return f"--repeat {self.kind} --vendor {self.vendor} --seed {self.seed}"


def run(daemon: Daemon, case: Case) -> str:
    """What went wrong; nothing: an empty text."""
    before = len(daemon.log())
    command = [sys.executable, "-m", f"kvmfs_fuzz.{case.kind}", daemon.node, case.seed, str(ROUNDS[case.kind])]
    said, hung = "", False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as client:
        try:
            said = client.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            client.kill()
            hung = True
    log = daemon.log()[before:]
    if hung:
        said += f"killed after {PATIENCE} s\n"
    return said + log if hung or client.returncode or any(text in log for text in TROUBLE) else ""


def fuzz(vendors: list[str], kinds: list[str], seed: str, seconds: float) -> int:
    """The number of clients that found something."""
    daemons = {vendor: Daemon(["--vendor", vendor]) for vendor in vendors}
    started, count, bad = time.monotonic(), 0, 0
    try:
        while time.monotonic() - started < seconds:
            vendor = vendors[count % len(vendors)]
            case = Case(kinds[count // len(vendors) % len(kinds)], vendor, f"{seed}.{count}")
            trouble = run(daemons[vendor], case)
            count += 1
            if trouble:
                bad += 1
                print(f"== {case}\n{trouble}", flush=True)
                if not daemons[vendor].alive():
                    daemons[vendor] = Daemon(["--vendor", vendor])
    finally:
        for daemon in daemons.values():
            daemon.stop()
    print(f"{count} clients in {time.monotonic() - started:.0f} s, seed {seed}: {bad} found something")
    return bad


def main() -> int:
    """The exit status: 1 when something was found."""
    parser = argparse.ArgumentParser(prog="kvmfs_fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: %(default)s)")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**9)), help="where chance begins (default: any)")
    parser.add_argument("--vendor", choices=["amd", "intel"], help="only this one")
    parser.add_argument("--kind", choices=sorted(ROUNDS), help="only guests' code, or only ioctls")
    parser.add_argument("--repeat", choices=sorted(ROUNDS), metavar="KIND", help="one client, as it was printed")
    options = parser.parse_args()
    vendors = [options.vendor] if options.vendor else ["amd", "intel"]
    if options.repeat:
        daemon = Daemon(["--vendor", vendors[0]])
        try:
            trouble = run(daemon, Case(options.repeat, vendors[0], options.seed))
        finally:
            daemon.stop()
        print(trouble, end="")
        return int(bool(trouble))
    kinds = [options.kind] if options.kind else sorted(ROUNDS)
    return int(fuzz(vendors, kinds, options.seed, options.seconds) > 0)


if __name__ == "__main__":
    sys.exit(main())
