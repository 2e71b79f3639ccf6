"""Pooled hidden states of completions: what the activation-level arms and gates read.

Layers between 60 and 75 % of the depth, averaged (the range of Wu & Tang, arXiv 2604.01476); one forward, no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.arms import Arm, Score
from projected_grpo.config import Config, VHackCfg
from projected_grpo.data_types import Pair
from projected_grpo.extract_vhack_grad import HackBasis, PairGrads, unit_rows

Pooling = Literal["last", "mean"]
DEPTH = (0.6, 0.75)


def hidden_layers(depth: int) -> list[int]:
    """Indices into ``hidden_states`` (0: embeddings, i: after layer i) in the depth range; the nearest if none is."""
    inside = [i for i in range(1, depth + 1) if DEPTH[0] <= i / depth <= DEPTH[1]]
    return inside or [min(range(1, depth + 1), key=lambda i: abs(i / depth - sum(DEPTH) / 2))]


@torch.no_grad()
def pooled(
    model: nn.Module, ids: Int[Tensor, "b s"], mask: Bool[Tensor, "b s-1"], pool: Pooling, micro_batch: int = 64
) -> Float[Tensor, "b d"]:
    """Each row's hidden state at its completion's last token, or the mean over its completion's tokens; float32."""
    use = hidden_layers(model.config.get_text_config().num_hidden_layers)
    rows = []
    for i, m in zip(ids.split(micro_batch), mask.split(micro_batch), strict=True):
        states = model.get_decoder()(input_ids=i, use_cache=False, output_hidden_states=True).hidden_states
        h = torch.stack([states[layer] for layer in use]).float().mean(0)
        written = torch.nn.functional.pad(m, (1, 0))  # mask[t] speaks of token t+1
        if pool == "last":
            at = written.shape[1] - 1 - written.flip(1).int().argmax(1)
            rows.append(h[torch.arange(len(h), device=h.device), at])
        else:
            weight = written.to(h)
            rows.append((h * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
    return torch.cat(rows)


def of_pairs(
    model: nn.Module, tokenizer: Any, chosen: Sequence[Pair], pool: Pooling, micro_batch: int = 64
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Pooled states of the pairs' hack sides and clean sides, at the knobs in use."""
    ids, mask = vhack.encoded(tokenizer, chosen, model.device)
    h = pooled(model, ids, mask, pool, micro_batch)
    return h[: len(chosen)], h[len(chosen) :]


def direction(hack: Float[Tensor, "n d"], clean: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """mean(h⁺ − h⁻), normalised."""
    d = (hack - clean).mean(0)
    return d / d.norm()


def random_direction(like: Float[Tensor, " d"], seed: int) -> Float[Tensor, " d"]:
    """A random unit vector of that width."""
    d = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    return d / d.norm()


FOLDS = 6


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


def evidence(kind: Score, N: dict[str, Float[Tensor, "b r"]], states: Float[Tensor, "b d"] | None) -> Any:
    """What a detector of that kind reads: rollouts' NLL gradients N, their pooled activations, or both."""
    match kind:
        case "gradient":
            return N
        case "fisher":
            return flat(N)
        case "activation":
            return states
        case "either":
            return flat(N), states


def pools_of(arm: Arm) -> list[Pooling]:
    """Which pooled activations an arm reads."""
    return ["mean"] * (arm.score in ("activation", "either")) + ["last"] * arm.reward.startswith("rebound")


def detector_for(
    arm: Arm, own: PairGrads, used: HackBasis, states: tuple[Tensor, Tensor] | None, cfg: Config
) -> Detector:
    """The arm's detector. Arms without a gate get gate_drop's, whose flags are logged and nothing else."""
    if arm.score == "gradient":
        if arm.basis != "hack":
            return gradient_detector(own, lambda _: used, cfg.vhack)
        fitted = replace(cfg.vhack, n_heldout=0)
        return gradient_detector(own, lambda g: vhack.sliced(vhack.fit_basis(g, fitted), fitted), cfg.vhack)
    sides = {"fisher": (flat(own.hack), flat(own.clean)), "activation": states}
    if arm.score == "either":
        return either(*(linear_for(arm, *sides[kind], cfg) for kind in ("fisher", "activation")))
    return linear_for(arm, *sides[arm.score], cfg)


def linear_for(arm: Arm, hack: Float[Tensor, "n d"], clean: Float[Tensor, "n d"], cfg: Config) -> Detector:
    """The linear detector of two sides of evidence, with the arm's control in the direction's place."""
    match arm.basis:
        case "random":
            w = random_direction(hack[0], cfg.seed)
            return linear_detector(hack, clean, cfg.vhack, lambda h, c: w)
        case "shuffled":
            hack, clean = vhack.swapped(hack, clean, cfg.seed)
    return linear_detector(hack, clean, cfg.vhack)
