// SPDX-License-Identifier: GPL-2.0-or-later
/* A debugger in the client: KVM_SET_GUEST_DEBUG and KVM_EXIT_DEBUG; registers in kvm_run; extended state. */
#include "modes.h"

#include <errno.h>
#include <string.h>

enum { DB = 1, BP = 3 };
#define DR6_LOW 0xffff0ff0u
#define DR6_BS 0x4000u
#define DR7_ENABLED(n, type, length) (2ul << 2 * (n) | (uint64_t)((type) | (length) << 2) << (16 + 4 * (n)))
enum { ON_EXECUTION, ON_WRITE, ON_ACCESS = 3 };
#define FLAG_RF 0x10000u

static void set_debug(struct client *c, uint32_t control, uint64_t dr7, uint64_t dr0, uint64_t dr1)
{
	struct kvm_guest_debug debug = { .control = control | KVM_GUESTDBG_ENABLE };

	debug.arch.debugreg[0] = dr0;
	debug.arch.debugreg[1] = dr1;
	debug.arch.debugreg[7] = dr7;
	kvm_call(c->vcpu, KVM_SET_GUEST_DEBUG, &debug);
}

/* The guest stops at `offset` from its start, with the bits of DR6 that `cause` says. */
static void expect_debug(struct client *c, uint32_t exception, uint64_t offset, uint64_t cause)
{
	expect_exit(c, KVM_EXIT_DEBUG);
	expect_u64("exception", c->run->debug.arch.exception, exception);
	expect_u64("pc", c->run->debug.arch.pc, CODE_AT + offset);
	if (exception == DB)
		expect_u64("dr6", c->run->debug.arch.dr6, DR6_LOW | cause);
}

GUEST(step_guest, 64, R"(
	mov	$1, %al
	pushf
	popf
	out	%al, $0x10
	jmp	1f
	nop
1:	nop
	hlt
)");

static void single_step(struct client *c)
{
	struct kvm_regs regs;

	load_guest(c, step_guest);
	begin_long(c, 0, 0, 0);
	set_debug(c, KVM_GUESTDBG_SINGLESTEP, 0, 0, 0);
	expect_debug(c, DB, 2, DR6_BS);
	get_regs(c, &regs);
	expect_u64("TF in the flags that a client sees", regs.rflags & 0x100, 0);
	expect_debug(c, DB, 3, DR6_BS);
	expect_debug(c, DB, 4, DR6_BS);
	expect_out(c, 0x10, 1, 1);
	expect_debug(c, DB, 6, DR6_BS);
	expect_debug(c, DB, 9, DR6_BS);
	expect_debug(c, DB, 10, DR6_BS);
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(int3_guest, 64, R"(
	nop
	int3
	hlt
)");

static void software_breakpoint(struct client *c)
{
	struct kvm_regs regs;

	load_guest(c, int3_guest);
	begin_long(c, 0, 0, 0);
	set_debug(c, KVM_GUESTDBG_USE_SW_BP, 0, 0, 0);
	expect_debug(c, BP, 1, 0);
	get_regs(c, &regs);
	expect_u64("rip", regs.rip, CODE_AT + 1);
	regs.rip++;
	set_regs(c, &regs);
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(loop_guest, 64, R"(
	mov	$2, %ecx
1:	add	$1, %eax
	sub	$1, %ecx
	jnz	1b
	hlt
)");

/* A breakpoint comes again until the client moves on: RF is not set for it, the client sets it. */
static void go_on(struct client *c)
{
	struct kvm_regs regs;

	get_regs(c, &regs);
	expect_u64("RF", regs.rflags & FLAG_RF, 0);
	regs.rflags |= FLAG_RF;
	kvm_call(c->vcpu, KVM_SET_REGS, &regs);
}

static void execution_breakpoints(struct client *c)
{
	struct kvm_guest_debug off = { 0 };

	load_guest(c, loop_guest);
	begin_long(c, 0, 0, 0);
	set_debug(c, KVM_GUESTDBG_USE_HW_BP, DR7_ENABLED(0, ON_EXECUTION, 0) | DR7_ENABLED(1, ON_EXECUTION, 0),
		  CODE_AT + 5, CODE_AT + 8);
	for (int i = 0; i < 2; i++) {
		expect_debug(c, DB, 5, 1);
		expect_debug(c, DB, 5, 1);
		go_on(c);
		expect_debug(c, DB, 8, 2);
		go_on(c);
	}
	expect_exit(c, KVM_EXIT_HLT);
	kvm_call(c->vcpu, KVM_SET_GUEST_DEBUG, &off);
	begin_long(c, 0, 0, 0);
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(store_guest, 64, R"(
	mov	%al, 0x4003
	mov	%eax, 0x4010
	mov	0x4008, %rbx
	mov	%rax, 0x4008
	incl	0x3ffe
	hlt
)");

static void data_breakpoints(struct client *c)
{
	load_guest(c, store_guest);
	begin_long(c, 0, 0, 0);
	set_debug(c, KVM_GUESTDBG_USE_HW_BP, DR7_ENABLED(0, ON_WRITE, 2) | DR7_ENABLED(1, ON_ACCESS, 1),
		  0x4008, 0x4000);
	expect_debug(c, DB, 30, 1);
	expect_debug(c, DB, 37, 2);
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(own_guest, 64, R"(
	lea	1f(%rip), %rax
	mov	%rax, %dr0
	mov	$2, %eax
	mov	%rax, %dr7
	mov	%dr7, %rdx
	mov	%rdx, 0x4008
1:	nop
	hlt
	.org	own_guest + 0x40
	mov	%dr6, %rax
	mov	%rax, 0x4000
	pop	%rbx
	mov	%rbx, 0x4010
	hlt
)");

/* The guest has a debugger of its own. */
static void guests_own_breakpoint(struct client *c)
{
	struct kvm_debugregs regs;

	load_guest(c, own_guest);
	begin_long(c, 0, 0, 0);
	set_gate(c, 64, DB, CODE_AT + 0x40);
	expect_exit(c, KVM_EXIT_HLT);
	kvm_call(c->vcpu, KVM_GET_DEBUGREGS, &regs);
	expect_u64("dr6 in the handler", read_note(c, 0), DR6_LOW | 1);
	expect_u64("dr7 as it reads", read_note(c, 1), 0x402);
	expect_u64("the handler's return address", read_note(c, 2), regs.db[0]);
	expect_u64("dr7", regs.dr7, 0x402);
}

GUEST(sync_guest, 64, R"(
	add	$1, %rax
	hlt
)");

static void sync_regs(struct client *c)
{
	load_guest(c, sync_guest);
	begin_long(c, 0, 0, 0);
	c->run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("rip", c->run->s.regs.regs.rip, CODE_AT + 5);
	c->run->s.regs.regs.rip = CODE_AT;
	c->run->s.regs.regs.rax = 41;
	c->run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("rax", c->run->s.regs.regs.rax, 42);
	expect_u64("kvm_dirty_regs", c->run->kvm_dirty_regs, 0);
	expect_u64("efer", c->run->s.regs.sregs.efer & 0x500, 0x500);
	c->run->kvm_valid_regs = 1ul << 40;
	if (try_ioctl(c->vcpu, KVM_RUN, 0) != -EINVAL)
		fail("KVM_RUN takes an unknown kvm_valid_regs");
}

GUEST(sse_guest, 64, R"(
	movaps	%xmm1, 0x4000
	pcmpeqd	%xmm2, %xmm2
	hlt
)");

static void xsave(struct client *c)
{
	struct kvm_xsave state;
	uint64_t *header = (uint64_t *)(state.region + 128), *xmm = (uint64_t *)(state.region + 40);

	load_guest(c, sse_guest);
	begin_long(c, 0, 0, 0);
	kvm_call(c->vcpu, KVM_GET_XSAVE, &state);
	header[0] |= 2;
	xmm[2] = 0x1122334455667788;
	xmm[3] = 0x99aabbccddeeff00;
	kvm_call(c->vcpu, KVM_SET_XSAVE, &state);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("xmm1", read_note(c, 0), 0x1122334455667788);
	expect_u64("xmm1, high", read_note(c, 1), 0x99aabbccddeeff00);
	kvm_call(c->vcpu, KVM_GET_XSAVE, &state);
	expect_u64("xmm2", xmm[4] & xmm[5], ~0ul);
	header[1] = 1ul << 63;
	if (try_ioctl(c->vcpu, KVM_SET_XSAVE, (unsigned long)&state) != -EINVAL)
		fail("KVM_SET_XSAVE takes the compacted format");
}

static void translate(struct client *c)
{
	struct kvm_translation page = { .linear_address = DATA_AT + 0x123 }, absent = { .linear_address = ABSENT_PAGE };

	begin_long(c, 0, 0, 0);
	kvm_call(c->vcpu, KVM_TRANSLATE, &page);
	expect_u64("valid", page.valid, 1);
	expect_u64("physical address", page.physical_address, DATA_AT + 0x123);
	kvm_call(c->vcpu, KVM_TRANSLATE, &absent);
	expect_u64("valid, without a page", absent.valid, 0);
}

const struct subtest debug_subtests[] = {
	{ "single_step", single_step },
	{ "software_breakpoint", software_breakpoint },
	{ "execution_breakpoints", execution_breakpoints },
	{ "data_breakpoints", data_breakpoints },
	{ "guests_own_breakpoint", guests_own_breakpoint },
	{ "sync_regs", sync_regs },
	{ "xsave", xsave },
	{ "translate", translate },
	{ 0 },
};
