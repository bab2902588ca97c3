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
extern const struct subtest port_subtests[];
extern const struct subtest mmio_subtests[];
extern const struct subtest event_subtests[];	/* exceptions, interrupts, NMI */
extern const struct subtest irq_subtests[];	/* the interrupt controllers in the kernel, eventfds */
extern const struct subtest debug_subtests[];	/* a debugger in the client, registers in kvm_run, extended state */
extern const struct subtest memory_subtests[];	/* dirty logging, many slots, writes that do not exit */

/* Long mode with these registers, and rdx = 0x5000 (the port of INS and OUTS). */
void begin_long(struct client *c, uint64_t rsi, uint64_t rdi, uint64_t rcx);
/* Registers now, without running; rip as an offset from the guest's start. */
void expect_string_regs(struct client *c, const char *when, uint64_t rsi, uint64_t rdi, uint64_t rcx);
void expect_rip(struct client *c, const char *when, uint64_t offset);
/* Runs to a REP INSB from port 0x5000 that asks for `count` bytes; gives it first, first + 1, ... */
void give_bytes(struct client *c, unsigned int count, uint8_t first);

#endif
