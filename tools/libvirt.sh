#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# kvm-ok, virt-host-validate and a libvirt domain of type kvm on the fake node, unmodified, with both vendors: one line each.
# Usage: tools/libvirt.sh (as root).  Exit 1 when one of them is not content.  What libvirtd writes lies in a private tmpfs.
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "libvirt: $1" >&2
    exit 1
}

# In the world of `kvmfs run`: libvirtd with directories of its own, one domain, until it has powered itself off.
domain() {
    grep -q '^kvmfs.* /dev/kvm fuse' /proc/mounts || fail "/dev/kvm is not the fake node"
    for directory in /etc/libvirt /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
        mkdir -p $directory
        mount -t tmpfs kvmfs-libvirt $directory
    done
    # A /dev that libvirtd builds has no fake node; the rest needs systemd, another user, or daemons beside libvirtd.
    cat > /etc/libvirt/qemu.conf <<'CONF'
namespaces = []
cgroup_controllers = []
security_driver = "none"
stdio_handler = "file"
user = "root"
group = "root"
remember_owner = 0
CONF
    printf 'auth_unix_rw = "none"\n' > /etc/libvirt/libvirtd.conf
    cat > /etc/libvirt/domain.xml <<XML
<domain type='kvm'>
  <name>kvmfs</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$kernel</kernel>
    <initrd>$PWD/$initrd</initrd>
    <cmdline>console=ttyS0 panic=-1</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='file'><source path='$serial'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
XML
    libvirtd --pid-file /run/libvirt/test.pid > "$log" 2>&1 &
    daemon=$!
    trap 'kill $daemon 2> /dev/null; wait $daemon 2> /dev/null || true' EXIT
    virsh="virsh -q -c qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
    for _ in $(seq 300); do
        $virsh uri > /dev/null 2>&1 && break
        kill -0 $daemon 2> /dev/null || fail "libvirtd did not start; see $log"
        sleep 0.2
    done
    $virsh domcapabilities --virttype kvm | grep -q '<domain>kvm</domain>' || fail "libvirt finds no kvm; see $log"
    $virsh create /etc/libvirt/domain.xml >> "$log" 2>&1 || fail "the domain did not start; see $log"
    for _ in $(seq 600); do
        [ -n "$($virsh list --name)" ] || return 0
        sleep 0.2
    done
    $virsh destroy kvmfs >> "$log" 2>&1
    fail "the domain did not power off; see $serial"
}

log=$PWD/build/libvirt.log serial=$PWD/build/libvirt-serial.log
if [ "${1:-}" = domain ]; then
    kernel=$2 initrd=$3
    domain
    exit
fi

tools/boot-packages.sh cpu-checker libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu
# shellcheck source=tools/linux_image.sh
. tools/linux_image.sh
for vendor in amd intel; do
    world=".venv/bin/kvmfs run --vendor $vendor --pretend-cpu --"
    said=$($world kvm-ok) || fail "kvm-ok, $vendor: $said"
    printf '%-6s kvm-ok              %s\n' $vendor "$(echo "$said" | tail -n 1)"
    # Its exit status is about the host as a whole.
    said=$($world virt-host-validate qemu) || true
    for check in "hardware virtualization" "/dev/kvm exists" "/dev/kvm is accessible"; do
        echo "$said" | grep "$check" | grep -q PASS || fail "virt-host-validate, $vendor: $said"
    done
    printf '%-6s virt-host-validate  %s PASS, of them the three about KVM\n' $vendor "$(echo "$said" | grep -c PASS)"
    rm -f "$serial"
    begin=$(date +%s)
    # shellcheck disable=SC2086
    timeout 300 $world sh tools/libvirt.sh domain "$kernel" "$initrd"
    line=$(grep -ao 'GUEST-UP.*' "$serial") || fail "the guest did not come up; see $serial"
    grep -aq 'Power down' "$serial" || fail "the guest did not power off; see $serial"
    printf '%-6s domain              %s, powered off after %s s\n' $vendor "$(printf %s "$line" | tr -d '\r')" $(($(date +%s) - begin))
done
