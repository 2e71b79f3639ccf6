"""The zygote: a small process, started once a worker, that forks one confined child a job.

Standard library only, run as ``python -P -s -S -B child.py <socket descriptor>``. It never reads a job's
payload or reply: these travel in memory files that the trainer makes and the child alone opens, so no child finds
the answers of an earlier one in the memory that it inherits.

Messages are lines of JSON. Down: the configuration, once; then a job's limits, with three descriptors: payload,
stdout, reply. Up: what came of it, with the result file's descriptor where there is one.

What a child does before it runs the submission costs as much as many a submission: every page that it touches, and a
reference count is enough for that, is copied first. So the zygote prepares all that is the same for each job, and the
child's few calls are names of this module, which touch less than attributes do.
"""

import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import time
from _thread import stack_size
from os import closerange, dup2, pread, setsid

STDOUT, REPLY, RULESET, CONTROL = 1, 3, 4, 5
TICK_S = 0.1
SCRATCH_BYTES = 32 << 20
SCRATCH_FILES = 500
MAX_PREPARED = 64
MAX_DESCRIPTOR = 4096
THREAD_STACK = 8 << 20


def receive(connection, max_fds=3):
    """(the next line, descriptors that came with it) from a stream socket; (b"", []) when the other side is gone."""
    data, fds = b"", []
    while not data.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, 1 << 20, max_fds)
        if not part:
            return b"", fds
        data, fds = data + part, fds + more
    return data, fds


def take_places(number):
    """The socket with the trainer, moved to CONTROL; /dev/null on all below it but stderr, which may have to speak."""
    if number != CONTROL:
        dup2(number, CONTROL)
        os.close(number)
    null = os.open(os.devnull, os.O_RDWR)
    for place in (0, STDOUT, REPLY, RULESET):
        if place != null:
            dup2(null, place)
    if null > CONTROL:
        os.close(null)
    return socket.socket(fileno=CONTROL)


def child(config, limits, fds, prepared):
    """Become the process of one job; does not return. It starts in the scratch folder, with /dev/null on 0 and 2."""
    payload, stdout, reply = fds
    setsid()
    data = pread(payload, limits["size"], 0)
    dup2(stdout, STDOUT)
    dup2(reply, REPLY)
    closerange(RULESET if config["restrict"] is None else CONTROL, MAX_DESCRIPTOR)
    config["confine"](config, limits)
    config["main"](data, prepared)


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


def cpu_taken(pid):
    """CPU seconds of a process so far, by its own clock; 0 where the system does not tell (the rlimit is left then)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), as Linux computes it
    except (OSError, OverflowError, ValueError):
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


def wait_a_tick(pid, pidfd, poller):
    """Wait TICK_S at most for a child; (status, usage) if it ended, "orphan" if the trainer is gone, else None."""
    for ready, _ in poller.poll(TICK_S * 1000 if pidfd is not None else 2):
        if ready == CONTROL:
            return "orphan"
    found, status, usage = os.wait4(pid, os.WNOHANG)
    return (status, usage) if found else None


def watch(pid, limits, scratch):
    """Wait for a child; (why it was ended or "", wait status, CPU seconds). Exits if the trainer is gone."""
    start, reason, ended = time.monotonic(), "", None
    pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    poller = select.poll()
    poller.register(CONTROL, select.POLLIN)
    if pidfd is not None:
        poller.register(pidfd, select.POLLIN)
    while not reason and not ended:
        ended = wait_a_tick(pid, pidfd, poller)
        if ended == "orphan":
            reason, ended = "orphan", None
        elif not ended and cpu_taken(pid) > limits["cpu_s"]:
            reason = "cpu"
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


def serve(control, config):
    """Fork, watch and answer until the trainer closes the socket."""
    scratch, prepared = config["scratch"], {"": None}
    while True:
        message, fds = receive(control)
        if not message:
            goodbye(scratch)
        limits = json.loads(message)
        if limits["setup"] not in prepared:
            prepared = dict(list(prepared.items())[-MAX_PREPARED:])
            prepared[limits["setup"]] = config["prepare"](limits["setup"])
            gc.freeze()
        pid = os.fork()
        if pid == 0:
            child(config, limits, fds, prepared[limits["setup"]])
        for fd in fds:
            os.close(fd)
        reason, status, cpu_s = watch(pid, limits, scratch)
        result = open_result(scratch, limits["file"]) if limits["file"] else None
        reply = json.dumps({"reason": reason, "status": status, "cpu_s": cpu_s}).encode() + b"\n"
        socket.send_fds(control, [reply], [] if result is None else [result])
        if result is not None:
            os.close(result)
        clean(scratch)


class Offered:
    """Finds packages outside the standard library for a submission that imports them, and no other."""

    def __init__(self, folders):
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        """The package's spec, made without listing the folder that it lies in, which holds much else."""
        if name not in self.folders:
            return None
        folder = self.folders[name]
        start = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, start, submodule_search_locations=[folder])


def load(path):
    """A module from its file, kept out of sys.modules, where a submission would find it."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preload(names):
    """Import what submissions use, without what random and threading would do in every child after the fork.

    This process has one thread, and each child seeds random itself; so there is nothing for them to repair.
    """
    register, os.register_at_fork = os.register_at_fork, lambda **hooks: None
    for name in names:
        importlib.import_module(name)
    os.register_at_fork = register


def start(control):
    """Read the configuration, take on what lasts for life, import what submissions use; what serve and child need."""
    config = json.loads(receive(control)[0])
    config["zygote"] = os.getpid()
    preload(config["preload"])
    sys.meta_path.append(Offered(config["offered"]))
    stack_size(THREAD_STACK)
    confine, harness = load(config["confine"]), load(config["harness"])
    harness.make_ready()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    confine.settle(config)
    restrict, note = None, ""
    if config["landlock"]:
        try:
            restrict = confine.landlock(config["landlock"], [config["scratch"], "/dev/null"], RULESET)
        except OSError as error:
            note = str(error)
    if restrict is None and config["read_all"]:
        config["uid"] = 0
    config |= {"restrict": restrict, "confine": confine.confine, "prepare": harness.prepare, "main": harness.main}
    os.chdir(config["scratch"])
    os.umask(0o077)
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"pid": os.getpid(), "landlock": note}).encode() + b"\n")
    dup2(0, 2)
    return config


if __name__ == "__main__":
    channel = take_places(int(sys.argv[1]))
    serve(channel, start(channel))
