"""One self-contained HTML page about a set of plans: plots, tables, overlays, changed answers.

The page fetches nothing and opens from the file system. Plots are SVG (:mod:`mllm.eval.plots`),
pictures are embedded, and the script in it only helps to read: without it everything is there.
`write` takes a `Report`, which knows nothing about models: the demo, a sweep and an evaluation all
fill one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from mllm.eval import plots
from mllm.eval.files import write_text
from mllm.eval.stats import wilson
from mllm.eval.words import by_budget

# Rows above which a page opens on one budget instead of all of them.
MANY_ROWS = 60
# Points of difference from which a cell of the heat map is one shade stronger.
SHADES = (1, 3, 6, 12, 25)
_TOLD = 900  # characters of explanation that stand open; more of it is folded


@dataclass
class Row:
    """One plan at one budget, over all tasks.

    Attributes:
        name: what is plotted as one line, such as `visionzip`.
        spec: the plan's spec text; empty for the unpatched model.
        budget: layer-average visual tokens aimed at, or the share of a KV cache's slots; None for
            the unpatched model.
        visual_avg: layer-average visual tokens reached (input to layer, mean over the samples).
        flops: prefill FLOPs of a sample, mean; vision tower and selection included.
        prefill_s: seconds to the first token per sample, or None where it was not measured.
        tasks: task name -> (answers right, of several seeds their mean; questions).
        sanity: a row any method has to beat (random, downsample, avgpool ...).
        flipped: changes against the unpatched model (see `Report.changed`); None for that model.
        ci: 95 % interval of `score`; None for the Wilson interval of the counts in `tasks`.
        same: share of questions with the unpatched model's answer text; None if not known.
        verdict: against random, downsample and unpatched, in words; empty where none was drawn.
        note: shown in the table, for example why a budget was not reached.
        kv_bytes: of the KV cache after the prefill of a sample, mean; NaN if not known.
        versus: `random`, `downsample`, `unpatched` -> the paired difference to that row, as
            :func:`mllm.eval.table.build` gives it, or None.
        task_versus: task name -> the same difference to the unpatched model on that task.
    """

    name: str
    spec: str
    budget: int | float | None
    visual_avg: float = math.nan
    flops: float = math.nan
    prefill_s: float | None = None
    tasks: dict[str, tuple[float, int]] = field(default_factory=dict)
    sanity: bool = False
    flipped: int | None = None
    note: str = ""
    ci: tuple[float, float] | None = None
    same: float | None = None
    verdict: str = ""
    kv_bytes: float = math.nan
    versus: dict[str, Any] = field(default_factory=dict)
    task_versus: dict[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> float:
        return sum(right for right, _ in self.tasks.values())

    @property
    def n(self) -> int:
        return sum(n for _, n in self.tasks.values())

    @property
    def score(self) -> float:
        """Share of right answers over all tasks, each question counting once."""
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `score`."""
        return self.ci or wilson(self.correct, self.n)

    def as_dict(self) -> dict[str, object]:
        """What `mllm demo --json` prints of the row."""
        return {
            "name": self.name,
            "spec": self.spec,
            "budget": self.budget,
            "sanity": self.sanity,
            "visual_avg": None if math.isnan(self.visual_avg) else self.visual_avg,
            "prefill_flops": None if math.isnan(self.flops) else self.flops,
            "kv_bytes": None if math.isnan(self.kv_bytes) else self.kv_bytes,
            "prefill_s": self.prefill_s,
            "n": self.n,
            "correct": self.correct,
            "score": self.score if self.n else None,
            "ci": list(self.interval) if self.n else None,
            "tasks": {name: {"correct": c, "n": n} for name, (c, n) in self.tasks.items()},
            "flipped": self.flipped,
            "note": self.note,
        }


@dataclass
class Overlay:
    """Drawings of one question under several plans."""

    question: str
    answer: str
    pictures: list[tuple[str, Image.Image]]


@dataclass
class Flip:
    """A question where plans changed whether the answer is right.

    Attributes:
        pictures: (caption, picture): as the model saw it, then what a plan kept; may be none.
        task, question, truth: as asked; empty where they are not known.
        unpatched: answer of the unpatched model, or of the first run of a comparison.
        answers: (answer, the plans that gave it) of the plans that changed it.
        first: whose answer `unpatched` is.
    """

    pictures: list[tuple[str, Image.Image]]
    task: str
    question: str
    truth: str
    unpatched: str
    answers: list[tuple[str, list[str]]]
    first: str = "unpatched"


@dataclass
class Training:
    """A short training run: `losses` are (step, loss)."""

    title: str
    text: str
    losses: list[tuple[int, float]]


@dataclass
class Report:
    """Everything on the page.

    Attributes:
        lead: paragraphs under the title.
        facts: (name, value) pairs of the run: model, device, versions, n.
        lost: questions the unpatched model answers right and some plans wrong.
        won: the reverse.
        changed: what `Row.flipped` counts.
        warnings: what is wrong with the results, such as damaged lines.
        gallery: how the questions in `lost` and `won` were chosen, and from how many.
    """

    title: str
    lead: list[str]
    facts: list[tuple[str, str]]
    rows: list[Row]
    overlays: list[Overlay] = field(default_factory=list)
    lost: list[Flip] = field(default_factory=list)
    won: list[Flip] = field(default_factory=list)
    training: Training | None = None
    changed: str = "answers that differ from the unpatched model's"
    warnings: list[str] = field(default_factory=list)
    gallery: str = ""


def templates() -> Environment:
    """The templates, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("mllm.eval"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        picture=_picture,
        percent=_percent,
        interval=_interval,
        points=_points,
        mark=mark,
        shade=shade,
        at=budget_name,
        number=_number,
    )
    return environment


def render(report: Report) -> str:
    """The page as text."""
    rows = report.rows
    measured = [row for row in rows if row.n]
    tasks = list(dict.fromkeys(task for row in measured for task in row.tasks))
    drawn = plots.styles(rows)
    axes = [axis for axis in plots.AXES if len(plots.measured(rows, axis)) > 1 or len(measured) < 2]
    figures = []
    for axis in axes:
        there = plots.measured(rows, axis)
        if there:
            left_out = len(measured) - len(there)
            figures.append(
                (plots.AXES[axis].heading, plots.pareto(rows, axis, drawn=drawn), left_out)
            )
    several, groups = len(tasks) > 1, by_budget(rows, lambda row: row.budget)
    known = {
        "same": any(row.same is not None for row in measured),
        "verdict": any(row.verdict for row in measured),
        "time": any(row.prefill_s is not None for row in measured),
        "kv": any(math.isfinite(row.kv_bytes) for row in measured),
        "changed": any(row.flipped is not None for row in measured),
    }
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            tasks=tasks,
            base=next((row for row in measured if row.budget is None), None),
            figures=figures,
            by_task=[
                (task, plots.pareto(rows, "tokens", task, drawn))
                for task in tasks * several
                if any(task in row.tasks for row in plots.measured(rows, "tokens"))
            ],
            loss=plots.losses(report.training.losses) if report.training else None,
            known=known,
            legend=[(name, plots.key(style), style) for name, style in drawn.items()],
            groups=groups,
            opened=opened(groups),
            folded=sum(map(len, report.lead)) > _TOLD,
        )
    )


def write(report: Report, path: Path) -> None:
    """Write the page to a temporary name, then rename it to `path`."""
    write_text(path, render(report))


def budget_name(budget: int | float | None) -> str:
    """What stands above the rows of a budget."""
    if budget is None:
        return "unpatched"
    return f"{budget:.0%} of the KV slots" if isinstance(budget, float) else f"{budget} tokens"


def mark(versus: dict[str, Any] | None) -> str:
    """A sign of what a difference says: filled after correction, hollow before it only."""
    if not versus or versus["verdict"] == "not better":
        return ""
    signs = {"better": "▲△", "worse": "▼▽"}[versus["verdict"]]
    return signs[not versus["holds"]]


def shade(points: float) -> str:
    """The heat map's class of a difference in points: `h0`, `up1` to `up5`, `down1` to `down5`."""
    step = sum(abs(points) >= limit for limit in SHADES)
    return "h0" if not step else f"{'up' if points > 0 else 'down'}{step}"


def opened(groups: Sequence[tuple[int | float | None, Sequence[Any]]]) -> str:
    """The budget that a long page opens on, the middle one; empty for all of them."""
    budgets = [budget for budget, _ in groups if budget is not None]
    many = sum(len(members) for _, members in groups) > MANY_ROWS
    return str(budgets[len(budgets) // 2]) if many and budgets else ""


def _picture(image: Image.Image, width: int) -> str:
    """A data URI of the picture as JPEG, `width` pixels wide at most."""
    if image.width > width:
        height = round(image.height * width / image.width)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _percent(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _interval(row: Row) -> str:
    low, high = row.interval
    return f"{100 * low:.0f}–{100 * high:.0f}"


def _points(versus: dict[str, Any]) -> str:
    """A difference in points with its interval, for a table cell."""
    low, high = (100 * bound for bound in versus["ci"])
    return f"{100 * versus['diff']:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def _number(value: float | None, scale: float = 1.0, form: str = ".3g") -> str:
    return "–" if value is None or math.isnan(value) else format(value * scale, form)
