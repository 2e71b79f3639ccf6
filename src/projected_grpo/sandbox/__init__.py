"""Runs untrusted code apart from us and says what it did. Knows nothing of problems or rewards.

A worker is a zygote (child) that forks one confined child a job. Jobs go down as data and come back as tagged
JSON (harness), read only after the child is dead; nothing is unpickled. What a job should have answered is
never sent. ``python -m projected_grpo.sandbox`` runs the canaries and prints the layers in force.
"""

import os
import queue
import shutil
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

from projected_grpo.sandbox import layers
from projected_grpo.sandbox.job import Job, Outcome, call_of
from projected_grpo.sandbox.layers import LAYERS, Layer
from projected_grpo.sandbox.worker import SandboxError, Worker, clear_away


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sandbox:
    """A pool of workers. Use as a context manager, or close() it.

    workers: how many (None: two a core, so that one runs while another waits for its child). allow_unsandboxed: go on
    where neither seccomp nor a namespace is proven. use: the layers to try (all). Raises SandboxError if submissions
    could reach the machine, saying what to install.
    """

    def __init__(self, workers: int | None = None, allow_unsandboxed: bool = False, use: Collection[Layer] = LAYERS):
        self._queue: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        clear_away()
        self._config, self._why = layers.plan(use)
        self._workers = [Worker(self._config) for _ in range(workers or 2 * cores())]
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        self._threads[0].start()
        try:
            self.layers = self._examine(allow_unsandboxed)
        except BaseException:
            self.close()
            raise
        for thread in self._threads[1:]:
            thread.start()

    def _examine(self, allow_unsandboxed: bool) -> dict[str, Any]:
        """Run the canary; what is in force. Raises SandboxError if that is too little."""
        outside = layers.outside_folder()
        try:
            source = layers.canary_source(outside, self._config["uid"])
            outcome = self.submit(Job(source=source, entry="look", calls=(call_of({}),))).result()
        finally:
            shutil.rmtree(outside, ignore_errors=True)
        if note := self._workers[0].hello.get("landlock"):
            self._why["landlock"] = note
        found = layers.verdict(self._why, outcome.values[0] if outcome.values else None)
        found["allow_unsandboxed"] = allow_unsandboxed
        if not layers.is_sandboxed(found) and not allow_unsandboxed:
            table = "\n".join(f"  {name}: {state}" for name, state in found["layers"].items())
            raise SandboxError(
                "refusing to grade: neither seccomp nor a namespace confines a submission here.\n"
                f"{table}\n  canary: {outcome.status} {outcome.raised}\n"
                f"Install it: {layers.INSTALL}; or pass --allow-unsandboxed-grading to run the policy's code "
                "with no more than resource limits (the choice is recorded with the run)."
            )
        return found

    def _serve(self, worker: Worker) -> None:
        """A worker's thread: jobs off the queue until None."""
        while (item := self._queue.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
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
        """End the workers and whatever they run; jobs still queued are cancelled. Idempotent."""
        for worker in self._workers:
            worker.abort()
        while not self._queue.empty():
            if (item := self._queue.get()) is not None:
                item[1].cancel()
        started = [thread for thread in self._threads if thread.is_alive()]
        for _ in started:
            self._queue.put(None)
        for thread in started:
            thread.join(timeout=60)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
