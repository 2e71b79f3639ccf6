"""Everything a run needs before its first step, and every refusal that can be made before its folder exists."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from projected_grpo import antipasto, models, pairs, pool, problems, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import Pair, Task
from projected_grpo.extract_vhack_grad import HackBasis


@dataclass
class Experiment:
    """What a run is made of, all of it checked before the run's folder exists."""

    model: nn.Module
    tokenizer: Any
    knobs: Knobs
    pairs: list[Pair]
    tasks: list[Task]
    held_out: list[Task]
    teacher: pool.Pool | None
    basis: HackBasis
    """V extracted from the pairs, before an arm exchanges it."""


def check(cfg: Config) -> None:
    """Refuse, before anything is loaded, what cannot work. Raises UserError."""
    proj.arm(cfg.intervention)
    writable(Path(cfg.outputs))
    models.device_of(cfg.model)
    if not 0 <= cfg.pool.mix_ratio < 1 or (cfg.pool.mix_ratio > 0 and cfg.n_teacher == 0):
        raise UserError(f"--mix-ratio={cfg.pool.mix_ratio} of a group of {cfg.rl.group} is {cfg.n_teacher} rollouts")
    if cfg.n_teacher and cfg.pool.pool is None:
        raise UserError("--mix-ratio needs a teacher pool: run `just build-pool`, then give --pool=FOLDER")
    if cfg.rl.group - cfg.n_teacher < 1 or cfg.rl.group < 2:
        raise UserError("a group needs two rollouts at least, one of them the student's: raise --group")


def writable(outputs: Path) -> None:
    """Raises UserError when nothing can be written there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {outputs}: {error.strerror}; set --outputs=FOLDER") from None


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


def set_up(cfg: Config) -> Experiment:
    """Load and extract everything. Raises UserError."""
    check(cfg)
    teacher = pool.read(Path(cfg.pool.pool)) if cfg.pool.pool else None
    tasks, held_out = pool.tasks_for(cfg), held_out_tasks(cfg)
    chosen_pairs = pairs.load(cfg.vhack, teacher, tasks)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    basis = vhack.basis_for(model, knobs, tokenizer, chosen_pairs, cfg)
    tasks = fitting(tasks, tokenizer, cfg.data.max_prompt)
    held_out = fitting(held_out, tokenizer, cfg.data.max_prompt)
    if teacher is not None and cfg.n_teacher:
        teacher.require(tasks)
    return Experiment(model, tokenizer, knobs, chosen_pairs, tasks, held_out, teacher, basis)


def arm_basis(basis: HackBasis, cfg: Config) -> HackBasis:
    """The V that the arm uses: k_use axes above the noise floor, and the arm's basis in their place."""
    used = vhack.sliced(basis, cfg.vhack)
    return used if proj.arm(cfg.intervention).basis == "hack" else proj.random_basis(used, cfg.seed)


def refresh(x: Experiment, cfg: Config) -> float:
    """Extract V again at the knobs as they stand, into ``x``; how far the new V overlaps the old."""
    new = vhack.extract(x.model, x.knobs, x.tokenizer, x.pairs, cfg)
    overlap = vhack.basis_overlap(new, x.basis)
    if overlap < 0.2:
        logger.warning("refresh: V turned (overlap {:.2f} < 0.2); a refresh like this does harm", overlap)
    x.basis = new
    return overlap
