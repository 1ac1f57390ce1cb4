"""The system calls that a sandboxed program may make, as a BPF filter written by hand (seccomp(2), Linux's `filter.h`).

Everything that is not on the list fails with EPERM: sockets, exec, fork, mounts, ptrace, other processes' memory, keys, namespaces, ... A
call by another machine's convention (32-bit, x32) kills the process. Standard library only: it runs inside the sandbox.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from functools import cache

# name:x86_64:aarch64 ("-": the machine has no such call), from asm/unistd_64.h and asm-generic/unistd.h
ALLOWED = """
read:0:63 write:1:64 close:3:57 fstat:5:80 lseek:8:62 mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 restart_syscall:219:128 pread64:17:67 pwrite64:18:68 readv:19:65
writev:20:66 preadv:295:69 pwritev:296:70 select:23:- poll:7:- pselect6:270:72 ppoll:271:73 pipe:22:-
pipe2:293:59 mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33:- dup3:292:24 pause:34:-
nanosleep:35:101 getitimer:36:102 setitimer:38:103 alarm:37:- getpid:39:172 getppid:110:173 gettid:186:178
sched_yield:24:124 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210
getsockname:51:204 getpeername:52:205 getsockopt:55:209 setsockopt:54:208 exit:60:93 exit_group:231:94
wait4:61:260 waitid:247:95 uname:63:160 flock:73:32 fsync:74:82 fdatasync:75:83
ftruncate:77:46 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276
rmdir:84:- unlink:87:- unlinkat:263:35 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
readlink:89:- readlinkat:267:78 access:21:-
faccessat:269:48 faccessat2:439:439 stat:4:- lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43
fstatfs:138:44 getdents64:217:61 open:2:- openat:257:56 creat:85:- getrlimit:97:163
getrusage:98:165 sysinfo:99:179 times:100:153 gettimeofday:96:169 clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 time:201:- getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgid:121:155 getpgrp:111:- getsid:124:156
arch_prctl:158:- set_tid_address:218:96 set_robust_list:273:99 futex:202:98 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
getrandom:318:278 rseq:334:293 epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87 copy_file_range:326:285
fallocate:285:47 close_range:436:436 membarrier:324:283 getcpu:309:168 fadvise64:221:223
"""
GUARDED = """
clone:56:220 socketpair:53:199 ioctl:16:29 prctl:157:167 kill:62:129 tgkill:234:131 prlimit64:302:261
clone3:435:435 execve:59:221 fork:57:- vfork:58:- setsid:112:157 setpgid:109:154 fcntl:72:25 mkdir:83:- mkdirat:258:34
truncate:76:45 chmod:90:- fchmod:91:52 fchmodat:268:53 umask:95:166 utimensat:280:88
"""
UNSEEN = (
    "truncate",
    "chmod",
    "fchmod",
    "fchmodat",
    "umask",
    "utimensat",
)  # what Landlock, or an early one, does not look at
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the table, AUDIT_ARCH_*
LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = (
    0x20,
    0x54,
    0x15,
    0x35,
    0x45,
    0x06,
)  # BPF operations on 32-bit words
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each, little-endian on both machines
X32_BIT = 0x40000000
CLONE_THREAD = 0x10000
CLONE_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
AF_UNIX = 1
PAIRS = tuple(
    kind | flags for kind in (1, 5) for flags in (0, 0x800, 0x80000, 0x80800)
)  # stream, seqpacket; NONBLOCK, CLOEXEC
SIGNALLING = (8, 10, 15)  # fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX: the kernel would send a signal in our name
OWNER_BITS = 0o700
TERMINAL_QUERIES = (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)  # TCGETS, FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
NAMES = (15, 16)  # prctl's PR_SET_NAME, PR_GET_NAME
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

Rule = list[tuple[int, int, int, int]]  # BPF instructions: operation, jump if true, jump if false, operand


@cache
def numbers(table: str) -> dict[str, int]:
    """The table's calls on this machine. Raises OSError on a machine that the table does not know."""
    if platform.machine() not in MACHINES:
        raise OSError(f"no system call table for {platform.machine()}, only for {', '.join(MACHINES)}")
    column = MACHINES[platform.machine()][0]
    rows = [entry.split(":") for entry in table.split()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def one_of(argument: int, values: tuple[int, ...]) -> Rule:
    """Allows the call where the argument's low word is one of the values, EPERM elsewhere."""
    tests = [(JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGS + 8 * argument), *tests, (RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW)]


def none_of(argument: int, values: tuple[int, ...]) -> Rule:
    """EPERM where the argument's low word is one of the values, allows the call elsewhere."""
    tests = [(JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGS + 8 * argument), *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)]


def listable(argument: int) -> Rule:
    """Allows to make a folder that its owner can list: others would hide files from whoever sums them up."""
    mode = (LOAD, 0, 0, ARGS + 8 * argument)
    return [
        mode,
        (AND, 0, 0, OWNER_BITS),
        (JUMP_EQUAL, 1, 0, OWNER_BITS),
        (RETURN, 0, 0, ERRNO | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]


def guarded(processes: bool, only_self: bool) -> dict[str, Rule]:
    """The rules of the calls whose arguments decide. Absent calls are refused."""
    flags = (LOAD, 0, 0, ARGS)
    no_namespaces = [flags, (JUMP_ANY_BIT, 0, 1, CLONE_NAMESPACES), (RETURN, 0, 0, ERRNO | EPERM)]
    threads_only = [(JUMP_ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, ERRNO | EPERM)]
    mine = one_of(0, (os.getpid(),)) if only_self else [(RETURN, 0, 0, ALLOW)]
    rules: dict[str, Rule] = {
        "clone": [*no_namespaces, *([] if processes else threads_only), (RETURN, 0, 0, ALLOW)],
        "clone3": [
            (RETURN, 0, 0, ERRNO | ENOSYS)
        ],  # its flags lie in memory, out of a filter's reach: glibc then uses clone
        "socketpair": [*one_of(0, (AF_UNIX,))[:-1], *one_of(1, PAIRS)],  # a datagram socket could send to any address
        "fcntl": none_of(1, SIGNALLING),
        "ioctl": one_of(1, TERMINAL_QUERIES),
        "prctl": one_of(0, NAMES),
        "kill": mine,
        "tgkill": mine,
        "prlimit64": one_of(0, (0, os.getpid())),
    }
    if only_self:
        rules |= {"mkdir": listable(1), "mkdirat": listable(2)}
    else:
        rules |= {name: [(RETURN, 0, 0, ALLOW)] for name in ("mkdir", "mkdirat", *UNSEEN)}
    if processes:
        rules |= {name: [(RETURN, 0, 0, ALLOW)] for name in ("execve", "fork", "vfork", "setsid", "setpgid")}
    return rules


def make_filter(processes: bool, only_self: bool) -> list[tuple[int, int, int, int]]:
    """The BPF program. `processes`: fork and exec are allowed; `only_self`: no namespaces stand between the program and other
    processes and files, so signals, modes and times are refused here."""
    architecture = MACHINES[platform.machine()][1] if platform.machine() in MACHINES else 0
    program: Rule = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NR),
    ]
    if platform.machine() == "x86_64":
        program += [(JUMP_AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]
    for number in numbers(ALLOWED).values():
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    special = numbers(GUARDED)
    for name, rule in guarded(processes, only_self).items():
        if name in special:
            program += [(JUMP_EQUAL, 0, len(rule), special[name]), *rule]
    return [*program, (RETURN, 0, 0, ERRNO | EPERM)]


def install(processes: bool = False, only_self: bool = False) -> None:
    """Puts this thread, and all that it starts, under the filter for good. Needs no_new_privs. Raises OSError."""
    program = make_filter(processes, only_self)
    instructions = b"".join(struct.pack("HBBI", code, true, false, k) for code, true, false, k in program)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
