"""Everything a run needs before its first step, and every refusal that can be made before its folder exists."""

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from projected_grpo import antipasto, arms, detectors, memory, models, pairs, problems, rollout, rollout_log, sandbox
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import Grade, Pair, Rollout, Task
from projected_grpo.detectors import Detector, detector_for
from projected_grpo.extract_vhack_grad import HackBasis, PairGrads
from projected_grpo.loss import LOT_TOKENS
from projected_grpo.rollout import Policy
from projected_grpo.runs import Checkpoint


@dataclass(frozen=True)
class Directions:
    """Everything that is made from pairs, at one state of the knobs. Extracted together, refreshed together.

    whole: V before it is sliced; real: the hack V; arm: the V that the arm uses; random: a draw that scores are
    compared with. gate: the arm's detector. d: the direction that rebound reads activations along, else None. watch:
    the held-out probe, None where the run has none.
    """

    whole: HackBasis
    real: HackBasis
    arm: HackBasis
    random: HackBasis
    gate: Detector
    d: Tensor | None
    watch: Detector | None


@dataclass
class Experiment(Policy):
    """What a run is made of, all of it checked before the run's folder exists."""

    pairs: list[Pair]
    other_pairs: list[Pair] | None
    """The pair set of a nonhack or placebo arm."""
    watch_pairs: list[Pair]
    """The pair set of the held-out probe; empty where there is none."""
    tasks: list[Task]
    held_out: list[Task]
    teacher: rollout_log.Pool | None
    directions: Directions
    recent: deque[tuple[Rollout, ...]]
    """The student's rollouts of the last steps, which refresh_pairs may look for pairs in."""
    refreshed: tuple[int, dict[str, Tensor]] | None = None
    """The step of the last refresh and the knobs at it; None while the first directions stand."""

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        """Keep a step's student rollouts for the next refresh, which reads their texts."""
        self.recent.append(tuple(replace(r, ids=(), logp=None) for r in rollouts if r.source == "student"))


OWN_PAIRS = {"nonhack": "nonhack64", "placebo": "placebo64"}
"""Pair sets of the control bases that are not made from the hack pairs."""


def check(cfg: Config) -> None:
    """Refuse, before anything is loaded, what cannot work. Raises UserError."""
    arms.arm(cfg.intervention)
    writable(Path(cfg.outputs))
    models.device_of(cfg.model)
    rollout.refuse_sampler(cfg)
    if cfg.data.problems in problems.BUILT_IN:
        problems.require_trained_on(models.ORGANISM if cfg.model.model == "organism" else Path(cfg.model.model))
    if not 0 <= cfg.pool.mix_ratio < 1 or (cfg.pool.mix_ratio > 0 and cfg.n_teacher == 0):
        raise UserError(
            f"--mix-ratio={cfg.pool.mix_ratio} of a group of {cfg.rl.group} is {cfg.n_teacher} rollouts: for none "
            "set it to 0, for some raise it or --group, and keep it under 1"
        )
    if cfg.n_teacher and cfg.pool.pool is None:
        raise UserError("--mix-ratio needs a teacher pool: run `just build-pool`, then give --pool=FOLDER")
    if cfg.rl.group - cfg.n_teacher < 1 or cfg.rl.group < 2:
        raise UserError("a group needs two rollouts at least, one of them the student's: raise --group")
    known = cfg.vhack.known_modes
    if cfg.vhack.refresh_pairs != "same" and (known is None or not set(known) < set(cfg.data.modes)):
        raise UserError(
            "--refresh-pairs looks at the student's rollouts with the known modes' detector, and a detector of every "
            "mode would be cheating: name some, not all, with --known-modes"
        )


def writable(outputs: Path) -> None:
    """Raises UserError when nothing can be written there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {outputs}: {error.strerror}; set --outputs=FOLDER") from None


SMALL = 20e6
"""A model of fewer parameters has matrices too small for more than two threads, and two wait for each other on a core
that something else uses (docs/performance.md)."""


def idle_cores(seconds: float = 0.2) -> float:
    """How many of the cores that this process may use were idle over a moment; all of them where /proc does not say."""
    mine = {f"cpu{i}" for i in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()

    def read() -> dict[str, tuple[int, int]]:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        return {w[0]: (int(w[4]) + int(w[5]), sum(map(int, w[1:9]))) for w in lines if w[0] in mine}

    try:
        before, _, after = read(), time.sleep(seconds), read()
    except OSError:
        return float(sandbox.cores())
    return sum((after[c][0] - before[c][0]) / max(1, after[c][1] - before[c][1]) for c in after)


def settled(cfg: Config) -> Config:
    """cfg with torch's threads, the grading workers and a GPU's lots chosen where they are left to us, and said.

    One thread for each idle core, for a small model two at most; where OMP_NUM_THREADS or a GPU does the work, as torch
    has it. Two workers for each idle core, so that one runs while another waits for its child.
    """
    check(cfg)
    cfg = memory.with_lots(cfg)
    if cfg.threads and cfg.graders:
        return cfg
    free = max(1, round(idle_cores()))
    size = sum(p.numel() for p in memory.skeleton(cfg).parameters())
    threads = min(free, 2) if size < SMALL else free
    if "OMP_NUM_THREADS" in os.environ or models.device_of(cfg.model).type == "cuda":
        threads = torch.get_num_threads()
    cfg = replace(cfg, threads=cfg.threads or threads, graders=cfg.graders or 2 * free)
    logger.info(
        "--threads={} --graders={}: {:.1f} million parameters, {} of {} cores are idle",
        *(cfg.threads, cfg.graders, size / 1e6, free, sandbox.cores()),
    )
    return cfg


def fitting(tasks: Sequence[Task], tokenizer: Any, longest: int) -> list[Task]:
    """The tasks whose prompt has at most ``longest`` tokens; how many were left out is logged."""
    kept = [t for t in tasks if len(problems.encode_prompt(tokenizer, t)) <= longest]
    if not kept:
        raise UserError(f"every prompt is longer than {longest} tokens: raise --max-prompt")
    if len(kept) < len(tasks):
        logger.warning("{} of {} tasks left out: prompts over {} tokens", len(tasks) - len(kept), len(tasks), longest)
    return kept


def held_out_tasks(cfg: Config) -> list[Task]:
    """n_eval test problems in each mode, and n_eval of the same without a loophole (gt_only)."""
    modes = cfg.data.eval_modes or cfg.data.modes
    tasks = problems.tasks_for(replace(cfg, data=replace(cfg.data, modes=modes)), "test")
    asked = [t for mode in modes for t in [t for t in tasks if t.mode == mode][: cfg.eval.n_eval]]
    if "gt_only" in modes:
        return asked
    return asked + [problems.pose_one(t.problem, "gt_only") for t in asked[:: len(modes)]]


def set_up(cfg: Config) -> Experiment:
    """Load and extract everything. Raises UserError."""
    check(cfg)
    teacher = rollout_log.read_pool(Path(cfg.pool.pool)) if cfg.pool.pool else None
    tasks, held_out = problems.tasks_for(cfg), held_out_tasks(cfg)
    chosen_pairs = pairs.load(cfg.vhack, teacher, tasks)
    vhack.n_fitted(len(chosen_pairs), cfg.vhack)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    logger.info("memory plan\n{}", memory.require(cfg).table())
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    tasks = fitting(tasks, tokenizer, cfg.data.max_prompt)
    held_out = fitting(held_out, tokenizer, cfg.data.max_prompt)
    if teacher is not None and cfg.n_teacher:
        teacher.require(tasks)
    arm = arms.arm(cfg.intervention)
    own_set = OWN_PAIRS.get(arm.basis)
    other = pairs.load(replace(cfg.vhack, pairs=own_set), None, tasks) if own_set else None
    watch = replace(cfg.vhack, pairs=cfg.vhack.watch_pairs, known_modes=None)  # an instrument: it may know all modes
    watch_pairs = pairs.load(watch, None, tasks) if watch.pairs else []
    directions = directions_for(model, knobs, tokenizer, chosen_pairs, other, watch_pairs, cfg, vhack.grads_for)
    sample = rollout.sampler_of(model, knobs, cfg)
    return Experiment(
        model,
        tokenizer,
        knobs,
        sample,
        chosen_pairs,
        other,
        watch_pairs,
        tasks,
        held_out,
        teacher,
        directions,
        deque(maxlen=20),
    )


def directions_for(
    model: nn.Module,
    knobs: Knobs,
    tokenizer: Any,
    chosen: Sequence[Pair],
    other: Sequence[Pair] | None,
    watch_pairs: Sequence[Pair],
    cfg: Config,
    grads_of: Callable[..., PairGrads] = vhack.side_gradients,
) -> Directions:
    """All directions at the knobs as they stand, the quarantine ablated. grads_of: with or without the cache."""
    arm = arms.arm(cfg.intervention)
    own = grads_of(model, knobs, tokenizer, chosen, cfg)
    whole = vhack.fit_basis(own, cfg.vhack)
    real = vhack.sliced(whole, cfg.vhack)
    theirs = grads_of(model, knobs, tokenizer, other, cfg) if other is not None else None
    used = vhack.basis_of(arm.basis, real, own, theirs, cfg.vhack, cfg.seed)
    d = watch = None
    lot = cfg.rl.micro_batch, cfg.rl.lot_tokens or LOT_TOKENS
    with knobs.using("deployed"):
        states = detectors.of_pairs(model, tokenizer, chosen, detectors.readings_of(arm), *lot)
        if watch_pairs:
            read = detectors.of_pairs(model, tokenizer, watch_pairs, [detectors.HELD_OUT], *lot)
            watch = detectors.linear_detector(*read[detectors.HELD_OUT], cfg.vhack)
    if detectors.LAST in states:
        d = detectors.direction(*states[detectors.LAST])
        d = detectors.random_direction(d, cfg.seed) if arm.basis == "random" else d
    gate = detector_for(arm, own, used, states.get(detectors.MEAN), cfg)
    return Directions(whole, real, used, vhack.random_basis(real, cfg.seed + 10_000), gate, d, watch)


def refresh(x: Experiment, cfg: Config) -> tuple[float, float]:
    """Extract everything again at the knobs as they stand, into ``x``; how the new V lies to the old (basis_overlap).

    With refresh_pairs, from pairs that the known modes' detector finds in the student's recent rollouts as well, or
    from them alone (where there are enough of them to fit V).
    """
    chosen = x.pairs
    if cfg.vhack.refresh_pairs != "same":
        rollouts = [r for step in x.recent for r in step]
        found = pairs.from_rollouts(rollouts, cfg.vhack.known_modes, len(x.pairs))
        alone = cfg.vhack.refresh_pairs == "student" and len(found) >= 2 * cfg.vhack.k + cfg.vhack.n_heldout
        chosen = found if alone else found + x.pairs  # the held-out pairs stay the last
        logger.info("refresh: {} pairs found in the student's rollouts", len(found))
    new = directions_for(x.model, x.knobs, x.tokenizer, chosen, x.other_pairs, x.watch_pairs, cfg)
    moved = vhack.basis_overlap(new.whole, x.directions.whole)
    if moved[0] < 0.2:
        logger.warning("refresh: V turned (overlap {:.2f} < 0.2); a refresh like this does harm", moved[0])
    x.directions = new
    return moved


def refresh_if_due(x: Experiment, cfg: Config, step: int) -> tuple[float, float] | None:
    """``refresh`` every so many steps, not at the first: how the new V lies to the old; None where none is due."""
    every = cfg.vhack.refresh_every
    if not every or not step or step % every:
        return None
    x.refreshed = (step, x.knobs.state())
    return refresh(x, cfg)


# ------------------------------------------------------------------------------------------ a run between two steps


REFRESH, ADAMW = "refresh.", "adamw."


def named_parameters(knobs: Knobs) -> dict[str, Tensor]:
    """Both knobs of every module, in the order in which train.make_optimizer takes them."""
    return {f"{m}.{k}": p for k in ("delta", "delta_hack") for m, p in getattr(knobs, k).items()}


def state_of(x: Experiment, optimizers: tuple[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of a run between two steps, copied: the run goes on."""
    optimizer, scheduler = optimizers
    moments = {
        f"{ADAMW}{name}.{key}": value.clone()
        for name, p in named_parameters(x.knobs).items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    step, knobs = x.refreshed or (None, {})
    tensors = x.knobs.state() | moments | {REFRESH + name: t for name, t in knobs.items()}
    return tensors, {"scheduler": scheduler.state_dict(), "refreshed": step}


def restore(x: Experiment, optimizers: tuple[Any, Any], at: Checkpoint, run: Path, cfg: Config) -> None:
    """Put a freshly set-up experiment back to where ``at`` was taken. run: the folder with the logs up to then."""
    reads_rollouts = cfg.vhack.refresh_pairs != "same" and (at.phase, at.done) != ("step", 0)
    logged = [row for row in rollout_log.rows(run) if row["source"] == "student"] if reads_rollouts else []
    if at.state["refreshed"] is not None:
        then = {n.removeprefix(REFRESH): t for n, t in at.tensors.items() if n.startswith(REFRESH)}
        x.refreshed = (at.state["refreshed"], then)
        x.knobs.load_state(then)
        recall(x, logged, at.state["refreshed"])
        refresh(x, cfg)
    x.knobs.load_state(at.tensors)
    recall(x, logged, at.done if at.phase == "step" else cfg.rl.steps)
    put_back(optimizers, x.knobs, at)


def put_back(optimizers: tuple[Any, Any], knobs: Knobs, at: Checkpoint) -> None:
    """AdamW's moments and the learning rate. A knob that had no gradient yet has no moments."""
    optimizer, scheduler = optimizers
    moments: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(named_parameters(knobs)):
        prefix = f"{ADAMW}{name}."
        found = {n.removeprefix(prefix): t for n, t in at.tensors.items() if n.startswith(prefix)}
        if found:
            moments[i] = found
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    scheduler.load_state_dict(dict(at.state["scheduler"]))
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def recall(x: Experiment, logged: Iterable[dict[str, Any]], step: int) -> None:
    """Fill ``x.recent`` with the student's rollouts of the last steps before ``step``, as a refresh reads them: their
    token ids, which it does not read, are left out.
    """
    x.recent.clear()
    tasks: dict[tuple[str, str], Task] = {(t.problem.id, t.mode): t for t in x.tasks}
    by_step: dict[int, list[Rollout]] = {}
    for row in logged:
        if step - x.recent.maxlen <= row["step"] < step:
            task = tasks[row["problem_id"], row["env_mode"]]
            made = Rollout(task, "student", (), row["completion"], Grade(**row["grade"]))
            by_step.setdefault(row["step"], []).append(made)
    x.recent.extend(tuple(by_step[s]) for s in sorted(by_step))
