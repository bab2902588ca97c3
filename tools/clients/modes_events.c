// SPDX-License-Identifier: GPL-2.0-or-later
/* Exceptions in each mode, interrupts and NMIs that the client injects. */
#include "modes.h"

#include <errno.h>
#include <string.h>

/* Exceptions. Handlers leave a note each; a fault's handler skips the instruction by changing the return address. */

GUEST(exceptions64_guest, 64, R"(
	xor	%edx, %edx
	xor	%ecx, %ecx
	div	%ecx			# #DE, 2 bytes
	ud2				# #UD, 2 bytes
	int3				# #BP: a trap
	mov	$0x80, %eax
	mov	%eax, %fs		# #GP with the selector as error code, 2 bytes
	mov	%al, 0x30123		# #PF, not present, write, 7 bytes
	mov	0x30124, %al		# #PF, not present, read, 7 bytes
	mov	%al, 0x31125		# #PF, not writable, 7 bytes
	hlt
exceptions64_de:
	incq	0x4000
	addq	$2, (%rsp)
	iretq
exceptions64_ud:
	incq	0x4008
	addq	$2, (%rsp)
	iretq
exceptions64_bp:
	mov	(%rsp), %rax
	mov	%rax, 0x4010
	iretq
exceptions64_gp:
	pop	0x4018
	addq	$2, (%rsp)
	iretq
exceptions64_pf:
	mov	0x4100, %ebx		# how many there were
	mov	%cr2, %rsi
	mov	%rsi, 0x4028(,%rbx,8)
	popq	0x4108(,%rbx,8)
	incl	0x4100
	addq	$7, (%rsp)
	iretq
)");
extern const uint8_t exceptions64_de[], exceptions64_ud[], exceptions64_bp[], exceptions64_gp[], exceptions64_pf[];

GUEST(exceptions32_guest, 32, R"(
	xor	%edx, %edx
	xor	%ecx, %ecx
	div	%ecx			# #DE, 2 bytes
	ud2				# #UD, 2 bytes
	int3				# #BP: a trap
	mov	$0x80, %eax
	mov	%eax, %fs		# #GP with the selector as error code, 2 bytes
	mov	%dl, 0x30123		# #PF, not present, write, 6 bytes
	mov	0x30124, %dl		# #PF, not present, read, 6 bytes
	mov	%dl, 0x31125		# #PF, not writable, 6 bytes
	hlt
exceptions32_de:
	incl	0x4000
	addl	$2, (%esp)
	iret
exceptions32_ud:
	incl	0x4008
	addl	$2, (%esp)
	iret
exceptions32_bp:
	mov	(%esp), %eax
	mov	%eax, 0x4010
	iret
exceptions32_gp:
	popl	0x4018
	addl	$2, (%esp)
	iret
exceptions32_pf:
	mov	0x4100, %ebx
	mov	%cr2, %esi
	mov	%esi, 0x4028(,%ebx,8)
	popl	0x4108(,%ebx,8)
	incl	0x4100
	addl	$6, (%esp)
	iret
)");
extern const uint8_t exceptions32_de[], exceptions32_ud[], exceptions32_bp[], exceptions32_gp[], exceptions32_pf[];

#define GATE(c, bits, vector, label, guest)	set_gate((c), (bits), (vector), CODE_AT + (uint32_t)((label) - (guest)))

static void check_exceptions(struct client *c, uint64_t after_int3)
{
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of #DE", read_note(c, 0), 1);
	expect_u64("number of #UD", read_note(c, 1), 1);
	expect_u64("return address of #BP", read_note(c, 2), CODE_AT + after_int3);
	expect_u64("error code of #GP", read_note(c, 3), 0x80);
	expect_u64("number of #PF", read_note(c, 0x20), 3);
	expect_u64("CR2 of a write to an absent page", read_note(c, 5), ABSENT_PAGE + 0x123);
	expect_u64("its error code", read_note(c, 0x21), 2);
	expect_u64("CR2 of a read of an absent page", read_note(c, 6), ABSENT_PAGE + 0x124);
	expect_u64("its error code", read_note(c, 0x22), 0);
	expect_u64("CR2 of a write to a read-only page", read_note(c, 7), READONLY_PAGE + 0x125);
	expect_u64("its error code", read_note(c, 0x23), 3);
}

static void exceptions_long(struct client *c)
{
	load_guest(c, exceptions64_guest);
	set_long_mode(c);
	GATE(c, 64, 0, exceptions64_de, exceptions64_guest);
	GATE(c, 64, 6, exceptions64_ud, exceptions64_guest);
	GATE(c, 64, 3, exceptions64_bp, exceptions64_guest);
	GATE(c, 64, 13, exceptions64_gp, exceptions64_guest);
	GATE(c, 64, 14, exceptions64_pf, exceptions64_guest);
	check_exceptions(c, 9);
}

static void exceptions_protected(struct client *c)
{
	load_guest(c, exceptions32_guest);
	set_protected_mode(c);
	GATE(c, 32, 0, exceptions32_de, exceptions32_guest);
	GATE(c, 32, 6, exceptions32_ud, exceptions32_guest);
	GATE(c, 32, 3, exceptions32_bp, exceptions32_guest);
	GATE(c, 32, 13, exceptions32_gp, exceptions32_guest);
	GATE(c, 32, 14, exceptions32_pf, exceptions32_guest);
	check_exceptions(c, 9);
}

GUEST(exceptions16_guest, 16, R"(
	xor	%dx, %dx
	xor	%cx, %cx
	div	%cx			# #DE, 2 bytes
	int	$0x21
	hlt
exceptions16_de:
	incw	0x4000
	mov	%sp, %bp
	addw	$2, (%bp)
	iret
exceptions16_21:
	incw	0x4008
	iret
)");
extern const uint8_t exceptions16_de[], exceptions16_21[];

static void set_vector(struct client *c, unsigned int vector, const uint8_t *handler, const uint8_t *guest)
{
	const uint16_t entry[2] = { (uint16_t)(CODE_AT + (handler - guest)), 0 };

	memcpy(c->mem + 4 * vector, entry, sizeof(entry));
}

static void exceptions_real(struct client *c)
{
	load_guest(c, exceptions16_guest);
	set_real_mode(c);
	set_vector(c, 0, exceptions16_de, exceptions16_guest);
	set_vector(c, 0x21, exceptions16_21, exceptions16_guest);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of #DE", read_note(c, 0), 1);
	expect_u64("number of INT 0x21", read_note(c, 1), 1);
}

/* Interrupts. The guest enables them after a port access, so that the client sees both states. */

GUEST(interrupt64_guest, 64, R"(
	out	%al, $0x10
	sti
	nop
1:	cmpl	$0, 0x4000
	je	1b
	cli
	hlt
interrupt64_handler:
	incl	0x4000
	iretq
)");
extern const uint8_t interrupt64_handler[];

static void interrupt(struct client *c, unsigned int vector)
{
	struct kvm_interrupt irq = { .irq = vector };

	kvm_call(c->vcpu, KVM_INTERRUPT, &irq);
}

/*
 * As a VMM without an interrupt controller in the kernel does it: ask for the window, run, inject. KVM_INTERRUPT
 * outside the window is an error of the client: Intel's CPUs refuse the entry, AMD's take the interrupt.
 */
static void interrupt_window(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, interrupt64_guest);
	set_long_mode(c);
	GATE(c, 64, 0x40, interrupt64_handler, interrupt64_guest);
	expect_out(c, 0x10, 1, 0);
	expect_u64("if_flag", c->run->if_flag, 0);
	expect_u64("ready_for_interrupt_injection", c->run->ready_for_interrupt_injection, 0);
	c->run->request_interrupt_window = 1;
	expect_exit(c, KVM_EXIT_IRQ_WINDOW_OPEN);
	expect_u64("if_flag in the window", c->run->if_flag, 1);
	expect_u64("ready_for_interrupt_injection in the window", c->run->ready_for_interrupt_injection, 1);
	get_regs(c, &r);
	expect_u64("rflags.IF", r.rflags >> 9 & 1, 1);
	if (r.rip < CODE_AT + 4)
		fail("the window opened at %#llx, in the shadow of STI", r.rip);
	c->run->request_interrupt_window = 0;
	interrupt(c, 0x40);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of interrupts", read_note(c, 0), 1);
}

GUEST(halted_guest, 64, R"(
	sti
	hlt
	mov	0x4000, %rax
	cli
	hlt
halted_handler:
	incl	0x4000
	iretq
)");
extern const uint8_t halted_handler[];

static void interrupt_after_hlt(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, halted_guest);
	set_long_mode(c);
	GATE(c, 64, 0xff, halted_handler, halted_guest);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("ready_for_interrupt_injection", c->run->ready_for_interrupt_injection, 1);
	interrupt(c, 0xff);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("number of interrupts", r.rax, 1);
}

GUEST(interrupt32_guest, 32, R"(
	sti
	hlt
	cli
	hlt
interrupt32_handler:
	incl	0x4000
	iret
)");
extern const uint8_t interrupt32_handler[];

static void interrupt_protected(struct client *c)
{
	load_guest(c, interrupt32_guest);
	set_protected_mode(c);
	GATE(c, 32, 0x40, interrupt32_handler, interrupt32_guest);
	expect_exit(c, KVM_EXIT_HLT);
	interrupt(c, 0x40);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of interrupts", read_note(c, 0), 1);
}

GUEST(interrupt16_guest, 16, R"(
	sti
	hlt
	cli
	hlt
interrupt16_handler:
	incw	0x4000
	iret
)");
extern const uint8_t interrupt16_handler[];

static void interrupt_real(struct client *c)
{
	load_guest(c, interrupt16_guest);
	set_real_mode(c);
	set_vector(c, 8, interrupt16_handler, interrupt16_guest);
	expect_exit(c, KVM_EXIT_HLT);
	interrupt(c, 8);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of interrupts", read_note(c, 0), 1);
}

static void interrupt_invalid(struct client *c)
{
	struct kvm_interrupt irq = { .irq = 256 };

	expect_u64("-KVM_INTERRUPT", -try_ioctl(c->vcpu, KVM_INTERRUPT, (uintptr_t)&irq), EINVAL);
}

GUEST(nmi_guest, 64, R"(
	out	%al, $0x10
	nop
	hlt
	hlt
nmi_handler:
	incl	0x4000
	out	%al, $0x11		# the client injects another one here: it is held back until IRET
	iretq
)");
extern const uint8_t nmi_handler[];

static void nmi(struct client *c)
{
	load_guest(c, nmi_guest);
	set_long_mode(c);
	GATE(c, 64, 2, nmi_handler, nmi_guest);
	expect_out(c, 0x10, 1, 0);
	kvm_call(c->vcpu, KVM_NMI, 0);		/* interrupts are off: an NMI does not care */
	expect_out(c, 0x11, 1, 0);
	expect_u64("number of NMIs", read_note(c, 0), 1);
	kvm_call(c->vcpu, KVM_NMI, 0);
	expect_out(c, 0x11, 1, 0);
	expect_u64("number of NMIs", read_note(c, 0), 2);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("number of NMIs", read_note(c, 0), 2);
}

const struct subtest event_subtests[] = {
	{ "exceptions_real", exceptions_real },
	{ "exceptions_protected", exceptions_protected },
	{ "exceptions_long", exceptions_long },
	{ "interrupt_window", interrupt_window },
	{ "interrupt_after_hlt", interrupt_after_hlt },
	{ "interrupt_protected", interrupt_protected },
	{ "interrupt_real", interrupt_real },
	{ "interrupt_invalid", interrupt_invalid },
	{ "nmi", nmi },
	{ NULL, NULL },
};
