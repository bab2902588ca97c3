// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The client whose ioctls are measured. It proves first which node it talks to, then does one job and prints
 * "NAME VALUE" lines: microseconds for what takes a call or an exit, milliseconds for `create` and `memory`, millions
 * of loops per second for `busy`. A latency is the median of calls that were timed one by one.
 */
#define _GNU_SOURCE
#include "../clients/kvmclient.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

enum {
	MISC_MAJOR = 10, KVM_MINOR = 232,	/* include/linux/miscdevice.h */
	DONE_PORT = 0x80, GO_PORT = 0x81,
	BUSY_LOOPS = 5000000,
	MIB = 1 << 20,
	CALM_US = 300,				/* for a vCPU to be back in its HLT */
	UNPROVEN = 3, ABSENT = 4,		/* exit codes */
};

GUEST(guest_pio, 16, "1: outb %al, $0x80\n jmp 1b");
GUEST(guest_mmio, 16, "movw $0xa000, %ax\n movw %ax, %ds\n 1: movb %al, 0\n jmp 1b");
GUEST(guest_hlt, 16, "1: hlt\n jmp 1b");
GUEST(guest_ioeventfd, 16, "1: inb $0x81, %al\n outb %al, $0x80\n jmp 1b");
GUEST(guest_busy, 16, "1: movl $5000000, %ecx\n 2: decl %ecx\n jnz 2b\n outb %al, $0x80\n jmp 1b");

/*
 * The master 8259A gets vectors from 0x20 on and IRQ 0 alone; the handler says so by OUT before its EOI. `idle` is what
 * the guest does between interrupts.
 */
#define INTERRUPT_GUEST(name, idle)								\
	GUEST(name, 16,										\
	      "xorw %ax, %ax\n movw %ax, %ds\n"							\
	      "movw $9f - " #name " + 0x8000, 4 * 0x20\n movw %ax, 4 * 0x20 + 2\n"		\
	      "movb $0x11, %al\n outb %al, $0x20\n movb $0x20, %al\n outb %al, $0x21\n"		\
	      "movb $0x04, %al\n outb %al, $0x21\n movb $0x01, %al\n outb %al, $0x21\n"		\
	      "movb $0xfe, %al\n outb %al, $0x21\n sti\n"					\
	      "1: " idle "\n jmp 1b\n"								\
	      "9: outb %al, $0x80\n movb $0x20, %al\n outb %al, $0x20\n iretw")
INTERRUPT_GUEST(guest_halted, "hlt");
INTERRUPT_GUEST(guest_running, "nop");

/* ---- time and figures --------------------------------------------------------------------------------------- */

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double *samples(unsigned int count)
{
	double *d = calloc(count, sizeof(*d));

	if (!d)
		fail("out of memory");
	return d;
}

static void print_median(const char *name, double *d, unsigned int count)
{
	qsort(d, count, sizeof(*d), by_value);
	printf("%s %.4f\n", name, (d[count / 2] + d[(count - 1) / 2]) / 2);
	free(d);
}

#define MEASURE(name, count, expression)				\
	do {								\
		double *d_ = samples(count);				\
		for (unsigned int i_ = 0; i_ < (count); i_++) {		\
			double begin_ = now_us();			\
			expression;					\
			d_[i_] = now_us() - begin_;			\
		}							\
		print_median((name), d_, (count));			\
	} while (0)

/* ---- whose node is it --------------------------------------------------------------------------------------- */

static int is_mounted_as(dev_t device, const char *type)
{
	char line[4096], numbers[32], wanted[64];
	FILE *file = fopen("/proc/self/mountinfo", "re");
	int found = 0;

	snprintf(numbers, sizeof(numbers), " %u:%u ", major(device), minor(device));
	snprintf(wanted, sizeof(wanted), " - %s ", type);
	while (file && !found && fgets(line, sizeof(line), file))
		found = strstr(line, numbers) && strstr(line, wanted);
	if (file)
		fclose(file);
	return found;
}

/* `kind` is "real", the kernel's own device, or the type of the file system that the node must be on. */
static void prove(int fd, const char *node, const char *kind)
{
	struct stat st;
	int proven;

	if (fstat(fd, &st))
		fail("%s: %s", node, strerror(errno));
	if (!strcmp(kind, "real"))
		proven = S_ISCHR(st.st_mode) && st.st_rdev == makedev(MISC_MAJOR, KVM_MINOR);
	else
		proven = S_ISREG(st.st_mode) && is_mounted_as(st.st_dev, kind);
	if (!proven) {
		printf("%s is not a node of %s\n", node, kind);
		exit(UNPROVEN);
	}
}

static void absent(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	exit(ABSENT);
}

/* ---- calls -------------------------------------------------------------------------------------------------- */

static void measure_system(int kvm, unsigned int count)
{
	MEASURE("api_version", count, kvm_call(kvm, KVM_GET_API_VERSION, 0));
	MEASURE("check_extension", count, kvm_call(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY));
}

static void measure_vcpu(int vcpu, unsigned int count)
{
	/* SYSENTER_*, PAT, STAR … SYSCALL_MASK, KERNEL_GS_BASE, and one of the MTRRs */
	static const struct { uint32_t index; uint64_t value; } msrs[] = {
		{ 0x174, 0 }, { 0x175, 0 }, { 0x176, 0 }, { 0x277, 0x0007040600070406 }, { 0xc0000081, 0 },
		{ 0xc0000082, 0 }, { 0xc0000083, 0 }, { 0xc0000084, 0 }, { 0xc0000102, 0 }, { 0x250, 0 },
	};
	enum { COUNT = sizeof(msrs) / sizeof(msrs[0]) };
	struct kvm_msrs *list = calloc(1, sizeof(*list) + COUNT * sizeof(struct kvm_msr_entry));
	struct kvm_regs regs;
	struct kvm_sregs sregs;

	if (!list)
		fail("out of memory");
	list->nmsrs = COUNT;
	for (int i = 0; i < COUNT; i++) {
		list->entries[i].index = msrs[i].index;
		list->entries[i].data = msrs[i].value;
	}
	expect_u64("KVM_SET_MSRS", (uint64_t)kvm_call(vcpu, KVM_SET_MSRS, list), COUNT);
	MEASURE("get_regs", count, kvm_call(vcpu, KVM_GET_REGS, &regs));
	MEASURE("get_sregs", count, kvm_call(vcpu, KVM_GET_SREGS, &sregs));
	MEASURE("set_msrs", count, kvm_call(vcpu, KVM_SET_MSRS, list));
	free(list);
}

/* ---- exits -------------------------------------------------------------------------------------------------- */

struct exits {
	const char *node;
	uint32_t reason;
	const uint8_t *code;
	size_t size;
	unsigned int count;
	double *times;
	pthread_barrier_t *barrier;
};

static void *run_exits(void *argument)
{
	struct exits *e = argument;
	struct client c;

	create_machine(&c, e->node);
	load_code(&c, e->code, e->size);
	set_real_mode(&c);
	for (unsigned int i = 0; i < 20; i++)
		expect_exit(&c, e->reason);
	pthread_barrier_wait(e->barrier);
	for (unsigned int i = 0; i < e->count; i++) {
		double begin = now_us();

		kvm_call(c.vcpu, KVM_RUN, 0);
		e->times[i] = now_us() - begin;
		if (c.run->exit_reason != e->reason)
			fail("exit %u instead of %u", c.run->exit_reason, e->reason);
	}
	pthread_barrier_wait(e->barrier);
	return NULL;
}

/* One VM: the median of its exits. More: the time that passed, divided by all their exits. */
static void measure_exits(const char *node, const char *kind, unsigned int count, unsigned int vms)
{
	static const struct { const char *name; uint32_t reason; const uint8_t *code, *end; } kinds[] = {
		{ "pio", KVM_EXIT_IO, guest_pio, guest_pio_end },
		{ "mmio", KVM_EXIT_MMIO, guest_mmio, guest_mmio_end },
		{ "hlt", KVM_EXIT_HLT, guest_hlt, guest_hlt_end },
	};
	pthread_barrier_t barrier;
	struct exits all[vms];
	pthread_t threads[vms];
	double begin;

	pthread_barrier_init(&barrier, NULL, vms + 1);
	for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++)
		if (!strcmp(kind, kinds[k].name))
			all[0] = (struct exits){ node, kinds[k].reason, kinds[k].code,
				(size_t)(kinds[k].end - kinds[k].code), count, NULL, &barrier };
	for (unsigned int v = 0; v < vms; v++) {
		all[v] = all[0];
		all[v].times = samples(count);
		if (pthread_create(&threads[v], NULL, run_exits, &all[v]))
			fail("no thread");
	}
	pthread_barrier_wait(&barrier);
	begin = now_us();
	pthread_barrier_wait(&barrier);
	if (vms == 1)
		print_median(kind, all[0].times, count);
	else
		printf("%s %.4f\n", kind, (now_us() - begin) / count / vms);
}

/* ---- events ------------------------------------------------------------------------------------------------- */

static struct client machine;
static double stamp;		/* when the other thread saw it */
static sem_t seen;

static void *run_and_stamp(void *unused)
{
	(void)unused;
	for (;;) {
		kvm_call(machine.vcpu, KVM_RUN, 0);
		stamp = now_us();
		if (machine.run->exit_reason != KVM_EXIT_IO || machine.run->io.port != DONE_PORT)
			fail("exit %u", machine.run->exit_reason);
		sem_post(&seen);
	}
	return NULL;
}

static void wait_seen(const char *what)
{
	struct timespec deadline;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += 10;
	while (sem_timedwait(&seen, &deadline))
		if (errno != EINTR)
			fail("%s: nothing came within 10 s", what);
}

/* From KVM_IRQ_LINE or the irqfd's write to the return of KVM_RUN from the handler's first instruction. */
static void measure_interrupt(const char *node, const char *kind, unsigned int count)
{
	int by_fd = !!strncmp(kind, "wake", 4), line = eventfd(0, EFD_CLOEXEC);
	struct kvm_irqfd irqfd = { .fd = (uint32_t)line, .gsi = 0 };
	double *d = samples(count);
	uint64_t one = 1;
	pthread_t thread;

	open_node(&machine, node);
	create_vm(&machine);
	if (ioctl(machine.vm, KVM_CREATE_IRQCHIP, 0))
		absent("KVM_CREATE_IRQCHIP");
	machine.mem_size = RAM_SIZE;
	machine.mem = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	set_memory(&machine, 0, 0, machine.mem, RAM_SIZE, 0);
	create_vcpu(&machine);
	if (by_fd && ioctl(machine.vm, KVM_IRQFD, &irqfd))
		absent("KVM_IRQFD");
	if (!strcmp(kind, "irqfd_running"))
		load_guest(&machine, guest_running);
	else
		load_guest(&machine, guest_halted);
	set_real_mode(&machine);
	if (pthread_create(&thread, NULL, run_and_stamp, NULL))
		fail("no thread");
	for (unsigned int i = 0; i < count + 5; i++) {
		struct kvm_irq_level level = { .irq = 0, .level = 1 };
		double begin;

		usleep(i ? CALM_US : 100 * CALM_US);
		begin = now_us();
		if (by_fd) {
			if (write(line, &one, sizeof(one)) != sizeof(one))
				fail("write to the irqfd: %s", strerror(errno));
		} else {
			kvm_call(machine.vm, KVM_IRQ_LINE, &level);
		}
		wait_seen(kind);
		if (i >= 5)
			d[i - 5] = stamp - begin;
		level.level = 0;
		if (!by_fd)
			kvm_call(machine.vm, KVM_IRQ_LINE, &level);
	}
	print_median(kind, d, count);
	fflush(stdout);
	_exit(0);
}

static void *read_and_stamp(void *fd)
{
	uint64_t value;

	while (read(*(int *)fd, &value, sizeof(value)) == sizeof(value)) {
		stamp = now_us();
		sem_post(&seen);
	}
	return NULL;
}

/* From the KVM_RUN whose guest does the OUT at once to the return of another thread's read. */
static void measure_ioeventfd(const char *node, unsigned int count)
{
	int event = eventfd(0, EFD_CLOEXEC);
	struct kvm_ioeventfd ioeventfd = {
		.addr = DONE_PORT, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO,
	};
	double *d = samples(count);
	pthread_t thread;

	create_machine(&machine, node);
	if (ioctl(machine.vm, KVM_IOEVENTFD, &ioeventfd))
		absent("KVM_IOEVENTFD");
	load_guest(&machine, guest_ioeventfd);
	set_real_mode(&machine);
	if (pthread_create(&thread, NULL, read_and_stamp, &event))
		fail("no thread");
	answer_in(&machine, GO_PORT, 1, 0);
	for (unsigned int i = 0; i < count; i++) {
		double begin = now_us();

		answer_in(&machine, GO_PORT, 1, 0);
		wait_seen("ioeventfd");
		d[i] = stamp - begin;
	}
	print_median("ioeventfd", d, count);
	fflush(stdout);
	_exit(0);
}

/* ---- VMs and their memory ----------------------------------------------------------------------------------- */

static void measure_create(int kvm, unsigned int count)
{
	double *d = samples(count);

	for (unsigned int i = 0; i < count; i++) {
		double begin = now_us();
		int vm = kvm_call(kvm, KVM_CREATE_VM, 0), vcpu = kvm_call(vm, KVM_CREATE_VCPU, 0);

		close(vcpu);
		close(vm);
		d[i] = (now_us() - begin) / 1e3;
	}
	print_median("create", d, count);
}

static void measure_memory(int kvm, unsigned int mib, int full, unsigned int count)
{
	size_t size = (size_t)mib * MIB;
	double *d = samples(count);

	for (unsigned int i = 0; i < count; i++) {
		struct client c = { .kvm = kvm };
		double begin;

		create_vm(&c);
		c.mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (c.mem == MAP_FAILED)
			fail("mmap of %u MiB: %s", mib, strerror(errno));
		if (full)
			memset(c.mem, 0x5a, size);
		begin = now_us();
		set_memory(&c, 0, 0, c.mem, size, 0);
		d[i] = (now_us() - begin) / 1e3;
		close(c.vm);
		munmap(c.mem, size);
	}
	print_median("memory", d, count);
}

/* VMs that have run and do nothing; they go when standard input ends. */
static void keep_idle(const char *node, unsigned int vms)
{
	struct client c;

	for (unsigned int v = 0; v < vms; v++) {
		create_machine(&c, node);
		load_guest(&c, guest_pio);
		set_real_mode(&c);
		expect_exit(&c, KVM_EXIT_IO);
	}
	printf("ready %u\n", vms);
	fflush(stdout);
	while (getchar() != EOF)
		;
}

struct busy {
	const char *node;
	double seconds, loops;
	pthread_barrier_t *barrier;
};

static void *run_busy(void *argument)
{
	struct busy *b = argument;
	struct client c;
	double begin, now;

	create_machine(&c, b->node);
	load_guest(&c, guest_busy);
	set_real_mode(&c);
	expect_exit(&c, KVM_EXIT_IO);
	pthread_barrier_wait(b->barrier);
	begin = now_us();
	do {
		expect_exit(&c, KVM_EXIT_IO);
		b->loops += BUSY_LOOPS;
		now = now_us();
	} while (now - begin < b->seconds * 1e6);
	b->loops /= now - begin;
	return NULL;
}

static void measure_busy(const char *node, unsigned int vms, double seconds)
{
	pthread_barrier_t barrier;
	struct busy all[vms];
	pthread_t threads[vms];
	double total = 0;

	pthread_barrier_init(&barrier, NULL, vms);
	for (unsigned int v = 0; v < vms; v++) {
		all[v] = (struct busy){ node, seconds, 0, &barrier };
		if (pthread_create(&threads[v], NULL, run_busy, &all[v]))
			fail("no thread");
	}
	for (unsigned int v = 0; v < vms; v++) {
		pthread_join(threads[v], NULL);
		total += all[v].loops;
	}
	printf("busy %.4f\n", total);
}

/* ---- command line ------------------------------------------------------------------------------------------- */

static const char usage[] =
	"usage: bench-client NODE real|fuse.kvmfs|fuse.kvmbench JOB\n"
	"  system COUNT           KVM_GET_API_VERSION, KVM_CHECK_EXTENSION\n"
	"  vcpu COUNT             KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_MSRS of ten\n"
	"  pio|mmio|hlt COUNT VMS exits\n"
	"  wake COUNT             KVM_IRQ_LINE to the handler of a halted guest\n"
	"  irqfd COUNT            the same by an irqfd\n"
	"  irqfd_running COUNT    the same, the guest computes\n"
	"  ioeventfd COUNT        a guest's OUT to another thread's read\n"
	"  create COUNT           KVM_CREATE_VM, KVM_CREATE_VCPU, close of both\n"
	"  memory MIB full|untouched COUNT\n"
	"  idle VMS               until the end of standard input\n"
	"  busy VMS SECONDS       throughput of all together\n";

int main(int argc, char **argv)
{
	const char *node, *kind, *job, *last;
	unsigned int number;
	struct client c;

	if (argc < 5) {
		fputs(usage, stderr);
		return 2;
	}
	node = argv[1];
	kind = argv[2];
	job = argv[3];
	number = (unsigned int)atoi(argv[4]);
	last = argc > 5 ? argv[5] : "1";
	open_node(&c, node);
	prove(c.kvm, node, kind);
	if (!strcmp(job, "system")) {
		measure_system(c.kvm, number);
	} else if (!strcmp(job, "vcpu")) {
		c.vcpu = c.kvm;		/* the C server has everything on one file */
		if (strcmp(kind, "fuse.kvmbench")) {
			create_vm(&c);
			create_vcpu(&c);
		}
		measure_vcpu(c.vcpu, number);
	} else if (!strcmp(job, "pio") || !strcmp(job, "mmio") || !strcmp(job, "hlt")) {
		measure_exits(node, job, number, (unsigned int)atoi(last));
	} else if (!strcmp(job, "wake") || !strncmp(job, "irqfd", 5)) {
		measure_interrupt(node, job, number);
	} else if (!strcmp(job, "ioeventfd")) {
		measure_ioeventfd(node, number);
	} else if (!strcmp(job, "create")) {
		measure_create(c.kvm, number);
	} else if (!strcmp(job, "memory")) {
		measure_memory(c.kvm, number, !strcmp(last, "full"), argc > 6 ? (unsigned int)atoi(argv[6]) : 1);
	} else if (!strcmp(job, "idle")) {
		keep_idle(node, number);
	} else if (!strcmp(job, "busy")) {
		measure_busy(node, number, atof(last));
	} else {
		fputs(usage, stderr);
		return 2;
	}
	return 0;
}
