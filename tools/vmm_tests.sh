#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Other people's KVM code on the fake node, from a newer Debian in a root of its own (build/trixie, about 2 GB): the unit
# tests of rust-vmm's kvm-ioctls, which Firecracker and Cloud Hypervisor are built on, a boot of Linux with QEMU 10, and
# libguestfs' own test.
# As root; both vendors. Exit 1 when something fails that passes on a real KVM.
set -eu
cd "$(dirname "$0")/.."
. tools/linux_image.sh
root=$PWD/build/trixie
log=build/vmm-tests.log
packages="librust-kvm-ioctls-dev cargo rustc gcc libc6-dev qemu-system-x86
    libguestfs-tools guestfish guestfs-tools linux-image-cloud-amd64"

if [ "$(id -u)" != 0 ]; then
    echo "vmm_tests: debootstrap and chroot need root" >&2
    exit 2
fi
if [ ! -e "$root/.ready" ]; then
    command -v debootstrap > /dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends debootstrap; }
    echo "a root with Debian 13 ($log) ..."
    debootstrap --variant=minbase trixie "$root" http://deb.debian.org/debian > "$log" 2>&1
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y -q --no-install-recommends $packages >> "$log" 2>&1
    # Debian's crates are its registry.
    mkdir -p "$root/root/.cargo"
    printf '[source.crates-io]\nreplace-with = "debian"\n[source.debian]\ndirectory = "/usr/share/cargo/registry"\n' \
        > "$root/root/.cargo/config.toml"
    cp -r "$root"/usr/share/cargo/registry/kvm-ioctls-* "$root/root/kvm-ioctls"
    rm -f "$root/root/kvm-ioctls/.cargo-checksum.json"
    chroot "$root" sh -c 'cd /root/kvm-ioctls && HOME=/root cargo test --offline --lib --no-run' >> "$log" 2>&1
    find "$root/root/kvm-ioctls/target/debug/deps" -name 'kvm_ioctls-*' -type f -executable -exec cp {} "$root/root/kvm-ioctls-tests" \;
    ln -sf /proc/self/fd "$root/dev/fd"
    touch "$root/.ready" "$root/dev/kvm"
fi
cp "$kernel" "$root/root/vmlinuz"
cp "$initrd" "$root/root/initrd"

# Runs its arguments in the root, where /dev/kvm is the node of `kvmfs run`: without one, Debian's tests all "pass".
inside='
    [ "$(findmnt -no FSTYPE -T /dev/kvm)" = fuse.kvmfs ] || { echo "vmm_tests: /dev/kvm is not of kvmfs" >&2; exit 2; }
    root=$1; shift
    mount --bind /dev/kvm "$root/dev/kvm"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount -t tmpfs tmpfs "$root/tmp"
    exec chroot "$root" "$@"'
on_kvmfs() {
    vendor=$1
    shift
    timeout 300 .venv/bin/kvmfs run --vendor "$vendor" -- unshare -m sh -c "$inside" sh "$root" "$@" < /dev/null 2>&1
}

status=0
for vendor in amd intel; do
    # One of them wants KVM_CAP_NR_VCPUS, the host's CPUs, to be 4 at least.
    skip=
    [ "$(nproc)" -ge 4 ] || skip="--skip test_kvm_getters"
    # shellcheck disable=SC2086
    if on_kvmfs $vendor /root/kvm-ioctls-tests $skip > build/vmm-kvm-ioctls-$vendor.log; then verdict=ok; else verdict=FAILED status=1; fi
    printf '%-6s kvm-ioctls  %-7s %s\n' $vendor $verdict "$(grep -a '^test result' build/vmm-kvm-ioctls-$vendor.log || echo "see build/vmm-kvm-ioctls-$vendor.log")"

    begin=$(date +%s%3N)
    on_kvmfs $vendor qemu-system-x86_64 -accel kvm -M q35 -cpu host -smp 2 -m 256 -nodefaults -display none -serial stdio \
        -no-reboot -kernel /root/vmlinuz -initrd /root/initrd -append "console=ttyS0 panic=-1" > build/vmm-qemu-$vendor.log || true
    if grep -aq 'Power down' build/vmm-qemu-$vendor.log; then verdict=ok; else verdict=FAILED status=1; fi
    printf '%-6s QEMU 10     %-7s %s, %d ms\n' $vendor $verdict \
        "$(grep -ao 'GUEST-UP.*' build/vmm-qemu-$vendor.log | tr -d '\r')" $(($(date +%s%3N) - begin))

    on_kvmfs $vendor env LIBGUESTFS_BACKEND=direct LIBGUESTFS_CACHEDIR=/var/tmp HOME=/root libguestfs-test-tool -t 250 \
        > build/vmm-libguestfs-$vendor.log || true
    verdict=FAILED
    if grep -aq 'qemu KVM: enabled' build/vmm-libguestfs-$vendor.log && grep -aq 'TEST FINISHED OK' build/vmm-libguestfs-$vendor.log; then
        verdict=ok
    else
        status=1
    fi
    printf '%-6s libguestfs  %-7s see build/vmm-libguestfs-%s.log\n' $vendor $verdict $vendor
done
exit $status
