# SPDX-License-Identifier: GPL-2.0-or-later
# Sourced in the top directory: QEMU, Debian's cloud kernel and a small initramfs that says a line and powers off, installed
# and made where they are missing; sets $kernel and $initrd.
tools/boot-packages.sh

kernel=$(find /boot -name 'vmlinuz-*cloud*' | sort | tail -n 1)
root=build/initramfs
initrd=build/initramfs.gz
mkdir -p $root/bin
cp /bin/busybox $root/bin/
cat > $root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
echo "GUEST-UP $(/bin/busybox uname -r), $(/bin/busybox nproc) CPUs," \
    "$(/bin/busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
/bin/busybox poweroff -f
INIT
chmod +x $root/init
(cd $root && find . | cpio -o -H newc --quiet | gzip) > "$initrd"
