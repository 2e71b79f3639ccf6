"""What a checkpoint holds of a run, and how a run is put back to it.

A step's data and randomness are pure functions of (seed, step), so the state is: the knobs, AdamW's moments, the
schedule's position, and the directions of the last refresh. Those are made again as they were made then: by
``prepare.refresh``, at the knobs of that step, with the rollouts that had been logged by then.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from projected_grpo import rollout_log
from projected_grpo.antipasto import Knobs
from projected_grpo.checkpoints import Checkpoint
from projected_grpo.config import Config
from projected_grpo.data_types import Grade, Rollout, Task
from projected_grpo.prepare import Experiment, refresh

REFRESH, ADAMW = "refresh.", "adamw."


def named_parameters(knobs: Knobs) -> dict[str, Tensor]:
    """Both knobs of every module, in the order in which step.make_optimizer takes them."""
    return {f"{m}.{k}": p for k in ("delta", "delta_hack") for m, p in getattr(knobs, k).items()}


def state_of(x: Experiment, optimizers: tuple[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of a run between two steps."""
    optimizer, scheduler = optimizers
    moments = {
        f"{ADAMW}{name}.{key}": value
        for name, p in named_parameters(x.knobs).items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    step, knobs = x.refreshed or (None, {})
    tensors = x.knobs.state() | moments | {REFRESH + name: t for name, t in knobs.items()}
    return tensors, {"scheduler": scheduler.state_dict(), "refreshed": step}


def restore(x: Experiment, optimizers: tuple[Any, Any], at: Checkpoint, run: Path, cfg: Config) -> None:
    """Put a freshly set-up experiment back to where ``at`` was taken. run: the folder with the logs up to then."""
    reads_rollouts = cfg.vhack.refresh_pairs != "same"
    logged = [row for row in rollout_log.rows(run) if row["source"] == "student"] if reads_rollouts else []
    if at.state["refreshed"] is not None:
        then = {n.removeprefix(REFRESH): t for n, t in at.tensors.items() if n.startswith(REFRESH)}
        x.refreshed = (at.state["refreshed"], then)
        x.knobs.load_state(then)
        remember(x, logged, at.state["refreshed"])
        refresh(x, cfg)
    x.knobs.load_state(at.tensors)
    remember(x, logged, at.done if at.phase == "step" else cfg.rl.steps)
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


def remember(x: Experiment, logged: Iterable[dict[str, Any]], step: int) -> None:
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
