"""Peak memory of the loss at a real vocabulary: ours against logits of every position, each in a process of its own.

    python -m projected_grpo.bench.memory chunked|full [--tokens=512]

prints one JSON line. Memory is the rise of the process's peak resident set (getrusage's ru_maxrss) over its resident
set just before the loss, so the model and the libraries do not count; nothing is sampled, so no peak is missed.
Linux only: it reads /proc, and takes ru_maxrss in kilobytes.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from projected_grpo import antipasto, loss
from projected_grpo.antipasto import Knobs
from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count

How = Literal["chunked", "full"]
VOCABULARY = 151_669
"""Qwen3's tokens."""


def random_qwen3(vocab: int, width: int, layers: int = 4) -> Qwen3ForCausalLM:
    """A random-weight Qwen3 of the organism's shape at another vocabulary and width (a multiple of 32), float32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=max(1, width // 64), head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def full_logits_gradients(
    model: nn.Module,
    knobs: Knobs,
    ids: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s-1"],
    weight: Float[Tensor, " b"],
) -> dict[str, Tensor]:
    """What ``loss.row_gradients`` computes, with the float32 logits of every position held at once."""
    with knobs.row_gradients(len(ids)) as eps:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        (-(weight[:, None] * (logp - logp.detach()).exp() * mask).sum()).backward()
        return {name: e.grad for name, e in eps.items() if e.grad is not None}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(how: How, rows: Count = 8, tokens: Count = 512, vocab: Count = VOCABULARY, width: Count = 64) -> None:
    """One forward and backward through ``rows`` completions of ``tokens`` tokens; prints its peak and its seconds."""
    torch.set_num_threads(1)
    model = random_qwen3(vocab, width, layers=2)
    with tempfile.TemporaryDirectory() as cache:
        knobs = antipasto.wrap(model, Path(cache))
    ids = torch.randint(vocab, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    mask, weight = torch.ones(rows, tokens, dtype=torch.bool), torch.linspace(-1, 1, rows)
    before, start = resident(), time.process_time()
    if how == "chunked":
        G = loss.row_gradients(model, knobs, ids, mask, weight, micro_batch=rows).G
    else:
        G = full_logits_gradients(model, knobs, ids, mask, weight)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    norm = torch.stack([g.double().square().sum() for g in G.values()]).sum().sqrt().item()
    print(json.dumps({"how": how, "peak_bytes": peak, "cpu_seconds": seconds, "gradient_norm": norm}))


def measured(how: How, tokens: int) -> dict[str, Any]:
    """``main`` in a fresh process, parsed. Raises RuntimeError with the end of its errors."""
    command = [sys.executable, "-m", "projected_grpo.bench.memory", how, f"--tokens={tokens}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed ({done.returncode}): {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_main(command(main, tyro.conf.PositionalRequiredArgs))
