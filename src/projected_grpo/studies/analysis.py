"""A stored summary -> the numbers of a report: levels by label and seed, and differences to a reference label."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from projected_grpo import arms
from projected_grpo.config import UserError
from projected_grpo.evals import LAST
from projected_grpo.studies import stats
from projected_grpo.studies.stats import H1, Equivalence, Interval, Permutation, Values, h1_verdict
from projected_grpo.studies.summaries import PROBE, Summary

Seeds = dict[int, float]
"""A number by seed."""
METRICS = ("hack", "attempt", "solve")
ONSET_LEVEL, WINDOW = 0.5, 5
"""Onset: where the attempts' mean over WINDOW steps first passes ONSET_LEVEL."""


@dataclass(frozen=True)
class Label:
    """A row of the study's tables: all seeds of one arm at one setting. heldout: trained modes V does not know."""

    name: str
    arm: str
    oracle: bool
    overrides: frozenset[str]
    modes: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def shown(self) -> str:
        """Its name as printed: an arm that reads gt_correct is marked wherever it stands."""
        return f"{self.name} **ORACLE**" if self.oracle else self.name


@dataclass(frozen=True)
class Comparison:
    """label − reference: seed-paired intervals, sign flips within pairs, splits of all runs of both, and TOST."""

    reference: str
    t: Interval
    boot: Interval
    flip: Permutation
    split: Permutation
    tost: Equivalence


def control_of(arm: str) -> str | None:
    """The arm that does the same with random directions, from its row of ARMS."""
    return getattr(arms.ARMS.get(arm), "control", None)


def coin_of(arm: str) -> str | None:
    """The arm that does the same to rollouts drawn at random, from its row of ARMS."""
    return getattr(arms.ARMS.get(arm), "coin", None)


def shared(a: Seeds, b: Seeds) -> tuple[list[float], list[float]]:
    """Values of both at the seeds that both have, in order."""
    both = sorted(a.keys() & b.keys())
    return [a[s] for s in both], [b[s] for s in both]


@dataclass(frozen=True)
class Analysis:
    """Lookups over one study's summary."""

    summary: Summary

    @cached_property
    def labels(self) -> dict[str, Label]:
        """In the order of the study's jobs. Raises UserError when a label has a seed twice."""
        out, seen = {}, set()
        for r in self.summary.tables["runs"].iter_rows(named=True):
            if (r["label"], r["seed"]) in seen:
                raise UserError(f"study {self.summary.name}: two runs of {r['label']!r} have seed {r['seed']}")
            seen.add((r["label"], r["seed"]))
            modes = tuple(r["modes"].split())
            known = modes if r["known_modes"] is None else r["known_modes"].split()
            heldout = tuple(m for m in modes if m not in known)
            out[r["label"]] = Label(
                r["label"], r["arm"], r["oracle"], frozenset(r["overrides"].split()), modes, heldout
            )
        return out

    def joined(self, table: str) -> pl.DataFrame:
        """A table with each row's label and seed."""
        runs = self.summary.tables["runs"].select("run", "label", "seed")
        return self.summary.tables[table].join(runs, on="run", how="left", maintain_order="left")

    @cached_property
    def curves(self) -> dict[tuple[str, str], dict[int, Values]]:
        """(label, column) -> each seed's curve over steps; NaN where a step has no value."""
        return self.curves_of("steps")

    @cached_property
    def relearn(self) -> dict[tuple[str, str], dict[int, Values]]:
        """The same of the relearning attack."""
        return self.curves_of("relearn")

    def curves_of(self, table: str) -> dict[tuple[str, str], dict[int, Values]]:
        """Curves of a table by (label, column) and seed."""
        out: dict[tuple[str, str], dict[int, Values]] = {}
        for (label, seed), part in self.joined(table).group_by("label", "seed", maintain_order=True):
            for column in part.columns:
                if column not in ("run", "step", "label", "seed"):
                    values = part.sort("step")[column].cast(pl.Float64).fill_null(float("nan"))
                    out.setdefault((label, column), {})[seed] = values.to_numpy()
        return out

    @cached_property
    def rates(self) -> dict[tuple[str, str, str, str, str], Seeds]:
        """(label, "first" | "last", knobs, mode, metric) -> deploy-eval rate by seed."""
        out: dict[tuple[str, str, str, str, str], Seeds] = {}
        evals = self.joined("evals")
        for when, step in (("first", pl.col("step").min()), ("last", pl.col("step").max())):
            for r in evals.filter(pl.col("step") == step.over("run")).iter_rows(named=True):
                key = (r["label"], when, r["knobs"], r["mode"], r["metric"])
                out.setdefault(key, {})[r["seed"]] = r["rate"]
        return out

    def deployed(
        self, label: str, metric: str, mode: str = "all", when: str = "last", knobs: str = "deployed"
    ) -> Seeds:
        """Deploy-eval rates by seed; {} when there are none."""
        return self.rates.get((label, when, knobs, mode, metric), {})

    def kept(self, label: str) -> dict[float, str]:
        """Shares of the quarantine that a label was evaluated with at the end, in order -> the evaluation's name."""
        ends = {"deployed": 0.0, "trained": 1.0}
        uses = {k[2] for k in self.rates if k[:2] == (label, "last")}
        return dict(sorted((ends[u] if u in ends else float(u.removeprefix("scale ")), u) for u in uses))

    def pooled(self, label: str, metric: str, modes: Iterable[str]) -> Seeds:
        """Mean of the modes' deployed rates by seed (each mode has as many samples)."""
        each = [self.deployed(label, metric, m) for m in modes]
        seeds = set.intersection(*map(set, each)) if each else set()
        return {s: float(np.mean([e[s] for e in each])) for s in sorted(seeds)}

    def curve_end(self, label: str, column: str) -> Seeds:
        """Mean of the last LAST steps by seed."""
        return {s: float(np.nanmean(c[-LAST:])) for s, c in self.curves.get((label, column), {}).items()}

    def level(self, label: str, measure: str) -> Seeds:
        """hack, attempt, solve: end of training; deploy_…: last deploy eval; base_…: the first; …@mode: of one mode."""
        name, _, mode = measure.partition("@")
        kind, _, metric = name.rpartition("_")
        if not kind:
            return self.curve_end(label, f"{metric}_s")
        return self.deployed(label, metric, mode or "all", {"base": "first", "deploy": "last"}[kind])

    def base(self, metric: str, mode: str = "all") -> Seeds:
        """The untrained model's deployed rate by seed: a mean over labels, which share the model and its samples."""
        each: dict[int, list[float]] = {}
        for label in self.labels:
            for seed, rate in self.deployed(label, metric, mode, "first").items():
                each.setdefault(seed, []).append(rate)
        return {s: float(np.mean(r)) for s, r in sorted(each.items())}

    @cached_property
    def problems(self) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
        """(label, metric) -> seed -> problem -> deployed rate after training, the probe left out."""
        last = self.joined("problems").filter(
            (pl.col("step") == pl.col("step").max().over("run"))
            & (pl.col("knobs") == "deployed")
            & (pl.col("mode") != PROBE)
        )
        counts = last.group_by("label", "seed", "problem_id", maintain_order=True).agg(pl.col("n", *METRICS).sum())
        out: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for r in counts.iter_rows(named=True):
            for metric in METRICS:
                seeds = out.setdefault((r["label"], metric), {})
                seeds.setdefault(r["seed"], {})[r["problem_id"]] = r[metric] / r["n"]
        return out

    def reference(self, label: Label, arm: str | None) -> Label | None:
        """The label of that arm whose overrides are most like ``label``'s; None when the study has none."""
        others = [o for o in self.labels.values() if o.arm == arm and o != label]
        near = lambda o: (len(o.overrides & label.overrides), -len(o.overrides ^ label.overrides))
        return max(others, key=near, default=None)

    def compare(self, label: str, reference: str, measure: str) -> Comparison | None:
        """label − reference in a measure. boot resamples problems within seeds for a pooled deploy measure, and seeds
        alone otherwise. None when no seed has both.
        """
        a, b = self.level(label, measure), self.level(reference, measure)
        x, y = shared(a, b)
        if not x:
            return None
        differences: Sequence[Sequence[float]] = [[i - j] for i, j in zip(x, y, strict=True)]
        kind, _, metric = measure.rpartition("_")
        if kind == "deploy" and "@" not in measure:
            p, q = self.problems.get((label, metric), {}), self.problems.get((reference, metric), {})
            differences = [[p[s][i] - q[s][i] for i in sorted(p[s].keys() & q[s].keys())] for s in sorted(p.keys() & q)]
        return Comparison(
            reference,
            stats.paired_t(x, y),
            stats.bootstrap(differences),
            stats.permutation(x, y, paired=True),
            stats.permutation(list(a.values()), list(b.values()), paired=False),
            stats.tost(np.subtract(x, y)),
        )

    def matched(self, label: str, reference: str, measure: str) -> Equivalence | None:
        """TOST of a measure's seed-paired differences; None when no seed has both."""
        x, y = shared(self.level(label, measure), self.level(reference, measure))
        return stats.tost(np.subtract(x, y)) if x else None

    def onsets(self, label: str, table: str = "curves") -> stats.Onsets | None:
        """Onset of attempts over a label's seeds, in training or in the relearning attack (table "relearn")."""
        curves = list(getattr(self, table).get((label, "attempt_s"), {}).values())
        if not curves:
            return None
        return stats.onsets([stats.onset(c, ONSET_LEVEL, WINDOW) for c in curves], [len(c) for c in curves])

    def peak(self, label: str, column: str = "hack_s") -> Seeds:
        """Highest mean over WINDOW steps by seed."""
        return {s: float(stats.rolling(c, WINDOW).max()) for s, c in self.curves.get((label, column), {}).items()}

    def candidates(self) -> list[tuple[Label, Label]]:
        """Labels that H1 can be asked of (an arm with a random control, no oracle), each with its none label."""
        asked = [x for x in self.labels.values() if control_of(x.arm) and not x.oracle]
        return [(x, none) for x in asked if (none := self.reference(x, "none"))]

    def h1(self, label: Label, none: Label, kind: str) -> H1 | None:
        """H1's verdict with kind "deploy_" (held-out problems) or "" (end of training); None without shared seeds."""
        levels = [self.level(x.name, f"{kind}{m}") for m in ("hack", "solve") for x in (none, label)]
        seeds = sorted(set.intersection(*map(set, levels)))
        if not seeds:
            return None
        control = self.reference(label, control_of(label.arm))
        over = control and self.compare(control.name, label.name, f"{kind}hack")
        return h1_verdict(*([level[s] for s in seeds] for level in levels), over.t if over else None)
