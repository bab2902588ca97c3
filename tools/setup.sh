#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Makes a checkout ready: system packages (Debian 12, Ubuntu 24.04; as root), .venv, pinned dependencies, kvmfs itself
# with its native helper. A second run finds the stamp newer than all it depends on and ends at once.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.setup-done
PACKAGES="fuse3 libfuse3-dev pkg-config gcc libc6-dev make binutils python3 python3-venv python3-dev libseccomp2 strace util-linux procps"
INPUTS="pyproject.toml setup.cfg tools/setup.sh tools/constraints.txt kvmfs/cpu kvmfs/fuse kvmfs/kvm daemon/kvmd"

if [ -e "$STAMP" ] && [ -x "$VENV/bin/python" ] \
    && [ -z "$(find $INPUTS -newer "$STAMP" -type f ! -name '*.py' ! -name '*.pyc' ! -name '*.so' -print -quit)" ]; then
    exit 0
fi

# --- system packages ---
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    missing=
    for package in $PACKAGES; do
        case $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) in
            ii*) ;;
            *) missing="$missing $package" ;;
        esac
    done
    if [ -n "$missing" ]; then
        if [ "$(id -u)" != 0 ]; then
            echo "setup: these packages are missing; as root: apt-get install$missing" >&2
            exit 1
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        # shellcheck disable=SC2086
        apt-get install -y -q --no-install-recommends $missing
    fi
else
    echo "setup: no apt here; these must be there already: $PACKAGES" >&2
fi

# --- the first Python that is new enough, can make a venv and has its headers ---
python=
for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    command -v "$candidate" >/dev/null || continue
    if "$candidate" - 2>/dev/null <<'PYTHON'
import os, sys, sysconfig
import ensurepip, venv
sys.exit(not (sys.version_info >= (3, 11)
              and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))))
PYTHON
    then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python from 3.11 on with venv and headers (python3-venv, python3-dev)" >&2
    exit 1
fi

# --- .venv ---
if ! "$VENV/bin/python" -c '' 2>/dev/null; then
    "$python" -m venv --clear "$VENV"
fi
pip="$VENV/bin/python -m pip --disable-pip-version-check -q"
# Without build isolation: what builds is pinned too, and the native helper is built in place. pyfuse3 comes as source
# only and asks setuptools_scm for its version and Cython for its C.
$pip install -c tools/constraints.txt setuptools setuptools-scm Cython
$pip install -c tools/constraints.txt --no-build-isolation -e '.[dev]'
touch "$STAMP"
