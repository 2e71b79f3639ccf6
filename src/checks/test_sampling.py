"""Sampling: the same tokens as transformers' generate, row by row and under the same generator."""

import pytest
import torch
from conftest import tiny_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from projected_grpo import decoding, rollout
from projected_grpo.data_types import Sampling


def tokens(rows):
    """The completions' ids, as lists."""
    return [list(row.ids) for row in rows]


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]


def with_generate(model, prompts, n, max_new, **settings):
    """The same batch through transformers: left padding, every prompt n times, all rows to the end."""
    width = max(map(len, prompts))
    rows = [p for p in prompts for _ in range(n)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows])
    config = GenerationConfig(max_new_tokens=max_new, eos_token_id=1, pad_token_id=0, top_k=0, **settings)
    out = model.generate(ids, attention_mask=attention, generation_config=config)[:, width:]
    ends = [(row == 1).nonzero() for row in out]
    return [row[: int(e[0]) + 1 if len(e) else max_new].tolist() for row, e in zip(out, ends, strict=True)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.8}])
def test_same_tokens_as_generate(settings):
    model = tiny_model(torch.float32)
    generator = torch.Generator().manual_seed(7)
    got = tokens(rollout.sample(model, PROMPTS, 5, Sampling(90, (1,), 0, **settings), generator))
    torch.manual_seed(7)
    expected = with_generate(model, PROMPTS, 5, 90, do_sample=True, **settings)
    assert got == expected
    assert len({len(c) for c in got}) > 2  # rows ended at different times


def test_greedy_is_generates_greedy():
    model = tiny_model(torch.float32)
    got = tokens(rollout.sample(model, PROMPTS, 2, Sampling(8, (1,), 0, temperature=0.0), torch.Generator()))
    assert got == with_generate(model, PROMPTS, 2, 8, do_sample=False)


def small(kind: str):
    common = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=12, pad_token_id=0, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    layers = ["linear_attention", "full_attention"]
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **linear, layer_types=layers)).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
def test_other_architectures_sample_what_generate_samples(kind):
    model = small(kind)
    got = tokens(rollout.sample(model, PROMPTS, 3, Sampling(8, (1,), 0), torch.Generator().manual_seed(7)))
    torch.manual_seed(7)
    assert got == with_generate(model, PROMPTS, 3, 8, do_sample=True)


def test_a_rows_tokens_do_not_depend_on_who_shares_its_padding():
    model = tiny_model(torch.float32)
    greedy = Sampling(8, (1,), 0, temperature=0.0), torch.Generator()
    alone = tokens(rollout.sample(model, PROMPTS[:1], 4, *greedy))
    assert tokens(rollout.sample(model, PROMPTS, 4, *greedy))[:4] == alone


def test_nucleus_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert decoding.nucleus(logits, 0.7).isinf().tolist() == [[False, False, True, True]]
    assert decoding.nucleus(logits, 0.5).isinf().tolist() == [[False, True, True, True]]
    assert decoding.nucleus(logits, 1.0) is logits


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_logp_is_that_of_the_distribution_drawn_from(top_p):
    """By one forward over prompt and completion: at the temperature, renormalised within the nucleus."""
    model = tiny_model(torch.float32)
    how = Sampling(12, (1,), 0, temperature=0.7, top_p=top_p)
    rows = rollout.sample(model, PROMPTS, 2, how, torch.Generator().manual_seed(7))
    for prompt, row in zip([p for p in PROMPTS for _ in range(2)], rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *row.ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        logp = decoding.nucleus(logits, top_p).log_softmax(-1).gather(-1, torch.tensor(row.ids)[:, None])[:, 0]
        assert row.logp == pytest.approx(logp.tolist(), abs=1e-4)
