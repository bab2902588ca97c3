# SPDX-License-Identifier: GPL-2.0-or-later
PYTHON := .venv/bin/python

.PHONY: all setup clients run boot boot-matrix libvirt bench fuzz selftests vmm-tests test clean

all: setup clients

# System packages, .venv, the package with its native helper; about nothing when it is done already.
setup:
	@tools/setup.sh

clients:
	@$(MAKE) --no-print-directory -C tools/clients

# A C client of ours on the fake node.
run: setup clients
	.venv/bin/kvmfs run -- build/hello

# Unmodified QEMU boots Linux on the fake node, from an initramfs and from a disk, both vendors, beside -accel tcg.
boot: setup
	tools/boot-packages.sh
	PYTHONPATH=.:daemon:tools $(PYTHON) -m qemu_boot.boot

# Machine types, devices, the monitor, boot loaders: every case of tools/qemu_boot/cases.py, one line each.
boot-matrix: setup
	tools/boot-packages.sh ovmf memtest86+ grub-common grub-pc-bin xorriso mtools qemu-utils
	PYTHONPATH=.:daemon:tools $(PYTHON) -m qemu_boot.matrix

# kvm-ok, virt-host-validate and a libvirt domain of type kvm, as root.
libvirt: setup
	tools/libvirt.sh

# Linux's own KVM selftests, from Debian's linux-source-6.12, on the fake node, both vendors.
selftests: setup
	tools/selftests/build.sh
	$(PYTHON) tools/selftests/run.py

# The unit tests of rust-vmm's kvm-ioctls, a boot with QEMU 10, libguestfs' test, from Debian 13 in a root of its own.
vmm-tests: setup
	tools/vmm_tests.sh

# kvmfs beside its rivals (a C libfuse server, the machine's own node, QEMU's TCG): a table, and build/bench.json.
# More: make bench BENCH=--help
bench: setup
	@PYTHONPATH=.:daemon:tools $(PYTHON) -m kvmfs_bench $(BENCH)

# Random guests and random ioctls against a daemon of each vendor, ten minutes.  More: make fuzz FUZZ=--help
fuzz: setup
	@PYTHONPATH=.:daemon:tools $(PYTHON) -m kvmfs_fuzz $(FUZZ)

# The fast ones of the kernel's selftests belong to it; where their source cannot be had they are skipped.
# So is QEMU where its packages cannot be had.
test: setup clients
	tools/selftests/build.sh $$($(PYTHON) tools/selftests/run.py --fast --list) || true
	tools/boot-packages.sh || true
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTHON) -m pytest

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info daemon/*.egg-info tools/*.egg-info
	find kvmfs daemon tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kvmfs/cpu/*.so
	rm -rf .venv
