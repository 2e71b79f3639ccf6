"""What a report is made from: a study's analysis, its runs' own records, and rollouts. Runs that cannot be used are
named, with the reason, and left out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from projected_grpo import families, problems, rollout_table, summaries
from projected_grpo.analysis import Analysis
from projected_grpo.config import UserError
from projected_grpo.results import json_lines
from projected_grpo.rollout_pack import RunRollouts
from projected_grpo.run_tables import Row, Unusable
from projected_grpo.study import STUDIES, Job, Study

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


def named_runs(names: Sequence[str], runs: Path) -> Study:
    """The named runs as a study. Raises UserError when one cannot be read at all, or two share label and seed."""
    jobs = []
    for name in names:
        try:
            jobs.append(found_job(runs / Path(name).name))
        except Unusable as why:
            raise UserError(f"{name}: {why}; `just report` takes finished runs of {runs} and studies") from None
    again = len({(j.label, j.seed) for j in jobs}) < len(jobs)
    if again:  # told apart by their names
        jobs = [replace(j, label=j.run) for j in jobs]
    name = jobs[0].name if len(jobs) == 1 else f"{len(jobs)} runs"
    return Study(name, H="", why="", resolve="", jobs=tuple(jobs))


def statements_of(metas: Sequence[Row]) -> dict[str, str]:
    """Problem id -> statement, of the problem files that the runs name; those that are gone are left out."""
    out: dict[str, str] = {}
    for source in sorted({str((m["config"].get("data") or {}).get("problems")) for m in metas}):
        try:
            found = families.generate() if source == "generated" else problems.read_problems(Path(source))
        except (OSError, ValueError):
            continue
        out |= {p.id: p.statement for p in found}
    return out


def rollouts_of(a: Analysis, runs: Path, most: int | None) -> tuple[list[RunRollouts], list[str]]:
    """Each run's rollouts, sampled to its share of ``most``; and, in words, the runs whose rollouts cannot be read."""
    table, out, notes = a.summary.tables["runs"], [], []
    for run, label, seed in table.select("run", "label", "seed").rows():
        try:
            rows = rollout_table.read(runs / run)
        except UserError as why:
            notes.append(f"Without rollouts: {why}.")
            continue
        kept = rows if most is None else rollout_table.sample(rows, most // len(table))
        out.append(RunRollouts(run, label, seed, kept, len(rows)))
    return out, notes


def gather(chosen: Study, runs: Path, store: Path, most: int = MOST) -> Material:
    """A study's material from its run folders, or from its stored summary where no run folder is left.

    Raises UserError when there is neither.
    """
    summary, notes = summaries.summarise(chosen, runs), []
    if summary.tables["runs"].is_empty() and (store / chosen.name / "study.json").exists():
        summary = summaries.load(store / chosen.name)
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
    if len(names) == 1 and not (runs / Path(names[0]).name).exists() and "/" not in names[0]:
        part = (runs / f"{names[0]}.part").exists()
        why = f"{names[0]} is unfinished" if part else f"{names[0]} is neither a run in {runs} nor a study"
        raise UserError(f"{why}; studies: {', '.join(STUDIES)}")
    return gather(named_runs(names, runs), runs, store, most)
