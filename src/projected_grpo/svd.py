"""Singular bases of a model's weights: computed in float32, kept on disk by content, resumed where they were left.

Weights of equal shape are factored in one batched call, on the GPU where they lie there. Each basis is written as soon
as its batch is done, so that an interrupted factorisation goes on from there.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

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
