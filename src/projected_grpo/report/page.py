"""Pieces of a page: figures as inline SVG, tables, templates."""

import html
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro

from projected_grpo.command_line import command, run_main
from projected_grpo.metrics import StepRow
from projected_grpo.report import data as report_data
from projected_grpo.report import data as rollout_pack
from projected_grpo.report import figures, panels
from projected_grpo.report.data import Material, minutes_by_stage
from projected_grpo.report.figures import BIG, HEIGHT, WIDTH, Figure, Panel
from projected_grpo.studies import tables as study_tables
from projected_grpo.studies.tables import left_out

e = html.escape
NUMBER_IDS = re.compile(r' id="[A-Za-z.0-9]+_\d+"')
"""Names that matplotlib gives to groups; several figures on a page would have the same ones."""


def template(name: str) -> str:
    """A file of report/files."""
    return (files("projected_grpo") / "report" / "files" / name).read_text(encoding="utf-8")


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


STAGES = {"gen": "#0072B2", "grade": "#E69F00", "train": "#009E73"}
DRAWN = {"step", "hack_s", "attempt_s", "solve_s", "cin", "cin_null", "cout", "cout_update", "basis_overlap"}


def tables(m: Material, *makers: Callable) -> str:
    """Tables of docs/results.md, those that there is data for."""
    return "".join(from_markdown(text) for make in makers if (text := make(m.analysis)))


def h1_html(m: Material) -> str:
    """H1's verdict for every arm that it can be asked of."""
    rows = []
    for label, none in m.analysis.candidates():
        for kind, where in (("deploy_", "deployed"), ("", "end of training")):
            if found := m.analysis.h1(label, none, kind):
                control = "–" if found.over_control is None else str(found.over_control)
                cells = (where, str(found.cut), str(found.loss), control, str(found.cut.n), found.why)
                rows.append(
                    f'<tr><td>{e(label.name)}</td><td class="verdict {found.verdict}">{found.verdict}</td>'
                    + "".join(f"<td>{e(c)}</td>" for c in cells) + "</tr>"
                )  # fmt: skip
    if not rows:
        return "<p>H1 cannot be asked here: it needs an arm with a random control, and none.</p>"
    heads = ("arm", "H1", "measured", "hack cut", "solve lost", "hack under control by", "n", "why")
    return (
        '<p class="caption">By the rule of docs/spec.md, read on each arm with a random control against none.</p>'
        '<div class="scroll"><table><thead><tr>' + "".join(f"<th>{h}</th>" for h in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )  # fmt: skip


def before_after(m: Material) -> str:
    """A single run's deploy evaluations, intervals clustered by problem."""
    evals = m.analysis.summary.tables["evals"]
    first, last = evals["step"].min(), evals["step"].max()
    cell = {}
    for r in evals.iter_rows(named=True):
        cell[r["step"], r["knobs"], r["mode"], r["metric"]] = f"{r['rate']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}]"
    keys = dict.fromkeys((r["mode"], r["knobs"]) for r in evals.iter_rows(named=True) if r["step"] == last)
    rows = [
        (mode, knobs, *(cell.get((s, k, mode, x), "–") for x in ("hack", "attempt", "solve")
                        for s, k in ((first, "deployed"), (last, knobs))))
        for mode, knobs in keys
    ]  # fmt: skip
    heads = ("mode", "knobs", *(f"{x} {when}" for x in ("hack", "attempt", "solve") for when in ("before", "after")))
    told = '<p class="caption">Held-out problems; [95 % interval, clustered by problem]. gt_only: no loophole.</p>'
    return told + table_html(heads, rows)


def time_html(m: Material) -> str:
    """Minutes a run by stage."""
    found = minutes_by_stage(m)
    stages = list(dict.fromkeys(s for row in found.values() for s in row))

    def bars(ax: plt.Axes) -> None:
        left = [0.0] * len(found)
        for stage in stages:
            width = [row.get(stage, 0.0) for row in found.values()]
            ax.barh(list(found), width, left=left, color=STAGES.get(stage, "#8a8a8a"), height=0.62)
            left = [a + b for a, b in zip(left, width, strict=True)]
        ax.invert_yaxis()
        ax.set_xlabel("minutes a run")
        ax.tick_params(axis="y", length=0)

    legend = tuple((s, dict(color=STAGES.get(s, "#8a8a8a"))) for s in stages)
    caption = "Sampling (gen), grading (grade), and forward, backward, projection and update (train); evaluation apart."
    panel = Panel("Minutes a run", bars, height=64 + 24 * len(found))
    return figure_html(Figure("time", "Time", caption, (panel,), legend))


def diagnostics_html(m: Material) -> str:
    """Every number of a step that no figure above shows; a new field of StepRow turns up here by itself."""
    (steps,) = m.steps.values()
    drawn = []
    for name, f in StepRow.__dataclass_fields__.items():
        at = [(s["step"], s[name]) for s in steps if isinstance(s.get(name), int | float)]
        if name not in DRAWN and at:
            draw = lambda ax, at=at: panels.plain(ax, *zip(*at, strict=True))
            panel = svg(Panel(name, draw, height=HEIGHT - 76), f"d-{name}")
            told = e(f.metadata["legend"])
            drawn.append(f'<figure class="panel"><h4>{name}</h4>{panel}<p class="caption">{told}</p></figure>')
    return f'<div class="panels">{"".join(drawn)}</div>'


def provenance(m: Material) -> str:
    """What each run was made with."""
    rows = []
    for r in m.analysis.summary.tables["runs"].iter_rows(named=True):
        meta = m.metas.get(r["run"], {})
        versions = " ".join(f"{k} {v}" for k, v in (meta.get("packages") or {}).items())
        accuracy = "–" if r["v_heldout_accuracy"] is None else f"{r['v_heldout_accuracy']:.2f}"
        rows.append(
            (r["run"], r["label"], r["seed"], r["steps"], r["commit"] or "unknown", r["digest"], accuracy,
             f"{r['minutes']:.1f}", meta.get("started", "–"), f"python {meta.get('python', '–')} {versions}")
        )  # fmt: skip
    heads = ("run", "label", "seed", "steps", "code", "settings", "V accuracy", "minutes", "started", "versions")
    told = (
        '<p class="caption">settings: a digest that all seeds of a label share. V accuracy: held-out pairs told apart. '
        "+ after a commit: the tree was changed.</p>"
    )
    out = told + table_html(heads, rows)
    for run, meta in m.metas.items() if m.single else ():
        text = json.dumps({k: meta.get(k) for k in ("argv", "config", "layers", "arm", "V")}, indent=1)
        out += f"<details><summary>Everything in {e(run)}/meta.json</summary><pre>{e(text)}</pre></details>"
    return out


def lead(m: Material) -> str:
    """What it is, what is left out."""
    s = m.analysis.summary
    terms = [(t, text) for t, text in (("H.", s.H), ("Why.", s.why), ("Resolves.", s.resolve)) if text]
    if m.single:
        (meta,) = m.metas.values()
        arm, config = meta.get("arm") or {}, meta["config"]
        terms = [("Arm.", f"{config['intervention']}: {arm.get('math', '')}"), ("H.", arm.get("H", ""))]
        terms.append(("Run.", f"preset {config.get('preset')}, seed {config['seed']}, code {meta.get('commit')}"))
    out = '<dl class="lead">' + "".join(f"<dt>{e(t)}</dt><dd>{e(text)}</dd>" for t, text in terms if text) + "</dl>"
    notes = [f"<li>{e(note)}</li>" for note in m.notes]
    if m.left_out:
        n = len(s.tables["runs"])
        notes.insert(0, f"<li>{n} of {s.n_jobs} runs. Left out: {e(left_out(m.left_out))}.</li>")
    return out + (f'<div class="warning"><ul>{"".join(notes)}</ul></div>' if notes else "")


def sections(m: Material) -> list[tuple[str, str, str]]:
    """(anchor, heading, body) of everything on the page."""
    t, a = study_tables, m.analysis
    body = {f.name: figure_html(f) for f in figures.figures_of(a) if not (m.single and f.name in ("story", "deployed"))}
    rollouts = [("rollouts", "Rollouts", template("browser.html"))] if m.rollouts else []
    if m.single:
        parts = [
            ("deploy", "Deployed", before_after(m)), ("curves", "Training", body["curves"]),
            ("modes", "By mode", body["modes"]), *rollouts,
            ("gradient", "What V sees", body["gradient"] + body.get("overlap", "") + tables(m, t.detector)),
            ("time", "Where time went", time_html(m)), ("diagnostics", "Other diagnostics", diagnostics_html(m)),
        ]  # fmt: skip
    else:
        parts = [
            ("story", "Hack against solve", body.get("story", "")), ("h1", "H1", h1_html(m)),
            ("deploy", "Deployed", body.get("deployed", "") + tables(m, t.deployed, t.by_mode, t.held_out)),
            ("against", "Differences", tables(m, t.against_none, t.against_random)),
            ("curves", "Training", body.get("arms", "") + body["curves"] + tables(m, t.training)),
            ("modes", "By mode", body["modes"]),
            ("gradient", "What V sees", body["gradient"] + tables(m, t.gradient, t.detector)),
            ("overlap", "Basis overlap", body.get("overlap", "")),
            ("after", "After deployment", tables(m, t.relearning, t.scales)), *rollouts,
            ("time", "Where time went", time_html(m) if m.steps else ""),
        ]  # fmt: skip
    return [p for p in (*parts, ("provenance", "Provenance", provenance(m))) if p[2]]


def assembled(title: str, kind: str, lead: str, found: list[tuple[str, str, str]], packed: str, foot: str) -> str:
    """The page of sections. packed: the rollouts as ``rollout_pack.packed`` has them, or nothing."""
    nav = "".join(f'<a href="#{name}">{e(heading)}</a>' for name, heading, _ in found)
    body = "\n".join(f'<section id="{name}"><h2>{e(heading)}</h2>{text}</section>' for name, heading, text in found)
    data = f'<script type="text/plain" id="rollout-data">{packed}</script>' if packed else ""
    return filled(
        template("page.html"), title=e(title), kind=kind, style=template("style.css"), lead=lead, nav=nav,
        sections=body, foot=foot, data=data, script=template("browser.js"),
    )  # fmt: skip


def browser_page(title: str, packed: str) -> str:
    """A page of rollouts alone."""
    return assembled(title, "Rollouts", "", [("rollouts", "Rollouts", template("browser.html"))], packed, "")


def page(m: Material, command: str) -> str:
    """The whole page. command: how it was made."""
    packed = rollout_pack.packed(rollout_pack.columns(m.rollouts, m.statements)) if m.rollouts else ""
    kind, foot = "Run" if m.single else "Study", f"Made by <code>{e(command)}</code>"
    return assembled(m.title, kind, lead(m), sections(m), packed, foot)


def make(names: tuple[str, ...], outputs: Path, store: Path, rollouts: int, to: Path | None = None) -> Path:
    """Write the report; its file. Raises UserError when there is nothing to report."""
    m = report_data.material(names, outputs / "runs", store, rollouts)
    stem = re.sub(r"[^\w.+-]+", "-", m.analysis.summary.name)
    path = to or outputs / "reports" / f"{stem}.html"
    write(page(m, " ".join(("just report", *names))), path)
    for name, why in m.left_out.items():
        if why != "not run":
            print(f"left out: {name}: {why}")
    return path


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    outputs: str = "outputs",
    store: str = "docs/results",
    rollouts: int = report_data.MOST,
    to: str | None = None,
) -> None:
    """Write outputs/reports/NAME.html. rollouts: how many a report of several runs holds; one run's holds all."""
    start = time.perf_counter()
    path = make(names, Path(outputs), Path(store), rollouts, Path(to) if to else None)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_main(command(main))
