"""The kernel's means of confinement through ctypes: namespaces, mounts, Landlock, capabilities, limits. Standard library only.

Each function does one thing to the calling process and raises OSError naming it when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Mapping, Sequence
from functools import cache

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
KEPT_FLAGS = {
    2: 2,
    4: 4,
    8: 8,
    1024: 1024,
    2048: 2048,
    4096: 1 << 21,
}  # statvfs' ST_* to mount's MS_*: locked ones must be repeated
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION = 0x20080522
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
READ_RIGHTS = 0b1101  # execute, read file, read directory
NOBODY = 65534
INNER_ID = 1000  # who the program is inside


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def checked(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int, what: str) -> None:
    checked(f"a new {what} namespace", libc().unshare(flags))


def become_nobody() -> None:
    """Root gives up its user and groups for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else our own /proc files would belong to root


def new_user(proc: int) -> None:
    """A new user namespace where this process is INNER_ID and nobody else exists. `proc`: a descriptor of /proc."""
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER, "user")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_ID} {user} 1"),
        ("gid_map", f"{INNER_ID} {group} 1"),
    ):
        with open(os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc), "w") as stream:
            stream.write(text)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    checked(
        f"mount {source or kind or flags} on {target}",
        libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]),
    )


def bind_read_only(source: str, target: str) -> None:
    """The tree at `source`, read-only at `target`."""
    mount(source, target, None, MS_BIND | MS_REC)
    there = os.statvfs(target).f_flag
    kept = sum(ms for st, ms in KEPT_FLAGS.items() if there & st)
    devices = 0 if source.startswith("/dev/") else MS_NODEV
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | devices | kept)


def make_root(root: str, readable: Sequence[str], scratch: str) -> None:
    """Makes `root` an empty read-only file system with the readable trees, four devices and the scratch folder, and moves into it."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in readable:
        place = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(os.readlink(path), place)
        else:
            os.makedirs(place, exist_ok=True)
            bind_read_only(path, place)
    os.makedirs(root + "/dev", exist_ok=True)
    for name in ("null", "zero", "random", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        bind_read_only(f"/dev/{name}", f"{root}/dev/{name}")
    os.makedirs(root + scratch, exist_ok=True)
    os.chdir(root)
    checked("pivot_root", libc().syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    checked("unmounting the old root", libc().umount2(b".", MNT_DETACH))
    os.chdir("/")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def mount_scratch(path: str, size: int) -> None:
    """An empty folder in memory, for one program."""
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={size},nr_inodes=1024,mode=700")


def unmount(path: str) -> None:
    checked(f"unmounting {path}", libc().umount2(os.fsencode(path), MNT_DETACH))


def die_with_parent() -> None:
    libc().prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def drop_capabilities() -> None:
    """No capability is left, and none can come back."""
    library = libc()
    checked("no_new_privs", library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    library.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        library.prctl(
            PR_CAPBSET_DROP, capability, 0, 0, 0
        )  # past the last one, or without the right to: the next line decides
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)
    checked("dropping capabilities", library.capset(header, nothing))


def landlock_version() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    return max(0, libc().syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def landlock(read: Sequence[str], write: Sequence[str]) -> None:
    """Only these trees may be read, and only those written to; where the kernel can, no TCP, no signals and no sockets to outside.

    Raises OSError without Landlock. Needs no_new_privs or CAP_SYS_ADMIN.
    """
    version = landlock_version()
    if version < 1:
        raise OSError("this kernel has no Landlock")
    rights = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        rights |= (version >= since) << bit
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    library = libc()
    ruleset = checked("landlock", library.syscall(SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0))
    for paths, allowed in ((read, READ_RIGHTS), (write, rights)):
        for path in paths:
            if not os.path.exists(path):
                continue
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            mask = allowed if os.path.isdir(path) else allowed & (0b111 | 1 << 14 | 1 << 15)
            rule = struct.pack("=Qi", mask, place)
            checked(f"landlock rule for {path}", library.syscall(SYS_LANDLOCK_ADD, ruleset, 1, rule, 0))
            os.close(place)
    checked("landlock", library.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def set_limits(limits: Mapping[str, int]) -> None:
    """rlimits by their lower-case names, soft and hard."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
