"""``ARMS``: one row an arm; and the pure functions that split a gradient into what is kept and what is removed."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.config import Gate, VHackCfg, choose
from projected_grpo.extract_vhack_grad import HackBasis

Basis = Literal["hack", "random"]
Act = Literal["measure", "erase", "route"]


@dataclass(frozen=True)
class Arm:
    """basis: whose V. act: what is done with the hack-ward part. H: what the arm can falsify. oracle: it reads
    ``gt_correct`` and is an upper bound, never a method (no arm does today).
    """

    basis: Basis
    act: Act
    H: str
    source: str
    oracle: bool = False


ARMS: dict[str, Arm] = {
    "none": Arm("hack", "measure", "hacking emerges under plain GRPO", "Dr.GRPO 2503.20783"),
    "erase": Arm("hack", "erase", "less hack at matched solve than none AND than random_V", "this project"),
    "route": Arm("hack", "route", "the quarantine takes the hack with it", "after Gradient Routing 2410.04332"),
    "random_V": Arm("random", "erase", "no less hack than none", "control for erase"),
    "random_V_route": Arm("random", "route", "ablation alone does not lower hack", "control for route"),
}


def arm(name: str) -> Arm:
    """The arm of that name. Raises UserError naming the arms there are."""
    return ARMS[choose("arm", name, list(ARMS))]


@dataclass(frozen=True)
class Projection:
    """kept + removed = g, the batch gradient, per module (r,) (up to overshoot and preserve_magnitude); gn = ‖g‖.

    δS descends ``kept``; under route δS_hack descends ``removed`` (None in other arms, so it stays exactly zero).
    """

    kept: dict[str, Float[Tensor, " _r"]]
    removed: dict[str, Float[Tensor, " _r"]] | None
    gn: float
    stats: dict[str, float | None]


def split(
    g: Float[Tensor, " r"], V: Float[Tensor, "k r"], gate: Gate = "one_sided", overshoot: float = 1.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """g = kept + removed, removed ∈ span(V).

    c = V g ∈ ℝᵏ; c_i > 0 means that descending g moves hack-ward along axis i (V is oriented so).
    one_sided: removed = relu(c) V    no_gate: c V    reverse: 2 c V    each times overshoot.
    After one_sided, relu(V kept) = 0 by construction: that is an identity, not evidence.
    """
    c = V @ g
    used = {"one_sided": c.clamp(min=0), "no_gate": c, "reverse": 2 * c}[gate]
    removed = overshoot * used @ V
    return g - removed, removed


def hackward(g: dict[str, Tensor], V: dict[str, Tensor]) -> Float[Tensor, " axes"]:
    """relu(V g), the hack-ward coefficients of every axis of every module, concatenated."""
    return torch.cat([(v @ g[m]).clamp(min=0) for m, v in V.items()])


def share(g: dict[str, Tensor], V: dict[str, Tensor]) -> float | None:
    """cin = ‖relu(V g)‖ / ‖g‖ over all modules; relu before anything is aggregated. None where g is all zero."""
    norm = total_norm(g)
    return float(hackward(g, V).norm() / norm) if norm else None


def null_share(g: dict[str, Tensor], V: dict[str, Tensor]) -> float | None:
    """What ``share`` would be for a random V of the same k in each module: √(Σ_m ‖g_m‖² k_m / 2r_m) / ‖g‖."""
    norm = total_norm(g)
    parts = sum(float(g[m].square().sum()) * v.shape[0] / (2 * v.shape[1]) for m, v in V.items())
    return parts**0.5 / norm if norm else None


def total_norm(g: dict[str, Tensor]) -> float:
    """‖g‖ over all modules."""
    return float(torch.stack([x.square().sum() for x in g.values()]).sum().sqrt())


def random_basis(basis: HackBasis, seed: int) -> HackBasis:
    """A random orthonormal V with the same modules and the same k in each: the control for ``basis``."""
    generator = torch.Generator().manual_seed(seed)
    V = {}
    for m, v in basis.V.items():
        q, r = torch.linalg.qr(torch.randn(v.shape[1], v.shape[0], generator=generator, dtype=torch.float64))
        V[m] = (q * r.diagonal().sign()).T.to(v)  # without the signs QR's convention leans to one side: not uniform
    return HackBasis(V, basis.S, basis.meta)


def project(
    G: dict[str, Float[Tensor, "b r"]], V: HackBasis, is_student: Bool[Tensor, " b"], act: Act, cfg: VHackCfg
) -> Projection:
    """Split the batch gradient Σ_i G_i by the arm's act. Pure: it sees gradients and V, and no verdict of a grader.

    measure keeps everything and only looks. A module without axes is kept whole.
    """
    g = {m: rows.sum(0) for m, rows in G.items()}
    g_s = {m: rows[is_student].sum(0) for m, rows in G.items()}
    g_t = {m: rows[~is_student].sum(0) for m, rows in G.items()}
    kept, removed = dict(g), {m: torch.zeros_like(x) for m, x in g.items()}
    if act != "measure":
        for m, v in V.V.items():
            kept[m], removed[m] = split(g[m], v, cfg.gate, cfg.overshoot)
            if cfg.preserve_magnitude:
                kept[m] = kept[m] * (g[m].norm() / kept[m].norm().clamp(min=1e-30))
    c, gn = hackward(g, V.V), total_norm(g)
    stats = {
        "cin": share(g, V.V),
        "cin_s": share(g_s, V.V),
        "cin_t": share(g_t, V.V),
        "cin_null": null_share(g, V.V),
        "cout": share(kept, V.V),
        "fired": float((c > 0).double().mean()),
        "removed_frac": total_norm(removed) / gn if gn else None,
    }
    return Projection(kept, removed if act == "route" else None, gn, stats)
