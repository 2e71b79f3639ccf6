"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides] [--resume=RUN]      --help lists every setting

``one_step`` is the algorithm, top to bottom; ``learn`` is the loop around it.
"""

import math
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo import arms, detectors, loss, prepare, proj, runs
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.arms import Arm
from projected_grpo.command_line import parse, recipe, run_main
from projected_grpo.config import Config
from projected_grpo.data_types import Factors, GradedBatch, Projection, RowGrads, Step, Update
from projected_grpo.metrics import StepRow, legend, rollout_rows, step_row, table_cells
from projected_grpo.prepare import Experiment, refresh_if_due, set_up, settled
from projected_grpo.rewards import Grader
from projected_grpo.rollout import EvalRow, bluf, evaluate, h4_decision, rollout, seeded, tasks_of_step
from projected_grpo.runs import RunRecord, Stopped, json_lines

TABLE_EVERY = 5
SHOULD = (
    "SHOULD: fmt stays over .9, gn is finite and not 0, flat stays under the prompts a step; under none att and hack "
    "rise; under erase cin stands above null."
)
Optimizers = tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]


class Alone:
    """The seam for several processes (scale.ranks): a process that is alone holds every rollout, and so each of these
    returns what it is given.
    """

    def own(self, b: int) -> slice:
        """This process's rows among those of all, where each has b."""
        return slice(0, b)

    def whole(self, batch: GradedBatch) -> GradedBatch:
        """The rollouts of all processes."""
        return batch

    def rows(self, values: Tensor, dim: int = 0) -> Tensor:
        """The values of all processes' rows."""
        return values

    def total(self, sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Sums over all processes."""
        return sums

    def summary(self, grads: RowGrads, n_tokens: int) -> RowGrads:
        """Objective, KL and drift over all processes."""
        return grads

    def agree(self, lots: list[Tensor], mask: Tensor) -> list[Tensor]:
        """Lots of rows, as many on every process."""
        return lots


ALONE = Alone()


def one_step(
    x: Experiment, arm: Arm, roll_out: Callable[[], GradedBatch], apply: Callable[[Projection], Update],
    cfg: Config, step: int, ranks: Alone = ALONE,
) -> Step:  # fmt: skip
    """One step of the algorithm. roll_out: this process's rollouts, whole groups; apply: act on the knobs.

    What decides over a rollout (rewards, flags, dice) is the same on every process; gradients are made where the
    rollouts are, and only their sums are shared. The Step returned holds the rollouts of all processes.
    """
    V = x.directions
    # --- roll out: tasks -> completions -> verdicts -> rewards                           rollout, decoding, rewards
    batch = roll_out()
    began = time.perf_counter()
    whole, own = ranks.whole(batch), ranks.own(len(batch.rewards))

    # --- shape: rewards -> advantages A, changed first as the arm's reward rule says     arms
    lot = cfg.rl.micro_batch, cfg.rl.lot_tokens or loss.LOT_TOKENS
    states = detectors.pooled(x.model, batch.ids, batch.mask, readings(arm, V), *lot, agree=ranks.agree)
    last = ranks.rows(states[detectors.LAST]) if detectors.LAST in states else None
    A = arms.shaped(whole, arm, last, V.d, cfg.arm, cfg.rl.group, seeded("cpu", cfg.seed, step, "monitor"))
    masked = whole.truncated & cfg.rl.mask_truncated
    A = A * ~masked  # after the group's mean, which their rewards are in
    n_zero_var = int((A.view(-1, cfg.rl.group) == 0).all(1).sum())

    # --- gradients: every rollout's own, in δS, from one backward                        loss, antipasto
    weight = (~masked).to(A)[own] if arm.rows in arms.UNIT else A[own]
    grads = sample_grads(x.model, x.knobs, batch, weight, cfg, ranks)

    # --- score: how hack-ward is each rollout, by V and by the arm's own detector        detectors
    N = {m: g * weight.sign()[:, None] for m, g in grads.policy.items()}  # gradients of each rollout's NLL
    scores, random = (ranks.rows(detectors.row_scores(N, v), 1) for v in (V.real, V.random))
    acting = ranks.rows(V.gate(N if arm.score == "gradient" else states[detectors.MEAN]))
    flagged = acting > V.gate.threshold
    held_out = None if V.watch is None else ranks.rows(V.watch(states[detectors.HELD_OUT]))

    # --- decide: which rollouts' gradients reach δS                                      arms
    dice = seeded("cpu", cfg.seed, step, "rows")
    f = arms.factors(arm.rows, arms.Seen(A, whole.rewards, flagged, cfg.rl.group, dice))
    mine = Factors(f.whole[own], f.keep[own])

    # --- project: take the hack-ward part out of their sum, or route it aside            proj
    sums = proj.sums(grads.G, mine, batch.is_student, grads.policy if cfg.rl.beta else None)
    p = proj.decided(ranks.total(sums), V.arm, V.real, arm, cfg.vhack)
    if p.gn == 0 and n_zero_var < len(A) // cfg.rl.group:
        raise FloatingPointError(f"step {step}: the gradient is all zero though rewards differ within a group")

    # --- apply: clip, AdamW, W' = W + U diag(δS + δS_hack) Vh                             antipasto
    update = apply(p)

    # --- log: what metrics.step_row and rollout_rows write down                          metrics, runs
    return Step(
        batch=whole,
        A=A,
        masked=masked,
        n_zero_var=n_zero_var,
        grads=ranks.summary(grads, int(batch.mask[batch.is_student & ~masked[own]].sum())),
        scores=scores,
        random_scores=random,
        acting=acting,
        flagged=flagged,
        threshold=V.gate.threshold,
        held_out=held_out,
        held_out_threshold=None if V.watch is None else V.watch.threshold,
        factors=f,
        projection=p,
        update=update,
        sec_train=time.perf_counter() - began,
    )


# ------------------------------------------------------------------------------------------------ stages of a step


def readings(arm: Arm, V: prepare.Directions) -> list[detectors.Reading]:
    """Which hidden states a step reads: the arm's, and those of the held-out probe where there is one."""
    return [*detectors.readings_of(arm), *([] if V.watch is None else [detectors.HELD_OUT])]


def sample_grads(
    model: nn.Module, knobs: Knobs, batch: GradedBatch, weight: Tensor, cfg: Config, ranks: Alone = ALONE
) -> RowGrads:
    """Every rollout's own gradient of the Dr.GRPO loss in δS, from one backward; weight (b,) is A, or 1 for all; 0 for
    rows that the loss leaves out.
    """
    return loss.row_gradients(
        model,
        knobs,
        batch.ids,
        batch.mask,
        weight / cfg.loss_denominator,
        temperature=cfg.rl.temperature,
        beta=cfg.rl.beta,
        kl_weight=1 / cfg.loss_denominator,
        kl_rows=batch.is_student & ~(batch.truncated & cfg.rl.mask_truncated),
        drawn=batch.drawn,
        cap=cfg.rl.importance_cap,
        micro_batch=cfg.rl.micro_batch,
        lot_tokens=cfg.rl.lot_tokens or loss.LOT_TOKENS,
        agree=ranks.agree,
    )


def make_optimizer(knobs: Knobs, cfg: Config) -> Optimizers:
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


ActOnUpdate = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Splits δS's descent, by module, into (kept, removed)."""


def update_rule(x: Experiment, arm: Arm, cfg: Config) -> ActOnUpdate | None:
    """The arm's act where it is done on the optimizer's update, else None."""
    if cfg.vhack.project != "update" or arm.act == "measure":
        return None
    V = x.directions
    return lambda descent: proj.acted(descent, V.arm.V, V.real.V, arm.act, cfg.vhack)


@torch.no_grad()
def apply_step(
    knobs: Knobs, p: Projection, optimizers: Optimizers, clip: float, act_on_update: ActOnUpdate | None = None
) -> Update:
    """The only mutation: δS descends p.kept, and δS_hack descends p.quarantined where the arm has a quarantine.

    Clipping is by the norm before projection, so that an arm differs from "none" by its projection alone.
    """
    optimizer, scheduler = optimizers
    lr, before = scheduler.get_last_lr()[0], {m: d.detach().clone() for m, d in knobs.delta.items()}
    put_gradient(knobs, p, clip_scale(p, clip))
    optimizer.step()
    scheduler.step()
    return Update(settle(knobs, p, before, act_on_update), lr)


def clip_scale(p: Projection, clip: float) -> float:
    """What a gradient is multiplied by so that before projection neither plain GRPO's norm nor the arm's is over
    ``clip``: where a rule withholds or punishes, what it acts on may be the longer.
    """
    return min(1.0, clip / max(p.gn, p.acted_on, 1e-30))


def put_gradient(knobs: Knobs, p: Projection, scale: float = 1.0) -> None:
    """``grad`` of the knobs: what δS, and where there is a quarantine δS_hack, are to descend."""
    for m, d in knobs.delta.items():
        d.grad = p.kept[m] * scale
    if p.quarantined is not None:
        for m, d in knobs.delta_hack.items():
            d.grad = p.quarantined[m] * scale


@torch.no_grad()
def settle(
    knobs: Knobs, p: Projection, before: dict[str, Tensor], act_on_update: ActOnUpdate | None
) -> dict[str, Tensor]:
    """After the optimizer has stepped: form every W'; δS's descent, by module. before: δS as it was. What
    ``act_on_update`` removes of the descent is undone, and goes to the quarantine where there is one.
    """
    if act_on_update is not None:
        _, removed = act_on_update({m: before[m] - d for m, d in knobs.delta.items()})
        for m, d in knobs.delta.items():
            d.add_(removed[m])
            if p.quarantined is not None:
                knobs.delta_hack[m].sub_(removed[m])
    knobs.merge()
    return {m: before[m] - d for m, d in knobs.delta.items()}


# -------------------------------------------------------------------------------------------------------- the loop


def loop(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, stopped: Stopped | None) -> None:
    """Training with its evaluations, then the relearning attack; from a stopped run's checkpoint on where given."""
    optimizers = make_optimizer(x.knobs, cfg)
    phase, done = "step", 0
    if stopped is not None:
        phase, done = stopped.at.phase, stopped.at.done
        prepare.restore(x, optimizers, stopped.at, rec.folder, cfg)
    if phase == "step":
        learn(x, grader, rec, cfg, optimizers, done)
        done = 0
        if cfg.rl.relearn_steps:
            ablate(x.knobs)
            optimizers = make_optimizer(x.knobs, cfg)
    relearn(x, grader, rec, cfg, optimizers, done)


def take_step(x: Experiment, arm: Arm, grader: Grader, optimizers: Optimizers, cfg: Config, step: int) -> Step:
    """``one_step`` of a process that is alone, with our own sampler and optimizer."""
    tasks = tasks_of_step(x.tasks, step, cfg.rl.prompts_per_step, cfg.seed)
    roll_out = partial(rollout, x, tasks, x.teacher, grader, cfg, step)
    apply = lambda p: apply_step(x.knobs, p, optimizers, cfg.rl.clip, update_rule(x, arm, cfg))
    return one_step(x, arm, roll_out, apply, cfg, step)


def learn(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, optimizers: Optimizers, first: int) -> None:
    """Steps ``first`` to the last. An evaluation comes after the checkpoint of its step: resumed, it is done again."""
    arm = arms.arm(cfg.intervention)
    if first == 0:
        rec.checkpoint("step", 0, *prepare.state_of(x, optimizers), write=False)
        deploy_eval(x, grader, rec, cfg, 0)
    bar = tqdm(range(first, cfg.rl.steps), cfg.intervention, cfg.rl.steps, initial=first, dynamic_ncols=True)
    for step in bar:
        if step and step % cfg.eval.eval_every == 0:
            deploy_eval(x, grader, rec, cfg, step)
        overlap = refresh_if_due(x, cfg, step)
        made = replace(take_step(x, arm, grader, optimizers, cfg, step), overlap=overlap)
        x.remember(made.batch.rollouts)
        row = record_step(x, rec, cfg, optimizers, step, made)
        bar.set_postfix_str(f"hack {row.hack_s:.2f} att {row.attempt_s:.2f} solve {row.solve_s:.2f}")
    deploy_eval(x, grader, rec, cfg, cfg.rl.steps, cfg.eval.scales)


def record_step(x: Experiment, rec: RunRecord, cfg: Config, optimizers: Optimizers, step: int, made: Step) -> StepRow:
    """Log the step, print a table row every few steps, and keep a checkpoint where it is time to."""
    row = step_row(step, made, x.directions.arm, x.knobs)
    rec.append("steps.jsonl", [asdict(row)])
    rec.rollouts(step, rollout_rows(step, made, layers_of(x.directions.real)))
    rec.tracker.log(step, runs.numbers_of("train", asdict(row)))
    last = step == cfg.rl.steps - 1
    if step % TABLE_EVERY == 0 or last:
        tqdm.write(table_cells(row))
    due = (step + 1) % cfg.checkpoint_every == 0 or last
    rec.checkpoint("step", step + 1, *prepare.state_of(x, optimizers), due)
    return row


def layers_of(V: vhack.HackBasis) -> list[int]:
    """The layer of each module of V, in V's order."""
    return [int(re.search(r"\blayers\.(\d+)\.", m)[1]) for m in V.V]


def ablate(knobs: Knobs) -> None:
    """Set the quarantine to 0 for good: its last gradient goes too, or an optimizer would fill it again with that."""
    for d in knobs.delta_hack.values():
        d.grad = None
    knobs.load_state({n: torch.zeros_like(t) if n.endswith(".delta_hack") else t for n, t in knobs.state().items()})


def relearn(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, optimizers: Optimizers, first: int) -> None:
    """A relearning attack on a model without quarantine: plain GRPO with a new optimizer, from step ``first`` on. The
    run's own detector goes on scoring, and nothing is done about it.
    """
    if not cfg.rl.relearn_steps:
        return
    plain = replace(arms.arm("none"), score=arms.arm(cfg.intervention).score)
    for step in tqdm(range(first, cfg.rl.relearn_steps), "relearn", dynamic_ncols=True):
        made = take_step(x, plain, grader, optimizers, cfg, cfg.rl.steps + step)
        row = asdict(step_row(step, made, x.directions.arm, x.knobs))
        rec.append("relearn.jsonl", [row])
        rec.tracker.log(cfg.rl.steps + step, runs.numbers_of("relearn", row))
        due = (step + 1) % cfg.checkpoint_every == 0
        rec.checkpoint("relearn", step + 1, *prepare.state_of(x, optimizers), due)


def deploy_eval(
    x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, step: int, scales: Sequence[float] = ()
) -> None:
    """Evaluate on the held-out problems, and write it down."""
    rows, counts = evaluate(x, x.held_out, grader, cfg, step, scales)
    rec.append("evals.jsonl", map(asdict, rows))
    rec.append("eval_problems.jsonl", counts)
    rec.tracker.log(step, runs.numbers_of_evals(rows))


# --------------------------------------------------------------------------------------------------------- one run


def meta_of(x: Experiment, grader: Grader, cfg: Config) -> dict[str, Any]:
    """What a run's record says of its sandbox, its arm and its directions."""
    arm = arms.arm(cfg.intervention)
    return {
        "layers": grader.layers,
        "oracle": arm.oracle,
        "arm": asdict(arm),
        "V": vhack.basis_summary(x.directions.real),
    }


def say_beginning(x: Experiment, rec: RunRecord, meta: dict[str, Any]) -> None:
    """What a run is made of, then the head and the legend of its table."""
    logger.info("run {}: {} tasks, {} held out", rec.name, len(x.tasks), len(x.held_out))
    logger.info("V: {n_pairs} pairs; of {n_heldout} held out {heldout_accuracy} point hack-ward", **meta["V"])
    follow = f"in another terminal: {recipe('watch')}"
    tqdm.write("\n".join((*textwrap.wrap(SHOULD, 100), legend(), "", follow, "", table_cells(None))))


def say_outcome(folder: Path, cfg: Config) -> None:
    """The bottom line of a finished run."""
    rows = [EvalRow(**row) for row in json_lines(folder / "evals.jsonl")]
    before, after = ([r for r in rows if r.step == at] for at in (0, cfg.rl.steps))
    tqdm.write(bluf(cfg, folder, before, after))
    if said := h4_decision(cfg, [row["hack_s"] for row in json_lines(folder / "steps.jsonl")]):
        tqdm.write(said)


def train(cfg: Config) -> Path:
    """One run from config to its finished folder. Raises UserError before a folder exists."""
    runs.require_tracker(cfg.tracker)
    stopped = runs.stopped(cfg)
    cfg = settled(cfg)
    x = set_up(cfg)
    with Grader(cfg.graders, cfg.allow_unsandboxed_grading) as grader:
        meta = meta_of(x, grader, cfg)
        with RunRecord(cfg, meta, stopped) as rec:
            say_beginning(x, rec, meta)
            loop(x, grader, rec, cfg, stopped)
            folder = rec.finish()
    say_outcome(folder, cfg)
    return folder


def main(argv: Sequence[str]) -> None:
    """Parse and train."""
    train(parse(argv))


if __name__ == "__main__":
    run_main(main)
