"""A run's rollouts on disk: a small parquet file a step while it runs, one ``rollouts.parquet`` when it is complete.

Every file has all of ``SCHEMA``, so that a column which is empty in one step (no gradient, no gate) is no puzzle to
polars or Hugging Face datasets. Runs from before there was parquet hold ``rollouts.jsonl``, which is read as well.
"""

import gzip
import json
import os
import random
import shutil
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from projected_grpo.config import UserError
from projected_grpo.data_types import Grade, Rollout, Task, Wording

FILE, PARTS, OLD = "rollouts.parquet", "rollouts.part", "rollouts.jsonl"
GROUP = 4096
"""Rows of a row group."""


def struct_of(carrier: type) -> pa.StructType:
    """The column type of a frozen carrier of numbers, truth values and words."""
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def kind(hint: Any) -> pa.DataType:
        optional = [a for a in typing.get_args(hint) if a in plain]
        return plain.get(optional[0] if optional else hint, pa.string())

    return pa.struct([(name, kind(hint)) for name, hint in typing.get_type_hints(carrier).items()])


SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "source": pa.string(),
        "A": pa.float64(),
        "kept": pa.float64(),
        "score": pa.float64(),
        "score_random": pa.float64(),
        "score_by_layer": pa.list_(pa.float64()),
        "flagged": pa.bool_(),
        "problem_id": pa.string(),
        "env_mode": pa.string(),
        "wording": struct_of(Wording),
        "completion": pa.string(),
        "grade": struct_of(Grade),
    }
)
"""The columns of ``metrics.rollout_rows``."""


def write_step(run: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a step's rows to a file of their own. Raises KeyError when they have other columns than ``SCHEMA``.

    pyarrow writes it in the calling thread; polars hands it to its own threads, which costs nothing on an idle
    machine and 0.1 s a step on a busy one.
    """
    odd = {name for row in rows for name in row.keys() ^ set(SCHEMA.names)}
    if odd:
        raise KeyError(f"rollout columns and rollout_log.SCHEMA differ in {', '.join(sorted(odd))}")
    (run / PARTS).mkdir(exist_ok=True)
    path = run / PARTS / f"step-{step:06d}.parquet"
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), part, compression="zstd")
    os.replace(part, path)


def step_files(run: Path) -> list[Path]:
    """The files of single steps, in order."""
    return sorted((run / PARTS).glob("step-*.parquet"))


def cut(run: Path, step: int) -> None:
    """Forget the rollouts of ``step`` and all later ones, of a run that is not complete."""
    for path in step_files(run):
        if int(path.stem.removeprefix("step-")) >= step:
            path.unlink()
    (run / FILE).unlink(missing_ok=True)


def consolidate(run: Path) -> None:
    """Make one file of the steps' files, which stay until ``drop_parts``; a few thousand rows in memory at a time."""
    paths = step_files(run)
    if not paths:
        return
    part = run / f"{FILE}.part"
    with pq.ParquetWriter(part, SCHEMA, compression="zstd") as file:
        waiting: list[pa.Table] = []
        for path in paths:
            waiting.append(pq.read_table(path))
            if sum(map(len, waiting)) >= GROUP or path == paths[-1]:
                file.write_table(pa.concat_tables(waiting))
                waiting = []
    os.replace(part, run / FILE)


def drop_parts(run: Path) -> None:
    """Remove the steps' files."""
    shutil.rmtree(run / PARTS, ignore_errors=True)


def rows(run: Path) -> Iterator[dict[str, Any]]:
    """All rollouts of a run, whether it is complete, going on, broken or of the old format, in the order of sampling.

    Raises UserError when the folder holds none.
    """
    if not (run / FILE).exists() and (run / OLD).exists():
        with (run / OLD).open() as lines:
            yield from map(json.loads, lines)
        return
    paths = [run / FILE] if (run / FILE).exists() else step_files(run)
    if not paths:
        raise UserError(f"{run} holds no rollouts: name a run's folder, for example outputs/runs/NAME")
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()


def frame(run: Path) -> pl.DataFrame:
    """The same as a table with the columns of ``SCHEMA``; what an old run did not log is null."""
    if (run / FILE).exists():
        return pl.read_parquet(run / FILE)
    return pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(list(rows(run)), schema=SCHEMA)))


I, F, S, B = pl.Int32, pl.Float32, pl.String, pl.Boolean
FIELDS: dict[str, tuple[tuple[str, ...], pl.DataType | type[pl.DataType]]] = {
    "step": (("step",), I),
    "source": (("source",), S),
    "mode": (("env_mode",), S),
    "problem": (("problem_id",), S),
    "name": (("wording", "name"), S),
    "text": (("wording", "text"), S),
    "completion": (("completion",), S),
    "label": (("grade", "label"), S),
    "status": (("grade", "status"), S),
    "detail": (("grade", "detail"), S),
    "reward": (("grade", "reward"), F),
    "compiles": (("grade", "compiles"), B),
    "format_ok": (("grade", "format_ok"), B),
    "gt_correct": (("grade", "gt_correct"), B),
    "channel": (("grade", "channel"), B),
    "attempted": (("grade", "attempted"), B),
    "type_mismatch": (("grade", "type_mismatch"), B),
    "vacuous_tests": (("grade", "vacuous_tests"), B),
    "rejects_canonical": (("grade", "rejects_canonical"), B),
    "A": (("A",), F),
    "kept": (("kept",), F),
    "score": (("score",), F),
    "score_random": (("score_random",), F),
    "by_layer": (("score_by_layer",), pl.List(F)),
    "flagged": (("flagged",), B),
}
"""Column -> where it stands in a written rollout, and its type. What a run lacks is null."""
NEEDED = ("step", "mode", "completion", "label")


def column(schema: pl.Schema, path: tuple[str, ...], dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
    """The value at a path, or null where the file has no such field."""
    inner, expr = schema.get(path[0]), pl.col(path[0])
    for name in path[1:]:
        fields = {f.name: f.dtype for f in inner.fields} if isinstance(inner, pl.Struct) else {}
        inner, expr = fields.get(name), expr.struct.field(name)
    return pl.lit(None, dtype=dtype) if inner is None or inner == pl.Null else expr.cast(dtype)


def read_table(folder: Path) -> pl.DataFrame:
    """All rollouts of a run, in the order written, as ``FIELDS`` and ``row`` (the number within its step).

    Raises UserError when there are none, or when the file is half written or of a version that lacks what is NEEDED.
    """
    parquet, lines = folder / "rollouts.parquet", folder / "rollouts.jsonl"
    try:
        found = pl.read_parquet(parquet) if parquet.exists() else pl.read_ndjson(lines, infer_schema_length=None)
        columns = {name: column(found.schema, *where) for name, where in FIELDS.items()}
        table = found.select(**columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = "no rollouts file" if isinstance(error, FileNotFoundError) else "rollouts cannot be read"
        raise UserError(f"{folder.name}: {reason}") from None
    for name in NEEDED:
        if table[name].null_count() == len(table):
            raise UserError(f"{folder.name}: its rollouts lack {'.'.join(FIELDS[name][0])}")
    return table.with_columns(row=pl.int_range(pl.len(), dtype=I).over("step"))


def sample(table: pl.DataFrame, most: int, by: tuple[str, ...] = ("label", "mode", "step")) -> pl.DataFrame:
    """At most ``most`` rows, in order, as evenly over the strata as they allow: a row of each, then a second, …

    Which rows of a stratum are taken is random with a fixed seed.
    """
    if len(table) <= most:
        return table
    shuffled = table.with_row_index("_at").sample(fraction=1, shuffle=True, seed=0)
    ranked = shuffled.with_columns(_rank=pl.int_range(pl.len()).over(by))
    return ranked.sort("_rank", maintain_order=True).head(most).sort("_at").drop("_at", "_rank")


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


def read_pool(folder: Path) -> Pool:
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


def write_pool(rows: Iterable[Row], folder: Path) -> int:
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


def scored_rollouts(folder: Path) -> pl.DataFrame | None:
    """step, mode, channel, score, score_random, flagged of the student rollouts with a score; None without scores."""
    parquet, lines = folder / "rollouts.parquet", folder / "rollouts.jsonl"
    if parquet.exists():
        found = pl.scan_parquet(parquet)
    elif lines.exists():
        found = pl.scan_ndjson(lines, infer_schema_length=None)
    else:
        return None
    columns = found.collect_schema().names()
    if "score" not in columns:
        return None
    wanted = {c: pl.col(c) if c in columns else pl.lit(None) for c in ("step", "score", "score_random", "flagged")}
    channel = pl.col("grade").struct.field("channel")
    students = found.filter((pl.col("source") == "student") & pl.col("score").is_not_null())
    return students.select(**wanted, mode="env_mode", channel=channel).collect()
