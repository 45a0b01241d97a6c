"""Write what was measured into docs/methods.md, yardstick.md, cache.md and outside-data.md.

They are made from benchmarks/results:

    python -m scripts.make_verdicts            write it
    python -m scripts.make_verdicts --check    exit 1 when a page is not up to date

Read are the tables of `mllm sweep` (`<name>.json`) that are of the embedded model, of the style it
was trained on and of the tasks that it learnt. A table of more tasks is built anew from its cells
(`<name>.jsonl`), one of fewer is left out and named. Where several tables have a method at a
budget, the one with the most questions counts.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import PlanError
from mllm.eval import cells, table
from mllm.eval.plans import UNPATCHED, make_plan
from mllm.eval.sweep import KV_SANITY, SANITY
from mllm.eval.words import or_dash, points
from mllm.loading import model_path
from mllm.yardstick import ADMITTED

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS, YARDSTICK, CACHE, OUTSIDE = (
    ROOT / "docs" / f"{name}.md" for name in ("methods", "yardstick", "cache", "outside-data")
)
OPEN, CLOSE = "<!-- made by scripts/make_verdicts.py -->", "<!-- until here -->"
MARK = "*Measured"
BASELINES = (*SANITY, "randomllm", *KV_SANITY)
#: The budget at which the hard questions are shown; the smallest one where it was not measured.
HARD = 64
_SECTION = re.compile(r"(^### `(\w+)`\n\n)(.*?)(?=\n\n#|\n*\Z)", re.M | re.S)


@dataclass
class Measured:
    """Rows of all tables, by method and budget.

    Attributes:
        rows: rows of :func:`mllm.eval.table.build`, over all admitted tasks.
        unreachable: methods and budgets that could not be run.
        sources: names of the tables.
        ignored: tables of the embedded model without all admitted tasks.
        outdated: methods and budgets whose parameters are others today, and no table has these.
        slots: budgets are shares of the slots of the KV cache.
    """

    slots: bool = False
    rows: dict[tuple[str, float | None], dict[str, Any]] = field(default_factory=dict)
    unreachable: set[tuple[str, int]] = field(default_factory=set)
    sources: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    outdated: set[tuple[str, int]] = field(default_factory=set)

    @property
    def budgets(self) -> list[float]:
        """Largest first."""
        return sorted({budget for _, budget in self.rows if budget is not None}, reverse=True)

    @property
    def methods(self) -> list[str]:
        """In the order of the tables, without the unpatched model."""
        return list(dict.fromkeys(method for method, budget in self.rows if budget is not None))

    def number(self, budget: float) -> str:
        """A budget, without what it counts."""
        return f"{100 * budget:.0f} %" if self.slots else str(budget)

    def named(self, budget: float) -> str:
        """A budget, with what it counts."""
        return f"{self.number(budget)} {'of the slots' if self.slots else 'tokens'}"

    def add(self, found: dict[str, Any], name: str, changed: set[tuple[str, int]]) -> None:
        """Take up a table's rows, but for outdated ones and those here with more questions."""
        self.sources.append(name)
        for row in found["rows"]:
            key = row["method"], row["budget"]
            if key in changed:
                self.outdated.add(key)
            elif key not in self.rows or row["n"] > self.rows[key]["n"]:
                self.rows[key] = row
        self.outdated -= self.rows.keys()
        self.unreachable |= {(s["method"], s["budget"]) for s in found["skipped"]}


def measured(folder: Path, weights: str, tasks: Sequence[str], slots: bool = False) -> Measured:
    """What the tables in `folder` hold of a model.

    Args:
        weights: sha256 of the model's weights.
        tasks: the tasks whose mean counts.
        slots: take tables of methods on the KV cache, read again, instead of the others.
    """
    known = Measured(slots)
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if not {"rows", "tasks", "split"} <= found.keys() or found["split"] != "test":
            continue
        if found["about"]["weights_sha256"] != weights or found.get("style", "plain") != "plain":
            continue
        if (found.get("protocol") == "again") != slots:
            continue
        if not set(tasks) <= set(found["tasks"]):
            known.ignored.append(path.stem)
            continue
        made = cells.read(path.with_suffix(".jsonl")).rows
        if set(found["tasks"]) != set(tasks):
            found = _restricted(found, made, tasks)
        known.add(found, path.stem, _changed(made))
    return known


def _changed(made: list[dict]) -> set[tuple[str, int]]:
    """Methods and budgets of which no cell has the parameters of today."""
    named = [((cell["method"], cell["budget"]), cell) for cell in made if "params" in cell]
    return {key for key, _ in named} - {key for key, cell in named if _is_of_today(cell)}


def _is_of_today(cell: dict[str, Any]) -> bool:
    try:
        return make_plan(cell["plan"]).to_dict()["stages"] == cell["params"]
    except PlanError:  # there is no such method or parameter any more
        return False


def _restricted(found: dict[str, Any], made: list[dict], tasks: Sequence[str]) -> dict[str, Any]:
    """A table's rows on some of its tasks only."""
    rows = {(row["method"], row["budget"]) for row in found["rows"]}
    mine = [c for c in made if c["task"] in tasks and (c["method"], c["budget"]) in rows]
    return table.build(mine) | {"skipped": found["skipped"]}


def with_verdicts(page: str, *all_known: Measured) -> str:
    """docs/methods.md with what was measured at the end of each section."""

    def section(match: re.Match) -> str:
        head, name, body = match.groups()
        kept = [part for part in body.split("\n\n") if not part.startswith(MARK)]
        lines = [
            verdict_line(method, name, known)
            for known in all_known
            for method in known.methods
            if _home(method) == name
        ]
        since = any(_home(method) == name for known in all_known for method, _ in known.outdated)
        none = f"{MARK}:* not in a sweep{' since its parameters changed' * since}."
        return head + "\n\n".join(kept + (lines or [none]))

    return _SECTION.sub(section, page)


def _home(method: str) -> str:
    """The section of a row: a stack stands with what its last part adds to the others."""
    return method.split("+")[-1].split(":")[0]


def verdict_line(method: str, section: str, known: Measured) -> str:
    """One line about a method at all budgets."""
    rows = [known.rows[method, b] for b in known.budgets if (method, b) in known.rows]
    head = f"{MARK}:*" if method == section else f"{MARK}* (`{method}`):"
    short = _verdict(method, known)
    parts = [f"{short}."] if short else []
    for row in rows:
        others = (UNPATCHED, "random", "downsample")
        said = [f"{name} {versus}" for name in others if (versus := _versus(row, name))]
        parts.append(f"{known.named(row['budget'])}: {_percent(row)} % ({', '.join(said)}).")
    return f"{head} {' '.join(parts)}"


def _verdict(method: str, known: Measured) -> str:
    """Against random, the budgets of each verdict; empty for random itself."""
    said: dict[str, list[str]] = {}
    for budget in known.budgets:
        row = known.rows.get((method, budget))
        if row and (versus := row["vs_random"]):
            unsure = versus["verdict"] != "not better" and not versus["holds"]
            text = f"{versus['verdict']} than random" + " (before correction only)" * unsure
            said.setdefault(text, []).append(known.number(budget))
        elif not row and (method, budget) in known.unreachable:
            said.setdefault("out of reach", []).append(known.number(budget))
    return "; ".join(f"{text} at {_all_of(at)}" for text, at in said.items())


def _all_of(budgets: Sequence[str]) -> str:
    *first, last = budgets
    return f"{', '.join(first)} and {last}" if first else last


def results(known: Measured) -> str:
    """The part of docs/yardstick.md between the two marks."""
    methods = ranked(known)
    hard = HARD if HARD in known.budgets else known.budgets[-1]
    own = sum(_home(method) not in BASELINES for method in methods)
    full = known.rows[UNPATCHED, None]
    counts = sorted({row["n"] // len(row["tasks"]) for row in known.rows.values()})
    seeds = sorted({len(known.rows["random", b]["seeds"]) for b in known.budgets
                    if ("random", b) in known.rows})  # fmt: skip
    files = ", ".join(f"[{name}](../benchmarks/results/{name}.md)" for name in known.sources)
    tasks = ", ".join(f"`{task}`" for task in full["tasks"])
    intro = (
        f"{own} {'method' if own == 1 else 'methods'} beside the sanity rows on "
        f"{len(full['tasks'])} admitted tasks ({tasks}), {_listed(counts)} test questions "
        f"each; the unpatched model answers {_percent(full)} % of the {full['n']:,}. An entry is "
        "the accuracy at that many visual tokens, averaged over decoder layers, and in brackets "
        f"the paired difference to `random` ({_listed(seeds)} "
        f'{"seed" if seeds == [1] else "seeds"}) in points with its 95 % interval. "Hard" are '
        "the questions that the unpatched model answers and `downsample` does not. The verdict "
        'holds after Holm\'s correction unless it says otherwise. "–" is a budget that a method '
        "inside the decoder cannot reach, because the layers before its first cut see everything, "
        "or a row that is itself compared with; an empty entry was not run. Rows are sorted by "
        f"the smallest budget. From {files}."
    )
    if known.outdated:
        names = ", ".join(sorted({f"`{method}`" for method, _ in known.outdated}))
        intro += f" Left out, as their parameters have changed since: {names}."
    head = ["method", *_tokens(known), f"{hard}: the hard questions", "verdict"]
    body = [
        [f"`{m}`", *_entries(m, known, _beside_random), _hard(m, hard, known), _verdict(m, known)]
        for m in methods
    ]
    below = "The same beside `downsample`: the paired difference in points."
    others = [
        [f"`{m}`", *_entries(m, known, lambda row: or_dash(_versus(row, "downsample")))]
        for m in methods
        if m != "downsample"
    ]
    parts = [_filled(intro), _grid(head, body), below, _grid(["method", *_tokens(known)], others)]
    return "\n\n".join(parts)


def outside(folder: Path) -> str:
    """The part of docs/outside-data.md between the two marks."""
    found = json.loads((folder / "easyvqa.json").read_text())
    known = measured(folder, found["about"]["weights_sha256"], found["tasks"])
    full = known.rows[UNPATCHED, None]
    tasks = " and ".join(f"`{task}`" for task in full["tasks"])
    intro = (
        f"Accuracy on {tasks}, {full['n'] // len(full['tasks'])} test questions each, and in "
        "brackets the paired difference to `random` in points with its 95 % interval; the "
        f"unpatched model answers {_percent(full)} %. Rows, empty entries and verdicts as in "
        "[the yardstick](yardstick.md#results)."
    )
    body = [
        [f"`{m}`", *_entries(m, known, _beside_random), _verdict(m, known)] for m in ranked(known)
    ]
    return f"{_filled(intro)}\n\n{_grid(['method', *_tokens(known), 'verdict'], body)}"


def on_cache(known: Measured) -> str:
    """The part of docs/cache.md between the two marks."""
    full = known.rows[UNPATCHED, None]
    intro = (
        f"Accuracy on the {len(full['tasks'])} admitted tasks, {full['n'] // len(full['tasks'])} "
        "test questions each, at a share of the slots per layer and KV head; in brackets the "
        "paired difference to `randomkv` in points with its 95 % interval, and what share of the "
        f"whole cache's bytes is held; the unpatched model answers {_percent(full)} %. From "
        "[kv](../benchmarks/results/kv.md)."
    )

    def entry(row: dict[str, Any]) -> str:
        return f"{_beside_random(row)}; {100 * row['kv_bytes'] / full['kv_bytes']:.0f} %"

    body = [[f"`{m}`", *_entries(m, known, entry), _verdict(m, known)] for m in ranked(known)]
    return f"{_filled(intro)}\n\n{_grid(['method', *_tokens(known), 'verdict'], body)}"


def ranked(known: Measured) -> list[str]:
    """Sanity rows first, then methods: what reaches the smallest budget, by its accuracy there."""

    def rank(method: str) -> tuple:
        if _home(method) in BASELINES:
            return 0, BASELINES.index(_home(method))
        rows = [known.rows.get((method, budget)) for budget in reversed(known.budgets)]
        return 1, *(-row["score"] if row else 1 for row in rows)

    return sorted(known.methods, key=rank)


def _entries(method: str, known: Measured, entry: Callable[[dict], str]) -> list[str]:
    """One entry per budget."""
    made = []
    for budget in known.budgets:
        row = known.rows.get((method, budget))
        made.append(entry(row) if row else "–" if (method, budget) in known.unreachable else "")
    return made


def _beside_random(row: dict[str, Any]) -> str:
    versus = _versus(row, "random")
    return f"{_percent(row)} ({versus})" if versus else _percent(row)


def _versus(row: dict[str, Any], name: str) -> str | None:
    found = row[f"vs_{name}"]
    return points(found) if found else None


def _hard(method: str, budget: int, known: Measured) -> str:
    found = known.rows.get((method, budget), {}).get("difficult")
    if not found or found["score"] is None:
        return "–"
    return f"{_percent(found)} (n={found['n']})"


def _percent(figures: dict[str, Any]) -> str:
    return f"{100 * figures['score']:.1f}"


def _tokens(known: Measured) -> list[str]:
    return [known.named(budget) for budget in known.budgets]


def _listed(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _filled(text: str, width: int = 104) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def scores(folder: Path, weights: str) -> str:
    """The table of docs/methods.md on where scores are high; only if it is of these weights."""
    path = folder / "score-auc.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is None or found["about"]["weights_sha256"] != weights:
        return "Not measured on the present model."
    tasks = list(found["rows"][0]["tasks"])
    body = [
        [f"`{row['plan']}`", f"{row['auc']:.2f}", *(f"{row['tasks'][task]:.2f}" for task in tasks)]
        for row in found["rows"]
    ]
    asked = f"{found['rows'][0]['n']} questions, up to {found['n']} a task."
    return f"{_grid(['scores of', 'mean', *tasks], body)}\n\n{asked}"


def between_marks(page: str, text: str) -> str:
    """`page` with `text` between its two marks."""
    before, rest = page.split(OPEN)
    return f"{before}{OPEN}\n{text}\n{CLOSE}{rest.split(CLOSE)[1]}"


def pages() -> dict[Path, str]:
    """The pages as they should be."""
    data = json.loads((Path(model_path("tiny-llava")) / "yardstick.json").read_text())
    known = measured(RESULTS, data["weights_sha256"], ADMITTED)
    cached = measured(RESULTS, data["weights_sha256"], ADMITTED, slots=True)
    for name in known.ignored:
        print(f"{name}: left out, it has not all admitted tasks", file=sys.stderr)
    methods = with_verdicts(METHODS.read_text(), known, cached)
    return {
        METHODS: between_marks(methods, scores(RESULTS, data["weights_sha256"])),
        YARDSTICK: between_marks(YARDSTICK.read_text(), results(known)),
        CACHE: between_marks(CACHE.read_text(), on_cache(cached)),
        OUTSIDE: between_marks(OUTSIDE.read_text(), outside(RESULTS)),
    }


if __name__ == "__main__":
    made = pages()
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in made.items() if path.read_text() != text]
        if stale:
            sys.exit(f"docs/{', docs/'.join(stale)} not up to date: run make docs")
    else:
        for path, text in made.items():
            path.write_text(text)
