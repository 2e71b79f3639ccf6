"""The adapter: identity at zero, the closed-form gradient by three routes, merging, ablation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from projected_grpo import antipasto, loss, models
from projected_grpo.config import UserError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_identical_at_zero(dtype, cache, batch):
    ids, _ = batch
    model = tiny_model(dtype)
    base = model(ids).logits
    knobs = antipasto.wrap(model, cache)
    assert torch.equal(model(ids).logits, base)
    knobs.merge()
    assert torch.equal(model(ids).logits, base)
    with torch.no_grad():  # also when W' is really formed: a gain that cancels
        for m in knobs.modules.values():
            m.delta.fill_(0.5)
            m.delta_hack.fill_(-0.5)
    knobs.merge()
    assert torch.equal(model(ids).logits, base)
    with knobs.row_gradients(len(ids)):  # and through the training path
        assert torch.equal(model(ids).logits, base)


def hook_form(module: antipasto.AntipastoLinear, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """y = W x + U((δS + δS_hack + ε_i) ⊙ (Vh x)), written with ordinary operations that autograd differentiates."""
    gain = module.delta + module.delta_hack + eps
    return module.linear(x) + (F.linear(x, module.Vh) * gain[:, None, :]) @ module.U.T


def test_closed_form_is_autograd_of_the_hook_form(wrapped, batch, monkeypatch):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    closed = loss.row_gradients(model, knobs, ids, mask, weight)
    monkeypatch.setattr(antipasto.AntipastoLinear, "forward", lambda m, x: hook_form(m, x, m.eps))
    hooked = loss.row_gradients(model, knobs, ids, mask, weight)
    torch.testing.assert_close(hooked.objective, closed.objective, rtol=1e-9, atol=0)
    for name, g in closed.G.items():
        torch.testing.assert_close(g, hooked.G[name], rtol=1e-7, atol=1e-10)


def test_closed_form_is_the_finite_difference(exact_norm, wrapped, batch):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    grads = loss.row_gradients(model, knobs, ids, mask, weight).G
    row = mask.nonzero()[:, 0]

    def value() -> float:
        knobs.merge()
        return -(weight[row] * loss.token_logprobs(model, ids, mask)).sum().item()

    for name in list(knobs.modules)[::5]:
        delta, axis, h = knobs.modules[name].delta, 2, 1e-5
        with torch.no_grad():
            delta[axis] += h
            up = value()
            delta[axis] -= 2 * h
            down = value()
            delta[axis] += h
        assert (up - down) / (2 * h) == pytest.approx(grads[name].sum(0)[axis].item(), rel=1e-6, abs=1e-8)


def test_rows_sum_to_the_batch_gradient_and_micro_batches_agree(wrapped, batch):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    whole = loss.row_gradients(model, knobs, ids, mask, weight)
    small = loss.row_gradients(model, knobs, ids, mask, weight, micro_batch=3)
    for i in range(len(ids)):  # each row alone: nothing of another row leaks into it
        alone = loss.row_gradients(model, knobs, ids[i : i + 1], mask[i : i + 1], weight[i : i + 1])
        for name, g in whole.G.items():
            torch.testing.assert_close(g[i], alone.G[name][0], rtol=1e-6, atol=1e-9)
    for name, g in whole.G.items():
        torch.testing.assert_close(g, small.G[name], rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_gives_the_same_gradient(wrapped, batch):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.ones(4, dtype=torch.float64)
    plain = loss.row_gradients(model, knobs, ids, mask, weight)
    models.recompute(model, on=True)
    calls = []
    knobs.modules["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *_: calls.append(1))
    again = loss.row_gradients(model, knobs, ids, mask, weight)
    assert len(calls) == 2  # forward, and again in the backward
    assert not model.training
    for name, g in plain.G.items():
        torch.testing.assert_close(g, again.G[name])


def test_bf16_gradient_points_where_the_exact_one_does(cache, batch):
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0])
    exact, rough = tiny_model(), tiny_model(torch.bfloat16)
    g64 = loss.row_gradients(exact, antipasto.wrap(exact, cache), ids, mask, weight.double()).G
    g16 = loss.row_gradients(rough, antipasto.wrap(rough, cache), ids, mask, weight).G
    flat64, flat16 = (torch.cat([g.flatten().double() for g in G.values()]) for G in (g64, g16))
    assert F.cosine_similarity(flat64, flat16, dim=0) > 0.99
    assert next(iter(g16.values())).dtype is torch.float32


def test_merged_weight_equals_hook_form(wrapped):
    _, knobs = wrapped
    for m in knobs.modules.values():
        x = torch.randn(2, 5, m.linear.in_features, dtype=torch.float64)
        eps = torch.zeros(2, len(m.delta), dtype=torch.float64)
        torch.testing.assert_close(m(x), hook_form(m, x, eps), rtol=1e-10, atol=1e-10)


def test_ablation_contexts(wrapped, batch):
    model, knobs = wrapped
    ids, _ = batch
    trained = model(ids).logits
    base = tiny_model()(ids).logits
    with knobs.using("base"):
        assert torch.equal(model(ids).logits, base)
    only_delta = copy.deepcopy(knobs.state())
    with knobs.using("deployed"):
        deployed = model(ids).logits
    assert torch.equal(model(ids).logits, trained)
    assert not torch.allclose(deployed, trained)
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta_hack.zero_()
    knobs.merge()
    assert torch.equal(model(ids).logits, deployed)
    knobs.load_state(only_delta)
    assert torch.equal(model(ids).logits, trained)


def test_stochastic_rounding_keeps_small_gains_on_average():
    w = torch.full((400, 400), 1.0)
    step = 2.0**-10  # an eighth of bfloat16's unit at 1: rounding to nearest would lose it
    assert (w + step).to(torch.bfloat16).float().mean() == 1.0
    rounded = antipasto.round_stochastic(w + step, torch.bfloat16, seed=0).float()
    assert rounded.mean().item() - 1 == pytest.approx(step, rel=0.05)
    assert torch.equal(antipasto.round_stochastic(-w, torch.bfloat16, 0), (-w).to(torch.bfloat16))


def test_layer_window_and_rank(cache):
    model = tiny_model(layers=4)
    knobs = antipasto.wrap(model, cache, layers=(0.5, 1.0), svd_rank=3)
    assert {n.split(".")[2] for n in knobs.modules} == {"2", "3"}
    assert {len(m.delta) for m in knobs.modules.values()} == {3}
    with pytest.raises(UserError, match="widen --layers"):
        antipasto.wrap(tiny_model(), cache, layers=(0.9, 0.95))


def test_w_prime_is_formed_once_for_the_same_gains(wrapped, monkeypatch):
    """The base needs none, and coming back to the knobs as they stand needs no new one."""
    model, knobs = wrapped
    formed, form = [], antipasto.round_stochastic
    monkeypatch.setattr(antipasto, "round_stochastic", lambda *args: formed.append(1) or form(*args))
    expected, held = model(torch.arange(2, 12)[None]).logits, [m.merged for m in knobs.modules.values()]
    knobs.merge()
    with knobs.using("base"):
        base = model(torch.arange(2, 12)[None]).logits
        assert all(m.merged is None and m.acting is None for m in knobs.modules.values())
    assert not torch.equal(base, expected)
    assert torch.equal(model(torch.arange(2, 12)[None]).logits, expected)
    assert all(m.merged is before for m, before in zip(knobs.modules.values(), held, strict=True))
    assert not formed
    with knobs.using("deployed"):
        assert len(formed) == len(held)
    assert len(formed) == 2 * len(held)
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta_hack.zero_()
    knobs.merge()
    formed.clear()
    with knobs.using("deployed"):  # the quarantine is empty: the same gains
        pass
    assert not formed
