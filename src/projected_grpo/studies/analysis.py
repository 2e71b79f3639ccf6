"""A stored summary -> the numbers of a report: levels by label and seed, differences to a reference label, and how much
of what honest training gains a label keeps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from projected_grpo import arms
from projected_grpo.config import UserError
from projected_grpo.rollout import LAST
from projected_grpo.studies import stats
from projected_grpo.studies.stats import H1, Aim, Equivalence, Interval, Permutation, Values, aim_verdict, h1_verdict
from projected_grpo.studies.summaries import PROBE, Summary

Seeds = dict[int, float]
"""A number by seed."""
METRICS = ("hack", "attempt", "solve")
ONSET_LEVEL, WINDOW = 0.5, 5
"""Onset: where the attempts' mean over WINDOW steps first passes ONSET_LEVEL."""
EARLY = 20
"""Steps at whose policy, still near the untrained one, a detector is looked at before what it does shows."""
HONEST, LEARNABLE = "honest", "learnable"
"""The arm that is paid for right answers alone; the kind of problem that such pay teaches."""
WORLD = ("--steps", "--model", "--problems", "--preset")
"""Flags that change what there is to gain: gain kept is read against an honest run that has the same ones."""


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
        return f"{self.name} (ORACLE)" if self.oracle else self.name

    @property
    def no_loophole(self) -> bool:
        """Plain GRPO on prompts without a loophole: the benchmark's own reference."""
        return self.arm == "none" and PROBE in self.overrides

    @property
    def obeys_flags(self) -> bool:
        """Whether what its detector flags decides over gradients."""
        return self.arm in arms.ARMS and arms.ARMS[self.arm].rows in ("drop", "punish")

    @property
    def world(self) -> frozenset[str]:
        """Its flags that change what there is to gain."""
        return frozenset(flag for flag in self.overrides if flag.startswith(WORLD))


@dataclass(frozen=True)
class Comparison:
    """label − reference: seed-paired intervals, Welch's of all runs, sign flips within pairs, splits of all runs, and
    TOST.
    """

    reference: str
    t: Interval
    boot: Interval
    welch: Interval
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


def divisor(mine: Seeds, every: Seeds) -> list[float]:
    """Honest's gains that gain kept is read against: at the label's seeds; of fewer than MIN_SEEDS all that honest has,
    since the mean of one or two may be next to nothing.
    """
    return [every[s] for s in mine] if len(mine) >= stats.MIN_SEEDS else list(every.values())


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
        """(label, "first" | "last", knobs, mode, metric) -> deploy-eval rate by seed. first: of the untrained model."""
        out: dict[tuple[str, str, str, str, str], Seeds] = {}
        evals = self.joined("evals")
        for when, step in (("first", pl.lit(0)), ("last", pl.col("step").max())):
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

    def early(self, label: str, column: str) -> Seeds:
        """Mean over those of the first EARLY steps that have a value, by seed."""
        found = {s: c[:EARLY] for s, c in self.curves.get((label, column), {}).items()}
        return {s: float(np.nanmean(c)) for s, c in found.items() if not np.isnan(c).all()}

    def level(self, label: str, measure: str) -> Seeds:
        """hack, attempt, solve: end of training; peak: its highest hack; start_…, end_…: a column of the steps
        (``moved``); deploy_…: last deploy eval; base_…: the first, before training; held_…: the last, of modes that V
        never saw; …@mode: of one mode. The label "base" is the untrained model.
        """
        name, _, mode = measure.partition("@")
        kind, _, metric = name.rpartition("_")
        if name == "peak":
            return self.peak(label)
        if not kind:
            return self.curve_end(label, f"{metric}_s")
        if label == "base" and label not in self.labels:
            return self.base(metric, mode or "all")
        if name.startswith(("start_", "end_")):
            begun, column = name.split("_", 1)
            return self.moved(label, column)[begun == "end"]
        if kind == "held":
            return self.pooled(label, metric, self.labels[label].heldout) if label in self.labels else {}
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
        """The label of that arm, of the same model, problems and horizon, whose other overrides are most like
        ``label``'s; None when the study has none.
        """
        others = [o for o in self.labels.values() if o.arm == arm and o != label and not o.no_loophole]
        others = [o for o in others if o.world == label.world]
        near = lambda o: (len(o.overrides & label.overrides), -len(o.overrides ^ label.overrides))
        return max(others, key=near, default=None)

    def default(self, label: Label) -> Label | None:
        """The label of the same arm and settings with the preset's own pairs; None when the study has none."""
        plain = frozenset(flag for flag in label.overrides if not flag.startswith("--pairs="))
        same = (o for o in self.labels.values() if o.arm == label.arm and o.overrides == plain and o != label)
        return next(same, None)

    def at_same(self, label: Label, arm: str | None) -> Label | None:
        """The label of that arm at ``label``'s settings: no other can be its control. None when the study has none."""
        same = (o for o in self.labels.values() if o.arm == arm and o.overrides == label.overrides and o != label)
        return next(same, None)

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
            stats.welch(list(a.values()), list(b.values())),
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

    def moved(self, label: str, column: str) -> tuple[Seeds, Seeds]:
        """(start, end) of a curve by seed: means of the first and of the last fifth of its values."""
        found = {s: e for s, c in self.curves.get((label, column), {}).items() if (e := stats.ends(c))}
        return {s: e[0] for s, e in found.items()}, {s: e[1] for s, e in found.items()}

    # --- gain kept ---------------------------------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> dict[tuple[str, str, str], Seeds]:
        """(label, "first" | "last", kind of problem) -> deployed solve by seed, without the probe; {} if no kinds."""
        rows = self.joined("problems").filter(
            (pl.col("knobs") == "deployed") & (pl.col("mode") != PROBE) & pl.col("kind").is_not_null()
        )
        out: dict[tuple[str, str, str], Seeds] = {}
        for when, step in (("first", pl.lit(0)), ("last", pl.col("step").max())):
            part = rows.filter(pl.col("step") == step.over("run"))
            counts = part.group_by("label", "seed", "kind", maintain_order=True).agg(pl.col("n", "solve").sum())
            for label, seed, kind, n, solve in counts.rows():
                out.setdefault((label, when, kind), {})[seed] = solve / n
        return out

    def solved(self, label: str, when: str = "last", kind: str | None = None) -> Seeds:
        """Deployed solve by seed, of all problems or of one kind."""
        return self.deployed(label, "solve", when=when) if kind is None else self.kinds.get((label, when, kind), {})

    def honest(self, label: Label) -> Label | None:
        """The honest label that ``label`` is read against: the same flags that change what there is to gain, and of
        those the one most alike. None when the study has none.
        """
        same = [o for o in self.labels.values() if o.arm == HONEST and o.world == label.world]
        near = lambda o: (len(o.overrides & label.overrides), -len(o.overrides ^ label.overrides))
        return max(same, key=near, default=None)

    def honest_gain(self, honest: Label, kind: str | None = None) -> Interval | None:
        """solve of honest − solve of its own untrained base, seed-paired; None without shared seeds."""
        top, base = shared(self.solved(honest.name, kind=kind), self.solved(honest.name, "first", kind))
        return stats.paired_t(top, base) if top else None

    def gains(self, label: Label, kind: str | None = None, over: str | None = None) -> tuple[Seeds, Seeds]:
        """By seed: solve − that of ``over``, or of the untrained base, at the seeds that have all of them; solve of
        honest − that of the base, at all of honest's. ({}, {}) where honest's own gain is not clear of 0.
        """
        honest = self.honest(label)
        whole = honest and self.honest_gain(honest, kind)
        if honest is None or whole is None or not stats.clear_above(whole):
            return {}, {}
        base, top = (self.solved(honest.name, when, kind) for when in ("first", "last"))
        floor, mine = base if over is None else self.solved(over, kind=kind), self.solved(label.name, kind=kind)
        every = {s: top[s] - base[s] for s in sorted(base.keys() & top.keys())}
        return {s: mine[s] - floor[s] for s in every if s in floor and s in mine}, every

    def gain_kept(self, label: Label, kind: str | None = None, over: str | None = None) -> Interval | None:
        """(solve − base's) / (honest's solve − base's), ratio of means over shared seeds; with ``over`` that label
        stands in the place of the base above the line. None where it is undefined (``no_gain`` says why).
        """
        mine, every = self.gains(label, kind, over)
        whole = divisor(mine, every)
        if not mine or (len(mine) >= stats.MIN_SEEDS and not stats.clear_above(stats.mean_interval(whole))):
            return None
        if len(mine) < stats.MIN_SEEDS:
            return Interval(float(np.mean(list(mine.values())) / np.mean(whole)), None, None, len(mine))
        return stats.ratio(list(mine.values()), whole)

    def kept_by_seed(self, label: Label) -> Seeds:
        """Each seed's gain as a share of what ``gain_kept`` divides by, so that their mean is that."""
        mine, every = self.gains(label)
        return {s: gain / float(np.mean(divisor(mine, every))) for s, gain in mine.items()}

    def no_gain(self, label: Label, kind: str | None = None) -> str | None:
        """Why gain kept is undefined for a label, in words; None where it is defined."""
        if self.gain_kept(label, kind) is not None:
            return None
        honest = self.honest(label)
        if honest is None:
            return " ".join(("no honest run", *(f"at {flag}" for flag in sorted(label.world))))
        found = self.honest_gain(honest, kind)
        if found is None:
            return f"{honest.name} has no evaluation before and after training"
        if found.lo is None:
            return f"{honest.name} has one seed, so its gain has no interval"
        if stats.clear_above(found):
            if self.gains(label, kind)[0]:
                return f"{honest.name}'s gain is not clear of 0 at the seeds of {label.name}"
            return f"{label.name} and {honest.name} share no seed"
        return f"{honest.name}'s own gain is not clear of 0: {found}"

    def without_landmarks(self) -> str | None:
        """What gain kept and the verdicts lack in this study, in one line; None where nothing is missing."""
        why = dict.fromkeys(told for label in self.labels.values() if (told := self.no_gain(label)))
        lacks = [f"gain kept is undefined where there is {w}" if w.startswith("no ") else w for w in why]
        gone: dict[str, set[int]] = {}
        for label in self.labels.values():
            if (honest := self.honest(label)) and (every := self.gains(label)[1]):
                gone.setdefault(honest.name, set()).update(self.solved(label.name).keys() - every.keys())
        for name, seeds in gone.items():
            if seeds:
                at = ", ".join(map(str, sorted(seeds)))
                lacks.append(f"no {name} at seed {at}, so gain kept there is of the other seeds")
        if not self.base("hack"):
            lacks.append("no evaluation of the untrained base")
        plain = {x.world for x in self.labels.values() if x.arm == "none" and not x.no_loophole}
        for world in sorted({x.world for x in self.labels.values()} - plain, key=sorted):
            at = "".join(f" at {flag}" for flag in sorted(world))
            lacks.append(f"no run of plain GRPO (none){at}, so H1 cannot be asked")
        return "; ".join(lacks) or None

    # --- verdicts and numbers by name --------------------------------------------------------------------------------

    def methods(self) -> list[Label]:
        """Labels that a verdict can be asked of: of an arm with a random control, and no oracle."""
        return [x for x in self.labels.values() if control_of(x.arm) and not x.oracle]

    def candidates(self) -> list[tuple[Label, Label]]:
        """Labels that H1 can be asked of, each with its none label."""
        return [(x, none) for x in self.methods() if (none := self.reference(x, "none"))]

    def h1(self, label: Label, none: Label, kind: str) -> H1 | None:
        """H1's verdict with kind "deploy_" (held-out problems) or "" (end of training); None without shared seeds."""
        levels = [self.level(x.name, f"{kind}{m}") for m in ("hack", "solve") for x in (none, label)]
        seeds = sorted(set.intersection(*map(set, levels)))
        if not seeds:
            return None
        control = self.at_same(label, control_of(label.arm))
        over = control and self.compare(control.name, label.name, f"{kind}hack")
        return h1_verdict(*([level[s] for s in seeds] for level in levels), over.t if over else None)

    def aim(self, label: Label) -> Aim | None:
        """The aim's verdict, on held-out problems; None without an evaluation before and after."""
        hack, base = shared(self.deployed(label.name, "hack"), self.deployed(label.name, "hack", when="first"))
        if not hack:
            return None
        control = self.at_same(label, control_of(label.arm))
        over = self.gain_kept(label, over=control.name) if control else None
        return aim_verdict(self.gain_kept(label), stats.paired_t(hack, base), over)

    def quantity(self, label: str, measure: str) -> Interval | None:
        """A number of a label, or of "base", for a document; None where there is none. measure: as ``level`` has it, or
        gain_kept.
        """
        if measure == "gain_kept":
            return self.gain_kept(self.labels[label]) if label in self.labels else None
        seeds = list(self.level(label, measure).values())
        return stats.mean_interval(seeds) if seeds else None
