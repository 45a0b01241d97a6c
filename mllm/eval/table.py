"""The table of a sweep, as Markdown, CSV and JSON, and what it says in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval import files, stats, words
from mllm.eval.plans import UNPATCHED, baseline_at
from mllm.eval.words import or_dash, points

VERSUS = tuple(f"vs_{name}" for name in ("random", "downsample", UNPATCHED))
FEWEST_DIFFICULT = 20
# Columns of the CSV that are figures as they stand.
_PLAIN = (
    "n",
    "score",
    "spread",
    "visual_avg",
    "kept_llm",
    "flops",
    "kv_bytes",
    "prefill_s",
    "verdict",
)
# By verdict and whether it holds after correction.
_MARKS = {
    ("better", True): "▲",
    ("worse", True): "▼",
    ("better", False): "△",
    ("worse", False): "▽",
}


@dataclass
class Entry:
    """The finished runs of one method at one budget: per seed, a cell for every task."""

    method: str
    budget: int | float | None
    runs: list[dict[str, dict[str, Any]]]

    def outcomes(self, tasks: Sequence[str]) -> list[list[np.ndarray]]:
        """Per seed and task, one truth value per question."""
        return [[bits(run[task]) for task in tasks] for run in self.runs]

    def flat(self, tasks: Sequence[str]) -> list[np.ndarray]:
        """Per seed, the outcomes of all tasks in one row."""
        return [np.concatenate(rows) for rows in self.outcomes(tasks)]

    def answers(self, tasks: Sequence[str]) -> list[list[str]] | None:
        """Per seed, the answers of all tasks in one row; None if a cell holds none."""
        if not all(run[task].get("answers") for run in self.runs for task in tasks):
            return None
        return [[text for task in tasks for text in run[task]["answers"]] for run in self.runs]


def build(cells: Iterable[dict[str, Any]], skipped: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything the files show.

    Cells of one method, budget and task with different seeds become one row. A seed counts where
    all tasks are there; what is unfinished is listed in `missing`. Where cells of a task differ
    in the number of questions, those with the most count.

    Args:
        cells: cells of one sweep (:func:`mllm.eval.sweep.run`).
        skipped: methods and budgets that could not be run, with `method`, `budget`, `reason`.

    Returns:
        `{schema, about, split, n, seed, style, tasks, rows, comparisons, missing, left_out,
        skipped, words}`. A row covers all tasks and seeds, its `tasks` one task each, with the same
        figures: `score` and `ci` are pooled, differences paired and stratified by task. In
        `vs_random`, `vs_downsample` and `vs_unpatched`, `p_holm` is corrected for the other
        comparisons with the same row: those over all tasks are one family, those on single tasks
        another; `comparisons` has their numbers. `loyalty` is None without answers in the cells;
        `difficult.score` is None under 20 questions.

    Raises:
        DataError: no cells, or those of a task differ in model, split, style, data, dtype, backend
            or protocol.
    """
    tasks, entries, missing, left_out = grouped(list(cells))
    rows = [_row(entry, tasks, entries) for entry in entries.values() if entry.runs]
    # Equal budgets stand together: they are what is compared.
    rows.sort(key=lambda row: -(row["budget"] or float("inf")))
    comparisons = _correct(rows)
    first = tasks[next(iter(tasks))]
    table = {
        "schema": 1,
        **{k: first[k] for k in ("about", "split", "n", "seed")},
        "protocol": first.get("protocol", "prompt"),
        "style": first.get("style", "plain"),
        "tasks": list(tasks),
        "rows": rows,
        "comparisons": comparisons,
        "missing": missing,
        "left_out": left_out,
        "skipped": [{"method": s.method, "budget": s.budget, "reason": s.reason} for s in skipped],
    }
    return table | {"words": words.paragraphs(table)}


def write(table: dict[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>.md`, `<stem>.csv` and `<stem>.json`, each atomically; returns the paths."""
    files.ensure_writable(stem.parent)
    return [
        files.write_text(stem.with_name(stem.name + ".md"), markdown(table)),
        files.write_text(stem.with_name(stem.name + ".csv"), comma_separated(table)),
        files.write_json(stem.with_name(stem.name + ".json"), table),
    ]


def markdown(table: dict[str, Any]) -> str:
    """The table for people; `title` and `written` of the table, where set, name its source."""
    tasks = table["tasks"]
    about = table["about"]
    each = words.per_task(table)
    lines = [
        f"# {table.get('title', 'Yardstick')}: {len(tasks)} tasks, {each} questions each, "
        f"{table['split']} split",
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
    ]
    body = [
        [
            f"`{row['plan']}`",
            or_dash(row["budget"]),
            f"{row['kept_llm']:.0f}",
            f"{row['visual_avg']:.1f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['kv_bytes'] / 1024:.0f}",
            "–" if row["prefill_s"] is None else f"{1e3 * row['prefill_s']:.0f}",
            _share(row),
            or_dash(row["vs_random"] and points(row["vs_random"])),
            or_dash(row["vs_downsample"] and points(row["vs_downsample"])),
        ]
        for row in table["rows"]
    ]
    lines += grid(head, body)
    lines += ["", "## What can be said", "", *_notes(table["rows"]), ""]
    head = [
        "method",
        "budget",
        "seeds",
        "p vs random",
        "same answers %",
        "difficult %",
        "verdict",
    ]
    body = [
        [
            row["method"],
            or_dash(row["budget"]),
            _seeds(row),
            _p(row["vs_random"]),
            or_dash(row["loyalty"] and _share(row["loyalty"], "share")),
            _on_difficult(row["difficult"]),
            row["verdict"] or "–",
        ]
        for row in table["rows"]
    ]
    lines += grid(head, body)
    lines += [
        "",
        "## By task",
        "",
        "Scores in percent; ▲ better than random at the same budget, ▼ worse, after Holm's "
        f"correction for {table['comparisons']['vs_random']['tasks']} comparisons; △ ▽ before it "
        "only; nothing: not resolved. Intervals are in the CSV and JSON files.",
        "",
    ]
    body = [
        [
            row["method"],
            or_dash(row["budget"]),
            *(_marked(row["tasks"][task]) for task in tasks),
        ]
        for row in table["rows"]
    ]
    lines += grid(["method", "budget", *tasks], body)
    if table["skipped"]:
        lines += ["", "## Not reachable", ""]
        lines += [f"- `{s['method']}` at {s['budget']}: {s['reason']}" for s in table["skipped"]]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        "## How",
        "",
        f"Protocol {table['protocol']}; "
        f"{about['dtype']}, {about['backend']}, {about['device']}, {about['threads']} threads; "
        f"{words.seeds(table)}; weights "
        f"{about['weights_sha256'][:12]}; commit {about['commit'] or 'unknown'}; {versions}. "
        + table.get(
            "written",
            "Written by `mllm sweep`; the cells, with the outcome of every question, are in the "
            "JSON Lines file beside this one.",
        ),
        "",
    ]
    return "\n".join(lines)


def comma_separated(table: dict[str, Any]) -> str:
    """One line per method, budget and task; task `all` is the pooled row."""
    fields = ["method", "budget", "plan", "task", "low", "high", "seeds", *_PLAIN]
    for versus in VERSUS:
        fields += [versus, *(f"{versus}_{name}" for name in ("low", "high", "p", "p_holm"))]
    fields += ["loyalty", "difficult", "difficult_n"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    for row in table["rows"]:
        for task, scores in [("all", row), *row["tasks"].items()]:
            low, high = scores["ci"]
            line = {name: row[name] for name in ("method", "budget", "plan")}
            line |= {"task": task, "low": low, "high": high, "seeds": len(row["seeds"])}
            line |= {name: scores[name] for name in _PLAIN}
            for versus in VERSUS:
                if found := scores[versus]:
                    low, high = found["ci"]
                    line |= {versus: found["diff"], f"{versus}_low": low, f"{versus}_high": high}
                    line |= {f"{versus}_p": found["p"], f"{versus}_p_holm": found["p_holm"]}
            hard = scores["difficult"] or {"n": None, "score": None}
            line |= {"difficult": hard["score"], "difficult_n": hard["n"]}
            line["loyalty"] = scores["loyalty"] and scores["loyalty"]["share"]
            writer.writerow(line)
    return buffer.getvalue()


def grouped(
    cells: list[dict[str, Any]],
) -> tuple[dict[str, dict], dict[tuple[str, int | None], Entry], list[dict], int]:
    """A first cell per task, the entries, what is missing, and how many cells were left out.

    Raises:
        DataError: as :func:`build`.
    """
    if not cells:
        raise DataError(
            "a table needs at least one cell of a sweep",
            argument="cells",
            given="none",
            expected="cells of mllm sweep",
        )
    most: dict[str, int] = {}
    for cell in cells:
        most[cell["task"]] = max(cell["n"], most.get(cell["task"], 0))
    tasks: dict[str, dict] = {}
    runs: dict[tuple[str, int | None], dict[int, dict[str, dict]]] = {}
    left_out = 0
    for cell in cells:
        task = cell["task"]
        if cell["n"] < most[task]:
            left_out += 1
            continue
        first = tasks.setdefault(task, cell)
        if _origin(cell) != _origin(first):
            given = f"{_origin(first)} and {_origin(cell)}"
            raise DataError(
                f"the cells of task {task!r} cannot be compared: {given}",
                argument="cells",
                given=given,
                expected="one model, split, style, version of the data, dtype, backend and "
                "protocol for each task",
            )
        name = cell["method"], cell["budget"]
        runs.setdefault(name, {}).setdefault(cell["seed"], {})[task] = cell
    entries, missing = {}, []
    for (method, budget), by_seed in runs.items():
        done = []
        for seed, run in sorted(by_seed.items()):
            absent = [task for task in tasks if task not in run]
            if absent:
                missing.append({"method": method, "budget": budget, "seed": seed, "tasks": absent})
            else:
                done.append(run)
        entries[method, budget] = Entry(method, budget, done)
    return tasks, entries, missing, left_out


def _origin(cell: dict[str, Any]) -> str:
    """What cells must share to be compared; older cells lack some of it: see `cells.identity`."""
    about = cell["about"]
    return (
        f"weights {about['weights_sha256'][:12]}, {cell['split']} split, "
        f"{cell.get('style', 'plain')} style, data {cell.get('data', 'scenes 1')[:12]}, "
        f"{about['dtype']}, {about['backend']}, protocol {cell.get('protocol', 'prompt')}"
    )


def _row(
    entry: Entry, tasks: Iterable[str], entries: dict[tuple[str, int | None], Entry]
) -> dict[str, Any]:
    def baseline(name: str) -> Entry | None:
        budget = None if name == UNPATCHED else entry.budget
        found = entries.get((baseline_at(name, budget), budget))
        return found if found and found.runs else None

    others = {name: baseline(name) for name in ("random", "downsample", UNPATCHED)}
    names = list(tasks)
    return {
        "method": entry.method,
        "budget": entry.budget,
        "plan": entry.runs[0][names[0]]["plan"],
        "seeds": [run[names[0]]["seed"] for run in entry.runs],
        **_figures(entry, names, others),
        "tasks": {task: _figures(entry, [task], others) for task in names},
    }


def _figures(
    entry: Entry, tasks: Sequence[str], others: dict[str, Entry | None]
) -> dict[str, Any]:
    """What is known of an entry on some tasks."""
    cells = [run[task] for run in entry.runs for task in tasks]
    flat = entry.flat(tasks)
    score = stats.share(flat)
    compared = {
        f"vs_{name}": _compared(entry, other, tasks)
        if other and entry.method not in (other.method, UNPATCHED)
        else None
        for name, other in others.items()
    }
    return {
        "n": score.n,
        "score": score.share,
        "ci": [score.low, score.high],
        "spread": score.spread,
        **{k: _mean(cells, k) for k in ("visual_avg", "kept_llm", "flops", "kv_bytes")},
        "prefill_s": _median_time(cells),
        **compared,
        "loyalty": _loyalty(entry, others[UNPATCHED], tasks),
        "difficult": _difficult(entry, others, tasks),
    }


def _compared(ours: Entry, theirs: Entry, tasks: Sequence[str]) -> dict[str, Any]:
    found = stats.paired_seeds(ours.outcomes(tasks), theirs.outcomes(tasks))
    return found.as_dict() | {
        "verdict": found.verdict,
        "gained": found.gained,
        "lost": found.lost,
        "flipped": found.flipped,
        "p": found.p,
        "p_mid": found.p_mid,
        "seeds": list(found.seeds),
    }


def _loyalty(
    entry: Entry, unpatched: Entry | None, tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Same answers as unpatched; None for that row itself and where answers were not kept."""
    if unpatched is None or entry.method == UNPATCHED:
        return None
    ours, theirs = entry.answers(tasks), unpatched.answers(tasks)
    if ours is None or theirs is None:
        return None
    found = stats.loyalty(ours, theirs[0])
    return {"share": found.share, "ci": [found.low, found.high], "n": found.n}


def _difficult(
    entry: Entry, others: dict[str, Entry | None], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Score where downsampling loses the answer; None for the two rows that choose the subset."""
    unpatched, downsample = others[UNPATCHED], others["downsample"]
    if entry.method in (UNPATCHED, "downsample") or unpatched is None or downsample is None:
        return None
    hard = stats.difficult(unpatched.flat(tasks)[0], downsample.flat(tasks)[0])
    n = int(hard.sum())
    if n < FEWEST_DIFFICULT:
        return {"n": n, "score": None, "ci": None}
    found = stats.share([np.asarray(row)[hard] for row in entry.flat(tasks)])
    return {"n": n, "score": found.share, "ci": [found.low, found.high]}


def _correct(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Give every comparison `p_holm` and `holds`, every row and task a verdict in words."""
    by_task = [figures for row in rows for figures in row["tasks"].values()]
    counts = {}
    for versus in VERSUS:
        families = {"all": rows, "tasks": by_task}
        for label, family in families.items():
            compared = [figures[versus] for figures in family if figures[versus]]
            adjusted = stats.holm([found["p"] for found in compared])
            for found, p in zip(compared, adjusted, strict=True):
                resolved = found["verdict"] != "not better"
                found |= {"p_holm": p, "holds": resolved and p < stats.LEVEL}
            counts.setdefault(versus, {})[label] = len(compared)
    for row in rows:
        for figures in (row, *row["tasks"].values()):
            figures["verdict"] = words.verdict(row["method"], figures, row["budget"])
    return counts


def bits(cell: dict[str, Any]) -> np.ndarray:
    """Outcomes of a cell: bool `[n]`."""
    return np.frombuffer(cell["outcomes"].encode(), np.uint8) == ord("1")


def _mean(cells: list[dict], name: str) -> float:
    return sum(cell[name] for cell in cells) / len(cells)


def _median_time(cells: list[dict]) -> float | None:
    """Mean over tasks of the median prefill time, seconds; None if it was not taken."""
    if any(cell["prefill_s"] is None for cell in cells):
        return None
    return sum(cell["prefill_s"]["median"] for cell in cells) / len(cells)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the columns of the statistics mean, and what to beware of."""
    several = any(row["vs_random"] and row["vs_random"]["p_mid"] is None for row in rows)
    test = "exact McNemar"
    if several:
        test += ", or the bootstrap's normal p where a side has several seeds"
    notes = [
        f"p: two-sided ({test}), after Holm's correction over the rows of this column. Same "
        "answers: share of questions that get the text that the unpatched model gives, right or "
        "wrong. Brackets are 95 % intervals."
    ]
    if all(row["loyalty"] is None for row in rows):
        notes.append("Same answers are not known: the cells hold no answers.")
    if any(row["difficult"] for row in rows):
        notes.append(
            "Difficult: questions that unpatched answers right and downsample, with the budget's "
            "tokens, wrong. By this choice downsample has 0 and unpatched 100 there, lucky and "
            "unlucky answers included; so compare methods there with each other and with random, "
            f"never with these two. Under {FEWEST_DIFFICULT} questions are too few."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _seeds(row: dict[str, Any]) -> str:
    if row["spread"] is None:
        return "1"
    return f"{len(row['seeds'])} (± {100 * row['spread']:.1f})"


def _p(versus: dict[str, Any] | None) -> str:
    if versus is None:
        return "–"
    return "< 0.0001" if versus["p_holm"] < 1e-4 else f"{versus['p_holm']:.4f}"


def _on_difficult(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["score"] is None:
        return f"too few ({found['n']})"
    return f"{_share(found)} of {found['n']}"


def _share(figures: dict[str, Any], name: str = "score") -> str:
    low, high = figures["ci"]
    return f"{100 * figures[name]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _marked(scores: dict[str, Any]) -> str:
    versus = scores["vs_random"]
    mark = _MARKS.get((versus["verdict"], versus["holds"]), "") if versus else ""
    return f"{100 * scores['score']:.1f} {mark}".strip()


def grid(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
