// SPDX-License-Identifier: GPL-2.0-or-later
// What answers some ioctls of a connection in the thread that read them, without Python. exchange calls it and knows no more of it.
#pragma once
#include <stdint.h>

enum { SHORTCUT_NOT_MINE = 0, SHORTCUT_ANSWERED = 1, SHORTCUT_BEGUN = 2 }; // the last: Python is to go on with it

struct shortcut {
    void *self;
    // Any reader thread. *result: what ioctl(2) returns, without data, when it is answered.
    int (*serve)(void *self, uint64_t nodeid, uint32_t tid, uint32_t cmd, uint64_t arg, int32_t *result);
    // Another thread, while serve() may be at it: the caller of an ioctl on that inode has a signal. It may be over meanwhile.
    void (*interrupt)(void *self, uint64_t nodeid);
};
