"""Runs untrusted code apart from us and says what it did. Knows nothing of problems or rewards.

A worker is a zygote (sandbox_child) that forks one confined child a job. Jobs go down as data and come back as tagged
JSON (sandbox_harness), read only after the child is dead; nothing is unpickled. What a job should have answered is
never sent. ``python -m projected_grpo.sandbox`` runs the canaries and prints the layers in force.
"""

import contextlib
import json
import math
import os
import queue
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate

from projected_grpo import sandbox_layers
from projected_grpo.sandbox_harness import COMPILED, MAX_RESULT
from projected_grpo.sandbox_layers import LAYERS, Layer

Probe = Literal["calls", "equal", "script", "stub", "audit", "flag"]
Status = Literal["ok", "compile_error", "error", "exit", "cpu_limit", "wall_limit", "disk_limit", "signal", "bad_reply"]
GRACE_S = 30.0
MAX_FILE = 65_536


class SandboxError(RuntimeError):
    """The sandbox cannot start or cannot be trusted, or a job failed twice for no fault of its own."""


@dataclass(frozen=True)
class Job:
    """One run of one submission, all of it data. ``calls`` are keyword arguments (JSON values) of ``cls().entry``.

    probe: "calls" returns what the calls return; "equal" also asks foreign values whether they equal an object that
    nothing equals; "script" runs it as a script that fails in the end; "stub" runs the function ``name`` on a class
    whose methods return 0; "audit" runs it on the submission's own class, on ``reference``'s and on an answer that
    equals nothing; "flag" reads the attribute ``name``. ``file`` is a result file to read back. cpu_s is a limit.
    """

    source: str
    probe: Probe = "calls"
    entry: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    setup: str = ""
    cls: str = "Solution"
    name: str = ""
    file: str = ""
    reference: str = ""
    cpu_s: float = 2.0


@dataclass(frozen=True)
class Foreign:
    """A returned value of no plain builtin type. ``equal``: it claimed to equal an object that nothing equals."""

    kind: str
    equal: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a job left behind. ``values`` are the calls' results up to the first that raised (``raised`` says what)."""

    status: Status
    compiled: bool
    values: tuple[Any, ...] = ()
    raised: str = ""
    flag: bool = False
    audit: Mapping[str, bool] | None = None
    stdout: str = ""
    file: bytes | None = None
    exit_code: int | None = None
    cpu_s: float = 0.0


def decode(data: Any) -> Any:
    """The value of tagged JSON (see sandbox_harness). Raises ValueError or TypeError otherwise."""
    if data is None or type(data) in (bool, int, str):
        return data
    if type(data) is list:
        return [decode(item) for item in data]
    if type(data) is not dict:
        raise ValueError("not tagged JSON")
    if "o" in data:
        return Foreign(str(data["o"])[:80], data.get("e") is True)
    ((tag, content),) = data.items()
    match tag:
        case "f":
            return float.fromhex(content)
        case "b":
            return bytes.fromhex(content)
        case "t":
            return tuple(decode(item) for item in content)
        case "s":
            return {decode(item) for item in content}
        case "z":
            return frozenset(decode(item) for item in content)
        case "d":
            return {decode(key): decode(item) for key, item in content}
    raise ValueError(f"unknown tag {tag[:20]!r}")


def memory_file(content: bytes = b"") -> int:
    """Descriptor of a new anonymous file that holds ``content``, at its start."""
    fd = os.memfd_create("job")
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


def payload_of(job: Job) -> bytes:
    """What the child reads. Each call's arguments are JSON of their own, so that each is decoded afresh."""
    fields = {key: getattr(job, key) for key in ("source", "probe", "entry", "setup", "cls", "name", "reference")}
    return json.dumps({**fields, "calls": [json.dumps(dict(call)) for call in job.calls]}).encode()


def outcome_of(job: Job, told: Mapping[str, Any], reply: bytes | None, stdout: bytes, file: bytes | None) -> Outcome:
    """Judge by the wait status and what the dead child left. A reply that does not decode is the submission's doing."""
    code = os.waitstatus_to_exitcode(told["status"])
    compiled = reply is not None and reply.startswith(COMPILED)
    found: dict[str, Any] = {}
    status: Status = "ok"
    if told["reason"]:
        status = {"wall": "wall_limit", "disk": "disk_limit"}[told["reason"]]
    elif code < 0:
        status = "cpu_limit" if told["cpu_s"] >= 0.9 * math.ceil(job.cpu_s) else "signal"
    elif not compiled:
        status = "compile_error" if reply == b"" else "bad_reply"
    body = reply[len(COMPILED) :] if compiled else b""
    if body:
        try:
            found = json.loads(body)
            found = {**found, "values": tuple(decode(value) for value in found.get("values", ()))}
        except (ValueError, TypeError, AttributeError, RecursionError):
            found, status = {}, "bad_reply"
    elif status == "ok":
        status = "exit"
    if status == "ok" and found.get("raised"):
        status = "error"
    audit = found.get("audit")
    return Outcome(
        status=status,
        compiled=compiled,
        values=found.get("values", ()),
        raised=str(found.get("raised", ""))[:200],
        flag=found.get("flag") is True,
        audit={key: value is True for key, value in audit.items()} if isinstance(audit, dict) else None,
        stdout=stdout.decode("utf-8", "replace"),
        file=file,
        exit_code=code,
        cpu_s=told["cpu_s"],
    )


class Worker:
    """One zygote and its socket. Used by one thread, which also starts it (bubblewrap dies with that thread)."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the zygote; raises SandboxError with what it said if it does not come up."""
        self.base = None if self.config["bubble"] else tempfile.mkdtemp(prefix="projected_grpo-")
        scratch = self.base or sandbox_layers.SCRATCH_IN_BUBBLE
        if self.config["uid"]:
            os.chown(scratch, self.config["uid"], self.config["uid"])
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                sandbox_layers.zygote_command(self.config["bubble"], theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            self.socket.settimeout(GRACE_S)
            try:
                self.socket.send(json.dumps({**self.config, "scratch": scratch}).encode())
                self.hello = json.loads(self.socket.recv(65536))
            except (OSError, ValueError) as error:
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip()[-600:]
                self.stop()
                raise SandboxError(f"a grading worker did not start: {error or 'no answer'}\n{said}") from error

    def stop(self) -> None:
        """End the zygote and whatever it runs; idempotent."""
        if self.process is None:
            return
        self.socket.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        if self.base:
            shutil.rmtree(self.base, ignore_errors=True)

    def attempt(self, job: Job) -> Outcome:
        """Run a job; raises OSError or ValueError if the zygote died or did not answer in time."""
        if self.process is None:
            self.start()
        wall_s = 3 * job.cpu_s + 2
        limits = {"cpu_s": job.cpu_s, "wall_s": wall_s, "file": job.file, "finalise": job.probe == "script"}
        with contextlib.ExitStack() as stack:
            fds = []
            for content in (payload_of(job), b"", b""):
                fds.append(memory_file(content))
                stack.callback(os.close, fds[-1])
            self.socket.settimeout(11 * wall_s + GRACE_S)
            socket.send_fds(self.socket, [json.dumps(limits).encode()], fds)
            message, result, _, _ = socket.recv_fds(self.socket, 65536, 1)
            for fd in result:
                stack.callback(os.close, fd)
            if not message:
                raise ConnectionError("a grading worker died")
            file = read_small(result[0], MAX_FILE) if result else None
            stdout = os.pread(fds[1], MAX_FILE, 0)
            reply = read_small(fds[2], MAX_RESULT + len(COMPILED))
            return outcome_of(job, json.loads(message), reply, stdout, file)

    def run(self, job: Job) -> Outcome:
        """Run a job, once more in a new worker if this one failed; raises SandboxError if that fails too."""
        try:
            return self.attempt(job)
        except (OSError, ValueError):
            self.stop()
        try:
            return self.attempt(job)
        except (OSError, ValueError) as error:
            self.stop()
            raise SandboxError(f"grading failed twice in two workers: {error}") from error


class Sandbox:
    """A pool of workers. Use as a context manager, or close() it.

    workers: how many (None: one a core). allow_unsandboxed: go on where neither seccomp nor a namespace is proven.
    use: the layers to try (all). Raises SandboxError if submissions could reach the machine, saying what to install.
    """

    def __init__(
        self, workers: int | None = None, allow_unsandboxed: bool = False, use: Collection[Layer] = LAYERS
    ):
        self._queue: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        self._config, self._why = sandbox_layers.plan(use)
        first = Worker(self._config)
        count = workers or len(os.sched_getaffinity(0))
        self._threads = [
            threading.Thread(target=self._serve, args=(first if i == 0 else Worker(self._config),), daemon=True)
            for i in range(count)
        ]
        self._threads[0].start()
        try:
            self.layers = self._examine(allow_unsandboxed)
        except BaseException:
            self._threads = self._threads[:1]
            self.close()
            raise
        for thread in self._threads[1:]:
            thread.start()

    def _examine(self, allow_unsandboxed: bool) -> dict[str, Any]:
        """Run the canary; what is in force. Raises SandboxError if that is too little."""
        outside = sandbox_layers.outside_folder()
        try:
            source = sandbox_layers.canary_source(outside, self._config["uid"])
            outcome = self.submit(Job(source=source, entry="look", calls=({},))).result()
        finally:
            shutil.rmtree(outside, ignore_errors=True)
        found = sandbox_layers.verdict(self._why, outcome.values[0] if outcome.values else None)
        found["allow_unsandboxed"] = allow_unsandboxed
        if not sandbox_layers.is_sandboxed(found) and not allow_unsandboxed:
            table = "\n".join(f"  {name}: {state}" for name, state in found["layers"].items())
            raise SandboxError(
                "refusing to grade: neither seccomp nor a namespace confines a submission here.\n"
                f"{table}\n  canary: {outcome.status} {outcome.raised}\n"
                f"Install it: {sandbox_layers.INSTALL}; or pass --allow-unsandboxed-grading to run the policy's code "
                "with no more than resource limits (the choice is recorded with the run)."
            )
        return found

    def _serve(self, worker: Worker) -> None:
        """A worker's thread: jobs off the queue until None."""
        while (item := self._queue.get()) is not None:
            job, future = item
            try:
                future.set_result(worker.run(job))
            except BaseException as error:
                future.set_exception(error)
        worker.stop()

    def submit(self, job: Job) -> "Future[Outcome]":
        """Queue a job."""
        future: Future[Outcome] = Future()
        self._queue.put((job, future))
        return future

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of many jobs, in their order; raises SandboxError if one fails twice for no fault of its own."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def close(self) -> None:
        """End the workers; idempotent."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=60)
        self._threads = []

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def table(found: Mapping[str, Any]) -> str:
    """The layers in force and what the canaries met, as text."""
    layers = tabulate(found["layers"].items(), headers=("layer", "state"))
    held = {True: "held", False: "GOT THROUGH"}
    acts = [(act, held[met.startswith("refused")], met) for act, met in found["canaries"].items()]
    return f"{layers}\n\n{tabulate(acts, headers=('a submission tries', '', 'and meets'))}"


def main() -> int:
    """Print the layers; 0 if submissions can be graded safely here."""
    try:
        with Sandbox(workers=1, allow_unsandboxed="--allow-unsandboxed-grading" in sys.argv[1:]) as sandbox:
            print(table(sandbox.layers))
            return 0 if all(met.startswith("refused") for met in sandbox.layers["canaries"].values()) else 1
    except SandboxError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
