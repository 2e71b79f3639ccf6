"""Pooled hidden states of completions: what the activation-level arms and gates read.

Layers between 60 and 75 % of the depth, averaged (the range of Wu & Tang, arXiv 2604.01476); one forward, no gradient.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.data_types import Pair

Pool = Literal["last", "mean"]
DEPTH = (0.6, 0.75)


def hidden_layers(depth: int) -> list[int]:
    """Indices into ``hidden_states`` (0: embeddings, i: after layer i) in the depth range; the nearest if none is."""
    inside = [i for i in range(1, depth + 1) if DEPTH[0] <= i / depth <= DEPTH[1]]
    return inside or [min(range(1, depth + 1), key=lambda i: abs(i / depth - sum(DEPTH) / 2))]


@torch.no_grad()
def pooled(
    model: nn.Module, ids: Int[Tensor, "b s"], mask: Bool[Tensor, "b s-1"], pool: Pool, micro_batch: int = 64
) -> Float[Tensor, "b d"]:
    """Each row's hidden state at its completion's last token, or the mean over its completion's tokens; float32."""
    use = hidden_layers(model.config.get_text_config().num_hidden_layers)
    rows = []
    for i, m in zip(ids.split(micro_batch), mask.split(micro_batch), strict=True):
        states = model.get_decoder()(input_ids=i, use_cache=False, output_hidden_states=True).hidden_states
        h = torch.stack([states[layer] for layer in use]).float().mean(0)
        written = torch.nn.functional.pad(m, (1, 0))  # mask[t] speaks of token t+1
        if pool == "last":
            at = written.shape[1] - 1 - written.flip(1).int().argmax(1)
            rows.append(h[torch.arange(len(h), device=h.device), at])
        else:
            weight = written.to(h)
            rows.append((h * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
    return torch.cat(rows)


def of_pairs(
    model: nn.Module, tokenizer: Any, chosen: Sequence[Pair], pool: Pool, micro_batch: int = 64
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Pooled states of the pairs' hack sides and clean sides, at the knobs in use."""
    ids, mask = vhack.encoded(tokenizer, chosen, model.device)
    h = pooled(model, ids, mask, pool, micro_batch)
    return h[: len(chosen)], h[len(chosen) :]


def direction(hack: Float[Tensor, "n d"], clean: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """mean(h⁺ − h⁻), normalised."""
    d = (hack - clean).mean(0)
    return d / d.norm()


def random_direction(like: Float[Tensor, " d"], seed: int) -> Float[Tensor, " d"]:
    """A random unit vector of that width."""
    d = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    return d / d.norm()
