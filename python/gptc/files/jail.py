"""A program that runs a stranger's Python program with no rights: see `sandbox`.

    python -I -S jail.py FOLDER SECONDS BYTES STATE_FD < "TOKEN\\nPROGRAM"

It takes rights away from itself, most by two means of Linux that need no rights themselves, and
that stay for good: Landlock (files) and seccomp (system calls). Where the kernel allows, it also
leaves the namespaces of users, networks and mounts. It writes "ready" to STATE_FD before the
program begins and the token after its end, or the reason why it does not begin. It imports nothing
of gptc.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from contextlib import suppress
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_FILE_BYTES, _FOLDER_BYTES = 1 << 22, 1 << 24  # the second where the folder is in memory
_FILES = 64  # open at a time

# Names of system calls that are refused, and their numbers on x86-64 and aarch64 (-1: none there).
_REFUSED = {
    "network": {"socket": (41, 198), "socketpair": (53, 199)},
    "processes": {
        "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    },
    "other processes": {
        "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
        "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117),
        "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
        "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
        "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
        "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
        "syslog": (103, 116),
    },
    "limits and namespaces": {
        "prlimit64": (302, 261), "setrlimit": (160, 164), "unshare": (272, 97), "setns": (308, 268),
    },
    "files that Landlock does not guard": {
        "truncate": (76, 45), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53),
        "fchmodat2": (452, 452), "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1),
        "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
        "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
        "setxattrat": (463, 463), "removexattrat": (466, 466), "chown": (92, -1),
        "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "file_setattr": (469, 469),
    },
    "memory that stays, or that no limit counts": {
        "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
        "memfd_create": (319, 279), "add_key": (248, 217), "request_key": (249, 218),
        "keyctl": (250, 219),
    },
    "ways around a filter": {
        "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
        "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    },
}  # fmt: skip
# The machine's place in those pairs, its AUDIT_ARCH, and the numbers of clone and capset.
_MACHINES = {
    "x86_64": (0, 0xC000003E, 56, 126),
    "aarch64": (1, 0xC00000B7, 220, 91),
}
_CLONE3 = 435
# Calls that depend on an argument: its place, the listed values, and the errors (0: allowed) of
# those and of others. An owner of a descriptor gets signals of it; ioctl changes flags of files
# that can be read, and what remains are questions about a terminal, and closing on exec.
_BY_ARGUMENT = {
    (72, 25): (1, (8, 15), errno.EPERM, 0),  # fcntl: F_SETOWN, F_SETOWN_EX
    (157, 167): (0, (1,), errno.EPERM, 0),  # prctl: PR_SET_PDEATHSIG
    (16, 29): (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), 0, errno.ENOTTY),  # ioctl
}
_READ, _WRITE = 0b1101, 0b10  # Landlock's rights of files: execute, read, list; write


class Refused(Exception):
    """The kernel lacks a means, and the program does not begin."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit(seconds: int, n_bytes: int) -> None:
    """Limits time, memory and files. Processes are refused; memory limits threads.

    A limit that is lower already stays.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1), (resource.RLIMIT_AS, n_bytes, n_bytes),
        (resource.RLIMIT_FSIZE, _FILE_BYTES, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES, _FILES), (resource.RLIMIT_CORE, 0, 0),
    ):  # fmt: skip
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def leave_namespaces(folder: str) -> None:
    """Leaves those of users, networks, messages and mounts, if the kernel allows.

    The folder is then in memory, and small.
    """
    user, group = os.geteuid(), os.getegid()
    new_user, new_net, new_ipc, new_mounts = 0x10000000, 0x40000000, 0x08000000, 0x00020000
    if _LIBC.unshare(new_user | new_net | new_ipc | new_mounts):
        return
    with suppress(OSError):
        for name, text in (
            ("setgroups", "deny"), ("gid_map", f"{group} {group} 1"),
            ("uid_map", f"{user} {user} 1"),
        ):  # fmt: skip
            Path(f"/proc/self/{name}").write_text(text)
        private, nosuid_nodev = 0x44000, 6
        if not _LIBC.mount(b"none", b"/", None, private, None):
            size = f"size={_FOLDER_BYTES}".encode()
            _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", nosuid_nodev, size)


def guard_files(folder: str) -> None:
    """Leaves the folder to write to, and Python's own files to read (Landlock)."""
    version = _checked(_LIBC.syscall(444, None, 0, 1), "Landlock")
    rights = (1 << 13) - 1 | sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5))
                                 if version >= since)  # fmt: skip
    rules = struct.pack("=QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_LIBC.syscall(444, rules, len(rules), 0), "Landlock")
    prefix = os.path.realpath(sys.base_prefix)  # other folders in it may be the user's
    own = {f"{prefix}/lib", f"{prefix}/lib64", "/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo"}
    allowed = [(folder, rights), *((path, _READ) for path in own), ("/dev/null", 0b110)]
    for path, access in allowed:
        if Path(path).exists():
            fd = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", access, fd)
            _checked(_LIBC.syscall(445, ruleset, 1, rule, 0), "Landlock")
            os.close(fd)
    _checked(_LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def refuse_calls(machine: tuple[int, int, int, int]) -> None:
    """Refuses system calls (seccomp): network, new processes, and ways around other limits."""
    place, arch, clone, _ = machine
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000

    def step(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_so, if_not, value)

    program = [step(load, 4), step(equal, arch, 1), step(give, kill), step(load, 0)]
    program += [step(at_least, 0x40000000, 0, 1), step(give, error | errno.EPERM)]  # x32
    program += [step(equal, _CLONE3, 0, 1), step(give, error | errno.ENOSYS)]  # clone is then used
    for calls in _REFUSED.values():
        for numbers in calls.values():
            if numbers[place] >= 0:
                program += [step(equal, numbers[place], 0, 1), step(give, error | errno.EPERM)]
    for call, (argument, listed, if_listed, otherwise) in _BY_ARGUMENT.items():
        n = len(listed)
        body = [step(load, 16 + 8 * argument)]
        body += [step(equal, value, n - i) for i, value in enumerate(listed)]
        body += [step(give, error | no if no else allow) for no in (otherwise, if_listed)]
        program += [step(equal, call[place], 0, len(body)), *body]
    # A clone is a thread, or a process.
    program += [step(equal, clone, 0, 3), step(load, 16), step(any_bit, 0x10000, 1)]
    program += [step(give, error | errno.EPERM), step(give, allow)]
    code = ctypes.create_string_buffer(b"".join(program))
    filters = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    _checked(_LIBC.prctl(22, 2, filters, 0, 0), "seccomp")


def close_up(folder: str, seconds: int, n_bytes: int) -> None:
    """Takes away all rights, and ends with the parent. Refused where the kernel lacks a means."""
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        raise Refused("it is for Linux on x86-64 and aarch64")
    leave_namespaces(folder)
    os.chdir(folder)
    _checked(_LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    guard_files(folder)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _checked(_LIBC.syscall(machine[3], header, none), "capabilities")
    _checked(_LIBC.prctl(1, 9, 0, 0, 0), "SIGKILL with the parent")
    limit(seconds, n_bytes)
    refuse_calls(machine)


def main() -> None:
    """Runs the program of the standard input."""
    folder, seconds, n_bytes, state = sys.argv[1], *map(int, sys.argv[2:5])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    os.dup2(state, 3)
    os.closerange(4, 256)
    sys.argv[:] = [""]
    os.environ.clear()
    try:
        close_up(folder, seconds, n_bytes)
    except (Refused, OSError) as reason:
        os.write(3, str(reason).encode())
        os._exit(0)
    os.write(3, b"ready\n")
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:
        os._exit(1)
    os.write(3, token)
    os._exit(0)


if __name__ == "__main__":
    main()
