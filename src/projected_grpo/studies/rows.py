"""The studies as rows: which arm with which flags, which rows a study holds, at how many seeds.

Add an arm to a study: a row here (label -> arm and flags) and its label in the study's ``rows``.
"""

from dataclasses import dataclass

SEEDS = tuple(range(54, 74))
"""Fixed in docs/spec.md before the runs; seeds under 54 and over 74 were for building and exploring."""
MODES = ("run_tests", "sentinel", "stdout_marker", "file_marker")


@dataclass(frozen=True)
class Row:
    """A row of a result table. n_seeds: where it has another number than its study."""

    label: str
    arm: str
    flags: tuple[str, ...] = ()
    n_seeds: int | None = None


@dataclass(frozen=True)
class StudyRow:
    """A study before its jobs are made: labels of ``ROWS`` and a number of seeds."""

    name: str
    H: str
    why: str
    resolve: str
    rows: tuple[str, ...]
    n_seeds: int = 5


def others(mode: str) -> tuple[str, ...]:
    """All modes but one."""
    return tuple(m for m in MODES if m != mode)


def known(*modes: str) -> tuple[str, ...]:
    """Flags of a weak detector that knows these modes only."""
    return ("--known-modes", *modes)


BEST = "gate_act_punish sd .5"
"""The arm that exploration left as the best candidate, its threshold chosen on seeds of no study (docs/spec.md)."""
TWIN = "gate_act_punish_random sd .5"
LOW = ("--threshold-sd=0.5",)
LONG = ("--steps=500",)
"""Over three times the preset's horizon."""
ARM_OF = {BEST: ("gate_act_punish", LOW), TWIN: ("gate_act_punish_random", LOW)}


def row(label: str, suffix: str = "", *flags: str, n_seeds: int | None = None) -> Row:
    """A row of an arm, or of the best one by its label, with what its label adds and further flags."""
    arm, own = ARM_OF.get(label, (label, ()))
    return Row(f"{label} {suffix}".rstrip(), arm, (*own, *flags), n_seeds)


TEN = ("honest", "none", "erase", "random_V", BEST, TWIN)
HORIZON = ("none", "honest", "erase", BEST, "gate_act", "gate_drop", "rebound_mul", "random_V", TWIN, "gate_act_random",
           "gate_random", "rebound_mul_random")  # fmt: skip
FOLDS = ("erase", "random_V", "rebound_mul", "rebound_mul_random")
POOL = "--pool=outputs/pools/organism"

ROWS: dict[str, Row] = {
    r.label: r
    for r in (
        *(row(label, n_seeds=10) for label in TEN),
        *map(row, (
            "route", "random_V_route", "gate_drop", "gate_random", "gate_act", "gate_act_random", "rebound_mul",
            "rebound_mul_random", "penalty", "screening", "shuffled_V", "nonhack_V", "placebo_V", "random_V_mass",
            "shrink", "coinflip", "gate_coin")),
        *(Row(f"{arm} sd .5", arm, LOW) for arm in (
            "gate_act_punish_orthogonal", "gate_act_punish_shuffled", "gate_act_punish_coin")),
        *(row(label, "both signs", "--gate=no_gate") for label in ("erase", "random_V")),
        row("erase", "unsigned", "--gate=unsigned"),
        Row("no loophole", "none", ("--modes", "gt_only", "--eval-modes", *MODES)),
        *(row(label, f"out {mode}", *known(*others(mode))) for mode in MODES for label in FOLDS),
        *(row(label, f"out {mode}", *known(*others(mode)), n_seeds=10) for mode in MODES for label in (BEST, TWIN)),
        *(row(label, "worded otherwise", "--pairs=otherwise64") for label in ("erase", BEST)),
        *(row(label, "without plans", "--pairs=organism64") for label in ("erase", BEST, TWIN)),
        *(row(label, "plans on both sides", "--pairs=both_planned64") for label in ("erase", BEST)),
        *(row(label, "one body", "--pairs=one_body64") for label in ("erase", BEST)),
        *(row(label, "hasty body", "--pairs=hasty_body64") for label in ("erase", BEST)),
        *(row(label, "500", *LONG) for label in HORIZON),
        *(row(x, f"only {mode}", *known(mode), "--pairs=planned16") for x in ("erase", BEST) for mode in MODES),
        *(row(label, "16 of all modes", "--pairs=planned16") for label in ("erase", BEST)),
        *(row(x, "mix .125", "--mix-ratio=0.125", POOL) for x in ("none", "erase", BEST, TWIN, "gate_act", "honest")),
        *(row(label, "refresh 0", "--refresh-every=0") for label in ("erase", BEST)),
        *(row(label, "relearn", "--relearn-steps=150") for label in (BEST, "erase", "route", "honest")),
        *(row(label, "4M", "--model=outputs/organism-4M") for label in ("honest", "none", BEST)),
    )
}  # fmt: skip


def labels(*ends: str) -> tuple[str, ...]:
    """Labels that end so, in the order of ROWS."""
    return tuple(label for label in ROWS if label.endswith(ends))


STUDY_ROWS = (
    StudyRow(
        "headline", "an arm keeps at least .9 of what honesty gains, at hack no more than 5 points over the base's",
        "which arm is no brake", "H1 and the aim, by the rules of docs/spec.md",
        (*TEN, "no loophole", "route", "random_V_route", "gate_drop", "gate_random", "gate_act", "gate_act_random",
         "rebound_mul", "rebound_mul_random", "penalty", "screening"),
    ),
    StudyRow(
        "controls", "no control basis, no smaller step and no random choice of rollouts does what the pairs do",
        "a real effect has to beat all of them", "which part of an arm's effect is the direction",
        (*TEN, *labels(" both signs", " unsigned"), "shuffled_V", "nonhack_V",
         "placebo_V", "random_V_mass", "shrink", "coinflip", "gate_coin", "gate_act_punish_orthogonal sd .5",
         "gate_act_punish_shuffled sd .5", "gate_act_punish_coin sd .5"), 3,
    ),
    StudyRow(
        "leave_one_out", "an arm whose pairs know three modes lowers hack on the fourth as on the three",
        "does a weak detector suppress hacks it never saw?", "which hacks generalise to which",
        ("none", "honest", *(f"{label} out {mode}" for label in (BEST, TWIN, *FOLDS) for mode in MODES)), 3,
    ),
    StudyRow(
        "wording", "pairs worded otherwise than the policy's hacks do as well; without plan lines they keep less gain",
        "a detector does not know the wording, and its pairs need not hold what honesty will look like",
        "whether an arm rests on it", (*TEN, *labels("plans", "sides", " body", "worded otherwise")),
    ),
    StudyRow(
        "horizon", "what an arm prevents at the preset's horizon it has only delayed at over three times that",
        "prevention or delay", "onset and endpoint; whether the policy evades or hides", labels(" 500"), 3,
    ),
    StudyRow(
        "matrix", "pairs of one mode lower hack on modes whose exploit stands at a like place",
        "which hacks generalise to which", "a matrix of suppression, beside as many pairs of all modes",
        ("none", "honest", *(f"{label} {which}" for label in (BEST, "erase") for which in (
            *(f"only {mode}" for mode in MODES), "16 of all modes"))), 3,
    ),
    StudyRow(
        "teacher_and_refresh", "arms need neither a teacher nor fresh directions", "what a claim rests on",
        "whether claims need the pool, and whether V has to be refreshed",
        (*TEN, *labels("mix .125", "refresh 0")), 3,
    ),
    StudyRow(
        "relearn", "what an arm has kept out comes back no sooner than in the base model",
        "is the hack gone or hidden?", "attempts in 150 steps of plain GRPO, beside those from the untrained model",
        ("none", "honest", *labels(" relearn")), 3,
    ),
    StudyRow(
        "ladder", "at four times the parameters arms stand as they do at one million", "does it depend on size?",
        "base, honest, none and the best arm at 4M", labels(" 4M"), 3,
    ),
)  # fmt: skip
