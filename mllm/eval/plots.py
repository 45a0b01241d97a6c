"""Plots as SVG text: accuracy over cost, losses over steps, and intervals.

Colours come from `templates/plot.css`; a mark carries its figures in a `title`, which readers see
on hover and the page's script shows on a tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

from mllm.errors import DataError
from mllm.eval.stats import wilson

if TYPE_CHECKING:
    from mllm.eval.report import Row

# More methods than this cannot be told apart: those that are not on the front stand back.
MANY = 7
WIDTH, HEIGHT = 440, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 44
_MARKERS = ("circle", "square", "diamond", "up", "down", "cross")
_COLOURS = 6


@dataclass(frozen=True)
class Axis:
    """A cost: what its plot is headed and its axis says, the value of a row, and the scale."""

    heading: str
    title: str
    cost: Callable[[Row], float]
    log: bool = False


AXES = {
    "tokens": Axis(
        "Visual tokens", "visual tokens, average over layers", lambda row: row.visual_avg, True
    ),
    "flops": Axis("Computation", "prefill GFLOPs per question", lambda row: row.flops / 1e9),
    "kv": Axis("KV cache", "KV cache in MiB per question", lambda row: row.kv_bytes / 2**20),
    "time": Axis(
        "Measured prefill",
        "milliseconds to the first token, per question",
        lambda row: math.nan if row.prefill_s is None else 1e3 * row.prefill_s,
    ),
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        css: classes of its line and marks.
        marker: shape of its marks.
        sanity: a row that any method has to beat: grey, dashed and hollow.
        back: whether it stands back until a reader asks for it.
    """

    css: str
    marker: str
    sanity: bool
    back: bool


def measured(rows: Sequence[Row], axis: str) -> list[Row]:
    """Rows with results whose cost on an axis is known, and can be drawn on its scale."""
    least = 0.0 if AXES[axis].log else -math.inf
    return [row for row in rows if row.n and least < AXES[axis].cost(row) < math.inf]


def front(rows: Sequence[Row], axis: str, task: str | None = None) -> list[Row]:
    """Rows that no other row beats: none is at least as cheap and as good, and better in one.

    By rising cost; of equal rows the first.
    """
    cost, best, found = AXES[axis].cost, -math.inf, []
    for row in sorted(measured(rows, axis), key=lambda r: (cost(r), -_share(r, task))):
        if _share(row, task) > best:
            best = _share(row, task)
            found.append(row)
    return found


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """How every method of a page is drawn, the same in all of its plots.

    One colour and one shape each. Of many methods, those on the front of visual tokens have the
    first colours and the others stand back.
    """
    names = list(dict.fromkeys(row.name for row in rows if row.budget is not None and row.n))
    sanity = {row.name for row in rows if row.sanity}
    ahead = {row.name for row in front(rows, "tokens")}
    methods = [name for name in names if name not in sanity]
    many = len(methods) > MANY
    if many:
        methods.sort(key=lambda name: name not in ahead)
    found = {}
    for name in names:
        peers = [n for n in names if n in sanity] if name in sanity else methods
        index = peers.index(name)
        css = f"sanity s{index % 4}" if name in sanity else f"c{index % _COLOURS}"
        # Shapes go on where colours begin anew, so that no two methods have both alike.
        shape = _MARKERS[(index + index // _COLOURS) % len(_MARKERS)]
        back = many and name not in sanity and name not in ahead
        found[name] = Style(css, shape, name in sanity, back)
    return found


def pareto(
    rows: Sequence[Row],
    axis: str,
    task: str | None = None,
    drawn: Mapping[str, Style] | None = None,
) -> Markup:
    """Accuracy over cost as SVG: a line per method, the unpatched model as a level, the front.

    Args:
        rows: rows of a page; those without results or without this cost are left out.
        axis: one of `AXES`.
        task: only this task; None for all questions together.
        drawn: of :func:`styles`; None makes them from `rows`.
    """
    kind, drawn = AXES[axis], styles(rows) if drawn is None else drawn
    rows = [row for row in measured(rows, axis) if task is None or task in row.tasks]
    points = {id(row): (kind.cost(row), 100 * _share(row, task)) for row in rows}
    xs, ys = zip(*points.values(), strict=True)
    x = (min(xs) / 1.15, max(xs) * 1.15) if kind.log else (0.0, max(xs) * 1.06 or 1.0)
    frame = _Frame(
        x, (0.0 if task else max(0.0, math.floor(min(ys) / 10 - 0.4) * 10), 100.0), kind.log
    )
    what = f"accuracy{' on ' + task if task else ''} over {kind.title}"
    parts = [_axes(frame, kind.title, "% right")]
    best = front(rows, axis, task)
    if len(best) > 1:
        path = "L".join("{:.1f} {:.1f}".format(*frame.at(*points[id(row)])) for row in best)
        parts.append(f'<path class="front" d="M{path}"/>')
    base = next((row for row in rows if row.budget is None), None)
    if base:
        x0, y0 = frame.at(frame.x[0], points[id(base)][1])
        star = frame.at(*points[id(base)])[0]
        parts.append(f'<path class="level" d="M{x0:.1f} {y0:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="level end" x="{star - 10:.1f}" y="{y0 - 5:.1f}">unpatched</text>'
        )
    names = dict.fromkeys(row.name for row in rows if row.budget is not None)
    for name in sorted(names, key=lambda name: (not drawn[name].back, not drawn[name].sanity)):
        line = sorted((row for row in rows if row.name == name), key=lambda r: points[id(r)][0])
        style = drawn[name]
        path = "L".join("{:.1f} {:.1f}".format(*frame.at(*points[id(row)])) for row in line)
        marks = "".join(_point(style, frame.at(*points[id(r)]), _describe(r, task)) for r in line)
        parts.append(
            f'<g class="series{" back" * style.back}" data-name="{escape(name)}">'
            f'<path class="line {style.css}" d="M{path}"/>{marks}</g>'
        )
    if base:
        star = Style("m-none", "star", False, False)
        parts.append(_point(star, frame.at(*points[id(base)]), _describe(base, task)))
    return _svg(parts, what)


def key(style: Style) -> Markup:
    """The legend's sample of a method's line."""
    return Markup(
        f'<svg class="key" viewBox="0 0 34 16" width="34" height="16" aria-hidden="true">'
        f'<path class="line {style.css}" d="M1 8H33"/>{_shape(style.css, style.marker, 17, 8)}'
        "</svg>"
    )


def losses(points: Sequence[tuple[int, float]]) -> Markup:
    """A training loss over steps."""
    steps, values = zip(*points, strict=True)
    frame = _Frame((min(steps), max(steps)), (0.0, max(values) * 1.08), False)
    path = "L".join("{:.1f} {:.1f}".format(*frame.at(*point)) for point in points)
    dot = Style("c0", "circle", False, False)
    parts = [_axes(frame, "step", "loss"), f'<path class="line c0" d="M{path}"/>']
    parts += [
        _point(dot, frame.at(*point), f"step {point[0]}: loss {point[1]:.3f}")
        for point in points[:: max(1, len(points) // 40)]
    ]
    return _svg(parts, "training loss over steps")


def bar(low: float, value: float, high: float, reach: float) -> Markup:
    """A difference with its interval beside zero, for a table cell; all in the same unit.

    Args:
        reach: half of the width.
    """
    wide, tall = 132, 16

    def at(x: float) -> float:
        return wide / 2 * (1 + max(-1.0, min(1.0, x / reach)) * 0.96)

    css = "up" if low > 0 else "down" if high < 0 else "open"
    return Markup(
        f'<svg class="bar {css}" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" '
        f'aria-hidden="true"><path class="zero" d="M{wide / 2} 0V{tall}"/>'
        f'<path class="span" d="M{at(low):.1f} 8H{at(high):.1f}"/>'
        f'<circle cx="{at(value):.1f}" cy="8" r="4"/></svg>'
    )


def picture(rows: Sequence[Row], title: str) -> str:
    """Accuracy over visual tokens as an SVG file of its own, with a title and a legend.

    Its colours are in it.

    Raises:
        DataError: no row has visual tokens.
    """
    from mllm.eval.report import templates

    if not measured(rows, "tokens"):
        raise DataError(
            "nothing to plot: the results hold no visual tokens",
            argument="svg",
            given=title,
            expected="results on pictures, or .html, .md or .csv",
        )

    drawn = styles(rows)
    plot = str(pareto(rows, "tokens", drawn=drawn)).replace(
        "<svg ", f'<svg x="0" y="34" width="{WIDTH}" height="{HEIGHT}" ', 1
    )
    parts = [f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>', plot]
    shown = [(name, style) for name, style in drawn.items() if not style.back]
    for i, (name, style) in enumerate(shown):
        y = 70 + 24 * i
        sample = str(key(style)).replace("<svg ", f'<svg x="{WIDTH + 6}" y="{y}" ', 1)
        note = " (sanity)" if style.sanity else ""
        parts += [sample, f'<text x="{WIDTH + 48}" y="{y + 12}">{escape(name + note)}</text>']
    width, height, margin = WIDTH + 220, max(HEIGHT + 40, 90 + 24 * len(shown)), 10
    css = templates().get_template("plot.css").render()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} 0 {width} {height}" '
        f'font-family="system-ui, sans-serif"><style>{css}</style>'
        f'<rect x="{-margin}" width="{width}" height="{height}" fill="var(--paper)"/>'
        f"{''.join(parts)}</svg>\n"
    )


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
            _LEFT + share * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )


def _share(row: Row, task: str | None) -> float:
    right, n = row.tasks.get(task, (0, 0)) if task else (row.correct, row.n)
    return right / n if n else 0.0


def _describe(row: Row, task: str | None) -> str:
    right, n = row.tasks[task] if task else (row.correct, row.n)
    low, high = wilson(right, n) if task else row.interval
    at = "" if row.budget is None else f" at {row.budget}"
    said = [
        f"{row.name}{at}: {100 * right / n:.1f} % of {n} right ({100 * low:.1f} to "
        f"{100 * high:.1f})",
    ]
    if math.isfinite(row.visual_avg):
        said.append(f"{row.visual_avg:.1f} visual tokens")
    if math.isfinite(row.flops):
        said.append(f"{row.flops / 1e9:.3g} GFLOPs")
    if math.isfinite(row.kv_bytes):
        said.append(f"KV cache {row.kv_bytes / 2**20:.3g} MiB")
    if row.prefill_s is not None:
        said.append(f"{1e3 * row.prefill_s:.3g} ms to the first token")
    return ", ".join(said)


def _point(style: Style, at: tuple[float, float], text: str) -> str:
    shape = _shape(style.css, style.marker, *at)
    return f'<g class="dot"><title>{escape(text)}</title>{shape}</g>'


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


def _axes(frame: _Frame, x_title: str, y_title: str) -> str:
    parts = []
    for value in _ticks(*frame.y, log=False):
        x, y = frame.at(frame.x[0], value)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{x - 6:.1f}" y="{y + 4:.1f}">{value:g}</text>')
    for value in _ticks(*frame.x, log=frame.log):
        x, y = frame.at(value, frame.y[0])
        parts.append(f'<path class="tick" d="M{x:.1f} {y:.1f}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{y + 17:.1f}">{value:g}</text>')
    x, y = frame.at(frame.x[0], frame.y[0])
    parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle}" y="{HEIGHT - 6}">{escape(x_title)}</text>')
    half = (_TOP + HEIGHT - _BOTTOM) / 2
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
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
