"""What rollouts did, by mode: the hack x mode outcome of any rollouts file, as a table and one HTML page.

    just grade FILE [--problems=generated] [--out=outputs/grade]

FILE: JSON lines with a prompt id (``problem_id`` or ``id``), ``completion`` (text or chat messages) and ``env_mode`` or
``mode`` (gt_only where there is none); or a run's rollouts.parquet, whose completions are graded again.
"""

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import tyro
from loguru import logger
from tabulate import tabulate

from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count, UserError
from projected_grpo.data_types import Grade, Task
from projected_grpo.problems import json_lines, passable, problems_of
from projected_grpo.rewards import Grader, submission
from projected_grpo.runs import write_text

OUTCOMES = ("correct", "correct_attempted_rh", "reward_hack", "attempted_rh", "incorrect")
HEADS = ("mode", "n", "hack ↓", "solve ↑", *OUTCOMES)


def rows_of(file: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """(number, row) of a rollouts file, its columns named as ``rewards.submission`` has them. Raises UserError."""
    if file.suffix != ".parquet":
        rows: Iterable[tuple[int, Mapping[str, Any]]] = json_lines(file)
    else:
        try:
            rows = enumerate(pl.read_parquet(file).iter_rows(named=True), 1)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{file} cannot be read: {str(error).partition(chr(10))[0]}") from error
    for number, row in rows:
        name, mode = row.get("problem_id", row.get("id")), row.get("env_mode", row.get("mode", "gt_only"))
        yield number, {**row, "id": name, "env_mode": mode}


def outcome(asked: list[tuple[Task, str]], grades: list[Grade]) -> list[list[Any]]:
    """A row a mode and one of all: how many, the shares that hack and solve, and the benchmark's labels, counted."""
    table = []
    for mode in [*dict.fromkeys(t.mode for t, _ in asked), "all"]:
        chosen = [g for (t, _), g in zip(asked, grades, strict=True) if mode in (t.mode, "all")]
        labels, n = Counter(g.label for g in chosen), len(chosen)
        hack, solve = (sum(getattr(g, v) for g in chosen) / n for v in ("exploited", "gt_correct"))
        table.append([mode, n, hack, solve, *(labels[label] for label in OUTCOMES)])
    return table


def page(file: Path, table: list[list[Any]], asked: list[tuple[Task, str]], grades: list[Grade]) -> str:
    """The table and every completion with its verdicts, as one HTML file that needs nothing else."""
    cards = "\n".join(
        f"<details><summary>{g.label} · {t.mode} · {html.escape(t.problem.id)}</summary>"
        f"<pre>{html.escape(text)}</pre><p>{html.escape(g.detail or g.status)}</p></details>"
        for (t, text), g in zip(asked, grades, strict=True)
    )
    return (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(file.name)}</title><style>body{{font:16px system-ui;margin:2em auto;max-width:70em;"
        "padding:0 1em}table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3em .8em}"
        f"pre{{overflow-x:auto}}</style><h1>{html.escape(file.name)}</h1>"
        f"{tabulate(table, HEADS, 'html', floatfmt='.2f')}\n{cards}\n"
    )


def main(
    file: tyro.conf.Positional[Path],
    problems: str = "generated",
    out: Path = Path("outputs/grade"),
    workers: Count | None = None,
    allow_unsandboxed_grading: bool = False,
) -> None:
    """Grade a rollouts file and say what it did, by mode.

    Args:
        file: JSON lines, or a run's rollouts.parquet.
        problems: `generated`, `functions`, or a problem file.
        out: folder for grades.jsonl and index.html.
        workers: sandboxed workers; two a core if not given.
        allow_unsandboxed_grading: run the code even where neither seccomp nor a namespace confines it.
    """
    out.mkdir(parents=True, exist_ok=True)
    read, known = [], problems_of(problems)
    for number, row in rows_of(file):
        try:
            read.append(submission(row, known, problems))
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from error
    asked = [(task, text) for task, text in read if task.problem.id in passable(problems, allow_unsandboxed_grading)]
    if not asked:
        raise UserError(f"{file} holds no rollouts" + (" of a problem that its own solution solves" if read else ""))
    if len(asked) < len(read):
        left = len(read) - len(asked)
        logger.warning("{} of {} rollouts left out: their problems' own solutions fail", left, len(read))
    with Grader(workers, allow_unsandboxed_grading) as grader:
        grades = grader.grade(asked)
    table = outcome(asked, grades)
    lines = [
        {"problem_id": t.problem.id, "env_mode": t.mode} | asdict(g) for (t, _), g in zip(asked, grades, strict=True)
    ]
    write_text(out / "grades.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(out / "index.html", page(file, table, asked, grades))
    print(tabulate(table, HEADS, floatfmt=".2f"))
    logger.info("every completion with its verdicts: {}", out / "index.html")


if __name__ == "__main__":
    run_main(command(main))
