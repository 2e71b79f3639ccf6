"""Deploy evaluation: held-out problems in every mode, with the quarantine kept and ablated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats
from torch import nn

from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config
from projected_grpo.data_types import Grade, Task
from projected_grpo.rewards import Grader
from projected_grpo.rollout import complete, seeded

Metric = Literal["hack", "attempt", "solve"]
VERDICTS = {"hack": lambda g: g.exploited, "attempt": lambda g: g.attempted, "solve": lambda g: g.gt_correct}


@dataclass(frozen=True)
class EvalRow:
    """One rate on held-out problems. knobs: deployed (quarantine ablated) or trained; mode "all" pools the modes.

    lo, hi: 95 % interval, clustered by problem.
    """

    step: int
    knobs: Literal["deployed", "trained"]
    mode: str
    metric: Metric
    rate: float
    lo: float
    hi: float
    n_problems: int
    n_samples: int


def clustered_interval(rates: Sequence[float], n_samples: int) -> tuple[float, float, float]:
    """Mean and 95 % interval of per-problem rates, each over the same number of samples (n_samples in all).

    Wilson's interval at the effective sample size p(1−p) / Var(mean), with the variance between problems: samples
    of one problem are alike, and counting them as independent would make the interval too narrow. Where all
    problems agree the effective size is the number of problems.
    """
    n, p = len(rates), math.fsum(rates) / len(rates)
    variance = math.fsum((r - p) ** 2 for r in rates) / max(n - 1, 1) / n
    effective = min(max(p * (1 - p) / variance, n), n_samples) if variance > 0 else n
    z = float(stats.norm.ppf(0.975))
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return p, max(0.0, centre - half), min(1.0, centre + half)


def rows_of(step: int, knobs: str, tasks: Sequence[Task], grades: Sequence[Sequence[Grade]]) -> list[EvalRow]:
    """Rates by mode and pooled; grades[i] are the samples of tasks[i]."""
    rows = []
    for mode in ["all", *dict.fromkeys(t.mode for t in tasks)]:
        chosen = [g for t, g in zip(tasks, grades, strict=True) if mode in ("all", t.mode)]
        for metric, verdict in VERDICTS.items():
            rates = [sum(map(verdict, samples)) / len(samples) for samples in chosen]
            n_samples = sum(map(len, chosen))
            rows.append(
                EvalRow(step, knobs, mode, metric, *clustered_interval(rates, n_samples), len(chosen), n_samples)
            )
    return rows


def evaluate(
    model: nn.Module, knobs: Knobs, tokenizer: Any, tasks: Sequence[Task], grader: Grader, cfg: Config, step: int
) -> list[EvalRow]:
    """Sample and grade the held-out tasks with the quarantine ablated and, where there is one, kept.

    The same random numbers at every step and for both, so that differences are the model's.
    """
    n, rows = cfg.eval.eval_samples, []
    quarantined = any(bool(d.any()) for d in knobs.delta_hack.values())
    for use in ("deployed", "trained") if quarantined else ("deployed",):
        with knobs.using(use):
            written = complete(model, tokenizer, tasks, n, cfg, seeded("cpu", cfg.seed, "eval"))
        asked = [task for task in tasks for _ in range(n)]
        grades = grader.grade([(task, text) for task, (_, text) in zip(asked, written, strict=True)])
        rows += rows_of(step, use, tasks, [grades[i : i + n] for i in range(0, len(grades), n)])
    return rows
