"""A run folder -> its rows of the stored tables (``SCHEMAS``). A run that cannot be used raises ``Unusable``."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from projected_grpo import proj, stats
from projected_grpo.results import json_lines
from projected_grpo.study import Job

Row = dict[str, Any]
PHASES = {"0-19": (0, 20), "20-49": (20, 50), "50 on": (50, 10**9)}
"""Training phases of the detector table: steps from, steps before."""
PROBE = "gt_only"
"""The capability probe's mode, which no pooled rate includes."""
CURVES = ("hack_s", "attempt_s", "solve_s", "cin", "cin_null", "cout", "cout_update", "removed_frac")
LATER_CURVES = ("withheld", "caught", "false_alarm", "basis_overlap")
"""Curves that a run may lack: None there."""
NOT_SETTINGS = ("seed", "outputs", "name", "threads", "graders", "checkpoint_every")
"""Config fields that say where and how a run was made, not what it was."""

I, F, S = pl.Int32, pl.Float32, pl.String
SCHEMAS: dict[str, dict[str, Any]] = {
    "runs": {
        "run": S, "label": S, "arm": S, "oracle": pl.Boolean, "seed": I, "overrides": S, "known_modes": S, "modes": S,
        "steps": I, "commit": S, "digest": S, "v_heldout_accuracy": F, "v_pairs": I, "v_axes": I, "minutes": F,
    },
    "steps": {"run": S, "step": I} | dict.fromkeys(CURVES + LATER_CURVES, F),
    "modes": {"run": S, "step": I, "mode": S, "n": I, "hack": I, "attempt": I, "solve": I},
    "evals": {
        "run": S, "step": I, "knobs": S, "mode": S, "metric": S,
        "rate": F, "lo": F, "hi": F, "n_problems": I, "n_samples": I,
    },
    "problems": {
        "run": S, "step": I, "knobs": S, "mode": S, "problem_id": S, "n": I, "hack": I, "attempt": I, "solve": I,
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
        (not files["eval_problems"], "no eval_problems.jsonl: made before it was written"),
    ]
    for wrong, why in problems:
        if wrong:
            raise Unusable(why)
    return meta, files


def run_row(meta: Row, steps: Sequence[Row], job: Job) -> Row:
    """The run's row of the table ``runs``."""
    config, V = meta["config"], meta.get("V") or {}
    arm = proj.ARMS.get(job.intervention)
    known = config["vhack"]["known_modes"]
    return {
        "run": job.name,
        "label": job.label,
        "arm": job.intervention,
        "oracle": bool(meta.get("oracle", getattr(arm, "oracle", False))),
        "seed": job.seed,
        "overrides": " ".join(job.overrides),
        "known_modes": None if known is None else " ".join(known),
        "modes": " ".join(config["data"]["modes"]),
        "steps": len(steps),
        "commit": meta["commit"],
        "digest": digest(config),
        "v_heldout_accuracy": V.get("heldout_accuracy"),
        "v_pairs": V.get("n_pairs"),
        "v_axes": V.get("axes"),
        "minutes": sum(v for row in steps for k, v in row.items() if k.startswith("sec_")) / 60,
    }


def mode_rows(steps: Sequence[Row]) -> list[Row]:
    """Counts by step and mode; a mode that a count does not name has none of it. No solves in older rows: None."""
    return [
        {"step": row["step"], "mode": mode, "n": n}
        | {kind: row[f"{kind}_by_mode"].get(mode, 0) for kind in ("hack", "attempt")}
        | {"solve": row["solve_by_mode"].get(mode, 0) if "solve_by_mode" in row else None}
        for row in steps
        for mode, n in sorted(row["n_by_mode"].items())
    ]


def ends(rows: Sequence[Row]) -> list[Row]:
    """Rows of the first and the last step, quarantine ablated."""
    kept = {min(r["step"] for r in rows), max(r["step"] for r in rows)}
    return [r for r in rows if r["step"] in kept and r["knobs"] == "deployed"]


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


def detector_rows(rollouts: pl.DataFrame | None) -> list[Row]:
    """Detector quality by phase and mode ("all" pools the modes), of the score and of score_random."""
    if rollouts is None or rollouts.is_empty():
        return []
    rows = []
    for phase, (start, stop) in PHASES.items():
        in_phase = rollouts.filter(pl.col("step").is_between(start, stop, closed="left"))
        for mode in ["all", *sorted(in_phase["mode"].unique())]:
            chosen = in_phase if mode == "all" else in_phase.filter(pl.col("mode") == mode)
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
            "steps": [{c: row[c] for c in ("step", *CURVES)} | {c: row.get(c) for c in LATER_CURVES} for row in steps],
            "modes": mode_rows(steps),
            "evals": [{c: row[c] for c in SCHEMAS["evals"] if c != "run"} for row in files["evals"]],
            "problems": [
                {c: row[c] for c in SCHEMAS["problems"] if c != "run"} for row in ends(files["eval_problems"])
            ],
            "relearn": [{c: row[c] for c in SCHEMAS["relearn"] if c != "run"} for row in files["relearn"]],
            "detector": detector_rows(scored_rollouts(folder)),
        }
    except Unusable:
        raise
    except KeyError as error:
        raise Unusable(f"lacks {error}: made by another version") from None
    except (OSError, ValueError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise Unusable(f"unreadable: {type(error).__name__}") from None
    return {name: [{"run": job.name} | row for row in table] for name, table in rows.items()}
