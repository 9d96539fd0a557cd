"""The statistics of a comparison, held against scipy and statsmodels, and on made-up cases with a known answer."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from raycifar.analysis.statistics import bootstrap, difference, holm, mcnemar, mean_interval, seeds_needed

IMAGES = 10_000


def runs(accuracy, count, rng, spread=0.003):
    """Made-up runs: images of differing difficulty, a little luck for each run."""
    difficulty = np.random.default_rng(0).beta(0.5, 0.5, IMAGES)
    chances = [difficulty ** (1 / (accuracy + spread * rng.normal()) - 1) for _ in range(count)]
    return np.stack([rng.random(IMAGES) < chance for chance in chances])


def test_the_interval_of_a_mean_is_student_s():
    values = [0.71, 0.73, 0.72, 0.70]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = mean_interval(values)
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert found["mean"] == pytest.approx(0.715)
    assert mean_interval([0.7]) == {"mean": 0.7, "low": None, "high": None, "n": 1}


def test_mcnemar_is_statsmodels():
    rng = np.random.default_rng(1)
    for accuracy in (0.50, 0.51, 0.55):
        (a,), (b,) = runs(0.5, 1, rng), runs(accuracy, 1, rng)
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert mcnemar(a, b) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    assert mcnemar(a, a) == 1.0


def test_with_one_run_of_each_the_bootstrap_is_scipy_s_over_images():
    rng = np.random.default_rng(2)
    a, b = runs(0.55, 1, rng), runs(0.50, 1, rng)
    expected = stats.bootstrap(
        (a[0].astype(float) - b[0],), np.mean, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    assert bootstrap(a, b) == pytest.approx(tuple(expected), abs=0.001)


def test_where_images_play_no_part_the_difference_is_welch_s_test():
    rng = np.random.default_rng(3)
    # Every run is right on a number of images of its own, and all of them are of one kind: no image is special.
    a, b = (
        np.stack([np.roll(np.arange(IMAGES) < count, rng.integers(IMAGES)) for count in counts])
        for counts in ((5210, 5190, 5250, 5230, 5170), (5100, 5130, 5080, 5120))
    )
    found = difference(a, b)
    welch = CompareMeans(DescrStatsW(a.mean(1)), DescrStatsW(b.mean(1)))
    seeds_only = welch.tconfint_diff(usevar="unequal")
    # The part of the images only widens it.
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert found["low"] < seeds_only[0] < seeds_only[1] < found["high"]
    error = np.sqrt(welch.std_meandiff_separatevar**2 + (a.mean(0) - b.mean(0)).var(ddof=1) / IMAGES)
    half = stats.t.ppf(0.975, found["degrees_of_freedom"]) * error
    assert found["high"] - found["difference"] == pytest.approx(half)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_same_model_twice_is_not_told_apart_and_five_points_are(seeds):
    rng = np.random.default_rng(4)
    a, same, better = runs(0.60, seeds, rng), runs(0.60, seeds, rng), runs(0.65, seeds, rng)
    assert difference(a, same)["p_value"] > 0.05
    assert difference(a, a)["p_value"] == 1.0
    found = difference(better, a)
    assert found["p_value"] < 0.01
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found["bootstrap"][0] > 0


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_difference_is_found_in_about_one_comparison_of_twenty(seeds):
    """Under the null hypothesis, with seeds that matter: false alarms are as rare as they are said to be."""
    rng = np.random.default_rng(5)
    spread = 0.0 if seeds == 1 else 0.003
    alarms = [
        difference(runs(0.6, seeds, rng, spread), runs(0.6, seeds, rng, spread))["p_value"] < 0.05 for _ in range(100)
    ]
    assert np.mean(alarms) <= 0.1


def test_the_number_of_seeds_that_is_advised_tells_the_difference():
    """By simulation: normally distributed accuracies, and scipy's own t test."""
    rng = np.random.default_rng(6)
    d, spread = 0.004, 0.003
    needed = seeds_needed(d, spread**2, 0.0)
    told = [
        stats.ttest_ind(rng.normal(d, spread, needed), rng.normal(0, spread, needed)).pvalue < 0.05 for _ in range(2000)
    ]
    assert np.mean(told) == pytest.approx(0.8, abs=0.06)
    assert seeds_needed(0.001, spread**2, 0.005**2) is None  # too few images for any number of seeds


def test_p_values_are_adjusted_for_their_number():
    p_values = [0.04, 0.01, 0.03]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
