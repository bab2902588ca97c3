# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guests are made of: Debian's cloud kernel, a busybox initramfs with its virtio modules, a root disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

QEMU = "qemu-system-x86_64"
BUSYBOX = Path("/bin/busybox")
PACKAGES = ("qemu-system-x86", "linux-image-cloud-amd64", "busybox-static", "cpio", "e2fsprogs")

# In the order of their dependencies; the root file system's driver is part of the kernel.
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio",
           "virtio_blk", "failover", "net_failover", "virtio_net", "virtio-rng")

# /init of the initramfs: to a shell on the serial console, or into the disk's root file system when there is a disk.
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
if [ -b /dev/vda ] && mount -t ext4 /dev/vda /root; then
    mount --move /proc /root/proc
    mount --move /sys /root/sys
    mount --move /dev /root/dev
    exec switch_root /root /sbin/init
fi
echo "GUEST-UP $(uname -r), $(nproc) CPUs, $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
exec /bin/console
"""

# A shell whose terminal is the console, without job control's complaints; PID 1 must not end.  Of the kernel only what is
# critical: on a busy host it warns of late timers, in the middle of the shell's lines.
CONSOLE = """#!/bin/busybox sh
export PATH=/bin HOME=/ PS1='guest# '
dmesg -n 3
while :; do setsid sh -c 'stty -echo < /dev/ttyS0; exec sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1'; done
"""

DISK_INIT = """#!/bin/busybox sh
export PATH=/bin
echo "GUEST-UP $(uname -r), $(nproc) CPUs, $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource), disk"
exec /bin/console
"""


class Missing(Exception):
    """Something that the guests need is not installed; the text names the packages."""


def kernel() -> Path:
    """The newest cloud kernel.  Raises Missing."""
    found = sorted(Path("/boot").glob("vmlinuz-*cloud*"))
    if not found or not BUSYBOX.exists() or not all(map(shutil.which, (QEMU, "cpio", "mke2fs"))):
        raise Missing(f"apt-get install --no-install-recommends {' '.join(PACKAGES)}")
    return found[-1]


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _busybox(tree: Path) -> None:
    for name in ("bin", "sbin", "proc", "sys", "dev", "root", "tmp", "etc"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, tree / "bin")
    _script(tree / "bin/console", CONSOLE)


def initramfs(directory: Path) -> Path:
    """An initramfs in ``directory``: busybox, the virtio modules of kernel(), an init that goes to a shell."""
    tree = directory / "initramfs"
    shutil.rmtree(tree, ignore_errors=True)
    _busybox(tree)
    _script(tree / "init", INIT)
    (tree / "modules").mkdir()
    source = Path("/lib/modules", kernel().name.removeprefix("vmlinuz-"), "kernel")
    files = {path.stem: path for path in source.rglob("*.ko") if path.stem in MODULES}
    for path in files.values():
        shutil.copy(path, tree / "modules")
    (tree / "modules/order").write_text(" ".join(name for name in MODULES if name in files))
    result = directory / "initramfs.cpio"
    with result.open("wb") as file:
        subprocess.run("find . | cpio -o -H newc --quiet", shell=True, cwd=tree, stdout=file, check=True)
    return result


def disk(directory: Path, name: str = "disk.img") -> Path:
    """A new 32 MiB ext4 image in ``directory`` that holds a root file system of busybox."""
    tree = directory / "rootfs"
    if not tree.exists():
        _busybox(tree)
        for applet in ("sh", "sync", "poweroff", "reboot", "uname", "nproc", "cat", "setsid", "stty", "mount"):
            (tree / "bin" / applet).symlink_to("busybox")
        _script(tree / "sbin/init", DISK_INIT.replace("export PATH=/bin", "export PATH=/bin\nbusybox --install -s /bin 2>&-"))
    result = directory / name
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/sbin:/usr/sbin"}
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(result), "32m"], check=True, env=environment,
                   stdout=subprocess.DEVNULL)
    return result
