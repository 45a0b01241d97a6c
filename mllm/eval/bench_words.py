"""What the rows of a bench say together: who is faster, and from which length a plan pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

CLAIM_PAIRS = 30  # fewer pairs are a look, not a figure to quote
HOW = "straight line through the medians of the saved time at the two lengths around it"


def summed(results: dict[str, Any]) -> dict[str, Any]:
    """The results with `break_even` (suite prefill) and `words`, one sentence each."""
    rows = results["rows"]
    words = speed(rows, "torch" if results["suite"] == "kernels" else "unpatched")
    if results["suite"] == "prefill":
        results["break_even"] = break_even(rows)
        words += [found["words"] for found in results["break_even"]]
    results["words"] = words
    return results


def verdict(row: Row) -> str:
    """`faster` or `slower` than unpatched where that is resolved, else `open`.

    A row without a ratio (out of memory, refused) is `none`.
    """
    if row.get("ratio") is None:
        return "none"
    low, high = row["ratio_ci"]
    if row["pairs"] < CLAIM_PAIRS or low <= 1 <= high:
        return "open"
    return "faster" if low > 1 else "slower"


def speed(rows: Sequence[Row], than: str) -> list[str]:
    """One sentence about the ratios of some rows, and one about rows that ran out of memory.

    Experts are left out: they are compared with an FFN of as many FLOPs, not with less work.
    """
    found = [verdict(row) for row in rows if "dense_rows" not in row]
    compared = [v for v in found if v != "none"]
    words = []
    if compared and "faster" not in compared:
        words.append(
            f"No real speed-up: of {_rows(len(compared))} none is resolved faster than {than} "
            f"({compared.count('slower')} slower, {compared.count('open')} not resolved)."
        )
    elif compared:
        words.append(
            f"Of {_rows(len(compared))} resolved faster than {than}: "
            f"{compared.count('faster')}; slower: {compared.count('slower')}; not resolved: "
            f"{compared.count('open')}."
        )
    if out := sum(row["status"] == "oom" for row in rows):
        words.append(f"Out of memory: {out} of {_rows(len(rows))}.")
    return words


def commits(results: dict[str, Any]) -> str:
    """The commit that results were measured at, and those of rows that came later."""
    each = [results["commit"], *(row.get("commit") for row in results.get("rows", ()))]
    names = [f"{x[:7]}{'+dirty' * x.endswith('+dirty')}" for x in dict.fromkeys(each) if x]
    return f"commit {' and '.join(names)}" if names else "no commit"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


# From which length


def break_even(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """From which prompt length on every plan pays, as far as the measured lengths tell.

    A plan pays from the smallest measured length on that, with all longer ones, is resolved faster.
    Where a shorter one is resolved slower, the length at which nothing is lost or won lies between;
    it is read off a straight line through the saved time at both. Nothing is extrapolated.

    Args:
        rows: of the suite prefill.

    Returns:
        For every plan, batch and so on: `plan`, `batch`, `text`, `lengths` (tokens of a sample,
        measured), `between` (tokens; either end may be None), `tokens` (on the line, or None),
        `how`, `status` "ok" or "unresolved", and `words`.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("ratio") is not None:
            key = tuple(row.get(k) for k in ("plan", "batch", "text", "unequal", "dtype"))
            groups.setdefault(key, []).append(row)
    return [_crossing(sorted(own, key=_length)) for own in groups.values()]


def _length(row: Row) -> int:
    return row["visual"] + row["text"]


def _crossing(rows: list[Row]) -> dict[str, Any]:
    lengths, found = [_length(row) for row in rows], [verdict(row) for row in rows]
    first = len(rows)
    while first and found[first - 1] == "faster":
        first -= 1
    slower = [i for i in range(first) if found[i] == "slower"]
    low = lengths[slower[-1]] if slower else None
    high = lengths[first] if first < len(rows) else None
    tokens = None
    if slower and high is not None:
        a, b = rows[slower[-1]]["saved_s"], rows[first]["saved_s"]
        tokens = round(low + (high - low) * -a / (b - a), 1)
    about = {key: rows[0][key] for key in ("plan", "batch", "text")}
    return {
        **about,
        "lengths": lengths,
        "between": [low, high],
        "tokens": tokens,
        "how": None if tokens is None else HOW,
        "status": "unresolved" if high is None else "ok",
        "words": f"{about['plan']}, batch {about['batch']}: "
        + _said(lengths, found, first, low, tokens),
    }


def _said(
    lengths: list[int], found: list[str], first: int, low: int | None, tokens: float | None
) -> str:
    measured = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    if first == len(lengths):
        if set(found) == {"slower"}:
            return f"pays at none of the measured lengths ({measured} tokens)."
        return (
            "the length from which it pays is not resolved: the longest "
            f"({lengths[-1]} tokens) is not resolved faster."
        )
    if tokens is not None:
        return (
            f"pays from {lengths[first]} tokens on; at {low} it does not. It breaks even at "
            f"about {tokens:.0f} ({HOW})."
        )
    if first == 0:
        return f"pays at every measured length ({measured} tokens); shorter ones are not measured."
    return f"pays from {lengths[first]} tokens on; whether below is not resolved."
