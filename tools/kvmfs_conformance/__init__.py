# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance suite: does a node answer every ioctl as KVM on x86 does?

It is written against Linux's Documentation/virt/kvm/api.rst and the kernel's source (6.12), speaks plain ioctl(2), and
runs on any node.  ``kvmfs conformance`` is its command.
"""
