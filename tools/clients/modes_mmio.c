// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Memory-mapped devices that the client plays (KVM_EXIT_MMIO): no slot is at DEVICE_AT = 0xa0000. Guests run in long
 * mode unless a subtest says otherwise.
 */
#include "modes.h"

#include <string.h>

GUEST(mmio_mov_guest, 64, R"(
	movabs	$0x8877665544332211, %rax
	mov	%al, (%rdi)
	mov	%ax, 2(%rdi)
	mov	%eax, 4(%rdi)
	mov	%rax, 8(%rdi)
	movl	$-2, 0x10(%rdi)
	movq	$-2, 0x18(%rdi)
	mov	$-1, %rax
	mov	(%rdi), %al
	mov	%rax, 0x4000
	mov	$-1, %rax
	mov	2(%rdi), %ax
	mov	%rax, 0x4008
	mov	$-1, %rax
	mov	4(%rdi), %eax
	mov	%rax, 0x4010
	mov	8(%rdi), %rax
	mov	%rax, 0x4018
	hlt
)");

static void mmio_mov(struct client *c)
{
	load_guest(c, mmio_mov_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT, 1, 0x11);
	expect_rip(c, "after a write", 12);
	expect_mmio_write(c, DEVICE_AT + 2, 2, 0x2211);
	expect_mmio_write(c, DEVICE_AT + 4, 4, 0x44332211);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x8877665544332211);
	expect_mmio_write(c, DEVICE_AT + 0x10, 4, 0xfffffffe);
	expect_mmio_write(c, DEVICE_AT + 0x18, 8, 0xfffffffffffffffe);
	answer_mmio_read(c, DEVICE_AT, 1, 0xa1);
	expect_rip(c, "at a read", 45);
	answer_mmio_read(c, DEVICE_AT + 2, 2, 0xa2a1);
	answer_mmio_read(c, DEVICE_AT + 4, 4, 0xa4a3a2a1);
	answer_mmio_read(c, DEVICE_AT + 8, 8, 0xa8a7a6a5a4a3a2a1);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("rax after a byte", read_note(c, 0), 0xffffffffffffffa1);
	expect_u64("rax after a word", read_note(c, 1), 0xffffffffffffa2a1);
	expect_u64("rax after a doubleword", read_note(c, 2), 0xa4a3a2a1);
	expect_u64("rax after a quadword", read_note(c, 3), 0xa8a7a6a5a4a3a2a1);
}

GUEST(mmio_movzx_guest, 64, R"(
	movzbl	(%rdi), %eax
	movzwl	(%rdi), %ebx
	movsbq	(%rdi), %rcx
	movswl	(%rdi), %edx
	movslq	(%rdi), %rbp
	hlt
)");

static void mmio_movzx(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_movzx_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	answer_mmio_read(c, DEVICE_AT, 1, 0x81);
	answer_mmio_read(c, DEVICE_AT, 2, 0x8182);
	answer_mmio_read(c, DEVICE_AT, 1, 0x83);
	answer_mmio_read(c, DEVICE_AT, 2, 0x8485);
	answer_mmio_read(c, DEVICE_AT, 4, 0x86878889);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("MOVZX of a byte", r.rax, 0x81);
	expect_u64("MOVZX of a word", r.rbx, 0x8182);
	expect_u64("MOVSX of a byte", r.rcx, 0xffffffffffffff83);
	expect_u64("MOVSX of a word", r.rdx, 0xffff8485);
	expect_u64("MOVSXD", r.rbp, 0xffffffff86878889);
}

GUEST(mmio_rmw_guest, 64, R"(
	addl	$5, (%rdi)
	orb	$0x80, 1(%rdi)
	incq	8(%rdi)
	mov	$1, %eax
	sub	(%rdi), %eax		# reads only
	cmpw	$7, 2(%rdi)		# reads only
	setz	%bl
	hlt
)");

/* Read exit, then write exit, with the instruction done after the second one. */
static void mmio_read_modify_write(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_rmw_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	answer_mmio_read(c, DEVICE_AT, 4, 10);
	expect_rip(c, "at the read of an ADD", 0);
	expect_mmio_write(c, DEVICE_AT, 4, 15);
	expect_rip(c, "at the write of an ADD", 3);
	answer_mmio_read(c, DEVICE_AT + 1, 1, 1);
	expect_mmio_write(c, DEVICE_AT + 1, 1, 0x81);
	answer_mmio_read(c, DEVICE_AT + 8, 8, 0xffffffff);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x100000000);
	answer_mmio_read(c, DEVICE_AT, 4, 3);
	answer_mmio_read(c, DEVICE_AT + 2, 2, 7);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("1 - 3", r.rax, 0xfffffffe);
	expect_u64("7 == 7", r.rbx, 1);
}

GUEST(mmio_xchg_guest, 64, R"(
	mov	$0x1111, %eax
	xchg	%eax, (%rdi)
	mov	$0x99, %ebx
	lock xaddl %ebx, 4(%rdi)
	hlt
)");

static void mmio_xchg(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_xchg_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	answer_mmio_read(c, DEVICE_AT, 4, 0x2222);
	expect_mmio_write(c, DEVICE_AT, 4, 0x1111);
	answer_mmio_read(c, DEVICE_AT + 4, 4, 1);
	expect_mmio_write(c, DEVICE_AT + 4, 4, 0x9a);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax after XCHG", r.rax, 0x2222);
	expect_u64("rbx after XADD", r.rbx, 1);
}

GUEST(mmio_cmpxchg_guest, 64, R"(
	mov	$7, %eax
	mov	$8, %ecx
	cmpxchg	%ecx, (%rdi)		# equal
	setz	%bl
	lock cmpxchg %ecx, (%rdi)	# not equal: eax becomes what was read
	setnz	%bh
	hlt
)");

static void mmio_cmpxchg(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_cmpxchg_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	answer_mmio_read(c, DEVICE_AT, 4, 7);
	expect_mmio_write(c, DEVICE_AT, 4, 8);
	answer_mmio_read(c, DEVICE_AT, 4, 9);
	expect_mmio_write(c, DEVICE_AT, 4, 9);	/* a write cycle with the old value */
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax", r.rax, 9);
	expect_u64("rbx", r.rbx, 0x101);
}

GUEST(mmio_push_guest, 64, R"(
	lea	0x10(%rdi), %rsp	# the stack is the device
	push	$0x55
	mov	$0x8000, %esp
	pushq	(%rdi)			# device to stack
	pop	%rax
	pushq	$0x66
	popq	8(%rdi)			# stack to device
	hlt
)");

static void mmio_push(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_push_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x55);
	get_regs(c, &r);
	expect_u64("rsp after PUSH", r.rsp, DEVICE_AT + 8);
	answer_mmio_read(c, DEVICE_AT, 8, 0x77);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x66);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax", r.rax, 0x77);
	expect_u64("rsp", r.rsp, STACK_TOP);
}

GUEST(mmio_string_guest, 64, R"(
	rep	movsb			# device to memory
	mov	$0x41, %al
	mov	$0xa0000, %edi
	mov	$2, %ecx
	rep	stosb
	mov	$0xa0000, %esi
	lodsl
	hlt
)");

static void mmio_string(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_string_guest);
	begin_long(c, DEVICE_AT, DATA_AT, 3);
	for (unsigned int i = 0; i < 3; i++) {
		answer_mmio_read(c, DEVICE_AT + i, 1, 'a' + i);
		expect_string_regs(c, "at a REP MOVSB", DEVICE_AT + i, DATA_AT + i, 3 - i);
	}
	for (unsigned int i = 0; i < 2; i++) {
		expect_mmio_write(c, DEVICE_AT + i, 1, 0x41);
		expect_string_regs(c, "at a REP STOSB", DEVICE_AT + 3, DEVICE_AT + i + 1, 1 - i);
	}
	answer_mmio_read(c, DEVICE_AT, 4, 0x1234);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax after LODSL", r.rax, 0x1234);
	if (memcmp(c->mem + DATA_AT, "abc", 4) != 0)
		fail("what REP MOVSB stored is not what the client gave");
}

GUEST(mmio_sse_guest, 64, R"(
	movdqu	(%rsi), %xmm1
	movdqa	%xmm1, (%rdi)
	movups	0x10(%rdi), %xmm2
	movups	%xmm2, 0x10(%rsi)
	hlt
)");

/* 16 bytes are two exits of 8. */
static void mmio_sse(struct client *c)
{
	uint64_t stored[2];

	load_guest(c, mmio_sse_guest);
	memcpy(c->mem + DATA_AT, "0123456789abcdef", 16);
	begin_long(c, DATA_AT, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT, 8, 0x3736353433323130);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x6665646362613938);
	answer_mmio_read(c, DEVICE_AT + 0x10, 8, 0x1111111122222222);
	answer_mmio_read(c, DEVICE_AT + 0x18, 8, 0x3333333344444444);
	expect_exit(c, KVM_EXIT_HLT);
	memcpy(stored, c->mem + DATA_AT + 0x10, sizeof(stored));
	expect_u64("the low half of xmm2", stored[0], 0x1111111122222222);
	expect_u64("the high half of xmm2", stored[1], 0x3333333344444444);
}

GUEST(mmio_edge_guest, 64, R"(
	movabs	$0x8877665544332211, %rax
	mov	%rax, 0xffd(%rdi)	# three bytes of one page, five of the next
	mov	0xffe(%rdi), %ebx
	mov	%eax, -2(%rdi)		# below 0xa0000 is no slot either: two pages again
	hlt
)");

static void mmio_page_edge(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_edge_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT + 0xffd, 3, 0x332211);
	expect_mmio_write(c, DEVICE_AT + 0x1000, 5, 0x8877665544);
	answer_mmio_read(c, DEVICE_AT + 0xffe, 2, 0x2211);
	answer_mmio_read(c, DEVICE_AT + 0x1000, 2, 0x4433);
	expect_mmio_write(c, DEVICE_AT - 2, 2, 0x2211);
	expect_mmio_write(c, DEVICE_AT, 2, 0x4433);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rbx", r.rbx, 0x44332211);
}

GUEST(mmio_mixed_guest, 64, R"(
	mov	$0x44332211, %eax
	mov	%eax, -2(%rdi)		# the last two bytes of memory, the first two of the device
	mov	-2(%rdi), %ebx
	hlt
)");

/* Across the edge between memory and device only the device's part is an exit. */
static void mmio_memory_edge(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, mmio_mixed_guest);
	begin_long(c, 0, RAM_SIZE, 0);
	expect_mmio_write(c, RAM_SIZE, 2, 0x4433);
	expect_u64("the byte before the edge", c->mem[RAM_SIZE - 1], 0x22);
	answer_mmio_read(c, RAM_SIZE, 2, 0x8877);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rbx", r.rbx, 0x88772211);
}

GUEST(real_mmio_guest, 16, R"(
	mov	$0xa000, %ax
	mov	%ax, %es
	movb	$0x48, %es:0x20
	mov	%es:0x22, %bx
	hlt
)");

static void real_mode_mmio(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, real_mmio_guest);
	set_real_mode(c);
	expect_mmio_write(c, DEVICE_AT + 0x20, 1, 0x48);
	answer_mmio_read(c, DEVICE_AT + 0x22, 2, 0x4242);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rbx", r.rbx, 0x4242);
}

GUEST(protected_mmio_guest, 32, R"(
	movb	$0x48, 0xa0020
	mov	0xa0024, %ebx
	rep	insb
	hlt
)");

static void protected_mode_devices(struct client *c)
{
	struct kvm_regs r = { .rip = CODE_AT, .rsp = STACK_TOP, .rflags = 2, .rcx = 5, .rdx = 0x5000,
			      .rdi = DATA_AT };

	load_guest(c, protected_mmio_guest);
	set_protected_mode(c);
	set_regs(c, &r);
	expect_mmio_write(c, DEVICE_AT + 0x20, 1, 0x48);
	answer_mmio_read(c, DEVICE_AT + 0x24, 4, 0x42424242);
	give_bytes(c, 5, 'a');
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rbx", r.rbx, 0x42424242);
	expect_u64("rdi", r.rdi, DATA_AT + 5);
}

const struct subtest mmio_subtests[] = {
	{ "mmio_mov", mmio_mov },
	{ "mmio_movzx", mmio_movzx },
	{ "mmio_read_modify_write", mmio_read_modify_write },
	{ "mmio_xchg", mmio_xchg },
	{ "mmio_cmpxchg", mmio_cmpxchg },
	{ "mmio_push", mmio_push },
	{ "mmio_string", mmio_string },
	{ "mmio_sse", mmio_sse },
	{ "mmio_page_edge", mmio_page_edge },
	{ "mmio_memory_edge", mmio_memory_edge },
	{ "real_mode_mmio", real_mode_mmio },
	{ "protected_mode_devices", protected_mode_devices },
	{ NULL, NULL },
};
