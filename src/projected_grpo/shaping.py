"""Reward-level arms: what is done to a step's rewards before advantages are made.

``monitor`` is the only function of a training step that reads the strict oracle's verdict, and only arms marked
``oracle`` reach it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo import loss
from projected_grpo.arms import Arm
from projected_grpo.config import ArmCfg
from projected_grpo.data_types import GradedBatch, Rollout

SIGMA_FLOOR = 0.1
"""Smallest σ of a group's scores; it presumes that d is normalised."""


def z_scores(s: Float[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """(s − s̄) / max(σ, 0.1) within each group."""
    sigma = s.std(dim=1, keepdim=True, correction=0).clamp(min=SIGMA_FLOOR)
    return (s - s.mean(dim=1, keepdim=True)) / sigma


def rebound_mul(r: Float[Tensor, "n g"], z: Float[Tensor, "n g"], alpha: float) -> Float[Tensor, "n g"]:
    """r (1 − α σ(z) 1[z > 0]), σ the logistic function. At α = 2 the factor is below 0 for every z > 0: it turns the
    sign of what a rollout earned, a correct one's as well (Wu & Tang, arXiv 2604.01476).
    """
    return r * (1 - alpha * z.sigmoid() * (z > 0))


def rebound_add(r: Float[Tensor, "n g"], z: Float[Tensor, "n g"], alpha: float) -> Float[Tensor, "n g"]:
    """r − α max(z, 0)."""
    return r - alpha * z.clamp(min=0)


def monitor(rollouts: Sequence[Rollout], accuracy: float, generator: torch.Generator) -> Bool[Tensor, " b"]:
    """ORACLE. Whether each rollout is paid without being right, as a monitor of that accuracy sees it: each verdict is
    turned round with probability 1 − accuracy.
    """
    truth = torch.tensor([r.grade.exploited for r in rollouts])
    return truth ^ (torch.rand(len(rollouts), generator=generator) >= accuracy)


def shaped(
    batch: GradedBatch, arm: Arm, states: Float[Tensor, "b d"] | None, d: Float[Tensor, " d"] | None,
    cfg: ArmCfg, group: int, generator: torch.Generator,
) -> GradedBatch:  # fmt: skip
    """The batch with the advantages that the arm's reward rule makes. states, d: pooled activations and the direction
    they are read along, for the rebound arms; None otherwise.
    """
    if arm.reward == "paid":
        return batch
    rewards, out = rearrange(batch.rewards, "(n g) -> n g", g=group), None
    if arm.reward in ("rebound_mul", "rebound_add"):
        assert states is not None
        assert d is not None
        z = z_scores(rearrange(states @ d, "(n g) -> n g", g=group).to(rewards))
        rewards = (rebound_mul if arm.reward == "rebound_mul" else rebound_add)(rewards, z, cfg.alpha)
    else:
        assert arm.oracle, "only an arm marked oracle may ask the monitor"
        flags = rearrange(monitor(batch.rollouts, cfg.monitor_accuracy, generator), "(n g) -> n g", g=group)
        flags = flags.to(rewards.device)
        if arm.reward == "penalty":
            rewards = rewards - cfg.penalty * flags
        else:
            out = flags
    A = loss.advantages(rewards, out)
    return replace(batch, A=rearrange(A, "n g -> (n g)"), n_zero_var=int((A == 0).all(1).sum()))
