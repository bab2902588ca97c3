// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The smallest FUSE server in C that could answer for a KVM node: libfuse's low-level interface, one thread, its own
 * mount, and answers of the right size without anything behind them. It is what a FUSE ioctl costs at least.
 * Usage: bench-server DIRECTORY; the node is DIRECTORY/kvm. Ends with SIGTERM.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/kvm.h>

enum { NODE_INODE = 2, MAX_MSRS = 256 };

static const char node_name[] = "kvm";

static int attributes(fuse_ino_t inode, struct stat *st)
{
	*st = (struct stat){ .st_ino = inode, .st_nlink = 1 };
	if (inode == FUSE_ROOT_ID)
		st->st_mode = S_IFDIR | 0755;
	else if (inode == NODE_INODE)
		st->st_mode = S_IFREG | 0600;
	else
		return -ENOENT;
	return 0;
}

static void do_getattr(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *file)
{
	struct stat st;

	(void)file;
	if (attributes(inode, &st))
		fuse_reply_err(req, ENOENT);
	else
		fuse_reply_attr(req, &st, 1);
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .ino = NODE_INODE, .attr_timeout = 1, .entry_timeout = 1 };

	if (parent != FUSE_ROOT_ID || strcmp(name, node_name)) {
		fuse_reply_err(req, ENOENT);
		return;
	}
	attributes(entry.ino, &entry.attr);
	fuse_reply_entry(req, &entry);
}

static void do_open(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *file)
{
	(void)inode;
	file->direct_io = 1;
	fuse_reply_open(req, file);
}

/* The entries stand behind the header, which is all that the kernel brings. */
static void set_msrs(fuse_req_t req, const struct kvm_msrs *header, uintptr_t argument)
{
	static struct kvm_msr_entry entries[MAX_MSRS];
	size_t size = header->nmsrs * sizeof(entries[0]);
	struct iovec local = { entries, size };
	struct iovec remote = { (void *)(argument + sizeof(*header)), size };

	if (header->nmsrs >= MAX_MSRS)
		fuse_reply_err(req, E2BIG);
	else if (process_vm_readv(fuse_req_ctx(req)->pid, &local, 1, &remote, 1, 0) != (ssize_t)size)
		fuse_reply_err(req, EFAULT);
	else
		fuse_reply_ioctl(req, (int)header->nmsrs, NULL, 0);
}

static void do_ioctl(fuse_req_t req, fuse_ino_t inode, unsigned int command, void *argument, struct fuse_file_info *file,
		     unsigned int flags, const void *in, size_t in_size, size_t out_size)
{
	static const struct kvm_regs regs;
	static const struct kvm_sregs sregs;

	(void)inode, (void)file, (void)flags, (void)out_size;
	switch (command) {
	case KVM_GET_API_VERSION:
		fuse_reply_ioctl(req, KVM_API_VERSION, NULL, 0);
		break;
	case KVM_CHECK_EXTENSION:
		fuse_reply_ioctl(req, (uintptr_t)argument == KVM_CAP_USER_MEMORY, NULL, 0);
		break;
	case KVM_GET_REGS:
		fuse_reply_ioctl(req, 0, &regs, sizeof(regs));
		break;
	case KVM_GET_SREGS:
		fuse_reply_ioctl(req, 0, &sregs, sizeof(sregs));
		break;
	case KVM_SET_MSRS:
		if (in_size == sizeof(struct kvm_msrs))
			set_msrs(req, in, (uintptr_t)argument);
		else
			fuse_reply_err(req, EINVAL);
		break;
	default:
		fuse_reply_err(req, ENOTTY);
	}
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = do_lookup, .getattr = do_getattr, .open = do_open, .ioctl = do_ioctl,
};

int main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
	struct fuse_session *session;
	int failed;

	if (argc != 2) {
		fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
		return 2;
	}
	fuse_opt_add_arg(&args, argv[0]);
	fuse_opt_add_arg(&args, "-osubtype=kvmbench,fsname=kvmbench");
	session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[1]))
		return 1;
	printf("ready\n");
	fflush(stdout);
	failed = fuse_session_loop(session) < 0;
	fuse_session_unmount(session);
	fuse_session_destroy(session);
	fuse_opt_free_args(&args);
	return failed;
}
