"""One step's rollouts: which tasks, the student's completions, the teacher's share, grades."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from projected_grpo import loss, problems
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config
from projected_grpo.data_types import GradedBatch, Rollout, Sampling, Task
from projected_grpo.rewards import Grader
from projected_grpo.rollout_log import Pool
from projected_grpo.sampling import Sampler


@dataclass
class Policy:
    """What writes completions. ``sample`` samples from the model with the knobs that are in use."""

    model: nn.Module
    tokenizer: Any
    knobs: Knobs
    sample: Sampler


def seeded(device: str, *parts: object) -> torch.Generator:
    """A generator that is a pure function of its parts: a step's randomness needs no state to be resumed."""
    return torch.Generator(device=device).manual_seed(random.Random(repr(parts)).getrandbits(63))


def tasks_of_step(tasks: Sequence[Task], step: int, n: int, seed: int) -> list[Task]:
    """The step's n tasks: endless epochs, each shuffled anew, modes in turn so that every step sees all of them.

    A pure function of (seed, step).
    """
    chosen: list[Task] = []
    for position in range(step * n, (step + 1) * n):
        epoch, at = divmod(position, len(tasks))
        chosen.append(_epoch(tasks, seed, epoch)[at])
    return chosen


def _epoch(tasks: Sequence[Task], seed: int, epoch: int) -> list[Task]:
    rng = random.Random(f"{seed} {epoch}")
    by_mode: dict[str, list[Task]] = {}
    for task in tasks:
        by_mode.setdefault(task.mode, []).append(task)
    for queue in by_mode.values():
        rng.shuffle(queue)
    turns = [(at / len(queue), mode, task) for mode, queue in by_mode.items() for at, task in enumerate(queue)]
    return [task for _, _, task in sorted(turns, key=lambda turn: turn[:2])]


def complete(
    sample: Sampler, tokenizer: Any, tasks: Sequence[Task], n: int, cfg: Config, generator: torch.Generator
) -> list[tuple[tuple[int, ...], str]]:
    """n sampled completions of each task as (token ids, text), task by task. Text is without special tokens and without
    the end of turn.
    """
    how = Sampling(
        cfg.rl.max_new, tokenizer.ends, tokenizer.pad_token_id, cfg.rl.temperature, cfg.rl.top_p, len(tokenizer)
    )
    ids = sample([problems.encode_prompt(tokenizer, t) for t in tasks], n, how, generator)
    said = [row[:-1] if row and row[-1] in how.eos else row for row in ids]
    return [(tuple(i), t) for i, t in zip(ids, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True)]


def rollout(
    x: Policy, tasks: Sequence[Task], teacher: Pool | None, grader: Grader, cfg: Config, step: int
) -> GradedBatch:
    """Sample, mix in the teacher's rollouts, grade."""
    clock = [time.perf_counter()]
    n_student = cfg.rl.group - cfg.n_teacher
    generator = seeded("cpu", cfg.seed, step, "rollout")
    written = complete(x.sample, x.tokenizer, tasks, n_student, cfg, generator)
    clock.append(time.perf_counter())
    asked = [task for task in tasks for _ in range(n_student)]
    grades = grader.grade([(task, text) for task, (_, text) in zip(asked, written, strict=True)])
    student = [Rollout(t, "student", i, text, g) for t, (i, text), g in zip(asked, written, grades, strict=True)]
    clock.append(time.perf_counter())
    rows: list[Rollout] = []
    for at, task in enumerate(tasks):
        rows += student[at * n_student : (at + 1) * n_student]
        if teacher is not None and cfg.n_teacher:
            rows += teacher.draw(task, cfg.n_teacher, x.tokenizer, random.Random(f"{cfg.seed} {step} {at}"))
    return collated(x, rows, {"gen": clock[1] - clock[0], "grade": clock[2] - clock[1]})


def collated(x: Policy, rows: Sequence[Rollout], seconds: Mapping[str, float]) -> GradedBatch:
    """The batch of these rollouts, which stand group by group."""
    device = x.knobs.device
    prompts = [problems.encode_prompt(x.tokenizer, r.task) for r in rows]
    ids, mask = loss.collate(prompts, [r.ids for r in rows], x.tokenizer.pad_token_id, device)
    return GradedBatch(
        ids=ids,
        mask=mask,
        rewards=torch.tensor([r.grade.reward for r in rows]).to(device),
        is_student=torch.tensor([r.source == "student" for r in rows], device=device),
        rollouts=tuple(rows),
        seconds=seconds,
    )
