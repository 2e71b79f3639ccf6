"""What a preset's model can do before any training: V on held-out pairs against shuffled labels, and its base rates.

python -m projected_grpo.base_report <preset> [--overrides]

V is judged as an extraction judges it, on the last n_heldout pairs; shuffled labels exchange the two sides of each
fitting pair by a coin, so that they have the pairs' prompts, lengths and scale, and no direction. Base rates are of the
held-out tasks that a deploy evaluation uses.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor

from projected_grpo import antipasto, models, pairs, pool, prepare, rollout
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.config import Config, UserError, parse
from projected_grpo.rewards import Grader
from projected_grpo.sandbox_worker import SandboxError

SHUFFLES = 20
VERDICTS = ("format_ok", "compiles", "gt_correct", "attempted", "exploited")


def judged(hack: dict[str, Tensor], clean: dict[str, Tensor], signs: Float[Tensor, " n"], cfg: Config) -> float:
    """Held-out accuracy of the V that is fitted to the first pairs, the sides of those with sign −1 exchanged."""
    n = len(signs)
    D = {m: (hack[m][:n] - clean[m][:n]) * signs[:, None].to(hack[m]) for m in hack}
    V = {m: vhack.fit(d, cfg.vhack.k, cfg.vhack.tau_axis)[0] for m, d in D.items()}
    return vhack.heldout_accuracy(V, {m: h[n:] for m, h in hack.items()}, {m: c[n:] for m, c in clean.items()})


def shuffled(n: int, seed: int) -> Float[Tensor, " n"]:
    """A fair coin's sign for each fitting pair."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def main(argv: Sequence[str]) -> None:
    """Print the report, with the seconds that each part took."""
    cfg = parse(argv)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        seconds[name] = time.perf_counter() - start
        return made

    teacher = pool.read(Path(cfg.pool.pool)) if cfg.pool.pool else None
    chosen = pairs.load(cfg.vhack, teacher, pool.tasks_for(cfg))
    n = len(chosen) - cfg.vhack.n_heldout
    if n < cfg.vhack.k or cfg.vhack.n_heldout < 1:
        raise UserError(f"{n} pairs to fit and {cfg.vhack.n_heldout} held out are too few: add pairs, or lower --k")
    model, tokenizer = timed("load", lambda: models.load(cfg.model))
    knobs = timed("adapters", lambda: antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank))
    hack, clean = timed("pairs' gradients", lambda: vhack.side_gradients(model, knobs, tokenizer, chosen, cfg))
    real = judged(hack, clean, torch.ones(n), cfg)
    null = [judged(hack, clean, shuffled(n, seed), cfg) for seed in range(SHUFFLES)]
    tasks = prepare.held_out_tasks(cfg)
    written = timed(
        "sampling",
        lambda: rollout.complete(model, tokenizer, tasks, cfg.eval.eval_samples, cfg, rollout.seeded("cpu", cfg.seed)),
    )
    asked = [task for task in tasks for _ in range(cfg.eval.eval_samples)]
    with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
        grades = grader.grade([(task, text) for task, (_, text) in zip(asked, written, strict=True)])
    print(f"V on {cfg.vhack.n_heldout} held-out pairs, fitted to {n}: {real:.3f} point hack-ward")
    print(f"shuffled labels, {SHUFFLES} times: mean {sum(null) / SHUFFLES:.3f}, {min(null):.3f} to {max(null):.3f}")
    rows = [(v, sum(getattr(g, v) for g in grades), len(grades)) for v in VERDICTS]
    print(tabulate(rows, headers=("base model", "completions", "of")))
    print(tabulate(seconds.items(), headers=("part", "seconds"), floatfmt=".1f"))
    print(f"\nthe first completion, in mode {asked[0].mode}:\n{written[0][1]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, SandboxError) as error:
        sys.exit(f"error: {error}")
