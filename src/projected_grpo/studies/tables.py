"""Numbers quoted in prose: ``0.73 <!-- results: STUDY/LABEL/MEASURE -->`` is checked against the stored summaries.

A quote may be rounded as it likes (0.7, 0.73) or be a percentage (73 %). ``numbers`` lists what can be quoted.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from tabulate import tabulate

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError
from projected_grpo.evals import LAST
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.studies import stats
from projected_grpo.studies.analysis import (
    METRICS,
    ONSET_LEVEL,
    WINDOW,
    Analysis,
    Comparison,
    Label,
    Seeds,
    coin_of,
    control_of,
)
from projected_grpo.studies.stats import MIN_SEEDS
from projected_grpo.studies.summaries import PHASES, PROBE, stored

QUOTE = re.compile(r"(?:(?P<number>[+-]?\d*\.?\d+)\s*(?P<percent>%?)\s*)?<!-- results: (?P<key>[^>]*?) -->")
FENCE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
"""Code, in which a quote is an example."""


def quoted_numbers(a: Analysis) -> dict[str, float]:
    """ "study/label/measure" -> mean over seeds. Measures: hack, attempt, solve, peak at the end of training; the same
    with deploy_ or base_, also @mode; n; cut_hack and cut_solve (none's deployed rate − the label's, seed-paired) and
    control_hack (the random control's − the label's). The label "base" has deploy_… of the untrained model.
    """
    out: dict[str, float] = {}
    for label in a.labels.values():
        measures = {m: a.level(label.name, m) for m in METRICS} | {"peak": a.peak(label.name)}
        for metric in METRICS:
            for mode in ("", "@gt_only", *(f"@{m}" for m in label.modes)):
                for kind in ("deploy_", "base_"):
                    measures[f"{kind}{metric}{mode}"] = a.level(label.name, f"{kind}{metric}{mode}")
        out |= {f"{label.name}/{m}": float(np.mean(list(seeds.values()))) for m, seeds in measures.items() if seeds}
        out[f"{label.name}/n"] = float(len(a.level(label.name, "hack")))
        none, control = a.reference(label, "none"), a.reference(label, control_of(label.arm))
        for name, other, metric in (("cut", none, "hack"), ("cut", none, "solve"), ("control", control, "hack")):
            if other and (found := a.compare(other.name, label.name, f"deploy_{metric}")):
                out[f"{label.name}/{name}_{metric}"] = found.t.mean
    for mode in ("", f"@{PROBE}"):
        base = {f"deploy_{m}{mode}": a.base(m, mode[1:] or "all") for m in METRICS}
        out |= {f"base/{m}": float(np.mean(list(seeds.values()))) for m, seeds in base.items() if seeds}
    return {f"{a.summary.name}/{key}": value for key, value in out.items()}


def wrong(text: str, known: Mapping[str, float]) -> list[str]:
    """Quotes of a page that do not hold, a line each; [] when all do. Quotes inside code are examples."""
    out = []
    for quote in QUOTE.finditer(FENCE.sub("", text)):
        key, number = quote["key"], quote["number"]
        if number is None:
            out.append(f"no number stands before the quote of {key}")
        elif key not in known:
            out.append(f"{number} quotes {key}, which no stored summary has")
        else:
            value = known[key] * (100 if quote["percent"] else 1)
            digits = len(number.partition(".")[2])
            if abs(float(number) - value) > 0.5 * 10**-digits + 1e-6:
                out.append(f"{number} quotes {key}, which is {value:.{digits + 1}f}")
    return out


NOTHING = "–"
Reference = Callable[[Analysis, Label], Label | None]
"""Which label a label is compared with."""


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A titled Markdown table that reads well raw too."""
    cells = [[NOTHING if c is None else str(c) for c in row] for row in rows]
    return f"### {title}\n\n" + tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True)


def mean(seeds: Seeds) -> str | None:
    """Mean over seeds with its interval."""
    return str(stats.mean_interval(list(seeds.values()))) if seeds else None


def short(seeds: Seeds) -> str | None:
    """Mean over seeds alone."""
    return f"{np.mean(list(seeds.values())):.2f}" if seeds else None


def gain(after: Seeds, before: Seeds) -> str | None:
    """after − before, seed by seed, with its interval."""
    return mean({s: after[s] - before[s] for s in sorted(after.keys() & before.keys())})


def differences(a: Analysis, title: str, of: Reference, measure: str) -> str | None:
    """Each label minus its reference in one measure, with intervals and tests, Holm over the table."""
    found: list[tuple[Label, Comparison]] = []
    for label in a.labels.values():
        if (other := of(a, label)) and (c := a.compare(label.name, other.name, measure)):
            found.append((label, c))
    if not found:
        return None
    flips, splits = stats.holm([c.flip.p for _, c in found]), stats.holm([c.split.p for _, c in found])
    rows = [
        [label.shown, c.reference, c.t.n, c.t, interval(c.boot), p_cell(c.flip, f), p_cell(c.split, s), c.tost.short]
        for (label, c), f, s in zip(found, flips, splits, strict=True)
    ]
    return table(title, ("label", "minus", "pairs", "Δ [t]", "boot", "flip p", "split p", "TOST p"), rows)


def interval(x: stats.Interval) -> str | None:
    """An interval without its mean."""
    return None if x.lo is None else f"[{x.lo:z.2f}, {x.hi:z.2f}]"


def p_cell(p: stats.Permutation, holm: float) -> str:
    """p, the smallest attainable, and Holm's."""
    return f"{p.p:.3f} ({p.smallest:.3f}) → {holm:.3f}"


def none_of(a: Analysis, label: Label) -> Label | None:
    """The none label that a label is compared with; none itself is compared with nothing."""
    return None if label.arm == "none" else a.reference(label, "none")


def random_of(a: Analysis, label: Label) -> Label | None:
    """The label's own random control."""
    return a.reference(label, control) if (control := control_of(label.arm)) else None


def tossed_of(a: Analysis, label: Label) -> Label | None:
    """The label's own coin control."""
    return a.reference(label, coin) if (coin := coin_of(label.arm)) else None


def against(a: Analysis, who: str, of: Reference) -> str | None:
    """Differences to a reference, and whether solve is shown to be matched."""
    titles = {"deploy_hack": "Deployed hack", "hack": "End-of-training hack", "deploy_solve": "Deployed solve"}
    parts = [differences(a, f"{title}, minus {who}", of, measure) for measure, title in titles.items()]
    return "\n\n".join(p for p in (*parts, matched_solve(a, who, of)) if p) or None


def against_none(a: Analysis) -> str | None:
    """Against plain GRPO."""
    return against(a, "none", none_of)


def against_random(a: Analysis) -> str | None:
    """Against the same arm with random directions."""
    return against(a, "its random control", random_of)


def against_coin(a: Analysis) -> str | None:
    """Hack against the same done to rollouts drawn at random."""
    return differences(a, "Deployed hack, minus its coin control", tossed_of, "deploy_hack")


def matched_solve(a: Analysis, who: str, of: Reference) -> str | None:
    """Is solve shown to be the reference's within the margin: deployed, pooled and by mode, and without a hint."""
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    rows = []
    for label in a.labels.values():
        if not (other := of(a, label)):
            continue
        measures = ["deploy_solve", *(f"deploy_solve@{m}" for m in (*modes, PROBE))]
        cells = [a.matched(label.name, other.name, m) for m in measures]
        if cells[0]:
            rows.append([label.shown, other.name, *cells])
    title = f"Deployed solve, minus {who}: equal within {stats.MARGIN:.2f}? (TOST)"
    return table(title, ("label", "minus", "all", *modes, PROBE), rows) if rows else None


def verdicts(a: Analysis) -> str | None:
    """H1 by its preregistered rule, for each arm that has a random control, on both measures of the protocol."""
    lines, too_few = [], []
    for label, none in a.candidates():
        for kind, where in (("deploy_", "deployed"), ("", "end of training")):
            found = a.h1(label, none, kind)
            if found and found.cut.n < MIN_SEEDS:
                too_few.append(label.name)
            elif found:
                lines.append(
                    f"- **H1, {label.name}, {where}: {found.verdict}**{str(found).removeprefix(found.verdict)}"
                )
    if too_few:
        lines.append(f"- H1 needs {MIN_SEEDS} seeds and has fewer in {len(set(too_few))} labels: not asked there.")
    return "\n".join(lines) or None


def training(a: Analysis) -> str:
    """End of training; the base row is step 0, which the untrained model samples."""
    first = {m: {} for m in METRICS}
    for name in a.labels:
        for m in METRICS:
            for seed, curve in a.curves[name, f"{m}_s"].items():
                first[m].setdefault(seed, float(curve[0]))
    rows = [["base (untrained)", len(first["hack"]), None, None, *(mean(first[m]) for m in METRICS), None]]
    for name, label in a.labels.items():
        end = {m: a.level(name, m) for m in METRICS}
        iqm = f"{stats.iqm(list(end['hack'].values())):.2f}"
        rows.append(
            [label.shown, len(end["hack"]), a.onsets(name), short(a.peak(name)), *(mean(end[m]) for m in METRICS), iqm]
        )
    return table("End of training", ("label", "n", "onset", "peak hack", "hack", "attempt", "solve", "hack IQM"), rows)


def deployed(a: Analysis) -> str:
    """Held-out problems, each label's gain over its own untrained model, and the capability probe."""
    base = {m: a.base(m) for m in METRICS}
    rows = [["base (untrained)", len(base["hack"]), *(mean(base[m]) for m in METRICS), None, None, None]]
    rows[0].append(mean(a.base("solve", PROBE)))
    for name, label in a.labels.items():
        level = {m: a.deployed(name, m) for m in METRICS}
        if not level["hack"]:
            continue
        gains = [gain(level[m], a.deployed(name, m, when="first")) for m in ("hack", "solve")]
        iqm = f"{stats.iqm(list(level['hack'].values())):.2f}"
        probe = mean(a.deployed(name, "solve", PROBE))
        rows.append([label.shown, len(level["hack"]), *(mean(level[m]) for m in METRICS), *gains, iqm, probe])
    headers = ("label", "n", *METRICS, "hack − base", "solve − base", "hack IQM", "gt_only solve")
    return table("Deployed", headers, rows)


def by_mode(a: Analysis) -> str | None:
    """Deployed hack by mode, with the base."""
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    rows = [["base (untrained)", *(short(a.base("hack", m)) for m in modes)]]
    for name, label in a.labels.items():
        cells = [short(a.deployed(name, "hack", m)) for m in modes]
        rows.append([label.shown, *(c and c + "°" * (m in label.heldout) for c, m in zip(cells, modes, strict=True))])
    return table("Deployed hack by mode", ("label", *modes), rows)


def held_out(a: Analysis) -> str | None:
    """Modes that V never saw, beside the known ones and beside none on the same modes."""
    rows = []
    for name, label in a.labels.items():
        if not label.heldout:
            continue
        known = [m for m in label.modes if m not in label.heldout]
        cells = [mean(a.pooled(name, m, label.heldout)) for m in METRICS]
        cells += [short(a.pooled(name, m, known)) for m in METRICS]
        references = (none_of(a, label), random_of(a, label), tossed_of(a, label))
        for other in references:
            hack = a.pooled(other.name, "hack", label.heldout) if other else {}
            cells.append(gain(a.pooled(name, "hack", label.heldout), hack))
        cells += [other and other.name for other in references[1:]]
        rows.append([label.shown, " ".join(label.heldout), len(a.pooled(name, "hack", label.heldout)), *cells])
    minus = ("hack − none", "hack − random", "hack − coin", "random", "coin")
    headers = ("label", "held out", "n", *METRICS, *(f"known {m}" for m in METRICS), *minus)
    return table("Held-out modes, deployed", headers, rows) if rows else None


def transfer(a: Analysis) -> str | None:
    """What a detector that knows one mode does to the modes whose exploit stands at a like place, and to the others."""
    rows = []
    for label in a.labels.values():
        known = [m for m in label.modes if m not in label.heldout]
        none = none_of(a, label)
        if len(known) != 1 or none is None:
            continue
        place = LOOPHOLES[known[0]].place
        like = [m for m in label.heldout if LOOPHOLES[m].place == place]
        unlike = [m for m in label.heldout if m not in like]
        cells = []
        for modes in (known, like, unlike):
            left, before = (short(a.pooled(name, "hack", modes)) for name in (label.name, none.name))
            cells.append(f"{left} of {before}" if modes else None)
            cells.append(number(early_auroc(a, label.name, modes)))
        rows.append([label.shown, known[0], " ".join(like) or None, " ".join(unlike), *cells])
    title = "Which hacks generalise to which: deployed hack of none's, and V's early AUROC on gradients"
    groups = ("known", "like", "unlike")
    headers = ("label", "known", "like place", "unlike", *(f"{m} {g}" for g in groups for m in ("hack", "AUROC")))
    return table(title, headers, rows) if rows else None


def early_auroc(a: Analysis, label: str, modes: Sequence[str]) -> float | None:
    """Mean over modes and seeds of V's score of rollouts' gradients in the first phase, whatever the arm's detector."""
    found = a.joined("detector").filter(
        (pl.col("label") == label) & (pl.col("phase") == next(iter(PHASES))) & (pl.col("score") == "own")
    )
    return found.filter(pl.col("mode").is_in(modes))["auroc"].mean()


def detector(a: Analysis) -> str | None:
    """How well a rollout's own gradient's score tells its mode's channel; means over seeds."""
    found = a.joined("detector")
    if found.is_empty():
        return None
    keys, numbers = ["label", "phase", "mode", "score"], ["prevalence", "auroc", "ap", "f05"]
    means = {
        row[:4]: row[4:]
        for row in found.group_by(keys, maintain_order=True).agg(pl.col(numbers).mean()).select(*keys, *numbers).rows()
    }
    modes = list(dict.fromkeys(m for label in a.labels.values() for m in label.modes))
    none = (None,) * len(numbers)
    rows = []
    for name, label in a.labels.items():
        for phase in PHASES:
            pooled, random = means.get((name, phase, "all", "own")), means.get((name, phase, "all", "random"), none)
            if pooled is None:
                continue
            cells = [number(x) for x in (pooled[0], pooled[1], random[1], pooled[2], random[2], pooled[3])]
            for mode in modes:
                cell = number(means.get((name, phase, mode, "own"), none)[1])
                cells.append(cell and cell + "°" * (mode in label.heldout))
            rows.append([label.shown, phase, *cells])
    judged = ("prevalence", "AUROC", "random", "AP", "random", "F0.5")
    headers = ("label", "steps", *judged, *(f"AUROC {m}" for m in modes))
    return table("Detector: a rollout's own score against its mode's channel", headers, rows)


def number(x: float | None) -> str | None:
    """Two decimals."""
    return None if x is None else f"{x:.2f}"


def gradient(a: Analysis) -> str:
    """cin beside its null, and what was removed: means over steps, then seeds."""
    columns = {
        "cin": "cin", "cin_null": "cin null", "cout": "cout", "cout_update": "cout_Δ", "removed_frac": "removed",
        "withheld": "withheld", "caught": "caught", "false_alarm": "false alarm", "basis_overlap": "overlap",
    }  # fmt: skip
    runs = a.summary.tables["runs"].group_by("label", maintain_order=True).agg(pl.col("v_heldout_accuracy").mean())
    quality = dict(runs.iter_rows())
    rows = [
        [label.shown, number(quality[name]), *(over_steps(a.curves.get((name, c), {})) for c in columns)]
        for name, label in a.labels.items()
    ]
    return table("Gradient", ("label", "V accuracy", *columns.values()), rows)


def over_steps(curves: Mapping[int, stats.Values]) -> str | None:
    """Mean over the steps that have a value, then over seeds."""
    return short({s: float(np.nanmean(c)) for s, c in curves.items() if not np.isnan(c).all()})


def relearning(a: Analysis) -> str | None:
    """Steps of plain GRPO, started from the deployed model, until attempts pass the onset level again."""
    rows = []
    for name, label in a.labels.items():
        if again := a.onsets(name, "relearn"):
            none = label if label.arm == "none" else a.reference(label, "none")
            rows.append([label.shown, again.n, again, a.onsets(none.name) if none else None])
    return table("Relearning", ("label", "n", "onset again", "none's onset"), rows) if rows else None


def scales(a: Analysis) -> str | None:
    """Deployed hack and solve with δS_hack at a share of what it learned."""
    kept = {label: a.kept(name) for name, label in a.labels.items() if len(a.kept(name)) > 1}
    shares = sorted({share for uses in kept.values() for share in uses})
    rows = []
    for label, uses in kept.items():
        cells = [[short(a.deployed(label.name, m, knobs=uses.get(s, ""))) for m in ("hack", "solve")] for s in shares]
        rows.append([label.shown, *(" / ".join(x or NOTHING for x in pair) for pair in cells)])
    return table("Share of δS_hack kept: hack / solve", ("label", *(f"{s:g}" for s in shares)), rows) if rows else None


TABLES: tuple[Callable[[Analysis], str | None], ...] = (
    verdicts, training, deployed, against_none, against_random, against_coin, by_mode, held_out, transfer, gradient,
    detector,    relearning, scales,
)  # fmt: skip


HEAD = f"""# Results

<!-- Generated by `just results-docs` from the summaries in docs/results/. Do not edit. -->

How to read it. A row is a label: one arm at one setting, over n seeds. **hack**: paid without being right;
**attempt**: the exploit is there, whatever the answer; **solve**: the strict oracle says right. Rates are shares,
0 to 1. *End of training*: student rollouts, mean of the last {LAST} steps, quarantine kept. *Deployed*: held-out
problems, quarantine ablated. An interval [a, b] is a 95 % t interval over seeds. **Onset**: the step at which the
mean of attempts over {WINDOW} steps first passes {ONSET_LEVEL}; the median over seeds, where runs that never get
there count as censored (k/n had one). **IQM**: interquartile mean over seeds. An arm marked **ORACLE** reads the
oracle's verdict: it is a bound, not a method.

Differences are paired by seed. *boot*: hierarchical bootstrap, seeds and then problems. *flip*: exact sign-flip test
within seed pairs; *split*: exact permutation of all runs of both labels; each p with, in brackets, the smallest that
so many seeds allow, and after the arrow Holm's correction over the table. *TOST*: equivalence within
{stats.MARGIN:.2f}; ✓: shown to be equal; ≥: shown not to be lower by more; neither means not shown.

**cin null**: what cin would be for random directions. **V accuracy**: share of held-out pairs that V tells apart.
**withheld**: share of student rollouts whose gradient was kept from δS; **caught** and **false alarm**: shares flagged
of those that fool their channel and of the others. The detector is judged on student rollouts that have a gradient.
° marks a mode that V never saw.
"""


def section(a: Analysis) -> str:
    """A study's part of the page."""
    s, runs = a.summary, a.summary.tables["runs"]
    seeds = sorted(set(runs.group_by("label").len()["len"]))
    mixed = [k[0] for k, part in runs.group_by("label", maintain_order=True) if part["digest"].n_unique() > 1]
    commits = ", ".join(sorted({c or "unknown" for c in runs["commit"]}))
    facts = [
        f"{len(runs)} of {s.n_jobs} runs; seeds a label: {span(seeds)}; steps: {span(sorted(set(runs['steps'])))}; "
        f"{runs['minutes'].sum() / 60:.1f} hours of training; code {commits}."
    ]
    if mixed:
        facts.append(f"**Seeds of one label differ in their settings:** {', '.join(mixed)}.")
    if s.missing:
        facts.append(f"**Left out:** {left_out(s.missing)}.")
    parts = [f"## {s.name}", f"**H:** {s.H}  \nWhy: {s.why}  \nResolves: {s.resolve}", *facts]
    parts += [text for make in TABLES if (text := make(a))]
    return "\n\n".join(parts)


def left_out(missing: Mapping[str, str]) -> str:
    """Runs that are not in, by reason; those that were never made are only counted."""
    by_reason: dict[str, list[str]] = {}
    for name, why in missing.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {len(n) if why == 'not run' else ', '.join(n)}" for why, n in by_reason.items())


def span(values: Sequence[int]) -> str:
    """ "5" or "3–5"."""
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}–{values[-1]}"


def render(analyses: Iterable[Analysis]) -> str:
    """The whole page."""
    parts = [section(a) for a in analyses] or ["No study is stored yet: run `just study NAME`, then `just summaries`."]
    return "\n\n".join((HEAD.rstrip(), *parts)) + "\n"


def bad_quotes(analyses: Sequence[Analysis], pages: Iterable[Path]) -> list[str]:
    """Numbers quoted in the pages that are not what the stored summaries have."""
    numbers = {key: value for a in analyses for key, value in quoted_numbers(a).items()}
    return [f"{path}: {why}" for path in pages for why in wrong(path.read_text(), numbers)]


def problems(docs: Path, readme: Path, write: bool = False) -> list[str]:
    """What is not as the stored summaries have it: the generated page (unless it is to be written), and quotes."""
    analyses, page = [Analysis(s) for s in stored(docs / "results")], docs / "results.md"
    text = render(analyses)
    if write:
        part = page.with_name("results.md.part")
        part.write_text(text)
        os.replace(part, page)
    stale = [] if page.exists() and page.read_text() == text else [f"{page} is stale: run `just results-docs`"]
    return stale + bad_quotes(analyses, sorted({readme, *docs.rglob("*.md")} - {page}))


def main(docs: str = "docs", readme: str = "README.md", check: bool = False) -> None:
    """Write docs/results.md; with --check, only say whether it and the numbers quoted in the docs are up to date."""
    if found := problems(Path(docs), Path(readme), write=not check):
        raise UserError("; ".join(found))


if __name__ == "__main__":
    run_main(command(main))
