#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Installs what QEMU's guests need (and the packages given as arguments), when it is not there. Exit 1 when it cannot.
set -eu
missing=
for package in qemu-system-x86 linux-image-cloud-amd64 busybox-static cpio e2fsprogs "$@"; do
    case $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) in
        ii*) ;;
        *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "boot: these packages are missing; as root: apt-get install$missing" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086
apt-get install -y -q --no-install-recommends $missing
