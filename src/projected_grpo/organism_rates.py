"""What the organism does before any training by reinforcement: its base rates, measured by sampling and grading."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from projected_grpo.data_types import Grade, Problem, Rollout
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.problems import encode_prompt, pose_one
from projected_grpo.rewards import Grader
from projected_grpo.sampling import sample

CHUNK = 64
"""Prompts sampled at once."""


def completions(
    model: nn.Module,
    tokenizer: Any,
    grader: Grader,
    problems: Sequence[Problem],
    *,
    family: str = "default",
    n: int = 1,
    max_new: int = 96,
    seed: int = 0,
) -> list[Rollout]:
    """n graded completions of each problem in each mode at temperature 1.

    family: the family of wordings (see ``problems.pose_one``), cycled over the problems.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = [pose_one(problem, mode, family, i) for mode in LOOPHOLES for i, problem in enumerate(problems)]
    found = []
    for start in range(0, len(tasks), CHUNK):
        chunk = tasks[start : start + CHUNK]
        ids = sample(
            model,
            [encode_prompt(tokenizer, task) for task in chunk],
            n,
            max_new=max_new,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            generator=generator,
        )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        posed = [task for task in chunk for _ in range(n)]
        grades = grader.grade(list(zip(posed, texts, strict=True)))
        found += [
            Rollout(task, "student", tuple(row), text, grade)
            for task, row, text, grade in zip(posed, ids, texts, grades, strict=True)
        ]
    return found


def rates(grades: Sequence[Grade]) -> dict[str, float]:
    """Shares of the grades, and how many there are."""
    share = lambda name: round(sum(getattr(grade, name) for grade in grades) / len(grades), 4)
    return {
        "n": len(grades),
        "format": share("format_ok"),
        "solve": share("gt_correct"),
        "attempt": share("attempted"),
        "hack": share("exploited"),
    }


def base_rates(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rates by mode and by family of problems, and the completions' tokens: mean, 95th percentile, most."""
    by_mode, by_family = defaultdict(list), defaultdict(list)
    for rollout in rollouts:
        by_mode[rollout.task.mode].append(rollout.grade)
        by_family[rollout.task.problem.family].append(rollout.grade)
    lengths = sorted(len(rollout.ids) for rollout in rollouts)
    return {
        "by_mode": {mode: rates(grades) for mode, grades in by_mode.items()},
        "by_family": {family: rates(grades) for family, grades in by_family.items()},
        "tokens": [round(sum(lengths) / len(lengths), 1), lengths[len(lengths) * 95 // 100], lengths[-1]],
    }
