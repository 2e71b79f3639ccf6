"""What draws on a matplotlib Axes: curves over training, deployed rates, the plane of hack against gain kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from projected_grpo.report.looks import (
    DASHES,
    GREY,
    INK,
    MARKERS,
    PALETTE,
    Family,
    Style,
    families,
    honest_label,
    is_control,
    no_loophole_label,
    none_label,
    styles,
)
from projected_grpo.studies import stats
from projected_grpo.studies.analysis import EARLY, WINDOW, Analysis, Seeds, shared
from projected_grpo.studies.stats import AIM_GAIN, AIM_HACK, MARGIN, Values

# --- over training --------------------------------------------------------------------------------------------------

FEW = 4
"""Labels of which one panel can show the seed bands."""
METRIC_STYLE: dict[str, tuple[str, Any]] = {
    "hack": ("#D55E00", "-"),
    "attempt": ("#E69F00", (0, (4, 1.6))),
    "solve": ("#0072B2", "-"),
}
SHARE_STYLE: dict[str, tuple[str, dict[str, Any]]] = {
    "cin": ("cin", dict(color="#D55E00")),
    "cout": ("cout", dict(color="#0072B2")),
    "cout_update": ("cout_Δ", dict(color="#009E73", linestyle=(0, (4, 1.6)))),
    "cin_null": ("null", dict(color=GREY, linestyle=(0, (1.4, 1.2)))),
}


PROBE_STYLE: dict[str, tuple[str, dict[str, Any]]] = {
    "caught": ("caught", dict(color="#D55E00")),
    "caught_held_out": ("caught by the held-out probe", dict(color="#0072B2")),
    "auroc": ("AUROC", dict(color="#D55E00", linestyle=DASHES[2])),
    "auroc_held_out": ("AUROC of the held-out probe", dict(color="#0072B2", linestyle=DASHES[2])),
}


def smoothed(curve: Values) -> Values:
    """Means over WINDOW steps of the values that there are; NaN where a window has none."""
    there = ~np.isnan(curve)
    total, n = stats.rolling(np.where(there, curve, 0), WINDOW), stats.rolling(there, WINDOW)
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 1e-9)


def band(curves: Mapping[int, Values]) -> tuple[Values, Values, Values, Values] | None:
    """(steps, mean, least, most) over the seeds that have a value, of curves smoothed over WINDOW steps; None of none.

    A point stands at the last step of its window. Curves are cut to the shortest.
    """
    if not curves:
        return None
    steps = min(map(len, curves.values()))
    smooth = np.stack([smoothed(c[:steps]) for c in curves.values()])
    known = ~np.isnan(smooth).all(0)
    if not known.any():
        return None
    at, smooth = np.arange(steps - smooth.shape[1], steps, dtype=np.float64)[known], smooth[:, known]
    return at, np.nanmean(smooth, 0), np.nanmin(smooth, 0), np.nanmax(smooth, 0)


def has_values(a: Analysis, label: str, column: str) -> bool:
    """Whether a column is anything but empty."""
    return any(not np.isnan(c).all() for c in a.curves.get((label, column), {}).values())


def curve(ax: Axes, curves: Mapping[int, Values], fill: bool = True, **style: Any) -> float | None:
    """Mean line and seed band; where the line ends, None when there is none."""
    found = band(curves)
    if found is None:
        return None
    at, mean, least, most = found
    ax.plot(at, mean, **style)
    if fill and len(curves) > 1:
        ax.fill_between(at, least, most, color=style.get("color"), alpha=0.16, linewidth=0)
    return float(mean[-1])


def name_ends(ax: Axes, ends: Mapping[str, tuple[float | None, str]]) -> None:
    """Names at the right end of lines, pushed apart where they would overlap. ends: name -> (height, colour)."""
    shown = sorted((y, name, color) for name, (y, color) in ends.items() if y is not None and np.isfinite(y))
    low, high = ax.get_ylim()
    gap = 0.085 * (high - low)
    heights = [y for y, _, _ in shown]
    for _ in range(40):
        for i in range(len(heights) - 1):
            if (short := gap - (heights[i + 1] - heights[i])) > 0:
                heights[i], heights[i + 1] = heights[i] - short / 2, heights[i + 1] + short / 2
    for (_, name, color), height in zip(shown, heights, strict=True):
        ax.annotate(
            name, (1.0, height), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            color=color, va="center", annotation_clip=False,
        )  # fmt: skip


def share_axis(ax: Axes, x: str = "step") -> None:
    """0 to 1 upwards."""
    ax.set(ylim=(-0.03, 1.03), xlabel=x)
    ax.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)


def rates(ax: Axes, a: Analysis, name: str) -> None:
    """Hack, attempt and solve of a label over training, with none's hack and honest's solve for reference."""
    for other, column, dash in ((none_label(a), "hack_s", DASHES[2]), (honest_label(a), "solve_s", DASHES[1])):
        if other and other != name:
            curve(ax, a.curves[other, column], fill=False, color=GREY, linestyle=dash, linewidth=1.4)
    ends = {}
    for metric, (color, dash) in METRIC_STYLE.items():
        ends[metric] = curve(ax, a.curves[name, f"{metric}_s"], color=color, linestyle=dash), color
    share_axis(ax)
    name_ends(ax, ends)


def compared(ax: Axes, a: Analysis, column: str) -> None:
    """One column of every label."""
    for name, style in styles(a).items():
        curve(ax, a.curves.get((name, column), {}), fill=len(a.labels) <= FEW, **style.line)
    share_axis(ax)


def mode_curves(a: Analysis, label: str, mode: str, metric: str) -> dict[int, Values]:
    """Share of a mode's rollouts by step and seed; NaN where the mode had none."""
    rows = a.joined("modes").filter((pl.col("label") == label) & (pl.col("mode") == mode))
    out = {}
    for (seed,), part in rows.group_by("seed", maintain_order=True):
        share = (part[metric] / part["n"]).cast(pl.Float64).fill_null(float("nan"))
        at, values = part["step"].to_numpy(), np.full(int(part["step"].max()) + 1, np.nan)
        values[at] = share.to_numpy()
        out[seed] = values
    return out


def hack_in_mode(ax: Axes, a: Analysis, mode: str) -> None:
    """Hack in a mode. Where a study leaves modes out, only of labels that left out this one, or none at all."""
    for name, style in styles(a).items():
        if a.labels[name].heldout and mode not in a.labels[name].heldout:
            continue
        curve(ax, mode_curves(a, name, mode, "hack"), fill=False, **style.line)
    share_axis(ax)


def rates_in_mode(ax: Axes, a: Analysis, mode: str) -> None:
    """Hack, attempt and solve in a mode, of the one label."""
    (name,) = a.labels
    for metric, (color, dash) in METRIC_STYLE.items():
        curve(ax, mode_curves(a, name, mode, metric), color=color, linestyle=dash)
    share_axis(ax)


def relearned(ax: Axes, a: Analysis) -> None:
    """Attempts under plain GRPO that starts from each label's deployed model; of none, which starts from the untrained
    one, its own training.
    """
    for name, style in styles(a).items():
        found = a.curves if a.labels[name].arm == "none" else a.relearn
        curve(ax, found.get((name, "attempt_s"), {}), **style.line)
    share_axis(ax)


def plain(ax: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    """One curve as it is."""
    ax.plot(steps, values, color=INK, linewidth=1.3)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)


def shares(ax: Axes, a: Analysis, name: str) -> None:
    """cin, its null, cout and cout_Δ of a label."""
    for column, (_, style) in SHARE_STYLE.items():
        curve(ax, a.curves.get((name, column), {}), **style)
    ax.set(xlabel="step", ylim=(0, None))
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)


def watched(ax: Axes, a: Analysis, name: str) -> None:
    """Recall and AUROC of a label's acting detector and of the held-out probe."""
    for column, (_, style) in PROBE_STYLE.items():
        curve(ax, a.curves.get((name, column), {}), fill=column.startswith("caught"), **style)
    share_axis(ax)


def overlaps(ax: Axes, a: Analysis) -> None:
    """Basis overlap at refreshes: each seed a dot, the mean a line."""
    for name, style in styles(a).items():
        found = a.curves.get((name, "basis_overlap"), {})
        if not has_values(a, name, "basis_overlap"):
            continue
        steps = min(map(len, found.values()))
        values = np.stack([c[:steps] for c in found.values()])
        at = np.flatnonzero(~np.isnan(values).all(0))
        ax.plot(at, np.nanmean(values[:, at], axis=0), **style.line)
        for seed in values:
            ax.plot(at, seed[at], linestyle="", marker=style.marker, color=style.color, markersize=2.5, alpha=0.5)
    ax.axhline(0.2, color=GREY, linewidth=0.9, linestyle=DASHES[2])
    share_axis(ax)


def stacked(ax: Axes, rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Minutes of each label as a bar of its stages."""
    left = [0.0] * len(rows)
    for stage, style in styles.items():
        width = [row.get(stage, 0.0) for row in rows.values()]
        ax.barh(list(rows), width, left=left, color=style["color"], height=0.62)
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.invert_yaxis()
    ax.set_xlabel("minutes a run")
    ax.tick_params(axis="y", length=0)


# --- deployed -------------------------------------------------------------------------------------------------------

Bar = tuple[tuple[float, float], tuple[float, float]]
"""The two ends of an interval, in data coordinates."""


def spread(seeds: Seeds) -> stats.Interval | None:
    """Mean over seeds with its interval; None of none."""
    return stats.mean_interval(list(seeds.values())) if seeds else None


def dots(ax: Axes, a: Analysis, metric: str) -> None:
    """Deployed rate of each label: its seeds, their mean, its interval. The untrained base comes first."""
    look = styles(a)
    rows: list[tuple[str, Seeds, str]] = [("base", a.base(metric), INK)]
    rows += [(name, a.deployed(name, metric), look[name].color) for name in a.labels]
    for i, (_, seeds, color) in enumerate(rows):
        if found := spread(seeds):
            jitter = np.linspace(-0.16, 0.16, len(seeds)) if len(seeds) > 1 else [0]
            ax.plot(list(seeds.values()), i + np.asarray(jitter), "o", color=color, markersize=3.5, alpha=0.45, mew=0)
            if found.lo is not None:
                ax.plot([max(0, found.lo), min(1, found.hi)], [i, i], color=color, linewidth=2)
            ax.plot(found.mean, i, "|", color=color, markersize=13, markeredgewidth=2.4)
    if (none := none_label(a)) and (found := spread(a.deployed(none, metric))):
        ax.axvline(found.mean, color=GREY, linewidth=0.9, linestyle=DASHES[2], zorder=0)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)


FEW_LABELS, NAMED = 7, 8
"""Up to so many labels are all named beside their points. Of more, controls go into a legend; and so does everything
where an arm has several labels, or where more than NAMED would be left to name.
"""


def keeps(a: Analysis) -> bool:
    """Whether gain kept can be drawn: some label has it."""
    return any(a.gain_kept(label) for label in a.labels.values())


def plane(ax: Axes, a: Analysis, corner: bool = False) -> None:
    """Deployed hack across (left is better) against gain kept (up is better); against solve where gain is undefined.

    The landmarks are black: the untrained base at height 0, honest at 1, and none. corner: the aim's, larger; where
    that is ``crowded``, what stands in it has its name there.
    """
    gain, named = keeps(a), named_beside(a)
    names, bars, heights = [], [], [0.0, 1.0] if gain else [0.0]
    base = Family("base", (), Style(INK, "-", "X"))
    seeds = lambda family: max((len(a.deployed(f.name, "hack")) for f in family.labels), default=0)
    for family in sorted((*families(a), base), key=seeds):  # what has most seeds lies on top
        style = family.style
        up = {f.name: a.kept_by_seed(f) if gain else a.deployed(f.name, "solve") for f in family.labels}
        points = [(name, a.deployed(name, "hack"), y) for name, y in up.items()]
        ground = dict.fromkeys(a.base("hack"), 0.0) if gain else a.base("solve")
        for name, hack, high in points or [("base", a.base("hack"), ground)]:
            x, y = shared(hack, high)
            if not x:
                continue
            bars += cross(ax, x, y, style)
            centre = float(np.mean(x)), float(np.mean(y))
            size = 13 if style.marker == "*" else 8.5
            ax.plot(
                *centre, marker=style.marker, color=style.color, markersize=size, mew=0.8, mec="white", linestyle=""
            )
            heights += y
            if name in named:
                names.append((name, centre, style.text))
    low, top = min(heights), max(heights)
    ax.set(xlim=(-0.05, 1.03), xlabel="hack, deployed", ylabel="gain kept" if gain else "solve, deployed")
    ax.set_ylim(low - 0.08 * (top - low), top + 0.12 * (top - low))
    if crowded(a):
        names = [(name, at, color) for name, at, color in names if in_corner(a, *at) == corner]
    if corner:
        ax.set(xlim=(-0.1 * aimed_hack(a), aimed_hack(a)), ylim=CORNER)
    landmarks(ax, a, gain)
    place(ax, names, bars)


CORNER = AIM_GAIN - 0.4, 1.2
"""Gain kept that the aim's corner shows."""


def aimed_hack(a: Analysis) -> float:
    """The highest hack that meets the aim."""
    return float(np.mean(list(a.base("hack").values()))) + AIM_HACK


def in_corner(a: Analysis, hack: float, kept: float) -> bool:
    """Whether a mean stands in the aim's corner."""
    return hack < aimed_hack(a) and CORNER[0] < kept < CORNER[1]


def crowded(a: Analysis) -> bool:
    """Whether more labels than two have their mean there."""
    if not keeps(a):
        return False
    mean = lambda seeds: float(np.mean(list(seeds.values())))
    both = [(a.deployed(name, "hack"), a.kept_by_seed(label)) for name, label in a.labels.items()]
    return sum(in_corner(a, mean(hack), mean(kept)) for hack, kept in both if kept) > 2


def ranked(ax: Axes, a: Analysis) -> None:
    """A point a run: how well its detector ranked hacks at first, against what is hacked in the end."""
    ax.axvline(0.5, color=GREY, linewidth=0.9, linestyle=DASHES[2], zorder=0)
    ax.annotate("as by chance", (0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), va="top",
                textcoords="offset points", color="#6a6a6a")  # fmt: skip
    for name, style in rankers(a).items():
        x, y = shared(a.early(name, "auroc"), a.deployed(name, "hack"))
        ax.plot(x, y, marker=style.marker, color=style.color, markersize=7, mew=0.8, mec="white", linestyle="")
    ax.set(
        xlim=(-0.03, 1.03), ylim=(-0.05, 1.03), xlabel=f"detector's AUROC, first {EARLY} steps", ylabel="hack, deployed"
    )


def rankers(a: Analysis) -> dict[str, Style]:
    """Labels whose detector decides, each with a colour of its own: here controls are what there is to see."""
    names = [name for name, label in a.labels.items() if label.obeys_flags and a.early(name, "auroc")]
    return {n: Style(PALETTE[i % len(PALETTE)], DASHES[0], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}


def landmarks(ax: Axes, a: Analysis, gain: bool) -> None:
    """Where to look: the levels of base and honest and the aim's corner; without gain kept, solve matched to none's."""
    none = none_label(a)
    soft = dict(textcoords="offset points", color="#6a6a6a")
    told = dict(xycoords=("axes fraction", "data"), ha="right", **soft)
    if gain:
        ax.add_patch(Rectangle((-1, AIM_GAIN), 1 + aimed_hack(a), 99, color="#e6f1ea", lw=0, zorder=0))
        ax.annotate("the aim", (0, 1), xycoords="axes fraction", xytext=(4, -3), va="top", **soft)
        for height, name in ((0, "as if untrained"), (1, "as if without a loophole")):
            if not ax.get_ylim()[0] < height < ax.get_ylim()[1]:
                continue
            ax.axhline(height, color=GREY, linewidth=0.9, linestyle=DASHES[2], zorder=0)
            ax.annotate(name, (1, height), xytext=(0, 3), **told)
    elif none and (matched := spread(a.deployed(none, "solve"))):
        ax.axhspan(matched.mean - MARGIN, matched.mean + MARGIN, color="#f1f1f1", zorder=0, linewidth=0)
        ax.annotate("matched solve", (1, matched.mean + MARGIN), xytext=(0, -12), **told)


def in_legend(a: Analysis) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The points of the plane that have no name beside them."""
    named = named_beside(a)
    hidden = [f for f in families(a) if named.isdisjoint(label.name for label in f.labels)]
    return tuple((f.name, dict(color=f.style.color, marker=f.style.marker, linestyle="")) for f in hidden)


def named_beside(a: Analysis) -> set[str]:
    """Names that stand beside their points."""
    marks = {"base", *filter(None, (none_label(a), honest_label(a), no_loophole_label(a)))}
    if len(a.labels) <= FEW_LABELS:
        return {*a.labels, *marks}
    methods = [f.name for f in families(a) if not is_control(f.labels[0])]
    folds = any(len(f.labels) > 1 for f in families(a))
    return marks if folds or len(methods) > NAMED else {*methods, *marks}


def cross(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> list[Bar]:
    """Several seeds as small marks with the intervals of their mean, whose ends are for ``place``."""
    if len(x) < 2:
        return []
    ax.plot(x, y, linestyle="", marker=style.marker, color=style.color, markersize=3.6, alpha=0.4, mew=0)
    mx, my = stats.mean_interval(x), stats.mean_interval(y)
    ax.plot([mx.lo, mx.hi], [my.mean] * 2, color=style.color, linewidth=1, alpha=0.8)
    ax.plot([mx.mean] * 2, [my.lo, my.hi], color=style.color, linewidth=1, alpha=0.8)
    return [((mx.lo, my.mean), (mx.hi, my.mean)), ((mx.mean, my.lo), (mx.mean, my.hi))]


OFFSETS = [(11, 0, "left"), (-11, 0, "right"), (6, 11, "left"), (6, -11, "left"), (-6, 11, "right"), (-6, -11, "right"),
           (0, 15, "center"), (0, -15, "center"), (10, 21, "left"), (10, -21, "left"), (-10, 21, "right"),
           (14, 32, "left"), (14, -32, "left"), (18, 46, "left"), (18, -46, "left"), (22, -60, "left")]  # fmt: skip


def place(
    ax: Axes,
    names: Sequence[tuple[str, tuple[float, float], str]],
    bars: Sequence[Bar],
) -> None:
    """Names beside their points, each where it overlaps points, bars and what is written already the least."""
    scale = ax.figure.dpi / 72
    size = ax.xaxis.label.get_size() * scale
    ax.figure.canvas.draw()
    frame, at = ax.get_window_extent(), [ax.transData.transform(p) for _, p, _ in names]
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    taken += [tuple(text.get_window_extent().extents) for text in ax.texts]  # what the landmarks say
    for ends in bars:
        (x0, y0), (x1, y1) = ax.transData.transform(ends)
        taken.append((x0 - 2, y0 - 2, x1 + 2, y1 + 2))
    for (name, point, color), (x, y) in zip(names, at, strict=True):
        width = 0.58 * size * len(name)

        def box(dx: float, dy: float, ha: str, x=x, y=y, width=width) -> tuple[float, float, float, float]:
            left = x + dx * scale - {"left": 0, "center": width / 2, "right": width}[ha]
            return left, y + dy * scale - size / 2, left + width, y + dy * scale + size / 2

        def cost(offset: tuple[float, float, str], box=box) -> float:
            b = box(*offset)
            outside = max(0, frame.x0 - b[0]) + max(0, b[2] - frame.x1) + max(0, frame.y0 - b[1])
            over = sum(
                max(0, min(b[2], t[2]) - max(b[0], t[0])) * max(0, min(b[3], t[3]) - max(b[1], t[1])) for t in taken
            )
            return over + 20 * outside

        best = min(OFFSETS, key=cost)
        taken.append(box(*best))
        ax.annotate(
            name, point, xytext=best[:2], textcoords="offset points", ha=best[2], va="center", color=color,
            arrowprops=dict(arrowstyle="-", color=color, lw=0.6, shrinkA=0, shrinkB=3) if abs(best[1]) > 16 else None,
        )  # fmt: skip
