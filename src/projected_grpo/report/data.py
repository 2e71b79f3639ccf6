"""Run folders, or a stored summary, -> a report's ``Material``; and its rollouts as the browser reads them."""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from projected_grpo import loopholes, problems, rollout_log
from projected_grpo.config import UserError
from projected_grpo.data_types import Wording
from projected_grpo.runs import json_lines
from projected_grpo.studies import summaries
from projected_grpo.studies.analysis import Analysis
from projected_grpo.studies.run import STUDIES, Job, Study
from projected_grpo.studies.summaries import Row, Unusable

# --- rollouts for the browser: columns with their repeated strings written once, gzipped -----------------------------

DIGITS = 3


@dataclass(frozen=True)
class RunRollouts:
    """Rollouts of a run, as ``rollout_log.frame`` has them and numbered within their step (row); of how many."""

    run: str
    arm: str
    seed: int
    rows: pl.DataFrame
    total: int


def exploit_pattern(mode: str, wording: Wording) -> str | None:
    """A regular expression, for Python (re.M) and JavaScript (gm) alike, of the lines that make up the exploit.

    A loophole's signature where it has one; of a test function that the model writes itself, the whole function.
    """
    row = loopholes.LOOPHOLES[mode]
    words = {"name": re.escape(wording.name), "text": re.escape(wording.text)}
    if row.signature is not None:
        return row.signature.format(**words)
    return rf"^def {words['name']}\b.*(?:\n[ \t]+.*)*" if wording.name else None


def task_rows(keys: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """What there is to say of each (mode, wording): the prompt's hint and the exploit's pattern."""
    out = []
    for mode, name, text in keys:
        known = mode in loopholes.LOOPHOLES
        hint = loopholes.LOOPHOLES[mode].hint.format(name=name, text=text) if known else None
        out.append({"hint": hint, "exploit": exploit_pattern(mode, Wording(name, text)) if known else None})
    return out


def coded(values: pl.Series) -> dict[str, Any]:
    """Each value once, and its number row by row; −1 for null."""
    unique = values.drop_nulls().unique(maintain_order=True)
    number = pl.DataFrame({"v": unique, "n": pl.int_range(len(unique), eager=True, dtype=pl.Int32)})
    codes = values.to_frame("v").join(number, on="v", how="left", maintain_order="left")["n"].fill_null(-1)
    return {"values": unique.to_list(), "codes": codes.to_list()}


def columns(parts: Sequence[RunRollouts], statements: Mapping[str, str]) -> dict[str, Any]:
    """The browser's data. statements: problem id -> its statement, with the sentence that a hint replaces."""
    told = ["env_mode", "name", "text"]
    table = pl.concat([p.rows.with_columns(pl.col(told).fill_null(""), run=i) for i, p in enumerate(parts)])
    keys = table.select(told).unique(maintain_order=True).with_columns(task=pl.int_range(pl.len()))
    table = table.join(keys, on=told, how="left", maintain_order="left").drop("name", "text")
    of = lambda *types: [name for name, dtype in table.schema.items() if dtype in types]
    words = {name: coded(table[name]) for name in of(pl.String)}
    return {
        "n": len(table),
        "total": sum(p.total for p in parts),
        "runs": [{"run": p.run, "arm": p.arm, "seed": p.seed, "total": p.total} for p in parts],
        "tasks": task_rows(keys.select(told).rows()),
        "sentence": loopholes.TESTS_SENTENCE,
        "statements": [statements.get(p) for p in words["problem_id"]["values"]],
        "coded": words,
        "plain": {name: table[name].to_list() for name in of(pl.Int32, pl.Int64)},
        "numbers": {name: table[name].round(DIGITS).to_list() for name in of(pl.Float64)},
        "flags": {name: table[name].cast(pl.Int8).to_list() for name in of(pl.Boolean)},
        "by_layer": [None if v is None else [round(x, DIGITS) for x in v] for v in table["score_by_layer"]],
    }


def packed(data: Mapping[str, Any]) -> str:
    """JSON, gzipped, in base64."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


# --- material -------------------------------------------------------------------------------------------------------

MOST = 24_000
"""Rollouts in a report of several runs."""
NOT_LABEL = ("intervention", "seed", "name", "outputs", "threads", "graders", "resume", "checkpoint-every")
"""Flags that do not tell a run from others of its label."""


@dataclass(frozen=True)
class FoundJob(Job):
    """The job of a run that stands in no study, as its meta.json tells it. run: the folder's name."""

    run: str = ""

    @property
    def name(self) -> str:
        """The run's folder."""
        return self.run


@dataclass(frozen=True)
class Material:
    """metas and steps: by run; {} where only the stored summary is left. notes: what a reader should know."""

    title: str
    analysis: Analysis
    metas: dict[str, Row]
    steps: dict[str, list[Row]]
    rollouts: list[RunRollouts]
    statements: dict[str, str]
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """One run."""
        return len(self.analysis.summary.tables["runs"]) == 1 and self.analysis.summary.n_jobs == 1


def own_flags(argv: Sequence[str]) -> Iterator[str]:
    """The flags of a train command that make a run another experiment."""
    skips = False
    for word in argv[2:]:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            dropped = flag.replace("_", "-") in NOT_LABEL
            skips = dropped and not value
            if not dropped:
                yield word
        elif not skips:
            yield word


def found_job(folder: Path) -> FoundJob:
    """A run's job from its meta.json. Raises Unusable."""
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part").is_dir()
        raise Unusable("unfinished" if part else "not run")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        config, flags = meta["config"], tuple(own_flags(meta["argv"]))
        arm = config["intervention"]
        return FoundJob(" ".join((arm, *flags)), arm, flags, int(config["seed"]), run=folder.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"meta.json: {type(error).__name__}") from None


def named_runs(names: Sequence[str], runs: Path) -> tuple[Study, Path]:
    """The named runs as a study, and the folder that they are in: ``runs``, or that of the names that are paths.

    Raises UserError when one cannot be read at all, or when they lie in several folders.
    """
    folders = [Path(name) if "/" in name else runs / name for name in names]
    home, *others = {folder.parent.resolve(): folder.parent for folder in folders}.values()
    if others:
        raise UserError(f"the runs lie in {home} and in {others[0]}: a report takes those of one folder")
    jobs = []
    for folder in folders:
        try:
            jobs.append(found_job(folder))
        except Unusable as why:
            raise UserError(f"{folder}: {why}; `just report` takes finished runs and studies") from None
    again = len({(j.label, j.seed) for j in jobs}) < len(jobs)
    if again:  # told apart by their names
        jobs = [replace(j, label=j.run) for j in jobs]
    name = jobs[0].name if len(jobs) == 1 else f"{len(jobs)} runs"
    return Study(name, H="", why="", resolve="", jobs=tuple(jobs)), home


def statements_of(metas: Sequence[Row]) -> dict[str, str]:
    """Problem id -> statement, of the problem files that the runs name; those that are gone are left out."""
    out: dict[str, str] = {}
    for source in sorted({str((m["config"].get("data") or {}).get("problems")) for m in metas}):
        try:
            found = (
                [g.problem for g in problems.generated()]
                if source == "generated"
                else problems.read_problems(Path(source))
            )
        except (OSError, ValueError):
            continue
        out |= {p.id: p.statement for p in found}
    return out


def sample(table: pl.DataFrame, most: int, by: tuple[str, ...] = ("label", "env_mode", "step")) -> pl.DataFrame:
    """At most ``most`` rows, in order, as evenly over the strata as they allow: a row of each, then a second, …

    Which rows of a stratum are taken is random with a fixed seed.
    """
    if len(table) <= most:
        return table
    shuffled = table.with_row_index("_at").sample(fraction=1, shuffle=True, seed=0)
    ranked = shuffled.with_columns(_rank=pl.int_range(pl.len()).over(by))
    return ranked.sort("_rank", maintain_order=True).head(most).sort("_at").drop("_at", "_rank")


def rollouts_of(a: Analysis, runs: Path, most: int | None) -> tuple[list[RunRollouts], list[str]]:
    """Each run's rollouts, sampled to its share of ``most``; and, in words, the runs whose rollouts cannot be read."""
    table, out, unread = a.summary.tables["runs"], [], []
    for run, label, seed in table.select("run", "label", "seed").rows():
        try:
            rows = rollout_log.frame(runs / run).with_columns(row=pl.int_range(pl.len()).over("step"))
        except UserError as why:
            unread.append(str(why))
            continue
        kept = rows if most is None else sample(rows, most // len(table))
        out.append(RunRollouts(run, label, seed, kept, len(rows)))
    more = f"; and {len(unread) - 1} runs more" if len(unread) > 1 else ""
    return out, [f"Without rollouts: {unread[0]}{more}."] if unread else []


def gather(chosen: Study, runs: Path, store: Path, most: int = MOST) -> Material:
    """A study's material from its run folders, or from its stored summary where no run folder is left.

    Raises UserError when there is neither.
    """
    summary, notes = summaries.summarise(chosen, runs), []
    if summary.tables["runs"].is_empty() and (store / f"{chosen.name}.json").exists():
        summary = summaries.load(store, chosen.name)
        notes.append("Made from the stored summary: the run folders are not here, so there are no rollouts.")
    elif summary.tables["runs"].is_empty():
        why = "; ".join(f"{run}: {reason}" for run, reason in list(summary.missing.items())[:3])
        raise UserError(f"no run of {chosen.name} can be used ({why})")
    a, here = Analysis(summary), not notes
    names = summary.tables["runs"]["run"].to_list() if here else []
    metas = {run: json.loads((runs / run / "meta.json").read_text()) for run in names}
    steps = {run: json_lines(runs / run / "steps.jsonl") for run in names}
    rollouts, unread = rollouts_of(a, runs, None if len(names) == 1 else most) if here else ([], [])
    title = f"Study {chosen.name}" if chosen.why else chosen.name
    return Material(
        title, a, metas, steps, rollouts, statements_of(list(metas.values())), dict(summary.missing), notes + unread
    )


def minutes_by_stage(m: Material) -> dict[str, dict[str, float]]:
    """Label -> stage -> minutes a run, the mean over its runs; a stage is what ``sec_…`` of a step names."""
    labels = dict(m.analysis.summary.tables["runs"].select("run", "label").rows())
    each: dict[str, list[dict[str, float]]] = {}
    for run, steps in m.steps.items():
        stages = [k for k in steps[0] if k.startswith("sec_")]
        each.setdefault(labels[run], []).append(
            {k.removeprefix("sec_"): sum(s.get(k) or 0.0 for s in steps) / 60 for k in stages}
        )
    return {
        label: {stage: sum(r.get(stage, 0.0) for r in rows) / len(rows) for stage in rows[0]}
        for label, rows in each.items()
    }


def newest_run(runs: Path) -> str:
    """The finished run that was written last. Raises UserError when there is none."""
    found = [p for p in runs.glob("*") if (p / "meta.json").exists() and p.suffix != ".part"]
    if not found:
        raise UserError(f"no finished run in {runs}: `just smoke` makes one")
    return max(found, key=lambda p: (p / "meta.json").stat().st_mtime).name


def material(names: Sequence[str], runs: Path, store: Path, most: int = MOST) -> Material:
    """The material of a study, a run, or several runs by name; of the newest run where none is named."""
    names = names or [newest_run(runs)]
    if len(names) == 1 and names[0] in STUDIES:
        return gather(STUDIES[names[0]], runs, store, most)
    if len(names) == 1 and "/" not in names[0] and not (runs / names[0]).exists():
        part = (runs / f"{names[0]}.part").exists()
        why = f"{names[0]} is unfinished" if part else f"{names[0]} is neither a run in {runs} nor a study"
        raise UserError(f"{why}; studies: {', '.join(STUDIES)}")
    chosen, home = named_runs(names, runs)
    return gather(chosen, home, store, most)
