/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef MODES_H
#define MODES_H

#include "kvmclient.h"

/* A subtest works on a fresh machine and calls fail() when something is not as Linux has it. */
struct subtest {
	const char *name;
	void (*run)(struct client *c);
};

/* Each ends with an entry without a name. */
extern const struct subtest basic_subtests[];	/* modes, HLT, SHUTDOWN, signals, memory slots */
extern const struct subtest device_subtests[];	/* port and memory-mapped devices */
extern const struct subtest event_subtests[];	/* exceptions, interrupts, NMI */

#endif
