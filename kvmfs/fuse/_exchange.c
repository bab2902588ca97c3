// SPDX-License-Identifier: GPL-2.0-or-later
// An answer to FUSE and the wait for the next request as one call. Between os.write and os.readv a reader would take Python's
// lock only to give it away again; as the answer wakes the client, which often runs at once on the same CPU, the reader then meets the next
// one that has the lock, and both pay for two more changes of threads.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <unistd.h>

static PyObject *exchange(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    Py_buffer reply = {0}, buffer = {0};
    int fd, error = 0;
    ssize_t got = -1;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "exchange(fd, reply, buffer)");
        return NULL;
    }
    fd = (int)PyLong_AsLong(args[0]);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    if (args[1] != Py_None && PyObject_GetBuffer(args[1], &reply, PyBUF_SIMPLE)) return NULL;
    if (PyObject_GetBuffer(args[2], &buffer, PyBUF_WRITABLE)) {
        if (reply.obj) PyBuffer_Release(&reply);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    if (reply.obj && write(fd, reply.buf, reply.len) < 0) error = errno;
    if (!error) {
        do got = read(fd, buffer.buf, buffer.len);
        while (got < 0 && errno == EINTR);
    }
    if (!error && got < 0) error = -errno;
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

static PyMethodDef methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, NULL},
    {0},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_exchange", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__exchange(void) { return PyModule_Create(&module); }
