// SPDX-License-Identifier: GPL-2.0-or-later
// Watches threads that let everybody else run first (SCHED_IDLE, see affinity.py): when others take their CPU from them for longer than
// a moment the zygote is asked to make them ordinary threads again (ordinary.py). In native code because the one that would see it in Python may have to wait for the
// interpreter's lock that one of these threads holds.
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 16, TEXT = 512 };

static uint64_t ran(int file) { // /proc/TID/schedstat: nanoseconds on a CPU, then others
    char text[TEXT];
    ssize_t n = pread(file, text, sizeof text - 1, 0);
    if (n <= 0) return 0;
    text[n] = 0;
    return strtoull(text, NULL, 10);
}

static bool ready(int file) { // /proc/TID/stat: the state stands behind the name
    char text[TEXT];
    ssize_t n = pread(file, text, sizeof text - 1, 0);
    if (n <= 0) return false;
    text[n] = 0;
    const char *end = strrchr(text, ')');
    return end && end[1] == ' ' && end[2] == 'R';
}

static int own_file(int tid, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/%s", tid, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

// For `rounds` periods of `period_ns`. 1: in two in a row one of the threads was ready to run, but neither they nor their client
// (its schedstat file, -1: none) did for the half of it; a byte in `ordinary` asks for that. 0: no such thing. -1: nothing can be seen here.
int yd_watch(const int *tid, int count, int client, int ordinary, long period_ns, int rounds) {
    const struct timespec period = {.tv_nsec = period_ns};
    int stat[THREADS], sched[THREADS], late = 0;
    if (count > THREADS) count = THREADS;
    for (int i = 0; i < count; i++) {
        stat[i] = own_file(tid[i], "stat");
        sched[i] = own_file(tid[i], "schedstat");
    }
    bool seen = count > 0 && sched[0] >= 0 && ran(sched[0]);
    uint64_t before = 0;
    for (int round = 0; seen && late < 2 && round <= rounds; round++) {
        uint64_t now = client < 0 ? 0 : ran(client);
        bool waits = false;
        for (int i = 0; i < count; i++) {
            now += ran(sched[i]);
            waits |= ready(stat[i]);
        }
        late = waits && round && now - before < (uint64_t)period_ns / 2 ? late + 1 : 0;
        before = now;
        if (late < 2 && round < rounds) nanosleep(&period, NULL);
    }
    if (late == 2) (void)!write(ordinary, "", 1); // a pipe that is full has been asked
    for (int i = 0; i < count; i++) {
        if (stat[i] >= 0) close(stat[i]);
        if (sched[i] >= 0) close(sched[i]);
    }
    return seen ? late == 2 : -1;
}

// An importable module, so that setuptools builds it as one; there is nothing in it.
void *PyInit__yielding(void) { return NULL; }
