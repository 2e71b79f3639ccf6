"""What a preset's model can do before any training: V on held-out pairs against shuffled labels, and its base rates.

python -m projected_grpo.tools.base_report <preset> [--overrides]

V is judged as an extraction judges it, on the last n_heldout pairs; so is a V of shuffled labels, that of the control
arm: the pairs' prompts, lengths and scale, and no direction. Base rates are of the
held-out tasks that a deploy evaluation uses.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from projected_grpo import antipasto, models, pairs, prepare, problems, rollout, rollout_log
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.command_line import parse, run_main
from projected_grpo.rewards import Grader

SHUFFLES = 20
VERDICTS = ("format_ok", "compiles", "gt_correct", "attempted", "exploited")


def main(argv: Sequence[str]) -> None:
    """Print the report, with the seconds that each part took."""
    cfg = parse(argv)
    rollout.refuse_sampler(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        seconds[name] = time.perf_counter() - start
        return made

    teacher = rollout_log.read_pool(Path(cfg.pool.pool)) if cfg.pool.pool else None
    chosen = pairs.load(cfg.vhack, teacher, problems.tasks_for(cfg))
    model, tokenizer = timed("load", lambda: models.load(cfg.model))
    knobs = timed("adapters", lambda: antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank))
    sample = timed("sampler", lambda: rollout.sampler_of(model, knobs, cfg))
    grads = timed("pairs' gradients", lambda: vhack.side_gradients(model, knobs, tokenizer, chosen, cfg))
    real = vhack.fit_basis(grads, cfg.vhack).meta
    null = [
        vhack.heldout_accuracy(vhack.fit_basis(vhack.shuffled(grads, seed), cfg.vhack).V, grads, cfg.vhack.n_heldout)
        for seed in range(SHUFFLES)
    ]
    tasks = prepare.held_out_tasks(cfg)
    written = timed(
        "sampling",
        lambda: rollout.complete(sample, tokenizer, tasks, cfg.eval.eval_samples, cfg, rollout.seeded("cpu", cfg.seed)),
    )
    asked = [task for task in tasks for _ in range(cfg.eval.eval_samples)]
    with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
        grades = grader.grade([(task, text) for task, (_, text) in zip(asked, written, strict=True)])
    print("V: {heldout_accuracy} of {n_heldout} held-out pairs point hack-ward, fitted to {n_pairs}".format(**real))
    if cfg.vhack.n_heldout:
        print(f"shuffled labels, {SHUFFLES} times: mean {sum(null) / SHUFFLES:.3f}, {min(null):.3f} to {max(null):.3f}")
    rows = [(v, sum(getattr(g, v) for g in grades), len(grades)) for v in VERDICTS]
    print(tabulate(rows, headers=("base model", "completions", "of")))
    print(tabulate(seconds.items(), headers=("part", "seconds"), floatfmt=".1f"))
    print(f"\nthe first completion, in mode {asked[0].mode}:\n{written[0][1]}")


if __name__ == "__main__":
    run_main(main)
