"""What the steps of ``gpu_check`` share: a line of its report (``Row``), the shapes, the models, the clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from projected_grpo import antipasto
from projected_grpo.antipasto import Knobs
from projected_grpo.config import PRESETS, Config


@dataclass(frozen=True)
class Row:
    """One line. ``beside``: the figure to compare it with, ``source``: where that is from (plan, roofline, at most, at
    least). ok: whether it is as it has to be; None where nothing has to be.
    """

    what: str
    value: float | None = None
    unit: str = ""
    beside: float | None = None
    source: str = ""
    ok: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over the figure beside it."""
        return self.value / self.beside if self.beside and self.value is not None else None


def at_most(what: str, value: float, most: float, unit: str = "") -> Row:
    """A line that fails over a limit, and where it is no number."""
    return Row(what, value, unit, most, "at most", value <= most)


def holds(what: str, truth: bool) -> Row:
    """A line that has no number."""
    return Row(what, ok=bool(truth))


@dataclass(frozen=True)
class Size:
    """The shapes: the whole model's, and how much of each thing is taken. prompt: tokens of a prompt; sampled: those of
    the full-shaped step; turns: between which a token's time is taken; lots: tokens that go through the model at once;
    n_gemm, n_copied: one side of a matrix, bytes; patience: what budgets are multiplied by.
    """

    shape: Mapping[str, Any]
    cfg: Config
    prompt: int
    rows: int
    contexts: tuple[int, ...]
    turns: tuple[int, int]
    length: int
    lots: tuple[int, ...]
    sampled: int
    n_gemm: int
    n_copied: int
    cached: tuple[int, ...]
    patience: float = 1.0


def on_device(cfg: Config, **rl: Any) -> Config:
    """A preset whose model needs no device to be planned."""
    return replace(cfg, model=replace(cfg.model, device="auto"), rl=replace(cfg.rl, **rl))


FULL = PRESETS["full"][1]
REAL = Size(
    shape=dict(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
    cfg=on_device(FULL), prompt=481, rows=64, contexts=(512, 1500, 3000), turns=(16, 48), length=2017,
    lots=(2048, 8192), sampled=128, n_gemm=8192, n_copied=1 << 30, cached=(64, 128, 256),
)  # fmt: skip
TINY = Size(
    shape=dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    ),
    cfg=replace(
        on_device(FULL, max_new=24, prompts_per_step=2, group=4), data=replace(FULL.data, max_prompt=24)
    ),
    prompt=16, rows=8, contexts=(16, 48), turns=(2, 6), length=40, lots=(64, 256), sampled=16, n_gemm=256,
    n_copied=1 << 24, cached=(4, 8), patience=10,
)  # fmt: skip
LAYERS = 2
"""Of the models that are compared in two dtypes, or with transformers' own ``generate``."""
END = -1
"""An end of turn that no token is: every row writes all its tokens."""


@dataclass
class Check:
    """What the steps hand on: the device's rates (bf16 FLOP/s, float32 FLOP/s, bytes/s), the large model, and what was
    timed, from which ``full_step`` extrapolates.
    """

    device: torch.device
    size: Size
    folder: Path
    flops: float = float("nan")
    flops32: float = float("nan")
    bandwidth: float = float("nan")
    large: tuple[nn.Module, Knobs] | None = None
    took: dict[str, float] = field(default_factory=dict)
    turn_s: dict[int, float] = field(default_factory=dict)

    @property
    def model(self) -> tuple[nn.Module, Knobs]:
        """The large model. Raises RuntimeError where its step did not make one."""
        if self.large is None:
            raise RuntimeError("there is no model: its step failed")
        return self.large

    @cached_property
    def prompts(self) -> list[list[int]]:
        """As many prompts as a step has, of one length."""
        made = torch.randint(
            5, self.size.shape["vocab_size"], (self.size.cfg.rl.prompts_per_step, self.size.prompt),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return made.tolist()

    def dice(self, seed: int = 0) -> torch.Generator:
        """A generator where the model is."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def synchronized(self) -> float:
        """The time, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable[[], Any], repeats: int = 3, warm: bool = True) -> float:
        """Median seconds of a call, after one to warm up."""
        if warm:
            call()
        taken = []
        for _ in range(repeats):
            began = self.synchronized()
            call()
            taken.append(self.synchronized() - began)
        return statistics.median(taken)

    def peak(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        """(seconds, bytes at most over what was there before) of one call; the bytes are told on a GPU alone."""
        if self.device.type != "cuda":
            return self.seconds(call, 1, warm=False), None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = self.seconds(call, 1, warm=False)
        return taken, torch.cuda.max_memory_allocated() - before


def config_of(size: Size, layers: int | None = None) -> Qwen3Config:
    """Of the size's model. A random Linear keeps its input's size whatever the width: with 0.02, which does that at
    2560, the layers of a narrow model would add nothing, and its tied head would say its last token again.
    """
    shape = dict(size.shape) | ({"num_hidden_layers": layers} if layers else {})
    return Qwen3Config(
        **shape,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=shape["hidden_size"] ** -0.5,
    )


def bare(check: Check, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A random Qwen3 of the size's shapes, on the device."""
    torch.manual_seed(0)
    with torch.device(check.device):
        model = AutoModelForCausalLM.from_config(config_of(check.size, layers), dtype=dtype)
    # logits of standard deviation 3: near 0 every token is as likely as any other, and nothing would show
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(3)
    return model.eval().requires_grad_(False)


def adapted(model: nn.Module) -> Knobs:
    """Adapters with random orthonormal U and Vh: neither time nor memory depends on their values, and the gradient of a
    gain in any basis is autograd's.
    """
    drawn: dict[tuple[int, int], Tensor] = {}

    def orthonormal(n: int, r: int, like: Tensor) -> Tensor:
        if (n, r) not in drawn:
            drawn[n, r] = torch.linalg.qr(torch.randn(n, r, device=like.device))[0]
        return drawn[n, r].to(like.dtype, copy=True)

    torch.manual_seed(1)
    modules = {}
    for name, linear in antipasto.targets(model).items():
        (o, i), W = linear.weight.shape, linear.weight
        r = min(o, i)
        U, Vh = orthonormal(o, r, W), orthonormal(i, r, W).T.contiguous()
        modules[name] = antipasto.AntipastoLinear(linear, U, Vh, seed=len(modules))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, modules[name])
    return Knobs(modules)


@torch.no_grad()
def moved(knobs: Knobs, scale: float = 1e-3) -> None:
    """Gains that are not zero, so that W' is formed."""
    torch.manual_seed(2)
    for d in knobs.delta.values():
        d.normal_(0, scale)
    knobs.merge()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def flat(G: Mapping[str, Tensor]) -> Tensor:
    """All modules' numbers in a row."""
    return torch.cat([g.flatten().double().cpu() for g in G.values()])
