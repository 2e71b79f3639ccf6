"""Tables of differences: each label against its reference, with intervals, exact tests and equivalence."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tabulate import tabulate

from projected_grpo import stats
from projected_grpo.analysis import Analysis, Comparison, Label, Seeds, coin_of, control_of
from projected_grpo.run_tables import PROBE

NOTHING = "–"
Reference = Callable[[Analysis, Label], Label | None]
"""Which label a label is compared with."""


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A titled Markdown table that reads well raw too."""
    cells = [[NOTHING if c is None else str(c) for c in row] for row in rows]
    return f"### {title}\n\n" + tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True)


def mean(seeds: Seeds) -> str | None:
    """Mean over seeds with its interval."""
    return str(stats.mean_interval(list(seeds.values()))) if seeds else None


def short(seeds: Seeds) -> str | None:
    """Mean over seeds alone."""
    return f"{np.mean(list(seeds.values())):.2f}" if seeds else None


def gain(after: Seeds, before: Seeds) -> str | None:
    """after − before, seed by seed, with its interval."""
    return mean({s: after[s] - before[s] for s in sorted(after.keys() & before.keys())})


def differences(a: Analysis, title: str, of: Reference, measure: str) -> str | None:
    """Each label minus its reference in one measure, with intervals and tests, Holm over the table."""
    found: list[tuple[Label, Comparison]] = []
    for label in a.labels.values():
        if (other := of(a, label)) and (c := a.compare(label.name, other.name, measure)):
            found.append((label, c))
    if not found:
        return None
    flips, splits = stats.holm([c.flip.p for _, c in found]), stats.holm([c.split.p for _, c in found])
    rows = [
        [label.shown, c.reference, c.t.n, c.t, interval(c.boot), p_cell(c.flip, f), p_cell(c.split, s), c.tost.short]
        for (label, c), f, s in zip(found, flips, splits, strict=True)
    ]
    return table(title, ("label", "minus", "pairs", "Δ [t]", "boot", "flip p", "split p", "TOST p"), rows)


def interval(x: stats.Interval) -> str | None:
    """An interval without its mean."""
    return None if x.lo is None else f"[{x.lo:z.2f}, {x.hi:z.2f}]"


def p_cell(p: stats.Permutation, holm: float) -> str:
    """p, the smallest attainable, and Holm's."""
    return f"{p.p:.3f} ({p.smallest:.3f}) → {holm:.3f}"


def none_of(a: Analysis, label: Label) -> Label | None:
    """The none label that a label is compared with; none itself is compared with nothing."""
    return None if label.arm == "none" else a.reference(label, "none")


def random_of(a: Analysis, label: Label) -> Label | None:
    """The label's own random control."""
    return a.reference(label, control) if (control := control_of(label.arm)) else None


def tossed_of(a: Analysis, label: Label) -> Label | None:
    """The label's own coin control."""
    return a.reference(label, coin) if (coin := coin_of(label.arm)) else None


def against(a: Analysis, who: str, of: Reference) -> str | None:
    """Differences to a reference, and whether solve is shown to be matched."""
    titles = {"deploy_hack": "Deployed hack", "hack": "End-of-training hack", "deploy_solve": "Deployed solve"}
    parts = [differences(a, f"{title}, minus {who}", of, measure) for measure, title in titles.items()]
    return "\n\n".join(p for p in (*parts, matched_solve(a, who, of)) if p) or None


def against_none(a: Analysis) -> str | None:
    """Against plain GRPO."""
    return against(a, "none", none_of)


def against_random(a: Analysis) -> str | None:
    """Against the same arm with random directions."""
    return against(a, "its random control", random_of)


def against_coin(a: Analysis) -> str | None:
    """Hack against the same done to rollouts drawn at random."""
    return differences(a, "Deployed hack, minus its coin control", tossed_of, "deploy_hack")


def matched_solve(a: Analysis, who: str, of: Reference) -> str | None:
    """Is solve shown to be the reference's within the margin: deployed, pooled and by mode, and without a hint."""
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    rows = []
    for label in a.labels.values():
        if not (other := of(a, label)):
            continue
        measures = ["deploy_solve", *(f"deploy_solve@{m}" for m in (*modes, PROBE))]
        cells = [a.matched(label.name, other.name, m) for m in measures]
        if cells[0]:
            rows.append([label.shown, other.name, *cells])
    title = f"Deployed solve, minus {who}: equal within {stats.MARGIN:.2f}? (TOST)"
    return table(title, ("label", "minus", "all", *modes, PROBE), rows) if rows else None
