"""Whose V: the hack direction, and the bases that stand in its place in a control. Pure functions of gradients.

Every control has the module list of the real V and the same number of axes in each module (``matched``).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.config import VHackCfg
from projected_grpo.extract_vhack_grad import HackBasis, PairGrads, fit_basis


def random_basis(basis: HackBasis, seed: int) -> HackBasis:
    """A random orthonormal V with the same modules and the same k in each."""
    generator = torch.Generator().manual_seed(seed)
    V = {}
    for m, v in basis.V.items():
        q, r = torch.linalg.qr(torch.randn(v.shape[1], v.shape[0], generator=generator, dtype=torch.float64))
        V[m] = (q * r.diagonal().sign()).T.to(v)  # without the signs QR's convention leans to one side: not uniform
    return HackBasis(V, basis.S, basis.meta)


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
    """The pairs with the labels of a random half of them swapped: hack against clean no longer means anything."""
    sides = {m: swapped(h, pair_grads.clean[m], seed) for m, h in pair_grads.hack.items()}
    return PairGrads({m: s[0] for m, s in sides.items()}, {m: s[1] for m, s in sides.items()})


def clean_span(pair_grads: PairGrads) -> PairGrads:
    """Pairs whose difference is the clean side's own gradient: its basis spans what honest completions move."""
    return PairGrads(pair_grads.clean, {m: torch.zeros_like(c) for m, c in pair_grads.clean.items()})


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
        case "random":
            return random_basis(real, seed)
        case "shuffled":
            return matched(fit_basis(shuffled(own, seed), cfg), real)
        case "clean":
            return matched(fit_basis(clean_span(own), cfg), real)
        case _:
            assert other is not None, f"basis {kind} needs its own pair set"
            return matched(fit_basis(other, cfg), real)
