"""The hack direction: pairs -> ``HackBasis``, cached by the content it was made from.

    python -m projected_grpo.extract_vhack_grad <preset> [--overrides]

For a pair's two completions of one prompt, the gradient of the negative log-likelihood in δS; D stacks hack minus
clean, (n_pairs, r) a module, so that what belongs to the prompt cancels. For one update with advantages +1 (hack)
and −1 (clean) the loss gradient is exactly a row of D. V is D's first k right singular vectors, each oriented by
the majority of the pairs, so that a positive coefficient V g means: descending g makes the hack more likely.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from safetensors.torch import safe_open, save_file
from tabulate import tabulate
from torch import Tensor, nn

from projected_grpo import antipasto, loss, models, pairs, pool, problems
from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config, UserError, VHackCfg, parse
from projected_grpo.data_types import Pair

DIRECTION = "v1"  # enters the cache key: change it when extraction computes something else


@dataclass(frozen=True)
class HackBasis:
    """V: per module (k, r), orthonormal rows oriented hack-ward; S: per module (k,) singular values of D.

    ``meta``: what it was made from and how good it is (floats and strings only). Modules may be missing: an axis
    under the noise floor is dropped, and a module without axes is left alone by every projection.
    """

    V: dict[str, Float[Tensor, "_k _r"]]
    S: dict[str, Float[Tensor, " _k"]]
    meta: dict[str, Any]


def side_gradients(
    model: nn.Module, knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config
) -> tuple[dict[str, Float[Tensor, "n r"]], dict[str, Float[Tensor, "n r"]]]:
    """Per-pair NLL gradients in δS of the hack sides and of the clean sides, with the knobs as they stand.

    NLL is summed over the completion and divided by Dr.GRPO's max_new (length_norm live) or by its own length (mean).
    Raises UserError naming the first pair whose NLL is not finite.
    """
    prompts = [problems.encode_prompt(tokenizer, p.task) for p in chosen] * 2
    sides = [p.hack for p in chosen] + [p.clean for p in chosen]
    written = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in sides]
    ids, mask = loss.collate(prompts, written, tokenizer.pad_token_id, model.device)
    length = mask.sum(1) if cfg.vhack.length_norm == "mean" else torch.full((len(ids),), cfg.rl.max_new)
    weight = 1.0 / length.to(model.device, torch.float32)
    try:
        rows = loss.row_gradients(model, knobs, ids, mask, weight, micro_batch=cfg.rl.micro_batch)
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
    return {m: g[:n] for m, g in rows.G.items()}, {m: g[n:] for m, g in rows.G.items()}


def fit(
    D: Float[Tensor, "n r"], k: int, tau_axis: float
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """V, S and vote margins of one module's differences D.

    Each right singular vector is oriented by the majority of sign(D V_iᵀ) over pairs, which an outlying pair cannot
    flip; margin = |votes for − votes against| / n. A near-tie makes a one-sided gate arbitrary on that axis. Axes
    with S_i / S_0 < tau_axis are set to zero.
    """
    _, S, Vh = torch.linalg.svd(D, full_matrices=False)
    V, S = Vh[:k], S[:k]
    votes = torch.sign(D @ V.T).sum(0)
    V = V * torch.where(votes < 0, -1.0, 1.0).to(V)[:, None]
    alive = tau_axis * S[0] <= S
    return V * alive[:, None], S * alive, votes.abs() / len(D)


def heldout_accuracy(V: dict[str, Tensor], hack: dict[str, Tensor], clean: dict[str, Tensor]) -> float:
    """Share of pairs whose hack side projects further onto V than the clean side, summed over modules and axes."""
    score = sum(((hack[m] - clean[m]) @ v.T).sum(1) for m, v in V.items())
    return float((score > 0).double().mean())


def extract(model: nn.Module, knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config) -> HackBasis:
    """Fit V on all but the last n_heldout pairs and judge it on those. The quarantine is ablated throughout:
    extracting through a live one turns V off the hack. Raises UserError when too few pairs are left to fit k axes.
    """
    n_fit = len(chosen) - cfg.vhack.n_heldout
    if n_fit < cfg.vhack.k:
        raise UserError(f"{n_fit} pairs are left to fit k = {cfg.vhack.k} axes: lower --k or --n-heldout, or add pairs")
    with knobs.using("deployed"):
        hack, clean = side_gradients(model, knobs, tokenizer, chosen, cfg)
    fits = {m: fit(hack[m][:n_fit] - clean[m][:n_fit], cfg.vhack.k, cfg.vhack.tau_axis) for m in hack}
    V = {m: f[0] for m, f in fits.items()}
    tail = slice(n_fit, None)
    accuracy = heldout_accuracy(V, {m: h[tail] for m, h in hack.items()}, {m: c[tail] for m, c in clean.items()})
    margin = torch.cat([f[2] for f in fits.values()])
    meta = {
        "n_pairs": n_fit,
        "n_heldout": cfg.vhack.n_heldout,
        "heldout_accuracy": accuracy if cfg.vhack.n_heldout else None,
        "vote_margin_mean": float(margin.mean()),
        "vote_margin_min": float(margin.min()),
    }
    return HackBasis(V, {m: f[1] for m, f in fits.items()}, meta)


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


def basis_overlap(new: HackBasis, old: HackBasis) -> float:
    """mean |⟨V_new_i, V_old_i⟩| over the modules and axes that both have; 1 means nothing turned."""
    cosines = [(new.V[m][:k] * old.V[m][:k]).sum(1).abs() for m in new.V if m in old.V for k in [_common(new, old, m)]]
    return float(torch.cat(cosines).mean()) if cosines else 0.0


def _common(new: HackBasis, old: HackBasis, module: str) -> int:
    return min(len(new.V[module]), len(old.V[module]))


def cache_key(knobs: Knobs, chosen: Sequence[Pair], cfg: Config) -> str:
    """sha256 over the adapted weights, the knobs, the pairs and every setting that extraction reads."""
    weights = [f"{n}:{antipasto.digest(m.linear.weight)}:{antipasto.digest(m.delta)}" for n, m in knobs.modules.items()]
    v = cfg.vhack
    settings = [DIRECTION, v.k, v.tau_axis, v.n_heldout, v.length_norm, cfg.rl.max_new, cfg.model.svd_rank]
    return hashlib.sha256(json.dumps([weights, pairs.digest(chosen), settings]).encode()).hexdigest()


def save(basis: HackBasis, path: Path) -> None:
    """Write a basis as safetensors with its meta, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    tensors = {f"V.{m}": v for m, v in basis.V.items()} | {f"S.{m}": s for m, s in basis.S.items()}
    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, part, metadata={"meta": json.dumps(basis.meta)})
    part.replace(path)


def load(path: Path, knobs: Knobs) -> HackBasis:
    """Read a basis. Raises UserError when it was made for a model with other modules or widths."""
    with safe_open(path, "pt") as f:
        tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a mapping
        meta = json.loads(f.metadata()["meta"])
    V = {n[2:]: t for n, t in tensors.items() if n.startswith("V.")}
    for name, v in V.items():
        if name not in knobs.modules or v.shape[1] != knobs.modules[name].delta.numel():
            raise UserError(f"{path} holds a V made for another model ({name}, width {v.shape[1]}): extract it again")
    device = {n: m.delta.device for n, m in knobs.modules.items()}
    S = {m: tensors[f"S.{m}"].to(device[m]) for m in V}
    return HackBasis({m: v.to(device[m]) for m, v in V.items()}, S, meta)


def basis_for(model: nn.Module, knobs: Knobs, tokenizer: Any, chosen: Sequence[Pair], cfg: Config) -> HackBasis:
    """The basis for these pairs at the knobs as they stand: from the cache when this exact one is there."""
    path = cfg.cache / "vhack" / f"{cache_key(knobs, chosen, cfg)}.safetensors"
    hit = path.exists()
    if not hit:
        save(extract(model, knobs, tokenizer, chosen, cfg), path)
    basis = load(path, knobs)
    logger.info("V: cache {} {}", "hit" if hit else "miss, extracted", path.name[:12])
    logger.info("V: {n_pairs} pairs; of {n_heldout} held out {heldout_accuracy:.0%} point hack-ward", **basis.meta)
    return basis


def main(argv: Sequence[str]) -> None:
    """Extract V for a preset and print what it looks like, module by module."""
    cfg = parse(argv)
    model, tokenizer = models.load(cfg.model)
    knobs = antipasto.wrap(model, cfg.cache, cfg.model.layers, cfg.model.svd_rank)
    teacher = pool.read(Path(cfg.pool.pool)) if cfg.pool.pool else None
    chosen = pairs.load(cfg.vhack, teacher, pool.tasks_for(cfg))
    whole = basis_for(model, knobs, tokenizer, chosen, cfg)
    used = sliced(whole, cfg.vhack)
    rows = [(m, len(used.V.get(m, ())), s[0].item(), (s[-1] / s[0]).item()) for m, s in whole.S.items()]
    print(tabulate(rows, headers=("module", "axes used", "S0", "S_last/S0"), floatfmt=".3g"))
    print(json.dumps(basis_summary(used, cfg), indent=1))


def basis_summary(basis: HackBasis, cfg: Config) -> dict[str, Any]:
    """What meta.json keeps of a run's V."""
    return basis.meta | {
        "axes": sum(map(len, basis.V.values())),
        "modules": len(basis.V),
        "settings": asdict(cfg.vhack),
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
