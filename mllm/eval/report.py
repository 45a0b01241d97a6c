"""One self-contained HTML page about a set of plans: plots, table, overlays, changed answers.

The page has no script, fetches nothing and opens from the file system. Plots are SVG written here;
pictures are embedded. `write` takes a `Report`, which knows nothing about models: the demo and the
sweep both fill one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from mllm.eval.files import write_text
from mllm.eval.stats import wilson


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
        tasks: task name -> (answers right, questions).
        sanity: a row any method has to beat (random, downsample, avgpool ...).
        flipped: changes against the unpatched model (see `Report.changed`); None for that model.
        ci: 95 % interval of `score`; None for the Wilson interval of the counts in `tasks`.
        same: share of questions with the unpatched model's answer text; None if not known.
        verdict: against random, downsample and unpatched, in words; empty where none was drawn.
        note: shown in the table, for example why a budget was not reached.
    """

    name: str
    spec: str
    budget: int | float | None
    visual_avg: float = math.nan
    flops: float = math.nan
    prefill_s: float | None = None
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)
    sanity: bool = False
    flipped: int | None = None
    note: str = ""
    ci: tuple[float, float] | None = None
    same: float | None = None
    verdict: str = ""

    @property
    def correct(self) -> int:
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
        image: as the model saw it.
        answers: (answer, the plans that gave it) of the plans that changed it.
    """

    image: Image.Image
    task: str
    question: str
    truth: str
    unpatched: str
    answers: list[tuple[str, list[str]]]


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


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("mllm.eval"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def render(report: Report) -> str:
    """The page as text."""
    environment = _templates()
    environment.filters.update(picture=_picture, percent=_percent, interval=_interval)
    measured = [row for row in report.rows if row.n]
    tasks = list(dict.fromkeys(task for row in measured for task in row.tasks))
    base = next((row for row in measured if row.budget is None), None)
    plots = {
        "tokens": pareto(measured, "tokens"),
        "flops": pareto(measured, "flops"),
        "time": pareto(measured, "time") if all(row.prefill_s for row in measured) else None,
        "tasks": [(task, pareto(measured, "tokens", task)) for task in tasks] * (len(tasks) > 1),
        "loss": _loss(report.training) if report.training else None,
    }
    known = {
        "same": any(row.same is not None for row in measured),
        "verdict": any(row.verdict for row in measured),
    }
    names = [row.name for row in report.rows if row.budget is not None]
    legend = [(name, _key(name, measured)) for name in dict.fromkeys(names)]
    return environment.get_template("report.html.j2").render(
        report=report, tasks=tasks, base=base, plots=plots, legend=legend, known=known
    )


def write(report: Report, path: Path) -> None:
    """Write the page to a temporary name, then rename it to `path`."""
    write_text(path, render(report))


def picture(rows: Sequence[Row], title: str) -> str:
    """Accuracy over visual tokens as an SVG file of its own, with a title and a legend."""
    measured = [row for row in rows if row.n]
    names = list(dict.fromkeys(row.name for row in measured if row.budget is not None))
    plot = str(pareto(measured, "tokens")).replace(
        "<svg ", f'<svg x="0" y="34" width="{_WIDTH}" height="{_HEIGHT}" ', 1
    )
    parts = [f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>', plot]
    for i, name in enumerate(names):
        y = 70 + 24 * i
        key = str(_key(name, measured)).replace("<svg ", f'<svg x="{_WIDTH + 6}" y="{y}" ', 1)
        note = " (sanity)" if _is_sanity(name, measured) else ""
        parts += [key, f'<text x="{_WIDTH + 48}" y="{y + 12}">{escape(name + note)}</text>']
    width, height, margin = _WIDTH + 220, _HEIGHT + 40, 10
    style = _templates().get_template("plot.css").render()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} 0 {width} {height}" '
        f'font-family="system-ui, sans-serif"><style>{style}</style>'
        f'<rect x="{-margin}" width="{width}" height="{height}" fill="var(--paper)"/>'
        f"{''.join(parts)}</svg>\n"
    )


_X: dict[str, tuple[str, Callable[[Row], float], bool]] = {
    "tokens": ("visual tokens, average over layers", lambda row: row.visual_avg, True),
    "flops": ("prefill GFLOPs per question", lambda row: row.flops / 1e9, False),
    "time": (
        "milliseconds to the first token, per question",
        lambda row: 1e3 * (row.prefill_s or math.nan),
        False,
    ),
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 310, 46, 14, 14, 44
_MARKERS = ("circle", "square", "diamond", "up", "down", "cross")


@dataclass
class _Frame:
    """Maps data to the plane of a plot."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        scale = math.log if self.log else float
        share = (scale(x) - scale(self.x[0])) / ((scale(self.x[1]) - scale(self.x[0])) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return (
            _LEFT + share * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )


def pareto(rows: Sequence[Row], axis: str, task: str | None = None) -> Markup:
    """Accuracy over cost as SVG: a line per plan, the unpatched model as a level.

    Args:
        rows: measured rows.
        axis: "tokens", "flops" or "time".
        task: only this task; None for all questions together.
    """
    title, cost, log = _X[axis]
    points = {
        id(row): (cost(row), 100 * right / n)
        for row in rows
        for right, n in [row.tasks[task] if task else (row.correct, row.n)]
    }
    xs, ys = zip(*points.values(), strict=True)
    x = (min(xs) / 1.15, max(xs) * 1.15) if log else (0.0, max(xs) * 1.06)
    frame = _Frame(x, (0.0 if task else max(0.0, math.floor(min(ys) / 10 - 0.4) * 10), 100.0), log)
    what = f"accuracy{' on ' + task if task else ''} over {title}"
    parts = [_axes(frame, title, "% right")]
    base = next((row for row in rows if row.budget is None), None)
    if base:
        x0, y0 = frame.at(frame.x[0], points[id(base)][1])
        star = frame.at(*points[id(base)])[0]
        parts.append(f'<path class="level" d="M{x0:.1f} {y0:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="level end" x="{star - 10:.1f}" y="{y0 - 5:.1f}">unpatched</text>'
        )
        parts.append(_point("m-none", "star", frame, points[id(base)], _describe(base, task)))
    names = dict.fromkeys(row.name for row in rows if row.budget is not None)
    for name in sorted(names, key=lambda name: not _is_sanity(name, rows)):
        line = sorted((row for row in rows if row.name == name), key=lambda r: points[id(r)][0])
        style, marker = _style(name, rows)
        path = " ".join("{:.1f} {:.1f}".format(*frame.at(*points[id(row)])) for row in line)
        parts.append(f'<path class="line {style}" d="M{path}"/>')
        parts += [_point(style, marker, frame, points[id(r)], _describe(r, task)) for r in line]
    return _svg(parts, what)


def _is_sanity(name: str, rows: Sequence[Row]) -> bool:
    return any(row.sanity for row in rows if row.name == name)


def _style(name: str, rows: Sequence[Row]) -> tuple[str, str]:
    """CSS class and marker of a plan: one colour and shape each; sanity rows grey and hollow."""
    sanity = _is_sanity(name, rows)
    peers = [row.name for row in rows if row.budget is not None and row.sanity == sanity]
    index = list(dict.fromkeys(peers)).index(name)
    kind = f"sanity s{index % 4}" if sanity else f"c{index % 6}"
    return kind, _MARKERS[index % len(_MARKERS)]


def _key(name: str, rows: Sequence[Row]) -> Markup | None:
    """The legend's sample of a plan's line; None if it has no measured row."""
    if all(row.name != name for row in rows):
        return None
    style, marker = _style(name, rows)
    shape = _shape(style, marker, 17, 8)
    return Markup(
        f'<svg class="key" viewBox="0 0 34 16" width="34" height="16" aria-hidden="true">'
        f'<path class="line {style}" d="M1 8H33"/>{shape}</svg>'
    )


def _describe(row: Row, task: str | None) -> str:
    right, n = row.tasks[task] if task else (row.correct, row.n)
    low, high = wilson(right, n)
    return (
        f"{row.spec or 'unpatched'}: {right} of {n} right ({100 * low:.0f} to {100 * high:.0f} %), "
        f"{row.visual_avg:.1f} visual tokens, {row.flops / 1e9:.2f} GFLOPs"
    )


def _point(style: str, marker: str, frame: _Frame, point: tuple[float, float], text: str) -> str:
    shape = _shape(style, marker, *frame.at(*point))
    return f"<g><title>{escape(text)}</title>{shape}</g>"


def _shape(style: str, marker: str, x: float, y: float) -> str:
    if marker == "circle":
        return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    outline = {
        "square": "M-4 -4H4V4H-4Z",
        "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",
        "up": "M0 -5.4L5 4H-5Z",
        "down": "M0 5.4L5 -4H-5Z",
        "cross": "M-1.6 -5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
        "star": "M0 -6.5L2 -2H6.5L3 1.2L4.3 6L0 3.2L-4.3 6L-3 1.2L-6.5 -2H-2Z",
    }[marker]
    return f'<path class="mark {style}" transform="translate({x:.1f} {y:.1f})" d="{outline}"/>'


def _loss(training: Training) -> Markup:
    steps, losses = zip(*training.losses, strict=True)
    top = max(losses) * 1.08
    frame = _Frame((min(steps), max(steps)), (0.0, top), False)
    path = " ".join("{:.1f} {:.1f}".format(*frame.at(*point)) for point in training.losses)
    parts = [_axes(frame, "step", "loss"), f'<path class="line c0" d="M{path}"/>']
    parts += [
        _point("c0", "circle", frame, point, f"step {point[0]}: loss {point[1]:.3f}")
        for point in training.losses[:: max(1, len(losses) // 40)]
    ]
    return _svg(parts, "training loss over steps")


def _axes(frame: _Frame, x_title: str, y_title: str) -> str:
    parts = []
    for value in _ticks(*frame.y, log=False):
        x, y = frame.at(frame.x[0], value)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{x - 6:.1f}" y="{y + 4:.1f}">{value:g}</text>')
    for value in _ticks(*frame.x, log=frame.log):
        x, y = frame.at(value, frame.y[0])
        parts.append(f'<path class="tick" d="M{x:.1f} {y:.1f}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{y + 17:.1f}">{value:g}</text>')
    x, y = frame.at(frame.x[0], frame.y[0])
    parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle}" y="{_HEIGHT - 6}">{escape(x_title)}</text>')
    half = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="mid" transform="translate(12 {half}) rotate(-90)">{escape(y_title)}</text>'
    )
    return "".join(parts)


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round values inside an interval: doublings on a logarithmic axis, else about five steps."""
    if log:
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2.0**power for power in powers]
    rough = (high - low) / 5 or 1.0
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(parts: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _picture(image: Image.Image, width: int) -> str:
    """A data URI of the picture as JPEG, `width` pixels wide at most."""
    if image.width > width:
        height = round(image.height * width / image.width)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f}"


def _interval(row: Row) -> str:
    low, high = row.interval
    return f"{100 * low:.0f}–{100 * high:.0f}"
