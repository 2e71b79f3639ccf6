"""Rollouts on disk, of a run or of a teacher pool: one schema, and one reader for both.

A run writes a small parquet file a step while it goes on, and one ``rollouts.parquet`` when it is complete. A pool is a
folder of prompt_NNNN.jsonl.gz files, one a task, with the columns of ``POOL``. Every parquet file has all of
``SCHEMA``, so that a column which is empty in one step (no gradient, no gate) is no puzzle to polars or Hugging Face
datasets.
"""

import gzip
import json
import os
import random
import shutil
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from projected_grpo.config import UserError
from projected_grpo.data_types import Grade, Rollout, Task, Wording
from projected_grpo.problems import json_lines

FILE, PARTS = "rollouts.parquet", "rollouts.part"
GROUP = 4096
"""Rows of a row group."""
Row = dict[str, Any]


SCHEMA: dict[str, Any] = {
    "step": int,
    "source": str,
    "A": float,
    "kept": float,
    "score": float,
    "score_random": float,
    "score_by_layer": list[float],
    "flagged": bool,
    "acting": float,
    "held_out": float,
    "problem_id": str,
    "env_mode": str,
    "wording": Wording,
    "completion": str,
    "grade": Grade,
}
"""The columns of ``metrics.rollout_rows``.

score, score_random, score_by_layer: of the rollout's gradient against V and a random V, whatever the arm; null without
a gradient. acting: the score of the arm's own detector, by which it is flagged. held_out: that of the held-out probe.
"""
POOL = ("problem_id", "env_mode", "wording", "completion", "grade")
"""Those that a rollout has wherever it came from: a pool's."""
FLAT: dict[str, pl.Expr] = {
    name: expr
    for column, kind in SCHEMA.items()
    for name, expr in (
        {inner.name: pl.col(column).struct.field(inner.name) for inner in fields(kind)}
        if is_dataclass(kind)
        else {column: pl.col(column)}
    ).items()
}
"""The columns of ``frame``: those of ``SCHEMA``, the fields of wording and grade each a column of its own name."""


@cache
def arrow_schema() -> Any:
    """``SCHEMA`` as pyarrow has it, which is imported where a file is touched: a GPU's image may lack it."""
    import pyarrow as pa

    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def of(kind: Any) -> Any:
        if is_dataclass(kind):
            return pa.struct([(name, of(hint)) for name, hint in typing.get_type_hints(kind).items()])
        if typing.get_origin(kind) is list:
            return pa.list_(of(typing.get_args(kind)[0]))
        optional = [a for a in typing.get_args(kind) if a in plain]
        return plain.get(optional[0] if optional else kind, pa.string())

    return pa.schema({name: of(kind) for name, kind in SCHEMA.items()})


def row_of(task: Task, completion: str, grade: Grade) -> Row:
    """The columns ``POOL`` of a rollout."""
    return {
        "problem_id": task.problem.id,
        "env_mode": task.mode,
        "wording": asdict(task.wording),
        "completion": completion,
        "grade": asdict(grade),
    }


# --------------------------------------------------------------------------------------------------- a run writes them


def write_step(run: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a step's rows to a file of their own. Raises KeyError when they have other columns than ``SCHEMA``.

    pyarrow writes it in the calling thread; polars hands it to its own threads, which costs nothing on an idle
    machine and 0.1 s a step on a busy one.
    """
    import pyarrow as pa
    from pyarrow import parquet

    odd = {name for row in rows for name in row.keys() ^ set(SCHEMA)}
    if odd:
        raise KeyError(f"rollout columns and rollout_log.SCHEMA differ in {', '.join(sorted(odd))}")
    (run / PARTS).mkdir(exist_ok=True)
    path = run / PARTS / f"step-{step:06d}.parquet"
    part = path.with_suffix(".part")
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=arrow_schema()), part, compression="zstd")
    os.replace(part, path)


def step_files(run: Path) -> list[Path]:
    """The files of single steps, in order."""
    return sorted((run / PARTS).glob("step-*.parquet"))


def first_spoiled(run: Path, steps: int) -> Path | None:
    """The first of the steps' files that is missing, empty or cut short; None when all of them are there."""
    import pyarrow as pa
    from pyarrow import parquet

    for step in range(steps):
        path = run / PARTS / f"step-{step:06d}.parquet"
        try:
            if parquet.read_metadata(path).num_rows == 0:
                return path
        except (OSError, pa.ArrowException):
            return path
    return None


def cut(run: Path, step: int) -> None:
    """Forget the rollouts of ``step`` and all later ones, of a run that is not complete."""
    for path in step_files(run):
        if int(path.stem.removeprefix("step-")) >= step:
            path.unlink()
    (run / FILE).unlink(missing_ok=True)


def consolidate(run: Path) -> None:
    """Make one file of the steps' files, which stay until ``drop_parts``; a few thousand rows in memory at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    paths = step_files(run)
    if not paths:
        return
    part = run / f"{FILE}.part"
    with parquet.ParquetWriter(part, arrow_schema(), compression="zstd") as file:
        waiting: list[pa.Table] = []
        for path in paths:
            waiting.append(parquet.read_table(path))
            if sum(map(len, waiting)) >= GROUP or path == paths[-1]:
                file.write_table(pa.concat_tables(waiting))
                waiting = []
    os.replace(part, run / FILE)


def drop_parts(run: Path) -> None:
    """Remove the steps' files."""
    shutil.rmtree(run / PARTS, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- reading


def files_of(folder: Path) -> list[Path]:
    """The files that hold a folder's rollouts: of a run that is complete, goes on or broke off, or of a pool.

    Raises UserError when there are none.
    """
    found = [folder / FILE] if (folder / FILE).exists() else step_files(folder) or sorted(folder.glob("prompt_*.gz"))
    if not found:
        raise UserError(f"{folder} holds no rollouts: name a run's folder (outputs/runs/NAME) or a pool's")
    return found


def rows(folder: Path) -> Iterator[Row]:
    """A folder's rollouts in the order of sampling, each with the columns of ``SCHEMA``; None in what a pool lacks.

    Raises UserError when there are none, or naming the file that cannot be read.
    """
    import pyarrow as pa

    for path in files_of(folder):
        try:
            yield from _pool_rows(path) if path.suffix == ".gz" else _parquet_rows(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{folder}: its rollouts cannot be read: {str(error).splitlines()[0]}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _pool_rows(path: Path) -> Iterator[Row]:
    for number, row in json_lines(path):
        try:
            Grade(**row["grade"]), Wording(**row["wording"])
            yield dict.fromkeys(SCHEMA) | {name: row[name] for name in POOL}
        except (KeyError, TypeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}:{number}: {why}; `just convert-pool` reads pools that others wrote") from error


def frame(folder: Path, columns: Sequence[str] = tuple(FLAT)) -> pl.DataFrame:
    """The same as a flat table, of the columns asked for.

    Raises UserError also when the files are of a version that lacks one.
    """
    paths = files_of(folder)
    if paths[0].suffix == ".gz":
        import pyarrow as pa

        found = pl.LazyFrame(pl.from_arrow(pa.Table.from_pylist(list(rows(folder)), schema=arrow_schema())))
    else:
        found = pl.scan_parquet(paths)
    try:
        return found.select(**{name: FLAT[name] for name in columns}).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder}: its rollouts cannot be read: {str(error).splitlines()[0]}") from error


# --------------------------------------------------------------------------------------------------------------- pools


@dataclass(frozen=True)
class Pool:
    """A teacher's rollouts, their grades frozen: rows by (problem id, mode)."""

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


def by_task(found: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (problem id, mode)."""
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        tasks.setdefault((row["problem_id"], row["env_mode"]), []).append(row)
    return tasks


def read_pool(folder: Path) -> Pool:
    """All rows of a pool. Raises UserError when the folder holds none."""
    if not any(folder.glob("prompt_*.gz")):
        raise UserError(f"no teacher pool in {folder}: run `just build-pool`, or set --mix-ratio=0")
    return Pool(by_task(rows(folder)))


def write_pool(found: Iterable[Row], folder: Path) -> int:
    """Write the columns ``POOL`` of rows, a file a task; the number of files. A pool that is there is replaced file by
    file.
    """
    tasks = by_task(found)
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(sorted(tasks)):
        lines = "".join(json.dumps({name: row[name] for name in POOL}) + "\n" for row in tasks[key])
        part = folder / f"prompt_{number:04d}.part"
        part.write_bytes(gzip.compress(lines.encode(), mtime=0))
        part.replace(folder / f"prompt_{number:04d}.jsonl.gz")
    return len(tasks)
