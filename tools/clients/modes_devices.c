// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Devices that the client plays: ports (KVM_EXIT_IO) and memory without a slot (KVM_EXIT_MMIO). Guests run in
 * long mode unless a subtest says otherwise. The device's memory is at DEVICE_AT = 0xa0000.
 */
#include "modes.h"

#include <stdio.h>
#include <string.h>

static void begin(struct client *c, uint64_t rsi, uint64_t rdi, uint64_t rcx)
{
	struct kvm_regs r = { .rip = CODE_AT, .rsp = STACK_TOP, .rflags = 2,
			      .rsi = rsi, .rdi = rdi, .rcx = rcx, .rdx = 0x5000 };

	set_long_mode(c);
	set_regs(c, &r);
}

static void expect_string_regs(struct client *c, const char *when, uint64_t rsi, uint64_t rdi, uint64_t rcx)
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

static void expect_rip(struct client *c, const char *when, uint64_t offset)
{
	struct kvm_regs r;
	char what[80];

	get_regs(c, &r);
	snprintf(what, sizeof(what), "rip %s", when);
	expect_u64(what, r.rip, CODE_AT + offset);
}

/* Ports. */

GUEST(out_guest, 64, R"(
	mov	$0x44332211, %eax
	out	%al, $0x10
	out	%ax, $0x20
	out	%eax, $0x30
	mov	$0xfffe, %edx
	out	%al, %dx
	out	%ax, %dx
	out	%eax, %dx
	hlt
)");

static void out_widths(struct client *c)
{
	load_guest(c, out_guest);
	begin(c, 0, 0, 0);
	expect_out(c, 0x10, 1, 0x11);
	expect_out(c, 0x20, 2, 0x2211);
	expect_out(c, 0x30, 4, 0x44332211);
	expect_out(c, 0xfffe, 1, 0x11);
	expect_out(c, 0xfffe, 2, 0x2211);
	expect_out(c, 0xfffe, 4, 0x44332211);
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(out_rip_guest, 64, R"(
	out	%al, $0x10
	out	%al, $0x7e
	in	$0x10, %al
	hlt
)");

/* A plain OUT or IN is completed on the next entry; only port 0x7e is past already (KVM_X86_QUIRK_OUT_7E_INC_RIP). */
static void out_rip(struct client *c)
{
	load_guest(c, out_rip_guest);
	begin(c, 0, 0, 0);
	expect_out(c, 0x10, 1, 0);
	expect_rip(c, "at an OUT", 0);
	expect_out(c, 0x7e, 1, 0);
	expect_rip(c, "at an OUT to port 0x7e", 4);
	answer_in(c, 0x10, 1, 1);
	expect_rip(c, "at an IN", 4);
	expect_exit(c, KVM_EXIT_HLT);
	expect_rip(c, "at a HLT", 7);
}

GUEST(in_guest, 64, R"(
	mov	$-1, %rax
	in	$0x10, %al
	mov	%rax, 0x4000
	mov	$-1, %rax
	in	$0x20, %ax
	mov	%rax, 0x4008
	mov	$-1, %rax
	in	$0x30, %eax
	mov	%rax, 0x4010
	mov	$-1, %rax
	mov	$0x1234, %edx
	in	%dx, %ax
	mov	%rax, 0x4018
	hlt
)");

static void in_widths(struct client *c)
{
	load_guest(c, in_guest);
	begin(c, 0, 0, 0);
	answer_in(c, 0x10, 1, 0x11);
	answer_in(c, 0x20, 2, 0x2211);
	answer_in(c, 0x30, 4, 0x44332211);
	answer_in(c, 0x1234, 2, 0xbeef);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("rax after IN AL", read_note(c, 0), 0xffffffffffffff11);
	expect_u64("rax after IN AX", read_note(c, 1), 0xffffffffffff2211);
	expect_u64("rax after IN EAX", read_note(c, 2), 0x44332211);
	expect_u64("rax after IN AX from DX", read_note(c, 3), 0xffffffffffffbeef);
}

GUEST(outs_guest, 64, R"(
	outsb
	outsw
	outsl
	hlt
)");

static void outs(struct client *c)
{
	load_guest(c, outs_guest);
	memcpy(c->mem + DATA_AT, "abcdefg", 7);
	begin(c, DATA_AT, 0, 0);
	expect_out(c, 0x5000, 1, 'a');
	expect_string_regs(c, "after OUTSB", DATA_AT + 1, 0, 0);
	expect_rip(c, "after OUTSB", 1);
	expect_out(c, 0x5000, 2, 0x6362);
	expect_out(c, 0x5000, 4, 0x67666564);
	expect_exit(c, KVM_EXIT_HLT);
	expect_string_regs(c, "at the end", DATA_AT + 7, 0, 0);
}

GUEST(rep_outs_guest, 64, R"(
	rep	outsw
	hlt
)");

/* One element per exit; registers are advanced, rip only after the last one. */
static void rep_outs(struct client *c)
{
	load_guest(c, rep_outs_guest);
	memcpy(c->mem + DATA_AT, "aabbcc", 6);
	begin(c, DATA_AT, 0, 3);
	for (unsigned int i = 0; i < 3; i++) {
		expect_out(c, 0x5000, 2, 0x6161 + 0x101 * i);
		expect_string_regs(c, "at a REP OUTSW", DATA_AT + 2 * (i + 1), 0, 2 - i);
		expect_rip(c, "at a REP OUTSW", 0);
	}
	expect_exit(c, KVM_EXIT_HLT);
	expect_rip(c, "at the end", 4);
}

GUEST(ins_guest, 64, R"(
	insb
	insw
	insl
	hlt
)");

static void ins(struct client *c)
{
	load_guest(c, ins_guest);
	begin(c, 0, DATA_AT, 0);
	answer_in(c, 0x5000, 1, 0x11);
	expect_string_regs(c, "at INSB", 0, DATA_AT, 0);
	expect_rip(c, "at INSB", 0);
	answer_in(c, 0x5000, 2, 0x3322);
	answer_in(c, 0x5000, 4, 0x77665544);
	expect_exit(c, KVM_EXIT_HLT);
	expect_string_regs(c, "at the end", 0, DATA_AT + 7, 0);
	if (memcmp(c->mem + DATA_AT, "\x11\x22\x33\x44\x55\x66\x77", 8) != 0)
		fail("what INS stored is not what the client gave");
}

GUEST(rep_ins_guest, 64, R"(
	rep	insb
	hlt
)");

static void give_bytes(struct client *c, unsigned int count, uint8_t first)
{
	uint8_t *data = expect_io(c, KVM_EXIT_IO_IN, 0x5000, 1, count);

	for (unsigned int i = 0; i < count; i++)
		data[i] = (uint8_t)(first + i);
}

/* KVM reads ahead: many elements per exit, up to a page edge of the destination and 1,024 bytes. */
static void rep_ins(struct client *c)
{
	load_guest(c, rep_ins_guest);
	begin(c, 0, DATA_AT + 0xffc, 1034);
	give_bytes(c, 4, 1);
	expect_string_regs(c, "at the first exit", 0, DATA_AT + 0xffc, 1034);
	give_bytes(c, 1024, 5);
	expect_string_regs(c, "at the second exit", 0, DATA_AT + 0x1000, 1030);
	give_bytes(c, 6, 5);
	expect_exit(c, KVM_EXIT_HLT);
	expect_string_regs(c, "at the end", 0, DATA_AT + 0xffc + 1034, 0);
	for (unsigned int i = 0; i < 1034; i++)
		expect_u64("a byte that REP INSB stored", c->mem[DATA_AT + 0xffc + i], (i + 1) & 0xff);
}

GUEST(real_io_guest, 16, R"(
	mov	$0x5000, %dx
	mov	$0x6000, %si
	mov	$0x6100, %di
	mov	$3, %cx
	rep	outsb
	mov	$4, %cx
	rep	insb
	in	%dx, %eax
	hlt
)");

static void real_mode_ports(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, real_io_guest);
	memcpy(c->mem + 0x6000, "xyz", 3);
	set_real_mode(c);
	expect_out(c, 0x5000, 1, 'x');
	expect_out(c, 0x5000, 1, 'y');
	expect_out(c, 0x5000, 1, 'z');
	give_bytes(c, 4, 'a');
	answer_in(c, 0x5000, 4, 0x12345678);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax", r.rax, 0x12345678);
	if (memcmp(c->mem + 0x6100, "abcd", 5) != 0)
		fail("what REP INSB stored is not what the client gave");
}

/* Memory-mapped devices. */

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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, DEVICE_AT, DATA_AT, 3);
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
	movq	%xmm1, 0x20(%rdi)
	hlt
)");

/* 16 bytes are two exits of 8. */
static void mmio_sse(struct client *c)
{
	uint64_t stored[2];

	load_guest(c, mmio_sse_guest);
	memcpy(c->mem + DATA_AT, "0123456789abcdef", 16);
	begin(c, DATA_AT, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT, 8, 0x3736353433323130);
	expect_mmio_write(c, DEVICE_AT + 8, 8, 0x6665646362613938);
	answer_mmio_read(c, DEVICE_AT + 0x10, 8, 0x1111111122222222);
	answer_mmio_read(c, DEVICE_AT + 0x18, 8, 0x3333333344444444);
	expect_mmio_write(c, DEVICE_AT + 0x20, 8, 0x3736353433323130);
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
	begin(c, 0, DEVICE_AT, 0);
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
	begin(c, 0, RAM_SIZE, 0);
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

const struct subtest device_subtests[] = {
	{ "out_widths", out_widths },
	{ "out_rip", out_rip },
	{ "in_widths", in_widths },
	{ "outs", outs },
	{ "rep_outs", rep_outs },
	{ "ins", ins },
	{ "rep_ins", rep_ins },
	{ "real_mode_ports", real_mode_ports },
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
