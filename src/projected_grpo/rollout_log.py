"""A run's rollouts on disk: a small parquet file a step while it runs, one ``rollouts.parquet`` when it is complete.

Every file has all of ``SCHEMA``, so that a column which is empty in one step (no gradient, no gate) is no puzzle to
polars or Hugging Face datasets. Runs from before there was parquet hold ``rollouts.jsonl``, which is read as well.
"""

import json
import os
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from projected_grpo.config import UserError
from projected_grpo.data_types import Grade, Wording

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
