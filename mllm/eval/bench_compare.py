"""Two result files of the bench side by side: what is resolved faster, slower, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.bench_words import CLAIM_PAIRS, Row
from mllm.eval.stats import RESAMPLES

#: What tells one measurement of a suite from another.
KEYS = (
    "plan", "part", "method", "batch", "visual", "text", "size", "length", "unequal", "dtype",
    "backend",
)  # fmt: skip


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What changed from results A to results B, row by row.

    The figure of a row is its `ratio`: each file's plan against the unpatched model of the same
    run, so that machines and their load cancel out as far as they can. Rows of the suite selection
    have `cost` instead, and kernels that ran in torch alone their time `torch_s`, which is compared
    on equal devices, versions and threads only.

    Returns:
        `{suite, differ, rows, only_a, only_b, words}`. `differ` are conditions `{what, a, b}`. A
        row has a `name`, its conditions, `figure`, `a` and `b`, `change` (b / a; b - a for `cost`)
        with `change_ci`, `how` the interval was found, `verdict` "better", "worse", "not resolved"
        or "not compared", and `words`.

    Raises:
        DataError: the files are of two suites.
    """
    if a["suite"] != b["suite"]:
        raise DataError(
            f"suites differ: {a['suite']} and {b['suite']}",
            argument="compare",
            given=f"{a['suite']}, {b['suite']}",
            expected="two result files of one suite",
        )
    differ = [{"what": name, "a": x, "b": y} for name, x, y in _conditions(a, b) if x != y]
    other = {"device", "threads", "model", *(f"version of {n}" for n in ("torch", "mllm"))}
    alike = not other & {d["what"] for d in differ}
    left, right = _keyed(a["rows"]), _keyed(b["rows"])
    rows = [_row(left[key], right[key], alike) for key in left if key in right]
    only = [[_name(r) for key, r in own.items() if key not in others]
            for own, others in ((left, right), (right, left))]  # fmt: skip
    found = {"suite": a["suite"], "differ": differ, "rows": rows,
             "only_a": only[0], "only_b": only[1]}  # fmt: skip
    return {**found, "words": _words(found)}


def read(path: str | Path) -> dict[str, Any]:
    """A result file of the bench.

    Raises:
        DataError: there is none there.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = found["schema"] == 1 and isinstance(found["rows"], list) and "suite" in found
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(
            f"{path} is no result file of mllm bench",
            argument="compare",
            given=str(path),
            expected="a file written by mllm bench --output",
        )
    return found


def _conditions(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = [(name, a.get(name), b.get(name)) for name in ("device", "threads", "commit", "sdpa")]
    found.append(("model", a["model_shape"], b["model_shape"]))
    names = sorted({*a["versions"], *b["versions"]})
    return found + [
        (f"version of {name}", a["versions"].get(name), b["versions"].get(name)) for name in names
    ]


def _keyed(rows: Sequence[Row]) -> dict[tuple, Row]:
    """Rows by their conditions; of equal ones the first is the first of its kind, and so on."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in KEYS)
        found[key, sum(own[0] == key for own in found)] = row
    return found


def _name(row: Row) -> str:
    more = [str(row[k]) for k in ("part", "method", "dtype") if row.get(k)]
    tokens = f"{row['length']} tokens" if row.get("length") else f"{row['visual']} visual tokens"
    return ", ".join([row["plan"], *more, tokens, f"batch {row['batch']}"])


def _figure(row: Row) -> str | None:
    """Which field is a row's main figure."""
    for name in ("ratio", "cost", "overhead_s", "torch_s"):
        if row.get(name) is not None:
            return name
    return None


def _row(a: Row, b: Row, alike: bool) -> dict[str, Any]:
    figure = _figure(a)
    found = {"name": _name(a), **{k: a[k] for k in KEYS if k in a}, "figure": figure}
    none = {"a": None, "b": None, "change": None, "change_ci": None, "how": None,
            "verdict": "not compared"}  # fmt: skip
    if figure is None or figure != _figure(b):
        without = a if figure is None else b
        return {**found, **none, "words": f"not compared: {without['words']}"}
    if figure.endswith("_s") and not alike:
        words = "not compared: times of different devices, versions or threads"
        return {**found, **none, "words": words}
    change, low, high, how = change_of(a, b, figure)
    nothing = 0.0 if figure == "cost" else 1.0
    if min(a["pairs"], b["pairs"]) < CLAIM_PAIRS or low <= nothing <= high:
        verdict = "not resolved"
    else:
        verdict = "better" if (low > nothing) == (figure == "ratio") else "worse"
    return {
        **found, "a": a[figure], "b": b[figure], "change": change, "change_ci": [low, high],
        "how": how, "verdict": verdict, "words": _said(figure, verdict, change, low, high, a, b),
    }  # fmt: skip


def change_of(a: Row, b: Row, figure: str) -> tuple[float, float, float, str]:
    """B against A with a 95 % interval, and how that was found."""
    if "samples" in a and "samples" in b:
        draw = np.random.default_rng(0)
        medians = []
        for row in (a, b):
            own = np.asarray(row["samples"])
            picks = draw.integers(0, len(own), (RESAMPLES, len(own)))
            medians.append(np.median(own[picks], axis=1))
        ends = medians[1] - medians[0] if figure == "cost" else medians[1] / medians[0]
        low, high = map(float, np.percentile(ends, [2.5, 97.5]))
        how = "bootstrap of the medians of both files' pairs"
    else:
        (la, ha), (lb, hb) = a[f"{figure}_ci"], b[f"{figure}_ci"]
        how = "from both files' intervals, taken for those of independent normal errors"
        if figure == "cost":
            half = math.hypot(ha - la, hb - lb) / 2
            low, high = b[figure] - a[figure] - half, b[figure] - a[figure] + half
        else:
            half = math.hypot(math.log(ha / la), math.log(hb / lb)) / 2
            middle = math.log(b[figure] / a[figure])
            low, high = math.exp(middle - half), math.exp(middle + half)
    change = b[figure] - a[figure] if figure == "cost" else b[figure] / a[figure]
    return change, low, high, how


def _said(
    figure: str, verdict: str, change: float, low: float, high: float, a: Row, b: Row
) -> str:
    if figure == "cost":
        words = f"{100 * change:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) of the saving"
        kinds = {"better": "choosing is resolved cheaper", "worse": "choosing is resolved dearer"}
    else:
        words = f"{change:.2f}x ({low:.2f} to {high:.2f})"
        kinds = {"better": "resolved faster", "worse": "resolved slower"}
        if figure != "ratio":
            words += " the time"
    if verdict != "not resolved":
        return f"{kinds[verdict]}: {words}"
    few = min(a["pairs"], b["pairs"])
    return f"not resolved: {words}" + (f"; {few} pairs are too few" if few < CLAIM_PAIRS else "")


def _words(found: dict[str, Any]) -> list[str]:
    rows, words = found["rows"], []
    if found["differ"]:
        named = ", ".join(d["what"] for d in found["differ"])
        words.append(f"The two runs differ in: {named}.")
    else:
        words.append("Device, versions, threads and commit are the same.")
    counts = {v: sum(r["verdict"] == v for r in rows)
              for v in ("better", "worse", "not resolved", "not compared")}  # fmt: skip
    compared = len(rows) - counts["not compared"]
    if compared:
        words.append(
            f"Rows that both have: {compared}; resolved better in B: {counts['better']}, worse: "
            f"{counts['worse']}, not resolved: {counts['not resolved']}. At 95 %, one of twenty "
            "rows without any change is expected to look resolved."
        )
        if not counts["better"]:
            words.append("Nothing is resolved better in B.")
    else:
        words.append("No row can be compared.")
    for which in ("a", "b"):
        if found[f"only_{which}"]:
            words.append(f"Only in {which.upper()}: {'; '.join(found[f'only_{which}'])}.")
    return words
