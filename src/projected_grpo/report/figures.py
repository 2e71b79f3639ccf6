"""A study's figures, from its analysis: what the report shows and what papers take (``just figures STUDY``).

    python -m projected_grpo.report.figures STUDY [STUDY ...] [--store=docs/results] [--to=docs/figures]

A ``Figure`` is a row of panels; a panel draws itself on a matplotlib Axes. Colours are Okabe & Ito's, and two of
Tol's muted ones, which colour-blind readers tell apart; on paper the dashes and markers tell them apart too.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError
from projected_grpo.report import panels
from projected_grpo.report import panels as looks
from projected_grpo.report import panels as panels_deployed
from projected_grpo.studies import summaries
from projected_grpo.studies.analysis import METRICS, WINDOW, Analysis
from projected_grpo.studies.stats import MARGIN
from projected_grpo.studies.summaries import PROBE

matplotlib.use("Agg")  # a file, never a window; has to come before pyplot

WIDTH, HEIGHT = 350, 236
"""Of a panel, in points: the report shows a point as a pixel, paper shrinks it to PAPER."""
BIG = 1.6, 1.2
"""How much wider and higher a big panel is where there is room; its text is as large as that of the others."""
PAPER = 0.72
CHARACTERS = 52
"""Of a legend, in a panel's width."""
RC = {
    "font.size": 12.0, "axes.titlesize": 12.5, "axes.labelsize": 12.0, "xtick.labelsize": 12.0, "ytick.labelsize": 12.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a8a8a", "axes.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "text.color": "#1c1c1c",
    "axes.labelcolor": "#3d3d3d", "xtick.color": "#5a5a5a", "ytick.color": "#5a5a5a",
    "xtick.major.size": 3.0, "ytick.major.size": 3.0, "lines.linewidth": 1.8, "svg.fonttype": "none",
    "figure.facecolor": "white",
}  # fmt: skip
SCALED = [key for key, value in RC.items() if isinstance(value, float)]


@dataclass(frozen=True)
class Panel:
    """A title and what draws on the axes. height: in points. big: shown larger where there is room."""

    title: str
    draw: Callable[[Axes], None]
    height: int = HEIGHT
    big: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels with one caption. legend: (name, style) of lines that are not labelled where they end."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, dict[str, Any]], ...] = field(default=())


def seeds_of(a: Analysis) -> str:
    """ "5 seeds", or "5–10 seeds" where labels differ."""
    counts = sorted({len(a.level(name, "hack")) for name in a.labels})
    return f"{counts[0]}" + (f"–{counts[-1]}" if len(counts) > 1 else "") + f" seed{'s' * (counts != [1])}"


def label_legend(a: Analysis) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Each family's line."""
    return tuple((family.name, family.style.line) for family in looks.families(a))


def greyed(a: Analysis) -> str:
    """What grey means, where it means something."""
    return " Controls are grey." if looks.greys_controls(a) else ""


def smoothed(a: Analysis, bands: bool = True) -> str:
    """How curves are drawn, in words."""
    several = seeds_of(a) != "1 seed"
    told = (f", mean of {seeds_of(a)}" if several else "") + (
        "; bands: least to most seed" if several and bands else ""
    )
    return f"Means over {WINDOW} steps of student rollouts{told}."


def story(a: Analysis) -> Figure | None:
    """Deployed hack against deployed solve."""
    if not any(a.deployed(name, "hack") for name in a.labels):
        return None
    caption = (
        f"Held-out problems, quarantine ablated. Small: a seed ({seeds_of(a)}); large: their mean, with its 95 % t "
        f"interval over seeds. Grey band: solve within {100 * MARGIN:.0f} points of none's mean. Down and right is "
        f"better.{greyed(a)}"
    )
    panel = Panel("", lambda ax: panels_deployed.pareto(ax, a), height=320, big=True)
    return Figure("story", "Hack against solve", caption, (panel,))


def curves(a: Analysis) -> Figure:
    """Hack, attempt and solve, a panel a label."""
    drawn = tuple(Panel(name, lambda ax, name=name: panels.rates(ax, a, name)) for name in a.labels)
    grey = " Dotted grey: hack under none." if len(a.labels) > 1 and looks.none_label(a) else ""
    legend = tuple((m, dict(color=c, linestyle=d)) for m, (c, d) in panels.METRIC_STYLE.items())
    return Figure("curves", "Training", f"{smoothed(a)} Quarantine kept.{grey}", drawn, legend)


def arms(a: Analysis) -> Figure | None:
    """All labels together."""
    if len(a.labels) < 2:
        return None
    drawn = tuple(
        Panel(metric, lambda ax, metric=metric: panels.compared(ax, a, f"{metric}_s")) for metric in ("hack", "solve")
    )
    caption = f"{smoothed(a, len(a.labels) <= panels.FEW)} Quarantine kept.{greyed(a)}"
    return Figure("arms", "Arms side by side", caption, drawn, label_legend(a))


def deployed(a: Analysis) -> Figure | None:
    """Deployed rates by label."""
    if not any(a.deployed(name, "hack") for name in a.labels):
        return None
    height = 70 + 24 * (len(a.labels) + 1)
    drawn = tuple(Panel(m, lambda ax, m=m: panels_deployed.dots(ax, a, m), height=height) for m in METRICS)
    caption = (
        f"Held-out problems, quarantine ablated. Dots: {seeds_of(a)}; bar: mean and its 95 % t interval over seeds. "
        "Base: the untrained model. Dotted: mean of none."
    )
    return Figure("deployed", "Deployed", caption, drawn)


def modes(a: Analysis) -> Figure:
    """By mode: hacks of every label, or all three rates of a single one."""
    names = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    single = len(a.labels) == 1
    draw = panels.rates_in_mode if single else panels.hack_in_mode
    drawn = tuple(Panel(mode, lambda ax, mode=mode: draw(ax, a, mode)) for mode in names if mode != PROBE)
    legend = (
        tuple((m, dict(color=c, linestyle=d)) for m, (c, d) in panels.METRIC_STYLE.items())
        if single
        else label_legend(a)
    )
    what = "Hack, attempt and solve" if single else "Hack"
    return Figure("modes", "By mode", f"{what} by mode of the loophole. {smoothed(a, single)}", drawn, legend)


def gradient(a: Analysis) -> Figure:
    """How much of the gradient is hack-ward, against what a random V would say."""
    drawn = tuple(Panel(name, lambda ax, name=name: panels.shares(ax, a, name)) for name in a.labels)
    legend = tuple((text, style) for text, style in panels.SHARE_STYLE.values())
    caption = (
        f"Hack-ward share of the gradient before the arm acts (cin), after (cout) and of δS's update (cout_Δ); null: "
        f"cin of a random V. Under one_sided cout is 0 by identity, which is no evidence. {smoothed(a)}"
    )
    return Figure("gradient", "What V sees", caption, drawn, legend)


def overlap(a: Analysis) -> Figure | None:
    """How far V turned at each refresh."""
    if not any(panels.has_values(a, name, "basis_overlap") for name in a.labels):
        return None
    panel = Panel("overlap at a refresh", lambda ax: panels.overlaps(ax, a))
    caption = f"Mean |⟨V_new, V_old⟩| at each refresh, {seeds_of(a)}; under 0.2 a refresh does harm."
    return Figure("overlap", "Basis overlap", caption, (panel,), label_legend(a))


def relearning(a: Analysis) -> Figure | None:
    """How soon hacking is back."""
    if not a.relearn:
        return None
    caption = (
        f"Attempts under plain GRPO, started from each label's deployed model; of none, from the untrained one. "
        f"{smoothed(a)}"
    )
    panel = Panel("attempts", lambda ax: panels.relearned(ax, a))
    return Figure("relearning", "Relearning", caption, (panel,), label_legend(a))


def quarantine(a: Analysis) -> Figure | None:
    """What the quarantine holds."""
    names = [name for name in a.labels if len(a.kept(name)) > 2]
    if not names:
        return None
    drawn = tuple(Panel(name, lambda ax, name=name: panels_deployed.scaled(ax, a, name)) for name in names)
    legend = tuple((m, dict(color=c, linestyle=d)) for m, (c, d) in panels.METRIC_STYLE.items() if m != "attempt")
    caption = (
        f"Held-out problems with δS_hack scaled: 0 is deployed, 1 as trained. Dots: {seeds_of(a)}; line: their mean."
    )
    return Figure("quarantine", "What the quarantine holds", caption, drawn, legend)


FIGURES: tuple[Callable[[Analysis], Figure | None], ...] = (
    story, deployed, arms, curves, modes, gradient, overlap, relearning, quarantine,
)  # fmt: skip


def figures_of(a: Analysis) -> list[Figure]:
    """All figures that the study has data for."""
    return [figure for make in FIGURES if (figure := make(a)) is not None]


@contextmanager
def look(scale: float = 1.0) -> Iterator[None]:
    """The house look, all sizes times ``scale``."""
    with plt.rc_context(RC | {key: RC[key] * scale for key in SCALED}):
        yield


def paper(figure: Figure, study: str, to: Path) -> list[Path]:
    """Write a figure as PNG and SVG with its caption in a text file beside them; the files."""
    n, across = len(figure.panels), min(3, len(figure.panels))
    down = -(-n // across)
    wider, higher = BIG if figure.panels[0].big else (1, 1)
    width, height = across * WIDTH * wider, down * figure.panels[0].height * higher
    longest = max((len(name) for name, _ in figure.legend), default=0) + 6  # with its line
    columns = max(1, min(4, len(figure.legend), int(CHARACTERS * across * wider) // longest))
    rows = -(-len(figure.legend) // columns)
    size = (width * PAPER / 72, height * PAPER / 72 + 0.2 * rows + 0.2 * bool(rows))
    with look(PAPER):
        drawn, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for ax, panel in zip(axes.flat, figure.panels, strict=False):
            panel.draw(ax)
            ax.set_title(panel.title)
        for ax in axes.flat[n:]:
            ax.axis("off")
        if figure.legend:
            handles = [Line2D([], [], label=name, **style) for name, style in figure.legend]
            drawn.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        to.mkdir(parents=True, exist_ok=True)
        paths = [to / f"{study}-{figure.name}.{kind}" for kind in ("png", "svg", "txt")]
        for path in paths[:2]:
            part = path.with_name(path.name + ".part")
            with plt.rc_context({"svg.hashsalt": path.stem}):
                metadata = {"Date": None} if path.suffix == ".svg" else None
                drawn.savefig(part, format=path.suffix[1:], dpi=160, metadata=metadata)
            os.replace(part, path)
        plt.close(drawn)
    paths[2].write_text(f"{figure.title}, study {study}. {figure.caption}\n")
    return paths


def main(names: tyro.conf.Positional[tuple[str, ...]], store: str = "docs/results", to: str = "docs/figures") -> None:
    """Draw the stored summaries of the named studies for papers."""
    if not names:
        raise UserError("name a study: `just figures headline`")
    for name in names:
        a = Analysis(summaries.load(Path(store) / name))
        for figure in figures_of(a):
            print(*paper(figure, name, Path(to)))


if __name__ == "__main__":
    run_main(command(main))
