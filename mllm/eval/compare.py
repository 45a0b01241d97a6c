"""Two runs side by side: what differs between them, and whether the difference is resolved.

Methods are matched by name and budget, questions one by one. Differences are the second run minus
the first.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval import logged, stats, table
from mllm.eval.cells import SETTINGS
from mllm.eval.gallery import Found, in_turn
from mllm.eval.plots import bar
from mllm.eval.report import Flip, opened, templates
from mllm.eval.words import by_budget, left_out, or_dash, points

COSTS = ("visual_avg", "flops", "kv_bytes", "prefill_s")
_NAMES = {
    "visual_avg": "Visual tokens",
    "flops": "Prefill FLOPs",
    "kv_bytes": "KV bytes",
    "prefill_s": "Measured prefill",
}

# Heading, factor and format of the costs in the page's table.
_SHOWN = {
    "visual_avg": ("tokens", 1, ".1f"),
    "flops": ("GFLOPs", 1e-9, ".2f"),
    "kv_bytes": ("KV KiB", 1 / 1024, ",.0f"),
    "prefill_s": ("first token, ms", 1e3, ".0f"),
}


def build(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], names: tuple[str, str]
) -> dict[str, Any]:
    """The comparison of two lists of cells.

    Args:
        first, second: cells of a sweep or of an evaluation.
        names: of the runs.

    Returns:
        `{schema, names, differs, tasks, rows, only, unfinished, left_out, apart, words}`. `differs`
        are (what, first, second) of how the runs were made. A row has `method`, `budget`, `plans`,
        `scores`, `n`, the paired difference as :func:`mllm.eval.table.build` gives it, `same`
        (share of equal answers, or None), the costs as pairs, and `tasks` with the same
        differences; `p_holm` is corrected over the rows, and over all single tasks. `only` lists
        rows of one run, `unfinished` those that lack tasks in one, `apart` tasks that cannot be
        compared, with the reason; `left_out` counts cells of fewer questions than others of their
        run.

    Raises:
        DataError: nothing can be compared.
    """
    runs = _on_common(first, second)
    firsts, entries = [run[0] for run in runs], [run[1] for run in runs]
    tasks, apart = _tasks(firsts, names)
    both = [name for name in entries[0] if name in entries[1]]
    rows = []
    for name in both:
        pair = [entry[name] for entry in entries]
        if tasks and all(entry.runs for entry in pair):
            rows.append(_row(pair, tasks))
    if not rows:
        reasons = [f"{task}: {why}" for task, why in apart.items()] or ["no task is in both"]
        if tasks:
            reasons = ["no method and budget is in both with all of its tasks"]
        raise DataError(
            f"{names[0]} and {names[1]} have nothing to compare: {'; '.join(reasons)}",
            argument="against",
            given=names[1],
            expected="two runs with a method, a budget and the questions of a task in common",
        )
    for family in (rows, [own for row in rows for own in row["tasks"].values()]):
        adjusted = stats.holm([own["p"] for own in family])
        for own, p in zip(family, adjusted, strict=True):
            own |= {"p_holm": p, "holds": own["verdict"] != "not better" and p < stats.LEVEL}
    only = [
        (names[i], _named(*name))
        for i in (0, 1)
        for name in entries[i]
        if name not in entries[1 - i]
    ]
    abouts = [next(iter(run.values())) for run in firsts]
    made = {
        "schema": 1,
        "names": list(names),
        "differs": _differs(*abouts),
        "tasks": list(tasks),
        "rows": rows,
        "only": only,
        "unfinished": [
            (names[i], _named(*name)) for name in both for i in (0, 1) if not entries[i][name].runs
        ],
        "left_out": sum(run[3] for run in runs),
        "apart": apart,
    }
    return made | {"words": _words(made)}


def flips(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], tasks: Sequence[str],
    limit: int,
) -> tuple[list[Found], list[Found], dict[bool, int]]:
    """Questions that the second run lost, and won, under the same method and budget.

    As :func:`mllm.eval.gallery.choose`, the first run as the reference.
    """  # fmt: skip
    runs = [run[1] for run in _on_common(first, second)]
    there = [name for name in runs[0] if name in runs[1] and runs[0][name].runs]
    there = [name for name in there if runs[1][name].runs]
    counts = {True: 0, False: 0}
    lists: dict[bool, list[list[Found]]] = {True: [], False: []}
    for name in there:
        for task in tasks:
            cells = [run[name].runs[0][task] for run in runs]
            a, b = (table.bits(cell) for cell in cells)
            for right in (True, False):
                at = np.flatnonzero((a == right) & (b != right))
                counts[right] += len(at)
                lists[right].append(
                    [Found(task, int(i), right, cells[0], [cells[1]]) for i in at[:limit]]
                )
    return in_turn(lists[True], limit), in_turn(lists[False], limit), counts


def markdown(made: dict[str, Any]) -> str:
    """The comparison for people."""
    a, b = made["names"]
    lines = [f"# {b} against {a}", "", *(f"{text}\n" for text in made["words"])]
    if made["differs"]:
        lines += ["## What differs between the runs", ""]
        lines += table.grid(["", a, b], [[f"{x}" for x in row] for row in made["differs"]]) + [""]
    head = ["method", "budget", "questions", f"{a} %", f"{b} %", "difference", "p (Holm)", "",
            "same answers %"]  # fmt: skip
    body = [
        [
            f"`{row['method']}`",
            or_dash(row["budget"]),
            str(row["n"]),
            *(f"{100 * score:.1f}" for score in row["scores"]),
            points(row),
            f"{row['p_holm']:.4f}",
            said(row),
            or_dash(row["same"] and f"{100 * row['same']:.1f}"),
        ]
        for row in made["rows"]
    ]
    lines += ["## All tasks", "", *table.grid(head, body)]
    if len(made["tasks"]) > 1:
        body = [
            [row["method"], or_dash(row["budget"])]
            + [
                f"{points(row['tasks'][task])} {said(row['tasks'][task], '')}".strip()
                for task in made["tasks"]
            ]
            for row in made["rows"]
        ]
        lines += ["", "## By task", "", *table.grid(["method", "budget", *made["tasks"]], body)]
    if made["only"]:
        lines += ["", "## In one run only", ""]
        lines += [f"- {run}: {name}" for run, name in made["only"]]
    return "\n".join([*lines, ""])


def comma_separated(made: dict[str, Any]) -> str:
    """One line per method, budget and task; task `all` is the pooled row."""
    costs = [f"{name}_{i}" for name in COSTS for i in (1, 2)]
    fields = ["method", "budget", "task", "n", "score_1", "score_2", "diff", "low", "high", "p",
              "p_holm", "verdict", "holds", "gained", "lost", "same", *costs]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in made["rows"]:
        for task, own in [("all", row), *row["tasks"].items()]:
            line = {**own, "method": row["method"], "budget": row["budget"], "task": task}
            line["score_1"], line["score_2"] = own["scores"]
            line["low"], line["high"] = own["ci"]
            for name in COSTS:
                line[f"{name}_1"], line[f"{name}_2"] = own[name]
            writer.writerow(line)
    return buffer.getvalue()


def said(own: dict[str, Any], otherwise: str = "not resolved") -> str:
    """What a difference says."""
    if own["verdict"] == "not better":
        return otherwise
    return own["verdict"] + ("" if own["holds"] else ", before correction only")


def _on_common(*cells: Sequence[dict[str, Any]]) -> list[tuple]:
    """:func:`mllm.eval.table.grouped` of two runs, their entries cut to what both asked."""
    runs = [table.grouped(list(one)) for one in cells]
    firsts = [run[0] for run in runs]
    for task in firsts[0].keys() & firsts[1].keys():
        both = np.intersect1d(*(logged.ids(run[task]) for run in firsts))
        for _, entries, *_ in runs:
            for entry in entries.values():
                for run in entry.runs:
                    run[task] = logged.only(run[task], both)
    return runs


def _tasks(
    firsts: list[dict[str, dict[str, Any]]], names: tuple[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Tasks with questions in common, and why others are not among them."""
    common, apart = [], {}
    for task, cell in firsts[0].items():
        other = firsts[1].get(task)
        if other is None:
            apart[task] = f"only in {names[0]}"
            continue
        differ = [
            f"{what} {x} and {y}"
            for what, otherwise in (("split", "test"), ("style", "plain"), ("data", "scenes 1"))
            if (x := cell.get(what, otherwise)) != (y := other.get(what, otherwise))
            and not (what == "data" and _agree(cell, other))
        ]
        if differ:
            apart[task] = f"other questions: {', '.join(differ)}"
        else:
            common.append(task)
    apart |= {task: f"only in {names[1]}" for task in firsts[1] if task not in firsts[0]}
    return common, apart


def _agree(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two cells of a public task, of which one asked more, asked some questions alike."""
    if "asked" not in first or "asked" not in second:
        return False
    asked = [dict(zip(logged.ids(cell), cell["asked"], strict=True)) for cell in (first, second)]
    both = asked[0].keys() & asked[1].keys()
    return bool(both) and all(asked[0][i] == asked[1][i] for i in both)


def _row(pair: list[table.Entry], tasks: Sequence[str]) -> dict[str, Any]:
    plans = [entry.runs[0][tasks[0]]["plan"] for entry in pair]
    return {
        "method": pair[0].method,
        "budget": pair[0].budget,
        "plans": plans,
        **_figures(pair, tasks),
        "tasks": {task: _figures(pair, [task]) for task in tasks},
    }


def _figures(pair: list[table.Entry], tasks: Sequence[str]) -> dict[str, Any]:
    """Both runs on some tasks."""
    ours, theirs = (entry.outcomes(tasks) for entry in pair)
    found = stats.paired_seeds(theirs, ours)
    answers = [entry.answers(tasks) for entry in pair]
    return {
        "n": found.n,
        "scores": [float(np.mean(np.concatenate([np.concatenate(r) for r in side])))
                   for side in (ours, theirs)],
        **found.as_dict(),
        "verdict": found.verdict,
        "gained": found.gained,
        "lost": found.lost,
        "p": found.p,
        "same": None if None in answers else stats.loyalty(answers[1], answers[0][0]).share,
        **{name: [_cost(entry, tasks, name) for entry in pair] for name in COSTS},
    }  # fmt: skip


def _cost(entry: table.Entry, tasks: Sequence[str], name: str) -> float | None:
    values = [run[task][name] for run in entry.runs for task in tasks]
    if None in values:
        return None
    if name == "prefill_s":
        values = [value["median"] for value in values]
    return float(np.mean(values))


def _differs(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """How the runs were made, where they differ."""
    told = first["about"].keys() & second["about"].keys() & SETTINGS.keys()

    def flat(cell: dict[str, Any]) -> dict[str, Any]:
        about = dict(cell["about"])
        settings = {name: about.pop(name, "")[:12] for name in SETTINGS}
        versions = about.pop("versions", {})
        named = {"questions per task": cell["n"], "seed": cell["seed"]}
        named["protocol"] = cell.get("protocol", "prompt")
        named["weights"] = about.pop("weights_sha256")[:12]
        named["commit"] = (about.pop("commit", None) or "unknown")[:12]
        named |= {SETTINGS[name]: settings[name] for name in settings if name in told}
        return named | about | versions

    a, b = flat(first), flat(second)
    return [
        (name, a.get(name, "–"), b.get(name, "–"))
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    ]


def _words(made: dict[str, Any]) -> list[str]:
    """What can be said in sentences."""
    (a, b), rows = made["names"], made["rows"]
    resolved = [row for row in rows if row["verdict"] != "not better"]
    holding = [row for row in resolved if row["holds"]]
    many = len(rows) != 1
    text = f"{len(rows)} {'rows are' if many else 'row is'} in both {a} and {b}. "
    if all(row["gained"] == row["lost"] == 0 for row in rows):
        text += "Every question has the same outcome in both."
    else:
        text += f"{len(holding)} differ after Holm's correction"
        text += f", {len(resolved) - len(holding)} more before it only" * (resolved != holding)
        text += ". "
        for verdict in ("better", "worse"):
            names = [
                f"{_named(row['method'], row['budget'])} ({points(row)})"
                for row in holding
                if row["verdict"] == verdict
            ]
            if names:
                text += f"{b} is {verdict} than {a} under {', '.join(names)}. "
        open_rows = [row for row in rows if row["verdict"] == "not better"]
        if open_rows:
            widest = max(max(map(abs, row["ci"])) for row in open_rows)
            text += (
                f"For {'the other ' if holding else ''}{len(open_rows)} no difference is resolved; "
                f"that is not the same as none: their intervals reach {100 * widest:.1f} points."
            )
    said_of = [text.strip()]
    for name in COSTS:
        pairs = [row[name] for row in rows if None not in row[name] and row[name][0]]
        ratios = [y / x for x, y in pairs]
        if ratios and (min(ratios) < 0.995 or max(ratios) > 1.005):
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            span = low if low == high else f"{low} to {high}"
            said_of.append(f"{_NAMES[name]}: {b} has {span} times what {a} has.")
    other = [row for row in rows if row["plans"][0] != row["plans"][1]]
    if other:
        listed = "; ".join(" and ".join(row["plans"]) for row in other[:5])
        said_of.append(f"{len(other)} rows have the same name and another plan: {listed}.")
    if made["apart"]:
        listed = "; ".join(f"{task} ({why})" for task, why in made["apart"].items())
        said_of.append(f"Not compared: {listed}.")
    if made["unfinished"]:
        listed = "; ".join(f"{row} in {run}" for run, row in made["unfinished"])
        said_of.append(f"Not finished, and so not compared: {listed}.")
    if made["left_out"]:
        said_of.append(left_out(made["left_out"]))
    if made["only"]:
        said_of.append(f"{len(made['only'])} rows are in one run only; they are listed below.")
    return said_of


def _named(method: str, budget: int | float | None) -> str:
    return method if budget is None else f"{method} at {budget}"


@dataclass
class Page:
    """A comparison as a page.

    Attributes:
        made: of :func:`build`.
        facts: (name, value) of both runs.
        lost, won: questions, the first run as the reference.
        gallery: how these were chosen.
        warnings: what is wrong with the results.
    """

    made: dict[str, Any]
    facts: list[tuple[str, str]]
    lost: list[Flip] = field(default_factory=list)
    won: list[Flip] = field(default_factory=list)
    gallery: str = ""
    warnings: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as text: one file that fetches nothing, as :mod:`mllm.eval.report` makes them."""
    rows = [
        row | {"cells": [*(row["tasks"][task] for task in page.made["tasks"]), row]}
        for row in page.made["rows"]
    ]
    costs = {
        name: shown for name, shown in _SHOWN.items() if all(None not in row[name] for row in rows)
    }
    groups = by_budget(rows, lambda row: row["budget"])
    reach = max((max(map(abs, row["ci"])) for row in rows), default=0.0) or 1.0
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            made=page.made,
            facts=page.facts,
            warnings=page.warnings,
            groups=groups,
            opened=opened(groups),
            costs=costs,
            known={"same": any(row["same"] is not None for row in rows)},
            bar=bar,
            reach=reach,
            lost=page.lost,
            won=page.won,
            gallery=page.gallery,
            drawn=any(len(flip.pictures) > 1 for flip in (*page.lost, *page.won)),
        )
    )
