"""Statistics and scoring, against SciPy, worked examples, slow references and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap

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


def test_paired_bootstrap_is_all_resamples():
    """Every way to draw five questions of one task and three of the other, counted."""
    ours, theirs = [[1, 1, 0, 0, 1], [1, 0, 1]], [[0, 1, 1, 0, 0], [0, 0, 1]]
    pairs = zip(ours, theirs, strict=True)
    first, second = ([a - b for a, b in zip(*row, strict=True)] for row in pairs)
    sums = sorted(
        sum(one) + sum(other)
        for one in itertools.product(first, repeat=5)
        for other in itertools.product(second, repeat=3)
    )
    low, high = (sums[int(share * len(sums))] / 8 for share in (0.025, 0.975))
    found = stats.paired(ours, theirs)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_paired_bootstrap_is_scipys():
    rng = np.random.default_rng(11)
    ours, theirs = rng.random((2, 400)) < [[0.75], [0.65]]
    found = stats.paired(ours, theirs)
    expected = bootstrap(
        (ours.astype(float), theirs.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.005)


@pytest.mark.parametrize("gained, lost", [(0, 1), (1, 7), (7, 1), (5, 5), (12, 3), (700, 611)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    n = gained + lost
    exact, mid = stats.mcnemar(gained, lost)
    assert exact == pytest.approx(binomtest(gained, n).pvalue, rel=1e-9)
    chances = binom.pmf(np.arange(n + 1), n, 0.5)
    as_likely = np.isclose(chances, chances[gained], rtol=1e-9)
    less_likely = chances[~as_likely & (chances < chances[gained])].sum()
    assert mid == pytest.approx(less_likely + chances[as_likely].sum() / 2, rel=1e-9)


def test_mcnemar_gives_the_published_example():
    """Table 1 of Fagerland, Lydersen and Laake (2013): 1 and 7 of 21 children."""
    exact, mid = stats.mcnemar(1, 7)
    assert (round(exact, 4), round(mid, 4)) == (0.0703, 0.0391)


def test_mcnemar_at_the_ends():
    assert stats.mcnemar(0, 0) == (1.0, 1.0)
    assert 0 <= stats.mcnemar(0, 6000)[0] < 1e-300
    assert stats.mcnemar(3000, 3000)[0] == 1.0


def _slow_holm(p_values, level):
    """Which hypotheses the step-down procedure rejects, in its textbook wording."""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - step):
            break
        rejected.add(index)
    return rejected


def test_holm_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_holm_rejects_what_the_procedure_rejects():
    rng = np.random.default_rng(4)
    for size in range(1, 30):
        p_values = list(rng.random(size) ** 4)
        adjusted = stats.holm(p_values)
        for level in (0.01, 0.05, 0.3):
            rejected = {i for i, p in enumerate(adjusted) if p <= level}
            assert rejected == _slow_holm(p_values, level)


def test_share_of_one_seed_is_wilsons():
    found = stats.share([[1] * 30 + [0] * 11])
    assert (found.low, found.high) == pytest.approx(stats.wilson(30, 41), abs=1e-12)
    assert (found.n, found.spread) == (41, None)
    full = stats.share([[1] * 9] * 3)
    assert (full.low, full.high) == pytest.approx(stats.wilson(9, 9))
    with pytest.raises(ValueError, match="non-empty questions"):
        stats.share([[1, 0], [1]])


def test_seeds_on_the_same_questions_are_no_new_questions():
    """Copies of a seed narrow nothing; treating them as new questions would."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300)) < 0.6
    assert stats.share([b] * 4).low == pytest.approx(stats.share([b]).low)
    one, four = stats.paired(a, b), stats.paired_seeds([a], [b] * 4)
    assert (four.low, four.high) == (one.low, one.high)
    assert (four.seeds, four.p_mid) == ((1, 4), None)
    assert four.p == pytest.approx(one.p, abs=0.05)


def test_one_seed_is_the_ordinary_paired_bootstrap():
    rng = np.random.default_rng(1)
    a, b = ([rng.random(80) < 0.7, rng.random(50) < 0.4] for _ in range(2))
    assert stats.paired_seeds([a], [b]) == stats.paired(a, b)
    assert stats.paired(a, b).p == stats.mcnemar(*_discordant(a, b))[0]


def _discordant(a, b):
    a, b = np.concatenate(a), np.concatenate(b)
    return int((a & ~b).sum()), int((b & ~a).sum())


def test_seeds_are_averaged_and_their_spread_widens():
    n = 400
    ours = [[1] * 200 + [0] * 200]
    low, high = [1] * 100 + [0] * 300, [1] * 300 + [0] * 100
    found = stats.paired_seeds(ours, [low, high])
    assert found.diff == 0 and found.verdict == "not better"
    assert found.low < -0.2 and found.high > 0.2  # the seeds are half the questions apart
    assert stats.share([low, high]).spread == pytest.approx(0.5 / math.sqrt(2))
    assert stats.share([low, high]).low < 0.25
    assert found.n == n and (found.gained, found.lost) == (100, 100)


def _answers(rng, chances, effects=(0.0,)):
    """Simulated outcomes `[seeds, n]` of a method with these chances, shifted for each seed."""
    shifted = chances + np.asarray(effects)[:, None]
    return rng.random(shifted.shape) < np.clip(shifted, 0, 1)


def _limit(runs, rate):
    """The count that simulation at this rate exceeds once in ten thousand times."""
    return binom.ppf(0.9999, runs, rate)


@pytest.mark.slow
def test_intervals_of_several_seeds_hold_the_truth(monkeypatch):
    """Questions and seeds are drawn anew each time; intervals without seeds miss too often."""

    def misses(runs=400):
        rng = np.random.default_rng(5)
        missed = np.zeros(2, dtype=int)
        for _ in range(runs):
            easy = rng.uniform(0.3, 0.9, 400)
            theirs = _answers(rng, easy, rng.normal(0, 0.04, 6))
            found = stats.paired_seeds(_answers(rng, easy + 0.05), theirs, resamples=400)
            own = stats.share(theirs)
            missed += [not found.low <= 0.05 <= found.high, not own.low <= 0.6 <= own.high]
        return missed

    assert (misses() <= _limit(400, 0.065)).all()
    monkeypatch.setattr(stats, "_seed_effects", lambda data: np.zeros(len(data)))
    assert (misses() > _limit(400, 0.065)).all()


@pytest.mark.parametrize("seeds", [1, 3])
def test_useless_methods_are_seldom_called_anything(seeds):
    """Random under other names: about 5 % are resolved one by one, far fewer after Holm.

    They err on other questions than random does, so that only the mean is the same.
    """
    rng = np.random.default_rng(7)
    families, size, n = 30, 12, 500
    resolved = rejected = wrong_families = 0
    for _ in range(families):
        easy, other = rng.beta(2, 1, (2, n))
        theirs = _answers(rng, easy, np.zeros(seeds))
        useless = [
            stats.paired_seeds(_answers(rng, rng.permutation(other)), theirs, resamples=300)
            for _ in range(size)
        ]
        resolved += sum(found.verdict != "not better" for found in useless)
        rejected += sum(found.p < stats.LEVEL for found in useless)
        wrong_families += min(stats.holm([found.p for found in useless])) < stats.LEVEL
    # One random row serves a family, so its comparisons go together: the limit is a wide one.
    assert 0.015 * families * size < resolved < 0.11 * families * size
    assert 0.01 * families * size < rejected < 0.11 * families * size
    assert wrong_families <= _limit(families, 0.05)


@pytest.mark.parametrize("seeds", [1, 3])
def test_eight_points_at_500_questions_are_found(seeds):
    rng = np.random.default_rng(8)
    found = found_reversed = 0
    for _ in range(100):
        easy = rng.beta(2, 1, 500) * 0.9
        ours, theirs = _answers(rng, easy + 0.08), _answers(rng, easy, np.zeros(seeds))
        found += stats.paired_seeds(ours, theirs, resamples=500).verdict == "better"
        found_reversed += stats.paired_seeds(theirs, ours, resamples=500).verdict == "worse"
    assert found >= 80 and found_reversed >= 80


def test_loyalty_counts_texts():
    found = stats.loyalty([["red", "4", "no"], ["red", "5", "no"]], ["red", "4", "yes"])
    assert found.share == pytest.approx(0.5)
    assert stats.loyalty([["a"] * 8], ["a"] * 8).share == 1.0
    with pytest.raises(ValueError):
        stats.loyalty([["a"]], ["a", "b"])


def test_difficult_is_lost_by_downsampling_only():
    hard = stats.difficult([1, 1, 0, 0], [0, 1, 0, 1])
    assert hard.tolist() == [True, False, False, False]


def test_paired_is_seeded_and_symmetric():
    a, b = [1, 1, 0, 1] * 20, [1, 0, 0, 0] * 20
    assert stats.paired_seeds([a, b], [b], seed=5) == stats.paired_seeds([a, b], [b], seed=5)
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
    with pytest.raises(ValueError, match="same, non-empty questions"):
        stats.paired_seeds([[1, 0]], [])
    with pytest.raises(ValueError, match="same, non-empty questions"):
        stats.paired_seeds([[1, 0]], [[1, 0], [1, 0, 1]])


def test_median_interval_holds_the_median():
    median, low, high = stats.median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert low <= median == 3.0 <= high
    assert stats.median_interval([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "said, answer, metric, right",
    [
        (" Red.", "red", "exact", True),
        ('"Red."', "red", "exact", True),
        ('"Red".', "red", "exact", True),
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
