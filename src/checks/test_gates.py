"""Gates, detectors and shaped rewards: each against a loop a reader can follow, or a case done by hand."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from projected_grpo import arms, detectors, metrics
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.config import VHackCfg
from projected_grpo.extract_vhack_grad import PairGrads, fit_basis, sliced, unit_rows

CFG = VHackCfg(k=2, n_heldout=0, drop_bottom_frac=0.0)


def some_pairs(n: int = 12, seed: int = 0) -> PairGrads:
    """Hack sides lean along e0 in module a; module b is noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda r: torch.randn(n, r, generator=generator, dtype=torch.float64)
    hack, clean = {"a": draw(6), "b": draw(4)}, {"a": draw(6), "b": draw(4)}
    hack["a"][:, 0] += 4
    return PairGrads(hack, clean)


def seen(rewards, flagged, group: int = 4, seed: int = 0) -> arms.Seen:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    A = arms.advantages(rewards.reshape(-1, group)).flatten()
    return arms.Seen(A, rewards, torch.tensor(flagged).bool(), group, torch.Generator().manual_seed(seed))


def test_row_scores_by_a_loop():
    N, V = some_pairs().hack, fit_basis(some_pairs(), CFG)
    got = detectors.row_scores(N, V).sum(0)
    for i in range(len(got)):
        norm = math.sqrt(sum(float((n[i] ** 2).sum()) for n in N.values()))
        want = sum(max(0.0, float(axis @ N[m][i])) for m, v in V.V.items() for axis in v) / norm
        assert got[i].item() == pytest.approx(want)


def test_unit_rows_have_norm_one_over_all_modules_and_zero_stays_zero():
    rows = unit_rows({"a": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[4.0], [0.0]])})
    torch.testing.assert_close(rows["a"], torch.tensor([[0.6, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows["b"], torch.tensor([[0.8], [0.0]]))


RULES_BY_HAND = {
    # rewards 4 0 0 0 | 2 2 0 0; flagged: rows 0, 1, 4
    "all": [1] * 8,
    "drop": [0, 1, 1, 1, 0, 1, 1, 1],  # row 1 is flagged but has A < 0
    "punish": [0, 0, 0, 0, -0.5, 1.5, -0.5, -0.5],
}


@pytest.mark.parametrize("rule", list(RULES_BY_HAND))
def test_rules_by_hand(rule):
    s = seen([4, 0, 0, 0, 2, 2, 0, 0], [1, 1, 0, 0, 1, 0, 0, 0])
    f = arms.factors(rule, s)
    torch.testing.assert_close(f.keep, torch.tensor(RULES_BY_HAND[rule], dtype=torch.float64))
    torch.testing.assert_close(f.whole, s.A if rule in arms.UNIT else torch.ones(8, dtype=torch.float64))


def test_every_rule_is_checked():
    assert {*RULES_BY_HAND, "coin", "count", "punish_count"} == set(arms.RULES)
    assert {arm.rows for arm in arms.ARMS.values()} <= set(arms.RULES)


two_groups = given(
    st.lists(st.sampled_from([0.0, 0.5, 3.5]), min_size=8, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.integers(0, 99),
)
"""Rewards and flags of eight rows, and a seed."""


@two_groups
def test_count_withholds_as_many_as_drop(rewards, flagged, seed):
    s = seen(rewards, flagged, seed=seed)
    drop, count = (arms.RULES[rule](s) for rule in ("drop", "count"))
    assert (drop == 0).sum() == (count == 0).sum()
    assert (s.A[count == 0] > 0).all()


@two_groups
def test_punish_count_is_punish_on_as_many_rows_drawn_anew(rewards, flagged, seed):
    s = seen(rewards, flagged, seed=seed)
    got = arms.RULES["punish_count"](s)
    n, rows = sum(flagged), torch.tensor(rewards, dtype=torch.float64)
    choices = [arms.advantages(rows.where(~torch.tensor([i in c for i in range(8)]), 0.0).reshape(2, 4)).flatten()
               for c in map(set, itertools.combinations(range(8), n))]  # fmt: skip
    assert any(torch.allclose(got, choice) for choice in choices)


def test_punish_count_draws_every_row_as_often():
    drawn = torch.zeros(8, dtype=torch.float64)
    for seed in range(400):
        s = seen([1.0] * 8, [True, True] + [False] * 6, seed=seed)
        drawn += (arms.RULES["punish_count"](s) < -1e-9).to(drawn)
    assert (drawn - 100).abs().max() < 40  # 400 draws of two of eight: 100 each, sd 8.7


def test_coin_is_fair():
    s = seen([1.0, 0.0] * 2000, [False] * 4000)
    assert arms.RULES["coin"](s).mean().item() == pytest.approx(0.5, abs=0.03)


def test_screened_advantages_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    rewards, out = torch.rand(5, 4, generator=generator), torch.rand(5, 4, generator=generator) < 0.4
    got = arms.advantages(rewards, out)
    for row in range(5):
        stay = [float(rewards[row, i]) for i in range(4) if not out[row, i]]
        for i in range(4):
            want = 0.0 if out[row, i] else float(rewards[row, i]) - sum(stay) / len(stay)
            assert got[row, i].item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 0.9])
def test_fisher_is_sklearns_shrunk_discriminant(shrinkage):
    rng = np.random.default_rng(0)
    hack, clean = rng.normal(0.3, 1, (30, 8)), rng.normal(0, 2, (30, 8))
    w = detectors.fisher(torch.tensor(hack), torch.tensor(clean), shrinkage).numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.5, 0.5])
    # sklearn standardises before it shrinks; on data of one scale for all features that is the same thing
    scale = np.sqrt(np.concatenate([hack - hack.mean(0), clean - clean.mean(0)]).var(0))
    reference.fit(np.concatenate([hack, clean]) / scale, [1] * 30 + [0] * 30)
    scaled = detectors.fisher(torch.tensor(hack / scale), torch.tensor(clean / scale), shrinkage).numpy()
    theirs = reference.coef_[0] / np.linalg.norm(reference.coef_[0])
    np.testing.assert_allclose(scaled, theirs, atol=1e-6)
    assert np.linalg.norm(w) == pytest.approx(1)


def test_crossfit_scores_each_pair_by_what_was_fitted_without_it():
    """On labels that mean nothing an in-sample threshold lies too low: the clean sides were fitted away from."""
    generator = torch.Generator().manual_seed(0)
    hack, clean = (torch.randn(60, 200, generator=generator) for _ in range(2))
    fresh = torch.randn(4000, 200, generator=generator)
    rate = {}
    for how in ("insample", "crossfit"):
        d = detectors.linear_detector(hack, clean, VHackCfg(calibration=how, threshold_sd=1.5))
        rate[how] = float((d(fresh) > d.threshold).double().mean())
    assert rate["crossfit"] == pytest.approx(1 - 0.933, abs=0.05)  # P(z > 1.5) = .067
    assert rate["insample"] > 2 * rate["crossfit"]


def test_gradient_detector_flags_hack_sides_and_a_random_v_does_not():
    pairs, held_out = some_pairs(24), some_pairs(40, seed=1)
    real = detectors.gradient_detector(pairs, lambda g: sliced(fit_basis(g, CFG), CFG), CFG)
    V = vhack.random_basis(fit_basis(pairs, CFG), 3)
    other = detectors.gradient_detector(pairs, lambda _: V, CFG)
    caught = [(d(held_out.hack) > d.threshold).double().mean().item() for d in (real, other)]
    false = [(d(held_out.clean) > d.threshold).double().mean().item() for d in (real, other)]
    assert caught[0] > 0.6
    assert caught[1] < 0.4
    assert max(false) < 0.25


def test_an_orthogonal_probe_does_not_tell_the_pairs_sides_apart():
    generator = torch.Generator().manual_seed(0)
    clean, noise, w = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((48, 8), (48, 8), (8,)))
    hack = clean + 3 * torch.eye(8, dtype=torch.float64)[0] + 0.1 * noise
    d = detectors.orthogonal(w / w.norm(), detectors.direction(hack, clean))
    assert d.norm() == pytest.approx(1)
    assert float((hack @ d).mean()) == pytest.approx(float((clean @ d).mean()))
    left = w - d * (w @ d)  # what was taken off lies along the difference alone
    assert abs(torch.cosine_similarity(left, detectors.direction(hack, clean), dim=0)) == pytest.approx(1)


def test_shuffled_pairs_swap_exactly_half():
    pairs = some_pairs(12)
    mixed = vhack.shuffled(pairs, 5)
    swapped = [bool((mixed.hack["a"][i] == pairs.clean["a"][i]).all()) for i in range(12)]
    assert sum(swapped) == 6
    for i, s in enumerate(swapped):
        assert torch.equal(mixed.clean["b"][i], (pairs.hack if s else pairs.clean)["b"][i])


@pytest.mark.parametrize("kind", ["random", "shuffled", "nonhack", "placebo"])
def test_control_bases_match_the_real_one_module_by_module(kind):
    cfg = VHackCfg(k=3, n_heldout=0, drop_bottom_frac=0.4)
    own, other = some_pairs(12), some_pairs(12, seed=9)
    real = sliced(fit_basis(own, cfg), cfg)
    control = vhack.basis_of(kind, real, own, other, cfg, seed=1)
    assert {m: len(v) for m, v in control.V.items()} == {m: len(v) for m, v in real.V.items()}
    for m, v in control.V.items():
        torch.testing.assert_close(v @ v.T, torch.eye(len(v), dtype=torch.float64), atol=1e-8, rtol=1e-8)
        assert not torch.allclose(v, real.V[m])


def test_rebound_by_hand():
    r, s = torch.tensor([[2.0, 2.0, 0.5, 0.0]]), torch.tensor([[3.0, 1.0, 1.0, -1.0]])
    z = arms.z_scores(s)
    torch.testing.assert_close(z, (s - 1) / math.sqrt(2))
    z0 = 2 / math.sqrt(2)
    factor = 1 - 2 / (1 + math.exp(-z0))
    torch.testing.assert_close(arms.rebound_mul(r, z, 2.0), torch.tensor([[2 * factor, 2.0, 0.5, 0.0]]))
    assert factor < 0, "at alpha 2 the multiplier turns the sign"
    assert (arms.z_scores(torch.full((1, 4), 3.0)) == 0).all()


@pytest.mark.parametrize("accuracy", [1.0, 0.9, 0.5])
def test_a_monitor_is_right_as_often_as_it_says(accuracy):
    class Rollout:
        def __init__(self, hacked):
            self.grade = type("Grade", (), {"exploited": hacked})()

    rng = random.Random(0)
    truth = [rng.random() < 0.3 for _ in range(4000)]
    flags = arms.monitor([Rollout(t) for t in truth], accuracy, torch.Generator().manual_seed(0))
    right = sum(bool(f) == t for f, t in zip(flags, truth, strict=True)) / len(truth)
    assert right == pytest.approx(accuracy, abs=0.025)


def test_pooled_states_by_a_loop(wrapped, batch):
    model, _ = wrapped
    ids, mask = batch
    readings = [detectors.LAST, detectors.MEAN, detectors.HELD_OUT]
    got = detectors.pooled(model, ids, mask, readings, micro_batch=3)
    assert detectors.hidden_layers(detectors.MEAN.depth, 4) == [3]
    assert detectors.hidden_layers(detectors.HELD_OUT.depth, 4) == [2]
    assert detectors.hidden_layers(detectors.MEAN.depth, 36) == [22, 23, 24, 25, 26, 27]
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
    for reading in readings:
        layers = detectors.hidden_layers(reading.depth, model.config.num_hidden_layers)
        for i in range(len(ids)):
            at = [t + 1 for t in range(mask.shape[1]) if mask[i, t]]
            h = sum(states[layer][i] for layer in layers) / len(layers)
            want = h[at[-1]] if reading.pool == "last" else h[at].mean(0)
            torch.testing.assert_close(got[reading][i], want.float(), rtol=1e-4, atol=1e-5)


def test_states_are_read_once_a_text_and_no_layer_deeper_than_asked(wrapped, batch):
    model, _ = wrapped
    ids, mask = (torch.cat([part, part[:3]]) for part in batch)
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: ran.append((i, len(out))))
        for i, layer in enumerate(model.get_decoder().layers, 1)
    ]
    got = detectors.pooled(model, ids, mask, [detectors.HELD_OUT])[detectors.HELD_OUT]
    assert ran == [(1, 4)], "one layer of two, four texts of seven"
    assert torch.equal(got[4:], got[:3])
    assert got[:4].unique(dim=0).shape == got[:4].shape
    ran.clear()
    deepest = detectors.pooled(model, ids, mask, [detectors.Reading("last", (1.0, 1.0))])
    assert [i for i, _ in ran] == [1, 2]
    [[_, h]] = deepest.items()
    with torch.no_grad():
        final = model.get_decoder()(input_ids=ids).last_hidden_state  # with the final norm, as ``hidden_states`` has it
    at = mask.shape[1] - mask.flip(1).int().argmax(1)
    torch.testing.assert_close(h, final[torch.arange(len(ids)), at].float(), rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert model.config.num_hidden_layers == 2


def test_no_arm_reads_what_the_held_out_probe_reads():
    for depth in (4, 8, 28, 36):
        watched = set(detectors.hidden_layers(detectors.HELD_OUT.depth, depth))
        for arm in arms.ARMS.values():
            for reading in detectors.readings_of(arm):
                assert not watched & set(detectors.hidden_layers(reading.depth, depth))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_sklearns(rows):
    scores, positive = torch.tensor([float(s) for s, _ in rows]), torch.tensor([p for _, p in rows])
    got = metrics.auroc(scores, positive)
    if positive.all() or not positive.any():
        assert got is None
    else:
        assert got == pytest.approx(roc_auc_score(positive, scores))


@pytest.mark.parametrize(("acting", "held_out", "says"), [
    ([9, 9, 1, 1], [9, 9, 1, 1], (1.0, 1.0)),  # both see the hacks
    ([1, 0, 1, 2], [9, 9, 1, 1], (0.0, 1.0)),  # the policy evades the detector that it is trained against
    ([1, 0, 1, 2], [0, 1, 2, 1], (0.0, 0.0)),  # it hides from both
])  # fmt: skip
def test_evading_and_hiding_are_told_apart_on_a_planted_case(acting, held_out, says):
    """Rows 0 and 1 fool their channel; a fifth row is the teacher's and counts for neither."""
    row = lambda fools: SimpleNamespace(grade=SimpleNamespace(channel=fools))
    made = SimpleNamespace(
        batch=SimpleNamespace(is_student=torch.tensor([True] * 4 + [False]),
                              rollouts=[row(i in (0, 1, 4)) for i in range(5)]),
        scores=torch.ones(3, 5), A=torch.ones(5), factors=arms.Factors(torch.ones(5), torch.ones(5)),
        acting=torch.tensor([*acting, 0.0]), flagged=torch.tensor([*acting, 0.0]) > 5,
        held_out=torch.tensor([*held_out, 0.0]), held_out_threshold=5.0,
    )  # fmt: skip
    found = metrics.detection(made)
    assert (found["caught"], found["caught_held_out"]) == says
    assert (found["auroc"] == 1, found["auroc_held_out"] == 1) == (says[0] == 1, says[1] == 1)
