// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The smallest whole use of KVM: hello [NODE] (default /dev/kvm). A guest in real mode writes a line to the
 * serial port, byte by byte, and halts. Exit code 0: all was as it should be; 1: it says what was not.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kvmclient.h"

enum { SERIAL = 0x3f8 };

GUEST(hello_guest, 16, R"(
	cld
	mov	$hello_line - hello_guest + 0x8000, %si
	mov	$0x3f8, %dx
1:	lodsb				# al = *si++
	test	%al, %al
	jz	2f
	out	%al, %dx
	jmp	1b
2:	mov	$0x6b76, %bx		# "vk": shows that registers come back
	hlt
hello_halted:
hello_line:
	.asciz	"Hello from a guest in real mode\n"
)");
extern const uint8_t hello_halted[], hello_line[];
__asm__(".hidden hello_halted, hello_line");

/* Runs the guest until it stops with something that is not serial output; the exit reason. */
static uint32_t run_console(struct client *c, char *line, size_t room)
{
	struct kvm_run *r = c->run;
	size_t length = 0;

	line[0] = 0;
	while (run(c) == KVM_EXIT_IO && r->io.direction == KVM_EXIT_IO_OUT && r->io.port == SERIAL && r->io.size == 1) {
		if (length + r->io.count >= room)
			fail("the guest writes too much");
		memcpy(line + length, (char *)r + r->io.data_offset, r->io.count);
		length += r->io.count;
		line[length] = 0;
	}
	return r->exit_reason;
}

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/kvm";
	struct client c;
	struct kvm_regs regs;
	char line[256];
	uint32_t reason;

	set_context("hello");
	create_machine(&c, node);
	printf("%s: API version %d, VM is descriptor %d, vCPU is descriptor %d\n", node, KVM_API_VERSION, c.vm,
	       c.vcpu);
	load_guest(&c, hello_guest);
	set_real_mode(&c);

	reason = run_console(&c, line, sizeof(line));
	printf("the guest wrote: %s", line);
	printf("%sit stopped with exit %u KVM_EXIT_%s\n", strchr(line, '\n') ? "" : "\n", reason,
	       exit_name(reason));
	show_regs(&c);

	if (reason != KVM_EXIT_HLT)
		fail("it should have halted");
	if (strcmp(line, (const char *)hello_line) != 0)
		fail("it should have written: %s", (const char *)hello_line);
	get_regs(&c, &regs);
	expect_u64("rip", regs.rip, CODE_AT + (size_t)(hello_halted - hello_guest));
	expect_u64("rbx", regs.rbx, 0x6b76);
	expect_u64("rsi", regs.rsi, CODE_AT + (size_t)(hello_guest_end - hello_guest));
	destroy_machine(&c);
	return 0;
}
