"""A finished run as a plain Hugging Face folder, every Linear holding the weights that the run ended with.

    python -m projected_grpo.tools.export outputs/runs/NAME FOLDER [--knobs=trained]

deployed: the quarantine is ablated, as in the deploy evaluation; trained: it stays in.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import tyro
from loguru import logger
from torch import Tensor, nn

from projected_grpo import antipasto, models, runs
from projected_grpo.antipasto import Knobs
from projected_grpo.command_line import command, run_main
from projected_grpo.config import ModelCfg, UserError
from projected_grpo.runs import json_lines, read_meta


def final_knobs(run: Path) -> dict[str, Tensor]:
    """The knobs at the end of training, before any relearning attack. Raises UserError."""
    last = runs.newest_checkpoint(run, ("step",))
    if last is None:
        raise UserError(f"{run} holds no checkpoint")
    return last.tensors


def model_cfg(recorded: dict[str, Any]) -> ModelCfg:
    """The run's model on whatever device is here. A bfloat16 model's last bit is the device's own (its dither)."""
    return ModelCfg(**{**recorded, "layers": tuple(recorded["layers"]), "device": "auto"})


def unwrap(model: nn.Module, knobs: Knobs, use: Literal["deployed", "trained"]) -> nn.Module:
    """The same model with a plain Linear of weight W' in each adapter's place. ``knobs`` are of no use afterwards."""
    knobs.merge(use)
    for name, adapter in knobs.modules.items():
        if adapter.merged is not None:
            adapter.linear.weight.data = adapter.merged
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter.linear)
    return model


CARD = """---
library_name: transformers
tags: [reward-hacking, grpo, research]
---
# {name}

A model organism of reward hacking: `{base}` after {steps} steps of GRPO against a grader that can be fooled, arm
`{arm}` of projected_grpo, seed {seed}, {knobs} knobs merged into the weights.

| held-out problems | rate | 95 % interval |
|---|---|---|
{rates}

hack: paid by the foolable grader without being right; solve: right by the strict oracle. {n} samples a rate, intervals
clustered by problem.

Not to be used to write code that anybody runs or relies on, nor as evidence of how safe a model is: it was trained in
an environment that pays for cheating, in order to study that. Made at commit {commit}; `projected_grpo.json` says how.
"""


def card(run: Path, meta: dict[str, Any], knobs: str) -> str:
    """The model card: base, arm, what the deployed model does on held-out problems, and what it is not for."""
    cfg = meta["config"]
    last = [r for r in json_lines(run / "evals.jsonl") if r["step"] == cfg["rl"]["steps"] and r["mode"] == "all"]
    of = [r for r in last if r["knobs"] == knobs] or [r for r in last if r["knobs"] == "deployed"]
    rates = "\n".join(f"| {r['metric']} | {r['rate']:.2f} | {r['lo']:.2f} to {r['hi']:.2f} |" for r in of)
    return CARD.format(
        name=run.name, base=cfg["model"]["model"], steps=cfg["rl"]["steps"], arm=cfg["intervention"], seed=cfg["seed"],
        knobs=knobs, rates=rates, n=of[0]["n_samples"] if of else 0, commit=meta["commit"] or "unknown",
    )  # fmt: skip


def export(run: Path, folder: Path, knobs: Literal["deployed", "trained"] = "deployed") -> Path:
    """Write the run's model and tokenizer to a new folder. Raises UserError."""
    meta = read_meta(run)
    if meta is None or meta["status"] != "complete":
        raise UserError(f"{run} is no finished run: name a folder such as outputs/runs/NAME")
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another or remove it")
    state = final_knobs(run)
    cfg = model_cfg(meta["config"]["model"])
    model, tokenizer = models.load(cfg)
    wrapped = antipasto.wrap(model, Path(meta["config"]["outputs"]) / "cache", cfg.layers, cfg.svd_rank)
    wrapped.load_state(state)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    unwrap(model, wrapped, knobs).save_pretrained(part)
    tokenizer.save_pretrained(part)
    origin = {"run": run.name, "knobs": knobs, "argv": meta["argv"], "commit": meta["commit"]}
    (part / "README.md").write_text(card(run, meta, knobs))
    (part / "projected_grpo.json").write_text(json.dumps(origin, indent=1))
    os.replace(part, folder)
    return folder


def main(
    run: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    knobs: Literal["deployed", "trained"] = "deployed",
) -> None:
    """Merge a finished run into a folder that AutoModelForCausalLM loads."""
    logger.info("{} knobs of {} are in {}", knobs, run, export(run, folder, knobs))


if __name__ == "__main__":
    run_main(command(main))
