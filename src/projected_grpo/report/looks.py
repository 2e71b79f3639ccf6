"""How a label looks wherever it stands: its colour, dash and marker, the same in every figure of a study."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from projected_grpo import arms
from projected_grpo.studies.analysis import HONEST, Analysis, Label

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933")
GREYS = ("#6a6a6a", "#949494", "#b4b4b4")
DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)))
MARKERS = ("o", "s", "D", "^", "v", "P", "p", "h")
INK, GREY = "#1c1c1c", "#8a8a8a"


@dataclass(frozen=True)
class Style:
    """How a label looks."""

    color: str
    dash: Any
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Of its line, in matplotlib's words."""
        return dict(color=self.color, linestyle=self.dash)

    @property
    def text(self) -> str:
        """Of its name: no grey lighter than can be read."""
        return GREYS[0] if self.color in GREYS else self.color


@dataclass(frozen=True)
class Family:
    """Labels that look alike: the folds of an arm, each with another mode left out; else a label by itself."""

    name: str
    labels: tuple[Label, ...]
    style: Style


def none_label(a: Analysis) -> str | None:
    """The first label of plain GRPO, its loopholes in place."""
    return next((name for name, x in a.labels.items() if x.arm == "none" and not x.no_loophole), None)


def honest_label(a: Analysis) -> str | None:
    """The first label that is paid for right answers alone."""
    return next((name for name, label in a.labels.items() if label.arm == HONEST), None)


def no_loophole_label(a: Analysis) -> str | None:
    """The first label of plain GRPO that trains on prompts without a loophole."""
    return next((name for name, label in a.labels.items() if label.no_loophole), None)


def is_control(label: Label) -> bool:
    """Whether its arm is there to be beaten."""
    return label.arm in arms.ARMS and arms.ARMS[label.arm].is_control


def grouped(a: Analysis) -> list[tuple[Label, ...]]:
    """Labels by family, in their order. Labels that leave out one mode twice between them stay by themselves."""
    alike: dict[tuple[str, bool, frozenset[str]], list[Label]] = {}
    for label in a.labels.values():
        settings = label.overrides - {"--known-modes", *label.modes}
        alike.setdefault((label.arm, bool(label.heldout), settings), []).append(label)
    out: list[tuple[Label, ...]] = []
    for labels in alike.values():
        left_out = [mode for label in labels for mode in label.heldout]
        folds = all(label.heldout for label in labels) and len(left_out) == len(set(left_out))
        out += [tuple(labels)] if folds else [(label,) for label in labels]
    return out


def family_name(labels: Sequence[Label]) -> str:
    """The label's name; of folds, without the mode that is left out."""
    first = labels[0]
    return first.name if len(labels) == 1 else " ".join(w for w in first.name.split() if w not in first.heldout)


def greys_controls(a: Analysis) -> bool:
    """Whether controls are grey: where they stand beside something else than plain GRPO."""
    kinds = {is_control(label) for name, label in a.labels.items() if name != none_label(a)}
    return kinds == {True, False}


def families(a: Analysis) -> list[Family]:
    """Landmarks (none, honest, none without a loophole) are black, controls are grey or, where nothing else is there,
    like the others; those go through the palette, and through dashes when it is used up.
    """
    groups, mixed = grouped(a), greys_controls(a)
    marks = {none_label(a): "o", honest_label(a): "*", no_loophole_label(a): "P"}
    black = {name: Style(INK, dash, mark) for (name, mark), dash in zip(marks.items(), DASHES, strict=False)}
    used: dict[tuple[str, ...], int] = {PALETTE: 0, GREYS: 0}
    out = []
    for labels in groups:
        if labels[0].name in black:
            style = black[labels[0].name]
        else:
            colors = GREYS if mixed and is_control(labels[0]) else PALETTE
            i = used[colors]
            used[colors] += 1
            turn, j = divmod(i, len(colors))
            style = Style(colors[j], DASHES[turn % len(DASHES)], MARKERS[(j + 3 * turn) % len(MARKERS)])
        out.append(Family(family_name(labels), labels, style))
    return out


def styles(a: Analysis) -> dict[str, Style]:
    """By label."""
    found = {label.name: family.style for family in families(a) for label in family.labels}
    return {name: found[name] for name in a.labels}
