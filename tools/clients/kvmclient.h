/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What every small KVM client needs, in the order in which it needs it: open the node, make a VM, give it
 * memory, make a vCPU, set its mode, run it, look at its exits. Linux's Documentation/virt/kvm/api.rst
 * describes each ioctl. Nothing here knows what stands behind the node.
 */
#ifndef KVMCLIENT_H
#define KVMCLIENT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include <linux/kvm.h>

/* Guest physical layout, the same in every mode (linear = physical). */
#define GDT_AT		0x1000u
#define IDT_AT		0x2000u
#define NOTES_AT	0x4000u		/* where guests leave their results */
#define STACK_TOP	0x8000u
#define CODE_AT		0x8000u		/* where load_guest() puts the code, and where it starts */
#define TABLES_AT	0x10000u	/* six pages of page tables */
#define DATA_AT		0x20000u
#define RAM_SIZE	0x90000u	/* slot 0: [0, RAM_SIZE) */
#define DEVICE_AT	0xa0000u	/* no slot: every access is an MMIO exit; real mode reaches it */
#define HIGH_AT		0x100000u	/* room for a second slot */
#define MAPPED_END	0x200000u	/* paging maps [0, MAPPED_END) */
#define ABSENT_PAGE	0x30000u	/* except this page: not present */
#define READONLY_PAGE	0x31000u	/* and this one: present, not writable */

/* Selectors of the GDT that the set_*_mode() functions lay out. */
#define CODE32_SEL	0x08
#define DATA_SEL	0x10
#define CODE64_SEL	0x18
#define CODE16_SEL	0x20
#define TSS_SEL		0x28

struct client {
	const char *node;
	int kvm, vm, vcpu;
	struct kvm_run *run;	/* shared with whoever runs the vCPU */
	size_t run_size;
	uint8_t *mem;		/* guest physical memory from 0 */
	size_t mem_size;
};

/*
 * A guest is assembled into the binary by the compiler's own assembler. AT&T syntax, as in Linux; labels are
 * reached relative to the guest's start: `label - name + 0x8000` is its address in the guest.
 */
#define GUEST(name, bits, text)						\
	extern const uint8_t name[], name##_end[];			\
	__asm__(".pushsection .rodata\n.code" #bits "\n"		\
		".globl " #name ", " #name "_end\n"			\
		".hidden " #name ", " #name "_end\n"			\
		#name ":\n" text "\n" #name "_end:\n"			\
		".code64\n.popsection\n")

#define load_guest(c, name)	load_code((c), name, (size_t)(name##_end - name))

/* Prints why, and ends the process with exit code 1. `context` (may be NULL) stands before every message. */
void set_context(const char *context);
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* An ioctl that must not fail: ends the process with the name of the ioctl and the errno otherwise. */
#define kvm_call(fd, request, arg)	named_ioctl((fd), #request, (request), (unsigned long)(arg))
/* Its pair, which returns: the result, or -errno. */
int try_ioctl(int fd, unsigned long request, unsigned long arg);
int named_ioctl(int fd, const char *name, unsigned long request, unsigned long arg);

void open_node(struct client *c, const char *node);		/* open, KVM_GET_API_VERSION */
void create_vm(struct client *c);				/* KVM_CREATE_VM */
void set_memory(struct client *c, uint32_t slot, uint64_t gpa, void *hva, size_t size, uint32_t flags);
void create_vcpu(struct client *c);				/* KVM_CREATE_VCPU, mmap of kvm_run */
void create_machine(struct client *c, const char *node);	/* all of these, with RAM_SIZE of memory */
void destroy_machine(struct client *c);

void load_code(struct client *c, const uint8_t *code, size_t size);

/* State at CODE_AT with the stack at STACK_TOP and interrupts off. */
void set_real_mode(struct client *c);
void set_protected_mode(struct client *c);	/* 32 bits, flat, paging on */
void set_long_mode(struct client *c);		/* 64 bits, four-level paging */
void write_gdt(struct client *c);
void write_tables32(struct client *c);
void write_tables64(struct client *c);
/* A gate in the IDT for `offset` in the mode's code segment; bits is 32 or 64. */
void set_gate(struct client *c, int bits, unsigned int vector, uint32_t offset);

void get_regs(struct client *c, struct kvm_regs *regs);
void set_regs(struct client *c, const struct kvm_regs *regs);
void show_regs(struct client *c);
uint64_t read_note(struct client *c, unsigned int index);	/* 64-bit word at NOTES_AT + 8 * index */

const char *exit_name(uint32_t reason);
uint32_t run(struct client *c);					/* KVM_RUN must succeed; the exit reason */
void expect_exit(struct client *c, uint32_t reason);
void expect_u64(const char *what, uint64_t got, uint64_t wanted);
void *expect_io(struct client *c, int direction, unsigned int port, unsigned int size, unsigned int count);
void expect_out(struct client *c, unsigned int port, unsigned int size, uint32_t value);
void answer_in(struct client *c, unsigned int port, unsigned int size, uint32_t value);
void expect_mmio_write(struct client *c, uint64_t gpa, unsigned int size, uint64_t value);
void answer_mmio_read(struct client *c, uint64_t gpa, unsigned int size, uint64_t value);

#endif
