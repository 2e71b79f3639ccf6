"""Measured peak memory of a step beside its plan, for small random models. Run by test_memory.py in a fresh process.

Each model lives in a fork of its own: a process that has held another one's memory would hide a peak. Prints a line a
model: name, planned bytes, measured bytes.
"""

import os
import sys
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig, Qwen3Config

from projected_grpo import antipasto, loss, memory, models, rollout
from projected_grpo.config import Config, DataCfg, ModelCfg, RLCfg
from projected_grpo.data_types import Sampling

COMMON = dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
              num_key_value_heads=3, head_dim=64, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)  # fmt: skip
LINEAR = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64)
CONFIG = Config(
    model=ModelCfg(device="cpu"),
    data=DataCfg(max_prompt=224),
    rl=RLCfg(prompts_per_step=2, group=4, max_new=32, micro_batch=8),
)
CASES = {
    "qwen3": (lambda: Qwen3Config(**COMMON), CONFIG),
    "llama, checkpointed": (
        lambda: LlamaConfig(**COMMON | {"num_hidden_layers": 8}),
        replace(CONFIG, model=replace(CONFIG.model, gradient_checkpointing=True)),
    ),
    "qwen3.5": (lambda: Qwen3_5TextConfig(**COMMON, **LINEAR), CONFIG),
}


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def step(config, cfg: Config) -> None:
    """Adapters, a merge, sampling and every row's gradient, at the plan's own sizes. U and Vh are random."""
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if cfg.model.gradient_checkpointing:
        models.recompute(model, on=True)
    modules = {}
    for name, linear in antipasto.targets(model).items():
        o, i = linear.weight.shape
        modules[name] = antipasto.AntipastoLinear(linear, torch.rand(o, min(o, i)), torch.rand(min(o, i), i), seed=0)
        modules[name].delta.data.fill_(1e-4)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, modules[name])
    knobs = antipasto.Knobs(modules)
    knobs.merge()
    prompts = [[5 + i] * cfg.data.max_prompt for i in range(cfg.rl.prompts_per_step)]
    how = Sampling(cfg.rl.max_new, (-1,), 0)
    written = rollout.sample(model, prompts, cfg.rl.group, how, torch.Generator())
    rows = [p for p in prompts for _ in range(cfg.rl.group)]
    ids, mask = loss.collate(rows, [c.ids for c in written], 0, torch.device("cpu"))
    loss.row_gradients(model, knobs, ids, mask, torch.ones(len(ids)), micro_batch=cfg.rl.micro_batch)


def main() -> None:
    """A line a model."""
    warm = COMMON | dict(hidden_size=32, intermediate_size=32, vocab_size=64, num_hidden_layers=1, head_dim=8)
    small = replace(CONFIG, data=DataCfg(max_prompt=8), rl=replace(CONFIG.rl, max_new=2))
    step(Qwen3Config(**warm), small)  # what the libraries allocate once is no model's
    for name, (make, cfg) in CASES.items():
        planned = memory.plan(cfg, make()).peak
        sys.stdout.flush()
        if os.fork():
            os.wait()
            continue
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        before = status("VmRSS")
        step(make(), cfg)
        print(f"{name}\t{planned}\t{status('VmHWM') - before}", flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
