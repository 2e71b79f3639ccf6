"""``STUDIES``: named sets of (arm, overrides) × seeds with a hypothesis; and what runs them.

    just study NAME [--how=here|pueue|slurm|print] [--parallel=2]
    just study                            lists the studies and how far each is

A job is one train command. Its run's folder is named by the command, so the same job in two studies is one run, a
finished run is kept, and a broken one is gone on with from its checkpoint, or done again where the code has changed.
"""

import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
import tyro
from tabulate import tabulate

from projected_grpo import runs
from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count, Positive, UserError, choose
from projected_grpo.runs import git_commit, read_meta
from projected_grpo.studies.rows import ROWS, SEEDS, STUDY_ROWS, Row

How = Literal["here", "pueue", "slurm", "print"]
Cluster = Literal["slurm", "local"]
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


def stored_names(store: Path) -> set[str]:
    """Names of all runs that a stored summary holds."""
    path = store / "runs.parquet"
    return set(pl.read_parquet(path, columns=["run"])["run"]) if path.exists() else set()


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
    return same and not (outputs / "runs" / job.name).exists() and bool(runs.places(folder))


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
        except KeyboardInterrupt as stop:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.add_note("what is done stays; the same command goes on")
            raise
    return failed


def queued(study: Study, job: Job, outputs: Path) -> list[str]:
    """What a queue runs for a job: this module again, so that a finished run is kept and a broken one done again."""
    return [
        sys.executable,
        "-m",
        "projected_grpo.studies.run",
        study.name,
        f"--only={job.name}",
        f"--outputs={outputs}",
    ]


def pueue_commands(study: Study, outputs: Path, parallel: int) -> list[list[str]]:
    """The study's own group, how many of it run at a time, then a ``pueue add`` for each job that is not done.

    The syntax is that of pueue 3 and 4. A task's command is one argument, quoted, since pueue gives it to a shell.
    """
    todo = [job for job in study.jobs if status(job, outputs) != "done"]
    label = f"why: {study.why} resolve: {study.resolve}"
    add = ["pueue", "add", "--group", study.name, "--label"]
    return [
        ["pueue", "group", "add", study.name],
        ["pueue", "parallel", "--group", study.name, str(parallel)],
        *([*add, f"{job.label} s{job.seed} {label}", "--", shlex.join(queued(study, job, outputs))] for job in todo),
    ]


def add_to_pueue(study: Study, outputs: Path, parallel: int) -> None:
    """Queue what is missing. Raises UserError when pueue is not there or refuses."""
    if shutil.which("pueue") is None:
        raise UserError("pueue is not installed: use --how=here, --how=slurm or --how=print")
    for number, words in enumerate(pueue_commands(study, outputs, parallel)):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and number:  # the first makes the group, which may be there
            raise UserError(f"{shlex.join(words)}: {done.stderr.strip()}")


def submit(
    study: Study, outputs: Path, parallel: int, hours: float, cluster: Cluster, extra: Sequence[str] = ()
) -> list[Any]:
    """Submit what is missing as one Slurm array through submitit; its jobs, whose result is ``run_here``'s.

    cluster "local" runs them as processes of this machine, all at once. extra: Slurm parameters, "partition=gpu".
    Raises UserError when submitit or Slurm is not there.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--how=slurm needs submitit: pip install -e '.[slurm]'") from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("this machine has no sbatch: submit from a Slurm login node, or use --how=here")
    todo = [job for job in study.jobs if status(job, outputs) != "done"]
    if not todo:
        return []
    executor = submitit.AutoExecutor(folder=outputs / "slurm", cluster=cluster)
    wanted = dict(pair.split("=", 1) for pair in extra if "=" in pair)
    executor.update_parameters(
        name=study.name,
        timeout_min=math.ceil(60 * hours),
        cpus_per_task=2,  # a run's one thread and its grader
        slurm_array_parallelism=parallel,
        slurm_comment=f"why: {study.why} resolve: {study.resolve}",
        **{f"slurm_{key}": value for key, value in wanted.items()},
    )
    return executor.map_array(run_here, todo, [outputs.resolve()] * len(todo))


def overview(outputs: Path) -> str:
    """Every study, how many of its runs are done, and its hypothesis."""
    rows = [
        (s.name, f"{sum(status(j, outputs) == 'done' for j in s.jobs)}/{len(s.jobs)}", s.H) for s in STUDIES.values()
    ]
    return tabulate(rows, headers=("study", "done", "H"), maxcolwidths=[None, None, 80])


def main(
    name: tyro.conf.Positional[str] = "",
    how: How = "here",
    parallel: Count = 2,
    outputs: str = "outputs",
    only: str = "",
    hours: Positive = 4.0,
    cluster: Cluster = "slurm",
    slurm: tuple[str, ...] = (),
    store: str = "docs/results",
    again: bool = False,
) -> None:
    """Run a study's missing jobs here, queue them, or print the commands. Without a name: list the studies.

    store: runs that a summary there holds are done, wherever they were made; again: run them all the same.
    only: one job of the study, by its run's name. hours, slurm (KEY=VALUE, as partition=gpu): of a Slurm job.
    cluster: "local" runs Slurm's jobs as processes here.
    """
    if not name:
        print(overview(Path(outputs)))
        return
    study, where = STUDIES[choose("study", name, list(STUDIES))], Path(outputs)
    if only:
        chosen = choose("job", only, [job.name for job in study.jobs])
        study = replace(study, jobs=tuple(job for job in study.jobs if job.name == chosen))
    print(f"# H: {study.H}\nwhy: {study.why}\nresolve: {study.resolve}", flush=True)
    done = set() if again or only else stored_names(Path(store))
    left = tuple(job for job in study.jobs if job.name not in done)
    if len(left) < len(study.jobs):
        print(f"{len(study.jobs) - len(left)} of {len(study.jobs)} runs are stored in {store}; --again runs them anew")
        study = replace(study, jobs=left)
    if how == "print":
        print("\n".join(shlex.join(job.command(outputs)) for job in study.jobs))
    elif how == "pueue":
        add_to_pueue(study, where, parallel)
    elif how == "slurm":
        jobs = submit(study, where, parallel, hours, cluster, slurm)
        print(f"{len(jobs)} jobs submitted; logs in {where / 'slurm'}; `just watch` follows the runs", flush=True)
        if cluster == "local" and any(job.result().startswith("FAILED") for job in jobs):
            raise UserError("some jobs failed; run the same command again to redo them")
    elif run_all(study, where, parallel):
        raise UserError("some jobs failed; run the same command again to redo them")


if __name__ == "__main__":
    run_main(command(main))
