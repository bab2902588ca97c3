// SPDX-License-Identifier: GPL-2.0-or-later
// A connection's reader threads: an answer to FUSE and the wait for the next request as one call. Between os.write and os.readv a reader
// would take Python's lock only to give it away again; as the answer wakes the client, which often runs at once on the same CPU, the
// reader then meets the next one that has the lock, and both pay for two more changes of threads.
//
// A shortcut answers some ioctls here, and Python never sees them. What must not be lost then:
// - Who serves may run a guest, so it does that only while another thread waits for requests, or will soon.
// - A FUSE_INTERRUPT for it is read by another thread, perhaps before this one has looked at its request. Whoever comes second sees
//   the other: the request is noted before the interrupts are looked at, and the other way round in `interrupt`.
//
// The kernel gives each request to the thread that has waited longest, so two readers would take turns, which costs a guest's exit a
// seventh more than always the same one. While the shortcut is busy the second one therefore is parked: it looks every PARK_NS
// whether the first is still at the same request, and only then reads, too.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <linux/fuse.h>
#include <linux/futex.h>
#include <linux/rseq.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "shortcut.h"

enum { SLOTS = 64, EARLY = 256, PARK_NS = 500000 };
// Python looks at every so many answers of the shortcut, earlier when the last PACE of them took long (cycles of the host's TSC): then
// it may be because the client runs on another CPU.
enum { LOOK_EVERY = 256, LOOK_SLOW = 64, PACE = 8, SLOW = PACE << 16 };
enum { PARKED = 1, WANTED };
enum { BEGUN = 1 << 30, LOOK = 1 << 29 }; // beside the length: exchange.py

extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned __rseq_size __attribute__((weak));
enum { RSEQ_AREA = 32 }; // what glibc registers where the kernel does not ask for more
#define RSEQ_SIG 0x53053053u

typedef struct { _Atomic uint64_t unique; uint64_t nodeid; } Slot; // a request in the shortcut
typedef struct {
    PyObject_HEAD
    int fd;
    const struct shortcut *shortcut;
    atomic_int waiting, running; // threads in read(2); in the shortcut
    atomic_int parked;           // PARKED: a thread is; WANTED: and shall read
    atomic_uint got, answered;   // messages; of them, by the shortcut
    unsigned slow;               // how often in a row PACE answers took long,
    uint64_t paced;              // and since when the next ones are counted
    atomic_uint idle_since;      // `answered` when the last one that was parked went to read
    Slot slot[SLOTS];
    _Atomic uint64_t early[EARLY]; // interrupted requests, by their number
} Exchange;

struct ioctl_request { struct fuse_in_header h; struct fuse_ioctl_in in; };
struct ioctl_reply { struct fuse_out_header h; struct fuse_ioctl_out out; };

static _Atomic uint64_t *early_of(Exchange *x, uint64_t unique) { return &x->early[unique / 2 % EARLY]; } // they are even

static bool covered(Exchange *x) { return atomic_load(&x->waiting) || atomic_load(&x->parked); }

// Another thread waits, and the shortcut is busy: this one reads when it is needed. True: it was parked, and still counts as that.
static bool park(Exchange *x) {
    const struct timespec period = {.tv_nsec = PARK_NS};
    int none = 0;
    if (!atomic_load(&x->waiting) || x->idle_since == atomic_load(&x->answered)) return false;
    if (!atomic_compare_exchange_strong(&x->parked, &none, PARKED)) return false;
    for (bool busy = true; busy && atomic_load(&x->parked) == PARKED;) {
        unsigned got = atomic_load(&x->got), answered = atomic_load(&x->answered);
        syscall(SYS_futex, &x->parked, FUTEX_WAIT_PRIVATE, PARKED, &period, NULL, 0);
        busy = atomic_load(&x->waiting) ? answered != atomic_load(&x->answered) : got != atomic_load(&x->got);
    }
    x->idle_since = atomic_load(&x->answered);
    return true;
}

static int serve(Exchange *x, const struct ioctl_request *r, struct ioctl_reply *reply) {
    const struct shortcut *s = x->shortcut;
    int verdict = SHORTCUT_NOT_MINE, i = 0;
    if (!s || r->h.opcode != FUSE_IOCTL || r->in.in_size || r->in.out_size || !covered(x)) return verdict;
    for (uint64_t none = 0; i < SLOTS && !atomic_compare_exchange_strong(&x->slot[i].unique, &none, 1); i++) none = 0;
    if (i == SLOTS) return verdict;
    Slot *slot = &x->slot[i];
    slot->nodeid = r->h.nodeid;
    atomic_store(&slot->unique, r->h.unique);
    atomic_fetch_add(&x->running, 1);
    if (covered(x) && atomic_load(early_of(x, r->h.unique)) != r->h.unique)
        verdict = s->serve(s->self, r->h.nodeid, r->h.pid, r->in.cmd, r->in.arg, &reply->out.result);
    atomic_fetch_sub(&x->running, 1);
    atomic_store(&slot->unique, 0);
    reply->h = (struct fuse_out_header){.len = sizeof *reply, .unique = r->h.unique};
    return verdict;
}

// The shortcut has answered one more. True: Python is to look at it.
static bool to_be_looked_at(Exchange *x) {
    unsigned answered = atomic_fetch_add_explicit(&x->answered, 1, memory_order_relaxed) + 1;
    if (answered % PACE) return false;
    uint64_t now = __builtin_ia32_rdtsc();
    x->slow = now - x->paced > SLOW ? x->slow + 1 : 0; // whatever another thread does here, it is only a hint
    x->paced = now;
    return answered % LOOK_EVERY == 0 || x->slow % (LOOK_SLOW / PACE) == 1;
}

// rseq(2), which glibc has from 2.35 on, costs a thread something at each wake-up, and only sched_getcpu() would use it here.
static void do_without_rseq(void) {
    static __thread bool done;
    if (done) return;
    done = true;
    if (&__rseq_offset && __rseq_size)
        syscall(SYS_rseq, (char *)__builtin_thread_pointer() + __rseq_offset, RSEQ_AREA, RSEQ_FLAG_UNREGISTER, RSEQ_SIG);
}

static PyObject *exchange(Exchange *x, PyObject *const *args, Py_ssize_t count) {
    Py_buffer reply = {0}, buffer = {0};
    struct ioctl_reply own = {0};
    const void *answer = NULL;
    size_t size = 0;
    int error = 0;
    ssize_t got = -1;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "exchange(reply, buffer)");
        return NULL;
    }
    if (args[0] != Py_None && PyObject_GetBuffer(args[0], &reply, PyBUF_SIMPLE)) return NULL;
    if (PyObject_GetBuffer(args[1], &buffer, PyBUF_WRITABLE)) {
        if (reply.obj) PyBuffer_Release(&reply);
        return NULL;
    }
    if (reply.obj) {
        answer = reply.buf;
        size = reply.len;
    }
    do_without_rseq();
    Py_BEGIN_ALLOW_THREADS
    for (;;) {
        if (answer && syscall(SYS_write, x->fd, answer, size) < 0 && answer != &own) { // of the shortcut's answers only nobody waiting is refused
            error = errno;
            break;
        }
        bool parked = park(x);
        atomic_fetch_add(&x->waiting, 1);
        if (parked) atomic_store(&x->parked, 0);
        do got = syscall(SYS_read, x->fd, buffer.buf, buffer.len); // read() would be a point where threads can be cancelled
        while (got < 0 && errno == EINTR);
        atomic_fetch_sub(&x->waiting, 1);
        atomic_fetch_add_explicit(&x->got, 1, memory_order_relaxed);
        if (got < (ssize_t)sizeof(struct ioctl_request)) break;
        int verdict = serve(x, buffer.buf, &own);
        if (verdict == SHORTCUT_BEGUN) got |= BEGUN;
        if (verdict != SHORTCUT_ANSWERED) break;
        answer = &own;
        size = sizeof own;
        if (to_be_looked_at(x)) {
            (void)!write(x->fd, answer, size);
            got |= LOOK;
            break;
        }
    }
    if (!error && got <= 0) error = got ? -errno : -ENODEV; // 0: a socket in the place of the kernel was closed
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    if (reply.obj) PyBuffer_Release(&reply);
    if (error > 0) return PyLong_FromLong(-error);
    if (error < 0) {
        errno = -error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(got);
}

static PyObject *interrupt(Exchange *x, PyObject *number) {
    uint64_t unique = PyLong_AsUnsignedLongLong(number);
    if (unique == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    const struct shortcut *s = x->shortcut;
    atomic_store(early_of(x, unique), unique);
    for (int i = 0; s && i < SLOTS; i++)
        if (atomic_load(&x->slot[i].unique) == unique) s->interrupt(s->self, x->slot[i].nodeid);
    Py_RETURN_NONE;
}

static PyObject *set_shortcut(Exchange *x, PyObject *address) {
    void *s = PyLong_AsVoidPtr(address);
    if (PyErr_Occurred()) return NULL;
    x->shortcut = s;
    Py_RETURN_NONE;
}

// The caller is going to block and not in the shortcut.
static PyObject *about_to_block(Exchange *x, PyObject *unused) {
    (void)unused;
    int parked = PARKED;
    if (atomic_load(&x->parked) == PARKED && atomic_compare_exchange_strong(&x->parked, &parked, WANTED))
        syscall(SYS_futex, &x->parked, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    return PyLong_FromLong(atomic_load(&x->running));
}

static PyObject *running(Exchange *x, void *closure) {
    (void)closure;
    return PyLong_FromLong(atomic_load(&x->running));
}

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int fd;
    if (keywords && PyDict_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Exchange(fd)");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "i", &fd)) return NULL;
    Exchange *x = (Exchange *)type->tp_alloc(type, 0); // zeroed
    if (x) x->fd = fd;
    return (PyObject *)x;
}

static PyMethodDef methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, NULL},
    {"about_to_block", (PyCFunction)about_to_block, METH_NOARGS, NULL},
    {"interrupt", (PyCFunction)interrupt, METH_O, NULL},
    {"set_shortcut", (PyCFunction)set_shortcut, METH_O, NULL},
    {0},
};
static PyGetSetDef attributes[] = {{"running", (getter)running, NULL, NULL, NULL}, {0}};
static PyTypeObject exchange_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "kvmfs.fuse._exchange.Exchange", .tp_basicsize = sizeof(Exchange), .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = methods, .tp_getset = attributes, .tp_new = make,
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_exchange", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__exchange(void) {
    PyObject *m = PyModule_Create(&module);
    if (m && (PyType_Ready(&exchange_type) || PyModule_AddObjectRef(m, "Exchange", (PyObject *)&exchange_type))) Py_CLEAR(m);
    return m;
}
