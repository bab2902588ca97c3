/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The smallest libfuse server in C that answers ioctls: bench-server DIRECTORY. It has one file, "kvm", and returns as many bytes
 * as each ioctl's number asks for. What the kernel's FUSE and libfuse cost, and nothing else.
 */
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define NODE_INODE 2
#define API_VERSION 12

static int attributes(fuse_ino_t inode, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	st->st_ino = inode;
	st->st_nlink = 1;
	st->st_mode = inode == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0666;
	return inode == FUSE_ROOT_ID || inode == NODE_INODE ? 0 : ENOENT;
}

static void do_getattr(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *file)
{
	struct stat st;
	int error = attributes(inode, &st);

	(void)file;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_attr(req, &st, 1.0);
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .ino = NODE_INODE, .attr_timeout = 1.0, .entry_timeout = 1.0 };

	(void)parent;
	if (strcmp(name, "kvm")) {
		fuse_reply_err(req, ENOENT);
		return;
	}
	attributes(NODE_INODE, &entry.attr);
	fuse_reply_entry(req, &entry);
}

static void do_open(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *file)
{
	(void)inode;
	file->direct_io = 1;
	fuse_reply_open(req, file);
}

static void do_ioctl(fuse_req_t req, fuse_ino_t inode, unsigned int cmd, void *arg, struct fuse_file_info *file, unsigned int flags,
		     const void *in, size_t in_size, size_t out_size)
{
	static const char zeros[16384];

	(void)inode, (void)cmd, (void)arg, (void)file, (void)flags, (void)in, (void)in_size;
	fuse_reply_ioctl(req, API_VERSION, zeros, out_size < sizeof(zeros) ? out_size : sizeof(zeros));
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = do_lookup, .getattr = do_getattr, .open = do_open, .ioctl = do_ioctl,
};

int main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
	struct fuse_session *session;

	if (argc != 2) {
		fprintf(stderr, "usage: bench-server DIRECTORY\n");
		return 2;
	}
	fuse_opt_add_arg(&args, argv[0]);
	session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[1]))
		return 1;
	fuse_session_loop(session);
	fuse_session_unmount(session);
	fuse_session_destroy(session);
	return 0;
}
