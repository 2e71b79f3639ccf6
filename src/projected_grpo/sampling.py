"""Sampling with a key-value cache, one call for all prompts and rollouts of a step.

Four things make it cheaper than a general ``generate``: each distinct prompt is read once and its cache entry copied to
its rollouts; rows that have ended make room for waiting ones, or leave the batch where none wait; a token is written
into the cache in place; and nothing is done a token that does not depend on it (``decoding``). Under the same generator
it draws the same tokens as transformers' ``generate`` (a check holds it to that).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config
from projected_grpo.data_types import Completion, Sampling
from projected_grpo.decoding import Read, Slots, pace_of, read, takes_joiners


@runtime_checkable
class Sampler(Protocol):
    """n completions of each prompt, as ``sample`` returns them, by the model with the knobs that are in use.

    Its randomness is drawn from ``generator``.
    """

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator
    ) -> list[Completion]: ...


CROWDED = 0.8
"""Share of slots with a row that goes on under which ended ones give way."""


@torch.inference_mode()
def sample(
    model: nn.Module, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator,
    rows: int | None = None,
) -> list[Completion]:  # fmt: skip
    """n completions of each prompt, prompt by prompt: row i·n + j is completion j of prompt i.

    rows: at most so many at once, all of them when None; one that has ended makes room for a waiting one. Random
    numbers are drawn on the model's device: from ``generator``, or from one there that it seeds. The generator's state
    after a call without waiting rows depends on the number of turns and not on which rows had ended.
    """
    asked = [i for i in range(len(prompts)) for _ in range(n)]
    most = min(rows or len(asked), len(asked))
    dice = generator
    if dice.device.type != model.device.type:
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        dice = torch.Generator(device=model.device).manual_seed(int(seed))
    if takes_joiners(model):
        return decode(model, prompts, asked, most, how, dice)
    whole = most // n * n or most  # a prompt's rollouts in one lot where they fit in
    written: list[Completion] = []
    for lot in (asked[i : i + whole] for i in range(0, len(asked), whole)):
        written += decode(model, prompts[lot[0] : lot[-1] + 1], [i - lot[0] for i in lot], len(lot), how, dice)
    return written


def decode(
    model: nn.Module, prompts: Sequence[Sequence[int]], asked: Sequence[int], most: int, how: Sampling,
    dice: torch.Generator,
) -> list[Completion]:  # fmt: skip
    """A completion of prompt ``asked[row]`` for every row, at most so many at once. asked: in order."""
    slots = Slots(model, how, most, len(asked), max(map(len, prompts)), pace_of(model))
    queue = Queue(model, prompts, asked, max(1, most * len(prompts) // len(asked)), how, deque(range(len(asked))))
    while True:
        going = len(slots.rows) - len(slots.free)
        roomy = going < CROWDED * len(slots.rows)
        if queue.rows and roomy:
            queue.seat(slots, dice)
            continue
        if not going:
            return slots.written()
        if roomy:
            slots.shrink()
        slots.take_turns(dice)


@dataclass
class Queue:
    """Rows that wait for a slot, in order. Prompts are read ``at_once``, when the first of their rows is seated:
    ``lot`` are those that were read last, from prompt ``first`` on.
    """

    model: nn.Module
    prompts: Sequence[Sequence[int]]
    asked: Sequence[int]
    at_once: int
    how: Sampling
    rows: deque[int]
    lot: Read | None = None
    first: int = 0

    def seat(self, slots: Slots, dice: torch.Generator) -> None:
        """Rows into the free slots, as many as there are."""
        free = slots.free
        while free and self.rows:
            if self.lot is None or self.asked[self.rows[0]] >= self.first + len(self.lot.sizes):
                self.first = self.asked[self.rows[0]]
                self.lot = read(self.model, self.prompts[self.first : self.first + self.at_once], self.how)
            end = self.first + len(self.lot.sizes)
            here = [row for row in islice(self.rows, len(free)) if self.asked[row] < end]
            slots.admit(free[: len(here)], here, self.lot, [self.asked[row] - self.first for row in here], dice)
            free = free[len(here) :]
            for _ in here:
                self.rows.popleft()
        slots.look()


def refuse(cfg: Config) -> None:
    """A sampler that cannot work, said before anything is loaded. Raises UserError."""
    if cfg.model.sampler == "vllm":
        from projected_grpo.scale import vllm_sampling

        vllm_sampling.refuse(cfg)


def sampler_of(model: nn.Module, knobs: Knobs, cfg: Config) -> Sampler:
    """The sampler asked for. Raises UserError when vLLM does not start."""
    if cfg.model.sampler == "own":
        return partial(sample, model, rows=cfg.model.sample_rows)
    from projected_grpo.scale import vllm_sampling

    return vllm_sampling.sampler(model, knobs, cfg)
