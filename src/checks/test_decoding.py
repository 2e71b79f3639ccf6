"""Rows decoded at once: rows that join others, columns that come round, and a turn that a graph can repeat."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import ClassVar

import pytest
import torch
from conftest import tiny_model
from scipy import stats
from test_models import KINDS, model_of, moved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from projected_grpo import antipasto, decoding, rollout
from projected_grpo.data_types import Sampling
from projected_grpo.decoding import Graph, Pace

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15], [16]]


def tokens(rows) -> list[tuple[int, ...]]:
    return [row.ids for row in rows]


def adapted(kind: str, cache):
    """A model that does not only write its last token again."""
    model = model_of(kind)
    moved(antipasto.wrap(model, cache), 0.5)
    return model


def greedy(model, max_new: int = 14) -> Sampling:
    """Greedy, ended by two tokens that this model writes early in some rows and late, or never, in others."""
    how = Sampling(max_new, (-1,), 0, temperature=0.0)
    rows = tokens(rollout.sample(model, PROMPTS, 1, how, torch.Generator()))
    lengths = lambda ends: {next((i for i, t in enumerate(row) if t in ends), max_new) for row in rows}
    pairs = combinations(sorted({t for row in rows for t in row}), 2)
    return replace(how, eos=max(pairs, key=lambda ends: len(lengths(ends))))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_write_the_same_whoever_is_beside_them(kind, cache, monkeypatch):
    """All at once, one after the other, and with rows that join others in their middle, behind prompts read late."""
    model, ats = adapted(kind, cache), []
    how = greedy(model)
    at_once = rollout.sample(model, PROMPTS, 3, how, torch.Generator())
    assert len({len(ids) for ids in tokens(at_once)}) > 2
    written = decoding.Slots.written

    def noted(slots):
        ats.append((slots.ring.at, slots.ring.size))
        return written(slots)

    monkeypatch.setattr(decoding.Slots, "written", noted)
    for most in (1, 2, 3, 5, 11):
        rows = rollout.sample(model, PROMPTS, 3, how, torch.Generator(), rows=most)
        assert tokens(rows) == tokens(at_once), most
        for ours, theirs in zip(rows, at_once, strict=True):
            assert ours.logp == pytest.approx(theirs.logp, abs=1e-4)
    assert any(at > size for at, size in ats), "no column has come round"


def test_windows_of_columns_are_sampled_in_lots():
    """A model with a layer whose cache is a window takes no joiners, and writes what it writes all at once."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, use_sliding_window=True, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    assert not decoding.takes_joiners(model)
    how = Sampling(10, (-1,), 0, temperature=0.0)
    at_once = tokens(rollout.sample(model, PROMPTS, 2, how, torch.Generator()))
    assert tokens(rollout.sample(model, PROMPTS, 2, how, torch.Generator(), rows=4)) == at_once
    assert tokens(rollout.sample(model, PROMPTS, 2, how, torch.Generator(), rows=1)) == at_once
    for prompt, ids in zip(PROMPTS, at_once[::2], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(ids)


def pair_probabilities(model, prompt: list[int], eos: int) -> dict[tuple[int, ...], float]:
    """Of every completion of two tokens at most, by the model's own forward."""
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        v = len(first)
        then = model(torch.tensor([[*prompt, t] for t in range(v)])).logits[:, -1].double().softmax(-1)
    pairs = {(a, b): float(first[a] * then[a, b]) for a, b in product(range(v), range(v)) if a != eos}
    return pairs | {(eos,): float(first[eos])}


def test_joining_rows_are_drawn_from_the_models_distribution():
    """Completions of two tokens at most, many times, 64 at once: χ² against their probabilities, in 40 bins of like
    probability and of every order.
    """
    model, n = tiny_model(torch.float32), 3000
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)  # far from uniform
    prompt = [8, 9]
    eos = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    p = pair_probabilities(model, prompt, eos)
    dice, how = torch.Generator().manual_seed(3), Sampling(2, (eos,), 0)
    rows = tokens(rollout.sample(model, [prompt, [5, 6, 7]], n, how, dice, rows=64))
    order, bins, share = sorted(p, key=lambda pair: (sum(pair) % 7, pair)), {}, 0.0
    for pair in order:
        bins[pair] = min(39, int(share * 40))
        share += p[pair]
    expected, got = torch.zeros(40, dtype=torch.double), torch.zeros(40, dtype=torch.double)
    for pair, q in p.items():
        expected[bins[pair]] += q * n
    for pair in rows[:n]:
        got[bins[pair]] += 1
    live = expected > 5
    assert 0.1 < p[(eos,)] < 0.9  # rows end early, and others join
    assert stats.chisquare(got[live], expected[live] * got[live].sum() / expected[live].sum()).pvalue > 1e-3


# --- a turn as a graph


class Tape(TorchDispatchMode):
    """Every operation of a turn with the very tensors that it read and made; refuses what would wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(func.__name__.startswith(name) for name in self.WAITS), f"{func} waits for the device"
        made = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """The same operations on the same memory, as a graph does them: what Python would say now has no part in it."""
        for func, args, kwargs, made in self.ops:
            again = func(*args, **kwargs)
            for then, now in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(then, torch.Tensor) and then.data_ptr() != now.data_ptr():
                    then.copy_(now)


class TapedGraph(Graph):
    """``Graph`` with a tape for the device's capture. Taping a turn takes it, where capturing one does not."""

    made: ClassVar[list["TapedGraph"]] = []

    def settle(self) -> None:
        self.turn()

    def captured(self) -> Callable[[], None]:
        with Tape() as tape:
            self.turn()
        self.tape, taken = tape, iter((True,))
        self.made.append(self)
        return lambda: None if next(taken, False) else tape.replay()


def taped(monkeypatch, stride: int) -> list[TapedGraph]:
    monkeypatch.setattr(rollout, "pace_of", lambda model: Pace(TapedGraph, stride, static=True))
    monkeypatch.setattr(TapedGraph, "made", [])
    return TapedGraph.made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_captured_turn_writes_what_turns_write_one_by_one(monkeypatch, attention, cache):
    """Replayed from a tape, under full masks, in sizes that halve, looked at every fourth turn; with rows that join."""
    model = adapted("qwen3", cache)
    model.config._attn_implementation = attention
    how = greedy(model, 40)
    drawn = replace(how, temperature=0.8)
    eager = [tokens(rollout.sample(model, PROMPTS, 3, h, torch.Generator().manual_seed(5))) for h in (how, drawn)]
    looks, look = [], decoding.Slots.look
    monkeypatch.setattr(decoding.Slots, "look", lambda slots: (looks.append(slots.ring.at), look(slots)))
    made = taped(monkeypatch, 4)
    for h, theirs in zip((how, drawn), eager, strict=True):
        assert tokens(rollout.sample(model, PROMPTS, 3, h, torch.Generator().manual_seed(5))) == theirs
    assert {len(g.tape.ops[1][1][0]) for g in made} >= {12, 6}, "one graph a batch size"
    assert len(looks) <= 2 * (2 + 40 / 4)
    assert tokens(rollout.sample(model, PROMPTS, 3, how, torch.Generator(), rows=5)) == eager[0]


def test_what_cannot_be_captured_goes_on_being_run(monkeypatch, cache):
    """A kernel that waits for the device breaks a capture; sampling goes on without, and says so."""
    model = adapted("qwen3", cache)
    how = greedy(model)
    expected = tokens(rollout.sample(model, PROMPTS, 3, how, torch.Generator()))

    class Broken(TapedGraph):
        def captured(self) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(rollout, "pace_of", lambda model: Pace(Broken, 4, static=True))
    assert tokens(rollout.sample(model, PROMPTS, 3, how, torch.Generator())) == expected


def test_a_nucleus_is_found_in_the_prefix():
    """The same set as by sorting everything; where so few tokens hold too little, they are the nucleus."""
    logits = 3 * torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    sorted_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= 0.9)
    assert (~sorted_out).sum(-1).max() < decoding.PREFIX
    assert decoding.nucleus(logits, 0.9).isinf().equal(sorted_out)
    assert (~decoding.nucleus(logits / 100, 0.9).isinf()).sum(-1).tolist() == [decoding.PREFIX] * 6
