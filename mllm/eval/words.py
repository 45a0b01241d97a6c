"""What a table of results says in words: verdicts, and the notes that keep them honest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from mllm.eval.plans import UNPATCHED
from mllm.eval.stats import LEVEL

T = TypeVar("T")
_VERDICTS = {
    "better": "{names} {beat} random",
    "not better": "{names} {be} not better than random",
    "worse": "{names} {be} worse than random",
}
_AGAINST_UNPATCHED = {
    "better": "gains {points} points on unpatched",
    "not better": "loses nothing that can be resolved against unpatched ({points})",
    "worse": "loses {points} points against unpatched",
}
_UNCORRECTED = "before correction only"
KV_BUDGETS = (
    "For methods on the KV cache the budget is the share of the slots that stay, per layer and "
    "head, and random is randomkv. What is really held is in the column KV KiB: some methods keep "
    "more than their budget in some layers."
)


def has_shares(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether some budgets are shares of the slots of a KV cache."""
    return any(isinstance(row["budget"], float) for row in rows)


def by_budget(
    rows: Iterable[T], budget_of: Callable[[T], int | float | None]
) -> list[tuple[int | float | None, list[T]]]:
    """Rows of equal budget together, in their order."""
    # 1 token and all slots, 1.0, are equal as numbers.
    groups: dict[Any, list[T]] = {}
    for row in rows:
        budget = budget_of(row)
        groups.setdefault((type(budget), budget), []).append(row)
    return [(budget, members) for (_, budget), members in groups.items()]


def verdict(method: str, figures: dict[str, Any], budget: int | float | None = None) -> str:
    """One line about a method at a budget, or on one task of it; empty for unpatched.

    Args:
        method: name of the row.
        figures: a row of :func:`mllm.eval.table.build`, or one of its `tasks`.
        budget: of the row; a share has no smaller picture to be compared with.
    """
    if method == UNPATCHED:
        return ""
    said = []
    on_cache = isinstance(budget, float)
    for name in ("random",) if on_cache else ("random", "downsample"):
        found = figures[f"vs_{name}"]
        if found:
            said.append(f"{found['verdict']} than {name}" + _caution(found))
        elif method != (f"{name}kv" if on_cache else name):
            said.append(f"not compared with {name}, which is missing")
    found = figures[f"vs_{UNPATCHED}"]
    if found:
        pattern = _AGAINST_UNPATCHED[found["verdict"]]
        said.append(pattern.format(points=_lost(found)) + _caution(found))
    else:
        said.append("not compared with unpatched, which is missing")
    return "; ".join(said)


def paragraphs(table: dict[str, Any]) -> list[str]:
    """A paragraph per budget, then how far to trust them, and what is missing.

    Args:
        table: of :func:`mllm.eval.table.build`, still without `words`.
    """
    rows = table["rows"]
    if has_shares(rows):
        return [KV_BUDGETS, *_compared(table)]
    return _compared(table)


def _compared(table: dict[str, Any]) -> list[str]:
    rows = table["rows"]
    groups = by_budget((row for row in rows if row["vs_random"]), lambda row: row["budget"])
    said = [_at_budget(budget, compared, table["tasks"]) for budget, compared in groups]
    if groups:
        said.append(
            f"Each comparison is paired on the same questions ({per_task(table)} per task); the "
            "brackets are 95 % bootstrap intervals of the difference in points, one by one. A "
            "method beats random where its interval lies above zero; not better means that no "
            "difference is resolved, and the interval says how large it may still be. Single tasks "
            "are named only where the difference holds after Holm's correction."
        )
        said.append(_chance(rows, table["comparisons"]))
        said.append(_about_seeds(rows))
    if table["missing"]:
        said.append(f"Not finished, and so not in the rows: {_missing(table['missing'])}.")
    if table["left_out"]:
        said.append(left_out(table["left_out"]))
    return said


def left_out(count: int) -> str:
    """The sentence about cells that asked less than others."""
    cells, were = ("cells", "were") if count > 1 else ("cell", "was")
    return f"{count} {cells} with fewer questions than others of the same task {were} left out."


def per_task(table: dict[str, Any]) -> str:
    """Number of questions of a task, or the least and the most."""
    counts = {figures["n"] for row in table["rows"] for figures in row["tasks"].values()}
    low, high = min(counts, default=table["n"]), max(counts, default=table["n"])
    return str(low) if low == high else f"{low} to {high}"


def seeds(table: dict[str, Any]) -> str:
    """The seeds of all rows."""
    found = sorted({seed for row in table["rows"] for seed in row["seeds"]})
    return f"seed{'s' * (len(found) != 1)} {', '.join(map(str, found))}"


def points(versus: dict[str, Any]) -> str:
    """A difference in percentage points, with its interval."""
    low, high = versus["ci"]
    return f"{100 * versus['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def or_dash(value: Any) -> str:
    """`value` as text, a dash for None."""
    return "–" if value is None else str(value)


def _at_budget(
    budget: int | float, compared: Sequence[dict[str, Any]], tasks: Sequence[str]
) -> str:
    parts = []
    for found, pattern in _VERDICTS.items():
        names = [
            f"{row['method']} ({points(row['vs_random'])}{_caution(row['vs_random'])})"
            for row in compared
            if row["vs_random"]["verdict"] == found
        ]
        if names:
            many = len(names) > 1
            beat, be = ("beat", "are") if many else ("beats", "is")
            parts.append(pattern.format(names=_listed(names), beat=beat, be=be))
    what = "of the slots" if isinstance(budget, float) else "tokens"
    sentences = [f"At {budget} {what}, over all tasks, {'; '.join(parts)}."]
    for task in tasks if len(tasks) > 1 else ():
        better = [row["method"] for row in compared if _beats(row["tasks"][task]["vs_random"])]
        verb = "beats" if len(better) == 1 else "beat"
        what = f"{_listed(better)} {verb} random" if better else "nothing beats random"
        sentences.append(f"On {task}, {what}.")
    return " ".join(sentences)


def _chance(rows: Sequence[dict[str, Any]], comparisons: dict[str, dict[str, int]]) -> str:
    """The note on multiple comparisons."""
    family = [row for row in rows if row["vs_random"]]
    singles = [figures for row in family for figures in row["tasks"].values()]
    resolved = [row for row in family if row["vs_random"]["verdict"] != "not better"]
    lost = [row for row in resolved if not row["vs_random"]["holds"]]
    counts = comparisons["vs_random"]
    text = (
        "The comparisons with random over all tasks are one family: every method and budget here "
        f"but random itself, sanity rows included, {counts['all']} in all. If none differed from "
        f"random, {LEVEL * counts['all']:.1f} of them would be expected to be resolved at "
        f"5 % by chance, in one direction or the other; {len(resolved)} are. After Holm's "
        f"correction {len(resolved) - len(lost)} of these hold"
    )
    if lost:
        text += f"; these do not: {_listed([_name(row) for row in lost])}"
    resolved_singles = sum(f["vs_random"]["verdict"] != "not better" for f in singles)
    holding_singles = sum(f["vs_random"]["holds"] for f in singles)
    if len(singles) > len(family):
        text += (
            f". The {counts['tasks']} comparisons on single tasks are another family: "
            f"{LEVEL * counts['tasks']:.1f} expected by chance, {resolved_singles} resolved, "
            f"{holding_singles} hold"
        )
    return (
        f"{text}. Comparisons with downsample ({comparisons['vs_downsample']['all']}) and with "
        f"unpatched ({comparisons[f'vs_{UNPATCHED}']['all']}) are families of their own."
    )


def _about_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """How many seeds stand behind random, and what the intervals contain."""
    seeds = {len(row["seeds"]) for row in rows if row["method"] in ("random", "randomkv")}
    if seeds == {1}:
        return (
            "Random was run with one seed: what is said against it holds for this draw, and "
            "another seed may lie higher or lower."
        )
    several = _listed(sorted(map(str, seeds), key=int)).replace(" and ", " or ")
    return (
        f"Random was run with {several} seeds. Rows of several seeds are their averages, and the "
        "intervals and p-values contain the spread between seeds."
    )


def _missing(missing: Iterable[dict[str, Any]]) -> str:
    return "; ".join(
        f"{_name(run)} (seed {run['seed']}: no {', '.join(run['tasks'])})" for run in missing
    )


def _beats(versus: dict[str, Any]) -> bool:
    return versus["verdict"] == "better" and versus["holds"]


def _caution(versus: dict[str, Any]) -> str:
    resolved = versus["verdict"] != "not better"
    return f", {_UNCORRECTED}" if resolved and not versus["holds"] else ""


def _lost(versus: dict[str, Any]) -> str:
    """Points with interval; of a loss that is resolved, its size."""
    if versus["verdict"] != "worse":
        return points(versus)
    low, high = versus["ci"]
    return f"{-100 * versus['diff']:.1f} [{-100 * high:.1f}, {-100 * low:.1f}]"


def _name(row: dict[str, Any]) -> str:
    return row["method"] if row["budget"] is None else f"{row['method']} at {row['budget']}"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
