"""Statistics and scoring, against slow references."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mllm.eval import stats
from mllm.eval.scoring import is_correct


@pytest.mark.parametrize("correct, n", [(0, 10), (3, 7), (50, 100), (499, 500), (8, 8)])
def test_wilson_is_scipys(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert stats.wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_says_nothing():
    assert stats.wilson(0, 0) == (0.0, 1.0)


def _slow_paired(rows_a, rows_b, resamples, seed):
    rng = np.random.default_rng(seed)
    n = sum(map(len, rows_a))
    means = []
    for _ in range(resamples):
        total = 0
        for a, b in zip(rows_a, rows_b, strict=True):
            for pick in rng.integers(0, len(a), len(a)):
                total += int(a[pick]) - int(b[pick])
        means.append(total / n)
    return np.percentile(means, [2.5, 97.5])


def test_paired_bootstrap_matches_a_loop():
    rng = np.random.default_rng(3)
    theirs = [rng.random(60) < 0.6, rng.random(40) < 0.5]
    ours = [rng.random(60) < 0.8, rng.random(40) < 0.5]
    found = stats.paired(ours, theirs)
    assert found.n == 100
    assert found.diff == pytest.approx((sum(map(sum, ours)) - sum(map(sum, theirs))) / 100)
    slow = _slow_paired(ours, theirs, 2000, 1)
    assert (found.low, found.high) == pytest.approx(tuple(slow), abs=0.02)
    assert found.flipped == sum((a != b).sum() for a, b in zip(ours, theirs, strict=True))


def test_paired_is_seeded_and_symmetric():
    a, b = [1, 1, 0, 1] * 20, [1, 0, 0, 0] * 20
    assert stats.paired(a, b, seed=5) == stats.paired(a, b, seed=5)
    back = stats.paired(b, a)
    assert (back.diff, back.gained, back.lost) == (-0.5, 0, 40)


def test_verdicts():
    n = 200
    better, same, worse = [1] * n, [1] * (n // 2) + [0] * (n // 2), [0] * n
    assert stats.paired(better, same).verdict == "better"
    assert stats.paired(worse, same).verdict == "worse"
    assert stats.paired(same, same).verdict == "not better"
    assert stats.paired(same[:-1] + [1], same).verdict == "not better"


def test_paired_refuses_other_questions():
    with pytest.raises(ValueError, match="same, non-empty questions"):
        stats.paired([1, 0], [1])
    with pytest.raises(ValueError, match="same, non-empty questions"):
        stats.paired([[1], []], [[1], []])


def test_median_interval_holds_the_median():
    median, low, high = stats.median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert low <= median == 3.0 <= high
    assert stats.median_interval([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "said, answer, metric, right",
    [
        (" Red.", "red", "exact", True),
        ("top  left", "Top left", "exact", True),
        ("red circle", "red", "exact", False),
        ("", "red", "exact", False),
        ("42", "40", "exact", False),
        ("42", "40", "relaxed", True),
        ("43", "40", "relaxed", False),
        ("38%", "40%", "relaxed", True),
        ("0", "0.0", "relaxed", True),
        ("forty", "40", "relaxed", False),
        ("Yes", "yes", "relaxed", True),
    ],
)
def test_scoring(said, answer, metric, right):
    assert is_correct(said, answer, metric) is right


def test_scoring_refuses_unknown_metrics():
    with pytest.raises(ValueError, match="exact, relaxed"):
        is_correct("a", "a", "fuzzy")
