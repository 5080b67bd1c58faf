"""A seccomp filter for the sandbox: no tracing, no new namespaces, no mounts, no exotic kernel interfaces.

Classic BPF as bubblewrap's --seccomp reads it. Refused calls return EPERM; clone3 returns ENOSYS, so that
libc falls back to clone, whose flags can be inspected.
"""

from __future__ import annotations

import os
import platform
import struct

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
X32 = 0x40000000

# name -> (x86_64, aarch64); the same number on both from 424 on
CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
}
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def supported() -> bool:
    return platform.machine() in ARCHITECTURES


def program() -> bytes:
    """The filter for this machine. Raises KeyError on an architecture that supported() denies."""
    column, audit = ARCHITECTURES[platform.machine()]
    code = [
        _op(LOAD, 4),  # seccomp_data.arch
        _op(JUMP_EQUAL, audit, 1, 0),
        _op(RETURN, KILL),
        _op(LOAD, 0),  # seccomp_data.nr
        _op(JUMP_GREATER_EQUAL, X32, 0, 1),
        _op(RETURN, ERRNO | ENOSYS),
        _op(JUMP_EQUAL, CLONE3[column], 0, 1),
        _op(RETURN, ERRNO | ENOSYS),
    ]
    for numbers in CALLS.values():
        code += [_op(JUMP_EQUAL, numbers[column], 0, 1), _op(RETURN, ERRNO | EPERM)]
    code += [
        _op(JUMP_EQUAL, CLONE[column], 0, 3),
        _op(LOAD, 16),  # low half of the first argument: clone's flags
        _op(JUMP_SET, NEW_NAMESPACES, 0, 1),
        _op(RETURN, ERRNO | EPERM),
        _op(RETURN, ALLOW),
    ]
    return b"".join(code)


def descriptor() -> int:
    """A memory file with the filter, for bubblewrap to read; the caller closes it."""
    number = os.memfd_create("seccomp")
    os.write(number, program())
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)
