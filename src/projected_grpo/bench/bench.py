"""The benchmark's candidates: our step, its parts, and the same step and parts done otherwise, timed in rounds.

Every candidate samples from the same policy: δS is a fixed small perturbation and the learning rate is 1e-6. Every
second rollout is rewarded, whatever it says, so that no group is without variance and nobody gains by skipping it.
"""

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tabulate import tabulate
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from projected_grpo import antipasto, arms, data_types, loss, models, problems, proj, rollout
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.bench import memory as bench_memory
from projected_grpo.bench.reference import HookForm, full_gradient, generate
from projected_grpo.command_line import command, extra, run_main
from projected_grpo.config import PRESETS, Config, Count
from projected_grpo.data_types import GradedBatch, Sampling, Task
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.rewards import Grader
from projected_grpo.rollout import tasks_of_step
from projected_grpo.sandbox.worker import SandboxError
from projected_grpo.train import apply_step, clip_scale, make_optimizer, sample_grads

LR = 1e-6
Seconds = tuple[float, float]
"""(CPU seconds of this process, wall seconds)."""


def random_orthonormal(knobs: Knobs, k: int) -> HackBasis:
    """A V of k axes in every module: projection costs the same whatever the axes are."""
    ones = {name: torch.ones(min(k, m.delta.numel()), m.delta.numel()) for name, m in knobs.modules.items()}
    return vhack.random_basis(HackBasis(ones, {name: v[:, 0] for name, v in ones.items()}, {}), seed=0)


class Laps:
    """A stop watch: a call names the stretch since the last one."""

    def __init__(self) -> None:
        self.taken: dict[str, Seconds] = {}
        self.last = (time.process_time(), time.perf_counter())

    def __call__(self, name: str) -> None:
        now = (time.process_time(), time.perf_counter())
        self.taken[name] = (now[0] - self.last[0], now[1] - self.last[1])
        self.last = now


class Candidates:
    """The models, all of the same weights, and the step on each. ``group``: rollouts a prompt."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.base, self.tokenizer = models.load(cfg.model)
        self.tasks: list[Task] = tasks_of_step(problems.tasks_for(cfg), 0, cfg.rl.prompts_per_step, cfg.seed)
        self.prompts = [problems.encode_prompt(self.tokenizer, t) for t in self.tasks]
        self.model = copy.deepcopy(self.base)
        self.knobs = antipasto.wrap(self.model, cfg.cache)
        torch.manual_seed(0)
        with torch.no_grad():
            for d in self.knobs.delta.values():
                d.normal_(0, 1e-3)
        self.knobs.merge()
        self.hook = HookForm(copy.deepcopy(self.base), self.knobs)
        with torch.no_grad():  # the unwrapped model is the same policy: it writes the same tokens
            for name, m in self.knobs.modules.items():
                self.base.get_parameter(f"{name}.weight").copy_(m.linear.weight if m.merged is None else m.merged)
        self.V = random_orthonormal(self.knobs, cfg.vhack.k)
        self.optimizer, self.scheduler = make_optimizer(self.knobs, cfg)
        self.hook_optimizer = torch.optim.AdamW(self.hook.delta.values(), lr=LR, betas=cfg.rl.betas, foreach=True)
        self.how = Sampling(cfg.rl.max_new, self.tokenizer.ends, self.tokenizer.pad_token_id, cfg.rl.temperature)

    def sample(self, model: nn.Module, seed: int, group: int | None = None) -> list[list[int]]:
        """Our sampler on a model, wrapped or not."""
        generator = torch.Generator().manual_seed(seed)
        rows = rollout.sample(model, self.prompts, group or self.cfg.rl.group, self.how, generator)
        return [list(row.ids) for row in rows]

    def batch(self, completions: list[list[int]]) -> tuple[GradedBatch, Tensor]:
        """Rewards and tensors, and advantages; the last row of each group plays the teacher."""
        group = len(completions) // len(self.prompts)
        rewards = (torch.arange(len(completions)) % 2).float().view(-1, group)
        rows = [p for p in self.prompts for _ in range(group)]
        ids, mask = loss.collate(rows, completions, self.tokenizer.pad_token_id, self.base.device)
        is_student = torch.arange(len(rows)) % group < group - 1
        A = arms.advantages(rewards).flatten()
        unsaid, ended = torch.full(mask.shape, torch.nan), torch.zeros_like(is_student)
        return GradedBatch(ids, mask, rewards.flatten(), is_student, unsaid, ended, (), {}), A

    def step(self, seed: int, group: int | None = None) -> dict[str, Seconds]:
        """Our step but for grading and logging; the seconds of its stages."""
        lap = Laps()
        completions = self.sample(self.model, seed, group)
        lap("sample")
        batch, A = self.batch(completions)
        lap("advantages, collate")
        grads = sample_grads(self.model, self.knobs, batch, A, self.cfg)
        lap("forward + backward")
        plain = data_types.Factors.plain(len(A))
        p = proj.decided(
            proj.sums(grads.G, plain, batch.is_student), self.V, self.V, arms.ARMS["erase"], self.cfg.vhack
        )
        lap("project")
        apply_step(self.knobs, p, (self.optimizer, self.scheduler), self.cfg.rl.clip)
        lap("update, merge")
        return lap.taken

    def hook_step(self, seed: int) -> dict[str, Seconds]:
        """The same step in the hook form."""
        torch.manual_seed(seed)
        lap = Laps()
        completions = self.hook.sample(self.prompts, self.cfg.rl.group, self.how)
        lap("sample")
        batch, A = self.batch(completions)
        lap("advantages, collate")
        weight = A / self.cfg.loss_denominator
        both = self.hook.two_backwards(batch.ids, batch.mask, weight, batch.is_student, self.cfg.rl.temperature)
        lap("forward + two backwards")
        is_student, plain = torch.tensor([True, False]), data_types.Factors.plain(2)
        p = proj.decided(proj.sums(both, plain, is_student), self.V, self.V, arms.ARMS["erase"], self.cfg.vhack)
        for name, delta in self.hook.delta.items():
            delta.grad = p.kept[name] * clip_scale(p, self.cfg.rl.clip)
        self.hook_optimizer.step()
        lap("project, update")
        return lap.taken


def timed(call: Callable[[], Any]) -> Seconds:
    """One call's (CPU, wall) seconds."""
    lap = Laps()
    call()
    lap("")
    return lap.taken[""]


def there_and_back(*calls: Callable[[], Any]) -> list[Seconds]:
    """The calls in turn and again in reverse, so that none always comes first: the mean seconds of each."""
    there = [timed(call) for call in calls]
    back = [timed(call) for call in reversed(calls)][::-1]
    return [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in zip(there, back, strict=True)]


def total(stages: dict[str, Seconds]) -> Seconds:
    """The sum of some stretches."""
    return sum(c for c, _ in stages.values()), sum(w for _, w in stages.values())


def one_round(b: Candidates, trl: Callable[[], Seconds], seed: int) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Every candidate once: its seconds, and the seconds of our step's stages."""
    cfg, group = b.cfg, b.cfg.rl.group
    batch, A = b.batch(b.sample(b.model, seed))
    fixed = (batch.ids, batch.mask, A / cfg.loss_denominator)
    shared = dict(temperature=cfg.rl.temperature, micro_batch=cfg.rl.micro_batch)
    ours = b.step(seed)
    hook = b.hook_step(seed)
    sample, sample_unwrapped = there_and_back(lambda: b.sample(b.model, seed), lambda: b.sample(b.base, seed))
    gradient, gradient_full = there_and_back(
        lambda: sample_grads(b.model, b.knobs, batch, A, cfg),
        lambda: full_gradient(b.base, list(b.knobs.modules), *fixed, **shared),
    )
    taken = {
        "step": total(ours),
        "step, TRL": trl(),
        "step, hook form": total(hook),
        "step, twice the rollouts": total(b.step(seed, 2 * group)),
        "sample": sample,
        "sample, unwrapped model": sample_unwrapped,
        "sample, transformers' generate": timed(lambda: generate(b.base, b.prompts, group, b.how)),
        "sample, hook form": hook["sample"],
        "gradient": gradient,
        "gradient, full fine-tuning": gradient_full,
        "gradient, hook form": hook["forward + two backwards"],
    }
    return taken, ours


def rounds(
    b: Candidates, trl: Callable[[], Seconds], n: int
) -> tuple[dict[str, list[Seconds]], dict[str, list[Seconds]]]:
    """n rounds after one to warm up: the seconds of each candidate, and of each stage of our step."""
    seconds: dict[str, list[Seconds]] = {}
    stages: dict[str, list[Seconds]] = {}
    one_round(b, trl, 0)
    for i in range(1, n + 1):
        taken, ours = one_round(b, trl, i)
        for name, pair in taken.items():
            seconds.setdefault(name, []).append(pair)
        for name, pair in ours.items():
            stages.setdefault(name, []).append(pair)
        logger.info("round {} of {}: step {:.2f} s, hook form {:.2f} s, TRL {:.2f} s", i, n,
                    *(taken[name][0] for name in ("step", "step, hook form", "step, TRL")))  # fmt: skip
    return seconds, stages


def grading(b: Candidates, n: int) -> list[Seconds] | None:
    """Seconds to grade a step's rollouts in the sandbox pool, once warm, which are wall seconds twice: the work is done
    in other processes. None where there is no sandbox."""
    texts = b.tokenizer.batch_decode(b.sample(b.model, 0), skip_special_tokens=True)
    asked = list(zip([t for t in b.tasks for _ in range(b.cfg.rl.group)], texts, strict=True))
    try:
        with Grader() as grader:
            grader.grade(asked)
            return [(wall, wall) for _, wall in (timed(lambda: grader.grade(asked)) for _ in range(n))]
    except SandboxError as error:
        logger.warning("grading is left out: {}", error)
        return None


with extra("bench"):
    from projected_grpo.bench.trl import TrlStep


@dataclass(frozen=True)
class Target:
    """A ratio of two candidates' times and its target: at least or at most."""

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


def run(cfg: Config, repeats: int, memory_tokens: int) -> dict[str, Any]:
    """Measure everything."""
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
    }


def main(
    model: str = "organism",
    repeats: Count = 5,
    quick: bool = False,
    outputs: str = "outputs",
) -> None:
    """Measure, print the tables and write them to outputs/bench.

    Args:
        model: `organism`, or a local folder of the same kind.
        repeats: rounds after the one that warms up.
        quick: two rounds and a short memory test: under a minute.
        outputs: where outputs/bench and the caches are.
    """
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    preset = PRESETS["organism"][1]
    cfg = replace(preset, model=replace(preset.model, model=model, device="cpu"), outputs=outputs,
                  rl=replace(preset.rl, prompts_per_step=8, lr=LR, warmup=0, schedule="constant"))  # fmt: skip
    result = run(cfg, 2 if quick else repeats, 64 if quick else 512)
    folder = Path(outputs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    text = tables(result)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "bench.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_main(command(main))
