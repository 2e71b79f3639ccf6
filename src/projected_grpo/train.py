"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides]         --help lists every setting
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo import evals, loss, pool, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, parse
from projected_grpo.data_types import GradedBatch
from projected_grpo.evals import EvalRow
from projected_grpo.loss import RowGrads
from projected_grpo.metrics import StepRow, Update, legend, step_row, table_cells
from projected_grpo.prepare import Experiment, arm_basis, refresh, set_up
from projected_grpo.proj import Projection
from projected_grpo.results import bluf
from projected_grpo.rewards import Grader
from projected_grpo.rollout import rollout, tasks_of_step
from projected_grpo.run_record import RunRecord
from projected_grpo.sandbox_worker import SandboxError

TABLE_EVERY = 5
SHOULD = (
    "SHOULD: fmt stays over .9, gn is finite and not 0, flat stays under the prompts a step; under none att and hack "
    "rise; under erase cout is 0 and cin stands above null."
)


def make_optimizer(knobs: Knobs, cfg: Config) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over δS and δS_hack (no decay there: it would leak the quarantine) with warm-up and the schedule."""
    groups = [
        {"params": list(knobs.delta.values()), "weight_decay": cfg.rl.weight_decay},
        {"params": list(knobs.delta_hack.values()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.rl.lr, betas=cfg.rl.betas, foreach=True)

    def factor(step: int) -> float:
        if step < cfg.rl.warmup:
            return (step + 1) / (cfg.rl.warmup + 1)
        if cfg.rl.schedule == "constant":
            return 1.0
        done = (step - cfg.rl.warmup) / max(1, cfg.rl.steps - cfg.rl.warmup)
        return cfg.rl.min_lr_frac + (1 - cfg.rl.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def sample_grads(model: nn.Module, knobs: Knobs, batch: GradedBatch, cfg: Config) -> RowGrads:
    """Every rollout's own gradient of the Dr.GRPO loss in δS, from one backward."""
    return loss.row_gradients(
        model,
        knobs,
        batch.ids,
        batch.mask,
        batch.A / cfg.loss_denominator,
        temperature=cfg.rl.temperature,
        beta=cfg.rl.beta,
        kl_weight=1 / cfg.loss_denominator,
        micro_batch=cfg.rl.micro_batch,
    )


@torch.no_grad()
def apply_step(knobs: Knobs, p: Projection, optimizer: torch.optim.Optimizer, scheduler: Any, clip: float) -> Update:
    """The only mutation: δS descends p.kept, and under route δS_hack descends p.removed.

    Clipping scales by the norm of the whole gradient, so that an arm differs from "none" by its projection alone.
    """
    scale = min(1.0, clip / p.gn) if p.gn > 0 else 1.0
    lr, before = scheduler.get_last_lr()[0], {m: d.detach().clone() for m, d in knobs.delta.items()}
    for m, d in knobs.delta.items():
        d.grad = p.kept[m] * scale
    if p.removed is not None:
        for m, d in knobs.delta_hack.items():
            d.grad = p.removed[m] * scale
    optimizer.step()
    scheduler.step()
    knobs.merge()
    return Update({m: before[m] - d for m, d in knobs.delta.items()}, lr)


def loop(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config) -> tuple[list[EvalRow], list[EvalRow]]:
    """The algorithm, a named call a stage. Returns the first and the last deploy evaluation."""
    act, V = proj.arm(cfg.intervention).act, arm_basis(x.basis, cfg)
    optimizer, scheduler = make_optimizer(x.knobs, cfg)
    before = deploy_eval(x, grader, rec, cfg, 0)
    bar = tqdm(range(cfg.rl.steps), desc=cfg.intervention, dynamic_ncols=True)
    for step in bar:
        overlap = None
        if cfg.vhack.refresh_every and step and step % cfg.vhack.refresh_every == 0:
            overlap = refresh(x, cfg)
            V = arm_basis(x.basis, cfg)
        tasks = tasks_of_step(x.tasks, step, cfg.rl.prompts_per_step, cfg.seed)
        batch = rollout(x.model, x.tokenizer, tasks, x.teacher, grader, cfg, step)
        start = time.perf_counter()
        grads = sample_grads(x.model, x.knobs, batch, cfg)
        p = proj.project(grads.G, V, batch.is_student, act, cfg.vhack)
        u = apply_step(x.knobs, p, optimizer, scheduler, cfg.rl.clip)
        row = step_row(step, batch, grads, p, u, V, x.knobs, overlap, time.perf_counter() - start)
        rec.append("steps.jsonl", [asdict(row)])
        rec.append("rollouts.jsonl", rollout_rows(step, batch))
        report(bar, row, cfg)
        done = step + 1
        if done % cfg.checkpoint_every == 0 or done == cfg.rl.steps:
            rec.checkpoint(done, checkpoint_state(x.knobs, optimizer))
        if done % cfg.eval.eval_every == 0 and done < cfg.rl.steps:
            deploy_eval(x, grader, rec, cfg, done)
    return before, deploy_eval(x, grader, rec, cfg, cfg.rl.steps)


def deploy_eval(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, step: int) -> list[EvalRow]:
    """Evaluate on the held-out problems, and write it down."""
    rows = evals.evaluate(x.model, x.knobs, x.tokenizer, x.held_out, grader, cfg, step)
    rec.append("evals.jsonl", map(asdict, rows))
    return rows


def report(bar: tqdm, row: StepRow, cfg: Config) -> None:
    """The few numbers that matter on the bar; a table row every few steps."""
    bar.set_postfix_str(f"hack {row.hack_s:.2f} att {row.attempt_s:.2f} solve {row.solve_s:.2f}")
    if row.step % TABLE_EVERY == 0 or row.step == cfg.rl.steps - 1:
        tqdm.write(table_cells(row))


def checkpoint_state(knobs: Knobs, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Knobs and AdamW's moments by name."""
    named = {f"{m}.{k}": p for k in ("delta", "delta_hack") for m, p in getattr(knobs, k).items()}
    moments = {f"adamw.{n}.{key}": value for n, p in named.items() for key, value in optimizer.state.get(p, {}).items()}
    return knobs.state() | moments


def rollout_rows(step: int, batch: GradedBatch) -> list[dict[str, Any]]:
    """The step's rollouts as they are written down."""
    return [
        {"step": step, "source": r.source, "A": a, **pool.row_of(r.task, r.text, r.grade)}
        for r, a in zip(batch.rollouts, batch.A.tolist(), strict=True)
    ]


def train(cfg: Config) -> Path:
    """One run from config to its finished folder. Raises UserError before a folder exists."""
    x = set_up(cfg)
    with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
        meta = {"layers": grader.layers, "V": vhack.basis_summary(arm_basis(x.basis, cfg), cfg)}
        with RunRecord(cfg, meta) as rec:
            logger.info("run {}: {} tasks, {} held out", rec.name, len(x.tasks), len(x.held_out))
            tqdm.write("\n".join((SHOULD, legend(), table_cells(None))))
            before, after = loop(x, grader, rec, cfg)
            folder = rec.finish()
    tqdm.write(bluf(cfg, folder, before, after))
    return folder


def main(argv: Sequence[str]) -> None:
    """Parse, train, and say in one line what is wrong when the user can mend it."""
    logger.remove()
    logger.add(lambda text: tqdm.write(text, end=""), format="{time:HH:mm:ss} {level: <7} {message}", level="INFO")
    try:
        train(parse(argv))
    except (UserError, SandboxError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
