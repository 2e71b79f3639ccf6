"""``STUDIES``: named sets of (arm, overrides) × seeds with a hypothesis; and what runs them.

    python -m projected_grpo.study NAME [--how=here|pueue|print] [--parallel=2]
    python -m projected_grpo.study                        lists the studies and how far each is

A job is one train command. Its run's folder is named by the command, so the same job in two studies is one run, a
finished run is kept, and a broken one is gone on with from its checkpoint, or done again where the code has changed.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tabulate import tabulate

from projected_grpo import checkpoints
from projected_grpo.config import UserError, choose
from projected_grpo.run_record import git_commit, read_meta
from projected_grpo.study_rows import ROWS, SEEDS, STUDY_ROWS, Row

How = Literal["here", "pueue", "print"]
ALWAYS = ("--threads=1", "--graders=1")
"""Two runs of one thread each beat one of two."""


@dataclass(frozen=True)
class Job:
    """One run: a row of a table (``label``) at one seed. ``overrides`` are train.py's flags."""

    label: str
    intervention: str
    overrides: tuple[str, ...]
    seed: int
    preset: str = "organism"

    @property
    def flags(self) -> tuple[str, ...]:
        """What is said after ``train.py``, but for the run's name."""
        return (self.preset, f"--intervention={self.intervention}", f"--seed={self.seed}", *self.overrides)

    @property
    def name(self) -> str:
        """The run's folder: arm, a digest of the flags, seed."""
        digest = hashlib.sha256("\0".join(self.flags).encode()).hexdigest()[:6]
        return f"{self.intervention}-{digest}-s{self.seed}"

    def command(self, outputs: str = "outputs") -> list[str]:
        """The train command."""
        name = (f"--name={self.name}", f"--outputs={outputs}")
        return [sys.executable, "-m", "projected_grpo.train", *self.flags, *ALWAYS, *name]


@dataclass(frozen=True)
class Study:
    """A question. H: the hypothesis it can falsify; why: what it is for; resolve: what its outcome decides."""

    name: str
    H: str
    why: str
    resolve: str
    jobs: tuple[Job, ...]


def jobs_of(row: Row, seeds: Sequence[int]) -> list[Job]:
    """A row at each of the seeds, or at its own number of them."""
    chosen = seeds if row.n_seeds is None else range(SEEDS[0], SEEDS[0] + row.n_seeds)
    return [Job(row.label, row.arm, row.flags, seed) for seed in chosen]


STUDIES: dict[str, Study] = {
    s.name: Study(
        s.name, s.H, s.why, s.resolve, tuple(j for label in s.rows for j in jobs_of(ROWS[label], SEEDS[: s.n_seeds]))
    )
    for s in STUDY_ROWS
}


def status(job: Job, outputs: Path) -> Literal["done", "broken", "missing"]:
    """Whether the job's run is complete, was begun and is not complete, or is not there."""
    folder = outputs / "runs" / job.name
    if folder.exists():
        try:
            done = json.loads((folder / "meta.json").read_text())["status"] == "complete"
        except (OSError, ValueError, KeyError):
            done = False
        return "done" if done else "broken"
    return "broken" if folder.with_name(folder.name + ".part").exists() else "missing"


@contextmanager
def claimed(job: Job, outputs: Path) -> Iterator[bool]:
    """Whether this process may run the job: False while another one does. The claim ends with the process."""
    (outputs / "locks").mkdir(parents=True, exist_ok=True)
    with (outputs / "locks" / job.name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def resumable(job: Job, outputs: Path) -> bool:
    """Whether the job's broken run has a checkpoint and was begun by exactly this code: a clean tree's commit."""
    folder, commit = outputs / "runs" / f"{job.name}.part", git_commit()
    same = commit is not None and not commit.endswith("+") and (read_meta(folder) or {}).get("commit") == commit
    return same and not (outputs / "runs" / job.name).exists() and bool(checkpoints.places(folder))


def run_here(job: Job, outputs: Path) -> str:
    """Run one job unless it is done or someone else runs it; what became of it."""
    with claimed(job, outputs) as mine:
        if not mine:
            return "runs elsewhere"
        if status(job, outputs) == "done":
            return "kept"
        command = job.command(str(outputs))
        if resumable(job, outputs):
            command.append(f"--resume={job.name}")
        else:
            for folder in (outputs / "runs" / job.name, outputs / "runs" / f"{job.name}.part"):
                shutil.rmtree(folder, ignore_errors=True)
        (outputs / "logs").mkdir(parents=True, exist_ok=True)
        with (outputs / "logs" / f"{job.name}.log").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        return "done" if code == 0 else f"FAILED ({code}), see {log.name}"


def run_all(study: Study, outputs: Path, parallel: int) -> int:
    """Run what is missing, ``parallel`` jobs at a time; the number of jobs that failed."""
    failed = 0
    with ThreadPoolExecutor(parallel) as pool:
        outcomes = pool.map(lambda job: (job, run_here(job, outputs)), study.jobs)
        try:
            for number, (job, outcome) in enumerate(outcomes, 1):
                print(f"{number}/{len(study.jobs)}  {job.label}  seed {job.seed}  {job.name}  {outcome}", flush=True)
                failed += outcome.startswith("FAILED")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def pueue_commands(study: Study, outputs: Path, parallel: int) -> list[list[str]]:
    """One ``pueue add`` for each job that is not done, in the study's own group."""
    todo = [job for job in study.jobs if status(job, outputs) != "done"]
    label = f"why: {study.why} resolve: {study.resolve}"
    add = ["pueue", "add", "--group", study.name, "--label"]
    return [
        ["pueue", "group", "add", study.name, "--parallel", str(parallel)],
        *([*add, f"{job.label} s{job.seed} {label}", "--", shlex.join(job.command(str(outputs)))] for job in todo),
    ]


def overview(outputs: Path) -> str:
    """Every study, how many of its runs are done, and its hypothesis."""
    rows = [
        (s.name, f"{sum(status(j, outputs) == 'done' for j in s.jobs)}/{len(s.jobs)}", s.H) for s in STUDIES.values()
    ]
    return tabulate(rows, headers=("study", "done", "H"), maxcolwidths=[None, None, 80])


def main(name: tyro.conf.Positional[str] = "", how: How = "here", parallel: int = 2, outputs: str = "outputs") -> None:
    """Run a study's missing jobs here, queue them with pueue, or print the commands. Without a name: list them."""
    if not name:
        print(overview(Path(outputs)))
        return
    study = STUDIES[choose("study", name, list(STUDIES))]
    print(f"# H: {study.H}\nwhy: {study.why}\nresolve: {study.resolve}", flush=True)
    if how == "print":
        print("\n".join(shlex.join(job.command(outputs)) for job in study.jobs))
    elif how == "pueue":
        if shutil.which("pueue") is None:
            raise UserError("pueue is not installed: use --how=here or --how=print")
        for number, command in enumerate(pueue_commands(study, Path(outputs), parallel)):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and number:  # the first makes the group, which may be there
                raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}")
    elif run_all(study, Path(outputs), parallel):
        raise UserError("some jobs failed; run the same command again to redo them")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"error: {error}")
