// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * modes [-n NODE] [-l] [NAME ...]: one subtest for each thing that a guest can do and a client can see.
 * Prints `ok NAME` or `FAIL NAME: why` for each subtest, in the order given (default: all); the exit code is
 * 0 only if all were ok. A NAME may end in `*`. -l lists the names. Each subtest has a machine of its own in a
 * process of its own, so that one that hangs or dies does not take the others with it.
 */
#define _GNU_SOURCE
#include "modes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECONDS_EACH = 20 };

static const struct subtest *const groups[] = { basic_subtests, port_subtests, mmio_subtests, event_subtests,
						irq_subtests, memory_subtests, debug_subtests };
static const char *node = "/dev/kvm";

static void run_alone(const struct subtest *t)
{
	struct client c;
	char prefix[80];

	snprintf(prefix, sizeof(prefix), "FAIL %s", t->name);
	set_context(prefix);
	alarm(SECONDS_EACH);
	create_machine(&c, node);
	t->run(&c);
	destroy_machine(&c);
	printf("ok %s\n", t->name);
	exit(0);
}

static int run_subtest(const struct subtest *t)
{
	int status;
	pid_t child;

	fflush(stdout);
	child = fork();
	if (child == 0)
		run_alone(t);
	if (child < 0 || waitpid(child, &status, 0) != child) {
		perror("modes: fork");
		exit(2);
	}
	if (WIFSIGNALED(status))
		printf("FAIL %s: killed by signal %d (%s)\n", t->name, WTERMSIG(status),
		       strsignal(WTERMSIG(status)));
	return status != 0;
}

static int matches(const char *name, const char *pattern)
{
	size_t length = strlen(pattern);

	if (length && pattern[length - 1] == '*')
		return strncmp(name, pattern, length - 1) == 0;
	return strcmp(name, pattern) == 0;
}

/* Runs (or lists) what matches; the number of failures, -1 if nothing matches. */
static int run_matching(const char *pattern, int list)
{
	int failures = 0, found = 0;

	for (size_t i = 0; i < sizeof(groups) / sizeof(groups[0]); i++)
		for (const struct subtest *t = groups[i]; t->name; t++) {
			if (!matches(t->name, pattern))
				continue;
			found = 1;
			if (list)
				puts(t->name);
			else
				failures += run_subtest(t);
		}
	return found ? failures : -1;
}

int main(int argc, char **argv)
{
	int failures = 0, list = 0, option;
	char *all[] = { "*", NULL };
	char **patterns;

	while ((option = getopt(argc, argv, "n:l")) != -1) {
		switch (option) {
		case 'n':
			node = optarg;
			break;
		case 'l':
			list = 1;
			break;
		default:
			fprintf(stderr, "usage: modes [-n NODE] [-l] [NAME ...]\n");
			return 2;
		}
	}
	patterns = argv[optind] ? argv + optind : all;
	for (; *patterns; patterns++) {
		int result = run_matching(*patterns, list);

		if (result < 0) {
			fprintf(stderr, "modes: there is no subtest %s; -l lists them\n", *patterns);
			return 2;
		}
		failures += result;
	}
	return failures != 0;
}
