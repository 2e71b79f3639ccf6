"""The hack direction: what V means, how it is oriented, what its cache is keyed by."""

import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from projected_grpo import antipasto, loss, models, pairs, problems
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.config import PRESETS, ModelCfg, UserError, VHackCfg

CFG = PRESETS["organism"][1]


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    model, tokenizer = models.load(ModelCfg())
    knobs = antipasto.wrap(model, cache)
    return model, tokenizer, knobs, pairs.load(CFG.vhack, None, []), replace(CFG, outputs=str(cache))


@pytest.fixture(scope="module")
def basis(organism):
    model, tokenizer, knobs, chosen, cfg = organism
    return extract(model, knobs, tokenizer, chosen, cfg)


def extract(model, knobs, tokenizer, chosen, cfg) -> vhack.HackBasis:
    return vhack.fit_basis(vhack.side_gradients(model, knobs, tokenizer, chosen, cfg), cfg.vhack)


def margin(organism, chosen) -> float:
    """mean log p(hack) − log p(clean) of pairs at the knobs as they stand."""
    model, tokenizer, _, _, _ = organism
    prompts = [problems.encode_prompt(tokenizer, p.task) for p in chosen] * 2
    sides = [p.hack for p in chosen] + [p.clean for p in chosen]
    written = [[*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id] for t in sides]
    ids, mask = loss.collate(prompts, written, tokenizer.pad_token_id, model.device)
    with torch.no_grad():
        logp = loss.token_logprobs(model, ids, mask)
    total = torch.zeros(len(ids)).index_add(0, mask.nonzero()[:, 0], logp)
    return float((total[: len(chosen)] - total[len(chosen) :]).mean())


@pytest.mark.parametrize("axis", [0, None])
def test_descending_along_v_makes_the_hack_more_likely(organism, basis, axis):
    """δS ← δS − η V raises log p(hack) − log p(clean) on pairs that V never saw; stepping the other way lowers it."""
    _, _, knobs, chosen, cfg = organism
    held_out = chosen[-cfg.vhack.n_heldout :]
    at_rest = margin(organism, held_out)
    moved = {}
    for sign in (1, -1):
        for name, v in basis.V.items():
            knobs.modules[name].delta.data = -sign * 0.02 * (v[0] if axis == 0 else v.sum(0))
        knobs.merge()
        moved[sign] = margin(organism, held_out)
    for m in knobs.modules.values():
        m.delta.data.zero_()
    knobs.merge()
    assert moved[1] > at_rest > moved[-1]


def test_held_out_pairs_project_hackward(basis):
    assert basis.meta["heldout_accuracy"] >= 0.75
    assert basis.meta["n_pairs"] == 64


def test_labels_swapped_turn_v_around(organism, basis):
    model, tokenizer, knobs, chosen, cfg = organism
    swapped = [replace(p, hack=p.clean, clean=p.hack) for p in chosen]
    other = extract(model, knobs, tokenizer, swapped, cfg)
    for m, v in basis.V.items():
        assert torch.sum(v[0] * other.V[m][0]) < -0.99


def test_fit_by_hand():
    """Four pairs along +e0 and one along −e0, twice as long: the majority orients the axis, not the outlier."""
    D = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [1, -0.1, 0], [1, 0, 0.0], [-2, 0, 0]])
    V, S, vote = (part["m"] for part in vhack.fit({"m": D}, k=2, tau_axis=0.0))
    assert V[0, 0] == pytest.approx(1.0, abs=1e-3)
    assert vote[0] == pytest.approx(3 / 5)
    torch.testing.assert_close(V @ V.T, torch.eye(2), atol=1e-5, rtol=1e-5)
    cut, S_cut, _ = (part["m"] for part in vhack.fit({"m": D}, k=2, tau_axis=0.5))
    assert S_cut[1] == 0
    assert (cut[1] == 0).all()
    assert S[1] > 0


def test_modules_are_fitted_together_as_they_are_alone():
    """To the bit on a CPU, whatever their widths and their order; by Gram matrices, as on a GPU, to some digits."""
    torch.manual_seed(0)
    fall = torch.logspace(0, -2, 20)[:, None]
    D = {f"m{i}": torch.randn(20, width) * fall for i, width in enumerate((30, 8, 30, 8))}
    V, S, votes = vhack.fit(D, 5, 0.1)
    assert list(V) == list(S) == list(votes) == list(D)
    for m, d in D.items():
        for part, alone in zip((V, S, votes), vhack.fit({m: d}, 5, 0.1), strict=True):
            assert torch.equal(part[m], alone[m])
        _, exact_S, exact = torch.linalg.svd(d, full_matrices=False)
        gram, gram_S = (t[0] for t in vhack.gram_axes(d[None], 5))
        torch.testing.assert_close(gram_S, exact_S[:5], rtol=1e-5, atol=0)
        torch.testing.assert_close((gram * exact[:5]).sum(1).abs(), torch.ones(5), rtol=1e-5, atol=0)
    flat = torch.outer(torch.ones(4), torch.tensor([3.0, 4.0]))
    gram, gram_S = vhack.gram_axes(torch.stack([flat, 0 * flat]), 2)
    torch.testing.assert_close(gram_S, torch.tensor([[10.0, 0.0], [0.0, 0.0]]))
    assert not gram[0, 1].any()
    assert not gram[1].any()


def test_the_lots_of_the_config_are_those_of_the_extraction(organism, monkeypatch):
    model, tokenizer, knobs, chosen, cfg = organism
    sizes, plain = [], loss.lots
    monkeypatch.setattr(loss, "lots", lambda *args: (made := plain(*args), sizes.append((args[3], len(made))))[0])
    few, whole = (replace(cfg, rl=replace(cfg.rl, lot_tokens=n)) for n in (300, None))
    a, b = (vhack.side_gradients(model, knobs, tokenizer, chosen[:3], c) for c in (few, whole))
    assert [tokens for tokens, _ in sizes] == [300, loss.LOT_TOKENS]
    assert sizes[0][1] > sizes[1][1] == 1
    for m, g in a.hack.items():
        torch.testing.assert_close(g, b.hack[m], rtol=1e-3, atol=1e-6)


def test_gradients_are_taken_at_the_runs_temperature(organism):
    """As the policy's own are: of log-probs whose logits were divided by it."""
    model, tokenizer, knobs, chosen, cfg = organism
    warm = replace(cfg, rl=replace(cfg.rl, temperature=0.7))
    ids, mask = vhack.encoded(tokenizer, chosen[:2], model.device)
    weight = torch.full((4,), 1 / cfg.rl.max_new)
    with knobs.using("deployed"):
        expected = loss.row_gradients(model, knobs, ids, mask, weight, temperature=0.7).G
    got, cold = (vhack.side_gradients(model, knobs, tokenizer, chosen[:2], c) for c in (warm, cfg))
    for m, g in got.hack.items():
        torch.testing.assert_close(g, expected[m][:2])
    assert any(not torch.allclose(g, cold.hack[m], rtol=1e-2) for m, g in got.hack.items())


def test_global_noise_floor_and_k_slice():
    S = {"a": torch.tensor([10.0, 5.0, 1.0]), "b": torch.tensor([4.0, 0.5, 0.1]), "c": torch.tensor([0.2, 0.2, 0.2])}
    whole = vhack.HackBasis({m: torch.eye(3) for m in S}, S, {})
    used = vhack.sliced(whole, VHackCfg(k_use=2, drop_bottom_frac=0.5))
    assert {m: len(v) for m, v in used.V.items()} == {"a": 2, "b": 1}  # the floor is the median of six: 2.25
    assert vhack.sliced(whole, VHackCfg(drop_bottom_frac=0.0)).V.keys() == S.keys()


def test_overlap_is_one_with_itself_and_small_at_random(basis):
    assert vhack.basis_overlap(basis, basis) == (pytest.approx(1.0, abs=1e-4), 0.0)
    assert vhack.basis_overlap(vhack.random_basis(basis, 1), basis)[0] < 0.2
    about = replace(basis, V={m: -v if i % 2 else v for i, (m, v) in enumerate(basis.V.items())})
    turned = sum(len(v) for v in list(basis.V.values())[1::2]) / sum(map(len, basis.V.values()))
    assert vhack.basis_overlap(about, basis) == (pytest.approx(1.0, abs=1e-4), pytest.approx(turned))


def test_cache_key_follows_every_ingredient(organism):
    _, tokenizer, knobs, chosen, cfg = organism
    key = vhack.cache_key(knobs, tokenizer, chosen, cfg)
    assert key == vhack.cache_key(knobs, tokenizer, list(chosen), cfg)
    others = [
        vhack.cache_key(knobs, tokenizer, chosen[:-1], cfg),
        vhack.cache_key(knobs, tokenizer, [replace(chosen[0], hack=chosen[0].hack + " "), *chosen[1:]], cfg),
        vhack.cache_key(knobs, tokenizer, chosen, replace(cfg, vhack=replace(cfg.vhack, length_norm="mean"))),
        vhack.cache_key(knobs, tokenizer, chosen, replace(cfg, rl=replace(cfg.rl, max_new=80))),
        vhack.cache_key(knobs, tokenizer, chosen, replace(cfg, rl=replace(cfg.rl, temperature=0.7))),
    ]
    module = next(iter(knobs.modules.values()))
    for part in (module.U, module.delta):
        kept = part.data.clone()
        part.data.view(-1)[0] += 1e-3
        others.append(vhack.cache_key(knobs, tokenizer, chosen, cfg))
        part.data.copy_(kept)
    for of in (lambda m: next(iter(antipasto.targets(m).values())), lambda m: m.get_input_embeddings()):
        changed, _ = models.load(ModelCfg())
        of(changed).weight.data[0, 0] += 1e-3  # of the embeddings, which have no adapter, as well
        others.append(vhack.cache_key(antipasto.wrap(changed, cfg.cache), tokenizer, chosen, cfg))
    assert len({key, *others}) == 10
    fits = replace(cfg, vhack=replace(cfg.vhack, k=4, tau_axis=0.1))
    assert key == vhack.cache_key(knobs, tokenizer, chosen, fits)


def test_cache_misses_then_hits_and_what_is_damaged_is_a_miss(organism, monkeypatch):
    model, tokenizer, knobs, chosen, cfg = organism
    made = deepcopy(vhack.grads_for(model, knobs, tokenizer, chosen, cfg))  # what is loaded lies in the file
    files = list((cfg.cache / "vhack").iterdir())
    again = deepcopy(vhack.grads_for(model, knobs, tokenizer, chosen, cfg))
    assert list((cfg.cache / "vhack").iterdir()) == files
    assert len(files) == 1
    whole = files[0].read_bytes()
    monkeypatch.setattr(vhack, "side_gradients", lambda *_: made)
    for size in (len(whole) - 4, 7, 0):
        os.truncate(files[0], size)
        vhack.grads_for(model, knobs, tokenizer, chosen, cfg)
        assert files[0].read_bytes() == whole
    for side in ("hack", "clean"):
        assert all(torch.equal(g, getattr(again, side)[m]) for m, g in getattr(made, side).items())


def test_gradients_of_another_model_are_refused(organism, tmp_path, wrapped):
    model, tokenizer, knobs, chosen, cfg = organism
    path = tmp_path / "v.safetensors"
    vhack.save(vhack.side_gradients(model, knobs, tokenizer, chosen[:2], cfg), path)
    with pytest.raises(UserError, match="another model"):
        vhack.load(path, wrapped[1])


def test_a_pair_with_a_nonfinite_nll_is_named(organism):
    model, tokenizer, knobs, chosen, cfg = organism
    token = tokenizer.encode("Ω", add_special_tokens=False)[0]  # a byte that no other pair holds
    bad = replace(chosen[3], hack=chosen[3].hack + "Ω", name="the bad one")

    def poison(_module, args, out):
        return out.masked_fill((args[0] == token)[..., None], float("nan"))

    hook = model.get_input_embeddings().register_forward_hook(poison)
    try:
        with pytest.raises(UserError, match=r"the bad one \(hack side\)"):
            vhack.side_gradients(model, knobs, tokenizer, [*chosen[:3], bad], cfg)
    finally:
        hook.remove()


def test_the_quarantine_is_ablated_during_extraction(organism, basis):
    model, tokenizer, knobs, chosen, cfg = organism
    for m in knobs.modules.values():
        m.delta_hack.data.normal_(0, 0.1)
    knobs.merge()
    with_quarantine = extract(model, knobs, tokenizer, chosen, cfg)
    for m in knobs.modules.values():
        m.delta_hack.data.zero_()
    knobs.merge()
    assert all(torch.equal(with_quarantine.V[m], basis.V[m]) for m in basis.V)


def test_too_few_pairs_is_one_clear_line(organism):
    model, tokenizer, knobs, chosen, cfg = organism
    with pytest.raises(UserError, match="lower --k"):
        extract(model, knobs, tokenizer, chosen[:10], cfg)
