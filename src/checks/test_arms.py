"""Every arm's update on a tiny case, against one written out longhand; and adding an arm as the docs show it.

The tiny case: four rollouts in two groups of two, two modules of four and three knobs, a V of two axes in the first
module and one in the second. The longhand version uses Python floats and the arm's one line of math.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import ranks_worker
import torch
from ranks_worker import CFG

from projected_grpo import arms, data_types, loss, proj
from projected_grpo.antipasto import Knobs
from projected_grpo.arms import ARMS, Arm
from projected_grpo.config import PRESETS, VHackCfg
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.train import apply_step, clip_scale, make_optimizer, one_step

WIDTHS = {"a": 4, "b": 3}
REWARDS = torch.tensor([3.5, 0.0, 0.5, 3.5], dtype=torch.float64)
A = torch.tensor([1.75, -1.75, -1.5, 1.5], dtype=torch.float64)
FLAGGED = torch.tensor([True, True, False, False])
STUDENT = torch.ones(4, dtype=torch.bool)
BY_ROW = {rule for rule in arms.RULES if rule not in ("coin", "count", "punish_count")}


def tiny() -> tuple[dict[str, torch.Tensor], HackBasis, HackBasis]:
    """NLL gradients of the rows, the arm's V, and the real V."""
    generator = torch.Generator().manual_seed(4)
    N = {m: torch.randn(4, r, generator=generator, dtype=torch.float64) for m, r in WIDTHS.items()}

    def basis(seed: int) -> HackBasis:
        g = torch.Generator().manual_seed(seed)
        V = {m: torch.linalg.qr(torch.randn(WIDTHS[m], k, generator=g, dtype=torch.float64))[0].T
             for m, k in (("a", 2), ("b", 1))}  # fmt: skip
        return HackBasis({m: v.contiguous() for m, v in V.items()}, {}, {})

    return N, basis(1), basis(2)


def dot(x, y) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def erased(g: dict, V: HackBasis) -> dict:
    """g − Σ_axes max(0, v·g) v, module by module, in floats."""
    out = {m: list(x) for m, x in g.items()}
    for m, axes in V.V.items():
        for v in axes.tolist():
            c = max(0.0, dot(v, g[m]))
            out[m] = [o - c * e for o, e in zip(out[m], v, strict=True)]
    return out


def norm(g: dict) -> float:
    return sum(x * x for row in g.values() for x in row) ** 0.5


def minus(g: dict, h: dict) -> dict:
    return {m: [a - b for a, b in zip(g[m], h[m], strict=True)] for m in g}


def scaled(g: dict, s: float) -> dict:
    return {m: [s * x for x in row] for m, row in g.items()}


def longhand(arm: Arm, N, V: HackBasis, real: HackBasis) -> tuple[dict, dict | None]:
    """(what δS descends, what δS_hack descends) by the arm's definition."""
    advantage = A.tolist()
    match arm.rows:
        case "drop":  # row 0 is flagged and has A > 0; row 1 is flagged and has A < 0
            advantage[0] = 0.0
        case "punish":  # rewards 0 0 | .5 3.5
            advantage = [0.0, 0.0, -1.5, 1.5]
    total = lambda w: {m: [dot(w, N[m][:, j].tolist()) for j in range(WIDTHS[m])] for m in WIDTHS}
    g = kept = total(advantage)
    match arm.act:
        case "erase" | "route":
            kept = erased(g, V)
        case "erase_mass":
            away = minus(g, erased(g, V))
            kept = minus(g, scaled(away, norm(minus(g, erased(g, real))) / norm(away)))
        case "shrink":
            kept = scaled(g, norm(erased(g, real)) / norm(g))
    return kept, (minus(g, kept) if arm.act == "route" else None)


@pytest.mark.parametrize("name", [n for n, arm in ARMS.items() if arm.rows in BY_ROW])
def test_an_arm_descends_what_its_line_says(name):
    arm = ARMS[name]
    N, V, real = tiny()
    seen = arms.Seen(A, REWARDS, FLAGGED, 2, torch.Generator().manual_seed(0))
    f = arms.factors(arm.rows, seen)
    G = N if arm.rows in arms.UNIT else {m: n * A[:, None] for m, n in N.items()}
    p = proj.decided(proj.sums(G, f, STUDENT), V, real, arm, VHackCfg())
    kept, quarantined = longhand(arm, N, V, real)
    for m in WIDTHS:
        torch.testing.assert_close(p.kept[m], torch.tensor(kept[m], dtype=torch.float64))
    assert (p.quarantined is None) == (quarantined is None)
    if quarantined is not None:
        for m in WIDTHS:
            torch.testing.assert_close(p.quarantined[m], torch.tensor(quarantined[m], dtype=torch.float64))
    whole = {m: (A @ n).tolist() for m, n in N.items()}
    assert p.gn == pytest.approx(norm(whole)), "gn is of the plain gradient, whatever the arm"


@pytest.mark.parametrize("name", list(ARMS))
def test_rows_are_complete_and_controls_exist(name):
    arm = ARMS[name]
    assert arm.math
    assert arm.H
    assert arm.source
    if arm.coin is not None:
        assert ARMS[arm.coin].rows in ("coin", "count", "punish_count")
        assert ARMS[arm.coin].reward == arm.reward
    if arm.control is not None:
        control = ARMS[arm.control]
        assert control.basis in ("random", "shuffled")
        assert (control.act, control.rows, control.reward) == (arm.act, arm.rows, arm.reward) or name == "gate_act"


@pytest.mark.parametrize("name", ["none", "gate_drop", "gate_act_punish"])
def test_a_step_with_a_kl_multiplies_the_policys_term_alone(name, cache, monkeypatch):
    """What δS descends is autograd's gradient of −Σ w_i Σ_t log π + β Σ K3 over student rows, w the advantages after
    the arm's rule; scores are those of a step without a KL; and the base's log-probs come from one pass over all lots.
    """
    arm, of_base = ARMS[name], []
    plain = replace(CFG, rl=replace(CFG.rl, importance_cap=None))
    cfg = replace(plain, rl=replace(plain.rl, beta=0.3))
    b = ranks_worker.batch(ranks_worker.rollouts(), slice(0, 16))

    def step(cfg):
        x = ranks_worker.experiment(cache, arm)
        return x, one_step(
            x, arm, lambda: b, lambda p: apply_step(x.knobs, p, make_optimizer(x.knobs, cfg), 1.0), cfg, 0
        )

    _, without = step(plain)
    using = Knobs.using
    monkeypatch.setattr(Knobs, "using", lambda knobs, use: of_base.append(use) or using(knobs, use))
    _, made = step(cfg)
    assert of_base == ["base"]
    assert len(loss.lots(b.mask, torch.arange(16), cfg.rl.micro_batch)) > 2
    x = ranks_worker.experiment(cache, arm)
    with torch.no_grad(), using(x.knobs, "base"):
        reference = loss.token_logprobs(x.model, b.ids, b.mask)
    w = made.factors.keep * (1 if arm.rows in arms.UNIT else made.A) * ~made.masked
    assert w.unique().numel() > 2
    row = b.mask.nonzero()[:, 0]
    with x.knobs.row_gradients(16) as eps:
        logp = loss.token_logprobs(x.model, b.ids, b.mask)
        d, in_kl = reference - logp, (b.is_student & ~made.masked)[row]
        (-(w[row] * logp).sum() + 0.3 * ((d.exp() - d - 1) * in_kl).sum()).div(cfg.loss_denominator).backward()
        for m, e in eps.items():
            torch.testing.assert_close(made.projection.kept[m], e.grad.sum(0), rtol=1e-5, atol=1e-9)
            assert not torch.allclose(without.projection.kept[m], e.grad.sum(0))
    torch.testing.assert_close(made.scores, without.scores)
    torch.testing.assert_close(made.acting, without.acting)


def test_an_all_zero_update_of_nothing_but_flagged_rows_is_no_step():
    """Where every row is withheld δS stays, and the gradient's own norm is still reported."""
    N, V, real = tiny()
    seen = arms.Seen(A, REWARDS, torch.ones(4, dtype=torch.bool), 2, torch.Generator())
    f = arms.factors("punish", seen)
    p = proj.decided(proj.sums(N, f, STUDENT), V, real, ARMS["gate_act_punish"], VHackCfg())
    assert all(not k.any() for k in p.kept.values())
    assert p.gn > p.acted_on == 0


def test_clipping_bounds_what_a_rule_learns_from_where_plain_grpo_learns_nothing():
    """Groups that were paid alike, one rollout of each punished: the whole gradient is 0 and the arm's is not."""
    N, V, real = tiny()
    seen = arms.Seen(torch.zeros(4), torch.full((4,), 3.5), torch.tensor([True, False] * 2), 2, torch.Generator())
    p = proj.decided(proj.sums(N, arms.factors("punish", seen), STUDENT), V, real, ARMS["gate_act_punish"], VHackCfg())
    assert p.gn == 0
    assert p.acted_on == pytest.approx(norm({m: k.tolist() for m, k in p.kept.items()}))
    assert p.acted_on > 0
    assert clip_scale(p, p.acted_on / 4) == pytest.approx(0.25)
    assert clip_scale(p, 2 * p.acted_on) == 1


@pytest.mark.parametrize("act", ["erase", "shrink"])
def test_project_update_acts_on_what_the_optimizer_did(act, wrapped):
    """δS moves by the kept part of the very update that AdamW makes without an intervention."""
    _, knobs = wrapped
    cfg = PRESETS["organism"][1]
    state = knobs.state()
    generator = torch.Generator().manual_seed(0)
    g = {m: torch.randn(len(d), generator=generator, dtype=torch.float64) for m, d in knobs.delta.items()}
    V = {m: torch.eye(len(d), dtype=torch.float64)[:2] for m, d in knobs.delta.items()}
    plain = apply_step(knobs, data_types.Projection(g, None, 1.0, 1.0, {}), make_optimizer(knobs, cfg), 1.0).descent
    knobs.load_state(state)
    update_cfg = replace(cfg.vhack, project="update")
    acted = lambda descent: proj.acted(descent, V, V, act, update_cfg)
    got = apply_step(
        knobs, data_types.Projection(g, None, 1.0, 1.0, {}), make_optimizer(knobs, cfg), 1.0, acted
    ).descent
    kept, _ = proj.acted(plain, V, V, act, update_cfg)
    for m in g:
        torch.testing.assert_close(got[m], kept[m], rtol=1e-6, atol=1e-9)


def test_the_worked_example_of_the_docs_is_an_arm_that_runs():
    """docs/method.md adds an arm in one row; that very row is taken from the page and put through a step."""
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (row,) = re.findall(r"```python\n(\"erase_half\": Arm\(.*?\),?)\n```", page, re.S)
    name, arm = next(iter(eval("{" + row + "}", {"Arm": Arm}).items()))
    assert name not in ARMS
    N, V, real = tiny()
    seen = arms.Seen(A, REWARDS, FLAGGED, 2, torch.Generator().manual_seed(0))
    f = arms.factors(arm.rows, seen)
    G = {m: n * A[:, None] for m, n in N.items()}
    p = proj.decided(proj.sums(G, f, STUDENT), V, real, arm, VHackCfg())
    kept, _ = longhand(arm, N, V, real)
    for m in WIDTHS:
        torch.testing.assert_close(p.kept[m], torch.tensor(kept[m], dtype=torch.float64))
