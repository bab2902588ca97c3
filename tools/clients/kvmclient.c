// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "kvmclient.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

/* Control register and page table bits (SDM volume 3, 2.5 and 4.3). */
#define CR0_PE		(1u << 0)
#define CR0_ET		(1u << 4)
#define CR0_NE		(1u << 5)
#define CR0_WP		(1u << 16)
#define CR0_PG		(1u << 31)
#define CR4_PAE		(1u << 5)
#define CR4_OSFXSR	(1u << 9)
#define EFER_LME	(1u << 8)
#define EFER_LMA	(1u << 10)
#define PTE_PRESENT	1u
#define PTE_WRITE	2u

static const char *context;

void set_context(const char *text)
{
	context = text;
}

void fail(const char *format, ...)
{
	va_list args;

	fflush(stdout);
	if (context)
		printf("%s: ", context);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	exit(1);
}

int try_ioctl(int fd, unsigned long request, unsigned long arg)
{
	int result = ioctl(fd, request, arg);

	return result < 0 ? -errno : result;
}

int named_ioctl(int fd, const char *name, unsigned long request, unsigned long arg)
{
	int result = try_ioctl(fd, request, arg);

	if (result < 0)
		fail("%s: %s", name, strerror(-result));
	return result;
}

/* Setting up. */

void open_node(struct client *c, const char *node)
{
	int version;

	*c = (struct client){ .node = node, .vm = -1, .vcpu = -1 };
	c->kvm = open(node, O_RDWR | O_CLOEXEC);
	if (c->kvm < 0)
		fail("open %s: %s", node, strerror(errno));
	version = kvm_call(c->kvm, KVM_GET_API_VERSION, 0);
	if (version != KVM_API_VERSION)
		fail("KVM_GET_API_VERSION: %d, not %d", version, KVM_API_VERSION);
}

void create_vm(struct client *c)
{
	c->vm = kvm_call(c->kvm, KVM_CREATE_VM, 0);
	/* Intel needs three pages for real mode; anywhere that is no slot will do. Others ignore it. */
	if (kvm_call(c->kvm, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0)
		kvm_call(c->vm, KVM_SET_TSS_ADDR, 0xfffbd000);
}

void set_memory(struct client *c, uint32_t slot, uint64_t gpa, void *hva, size_t size, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)hva,
	};

	kvm_call(c->vm, KVM_SET_USER_MEMORY_REGION, &region);
}

void create_vcpu(struct client *c)
{
	c->vcpu = kvm_call(c->vm, KVM_CREATE_VCPU, 0);
	c->run_size = (size_t)kvm_call(c->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	c->run = mmap(NULL, c->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, c->vcpu, 0);
	if (c->run == MAP_FAILED)
		fail("mmap of kvm_run: %s", strerror(errno));
}

/* The guest sees what KVM supports. */
static void set_cpuid(struct client *c)
{
	enum { ROOM = 256 };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + ROOM * sizeof(struct kvm_cpuid_entry2));

	if (!cpuid)
		fail("out of memory");
	cpuid->nent = ROOM;
	kvm_call(c->kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
	kvm_call(c->vcpu, KVM_SET_CPUID2, cpuid);
	free(cpuid);
}

void create_machine(struct client *c, const char *node)
{
	open_node(c, node);
	create_vm(c);
	c->mem_size = RAM_SIZE;
	c->mem = mmap(NULL, c->mem_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (c->mem == MAP_FAILED)
		fail("mmap of guest memory: %s", strerror(errno));
	set_memory(c, 0, 0, c->mem, c->mem_size, 0);
	create_vcpu(c);
	set_cpuid(c);
}

void destroy_machine(struct client *c)
{
	munmap(c->run, c->run_size);
	close(c->vcpu);
	close(c->vm);
	close(c->kvm);
	munmap(c->mem, c->mem_size);
}

void load_code(struct client *c, const uint8_t *code, size_t size)
{
	if (size > TABLES_AT - CODE_AT)
		fail("guest code of %zu bytes is too long", size);
	memcpy(c->mem + CODE_AT, code, size);
}

/* Modes. */

static struct kvm_segment segment(uint16_t selector, uint8_t type, int db, int l)
{
	return (struct kvm_segment){
		.selector = selector, .limit = 0xffffffff, .type = type,
		.present = 1, .s = 1, .db = (uint8_t)db, .l = (uint8_t)l, .g = 1,
	};
}

static void start(struct client *c)
{
	struct kvm_regs regs = { .rip = CODE_AT, .rsp = STACK_TOP, .rflags = 2 };

	set_regs(c, &regs);
}

void set_real_mode(struct client *c)
{
	struct kvm_sregs sregs;

	kvm_call(c->vcpu, KVM_GET_SREGS, &sregs);
	/* After reset only CS is not at 0: it points at the top of the 32-bit address space. */
	sregs.cs.selector = 0;
	sregs.cs.base = 0;
	kvm_call(c->vcpu, KVM_SET_SREGS, &sregs);
	start(c);
}

void write_gdt(struct client *c)
{
	const uint64_t gdt[] = {
		0,
		0x00cf9b000000ffff,	/* CODE32_SEL: 32-bit code, flat */
		0x00cf93000000ffff,	/* DATA_SEL: data, flat */
		0x00af9b000000ffff,	/* CODE64_SEL: 64-bit code */
		0x00009b000000ffff,	/* CODE16_SEL: 16-bit code, 64 KiB */
		0x00008b0000000067,	/* TSS_SEL: busy TSS at 0 */
		0,			/* its upper half in long mode */
	};

	memcpy(c->mem + GDT_AT, gdt, sizeof(gdt));
}

static uint32_t page_flags(uint32_t gpa)
{
	if (gpa == ABSENT_PAGE)
		return 0;
	return gpa == READONLY_PAGE ? PTE_PRESENT : PTE_PRESENT | PTE_WRITE;
}

/* Two levels, 4-byte entries: directory, table of the first 4 MiB (SDM volume 3, 4.3). */
void write_tables32(struct client *c)
{
	uint32_t *directory = (uint32_t *)(c->mem + TABLES_AT);
	uint32_t *table = (uint32_t *)(c->mem + TABLES_AT + PAGE);

	directory[0] = (TABLES_AT + PAGE) | PTE_PRESENT | PTE_WRITE;
	for (uint32_t gpa = 0; gpa < MAPPED_END; gpa += PAGE)
		table[gpa / PAGE] = gpa | page_flags(gpa);
}

/* Four levels, 8-byte entries: PML4, PDPT, directory, table of the first 2 MiB (SDM volume 3, 4.5). */
void write_tables64(struct client *c)
{
	uint64_t *table = (uint64_t *)(c->mem + TABLES_AT);

	for (uint32_t level = 0; level < 3; level++, table += PAGE / sizeof(*table))
		table[0] = (TABLES_AT + (level + 1) * PAGE) | PTE_PRESENT | PTE_WRITE;
	for (uint32_t gpa = 0; gpa < MAPPED_END; gpa += PAGE)
		table[gpa / PAGE] = gpa | page_flags(gpa);
}

/* What the two paged modes have in common. */
static void set_flat_mode(struct client *c, struct kvm_segment code)
{
	struct kvm_segment data = segment(DATA_SEL, 3, 1, 0);
	struct kvm_sregs sregs;

	write_gdt(c);
	kvm_call(c->vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = (struct kvm_segment){ .selector = TSS_SEL, .limit = 0x67, .type = 11, .present = 1 };
	sregs.gdt.base = GDT_AT;
	sregs.gdt.limit = 7 * 8 - 1;
	sregs.idt.base = IDT_AT;
	sregs.idt.limit = 256 * (code.l ? 16 : 8) - 1;
	sregs.cr3 = TABLES_AT;
	sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
	sregs.cr4 = CR4_OSFXSR | (code.l ? CR4_PAE : 0);
	sregs.efer = code.l ? EFER_LME | EFER_LMA : 0;
	kvm_call(c->vcpu, KVM_SET_SREGS, &sregs);
	start(c);
}

void set_protected_mode(struct client *c)
{
	write_tables32(c);
	set_flat_mode(c, segment(CODE32_SEL, 11, 1, 0));
}

void set_long_mode(struct client *c)
{
	write_tables64(c);
	set_flat_mode(c, segment(CODE64_SEL, 11, 0, 1));
}

void set_gate(struct client *c, int bits, unsigned int vector, uint32_t offset)
{
	uint32_t selector = bits == 64 ? CODE64_SEL : CODE32_SEL;
	uint32_t *gate = (uint32_t *)(c->mem + IDT_AT + vector * (bits == 64 ? 16 : 8));

	gate[0] = selector << 16 | (offset & 0xffff);
	gate[1] = (offset & 0xffff0000) | 0x8e00;	/* present, DPL 0, interrupt gate */
	if (bits == 64)
		gate[2] = gate[3] = 0;
}

/* Registers and results. */

void get_regs(struct client *c, struct kvm_regs *regs)
{
	kvm_call(c->vcpu, KVM_GET_REGS, regs);
}

void set_regs(struct client *c, const struct kvm_regs *regs)
{
	kvm_call(c->vcpu, KVM_SET_REGS, regs);
}

void show_regs(struct client *c)
{
	struct kvm_regs r;

	get_regs(c, &r);
	printf("  rip %016" PRIx64 "  rflags %08" PRIx64 "\n", (uint64_t)r.rip, (uint64_t)r.rflags);
	printf("  rax %016" PRIx64 "  rbx %016" PRIx64 "  rcx %016" PRIx64 "  rdx %016" PRIx64 "\n",
	       (uint64_t)r.rax, (uint64_t)r.rbx, (uint64_t)r.rcx, (uint64_t)r.rdx);
	printf("  rsi %016" PRIx64 "  rdi %016" PRIx64 "  rbp %016" PRIx64 "  rsp %016" PRIx64 "\n",
	       (uint64_t)r.rsi, (uint64_t)r.rdi, (uint64_t)r.rbp, (uint64_t)r.rsp);
}

uint64_t read_note(struct client *c, unsigned int index)
{
	uint64_t value;

	memcpy(&value, c->mem + NOTES_AT + 8 * index, sizeof(value));
	return value;
}

/* Running and exits. */

const char *exit_name(uint32_t reason)
{
	static const char *const names[] = {
		[KVM_EXIT_UNKNOWN] = "UNKNOWN", [KVM_EXIT_EXCEPTION] = "EXCEPTION", [KVM_EXIT_IO] = "IO",
		[KVM_EXIT_HYPERCALL] = "HYPERCALL", [KVM_EXIT_DEBUG] = "DEBUG", [KVM_EXIT_HLT] = "HLT",
		[KVM_EXIT_MMIO] = "MMIO", [KVM_EXIT_IRQ_WINDOW_OPEN] = "IRQ_WINDOW_OPEN",
		[KVM_EXIT_SHUTDOWN] = "SHUTDOWN", [KVM_EXIT_FAIL_ENTRY] = "FAIL_ENTRY",
		[KVM_EXIT_INTR] = "INTR", [KVM_EXIT_SET_TPR] = "SET_TPR",
		[KVM_EXIT_TPR_ACCESS] = "TPR_ACCESS", [KVM_EXIT_NMI] = "NMI",
		[KVM_EXIT_INTERNAL_ERROR] = "INTERNAL_ERROR", [KVM_EXIT_SYSTEM_EVENT] = "SYSTEM_EVENT",
	};

	if (reason < sizeof(names) / sizeof(names[0]) && names[reason])
		return names[reason];
	return "another";
}

uint32_t run(struct client *c)
{
	kvm_call(c->vcpu, KVM_RUN, 0);
	return c->run->exit_reason;
}

/* The vCPU stopped with another exit than was wanted: say which, with what belongs to it. */
static void unexpected_exit(struct client *c, const char *wanted)
{
	struct kvm_run *r = c->run;
	struct kvm_regs regs;
	char detail[160] = "";

	get_regs(c, &regs);
	switch (r->exit_reason) {
	case KVM_EXIT_IO:
		snprintf(detail, sizeof(detail), " (%s port %#x size %u count %u)",
			 r->io.direction == KVM_EXIT_IO_IN ? "in" : "out", r->io.port, r->io.size,
			 r->io.count);
		break;
	case KVM_EXIT_MMIO:
		snprintf(detail, sizeof(detail), " (%s gpa %#llx size %u)", r->mmio.is_write ? "write" : "read",
			 r->mmio.phys_addr, r->mmio.len);
		break;
	case KVM_EXIT_FAIL_ENTRY:
		snprintf(detail, sizeof(detail), " (reason %#llx)",
			 r->fail_entry.hardware_entry_failure_reason);
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		snprintf(detail, sizeof(detail), " (suberror %u, ndata %u, data[0..2] %#llx %#llx %#llx)", r->internal.suberror,
			 r->internal.ndata, r->internal.data[0], r->internal.data[1],
			 r->internal.data[2]);
		break;
	}
	fail("exit %u %s%s at rip %#llx, wanted %s", r->exit_reason, exit_name(r->exit_reason), detail, regs.rip,
	     wanted);
}

void expect_exit(struct client *c, uint32_t reason)
{
	if (run(c) != reason)
		unexpected_exit(c, exit_name(reason));
}

void expect_u64(const char *what, uint64_t got, uint64_t wanted)
{
	if (got != wanted)
		fail("%s is %#" PRIx64 ", wanted %#" PRIx64, what, got, wanted);
}

void *expect_io(struct client *c, int direction, unsigned int port, unsigned int size, unsigned int count)
{
	struct kvm_run *r = c->run;
	char wanted[80];

	snprintf(wanted, sizeof(wanted), "IO (%s port %#x size %u count %u)",
		 direction == KVM_EXIT_IO_IN ? "in" : "out", port, size, count);
	if (run(c) != KVM_EXIT_IO || r->io.direction != direction || r->io.port != port || r->io.size != size ||
	    r->io.count != count)
		unexpected_exit(c, wanted);
	if (r->io.data_offset + (uint64_t)size * count > c->run_size)
		fail("io.data_offset %#llx is outside the mapping", r->io.data_offset);
	return (uint8_t *)r + r->io.data_offset;
}

void expect_out(struct client *c, unsigned int port, unsigned int size, uint32_t value)
{
	uint32_t got = 0;

	memcpy(&got, expect_io(c, KVM_EXIT_IO_OUT, port, size, 1), size);
	expect_u64("the value written to the port", got, value);
}

void answer_in(struct client *c, unsigned int port, unsigned int size, uint32_t value)
{
	memcpy(expect_io(c, KVM_EXIT_IO_IN, port, size, 1), &value, size);
}

static void expect_mmio(struct client *c, int is_write, uint64_t gpa, unsigned int size)
{
	struct kvm_run *r = c->run;
	char wanted[80];

	snprintf(wanted, sizeof(wanted), "MMIO (%s gpa %#" PRIx64 " size %u)", is_write ? "write" : "read", gpa,
		 size);
	if (run(c) != KVM_EXIT_MMIO || r->mmio.is_write != is_write || r->mmio.phys_addr != gpa ||
	    r->mmio.len != size)
		unexpected_exit(c, wanted);
}

void expect_mmio_write(struct client *c, uint64_t gpa, unsigned int size, uint64_t value)
{
	uint64_t got = 0;

	expect_mmio(c, 1, gpa, size);
	memcpy(&got, c->run->mmio.data, size);
	expect_u64("the value written to the device", got, value);
}

void answer_mmio_read(struct client *c, uint64_t gpa, unsigned int size, uint64_t value)
{
	expect_mmio(c, 0, gpa, size);
	memcpy(c->run->mmio.data, &value, size);
}
