"""The hack direction: pairs -> ``PairGrads`` (cached by the content they were made from) -> ``HackBasis``.

    python -m projected_grpo.extract_vhack_grad <preset> [--overrides]

For a pair's two completions of one prompt, the gradient of the negative log-likelihood in δS; D stacks hack minus
clean, (n_pairs, r) a module, so that what belongs to the prompt cancels. For one update with advantages +1 (hack)
and −1 (clean) the loss gradient is exactly a row of D. V is D's first k right singular vectors, each oriented by
the majority of the pairs, so that a positive coefficient V g means: descending g makes the hack more likely.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor, nn

from projected_grpo import antipasto, loss, models, pairs, problems, rollout_log
from projected_grpo.antipasto import Knobs
from projected_grpo.command_line import parse, run_main
from projected_grpo.config import Config, UserError, VHackCfg
from projected_grpo.data_types import Pair

DIRECTION = "v2"  # enters the cache key: change it when the pairs' gradients mean something else


@dataclass(frozen=True)
class PairGrads:
    """Every pair's NLL gradient in δS, of its hack side and of its clean side: per module (n, r), in the pairs' order.

    All that V, its controls and the gates' thresholds are made from.
    """

    hack: dict[str, Float[Tensor, "_n _r"]]
    clean: dict[str, Float[Tensor, "_n _r"]]

    def __len__(self) -> int:
        return len(next(iter(self.hack.values())))

    def unit(self) -> "PairGrads":
        """Each side scaled to norm 1 over all modules; a side that is all zero stays so."""
        return PairGrads(unit_rows(self.hack), unit_rows(self.clean))

    def rows(self, chosen: Tensor) -> "PairGrads":
        """The chosen pairs: indices or a mask."""
        return PairGrads(*({m: g[chosen] for m, g in side.items()} for side in (self.hack, self.clean)))


def unit_rows(G: dict[str, Float[Tensor, "b r"]]) -> dict[str, Float[Tensor, "b r"]]:
    """Each row scaled to norm 1 over all modules together; a row that is all zero stays so."""
    norm = torch.stack([g.square().sum(1) for g in G.values()]).sum(0).sqrt().clamp(min=1e-30)
    return {m: g / norm[:, None] for m, g in G.items()}


@dataclass(frozen=True)
class HackBasis:
    """V: per module (k, r), orthonormal rows oriented hack-ward; S: per module (k,) singular values of D.

    ``meta``: what it was made from and how good it is (floats and strings only). Modules may be missing: an axis
    under the noise floor is dropped, and a module without axes is left alone by every projection.
    """

    V: dict[str, Float[Tensor, "_k _r"]]
    S: dict[str, Float[Tensor, " _k"]]
    meta: dict[str, Any]


def encoded(
    tokenizer: Any, chosen: Sequence[Pair], device: torch.device
) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s-1"]]:
    """The pairs as a batch, b = 2n: all hack sides, then all clean sides, each with its end-of-turn token."""
    prompts = [problems.encode_prompt(tokenizer, p.task) for p in chosen] * 2
    sides = [p.hack for p in chosen] + [p.clean for p in chosen]
    written = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in sides]
    return loss.collate(prompts, written, tokenizer.pad_token_id, device)


def side_gradients(model: nn.Module, knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config) -> PairGrads:
    """Per-pair NLL gradients in δS of both sides, at the knobs as they stand but for the quarantine.

    The quarantine is ablated throughout: extracting through a live one turns V off the hack. NLL is summed over the
    completion, at the run's temperature as the policy gradient's are, and divided by Dr.GRPO's max_new (length_norm
    live) or by its own length (mean).
    Raises UserError naming the first pair whose NLL is not finite.
    """
    ids, mask = encoded(tokenizer, chosen, model.device)
    length = mask.sum(1) if cfg.vhack.length_norm == "mean" else torch.full((len(ids),), cfg.rl.max_new)
    weight = 1.0 / length.to(model.device, torch.float32)
    try:
        with knobs.using("deployed"):
            rows = loss.row_gradients(
                model, knobs, ids, mask, weight, temperature=cfg.rl.temperature, micro_batch=cfg.rl.micro_batch,
                lot_tokens=cfg.rl.lot_tokens or loss.LOT_TOKENS,
            )  # fmt: skip
    except FloatingPointError:
        for i, pair in enumerate([*chosen, *chosen]):
            nll = -loss.token_logprobs(model, ids[i : i + 1], mask[i : i + 1]).sum()
            if not torch.isfinite(nll):
                side = "hack" if i < len(chosen) else "clean"
                raise UserError(
                    f"pair {pair.name} ({side} side) has an NLL of {nll.item()}: mend or remove it"
                ) from None
        raise
    n = len(chosen)
    return PairGrads({m: g[:n] for m, g in rows.G.items()}, {m: g[n:] for m, g in rows.G.items()})


def leading_axes(D: Float[Tensor, "m n r"], k: int) -> tuple[Float[Tensor, "m k r"], Float[Tensor, "m k"]]:
    """The first k right singular vectors and singular values of m matrices of few rows.

    On a CPU LAPACK's SVD of each, whose bits the results in docs/results.md rest on. On a GPU, where that would be m
    factorisations one after the other, one batch of eigenproblems: D Dᵀ = Q Λ Qᵀ in float64, V = Λ^(−1/2) Qᵀ D.
    """
    if not D.is_cuda:
        _, S, Vh = torch.linalg.svd(D, full_matrices=False)
        return Vh[:, :k], S[:, :k]
    return gram_axes(D, k)


def gram_axes(D: Float[Tensor, "m n r"], k: int) -> tuple[Float[Tensor, "m k r"], Float[Tensor, "m k"]]:
    """``leading_axes`` by the pairs' Gram matrices. Axes of no singular value are 0."""
    exact = D.double()
    values, Q = torch.linalg.eigh(exact @ exact.mT)
    S = values.flip(-1)[:, :k].clamp(min=0).sqrt()
    V = Q.flip(-1)[..., :k].mT @ exact
    alive = 1e-5 * S[:, :1] < S  # under that float64 no longer tells V from noise
    return torch.where(alive[..., None], V / S[..., None], 0.0).to(D), torch.where(alive, S, 0.0).to(D)


def fit(
    D: Mapping[str, Float[Tensor, "n _r"]], k: int, tau_axis: float
) -> tuple[dict[str, Float[Tensor, "k _r"]], dict[str, Float[Tensor, " k"]], dict[str, Float[Tensor, " k"]]]:
    """V, S and vote margins of every module's differences D; modules of one width are fitted together.

    Each right singular vector is oriented by the majority of sign(D V_iᵀ) over pairs, which an outlying pair cannot
    flip; margin = |votes for − votes against| / n. A near-tie makes a one-sided gate arbitrary on that axis. Axes
    with S_i / S_0 < tau_axis are set to zero.
    """
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for width in dict.fromkeys(d.shape[1] for d in D.values()):
        names = [m for m, d in D.items() if d.shape[1] == width]
        stack = torch.stack([D[m] for m in names])
        V, S = leading_axes(stack, k)
        votes = torch.sign(stack @ V.mT).sum(1)
        V = V * torch.where(votes < 0, -1.0, 1.0).to(V)[..., None]
        alive = tau_axis * S[:, :1] <= S
        parts = zip(V * alive[..., None], S * alive, votes.abs() / stack.shape[1], strict=True)
        found |= dict(zip(names, parts, strict=True))
    return tuple({m: found[m][part] for m in D} for part in range(3))


def heldout_accuracy(V: dict[str, Tensor], pair_grads: PairGrads, n_heldout: int) -> float | None:
    """Share of the last pairs whose hack side projects further onto V than the clean side, over all modules and axes.

    None where no pair was held out.
    """
    if not n_heldout:
        return None
    D = {m: pair_grads.hack[m][-n_heldout:] - pair_grads.clean[m][-n_heldout:] for m in V}
    score = torch.stack([(D[m] @ v.T).sum(1) for m, v in V.items()]).sum(0)
    return float((score > 0).double().mean())


def n_fitted(n_pairs: int, cfg: VHackCfg) -> int:
    """How many of the pairs V is fitted to. Raises UserError when they are too few for k axes."""
    left = n_pairs - cfg.n_heldout
    if left < cfg.k:
        raise UserError(
            f"{n_pairs} pairs, {cfg.n_heldout} of them held out, are too few to fit k = {cfg.k} axes: lower --k or "
            "--n-heldout, or add pairs"
        )
    return left


def fit_basis(pair_grads: PairGrads, cfg: VHackCfg) -> HackBasis:
    """Fit V on all but the last n_heldout pairs and judge it on those. Under pair_norm = unit every side's gradient
    is scaled to norm 1 first: otherwise a few surprising tokens in a few pairs decide the singular vectors.

    Raises UserError when too few pairs are left to fit k axes.
    """
    n_fit = n_fitted(len(pair_grads), cfg)
    pair_grads = pair_grads.unit() if cfg.pair_norm == "unit" else pair_grads
    D = {m: h[:n_fit] - pair_grads.clean[m][:n_fit] for m, h in pair_grads.hack.items()}
    V, S, margins = fit(D, cfg.k, cfg.tau_axis)
    margin = torch.cat(list(margins.values()))
    meta = {
        "n_pairs": n_fit,
        "n_heldout": cfg.n_heldout,
        "heldout_accuracy": heldout_accuracy(V, pair_grads, cfg.n_heldout),
        "vote_margin_mean": float(margin.mean()),
        "vote_margin_min": float(margin.min()),
    }
    return HackBasis(V, S, meta)


def sliced(basis: HackBasis, cfg: VHackCfg) -> HackBasis:
    """What a run uses: the first k_use axes, then the global noise floor.

    S is pooled over all modules and axes below its drop_bottom_frac quantile go, as do zeroed axes; a module left
    with none is skipped.
    """
    S = {m: s[: cfg.k_use] for m, s in basis.S.items()}
    floor = torch.cat(list(S.values())).quantile(cfg.drop_bottom_frac)
    keep = {m: (s >= floor) & (s > 0) for m, s in S.items()}
    V = {m: basis.V[m][: cfg.k_use][keep[m]] for m in S if keep[m].any()}
    return HackBasis(V, {m: S[m][keep[m]] for m in V}, basis.meta)


def basis_overlap(new: HackBasis, old: HackBasis) -> tuple[float, float]:
    """Of two whole bases of one model: (mean |⟨V_new_i, V_old_i⟩| over all axes, and of the axes at which that is over
    1/2 the share that point the other way now). (1, 0) means nothing turned; an axis that changed places with another
    lowers the first.
    """
    cosines = torch.cat([(v * old.V[m]).sum(1) for m, v in new.V.items()])
    same = cosines.abs() > 0.5
    return float(cosines.abs().mean()), float((cosines[same] < 0).double().mean()) if same.any() else 0.0


def cache_key(knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config) -> str:
    """sha256 over all weights, their bases, the knobs, the pairs as tokens and every setting that their gradients
    depend on. Of a basis, which is a function of its weight but for signs and rotations, the first row of U tells them.
    """
    parts = lambda m: (m.content, antipasto.digest(m.U[:1]), antipasto.digest(m.delta))
    weights = [":".join((n, *parts(m))) for n, m in knobs.modules.items()]
    settings = [DIRECTION, cfg.vhack.length_norm, cfg.rl.max_new, cfg.rl.temperature, cfg.model.svd_rank]
    texts = [antipasto.digest(part) for part in encoded(tokenizer, chosen, torch.device("cpu"))]
    return hashlib.sha256(json.dumps([knobs.rest, weights, texts, settings]).encode()).hexdigest()


def save(pair_grads: PairGrads, path: Path) -> None:
    """Write the pairs' gradients as safetensors, atomically."""
    sides = {"hack": pair_grads.hack, "clean": pair_grads.clean}
    antipasto.save({f"{side}.{m}": g for side, grads in sides.items() for m, g in grads.items()}, path)


def load(path: Path, knobs: Knobs) -> PairGrads:
    """Read the pairs' gradients. Raises UserError when they are of a model with other modules or widths."""
    tensors = load_file(path)
    modules = {n.removeprefix("hack."): t.shape[1] for n, t in tensors.items() if n.startswith("hack.")}
    for name, width in modules.items():
        if name not in knobs.modules or width != knobs.modules[name].delta.numel():
            raise UserError(f"{path} was made for another model ({name}, width {width}): remove it")
    device = {n: knobs.modules[n].delta.device for n in modules}
    sides = [{n: tensors[f"{side}.{n}"].to(device[n]) for n in modules} for side in ("hack", "clean")]
    return PairGrads(*sides)


def grads_for(model: nn.Module, knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config) -> PairGrads:
    """The pairs' gradients at the knobs as they stand: from the cache when these exact ones are there."""
    path = cfg.cache / "vhack" / f"{cache_key(knobs, tokenizer, chosen, cfg)}.safetensors"
    hit = antipasto.whole(path)
    if not hit:
        save(side_gradients(model, knobs, tokenizer, chosen, cfg), path)
    logger.info("V: cache {} {}", "hit" if hit else "miss, extracted", path.name[:12])
    return load(path, knobs)


def main(argv: Sequence[str]) -> None:
    """Extract V for a preset and print what it looks like, module by module."""
    from tabulate import tabulate

    cfg = parse(argv)
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    teacher = rollout_log.read_pool(Path(cfg.pool.pool)) if cfg.pool.pool else None
    chosen = pairs.load(cfg.vhack, teacher, problems.tasks_for(cfg))
    whole = fit_basis(grads_for(model, knobs, tokenizer, chosen, cfg), cfg.vhack)
    used = sliced(whole, cfg.vhack)
    rows = [(m, len(used.V.get(m, ())), s[0].item(), (s[-1] / s[0]).item()) for m, s in whole.S.items()]
    print(tabulate(rows, headers=("module", "axes used", "S0", "S_last/S0"), floatfmt=".3g"))
    print(json.dumps(basis_summary(used), indent=1))


def basis_summary(basis: HackBasis) -> dict[str, Any]:
    """What meta.json keeps of a run's V."""
    return basis.meta | {"axes": sum(map(len, basis.V.values())), "modules": len(basis.V)}


def random_basis(basis: HackBasis, seed: int) -> HackBasis:
    """A random orthonormal V with the same modules and the same k in each.

    One generator serves all modules in turn: where a refresh changes the k of one, those behind it are drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    V = {}
    for m, v in basis.V.items():
        q, r = torch.linalg.qr(torch.randn(v.shape[1], v.shape[0], generator=generator, dtype=torch.float64))
        V[m] = (q * r.diagonal().sign()).T.to(v)  # without the signs QR's convention leans to one side: not uniform
    return HackBasis(V, basis.S, {})


def swapped(
    hack: Float[Tensor, "n d"], clean: Float[Tensor, "n d"], seed: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """The two sides with a random half of the rows exchanged."""
    n = len(hack)
    swap = torch.zeros(n, dtype=torch.bool)
    swap[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]] = True
    swap = swap.to(hack.device)[:, None]
    return torch.where(swap, clean, hack), torch.where(swap, hack, clean)


def shuffled(pair_grads: PairGrads, seed: int) -> PairGrads:
    """The pairs with the labels of a random half of them swapped. Rows of D change their signs, so that its singular
    vectors stay, and only the side to which a V points is lost; of a probe the direction is lost too.
    """
    sides = {m: swapped(h, pair_grads.clean[m], seed) for m, h in pair_grads.hack.items()}
    return PairGrads({m: s[0] for m, s in sides.items()}, {m: s[1] for m, s in sides.items()})


def matched(basis: HackBasis, like: HackBasis) -> HackBasis:
    """The first axes of ``basis`` in the modules of ``like``, as many in each as ``like`` has there."""
    V = {m: basis.V[m][: len(v)] for m, v in like.V.items()}
    return HackBasis(V, {m: basis.S[m][: len(v)] for m, v in V.items()}, basis.meta)


def basis_of(
    kind: str, real: HackBasis, own: PairGrads, other: PairGrads | None, cfg: VHackCfg, seed: int
) -> HackBasis:
    """The basis of that kind, matched to ``real``. own: the hack pairs' gradients; other: those of the control's own
    pair set (nonhack, placebo), None for the kinds that need none.
    """
    match kind:
        case "hack":
            return real
        case "random" | "orthogonal":  # which differ for a probe alone
            return random_basis(real, seed)
        case "shuffled":
            return matched(fit_basis(shuffled(own, seed), cfg), real)
        case _:
            assert other is not None, f"basis {kind} needs its own pair set"
            return matched(fit_basis(other, cfg), real)


if __name__ == "__main__":
    run_main(main)
