// SPDX-License-Identifier: GPL-2.0-or-later
/* Eventfds that interrupt a guest and that a guest signals, with the interrupt controllers in the kernel. */
#include "modes.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define LINE		5u		/* a GSI that is a pin of the PIC */
#define VECTOR		(0x20u + LINE)
#define DOORBELL	0x510u		/* a port */
#define ROUNDS		1000u

/* Rings once, and once for each interrupt; leaves through port 0x10 after as many as 0x4004 says. The PIC's line
 * has the trigger mode that 0x4006 says. */
GUEST(line_guest, 16, R"(
	mov	$0x11, %al
	out	%al, $0x20
	out	%al, $0xa0
	mov	$0x20, %al
	out	%al, $0x21
	mov	$0x28, %al
	out	%al, $0xa1
	mov	$4, %al
	out	%al, $0x21
	mov	$2, %al
	out	%al, $0xa1
	mov	$1, %al
	out	%al, $0x21
	out	%al, $0xa1
	mov	0x4006, %al
	mov	$0x4d0, %dx
	out	%al, %dx
	mov	$0, %al
	out	%al, $0x21
	mov	$0x510, %dx
	out	%al, %dx
1:	cli
	mov	0x4004, %ax
	cmp	%ax, 0x4000
	jae	2f
	sti
	hlt
	jmp	1b
2:	out	%al, $0x10
	jmp	1b
line_handler:
	push	%ax
	push	%dx
	incw	0x4000
	mov	$0x20, %al
	out	%al, $0x20
	mov	$0x510, %dx
	out	%al, %dx
	pop	%dx
	pop	%ax
	iret
)");
extern const uint8_t line_handler[];

static int event(void)
{
	int fd = eventfd(0, EFD_CLOEXEC);

	if (fd < 0)
		fail("eventfd: %s", strerror(errno));
	return fd;
}

/* The machine again, with an irqchip. */
static void begin(struct client *c, int level)
{
	const uint16_t vector[2] = { (uint16_t)(CODE_AT + (line_handler - line_guest)), 0 };

	destroy_machine(c);
	open_node(c, c->node);
	create_vm(c);
	kvm_call(c->vm, KVM_CREATE_IRQCHIP, 0);
	c->mem_size = RAM_SIZE;
	c->mem = mmap(NULL, c->mem_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (c->mem == MAP_FAILED)
		fail("mmap of guest memory: %s", strerror(errno));
	set_memory(c, 0, 0, c->mem, c->mem_size, 0);
	create_vcpu(c);
	load_guest(c, line_guest);
	set_real_mode(c);
	memcpy(c->mem + 4 * VECTOR, vector, sizeof(vector));
	c->mem[NOTES_AT + 6] = level ? 1 << LINE : 0;
}

static void doorbell(struct client *c, int fd)
{
	struct kvm_ioeventfd ring = { .addr = DOORBELL, .len = 1, .fd = fd, .flags = KVM_IOEVENTFD_FLAG_PIO };

	kvm_call(c->vm, KVM_IOEVENTFD, &ring);
}

struct device {
	int told, tells;	/* eventfds */
	int first;		/* what tells it that it may begin, 0: nothing */
	unsigned int rounds;
	int lost;
};

static int answer_one(int told, int tells)
{
	struct pollfd p = { .fd = told, .events = POLLIN };
	uint64_t count;

	return poll(&p, 1, 10000) == 1 && read(told, &count, 8) == 8 && count == 1 && write(tells, &count, 8) == 8;
}

/* Each time it is told it tells. */
static void *answer(void *arg)
{
	struct device *d = arg;

	if (d->first)
		d->lost = !answer_one(d->first, d->tells);
	for (unsigned int i = 0; i < d->rounds && !d->lost; i++)
		d->lost = !answer_one(d->told, d->tells);
	return NULL;
}

static void play(struct client *c, struct device *d, unsigned int interrupts)
{
	pthread_t thread;

	memcpy(c->mem + NOTES_AT + 4, &(uint16_t){ (uint16_t)interrupts }, 2);
	if (pthread_create(&thread, NULL, answer, d))
		fail("pthread_create");
	expect_io(c, KVM_EXIT_IO_OUT, 0x10, 1, 1);
	pthread_join(thread, NULL);
	if (d->lost)
		fail("an event was lost");
	expect_u64("number of interrupts", read_note(c, 0) & 0xffff, interrupts);
}

static void irqfd(struct client *c)
{
	struct device d = { .told = event(), .tells = event(), .rounds = ROUNDS };
	struct kvm_irqfd line = { .fd = (uint32_t)d.tells, .gsi = LINE };
	uint64_t count = 1;

	begin(c, 0);
	doorbell(c, d.told);
	kvm_call(c->vm, KVM_IRQFD, &line);
	expect_u64("-KVM_IRQFD again", -try_ioctl(c->vm, KVM_IRQFD, (uintptr_t)&line), EBUSY);
	play(c, &d, ROUNDS);
	line.flags = KVM_IRQFD_FLAG_DEASSIGN;
	kvm_call(c->vm, KVM_IRQFD, &line);
	if (write(d.tells, &count, 8) != 8 || read(d.tells, &count, 8) != 8)
		fail("the eventfd is not the client's alone again");
}

/* The guest's EOI is what the device is told, and it raises the line again. */
static void irqfd_resample(struct client *c)
{
	struct device d = { .told = event(), .tells = event(), .first = event(), .rounds = ROUNDS - 1 };
	struct kvm_irqfd line = { .fd = (uint32_t)d.tells, .gsi = LINE, .flags = KVM_IRQFD_FLAG_RESAMPLE,
				  .resamplefd = (uint32_t)d.told };

	begin(c, 1);
	doorbell(c, d.first);
	kvm_call(c->vm, KVM_IRQFD, &line);
	play(c, &d, ROUNDS);
}

const struct subtest irq_subtests[] = {
	{ "irqfd", irqfd },
	{ "irqfd_resample", irqfd_resample },
	{ NULL, NULL },
};
