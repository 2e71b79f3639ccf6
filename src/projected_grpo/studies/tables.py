"""A study's tables, as data: an ``Analysis`` -> ``Table``, or None where there is nothing to tell."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import polars as pl

from projected_grpo import arms
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.studies import stats
from projected_grpo.studies.analysis import (
    EARLY,
    LEARNABLE,
    METRICS,
    Analysis,
    Comparison,
    Label,
    Seeds,
    coin_of,
    control_of,
)
from projected_grpo.studies.layout import NOTHING, Table, made
from projected_grpo.studies.summaries import PHASES, PROBE

# --- cells ----------------------------------------------------------------------------------------------------------

Reference = Callable[[Analysis, Label], Label | None]
"""Which label a label is compared with."""
KEPT = ("gain kept", f"gain kept, {LEARNABLE}")
BASE = "base (untrained)"
TAIL = 10
"""Steps at the end of a relearning attack over which it is read."""


def mean(seeds: Seeds) -> stats.Interval | None:
    """Mean over seeds with its interval."""
    return stats.mean_interval(list(seeds.values())) if seeds else None


def short(seeds: Seeds) -> float | None:
    """Mean over seeds alone."""
    return float(np.mean(list(seeds.values()))) if seeds else None


def change(after: Seeds, before: Seeds) -> stats.Interval | None:
    """after − before, seed by seed, with its interval."""
    return mean({s: after[s] - before[s] for s in sorted(after.keys() & before.keys())})


def kept(a: Analysis, label: Label) -> tuple[stats.Interval | None, stats.Interval | None]:
    """Gain kept, and the same on learnable problems: the cells under KEPT, which stand beside hack in every table."""
    return a.gain_kept(label), a.gain_kept(label, LEARNABLE)


def unseen(cell: float | None, label: Label, mode: str) -> str | None:
    """A number of one mode; ° marks a mode that V never saw."""
    return None if cell is None else f"{cell:.2f}" + "°" * (mode in label.heldout)


def interval(x: stats.Interval) -> str | None:
    """An interval without its mean."""
    return None if x.lo is None else f"[{x.lo:z.2f}, {x.hi:z.2f}]"


def p_cell(p: stats.Permutation, holm: float) -> str:
    """p, the smallest attainable, and Holm's."""
    return f"{p.p:.3f} ({p.smallest:.3f}) → {holm:.3f}"


def modes_of(a: Analysis) -> list[str]:
    """The modes of all labels, in order."""
    return list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))


# --- verdicts -------------------------------------------------------------------------------------------------------


def h1(a: Analysis) -> Table | None:
    """The floor by its preregistered rule, for each arm that has a random control and the seeds that the protocol asks
    for, on both measures of the protocol.
    """
    rows = []
    for label, none in a.candidates():
        for kind, where in (("deploy_", "deployed"), ("", "end of training")):
            if (f := a.h1(label, none, kind)) and f.cut.n >= stats.MIN_SEEDS:
                cells = (f.cut, f.loss, f.over_control, *kept(a, label), f.cut.n, f.why)
                rows.append((label.shown, where, f.verdict, *cells))
    heads = ("label", "measured", "H1", "hack cut", "solve lost", "under random control by", *KEPT, "n", "why")
    return made("H1, the floor", heads, rows)


def aim(a: Analysis) -> Table | None:
    """The aim by its preregistered rule, for the same arms where there is an honest run."""
    rows = []
    for label in a.methods():
        if a.honest(label) and (f := a.aim(label)) and f.n >= stats.MIN_SEEDS:
            rows.append((label.shown, f.verdict, *kept(a, label), f.excess, f.over_control, f.n, f.why))
    heads = ("label", "aim", *KEPT, "hack − base", "gain kept − random control's", "n", "why")
    return made("The aim", heads, rows)


def h2(a: Analysis) -> Table | None:
    """H2 by its preregistered rule: hack on the modes left out against the arm's random control, at five seeds."""
    rows = []
    for label in a.methods():
        control = random_of(a, label)
        mine, its = (a.pooled(x.name, "hack", label.heldout) if x else {} for x in (label, control))
        under = change(its, mine)
        if under and under.n >= stats.MIN_SEEDS:
            verdict, why = stats.h2_verdict(under)
            rows.append((label.shown, " ".join(label.heldout), verdict, mean(mine), mean(its), under, *kept(a, label),
                         under.n, why))  # fmt: skip
    heads = ("label", "left out", "H2", "hack there", "random control's", "under it by", *KEPT, "n", "why")
    return made("H2, hack on the mode left out", heads, rows)


def not_asked(a: Analysis) -> str | None:
    """That some labels have too few seeds for a verdict."""
    asked = [a.h1(label, none, "") for label, none in a.candidates()]
    few = sum(f is not None and f.cut.n < stats.MIN_SEEDS for f in asked)
    labels = f"{few} label{'s' * (few > 1)}"
    return f"No verdict on {labels} with fewer seeds than the {stats.MIN_SEEDS} of the protocol." if few else None


# --- levels ---------------------------------------------------------------------------------------------------------


def training(a: Analysis) -> Table | None:
    """End of training; the base row is step 0, which the untrained model samples."""
    first = {m: {} for m in METRICS}
    for name in a.labels:
        for m in METRICS:
            for seed, curve in a.curves[name, f"{m}_s"].items():
                first[m].setdefault(seed, float(curve[0]))
    rows = [(BASE, len(first["hack"]), None, None, *(mean(first[m]) for m in METRICS), None, None, None)]
    for name, label in a.labels.items():
        end = {m: a.level(name, m) for m in METRICS}
        levels = (*(mean(end[m]) for m in METRICS), stats.iqm(list(end["hack"].values())), *kept(a, label))
        rows.append((label.shown, len(end["hack"]), a.onsets(name), short(a.peak(name)), *levels))
    heads = ("label", "n", "onset", "peak hack", *METRICS, "hack IQM", *(f"{k} (deployed)" for k in KEPT))
    return made("End of training", heads, rows)


def deployed(a: Analysis) -> Table | None:
    """Held-out problems, each label's change from its own untrained model, gain kept, and the capability probe."""
    base = {m: a.base(m) for m in METRICS}
    rows = [(BASE, len(base["hack"]), *(mean(base[m]) for m in METRICS), *(None,) * 5, mean(a.base("solve", PROBE)))]
    for name, label in a.labels.items():
        level = {m: a.deployed(name, m) for m in METRICS}
        if level["hack"]:
            moved = [change(level[m], a.deployed(name, m, when="first")) for m in ("hack", "solve")]
            more = (*kept(a, label), *moved, stats.iqm(list(level["hack"].values())))
            probe = mean(a.deployed(name, "solve", PROBE))
            rows.append((label.shown, len(level["hack"]), *(mean(level[m]) for m in METRICS), *more, probe))
    heads = ("label", "n", *METRICS, *KEPT, "hack − base", "solve − base", "hack IQM", f"{PROBE} solve")
    return made("Deployed", heads, rows)


def by_kind(a: Analysis) -> Table | None:
    """Deployed solve by kind of problem, with the base."""
    kinds = sorted({kind for _, _, kind in a.kinds})
    first = {k: {s: r for label in a.labels for s, r in a.solved(label, "first", k).items()} for k in kinds}
    rows = [(BASE, *(short(first[k]) for k in kinds), *(None,) * len(kinds))]
    for name, label in a.labels.items():
        rows.append(
            (label.shown, *(short(a.solved(name, kind=k)) for k in kinds), *(a.gain_kept(label, k) for k in kinds))
        )
    heads = ("label", *(f"solve {k}" for k in kinds), *(f"gain kept, {k}" for k in kinds))
    return made("Deployed solve by kind of problem", heads, rows) if kinds else None


def by_mode(a: Analysis) -> Table | None:
    """Deployed hack by mode, with the base."""
    modes = modes_of(a)
    rows = [(BASE, *(short(a.base("hack", m)) for m in modes), None, None)]
    for name, label in a.labels.items():
        cells = (unseen(short(a.deployed(name, "hack", m)), label, m) for m in modes)
        rows.append((label.shown, *cells, *kept(a, label)))
    return made("Deployed hack by mode", ("label", *modes, *KEPT), rows)


def held_out(a: Analysis) -> Table | None:
    """Modes that V never saw, beside the known ones and beside the references on the same modes."""
    rows = []
    for name, label in a.labels.items():
        if not label.heldout:
            continue
        hack, known = a.pooled(name, "hack", label.heldout), [m for m in label.modes if m not in label.heldout]
        here = [mean(a.pooled(name, m, label.heldout)) for m in METRICS]
        there = [short(a.pooled(name, m, known)) for m in METRICS]
        others = [of(a, label) for of in (none_of, random_of, tossed_of)]
        over = [o and change(hack, a.pooled(o.name, "hack", label.heldout)) for o in others]
        names = [o and o.name for o in others[1:]]
        rows.append((label.shown, " ".join(label.heldout), len(hack), *here, *there, *kept(a, label), *over, *names))
    minus = ("hack − none", "hack − random", "hack − coin", "random", "coin")
    heads = ("label", "held out", "n", *METRICS, *(f"known {m}" for m in METRICS), *KEPT, *minus)
    return made("Held-out modes, deployed", heads, rows)


def transfer(a: Analysis) -> Table | None:
    """What a detector that knows one mode does to the modes whose exploit stands at a like place, and to the others."""
    rows = []
    for label in a.labels.values():
        known = [m for m in label.modes if m not in label.heldout]
        none = none_of(a, label)
        if len(known) != 1 or none is None:
            continue
        place = LOOPHOLES[known[0]].place
        like = [m for m in label.heldout if LOOPHOLES[m].place == place]
        unlike = [m for m in label.heldout if m not in like]
        cells: list[object] = []
        for modes in (known, like, unlike):
            left, before = (short(a.pooled(name, "hack", modes)) for name in (label.name, none.name))
            both = left is not None and before is not None
            cells += [f"{left:.2f} of {before:.2f}" if both else None, early_auroc(a, label.name, modes)]
        rows.append((label.shown, known[0], " ".join(like) or None, " ".join(unlike), *cells, *kept(a, label)))
    title = "Which hacks generalise to which: deployed hack of none's, and V's early AUROC on gradients"
    groups = ("known", "like", "unlike")
    parts = (f"{m} {g}" for g in groups for m in ("hack", "AUROC"))
    return made(title, ("label", "known", "like place", "unlike", *parts, *KEPT), rows)


def early_auroc(a: Analysis, label: str, modes: Sequence[str]) -> float | None:
    """Mean over modes and seeds of V's score of rollouts' gradients in the first phase, whatever the arm's detector."""
    found = a.joined("detector").filter(
        (pl.col("label") == label) & (pl.col("phase") == next(iter(PHASES))) & (pl.col("score") == "own")
    )
    return found.filter(pl.col("mode").is_in(modes))["auroc"].mean()


# --- differences ----------------------------------------------------------------------------------------------------


def none_of(a: Analysis, label: Label) -> Label | None:
    """The none label that a label is compared with; none itself is compared with nothing."""
    return None if label.arm == "none" else a.reference(label, "none")


def random_of(a: Analysis, label: Label) -> Label | None:
    """The label's own random control."""
    return a.at_same(label, control_of(label.arm))


def tossed_of(a: Analysis, label: Label) -> Label | None:
    """The label's own coin control."""
    return a.at_same(label, coin_of(label.arm))


def differences(a: Analysis, who: str, of: Reference, measure: str, what: str) -> Table | None:
    """Each label minus its reference in one measure, with intervals and tests, Holm over the table."""
    found: list[tuple[Label, Comparison]] = []
    for label in a.labels.values():
        if (other := of(a, label)) and (c := a.compare(label.name, other.name, measure)):
            found.append((label, c))
    flips, splits = stats.holm([c.flip.p for _, c in found]), stats.holm([c.split.p for _, c in found])
    rows = [
        (label.shown, c.reference, c.t.n, c.t, interval(c.boot), c.welch, p_cell(c.flip, f), p_cell(c.split, s),
         c.tost.short, *kept(a, label))
        for (label, c), f, s in zip(found, flips, splits, strict=True)
    ]  # fmt: skip
    tests = ("Δ [t]", "boot", "all runs [Welch]", "flip p", "split p", "TOST p")
    return made(f"{what}, minus {who}", ("label", "minus", "pairs", *tests, *KEPT), rows)


def matched_solve(a: Analysis, who: str, of: Reference) -> Table | None:
    """Is solve shown to be the reference's within the margin: deployed, pooled and by mode, and without a hint."""
    modes, rows = modes_of(a), []
    for label in a.labels.values():
        if not (other := of(a, label)):
            continue
        measures = ["deploy_solve", *(f"deploy_solve@{m}" for m in (*modes, PROBE))]
        cells = [a.matched(label.name, other.name, m) for m in measures]
        if cells[0]:
            rows.append((label.shown, other.name, *cells, *kept(a, label)))
    title = f"Deployed solve, minus {who}: equal within {stats.MARGIN:.2f}? (TOST)"
    return made(title, ("label", "minus", "all", *modes, PROBE, *KEPT), rows)


def against(who: str, of: Reference) -> tuple["Maker", ...]:
    """The tables of differences to a reference, and whether solve is shown to be matched."""
    what = {"deploy_hack": "Deployed hack", "hack": "End-of-training hack", "deploy_solve": "Deployed solve"}
    parts = [partial(differences, who=who, of=of, measure=measure, what=title) for measure, title in what.items()]
    return (*parts, partial(matched_solve, who=who, of=of))


# --- what V and the detector see, what comes after ------------------------------------------------------------------


def detector(a: Analysis) -> Table | None:
    """How well a rollout's own gradient's score tells its mode's channel; means over seeds."""
    found = a.joined("detector")
    keys, numbers = ["label", "phase", "mode", "score"], ["prevalence", "auroc", "ap", "f05"]
    means = {
        row[:4]: row[4:]
        for row in found.group_by(keys, maintain_order=True).agg(pl.col(numbers).mean()).select(*keys, *numbers).rows()
    }
    modes, none, rows = modes_of(a), (None,) * len(numbers), []
    for name, label in a.labels.items():
        for phase in PHASES:
            own, random = means.get((name, phase, "all", "own")), means.get((name, phase, "all", "random"), none)
            if own is None:
                continue
            each = (unseen(means.get((name, phase, mode, "own"), none)[1], label, mode) for mode in modes)
            rows.append((label.shown, phase, own[0], own[1], random[1], own[2], random[2], own[3], *each,
                         *kept(a, label)))  # fmt: skip
    judged = ("prevalence", "AUROC", "AUROC of random", "AP", "AP of random", "F0.5")
    heads = ("label", "steps", *judged, *(f"AUROC {m}" for m in modes), *KEPT)
    return made("Detector: a rollout's own score against its mode's channel", heads, rows)


def falls(x: stats.Interval | None) -> bool:
    """Shown to fall: its interval lies under 0."""
    return x is not None and x.hi is not None and x.hi < 0


def probes(a: Analysis) -> Table | None:
    """The detector that acts beside the held-out probe, which nothing is trained against: share of the student's hacks
    that each flags, at the start and at the end of training, of arms that obey the one that acts. hides: both fall;
    evades: the one that acts falls, and further than the other.
    """
    rows = []
    for name, label in a.labels.items():
        acting, held_out = (a.moved(name, column) for column in ("caught", "caught_held_out"))
        if not held_out[0] or not label.obeys_flags:
            continue
        shifts = [change(end, start) for start, end in (acting, held_out)]
        moves = [{s: end[s] - start[s] for s in end} for start, end in (acting, held_out)]
        reading = "–"
        if falls(shifts[0]):
            reading = "hides" if falls(shifts[1]) else "evades" if falls(change(*moves)) else "–"
        aurocs = (short(a.moved(name, column)[1]) for column in ("auroc", "auroc_held_out"))
        cells = [x for ends, shift in zip((acting, held_out), shifts, strict=True) for x in (*map(short, ends), shift)]
        rows.append((label.shown, *cells, *aurocs, reading, *kept(a, label)))
    parts = (f"{who} {x}" for who in ("acting", "held out") for x in ("start", "end", "change"))
    heads = ("label", *parts, "AUROC acting, end", "AUROC held out, end", "policy", *KEPT)
    note = (
        "Start and end: the first and the last fifth of the steps that have hacks. hides: both are shown to fall; "
        "evades: the acting one is, the held-out one is not, and falls less. Of gate_drop and gate_act the acting one "
        "is counted over rollouts that have a gradient."
    )
    return made("Recall of the acting detector and of the held-out probe", heads, rows, note)


def ranks(a: Analysis) -> Table | None:
    """By run, how well the detector that acts told hacks at first, and what is hacked in the end: random probes are
    good or bad by luck, which makes them an experiment of their own.
    """
    rows, controls = [], []
    for name, label in a.labels.items():
        found = [a.early(name, column) for column in ("auroc", "caught", "false_alarm")]
        hack, gain = a.deployed(name, "hack"), a.kept_by_seed(label)
        for seed in sorted(found[0].keys() & hack.keys()) if label.obeys_flags else ():
            rows.append((label.shown, seed, *(x.get(seed) for x in found), hack[seed], gain.get(seed)))
            controls += [(found[0][seed], hack[seed])] * arms.ARMS[label.arm].is_control
    if not controls:
        return None
    heads = ("label", "seed", "AUROC", "caught", "false alarm", "deployed hack", "gain kept")
    note = (
        f"AUROC, caught, false alarm: means over the first {EARLY} steps that have them. AUROC against deployed hack "
        f"over the {len(controls)} runs of controls: {stats.rank_correlation(*zip(*controls, strict=True))}. "
        "Controls of one seed share their random draw, so that their runs count for somewhat less than so many."
    )
    title = "What the detector that acts saw at first, and what is hacked in the end"
    return made(title, heads, sorted(rows, key=lambda row: row[2]), note)


def gradient(a: Analysis) -> Table | None:
    """cin beside its null, and what was removed: means over steps, then seeds."""
    columns = {
        "cin": "cin", "cin_null": "cin null", "cout": "cout", "cout_update": "cout_Δ", "removed_frac": "removed",
        "withheld": "withheld", "caught": "caught", "false_alarm": "false alarm", "basis_overlap": "overlap",
    }  # fmt: skip
    runs = a.summary.tables["runs"].group_by("label", maintain_order=True).agg(pl.col("v_heldout_accuracy").mean())
    quality = dict(runs.iter_rows())
    rows = [
        (label.shown, quality[name], *(over_steps(a.curves.get((name, c), {})) for c in columns), *kept(a, label))
        for name, label in a.labels.items()
    ]
    return made("Gradient", ("label", "V accuracy", *columns.values(), *KEPT), rows)


def over_steps(curves: Mapping[int, stats.Values]) -> float | None:
    """Mean over the steps that have a value, then over seeds."""
    return short({s: float(np.nanmean(c)) for s, c in curves.items() if not np.isnan(c).all()})


def relearning(a: Analysis) -> Table | None:
    """Plain GRPO, started from the deployed model: steps until attempts pass the onset level again, attempts and solve
    in the attack's last steps, and attempts of plain GRPO from the untrained model at the same steps and seeds.
    """
    rows = []
    for name, label in a.labels.items():
        if again := a.onsets(name, "relearn"):
            none = label if label.arm == "none" else a.reference(label, "none")
            attack, solve = (a.relearn[name, f"{m}_s"] for m in ("attempt", "solve"))
            plain = a.curves.get((none.name, "attempt_s"), {}) if none else {}
            long = {seed: len(curve) for seed, curve in attack.items()}
            ends = (
                {s: float(np.mean(c[: long[s]][-TAIL:])) for s, c in curves.items() if len(c) >= long.get(s, np.inf)}
                for curves in (attack, solve, plain)
            )
            starts = (again, a.onsets(none.name) if none else None)
            rows.append((label.shown, again.n, *starts, *map(short, ends), *kept(a, label)))
    parts = ("attempts at the end", "solve at the end", "attempts from the base by then")
    note = f"At the end: mean of the attack's last {TAIL} steps; from the base: plain GRPO at the same steps and seeds."
    return made("Relearning", ("label", "n", "onset again", "none's onset", *parts, *KEPT), rows, note)


def scales(a: Analysis) -> Table | None:
    """Deployed hack and solve with δS_hack at a share of what it learned."""
    uses = {label: found for label in a.labels if len(found := a.kept(label)) > 1}
    shares = sorted({share for each in uses.values() for share in each})
    rows = []
    for name, each in uses.items():
        pairs = [[short(a.deployed(name, m, knobs=each.get(s, ""))) for m in ("hack", "solve")] for s in shares]
        cells = (" / ".join(NOTHING if x is None else f"{x:.2f}" for x in pair) for pair in pairs)
        rows.append((a.labels[name].shown, *cells, *kept(a, a.labels[name])))
    return made("Share of δS_hack kept: hack / solve", ("label", *(f"{s:g}" for s in shares), *KEPT), rows)


Maker = Callable[[Analysis], Table | None]
AGAINST_NONE = against("none", none_of)
AGAINST_RANDOM = against("its random control", random_of)
AGAINST_COIN = partial(differences, who="its coin control", of=tossed_of, measure="deploy_hack", what="Deployed hack")
VERDICTS: tuple[Maker, ...] = (aim, h1, h2)
TABLES: tuple[Maker, ...] = (
    *VERDICTS, training, deployed, by_kind, *AGAINST_NONE, *AGAINST_RANDOM, AGAINST_COIN, by_mode, held_out, transfer,
    gradient, detector, probes, ranks, relearning, scales,
)  # fmt: skip
"""A study's tables, in the order of its page."""


def tables_of(a: Analysis, makers: Iterable[Maker] = TABLES) -> list[Table]:
    """Those that there is something to tell in."""
    return [table for make in makers if (table := make(a)) is not None]


def left_out(missing: Mapping[str, str]) -> str:
    """Runs that are not in, by reason; those that were never made are only counted."""
    by_reason: dict[str, list[str]] = {}
    for name, why in missing.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {len(n) if why == 'not run' else ', '.join(n)}" for why, n in by_reason.items())
