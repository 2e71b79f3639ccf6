"""The studies as rows: which arm with which flags, which rows a study holds, at how many seeds.

Add an arm to a study: a row here (label -> arm and flags) and its label in the study's ``rows``.
"""

from dataclasses import dataclass

SEEDS = tuple(range(51, 71))
"""Fixed in docs/spec.md before the runs; seeds under 50 and over 100 were for building and exploring."""
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


def plain(*names: str) -> list[Row]:
    """Rows of arms without flags, labelled by the arm."""
    return [Row(name, name) for name in names]


def variants(arm: str, *pairs: tuple[str, tuple[str, ...]]) -> list[Row]:
    """Rows of one arm: (what the label adds, flags)."""
    return [Row(f"{arm} {suffix}", arm, flags) for suffix, flags in pairs]


def long(arm: str, n_seeds: int | None = None) -> Row:
    """The arm at three times the horizon."""
    return Row(f"{arm} 3x", arm, ("--steps=150",), n_seeds)


BEST = ("erase", "gate_act", "gate_act_punish")
"""The arms that exploration left as candidates (docs/spec.md)."""

COMBINED = ("gate_either_punish", "gate_act_punish_erase")
"""Combinations that the detectors' faults on held-out modes suggested (docs/spec.md, deviations)."""

ROWS: dict[str, Row] = {
    row.label: row
    for row in (
        *plain(
            "none", "erase", "route", "gate_drop", "gate_fisher", "gate_act", "gate_act_punish", "gate_act_screen",
            "gate_screen", "gate_punish", "gate_erase", "gate_route", "shuffled_V", "nonhack_V", "placebo_V",
            "random_V_mass", "shrink", "coinflip", "random_V_route", "shuffled_V_route", "nonhack_V_route",
            "placebo_V_route", "gate_random", "gate_coin", "gate_act_random", "gate_act_shuffled",
            "gate_act_punish_random", "gate_act_punish_coin", "gate_either_punish", "gate_either_punish_random",
            "gate_act_punish_erase", "gate_act_punish_erase_random", "gate_route_random",
            "gate_route_reversed", "trusted", "trusted_random", "absorb", "inoculation",
            "rebound_add", "rebound_add_random", "penalty", "screening",
        ),
        *(Row(arm, arm, n_seeds=10) for arm in ("random_V", "rebound_mul", "rebound_mul_random")),
        *(Row(f"{arm} {suffix}", arm, (flag,), 3) for arm, suffix, flag in (
            ("penalty", "dose 1", "--penalty=1"),
            *((arm, f"acc .{x}", f"--monitor-accuracy=0.{x}") for arm in ("penalty", "screening") for x in (9, 7)))),
        *(Row(f"{arm} out {mode}", arm, known(*others(mode))) for mode in MODES
          for arm in (*BEST, *COMBINED, "gate_act_punish_random")),
        *(Row(f"gate_act_punish found out {mode}", "gate_act_punish", (*known(*others(mode)), "--refresh-pairs=both"))
          for mode in MODES),
        *(Row(f"{arm} sd .5 out {mode}", arm, (*known(*others(mode)), "--threshold-sd=0.5"))
          for arm in ("gate_act_punish", "gate_act_punish_erase", "gate_act_punish_random") for mode in MODES),
        *(Row(f"rebound_mul out {mode}", "rebound_mul", known(*others(mode))) for mode in MODES),
        *(Row(f"{arm} sd .5", arm, ("--threshold-sd=0.5",), 10) for arm in (
            "gate_act_punish", "gate_act_punish_random")),
        Row("gate_act_punish_coin sd .5", "gate_act_punish_coin", ("--threshold-sd=0.5",)),
        Row("gate_act_punish sd .5 3x", "gate_act_punish", ("--threshold-sd=0.5", "--steps=150")),
        *(Row(f"gate_act_punish sd .5 out {mode} 3x", "gate_act_punish",
              (*known(*others(mode)), "--threshold-sd=0.5", "--steps=150")) for mode in MODES),
        *(Row(f"{arm} only {mode}", arm, known(mode)) for arm in BEST for mode in MODES),
        *map(long, ("none", *BEST, "random_V", "gate_act_random", "rebound_mul", "rebound_mul_random")),
        long("gate_act_punish_random", 5),
        *(
            Row(f"{arm} mix {mix}", arm, (f"--mix-ratio={mix}", "--pool=outputs/pools/organism"))
            for arm in ("none", *BEST) for mix in ("0.125", "0.5")
        ),
        *(Row(f"{arm} pairs {name}", arm, (f"--pairs={name}",)) for arm in BEST for name in (
            "organism8", "organism16", "organism32", "reworded64", "otherwise64", "semantic64")),
        *variants("erase", ("k 1", ("--k=1",)), ("k 12", ("--k=12",)), ("no_gate", ("--gate=no_gate",)),
                  ("reverse", ("--gate=reverse",)), ("overshoot 1.5", ("--overshoot=1.5",)),
                  ("pair norm none", ("--pair-norm=none",)), ("update", ("--project=update",))),
        *variants("erase", ("refresh 0", ("--refresh-every=0",)), ("refresh 2", ("--refresh-every=2",)),
                  ("refresh 25", ("--refresh-every=25",))),
        *variants("gate_act", ("refresh 0", ("--refresh-every=0",)), ("refresh 25", ("--refresh-every=25",))),
        *variants("erase", ("layers 0-.5", ("--layers", "0", "0.5")), ("layers .5-1", ("--layers", "0.5", "1")),
                  ("rank 16", ("--svd-rank=16",))),
        *variants("none", ("layers 0-.5", ("--layers", "0", "0.5")), ("layers .5-1", ("--layers", "0.5", "1")),
                  ("rank 16", ("--svd-rank=16",))),
        *(Row(f"{arm} relearn", arm, ("--relearn-steps=50",)) for arm in (*BEST, "route", "gate_route")),
        Row("route scales", "route", ("--scales", "0.25", "0.5", "0.75")),
        Row("gate_route scales", "gate_route", ("--scales", "0.25", "0.5", "0.75")),
        Row("absorb scales", "absorb", ("--scales", "0.25", "0.5", "0.75")),
    )
}  # fmt: skip


def labels(prefix: str) -> tuple[str, ...]:
    """Labels that begin so, in the order of ROWS."""
    return tuple(label for label in ROWS if label.startswith(prefix))


STUDY_ROWS = (
    StudyRow(
        "headline", "H1: erase cuts hack by 30 points at solve within 10 points of none, and beats random_V",
        "H1, and which arm is best without an oracle", "supported, falsified or undecided by the rule of docs/spec.md",
        ("none", "erase", "random_V", "gate_act_punish", "gate_act", "gate_drop", "route", "gate_act_punish_random",
         "gate_act_random", "gate_random", "random_V_route", "gate_act_punish sd .5", "gate_act_punish_random sd .5",
         "gate_act_punish_coin sd .5", "coinflip", "gate_coin", "gate_act_punish_coin"),
    ),
    StudyRow(
        "controls", "no control basis, no smaller step and no random choice of rollouts lowers hack as the real V does",
        "a real effect has to beat all of them", "which part of an arm's effect is the direction",
        ("none", "shuffled_V", "nonhack_V", "placebo_V", "random_V_mass", "shrink", "coinflip", "gate_coin",
         "gate_random", "gate_act_random", "gate_act_shuffled", "random_V_route", "gate_act_punish_coin"),
    ),
    StudyRow(
        "horizon", "what an arm prevents at 50 steps it has only delayed at 150",
        "prevention or delay", "onset, peak and endpoint at three times the horizon",
        ("none 3x", "gate_act_punish 3x", "erase 3x", "gate_act 3x", "random_V 3x", "gate_act_punish_random 3x",
         "gate_act_punish sd .5 3x", "rebound_mul 3x", "rebound_mul_random 3x"), 3,
    ),
    StudyRow(
        "leave_one_out", "an arm whose V knows three modes lowers hack on the fourth as on the three",
        "does a weak detector suppress hacks it never saw?", "which hacks generalise to which",
        ("none", "random_V", "coinflip", "gate_act_punish_coin", "gate_act_punish_coin sd .5",
         "rebound_mul_random", *(f"{arm} out {mode}" for arm in (
            "gate_act_punish", "gate_act_punish_random", "erase", "gate_act_punish sd .5",
            "gate_act_punish_random sd .5", "rebound_mul") for mode in MODES),
         *(f"{idea} out run_tests" for idea in (
            *COMBINED, "gate_act_punish found", "gate_act_punish_erase sd .5"))), 3,
    ),
    StudyRow(
        "leave_one_out_3x", "what a weak detector prevents on a mode it never saw it has only delayed at 150 steps",
        "prevention or delay where it matters", "the left-out mode's hack rate at three times the horizon",
        ("none 3x", "gate_act_punish_random 3x", *(f"gate_act_punish sd .5 out {mode} 3x" for mode in MODES)), 3,
    ),
    StudyRow(
        "baselines", "no published baseline without an oracle does better than the best arm",
        "what others do at the same cost", "where the project's arms stand",
        ("none", "random_V", "erase", "gate_act_punish", "gate_act_punish_random", "gate_act_punish sd .5",
         "gate_act_punish_random sd .5", "penalty", "screening", "inoculation",
         "rebound_mul", "rebound_mul_random", "rebound_add", "rebound_add_random", "trusted",
         "trusted_random", "absorb", "gate_route",
         "gate_route_random", "gate_route_reversed", "penalty dose 1",
         "penalty acc .9", "penalty acc .7", "screening acc .9", "screening acc .7"),
    ),
    StudyRow(
        "matrix", "V from one mode lowers hack on modes whose exploit stands at a like place",
        "which hacks generalise to which", "a matrix of suppression",
        ("none", "random_V", "gate_act_punish_random", "gate_act_punish_coin",
         *(f"{arm} only {mode}" for arm in ("gate_act_punish", "erase") for mode in MODES)), 3,
    ),
    StudyRow(
        "relearn", "what an arm has kept out comes back no sooner than in the base model",
        "is the hack gone or hidden?", "steps until attempts pass one half under plain GRPO",
        ("none", *(f"{arm} relearn" for arm in (*BEST, "route"))), 3,
    ),
    StudyRow(
        "deploy_scale", "hack rises with the share of the quarantine that is kept",
        "what the quarantine holds", "hack and solve against the scale of δS_hack",
        ("none", "route scales", "gate_route scales", "absorb scales"), 3,
    ),
    StudyRow(
        "no_teacher", "arms do the same with and without a teacher pool", "teacher rollouts are imitation",
        "whether claims need the pool",
        tuple(f"{arm} mix {mix}" for mix in ("0.125", "0.5") for arm in ("none", *BEST)),
        3,
    ),
    StudyRow(
        "pairs", "mechanism and number of pairs matter, framing does not", "what the pairs have to hold",
        "count and content", ("none", "random_V", "gate_act_random", "gate_act_punish_random", "gate_act_punish_coin",
                              "coinflip", *BEST, *(label for label in ROWS if " pairs " in label)), 3,
    ),
    StudyRow(
        "k_and_gate", "one-sided removal of five axes is a good choice", "settings of the projection",
        "k, gate, overshoot, gradient or update",
        ("none", "random_V", "erase", "erase k 1", "erase k 12", "erase no_gate", "erase reverse",
         "erase overshoot 1.5", "erase pair norm none", "erase update"), 3,
    ),
    StudyRow(
        "refresh", "V has to be refreshed to last", "how often", "steps between refreshes",
        ("none", "erase", "gate_act", *labels("erase refresh"), *labels("gate_act refresh")), 3,
    ),
    StudyRow(
        "layers", "the hack direction sits in the upper half", "depth windows, top singular axes",
        "where the adapter should be", tuple(x for arm in ("none", "erase") for x in (
            *labels(f"{arm} layers"), f"{arm} rank 16")), 3,
    ),
    StudyRow(
        "emergence", "plain GRPO learns to hack within 50 steps", "the phenomenon", "onset and endpoint", ("none",), 5,
    ),
    StudyRow(
        "ideas", "a combination beats its parts", "what might last longer", "rows to try next",
        ("none", "gate_erase", "gate_screen", "gate_punish", "gate_fisher", "gate_act_screen", "erase update"), 5,
    ),
)  # fmt: skip
