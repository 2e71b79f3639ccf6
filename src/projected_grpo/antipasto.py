"""Singular bases of a model's weights, checked, kept on disk by content, resumed where they were left; the adapter that
trains gains in them.

A weight is factored where it lies, and its basis is written as soon as it is made, so that an interrupted factorisation
goes on from there.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo.config import UserError

Basis = tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]
"""U and Vh of W = U Σ Vh, singular values descending."""

EXACT = 1e-5
"""Errors of a basis at most: see ``errors_of``."""

LARGE = 1024
"""Short side from which on a CPU, too, takes the route by the Gram matrix."""

SLOW_S = 5.0
"""An estimate is logged when what is left takes longer than this."""


def digest(tensor: Tensor) -> str:
    """sha256 over a tensor's bytes, dtype and shape."""
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------- singular vectors


def basis_of(W: Float[Tensor, "o i"], rank: int | None = None) -> Basis:
    """The singular vectors of W, the first ``rank`` of them alone where that is given, in float32 or wider.

    A small matrix on a CPU goes to LAPACK's SVD, whose bits the results in docs/results.md rest on. Elsewhere SVD is
    slow (cuSOLVER's Jacobi sweeps run matrix by matrix) or computes what is not kept: ``gram_basis``.
    """
    exact = torch.promote_types(W.dtype, torch.float32)
    if rank is None and not W.is_cuda and min(W.shape) < LARGE:
        U, _, Vh = torch.linalg.svd(W.to(exact), full_matrices=False)
        return U, Vh
    U, Vh = gram_basis(W, rank)
    return U.to(exact), Vh.to(exact)


def gram_basis(W: Float[Tensor, "o i"], rank: int | None = None) -> Basis:
    """By A Aᵀ = Q Λ Qᵀ, A being W or Wᵀ with its short side n first, and Aᵀ Q = P R, whose R is Σ but for signs:
    A = Q Σ Pᵀ. In float64: an axis is off by ε σ₁² / σ, which float32 cannot afford. Householder's P is orthonormal
    whatever σ is, 0 included.
    """
    wide = W.shape[0] <= W.shape[1]
    A = W.double() if wide else W.double().T
    Q = leading_eigenvectors(A @ A.T, min(rank or len(A), len(A)))
    P, R = torch.linalg.qr(A.T @ Q)
    P = P * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q, P.T) if wide else (P, Q.T)


ROUNDS, POWERS, CONVERGED = 40, 3, 1e-11


def leading_eigenvectors(G: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """Of a positive G, by descending eigenvalue.

    A few of many by iterating a block of twice as many (Rayleigh and Ritz): G Q costs n² a column and LAPACK's
    reduction n³, which it saves no part of for eigenvectors that nobody wants. All of them where the block would be
    most of G, or where ``ROUNDS`` leave ‖G q − λ q‖ over ``CONVERGED`` λ₁.
    """
    block = 2 * rank + 8
    if 3 * block < len(G):
        start = torch.randn(len(G), block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        Q = torch.linalg.qr(start.to(G.device))[0]
        for _ in range(ROUNDS):
            for _ in range(POWERS):
                Q = torch.linalg.qr(G @ Q)[0]
            values, turn = torch.linalg.eigh(Q.T @ G @ Q)
            Q, values = Q @ turn.flip(1), values.flip(0)
            off = (G @ Q[:, :rank] - Q[:, :rank] * values[:rank]).norm(dim=0).max()
            if off <= CONVERGED * values[0]:
                return Q[:, :rank]
    return torch.linalg.eigh(G)[1].flip(1)[:, :rank]


def errors_of(W: Float[Tensor, "o i"], U: Float[Tensor, "o r"], Vh: Float[Tensor, "r i"]) -> tuple[float, float]:
    """(orthogonality, reconstruction): the largest of |Uᵀ U − I| and |Vh Vhᵀ − I|, and the larger of ‖Uᵀ W − Σ Vh‖ and
    ‖W Vhᵀ − U Σ‖ over ‖W‖, Σ = diag(Uᵀ W Vhᵀ). At full rank the latter is ‖W − U Σ Vh‖; at a lower one it is 0 for
    singular vectors and for nothing else.
    """
    W, one = W.to(U), torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    left, right = U.T @ W, W @ Vh.T
    sigma = (left * Vh).sum(1)
    orthogonality = torch.maximum((U.T @ U - one).abs().max(), (Vh @ Vh.T - one).abs().max())
    off = torch.maximum((left - sigma[:, None] * Vh).norm(), (right - U * sigma).norm())
    return float(orthogonality), float(off / W.norm().clamp(min=torch.finfo(U.dtype).tiny))


# ------------------------------------------------------------------------------------------------------ bases on disk


def path_of(weight: Tensor, cache: Path, rank: int | None = None) -> Path:
    """Where the basis of exactly these bytes is kept."""
    return cache / "svd" / f"{digest(weight)}{'' if rank is None else f'-{rank}'}.safetensors"


def whole(path: Path) -> bool:
    """Whether a cached file is there, with as many bytes as its header says; nothing else of it is read."""
    try:
        with safe_open(path, "pt"):
            return True
    except FileNotFoundError:
        return False
    except SafetensorError as error:
        logger.warning("{} is cut short or damaged ({}), and made anew", path, error)
        return False


def load(path: Path) -> Basis:
    """U and Vh as they were written."""
    both = load_file(path)
    return both["U"], both["Vh"]


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors into a cache, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, part)
    part.replace(path)


def cost(shape: Sequence[int]) -> float:
    """What factoring one (o, i) weight costs, up to a constant: o · i · min(o, i)."""
    return float(shape[0] * shape[1] * min(shape))


def factor(weights: Mapping[str, Float[Tensor, "_o _i"]], cache: Path, rank: int | None = None) -> dict[str, Path]:
    """Make sure that every weight's basis is on disk; the files, by the weights' names.

    A basis is computed in float32 or wider, checked there, and written in its weight's dtype, which is what the adapter
    holds it in. Equal weights are factored once. Progress is a bar in units of ``cost``; after the first the time that
    is left is estimated and logged. A damaged file is made anew. Raises UserError naming the weight whose basis is
    none.
    """
    paths = {name: path_of(w, cache, rank) for name, w in weights.items()}
    missing = {path: name for name, path in paths.items() if not whole(path)}
    total = sum(cost(weights[name].shape) for name in missing.values())
    start, told = time.perf_counter(), False
    with tqdm(total=100, desc="SVD", unit="%", leave=False, disable=not missing, bar_format="{l_bar}{bar}|") as bar:
        for path, name in missing.items():
            W = weights[name].detach()
            U, Vh = basis_of(W, rank)
            errors = errors_of(W, U, Vh)
            if not max(errors) <= EXACT:  # nor NaN
                raise UserError(
                    f"the SVD of {name} failed: orthogonal to {errors[0]:.0e}, W to {errors[1]:.0e}, not {EXACT:.0e}; "
                    "look at that weight, or leave its layer out with --layers"
                )
            save({"U": U.to(W.dtype), "Vh": Vh.to(W.dtype)}, path)
            bar.update(100 * cost(W.shape) / total)
            left = (time.perf_counter() - start) * (100 - bar.n) / max(bar.n, 1e-9)
            if not told and left > SLOW_S:
                logger.info("SVD of {} weights: about {:.0f} s left; a restart goes on from here", len(missing), left)
                told = True
    return paths


# --------------------------------------------------------------------------------------------------------- the adapter


ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
GATED_DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
TARGETS = frozenset(ATTENTION_AND_MLP + GATED_DELTA_NET)
Use = Literal["base", "deployed", "trained"] | float
"""Which knobs act: none, δS alone (the quarantine ablated), both, or δS + that factor times δS_hack."""


class _SingularGain(torch.autograd.Function):
    """y = x W'ᵀ with the closed-form gradient of each batch row in the gains.

    For gains δ = δS + δS_hack + ε_i:  ∂L/∂ε_i = Σ_t (Uᵀ dy_it) ⊙ (Vh x_it),   dx = dy W'.
    ε is a zero leaf beside the knobs: it gives row i's own gradient in δS space without a second backward
    (scaling δS by a row weight would not: that gradient vanishes at δS = 0). The forward does not read it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, U: Tensor, Vh: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, U, Vh)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        x, weight, U, Vh = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[4]:
            return dx, None, None, None, None
        exact = torch.promote_types(dy.dtype, torch.float32)
        return dx, None, None, None, ((dy @ U).to(exact) * F.linear(x, Vh).to(exact)).sum(-2)


def round_stochastic(w: Float[Tensor, "o i"], dtype: torch.dtype, seed: int) -> Float[Tensor, "o i"]:
    """Cast float32 to bfloat16 by a fixed random dither, exact where the value is representable.

    Rounding to nearest would swallow every gain below half a unit in the last place, that is nearly all of early
    training. With a dither that does not change from step to step, W' follows the knobs without bias, and W' = W
    to the bit at zero knobs. Other dtypes are cast plainly.
    """
    if dtype is not torch.bfloat16:
        return w.to(dtype)
    generator = torch.Generator(device=w.device).manual_seed(seed)
    dither = torch.randint(0, 1 << 16, w.shape, generator=generator, device=w.device, dtype=torch.int32)
    bits = w.contiguous().view(torch.int32) + dither
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two gains (r,) are the same; None is none at all."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


class AntipastoLinear(nn.Module):
    """A frozen Linear with knobs ``delta`` (δS) and ``delta_hack`` (δS_hack), both float32 of shape (r,). ``content``:
    the ``digest`` of W, taken once.

    ``acting``: the gains in use (r,), ``merged``: W' made with them; both None where W itself is in use. ``eps``, set
    by ``row_gradients`` around a backward, is the (b, r) zero leaf that receives each row's gradient.
    """

    def __init__(
        self, linear: nn.Linear, U: Float[Tensor, "o r"], Vh: Float[Tensor, "r i"], seed: int, content: str = ""
    ) -> None:
        super().__init__()
        self.linear, self.seed, self.content = linear.requires_grad_(False), seed, content
        exact = torch.promote_types(linear.weight.dtype, torch.float32)
        self.register_buffer("U", U.to(linear.weight), persistent=False)
        self.register_buffer("Vh", Vh.to(linear.weight), persistent=False)
        r = U.shape[1]
        self.delta = nn.Parameter(torch.zeros(r, dtype=exact, device=linear.weight.device), requires_grad=False)
        self.delta_hack = nn.Parameter(torch.zeros_like(self.delta), requires_grad=False)
        self.acting: Tensor | None = None
        self.merged: Tensor | None = None
        self.eps: Tensor | None = None

    @torch.no_grad()
    def gain(self, use: Use) -> Float[Tensor, " r"] | None:
        """What the knobs in use add to the singular values; None where that is nothing."""
        scale = {"base": None, "deployed": 0.0, "trained": 1.0}[use] if isinstance(use, str) else use
        gain = None if scale is None else self.delta + scale * self.delta_hack
        return gain if gain is not None and gain.any() else None

    @torch.no_grad()
    def merge(self, use: Use) -> None:
        """Form W' for the knobs in use, where it was not made with the same gains. All of them zero means W itself."""
        gain = self.gain(use)
        if alike(gain, self.acting):
            return
        self.acting = gain
        if gain is None:
            self.merged = None
            return
        W, exact = self.linear.weight, gain.dtype
        self.merged = round_stochastic(W.to(exact) + (self.U.to(exact) * gain) @ self.Vh.to(exact), W.dtype, self.seed)

    @property
    def in_use(self) -> Float[Tensor, "o i"]:
        """The weight that the forward uses: W' where one is formed, else W."""
        return self.linear.weight if self.merged is None else self.merged

    def forward(self, x: Float[Tensor, "b s i"]) -> Float[Tensor, "b s o"]:
        if self.eps is None:
            return F.linear(x, self.in_use, self.linear.bias)
        y = _SingularGain.apply(x, self.in_use, self.U, self.Vh, self.eps)
        return y if self.linear.bias is None else y + self.linear.bias


@dataclass(frozen=True)
class Knobs:
    """All adapters of a model, by module name. The trainable state of a run is ``delta`` and ``delta_hack``. rest: the
    digests of what has no adapter, taken once.
    """

    modules: dict[str, AntipastoLinear]
    rest: tuple[str, ...] = ()

    @property
    def delta(self) -> dict[str, nn.Parameter]:
        """δS by module, each (r,)."""
        return {name: m.delta for name, m in self.modules.items()}

    @property
    def delta_hack(self) -> dict[str, nn.Parameter]:
        """δS_hack by module, each (r,)."""
        return {name: m.delta_hack for name, m in self.modules.items()}

    @property
    def device(self) -> torch.device:
        """Where they are, which is where the model is."""
        return next(iter(self.modules.values())).delta.device

    def merge(self, use: Use = "trained") -> None:
        """Form every W'. Call after the knobs have moved."""
        for module in self.modules.values():
            module.merge(use)

    @contextmanager
    def using(self, use: Use) -> Iterator[None]:
        """The one ablation context: the model with these knobs only; afterwards with all of them again.

        For the base nothing has to be formed, and W' is kept: inside, the knobs must not move.
        """
        held = [(m, m.acting, m.merged) for m in self.modules.values()] if use == "base" else []
        self.merge(use)
        try:
            yield
        finally:
            for m, acting, merged in held:
                m.acting, m.merged = acting, merged
            self.merge("trained")

    @contextmanager
    def row_gradients(self, b: int) -> Iterator[dict[str, Float[Tensor, "b r"]]]:
        """Inside, a backward through b rows leaves each row's δS gradient in ``.grad`` of the leaves yielded."""
        leaves = {}
        for name, m in self.modules.items():
            m.eps = torch.zeros(b, m.delta.numel(), dtype=m.delta.dtype, device=m.delta.device, requires_grad=True)
            leaves[name] = m.eps
        try:
            yield leaves
        finally:
            for m in self.modules.values():
                m.eps = None

    def state(self) -> dict[str, Tensor]:
        """A copy of both knobs of every module, for a checkpoint."""
        return {
            f"{n}.{k}": getattr(m, k).detach().clone() for n, m in self.modules.items() for k in ("delta", "delta_hack")
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's knobs back. Raises KeyError when a module is missing."""
        for name, m in self.modules.items():
            m.delta.copy_(state[f"{name}.delta"])
            m.delta_hack.copy_(state[f"{name}.delta_hack"])
        self.merge()


def targets(model: nn.Module, layers: Sequence[float] = (0.0, 1.0)) -> dict[str, nn.Linear]:
    """Every Linear by name that is to get an adapter: named in ``TARGETS``, within the depth window [lo, hi).

    Its depth is its layer's index over the number of layers. Raises UserError when none is left.
    """
    depth = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.Linear] = {}
    for name, linear in model.named_modules():
        at = re.search(r"\blayers\.(\d+)\.", name)
        if name.rpartition(".")[2] not in TARGETS or not isinstance(linear, nn.Linear) or at is None:
            continue
        if layers[0] <= int(at[1]) / depth < layers[1]:
            found[name] = linear
    if not found:
        raise UserError(f"no Linear to adapt in layers {layers[0]}-{layers[1]} of {depth}: widen --layers")
    return found


def wrap(model: nn.Module, cache: Path, layers: Sequence[float] = (0.0, 1.0), svd_rank: int | None = None) -> Knobs:
    """Freeze the model and put an adapter on every one of its ``targets``.

    svd_rank: compute and keep the top m singular axes only. Raises UserError when no Linear is left to wrap.
    """
    model.requires_grad_(False)
    modules: dict[str, AntipastoLinear] = {}
    linears = targets(model, layers)
    adapted = {id(linear.weight) for linear in linears.values()}
    rest = tuple(digest(p) for p in model.parameters() if id(p) not in adapted)
    for name, path in factor({n: m.weight for n, m in linears.items()}, cache, svd_rank).items():
        U, Vh = load(path)
        parent, _, leaf = name.rpartition(".")
        modules[name] = AntipastoLinear(linears[name], U, Vh, seed=len(modules), content=path.stem)
        setattr(model.get_submodule(parent), leaf, modules[name])
    logger.debug("adapters on {} Linears, {} knobs", len(modules), sum(m.delta.numel() for m in modules.values()))
    return Knobs(modules, rest)
