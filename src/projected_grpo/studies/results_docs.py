"""Stored summaries -> the docs (``just results-docs``): docs/results.md, the tables that other pages hold between two
marker lines, and, whole, outputs/results/STUDY.md.

A page's table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``quoted.toml`` beside the summaries says
what NAME shows, of a study's labels or as a table of the study whole (``WHOLE``):

    [tables.NAME]
    study = "headline"
    columns = { "hack ↓" = "deploy_hack", "its random control: hack" = "deploy_hack of random" }
    rows = { base = "the untrained model", erase = "the hack-ward part of the gradient taken out" }

    [tables.OTHER]
    study = "leave_one_out"
    table = "h2"

A column is a measure of ``Analysis.quantity``; "M of random" takes it of the row's own random control, and "M under
random" is the control's minus the row's, with its interval; so with coin and none.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from projected_grpo.command_line import command, run_main
from projected_grpo.config import UserError
from projected_grpo.rollout import LAST
from projected_grpo.runs import write_text
from projected_grpo.studies import layout, stats, tables
from projected_grpo.studies.analysis import ONSET_LEVEL, WINDOW, Analysis, shared
from projected_grpo.studies.run import STUDIES
from projected_grpo.studies.stats import Interval
from projected_grpo.studies.summaries import stored

MARKED = re.compile(r"(<!-- table: (?P<name>[\w .-]+?) -->\n).*?(?=^<!-- end -->$)", re.M | re.S)
Quoted = Mapping[str, Any]
RULINGS = ("aim", "h1")
REFERENCES = {"none": tables.none_of, "random": tables.random_of, "coin": tables.tossed_of, "default": Analysis.default}

WHOLE = {make.__name__: make for make in (*tables.VERDICTS, tables.probes, tables.ranks, tables.relearning)}
"""Tables of a study that a page may quote whole."""

HOW_TO_READ = f"""A row is a label: one arm at one setting, over n seeds. **hack**: paid without being right;
**attempt**: the exploit is there, whatever the answer; **solve**: the strict oracle says right. Rates are shares,
0 to 1. *End of training*: student rollouts, mean of the last {LAST} steps, quarantine kept. *Deployed*: held-out
problems, the same for all seeds, quarantine ablated. An interval [a, b] is a 95 % interval over seeds. An arm marked
ORACLE reads the oracle's verdict: it is a bound, not a method.

**Gain kept**: (solve − the untrained base's) / (honest's solve − the base's), seeds paired, a ratio of means with a
bootstrap over seeds, of {stats.MIN_SEEDS} at least; honest is the arm that is paid for right answers alone. 1: as if
there were no loophole; 0: as if untrained; below 0: unlearnt. It is undefined where honest's own gain is not
clear of 0."""

ALL_OF_IT = f"""{HOW_TO_READ}

**Onset**: the step at which the mean of attempts over {WINDOW} steps first passes {ONSET_LEVEL}; the median over seeds,
where runs that never get there count as censored (k/n had one). **IQM**: interquartile mean over seeds.

Differences are paired by seed. *boot*: hierarchical bootstrap, seeds and then problems. *Welch*: unpaired, all runs of
both labels. *flip*: exact sign-flip test within seed pairs; *split*: exact permutation of all runs of both labels; each
p with, in brackets, the smallest that so many seeds allow, and after the arrow Holm's correction over the table.
*TOST*: equivalence within {stats.MARGIN:.2f}; ✓: shown to be equal; ≥: shown not to be lower by more; neither means not
shown.

**cin null**: what cin would be for random directions. **V accuracy**: share of held-out pairs that V tells apart.
**withheld**: share of student rollouts whose gradient was kept from δS; **caught** and **false alarm**: shares flagged
of those that fool their channel and of the others. The detector is judged on student rollouts that have a gradient.
° marks a mode that V never saw."""


# --- whole pages ----------------------------------------------------------------------------------------------------


def provenance(a: Analysis) -> list[str]:
    """What a reader should know of a study's runs, a sentence each: how many, settings that differ, what is missing."""
    s, runs = a.summary, a.summary.tables["runs"]
    seeds = sorted(set(runs.group_by("label").len()["len"]))
    mixed = [k[0] for k, part in runs.group_by("label", maintain_order=True) if part["digest"].n_unique() > 1]
    commits = ", ".join(sorted({c or "unknown" for c in runs["commit"]}))
    facts = [
        f"{len(runs)} of {s.n_jobs} runs; seeds a label: {span(seeds)}; steps: {span(sorted(set(runs['steps'])))}; "
        f"{runs['minutes'].sum() / 60:.1f} hours of training; code {commits}."
    ]
    facts += [f"Seeds of one label differ in their settings: {', '.join(mixed)}."] if mixed else []
    facts += [f"Left out: {tables.left_out(s.missing)}."] if s.missing else []
    facts += [f"Landmarks: {lacks}."] if (lacks := a.without_landmarks()) else []
    return [*facts, *([few] if (few := tables.not_asked(a)) else [])]


def span(values: Sequence[int]) -> str:
    """ "5" or "3–5"."""
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}–{values[-1]}"


def section(a: Analysis, makers: Iterable[tables.Maker] = tables.TABLES) -> str:
    """A study's part of a page."""
    s = a.summary
    told = f"**H:** {s.H}  \nWhy: {s.why}  \nResolves: {s.resolve}"
    parts = [f"## {s.name}", told, " ".join(provenance(a)), *map(layout.markdown, tables.tables_of(a, makers))]
    return "\n\n".join(parts)


def results_page(analyses: Sequence[Analysis]) -> str:
    """docs/results.md: each study's verdicts and its deployed table."""
    none = "No study is stored yet: run `just study NAME`, then `just summaries`."
    told = (
        "Written by `just results-docs` from the summaries in docs/results/, which writes each study's other tables to"
    )
    parts = ["# Results", f"{told} outputs/results/.", HOW_TO_READ]
    return "\n\n".join((*parts, *(section(a, (*tables.VERDICTS, tables.deployed)) for a in analyses))) + (
        "\n" if analyses else f"\n\n{none}\n"
    )


def study_page(a: Analysis) -> str:
    """All of a study's tables."""
    return "\n\n".join((f"# Study {a.summary.name}", ALL_OF_IT, section(a))) + "\n"


# --- tables between markers -----------------------------------------------------------------------------------------


def number(a: Analysis, label: str, asked: str) -> Interval | None:
    """A column's value for a row: a measure of the label, or of one of its references, or under it (``REFERENCES``).
    A reference is taken at the seeds that the label has, and on the modes that the label left out.
    """
    measure, how, whose = next((asked.partition(how) for how in (" of ", " under ") if how in asked), (asked, "", ""))
    if not how:
        return a.quantity(label, measure)
    row = a.labels.get(label)
    if row is None or (other := REFERENCES[whose](a, row)) is None:
        return None
    if measure == "gain_kept":
        return a.gain_kept(other) if how == " of " else a.gain_kept(other, over=label)
    kind, _, metric = measure.partition("_")
    levels = [
        a.pooled(x.name, metric, row.heldout) if kind == "held" else a.level(x.name, measure) for x in (other, row)
    ]
    its, mine = shared(*levels)
    if not its:
        return None
    return stats.paired_t(its, mine) if how == " under " else stats.mean_interval(its)


def ruling(a: Analysis, label: str, asked: str) -> str | None:
    """The verdict "aim" or "h1" on a label; None where it cannot be asked of it, or not yet."""
    x = next((x for x in a.methods() if x.name == label), None)
    if x is None or asked not in RULINGS:
        return None
    none = a.reference(x, "none")
    found = a.aim(x) if asked == "aim" else none and a.h1(x, none, "deploy_")
    return found.verdict if found and found.n >= stats.MIN_SEEDS else None


def shown(value: Interval | str | None, measure: str, n: int) -> str | float | None:
    """A cell: a difference and gain kept with their interval, another number as a mean, and how many seeds it has where
    those are not the row's.
    """
    if value is None or isinstance(value, str):
        return value
    told = str(value) if " under " in measure or measure == "gain_kept" else f"{value.mean:.2f}"
    return told if value.n == n else f"{told} ({value.n})"


def quoted_table(analyses: Mapping[str, Analysis], name: str, asked: Quoted) -> str:
    """A table of quoted.toml as Markdown, without the rows that are not run yet; TODO where the study is not.

    Raises UserError for a table that is not listed, and for a row that its study does not have.
    """
    if name not in asked.get("tables", {}):
        raise UserError(f"no table {name!r} in quoted.toml, which has {', '.join(asked.get('tables', {})) or 'none'}")
    spec = asked["tables"][name]
    study, rows, lacks = spec["study"], [], {}
    if (a := analyses.get(study)) is None:
        return f"TODO: no runs yet (`just study {study}`, `just summaries {study}`, `just results-docs`)."
    if "table" in spec:
        whole = WHOLE[spec["table"]](a)
        return "\n\n".join(filter(None, (layout.grid(whole), whole.note))) if whole else "TODO: nothing in it yet."
    planned = {job.label for job in STUDIES[study].jobs} if study in STUDIES else set()
    for label, what in spec["rows"].items():
        found = {m: ruling(a, label, m) or number(a, label, m) for m in spec["columns"].values()}
        if any(found.values()):
            arm, n = a.labels[label].shown if label in a.labels else label, len(a.level(label, "deploy_hack"))
            rows.append((arm, n, *(shown(x, m, n) for m, x in found.items()), what or None))
            if label in a.labels and found.get("gain_kept", "") is None:
                lacks[str(a.no_gain(a.labels[label]))] = None
        elif label not in planned:
            raise UserError(f"table {name}: study {study} has no label {label!r}")
    table = layout.made("", ("arm", "seeds", *spec["columns"], "what it is"), rows)
    if table is None:
        return f"TODO: none of these rows is run yet (`just study {study}`)."
    return "\n\n".join((layout.grid(table), *([f"Gain kept is undefined: {'; '.join(lacks)}."] if lacks else [])))


# --- what `just results-docs` does ----------------------------------------------------------------------------------


def pages(root: Path) -> list[Path]:
    """What is read by people: README.md and docs/."""
    return sorted(p for p in (root / "README.md", *(root / "docs").rglob("*.md")) if p.exists())


def written(root: Path) -> tuple[dict[Path, str], list[Analysis]]:
    """Every page as it should be, and the studies."""
    store, page = root / "docs" / "results", root / "docs" / "results.md"
    found = [Analysis(s) for s in stored(store)]
    analyses = {a.summary.name: a for a in found}
    listed = store / "quoted.toml"
    try:
        asked = tomllib.loads(listed.read_text()) if listed.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{listed}: {error}") from None
    new = {page: results_page(found)}
    for path in pages(root):
        fill = lambda m: m[1] + quoted_table(analyses, m["name"], asked) + "\n"
        if path != page:
            new[path] = MARKED.sub(fill, path.read_text())
    return new, found


def stale(root: Path) -> list[Path]:
    """Pages that are not as the stored summaries have them."""
    new, _ = written(root)
    return [path for path, text in new.items() if not path.exists() or path.read_text() != text]


def main(root: str = ".", outputs: str = "outputs", check: bool = False) -> None:
    """Write docs/results.md, the tables of README.md and docs/, and outputs/results/; --check says what is stale."""
    if check:
        if old := stale(Path(root)):
            raise UserError(f"stale: {', '.join(map(str, old))}; run `just results-docs`")
        return
    new, found = written(Path(root))
    for path, text in new.items():
        write_text(path, text)
    for a in found:
        write_text(Path(outputs) / "results" / f"{a.summary.name}.md", study_page(a))


if __name__ == "__main__":
    run_main(command(main))
