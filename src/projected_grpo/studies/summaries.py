"""Run folders -> small stored summaries, from which every table of the docs is made (``just summaries``).

A run becomes rows of the stored tables (``SCHEMAS``); one that cannot be used raises ``Unusable`` and is named. A
study is stored as the names of its runs, with the labels that it gives them.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import tyro
from loguru import logger

from projected_grpo import arms, rollout_log
from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError, choose
from projected_grpo.runs import json_lines, write_json
from projected_grpo.studies import stats
from projected_grpo.studies.run import STUDIES, Job, Study

Row = dict[str, Any]
PHASES = {"0-19": (0, 20), "20-49": (20, 50), "50 on": (50, 10**9)}
"""Training phases of the detector table: steps from, steps before."""
PROBE = "gt_only"
"""The capability probe's mode, which no pooled rate includes."""
CURVES = (
    "hack_s", "attempt_s", "solve_s", "cin", "cin_null", "cout", "cout_update", "removed_frac",
    "withheld", "caught", "false_alarm", "auroc", "caught_held_out", "auroc_held_out", "basis_overlap",
)  # fmt: skip
NOT_SETTINGS = ("seed", "outputs", "name", "threads", "graders", "checkpoint_every")
"""Config fields that say where and how a run was made, not what it was."""

I, F, S = pl.Int32, pl.Float32, pl.String
SCHEMAS: dict[str, dict[str, Any]] = {
    "runs": {
        "run": S, "arm": S, "oracle": pl.Boolean, "seed": I, "overrides": S, "known_modes": S, "modes": S,
        "steps": I, "commit": S, "digest": S, "v_heldout_accuracy": F, "v_pairs": I, "v_axes": I, "minutes": F,
    },
    "steps": {"run": S, "step": I} | dict.fromkeys(CURVES, F),
    "modes": {"run": S, "step": I, "mode": S, "n": I, "hack": I, "attempt": I, "solve": I},
    "evals": {
        "run": S, "step": I, "knobs": S, "mode": S, "metric": S,
        "rate": F, "lo": F, "hi": F, "n_problems": I, "n_samples": I,
    },
    "problems": {
        "run": S, "step": I, "knobs": S, "mode": S, "problem_id": S, "kind": S,
        "n": I, "hack": I, "attempt": I, "solve": I,
    },
    "relearn": {"run": S, "step": I, "hack_s": F, "attempt_s": F, "solve_s": F},
    "detector": {
        "run": S, "phase": S, "mode": S, "score": S, "n": I, "prevalence": F, "auroc": F, "ap": F, "f05": F,
    },
}  # fmt: skip


class Unusable(Exception):
    """A run that cannot enter a summary; the message says why."""


def digest(config: Mapping[str, Any]) -> str:
    """Settings that make a run what it is, without its seed: equal for all seeds of a label."""
    settings = {k: v for k, v in config.items() if k not in NOT_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_run(folder: Path, job: Job) -> tuple[Row, dict[str, list[Row]]]:
    """meta.json and the JSON-lines files of a complete run. Raises Unusable."""
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        raise Unusable("unfinished" if part.is_dir() else "not run")
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"meta.json: {type(error).__name__}") from None
    files = {name: json_lines(folder / f"{name}.jsonl") for name in ("steps", "evals", "eval_problems", "relearn")}
    config = meta["config"]
    problems = [
        (meta["status"] != "complete", f"status {meta['status']}"),
        (config["intervention"] != job.intervention, f"is arm {config['intervention']}, not {job.intervention}"),
        (config["seed"] != job.seed, f"is seed {config['seed']}, not {job.seed}"),
        (len(files["steps"]) != config["rl"]["steps"], f"{len(files['steps'])} of {config['rl']['steps']} steps"),
        (not files["evals"], "no deploy evaluation"),
        (not files["eval_problems"], "no eval_problems.jsonl"),
    ]
    for wrong, why in problems:
        if wrong:
            raise Unusable(why)
    return meta, files


def run_row(meta: Row, steps: Sequence[Row], job: Job) -> Row:
    """The run's row of the table ``runs``."""
    config, V = meta["config"], meta.get("V") or {}
    arm = arms.ARMS.get(job.intervention)
    known = config["vhack"]["known_modes"]
    return {
        "run": job.name,
        "arm": job.intervention,
        "oracle": bool(meta.get("oracle", getattr(arm, "oracle", False))),
        "seed": job.seed,
        "overrides": " ".join(job.overrides),
        "known_modes": None if known is None else " ".join(known),
        "modes": " ".join(config["data"].get("eval_modes") or config["data"]["modes"]),
        "steps": len(steps),
        "commit": meta["commit"],
        "digest": digest(config),
        "v_heldout_accuracy": V.get("heldout_accuracy"),
        "v_pairs": V.get("n_pairs"),
        "v_axes": V.get("axes"),
        "minutes": sum(v for row in steps for k, v in row.items() if k.startswith("sec_")) / 60,
    }


def mode_rows(steps: Sequence[Row]) -> list[Row]:
    """Counts by step and mode; a mode that a count does not name has none of it."""
    return [
        {"step": row["step"], "mode": mode, "n": n}
        | {kind: row[f"{kind}_by_mode"].get(mode, 0) for kind in ("hack", "attempt", "solve")}
        for row in steps
        for mode, n in sorted(row["n_by_mode"].items())
    ]


def ends(rows: Sequence[Row]) -> list[Row]:
    """Rows of the first and the last step, quarantine ablated."""
    kept = {min(r["step"] for r in rows), max(r["step"] for r in rows)}
    return [r for r in rows if r["step"] in kept and r["knobs"] == "deployed"]


SCORED = ("step", "source", "env_mode", "channel", "score", "score_random", "flagged")


def detector_rows(run: Path) -> list[Row]:
    """Detector quality on student rollouts by phase and mode ("all" pools the modes), of score and of score_random."""
    if not (run / rollout_log.FILE).exists():
        return []
    rollouts, rows = rollout_log.frame(run, SCORED).filter(source="student").drop_nulls("score"), []
    for phase, (start, stop) in PHASES.items():
        in_phase = rollouts.filter(pl.col("step").is_between(start, stop, closed="left"))
        for mode in ["all", *sorted(in_phase["env_mode"].unique())]:
            chosen = in_phase if mode == "all" else in_phase.filter(pl.col("env_mode") == mode)
            for score, flags in (("own", "flagged"), ("random", None)):
                column = {"own": "score", "random": "score_random"}[score]
                part = chosen.drop_nulls(column)
                if part.is_empty():
                    continue
                flagged = None if flags is None or part[flags].null_count() else part[flags].cast(bool).to_numpy()
                found = stats.detector(part["channel"].to_numpy(), part[column].to_numpy(), flagged)
                rows.append({"phase": phase, "mode": mode, "score": score, **asdict(found)})
    return rows


def summarise_run(folder: Path, job: Job) -> dict[str, list[Row]]:
    """The run's rows of every table. Raises Unusable, with the reason, for a run that is not complete and readable."""
    try:
        meta, files = read_run(folder, job)
        steps = files["steps"]
        rows = {
            "runs": [run_row(meta, steps, job)],
            "steps": [{c: row[c] for c in ("step", *CURVES)} for row in steps],
            "modes": mode_rows(steps),
            "evals": [{c: row[c] for c in SCHEMAS["evals"] if c != "run"} for row in files["evals"]],
            "problems": [
                {c: row[c] for c in SCHEMAS["problems"] if c != "run"} for row in ends(files["eval_problems"])
            ],
            "relearn": [{c: row[c] for c in SCHEMAS["relearn"] if c != "run"} for row in files["relearn"]],
            "detector": detector_rows(folder),
        }
    except Unusable:
        raise
    except UserError as error:
        raise Unusable(str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ")) from None
    except KeyError as error:
        raise Unusable(f"lacks {error}: made by another version, run it again") from None
    except (OSError, ValueError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise Unusable(f"unreadable: {type(error).__name__}") from None
    return {name: [{"run": job.name} | row for row in table] for name, table in rows.items()}


# --- summaries, stored: each run once, whatever studies it is in ----------------------------------------------------

Tables = dict[str, pl.DataFrame]
DIGITS = 4
"""Decimals that are stored."""
TEXT = ("name", "H", "why", "resolve", "n_jobs", "missing")


@dataclass(frozen=True)
class Summary:
    """A study's summary: its runs' rows, ``runs`` with a column ``label``. missing: run name -> why it is not in."""

    name: str
    H: str
    why: str
    resolve: str
    n_jobs: int
    missing: Mapping[str, str]
    tables: Tables

    @property
    def labels(self) -> dict[str, str]:
        """Run name -> the label that the study gives it, in the study's order."""
        return dict(self.tables["runs"].select("run", "label").iter_rows())


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
    tables = of_runs({name: frame(name, table) for name, table in rows.items()}, {j.name: j.label for j in study.jobs})
    return Summary(study.name, study.H, study.why, study.resolve, len(study.jobs), missing, tables)


def read_runs(store: Path) -> Tables:
    """The tables of all stored runs; empty where nothing is stored. Raises UserError where they are not readable."""
    try:
        if not list(store.glob("*.json")):
            return {name: frame(name, []) for name in SCHEMAS}
        tables = {name: pl.read_parquet(store / f"{name}.parquet") for name in SCHEMAS}
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{store} holds no readable runs ({error}): move it away and run `just summaries`") from None
    odd = [name for name, table in tables.items() if set(table.columns) != set(SCHEMAS[name])]
    if odd:
        raise UserError(f"{store}: {', '.join(odd)} of another version: move it away and run `just summaries`")
    return tables


def of_runs(tables: Tables, labels: Mapping[str, str]) -> Tables:
    """The rows of the runs that ``labels`` names, in its order and with its labels."""
    place = pl.col("run").replace_strict({run: i for i, run in enumerate(labels)}, return_dtype=pl.Int64)
    some = {
        name: table.filter(pl.col("run").is_in(list(labels))).sort(place, maintain_order=True)
        for name, table in tables.items()
    }
    label = pl.col("run").replace_strict(labels, return_dtype=pl.String)
    return some | {"runs": some["runs"].with_columns(label=label)}


def over(old: Tables, new: Tables) -> Tables:
    """Both, and of a run that is in both, the new."""
    lasting = ~pl.col("run").is_in(new["runs"]["run"].to_list())
    return {
        name: pl.concat([t.select(list(SCHEMAS[name])) for t in (new[name], old[name].filter(lasting))])
        for name in SCHEMAS
    }


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """One process at a time reads and writes the store: the lock is on its folder, and ends with the process."""
    store.mkdir(parents=True, exist_ok=True)
    handle = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def named_runs(store: Path) -> set[str]:
    """Names of the runs of all stored studies. Raises UserError naming a file that is no study's."""
    names: set[str] = set()
    for path in store.glob("*.json"):
        try:
            names |= set(json.loads(path.read_text())["runs"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no stored study: move it away, then `just summaries {path.stem}`") from None
    return names


def save(summaries: Sequence[Summary], store: Path) -> None:
    """Store studies: a JSON file each, and their runs beside those that are stored; runs that no study names go.

    Tables are replaced one by one and ``runs`` last, before the studies' own files: killed on the way, a run that is
    named lacks rows in no table. One process at a time: see ``locked``.
    """
    tables, labels = read_runs(store), {s.name: s.labels for s in summaries}
    names = named_runs(store).union(*labels.values())
    for s in summaries:
        tables = over(tables, s.tables)
    tables = {name: t.filter(pl.col("run").is_in(list(names))) for name, t in tables.items()}
    paths = {name: store / f"{name}.parquet" for name in (*(n for n in tables if n != "runs"), "runs")}
    for name, path in paths.items():
        part = path.with_name(path.name + ".part")
        tables[name].sort("run", maintain_order=True).write_parquet(part, compression="zstd", compression_level=19)
    for path in paths.values():
        os.replace(path.with_name(path.name + ".part"), path)
    for s in summaries:
        write_json(store / f"{s.name}.json", {k: getattr(s, k) for k in TEXT} | {"runs": labels[s.name]})


def load(store: Path, name: str, tables: Tables | None = None) -> Summary:
    """A stored study; ``tables``: what ``read_runs`` says. Raises UserError when the store does not hold all of it."""
    try:
        text = json.loads((store / f"{name}.json").read_text())
        labels, text = text["runs"], {k: text[k] for k in TEXT}
        lost = set(labels) - set((tables := tables or read_runs(store))["runs"]["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{store} holds no readable summary of {name} ({error}): `just summaries {name}`") from None
    if lost:
        raise UserError(f"{store}: {name} names runs that are not stored, as {min(lost)}: `just summaries {name}`")
    return Summary(**text, tables=of_runs(tables, labels))


def stored(store: Path) -> list[Summary]:
    """All stored studies, by name."""
    tables = read_runs(store)
    return [load(store, path.stem, tables) for path in sorted(store.glob("*.json"))]


def update(studies: Sequence[Study], runs: Path, store: Path, force: bool = False) -> None:
    """Summarise studies and store them. Stored runs that are not in ``runs`` any more stay, unless ``force``. A study
    without any run is left as it is stored.
    """
    found = [summarise(study, runs) for study in studies]
    with locked(store):
        store_found(studies, found, store, force)


def store_found(studies: Sequence[Study], found: Sequence[Summary], store: Path, force: bool) -> None:
    """``update`` when the runs have been read."""
    have = read_runs(store) if not force else {name: frame(name, []) for name in SCHEMAS}
    for s in found:
        have = over(have, s.tables)
    kept, names = [], set(have["runs"]["run"])
    for study, s in zip(studies, found, strict=True):
        labels = {job.name: job.label for job in study.jobs if job.name in names}
        missing = {run: why for run, why in s.missing.items() if run not in names}
        for run, why in s.missing.items():
            if run in missing or why not in ("not run", "unfinished"):
                kept_as = "left out" if run in missing else "kept as it was stored"
                logger.warning("{}: {} {}: {}", s.name, run, kept_as, why)
        if labels:
            kept.append(replace(s, missing=missing, tables=of_runs(have, labels)))
            told = "{}: {} of {} runs, {} of them as they were stored"
            logger.info(told, s.name, len(labels), s.n_jobs, len(labels) - len(s.tables["runs"]))
    save(kept, store)


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    store: str = "docs/results",
    force: bool = False,
) -> None:
    """Summarise the named studies, or all, from outputs/runs; runs that cannot be used are named and left out.

    Stored runs that are not in outputs/runs stay as they are stored; with --force those of a study that has others go.
    """
    chosen = [STUDIES[choose("study", n, list(STUDIES))] for n in names or STUDIES]
    update(chosen, Path(outputs) / "runs", Path(store), force)


if __name__ == "__main__":
    run_main(command(main))
