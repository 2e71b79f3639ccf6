"""Pieces of a page: figures as inline SVG, tables, templates."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from projected_grpo import figures
from projected_grpo.figures import BIG, WIDTH, Figure, Panel

e = html.escape
NUMBER_IDS = re.compile(r' id="[A-Za-z.0-9]+_\d+"')
"""Names that matplotlib gives to groups; several figures on a page would have the same ones."""


def template(name: str) -> str:
    """A file of report_files."""
    return (files("projected_grpo") / "report_files" / name).read_text(encoding="utf-8")


def filled(text: str, **values: str) -> str:
    """``{{name}}`` replaced, in one pass, so that a value may hold braces."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], text)


def drawn_panel(panel: Panel, name: str) -> str:
    """A panel's SVG; of a big one two, of which the style shows the one that fits."""
    if not panel.big:
        return svg(panel, name)
    narrow = svg(panel, f"{name}n").replace("<svg", '<svg class="narrow"', 1)
    return svg(panel, name, *BIG).replace("<svg", '<svg class="wide"', 1) + narrow


def svg(panel: Panel, name: str, wider: float = 1.0, higher: float = 1.0) -> str:
    """A panel as inline SVG, a point as a pixel; text stays text. wider, higher: of the panel, not of its text."""
    width, height = round(WIDTH * wider), round(panel.height * higher)
    with figures.look(), plt.rc_context({"svg.hashsalt": name}):
        drawn, ax = plt.subplots(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        panel.draw(ax)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawn)
    body = out.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", body, flags=re.S)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{width}"', body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 height="{height}"', body, count=1)
    body = body.replace("<svg", f'<svg role="img" aria-label="{e(panel.title or name, quote=True)}"', 1)
    return NUMBER_IDS.sub("", body)


def swatch(style: dict[str, Any]) -> str:
    """A line of a legend."""
    dash = style.get("linestyle", "-")
    pattern = "" if isinstance(dash, str) else f' stroke-dasharray="{" ".join(str(2 * d) for d in dash[1])}"'
    return (
        '<svg width="28" height="8" aria-hidden="true"><line x1="0" x2="28" y1="4" y2="4" '
        f'stroke="{style["color"]}" stroke-width="2"{pattern}/></svg>'
    )


def heading(title: str) -> str:
    """Of a panel; nothing where it has no title."""
    return f"<h4>{e(title)}</h4>" if title else ""


def figure_html(figure: Figure) -> str:
    """Caption, legend, panels."""
    legend = "".join(f"<li>{swatch(style)}{e(name)}</li>" for name, style in figure.legend)
    drawn = "".join(
        f'<figure class="panel{" big" * p.big}">{heading(p.title)}{drawn_panel(p, f"{figure.name}{i}")}</figure>'
        for i, p in enumerate(figure.panels)
    )
    return (
        f'<p class="caption">{e(figure.caption)}</p>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<div class="panels">{drawn}</div>'
    )


def table_html(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """A table that scrolls by itself where it is too wide."""
    head = "".join(f"<th>{e(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{e(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    heading = f"<h3>{e(title)}</h3>" if title else ""
    return f'{heading}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def from_markdown(text: str) -> str:
    """Titled tables as docs/results.md has them: "### title", then a pipe table, once or more."""
    out = []
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        title, *lines = [line for line in part.splitlines() if line.strip()]
        cells = [[c.strip().replace("**", "") for c in line.strip().strip("|").split("|")] for line in lines]
        out.append(table_html(cells[0], cells[2:], title))
    return "".join(out)


def write(text: str, path: Path) -> None:
    """To a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
