/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Clients for test_client_*.py. Descriptor 3 is the file whose ioctls the test answers. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CREATE_VCPU 0xAE41
#define KVM_RUN 0xAE80
#define SET_MEMORY 0x4020AE46

struct region { uint32_t slot, flags; uint64_t gpa, size, hva; };

static void report(long r)
{
	struct stat s = {0};
	int e = errno;

	if (r >= 0)
		fstat(r, &s);
	printf("%ld %d %lu %d\n", r, r < 0 ? e : 0, (unsigned long)s.st_ino, r >= 0 ? fcntl(r, F_GETFD) : 0);
	fflush(stdout);
}

/* grafts N [close]: one line per call: result errno inode FD_CLOEXEC */
static int grafts(int n, int closing)
{
	for (int i = 0; i < n; i++) {
		int r = ioctl(3, CREATE_VCPU, (long)i);

		report(r);
		if (closing && r >= 0)
			close(r);
	}
	return 0;
}

static void *graft_thread(void *arg)
{
	grafts(*(int *)arg, 0);
	return NULL;
}

static volatile long alarms;
static void on_alarm(int s) { (void)s; alarms++; }

static int storm(int n)
{
	struct sigaction sa = {.sa_handler = on_alarm};
	struct itimerval it = {{0, 200}, {0, 200}};
	int bad = 0, eintr = 0;
	sigset_t mask;

	sigaction(SIGALRM, &sa, 0);
	setitimer(ITIMER_REAL, &it, 0);
	for (int i = 0; i < n; i++) {
		int r = ioctl(3, CREATE_VCPU, 0);

		if (r < 0 && errno == EINTR)
			eintr++;
		else if (r != 4 || fcntl(r, F_GETFD) != FD_CLOEXEC)
			bad++;
		if (r >= 0)
			close(r);
	}
	memset(&it, 0, sizeof(it));
	setitimer(ITIMER_REAL, &it, 0);
	sigprocmask(0, 0, &mask);
	printf("bad=%d eintr=%d alarms=%d blocked=%d\n", bad, eintr, alarms > 10, sigismember(&mask, SIGALRM));
	return 0;
}

/* The value that a real-time signal carries must come through an injection. */
static volatile int value = -1;
static void on_value(int s, siginfo_t *i, void *c) { (void)s; (void)c; value = i->si_value.sival_int; }

static int queued(void)
{
	struct sigaction sa = {.sa_sigaction = on_value, .sa_flags = SA_SIGINFO};
	int r;

	sigaction(SIGRTMIN, &sa, 0);
	puts("ready");
	fflush(stdout);
	r = ioctl(3, CREATE_VCPU, 0);
	printf("%d %d\n", r, value);
	return 0;
}

static int killing_filter(void)
{
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_ioctl, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_write, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_exit_group, 1, 0),
		BPF_STMT(BPF_RET, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW)};
	struct sock_fprog p = {6, f};
	char b[100];
	int r;

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_SECCOMP, 2, &p);
	r = ioctl(3, CREATE_VCPU, 0);
	if (write(1, b, sprintf(b, "%d\n", r)) < 0)
		return 1;
	_exit(0);
}

/* Writers count in the memory that is taken over, and beside it how often they did. */
#define WRITERS 3
static char *guest;
static size_t guest_size;
static volatile int stop, go;
static uint64_t counted[WRITERS];

static void *writer(void *arg)
{
	long id = (long)arg;
	size_t page = 0, pages = guest_size / 4096;
	uint64_t n = 0;

	while (!stop) {
		(*(volatile uint64_t *)(guest + page * 4096 + id * 8))++;
		n++;
		page = (page + 7) % pages;
		if (n == 10000)
			__atomic_add_fetch(&go, 1, __ATOMIC_SEQ_CST);
	}
	counted[id] = n;
	return NULL;
}

static long set_memory(uint32_t slot, void *hva, size_t size)
{
	struct region m = {slot, 0, 0, size, (uint64_t)hva};

	return ioctl(3, SET_MEMORY, &m);
}

static int writers(size_t size, int rounds)
{
	pthread_t t[WRITERS];
	uint64_t want = 0, have = 0;
	long r = 0;

	guest_size = size;
	guest = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (long i = 0; i < WRITERS; i++)
		pthread_create(t + i, 0, writer, (void *)i);
	while (go < WRITERS)
		usleep(1000);
	for (int i = 0; i < rounds && !r; i++) {
		r = set_memory(i, guest + size / rounds * i, size / rounds);
		usleep(2000);
	}
	stop = 1;
	for (int i = 0; i < WRITERS; i++) {
		pthread_join(t[i], 0);
		want += counted[i];
	}
	for (size_t p = 0; p < size / 4096; p++)
		for (int i = 0; i < WRITERS; i++)
			have += *(uint64_t *)(guest + p * 4096 + i * 8);
	printf("result=%ld lost=%ld\n", r, (long)(want - have));
	fflush(stdout);
	/* what is written now must be seen through the memfd, and the other way round */
	*(volatile uint64_t *)(guest + 4096) = 0x1122334455667788;
	r = ioctl(3, CREATE_VCPU, 0);
	printf("%d %lx\n", r >= 0, (unsigned long)*(volatile uint64_t *)(guest + 8192));
	return 0;
}

/* memory KIND: a layout to be resolved or taken over; prints a checksum before and after */
static uint64_t checksum(volatile unsigned char *p, size_t n)
{
	uint64_t s = 0;

	for (size_t i = 0; i < n; i += 64)
		s = s * 31 + p[i];
	return s;
}

static char in_bss[8 * 4096] __attribute__((aligned(4096)));

static int memory(const char *kind, const char *path)
{
	size_t size = 16 * 4096;
	char *p = NULL;
	uint64_t before;
	long r;
	int fd;

	if (!strcmp(kind, "anon-shared")) {
		p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	} else if (!strcmp(kind, "memfd") || !strcmp(kind, "memfd-closed")) {
		fd = memfd_create("own", 0);
		if (ftruncate(fd, 2 * size))
			return 1;
		p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 4096);
		if (!strcmp(kind, "memfd-closed"))
			close(fd);
	} else if (!strcmp(kind, "file-private") || !strcmp(kind, "file-shared")) {
		fd = open(path, O_RDWR);
		p = mmap(0, size, PROT_READ | PROT_WRITE, !strcmp(kind, "file-shared") ? MAP_SHARED : MAP_PRIVATE, fd, 0);
		if (!strcmp(kind, "file-private"))
			p[3 * 4096] = 'x';
		close(fd);
	} else if (!strcmp(kind, "bss")) {
		p = in_bss;
		size = sizeof(in_bss);
		memset(p, 7, 4096);
	} else if (!strcmp(kind, "mixed")) {
		/* private, a hole, read only, no access, own memfd */
		p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(p, 5, size);
		fd = memfd_create("own", 0);
		if (ftruncate(fd, 4096))
			return 1;
		mmap(p + 12 * 4096, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
		mprotect(p + 8 * 4096, 4096, PROT_READ);
		mprotect(p + 9 * 4096, 4096, PROT_NONE);
		munmap(p + 4 * 4096, 4096);
		printf("%lx\n", (unsigned long)p);
		r = set_memory(0, p, size);
		printf("%ld %d", r, p[8 * 4096]);
		mprotect(p + 9 * 4096, 4096, PROT_READ | PROT_WRITE);
		printf(" %d %d\n", p[9 * 4096], p[15 * 4096]);
		return 0;
	} else {
		p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	if (!strcmp(kind, "anon-shared") || !strncmp(kind, "memfd", 5) || !strcmp(kind, "anon"))
		for (size_t i = 0; i < size; i += 64 * 5)
			p[i] = i >> 6;
	before = checksum((void *)p, size);
	printf("%lx\n", (unsigned long)p);
	fflush(stdout);
	r = set_memory(0, p, size);
	printf("%ld %d\n", r, checksum((void *)p, size) == before);
	fflush(stdout);
	r = ioctl(3, CREATE_VCPU, 0);
	printf("%d\n", p[4096]);
	return 0;
}

/* A thread in KVM_RUN and one in epoll_wait while memory is taken over: neither may see it. */
static void *runner(void *arg)
{
	int r = ioctl(3, KVM_RUN, 0);

	printf("run %d %d\n", r, r < 0 ? errno : 0);
	fflush(stdout);
	return arg;
}

static void *poller(void *arg)
{
	struct epoll_event e;
	int r = epoll_wait(epoll_create1(0), &e, 1, 1500);

	printf("epoll %d %d\n", r, r < 0 ? errno : 0);
	fflush(stdout);
	return arg;
}

static void *creator(void *arg)
{
	int r = ioctl(3, CREATE_VCPU, 7);

	printf("create %d\n", r >= 0);
	fflush(stdout);
	return arg;
}

static int blocked(const char *who)
{
	pthread_t a, b, c;
	char *p = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	long r;

	if (!strcmp(who, "signal")) {
		struct sigaction sa = {.sa_handler = on_alarm};

		sigaction(SIGUSR1, &sa, 0);
	}
	pthread_create(&a, 0, runner, 0);
	pthread_create(&b, 0, poller, 0);
	if (!strcmp(who, "create"))
		pthread_create(&c, 0, creator, 0);
	usleep(100000);
	r = set_memory(0, p, 65536);
	printf("set %ld\n", r);
	fflush(stdout);
	pthread_join(a, 0);
	pthread_join(b, 0);
	if (!strcmp(who, "create"))
		pthread_join(c, 0);
	return 0;
}

static void *exit_leader(void *arg)
{
	usleep(100000);
	return graft_thread(arg);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int n = argc > 2 ? atoi(argv[2]) : 1;
	pthread_t t;
	const char *fd = getenv("RIG_FD");

	if (fd && atoi(fd) != 3) {
		dup2(atoi(fd), 3);
		close(atoi(fd));
	}
	if (!strcmp(what, "grafts"))
		return grafts(n, argc > 3);
	if (!strcmp(what, "storm"))
		return storm(n);
	if (!strcmp(what, "queued"))
		return queued();
	if (!strcmp(what, "seccomp"))
		return killing_filter();
	if (!strcmp(what, "writers"))
		return writers((size_t)n << 12, atoi(argv[3]));
	if (!strcmp(what, "memory"))
		return memory(argv[2], argc > 3 ? argv[3] : NULL);
	if (!strcmp(what, "blocked"))
		return blocked(argc > 2 ? argv[2] : "");
	if (!strcmp(what, "thread")) {
		pthread_create(&t, 0, graft_thread, &n);
		pthread_join(t, 0);
		return 0;
	}
	if (!strcmp(what, "leaderless")) {
		pthread_create(&t, 0, exit_leader, &n);
		pthread_exit(0);
	}
	if (!strcmp(what, "uid")) {
		if (setgid(65534) || setuid(65534))
			return 1;
		return grafts(n, 0);
	}
	if (!strcmp(what, "namespaces")) {
		if (unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS))
			return 1;
		if (fork()) {
			wait(0);
			return 0;
		}
		return grafts(n, 0);
	}
	return 2;
}
