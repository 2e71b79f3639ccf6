"""The benchmark: where a step's time goes, and the ratios that say whether it is fast (`just bench`).

    python -m projected_grpo.bench [--quick] [--model=FOLDER] [--figure=FILE.png]

Everything runs on one thread, in rounds that take each candidate once, so that a busy machine slows all alike. Times
are CPU seconds of this process, which on an idle core are wall seconds; ratios are taken within a round and their
median, least and greatest over rounds are given. Writes outputs/bench/bench.{json,md}.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from loguru import logger
from tabulate import tabulate
from transformers.utils import logging as transformers_logging

from projected_grpo import bench_memory, models
from projected_grpo.bench_candidates import LR, Candidates, Seconds, grading, rounds
from projected_grpo.config import PRESETS, Config, UserError

try:
    from projected_grpo.bench_figure import draw, sweep
    from projected_grpo.bench_trl import TrlStep
except ImportError as error:
    raise SystemExit(f"error: {error}; the benchmark needs the extra: pip install -e '.[bench]'") from error


@dataclass(frozen=True)
class Target:
    """A ratio of two candidates' times and what issue 4 asks of it: at least or at most."""

    text: str
    over: str
    under: str
    least: float | None = None
    most: float | None = None

    def met(self, ratio: float) -> bool | None:
        """None where nothing was asked."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or ratio >= self.least) and (self.most is None or ratio <= self.most)

    @property
    def asked(self) -> str:
        """The target in words."""
        return f"≥ {self.least}" if self.least is not None else f"≤ {self.most}" if self.most is not None else "–"


TARGETS = (
    Target("samples/s of a step, over the hook form's", "step, hook form", "step", least=3.0),
    Target("samples/s of a step, over TRL's", "step, TRL", "step", least=1.5),
    Target("sampling, over the unwrapped model's", "sample", "sample, unwrapped model", most=1.05),
    Target("forward + backward, over full fine-tuning's", "gradient", "gradient, full fine-tuning", most=1.45),
    Target("a step of twice the rollouts, over a step", "step, twice the rollouts", "step", most=2.0),
    Target("sampling by transformers' generate, over ours", "sample, transformers' generate", "sample"),
    Target("hook form's sampling, over ours", "sample, hook form", "sample"),
    Target("hook form's two backwards, over our one", "gradient, hook form", "gradient"),
)


def mean_length(b: Candidates, n: int) -> list[float]:
    """Tokens a completion in each round."""
    rounds_of = (b.sample(b.model, i) for i in range(1, n + 1))
    return [sum(map(len, c)) / len(c) for c in rounds_of]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(
    seconds: dict[str, list[Seconds]], memory: dict[str, dict[str, Any]], memory_tokens: int
) -> list[dict[str, Any]]:
    """Every target with its measured ratio: of CPU seconds within a round, and of peak memory (asked of 8 x 512)."""
    rows = []
    for t in TARGETS:
        r = spread([over[0] / under[0] for over, under in zip(seconds[t.over], seconds[t.under], strict=True)])
        rows.append({"ratio": t.text, **r, "asked": t.asked, "met": t.met(r["median"])})
    peak = memory["chunked"]["peak_bytes"] / memory["full"]["peak_bytes"]
    t = Target("peak memory of the loss, over full logits'", "", "", most=0.33 if memory_tokens == 512 else None)
    row = {"ratio": t.text, **spread([peak]), "asked": t.asked, "met": t.met(peak)}
    return [*rows, row]


def tables(result: dict[str, Any]) -> str:
    """The report in Markdown: ratios against targets, seconds of each candidate, where our step's time goes."""
    verdict = {True: "met", False: "MISSED", None: ""}
    first = [
        [r["ratio"], f"{r['median']:.2f}", f"{r['min']:.2f}–{r['max']:.2f}", r["asked"], verdict[r["met"]]]
        for r in result["ratios"]
    ]
    rollouts = result["rollouts"]
    second = []
    for name, taken in result["seconds"].items():
        cpu, n = spread([c for c, _ in taken]), rollouts * (2 if "twice" in name else 1)
        second.append([name, f"{cpu['median']:.3f}", f"{cpu['min']:.3f}–{cpu['max']:.3f}", f"{n / cpu['median']:.0f}"])
    stages = {name: statistics.median(c for c, _ in taken) for name, taken in result["stages"].items()}
    whole = sum(stages.values())
    third = [[name, f"{median:.3f}", f"{median / whole:.0%}"] for name, median in stages.items()]
    gigabytes = " · ".join(f"{k} {v['peak_bytes'] / 1e9:.2f} GB" for k, v in result["memory"].items())
    return "\n\n".join((
        tabulate(first, ("ratio", "median", "min–max", "target", ""), "github", disable_numparse=True),
        tabulate(second, ("candidate", "CPU s", "min–max", "samples/s"), "github", disable_numparse=True),
        tabulate(third, ("stage of our step", "s", "share"), "github", disable_numparse=True),
        f"Peak memory of the loss, {result['memory_shape']}: {gigabytes}.",
    ))  # fmt: skip


def run(cfg: Config, repeats: int, memory_tokens: int, points: int) -> dict[str, Any]:
    """Measure everything. ``points``: how many values of each axis the sweep takes; 0 leaves it out."""
    b = Candidates(cfg)
    own, tokenizer = models.load(cfg.model)
    trl = TrlStep(own, tokenizer, b.prompts, cfg, LR)
    torch.set_num_threads(1)
    seconds, stages = rounds(b, trl, repeats)
    graded = grading(b, repeats)
    if graded is not None:
        stages["grade (wall, sandbox pool)"] = graded
    logger.info("memory of the loss")
    memory = {how: bench_memory.measured(how, memory_tokens) for how in ("chunked", "full")}
    return {
        "argv": sys.argv[1:],
        "model": cfg.model.model,
        "rollouts": len(b.prompts) * cfg.rl.group,
        "prompt_tokens": sum(map(len, b.prompts)) / len(b.prompts),
        "completion_tokens": {"ours": mean_length(b, repeats), "TRL": trl.tokens[1:]},
        "machine": {
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "threads": torch.get_num_threads(),
        },
        "versions": {p: version(p) for p in ("torch", "transformers", "trl")},
        "ratios": ratios(seconds, memory, memory_tokens),
        "seconds": seconds,
        "stages": stages,
        "memory": memory,
        "memory_shape": f"8 x {memory_tokens} completion tokens, vocabulary {bench_memory.VOCABULARY:,}",
        "sweep": sweep(points) if points else [],
    }


def main(
    model: str = "organism",
    repeats: int = 5,
    quick: bool = False,
    sweep_points: int = 4,
    outputs: str = "outputs",
    figure: Path | None = None,
) -> None:
    """Measure, print the tables and write them to outputs/bench.

    Args:
        model: `organism`, or a local folder of the same kind.
        repeats: rounds after the one that warms up.
        quick: two rounds, a short memory test, no sweep: about a minute.
        sweep_points: values of each of the sweep's four axes; 0 leaves sweep and figure out.
        outputs: where outputs/bench and the caches are.
        figure: where the figure goes; outputs/bench/cost.png when unset.
    """
    torch.set_num_threads(1)
    logger.remove()
    logger.add(sys.stderr, format="{time:HH:mm:ss} {message}", level="INFO")
    transformers_logging.set_verbosity_error()
    preset = PRESETS["organism"][1]
    cfg = replace(preset, model=replace(preset.model, model=model, device="cpu"), outputs=outputs,
                  rl=replace(preset.rl, lr=LR, warmup=0, schedule="constant"))  # fmt: skip
    try:
        result = run(cfg, 2 if quick else repeats, 64 if quick else 512, 0 if quick else sweep_points)
    except UserError as error:
        sys.exit(f"error: {error}")
    folder = Path(outputs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    text = tables(result)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "bench.md").write_text(text + "\n")
    if result["sweep"]:
        draw(result["sweep"], figure or folder / "cost.png")
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
