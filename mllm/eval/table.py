"""The table of a sweep, as Markdown, CSV and JSON, and what it says in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mllm.eval import files, stats
from mllm.eval.plans import UNPATCHED

_VERDICTS = {
    "better": "{names} {beat} random",
    "not better": "{names} {be} not better than random",
    "worse": "{names} {be} worse than random",
}
_MARKS = {"better": "▲", "worse": "▼"}


def build(cells: Iterable[dict[str, Any]], skipped: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything the files show.

    Args:
        cells: cells of one sweep (:func:`mllm.eval.sweep.run`).
        skipped: methods and budgets that could not be run, with `method`, `budget`, `reason`.

    Returns:
        `{schema, about, split, n, seed, tasks, rows, skipped, words}`. A row covers all tasks:
        `score` and `ci` are pooled, differences are paired and stratified by task.
    """
    grouped: dict[tuple[str, int | None], dict[str, dict]] = {}
    tasks: dict[str, int] = {}
    for cell in cells:
        grouped.setdefault((cell["method"], cell["budget"]), {})[cell["task"]] = cell
        tasks[cell["task"]] = cell["n"]
    outcomes = {
        name: [_bits(by_task[task]) for task in tasks]
        for name, by_task in grouped.items()
        if len(by_task) == len(tasks)
    }
    rows = [
        _row(name, {task: grouped[name][task] for task in tasks}, outcomes) for name in outcomes
    ]
    # Equal budgets stand together: they are what is compared.
    rows.sort(key=lambda row: -(row["budget"] or float("inf")))
    first = next(iter(next(iter(grouped.values())).values()))
    about = {k: first[k] for k in ("about", "split", "n", "seed")}
    return {
        "schema": 1,
        **about,
        "tasks": list(tasks),
        "rows": rows,
        "skipped": [{"method": s.method, "budget": s.budget, "reason": s.reason} for s in skipped],
        "words": words(rows, list(tasks), first["n"]),
    }


def write(table: dict[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>.md`, `<stem>.csv` and `<stem>.json`, each atomically; returns the paths."""
    files.ensure_writable(stem.parent)
    return [
        files.write_text(stem.with_name(stem.name + ".md"), markdown(table)),
        files.write_text(stem.with_name(stem.name + ".csv"), comma_separated(table)),
        files.write_json(stem.with_name(stem.name + ".json"), table),
    ]


def words(rows: list[dict[str, Any]], tasks: list[str], n: int) -> list[str]:
    """One paragraph per budget: which methods beat random, and on which tasks."""
    said = []
    for budget in dict.fromkeys(row["budget"] for row in rows if row["vs_random"]):
        compared = [row for row in rows if row["budget"] == budget and row["vs_random"]]
        parts = []
        for verdict, pattern in _VERDICTS.items():
            names = [
                f"{row['method']} ({_difference(row['vs_random'])})"
                for row in compared
                if row["vs_random"]["verdict"] == verdict
            ]
            if names:
                many = len(names) > 1
                parts.append(
                    pattern.format(
                        names=_listed(names),
                        beat="beat" if many else "beats",
                        be="are" if many else "is",
                    )
                )
        sentences = [f"At {budget} tokens, over all tasks, {'; '.join(parts)}."]
        for task in tasks:
            better = [
                row["method"]
                for row in compared
                if row["tasks"][task]["vs_random"]["verdict"] == "better"
            ]
            verb = "beats" if len(better) == 1 else "beat"
            what = f"{_listed(better)} {verb} random" if better else "nothing beats random"
            sentences.append(f"On {task}, {what}.")
        said.append(" ".join(sentences))
    said.append(
        f"Each comparison is paired on the same questions ({n} per task); the brackets are 95 % "
        "bootstrap intervals of the difference in points, one by one, not corrected for their "
        "number. A method beats random where its interval lies above zero."
    )
    return said


def markdown(table: dict[str, Any]) -> str:
    """The table for people."""
    tasks = table["tasks"]
    about = table["about"]
    lines = [
        f"# Yardstick: {len(tasks)} tasks, {table['n']} questions each, {table['split']} split",
        "",
        *(f"{paragraph}\n" for paragraph in table["words"]),
        "## All tasks",
        "",
        "Tokens are visual tokens per picture: the budget, what enters the language model, and "
        "the average over decoder layers (input to layer). GFLOPs are those of the prefill; time "
        "is the median to the first token of one picture and question.",
        "",
    ]
    head = [
        "method",
        "budget",
        "into LLM",
        "layer average",
        "GFLOPs",
        "KV KiB",
        "prefill ms",
        "score % (95 %)",
        "vs random",
        "vs downsample",
        "flipped vs unpatched",
    ]
    body = [
        [
            f"`{row['plan']}`",
            _or_dash(row["budget"]),
            f"{row['kept_llm']:.0f}",
            f"{row['visual_avg']:.1f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['kv_bytes'] / 1024:.0f}",
            "–" if row["prefill_s"] is None else f"{1e3 * row['prefill_s']:.0f}",
            _score(row),
            _or_dash(row["vs_random"] and _difference(row["vs_random"])),
            _or_dash(row["vs_downsample"] and _difference(row["vs_downsample"])),
            _or_dash(row["vs_unpatched"] and row["vs_unpatched"]["flipped"]),
        ]
        for row in table["rows"]
    ]
    lines += _grid(head, body)
    lines += [
        "",
        "## By task",
        "",
        "Scores in percent; ▲ better than random at the same budget, ▼ worse, nothing: not "
        "resolved. Intervals are in the CSV and JSON files.",
        "",
    ]
    body = [
        [
            row["method"],
            _or_dash(row["budget"]),
            *(_marked(row["tasks"][task]) for task in tasks),
        ]
        for row in table["rows"]
    ]
    lines += _grid(["method", "budget", *tasks], body)
    if table["skipped"]:
        lines += ["", "## Not reachable", ""]
        lines += [f"- `{s['method']}` at {s['budget']}: {s['reason']}" for s in table["skipped"]]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        "## How",
        "",
        f"{about['dtype']}, {about['backend']}, {about['device']}, {about['threads']} threads; "
        f"seed {table['seed']}; weights {about['weights_sha256'][:12]}; commit "
        f"{about['commit'] or 'unknown'}; {versions}. Written by `mllm sweep`; the cells, with "
        "the outcome of every question, are in the JSON Lines file beside this one.",
        "",
    ]
    return "\n".join(lines)


def comma_separated(table: dict[str, Any]) -> str:
    """One line per method, budget and task; task `all` is the pooled row."""
    fields = [
        "method",
        "budget",
        "plan",
        "task",
        "n",
        "score",
        "low",
        "high",
        "visual_avg",
        "kept_llm",
        "flops",
        "kv_bytes",
        "prefill_s",
        "vs_random",
        "vs_random_low",
        "vs_random_high",
        "vs_downsample",
        "vs_downsample_low",
        "vs_downsample_high",
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    for row in table["rows"]:
        for task, scores in [("all", row), *row["tasks"].items()]:
            line = {name: row[name] for name in ("method", "budget", "plan")}
            line |= {"task": task, "low": scores["ci"][0], "high": scores["ci"][1]}
            for name in ("n", "score", "visual_avg", "kept_llm", "flops", "kv_bytes", "prefill_s"):
                line[name] = scores[name]
            for versus in ("vs_random", "vs_downsample"):
                if scores[versus]:
                    low, high = scores[versus]["ci"]
                    line |= {versus: scores[versus]["diff"]}
                    line |= {f"{versus}_low": low, f"{versus}_high": high}
            writer.writerow(line)
    return buffer.getvalue()


def _row(
    name: tuple[str, int | None],
    by_task: dict[str, dict],
    outcomes: dict[tuple[str, int | None], list[list[bool]]],
) -> dict[str, Any]:
    method, budget = name
    cells = list(by_task.values())
    versus = {
        f"vs_{other}": outcomes.get((other, None if other == UNPATCHED else budget))
        if method not in (other, UNPATCHED)
        else None
        for other in ("random", "downsample", UNPATCHED)
    }
    n, correct = sum(cell["n"] for cell in cells), sum(cell["correct"] for cell in cells)
    return {
        "method": method,
        "budget": budget,
        "plan": cells[0]["plan"],
        "n": n,
        "score": correct / n,
        "ci": list(stats.wilson(correct, n)),
        "visual_avg": _mean(cells, "visual_avg"),
        "kept_llm": _mean(cells, "kept_llm"),
        "flops": _mean(cells, "flops"),
        "kv_bytes": _mean(cells, "kv_bytes"),
        "prefill_s": _median_time(cells),
        **{label: theirs and _compared(outcomes[name], theirs) for label, theirs in versus.items()},
        "tasks": {
            task: {
                **{k: cell[k] for k in ("n", "score", "ci", "visual_avg", "kept_llm", "flops")},
                "kv_bytes": cell["kv_bytes"],
                "prefill_s": _median_time([cell]),
                **{
                    label: theirs and _compared(outcomes[name][i], theirs[i])
                    for label, theirs in versus.items()
                },
            }
            for i, (task, cell) in enumerate(by_task.items())
        },
    }


def _compared(ours: Any, theirs: Any) -> dict[str, Any]:
    found = stats.paired(ours, theirs)
    return found.as_dict() | {
        "verdict": found.verdict,
        "gained": found.gained,
        "lost": found.lost,
        "flipped": found.flipped,
    }


def _bits(cell: dict[str, Any]) -> list[bool]:
    return [value == "1" for value in cell["outcomes"]]


def _mean(cells: list[dict], name: str) -> float:
    return sum(cell[name] for cell in cells) / len(cells)


def _median_time(cells: list[dict]) -> float | None:
    """Mean over tasks of the median prefill time, seconds; None if it was not taken."""
    if any(cell["prefill_s"] is None for cell in cells):
        return None
    return sum(cell["prefill_s"]["median"] for cell in cells) / len(cells)


def _difference(versus: dict[str, Any]) -> str:
    low, high = versus["ci"]
    return f"{100 * versus['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _score(scores: dict[str, Any]) -> str:
    low, high = scores["ci"]
    return f"{100 * scores['score']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _marked(scores: dict[str, Any]) -> str:
    verdict = scores["vs_random"]["verdict"] if scores["vs_random"] else ""
    return f"{100 * scores['score']:.1f} {_MARKS.get(verdict, '')}".strip()


def _listed(names: list[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)


def _grid(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
