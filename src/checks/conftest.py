"""Fixtures: a tiny random Qwen3 in float64, wrapped, so that mathematics can be checked to many digits."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from projected_grpo import antipasto, loss
from projected_grpo.data_types import Problem

# checks run side by side, a process a core: more threads in each of them would only wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 2) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).eval()


def write_problems(found: Sequence[Problem], path: Path) -> None:
    """A problem file in this project's own format, a row a problem."""
    path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in found))


@pytest.fixture
def exact_norm(monkeypatch):
    """transformers' RMSNorm goes through float32; finite differences need it in the model's own precision."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", forward)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def wrapped(cache):
    """(model, knobs) in float64 with knobs away from zero, quarantine included."""
    model = tiny_model()
    knobs = antipasto.wrap(model, cache)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta.copy_(0.1 * torch.randn(m.delta.shape, generator=generator, dtype=torch.float64))
            m.delta_hack.copy_(0.1 * torch.randn(m.delta.shape, generator=generator, dtype=torch.float64))
    knobs.merge()
    return model, knobs


@pytest.fixture
def batch():
    """Four rows of unequal lengths; the token 0 (pad) occurs inside completions on purpose."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    completions = [[20, 0, 1], [21, 22, 23, 24, 1], [25], [26, 27, 1]]
    return loss.collate(prompts, completions, 0, torch.device("cpu"))
