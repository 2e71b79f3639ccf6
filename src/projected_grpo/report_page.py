"""A report's material -> one HTML page that needs nothing else."""

import json
from collections.abc import Callable

import matplotlib.pyplot as plt

from projected_grpo import figures, panels, rollout_pack, study_tables
from projected_grpo.figures import HEIGHT, Figure, Panel
from projected_grpo.metrics import StepRow
from projected_grpo.report_data import Material, minutes_by_stage
from projected_grpo.report_html import e, figure_html, filled, from_markdown, svg, table_html, template
from projected_grpo.results_docs import left_out

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
