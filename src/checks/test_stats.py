"""The statistics against scipy's, against closed forms and against planted truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from projected_grpo.studies import stats
from projected_grpo.studies.stats import Interval, aim_verdict, h1_verdict

RATES = st.lists(st.floats(0, 1), min_size=2, max_size=8)


def test_five_hacked_runs_against_none_is_2_in_252():
    found = stats.permutation([1] * 5, [0] * 5, paired=False)
    assert found.p == pytest.approx(2 / 252)
    assert found.smallest == pytest.approx(2 / 252)
    paired = stats.permutation([1] * 5, [0] * 5, paired=True)
    assert paired.p == pytest.approx(2 / 32)
    assert paired.smallest == pytest.approx(2 / 32)


@given(RATES, RATES)
@settings(max_examples=25, deadline=None)
def test_the_smallest_p_bounds_every_p(a, b):
    for x, y, paired in ((a, b, False), (a[:2], b[:2], True)):
        found = stats.permutation(x, y, paired)
        assert found.smallest - 1e-12 <= found.p <= 1


def test_sign_flips_agree_with_enumeration():
    d = np.array([0.3, -0.1, 0.25, 0.02])
    signs = np.array(np.meshgrid(*[[1, -1]] * 4)).reshape(4, -1).T
    sums = signs @ d
    one_sided = min((sums >= d.sum() - 1e-12).mean(), (sums <= d.sum() + 1e-12).mean())
    assert stats.permutation(d, np.zeros(4), paired=True).p == pytest.approx(2 * one_sided)


def test_many_runs_are_sampled_and_few_are_not_judged():
    rng = np.random.default_rng(0)
    found = stats.permutation(rng.normal(0, 1, 14), rng.normal(3, 1, 14), paired=False)
    assert found.p == pytest.approx(2 / stats.MAX_EXACT)
    assert stats.permutation([1.0], [0.0], paired=True).p == 1
    with pytest.raises(ValueError, match="paired samples of 2 and 3"):
        stats.permutation([1, 2], [1, 2, 3], paired=True)


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 0.1, 6), rng.normal(0.3, 0.1, 6)
    ours, theirs = stats.paired_t(a, b), scipy_stats.ttest_rel(a, b).confidence_interval()
    assert (ours.lo, ours.hi) == pytest.approx((theirs.low, theirs.high))
    one = scipy_stats.ttest_1samp(a, 0).confidence_interval()
    assert (stats.mean_interval(a).lo, stats.mean_interval(a).hi) == pytest.approx((one.low, one.high))
    assert stats.mean_interval([0.4]) == stats.Interval(0.4, None, None, 1)
    assert not stats.mean_interval([0.4]).excludes_zero


def test_welch_agrees_with_scipy_and_bears_runs_that_are_all_alike():
    rng = np.random.default_rng(7)
    a, b = rng.normal(0.5, 0.02, 3), rng.normal(0.3, 0.2, 10)
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    ours = stats.welch(a, b)
    assert (ours.lo, ours.hi, ours.n) == (pytest.approx(theirs.low), pytest.approx(theirs.high), 3)
    assert stats.welch([0.5] * 3, [0.2] * 4) == Interval(0.3, 0.3, 0.3, 3)
    one = stats.welch([0.5] * 3, b)
    assert one.lo < one.mean < one.hi
    assert stats.welch([0.5], b).lo is None


def test_a_ratio_is_of_means_and_its_interval_covers_a_planted_one():
    found = stats.ratio([0.1, 0.3], [0.2, 0.2])
    assert found.mean == pytest.approx(1.0)
    assert stats.ratio([0.1, 0.1], [0.01, 0.99]).mean == pytest.approx(0.2)  # a mean of the ratios would be 5.05
    assert stats.ratio([0.1], [0.2]) == Interval(0.5, None, None, 1)
    assert stats.ratio([0.1, 0.2, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2]).lo is None, "of four seeds it would cover too little"
    same = stats.ratio([0.2, 0.3, 0.25, 0.2, 0.3], [0.2, 0.3, 0.25, 0.2, 0.3])
    assert (same.lo, same.hi) == (1.0, 1.0)
    rng, covered, trials = np.random.default_rng(8), 0, 300
    for _ in range(trials):
        below = rng.normal(0.3, 0.05, 5)
        found = stats.ratio(0.8 * 0.3 + rng.normal(0, 0.05, 5), below, draws=400)
        covered += found.lo <= 0.8 <= found.hi
    assert covered / trials == pytest.approx(0.95, abs=0.05)


def coverage(interval, noise: float, seeds: int = 5, trials: int = 400) -> float:
    """Share of intervals that cover 0 when both arms are the same: seeds differ, problems differ within a seed."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(trials):
        of_seed = rng.normal(0, 0.1, seeds)
        found = interval([rng.normal(m, noise, 16) for m in of_seed])
        covered += found.lo <= 0 <= found.hi
    return covered / trials


def test_intervals_of_a_planted_null_cover_zero_at_the_stated_rate():
    assert coverage(lambda d: stats.mean_interval([x.mean() for x in d]), 0.3) == pytest.approx(0.95, abs=0.03)
    assert coverage(lambda d: stats.bootstrap(d, draws=500), 0.15) == pytest.approx(0.95, abs=0.03)
    assert coverage(lambda d: stats.bootstrap(d, draws=500), 0.3) >= 0.95  # wide where problems are noisy


def test_bootstrap_over_seeds_alone_agrees_with_scipys():
    x = np.random.default_rng(3).normal(0.2, 0.1, 40)
    ours = stats.bootstrap([[v] for v in x], draws=9000)
    theirs = scipy_stats.bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert ours.mean == pytest.approx(x.mean())
    assert ours.lo == pytest.approx(theirs.confidence_interval.low, abs=0.005)
    assert ours.hi == pytest.approx(theirs.confidence_interval.high, abs=0.005)
    assert stats.bootstrap([[0.1, 0.2]]).lo is None


def test_bootstrap_widens_with_noise_between_problems():
    rng = np.random.default_rng(4)
    quiet = stats.bootstrap([np.full(16, 0.1) for _ in range(5)])
    noisy = stats.bootstrap([0.1 + rng.normal(0, 0.5, 16) for _ in range(5)])
    assert quiet.lo == pytest.approx(quiet.hi)
    assert noisy.hi - noisy.lo > 0.2


def test_holm_by_hand_and_as_statsmodels_has_it():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []
    p = np.random.default_rng(6).random(20) / 4
    assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_tost_agrees_with_two_t_tests_and_with_its_90_percent_interval():
    d = np.array([0.01, -0.02, 0.03, 0.0, -0.01])
    low = scipy_stats.ttest_1samp(d, -0.1, alternative="greater").pvalue
    high = scipy_stats.ttest_1samp(d, 0.1, alternative="less").pvalue
    assert stats.tost(d).p == pytest.approx(max(low, high))
    assert stats.tost(d).p_low == pytest.approx(low)
    assert stats.tost(d).holds
    for shift in np.linspace(-0.2, 0.2, 21):
        ninety = stats.mean_interval(d + shift, level=0.9)
        assert stats.tost(d + shift).holds == (ninety.lo > -0.1 and ninety.hi < 0.1)
    assert stats.tost([0.05] * 5).p == 0
    assert (stats.tost([0.2] * 5).p, stats.tost([0.2] * 5).short) == (1, "1.000 ≥")
    assert stats.tost([-0.2] * 5).short == "1.000"
    gain = stats.tost(0.3 + d)
    assert gain.no_loss
    assert not gain.holds
    assert stats.tost([0.0]).p is None


def test_rank_correlation_counts_all_pairings_of_few():
    assert stats.rank_correlation([1, 2, 3, 4], [9, 7, 5, 3]) == "ρ = -1.00, p = 0.083"  # 2 of 24
    assert stats.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).startswith("ρ = 0.80, p = 0.1")
    assert stats.rank_correlation([1, 2], [1, 2]) == stats.rank_correlation([1, 1, 1], [1, 2, 3]) == "–"


def test_iqm_drops_the_extreme_seeds():
    assert stats.iqm([0, 0.2, 0.3, 0.4, 9]) == pytest.approx(0.3)


def test_onset_and_its_censoring():
    curve = [0.0] * 10 + [1.0] * 10
    assert stats.onset(curve, 0.5, window=5) == 12  # three of the five steps 8..12 are over
    assert stats.onset([0.4] * 20, 0.5) is None
    assert stats.onset([0.9], 0.5) == 0
    found = stats.onsets([10, 20, 30, None, None], [60] * 5)
    assert (found.median, found.reached, str(found)) == (30, 3, "30 (3/5)")
    assert str(stats.onsets([10, None, None], [60, 60, 60])) == "> 60 (1/3)"
    assert str(stats.onsets([None, None], [60, 60])) == "> 60 (0/2)"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.05, 0.9))
def test_a_higher_level_never_comes_earlier(curve, level):
    low, high = stats.onset(curve, level), stats.onset(curve, level + 0.05)
    assert high is None or (low is not None and low <= high)


def test_detector_by_hand():
    found = stats.detector([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [0, 1, 0, 1])
    assert found.auroc == pytest.approx(0.75)
    assert found.ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.f05 == pytest.approx(1.25 * 0.5 * 0.5 / (0.25 * 0.5 + 0.5))
    assert stats.detector([1, 1], [0.1, 0.2]).auroc is None
    rng = np.random.default_rng(5)
    truth = rng.random(20000) < 0.3
    planted = stats.detector(truth, rng.normal(truth * 1.0, 1))
    assert planted.auroc == pytest.approx(scipy_stats.norm.cdf(1 / math.sqrt(2)), abs=0.01)


FIVE = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])
CONTROL = stats.Interval(0.2, 0.1, 0.3, 5)


@pytest.mark.parametrize(
    ("hack", "solve", "control", "verdict", "why"),
    [
        (0.50, 0.30, CONTROL, "supported", "all three"),
        (0.50, 0.60, CONTROL, "supported", "all three"),  # a gain of solve is no loss
        (0.50, 0.20, CONTROL, "supported", "all three"),
        (0.50, 0.17, CONTROL, "undecided", "over 10 points"),
        (0.50, 0.14, CONTROL, "falsified", "solve fell by over 15"),
        (0.50, 0.30, stats.Interval(0.2, -0.01, 0.4, 5), "undecided", "random control"),
        (0.50, 0.30, stats.Interval(-0.2, -0.3, -0.1, 5), "undecided", "random control"),
        (0.50, 0.30, None, "undecided", "no random control"),
        (0.50, 0.30, stats.Interval(0.2, 0.1, 0.3, 2), "undecided", "random control has 2 of the 5 seeds"),
        (0.60, 0.30, CONTROL, "undecided", "under 30"),
        (0.70, 0.30, CONTROL, "falsified", "under 15"),
        (0.95, 0.30, CONTROL, "falsified", "under 15"),
    ],
)
def test_h1_by_its_rule(hack, solve, control, verdict, why):
    found = h1_verdict(0.8 + FIVE, hack - FIVE, 0.3 + FIVE, solve - FIVE, control)
    assert found.verdict == verdict
    assert why in found.why


def test_h1_within_one_sem_and_with_few_seeds():
    scattered = np.array([0.1, 0.9, 0.1, 0.9, 0.9])
    found = h1_verdict(scattered, scattered - 0.16, [0.3] * 5, [0.3] * 5, CONTROL)
    assert found.verdict == "falsified"
    assert found.why == "within 1 SEM of none"
    few = h1_verdict([0.8] * 3, [0.1] * 3, [0.3] * 3, [0.3] * 3, CONTROL)
    assert few.verdict == "undecided"
    assert "3 seeds" in few.why


CLOSE, ABOVE = Interval(0.01, -0.01, 0.03, 5), Interval(0.4, 0.2, 0.6, 5)


@pytest.mark.parametrize(
    ("gain", "excess", "control", "verdict", "why"),
    [
        (Interval(0.95, 0.8, 1.1, 5), CLOSE, ABOVE, "supported", "all three"),
        (Interval(0.90, 0.8, 1.1, 5), Interval(0.05, 0.0, 0.1, 5), ABOVE, "supported", "all three"),
        (Interval(0.85, 0.7, 1.0, 5), CLOSE, ABOVE, "undecided", "gain kept under 0.9"),
        (Interval(0.50, 0.3, 0.7, 5), CLOSE, ABOVE, "falsified", "gain kept under 0.9"),
        (Interval(0.95, 0.8, 1.1, 5), Interval(0.07, 0.0, 0.1, 5), ABOVE, "undecided", "hack over base"),
        (Interval(0.95, 0.8, 1.1, 5), Interval(0.20, 0.1, 0.3, 5), ABOVE, "falsified", "hack over base"),
        (Interval(0.95, 0.8, 1.1, 5), CLOSE, Interval(0.4, -0.1, 0.9, 5), "undecided", "random control"),
        (Interval(0.95, 0.8, 1.1, 5), CLOSE, None, "undecided", "no random control"),
        (Interval(0.95, 0.8, 1.1, 5), CLOSE, Interval(0.4, 0.2, 0.6, 4), "undecided", "4 of the 5 seeds"),
        (Interval(0.95, 0.8, 1.1, 3), CLOSE, ABOVE, "undecided", "3 seeds"),
        (None, CLOSE, ABOVE, "undecided", "undefined"),
    ],
)
def test_the_aim_by_its_rule(gain, excess, control, verdict, why):
    found = aim_verdict(gain, excess, control)
    assert found.verdict == verdict
    assert why in found.why


@pytest.mark.parametrize(
    ("under", "verdict", "why"),
    [
        (ABOVE, "supported", "above 0"),
        (CLOSE, "falsified", "not shown to hack less"),  # its interval has 0 in it
        (Interval(-0.4, -0.6, -0.2, 5), "falsified", "not shown"),
        (Interval(0.4, 0.2, 0.6, 4), "undecided", "4 of the 5 seeds"),
        (None, "undecided", "no random control"),
    ],
)
def test_h2_by_its_rule(under, verdict, why):
    found, told = stats.h2_verdict(under)
    assert (found, why in told) == (verdict, True)
