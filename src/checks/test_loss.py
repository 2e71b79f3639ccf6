"""Advantages, masks and log-probs against values made by hand or by the plain formula."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo import arms, loss, rollout
from projected_grpo.data_types import Sampling


def test_advantages_by_hand():
    A = arms.advantages(torch.tensor([[3.5, 0.5, 0.5, 3.5], [0.5, 0.5, 0.5, 0.5]]))
    assert A.tolist() == [[1.5, -1.5, -1.5, 1.5], [0, 0, 0, 0]]


def test_mask_by_hand_with_pad_equal_to_eos():
    """pad = eos = 9: the end-of-turn token that was written is a target, the padding after it is not."""
    ids, mask = loss.collate([[1, 2], [3]], [[4, 9], [9, 9, 5, 9]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 4, 9, 9], [3, 9, 9, 5, 9]]
    assert mask.tolist() == [[False, True, True, False], [True, True, True, True]]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6))
def test_mask_counts_exactly_the_completions(lengths):
    prompts, completions = [[1] * p for p, _ in lengths], [[2] * c for _, c in lengths]
    ids, mask = loss.collate(prompts, completions, 0, torch.device("cpu"))
    assert mask.sum(1).tolist() == [c for _, c in lengths]
    assert (ids[:, 1:][mask] == 2).all()
    assert (ids[:, 1:][~mask] != 2).all()


def plain_logprobs(model, ids, mask, temperature=1.0):
    logp = (model(ids[:, :-1]).logits / temperature).log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_are_the_plain_ones(wrapped, batch, monkeypatch, temperature):
    model, knobs = wrapped
    ids, mask = batch
    expected = plain_logprobs(model, ids, mask, temperature)
    whole = loss.token_logprobs(model, ids, mask, temperature)
    weight = torch.ones(4, dtype=torch.float64)
    G = loss.row_gradients(model, knobs, ids, mask, weight).G
    monkeypatch.setattr(loss, "LOGIT_BUDGET", 97 * 2)
    chunked = loss.token_logprobs(model, ids, mask, temperature)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(chunked, expected)
    for name, g in loss.row_gradients(model, knobs, ids, mask, weight).G.items():
        torch.testing.assert_close(g, G[name])


def test_logits_of_a_16_bit_head_are_not_rounded():
    """Logits of 16 to 32: bfloat16 has them .125 apart. These are what float64 says of the weights."""
    model = tiny_model(torch.bfloat16)
    head, h = model.get_output_embeddings(), 60 * torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    h = h.bfloat16().requires_grad_()
    exact = h.detach().double() @ head.weight.double().T
    assert 16 < exact.abs().max() < 64
    made = loss.logits_of(head, h)
    assert made.dtype is torch.float32
    assert (made - exact).abs().max() < 1e-4 < 0.02 < (head(h) - exact).abs().max()
    made.logsumexp(-1).sum().backward()
    torch.testing.assert_close(h.grad.double(), exact.softmax(-1) @ head.weight.double(), rtol=0.02, atol=1e-3)
    wide = torch.nn.Linear(24, 5)
    assert torch.equal(loss.logits_of(wide, h.detach().float()), wide(h.detach().float()))
    wide = wide.bfloat16()
    assert loss.logits_of(wide, h.detach()).dtype is torch.float32
    torch.testing.assert_close(loss.logits_of(wide, h.detach()), wide(h.detach()).float(), rtol=0.01, atol=0.3)


def test_a_16_bit_model_samples_and_trains_on_unrounded_logits(monkeypatch):
    """What the sampler says it drew at is what the trainer finds, closer than bfloat16's logits could be; at no token
    is the head itself asked, whose logits are rounded.
    """
    model = tiny_model(torch.bfloat16)
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda h: pytest.fail("logits in bfloat16"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # tied: the embeddings too, which a norm takes back
    prompt = [[5, 6, 7]]
    rows = rollout.sample(model, prompt, 8, Sampling(6, (-1,), 0), torch.Generator().manual_seed(0))
    ids, mask = loss.collate(prompt * 8, [r.ids for r in rows], 0, torch.device("cpu"))
    logp = loss.token_logprobs(model, ids, mask)
    with torch.no_grad():
        h = model.get_decoder()(input_ids=ids[:, :-1]).last_hidden_state[mask].double()
    logits = h @ model.get_output_embeddings().weight.double().T
    exact = logits.log_softmax(-1).gather(-1, ids[:, 1:][mask][:, None])[:, 0]
    assert (logp - exact).abs().max() < 1e-4
    first = mask.cumsum(1)[mask] == 1  # of the prompt's own forward, the same in both
    said = torch.tensor([p for r in rows for p in r.logp])
    assert (said - logp)[first].abs().max() < 1e-4


def test_padding_changes_nothing(wrapped, batch):
    model, _ = wrapped
    ids, mask = batch
    wide = torch.cat([ids, torch.zeros(4, 3, dtype=torch.long)], 1)
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(loss.token_logprobs(model, ids, mask), loss.token_logprobs(model, wide, wide_mask))


def test_kl_is_k3_to_the_base_and_its_gradient_is_autograds(wrapped, batch, exact_norm):
    model, knobs = wrapped
    ids, mask = batch
    weight, beta = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64), 0.3
    with torch.no_grad():
        logp = loss.token_logprobs(model, ids, mask)
        with knobs.using("base"):
            d = loss.token_logprobs(model, ids, mask) - logp
    got = loss.row_gradients(model, knobs, ids, mask, weight, beta=beta, kl_weight=0.5)
    k3 = d.exp() - d - 1
    row = mask.nonzero()[:, 0]
    assert got.kl == pytest.approx(k3.mean().item(), rel=1e-9)
    assert got.objective.sum().item() == pytest.approx(-weight[row].sum().item(), rel=1e-9)
    # dK3/dlogπ = 1 − exp(d): a policy term of weight −β·kl_weight·(1 − e^d) per token has the same gradient
    with knobs.row_gradients(len(ids)) as eps:
        coefficient = weight[row] - beta * 0.5 * (1 - d.exp())
        (-(coefficient * loss.token_logprobs(model, ids, mask)).sum()).backward()
        for name, e in eps.items():
            torch.testing.assert_close(got.G[name], e.grad, rtol=1e-7, atol=1e-11)


def test_kl_looks_at_chosen_rows_and_leaves_the_policys_term_alone(wrapped, batch):
    """Teacher rows are left out of K3, and detectors get the gradient that they were calibrated on."""
    model, knobs = wrapped
    ids, mask = batch
    weight, students = (
        torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64),
        torch.tensor([True, False, True, False]),
    )
    plain = loss.row_gradients(model, knobs, ids, mask, weight)
    got = loss.row_gradients(model, knobs, ids, mask, weight, beta=0.3, kl_weight=0.5, kl_rows=students)
    assert plain.policy is plain.G
    for name, g in got.policy.items():
        torch.testing.assert_close(g, plain.G[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(got.G[name][~students], g[~students])
        assert not torch.allclose(got.G[name][students], g[students])
    only = [
        loss.row_gradients(model, knobs, ids[i : i + 1], mask[i : i + 1], weight[:1] * 0, beta=1.0).kl for i in (0, 2)
    ]
    n = mask.sum(1)
    assert got.kl == pytest.approx((only[0] * n[0] + only[1] * n[2]).item() / (n[0] + n[2]).item())


def test_one_token_cannot_outweigh_the_kl_of_all_others(wrapped, batch, monkeypatch):
    model, knobs = wrapped
    ids, mask = batch
    monkeypatch.setattr(loss, "MAX_LOG_RATIO", 0.0)
    got = loss.row_gradients(model, knobs, ids, mask, torch.zeros(4, dtype=torch.float64), beta=1.0, kl_weight=1.0)
    assert got.kl == 0


def test_importance_weights_are_truncated_constants_of_each_token(wrapped, batch):
    """Equal log-probs, and tokens that no sampler spoke of, change nothing to the bit; elsewhere every token's term is
    multiplied by min(exp(log π − drawn), cap), in every row's gradient of the one backward.
    """
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    plain = loss.row_gradients(model, knobs, ids, mask, weight, micro_batch=4)
    with torch.no_grad():
        logp = loss.token_logprobs(model, ids, mask)
    drawn = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    for filled in (drawn, drawn.masked_scatter(mask, logp)):
        same = loss.row_gradients(model, knobs, ids, mask, weight, drawn=filled, cap=2.0, micro_batch=4)
        assert torch.equal(same.objective, plain.objective)
        assert all(torch.equal(g, plain.G[name]) for name, g in same.G.items())
        assert len(same.drift) == int((~filled.isnan()).sum())
        assert not same.drift.any()
    off = torch.linspace(-1.5, 1.5, len(logp), dtype=torch.float64)
    off[3] = torch.nan
    c, row = off.exp().clamp(max=2).nan_to_num(1), mask.nonzero()[:, 0]
    assert (c == 2).any()
    got = loss.row_gradients(model, knobs, ids, mask, weight, drawn=drawn.masked_scatter(mask, logp - off), cap=2.0)
    assert got.objective.sum().item() == pytest.approx(-(weight[row] * c).sum().item())
    torch.testing.assert_close(got.drift.sort().values, off[~off.isnan()].sort().values)
    with knobs.row_gradients(len(ids)) as eps:
        (-(weight[row] * c * loss.token_logprobs(model, ids, mask)).sum()).backward()
        for name, e in eps.items():
            torch.testing.assert_close(got.G[name], e.grad, rtol=1e-7, atol=1e-11)
    without = loss.row_gradients(model, knobs, ids, mask, weight, drawn=drawn.masked_scatter(mask, logp - off))
    assert all(torch.equal(without.G[name], plain.G[name]) for name in plain.G)


def test_rows_without_advantage_are_skipped_exactly(wrapped, batch):
    model, knobs = wrapped
    ids, mask = batch
    got = loss.row_gradients(model, knobs, ids, mask, torch.tensor([1.0, 0.0, 0.0, -1.0], dtype=torch.float64))
    assert all((g[1] == 0).all() and (g[2] == 0).all() and (g[0] != 0).any() for g in got.G.values())
    none = loss.row_gradients(model, knobs, ids, mask, torch.zeros(4, dtype=torch.float64))
    assert not none.objective.any()
    assert all((g == 0).all() for g in none.G.values())


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_of_rows_that_are_alike_one_goes_through_for_all(wrapped, batch, monkeypatch, beta, cap):
    """What comes out is what each row alone would leave; a copy with another weight, another share in the KL or, under
    a cap, other draws is none.
    """
    model, knobs = wrapped
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta += 0.05
    knobs.merge()
    ids, mask = (torch.cat([part, part, part[:2]]) for part in batch)
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, -2.0, 0.7, 0.0, 1.0, -2.0], dtype=torch.float64)
    kl_rows = torch.tensor([True] * 8 + [False, True])
    drawn = torch.full(mask.shape, -3.0, dtype=torch.float64)
    drawn[9] = -9.0
    given = dict(beta=beta, kl_weight=0.25, cap=cap)
    went = []
    forward = loss.token_logprobs
    monkeypatch.setattr(loss, "token_logprobs", lambda model, i, *more: went.append(len(i)) or forward(model, i, *more))
    rows = loss.row_gradients(model, knobs, ids, mask, weight, kl_rows=kl_rows, drawn=drawn, **given)
    # rows 4, 5, 8 and 9 are copies of 0 and 1, and 7 of 3, which has no weight; 8 has no KL, 9 was drawn elsewhere
    own = {(0.0, None): 4, (0.0, 2.0): 5, (0.3, None): 6, (0.3, 2.0): 7}[beta, cap]
    assert sum(went) == own * (2 if beta else 1)
    k3, drift = 0.0, []
    for i in range(len(ids)):
        at = slice(i, i + 1)
        one = loss.row_gradients(
            model, knobs, ids[at], mask[at], weight[at], kl_rows=kl_rows[at], drawn=drawn[at], **given
        )
        k3 += (one.kl or 0) * int(mask[i].sum()) * bool(kl_rows[i])
        drift.append(one.drift)
        torch.testing.assert_close(rows.objective[i], one.objective[0])
        for n in rows.G:
            torch.testing.assert_close(rows.G[n][i], one.G[n][0])
            torch.testing.assert_close(rows.policy[n][i], one.policy[n][0])
    torch.testing.assert_close(
        rows.drift.sort().values, torch.cat(drift).sort().values
    )  # each as often as it was drawn
    assert not beta or rows.kl == pytest.approx(k3 / int(mask[kl_rows].sum()))


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 3.0, 3.5]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_sum_to_zero_and_vanish_without_variance(rewards):
    R = torch.tensor(rewards)
    A = arms.advantages(R)
    assert A.sum(1).abs().max() < 1e-5
    assert ((A == 0).all(1) == (R[:, :1] == R).all(1)).all()
