"""A study's figures, from its analysis: what the report shows and what papers take (``just figures STUDY``).

A ``Figure`` is a row of panels; a panel draws itself on a matplotlib Axes. Colours are Okabe & Ito's, and two of
Tol's muted ones, which colour-blind readers tell apart; on paper the dashes and markers tell them apart too.
"""

import io
import re
import shutil
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
from PIL import Image

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError
from projected_grpo.report import looks, panels
from projected_grpo.studies import summaries
from projected_grpo.studies.analysis import EARLY, METRICS, WINDOW, Analysis
from projected_grpo.studies.stats import MARGIN
from projected_grpo.studies.summaries import PROBE

matplotlib.use("Agg")  # a file, never a window; has to come before pyplot

WIDTH, HEIGHT = 350, 236
"""Of a panel, in points: the report shows a point as a pixel, paper shrinks it to PAPER."""
BIG = 1.6, 1.2
"""How much wider and higher a big panel is where there is room; its text is as large as that of the others."""
PAPER = 0.72
COLOURS = 64
"""Of a PNG: a third of the size of one in full colour, and no difference to see."""
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
    """Deployed hack against gain kept."""
    if not any(a.deployed(name, "hack") for name in a.labels):
        return None
    gain = panels.keeps(a)
    missing = [name for name, label in a.labels.items() if gain and not a.gains(label)[0]]
    told = (
        "Gain kept: solve over the untrained base's, as a share of what honest (paid for right answers alone) gains. "
        "Black: base, honest, none, and none without a loophole if it was run. Tinted: the aim. Up and left is better."
        if gain
        else f"Gain kept is undefined here, so that solve stands in its place; grey band: solve within "
        f"{100 * MARGIN:.0f} points of none's mean. Up and left is better."
    )
    caption = (
        f"Held-out problems, quarantine ablated. Small: a seed ({seeds_of(a)}); large: their mean, with its 95 % t "
        f"interval over seeds. {told}{greyed(a)}"
    ) + (f" Not drawn, gain kept being undefined: {', '.join(missing)}." if missing else "")
    corners = {"All": False, "The aim's corner, larger": True} if panels.crowded(a) else {"": False}
    drawn = [Panel(t, lambda ax, c=c: panels.plane(ax, a, c), height=320, big=True) for t, c in corners.items()]
    title = f"Hack against {'gain kept' if gain else 'solve'}"
    return Figure("story", title, caption, tuple(drawn), panels.in_legend(a))


def curves(a: Analysis) -> Figure:
    """Hack, attempt and solve, a panel a label."""
    drawn = tuple(Panel(name, lambda ax, name=name: panels.rates(ax, a, name)) for name in a.labels)
    lines = (
        ("Dotted grey: hack under none.", looks.none_label(a)),
        ("Dashed: solve under honest.", looks.honest_label(a)),
    )
    grey = "".join(f" {told}" for told, name in lines if name and len(a.labels) > 1)
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
    drawn = tuple(Panel(m, lambda ax, m=m: panels.dots(ax, a, m), height=height) for m in METRICS)
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


def probes(a: Analysis) -> Figure | None:
    """Whether the policy evades the detector that acts."""
    names = [n for n, x in a.labels.items() if x.obeys_flags and panels.has_values(a, n, "caught_held_out")]
    if not names:
        return None
    drawn = tuple(Panel(name, lambda ax, name=name: panels.watched(ax, a, name)) for name in names)
    caption = (
        "Of student rollouts that fool their channel, the share that the acting detector flags, and that a probe flags "
        "which nothing is trained against. The first alone falls: the policy evades; both fall: it hides. "
        f"Steps with few hacks say little. {smoothed(a)}"
    )
    return Figure("probes", "Evasion", caption, drawn, tuple(panels.PROBE_STYLE.values()))


def ranks(a: Analysis) -> Figure | None:
    """Whether what a detector saw at first tells what is hacked in the end."""
    found = panels.rankers(a)
    if not any(looks.is_control(a.labels[name]) for name in found):
        return None
    caption = (
        f"A point a run of an arm that obeys a detector. Across: P(a rollout that fools its channel scores over one "
        f"that does not), mean over the first {EARLY} steps; upward: deployed hack after training. Random probes are "
        "good or bad by luck."
    )
    panel = Panel("", lambda ax: panels.ranked(ax, a), height=280, big=True)
    legend = tuple((n, dict(color=s.color, marker=s.marker, linestyle="")) for n, s in found.items())
    return Figure("ranks", "What the detector sees, and what it prevents", caption, (panel,), legend)


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


FIGURES: tuple[Callable[[Analysis], Figure | None], ...] = (
    story, deployed, arms, curves, modes, gradient, probes, ranks, overlap, relearning,
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
    """Write a figure as PNG (COLOURS of them) and SVG with its caption in a text file beside them; the files."""
    n, across = len(figure.panels), min(3, len(figure.panels))
    down = -(-n // across)
    wider, higher = BIG if figure.panels[0].big and n == 1 else (1, 1)
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
        png, svg, caption = paths = [to / f"{study}-{figure.name}.{kind}" for kind in ("png", "svg", "txt")]
        with plt.rc_context({"svg.hashsalt": svg.stem}):
            drawn.savefig(svg, format="svg", metadata={"Date": None})
        pixels = io.BytesIO()
        drawn.savefig(pixels, format="png", dpi=160)
        Image.open(pixels).convert("RGB").quantize(
            COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
        ).save(png, optimize=True)
        plt.close(drawn)
    caption.write_text(f"{figure.title}, study {study}. {figure.caption}\n")
    return paths


def cited(root: Path) -> set[str]:
    """Names of the figures that README.md and docs/ show."""
    pages = (p.read_text() for p in (root / "README.md", *(root / "docs").rglob("*.md")) if p.exists())
    return {name for page in pages for name in re.findall(r"figures/([\w.-]+\.png)", page)}


def main(names: tyro.conf.Positional[tuple[str, ...]], root: str = ".", outputs: str = "outputs") -> None:
    """Draw the named studies' stored summaries into outputs/figures; PNGs that a page cites go to docs/figures too."""
    if not names:
        raise UserError("name a study: `just figures headline`")
    shown = cited(Path(root))
    for name in names:
        a = Analysis(summaries.load(Path(root) / "docs" / "results", name))
        for figure in figures_of(a):
            png, *_ = paths = paper(figure, name, Path(outputs) / "figures")
            if png.name in shown:
                paths.append(Path(root) / "docs" / "figures" / png.name)
                paths[-1].parent.mkdir(exist_ok=True)
                shutil.copyfile(png, paths[-1])
            print(*paths)


if __name__ == "__main__":
    run_main(command(main))
