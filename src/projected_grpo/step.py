"""One step of the algorithm: roll out, one backward, score, decide, project, apply."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from projected_grpo import activations, gates, loss, proj
from projected_grpo.antipasto import Knobs
from projected_grpo.arms import Arm
from projected_grpo.config import Config
from projected_grpo.data_types import GradedBatch
from projected_grpo.loss import RowGrads
from projected_grpo.metrics import Step, Update
from projected_grpo.prepare import Experiment
from projected_grpo.proj import Factors, Projection
from projected_grpo.ranks import ALONE, Ranks, rows_of
from projected_grpo.rewards import Grader
from projected_grpo.rollout import rollout, seeded, tasks_of_step
from projected_grpo.shaping import shaped


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


def sample_grads(
    model: nn.Module, knobs: Knobs, batch: GradedBatch, weight: Tensor, cfg: Config, ranks: Ranks = ALONE
) -> RowGrads:
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
        agree=ranks.agree,
    )


def with_masks(
    x: Experiment, grads: RowGrads, batch: GradedBatch, weight: Tensor, f: Factors, cfg: Config, ranks: Ranks = ALONE
) -> RowGrads:
    """The gradients that a routing gate learns from: rows that only δS learns from see the model without quarantine.

    Without that mask both regions would receive the same gradients, and the quarantine would absorb nothing.
    """
    alone = (f.quarantine == 0) & (f.keep != 0)
    with x.knobs.using("deployed"):
        masked = sample_grads(x.model, x.knobs, batch, weight * alone, cfg, ranks)
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
    lr, before = scheduler.get_last_lr()[0], {m: d.detach().clone() for m, d in knobs.delta.items()}
    put_gradient(knobs, p, clip_scale(p, clip))
    optimizer.step()
    scheduler.step()
    return Update(settle(knobs, p, before, act_on_update), lr)


def clip_scale(p: Projection, clip: float) -> float:
    """What a gradient is multiplied by so that the norm of the whole one, before projection, is at most ``clip``."""
    return min(1.0, clip / p.gn) if p.gn > 0 else 1.0


def put_gradient(knobs: Knobs, p: Projection, scale: float = 1.0) -> None:
    """``grad`` of the knobs: what δS, and where there is a quarantine δS_hack, are to descend."""
    for m, d in knobs.delta.items():
        d.grad = p.kept[m] * scale
    if p.quarantined is not None:
        for m, d in knobs.delta_hack.items():
            d.grad = p.quarantined[m] * scale


@torch.no_grad()
def settle(
    knobs: Knobs, p: Projection, before: dict[str, Tensor],
    act_on_update: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]] | None,
) -> dict[str, Tensor]:  # fmt: skip
    """After the optimizer has stepped: act on its update, form every W'; the descent of δS. before: δS as it was."""
    if act_on_update is not None:
        _, removed = act_on_update({m: before[m] - d for m, d in knobs.delta.items()})
        for m, d in knobs.delta.items():
            d.add_(removed[m])
            if p.quarantined is not None:
                knobs.delta_hack[m].sub_(removed[m])
    knobs.merge()
    return {m: before[m] - d for m, d in knobs.delta.items()}


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


def n_ablated(arm: Arm, n: int, cfg: Config) -> int:
    """How many of a step's n tasks are sampled with the quarantine ablated."""
    return round(cfg.arm.ablated_share * n) if arm.rows in ("route", "route_low") else 0


def update_rule(x: Experiment, arm: Arm, cfg: Config) -> Callable[[dict[str, Tensor]], Any] | None:
    """The arm's act where it is done on the optimizer's update, else None."""
    if cfg.vhack.project != "update" or arm.act == "measure":
        return None
    V = x.directions
    return lambda descent: proj.acted(descent, V.arm.V, V.real.V, arm.act, cfg.vhack)


def learn(x: Experiment, arm: Arm, batch: GradedBatch, cfg: Config, step: int, ranks: Ranks = ALONE) -> Step:
    """From rollouts to the projected gradient; the update is left out. batch: this process's rollouts, the groups
    whole; the Step returned holds those of all. What decides over a rollout (rewards, flags, dice) is the same on
    every process; gradients are made where the rollouts are, and only their sums are shared.
    """
    start, V = time.perf_counter(), x.directions
    whole, own = ranks.whole(batch), ranks.own(len(batch.A))
    states = None
    if arm.reward.startswith("rebound"):
        states = ranks.rows(activations.pooled(x.model, batch.ids, batch.mask, "last", cfg.rl.micro_batch))
    whole = shaped(whole, arm, states, V.d, cfg.arm, cfg.rl.group, seeded("cpu", cfg.seed, step, "monitor"))
    weight = torch.ones_like(batch.A) if arm.rows in gates.UNIT else whole.A[own]
    grads = sample_grads(x.model, x.knobs, batch, weight, cfg, ranks)
    N = {m: g * weight.sign()[:, None] for m, g in grads.G.items()}
    scores, random, flagged, low = (ranks.rows(s, s.ndim - 1) for s in scored(x, arm, N, batch, cfg))
    dice = seeded("cpu", cfg.seed, step, "rows")
    f = gates.factors(arm.rows, gates.Seen(whole.A, whole.rewards, flagged, low, cfg.rl.group, dice), whole.ablated)
    mine = rows_of(f, own)
    if arm.rows in ("route", "route_low"):
        grads = with_masks(x, grads, batch, weight, mine, cfg, ranks)
    sums = ranks.total(proj.sums(grads.G, mine, batch.is_student))
    p = proj.decided(sums, V.arm, V.real, arm, cfg.vhack)
    if p.gn == 0 and whole.n_zero_var < len(whole.A) // cfg.rl.group:
        raise FloatingPointError(f"step {step}: the gradient is all zero though rewards differ within a group")
    log = ranks.summary(grads, int(batch.mask.sum()))
    taken = time.perf_counter() - start
    return Step(whole, log, scores, random, flagged, f, p, Update({}, 0.0), V.gate.threshold, None, taken)


def take_step(x: Experiment, arm: Arm, grader: Grader, optimizers: tuple[Any, Any], cfg: Config, step: int) -> Step:
    """One step of the algorithm, a named call a stage."""
    tasks = tasks_of_step(x.tasks, step, cfg.rl.prompts_per_step, cfg.seed)
    ablated = n_ablated(arm, len(tasks), cfg)
    batch = rollout(x.sample, x.knobs, x.tokenizer, tasks, x.teacher, grader, cfg, step, ablated)
    made, start = learn(x, arm, batch, cfg, step), time.perf_counter()
    u = apply_step(x.knobs, made.projection, *optimizers, cfg.rl.clip, update_rule(x, arm, cfg))
    return replace(made, update=u, sec_train=made.sec_train + time.perf_counter() - start)
