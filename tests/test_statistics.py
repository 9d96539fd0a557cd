"""The statistics of a comparison, held against scipy and statsmodels, and on made-up cases with a known answer."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from raycifar.analysis.statistics import accuracy_intervals, difference, mcnemar, mean_interval, seeds_needed

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


def test_the_intervals_of_accuracies_are_wilson_s():
    scores = {"images": 300, "top1": 0.7, "near_duplicates": 100, "top1_without_near_duplicates": 0.65, "ece": 0.1}
    found = accuracy_intervals(scores)
    assert found.keys() == {"top1", "top1_without_near_duplicates"}
    for name, right, n in (("top1", 210, 300), ("top1_without_near_duplicates", 130, 200)):
        assert tuple(found[name].values()) == pytest.approx(proportion_confint(right, n, method="wilson"))


def test_a_score_of_one_is_not_certain_on_few_images():
    ends = accuracy_intervals({"images": 20, "top1": 1.0})["top1"]
    assert ends["low"] == pytest.approx(0.839, abs=0.001)
    assert ends["high"] == 1
    only_duplicates = {"images": 20, "near_duplicates": 20, "top1_without_near_duplicates": None}
    assert accuracy_intervals(only_duplicates) == {}


def test_mcnemar_is_statsmodels():
    rng = np.random.default_rng(1)
    for accuracy in (0.50, 0.51, 0.55):
        (a,), (b,) = runs(0.5, 1, rng), runs(accuracy, 1, rng)
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert mcnemar(a, b) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    assert mcnemar(a, a) == 1.0


def test_where_images_play_no_part_the_difference_is_welch_s_test():
    rng = np.random.default_rng(3)
    # Every run is right on a number of images of its own, and all of them are of one kind: no image is special.
    a, b = (
        np.stack([rng.permutation(np.arange(IMAGES) < count) for count in counts])
        for counts in ((5210, 5190, 5450, 5230, 5070), (5100, 5230, 4980, 5120))
    )
    found = difference(a, b)
    welch = CompareMeans(DescrStatsW(a.mean(1)), DescrStatsW(b.mean(1)))
    low, high = welch.tconfint_diff(usevar="unequal")
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=0.05)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_same_model_twice_is_not_told_apart_and_five_points_are(seeds):
    rng = np.random.default_rng(4)
    a, same, better = runs(0.60, seeds, rng), runs(0.60, seeds, rng), runs(0.65, seeds, rng)
    assert difference(a, same)["p_value"] > 0.05
    alike = difference(a, a)
    assert alike["p_value"] == 1.0
    assert alike["low"] <= 0 <= alike["high"]
    found = difference(better, a)
    assert found["p_value"] < 0.02
    assert 0 < found["low"] < found["difference"] < found["high"]


def chances(rng, of_model=0.5):
    """The chances of each of 1,000 new images to be classified correctly by two equally good models."""
    easy = rng.normal(0.5, 1.5, 1000)
    return [1 / (1 + np.exp(-(easy + of_model * rng.normal(size=1000)))) for _ in range(2)]


@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("seeds", [2, 4])
def test_the_standard_error_is_that_of_new_seeds_and_new_images(seeds, spread):
    """Under the null hypothesis, with seeds that matter or don't."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(250):
        both = [
            np.stack([rng.random(1000) < np.clip(chance + spread / 10 * rng.normal(), 0, 1) for _ in range(seeds)])
            for chance in chances(rng)
        ]
        found.append(difference(*both))
    errors = [(each["high"] - each["low"]) / 2 / stats.t.ppf(0.975, each["degrees_of_freedom"]) for each in found]
    actual = np.std([each["difference"] for each in found])
    assert 0.85 <= np.sqrt(np.mean(np.square(errors))) / actual <= 1.25
    assert np.mean([each["p_value"] < 0.05 for each in found]) <= 0.09


def test_with_a_single_run_the_seed_is_allowed_for():
    """The effect of a seed can't be measured: the interval is wide, so that false alarms are rare all the same."""
    rng = np.random.default_rng(5)
    alarms = [
        difference(*(rng.random((1, 1000)) < chance for chance in chances(rng)))["p_value"] < 0.05 for _ in range(250)
    ]
    assert np.mean(alarms) <= 0.03


def test_more_seeds_take_away_what_only_some_seeds_get_right():
    rng = np.random.default_rng(6)
    a, b = (rng.random((3, IMAGES)) < accuracy for accuracy in (0.605, 0.600))  # images are all of one kind
    needed = difference(a, b)["seeds_needed"]
    assert needed is not None
    told = [
        difference(*(rng.random((needed, IMAGES)) < accuracy for accuracy in (a.mean(), b.mean())))["p_value"] < 0.05
        for _ in range(40)
    ]
    assert np.mean(told) >= 0.6


@pytest.mark.parametrize("pairs", [1, 15])
def test_the_number_of_seeds_that_is_advised_tells_the_difference(pairs):
    """By simulation: normally distributed accuracies, and scipy's own t test."""
    rng = np.random.default_rng(6)
    d, spread = 0.004, 0.003
    needed = seeds_needed(d, spread**2, 0.0, 1 - 0.05 / pairs)
    p_values = stats.ttest_ind(*(rng.normal(mean, spread, (2000, needed)) for mean in (d, 0)), axis=1).pvalue
    assert np.mean(pairs * p_values < 0.05) == pytest.approx(0.8, abs=0.06)
    assert seeds_needed(0.001, spread**2, 0.005**2) is None  # too few images for any number of seeds


def test_intervals_and_p_values_are_adjusted_for_the_number_of_pairs():
    rng = np.random.default_rng(4)
    a, b = runs(0.60, 3, rng), runs(0.61, 3, rng)
    alone, found = difference(a, b), difference(a, b, 3)
    _, adjusted, _, alpha = multipletests([alone["p_value"], 1, 1], method="bonferroni")
    error = (alone["high"] - alone["low"]) / 2 / stats.t.ppf(0.975, alone["degrees_of_freedom"])
    assert found["p_adjusted"] == pytest.approx(adjusted[0])
    assert found["high"] - found["difference"] == pytest.approx(
        error * stats.t.ppf(1 - alpha / 2, alone["degrees_of_freedom"])
    )
