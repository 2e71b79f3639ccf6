"""The loop: mixed student + teacher GRPO with the hack direction taken out of the gradient, or routed aside.

python -m projected_grpo.train <preset> [--overrides]         --help lists every setting
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from projected_grpo import evals, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, parse
from projected_grpo.evals import EvalRow
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.metrics import StepRow, legend, rollout_rows, step_row, table_cells
from projected_grpo.prepare import Experiment, refresh, set_up
from projected_grpo.results import bluf
from projected_grpo.rewards import Grader
from projected_grpo.run_record import RunRecord
from projected_grpo.sandbox_worker import SandboxError
from projected_grpo.step import make_optimizer, take_step

TABLE_EVERY = 5
SHOULD = (
    "SHOULD: fmt stays over .9, gn is finite and not 0, flat stays under the prompts a step; under none att and hack "
    "rise; under erase cout is 0 and cin stands above null."
)


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
