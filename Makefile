# SPDX-License-Identifier: GPL-2.0-or-later
PYTHON := .venv/bin/python

.PHONY: all setup clients run boot test clean

all: setup clients

# System packages, .venv, the package with its native helper; about nothing when it is done already.
setup:
	@tools/setup.sh

clients:
	@$(MAKE) --no-print-directory -C tools/clients

# A C client of ours on the fake node.
run: setup clients
	.venv/bin/kvmfs run -- build/hello

# Unmodified QEMU boots Linux on the fake node, both vendors, beside -accel tcg.
boot: setup
	tools/boot.sh

test: setup clients
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTHON) -m pytest

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info daemon/*.egg-info tools/*.egg-info
	find kvmfs daemon tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kvmfs/cpu/*.so
	rm -rf .venv
