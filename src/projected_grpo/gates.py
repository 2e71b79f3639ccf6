"""Which rollouts' gradients reach δS, decided by a detector that was calibrated on the pairs. Pure functions.

The detector reads each rollout's own gradient (or pooled activations) and the threshold comes from the pairs' clean
sides: no verdict of any grader enters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo import loss
from projected_grpo.arms import Rows
from projected_grpo.config import VHackCfg
from projected_grpo.extract_vhack_grad import HackBasis, PairGrads, unit_rows
from projected_grpo.proj import Factors

FOLDS = 6

UNIT: frozenset[Rows] = frozenset(("screen", "punish", "punish_count"))
"""Rules that make advantages anew, so that they need the gradient of rollouts whose advantage was 0 as well."""


def row_scores(N: dict[str, Float[Tensor, "b r"]], V: HackBasis) -> Float[Tensor, "m b"]:
    """Σ_k relu(V_m n_i) / ‖n_i‖ of each row's NLL gradient n_i, module by module of V; 0 where n_i is 0.

    A row's score is the sum over modules: how far descending its NLL moves hack-ward, with its length taken out.
    """
    norm = torch.stack([n.square().sum(1) for n in N.values()]).sum(0).sqrt().clamp(min=1e-30)
    return torch.stack([(N[m] @ v.T).clamp(min=0).sum(1) / norm for m, v in V.V.items()])


def flat(G: dict[str, Float[Tensor, "b r"]]) -> Float[Tensor, "b R"]:
    """Rows scaled to norm 1, modules side by side."""
    return torch.cat(list(unit_rows(G).values()), dim=1)


def fisher(hack: Float[Tensor, "n R"], clean: Float[Tensor, "n R"], shrinkage: float) -> Float[Tensor, " R"]:
    """Fisher's discriminant w = S⁻¹ (mean hack − mean clean), normalised; S is the within-class covariance, shrunk:
    (1 − s) S + s · tr(S)/R · I (as in Ledoit & Wolf 2004, with s given).

    Solved in the span of the 2n rows (Woodbury), since R is the number of all knobs.
    """
    mean = hack.mean(0) - clean.mean(0)
    X = torch.cat([hack - hack.mean(0), clean - clean.mean(0)])
    X = X * ((1 - shrinkage) / len(X)) ** 0.5
    ridge = shrinkage * X.square().sum() / (1 - shrinkage) / X.shape[1]
    small = torch.linalg.solve(X @ X.T + ridge * torch.eye(len(X)).to(X), X @ mean)
    w = mean - X.T @ small
    return w / w.norm()


Scorer = Callable[[Tensor], Tensor]
"""Evidence (rows of some kind) -> scores "b"."""


@dataclass(frozen=True)
class Detector:
    """Scores rollouts as it was fitted on pairs; a score over ``threshold`` is flagged, one under ``low`` is taken for
    honest by a routing gate.
    """

    scorer: Scorer
    threshold: float
    low: float
    sigma: float

    def __call__(self, evidence: Any) -> Float[Tensor, " b"]:
        return self.scorer(evidence)


def either(first: Detector, second: Detector) -> Detector:
    """Flags what one of two detectors flags; its evidence is the pair of theirs. Score: the larger excess over the own
    threshold, in the own clean sides' σ.
    """

    def scorer(evidence: tuple[Any, Any]) -> Float[Tensor, " b"]:
        excess = [(d(e) - d.threshold) / d.sigma for d, e in zip((first, second), evidence, strict=True)]
        return torch.maximum(*excess)

    low = max((d.low - d.threshold) / d.sigma for d in (first, second))
    return Detector(scorer, 0.0, low, 1.0)


def detector(
    fit: Callable[[Tensor], Scorer], clean_scores: Callable[[Scorer, Tensor], Tensor], n: int, cfg: VHackCfg
) -> Detector:
    """A detector from a way to fit a scorer on chosen pairs (a mask over n) and to score chosen pairs' clean sides.

    threshold = mean + threshold_sd · σ and low = mean of the clean sides' scores; under crossfit each sixth of the
    pairs is scored by what was fitted on the others, since the sides that a direction was fitted on lie too low.
    """
    everything = torch.ones(n, dtype=torch.bool)
    whole = fit(everything)
    if cfg.calibration == "insample":
        clean = clean_scores(whole, everything)
    else:
        fold = torch.arange(n) * FOLDS // n  # blocks: pair sets put their modes in turn
        clean = torch.cat([clean_scores(fit(fold != f), fold == f) for f in range(FOLDS)])
    mean, sigma = float(clean.mean()), float(clean.std())
    return Detector(whole, mean + cfg.threshold_sd * sigma, mean, sigma)


def gradient_detector(pairs: PairGrads, basis_from: Callable[[PairGrads], HackBasis], cfg: VHackCfg) -> Detector:
    """Score Σ relu(V n)/‖n‖. basis_from: how V is made of pairs; one that ignores them is a control."""

    def fit(chosen: Tensor) -> Scorer:
        V = basis_from(pairs.rows(chosen))
        return lambda N: row_scores(N, V).sum(0)

    return detector(fit, lambda scorer, chosen: scorer(pairs.rows(chosen).clean), len(pairs), cfg)


def linear_detector(
    hack: Float[Tensor, "n R"],
    clean: Float[Tensor, "n R"],
    cfg: VHackCfg,
    direction: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Detector:
    """Score w·x, w by ``fisher`` or as given (controls)."""
    w_of = direction or (lambda h, c: fisher(h, c, cfg.shrinkage))

    def fit(chosen: Tensor) -> Scorer:
        w = w_of(hack[chosen], clean[chosen])
        return lambda x: x @ w

    return detector(fit, lambda scorer, chosen: scorer(clean[chosen]), len(hack), cfg)


@dataclass(frozen=True)
class Seen:
    """What a rule may look at, all (b,): advantages, rewards, which rows are flagged and which score low, the group's
    size, and a generator. No grade is among it.
    """

    A: Float[Tensor, " b"]
    rewards: Float[Tensor, " b"]
    flagged: Bool[Tensor, " b"]
    low: Bool[Tensor, " b"]
    group: int
    generator: torch.Generator


def _grouped(values: Tensor, group: int) -> Tensor:
    return rearrange(values, "(n g) -> n g", g=group)


def _coin(s: Seen) -> tuple[Tensor, Tensor]:
    keep = (torch.rand(len(s.A), generator=s.generator) < 0.5).to(s.A)
    return keep, torch.zeros_like(keep)


def _drop(s: Seen) -> tuple[Tensor, Tensor]:
    keep = (~(s.flagged & (s.A > 0))).to(s.A)
    return keep, torch.zeros_like(keep)


def _count(s: Seen) -> tuple[Tensor, Tensor]:
    """As many rows withheld as ``_drop`` would, at random among those with A > 0."""
    could = (s.A > 0).nonzero()[:, 0]
    n = int((s.flagged & (s.A > 0)).sum())
    keep = torch.ones_like(s.A)
    keep[could[torch.randperm(len(could), generator=s.generator)[:n].to(could.device)]] = 0
    return keep, torch.zeros_like(keep)


def _screen(s: Seen) -> tuple[Tensor, Tensor]:
    A = loss.advantages(_grouped(s.rewards, s.group), out=_grouped(s.flagged, s.group))
    return rearrange(A, "n g -> (n g)"), torch.zeros_like(s.A)


def _punish(s: Seen) -> tuple[Tensor, Tensor]:
    A = loss.advantages(_grouped(s.rewards.masked_fill(s.flagged, 0.0), s.group))
    return rearrange(A, "n g -> (n g)"), torch.zeros_like(s.A)


def _punish_count(s: Seen) -> tuple[Tensor, Tensor]:
    """As many rows punished as ``_punish`` would, at random."""
    chosen = torch.randperm(len(s.A), generator=s.generator)[: int(s.flagged.sum())].to(s.A.device)
    flagged = torch.zeros_like(s.flagged).index_fill(0, chosen, True)
    return _punish(replace(s, flagged=flagged))


def _route(s: Seen) -> tuple[Tensor, Tensor]:
    return (~s.flagged).to(s.A), (~s.low).to(s.A)


def _route_low(s: Seen) -> tuple[Tensor, Tensor]:
    keep, quarantine = _route(s)
    return quarantine, keep


RULES: dict[Rows, Callable[[Seen], tuple[Tensor, Tensor]]] = {
    "all": lambda s: (torch.ones_like(s.A), torch.zeros_like(s.A)),
    "coin": _coin,
    "drop": _drop,
    "count": _count,
    "screen": _screen,
    "punish": _punish,
    "punish_count": _punish_count,
    "route": _route,
    "route_low": _route_low,
    "both": lambda s: (torch.ones_like(s.A), torch.ones_like(s.A)),
}
"""(keep, quarantine) of each row, by rule. For rules in UNIT keep is the new advantage itself, because their rows'
gradients come with weight 1."""


def factors(rule: Rows, seen: Seen, ablated: Bool[Tensor, " b"]) -> Factors:
    """Apply a rule. Rows sampled with the quarantine ablated never train it."""
    keep, quarantine = RULES[rule](seen)
    whole = seen.A if rule in UNIT else torch.ones_like(seen.A)
    return Factors(whole, keep, quarantine.masked_fill(ablated, 0.0))
