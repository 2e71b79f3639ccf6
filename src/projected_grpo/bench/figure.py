"""The benchmark's sweep and its figure: a step's cost against four sizes, ours and the hook form's (extra bench)."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.pyplot as plt
import torch
from loguru import logger

from projected_grpo import antipasto, loss, sampling
from projected_grpo.bench import memory
from projected_grpo.bench.reference import HookForm

matplotlib.use("Agg")  # a file, never a window; has to come before pyplot

Axis = Literal["rollouts", "completion", "vocabulary", "width"]


@dataclass(frozen=True)
class Point:
    """A random-weight Qwen3 of four layers; groups of 8, prompts of 70 tokens, completions of one length."""

    rollouts: int = 32
    completion: int = 32
    vocabulary: int = 768
    width: int = 128


SWEEP: dict[Axis, tuple[Point, tuple[int, ...]]] = {
    "rollouts": (Point(), (16, 32, 64, 128)),
    "completion": (Point(), (16, 32, 64, 128)),
    "vocabulary": (Point(rollouts=16, completion=16), (768, 8_192, 32_768, 151_669)),
    "width": (Point(rollouts=16, completion=16), (64, 128, 256, 512)),
}
FIXED = {
    "rollouts": "{:,} rollouts",
    "completion": "{:,} tokens each",
    "vocabulary": "vocabulary {:,}",
    "width": "width {:,}",
}
LABELS = {
    "rollouts": "rollouts a step",
    "completion": "completion length (tokens)",
    "vocabulary": "vocabulary (tokens)",
    "width": "model width",
}
LINES = {
    "step": ("our step", "#1b6ca8", "-"),
    "sample": ("its sampling", "#1b6ca8", ":"),
    "gradient": ("its forward + backward", "#1b6ca8", "--"),
    "hook": ("hook form, two backwards", "#c8553d", "-"),
}


def best(call: Callable[[], Any], n: int) -> tuple[float, Any]:
    """Least CPU seconds of n calls, and what the call gave."""
    taken, out = [], None
    for _ in range(n):
        start = time.process_time()
        out = call()
        taken.append(time.process_time() - start)
    return min(taken), out


def measure(p: Point) -> dict[str, float]:
    """CPU seconds at a point: our sampling and gradient (best of two), and the hook form's (once)."""
    model, base = (memory.random_qwen3(p.vocabulary, p.width) for _ in range(2))
    with tempfile.TemporaryDirectory() as cache:
        knobs = antipasto.wrap(model, Path(cache))
    with torch.no_grad():
        for d in knobs.delta.values():
            d.normal_(0, 1e-3)
    knobs.merge()
    hook = HookForm(base, knobs)
    prompts = torch.randint(2, p.vocabulary, (p.rollouts // 8, 70)).tolist()
    end: dict[str, Any] = dict(max_new=p.completion, pad=0)
    sample, written = best(
        lambda: sampling.sample(model, prompts, 8, eos=-1, generator=torch.Generator().manual_seed(0), **end), 2
    )
    ids, mask = loss.collate([x for x in prompts for _ in range(8)], written, 0, model.device)
    weight, is_student = torch.linspace(-1, 1, p.rollouts), torch.arange(p.rollouts) % 8 < 7
    gradient, _ = best(lambda: loss.row_gradients(model, knobs, ids, mask, weight), 2)
    hook_sample, _ = best(lambda: hook.sample(prompts, 8, eos=None, **end), 1)
    hook_gradient, _ = best(lambda: hook.two_backwards(ids, mask, weight, is_student), 1)
    return {"sample": sample, "gradient": gradient, "step": sample + gradient, "hook": hook_sample + hook_gradient}


def sweep(points: int) -> list[dict[str, Any]]:
    """The first ``points`` values of every axis, one row each: axis, value, the point, its seconds."""
    rows = []
    for axis, (base, values) in SWEEP.items():
        logger.info("sweep of {}", axis)
        for value in values[:points]:
            p = replace(base, **{axis: value})
            rows.append({"axis": axis, "value": value, "point": asdict(p), "seconds": measure(p)})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Four panels, seconds against each size on logarithmic axes."""
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for panel, axis in zip(panels, SWEEP, strict=True):
        of_axis = [r for r in rows if r["axis"] == axis]
        values = [r["value"] for r in of_axis]
        for key, (label, color, style) in LINES.items():
            seconds = [r["seconds"][key] for r in of_axis]
            panel.plot(values, seconds, style, color=color, marker="o", markersize=2, label=label)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
        panel.set_xticks(values, [f"{v:,}" for v in values], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        fixed = {k: v for k, v in of_axis[0]["point"].items() if k != axis}
        panel.set_title(" · ".join(FIXED[k].format(v) for k, v in fixed.items()), fontsize=7)
    panels[0].set_ylabel("CPU seconds a step, one thread")
    panels[0].legend(fontsize=7, frameon=False, handlelength=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
