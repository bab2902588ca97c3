// SPDX-License-Identifier: GPL-2.0-or-later
/* Port devices that the client plays (KVM_EXIT_IO). Guests run in long mode unless a subtest says otherwise. */
#include "modes.h"

#include <string.h>

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
	begin_long(c, 0, 0, 0);
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
	begin_long(c, 0, 0, 0);
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
	begin_long(c, 0, 0, 0);
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
	begin_long(c, DATA_AT, 0, 0);
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

/* One element per exit; registers are advanced, rip on the next entry, when rcx is found to be 0. */
static void rep_outs(struct client *c)
{
	load_guest(c, rep_outs_guest);
	memcpy(c->mem + DATA_AT, "aabbcc", 6);
	begin_long(c, DATA_AT, 0, 3);
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
	begin_long(c, 0, DATA_AT, 0);
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

/* KVM reads ahead: many elements per exit, up to a page edge of the destination and 1,024 bytes. */
static void rep_ins(struct client *c)
{
	load_guest(c, rep_ins_guest);
	begin_long(c, 0, DATA_AT + 0xffc, 1034);
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

const struct subtest port_subtests[] = {
	{ "out_widths", out_widths },
	{ "out_rip", out_rip },
	{ "in_widths", in_widths },
	{ "outs", outs },
	{ "rep_outs", rep_outs },
	{ "ins", ins },
	{ "rep_ins", rep_ins },
	{ "real_mode_ports", real_mode_ports },
	{ NULL, NULL },
};
