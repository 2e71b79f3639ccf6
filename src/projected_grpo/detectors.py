"""Detectors of hacks, fitted on the pairs: by each rollout's own gradient, or by its pooled hidden states.

A threshold comes from the pairs' clean sides: no verdict of any grader enters. The *acting* detector is the arm's. The
*held-out* probe is fitted on other pairs and other layers, and nothing is ever trained against it: where the acting
one's recall falls and its does not, the policy evades; where both fall, it hides.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from projected_grpo import extract_vhack_grad as vhack
from projected_grpo import loss
from projected_grpo.arms import Arm
from projected_grpo.config import Config, VHackCfg
from projected_grpo.data_types import Pair
from projected_grpo.extract_vhack_grad import HackBasis, PairGrads

# ------------------------------------------------------------------------------------------------ pooled hidden states


@dataclass(frozen=True)
class Reading:
    """Hidden states of a completion as one vector: of its last token or the mean over its tokens, averaged over the
    layers in this range of the depth (0: embeddings, 1: after the last layer).
    """

    pool: Literal["last", "mean"]
    depth: tuple[float, float] = (0.6, 0.75)


LAST, MEAN = Reading("last"), Reading("mean")
"""What arms read; the range is that of Wu & Tang (arXiv 2604.01476)."""
HELD_OUT = Reading("mean", (0.4, 0.55))
"""What the held-out probe reads."""
States = dict[Reading, Tensor]


def hidden_layers(depth: tuple[float, float], n: int) -> list[int]:
    """Indices into the ``hidden_states`` of a model of n layers in that range; the nearest one if none is."""
    inside = [i for i in range(1, n + 1) if depth[0] <= i / n <= depth[1]]
    return inside or [min(range(1, n + 1), key=lambda i: abs(i / n - sum(depth) / 2))]


@contextmanager
def states_of(decoder: nn.Module, layers: Collection[int]) -> Iterator[dict[int, Float[Tensor, "b s d"]]]:
    """Inside, a forward leaves the hidden states of these layers in the dict yielded, 1 after the first layer, and runs
    no layer behind the last of them. What a model's ``hidden_states`` hold, the last with the final norm.
    """
    kept: dict[int, Tensor] = {}
    config, n = decoder.config, decoder.config.num_hidden_layers

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, out: kept.update({layer: getattr(out, "last_hidden_state", out)})

    hooks = [(decoder if i == n else decoder.layers[i - 1]).register_forward_hook(keep(i)) for i in layers]
    config.num_hidden_layers = max(layers)  # as far as transformers' decoders go
    try:
        yield kept
    finally:
        config.num_hidden_layers = n
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def pooled(
    model: nn.Module, ids: Int[Tensor, "b s"], mask: Bool[Tensor, "b s-1"], readings: Sequence[Reading],
    micro_batch: int = 64, lot_tokens: int = loss.LOT_TOKENS,
    agree: Callable[[list[Tensor], Tensor], list[Tensor]] | None = None,
) -> States:  # fmt: skip
    """Every reading of the rows' completions, (b, d) in float32, from one forward at the knobs in use, in lots as those
    of ``loss.row_gradients``, rows that are alike once.
    """
    if not readings:
        return {}
    config, decoder = model.config.get_text_config(), model.get_decoder()
    layers = {r: hidden_layers(r.depth, config.num_hidden_layers) for r in readings}
    first = loss.first_alike(ids, mask)
    lots = loss.lots(mask, first.unique(), micro_batch, lot_tokens)
    found = {r: torch.zeros(len(ids), config.hidden_size, device=ids.device) for r in readings}
    for lot, i, m in (loss.trimmed(ids, mask, lot) for lot in (agree(lots, mask) if agree else lots)):
        with states_of(decoder, sorted({i for of in layers.values() for i in of})) as states:
            decoder(input_ids=i, use_cache=False)
        written = torch.nn.functional.pad(m, (1, 0))  # mask[t] speaks of token t+1
        for r in readings:
            h = torch.stack([states[layer] for layer in layers[r]]).float().mean(0)
            if r.pool == "last":
                at = written.shape[1] - 1 - written.flip(1).int().argmax(1)
                found[r][lot] = h[torch.arange(len(h), device=h.device), at]
            else:
                weight = written.to(h)
                found[r][lot] = (h * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return {r: h[first] for r, h in found.items()}


def of_pairs(
    model: nn.Module, tokenizer: Any, chosen: Sequence[Pair], readings: Sequence[Reading], micro_batch: int = 64,
    lot_tokens: int = loss.LOT_TOKENS,
) -> dict[Reading, tuple[Tensor, Tensor]]:  # fmt: skip
    """Every reading of the pairs' hack sides and clean sides, (n, d) each, at the knobs in use."""
    ids, mask = vhack.encoded(tokenizer, chosen, model.device)
    n = len(chosen)
    return {r: (h[:n], h[n:]) for r, h in pooled(model, ids, mask, readings, micro_batch, lot_tokens).items()}


def readings_of(arm: Arm) -> list[Reading]:
    """Which readings an arm needs."""
    return [MEAN] * (arm.score == "activation") + [LAST] * (arm.reward == "rebound_mul")


def direction(hack: Float[Tensor, "n d"], clean: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """mean(h⁺ − h⁻), normalised."""
    d = (hack - clean).mean(0)
    return d / d.norm()


def random_direction(like: Float[Tensor, " d"], seed: int) -> Float[Tensor, " d"]:
    """A random unit vector of that width."""
    d = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    return d / d.norm()


def orthogonal(d: Float[Tensor, " d"], to: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """d without its part along the unit vector ``to``, normalised."""
    d = d - (d @ to) * to
    return d / d.norm()


# ------------------------------------------------------------------------------------------------- scores, thresholds


FOLDS = 6


def row_scores(N: dict[str, Float[Tensor, "b r"]], V: HackBasis) -> Float[Tensor, "m b"]:
    """Σ_k relu(V_m n_i) / ‖n_i‖ of each row's NLL gradient n_i, module by module of V; 0 where n_i is 0.

    A row's score is the sum over modules: how far descending its NLL moves hack-ward, with its length taken out.
    """
    norm = torch.stack([n.square().sum(1) for n in N.values()]).sum(0).sqrt().clamp(min=1e-30)
    return torch.stack([(N[m] @ v.T).clamp(min=0).sum(1) / norm for m, v in V.V.items()])


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
    """Scores rollouts as it was fitted on pairs; a score over ``threshold`` is flagged."""

    scorer: Scorer
    threshold: float

    def __call__(self, evidence: Any) -> Float[Tensor, " b"]:
        return self.scorer(evidence)


def detector(
    fit: Callable[[Tensor], Scorer], clean_scores: Callable[[Scorer, Tensor], Tensor], n: int, cfg: VHackCfg
) -> Detector:
    """A detector from a way to fit a scorer on chosen pairs (a mask over n) and to score chosen pairs' clean sides.

    threshold = mean + threshold_sd · σ of the clean sides' scores; under crossfit each sixth of the pairs is scored by
    what was fitted on the others, since the sides that a direction was fitted on lie too low.
    """
    everything = torch.ones(n, dtype=torch.bool)
    whole = fit(everything)
    if cfg.calibration == "insample":
        clean = clean_scores(whole, everything)
    else:
        fold = torch.arange(n) * FOLDS // n  # blocks: pair sets put their modes in turn
        clean = torch.cat([clean_scores(fit(fold != f), fold == f) for f in range(FOLDS)])
    return Detector(whole, float(clean.mean()) + cfg.threshold_sd * float(clean.std()))


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


def detector_for(
    arm: Arm, own: PairGrads, used: HackBasis, states: tuple[Tensor, Tensor] | None, cfg: Config
) -> Detector:
    """The arm's detector; states: ``MEAN`` of the pairs' sides, for arms that score activations. Arms without a gate
    get gate_drop's, whose flags are logged and nothing else.
    """
    if arm.score == "gradient":
        if arm.basis != "hack":
            return gradient_detector(own, lambda _: used, cfg.vhack)
        fitted = replace(cfg.vhack, n_heldout=0)
        return gradient_detector(own, lambda g: vhack.sliced(vhack.fit_basis(g, fitted), fitted), cfg.vhack)
    hack, clean = states
    if arm.basis in ("random", "orthogonal"):
        w = random_direction(hack[0], cfg.seed)
        return linear_detector(
            hack, clean, cfg.vhack, lambda h, c: orthogonal(w, direction(h, c)) if arm.basis == "orthogonal" else w
        )
    if arm.basis == "shuffled":
        hack, clean = vhack.swapped(hack, clean, cfg.seed)
    return linear_detector(hack, clean, cfg.vhack)
