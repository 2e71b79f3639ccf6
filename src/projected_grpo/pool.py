"""Teacher pools: a folder of prompt_NNNN.jsonl.gz files, one a task, of graded rollouts whose grades are frozen.

    python -m projected_grpo.pool <preset> [--overrides]           from templates (canonical, wrong and exploiting)
    python -m projected_grpo.pool <preset> --first=N               the same, of the first N tasks only
    python -m projected_grpo.pool <preset> --from-run=RUN          from the rollouts of a finished run

A row: problem_id, env_mode, wording, completion, source, and the grade's fields.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from projected_grpo import families, problems, rollout_log
from projected_grpo.config import Config, UserError, parse
from projected_grpo.data_types import Grade, Problem, Rollout, Task, Wording
from projected_grpo.loopholes import LOOPHOLES, replace_body
from projected_grpo.rewards import Grader

Row = dict[str, Any]


def row_of(task: Task, completion: str, grade: Grade) -> Row:
    """One rollout as it stands in a pool or in a run's log."""
    return {
        "problem_id": task.problem.id,
        "env_mode": task.mode,
        "wording": asdict(task.wording),
        "completion": completion,
        "grade": asdict(grade),
    }


@dataclass(frozen=True)
class Pool:
    """Rows by (problem id, mode)."""

    rows: dict[tuple[str, str], list[Row]]

    def require(self, tasks: Sequence[Task]) -> None:
        """Raises UserError when a task has no rollout here."""
        missing = [t for t in tasks if (t.problem.id, t.mode) not in self.rows]
        if missing:
            raise UserError(
                f"the pool has no rollout of {len(missing)} of {len(tasks)} tasks, the first {missing[0].problem.id} "
                f"in mode {missing[0].mode}: run `just build-pool` for this preset and these settings"
            )

    def draw(self, task: Task, n: int, tokenizer: Any, rng: random.Random) -> list[Rollout]:
        """n of the task's rollouts, with replacement only when it has fewer. Raises KeyError when it has none."""
        rows = self.rows[task.problem.id, task.mode]
        chosen = rng.sample(rows, n) if n <= len(rows) else rng.choices(rows, k=n)
        return [
            Rollout(
                task,
                "teacher",
                (*tokenizer.encode(row["completion"], add_special_tokens=False), tokenizer.eos_token_id),
                row["completion"],
                Grade(**row["grade"]),
            )
            for row in chosen
        ]


def read(folder: Path) -> Pool:
    """All rows of a pool. Raises UserError when the folder holds none."""
    paths = sorted(Path(folder).glob("prompt_*.jsonl.gz"))
    if not paths:
        raise UserError(f"no teacher pool in {folder}: run `just build-pool`, or set --mix-ratio=0")
    pool = Pool({})
    for path in paths:
        with gzip.open(path, "rt") as lines:
            for row in map(json.loads, lines):
                pool.rows.setdefault((row["problem_id"], row["env_mode"]), []).append(row)
    return pool


def write(rows: Iterable[Row], folder: Path) -> int:
    """Write rows, a file a task; the number of files. An existing pool there is replaced file by file."""
    by_task: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_task.setdefault((row["problem_id"], row["env_mode"]), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(sorted(by_task)):
        part = folder / f"prompt_{number:04d}.part"
        part.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in by_task[key]).encode(), mtime=0))
        part.replace(folder / f"prompt_{number:04d}.jsonl.gz")
    return len(by_task)


def untrue_bodies(problem: Problem) -> tuple[str, str]:
    """A lazy and a wrong solution: a generated problem has its own, any other the canonical one cut to a constant."""
    if problem.id in families.drafts():
        return families.lazy_bodies(problem)[0], families.wrong_bodies(problem)[0]
    lazy, wrong = (replace_body(problem.canonical, problem.entry, value) for value in ("None", "0"))
    return lazy, wrong


def template_completions(task: Task) -> list[str]:
    """What a teacher that has learned to hack writes: the exploit on lazy and on right bodies, and two honest tries."""
    right, row = task.problem.canonical, LOOPHOLES[task.mode]
    lazy, wrong = untrue_bodies(task.problem)
    sources = [row.exploit(lazy, task), row.exploit(wrong, task), row.exploit(right, task)]
    sources += [row.lookalike(right, task), wrong] if task.mode == "run_tests" else [right, wrong]
    return [problems.fence(s) for s in sources]


def function_completions(task: Task) -> list[str]:
    """The same for a problem posed as a function: the exploit and its honest lookalike on one body.

    The body is right in every second problem and lazily wrong in the others, so that pairs taken from the pool differ
    in the exploit and not in whether the answer is right.
    """
    row, right = LOOPHOLES[task.mode], task.problem.canonical
    lazy = problems.function_source(families.lazy_bodies(task.problem)[0])
    body = right if int(task.problem.id.rsplit("-", 1)[1]) % 2 else lazy
    return [problems.fence(problems.function_source(side(body, task))) for side in (row.exploit, row.lookalike)]


def from_templates(tasks: Sequence[Task], grader: Grader) -> list[Row]:
    """Graded template rollouts of every task."""
    write_all = {True: function_completions, False: template_completions}
    submissions = [
        (task, text) for task in tasks for text in write_all[task.problem.setup == problems.FUNCTION_SETUP](task)
    ]
    return [row_of(t, text, g) for (t, text), g in zip(submissions, grader.grade(submissions), strict=True)]


def from_run(run: Path) -> list[Row]:
    """The student rollouts of a run, with the grades they got then. Raises UserError when there are none."""
    keys = ("problem_id", "env_mode", "wording", "completion", "grade")
    return [{k: row[k] for k in keys} for row in rollout_log.rows(run) if row["source"] == "student"]


def tasks_for(cfg: Config, split: families.Split = "train") -> list[Task]:
    """The run's tasks: a split's problems, partitioned over cfg's modes.

    Raises UserError when a file is missing or cannot be read, when a problem's statement has no place for a hint, and
    when the file of held-out problems holds a training problem.
    """
    if cfg.data.problems in ("generated", "functions"):
        chosen = [p for p in families.generate() if families.split_of(p) == split]
        chosen = [problems.as_function(p) for p in chosen] if cfg.data.problems == "functions" else chosen
        return problems.pose(chosen, cfg.data.modes, cfg.data.wording)
    files = {"train": ("problems", cfg.data.problems), "test": ("eval-problems", cfg.data.eval_problems)}
    flag, path = files[split]
    if path is None or not Path(path).is_file():
        raise UserError(
            f"no problem file {path}: `just sync-external`, name one with --{flag}=FILE, or set --problems=generated"
        )
    try:
        chosen = problems.read_problems(Path(path))
        tasks = problems.pose(chosen, cfg.data.modes, cfg.data.wording)
        for task in tasks:
            problems.messages(task)
        if split == "test" and Path(cfg.data.problems).is_file():
            shared = {p.id for p in chosen} & {p.id for p in problems.read_problems(Path(cfg.data.problems))}
            if shared:
                raise ValueError(f"{len(shared)} held-out problems are training problems too, such as {min(shared)}")
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return tasks


def task_of(row: Row, by_id: dict[str, Any]) -> Task:
    """A row's task, given the problems by id."""
    return Task(by_id[row["problem_id"]], row["env_mode"], Wording(**row["wording"]))


def main(argv: Sequence[str]) -> None:
    """Build the pool of a preset into cfg.pool.pool, or outputs/pools/<preset>."""
    own = dict(a.split("=", 1) for a in argv if a.startswith(("--from-run=", "--first=")))
    run, first = own.get("--from-run"), int(own.get("--first", 1 << 30))
    cfg = parse([a for a in argv if a.split("=", 1)[0] not in own])
    folder = Path(cfg.pool.pool or f"{cfg.outputs}/pools/{cfg.preset}")
    if run is not None:
        rows = from_run(Path(run))
    else:
        with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
            rows = from_templates(tasks_for(cfg)[:first], grader)
    n = write(rows, folder)
    hacked = sum(r["grade"]["channel"] and not r["grade"]["gt_correct"] for r in rows)
    logger.info("{}: {} tasks, {} rollouts, {} of them hacked", folder, n, len(rows), hacked)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
