// SPDX-License-Identifier: GPL-2.0-or-later
#include "modes.h"

#include <stdio.h>

void begin_long(struct client *c, uint64_t rsi, uint64_t rdi, uint64_t rcx)
{
	struct kvm_regs r = { .rip = CODE_AT, .rsp = STACK_TOP, .rflags = 2,
			      .rsi = rsi, .rdi = rdi, .rcx = rcx, .rdx = 0x5000 };

	set_long_mode(c);
	set_regs(c, &r);
}

void expect_string_regs(struct client *c, const char *when, uint64_t rsi, uint64_t rdi, uint64_t rcx)
{
	struct kvm_regs r;
	char what[80];

	get_regs(c, &r);
	snprintf(what, sizeof(what), "rsi %s", when);
	expect_u64(what, r.rsi, rsi);
	snprintf(what, sizeof(what), "rdi %s", when);
	expect_u64(what, r.rdi, rdi);
	snprintf(what, sizeof(what), "rcx %s", when);
	expect_u64(what, r.rcx, rcx);
}

void expect_rip(struct client *c, const char *when, uint64_t offset)
{
	struct kvm_regs r;
	char what[80];

	get_regs(c, &r);
	snprintf(what, sizeof(what), "rip %s", when);
	expect_u64(what, r.rip, CODE_AT + offset);
}

void give_bytes(struct client *c, unsigned int count, uint8_t first)
{
	uint8_t *data = expect_io(c, KVM_EXIT_IO_IN, 0x5000, 1, count);

	for (unsigned int i = 0; i < count; i++)
		data[i] = (uint8_t)(first + i);
}
