"""The benchmark's reference: the hook form says what the fast path says, in float64."""

import pytest
import torch
from conftest import tiny_model

from projected_grpo import loss, rollout
from projected_grpo.bench import reference
from projected_grpo.bench.memory import full_logits_gradients
from projected_grpo.bench.reference import HookForm
from projected_grpo.data_types import Sampling

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]


@pytest.fixture
def hook(wrapped):
    return HookForm(tiny_model(), wrapped[1])


def test_merged_logits_are_the_hook_forms(wrapped, batch, hook):
    ids, _ = batch
    plain = tiny_model()(ids).logits
    merged, hooked = wrapped[0](ids).logits, hook.model(ids).logits
    torch.testing.assert_close(merged, hooked, rtol=1e-5, atol=1e-6)  # transformers' norms go through float32
    assert (merged - plain).abs().max() > 100 * (merged - hooked).abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_backward_gives_both_of_the_references_gradients(exact_norm, wrapped, batch, hook, temperature):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    is_student = torch.tensor([True, False, True, False])
    two = hook.two_backwards(ids, mask, weight, is_student, temperature)
    G = loss.row_gradients(model, knobs, ids, mask, weight, temperature=temperature).G
    for name, g in G.items():
        ours = torch.stack([g[is_student].sum(0), g[~is_student].sum(0)])
        torch.testing.assert_close(ours, two[name], rtol=1e-9, atol=1e-12)
        assert (two[name] != 0).any(1).all()


def test_full_logits_give_the_same_row_gradients(wrapped, batch):
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    G = loss.row_gradients(model, knobs, ids, mask, weight).G
    for name, g in full_logits_gradients(model, knobs, ids, mask, weight).items():
        torch.testing.assert_close(G[name], g, rtol=1e-6, atol=1e-9)


def test_full_fine_tunings_gradient_holds_ours(exact_norm, wrapped, batch):
    """∂L/∂δ = diag(Uᵀ (∂L/∂W) Vhᵀ): the floor differentiates the same loss."""
    model, knobs = wrapped
    ids, mask = batch
    weight = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    merged = tiny_model().requires_grad_(False)
    with torch.no_grad():
        for name, m in knobs.modules.items():
            merged.get_submodule(name).weight.copy_(m.merged)
    dW = reference.full_gradient(merged, list(knobs.modules), ids, mask, weight)
    G = loss.row_gradients(model, knobs, ids, mask, weight).G
    for name, m in knobs.modules.items():
        torch.testing.assert_close(G[name].sum(0), torch.einsum("or,oi,ri->r", m.U, dW[name], m.Vh))


def test_same_seed_same_rollouts_in_either_form(wrapped, hook):
    """Merged weights and our sampler against hooks and transformers' generate, a prompt at a time."""
    model, _ = wrapped
    for prompt in PROMPTS:
        ours = [
            rollout.sample(model, [prompt], 5, Sampling(20, (1,), 0), torch.Generator().manual_seed(7))
            for _ in range(2)
        ]
        torch.manual_seed(7)
        ids = [list(row.ids) for row in ours[0]]
        assert ours[0] == ours[1]
        assert ids == hook.sample([prompt], 5, Sampling(20, (1,), 0))


def test_lots_hold_every_row_once_and_like_lengths_together():
    ends = [3, 9, 4, 4, 8, 2]
    mask = torch.tensor([[t < end for t in range(10)] for end in ends])
    assert [lot.tolist() for lot in loss.lots(mask, torch.arange(6), 64, 12)] == [[1], [4], [2, 3, 0], [5]]
    assert [lot.tolist() for lot in loss.lots(mask, torch.tensor([0, 2, 5]), 2, 12)] == [[2, 0], [5]]
    assert loss.lots(mask, torch.tensor([], dtype=torch.long), 64, 12) == []
