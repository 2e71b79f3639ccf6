"""The pure functions that split a gradient into what is kept and what is removed, as an arm (``ARMS``) says."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arms import Act, Arm
from projected_grpo.config import Gate, VHackCfg
from projected_grpo.data_types import Factors, Projection
from projected_grpo.extract_vhack_grad import HackBasis


def split(
    g: Float[Tensor, " r"], V: Float[Tensor, "k r"], gate: Gate = "one_sided", overshoot: float = 1.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """g = kept + removed, removed ∈ span(V).

    c = V g ∈ ℝᵏ; c_i > 0 means that descending g moves hack-ward along axis i (V is oriented so).
    one_sided: removed = relu(c) V    no_gate: c V    reverse: 2 c V    unsigned: (c + |c|/2) V    each times overshoot.
    After one_sided, relu(V kept) = 0 by construction: that is an identity, not evidence.
    """
    c = V @ g
    used = {"one_sided": c.clamp(min=0), "no_gate": c, "reverse": 2 * c, "unsigned": c + c.abs() / 2}[gate]
    removed = overshoot * used @ V
    return g - removed, removed


def split_all(
    g: dict[str, Tensor], V: dict[str, Tensor], cfg: VHackCfg
) -> tuple[dict[str, Float[Tensor, " _r"]], dict[str, Float[Tensor, " _r"]]]:
    """``split`` in every module; a module without axes is kept whole."""
    kept, removed = dict(g), {m: torch.zeros_like(x) for m, x in g.items()}
    for m, v in V.items():
        kept[m], removed[m] = split(g[m], v, cfg.gate, cfg.overshoot)
        if cfg.preserve_magnitude:
            kept[m] = kept[m] * (g[m].norm() / kept[m].norm().clamp(min=1e-30))
    return kept, removed


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


def acted(
    g: dict[str, Tensor], V: dict[str, Tensor], real: dict[str, Tensor], act: Act, cfg: VHackCfg
) -> tuple[dict[str, Float[Tensor, " _r"]], dict[str, Float[Tensor, " _r"]]]:
    """(kept, removed) of a gradient or an update, by the arm's act. real: the hack V, whatever V the arm uses."""
    nothing = {m: torch.zeros_like(x) for m, x in g.items()}
    match act:
        case "measure":
            return dict(g), nothing
        case "erase" | "route":
            return split_all(g, V, cfg)
        case "erase_mass":
            _, removed = split_all(g, V, cfg)
            scale = total_norm(split_all(g, real, cfg)[1]) / max(total_norm(removed), 1e-30)
            return {m: x - scale * removed[m] for m, x in g.items()}, {m: scale * x for m, x in removed.items()}
        case "shrink":
            scale = total_norm(split_all(g, real, cfg)[0]) / max(total_norm(g), 1e-30)
            return {m: scale * x for m, x in g.items()}, {m: (1 - scale) * x for m, x in g.items()}


def sums(
    G: dict[str, Float[Tensor, "b r"]], f: Factors, is_student: Bool[Tensor, " b"],
    policy: dict[str, Float[Tensor, "b r"]] | None = None,
) -> dict[str, dict[str, Float[Tensor, " _r"]]]:  # fmt: skip
    """All that a projection reads of the rows, by name and module: whole = Σ_i f.whole_i G_i and its student and
    teacher parts, keep = Σ_i f.keep_i G_i. Linear in the rows: processes that hold different rows add theirs up.

    policy: the rows' gradients without the KL term, where there is one. A factor is an advantage, or says whether a
    rollout is learned from: it multiplies these, and the KL term G − policy is added as it is.
    """
    student = is_student.to(f.whole)
    weights = {
        "whole": (f.whole, torch.ones_like(student)),
        "keep": (f.keep, torch.ones_like(student)),
        "student": (f.whole * student, student),
        "teacher": (f.whole * (1 - student), 1 - student),
    }
    if policy is None:
        return {name: {m: w.to(rows) @ rows for m, rows in G.items()} for name, (w, _) in weights.items()}
    return {
        name: {m: w.to(g) @ policy[m] + own.to(g) @ (g - policy[m]) for m, g in G.items()}
        for name, (w, own) in weights.items()
    }


def decided(s: dict[str, dict[str, Tensor]], V: HackBasis, real: HackBasis, arm: Arm, cfg: VHackCfg) -> Projection:
    """δS descends the arm's act on the sum ``keep``; δS_hack descends, under route, what the act removed. Pure: it sees
    gradients, factors and V, and no verdict of a grader.

    The shares cin are of the sum ``whole``; cout is of what δS descends. With cfg.project = update the act is left to
    the optimizer's update (train.apply_step).
    """
    whole, g, g_s, g_t = (s[name] for name in ("whole", "keep", "student", "teacher"))
    kept, removed = acted(g, V.V, real.V, "measure" if cfg.project == "update" else arm.act, cfg)
    gn, inward = total_norm(whole), hackward(whole, V.V)
    stats = {
        "cin": share(whole, V.V),
        "cin_s": share(g_s, V.V),
        "cin_t": share(g_t, V.V),
        "cin_null": null_share(whole, V.V),
        "cout": share(kept, V.V),
        "fired": float((inward > 0).double().mean()),
        "removed_frac": total_norm(removed) / total_norm(g) if total_norm(g) else None,
    }
    return Projection(kept, removed if arm.quarantines else None, gn, total_norm(g), stats)
