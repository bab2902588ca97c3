// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Guest memory as the client manages it: dirty logging, many slots, and writes that do not exit (coalesced zones,
 * ioeventfds).
 */
#define _GNU_SOURCE
#include "modes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef KVM_SET_USER_MEMORY_REGION2		/* headers from before Linux 6.8 */
struct kvm_userspace_memory_region2 {
	__u32 slot, flags;
	__u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	__u32 guest_memfd, pad1;
	__u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif

enum { PAGE = 4096, RAM_PAGES = RAM_SIZE / PAGE, MANY_SLOTS = 1000, MANY_AT = 0x10000000 };

static void set_flags(struct client *c, uint32_t flags)
{
	set_memory(c, 0, 0, c->mem, RAM_SIZE, flags);
}

static void get_dirty_log(struct client *c, uint64_t bitmap[4])
{
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = bitmap };

	memset(bitmap, 0, 32);
	kvm_call(c->vm, KVM_GET_DIRTY_LOG, &log);
}

/* Writes pages 0x20, 0x22 and 0x23; a page that is only read is not in the log. */
GUEST(stores_guest, 64, R"(
1:
	mov	%al, (%rdi)
	mov	%rax, 0x2ffc(%rdi)
	mov	0x5000(%rdi), %rbx
	hlt
	jmp	1b
)");

static void begin_stores(struct client *c)
{
	load_guest(c, stores_guest);
	begin_long(c, 0, DATA_AT, 0);
	expect_exit(c, KVM_EXIT_HLT);		/* the page tables have their accessed and dirty bits now */
}

static void dirty_log(struct client *c)
{
	uint64_t bitmap[4];
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = bitmap };

	begin_stores(c);
	expect_u64("without a log", try_ioctl(c->vm, KVM_GET_DIRTY_LOG, (unsigned long)&log), -ENOENT);
	set_flags(c, KVM_MEM_LOG_DIRTY_PAGES);
	c->mem[DATA_AT + 0x7000] = 1;		/* the client's own writes are not logged */
	expect_exit(c, KVM_EXIT_HLT);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages", bitmap[0], 0xdull << 32);
	expect_u64("dirty pages from 64 on", bitmap[1] | bitmap[2], 0);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages, again", bitmap[0], 0);
	expect_exit(c, KVM_EXIT_HLT);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages after another round", bitmap[0], 0xdull << 32);
}

static void dirty_log_manual(struct client *c)
{
	uint64_t bitmap[4], mask[4] = { 1ull << 32 };
	struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { 1 } };
	struct kvm_clear_dirty_log clear = { .slot = 0, .num_pages = 64, .dirty_bitmap = mask };

	expect_u64("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
		   try_ioctl(c->vm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), 3);
	kvm_call(c->vm, KVM_ENABLE_CAP, &cap);
	begin_stores(c);
	set_flags(c, KVM_MEM_LOG_DIRTY_PAGES);
	expect_exit(c, KVM_EXIT_HLT);
	get_dirty_log(c, bitmap);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages, again", bitmap[0], 0xdull << 32);
	kvm_call(c->vm, KVM_CLEAR_DIRTY_LOG, &clear);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages without the cleared one", bitmap[0], 0xcull << 32);
	expect_exit(c, KVM_EXIT_HLT);
	get_dirty_log(c, bitmap);
	expect_u64("dirty pages after another round", bitmap[0], 0xdull << 32);
}

static void memory_region2(struct client *c)
{
	struct kvm_userspace_memory_region2 region = {
		.slot = 1, .guest_phys_addr = HIGH_AT, .memory_size = PAGE, .userspace_addr = (unsigned long)c->mem + DATA_AT,
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
	};
	uint64_t bitmap[1] = { 0 };
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bitmap };

	kvm_call(c->vm, KVM_SET_USER_MEMORY_REGION2, &region);
	load_guest(c, stores_guest);
	begin_long(c, 0, HIGH_AT, 0);
	expect_mmio_write(c, HIGH_AT + 0x2ffc, 4, 0);
	kvm_call(c->vm, KVM_GET_DIRTY_LOG, &log);
	expect_u64("dirty pages of slot 1", bitmap[0], 1);
}

GUEST(ring_guest, 16, R"(
	mov	$0x2000, %ax
	mov	%ax, %ds
1:
	mov	%al, 0
	mov	%eax, 0x2ffe
	mov	0x5000, %bl
	hlt
	jmp	1b
)");

/* Needs a VM of its own, which has rings before it has vCPUs. */
static void dirty_ring(struct client *first)
{
	enum { BYTES = 65536, DIRTY = 1, RESET = 2 };
	struct client c = { 0 };
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { BYTES } };
	struct { uint32_t flags, slot; uint64_t offset; } *ring;

	open_node(&c, first->node);
	create_vm(&c);
	if (try_ioctl(c.vm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) == 0)
		return;			/* absent where kvm_run cannot be shared */
	kvm_call(c.vm, KVM_ENABLE_CAP, &cap);
	c.mem_size = RAM_SIZE;
	c.mem = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	set_flags(&c, 0);
	create_vcpu(&c);
	ring = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, c.vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	if (ring == MAP_FAILED)
		fail("the ring cannot be mapped");
	load_guest(&c, ring_guest);
	set_real_mode(&c);
	set_flags(&c, KVM_MEM_LOG_DIRTY_PAGES);
	for (unsigned int round = 0; round < 2; round++) {
		static const uint64_t pages[] = { 0x20, 0x22, 0x23 };
		unsigned int base = 3 * round, seen = 0;

		expect_exit(&c, KVM_EXIT_HLT);
		for (unsigned int i = base; i < base + 3; i++) {
			expect_u64("flags of an entry", ring[i].flags, DIRTY);
			expect_u64("slot of an entry", ring[i].slot, 0);
			for (unsigned int k = 0; k < 3; k++)
				seen |= (ring[i].offset == pages[k]) << k;
			ring[i].flags = RESET;
		}
		expect_u64("pages seen", seen, 7);
		expect_u64("no further entry", ring[base + 3].flags, 0);
		expect_u64("entries reset", kvm_call(c.vm, KVM_RESET_DIRTY_RINGS, 0), 3);
		expect_u64("flags after the reset", ring[base].flags, 0);
	}
}

/* Each slot shows the same page of the client, so that what the guest writes through one is read through another. */
static void many_slots(struct client *c)
{
	uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (int i = 1; i <= MANY_SLOTS; i++)
		set_memory(c, i, MANY_AT + 2ull * PAGE * i, page, PAGE, 0);
	load_guest(c, stores_guest);
	set_real_mode(c);
	for (int i = 1; i <= MANY_SLOTS; i += 2)
		set_memory(c, i, 0, page, 0, 0);
	for (int i = 1; i <= MANY_SLOTS; i += 2)
		set_memory(c, i, MANY_AT + 2ull * PAGE * i, page, PAGE, 0);
	expect_u64("an overlap", try_ioctl(c->vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)
		&(struct kvm_userspace_memory_region){ .slot = MANY_SLOTS + 1, .guest_phys_addr = MANY_AT + 4ull * PAGE,
			.memory_size = 2 * PAGE, .userspace_addr = (unsigned long)page }), -EEXIST);
}

GUEST(devices_guest, 64, R"(
1:
	mov	%eax, (%rdi)
	mov	%ax, 4(%rdi)
	mov	$0x5000, %edx
	out	%al, %dx
	hlt
	jmp	1b
)");

/* A write in a zone may still exit: the ring is full, or this KVM has none for the vCPU. */
static void expect_coalesced(struct client *c, struct kvm_coalesced_mmio_ring *ring, uint64_t gpa, unsigned int size)
{
	uint32_t entries = (PAGE - sizeof(*ring)) / sizeof(ring->coalesced_mmio[0]);

	if (c->run->exit_reason == KVM_EXIT_MMIO && c->run->mmio.phys_addr == gpa) {
		run(c);
		return;
	}
	if (ring->first == ring->last)
		fail("the write is not in the ring");
	expect_u64("address in the ring", ring->coalesced_mmio[ring->first].phys_addr, gpa);
	expect_u64("length in the ring", ring->coalesced_mmio[ring->first].len, size);
	ring->first = (ring->first + 1) % entries;
}

static void coalesced(struct client *c)
{
	struct kvm_coalesced_mmio_zone zone = { .addr = DEVICE_AT, .size = 6 };
	int page = try_ioctl(c->kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
	struct kvm_coalesced_mmio_ring *ring = (void *)((uint8_t *)c->run + page * PAGE);

	expect_u64("KVM_CAP_COALESCED_MMIO", page, 2);
	kvm_call(c->vm, KVM_REGISTER_COALESCED_MMIO, &zone);
	load_guest(c, devices_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	for (unsigned int i = 0; i < 200; i++) {		/* once around the ring */
		run(c);
		expect_coalesced(c, ring, DEVICE_AT, 4);
		expect_coalesced(c, ring, DEVICE_AT + 4, 2);
		expect_u64("exit", c->run->exit_reason, KVM_EXIT_IO);
		expect_exit(c, KVM_EXIT_HLT);
	}
	kvm_call(c->vm, KVM_UNREGISTER_COALESCED_MMIO, &zone);
	expect_mmio_write(c, DEVICE_AT, 4, 0);
}

static void ioeventfd(struct client *c)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	uint64_t count = 0;
	struct kvm_ioeventfd mmio = { .addr = DEVICE_AT, .len = 4, .fd = fd };
	struct kvm_ioeventfd port = { .addr = 0x5000, .len = 1, .fd = fd,
				      .flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH };

	kvm_call(c->vm, KVM_IOEVENTFD, &mmio);
	kvm_call(c->vm, KVM_IOEVENTFD, &port);
	expect_u64("the same again", try_ioctl(c->vm, KVM_IOEVENTFD, (unsigned long)&port), -EEXIST);
	load_guest(c, devices_guest);
	begin_long(c, 0, DEVICE_AT, 0);
	expect_mmio_write(c, DEVICE_AT + 4, 2, 0);
	expect_exit(c, KVM_EXIT_HLT);
	if (read(fd, &count, sizeof(count)) != sizeof(count))
		fail("nothing was signalled");
	expect_u64("signals", count, 2);
	port.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	kvm_call(c->vm, KVM_IOEVENTFD, &port);
	expect_u64("gone", try_ioctl(c->vm, KVM_IOEVENTFD, (unsigned long)&port), -ENOENT);
	expect_mmio_write(c, DEVICE_AT + 4, 2, 0);
	expect_out(c, 0x5000, 1, 0);
}

const struct subtest memory_subtests[] = {
	{ "dirty_log", dirty_log },
	{ "dirty_log_manual", dirty_log_manual },
	{ "dirty_ring", dirty_ring },
	{ "memory_region2", memory_region2 },
	{ "many_slots", many_slots },
	{ "coalesced", coalesced },
	{ "ioeventfd", ioeventfd },
	{ NULL, NULL },
};
