"""Intervals, paired comparisons and corrections for accuracies; numpy only.

Outcomes are 0/1 values, one per question, in the same order for everything that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.05
_Z95 = 1.959963984540054

Outcomes = Sequence[Sequence[bool]] | Sequence[bool] | np.ndarray


@dataclass(frozen=True)
class Share:
    """A share of the questions, averaged over seeds.

    Attributes:
        share: in [0, 1].
        low, high: 95 % interval of `share`; it covers the drawing of questions and of seeds.
        n: number of questions.
        spread: standard deviation of the share between seeds; None for one seed.
    """

    share: float
    low: float
    high: float
    n: int
    spread: float | None = None


@dataclass(frozen=True)
class Difference:
    """A paired difference of two accuracies on the same questions.

    Attributes:
        diff: mean of `ours - theirs`, in [-1, 1]; accuracies are averaged over seeds.
        low, high: percentile bootstrap interval of `diff`, of 95 % unless another was asked for.
        gained, lost: questions that we, or they, answer correctly (with several seeds: more
            often) and the other not.
        n: number of questions.
        p: two-sided p-value of no difference. Exact McNemar between two single seeds; with more
            seeds, of `diff` over its bootstrap standard error, which covers the seeds.
        p_mid: mid-p McNemar between two single seeds, else None.
        seeds: how many seeds we and they have.
    """

    diff: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    p: float
    p_mid: float | None
    seeds: tuple[int, int] = (1, 1)

    @property
    def flipped(self) -> int:
        """Questions whose correctness differs between the two."""
        return self.gained + self.lost

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves zero out, else `not better`."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not better"

    def as_dict(self) -> dict:
        """The `vs_random` object of a sweep cell."""
        return {"diff": self.diff, "ci": [self.low, self.high]}


def wilson(correct: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) when `n` is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def share(seeds: Sequence[Sequence[bool]] | np.ndarray) -> Share:
    """Share of ones, with the Wilson interval; seeds and questions both count as drawn.

    Several seeds on the same questions are no new questions, so the interval is Wilson's at the
    number of independent questions that would have the variance of the seeds' mean (Kish 1965).

    Args:
        seeds: `[seeds, n]` outcomes; with one seed the interval is :func:`wilson`'s.

    Raises:
        ValueError: if seeds differ in their number of questions, or there are none.
    """
    data = _table(seeds)
    count, n = data.shape
    mean = float(data.mean())
    effects = _seed_effects(data)
    variance = data.mean(axis=0).var() / n
    spread = None
    if count > 1:
        variance += (effects**2).sum() / (count * (count - 1))
        spread = float(data.mean(axis=1).std(ddof=1))
    independent = mean * (1 - mean) / variance if variance > 0 else n
    low, high = wilson(mean * independent, independent)
    return Share(mean, low, high, n, spread)


def paired(
    ours: Outcomes,
    theirs: Outcomes,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Paired bootstrap and McNemar test of the difference of two accuracies.

    Args:
        ours, theirs: outcomes on the same questions: one row of `n` 0/1 values, or a list of
            such rows (one per task). Rows are resampled apart, so that the mix of tasks stays.
        seed, resamples, level: as for :func:`paired_seeds`; one seed leaves nothing to chance.

    Raises:
        ValueError: if the two do not have the same, non-empty shape.
    """
    return paired_seeds([ours], [theirs], seed=seed, resamples=resamples, level=level)


def paired_seeds(
    ours: Sequence[Outcomes],
    theirs: Sequence[Outcomes],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """:func:`paired` where a side was run with several seeds: a two-level bootstrap.

    Questions are resampled with their outcomes under all seeds, and the seeds of either side are
    resampled too. Two corrections keep the width right: `S - 1` of `S` seeds are drawn (Rao and
    Wu 1988), and seed effects are shrunk by the part that the drawing of questions explains, by
    a two-way analysis of variance; otherwise this part would count twice (Owen 2007, The
    pigeonhole bootstrap). With two or three seeds their variance is itself poorly known.

    Args:
        ours, theirs: one entry per seed, each as :func:`paired` takes it.
        seed: of the resampling of seeds; the law of resampled questions is computed.
        resamples: quantiles of that law, each with one draw of the seeds.
        level: how often the interval may miss; 0.05 / k for k intervals that hold together.

    Raises:
        ValueError: if not all have the same, non-empty shape.
    """
    sides = [[_rows(one) for one in side] for side in (ours, theirs)]
    shape, *others = {tuple(len(row) for row in rows) for side in sides for rows in side} or {()}
    if not all(sides) or others or not shape or 0 in shape:
        raise ValueError("a paired comparison needs the same, non-empty questions on both sides")
    a, b = (np.stack([np.concatenate(rows) for rows in side]) for side in sides)
    # Whole numbers: the difference of the two means times the product of the seed counts.
    values = len(b) * a.sum(axis=0) - len(a) * b.sum(axis=0)
    scale = len(a) * len(b) * values.size
    rng = np.random.default_rng(seed)
    totals = _resampled_sums(np.split(values, np.cumsum(shape)[:-1]), resamples) / scale
    for sign, side in ((1, a), (-1, b)):
        if len(side) > 1:
            draws = len(side) - 1
            picks = rng.multinomial(draws, np.full(len(side), 1 / len(side)), size=resamples)
            totals += sign * (picks @ _seed_effects(side)) / draws
    low, high = np.percentile(totals, [50 * level, 100 - 50 * level])
    diff, gained, lost = values.sum() / scale, int((values > 0).sum()), int((values < 0).sum())
    if len(a) == len(b) == 1:
        p, p_mid = mcnemar(gained, lost)
    else:
        p, p_mid = _normal_p(diff, totals.std()), None
    return Difference(
        float(diff),
        float(low),
        float(high),
        gained,
        lost,
        values.size,
        p,
        p_mid,
        (len(a), len(b)),
    )


def paired_scores(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, level: float = LEVEL
) -> Difference:
    """:func:`paired` where an answer has a score, which counts to a hundredth.

    Args:
        ours, theirs: scores in [0, 1] of the same questions, one row per task.
        level: as for :func:`paired_seeds`.

    Raises:
        ValueError: if the two do not have the same, non-empty shape.
    """
    a, b = ([np.rint(100 * np.asarray(row)).astype(int) for row in side] for side in (ours, theirs))
    if not a or [row.size for row in a] != [row.size for row in b] or not all(r.size for r in a):
        raise ValueError("a paired comparison needs the same, non-empty questions on both sides")
    rows = [x - y for x, y in zip(a, b, strict=True)]
    values = np.concatenate(rows)
    totals = _resampled_sums(rows, RESAMPLES) / (100 * values.size)
    low, high = np.percentile(totals, [50 * level, 100 - 50 * level])
    diff, gained, lost = values.mean() / 100, int((values > 0).sum()), int((values < 0).sum())
    p = _normal_p(diff, totals.std())
    return Difference(
        float(diff), float(low), float(high), gained, lost, values.size, p, None
    )  # fmt: skip


def mcnemar(gained: int, lost: int) -> tuple[float, float]:
    """Two-sided McNemar test: (exact p, mid-p).

    The exact p never rejects too often; the mid-p rejects nearly as often as it should
    (Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91).

    Args:
        gained, lost: questions that only one, or only the other, answers correctly.
    """
    n, fewer = gained + lost, min(gained, lost)
    ways = below = 1
    for i in range(fewer):
        ways = ways * (n - i) // (i + 1)
        below += ways
    # Quotients of whole numbers: Python rounds them correctly however long they are.
    if gained == lost:
        return 1.0, 1 - ways / 2 ** (n + 1) if n else 1.0
    return 2 * below / 2**n, (2 * below - ways) / 2**n


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for a family of comparisons (Holm 1979), in the given order.

    Calling those under 0.05 resolved is wrong about any of the family at most 5 % of the time,
    however the comparisons hang together.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate((p.size - np.arange(p.size)) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.tolist()


def loyalty(ours: Sequence[Sequence[str]], theirs: Sequence[str]) -> Share:
    """Share of questions that get the same answer text from both, right or wrong.

    Args:
        ours: one list of `n` normalised answers per seed.
        theirs: `n` normalised answers of the unpatched model.

    Raises:
        ValueError: if the numbers of answers differ or there are none.
    """
    return share([[a == b for a, b in zip(one, theirs, strict=True)] for one in ours])


def difficult(unpatched: Sequence[bool], downsample: Sequence[bool]) -> np.ndarray:
    """Which questions need the tokens: boolean `[n]`.

    Those that the unpatched model answers correctly and a picture shrunk to the same number of
    tokens does not (the filter of VTC-Bench, arXiv 2510.07143).

    The subset is chosen by two of the rows that one would compare: on it `downsample` has 0 and
    `unpatched` 1 by construction, and answers that the one got wrong or the other right by luck
    are in it too, so a method looks better than `downsample` and worse than `unpatched` there
    whatever it does. Compare methods on it with each other and with random only.
    """
    return np.asarray(unpatched, dtype=bool) & ~np.asarray(downsample, dtype=bool)


def median_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Median of `values` with its 95 % percentile bootstrap interval: (median, low, high)."""
    return _interval(np.median, values, seed, resamples)


def mean_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of `values` with its 95 % percentile bootstrap interval: (mean, low, high)."""
    return _interval(np.mean, values, seed, resamples)


def _interval(
    of: Callable[..., Any], values: Sequence[float], seed: int, resamples: int
) -> tuple[float, float, float]:
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.percentile(of(data[picks], axis=1), [2.5, 97.5])
    return float(of(data)), float(low), float(high)


def _rows(outcomes: Outcomes) -> list[np.ndarray]:
    """`outcomes` as a list of 0/1 rows, whether one row or several were given."""
    if len(outcomes) and np.ndim(outcomes[0]) == 0:
        outcomes = [outcomes]
    return [np.asarray(row, dtype=bool).astype(np.int8) for row in outcomes]


def _resampled_sums(rows: list[np.ndarray], count: int) -> np.ndarray:
    """Sums of whole-numbered rows under resampling within each row: `[count]` even quantiles.

    The law of a sum of n draws is the n-th power of the characteristic function of one draw, so
    nothing has to be drawn and nothing is left to chance.
    """
    lowest = [int(row.min()) for row in rows]
    reach = sum(row.size * int(np.ptp(row)) for row in rows)
    size = 2 ** math.ceil(math.log2(reach + 1))
    draws: dict[int, np.ndarray | float] = {}
    for row, low in zip(rows, lowest, strict=True):
        one = np.fft.rfft(np.bincount(row - low) / row.size, size)
        draws[row.size] = draws.get(row.size, 1.0) * one
    law = math.prod(one**n for n, one in draws.items())
    below = np.cumsum(np.fft.irfft(law, size)[: reach + 1].clip(0))
    quantiles = (np.arange(count) + 0.5) / count
    offset = sum(row.size * low for row, low in zip(rows, lowest, strict=True))
    return offset + np.searchsorted(below / below[-1], quantiles)


def _table(seeds: Sequence[Sequence[bool]] | np.ndarray) -> np.ndarray:
    rows = [np.asarray(row, dtype=bool).astype(np.int8) for row in seeds]
    if not rows or not rows[0].size or len({row.size for row in rows}) != 1:
        raise ValueError("a share needs the same, non-empty questions under every seed")
    return np.stack(rows)


def _seed_effects(data: np.ndarray) -> np.ndarray:
    """Seeds' deviations from their mean, `[seeds]`, shrunk to what questions do not explain."""
    seeds, n = data.shape
    means = data.mean(axis=1)
    effects = means - means.mean()
    between = n * (effects**2).sum()
    within = ((data - data.mean(axis=0) - effects[:, None]) ** 2).sum() / max(1, n - 1)
    return effects * math.sqrt(max(0.0, 1 - within / between)) if between > 0 else effects


def _normal_p(diff: float, error: float) -> float:
    if error == 0:
        return float(diff == 0)
    return math.erfc(abs(diff) / error / math.sqrt(2))
