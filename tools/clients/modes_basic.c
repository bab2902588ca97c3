// SPDX-License-Identifier: GPL-2.0-or-later
/* The three modes, how a guest ends, how a client stops it, and memory slots. */
#define _GNU_SOURCE
#include "modes.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Modes. */

GUEST(real_guest, 16, R"(
	mov	$0x1234, %ax
	mov	%ax, %ds		# base = selector * 16
	movl	$0xcafebabe, 0x10	# linear 0x12350
	xor	%bx, %bx
	mov	%bx, %ds
	mov	%sp, %bp
	push	%ax
	pop	%dx
	hlt
)");

static void real_mode(struct client *c)
{
	struct kvm_regs r;
	uint32_t stored;

	load_guest(c, real_guest);
	set_real_mode(c);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	memcpy(&stored, c->mem + 0x12350, sizeof(stored));
	expect_u64("the word at 0x12350", stored, 0xcafebabe);
	expect_u64("rdx", r.rdx, 0x1234);
	expect_u64("rsp", r.rsp, STACK_TOP);
	expect_u64("rbp", r.rbp, STACK_TOP);
	expect_u64("rip", r.rip, CODE_AT + (size_t)(real_guest_end - real_guest));
}

GUEST(protected_guest, 32, R"(
	mov	$0x11223344, %eax
	mov	%eax, 0x4000
	mov	%cr0, %ebx
	mov	%cs, %ecx
	call	1f
1:	pop	%edx			# where we are
	hlt
)");

static void protected_mode(struct client *c)
{
	struct kvm_regs r;
	struct kvm_sregs s;

	load_guest(c, protected_guest);
	set_protected_mode(c);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("note 0", read_note(c, 0), 0x11223344);
	expect_u64("CR0 as the guest sees it", r.rbx, 0x80010031);
	expect_u64("CS as the guest sees it", r.rcx, CODE32_SEL);
	expect_u64("rdx", r.rdx, r.rip - 2);
	kvm_call(c->vcpu, KVM_GET_SREGS, &s);
	expect_u64("CR0", s.cr0, 0x80010031);
	expect_u64("EFER", s.efer, 0);
	expect_u64("CS.db", s.cs.db, 1);
}

GUEST(long_guest, 64, R"(
	movabs	$0x1122334455667788, %rax
	mov	%rax, 0x4000
	mov	$0xc0000080, %ecx
	rdmsr				# EFER
	mov	%eax, 0x4008
	lea	(%rip), %r8
1:	mov	%cs, %r9d
	mov	$-1, %r15
	hlt
)");

static void long_mode(struct client *c)
{
	struct kvm_regs r;
	struct kvm_sregs s;

	load_guest(c, long_guest);
	set_long_mode(c);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("note 0", read_note(c, 0), 0x1122334455667788);
	expect_u64("EFER as the guest sees it", read_note(c, 1), 0x500);
	expect_u64("r9", r.r9, CODE64_SEL);
	expect_u64("r15", r.r15, UINT64_MAX);
	expect_u64("rip", r.rip, CODE_AT + (size_t)(long_guest_end - long_guest));
	kvm_call(c->vcpu, KVM_GET_SREGS, &s);
	expect_u64("EFER", s.efer, 0x500);
	expect_u64("CR3", s.cr3, TABLES_AT);
	expect_u64("CS.l", s.cs.l, 1);
}

/* A guest does it all itself, as a boot loader does: real mode, protected mode, paging, long mode, and notes
 * a word in each. The client writes GDT and page tables only. */
GUEST(boot_guest, 16, R"(
	movl	$0x16, 0x4000
	lgdtl	boot_gdtr - boot_guest + 0x8000
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$0x08, $(boot_protected - boot_guest + 0x8000)
boot_gdtr:
	.word	7 * 8 - 1
	.long	0x1000
	.code32
boot_protected:
	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	movl	$0x32, 0x4008
	mov	%cr4, %eax
	or	$0x20, %eax		# PAE
	mov	%eax, %cr4
	mov	$0x10000, %eax
	mov	%eax, %cr3
	mov	$0xc0000080, %ecx
	rdmsr
	or	$0x100, %eax		# LME
	wrmsr
	mov	%cr0, %eax
	or	$0x80000000, %eax	# PG: long mode is active, still in a 32-bit segment
	mov	%eax, %cr0
	rdmsr
	mov	%eax, 0x4010
	ljmp	$0x18, $(boot_long - boot_guest + 0x8000)
	.code64
boot_long:
	movabs	$0x6400000064, %rax
	mov	%rax, 0x4018
	hlt
)");

static void boot_to_long_mode(struct client *c)
{
	struct kvm_sregs s;

	write_gdt(c);
	write_tables64(c);
	load_guest(c, boot_guest);
	set_real_mode(c);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0 (real mode)", read_note(c, 0), 0x16);
	expect_u64("note 1 (protected mode)", read_note(c, 1), 0x32);
	expect_u64("note 2 (EFER with paging on)", read_note(c, 2), 0x500);
	expect_u64("note 3 (long mode)", read_note(c, 3), 0x6400000064);
	kvm_call(c->vcpu, KVM_GET_SREGS, &s);
	expect_u64("EFER", s.efer, 0x500);
	expect_u64("CS.selector", s.cs.selector, CODE64_SEL);
	expect_u64("CS.l", s.cs.l, 1);
	expect_u64("GDT base", s.gdt.base, GDT_AT);
}

/* How a guest ends, and how a client stops it. */

GUEST(halts_guest, 64, R"(
	hlt
	inc	%rax
	hlt
	inc	%rax
	hlt
)");

static void hlt(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, halts_guest);
	set_long_mode(c);
	for (uint64_t i = 0; i < 3; i++) {
		expect_exit(c, KVM_EXIT_HLT);
		get_regs(c, &r);
		expect_u64("rax", r.rax, i);
		expect_u64("rip", r.rip, CODE_AT + 1 + 4 * i);
	}
}

GUEST(triple_guest, 64, R"(
	lidt	triple_idtr - triple_guest + 0x8000
	ud2
triple_idtr:
	.word	0
	.quad	0
)");

static void shutdown_by_triple_fault(struct client *c)
{
	load_guest(c, triple_guest);
	set_long_mode(c);
	expect_exit(c, KVM_EXIT_SHUTDOWN);
}

GUEST(io_guest, 64, R"(
	mov	$0x21, %al
	out	%al, $0x10
	inc	%rbx
	in	$0x11, %al
	inc	%rbx
	hlt
)");

/* With immediate_exit KVM_RUN completes the pending exit and returns EINTR before it enters the guest. */
static void immediate_exit(struct client *c)
{
	struct kvm_regs r;

	load_guest(c, io_guest);
	set_long_mode(c);
	c->run->immediate_exit = 1;
	expect_u64("-KVM_RUN", -try_ioctl(c->vcpu, KVM_RUN, 0), EINTR);
	get_regs(c, &r);
	expect_u64("rip before the first instruction", r.rip, CODE_AT);
	c->run->immediate_exit = 0;
	expect_out(c, 0x10, 1, 0x21);
	answer_in(c, 0x11, 1, 0x77);
	c->run->immediate_exit = 1;
	expect_u64("-KVM_RUN", -try_ioctl(c->vcpu, KVM_RUN, 0), EINTR);
	get_regs(c, &r);
	expect_u64("rax after the completed IN", r.rax, 0x77);
	expect_u64("rbx", r.rbx, 1);
	expect_u64("rip after the completed IN", r.rip, CODE_AT + 9);
	c->run->immediate_exit = 0;
	expect_exit(c, KVM_EXIT_HLT);
}

GUEST(spinning_guest, 64, R"(
1:	inc	%rax
	jmp	1b
)");

static volatile sig_atomic_t signals;

static void count_signal(int number)
{
	(void)number;
	signals++;
}

static void signal_while_running(struct client *c)
{
	struct sigaction action = { .sa_handler = count_signal };
	struct kvm_regs r;
	uint64_t before = 0;

	load_guest(c, spinning_guest);
	set_long_mode(c);
	sigaction(SIGUSR1, &action, NULL);
	for (int i = 0; i < 3; i++) {
		pid_t parent = getpid(), child = fork();

		if (child == 0) {
			usleep(50000);
			kill(parent, SIGUSR1);
			_exit(0);
		}
		expect_u64("-KVM_RUN", -try_ioctl(c->vcpu, KVM_RUN, 0), EINTR);
		expect_u64("exit_reason", c->run->exit_reason, KVM_EXIT_INTR);
		expect_u64("signals handled", signals, (uint64_t)i + 1);
		get_regs(c, &r);
		if (r.rax <= before)
			fail("the guest did not run: rax is %llu", r.rax);
		before = r.rax;
		if (r.rip < CODE_AT || r.rip >= CODE_AT + (size_t)(spinning_guest_end - spinning_guest))
			fail("rip is %#llx", r.rip);
	}
}

/* KVM_SET_SIGNAL_MASK: a signal that is blocked outside and not inside ends KVM_RUN, and stays pending. */
static void signal_mask(struct client *c)
{
	struct { struct kvm_signal_mask head; uint8_t set[8]; } mask = { .head.len = 8 };
	sigset_t blocked, pending;

	load_guest(c, spinning_guest);
	set_long_mode(c);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	kvm_call(c->vcpu, KVM_SET_SIGNAL_MASK, &mask);
	kill(getpid(), SIGUSR1);
	expect_u64("-KVM_RUN", -try_ioctl(c->vcpu, KVM_RUN, 0), EINTR);
	expect_u64("exit_reason", c->run->exit_reason, KVM_EXIT_INTR);
	sigpending(&pending);
	expect_u64("SIGUSR1 pending", sigismember(&pending, SIGUSR1), 1);
}

/* Memory slots. */

GUEST(high_guest, 64, R"(
	mov	0x100008, %rax		# 8 bytes of the second slot
	mov	%rax, 0x4000
	movq	$0x5a, 0x100010
	mov	0x100010, %rbx
	hlt
	jmp	high_guest
)");

static uint8_t *high_slot(struct client *c, uint32_t flags)
{
	uint8_t *high = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t secret = 0x5ec2e7;

	if (high == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	memcpy(high + 8, &secret, sizeof(secret));
	set_memory(c, 1, HIGH_AT, high, 0x10000, flags);
	load_guest(c, high_guest);
	set_long_mode(c);
	return high;
}

static void second_slot(struct client *c)
{
	uint8_t *high = high_slot(c, 0);

	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0", read_note(c, 0), 0x5ec2e7);
	expect_u64("what the guest stored", high[0x10], 0x5a);
	high[8] = 0xe8;
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0 after the client's store", read_note(c, 0), 0x5ec2e8);
}

/* Guest memory that the client has shared itself, and sees through another mapping too. */
static void check_shared_memory(struct client *c, int keep_open)
{
	int fd = memfd_create("guest", MFD_CLOEXEC);
	uint8_t *one, *other;
	const uint64_t secret = 0xfd;

	if (fd < 0 || ftruncate(fd, 0x11000) != 0)
		fail("memfd: %s", strerror(errno));
	one = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0x1000);
	other = mmap(NULL, 0x11000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (one == MAP_FAILED || other == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	if (!keep_open)
		close(fd);
	set_memory(c, 1, HIGH_AT, one, 0x10000, 0);
	memcpy(other + 0x1008, &secret, sizeof(secret));
	load_guest(c, high_guest);
	set_long_mode(c);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0", read_note(c, 0), 0xfd);
	expect_u64("what the guest stored, through the other mapping", other[0x1010], 0x5a);
}

static void shared_memory(struct client *c)
{
	check_shared_memory(c, 1);
}

static void shared_memory_without_fd(struct client *c)
{
	check_shared_memory(c, 0);
}

static void readonly_slot(struct client *c)
{
	uint8_t *high = high_slot(c, KVM_MEM_READONLY);

	expect_mmio_write(c, HIGH_AT + 0x10, 8, 0x5a);
	expect_u64("what the guest could not store", high[0x10], 0);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0", read_note(c, 0), 0x5ec2e7);
}

static void deleted_slot(struct client *c)
{
	uint8_t *high = high_slot(c, 0);
	struct kvm_regs r;

	expect_exit(c, KVM_EXIT_HLT);
	set_memory(c, 1, HIGH_AT, high, 0, 0);
	answer_mmio_read(c, HIGH_AT + 8, 8, 0x1122334455667788);
	expect_mmio_write(c, HIGH_AT + 0x10, 8, 0x5a);
	answer_mmio_read(c, HIGH_AT + 0x10, 8, 0x99);
	expect_exit(c, KVM_EXIT_HLT);
	get_regs(c, &r);
	expect_u64("rax", r.rax, 0x1122334455667788);
	expect_u64("rbx", r.rbx, 0x99);
	set_memory(c, 1, HIGH_AT, high, 0x10000, 0);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0 when the slot is back", read_note(c, 0), 0x5ec2e7);
}

static void moved_slot(struct client *c)
{
	uint8_t *high = high_slot(c, 0);

	set_memory(c, 1, HIGH_AT + 0x20000, high, 0x10000, 0);
	answer_mmio_read(c, HIGH_AT + 8, 8, 0);
	set_memory(c, 1, HIGH_AT, high, 0x10000, 0);
	expect_exit(c, KVM_EXIT_HLT);
	expect_u64("note 0, answered by the client", read_note(c, 0), 0);
	expect_u64("what the guest stored", high[0x10], 0x5a);
}

/* Several VMs in one process, each run by a thread of its own. */

static void *other_vm(void *node)
{
	struct client c;
	struct kvm_regs r;

	create_machine(&c, node);
	load_guest(&c, halts_guest);
	set_long_mode(&c);
	for (int i = 0; i < 3; i++)
		expect_exit(&c, KVM_EXIT_HLT);
	get_regs(&c, &r);
	expect_u64("rax", r.rax, 2);
	destroy_machine(&c);
	return NULL;
}

static void three_vms(struct client *c)
{
	pthread_t threads[2];

	for (int i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, other_vm, (void *)c->node))
			fail("pthread_create");
	hlt(c);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}

const struct subtest basic_subtests[] = {
	{ "real_mode", real_mode },
	{ "protected_mode", protected_mode },
	{ "long_mode", long_mode },
	{ "boot_to_long_mode", boot_to_long_mode },
	{ "hlt", hlt },
	{ "shutdown_by_triple_fault", shutdown_by_triple_fault },
	{ "immediate_exit", immediate_exit },
	{ "signal_while_running", signal_while_running },
	{ "signal_mask", signal_mask },
	{ "second_slot", second_slot },
	{ "shared_memory", shared_memory },
	{ "shared_memory_without_fd", shared_memory_without_fd },
	{ "readonly_slot", readonly_slot },
	{ "deleted_slot", deleted_slot },
	{ "moved_slot", moved_slot },
	{ "three_vms", three_vms },
	{ NULL, NULL },
};
