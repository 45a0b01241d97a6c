"""Intervals and paired comparisons for accuracies; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """A paired difference of two accuracies on the same questions.

    Attributes:
        diff: mean of `ours - theirs`, in [-1, 1].
        low, high: 95 % percentile bootstrap interval of `diff`.
        gained, lost: questions that only we, or only they, answer correctly.
        n: number of questions.
    """

    diff: float
    low: float
    high: float
    gained: int
    lost: int
    n: int

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


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) when `n` is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired(
    ours: Sequence[Sequence[bool]] | np.ndarray,
    theirs: Sequence[Sequence[bool]] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Paired bootstrap of the difference of two accuracies.

    Args:
        ours, theirs: outcomes on the same questions: one row of `n` 0/1 values, or a list of
            such rows (one per task). Rows are resampled apart, so that the mix of tasks stays.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: if the two do not have the same, non-empty shape.
    """
    a, b = _rows(ours), _rows(theirs)
    if [len(row) for row in a] != [len(row) for row in b] or not all(len(row) for row in a):
        raise ValueError("a paired comparison needs the same, non-empty questions on both sides")
    rng = np.random.default_rng(seed)
    n = sum(len(row) for row in a)
    totals = np.zeros(resamples)
    gained = lost = 0
    for x, y in zip(a, b, strict=True):
        up, down = int((x > y).sum()), int((x < y).sum())
        gained, lost = gained + up, lost + down
        # A difference is -1, 0 or +1, so resampling n questions is one multinomial draw.
        share = np.array([down, len(x) - up - down, up]) / len(x)
        totals += rng.multinomial(len(x), share, size=resamples) @ np.array([-1, 0, 1])
    low, high = np.percentile(totals / n, [2.5, 97.5])
    return Difference((gained - lost) / n, float(low), float(high), gained, lost, n)


def median_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Median of `values` with its 95 % percentile bootstrap interval: (median, low, high)."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return float(np.median(data)), float(low), float(high)


def _rows(outcomes: Sequence[Sequence[bool]] | np.ndarray) -> list[np.ndarray]:
    """`outcomes` as a list of boolean rows, whether one row or several were given."""
    if len(outcomes) and np.ndim(outcomes[0]) == 0:
        outcomes = [outcomes]
    return [np.asarray(row, dtype=bool).astype(np.int8) for row in outcomes]
