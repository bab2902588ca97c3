/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The bare machine below guest.c: multiboot entry in protected mode, long mode with the first GiB mapped one to one (large
 * pages, also for user mode), a GDT for SYSCALL, ring 3, a page fault handler, two address spaces. Interrupts stay off.
 */
#define PRESENT_WRITE_USER	0x7
#define LARGE_PAGE		0x80
#define MSR_EFER		0xc0000080
#define MSR_STAR		0xc0000081
#define MSR_LSTAR		0xc0000082
#define MSR_FMASK		0xc0000084
#define EFER_SCE_LME		0x101
#define CR0_PE_MP_NE_WP_PG	0x80010023
#define CR4_PAE_FXSR_XMM	0x620

#define KERNEL_CODE	0x08
#define USER_BASE	0x10	/* SYSRET: SS is this + 8, CS this + 16 */
#define USER_DATA	0x1b
#define USER_CODE	0x23

	.section .multiboot, "a"
	.align 4
	.long 0x1badb002, 0, -0x1badb002

	.text
	.code32
	.globl start
start:
	cli
	movl $stack_end, %esp
	movl $pml4, %edi
	call make_tables
	movl $second_pml4, %edi
	call make_tables
	movl $directory, %edi
	movl $(PRESENT_WRITE_USER | LARGE_PAGE), %eax
	movl $512, %ecx
1:	movl %eax, (%edi)
	movl $0, 4(%edi)
	addl $8, %edi
	addl $0x200000, %eax
	loop 1b
	movl $(fault_table + PRESENT_WRITE_USER), directory + 8 * 511	/* guest.c's pages to fault on */

	movl $CR4_PAE_FXSR_XMM, %eax
	movl %eax, %cr4
	movl $pml4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	movl $EFER_SCE_LME, %eax
	xorl %edx, %edx
	wrmsr
	movl $CR0_PE_MP_NE_WP_PG, %eax
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $KERNEL_CODE, $long_mode

make_tables:				/* edi: a PML4 for the one page directory */
	movl $(pdpt + PRESENT_WRITE_USER), (%edi)
	movl $(directory + PRESENT_WRITE_USER), pdpt
	ret

	.code64
long_mode:
	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $page_fault, %eax		/* gate 14: low half, selector, present interrupt gate, high half */
	movw %ax, idt + 14 * 16
	movw $KERNEL_CODE, idt + 14 * 16 + 2
	movw $0x8e00, idt + 14 * 16 + 4
	shrl $16, %eax
	movw %ax, idt + 14 * 16 + 6
	lidt idt_pointer
	movl $MSR_STAR, %ecx
	xorl %eax, %eax
	movl $(USER_BASE << 16 | KERNEL_CODE), %edx
	wrmsr
	movl $MSR_LSTAR, %ecx
	movl $system_call, %eax
	xorl %edx, %edx
	wrmsr
	movl $MSR_FMASK, %ecx
	xorl %eax, %eax
	wrmsr
	call guest_main
	movl $0, %eax
	outl %eax, $0xf4		/* isa-debug-exit */
1:	hlt
	jmp 1b

/* The page that guest.c touched becomes present, at its own address. */
page_fault:
	pushq %rax
	pushq %rdx
	movq %cr2, %rax
	movq %rax, %rdx
	shrq $12, %rdx
	andl $511, %edx
	andq $-4096, %rax
	orq $PRESENT_WRITE_USER, %rax
	movq %rax, fault_table(, %rdx, 8)
	popq %rdx
	popq %rax
	addq $8, %rsp
	iretq

/* eax: 0 returns at once, 1 goes to the other address space, 2 ends user mode. */
system_call:
	cmpl $1, %eax
	je yield
	ja leave_user
	sysretq
yield:
	pushq %rcx
	pushq %r11
	pushq %rbx
	pushq %rbp
	xchgq %rsp, other_stack
	movq other_space, %rax
	movq %cr3, %rcx
	movq %rcx, other_space
	movq %rax, %cr3
	popq %rbp
	popq %rbx
	popq %r11
	popq %rcx
	sysretq
leave_user:
	movl $pml4, %eax
	movq %rax, %cr3
	movq kernel_stack, %rsp
	popq %rbx
	popq %rbp
	popq %r12
	popq %r13
	popq %r14
	popq %r15
	ret

/* void enter_user(void (*first)(void), void (*second)(void)): until one of them leaves. */
	.globl enter_user
enter_user:
	pushq %r15
	pushq %r14
	pushq %r13
	pushq %r12
	pushq %rbp
	pushq %rbx
	movq %rsp, kernel_stack
	movq $second_pml4, other_space
	movq $(second_stack_end - 32), other_stack
	movq %rsi, second_stack_end - 8		/* rcx: where SYSRET goes */
	movq $2, second_stack_end - 16		/* r11: its RFLAGS */
	movl $first_stack_end, %ecx
	pushq $USER_DATA
	pushq %rcx
	pushq $2
	pushq $USER_CODE
	pushq %rdi
	iretq

	.data
	.align 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
gdt_pointer:
	.word . - gdt - 1
	.quad gdt
idt_pointer:
	.word 16 * 16 - 1
	.quad idt

	.bss
	.align 4096
pml4:		.skip 4096
second_pml4:	.skip 4096
pdpt:		.skip 4096
directory:	.skip 4096
	.globl fault_table
fault_table:	.skip 4096
idt:		.skip 16 * 16
other_stack:	.skip 8
other_space:	.skip 8
kernel_stack:	.skip 8
	.align 16
		.skip 16384
stack_end:
		.skip 8192
first_stack_end:
		.skip 8192
second_stack_end:

	.section .note.GNU-stack, "", @progbits
