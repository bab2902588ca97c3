# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU and its guests do in `make boot-matrix` and in the test suite.

A case is a function of a vendor ("amd" or "intel" under `kvmfs run`, None with TCG) and a directory for its files.  It returns a
Result, and raises GuestError, LeftError, AssertionError or Missing.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import pty
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qemu_boot import images
from qemu_boot.guest import Guest
from qemu_boot.remains import Node


class Result(NamedTuple):
    """What a case has to say, and the seconds from QEMU's start to the guest's shell where that is comparable with TCG's."""

    said: str
    up: float | None = None


Case = Callable[[str | None, Path], Result]
MEMORY = ("-m", "256")
APPEND = ("-append", "console=ttyS0")
OVMF = Path("/usr/share/OVMF")


def linux(directory: Path) -> list[str]:
    """The options of a guest that goes to the shell of our initramfs."""
    return [*MEMORY, "-kernel", str(images.kernel()), "-initrd", str(images.initramfs(directory)), *APPEND]


def check_clock(guest: Guest, vendor: str | None) -> None:
    """With KVM the clock source is kvm-clock, and the guest's seconds are as long as the host's."""
    if vendor is None:
        return
    assert guest.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock"
    begin, first = time.monotonic(), float(guest.shell("cut -d' ' -f1 /proc/uptime"))
    time.sleep(1)
    last = float(guest.shell("cut -d' ' -f1 /proc/uptime"))
    took = time.monotonic() - begin
    assert 0.9 < last - first < took + 0.2, f"the guest counted {last - first:.2f} s of {took:.2f} s"


def no_warnings(guest: Guest, vendor: str | None) -> None:
    """Neither QEMU nor kvmfs complained.  (TCG lacks features of the host's CPU and says so.)"""
    assert vendor is None or not guest.stderr(), guest.stderr()


def boot(vendor: str | None, directory: Path, *, machine: str = "pc", cpus: int = 2, cpu: str | None = None,
         restart: bool = True) -> Result:
    """Firmware, kernel, shell; reboot; again to the shell; power off."""
    chosen = ("-cpu", cpu) if cpu is not None and vendor is not None else ()
    begin = time.monotonic()
    with Guest(vendor, [*linux(directory), "-smp", str(cpus), *chosen], machine=machine) as guest:
        line = guest.up(120)
        first = time.monotonic() - begin
        assert f" {cpus} CPUs" in line, line
        assert guest.shell("echo $((6 * 7))") == "42"
        check_clock(guest, vendor)
        said = f"to the shell {first:.1f} s"
        if restart:
            if machine.startswith("microvm"):
                # Linux would jump to the firmware's entry. That is qboot, which sets SP and not ESP: its stack is wherever
                # the kernel's was, modulo 64 KiB, and sooner or later it overwrites something that is needed.
                guest.shell("echo triple > /sys/kernel/reboot/type")
            begin = time.monotonic()
            guest.send("reboot -f\n")
            guest.up(120)
            assert guest.shell("echo $((7 * 8))") == "56"
            said += f", reboot {time.monotonic() - begin:.1f} s"
        guest.power_off()
        no_warnings(guest, vendor)
    return Result(said, first)


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[int]:
    """An HTTP server on ``directory``, for guests' user networking; yields its port."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def virtio(machine: str, disk: Path) -> list[str]:
    """A disk, a network card and an entropy source; microvm has no PCI."""
    bus = "device" if machine.startswith("microvm") else "pci"
    return ["-drive", f"file={disk},format=raw,if=none,id=disk", "-device", f"virtio-blk-{bus},drive=disk",
            "-netdev", "user,id=net", "-device", f"virtio-net-{bus},netdev=net", "-device", f"virtio-rng-{bus}"]


def devices(vendor: str | None, directory: Path, *, machine: str = "pc", cpus: int = 2, network: bool = True) -> Result:
    """The root file system on a virtio disk, written to and checked from outside; network; entropy."""
    disk = images.disk(directory)
    token, size = str(random.randrange(10**12)), 700_000
    web = directory / "web"
    web.mkdir(exist_ok=True)
    (web / "data").write_bytes(data := random.randbytes(size))
    begin = time.monotonic()
    with web_server(web) as port, Guest(vendor, [*linux(directory), "-smp", str(cpus), *virtio(machine, disk)],
                                        machine=machine) as guest:
        line = guest.up(120)
        first = time.monotonic() - begin
        assert line.endswith(", disk") and f" {cpus} CPUs" in line, line
        check_clock(guest, vendor)
        assert guest.shell("head -c 100 /dev/hwrng | wc -c") == "100"
        guest.shell(f"echo {token} > /token && mkdir /new")
        if network:
            guest.shell("ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up && ping -c 2 10.0.2.2")
            guest.shell(f"wget -q -O /new/data http://10.0.2.2:{port}/data", 60)
        guest.shell("sync && mount -o remount,ro /")
        guest.power_off()
        no_warnings(guest, vendor)
    path = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/sbin:/usr/sbin"}
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, env=path, capture_output=True)

    def content(name: str) -> bytes:
        return subprocess.run(["debugfs", "-R", f"cat {name}", str(disk)], check=True, env=path, capture_output=True).stdout

    assert content("/token").decode().strip() == token
    assert not network or content("/new/data") == data
    return Result(f"to the shell {first:.1f} s", first)


def snapshot(vendor: str | None, directory: Path, *, machine: str = "pc") -> Result:
    """savevm, more work, loadvm: the guest is where it was, and goes on."""
    disk = directory / "snapshot.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64m"], check=True)
    with Guest(vendor, [*linux(directory), "-smp", "2", "-drive", f"file={disk},format=qcow2,if=none,id=d"],
               machine=machine) as guest:
        guest.up(120)
        guest.shell("V=before")
        said = guest.hmp("savevm one", 120)
        assert not said, said
        assert guest.shell("V=after; echo $V") == "after"
        said = guest.hmp("loadvm one", 120)
        assert not said, said
        assert guest.shell("echo $V") == "before"
        check_clock(guest, vendor)
        guest.power_off()
        no_warnings(guest, vendor)
    return Result("the shell's variable is the saved one")


def migration(vendor: str | None, directory: Path, *, machine: str = "pc") -> Result:
    """Live migration over a local socket: the guest's counter goes on in the other QEMU."""
    path = directory / "migration.sock"
    path.unlink(missing_ok=True)
    arguments = [*linux(directory), "-smp", "2"]
    with Guest(vendor, arguments, machine=machine) as source, \
            Guest(vendor, [*arguments, "-incoming", f"unix:{path}"], machine=machine) as target:
        _count(source)
        begin = int(source.shell("sleep 1; cat /count"))
        target.qmp("query-status")                          # it listens
        source.qmp("migrate", uri=f"unix:{path}")
        deadline = time.monotonic() + 120
        while (state := source.qmp("query-migrate"))["status"] not in ("completed", "failed"):      # type: ignore[index]
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
        assert state["status"] == "completed", state        # type: ignore[index]
        source.qmp("quit")
        source.wait()
        first = int(target.shell("cat /count"))
        second = int(target.shell("sleep 1; cat /count"))
        assert begin <= first < second, (begin, first, second)
        check_clock(target, vendor)
        target.power_off()
        no_warnings(source, vendor)
        no_warnings(target, vendor)
    return Result(f"down {state.get('downtime')} ms, counted {begin}, {first}, {second}")       # type: ignore[attr-defined]


def _count(guest: Guest) -> None:
    guest.up(120)
    guest.shell("{ while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done & }")


def monitor(vendor: str | None, directory: Path, *, machine: str = "pc") -> Result:
    """stop, cont, system_reset, quit."""
    with Guest(vendor, [*linux(directory), "-smp", "2"], machine=machine) as guest:
        _count(guest)
        guest.qmp("stop")
        guest.send("cat /count; echo STIR''RED\n")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            guest.read(0.2)
        assert b"STIRRED" not in guest.console
        guest.qmp("cont")
        guest.expect("STIRRED", 20)
        check_clock(guest, None)
        guest.qmp("system_reset")
        guest.up(120)
        assert guest.shell("echo $((6 * 7))") == "42"
        guest.qmp("quit")
        status = guest.wait(20)
        assert status == 0, status
        no_warnings(guest, vendor)
    return Result("stop, cont, system_reset, quit")


def interrupt(vendor: str | None, directory: Path) -> Result:
    """Ctrl-C on the terminal of `kvmfs run -- qemu`."""
    reader, writer = pty.openpty()
    try:
        with Guest(vendor, [*linux(directory), "-smp", "2"], terminal=writer) as guest:
            guest.up(120)
            os.write(reader, b"\3")
            guest.wait(20)
    finally:
        os.close(writer)
        os.close(reader)
    return Result("ended by Ctrl-C")


def _quit_while_stopped(guest: Guest) -> None:
    guest.qmp("stop")
    guest.qmp("quit")


def _reset_and_quit(guest: Guest) -> None:
    for _ in range(3):
        guest.qmp("system_reset")
        guest.qmp("stop")
        guest.qmp("cont")
    guest.qmp("quit")


# How a QEMU ends in the middle of its guest's boot, when all vCPUs and the disk are at work.
ENDS: dict[str, Callable[[Guest], object]] = {
    "quit": lambda guest: guest.qmp("quit"),
    "quit while stopped": _quit_while_stopped,
    "system_reset, stop, cont, quit": _reset_and_quit,
    "SIGINT": lambda guest: os.kill(guest.qemu(), signal.SIGINT),
    "SIGTERM": lambda guest: os.kill(guest.qemu(), signal.SIGTERM),
    "SIGKILL": lambda guest: os.kill(guest.qemu(), signal.SIGKILL),
}


def ends(vendor: str | None, directory: Path, *, machine: str = "pc", ways: Sequence[str] = tuple(ENDS)) -> Result:
    """QEMUs that end in each of these ways leave nothing in the daemon that they shared: no VM, worker, memfd, descriptor."""
    assert vendor is not None
    arguments = [*linux(directory), "-smp", "2", *virtio(machine, images.disk(directory))]
    with Node(vendor, directory) as node:
        before = node.census()
        for name in ways:
            with Guest(vendor, arguments, machine=machine, node=node) as guest:
                guest.expect("Linux version", 60)
                during = node.census()
                assert during["VM"] == before["VM"] + 1, (name, during)
                assert during["process"] > before["process"], (name, during)
                ENDS[name](guest)
                guest.wait(20)
            node.settle(before)
    return Result(", ".join(ways))


def grub(vendor: str | None, directory: Path, *, machine: str = "pc") -> Result:
    """GRUB from an ISO (as a CD-ROM) boots the kernel."""
    if not all(map(shutil.which, ("grub-mkrescue", "xorriso"))) or not Path("/usr/lib/grub/i386-pc").exists():
        raise images.Missing("apt-get install grub-common grub-pc-bin xorriso")
    tree = directory / "iso"
    (tree / "boot/grub").mkdir(parents=True, exist_ok=True)
    shutil.copy(images.kernel(), tree / "boot/vmlinuz")
    shutil.copy(images.initramfs(directory), tree / "boot/initrd")
    (tree / "boot/grub/grub.cfg").write_text(
        "serial --unit=0\nterminal_input serial\nterminal_output serial\necho GRUB-UP\n"
        "linux /boot/vmlinuz console=ttyS0\ninitrd /boot/initrd\nboot\n")
    iso = directory / "grub.iso"
    subprocess.run(["grub-mkrescue", "-d", "/usr/lib/grub/i386-pc", "-o", str(iso), str(tree)], check=True, capture_output=True)
    begin = time.monotonic()
    with Guest(vendor, [*MEMORY, "-smp", "2", "-cdrom", str(iso)], machine=machine) as guest:
        guest.expect("GRUB-UP", 120)
        first = time.monotonic() - begin
        guest.up(180)
        up = time.monotonic() - begin
        check_clock(guest, vendor)
        guest.power_off()
        no_warnings(guest, vendor)
    return Result(f"GRUB after {first:.1f} s, shell {up:.1f} s", up)


def memtest(vendor: str | None, directory: Path, *, seconds: float = 60) -> Result:
    """memtest86+ for a minute."""
    image = Path("/boot/memtest86+x64.bin")
    if not image.exists():
        raise images.Missing("apt-get install memtest86+")
    with Guest(vendor, ["-m", "64", "-vga", "std", "-kernel", str(image), "-append", "console=ttyS0,115200"]) as guest:
        guest.expect("Memtest86+", 60)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert guest.read(0.5), "QEMU ended"
        text = guest.console.decode(errors="replace")
        (directory / "memtest.log").write_text(text)
        assert "Test #" in text or "Testing:" in text, text[-400:]
        assert "Failing" not in text and "Unexpected" not in text, text[-800:]
        guest.qmp("quit")
        guest.wait()
    return Result(f"{seconds:.0f} s without errors")


def ovmf(vendor: str | None, directory: Path, *, machine: str = "q35") -> Result:
    """OVMF to the UEFI shell, which runs a command."""
    code, variables = OVMF / "OVMF_CODE_4M.fd", OVMF / "OVMF_VARS_4M.fd"
    if not code.exists():
        raise images.Missing("apt-get install ovmf")
    shutil.copy(variables, directory / "vars.fd")
    begin = time.monotonic()
    with Guest(vendor, [*MEMORY, "-smp", "2", "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
                        "-drive", f"if=pflash,format=raw,unit=1,file={directory / 'vars.fd'}"], machine=machine) as guest:
        guest.expect("Shell>", 180)
        took = time.monotonic() - begin
        guest.send("ver\r")
        guest.expect("UEFI Interactive Shell", 30)
        guest.send("reset -s\r")
        guest.wait(30)
        no_warnings(guest, vendor)
    return Result(f"to the UEFI shell {took:.1f} s", took)


def _named(function: Callable[..., Result], **options: object) -> Case:
    return functools.partial(function, **options)


def cases() -> dict[str, Case]:
    """Every case of the matrix, by name."""
    found: dict[str, Case] = {}
    for machine in ("pc", "q35", "microvm"):
        for cpus in (1, 2, 4):
            for chip in ("on", "split"):
                found[f"boot/{machine}/irqchip-{chip}/{cpus}-cpus"] = _named(
                    boot, machine=f"{machine},kernel-irqchip={chip}", cpus=cpus)
        # More than one hang in QEMU 7.2.22 (Debian's 7.2+dfsg-7+deb12u18) on any KVM: its apic_sipi() takes back
        # CPU_INTERRUPT_SIPI no more, TCG does that for itself now, kvm_arch_process_async_events() does not; once such a
        # processor halts its thread spins with the big lock held.
        found[f"boot/{machine}/irqchip-off/1-cpu"] = _named(boot, machine=f"{machine},kernel-irqchip=off", cpus=1)
    found["boot/pc/cpu-host"] = _named(boot, cpu="host")
    found["boot/q35/cpu-max"] = _named(boot, machine="q35", cpu="max")
    for machine in ("pc", "q35", "microvm"):
        found[f"devices/{machine}"] = _named(devices, machine=machine)
    found["devices/q35/irqchip-split"] = _named(devices, machine="q35,kernel-irqchip=split")
    found["devices/pc/irqchip-off"] = _named(devices, machine="pc,kernel-irqchip=off", cpus=1)
    for machine in ("pc", "q35"):
        found[f"monitor/{machine}"] = _named(monitor, machine=machine)
        found[f"snapshot/{machine}"] = _named(snapshot, machine=machine)
        found[f"migration/{machine}"] = _named(migration, machine=machine)
    found["interrupt"] = interrupt
    for machine in ("pc", "q35", "microvm"):
        found[f"ends/{machine}"] = _named(ends, machine=machine)
    found["grub/pc"] = _named(grub)
    found["memtest"] = _named(memtest)
    found["ovmf/q35"] = _named(ovmf)
    return found


def names(patterns: Sequence[str]) -> list[str]:
    """The cases that one of ``patterns`` is a part of; without patterns, all."""
    return [name for name in cases() if not patterns or any(pattern in name for pattern in patterns)]
