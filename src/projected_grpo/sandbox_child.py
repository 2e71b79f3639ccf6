"""The zygote: a small process, started once a worker, that forks one confined child a job.

Standard library only, run as ``python -P -s -S -B sandbox_child.py <socket descriptor>``. It never reads a job's
payload or reply: these travel in memory files that the trainer makes and the child alone opens, so no child finds
the answers of an earlier one in the memory that it inherits.

Messages are lines of JSON. Down: the configuration, once; then a job's limits, with three descriptors: payload,
stdout, reply. Up: what came of it, with the result file's descriptor where there is one.
"""

import ctypes
import gc
import importlib
import importlib.util
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

TICK_S = 0.1
SCRATCH_BYTES = 32 << 20
SCRATCH_FILES = 500
FILE_BYTES = 4 << 20
MEMORY_BYTES = 512 << 20
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR, FS_REMOVE_FILE, FS_MAKE_REG, FS_TRUNCATE = 2, 4, 8, 32, 256, 1 << 14

libc = ctypes.CDLL(None, use_errno=True)


def receive(connection, max_fds=3):
    """(the next line, descriptors that came with it) from a stream socket; (b"", []) when the other side is gone."""
    data, fds = b"", []
    while not data.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, 1 << 20, max_fds)
        if not part:
            return b"", fds
        data, fds = data + part, fds + more
    return data, fds


def checked(result, what):
    """The result of a C call, or OSError with its errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option, *args):
    """prctl(2); raises OSError. Nothing where there is no such call."""
    if not hasattr(libc, "prctl"):
        return 0
    return checked(libc.prctl(option, *(ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4])), f"prctl {option}")


def landlock_ruleset(read, write):
    """Descriptor of a Landlock ruleset: ``read`` paths readable, ``write`` folders also writable, all else refused."""
    abi = checked(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)), "landlock")
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    scoped = 3 if abi >= 6 else 0
    attr = struct.pack("QQQ", known, 3 if abi >= 4 else 0, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = checked(
        libc.syscall(LANDLOCK_CREATE, attr, ctypes.c_size_t(len(attr)), ctypes.c_uint(0)), "landlock_create_ruleset"
    )
    os.set_inheritable(ruleset, True)
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
    return ruleset


def limit_resources(config, cpu_s):
    """Hard limits of one child: CPU seconds always, the rest where that layer is wanted."""
    limits = [(resource.RLIMIT_CPU, math.ceil(cpu_s))]
    if config["rlimits"]:
        limits += [(resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)]
    if config["rlimits"] and config["address_space"]:
        limits += [(resource.RLIMIT_AS, config["address_space"])]
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


def confine(config, ruleset, limits):
    """Give up everything that a submission must not have; the last call before its code runs."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config["zygote"]:
        os._exit(1)
    limit_resources(config, limits["cpu_s"])
    if config["uid"]:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
        resource.setrlimit(resource.RLIMIT_NPROC, (32, 32))
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)
    if config["no_new_privs"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        checked(libc.syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0)), "landlock_restrict_self")
        os.close(ruleset)
    if config["seccomp"]:
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(config["program"]))


def child(config, ruleset, limits, fds, harness):
    """Become the process of one job; does not return."""
    payload, stdout, reply = fds
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    keep = ruleset if ruleset is not None else -1
    first = max(*fds, null, keep, 9) + 1
    moved = [os.dup2(fd, first + i) for i, fd in enumerate((null, stdout, null, reply, payload))]
    kept = os.dup2(keep, first + 5) if keep >= 0 else None
    for target, fd in enumerate(moved):
        os.dup2(fd, target)
    if kept is not None:
        ruleset = os.dup2(kept, 5)
    os.closerange(5 if ruleset is None else 6, first + 16)
    os.chdir(config["scratch"])
    os.umask(0o077)
    confine(config, ruleset, limits)
    with open(4, "rb") as file:
        data = file.read()
    gc.enable()
    harness.main(data)


def address_space():
    """Bytes that a child may map: what it is born with and MEMORY_BYTES. 0 where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    except OSError:
        return 0


def scratch_is_full(path):
    """Whether a running child has filled its folder past the limit."""
    total = count = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                count += 1
                if total > SCRATCH_BYTES or count > SCRATCH_FILES:
                    return True
    except OSError:
        pass
    return False


def clean(path):
    """Empty a folder of any depth without recursion: a nested folder's entries are moved up, then it is removed."""
    serial = 0
    while names := os.listdir(path):
        for name in names:
            here = os.path.join(path, name)
            if not os.path.isdir(here) or os.path.islink(here):
                os.unlink(here)
                continue
            os.chmod(here, 0o700)
            for inner in os.listdir(here):
                serial += 1
                os.rename(os.path.join(here, inner), os.path.join(path, f"{time.monotonic_ns()}-{serial}"))
            os.rmdir(here)


def waited_for_cpu(pid):
    """Seconds that the process stood in the run queue (0 where the kernel does not say)."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def kill_stragglers():
    """End and reap every process that still descends from this one."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            try:
                with open("/proc/thread-self/children") as file:
                    for left in file.read().split():
                        os.kill(int(left), signal.SIGKILL)
            except OSError:
                return
            time.sleep(0.001)


def wait_a_tick(pid, pidfd, control):
    """Wait TICK_S at most for a child; (status, usage) if it ended, "orphan" if the trainer is gone, else None."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    if pidfd is not None:
        poller.register(pidfd, select.POLLIN)
    ready = [fd for fd, _ in poller.poll(TICK_S * 1000 if pidfd is not None else 2)]
    if control.fileno() in ready:
        return "orphan"
    found, status, usage = os.wait4(pid, os.WNOHANG)
    return (status, usage) if found else None


def watch(pid, limits, scratch, control):
    """Wait for a child; (why it was ended or "", wait status, CPU seconds). Exits if the trainer is gone."""
    start, reason, ended = time.monotonic(), "", None
    pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    while not reason and not ended:
        ended = wait_a_tick(pid, pidfd, control)
        if ended == "orphan":
            reason, ended = "orphan", None
        elif not ended and scratch_is_full(scratch):
            reason = "disk"
        elif not ended and (elapsed := time.monotonic() - start) > limits["wall_s"]:
            starved = min(waited_for_cpu(pid), 10 * limits["wall_s"])
            reason = "wall" if elapsed - starved > limits["wall_s"] else ""
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, *ended = os.wait4(pid, 0)
    if pidfd is not None:
        os.close(pidfd)
    kill_stragglers()
    if reason == "orphan":
        goodbye(scratch)
    status, usage = ended
    return reason, status, usage.ru_utime + usage.ru_stime


def goodbye(scratch):
    """The trainer closed the socket or died: leave nothing behind."""
    try:
        clean(scratch)
        os.rmdir(scratch)
    except OSError:
        pass
    os._exit(0)


def open_result(scratch, name):
    """Descriptor of the result file, or None; never follows a link nor waits for a FIFO's writer."""
    try:
        return os.open(os.path.join(scratch, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None


def serve(control, config, ruleset, harness):
    """Fork, watch and answer until the trainer closes the socket."""
    scratch = config["scratch"]
    while True:
        message, fds = receive(control)
        if not message:
            goodbye(scratch)
        limits = json.loads(message)
        pid = os.fork()
        if pid == 0:
            child(config, ruleset, limits, fds, harness)
        for fd in fds:
            os.close(fd)
        reason, status, cpu_s = watch(pid, limits, scratch, control)
        result = open_result(scratch, limits["file"]) if limits["file"] else None
        reply = json.dumps({"reason": reason, "status": status, "cpu_s": cpu_s}).encode() + b"\n"
        socket.send_fds(control, [reply], [] if result is None else [result])
        if result is not None:
            os.close(result)
        clean(scratch)


def start(control):
    """Read the configuration, take on what lasts for life, import what submissions use; (config, ruleset, harness)."""
    config = json.loads(receive(control)[0])
    if config["hide_memory"]:
        prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config["zygote"] = os.getpid()
    ruleset, note = None, ""
    if config["landlock"]:
        try:
            ruleset = landlock_ruleset(config["landlock"], [config["scratch"], "/dev/null"])
        except OSError as error:
            note = str(error)
    program = bytes.fromhex(config["seccomp"])
    config["filter"] = ctypes.create_string_buffer(program, len(program) or 1)
    config["program"] = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(config["filter"]))
    )
    spec = importlib.util.spec_from_file_location("harness", config["harness"])
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    for name in config["preload"]:
        importlib.import_module(name)
    config["address_space"] = address_space()
    os.chdir(config["scratch"])
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"pid": os.getpid(), "landlock": note}).encode() + b"\n")
    return config, ruleset, harness


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    serve(channel, *start(channel))
