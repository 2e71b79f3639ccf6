"""Singular bases of a model's weights: computed in float32, kept on disk by content, resumed where they were left.

Weights of equal shape are factored in one batched call, on the GPU where they lie there. Each basis is written as soon
as its batch is done, so that an interrupted factorisation goes on from there.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from projected_grpo.config import UserError

BATCH_FLOATS = 1 << 27
"""Floats of weights factored in one call (512 MB in float32)."""

SLOW_S = 5.0
"""An estimate is logged when what is left takes longer than this."""


def digest(tensor: Tensor) -> str:
    """sha256 over a tensor's bytes, dtype and shape."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()


def path_of(weight: Tensor, cache: Path) -> Path:
    """Where the basis of exactly these bytes is kept."""
    return cache / "svd" / f"{digest(weight)}.safetensors"


def load(path: Path) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """U and Vh as they were written."""
    both = load_file(path)
    return both["U"], both["Vh"]


def save(U: Float[Tensor, "o r"], Vh: Float[Tensor, "r i"], path: Path) -> None:
    """Write one basis, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({"U": U.contiguous().cpu(), "Vh": Vh.contiguous().cpu()}, part)
    part.replace(path)


def cost(shape: Sequence[int]) -> float:
    """What factoring one (o, i) weight costs, up to a constant: o · i · min(o, i)."""
    return float(shape[0] * shape[1] * min(shape))


def factor(weights: Sequence[Float[Tensor, "_o _i"]], cache: Path) -> list[Path]:
    """Make sure that every weight's basis is on disk, W = U Σ Vh in float32 or wider; the files, in order.

    Equal weights are factored once. Progress is a bar in units of ``cost``; after the first batch the time that is
    left is estimated and logged.
    """
    paths = [path_of(w, cache) for w in weights]
    missing = {p: w for p, w in zip(paths, weights, strict=True) if not p.exists()}
    by_shape: dict[tuple[int, ...], list[Path]] = {}
    for path, w in missing.items():
        by_shape.setdefault(tuple(w.shape), []).append(path)
    total = sum(cost(w.shape) for w in missing.values())
    start, told = time.perf_counter(), False
    with tqdm(total=100, desc="SVD", unit="%", leave=False, disable=not missing, bar_format="{l_bar}{bar}|") as bar:
        for shape, its in by_shape.items():
            size = max(1, BATCH_FLOATS // (shape[0] * shape[1]))
            for lot in (its[i : i + size] for i in range(0, len(its), size)):
                exact = torch.promote_types(missing[lot[0]].dtype, torch.float32)
                stack = torch.stack([missing[p].detach().to(exact) for p in lot])
                U, _, Vh = torch.linalg.svd(stack, full_matrices=False)
                for i, path in enumerate(lot):
                    save(U[i], Vh[i], path)
                bar.update(100 * len(lot) * cost(shape) / total)
                left = (time.perf_counter() - start) * (100 - bar.n) / max(bar.n, 1e-9)
                if not told and left > SLOW_S:
                    logger.info(
                        "SVD of {} weights: about {:.0f} s left; a restart goes on from here", len(missing), left
                    )
                    told = True
    return paths


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


class AntipastoLinear(nn.Module):
    """A frozen Linear with knobs ``delta`` (δS) and ``delta_hack`` (δS_hack), both float32 of shape (r,).

    ``acting``: the gains in use (r,), ``merged``: W' made with them; both None where W itself is in use. ``eps``, set
    by ``row_gradients`` around a backward, is the (b, r) zero leaf that receives each row's gradient.
    """

    def __init__(self, linear: nn.Linear, U: Float[Tensor, "o r"], Vh: Float[Tensor, "r i"], seed: int) -> None:
        super().__init__()
        self.linear, self.seed = linear.requires_grad_(False), seed
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
        """Form W' for the knobs in use. All of them zero means W itself."""
        self.acting = gain = self.gain(use)
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
    """All adapters of a model, by module name. The trainable state of a run is ``delta`` and ``delta_hack``."""

    modules: dict[str, AntipastoLinear]

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
        """The one ablation context: the model with these knobs only; afterwards with all of them again."""
        self.merge(use)
        try:
            yield
        finally:
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

    svd_rank: keep the top m singular axes only. Raises UserError when no Linear is left to wrap.
    """
    model.requires_grad_(False)
    modules: dict[str, AntipastoLinear] = {}
    linears = targets(model, layers)
    for (name, linear), path in zip(linears.items(), factor([m.weight for m in linears.values()], cache), strict=True):
        U, Vh = load(path)
        parent, _, leaf = name.rpartition(".")
        modules[name] = AntipastoLinear(linear, U[:, :svd_rank], Vh[:svd_rank], seed=len(modules))
        setattr(model.get_submodule(parent), leaf, modules[name])
    logger.debug("adapters on {} Linears, {} knobs", len(modules), sum(m.delta.numel() for m in modules.values()))
    return Knobs(modules)
