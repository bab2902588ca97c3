#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Unmodified QEMU boots Debian's kernel on the fake node, to a line of its init and power-off, with both vendors; then
# the same with -accel tcg, and the ratio of the times. Usage: tools/boot.sh [CPUS]. Exit 1 when a boot fails.
set -eu
cd "$(dirname "$0")/.."
cpus=${1:-2}
. tools/linux_image.sh

# boot NAME ACCELERATOR WRAPPER...: sets $took (in ms)
boot() {
    name=$1 accel=$2 log=build/boot-$1.log
    shift 2
    begin=$(date +%s%3N)
    "$@" timeout 120 qemu-system-x86_64 -machine "pc,accel=$accel" -cpu qemu64 -smp "$cpus" -m 256 -nodefaults \
        -display none -serial stdio -monitor none -no-reboot \
        -kernel "$kernel" -initrd "$initrd" -append "console=ttyS0 panic=-1" > "$log" 2>&1 < /dev/null || true
    took=$(($(date +%s%3N) - begin))
    if ! line=$(grep -ao 'GUEST-UP.*' "$log") || ! grep -aq 'Power down' "$log"; then
        echo "boot: $name: the guest did not come up and power off; see $log" >&2
        tail -n 5 "$log" >&2
        exit 1
    fi
    printf '%-6s %6d ms   %s\n' "$name" "$took" "$(printf %s "$line" | tr -d '\r')"
}

boot tcg tcg
tcg=$took
for vendor in amd intel; do
    boot $vendor kvm .venv/bin/kvmfs run --vendor $vendor --
    echo "       $((took * 100 / tcg)) % of the time with -accel tcg"
done
