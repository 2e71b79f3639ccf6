"""Runs -> one HTML file that needs no network: ``just report [STUDY | RUN ...]``.

A page is sections of blocks: tables as ``studies.tables`` has them, figures as inline SVG, sentences, and the rollout
browser. files/page.html makes HTML of them and escapes what it is given.
"""

import html
import io
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jinja2
import matplotlib.pyplot as plt
import tyro

from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count
from projected_grpo.metrics import StepRow
from projected_grpo.report import data, figures, panels
from projected_grpo.report.data import Material
from projected_grpo.report.figures import BIG, HEIGHT, WIDTH, Figure, Panel
from projected_grpo.runs import write_text
from projected_grpo.studies import stats, tables
from projected_grpo.studies.layout import Table, made
from projected_grpo.studies.tables import tables_of

FILES = jinja2.PackageLoader("projected_grpo", "report/files")
NUMBER_IDS = re.compile(r' id="[A-Za-z.0-9]+_\d+"')
"""Names that matplotlib gives to groups; several figures on a page would have the same ones."""
GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "p": "⬟", "h": "⬢", "X": "✖", "*": "★"}
"""Of matplotlib's markers."""
STAGES = {"gen": "#0072B2", "grade": "#E69F00", "train": "#009E73"}
DRAWN = {"step", "hack_s", "attempt_s", "solve_s", "cin", "cin_null", "cout", "cout_update", "basis_overlap"}
"""What the figures show of a step."""


# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A panel as SVG. narrow: of a big one, how it is drawn where there is little room. told: what stands below it."""

    title: str
    svg: str
    narrow: str = ""
    told: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a legend, dash in SVG's words; or a point of one, by a glyph."""

    name: str
    color: str
    dash: str
    glyph: str


@dataclass(frozen=True)
class Drawings:
    """A figure, drawn."""

    caption: str
    legend: tuple[Line, ...]
    panels: tuple[Drawing, ...]


@dataclass(frozen=True)
class Folded:
    """A text that is shown when it is asked for."""

    summary: str
    folded: str


Block = Table | Drawings | Folded | str


@dataclass(frozen=True)
class Section:
    """A part of the page. browser: the rollout browser stands in it."""

    anchor: str
    heading: str
    blocks: Sequence[Block] = ()
    browser: bool = False


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
    body = body.replace("<svg", f'<svg role="img" aria-label="{html.escape(panel.title or name)}"', 1)
    return NUMBER_IDS.sub("", body)


def in_svg(dash: Any) -> str:
    """A line's dashes, as matplotlib has them, in SVG's words."""
    return "" if isinstance(dash, str) else " ".join(str(2 * d) for d in dash[1])


def drawn(figure: Figure) -> Drawings:
    """The figure with its panels drawn; of a big one twice, for much and for little room."""
    lines = [
        Line(name, style["color"], in_svg(style.get("linestyle", "-")), GLYPHS.get(style.get("marker", ""), ""))
        for name, style in figure.legend
    ]
    each = [
        Drawing(p.title, svg(p, name, *BIG), svg(p, f"{name}n")) if p.big else Drawing(p.title, svg(p, name))
        for i, p in enumerate(figure.panels)
        for name in (f"{figure.name}{i}",)
    ]
    return Drawings(figure.caption, tuple(lines), tuple(each))


# --- what stands in the sections ------------------------------------------------------------------------------------


def verdicts(m: Material) -> list[Block]:
    """The verdicts by the rules of docs/spec.md, for every arm that they can be asked of."""
    few = tables.not_asked(m.analysis)
    told = (
        "By the rules of docs/spec.md, read on each arm with a random control: it takes none, and for the aim honest."
    )
    return [" ".join(filter(None, (told, few))), *tables_of(m.analysis, tables.VERDICTS)]


def before_after(m: Material) -> list[Block]:
    """A single run's deploy evaluations, intervals clustered by problem."""
    evals = m.analysis.summary.tables["evals"]
    first, last = evals["step"].min(), evals["step"].max()
    cell = {}
    for r in evals.iter_rows(named=True):
        cell[r["step"], r["knobs"], r["mode"], r["metric"]] = f"{r['rate']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}]"
    keys = dict.fromkeys((r["mode"], r["knobs"]) for r in evals.iter_rows(named=True) if r["step"] == last)
    metrics, ends = ("hack", "attempt", "solve"), ("before", "after")
    rows = [
        (mode, knobs, *(cell.get((s, k, mode, x)) for x in metrics for s, k in ((first, "deployed"), (last, knobs))))
        for mode, knobs in keys
    ]
    table = made("", ("mode", "knobs", *(f"{x} {when}" for x in metrics for when in ends)), rows)
    told = "Held-out problems; [95 % interval, clustered by problem]. gt_only: no loophole."
    return [told, table] if table else []


def time_spent(m: Material) -> list[Block]:
    """Minutes a run by stage."""
    found = data.minutes_by_stage(m)
    if not found:
        return []
    stages = list(dict.fromkeys(s for row in found.values() for s in row))
    legend = tuple((s, dict(color=STAGES.get(s, "#8a8a8a"))) for s in stages)
    caption = "Sampling (gen), grading (grade), and forward, backward, projection and update (train); evaluation apart."
    panel = Panel("Minutes a run", lambda ax: panels.stacked(ax, found, dict(legend)), height=64 + 24 * len(found))
    return [drawn(Figure("time", "Time", caption, (panel,), legend))]


def diagnostics(m: Material) -> list[Block]:
    """Every number of a step that no figure above shows; a new field of StepRow turns up here by itself."""
    (steps,) = m.steps.values()
    found = []
    for name, f in StepRow.__dataclass_fields__.items():
        at = [(s["step"], s[name]) for s in steps if isinstance(s.get(name), int | float)]
        if name not in DRAWN and at:
            draw = lambda ax, at=at: panels.plain(ax, *zip(*at, strict=True))
            panel = Panel(name, draw, height=HEIGHT - 76)
            found.append(Drawing(name, svg(panel, f"d-{name}"), told=f.metadata["legend"]))
    return [Drawings("", (), tuple(found))]


def provenance(m: Material) -> list[Block]:
    """What each run was made with."""
    rows = []
    for r in m.analysis.summary.tables["runs"].iter_rows(named=True):
        meta = m.metas.get(r["run"], {})
        versions = " ".join(f"{k} {v}" for k, v in (meta.get("packages") or {}).items())
        rows.append(
            (*(r[k] for k in ("run", "label", "seed", "steps")), r["commit"] or "unknown", r["digest"],
             r["v_heldout_accuracy"], f"{r['minutes']:.1f}", meta.get("started"),
             f"python {meta.get('python', '–')} {versions}")
        )  # fmt: skip
    heads = ("run", "label", "seed", "steps", "code", "settings", "V accuracy", "minutes", "started", "versions")
    told = (
        "settings: a digest that all seeds of a label share. V accuracy: held-out pairs told apart. "
        "+ after a commit: the tree was changed."
    )
    known = ("argv", "config", "layers", "arm", "V")
    whole = [
        Folded(f"Everything in {run}/meta.json", json.dumps({k: meta.get(k) for k in known}, indent=1))
        for run, meta in m.metas.items()
        if m.single
    ]
    return [told, *filter(None, [made("", heads, rows)]), *whole]


def sections(m: Material) -> list[Section]:
    """Everything on the page, in order; a section without blocks is left out."""
    t, a = tables, m.analysis
    some = lambda *makers: tables_of(a, makers)
    hidden = ("story", "deployed") if m.single else ()
    figure = {f.name: [drawn(f)] for f in figures.figures_of(a) if f.name not in hidden}
    of = lambda name: figure.get(name, [])
    rollouts = [Section("rollouts", "Rollouts", browser=True)] if m.rollouts else []
    if m.single:
        parts = [
            Section("deploy", "Deployed", before_after(m)),
            Section("curves", "Training", of("curves")),
            Section("modes", "By mode", of("modes")),
            *rollouts,
            Section("gradient", "What V sees", [*of("gradient"), *of("overlap"), *of("probes"), *some(t.detector)]),
            Section("time", "Where time went", time_spent(m)),
            Section("diagnostics", "Other diagnostics", diagnostics(m)),
        ]
    else:
        levels = some(t.deployed, t.by_kind, t.by_mode, t.held_out, t.transfer)
        differences = some(*t.AGAINST_NONE, *t.AGAINST_RANDOM, t.AGAINST_COIN)
        parts = [
            Section("story", "Hack against gain kept", of("story")),
            Section("verdicts", "Verdicts", verdicts(m)),
            Section("deploy", "Deployed", [*of("deployed"), *levels]),
            Section("against", "Differences", differences),
            Section("curves", "Training", [*of("arms"), *of("curves"), *some(t.training)]),
            Section("modes", "By mode", of("modes")),
            Section("gradient", "What V sees", [*of("gradient"), *some(t.gradient, t.detector)]),
            Section("evasion", "Evasion", [*of("probes"), *some(t.probes)]),
            Section("ranks", "What the detector sees", [*of("ranks"), *some(t.ranks)]),
            Section("overlap", "Basis overlap", of("overlap")),
            Section("after", "After deployment", [*of("relearning"), *some(t.relearning, t.scales)]),
            *rollouts,
            Section("time", "Where time went", time_spent(m)),
        ]
    return [s for s in (*parts, Section("provenance", "Provenance", provenance(m))) if s.blocks or s.browser]


def lead(m: Material) -> list[tuple[str, str]]:
    """What it is: (term, text)."""
    s = m.analysis.summary
    if not m.single:
        terms = [("H.", s.H), ("Why.", s.why), ("Resolves.", s.resolve)]
    else:
        (meta,) = m.metas.values()
        arm, config = meta.get("arm") or {}, meta["config"]
        terms = [("Arm.", f"{config['intervention']}: {arm.get('math', '')}"), ("H.", arm.get("H", ""))]
        terms.append(("Run.", f"preset {config.get('preset')}, seed {config['seed']}, code {meta.get('commit')}"))
    return [(term, text) for term, text in terms if text]


def notes(m: Material) -> list[str]:
    """What a reader should know before the rest: what is left out, what cannot be said."""
    s, lacks = m.analysis.summary, None if m.single else m.analysis.without_landmarks()
    out = (
        [f"{len(s.tables['runs'])} of {s.n_jobs} runs. Left out: {tables.left_out(m.left_out)}."] if m.left_out else []
    )
    return [*out, *([f"Landmarks: {lacks}."] if lacks else []), *m.notes]


# --- the page -------------------------------------------------------------------------------------------------------


def pointed(head: str) -> str:
    """A table's head with the way that is better, where it names a rate."""
    if re.search(r"hack cut|random control by|solve(?! lost)|gain kept|AUROC|accuracy", head):
        return f"{head} ↑"
    return f"{head} ↓" if re.search(r"hack|attempt|solve lost", head) else head


def rendered(
    title: str, kind: str, found: Iterable[Section], packed: str = "", command: str = "just report", **more: Any
) -> str:
    """The page as text. packed: the rollouts as ``data.packed`` has them, or nothing."""
    env = jinja2.Environment(loader=FILES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["pointed"] = pointed
    style, script = (FILES.get_source(env, name)[0] for name in ("style.css", "browser.js"))
    return env.get_template("page.html").render(
        title=title, kind=kind, sections=list(found), packed=packed, command=command, style=style, script=script,
        verdicts=get_args(stats.Ruling), **{"lead": (), "notes": ()} | more,
    )  # fmt: skip


def page(m: Material, command: str) -> str:
    """A report's page. command: how it was made."""
    packed = data.packed(data.columns(m.rollouts, m.statements)) if m.rollouts else ""
    kind = "Run" if m.single else "Study"
    return rendered(m.title, kind, sections(m), packed, command, lead=lead(m), notes=notes(m))


def make(names: tuple[str, ...], outputs: Path, store: Path, rollouts: int, to: Path | None = None) -> Path:
    """Write the report; its file. Raises UserError when there is nothing to report."""
    m = data.material(names, outputs / "runs", store, rollouts)
    stem = re.sub(r"[^\w.+-]+", "-", m.analysis.summary.name)
    path = to or outputs / "reports" / f"{stem}.html"
    write_text(path, page(m, " ".join(("just report", *names))))
    for name, why in m.left_out.items():
        if why != "not run":
            print(f"left out: {name}: {why}")
    return path


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    store: str = "docs/results",
    rollouts: Count = data.MOST,
    to: str | None = None,
) -> None:
    """Write outputs/reports/NAME.html. rollouts: how many a report of several runs holds; one run's holds all."""
    start = time.perf_counter()
    path = make(names, Path(outputs), Path(store), rollouts, Path(to) if to else None)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_main(command(main))
