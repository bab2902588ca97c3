# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin: a private node for tests of programs that use KVM.  Loaded by pytest when kvmfs is installed.

Fixtures: ``kvm_node`` (the path of a node of this test run's own) and ``kvm`` (a :class:`kvmfs.testing.Kvm` on it).  Markers on a
test, class or module choose what that node is: ``kvm_vendor("intel")``, ``kvm_profile("linux-5.15")``,
``kvm_fault("KVM_CREATE_VCPU:ENOMEM")``.  Where the host cannot have a node the tests are skipped, and the reason says
what is missing.
``--kvm-node PATH`` gives them an existing one instead: then tests with a marker are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kvmfs.testing.daemon import Daemon, DaemonError

if TYPE_CHECKING:
    from kvmfs.testing.client import Kvm

MARKERS = (
    'kvm_vendor(name): the node of this test presents "intel" or "amd" CPUs.',
    'kvm_profile(name): the node of this test answers as an older kernel, "linux-5.15" say (kvmfs mount --help has the names).',
    "kvm_fault(rule, ...): faults that the node of this test injects (kvmfs mount --help has the rules).",
)
DEFAULT_NODE = "/dev/kvm"
_NEEDED = ("fuse", "mounting", "capabilities", "ptrace", "pidfd", "engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kvm-node``."""
    parser.getgroup("kvmfs").addoption("--kvm-node", metavar="PATH", help="Use this KVM node (/dev/kvm, say) and start none.")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a test's markers ask of its node."""

    vendor: str = ""
    profile: str = ""
    faults: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """kvmd's options for it."""
        return [*(["--vendor", self.vendor] if self.vendor else []), *(["--profile", self.profile] if self.profile else []),
                *(part for fault in self.faults for part in ("--fault", fault))]


class Nodes:
    """The daemons of this test run, one for each wish."""

    def __init__(self, given: str | None) -> None:
        self._given = given
        self._daemons: dict[Wish, Daemon] = {}

    def get(self, wish: Wish) -> str:
        """The path of a node that is as wished.  Skips the test when there cannot be one."""
        given = self._given or _inherited()
        if given is not None:
            if wish != Wish():
                pytest.skip(f"{given} is as it is: this test's markers ask for a node of its own")
            return given
        daemon = self._daemons.get(wish)
        # What a fault rule has counted so far belongs to one test.
        if daemon is not None and (wish.faults or not daemon.alive()):
            self._daemons.pop(wish).stop()
            daemon = None
        if daemon is None:
            daemon = self._daemons[wish] = self._start(wish)
        return daemon.node

    @staticmethod
    def _start(wish: Wish) -> Daemon:
        try:
            return Daemon(wish.options())
        except DaemonError as error:
            if why := _what_is_missing():
                pytest.skip(f"no KVM node: {why} ('kvmfs doctor' says more)")
            pytest.fail(f"kvmd did not start: {error}", pytrace=False)

    def stop(self) -> None:
        """End them all."""
        for daemon in self._daemons.values():
            daemon.stop()
        self._daemons.clear()


def _inherited() -> str | None:
    """/dev/kvm under ``kvmfs run -- pytest``."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        ours = any(line.split()[4] == DEFAULT_NODE and " fuse.kvmfs " in line for line in file)
    return DEFAULT_NODE if ours else None


def _what_is_missing() -> str:
    from kvmfs_cli.checks import CHECKS, Status, run

    lacking = [result.detail for name, check in CHECKS if name in _NEEDED and (result := run(check)).status is not Status.OK]
    if lacking and os.geteuid() != 0:
        lacking.append("an ordinary user runs the tests as 'kvmfs run -- pytest'")
    return "; ".join(lacking)


@pytest.fixture(scope="session")
def _kvm_nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    nodes = Nodes(request.config.getoption("--kvm-node"))
    yield nodes
    nodes.stop()


def _wish_of(item: pytest.Item) -> Wish:
    def argument(name: str) -> str:
        marker = item.get_closest_marker(name)
        return str(marker.args[0]) if marker else ""

    faults = tuple(str(rule) for marker in item.iter_markers("kvm_fault") for rule in marker.args)
    return Wish(argument("kvm_vendor"), argument("kvm_profile"), faults)


@pytest.fixture
def kvm_node(request: pytest.FixtureRequest, _kvm_nodes: Nodes) -> str:
    """The path of a KVM node of this test run's own, as the test's markers want it."""
    return _kvm_nodes.get(_wish_of(request.node))


@pytest.fixture
def kvm(kvm_node: str) -> Iterator[Kvm]:
    """A :class:`kvmfs.testing.Kvm` on ``kvm_node``; it is closed when the test ends."""
    from kvmfs.testing.client import Kvm

    with Kvm(kvm_node) as client:
        yield client
