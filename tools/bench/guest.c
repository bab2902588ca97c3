// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a guest's instructions cost: the same image for every machine that loads multiboot kernels. It says "begin NAME"
 * and "end NAME COUNT" on QEMU's debug console, and whoever listens has the clock: a guest's own may be anything.
 */
#include <stdint.h>

enum { CONSOLE = 0xe9, WORDS = 8192, PAGES = 512, PAGE = 4096, ROUNDS = 500 };

#define FAULTING_AT	(511ul << 21)	/* start.S maps it by pages, none of them present */
#define noinline	__attribute__((noinline))

extern volatile uint64_t fault_table[PAGES];
void enter_user(void (*first)(void), void (*second)(void));
void guest_main(void);

static volatile uint64_t words[WORDS], sink;

static void put(const char *text)
{
	for (; *text; text++)
		__asm__ volatile("outb %b0, %w1" :: "a"(*text), "Nd"(CONSOLE));
}

static void put_number(uint32_t n)
{
	char digits[12], *at = digits + sizeof(digits) - 1;

	*at = 0;
	do
		*--at = (char)('0' + n % 10);
	while (n /= 10);
	put(at);
}

static noinline void integers(uint32_t n)
{
	uint64_t a = 1;

	for (; n; n--) {
		a = a * 6364136223846793005 + 1442695040888963407;
		a ^= a >> 13;
		__asm__ volatile("" : "+r"(a));
	}
	sink = a;
}

static noinline void loads(uint32_t n)
{
	uint64_t a = 0;

	for (uint32_t i = 0; i < n; i++)
		a += words[i * 7 % WORDS];
	sink = a;
}

static noinline void stores(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		words[i * 7 % WORDS] = i;
}

static noinline uint64_t one(uint64_t x)
{
	return x * 3 + 1;
}

static noinline uint64_t other(uint64_t x)
{
	return x ^ 7;
}

static noinline void calls(uint32_t n)
{
	uint64_t (*volatile functions[2])(uint64_t) = { one, other };
	uint64_t a = 0;

	for (uint32_t i = 0; i < n; i++)
		a = functions[i & 1](a);
	sink = a;
}

static noinline void doubles(uint32_t n)
{
	volatile double x = 1;

	for (; n; n--)
		x = x * 1.0000001 + 0.5;
}

static noinline void page_faults(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (i % PAGES == 0) {
			uint64_t cr3;

			for (uint32_t page = 0; page < PAGES; page++)
				fault_table[page] = 0;
			__asm__ volatile("mov %%cr3, %0\n mov %0, %%cr3" : "=r"(cr3) :: "memory");
		}
		*(volatile uint8_t *)(FAULTING_AT + i % PAGES * PAGE) = 1;
	}
}

/* User mode: its loops take their count from here. */
static volatile uint32_t user_count;

static inline void user_call(uint64_t number)
{
	__asm__ volatile("syscall" : "+a"(number) :: "rcx", "r11", "rdx", "rsi", "rdi", "r8", "r9", "r10", "memory");
}

static void user_calls(void)
{
	for (uint32_t n = user_count; n; n--)
		user_call(0);
	user_call(2);
}

static void user_yields(void)
{
	for (uint32_t n = user_count / 2; n; n--)
		user_call(1);
	user_call(2);
}

static void user_answers(void)
{
	for (;;)
		user_call(1);
}

static void system_calls(uint32_t n)
{
	user_count = n;
	enter_user(user_calls, user_answers);
}

static void switches(uint32_t n)
{
	user_count = n;
	enter_user(user_yields, user_answers);
}

static const struct {
	const char *name;
	void (*work)(uint32_t n);
	uint32_t n;
} benches[] = {
	{ "integer", integers, 120000000 }, { "load", loads, 60000000 }, { "store", stores, 60000000 },
	{ "call", calls, 16000000 }, { "double", doubles, 12000000 }, { "syscall", system_calls, 1200000 },
	{ "page_fault", page_faults, PAGES * ROUNDS }, { "switch", switches, 100000 },
};

void guest_main(void)
{
	for (uint32_t i = 0; i < sizeof(benches) / sizeof(benches[0]); i++) {
		benches[i].work(benches[i].n / 64);		/* translated, and in caches */
		put("begin ");
		put(benches[i].name);
		put("\n");
		benches[i].work(benches[i].n);
		put("end ");
		put(benches[i].name);
		put(" ");
		put_number(benches[i].n);
		put("\n");
	}
}
