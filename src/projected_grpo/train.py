"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides]         --help lists every setting
"""

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo import activations, evals, gates, loss, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, parse
from projected_grpo.data_types import GradedBatch
from projected_grpo.evals import EvalRow
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.loss import RowGrads
from projected_grpo.metrics import Step, StepRow, Update, legend, rollout_rows, step_row, table_cells
from projected_grpo.prepare import Experiment, refresh, set_up
from projected_grpo.proj import Arm, Factors, Projection
from projected_grpo.results import bluf
from projected_grpo.rewards import Grader
from projected_grpo.rollout import rollout, seeded, tasks_of_step
from projected_grpo.run_record import RunRecord
from projected_grpo.sandbox_worker import SandboxError
from projected_grpo.shaping import shaped

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


def sample_grads(model: nn.Module, knobs: Knobs, batch: GradedBatch, weight: Tensor, cfg: Config) -> RowGrads:
    """Every rollout's own gradient of the Dr.GRPO loss in δS, from one backward; weight (b,) is A, or 1 for all."""
    return loss.row_gradients(
        model,
        knobs,
        batch.ids,
        batch.mask,
        weight / cfg.loss_denominator,
        temperature=cfg.rl.temperature,
        beta=cfg.rl.beta,
        kl_weight=1 / cfg.loss_denominator,
        micro_batch=cfg.rl.micro_batch,
    )


def with_masks(x: Experiment, grads: RowGrads, batch: GradedBatch, weight: Tensor, f: Factors, cfg: Config) -> RowGrads:
    """The gradients that a routing gate learns from: rows that only δS learns from see the model without quarantine.

    Without that mask both regions would receive the same gradients, and the quarantine would absorb nothing.
    """
    alone = (f.quarantine == 0) & (f.keep != 0)
    with x.knobs.using("deployed"):
        masked = sample_grads(x.model, x.knobs, batch, weight * alone, cfg)
    G = {m: torch.where(alone[:, None], masked.G[m], g) for m, g in grads.G.items()}
    return RowGrads(G, grads.nll, grads.loss, grads.kl)


@torch.no_grad()
def apply_step(
    knobs: Knobs, p: Projection, optimizer: torch.optim.Optimizer, scheduler: Any, clip: float,
    act_on_update: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None,
) -> Update:  # fmt: skip
    """The only mutation: δS descends p.kept, and δS_hack descends p.quarantined where the arm has a quarantine.

    Clipping scales by the norm of the whole gradient, so that an arm differs from "none" by its projection alone.
    act_on_update (project = update): splits δS's descent into (kept, removed); what is removed is undone, and goes to
    the quarantine where there is one.
    """
    scale = min(1.0, clip / p.gn) if p.gn > 0 else 1.0
    lr, before = scheduler.get_last_lr()[0], {m: d.detach().clone() for m, d in knobs.delta.items()}
    for m, d in knobs.delta.items():
        d.grad = p.kept[m] * scale
    if p.quarantined is not None:
        for m, d in knobs.delta_hack.items():
            d.grad = p.quarantined[m] * scale
    optimizer.step()
    scheduler.step()
    if act_on_update is not None:
        _, removed = act_on_update({m: before[m] - d for m, d in knobs.delta.items()})
        for m, d in knobs.delta.items():
            d.add_(removed[m])
            if p.quarantined is not None:
                knobs.delta_hack[m].sub_(removed[m])
    knobs.merge()
    return Update({m: before[m] - d for m, d in knobs.delta.items()}, lr)


def scored(x: Experiment, arm: Arm, N: dict[str, Tensor], batch: GradedBatch, cfg: Config) -> tuple[Tensor, ...]:
    """(scores by the hack V "m b", by a random V "m b", flagged "b", low "b") of rows with NLL gradients N."""
    V, gate = x.directions, x.directions.gate
    states = None
    if arm.score in ("activation", "either"):
        states = activations.pooled(x.model, batch.ids, batch.mask, "mean", cfg.rl.micro_batch)
    match arm.score:
        case "gradient":
            own = gate(N)
        case "fisher":
            own = gate(gates.flat(N))
        case "activation":
            own = gate(states)
        case "either":
            own = gate((gates.flat(N), states))
    return gates.row_scores(N, V.real), gates.row_scores(N, V.random), own > gate.threshold, own < gate.low


def take_step(x: Experiment, arm: Arm, grader: Grader, optimizers: tuple[Any, Any], cfg: Config, step: int) -> Step:
    """One step of the algorithm, a named call a stage."""
    tasks = tasks_of_step(x.tasks, step, cfg.rl.prompts_per_step, cfg.seed)
    ablated = round(cfg.arm.ablated_share * len(tasks)) if arm.rows in ("route", "route_low") else 0
    batch = rollout(x.model, x.knobs, x.tokenizer, tasks, x.teacher, grader, cfg, step, ablated)
    start, V = time.perf_counter(), x.directions
    states = None
    if arm.reward.startswith("rebound"):
        states = activations.pooled(x.model, batch.ids, batch.mask, "last", cfg.rl.micro_batch)
    batch = shaped(batch, arm, states, V.d, cfg.arm, cfg.rl.group, seeded("cpu", cfg.seed, step, "monitor"))
    weight = torch.ones_like(batch.A) if arm.rows in gates.UNIT else batch.A
    grads = sample_grads(x.model, x.knobs, batch, weight, cfg)
    N = {m: g * weight.sign()[:, None] for m, g in grads.G.items()}
    scores, random, flagged, low = scored(x, arm, N, batch, cfg)
    dice = seeded("cpu", cfg.seed, step, "rows")
    seen = gates.Seen(batch.A, batch.rewards, flagged, low, cfg.rl.group, dice)
    f = gates.factors(arm.rows, seen, batch.ablated)
    if arm.rows in ("route", "route_low"):
        grads = with_masks(x, grads, batch, weight, f, cfg)
    p = proj.project(grads.G, f, V.arm, V.real, batch.is_student, arm, cfg.vhack)
    if p.gn == 0 and batch.n_zero_var < len(tasks):
        raise FloatingPointError(f"step {step}: the gradient is all zero though rewards differ within a group")
    act = None
    if cfg.vhack.project == "update" and arm.act != "measure":
        act = lambda descent: proj.acted(descent, V.arm.V, V.real.V, arm.act, cfg.vhack)
    u = apply_step(x.knobs, p, *optimizers, cfg.rl.clip, act)
    return Step(batch, grads, scores, random, flagged, f, p, u, V.gate.threshold, None, time.perf_counter() - start)


def loop(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config) -> tuple[list[EvalRow], list[EvalRow]]:
    """Training with its evaluations. Returns the first and the last deploy evaluation."""
    arm = proj.arm(cfg.intervention)
    optimizers = make_optimizer(x.knobs, cfg)
    before = deploy_eval(x, grader, rec, cfg, 0)
    bar = tqdm(range(cfg.rl.steps), desc=cfg.intervention, dynamic_ncols=True)
    for step in bar:
        refreshes = cfg.vhack.refresh_every and step and step % cfg.vhack.refresh_every == 0
        overlap = refresh(x, cfg) if refreshes else None
        made = replace(take_step(x, arm, grader, optimizers, cfg, step), overlap=overlap)
        x.recent.append(tuple(r for r in made.batch.rollouts if r.source == "student"))
        row = step_row(step, made, x.directions.arm, x.knobs)
        rec.append("steps.jsonl", [asdict(row)])
        rec.append("rollouts.jsonl", rollout_rows(step, made, layers_of(x.directions.real)))
        report(bar, row, cfg)
        done = step + 1
        if done % cfg.checkpoint_every == 0 or done == cfg.rl.steps:
            rec.checkpoint(done, checkpoint_state(x.knobs, optimizers[0]))
        if done % cfg.eval.eval_every == 0 and done < cfg.rl.steps:
            deploy_eval(x, grader, rec, cfg, done)
    after = deploy_eval(x, grader, rec, cfg, cfg.rl.steps, cfg.eval.scales)
    relearn(x, grader, rec, cfg)
    return before, after


def relearn(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config) -> None:
    """A relearning attack: ablate the quarantine for good and go on with plain GRPO and a new optimizer."""
    if not cfg.rl.relearn_steps:
        return
    state = x.knobs.state()
    x.knobs.load_state({n: torch.zeros_like(t) if n.endswith(".delta_hack") else t for n, t in state.items()})
    optimizers, plain = make_optimizer(x.knobs, cfg), proj.arm("none")
    for step in tqdm(range(cfg.rl.relearn_steps), desc="relearn", dynamic_ncols=True):
        made = take_step(x, plain, grader, optimizers, cfg, cfg.rl.steps + step)
        rec.append("relearn.jsonl", [asdict(step_row(step, made, x.directions.arm, x.knobs))])


def layers_of(V: HackBasis) -> list[int]:
    """The layer of each module of V, in V's order."""
    return [int(re.search(r"\blayers\.(\d+)\.", m)[1]) for m in V.V]


def deploy_eval(
    x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, step: int, scales: Sequence[float] = ()
) -> list[EvalRow]:
    """Evaluate on the held-out problems, and write it down."""
    rows, counts = evals.evaluate(x.model, x.knobs, x.tokenizer, x.held_out, grader, cfg, step, scales)
    rec.append("evals.jsonl", map(asdict, rows))
    rec.append("eval_problems.jsonl", counts)
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


def train(cfg: Config) -> Path:
    """One run from config to its finished folder. Raises UserError before a folder exists."""
    x = set_up(cfg)
    with Grader(cfg.graders or None, cfg.allow_unsandboxed_grading) as grader:
        arm = proj.arm(cfg.intervention)
        meta = {
            "layers": grader.layers,
            "oracle": arm.oracle,
            "arm": asdict(arm),
            "V": vhack.basis_summary(x.directions.real, cfg),
            "arm_V": vhack.basis_summary(x.directions.arm, cfg),
        }
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
