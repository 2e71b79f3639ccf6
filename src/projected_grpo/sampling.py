"""Batched sampling with a key-value cache, one call for all prompts and rollouts of a step.

Four things make it cheaper than a general ``generate``: each distinct prompt is read once and its cache entry
copied to its rollouts; rows that have ended leave the batch; a token is appended to the cache in place; and nothing
is done a token that does not depend on it. Under the same generator it draws the same tokens as transformers'
``generate`` (a check holds it to that).
"""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from projected_grpo.antipasto import Knobs
from projected_grpo.config import Config
from projected_grpo.data_types import Completion, Sampling
from projected_grpo.loss import logits_of


@runtime_checkable
class Sampler(Protocol):
    """n completions of each prompt, as ``sample`` returns them, by the model with the knobs that are in use.

    Its randomness is drawn from ``generator``.
    """

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator
    ) -> list[Completion]: ...


class RoomyLayer(DynamicLayer):
    """A layer's keys and values (b, h, s, d) with room to append in place.

    transformers' own layer copies all of them for every token, about a tenth of the organism's sampling time.
    ``keys`` and ``values`` are views of the filled part of ``room``; a new room is made every ``SPARE`` tokens, and
    after rows were reordered or dropped.
    """

    SPARE = 64
    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            room = [n.new_empty(*n.shape[:-2], end + self.SPARE, n.shape[-1]) for n in (key_states, value_states)]
            if start:
                room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
            self.room = (room[0], room[1])
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = key_states, value_states
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        super().reorder_cache(beam_idx)
        self.room = None


def roomy_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for the model; layers of other kinds (linear attention, sliding windows) are transformers' own."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_name(decoder: nn.Module) -> str:
    """What the installed transformers calls the cache. A name that it does not know it would swallow in silence."""
    return "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"


def nucleus(logits: Float[Tensor, "b v"], top_p: float) -> Float[Tensor, "b v"]:
    """Logits with all but the smallest set of tokens that holds probability top_p set to −inf."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill(
        torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p), -torch.inf
    )


def draw(logits: Float[Tensor, "b v"], race: Float[Tensor, "b v"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token a row and its probability: argmax of p over an Exp(1) variable, the exponential race that
    torch.multinomial runs.
    """
    p = logits.softmax(-1)
    token = (p / race).argmax(-1)
    return token, p.gather(-1, token[:, None])[:, 0]


def sample(
    model: nn.Module, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator,
    rows: int | None = None,
) -> list[Completion]:  # fmt: skip
    """n completions of each prompt, prompt by prompt: row i·n + j is completion j of prompt i.

    rows: at most so many rows at once, one call of ``sample_lot`` after the other; all together when None.
    """
    if rows is None or len(prompts) * n <= rows:
        return sample_lot(model, prompts, n, how, generator)
    if n > rows:
        parts = [min(rows, n - i) for i in range(0, n, rows)]
        return [c for prompt in prompts for k in parts for c in sample_lot(model, [prompt], k, how, generator)]
    size = rows // n
    lots = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return [c for lot in lots for c in sample_lot(model, lot, n, how, generator)]


@torch.inference_mode()
def sample_lot(
    model: nn.Module, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator
) -> list[Completion]:
    """n completions of each prompt, in one batch.

    ``generator`` lives on the CPU or on the model's device; its state after the call depends on the number of steps
    taken and not on which rows had ended.
    """
    device, width, max_new = model.device, max(map(len, prompts)), how.max_new
    eos = torch.tensor(how.eos, device=device)
    ids = torch.tensor([[how.pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = roomy_cache(model)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    kept = {cache_name(decoder): cache}
    h = decoder(
        input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=True, **kept
    ).last_hidden_state[:, -1]
    assert cache.get_seq_length() == width, "the model did not fill the cache that it was given"
    copies = torch.arange(len(prompts), device=device).repeat_interleave(n)
    cache.reorder_cache(copies)
    logits, position = logits_of(head, h)[copies], positions[copies, -1]
    attention = torch.cat([attention[copies], attention.new_ones(len(copies), max_new)], dim=1)
    rows = torch.arange(len(copies), device=device)
    out = torch.full((len(copies), max_new), how.pad, device=device)
    p = torch.ones(len(copies), max_new, device=device)
    length = torch.full((len(copies),), max_new, device=device)
    live = torch.ones(len(copies), dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = logits[:, : how.vocab].float()
        if how.temperature == 0:
            token = logits.argmax(-1)
            chosen = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
        else:
            race = torch.empty(len(copies), logits.shape[-1], device=generator.device).exponential_(generator=generator)
            token, chosen = draw(nucleus(logits / how.temperature, how.top_p), race.to(device)[rows])
        out[rows, t], p[rows, t] = torch.where(live[rows], token, how.pad), chosen
        ended = torch.isin(token, eos)
        length[rows[live[rows] & ended]] = t + 1
        live[rows[ended]] = False
        if t + 1 == max_new or not live.any():
            break
        if live[rows].float().mean() < 0.8:
            keep = live[rows].nonzero()[:, 0]
            cache.reorder_cache(keep)
            rows, token, position, attention = rows[keep], token[keep], position[keep], attention[keep]
        position = position + 1
        h = decoder(
            input_ids=token[:, None],
            attention_mask=attention[:, : width + t + 1],
            position_ids=position[:, None],
            use_cache=True,
            **kept,
        ).last_hidden_state[:, -1]
        logits = logits_of(head, h)
    found = zip(out.tolist(), p.log().tolist(), length.tolist(), strict=True)
    return [Completion(tuple(ids[:k]), tuple(logp[:k])) for ids, logp, k in found]


def refuse(cfg: Config) -> None:
    """A sampler that cannot work, said before anything is loaded. Raises UserError."""
    if cfg.model.sampler == "vllm":
        from projected_grpo.scale import vllm_sampling

        vllm_sampling.refuse(cfg)


def sampler_of(model: nn.Module, knobs: Knobs, cfg: Config) -> Sampler:
    """The sampler asked for. Raises UserError when vLLM does not start."""
    if cfg.model.sampler == "own":
        return partial(sample, model, rows=cfg.model.sample_rows)
    from projected_grpo.scale import vllm_sampling

    return vllm_sampling.VllmSampler(vllm_sampling.engine(model, cfg), knobs)
