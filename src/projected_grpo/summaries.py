"""Run folders -> small stored summaries, from which every table of docs/results.md is made.

    python -m projected_grpo.summaries [STUDY ...] [--outputs=outputs] [--store=docs/results] [--force]

A study's folder ``docs/results/STUDY/`` holds ``study.json`` (hypothesis, and which runs were left out, and why) and
a parquet file a table, long format, all with the column ``run``:

    runs      what the run was: label, arm, seed, overrides, commit, digest of its settings, V's quality, cost
    steps     the curves            modes     hacks, attempts, solves and rollouts by step and mode
    evals     deploy-eval rates     problems  the first and the last deploy evaluation by problem, counts
    relearn   the curve of plain GRPO started from the deployed model
    detector  how well a rollout's own score tells its mode's channel, by mode and phase

The bytes are a function of the runs alone.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro
from loguru import logger

from projected_grpo.config import UserError, choose
from projected_grpo.run_tables import SCHEMAS, Row, Unusable, summarise_run
from projected_grpo.study import STUDIES, Study

Tables = dict[str, pl.DataFrame]
DIGITS = 4
"""Decimals that are stored."""


@dataclass(frozen=True)
class Summary:
    """A study's stored summary. missing: run name -> why it is not in."""

    name: str
    H: str
    why: str
    resolve: str
    n_jobs: int
    missing: Mapping[str, str]
    tables: Tables


def frame(name: str, rows: Sequence[Row]) -> pl.DataFrame:
    """Rows as a table of the stored schema, numbers rounded so that they compress."""
    table = pl.DataFrame(rows, schema={c: pl.Float64 if t == pl.Float32 else t for c, t in SCHEMAS[name].items()})
    return table.with_columns(pl.col(pl.Float64).round(DIGITS).cast(pl.Float32))


def summarise(study: Study, runs: Path) -> Summary:
    """All of a study's usable runs, in the order of its jobs."""
    rows: dict[str, list[Row]] = {name: [] for name in SCHEMAS}
    missing = {}
    for job in study.jobs:
        try:
            for name, more in summarise_run(runs / job.name, job).items():
                rows[name] += more
        except Unusable as why:
            missing[job.name] = str(why)
    tables = {name: frame(name, table) for name, table in rows.items()}
    return Summary(study.name, study.H, study.why, study.resolve, len(study.jobs), missing, tables)


def save(summary: Summary, store: Path) -> int:
    """Write a study's folder, file by file to a temporary name first; its size in bytes."""
    folder = store / summary.name
    folder.mkdir(parents=True, exist_ok=True)
    text = {k: getattr(summary, k) for k in ("name", "H", "why", "resolve", "n_jobs", "missing")}
    (folder / "study.json.part").write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    for name, table in summary.tables.items():
        table.write_parquet(folder / f"{name}.parquet.part", compression="zstd", compression_level=19)
    for part in folder.glob("*.part"):
        os.replace(part, part.with_suffix(""))
    return sum(f.stat().st_size for f in folder.iterdir())


def load(folder: Path) -> Summary:
    """A stored summary. Raises UserError when the folder does not hold one."""
    try:
        text = json.loads((folder / "study.json").read_text())
        tables = {name: pl.read_parquet(folder / f"{name}.parquet") for name in SCHEMAS}
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder} holds no readable summary ({error}): `just summaries {folder.name}`") from None
    return Summary(**text, tables=tables)


def stored(store: Path) -> list[Summary]:
    """All stored summaries, by name."""
    return [load(path.parent) for path in sorted(store.glob("*/study.json"))]


def update(studies: Sequence[Study], runs: Path, store: Path, force: bool = False) -> None:
    """Summarise studies and store them. A summary that would lose runs is kept unless ``force``."""
    for study in studies:
        summary = summarise(study, runs)
        for name, why in summary.missing.items():
            logger.warning("{}: {} left out: {}", study.name, name, why)
        here, old = set(summary.tables["runs"]["run"]), store / study.name
        lost = set(load(old).tables["runs"]["run"]) - here if (old / "study.json").exists() else set()
        if lost and not force:
            logger.warning(
                "{}: {} stored runs are not in {} (first {}): summary kept, --force replaces it",
                study.name, len(lost), runs, min(lost),
            )  # fmt: skip
        elif here:
            size = save(summary, store)
            logger.info("{}: {} of {} runs, {:.0f} kB", study.name, len(here), summary.n_jobs, size / 1000)


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    store: str = "docs/results",
    force: bool = False,
) -> None:
    """Summarise the named studies, or all, from outputs/runs; runs that cannot be used are named and left out."""
    chosen = [STUDIES[choose("study", n, list(STUDIES))] for n in names or STUDIES]
    update(chosen, Path(outputs) / "runs", Path(store), force)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"error: {error}")
