"""Scoring of one short answer, the same in lmms-eval tasks, sweeps and reports."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)%?$")
METRICS = ("exact", "relaxed")


def normalise(text: str) -> str:
    """Lower-case `text`, with white space collapsed and quotes and final stops removed."""
    return " ".join(text.lower().split()).strip(" \"'`").rstrip(".,;:!? \"'`")


def is_correct(prediction: str, answer: str, metric: str = "exact") -> bool:
    """Whether `prediction` answers the question.

    Args:
        prediction: what the model said.
        answer: the reference.
        metric: `exact` compares normalised text; `relaxed` also accepts a number within 5 %
            of a numeric reference (the rule of ChartQA, arXiv:2203.10244).

    Raises:
        ValueError: if `metric` is neither.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    said, wanted = normalise(prediction), normalise(answer)
    if said == wanted:
        return True
    if metric == "relaxed" and _NUMBER.match(said) and _NUMBER.match(wanted):
        reference = float(wanted.rstrip("%"))
        return abs(float(said.rstrip("%")) - reference) <= 0.05 * abs(reference)
    return False
