"""What a forked child gives up before it runs a submission: rlimits, user, privileges, Landlock, seccomp.

Standard library only: the zygote loads this file by path, apart from the package.
"""

import ctypes
import functools
import os
import resource
import signal
import struct
from os import close, getppid
from resource import RLIMIT_CPU, setrlimit

FILE_BYTES = 4 << 20
MEMORY_BYTES = 512 << 20
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP = 1, 4, 8, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_DAC_READ_SEARCH = 1 << 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR, FS_REMOVE_FILE, FS_MAKE_REG, FS_TRUNCATE = 2, 4, 8, 32, 256, 1 << 14

libc = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    """The result of a C call, or OSError with its errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def ready(option, *args):
    """prctl(2) as a call without arguments: they are made here, before the fork. Nothing where there is no prctl."""
    if not hasattr(libc, "prctl"):
        return lambda: 0
    return functools.partial(libc.prctl, option, *(ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]))


def prctl(option, *args):
    """prctl(2); raises OSError."""
    return checked(ready(option, *args)(), f"prctl {option}")


def landlock(read, write, place):
    """The call that enters a Landlock ruleset: ``read`` paths readable, ``write`` folders also writable, no more.

    The ruleset is kept as descriptor ``place``; the call closes it. Raises OSError where there is no Landlock.
    """
    abi = checked(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)), "landlock")
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    scoped = 3 if abi >= 6 else 0
    attr = struct.pack("QQQ", known, 3 if abi >= 4 else 0, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = checked(
        libc.syscall(LANDLOCK_CREATE, attr, ctypes.c_size_t(len(attr)), ctypes.c_uint(0)), "landlock_create_ruleset"
    )
    of_file = FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE
    for paths, allowed in (
        (read, FS_READ_FILE | FS_READ_DIR),
        (write, of_file | FS_READ_DIR | FS_REMOVE_FILE | FS_MAKE_REG),
    ):
        for path in paths:
            if not os.path.exists(path):
                continue
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = allowed & known if os.path.isdir(path) else allowed & known & of_file
            rule = struct.pack("=Qi", rights, fd)
            checked(libc.syscall(LANDLOCK_ADD, ruleset, ctypes.c_uint(1), rule, ctypes.c_uint(0)), f"landlock {path}")
            os.close(fd)
    os.dup2(ruleset, place)
    os.close(ruleset)
    call = functools.partial(libc.syscall, LANDLOCK_RESTRICT, place, ctypes.c_uint(0))

    def enter():
        checked(call(), "landlock_restrict_self")
        close(place)

    return enter


def change_uid(uid, read_all):
    """Become ``uid``, without a capability but, with ``read_all``, CAP_DAC_READ_SEARCH.

    That one lets a child read an interpreter that lies in root's home; Landlock keeps it to that (see start).
    """
    if read_all:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if read_all:
        version_3 = struct.pack("Ii", 0x20080522, 0)
        effective_permitted = struct.pack("6I", CAP_DAC_READ_SEARCH, CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
        checked(libc.capset(version_3, effective_permitted), "capset")
    resource.setrlimit(resource.RLIMIT_NPROC, (32, 32))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user forgets it
    prctl(PR_SET_DUMPABLE, 0)


def confine(config, limits):
    """Give up everything that a submission must not have; the last call before its code runs."""
    checked(config["die_with_zygote"](), "prctl PDEATHSIG")
    if getppid() != config["zygote"]:
        os._exit(1)
    setrlimit(RLIMIT_CPU, limits["rlimit_cpu"])
    if config["uid"]:
        change_uid(config["uid"], config["read_all"])
    if config["restrict"] is not None:
        config["restrict"]()
    if config["enter_seccomp"] is not None:
        checked(config["enter_seccomp"](), "prctl SECCOMP")


def address_space():
    """Bytes that a child may map: what it is born with and MEMORY_BYTES; no limit where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    except OSError:
        return resource.RLIM_INFINITY


def settle(config):
    """What the zygote does once for all its children, which inherit it or use it: all that is the same for each job."""
    if config["hide_memory"]:
        prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if config["no_new_privs"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if config["rlimits"]:
        limits = {resource.RLIMIT_FSIZE: FILE_BYTES, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}
        for kind, value in {**limits, resource.RLIMIT_AS: address_space()}.items():
            resource.setrlimit(kind, (value, value))
    program = bytes.fromhex(config["seccomp"])
    config["filter"] = ctypes.create_string_buffer(program, len(program) or 1)
    fields = len(program) // 8, ctypes.addressof(config["filter"])
    config["program"] = ctypes.create_string_buffer(struct.pack("HxxxxxxP", *fields))
    enter = ready(PR_SET_SECCOMP, 2, ctypes.addressof(config["program"]))
    config["enter_seccomp"] = enter if program else None
    config["die_with_zygote"] = ready(PR_SET_PDEATHSIG, signal.SIGKILL)
