"""A mock learner: run folders with planted effects, in the schema of real ones, for the analysis to recover."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from projected_grpo.studies.run import Job, Study

MODES = ("run_tests", "sentinel", "stdout_marker", "file_marker")
STEPS, SAMPLES = 60, 4
BASE = {"hack": 0.05, "attempt": 0.08, "solve": 0.30}
KINDS = ("sure",) * 2 + ("learnable",) * 4 + ("hard",) * 2
"""Of the problems of a mode, by their number."""
EASE = {"sure": 1.5, "learnable": 1.25, "hard": 0.0}
"""How many times as often as the mean a problem of a kind is solved; the mean over KINDS is 1."""


@dataclass(frozen=True)
class Plant:
    """Where a label's rates end. onset: the middle of the rise of attempts. shift: of a hack's score, in sd's (None:
    no scores are written). by_kind: solve rates of kinds of problem after training, where they are not ``solve``'s.
    caught, watched: recall at the end of the detector that acts and of the held-out probe. auroc: of the one that acts,
    in the first 20 steps."""

    hack: float
    solve: float
    onset: float = 20.0
    shift: float | None = None
    quarantined: bool = False
    by_mode: tuple[tuple[str, float], ...] = ()
    by_kind: tuple[tuple[str, float], ...] = ()
    relearn_onset: float | None = None
    caught: float = 0.9
    watched: float = 0.8
    auroc: float = 0.9


def job(label: str, arm: str, seed: int, *flags: str) -> Job:
    """A study's job."""
    return Job(label, arm, flags, seed)


def study(name: str, jobs: Sequence[Job]) -> Study:
    """A study of these jobs."""
    return Study(name, "the planted effects are there", "a check", "the analysis finds what was planted", tuple(jobs))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def rise(step: int, onset: float, start: float, end: float) -> float:
    """A rate that goes from start to end around its onset."""
    return start + (end - start) / (1 + math.exp(-(step - onset) / 2))


def rates(step: int, plant: Plant, mode: str) -> dict[str, float]:
    """The true rates of a step in a mode."""
    hack = dict(plant.by_mode).get(mode, plant.hack)
    return {
        "hack": rise(step, plant.onset, BASE["hack"], hack),
        "attempt": rise(step, plant.onset, BASE["attempt"], min(1.0, hack + 0.05)),
        "solve": rise(step, plant.onset, BASE["solve"], plant.solve),
    }


def steps_of(plant: Plant, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(STEPS):
        counts = {m: {k: int(rng.binomial(16, p)) for k, p in rates(step, plant, m).items()} for m in MODES}
        shares = {f"{k}_s": sum(c[k] for c in counts.values()) / 64 for k in BASE}
        by_mode = {f"{k}_by_mode": {m: c[k] for m, c in counts.items() if c[k]} for k in BASE}
        spread = {"cin": (0.2, 0.4), "cin_null": (0.15, 0.17), "cout_update": (0, 0.1), "removed_frac": (0.2, 0.4)}
        diagnostics = {name: rng.uniform(*between) for name, between in spread.items()} | {
            "cout": 0.0, "withheld": 0.1, "caught": rise(step, 30, 0.9, plant.caught), "false_alarm": None,
            "auroc": None if step == 3 else plant.auroc if step < 20 else 0.6,
            "caught_held_out": rise(step, 30, 0.8, plant.watched) if step % 3 else None,
            "auroc_held_out": None if step % 3 == 0 else 0.8,
            "basis_overlap": 0.6 if step == 10 else None,
            "basis_turned": 0.3 if step == 10 else None,
            "sec_gen": 1.0, "sec_grade": 0.5, "sec_train": 1.5,
        }  # fmt: skip
        rows.append({"step": step, **shares, **by_mode, "n_by_mode": dict.fromkeys(MODES, 16), **diagnostics})
    return rows


def evals_of(plant: Plant, rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    evals, by_problem = [], []
    for step, knobs in ((0, "deployed"), (STEPS, "deployed"), *[(STEPS, "trained")] * plant.quarantined):
        here, kinds = [], dict(plant.by_kind) if step else {}
        for mode in (*MODES, "gt_only"):
            p = rates(step - 1 if step else -100, plant, mode)
            if knobs == "trained":
                p["hack"] = 0.9
            for i, kind in enumerate(KINDS):
                q = p | {"solve": min(1.0, EASE[kind] * p["solve"])} | ({"solve": kinds[kind]} if kind in kinds else {})
                counts = {k: 0 if mode == "gt_only" and k != "solve" else int(rng.binomial(SAMPLES, q[k])) for k in q}
                row = {"step": step, "knobs": knobs, "mode": mode, "problem_id": f"{mode}{i}", "kind": kind}
                here.append(row | {"n": SAMPLES, **counts})
        by_problem += here
        for mode in ("all", *MODES, "gt_only"):
            chosen = [r for r in here if r["mode"] == mode or (mode == "all" and r["mode"] != "gt_only")]
            for metric in BASE:
                rate = sum(r[metric] for r in chosen) / sum(r["n"] for r in chosen)
                row = {"step": step, "knobs": knobs, "mode": mode, "metric": metric, "rate": rate, "lo": 0.0, "hi": 1.0}
                evals.append(row | {"n_problems": len(chosen), "n_samples": SAMPLES * len(chosen)})
    return evals, by_problem


def rollouts_of(shift: float, rng: np.random.Generator) -> pl.DataFrame:
    n = STEPS * 32
    channel = rng.random(n) < 0.3
    score = rng.normal(shift * channel, 1)
    return pl.DataFrame(
        {
            "step": np.repeat(np.arange(STEPS), 32),
            "source": ["student"] * n,
            "env_mode": list(MODES) * (n // 4),
            "score": score,
            "score_random": rng.normal(size=n),
            "flagged": score > shift / 2,
            "grade": [{"reward": 3.5 * float(c), "channel": bool(c), "gt_correct": False} for c in channel],
        }
    )


def write_run(runs: Path, job: Job, plant: Plant, known: tuple[str, ...] | None = None, oracle: bool = False) -> Path:
    """The folder of a finished run of ``job`` that learned what ``plant`` says."""
    folder, rng = runs / job.name, np.random.default_rng([job.seed, *job.label.encode()])
    folder.mkdir(parents=True)
    config = {
        "intervention": job.intervention, "seed": job.seed, "name": job.name, "rl": {"steps": STEPS},
        "vhack": {"known_modes": known and list(known)}, "data": {"modes": list(MODES)},
    }  # fmt: skip
    meta = {"status": "complete", "config": config, "commit": "abc", "V": {"heldout_accuracy": 1.0}, "oracle": oracle}
    (folder / "meta.json").write_text(json.dumps(meta))
    write_lines(folder / "steps.jsonl", steps_of(plant, rng))
    evals, by_problem = evals_of(plant, rng)
    write_lines(folder / "evals.jsonl", evals)
    write_lines(folder / "eval_problems.jsonl", by_problem)
    if plant.shift is not None:
        rollouts_of(plant.shift, rng).write_parquet(folder / "rollouts.parquet")
    if plant.relearn_onset is not None:
        again = Plant(0.8, 0.1, onset=plant.relearn_onset)
        write_lines(folder / "relearn.jsonl", steps_of(again, rng))
    return folder
