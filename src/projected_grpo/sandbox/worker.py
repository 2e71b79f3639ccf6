"""One worker of the sandbox: a zygote process (child), its socket, and a job's way there and back."""

import contextlib
import fcntl
import glob
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from projected_grpo.sandbox import layers
from projected_grpo.sandbox.child import receive
from projected_grpo.sandbox.harness import COMPILED, MAX_RESULT
from projected_grpo.sandbox.job import Job, Outcome, outcome_of, payload_of

GRACE_S = 30.0
MAX_FILE = 65_536
# LD_BIND_NOW: the zygote resolves its symbols once, instead of each child for itself
# one thread for numpy: its others would take address space and cores that a submission does not have
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "LD_BIND_NOW": "1", "OPENBLAS_NUM_THREADS": "1"}


class SandboxError(RuntimeError):
    """The sandbox cannot start or cannot be trusted, or a job failed twice for no fault of its own."""


def memory_file(content: bytes = b"") -> int:
    """Descriptor of a new anonymous file that holds ``content``, at its start."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("job")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_small(fd: int, limit: int) -> bytes | None:
    """A regular file's bytes; None if it is no regular file or over ``limit`` bytes."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
        return None
    return os.pread(fd, limit, 0)


def backstop(cpu_s: float) -> tuple[int, int]:
    """RLIMIT_CPU for a limit: three times as much on Linux, whose ticks are far too many on a busy virtual machine."""
    seconds = math.ceil(cpu_s * (3 if sys.platform == "linux" else 1))
    return seconds, seconds


def locked(folder: str, wait: bool = True) -> int | None:
    """Descriptor of a folder under a lock that ends with this process; None where another process holds it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(fd)
        return None
    return fd


def clear_away() -> None:
    """Remove the scratch folders that processes which are dead left behind: killed with all their workers at once.

    The lock tells a process of another container, whose number says nothing here, from a dead one.
    """
    for folder in glob.glob(os.path.join(tempfile.gettempdir(), "projected_grpo-*-*")):
        owner = os.path.basename(folder).split("-")[1]
        if not owner.isdigit() or alive(int(owner)) or (fd := locked(folder, wait=False)) is None:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there is one, of somebody else
        return True
    return True


class Worker:
    """One zygote and its socket. Used by one thread, which also starts it (bubblewrap dies with that thread).

    ``abort`` alone may be called from another thread.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.folder: str | None = None
        self.lock: int | None = None
        self.aborted = False
        self.hello: dict[str, Any] = {}

    def start(self) -> None:
        """Start the zygote; raises SandboxError with what it said if it does not come up."""
        self.folder = None if self.config["bubble"] else tempfile.mkdtemp(prefix=f"projected_grpo-{os.getpid()}-")
        scratch = self.folder or layers.SCRATCH_IN_BUBBLE
        self.lock = locked(self.folder) if self.folder else None
        if self.config["uid"]:
            os.chown(scratch, self.config["uid"], self.config["uid"])
        self.socket, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                layers.zygote_command(self.config["bubble"], theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            self.socket.settimeout(2 * GRACE_S)
            try:
                self.socket.sendall(json.dumps({**self.config, "scratch": scratch}).encode() + b"\n")
                self.hello = json.loads(receive(self.socket)[0])
            except (OSError, ValueError) as error:
                self.stop()
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip()[-600:]
                raise SandboxError(f"a grading worker did not start ({error})\n{said}") from error

    def stop(self) -> None:
        """End the zygote and whatever it runs; idempotent."""
        if self.process is None or self.socket is None:
            return
        self.socket.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def abort(self) -> None:
        """From another thread: end the job that is running, and start no other."""
        self.aborted = True
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def attempt(self, job: Job) -> Outcome:
        """Run a job; raises OSError or ValueError if the zygote died or did not answer in time."""
        if self.process is None:
            self.start()
        wall_s = 3 * job.cpu_s + 2
        payload = payload_of(job)
        limits = {"cpu_s": job.cpu_s, "wall_s": wall_s, "rlimit_cpu": backstop(job.cpu_s), "file": job.file}
        limits |= {"setup": job.setup, "size": len(payload)}
        with contextlib.ExitStack() as stack:
            fds = []
            for content in (payload, b"", b""):
                fds.append(memory_file(content))
                stack.callback(os.close, fds[-1])
            self.socket.settimeout(11 * wall_s + GRACE_S)
            socket.send_fds(self.socket, [json.dumps(limits).encode() + b"\n"], fds)
            message, result = receive(self.socket, 1)
            for fd in result:
                stack.callback(os.close, fd)
            if not message:
                raise ConnectionError("the grading worker died")
            file = read_small(result[0], MAX_FILE) if result else None
            stdout = os.pread(fds[1], MAX_FILE, 0)
            reply = read_small(fds[2], MAX_RESULT + len(COMPILED))
            return outcome_of(job, json.loads(message), reply, stdout, file)

    def run(self, job: Job) -> Outcome:
        """Run a job, once more in a new worker if this one failed; raises SandboxError if that fails too."""
        for attempts_left in (1, 0):
            if self.aborted:
                raise SandboxError("the sandbox was closed")
            try:
                return self.attempt(job)
            except (OSError, ValueError, SandboxError) as error:
                self.stop()
                if self.aborted or not attempts_left:
                    raise SandboxError(f"a job failed in two workers, for no fault of its own: {error}") from error
        raise AssertionError("unreachable")
