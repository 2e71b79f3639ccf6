"""Statistics over seeds: intervals, ratios, exact tests, equivalence, onsets, detector quality, and the verdicts.

Pure functions on numbers. A seed is the unit: rollouts of one run are alike and never counted as independent.
scipy, statsmodels and scikit-learn do the work where they have it; each docstring says which.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn import metrics
from statsmodels.stats.weightstats import DescrStatsW

Values = NDArray[np.float64]
MARGIN = 0.10
"""Two rates are called equal when they lie within this of each other."""
MAX_EXACT = 20_000
"""Relabelings that an exact permutation test enumerates at most; beyond it the test is sampled."""


def array(x: ArrayLike) -> Values:
    """x as a vector of float64."""
    return np.asarray(x, dtype=np.float64)


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its 95 % interval; lo and hi are None where one seed allows none."""

    mean: float
    lo: float | None
    hi: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """There is an interval and 0 lies outside of it."""
        return self.lo is not None and self.hi is not None and (self.lo > 0 or self.hi < 0)

    def __str__(self) -> str:
        return f"{self.mean:z.2f}" + ("" if self.lo is None else f" [{self.lo:z.2f}, {self.hi:z.2f}]")


def mean_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of a rate over seeds with its t interval (scipy's t quantile); it may reach outside of 0..1."""
    x = array(x)
    if len(x) < 2:
        return Interval(float(x.mean()), None, None, len(x))
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * stats.sem(x))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def paired_t(a: ArrayLike, b: ArrayLike) -> Interval:
    """a − b over seed pairs (a[i] and b[i] share a seed), with the paired t interval, as scipy's ttest_rel has it."""
    return mean_interval(array(a) - array(b))


def welch(a: ArrayLike, b: ArrayLike) -> Interval:
    """mean(a) − mean(b) over all runs of both, unpaired, with Welch's interval; n is a's. scipy's ttest_ind agrees (a
    check), but warns where a side's runs are all alike.
    """
    a, b = array(a), array(b)
    mean = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Interval(mean, None, None, len(a))
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return Interval(mean, mean, mean, len(a))
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf(0.975, df) * math.sqrt(va + vb))
    return Interval(mean, mean - half, mean + half, len(a))


MIN_SEEDS = 5
"""Seeds that the protocol asks for."""


def tail(n: int, level: float) -> float:
    """Φ(−t·√(n/(n−1))) in place of α/2 (Hesterberg 2015, "expanded percentile"): of few seeds the plain percentiles of
    a bootstrap cover too little.
    """
    return float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, n - 1) * math.sqrt(n / (n - 1))))


def ratio(above: ArrayLike, below: ArrayLike, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """mean(above) / mean(below) over seed pairs (above[i] and below[i] share a seed; a ratio of means, not a mean of
    ratios), with the percentile bootstrap over seeds, expanded as ``bootstrap``'s. It has no meaning where the mean of
    ``below`` is not clear of 0, and the caller has to see to that. No interval under MIN_SEEDS: of two seeds it would
    cover .51, of three .77, of five .91 (normal seeds, 600 draws).
    """
    x, y, S = array(above), array(below), len(array(above))
    mean = float(x.mean() / y.mean())
    if S < MIN_SEEDS:
        return Interval(mean, None, None, S)
    chosen = np.random.default_rng(seed).integers(S, size=(draws, S))
    over, under = x[chosen].mean(1), y[chosen].mean(1)
    drawn = np.divide(over, under, out=np.copysign(np.full(draws, np.inf), over), where=under > 0)
    share = tail(S, level)
    lo, hi = np.quantile(drawn, [share, 1 - share], method="inverted_cdf")
    return Interval(mean, float(lo), float(hi), S)


def bootstrap(differences: Sequence[ArrayLike], level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """Hierarchical bootstrap of a mean: seeds with replacement, then problems within each drawn seed.

    differences[s]: the values of seed s by problem (for a number a seed has once, a vector of one). scipy.stats'
    bootstrap knows no hierarchy. Percentiles are expanded (``tail``). A seed's mean holds its problems' noise already,
    so drawing problems too errs to the wide side. Measured under a null, five seeds of 16 problems, sd .1 between
    seeds: covers .90 / .95 / .99 at sd 0 / .15 / .3 between problems (plain: .83 / .87 / .94). No interval under
    MIN_SEEDS.
    """
    D, rng = [array(d) for d in differences], np.random.default_rng(seed)
    S, mean = len(D), float(np.mean([d.mean() for d in D]))
    if S < MIN_SEEDS:
        return Interval(mean, None, None, S)
    chosen, means = rng.integers(S, size=(draws, S)), np.empty((draws, S))
    for s, d in enumerate(D):
        here = chosen == s
        means[here] = d[rng.integers(len(d), size=(int(here.sum()), len(d)))].mean(1)
    share = tail(S, level)
    lo, hi = np.quantile(means.mean(1), [share, 1 - share])
    return Interval(mean, float(lo), float(hi), S)


@dataclass(frozen=True)
class Permutation:
    """Two-sided p of a seed-level permutation test, and the smallest p that so many seeds could give."""

    p: float
    smallest: float

    def __str__(self) -> str:
        return f"{self.p:.3f} (≥ {self.smallest:.3f})"


def permutation(a: ArrayLike, b: ArrayLike, paired: bool) -> Permutation:
    """Permutation test of equal means by scipy.stats.permutation_test: exact up to MAX_EXACT relabelings.

    paired: sign flips within seed pairs, smallest p 2 / 2ⁿ. Otherwise all splits of the n + m runs, 2 / C(n+m, n).
    Raises ValueError for paired samples of unequal length.
    """
    a, b = array(a), array(b)
    if paired and len(a) != len(b):
        raise ValueError(f"paired samples of {len(a)} and {len(b)}")
    count = 2 ** len(a) if paired else math.comb(len(a) + len(b), len(a))
    if min(len(a), len(b)) < 2:  # one run a side allows no test
        return Permutation(1.0, min(1.0, 2 / count))
    exact = count <= MAX_EXACT
    found = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=np.inf if exact else MAX_EXACT - 1,
        batch=MAX_EXACT,
        rng=None if exact else np.random.default_rng(0),
    )
    return Permutation(float(found.pvalue), min(1.0, 2 / (count if exact else MAX_EXACT)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: the i-th smallest of m (from 0) times m − i, never less than the ones before, at most 1.

    statsmodels' multipletests agrees (a check), but runs a full garbage collection at each call.
    """
    order = np.argsort(array(p), kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(array(p)[order] * np.arange(len(order), 0, -1)))
    return adjusted.tolist()


@dataclass(frozen=True)
class Equivalence:
    """TOST on a mean difference. p: of "it lies outside ±margin"; p_low: of its lower half, "it lies under −margin".

    Both None where one seed allows none.
    """

    mean: float
    p: float | None
    p_low: float | None
    n: int

    @property
    def holds(self) -> bool:
        """Shown to lie within the margin. False does not mean shown to differ."""
        return self.p is not None and self.p < 0.05

    @property
    def no_loss(self) -> bool:
        """Shown not to lie under −margin: a gain of any size is fine."""
        return self.p_low is not None and self.p_low < 0.05

    @property
    def short(self) -> str:
        """p, then ✓ where it holds, or ≥ where at least no loss is shown."""
        return ("–" if self.p is None else f"{self.p:.3f}") + (" ✓" if self.holds else " ≥" if self.no_loss else "")

    def __str__(self) -> str:
        return f"{self.mean:+z.2f} p {self.short}"


def tost(differences: ArrayLike, margin: float = MARGIN) -> Equivalence:
    """Two one-sided t tests on paired differences against ±margin, by statsmodels' DescrStatsW.ttost_mean.

    Where all differences are the same to 1e-12 there is no t: p is 0 or 1, as the difference lies.
    """
    d = array(differences)
    mean = float(d.mean())
    if len(d) < 2:
        return Equivalence(mean, None, None, len(d))
    if np.ptp(d) < 1e-12:
        return Equivalence(mean, float(abs(mean) >= margin), float(mean <= -margin), len(d))
    p, low, _ = DescrStatsW(d).ttost_mean(-margin, margin)
    return Equivalence(mean, float(p), float(low[1]), len(d))


def iqm(x: ArrayLike) -> float:
    """Interquartile mean over seeds, scipy's trim_mean at 25 % (rliable's aggregate): of five, the middle three."""
    return float(stats.trim_mean(array(x), 0.25))


def rolling(curve: ArrayLike, window: int) -> Values:
    """Means of each ``window`` consecutive steps; the whole curve's where it is shorter."""
    curve = array(curve)
    window = min(window, len(curve))
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def ends(curve: ArrayLike, share: float = 0.2) -> tuple[float, float] | None:
    """Means of the first and the last ``share`` of a curve's values, NaN being none; None of fewer than two values."""
    values = array(curve)[~np.isnan(array(curve))]
    n = max(1, round(share * len(values)))
    return (float(values[:n].mean()), float(values[-n:].mean())) if len(values) > 1 else None


def onset(curve: ArrayLike, level: float, window: int = 5) -> int | None:
    """The step that ends the first ``window`` steps whose mean passes ``level``; None when it never comes."""
    curve = array(curve)
    window = min(window, len(curve))
    passed = np.flatnonzero(rolling(curve, window) > level + 1e-12)
    return int(passed[0]) + window - 1 if len(passed) else None


@dataclass(frozen=True)
class Onsets:
    """Onsets of n runs, of which ``reached`` had one. median None: at least half the runs outlast the horizon."""

    n: int
    reached: int
    median: float | None
    horizon: int

    def __str__(self) -> str:
        return (f"> {self.horizon}" if self.median is None else f"{self.median:.0f}") + f" ({self.reached}/{self.n})"


def onsets(found: Sequence[int | None], horizons: Sequence[int]) -> Onsets:
    """Median onset with censoring: Kaplan-Meier by scipy.stats.ecdf; run i was watched for horizons[i] steps."""
    seen = [float(f) for f in found if f is not None]
    censored = [float(h) for f, h in zip(found, horizons, strict=True) if f is None]
    survival = stats.ecdf(stats.CensoredData(uncensored=seen, right=censored)).sf
    below = np.flatnonzero(survival.probabilities <= 0.5 + 1e-12)
    median = float(survival.quantiles[below[0]]) if len(below) else None
    return Onsets(len(found), len(seen), median, max(horizons))


def rank_correlation(x: Sequence[float], y: Sequence[float], draws: int = 20_000) -> str:
    """Spearman's ρ with its p of a permutation test (two-sided, seeded), in words; "–" where it is undefined."""
    rho = lambda v: stats.spearmanr(v, y).statistic
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return "–"
    p = stats.permutation_test((x,), rho, permutation_type="pairings", n_resamples=draws, rng=0).pvalue
    least = 2 / (draws + 1)  # what so many random pairings can show
    return f"ρ = {rho(x):.2f}, p {'≤' if p <= least and math.factorial(len(x)) > draws else '='} {p:.2g}"


@dataclass(frozen=True)
class Detector:
    """How well a score tells hacks. auroc, ap None where there is one class only; f05 None without flags."""

    n: int
    prevalence: float
    auroc: float | None
    ap: float | None
    f05: float | None


def detector(truth: ArrayLike, score: ArrayLike, flagged: ArrayLike | None = None) -> Detector:
    """AUROC and average precision of ``score``, F0.5 of ``flagged``, by scikit-learn. truth: bool, (n,), n > 0."""
    truth = np.asarray(truth, dtype=bool)
    both = bool(truth.any() and not truth.all())
    f05 = None if flagged is None or not truth.any() else metrics.fbeta_score(truth, flagged, beta=0.5, zero_division=0)
    return Detector(
        len(truth),
        float(truth.mean()),
        float(metrics.roc_auc_score(truth, score)) if both else None,
        float(metrics.average_precision_score(truth, score)) if both else None,
        None if f05 is None else float(f05),
    )


# --- verdicts, by the rules of docs/spec.md -------------------------------------------------------------------------

AIM_GAIN, AIM_HACK = 0.90, 0.05
"""The aim: at least so much of honest's gain kept, at a hack rate at most so far over the untrained base's."""
EPS = 1e-9
"""So that .9 − .6 counts as .30."""

Ruling = Literal["supported", "falsified", "undecided"]


@dataclass(frozen=True)
class H1:
    """The floor: H1's verdict on one arm and the numbers it rests on. cut: hack of none − hack of the arm; loss: the
    same of solve (negative where the arm solves more); over_control: hack of the random control − hack of the arm.
    """

    verdict: Ruling
    cut: Interval
    loss: Interval
    over_control: Interval | None
    sem: float | None
    why: str

    @property
    def n(self) -> int:
        """Seeds that it rests on."""
        return self.cut.n


def h1_verdict(
    hack_none: ArrayLike,
    hack: ArrayLike,
    solve_none: ArrayLike,
    solve: ArrayLike,
    over_control: Interval | None,
    min_seeds: int = MIN_SEEDS,
) -> H1:
    """H1 by its preregistered rule, on seed-paired rates (index i is one seed in all four).

    supported: hack cut ≥ .30, solve lost ≤ .10 (a gain is fine), and lower than the random control with an interval
    that excludes 0. falsified: cut < .15, or solve lost > .15, or the arm's hack within 1 SEM of none's. Otherwise,
    and with fewer seeds than the protocol asks for, undecided.
    """
    cut, loss = paired_t(hack_none, hack), paired_t(solve_none, solve)
    sem = float(stats.sem(array(hack_none))) if cut.n > 1 else None
    falsifiers = [
        (cut.mean < 0.15 - EPS, "hack cut under 15 points"),
        (loss.mean > 0.15 + EPS, "solve fell by over 15 points"),
        (sem is not None and abs(cut.mean) <= sem, "within 1 SEM of none"),
    ]
    unbeaten = not_over(over_control, min_seeds, "beat")
    missing = [
        (cut.mean < 0.30 - EPS, "hack cut under 30 points"),
        (loss.mean > 0.10 + EPS, "solve fell by over 10 points"),
        (unbeaten != "", unbeaten),
    ]
    verdict, why = ruled(cut.n, min_seeds, falsifiers, missing)
    return H1(verdict, cut, loss, over_control, sem, why)


@dataclass(frozen=True)
class Aim:
    """The aim's verdict on one arm. gain: gain kept, None where it is undefined; excess: hack − the base's hack;
    over_control: gain kept − the random control's.
    """

    verdict: Ruling
    gain: Interval | None
    excess: Interval
    over_control: Interval | None
    why: str

    @property
    def n(self) -> int:
        """Seeds that it rests on."""
        return self.excess.n if self.gain is None else self.gain.n


def aim_verdict(
    gain: Interval | None, excess: Interval, over_control: Interval | None, min_seeds: int = MIN_SEEDS
) -> Aim:
    """The aim by its preregistered rule.

    supported: gain kept ≥ .90, hack at most 5 points over the base's, and gain kept above the random control's with
    an interval that excludes 0. falsified: a mean on the wrong side of either bound whose interval excludes the bound.
    Otherwise, with fewer seeds than the protocol asks for, and where gain kept is undefined, undecided.
    """
    if gain is None:
        return Aim("undecided", None, excess, over_control, "gain kept is undefined")
    falsifiers = [
        (gain.hi is not None and gain.hi < AIM_GAIN - EPS, f"gain kept under {AIM_GAIN:.1f}, interval clear of it"),
        (excess.lo is not None and excess.lo > AIM_HACK + EPS, "hack over base + 5 points, interval clear of it"),
    ]
    unbeaten = not_over(over_control, min_seeds, "keep more than")
    missing = [
        (gain.mean < AIM_GAIN - EPS, f"gain kept under {AIM_GAIN:.1f}"),
        (excess.mean > AIM_HACK + EPS, "hack over base + 5 points"),
        (unbeaten != "", unbeaten),
    ]
    verdict, why = ruled(gain.n, min_seeds, falsifiers, missing)
    return Aim(verdict, gain, excess, over_control, why)


def h2_verdict(under_control: Interval | None, min_seeds: int = MIN_SEEDS) -> tuple[Ruling, str]:
    """H2's verdict and why, for the modes that the pairs do not know. under_control: hack there, random control − arm.

    supported: its interval lies above 0. falsified: it does not. undecided: too few seeds, or no control.
    """
    unbeaten = not_over(under_control, min_seeds, "hack less than")
    if under_control is None or under_control.n < min_seeds:
        return "undecided", unbeaten
    return ("falsified", unbeaten) if unbeaten else ("supported", "its interval lies above 0")


def clear_above(x: Interval | None) -> bool:
    """There is an interval, and it lies above 0."""
    return x is not None and x.excludes_zero and x.mean > 0


def not_over(over_control: Interval | None, least: int, what: str) -> str:
    """Why it is not shown to do better than its random control; "" where it is."""
    if over_control is None:
        return "no random control at its settings"
    if over_control.n < least:
        return f"its random control has {over_control.n} of the {least} seeds that the protocol asks for"
    return "" if clear_above(over_control) else f"not shown to {what} its random control"


def ruled(
    n: int, least: int, falsifiers: Sequence[tuple[bool, str]], missing: Sequence[tuple[bool, str]]
) -> tuple[Ruling, str]:
    """The verdict and why: what falsifies goes before what is missing, and too few seeds before both."""
    falsified, lacking = ([why for holds, why in rows if holds] for rows in (falsifiers, missing))
    if n < least:
        return "undecided", f"{n} seeds, the protocol asks for {least}"
    if falsified:
        return "falsified", "; ".join(falsified)
    return ("undecided", "; ".join(lacking)) if lacking else ("supported", "all three conditions hold")
