/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One measurement on one node: bench-client [-c] NODE WHAT COUNT [SIZE TOUCHED]. Prints one line, JSON: the median, the 10th and the
 * 90th percentile of COUNT round trips in microseconds ("busy": what the guests of COUNT VMs counted in a second).
 * With -c NODE is the file of the C server, which answers vCPU ioctls on the node itself.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../clients/kvmclient.h"

#define SERVER_ROOM 4096
#define EVENT_PORT 0x500
#define IRQ 5
#define WARM_UP 200

/* again: out 0x80; jmp again */
GUEST(pio_guest, 16, "1: outb %al, $0x80; jmp 1b");
GUEST(mmio_guest, 64, "1: movl %eax, 0xa0000; jmp 1b");
GUEST(hlt_guest, 16, "1: hlt; jmp 1b");
GUEST(event_guest, 16, "movw $0x500, %dx; movw $1000, %cx; 1: outb %al, %dx; loop 1b; hlt; .byte 0xeb, 0xf4");
GUEST(busy_guest, 64, "1: incq 0x4000; jmp 1b");
/* Both PICs at 0x20 and 0x28, all lines open; then wait. The handler of IRQ 5 writes the port and says EOI. */
GUEST(irq_guest, 16,
      "movb $0x11, %al; outb %al, $0x20; movb $0x20, %al; outb %al, $0x21; movb $4, %al; outb %al, $0x21;"
      "movb $1, %al; outb %al, $0x21; movb $0xdf, %al; outb %al, $0x21;"
      "movw $(2f - irq_guest + 0x8000), 0x94; movw $0, 0x96; movw $0x501, %dx; outb %al, %dx;"
      "sti; 1: hlt; jmp 1b;"
      "2: pushw %ax; pushw %dx; movw $0x500, %dx; outb %al, %dx; movb $0x20, %al; outb %al, $0x20; popw %dx; popw %ax; iret");

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void report(double *took, int count)
{
	qsort(took, count, sizeof(*took), compare);
	printf("{\"median\": %.3f, \"low\": %.3f, \"high\": %.3f}\n", took[count / 2], took[count / 10], took[count * 9 / 10]);
}

static void repeat(int fd, unsigned long request, unsigned long arg, int count, int expected_exit, struct client *c)
{
	double *took = calloc(count, sizeof(*took)), start;

	for (int i = -WARM_UP; i < count; i++) {
		start = now();
		if (ioctl(fd, request, arg) < 0)
			fail("ioctl %#lx: %s", request, strerror(errno));
		if (i >= 0)
			took[i] = now() - start;
		if (expected_exit >= 0 && c->run->exit_reason != (unsigned int)expected_exit)
			fail("exit %u, not %d", c->run->exit_reason, expected_exit);
	}
	report(took, count);
}

static void state(const char *node, const char *what, int count, int server)
{
	static union { struct kvm_regs regs; struct kvm_sregs sregs; struct { struct kvm_msrs head; struct kvm_msr_entry entries[10]; } msrs; } u;
	struct client c = { 0 };
	int system, vcpu;

	if (server) {
		system = vcpu = open(node, O_RDWR | O_CLOEXEC);
		if (system < 0)
			fail("%s: %s", node, strerror(errno));
	} else {
		create_machine(&c, node);
		system = c.kvm;
		vcpu = c.vcpu;
	}
	u.msrs.head.nmsrs = 10;
	for (int i = 0; i < 10; i++)
		u.msrs.entries[i].index = 0x174;	/* SYSENTER_CS */
	if (!strcmp(what, "api_version"))
		repeat(system, KVM_GET_API_VERSION, 0, count, -1, &c);
	else if (!strcmp(what, "check_extension"))
		repeat(system, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS, count, -1, &c);
	else if (!strcmp(what, "get_regs"))
		repeat(vcpu, KVM_GET_REGS, (unsigned long)&u.regs, count, -1, &c);
	else if (!strcmp(what, "get_sregs"))
		repeat(vcpu, KVM_GET_SREGS, (unsigned long)&u.sregs, count, -1, &c);
	else
		repeat(vcpu, KVM_SET_MSRS, (unsigned long)&u.msrs, count, -1, &c);
}

static void exits(const char *node, const char *what, int count)
{
	struct client c = { 0 };

	create_machine(&c, node);
	if (!strcmp(what, "mmio")) {
		set_long_mode(&c);
		load_guest(&c, mmio_guest);
		repeat(c.vcpu, KVM_RUN, 0, count, KVM_EXIT_MMIO, &c);
		return;
	}
	set_real_mode(&c);
	if (!strcmp(what, "pio")) {
		load_guest(&c, pio_guest);
		repeat(c.vcpu, KVM_RUN, 0, count, KVM_EXIT_IO, &c);
	} else {
		load_guest(&c, hlt_guest);
		repeat(c.vcpu, KVM_RUN, 0, count, KVM_EXIT_HLT, &c);
	}
}

static int event_at(struct client *c, unsigned int port)
{
	struct kvm_ioeventfd bind = { .addr = port, .len = 1, .fd = eventfd(0, EFD_CLOEXEC), .flags = KVM_IOEVENTFD_FLAG_PIO };

	kvm_call(c->vm, KVM_IOEVENTFD, &bind);
	return bind.fd;
}

/* What an OUT to an ioeventfd costs the guest: 1,000 of them between two halts. */
static void ioeventfd(const char *node, int count)
{
	struct client c = { 0 };
	double *took = calloc(count, sizeof(*took)), start;

	create_machine(&c, node);
	event_at(&c, EVENT_PORT);
	set_real_mode(&c);
	load_guest(&c, event_guest);
	for (int i = 0; i < count; i++) {
		set_real_mode(&c);
		start = now();
		expect_exit(&c, KVM_EXIT_HLT);
		took[i] = (now() - start) / 1000;
	}
	report(took, count);
}

static void *play(void *arg)
{
	struct client *c = arg;

	for (;;)
		if (ioctl(c->vcpu, KVM_RUN, 0) < 0 && errno != EINTR)
			return NULL;
}

/* An irqfd is signalled, the guest's handler runs and writes to an ioeventfd, which wakes us: there and back. */
static void irqfd(const char *node, int count)
{
	struct client c = { 0 };
	struct kvm_irqfd bind = { .fd = eventfd(0, EFD_CLOEXEC), .gsi = IRQ };
	double *took = calloc(count, sizeof(*took)), start;
	uint64_t value = 1;
	pthread_t thread;
	int back, ready;

	open_node(&c, node);
	create_vm(&c);
	c.mem = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	c.mem_size = RAM_SIZE;
	set_memory(&c, 0, 0, c.mem, RAM_SIZE, 0);
	kvm_call(c.vm, KVM_CREATE_IRQCHIP, 0);
	create_vcpu(&c);
	back = event_at(&c, EVENT_PORT);
	ready = event_at(&c, EVENT_PORT + 1);
	kvm_call(c.vm, KVM_IRQFD, &bind);
	set_real_mode(&c);
	load_guest(&c, irq_guest);
	pthread_create(&thread, NULL, play, &c);
	if (read(ready, &value, 8) != 8)
		fail("the guest does not start");
	for (int i = -WARM_UP; i < count; i++) {
		value = 1;
		start = now();
		if (write(bind.fd, &value, 8) != 8 || read(back, &value, 8) != 8)
			fail("eventfd: %s", strerror(errno));
		if (i >= 0)
			took[i] = now() - start;
	}
	report(took, count);
	exit(0);
}

static void create(const char *node, int count)
{
	double *took = calloc(count, sizeof(*took)), start;
	struct client c = { 0 };

	open_node(&c, node);
	for (int i = -2; i < count; i++) {
		start = now();
		c.vm = kvm_call(c.kvm, KVM_CREATE_VM, 0);
		c.vcpu = kvm_call(c.vm, KVM_CREATE_VCPU, 0);
		close(c.vcpu);
		close(c.vm);
		if (i >= 0)
			took[i] = now() - start;
	}
	report(took, count);
}

static void memory(const char *node, int count, size_t size, int touched)
{
	double *took = calloc(count, sizeof(*took)), start;
	struct client c = { 0 };
	char *area;

	open_node(&c, node);
	for (int i = 0; i < count; i++) {
		create_vm(&c);
		area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (area == MAP_FAILED)
			fail("mmap: %s", strerror(errno));
		if (touched)
			memset(area, 1, size);
		start = now();
		set_memory(&c, 0, 0x100000000ull, area, size, 0);
		took[i] = now() - start;
		close(c.vm);
		munmap(area, size);
	}
	report(took, count);
}

/* VMs that count, each in a process of its own, all for the same second. */
static void busy(const char *node, int vms)
{
	uint64_t *counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), sum = 0;
	volatile uint64_t *go = counts + 500, *ready = counts + 501;

	for (int i = 0; i < vms; i++) {
		struct client c = { 0 };
		pthread_t thread;
		uint64_t before;

		if (fork())
			continue;
		create_machine(&c, node);
		set_long_mode(&c);
		load_guest(&c, busy_guest);
		pthread_create(&thread, NULL, play, &c);
		__sync_fetch_and_add(ready, 1);
		while (!*go)
			usleep(1000);
		before = read_note(&c, 0);
		usleep(2000000);
		counts[i] = (read_note(&c, 0) - before) / 2;
		_exit(0);
	}
	while (*ready < (uint64_t)vms)
		usleep(1000);
	usleep(300000);
	*go = 1;
	while (wait(NULL) > 0)
		;
	for (int i = 0; i < vms; i++)
		sum += counts[i];
	printf("{\"median\": %.3f, \"low\": %.3f, \"high\": %.3f}\n", sum / 1e6, sum / 1e6, sum / 1e6);
}

/* VMs that exist and do nothing, until standard input ends. */
static void idle(const char *node, int vms)
{
	char byte;

	for (int i = 0; i < vms; i++) {
		struct client c = { 0 };

		create_machine(&c, node);
	}
	printf("ready\n");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
}

int main(int argc, char **argv)
{
	int server = argc > 1 && !strcmp(argv[1], "-c");
	const char *node, *what;
	int count;

	argc -= server;
	argv += server;
	if (argc < 4)
		fail("usage: bench-client [-c] NODE WHAT COUNT [SIZE TOUCHED]");
	node = argv[1];
	what = argv[2];
	count = atoi(argv[3]);
	if (count <= 0)
		fail("COUNT is a number from 1 on");
	if (!strcmp(what, "pio") || !strcmp(what, "mmio") || !strcmp(what, "hlt"))
		exits(node, what, count);
	else if (!strcmp(what, "ioeventfd"))
		ioeventfd(node, count);
	else if (!strcmp(what, "irqfd"))
		irqfd(node, count);
	else if (!strcmp(what, "create"))
		create(node, count);
	else if (!strcmp(what, "memory") && argc == 6)
		memory(node, count, strtoull(argv[4], NULL, 0), atoi(argv[5]));
	else if (!strcmp(what, "busy"))
		busy(node, count);
	else if (!strcmp(what, "idle"))
		idle(node, count);
	else
		state(node, what, count, server);
	return 0;
}
