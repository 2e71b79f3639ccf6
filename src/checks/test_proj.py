"""Projection: identities, gates, the null, and the arms' one mutation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo import arms, data_types, proj
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.config import PRESETS, UserError, VHackCfg
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.train import apply_step, make_optimizer

PLAIN = VHackCfg()


def basis(k: int, r: int, seed: int = 0, modules=("a", "b")) -> HackBasis:
    generator = torch.Generator().manual_seed(seed)
    V = {}
    for m in modules:
        q, _ = torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64))
        V[m] = q.T.contiguous()
    return HackBasis(V, {m: torch.ones(k, dtype=torch.float64) for m in modules}, {})


def test_split_by_hand():
    V = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    g = torch.tensor([3.0, -2.0, 5.0])
    kept, removed = proj.split(g, V)
    assert kept.tolist() == [0, -2, 5]
    assert removed.tolist() == [3, 0, 0]
    assert proj.split(g, V, "no_gate")[0].tolist() == [0, 0, 5]
    assert proj.split(g, V, "reverse")[0].tolist() == [-3, 2, 5]
    assert proj.split(g, V, "unsigned")[0].tolist() == [-1.5, -1, 5]
    assert proj.split(g, V, overshoot=2.0)[0].tolist() == [-3, -2, 5]


@given(
    st.integers(1, 4),
    st.integers(4, 12),
    st.integers(0, 10_000),
    st.sampled_from(["one_sided", "no_gate", "reverse", "unsigned"]),
)
def test_split_identities(k, r, seed, gate):
    V = basis(k, r, seed).V["a"]
    g = torch.randn(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept, removed = proj.split(g, V, gate)
    torch.testing.assert_close(kept + removed, g)
    torch.testing.assert_close(removed @ V.T @ V, removed, rtol=1e-9, atol=1e-12)  # removed ∈ span(V)
    c, c_kept = V @ g, V @ kept
    if gate == "one_sided":
        assert c_kept.max() <= 1e-9
        torch.testing.assert_close(c_kept, c.clamp(max=0), rtol=1e-9, atol=1e-9)
    elif gate == "no_gate":
        assert c_kept.abs().max() < 1e-9
    elif gate == "unsigned":
        torch.testing.assert_close(c_kept, -c.abs() / 2)
    else:
        torch.testing.assert_close(c_kept, -c)
        torch.testing.assert_close(kept.norm(), g.norm())


def test_a_one_sided_gate_makes_a_drift_of_noise_and_a_two_sided_one_does_not():
    """Descending n draws of N(0, 1) noise, an axis moves by n E[relu(z)] = n/√(2π) against V: other axes by √n."""
    n, r, k = 400, 40, 3
    V = {"a": basis(k, r).V["a"]}
    noise = torch.randn(n, r, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = lambda gate: {"a": -sum(proj.split(g, V["a"], gate)[0] for g in noise)}
    one, two, unsigned, none = moved("one_sided"), moved("no_gate"), moved("unsigned"), {"a": -noise.sum(0)}
    torch.testing.assert_close(
        V["a"] @ one["a"], torch.full((k,), n / (2 * torch.pi) ** 0.5).double(), rtol=0.15, atol=0
    )
    expected = (k * n / (2 * torch.pi) / (k * n / (2 * torch.pi) + r - k)) ** 0.5
    assert proj.share(one, V) == pytest.approx(expected, rel=0.05)
    assert proj.share(one, V) > 3 * proj.null_share(one, V)
    assert proj.share(none, V) < 1.7 * proj.null_share(none, V)
    assert proj.share(two, V) < 1e-9
    torch.testing.assert_close(V["a"] @ unsigned["a"], V["a"] @ one["a"], rtol=0.15, atol=0)


def rows(b: int = 6, r: int = 8, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    G = {m: torch.randn(b, r, generator=generator, dtype=torch.float64) for m in ("a", "b", "c")}
    return G, torch.tensor([True, True, True, True, False, False])


def project(G, V, is_student, name, cfg=PLAIN):
    sums = proj.sums(G, data_types.Factors.plain(len(is_student)), is_student)
    return proj.decided(sums, V, V, arms.arm(name), cfg)


@pytest.mark.parametrize("name", ["none", "erase", "route"])
def test_project_against_brute_force(name):
    """Module c has no axes. cin, cout and the students' share by the textbook formula, element by element."""
    G, is_student = rows()
    V = basis(2, 8)
    p = project(G, V, is_student, name)
    sums = {m: sum(g[i] for i in range(6)) for m, g in G.items()}
    students = {m: sum(g[i] for i in range(4)) for m, g in G.items()}

    def share(g):
        hack = sum(max(0.0, float(v @ g[m])) ** 2 for m in ("a", "b") for v in V.V[m])
        return (hack / sum(float((x**2).sum()) for x in g.values())) ** 0.5

    assert p.stats["cin"] == pytest.approx(share(sums))
    assert p.stats["cin_s"] == pytest.approx(share(students))
    assert p.stats["cout"] == pytest.approx(share(sums) if name == "none" else 0.0, abs=1e-12)
    torch.testing.assert_close(p.kept["c"], sums["c"])
    if name == "none":
        for m in G:
            torch.testing.assert_close(p.kept[m], sums[m])
    assert (p.quarantined is None) == (name != "route")
    if p.quarantined is not None:
        for m in sums:
            torch.testing.assert_close(p.kept[m] + p.quarantined[m], sums[m])


def test_preserve_magnitude():
    G, is_student = rows()
    p = project(G, basis(2, 8), is_student, "erase", VHackCfg(preserve_magnitude=True))
    for m in G:
        torch.testing.assert_close(p.kept[m].norm(), G[m].sum(0).norm())


def test_shares_of_an_empty_side_are_absent_not_zero():
    G, _ = rows()
    p = project(G, basis(2, 8), torch.ones(6, dtype=torch.bool), "erase")
    assert p.stats["cin_t"] is None
    assert p.stats["cin_s"] is not None


def test_null_is_the_mean_over_random_bases():
    G, _ = rows()
    g = {m: x.sum(0) for m, x in G.items()}
    V = basis(2, 8)
    draws = [proj.share(g, vhack.random_basis(V, seed).V) for seed in range(1000)]
    rms = (sum(d**2 for d in draws) / len(draws)) ** 0.5
    assert proj.null_share(g, V.V) == pytest.approx(rms, rel=0.04)


def test_random_basis_is_orthonormal_with_matched_k_and_another_draw_a_seed():
    V = basis(3, 8)
    first, second = vhack.random_basis(V, 1), vhack.random_basis(V, 2)
    for m, v in first.V.items():
        torch.testing.assert_close(v @ v.T, torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(v, second.V[m])


@pytest.mark.parametrize("name", ["none", "erase", "route", "random_V"])
def test_only_route_moves_the_quarantine(name, wrapped):
    _, knobs = wrapped
    knobs.load_state({n: torch.zeros_like(t) for n, t in knobs.state().items()})
    cfg = PRESETS["organism"][1]
    optimizer, scheduler = make_optimizer(knobs, cfg)
    generator = torch.Generator().manual_seed(0)
    G = {m: torch.randn(4, len(d), generator=generator, dtype=torch.float64) for m, d in knobs.delta.items()}
    V = HackBasis({m: basis(2, len(d), 7, (m,)).V[m] for m, d in knobs.delta.items()}, {}, {})
    for _ in range(3):
        p = project(G, V, torch.ones(4, dtype=torch.bool), name, cfg.vhack)
        apply_step(knobs, p, (optimizer, scheduler), cfg.rl.clip)
    quarantined = any(bool(d.any()) for d in knobs.delta_hack.values())
    assert quarantined == (name == "route")
    assert all(bool(d.any()) for d in knobs.delta.values())


def test_step_is_adamw_on_the_kept_gradient(wrapped):
    """The first AdamW step moves each coordinate by lr against its gradient's sign; clipping scales all alike."""
    _, knobs = wrapped
    cfg = PRESETS["organism"][1]
    optimizer, scheduler = make_optimizer(knobs, cfg)
    lr = scheduler.get_last_lr()[0]
    kept = {m: torch.randn_like(d) for m, d in knobs.delta.items()}
    descent = apply_step(knobs, data_types.Projection(kept, None, 50.0, 50.0, {}), (optimizer, scheduler), 1.0).descent
    for m, g in kept.items():
        torch.testing.assert_close(descent[m], lr * g.sign(), rtol=1e-4, atol=1e-8)


def test_unknown_arm_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'erase'"):
        arms.arm("eraze")
