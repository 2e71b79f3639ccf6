"""Panels of deployed rates: by label, and hack against solve."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from projected_grpo import stats
from projected_grpo.analysis import Analysis, Seeds
from projected_grpo.looks import DASHES, GREY, INK, Family, Style, families, is_control, none_label, styles
from projected_grpo.panels import METRIC_STYLE, share_axis
from projected_grpo.stats import MARGIN

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


def scaled(ax: Axes, a: Analysis, name: str) -> None:
    """Hack and solve of a label against the share of δS_hack that is kept: each seed a dot, the mean a line."""
    for metric in ("hack", "solve"):
        color, dash = METRIC_STYLE[metric]
        rates = {scale: a.deployed(name, metric, knobs=knobs) for scale, knobs in a.kept(name).items()}
        for scale, seeds in rates.items():
            ax.plot([scale] * len(seeds), list(seeds.values()), "o", color=color, markersize=3, alpha=0.45, mew=0)
        ax.plot(list(rates), [np.mean(list(s.values())) for s in rates.values()], color=color, linestyle=dash)
    share_axis(ax, "share of δS_hack kept")


FEW, NAMED, LONG = 12, 8, 16
"""Up to FEW labels are all named beside their points. Of more, controls go into a legend; and so does everything where
an arm has several labels, or where more than NAMED would be left to name. A legend that is LONG takes two columns.
"""


def pareto(ax: Axes, a: Analysis) -> None:
    """Deployed hack (down is better) against deployed solve (right is better), with the band of matched solve."""
    none, named = none_label(a), named_beside(a)
    names, bars, handles, right = [], [], [], 0.28
    base = Family("base", (), Style(INK, "-", "X"))
    for family in (*families(a), base):
        style = family.style
        points = [(f.name, a.deployed(f.name, "solve"), a.deployed(f.name, "hack")) for f in family.labels]
        for name, solve, hack in points or [("base", a.base("solve"), a.base("hack"))]:
            both = sorted(solve.keys() & hack.keys())
            if not both:
                continue
            x, y = ([values[s] for s in both] for values in (solve, hack))
            bars += cross(ax, x, y, style)
            centre = float(np.mean(x)), float(np.mean(y))
            ax.plot(*centre, marker=style.marker, color=style.color, markersize=8.5, mew=0.8, mec="white", linestyle="")
            right = max(right, centre[0])
            if name in named:
                names.append((name, centre, style.text))
        if family is not base and named.isdisjoint(label.name for label in family.labels):
            handles.append(Line2D([], [], linestyle="", marker=style.marker, color=style.color, label=family.name))
    if none and (matched := spread(a.deployed(none, "solve"))):
        ax.axvspan(matched.mean - MARGIN, matched.mean + MARGIN, color="#f1f1f1", zorder=0, linewidth=0)
        left = max(matched.mean - MARGIN, -0.05)
        ax.annotate(
            "matched solve", (left, 1.03), xytext=(4, -3), textcoords="offset points", va="top", color="#6a6a6a"
        )
    long = len(handles) > LONG
    ax.set(
        xlim=(-0.05, right + (0.45 if long else 0.22)),
        ylim=(-0.05, 1.03),
        xlabel="solve, deployed",
        ylabel="hack, deployed",
    )
    if handles:
        columns = dict(ncols=1 + long, columnspacing=0.8, handletextpad=0.2, labelspacing=0.25)
        ax.legend(handles=handles, loc="upper right", frameon=False, **columns)
    place(ax, names, bars)


def named_beside(a: Analysis) -> set[str]:
    """Names that stand beside their points."""
    if len(a.labels) <= FEW:
        return {*a.labels, "base"}
    methods = [f.name for f in families(a) if not is_control(f.labels[0])]
    folds = any(len(f.labels) > 1 for f in families(a))
    return {"base"} if folds or len(methods) > NAMED else {*methods, "base"}


def cross(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> list[Bar]:
    """Several seeds as small marks with the intervals of their mean; the horizontal interval's ends, for ``place``."""
    if len(x) < 2:
        return []
    ax.plot(x, y, linestyle="", marker=style.marker, color=style.color, markersize=3.6, alpha=0.4, mew=0)
    mx, my = stats.mean_interval(x), stats.mean_interval(y)
    ax.plot([mx.lo, mx.hi], [my.mean] * 2, color=style.color, linewidth=1, alpha=0.8)
    ax.plot([mx.mean] * 2, [my.lo, my.hi], color=style.color, linewidth=1, alpha=0.8)
    return [((mx.lo, my.mean), (mx.hi, my.mean))]


OFFSETS = [(11, 0, "left"), (-11, 0, "right"), (6, 11, "left"), (6, -11, "left"), (-6, 11, "right"), (-6, -11, "right"),
           (0, 15, "center"), (0, -15, "center"), (10, 21, "left"), (10, -21, "left"), (-10, 21, "right"),
           (14, 32, "left"), (14, -32, "left")]  # fmt: skip


def place(
    ax: Axes,
    names: Sequence[tuple[str, tuple[float, float], str]],
    bars: Sequence[Bar],
) -> None:
    """Names beside their points, each where it overlaps points, bars and names already placed the least."""
    scale = ax.figure.dpi / 72
    size = ax.xaxis.label.get_size() * scale
    ax.figure.canvas.draw()
    frame, at = ax.get_window_extent(), [ax.transData.transform(p) for _, p, _ in names]
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for ends in bars:
        (x0, y0), (x1, _) = ax.transData.transform(ends)
        taken.append((x0, y0 - 2, x1, y0 + 2))
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
