#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Linux's KVM selftests from Debian's linux-source-6.12, unmodified, into build/selftests/kvm.
# Usage: tools/selftests/build.sh [TEST]...  (x86_64/cpuid_test, say; without one: all of them)
# The package (150 MB) is installed when it is missing; of its tree only what the tests need is unpacked (30 MB).
set -eu
cd "$(dirname "$0")/../.."
package=linux-source-6.12
archive=/usr/src/$package.tar.xz
output=$PWD/build/selftests/kvm
linux=$PWD/build/selftests/$package
# From Makefile on: what makes the kernel's headers for user space.
parts="tools/testing/selftests/kvm tools/testing/selftests/rseq tools/testing/selftests/lib.mk
    tools/testing/selftests/kselftest.h tools/testing/selftests/kselftest_harness.h
    tools/include tools/arch/x86/include tools/lib tools/build tools/scripts
    Makefile Kbuild scripts usr include/uapi include/asm-generic arch/x86/Makefile arch/x86/entry/syscalls
    arch/x86/include arch/x86/tools"

install_package() {
    if [ "$(id -u)" != 0 ]; then
        echo "selftests: $archive is missing; as root: apt-get install $package" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    if [ -z "$(apt-cache madison $package)" ]; then
        echo "selftests: no $package here (Debian 12 has it in bookworm-security and bookworm-backports)" >&2
        exit 1
    fi
    echo "selftests: installing $package and xz-utils"
    apt-get install -y -q --no-install-recommends $package xz-utils
}

[ -e $archive ] || install_package
if ! [ $linux/.unpacked -nt $archive ]; then
    echo "selftests: unpacking $archive"
    rm -rf "$linux" "$output"
    mkdir -p "$linux"
    # shellcheck disable=SC2086
    tar -xf $archive -C "$linux" --strip-components=1 $(printf "$package/%s " $parts)
    make -s -C "$linux" ARCH=x86_64 headers > build/selftests/headers.log 2>&1 \
        || { tail -n 20 build/selftests/headers.log >&2; exit 1; }
    touch "$linux/.unpacked"
fi

# The tests' Makefile wants whole paths as targets, and says a command line for each of them.
targets=
for test in "$@"; do
    targets="$targets $output/$test"
done
# shellcheck disable=SC2086
make -s -j"$(nproc)" -C "$linux/tools/testing/selftests/kvm" OUTPUT="$output" $targets
