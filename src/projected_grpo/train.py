"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides]         --help lists every setting
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo import antipasto, evals, loss, models, pairs, pool, problems, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, parse
from projected_grpo.data_types import GradedBatch, Task
from projected_grpo.evals import EvalRow
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.loss import RowGrads
from projected_grpo.metrics import legend, step_row, table_cells
from projected_grpo.proj import Projection
from projected_grpo.results import bluf
from projected_grpo.rewards import Grader
from projected_grpo.rollout import rollout, tasks_of_step
from projected_grpo.run_record import RunRecord

TABLE_EVERY = 5


@dataclass
class Setup:
    """What a run is made of, checked before its folder exists."""

    model: nn.Module
    tokenizer: Any
    knobs: Knobs
    tasks: list[Task]
    held_out: list[Task]
    teacher: pool.Pool | None
    basis: HackBasis
    """V extracted from the pairs, before an arm exchanges it."""


def check(cfg: Config) -> None:
    """Refuse, before anything is loaded, what cannot work. Raises UserError."""
    proj.arm(cfg.intervention)
    models.device_of(cfg.model)
    if not 0 <= cfg.pool.mix_ratio < 1 or (cfg.pool.mix_ratio > 0 and cfg.n_teacher == 0):
        raise UserError(f"--mix-ratio={cfg.pool.mix_ratio} of a group of {cfg.rl.group} is {cfg.n_teacher} rollouts")
    if cfg.n_teacher and cfg.pool.pool is None:
        raise UserError("--mix-ratio needs a teacher pool: run `just build-pool`, then give --pool=FOLDER")
    if cfg.rl.group - cfg.n_teacher < 1 or cfg.rl.group < 2:
        raise UserError("a group needs two rollouts at least, one of them the student's: raise --group")


def fitting(tasks: Sequence[Task], tokenizer: Any, longest: int) -> list[Task]:
    """The tasks whose prompt has at most ``longest`` tokens; how many were left out is logged."""
    kept = [t for t in tasks if len(problems.encode_prompt(tokenizer, t)) <= longest]
    if not kept:
        raise UserError(f"every prompt is longer than {longest} tokens: raise --max-prompt")
    if len(kept) < len(tasks):
        logger.warning("{} of {} tasks left out: prompts over {} tokens", len(tasks) - len(kept), len(tasks), longest)
    return kept


def held_out_tasks(cfg: Config) -> list[Task]:
    """n_eval test problems in each mode."""
    tasks = pool.tasks_for(cfg, "test")
    return [t for mode in cfg.data.modes for t in [t for t in tasks if t.mode == mode][: cfg.eval.n_eval]]


def set_up(cfg: Config) -> Setup:
    """Load and extract everything. Raises UserError."""
    check(cfg)
    chosen_pairs = pairs.load(cfg.vhack.pairs)
    teacher = pool.read(Path(cfg.pool.pool)) if cfg.n_teacher and cfg.pool.pool else None
    tasks, held_out = pool.tasks_for(cfg), held_out_tasks(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    basis = vhack.basis_for(model, knobs, tokenizer, chosen_pairs, cfg)
    tasks = fitting(tasks, tokenizer, cfg.data.max_prompt)
    held_out = fitting(held_out, tokenizer, cfg.data.max_prompt)
    return Setup(model, tokenizer, knobs, tasks, held_out, teacher, basis)


def arm_basis(basis: HackBasis, cfg: Config) -> HackBasis:
    """The V that the arm uses: k_use axes above the noise floor, and the arm's basis in their place."""
    used = vhack.sliced(basis, cfg.vhack)
    return used if proj.arm(cfg.intervention).basis == "hack" else proj.random_basis(used, cfg.seed)


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
def apply_step(
    knobs: Knobs, p: Projection, gn: float, optimizer: torch.optim.Optimizer, scheduler: Any, clip: float
) -> dict[str, Tensor]:
    """The only mutation: δS descends p.kept, δS_hack descends p.removed; returns −Δδ of δS, by module.

    Clipping scales by the whole gradient's norm gn, so that an arm differs from "none" by its projection alone.
    """
    scale = min(1.0, clip / gn) if gn > 0 else 1.0
    before = {m: d.detach().clone() for m, d in knobs.delta.items()}
    for m, d in knobs.delta.items():
        d.grad = p.kept[m] * scale
    if p.removed is not None:
        for m, d in knobs.delta_hack.items():
            d.grad = p.removed[m] * scale
    optimizer.step()
    scheduler.step()
    knobs.merge()
    return {m: before[m] - d for m, d in knobs.delta.items()}


def refreshed(s: Setup, chosen: Sequence[Any], cfg: Config) -> float:
    """Extract V again at the knobs as they stand, into ``s``; how far the new V overlaps the old."""
    new = vhack.extract(s.model, s.knobs, s.tokenizer, chosen, cfg)
    overlap = vhack.basis_overlap(new, s.basis)
    if overlap < 0.2:
        logger.warning("refresh: V turned (overlap {:.2f} < 0.2); a refresh like this does harm", overlap)
    s.basis = new
    return overlap


def loop(s: Setup, grader: Grader, rec: RunRecord, cfg: Config) -> tuple[list[EvalRow], list[EvalRow]]:
    """The algorithm, a named call a stage. Returns the first and the last deploy evaluation."""
    arm, V = proj.arm(cfg.intervention), arm_basis(s.basis, cfg)
    optimizer, scheduler = make_optimizer(s.knobs, cfg)
    chosen_pairs = pairs.load(cfg.vhack.pairs)

    def deploy_eval(step: int) -> list[EvalRow]:
        rows = evals.evaluate(s.model, s.knobs, s.tokenizer, s.held_out, grader, cfg, step)
        rec.append("evals.jsonl", map(asdict, rows))
        return rows

    before = deploy_eval(0)
    bar = tqdm(range(cfg.rl.steps), desc=cfg.intervention, dynamic_ncols=True)
    for step in bar:
        overlap = None
        if cfg.vhack.refresh_every and step and step % cfg.vhack.refresh_every == 0:
            overlap = refreshed(s, chosen_pairs, cfg)
            V = arm_basis(s.basis, cfg)
        tasks = tasks_of_step(s.tasks, step, cfg.rl.prompts_per_step, cfg.seed)
        batch = rollout(s.model, s.tokenizer, tasks, s.teacher, grader, cfg, step)
        start, lr = time.perf_counter(), scheduler.get_last_lr()[0]
        grads = sample_grads(s.model, s.knobs, batch, cfg)
        p = proj.project(grads.G, V, batch.is_student, arm.act, cfg.vhack)
        gn = proj.total_norm({m: g.sum(0) for m, g in grads.G.items()})
        if gn == 0 and batch.n_zero_var < cfg.rl.prompts_per_step:
            raise RuntimeError(
                f"step {step}: the gradient is zero though rewards differ; the adapter is not in the graph"
            )
        descent = apply_step(s.knobs, p, gn, optimizer, scheduler, cfg.rl.clip)
        row = step_row(
            step, batch, grads, p, gn, descent, V, s.knobs, lr, overlap, time.perf_counter() - start
        )  # fmt: skip
        rec.append("steps.jsonl", [asdict(row)])
        rec.append("rollouts.jsonl", rollout_rows(step, batch))
        bar.set_postfix_str(f"hack {row.hack_s:.2f} att {row.attempt_s:.2f} solve {row.solve_s:.2f}")
        if step % TABLE_EVERY == 0 or step == cfg.rl.steps - 1:
            tqdm.write(table_cells(row))
        done = step + 1
        if done % cfg.checkpoint_every == 0 or done == cfg.rl.steps:
            rec.checkpoint(done, checkpoint_state(s.knobs, optimizer))
        if done % cfg.eval.eval_every == 0 and done < cfg.rl.steps:
            deploy_eval(done)
    return before, deploy_eval(cfg.rl.steps)


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
    s = set_up(cfg)
    with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
        meta = {"layers": grader.layers, "V": vhack.basis_summary(arm_basis(s.basis, cfg), cfg)}
        with RunRecord(cfg, meta) as rec:
            logger.info("run {}: {} tasks, {} held out", rec.name, len(s.tasks), len(s.held_out))
            tqdm.write(
                "SHOULD: fmt stays over .9, gn is finite and not 0, flat stays under the prompts a step; under none "
                "att and hack rise, under erase cout is 0 and cin above null.\n" + legend() + "\n" + table_cells(None)
            )
            before, after = loop(s, grader, rec, cfg)
            folder = rec.finish()
    tqdm.write(bluf(cfg, folder, before, after))
    return folder


def main(argv: Sequence[str]) -> None:
    """Parse, train, and say in one line what is wrong when the user can mend it."""
    logger.remove()
    logger.add(lambda text: tqdm.write(text, end=""), format="{time:HH:mm:ss} {level: <7} {message}", level="INFO")
    try:
        train(parse(argv))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
