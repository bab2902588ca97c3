# SPDX-License-Identifier: GPL-2.0-or-later
PYTHON := .venv/bin/python
CFLAGS := -O2 -g -std=gnu11 -Wall -Wextra
CLIENTS := $(patsubst tools/clients/%.c,build/%,$(wildcard tools/clients/*.c))

.PHONY: all setup clients run test clean

all: setup clients

# System packages, .venv, the package with its native helper; about nothing when it is done already.
setup:
	@tools/setup.sh

clients: $(CLIENTS)

build/%: tools/clients/%.c $(wildcard tools/clients/*.h)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ $<

# A C client of ours on the fake node.
run: setup build/hello
	.venv/bin/kvmfs run -- build/hello

test: setup clients
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTHON) -m pytest

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info daemon/*.egg-info tools/*.egg-info
	find kvmfs daemon tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kvmfs/cpu/*.so
	rm -rf .venv
