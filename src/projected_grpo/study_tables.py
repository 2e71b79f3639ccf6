"""The tables of a study's section in docs/results.md: an ``Analysis`` -> Markdown, or None where there is nothing."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from projected_grpo import stats
from projected_grpo.analysis import METRICS, Analysis
from projected_grpo.comparison_tables import (
    NOTHING,
    against_coin,
    against_none,
    against_random,
    gain,
    mean,
    none_of,
    random_of,
    short,
    table,
    tossed_of,
)
from projected_grpo.h1 import MIN_SEEDS
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.run_tables import PHASES, PROBE


def verdicts(a: Analysis) -> str | None:
    """H1 by its preregistered rule, for each arm that has a random control, on both measures of the protocol."""
    lines, too_few = [], []
    for label, none in a.candidates():
        for kind, where in (("deploy_", "deployed"), ("", "end of training")):
            found = a.h1(label, none, kind)
            if found and found.cut.n < MIN_SEEDS:
                too_few.append(label.name)
            elif found:
                lines.append(
                    f"- **H1, {label.name}, {where}: {found.verdict}**{str(found).removeprefix(found.verdict)}"
                )
    if too_few:
        lines.append(f"- H1 needs {MIN_SEEDS} seeds and has fewer in {len(set(too_few))} labels: not asked there.")
    return "\n".join(lines) or None


def training(a: Analysis) -> str:
    """End of training; the base row is step 0, which the untrained model samples."""
    first = {m: {} for m in METRICS}
    for name in a.labels:
        for m in METRICS:
            for seed, curve in a.curves[name, f"{m}_s"].items():
                first[m].setdefault(seed, float(curve[0]))
    rows = [["base (untrained)", len(first["hack"]), None, None, *(mean(first[m]) for m in METRICS), None]]
    for name, label in a.labels.items():
        end = {m: a.level(name, m) for m in METRICS}
        iqm = f"{stats.iqm(list(end['hack'].values())):.2f}"
        rows.append(
            [label.shown, len(end["hack"]), a.onsets(name), short(a.peak(name)), *(mean(end[m]) for m in METRICS), iqm]
        )
    return table("End of training", ("label", "n", "onset", "peak hack", "hack", "attempt", "solve", "hack IQM"), rows)


def deployed(a: Analysis) -> str:
    """Held-out problems, each label's gain over its own untrained model, and the capability probe."""
    base = {m: a.base(m) for m in METRICS}
    rows = [["base (untrained)", len(base["hack"]), *(mean(base[m]) for m in METRICS), None, None, None]]
    rows[0].append(mean(a.base("solve", PROBE)))
    for name, label in a.labels.items():
        level = {m: a.deployed(name, m) for m in METRICS}
        if not level["hack"]:
            continue
        gains = [gain(level[m], a.deployed(name, m, when="first")) for m in ("hack", "solve")]
        iqm = f"{stats.iqm(list(level['hack'].values())):.2f}"
        probe = mean(a.deployed(name, "solve", PROBE))
        rows.append([label.shown, len(level["hack"]), *(mean(level[m]) for m in METRICS), *gains, iqm, probe])
    headers = ("label", "n", *METRICS, "hack − base", "solve − base", "hack IQM", "gt_only solve")
    return table("Deployed", headers, rows)


def by_mode(a: Analysis) -> str | None:
    """Deployed hack by mode, with the base."""
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    rows = [["base (untrained)", *(short(a.base("hack", m)) for m in modes)]]
    for name, label in a.labels.items():
        cells = [short(a.deployed(name, "hack", m)) for m in modes]
        rows.append([label.shown, *(c and c + "°" * (m in label.heldout) for c, m in zip(cells, modes, strict=True))])
    return table("Deployed hack by mode", ("label", *modes), rows)


def held_out(a: Analysis) -> str | None:
    """Modes that V never saw, beside the known ones and beside none on the same modes."""
    rows = []
    for name, label in a.labels.items():
        if not label.heldout:
            continue
        known = [m for m in label.modes if m not in label.heldout]
        cells = [mean(a.pooled(name, m, label.heldout)) for m in METRICS]
        cells += [short(a.pooled(name, m, known)) for m in METRICS]
        references = (none_of(a, label), random_of(a, label), tossed_of(a, label))
        for other in references:
            hack = a.pooled(other.name, "hack", label.heldout) if other else {}
            cells.append(gain(a.pooled(name, "hack", label.heldout), hack))
        cells += [other and other.name for other in references[1:]]
        rows.append([label.shown, " ".join(label.heldout), len(a.pooled(name, "hack", label.heldout)), *cells])
    minus = ("hack − none", "hack − random", "hack − coin", "random", "coin")
    headers = ("label", "held out", "n", *METRICS, *(f"known {m}" for m in METRICS), *minus)
    return table("Held-out modes, deployed", headers, rows) if rows else None


def transfer(a: Analysis) -> str | None:
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
        cells = []
        for modes in (known, like, unlike):
            left, before = (short(a.pooled(name, "hack", modes)) for name in (label.name, none.name))
            cells.append(f"{left} of {before}" if modes else None)
            cells.append(number(early_auroc(a, label.name, modes)))
        rows.append([label.shown, known[0], " ".join(like) or None, " ".join(unlike), *cells])
    title = "Which hacks generalise to which: deployed hack of none's, and V's early AUROC on gradients"
    groups = ("known", "like", "unlike")
    headers = ("label", "known", "like place", "unlike", *(f"{m} {g}" for g in groups for m in ("hack", "AUROC")))
    return table(title, headers, rows) if rows else None


def early_auroc(a: Analysis, label: str, modes: Sequence[str]) -> float | None:
    """Mean over modes and seeds of V's score of rollouts' gradients in the first phase, whatever the arm's detector."""
    found = a.joined("detector").filter(
        (pl.col("label") == label) & (pl.col("phase") == next(iter(PHASES))) & (pl.col("score") == "own")
    )
    return found.filter(pl.col("mode").is_in(modes))["auroc"].mean()


def detector(a: Analysis) -> str | None:
    """How well a rollout's own gradient's score tells its mode's channel; means over seeds."""
    found = a.joined("detector")
    if found.is_empty():
        return None
    keys, numbers = ["label", "phase", "mode", "score"], ["prevalence", "auroc", "ap", "f05"]
    means = {
        row[:4]: row[4:]
        for row in found.group_by(keys, maintain_order=True).agg(pl.col(numbers).mean()).select(*keys, *numbers).rows()
    }
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    none = (None,) * len(numbers)
    rows = []
    for name, label in a.labels.items():
        for phase in PHASES:
            pooled, random = means.get((name, phase, "all", "own")), means.get((name, phase, "all", "random"), none)
            if pooled is None:
                continue
            cells = [number(x) for x in (pooled[0], pooled[1], random[1], pooled[2], random[2], pooled[3])]
            for mode in modes:
                cell = number(means.get((name, phase, mode, "own"), none)[1])
                cells.append(cell and cell + "°" * (mode in label.heldout))
            rows.append([label.shown, phase, *cells])
    judged = ("prevalence", "AUROC", "random", "AP", "random", "F0.5")
    headers = ("label", "steps", *judged, *(f"AUROC {m}" for m in modes))
    return table("Detector: a rollout's own score against its mode's channel", headers, rows)


def number(x: float | None) -> str | None:
    """Two decimals."""
    return None if x is None else f"{x:.2f}"


def gradient(a: Analysis) -> str:
    """cin beside its null, and what was removed: means over steps, then seeds."""
    columns = {
        "cin": "cin", "cin_null": "cin null", "cout": "cout", "cout_update": "cout_Δ", "removed_frac": "removed",
        "withheld": "withheld", "caught": "caught", "false_alarm": "false alarm", "basis_overlap": "overlap",
    }  # fmt: skip
    runs = a.summary.tables["runs"].group_by("label", maintain_order=True).agg(pl.col("v_heldout_accuracy").mean())
    quality = dict(runs.iter_rows())
    rows = [
        [label.shown, number(quality[name]), *(over_steps(a.curves.get((name, c), {})) for c in columns)]
        for name, label in a.labels.items()
    ]
    return table("Gradient", ("label", "V accuracy", *columns.values()), rows)


def over_steps(curves: Mapping[int, stats.Values]) -> str | None:
    """Mean over the steps that have a value, then over seeds."""
    return short({s: float(np.nanmean(c)) for s, c in curves.items() if not np.isnan(c).all()})


def relearning(a: Analysis) -> str | None:
    """Steps of plain GRPO, started from the deployed model, until attempts pass the onset level again."""
    rows = []
    for name, label in a.labels.items():
        if again := a.onsets(name, "relearn"):
            none = label if label.arm == "none" else a.reference(label, "none")
            rows.append([label.shown, again.n, again, a.onsets(none.name) if none else None])
    return table("Relearning", ("label", "n", "onset again", "none's onset"), rows) if rows else None


def scales(a: Analysis) -> str | None:
    """Deployed hack and solve with δS_hack at a share of what it learned."""
    kept = {label: a.kept(name) for name, label in a.labels.items() if len(a.kept(name)) > 1}
    shares = sorted({share for uses in kept.values() for share in uses})
    rows = []
    for label, uses in kept.items():
        cells = [[short(a.deployed(label.name, m, knobs=uses.get(s, ""))) for m in ("hack", "solve")] for s in shares]
        rows.append([label.shown, *(" / ".join(x or NOTHING for x in pair) for pair in cells)])
    return table("Share of δS_hack kept: hack / solve", ("label", *(f"{s:g}" for s in shares)), rows) if rows else None


TABLES: tuple[Callable[[Analysis], str | None], ...] = (
    verdicts, training, deployed, against_none, against_random, against_coin, by_mode, held_out, transfer, gradient,
    detector,    relearning, scales,
)  # fmt: skip
