"""What a panel of a figure shows: an ``Analysis`` drawn on a matplotlib Axes. Rates are shares, 0 to 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from projected_grpo import stats
from projected_grpo.analysis import WINDOW, Analysis
from projected_grpo.looks import DASHES, GREY, INK, none_label, styles
from projected_grpo.stats import Values

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


def band(curves: Mapping[int, Values]) -> tuple[Values, Values, Values, Values] | None:
    """(steps, mean, least, most) over seeds of curves smoothed over WINDOW steps; None without a value.

    A point stands at the last step of its window. Curves are cut to the shortest.
    """
    if not curves:
        return None
    steps = min(map(len, curves.values()))
    smooth = np.stack([stats.rolling(c[:steps], WINDOW) for c in curves.values()])
    if np.isnan(smooth).all():
        return None
    at = np.arange(steps - smooth.shape[1], steps, dtype=np.float64)
    return at, smooth.mean(0), smooth.min(0), smooth.max(0)


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
    """Hack, attempt and solve of a label over training, with none's hack for reference."""
    none = none_label(a)
    if none and none != name:
        curve(ax, a.curves[none, "hack_s"], fill=False, color=GREY, linestyle=DASHES[2], linewidth=1.4)
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
