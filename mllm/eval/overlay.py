"""Draw what became of each visual token over the picture that the model saw.

Nothing here runs a model: the inputs are a picture, the grid of its tokens and the index tensors
of a ledger (`ledger.kept("llm")`, `ledger.kept(layer)`, `ledger.merged_into`).

A token is told by brightness and line first and by colour second, so that the drawing can be read
without colour vision: kept tokens show the picture as it is inside a white border; merged ones are
tinted, with a line to the token that took them in; dropped ones are grey with a stroke; tokens that
an earlier stage had already taken away are nearly black.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours for colour-blind readers, without black (kept borders) and the yellow that
# a white border hides.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
INK, PAPER, QUIET = "#1b1d22", "#ffffff", "#5b616b"
_SMOOTH = 2  # panels are drawn this many times larger, then reduced: PIL's lines are not smooth


class Fate(IntEnum):
    """What happened to one visual token up to a point of the model."""

    KEPT = 0
    MERGED = 1
    DROPPED = 2
    GONE = 3


@dataclass
class Panel:
    """One picture of a figure, with the sentence above it.

    Attributes:
        title: one short line.
        image: the picture.
        fates: the kinds of token in it, for the legend.
    """

    title: str
    image: Image.Image
    fates: tuple[Fate, ...] = ()


def as_seen(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture behind normalised pixel values: resized and cropped as the model saw it.

    Args:
        pixels: float tensor `[3, height, width]` from an image processor.
        mean: its `image_mean`.
        std: its `image_std`.
    """
    values = np.asarray(pixels.detach().cpu().float())
    values = values * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
    return Image.fromarray((values.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def fates(
    tokens: int,
    kept: Iterable[int],
    *,
    merged_into: Iterable[int] | None = None,
    before: Iterable[int] | None = None,
) -> np.ndarray:
    """The `Fate` of every token.

    Args:
        tokens: visual tokens of the picture at the start.
        kept: indices that go on from here.
        merged_into: per token the index that took it in (its own: kept; -1: dropped; -2: one in
            another picture).
        before: indices that had come this far; None means all.

    Returns:
        int array `[tokens]`.

    Raises:
        ValueError: an index lies outside the picture.
    """
    kept, before = _indices(kept, tokens), None if before is None else _indices(before, tokens)
    result = np.full(tokens, int(Fate.DROPPED))
    if merged_into is not None:
        into = np.asarray([int(i) for i in merged_into])
        result[(into != -1) & (into != np.arange(tokens))] = Fate.MERGED
    if before is not None:
        result[np.setdiff1d(np.arange(tokens), before)] = Fate.GONE
    result[kept] = Fate.KEPT
    return result


def draw_tokens(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Iterable[int],
    *,
    merged_into: Iterable[int] | None = None,
    before: Iterable[int] | None = None,
    width: int = 504,
) -> tuple[Image.Image, tuple[Fate, ...]]:
    """Draw one stage over the picture.

    Args:
        image: the picture as the model saw it.
        grid: (rows, columns) of its visual tokens.
        kept: indices (row by row) of the tokens that go on.
        merged_into: see `fates`; a line goes from each merged token to the one that took it in.
        before: see `fates`.
        width: of the result in pixels; the height follows the picture.

    Returns:
        The drawing, and the fates that occur in it.
    """
    rows, columns = grid
    into = None if merged_into is None else [int(i) for i in merged_into]
    fate = fates(rows * columns, kept, merged_into=into, before=before)
    size = (width * _SMOOTH, round(width * image.height / image.width) * _SMOOTH)
    base = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    xs = np.linspace(0, size[0], columns + 1).round().astype(int)
    ys = np.linspace(0, size[1], rows + 1).round().astype(int)
    boxes = [
        (xs[c], ys[r], xs[c + 1] - 1, ys[r + 1] - 1) for r in range(rows) for c in range(columns)
    ]

    pixels = np.asarray(base).astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    level = np.repeat(np.repeat(fate.reshape(rows, columns), np.diff(ys), 0), np.diff(xs), 1)
    for kind, strength, floor in (
        (Fate.MERGED, 0.40, 26),
        (Fate.DROPPED, 0.26, 30),
        (Fate.GONE, 0.05, 10),
    ):
        where = level == kind
        pixels[where] = (grey[where] * strength + floor)[:, None]
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas, "RGBA")
    step = min(size[0] // columns, size[1] // rows)
    line = max(2, step // 14)

    for i in np.flatnonzero(fate == Fate.DROPPED):
        x0, y0, x1, y1 = boxes[i]
        draw.line((x0 + step // 3, y1 - step // 3, x1 - step // 3, y0 + step // 3), "#8a909a", line)
    targets: dict[int, str] = {}
    if into is not None:
        merged = np.flatnonzero(fate == Fate.MERGED)
        for target in sorted({into[i] for i in merged if into[i] >= 0}):
            targets[target] = COLOURS[len(targets) % len(COLOURS)]
        for i in merged:
            draw.rectangle(tuple(boxes[i]), fill=targets.get(into[i], QUIET) + "59")
        for i in merged:
            if into[i] < 0:
                continue
            draw.line((*_centre(boxes[i]), *_centre(boxes[into[i]])), targets[into[i]] + "99", line)
        for i in np.flatnonzero(fate == Fate.KEPT):
            x0, y0, x1, y1 = boxes[i]
            canvas.paste(base.crop((x0, y0, x1 + 1, y1 + 1)), (x0, y0))
    _borders(draw, fate.reshape(rows, columns) == Fate.KEPT, xs, ys, line)
    for target, colour in targets.items():
        if fate[target] == Fate.KEPT:
            draw.rectangle(tuple(boxes[target]), outline=INK, width=line * 4)
            draw.rectangle(tuple(boxes[target]), outline=colour, width=line * 3)
    drawing = canvas.reduce(_SMOOTH)
    return drawing, tuple(Fate(kind) for kind in np.unique(fate))


def figure(panels: Sequence[Panel], caption: Sequence[str], *, columns: int = 3) -> Image.Image:
    """Set panels side by side over a legend and a caption.

    Args:
        panels: at least one; all are given the width of the first.
        caption: paragraphs under the pictures.
        columns: panels in a row at most.
    """
    gap, title_font, text_font = 16, ImageFont.load_default(17), ImageFont.load_default(16)
    columns = min(columns, len(panels))
    width, height = panels[0].image.size
    titles = [_wrap(panel.title, title_font, width) for panel in panels]
    head = max(len(lines) for lines in titles) * 22 + 6
    full = max(columns * (width + gap) + gap, 520)
    rows = -(-len(panels) // columns)
    paragraphs = [line for text in caption for line in _wrap(text, text_font, full - 2 * gap)]
    legend = _legend(sorted({fate for panel in panels for fate in panel.fates}), full - 2 * gap)
    body = rows * (head + height + gap) + gap
    foot = (legend.height + gap if legend else 0) + len(paragraphs) * 22 + gap
    sheet = Image.new("RGB", (full, body + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (panel, lines) in enumerate(zip(panels, titles, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (head + height + gap)
        for j, text in enumerate(lines):
            draw.text((x, y + j * 22), text, INK, title_font)
        sheet.paste(panel.image.resize((width, height)), (x, y + head))
    y = body
    if legend:
        sheet.paste(legend, (gap, y))
        y += legend.height + gap
    for j, text in enumerate(paragraphs):
        draw.text((gap, y + j * 22), text, INK, text_font)
    return sheet


def _indices(values: Iterable[int], tokens: int) -> np.ndarray:
    indices = np.asarray([int(i) for i in values], dtype=np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= tokens):
        raise ValueError(f"token indices go from 0 to {tokens - 1}, got {indices.max()}")
    return indices


def _centre(box: Sequence[int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _borders(
    draw: ImageDraw.ImageDraw, kept: np.ndarray, xs: np.ndarray, ys: np.ndarray, line: int
) -> None:
    """White lines around every region of kept tokens, faint ones between the tokens inside it."""
    padded = np.pad(kept, 1)
    edges = []
    for r, c in np.argwhere(kept):
        corners = (xs[c], ys[r], xs[c + 1], ys[r + 1])
        sides = (
            (padded[r, c + 1], (corners[0], corners[1], corners[2], corners[1])),
            (padded[r + 2, c + 1], (corners[0], corners[3], corners[2], corners[3])),
            (padded[r + 1, c], (corners[0], corners[1], corners[0], corners[3])),
            (padded[r + 1, c + 2], (corners[2], corners[1], corners[2], corners[3])),
        )
        edges += sides
    for inside, side in edges:
        if inside:
            draw.line(side, "#ffffff40", max(1, line // 2))
    for colour, width in ((INK, line * 3), (PAPER, line * 2)):
        for inside, side in edges:
            if not inside:
                draw.line(side, colour, width)


_LEGEND = {
    Fate.KEPT: "kept",
    Fate.MERGED: "merged along its line into the token with a border of its colour",
    Fate.DROPPED: "dropped here",
    Fate.GONE: "gone before",
}


def _legend(kinds: Sequence[Fate], width: int) -> Image.Image | None:
    """Swatches drawn by `draw_tokens` itself, so that the legend cannot differ from the panels."""
    if not kinds:
        return None
    font, swatch = ImageFont.load_default(16), 26
    picture = Image.new("RGB", (60, 60), "#7fb4d8")
    into = {Fate.MERGED: ([1], [1, 1])}
    sheet = Image.new("RGB", (width, (swatch + 8) * len(kinds)), PAPER)
    x = y = 0
    for kind in kinds:
        kept, merged = into.get(kind, ([0], None))
        if kind is Fate.MERGED:
            sample, _ = draw_tokens(picture, (1, 2), kept, merged_into=merged, width=swatch * 2)
        elif kind is Fate.KEPT:
            sample, _ = draw_tokens(picture, (3, 3), [4], before=[4], width=swatch * 2)
            sample = sample.crop((swatch // 2, swatch // 2, swatch * 3 // 2, swatch * 3 // 2))
        else:
            before = [] if kind is Fate.GONE else None
            sample, _ = draw_tokens(picture, (1, 1), [], before=before, width=swatch)
        sample = sample.resize((swatch * (2 if kind is Fate.MERGED else 1), swatch))
        needed = sample.width + 8 + round(font.getlength(_LEGEND[kind])) + 24
        if x and x + needed > width:
            x, y = 0, y + swatch + 8
        sheet.paste(sample, (x, y))
        ImageDraw.Draw(sheet).text((x + sample.width + 8, y + 3), _LEGEND[kind], QUIET, font)
        x += needed
    return sheet.crop((0, 0, width, y + swatch))


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a paragraph into lines no wider than `width`, inside words where it must be."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
