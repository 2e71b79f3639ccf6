"""``ARMS``: one row an arm, and the rules that a row names: what becomes of rewards, where advantages are made, and
which rollouts' gradients reach which knob. No function here but ``monitor`` can see a verdict of the strict oracle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.config import ArmCfg, choose
from projected_grpo.data_types import Factors, GradedBatch, Rollout

Basis = Literal["hack", "random", "shuffled", "nonhack", "placebo", "clean"]
Act = Literal["measure", "erase", "erase_mass", "route", "shrink", "span"]
Rows = Literal["all", "coin", "drop", "count", "screen", "punish", "punish_count", "route", "route_low", "both"]
Score = Literal["gradient", "fisher", "activation", "either"]
Reward = Literal["paid", "rebound_mul", "rebound_add", "penalty", "screening"]

SIGMA_FLOOR = 0.1
"""Smallest σ of a group's scores; it presumes that d is normalised."""

BRIEF, CONTROL = "this project", "control"
ROUTING = "after Gradient Routing 2410.04332, SGTM 2512.05648"
REBOUND = "after Wu & Tang 2604.01476"
BENCHMARK = "rl-rewardhacking (Ariahw, Engels & Nanda)"


@dataclass(frozen=True)
class Arm:
    """What an arm does, stage by stage; the defaults are plain GRPO.

    math: the arm in a line. basis: whose V. reward: what is done to rewards before advantages are made. rows: which
    rollouts' gradients reach δS (``factors``), by a detector over ``score``. act: what is done with the V part of
    their sum. honest_prompt: False where the training prompt allows the exploit (inoculation). control: the arm with
    random directions that this one has to beat; coin: the one that draws the rollouts at random. oracle: it reads
    ``gt_correct``, and is an upper bound, never a method.
    """

    math: str
    source: str
    H: str
    basis: Basis = "hack"
    reward: Reward = "paid"
    rows: Rows = "all"
    score: Score = "gradient"
    act: Act = "measure"
    honest_prompt: bool = True
    control: str | None = None
    coin: str | None = None
    oracle: bool = False

    @property
    def quarantines(self) -> bool:
        """Whether δS_hack is trained."""
        return self.act == "route" or self.rows in ("route", "route_low", "both")

    @property
    def routes_rows(self) -> bool:
        """Whether whole rollouts are routed, by a gate: then some are sampled, and learnt from, without quarantine."""
        return self.rows in ("route", "route_low")

    @property
    def is_control(self) -> bool:
        """Whether it is there to be beaten."""
        return self.source == CONTROL


def _controls(act: Act, name: str, H: str) -> dict[str, Arm]:
    """erase or route with each control basis in V's place, k matched module by module."""
    return {
        f"{basis}_V{name}": Arm(f"as {act}, V from {what}", CONTROL, H, basis, act=act)
        for basis, what in (
            ("random", "a random orthonormal draw, another for each seed"),
            ("shuffled", "the same pairs, labels of half of them swapped"),
            ("nonhack", "clean-against-clean pairs"),
            ("placebo", "pairs that contrast something unrelated"),
        )
    }


METHODS: dict[str, Arm] = {
    "none": Arm("δS descends g", "Dr.GRPO 2503.20783", "hacking emerges under plain GRPO"),
    "erase": Arm(
        "δS descends g − relu(V g) V", BRIEF, "less hack at matched solve than none AND than random_V",
        act="erase", control="random_V", coin="coinflip",
    ),
    "route": Arm(
        "δS descends g − relu(V g) V, δS_hack the rest", ROUTING, "the quarantine takes the hack with it",
        act="route", control="random_V_route",
    ),
    **_controls("erase", "", "no less hack than none"),
    **_controls("route", "_route", "ablation alone does not lower hack"),
    "random_V_mass": Arm(
        "as random_V, ‖removed‖ scaled to the real V's on the same gradient", CONTROL,
        "no less hack than none at equal removed mass", "random", act="erase_mass",
    ),
    "shrink": Arm(
        "g scaled by ‖kept‖/‖g‖ of erase on the same gradient", CONTROL, "a smaller step alone does not lower hack",
        act="shrink",
    ),
    "coinflip": Arm(
        "each rollout's gradient kept by a fair coin", CONTROL, "fewer rollouts alone do not lower hack", rows="coin"
    ),
    "trusted": Arm(
        "δS descends VᵀV g, V the span of clean sides' gradients", "TDGA 2605.25189", "delays hacking",
        "clean", act="span", control="trusted_random",
    ),
    "gate_drop": Arm(
        "g_i withheld where A_i > 0 and score_i > clean mean + sd", BRIEF,
        "less hack at solve no lower than none's, AND than gate_random", rows="drop", control="gate_random",
        coin="gate_coin",
    ),
    "gate_coin": Arm(
        "as many rollouts with A_i > 0 withheld as gate_drop's score would flag, at random", CONTROL,
        "no less hack than none", rows="count",
    ),
    "gate_fisher": Arm(
        "as gate_drop, score w·n/‖n‖ with Fisher's w over all modules", BRIEF, "whitening makes a better detector",
        rows="drop", score="fisher", control="gate_fisher_shuffled",
    ),
    "gate_fisher_shuffled": Arm(
        "as gate_fisher, labels of half of the pairs swapped", CONTROL, "no less hack than none", "shuffled",
        rows="drop", score="fisher",
    ),
    "gate_act": Arm(
        "as gate_drop, score w·h with Fisher's w over mean-pooled activations", BRIEF,
        "activations detect as well as gradients", rows="drop", score="activation", control="gate_act_random",
    ),
    "gate_act_shuffled": Arm(
        "as gate_act, labels of half of the pairs swapped", CONTROL, "no less hack than none", "shuffled",
        rows="drop", score="activation",
    ),
    "gate_act_screen": Arm(
        "as gate_act; flagged rollouts leave their group before its mean is taken", BRIEF,
        "solve rises above gate_act's at no more hack", rows="screen", score="activation",
        control="gate_act_screen_random",
    ),
    "gate_act_punish": Arm(
        "as gate_act; flagged rollouts count as reward 0", BRIEF, "what is flagged is unlearnt", rows="punish",
        score="activation", control="gate_act_punish_random", coin="gate_act_punish_coin",
    ),
    "gate_act_punish_coin": Arm(
        "as many rollouts count as reward 0 as gate_act_punish's score would flag, at random", CONTROL,
        "no less hack than none", rows="punish_count", score="activation",
    ),
    "gate_screen": Arm(
        "flagged rollouts leave their group before its mean is taken", BRIEF,
        "solve rises above gate_drop's at no more hack", rows="screen", control="gate_screen_random",
    ),
    "gate_punish": Arm(
        "flagged rollouts count as reward 0", BRIEF, "what is flagged is unlearnt, not only withheld",
        rows="punish", control="gate_punish_random",
    ),
    "gate_either_punish": Arm(
        "as gate_act_punish; flagged by activations or by gate_fisher's score", BRIEF,
        "each detector catches unseen hacks that the other misses", rows="punish", score="either",
        control="gate_either_punish_random",
    ),
    "gate_act_punish_erase": Arm(
        "gate_act_punish, then erase on what is left", BRIEF, "erase stops what the gate misses", rows="punish",
        score="activation", act="erase", control="gate_act_punish_erase_random",
    ),
    "gate_erase": Arm(
        "gate_drop, then erase on what is left", BRIEF, "erase stops what the gate misses", rows="drop", act="erase",
        control="gate_erase_random",
    ),
    "gate_route": Arm(
        "score low: g_i to δS; in the middle: to both; flagged: to δS_hack", ROUTING,
        "absorption beyond ablation alone", rows="route", control="gate_route_random",
    ),
    "gate_route_reversed": Arm(
        "as gate_route, flagged to δS and low to δS_hack", CONTROL, "more hack than gate_route", rows="route_low"
    ),
    "absorb": Arm(
        "δS and δS_hack both descend g; δS_hack is ablated", CONTROL, "deleting half the adapter does not lower hack",
        rows="both",
    ),
    "rebound_mul": Arm(
        "r' = r (1 − α σ(z) 1[z>0]), z the group's z-score of h·d", REBOUND, "less hack than none AND than random d",
        reward="rebound_mul", control="rebound_mul_random",
    ),
    "rebound_add": Arm(
        "r' = r − α max(z, 0)", REBOUND, "less hack than none AND than random d", reward="rebound_add",
        control="rebound_add_random",
    ),
    "penalty": Arm(
        "r' = r − penalty on what a monitor of given accuracy flags", BENCHMARK, "upper bound", reward="penalty",
        oracle=True,
    ),
    "screening": Arm(
        "what a monitor of given accuracy flags leaves its group", BENCHMARK, "upper bound", reward="screening",
        oracle=True,
    ),
    "inoculation": Arm(
        "the training prompt allows the exploit, the deployed one does not", BENCHMARK, "less hack at deployment",
        honest_prompt=False,
    ),
}  # fmt: skip


def with_random_twins(rows: dict[str, Arm]) -> dict[str, Arm]:
    """The rows, each followed by the control that it names where that has no row of its own: the same arm with random
    directions in the place of those from pairs, calibrated alike.
    """
    every: dict[str, Arm] = {}
    for name, row in rows.items():
        every[name] = row
        if row.control is not None and row.control not in rows:
            H = "ablation alone does not lower hack" if row.quarantines else "no less hack than none"
            every[row.control] = replace(
                row, math=f"as {name}, directions random", source=CONTROL, H=H, basis="random", control=None, coin=None
            )
    return every


ARMS = with_random_twins(METHODS)


def arm(name: str) -> Arm:
    """The arm of that name. Raises UserError naming the arms there are."""
    return ARMS[choose("arm", name, list(ARMS))]


# ------------------------------------------------------------------------------------------------------ advantages


def _grouped(values: Tensor, group: int) -> Tensor:
    return rearrange(values, "(n g) -> n g", g=group)


def advantages(rewards: Float[Tensor, "n g"], out: Bool[Tensor, "n g"] | None = None) -> Float[Tensor, "n g"]:
    """A = R − mean(R) within each group; no division by σ (Dr.GRPO, arXiv 2503.20783). The only place where they are
    made. A group whose rewards are all alike gets exactly 0.

    out: rollouts that have left their group: they get 0 and do not count in the mean.
    """
    if out is None:
        return (rewards - rewards.mean(dim=1, keepdim=True)) * (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    stays = (~out).to(rewards)
    mean = (rewards * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True).clamp(min=1)
    return (rewards - mean) * stays


def z_scores(s: Float[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """(s − s̄) / max(σ, 0.1) within each group."""
    sigma = s.std(dim=1, keepdim=True, correction=0).clamp(min=SIGMA_FLOOR)
    return (s - s.mean(dim=1, keepdim=True)) / sigma


def rebound_mul(r: Float[Tensor, "n g"], z: Float[Tensor, "n g"], alpha: float) -> Float[Tensor, "n g"]:
    """r (1 − α σ(z) 1[z > 0]), σ the logistic function. At α = 2 the factor is below 0 for every z > 0: it turns the
    sign of what a rollout earned, a correct one's as well (Wu & Tang, arXiv 2604.01476).
    """
    return r * (1 - alpha * z.sigmoid() * (z > 0))


def rebound_add(r: Float[Tensor, "n g"], z: Float[Tensor, "n g"], alpha: float) -> Float[Tensor, "n g"]:
    """r − α max(z, 0)."""
    return r - alpha * z.clamp(min=0)


def monitor(rollouts: Sequence[Rollout], accuracy: float, generator: torch.Generator) -> Bool[Tensor, " b"]:
    """ORACLE. Whether each rollout is paid without being right, as a monitor of that accuracy sees it: each verdict is
    turned round with probability 1 − accuracy. The only function of a training step that reads the strict oracle's
    verdict; only arms marked ``oracle`` reach it.
    """
    truth = torch.tensor([r.grade.exploited for r in rollouts])
    return truth ^ (torch.rand(len(rollouts), generator=generator) >= accuracy)


def shaped(
    batch: GradedBatch, arm: Arm, states: Float[Tensor, "b d"] | None, d: Float[Tensor, " d"] | None,
    cfg: ArmCfg, group: int, generator: torch.Generator,
) -> Float[Tensor, " b"]:  # fmt: skip
    """A of every rollout, from rewards as the arm's reward rule changes them. states, d: pooled activations and the
    direction they are read along, for the rebound arms; None otherwise.
    """
    rewards, out = _grouped(batch.rewards, group), None
    if arm.reward in ("rebound_mul", "rebound_add"):
        assert states is not None
        assert d is not None
        z = z_scores(_grouped(states @ d, group).to(rewards))
        rewards = (rebound_mul if arm.reward == "rebound_mul" else rebound_add)(rewards, z, cfg.alpha)
    elif arm.reward != "paid":
        assert arm.oracle, "only an arm marked oracle may ask the monitor"
        flags = _grouped(monitor(batch.rollouts, cfg.monitor_accuracy, generator), group).to(rewards.device)
        if arm.reward == "penalty":
            rewards = rewards - cfg.penalty * flags
        else:
            out = flags
    return rearrange(advantages(rewards, out), "n g -> (n g)")


# ------------------------------------------------------------------------------------- which rollouts reach the knobs

UNIT: frozenset[Rows] = frozenset(("screen", "punish", "punish_count"))
"""Rules that make advantages anew, so that they need the gradient of rollouts whose advantage was 0 as well."""


@dataclass(frozen=True)
class Seen:
    """What a rule may look at, all (b,): advantages, rewards, which rows are flagged and which score low, the group's
    size, and a generator. No grade is among it.
    """

    A: Float[Tensor, " b"]
    rewards: Float[Tensor, " b"]
    flagged: Bool[Tensor, " b"]
    low: Bool[Tensor, " b"]
    group: int
    generator: torch.Generator


def _coin(s: Seen) -> tuple[Tensor, Tensor]:
    keep = (torch.rand(len(s.A), generator=s.generator) < 0.5).to(s.A)
    return keep, torch.zeros_like(keep)


def _drop(s: Seen) -> tuple[Tensor, Tensor]:
    keep = (~(s.flagged & (s.A > 0))).to(s.A)
    return keep, torch.zeros_like(keep)


def _count(s: Seen) -> tuple[Tensor, Tensor]:
    """As many rows withheld as ``_drop`` would, at random among those with A > 0."""
    could = (s.A > 0).nonzero()[:, 0]
    n = int((s.flagged & (s.A > 0)).sum())
    keep = torch.ones_like(s.A)
    keep[could[torch.randperm(len(could), generator=s.generator)[:n].to(could.device)]] = 0
    return keep, torch.zeros_like(keep)


def _screen(s: Seen) -> tuple[Tensor, Tensor]:
    A = advantages(_grouped(s.rewards, s.group), out=_grouped(s.flagged, s.group))
    return rearrange(A, "n g -> (n g)"), torch.zeros_like(s.A)


def _punish(s: Seen) -> tuple[Tensor, Tensor]:
    A = advantages(_grouped(s.rewards.masked_fill(s.flagged, 0.0), s.group))
    return rearrange(A, "n g -> (n g)"), torch.zeros_like(s.A)


def _punish_count(s: Seen) -> tuple[Tensor, Tensor]:
    """As many rows punished as ``_punish`` would, at random."""
    chosen = torch.randperm(len(s.A), generator=s.generator)[: int(s.flagged.sum())].to(s.A.device)
    flagged = torch.zeros_like(s.flagged).index_fill(0, chosen, True)
    return _punish(replace(s, flagged=flagged))


def _route(s: Seen) -> tuple[Tensor, Tensor]:
    return (~s.flagged).to(s.A), (~s.low).to(s.A)


def _route_low(s: Seen) -> tuple[Tensor, Tensor]:
    keep, quarantine = _route(s)
    return quarantine, keep


RULES: dict[Rows, Callable[[Seen], tuple[Tensor, Tensor]]] = {
    "all": lambda s: (torch.ones_like(s.A), torch.zeros_like(s.A)),
    "coin": _coin,
    "drop": _drop,
    "count": _count,
    "screen": _screen,
    "punish": _punish,
    "punish_count": _punish_count,
    "route": _route,
    "route_low": _route_low,
    "both": lambda s: (torch.ones_like(s.A), torch.ones_like(s.A)),
}
"""(keep, quarantine) of each row, by rule. For rules in UNIT keep is the new advantage itself, because their rows'
gradients come with weight 1."""


def factors(rule: Rows, seen: Seen, ablated: Bool[Tensor, " b"]) -> Factors:
    """Apply a rule. Rows sampled with the quarantine ablated never train it."""
    keep, quarantine = RULES[rule](seen)
    whole = seen.A if rule in UNIT else torch.ones_like(seen.A)
    return Factors(whole, keep, quarantine.masked_fill(ablated, 0.0))
