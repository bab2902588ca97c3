/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a guest's user space costs: run inside a guest, static. Prints "BENCH name nanoseconds" for each, the median of
 * seven rounds.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 7

static uint64_t words[8192];
static volatile uint64_t sink;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void integer(long n)
{
	uint64_t a = 1;

	for (long i = 0; i < n; i++) {
		a = a * 6364136223846793005ull + 1442695040888963407ull;
		a ^= a >> 13;
		__asm__ volatile("" : "+r"(a));
	}
	sink = a;
}

static void load(long n)
{
	uint64_t a = 0;

	for (long i = 0; i < n; i++)
		a += ((volatile uint64_t *)words)[i * 7 & 8191];
	sink = a;
}

static void store(long n)
{
	for (long i = 0; i < n; i++)
		((volatile uint64_t *)words)[i * 7 & 8191] = i;
}

static __attribute__((noinline)) uint64_t one(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t other(uint64_t x) { return x ^ 7; }

static void call(long n)
{
	uint64_t (*volatile functions[2])(uint64_t) = { one, other };
	uint64_t a = 0;

	for (long i = 0; i < n; i++)
		a = functions[i & 1](a);
	sink = a;
}

static void real(long n)
{
	volatile double x = 1;

	for (long i = 0; i < n; i++)
		x = x * 1.0000001 + 0.5;
}

static void system_call(long n)
{
	for (long i = 0; i < n; i++)
		syscall(SYS_getppid);
}

static void page_fault(long n)
{
	char *pages = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (long i = 0; i < n; i++)
		pages[i * 4096] = 1;
	munmap(pages, n * 4096);
}

static void context_switch(long n)
{
	int there[2], back[2];
	char byte = 0;
	pid_t child;

	if (pipe(there) || pipe(back))
		exit(1);
	child = fork();
	if (!child) {
		for (long i = 0; i < n / 2; i++)
			if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	for (long i = 0; i < n / 2; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			exit(1);
	waitpid(child, NULL, 0);
	close(there[0]), close(there[1]), close(back[0]), close(back[1]);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

int main(void)
{
	static const struct { const char *name; void (*run)(long); long n; } tests[] = {
		{ "integer", integer, 4000000 }, { "load", load, 3000000 }, { "store", store, 3000000 }, { "call", call, 1000000 },
		{ "double", real, 1000000 }, { "syscall", system_call, 20000 }, { "page_fault", page_fault, 2000 },
		{ "context_switch", context_switch, 1000 },
	};

	for (size_t t = 0; t < sizeof(tests) / sizeof(*tests); t++) {
		double took[ROUNDS], start;

		for (int i = 0; i < ROUNDS; i++) {
			start = now();
			tests[t].run(tests[t].n);
			took[i] = (now() - start) / tests[t].n;
		}
		qsort(took, ROUNDS, sizeof(*took), compare);
		printf("BENCH %s %.3f\n", tests[t].name, took[ROUNDS / 2]);
		fflush(stdout);
	}
	return 0;
}
