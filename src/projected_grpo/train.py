"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides] [--resume=RUN]      --help lists every setting
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tqdm import tqdm

from projected_grpo import evals, proj, resume, run_record, trackers
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, parse
from projected_grpo.evals import EvalRow
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.metrics import StepRow, legend, rollout_rows, step_row, table_cells
from projected_grpo.prepare import Experiment, refresh, set_up
from projected_grpo.results import bluf, h4_decision, json_lines
from projected_grpo.rewards import Grader
from projected_grpo.run_record import RunRecord, Stopped
from projected_grpo.sandbox_worker import SandboxError
from projected_grpo.step import make_optimizer, take_step

TABLE_EVERY = 5
SHOULD = (
    "SHOULD: fmt stays over .9, gn is finite and not 0, flat stays under the prompts a step; under none att and hack "
    "rise; under erase cout is 0 and cin stands above null."
)


def loop(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, stopped: Stopped | None) -> None:
    """Training with its evaluations, then the relearning attack; from a stopped run's checkpoint on where given."""
    optimizers = make_optimizer(x.knobs, cfg)
    phase, done = "step", 0
    if stopped is not None:
        phase, done = stopped.at.phase, stopped.at.done
        resume.restore(x, optimizers, stopped.at, rec.folder, cfg)
    if phase == "step":
        learn(x, grader, rec, cfg, optimizers, done)
        done = 0
        if cfg.rl.relearn_steps:
            ablate(x.knobs)
            optimizers = make_optimizer(x.knobs, cfg)
    relearn(x, grader, rec, cfg, optimizers, done)


def learn(x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, optimizers: tuple[Any, Any], first: int) -> None:
    """Steps ``first`` to the last. An evaluation comes after the checkpoint of its step: resumed, it is done again."""
    arm = proj.arm(cfg.intervention)
    if first == 0:
        deploy_eval(x, grader, rec, cfg, 0)
    bar = tqdm(range(first, cfg.rl.steps), cfg.intervention, cfg.rl.steps, initial=first, dynamic_ncols=True)
    for step in bar:
        if step and step % cfg.eval.eval_every == 0:
            deploy_eval(x, grader, rec, cfg, step)
        overlap = None
        if cfg.vhack.refresh_every and step and step % cfg.vhack.refresh_every == 0:
            x.refreshed = (step, x.knobs.state())
            overlap = refresh(x, cfg)
        made = replace(take_step(x, arm, grader, optimizers, cfg, step), overlap=overlap)
        x.recent.append(tuple(r for r in made.batch.rollouts if r.source == "student"))
        row = step_row(step, made, x.directions.arm, x.knobs)
        rec.append("steps.jsonl", [asdict(row)])
        rec.rollouts(step, rollout_rows(step, made, layers_of(x.directions.real)))
        rec.tracker.log(step, trackers.numbers_of("train", asdict(row)))
        report(bar, row, cfg)
        if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.rl.steps:
            rec.checkpoint("step", step + 1, *resume.state_of(x, optimizers))
    deploy_eval(x, grader, rec, cfg, cfg.rl.steps, cfg.eval.scales)


def ablate(knobs: Knobs) -> None:
    """Set the quarantine to 0 for good: its last gradient goes too, or an optimizer would fill it again with that."""
    for d in knobs.delta_hack.values():
        d.grad = None
    knobs.load_state({n: torch.zeros_like(t) if n.endswith(".delta_hack") else t for n, t in knobs.state().items()})


def relearn(
    x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, optimizers: tuple[Any, Any], first: int
) -> None:
    """A relearning attack on a model without quarantine: plain GRPO with a new optimizer, from step ``first`` on. The
    run's own detector goes on scoring, and nothing is done about it.
    """
    if not cfg.rl.relearn_steps:
        return
    plain = replace(proj.arm("none"), score=proj.arm(cfg.intervention).score)
    for step in tqdm(range(first, cfg.rl.relearn_steps), "relearn", dynamic_ncols=True):
        made = take_step(x, plain, grader, optimizers, cfg, cfg.rl.steps + step)
        row = asdict(step_row(step, made, x.directions.arm, x.knobs))
        rec.append("relearn.jsonl", [row])
        rec.tracker.log(cfg.rl.steps + step, trackers.numbers_of("relearn", row))
        if (step + 1) % cfg.checkpoint_every == 0:
            rec.checkpoint("relearn", step + 1, *resume.state_of(x, optimizers))


def layers_of(V: HackBasis) -> list[int]:
    """The layer of each module of V, in V's order."""
    return [int(re.search(r"\blayers\.(\d+)\.", m)[1]) for m in V.V]


def deploy_eval(
    x: Experiment, grader: Grader, rec: RunRecord, cfg: Config, step: int, scales: Sequence[float] = ()
) -> list[EvalRow]:
    """Evaluate on the held-out problems, and write it down."""
    rows, counts = evals.evaluate(x.sample, x.knobs, x.tokenizer, x.held_out, grader, cfg, step, scales)
    rec.append("evals.jsonl", map(asdict, rows))
    rec.append("eval_problems.jsonl", counts)
    rec.tracker.log(step, trackers.numbers_of_evals(rows))
    return rows


def report(bar: tqdm, row: StepRow, cfg: Config) -> None:
    """The few numbers that matter on the bar; a table row every few steps."""
    bar.set_postfix_str(f"hack {row.hack_s:.2f} att {row.attempt_s:.2f} solve {row.solve_s:.2f}")
    if row.step % TABLE_EVERY == 0 or row.step == cfg.rl.steps - 1:
        tqdm.write(table_cells(row))


def train(cfg: Config) -> Path:
    """One run from config to its finished folder. Raises UserError before a folder exists."""
    trackers.require(cfg.tracker)
    stopped = run_record.stopped(cfg)
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
        with RunRecord(cfg, meta, stopped) as rec:
            logger.info("run {}: {} tasks, {} held out", rec.name, len(x.tasks), len(x.held_out))
            logger.info("V: {n_pairs} pairs; of {n_heldout} held out {heldout_accuracy} point hack-ward", **meta["V"])
            tqdm.write("\n".join((SHOULD, legend(), table_cells(None))))
            loop(x, grader, rec, cfg, stopped)
            folder = rec.finish()
    rows = [EvalRow(**row) for row in json_lines(folder / "evals.jsonl")]
    before, after = ([r for r in rows if r.step == at] for at in (0, cfg.rl.steps))
    tqdm.write(bluf(cfg, folder, before, after))
    if said := h4_decision(cfg, [row["hack_s"] for row in json_lines(folder / "steps.jsonl")]):
        tqdm.write(said)
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
