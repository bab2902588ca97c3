# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of ``kvmfs stat``: a row for each statistic, in groups; a column for each VM, and one for all of them."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmfs.kvm.stats import TRANSLATION, VCPU_TIMES
from kvmfs_cli.stat import Numbers, total

_WIDTH: Final = 120             # not on a terminal
_NAMES_WIDTH, _COLUMN_WIDTH = 30, 14
_INTERRUPTS: Final = ("irq_injections", "nmi_injections", "req_event", "request_irq_exits", "irq_window_exits", "nmi_window_exits")
_GROUPS: Final = ("exits by reason", "exits", "interrupts", "ioctls", "translation", "time", "memory")
_MEMORY: Final = ("guest_memory_bytes", "worker_memory_bytes")
_NO_RATE: Final = (*_MEMORY, "code_buffer_bytes", "code_buffer_size")


def group(name: str) -> str:
    """Under which heading a statistic stands."""
    if name.startswith("kvm_exit("):
        return "exits by reason"
    if name.startswith("KVM_"):
        return "ioctls"
    if name in _INTERRUPTS:
        return "interrupts"
    if name in TRANSLATION:
        return "translation"
    if name.endswith(("_ns", "_seconds")) or name in VCPU_TIMES:
        return "time"
    return "memory" if name in _MEMORY else "exits"


def value_text(name: str, value: float) -> str:
    """A count; nanoseconds as seconds."""
    if name.endswith("_ns"):
        return f"{value / 1e9:,.2f} s"
    if name.endswith("_seconds"):
        return f"{value:,.2f} s"
    return f"{value:,.0f}"


def rate_text(name: str, difference: float, seconds: float) -> str:
    """By how much it grows in a second; a time, in percent of one CPU."""
    if name in _NO_RATE:
        return ""
    if name.endswith("_ns"):
        return f"{difference / seconds / 1e7:,.0f} %"
    if name.endswith("_seconds"):
        return f"{100 * difference / seconds:,.0f} %"
    return f"{difference / seconds:,.0f}"


class Screen:
    """Where the table appears: again and again at the same place of a terminal, or one after the other."""

    def __init__(self, *, live: bool) -> None:
        self._console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False)
        on_screen = live and self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False, screen=True) if on_screen else None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, now: dict[str, Numbers], before: dict[str, Numbers] | None, seconds: float) -> None:
        """The table of these numbers; ``before`` those of ``seconds`` ago, for rates."""
        view = table(now, before, seconds, self._console.width) if now else Text("No VM runs.")
        if self._live is not None:
            self._live.update(view, refresh=True)
        else:
            self._console.print(view)


def table(now: dict[str, Numbers], before: dict[str, Numbers] | None, seconds: float, width: int) -> Table:
    """Statistics that are not 0.  When the VMs do not fit side by side only their sum is shown."""
    columns = [(f"VM {name.partition('/')[2]} of daemon {name.partition('/')[0]}", numbers,
                None if before is None else before.get(name, {})) for name, numbers in now.items()]
    if len(now) > 1:
        columns.append(("all", total(now), None if before is None else total(before)))
    if len(columns) * _COLUMN_WIDTH * (1 if before is None else 2) > width - _NAMES_WIDTH:
        columns = [(f"all {len(now)} VMs (--vm N: one)", *columns[-1][1:])] if len(now) > 1 else columns
    found = Table(box=None, pad_edge=False)
    found.add_column("")
    for title, _, earlier in columns:
        found.add_column(title, justify="right")
        if earlier is not None:
            found.add_column("per second", justify="right")
    _add_rows(found, columns, seconds)
    return found


def _add_rows(found: Table, columns: list[tuple[str, Numbers, Numbers | None]], seconds: float) -> None:
    most: dict[str, float] = {}
    for _, numbers, _ in columns:
        for name, value in numbers.items():
            if value:
                most[name] = max(most.get(name, 0), value)
    if sum(name.startswith("vcpu") for name in most) == 1:      # the same as the VM's
        most = {name: value for name, value in most.items() if not name.startswith("vcpu")}
    for heading in _GROUPS:
        names = sorted((name for name in most if group(name) == heading), key=lambda name: (-most[name], name))
        if names:
            found.add_row(Text(heading, style="bold"))
        for name in names:
            cells = []
            for _, numbers, earlier in columns:
                here = name in numbers
                cells.append(value_text(name, numbers[name]) if here else "")
                if earlier is not None:
                    cells.append(rate_text(name, numbers[name] - earlier.get(name, 0), seconds) if here else "")
            found.add_row(f"  {name}", *cells)
