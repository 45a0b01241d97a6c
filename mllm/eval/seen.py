"""What a ledger says of every picture: its grids of tokens, and what each step leaves of them.

Nothing here runs a model. A *view* is one grid of visual tokens: a picture, a tile of one, or a
frame; models that see a picture as tiles have several of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import PlanError
from mllm.eval import overlay
from mllm.eval.overlay import Panel
from mllm.tokens import Layout


@dataclass(frozen=True)
class View:
    """One grid of tokens.

    Attributes:
        name: such as `frame 3`; empty where there is one view only.
        picture: ordinal of the picture or video that it belongs to.
        grid: (rows, columns).
        tokens: int64 `[rows * columns]`, row by row: indices among the sample's visual tokens.
    """

    name: str
    picture: int
    grid: tuple[int, int]
    tokens: np.ndarray

    def kept(self, indices: np.ndarray) -> np.ndarray:
        """Cells of this view whose tokens are among `indices`."""
        return np.flatnonzero(np.isin(self.tokens, indices))

    def merged_into(self, into: np.ndarray) -> np.ndarray:
        """Per cell the cell of its target, -1 where it was dropped, -2 in another view."""
        place = np.full(len(into), -2)
        place[self.tokens] = np.arange(len(self.tokens))
        target = into[self.tokens]
        return np.where(target < 0, -1, place[np.maximum(target, 0)])


@dataclass(frozen=True)
class Step:
    """What goes on from one place of the model.

    Attributes:
        layer: decoder layer that the tokens enter; None is the language model's input.
        kept: indices of the visual tokens that do, sorted.
        before: those that had come this far; None is all.
        into: what merged what, per visual token (`ledger.merged_into`); None is nothing.
    """

    layer: int | None
    kept: np.ndarray
    before: np.ndarray | None
    into: np.ndarray | None

    @property
    def name(self) -> str:
        """Where it is."""
        return "Entering the LLM" if self.layer is None else f"Entering decoder layer {self.layer}"


def views(layouts: Sequence[Layout]) -> list[View]:
    """The views of a sample.

    Args:
        layouts: of its pictures and videos (`ledger.layouts`), in the order of the prompt.
    """
    found, start = [], 0
    for number, layout in enumerate(layouts):
        places, several = layout.places, len(layout.grids) > 1
        ordinal = (places.frame if layout.video else places.tile).numpy()
        cells = ~places.newline.numpy()
        for i, grid in enumerate(layout.grids):
            words = [f"picture {number + 1}"] * (len(layouts) > 1)
            if several and layout.video:
                words.append(f"frame {i + 1}")
            elif several:
                words.append("tiles" if i else "overview")
            tokens = start + np.flatnonzero((ordinal == i) & cells)
            found.append(View(", ".join(words), number, grid, tokens))
        start += layout.tokens
    return found


def steps(ledger: Any, sample: int = 0) -> list[Step]:
    """The places of the model at which visual tokens go, first to last.

    The first is the language model's input, also where all tokens reach it.

    Args:
        ledger: of a prefill.
        sample: of the batch.
    """
    total = sum(layout.tokens for layout in ledger.layouts[sample])
    kept = ledger.kept("llm")[sample].numpy()
    into = ledger.merged_into[sample].numpy() if len(kept) < total else None
    found = [Step(None, kept, None, into)]
    for layer in range(len(ledger.as_dict()["layers"])):
        now = ledger.kept(layer)[sample].numpy()
        if not np.array_equal(now, found[-1].kept):
            found.append(Step(layer, now, found[-1].kept, None))
    return found


def pictures(
    processor: Any, inputs: Mapping[str, Any], given: Sequence[Any], layouts: Sequence[Layout]
) -> list[Image.Image]:
    """The picture behind each view of one sample.

    What the model was given, where its pixels are one picture for each view; else the original,
    stretched over the grid, where that is how the family's grid lies: Qwen-VL's packed patches,
    the tiled view of LLaVA-NeXT.

    Args:
        processor: of the model.
        inputs: its output for this sample alone.
        given: the original pictures; a video as the list of its frames.
        layouts: of these.

    Raises:
        PlanError: a model whose views lie otherwise.
    """
    there = views(layouts)
    for name, part in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        pixels = inputs.get(name)
        shape = getattr(processor, f"{part}_processor", None)
        mean, std = getattr(shape, "image_mean", None), getattr(shape, "image_std", None)
        if pixels is None or mean is None or pixels.dim() not in (4, 5):
            continue
        each = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
        if len(each) != len(there) or any(layout.tiling for layout in layouts):
            continue
        sizes = inputs.get("image_sizes")  # of pictures that were padded to the largest
        if sizes is not None and len(sizes) == len(each):
            each = [x[:, :h, :w] for x, (h, w) in zip(each, sizes.tolist(), strict=True)]
        return [overlay.as_seen(x, mean, std) for x in each]
    if len(given) == len(layouts) and (
        inputs.get("image_grid_thw") is not None
        or inputs.get("video_grid_thw") is not None
        or any(layout.tiling for layout in layouts)
    ):
        found, counts = [], [len(layout.grids) for layout in layouts]
        for original, count in zip(given, counts, strict=True):
            if isinstance(original, list):
                found += [original[i * len(original) // count] for i in range(count)]
            else:
                found += [original] * count
        return found
    raise PlanError(
        f"{type(processor).__name__} cuts pictures in a way that cannot be drawn",
        argument="model",
        given=[layout.grids for layout in layouts],
        expected="a model that sees pictures whole, as LLaVA 1.5, LLaVA-NeXT, Qwen-VL or Gemma 3; "
        "the kept tokens of others are in patched.ledger.kept(layer)",
    )


def panels(
    images: Sequence[Image.Image],
    ledger: Any,
    *,
    width: int = 504,
    there: Sequence[View] | None = None,
) -> list[Panel]:
    """The panels of one answer: the views, after the pre-LLM stage, and after each later cut.

    Args:
        images: one for each view of the first sample.
        ledger: of a prefill.
        width: of one panel in pixels.
        there: the views, where they have other names than those of :func:`views`.
    """
    there = views(ledger.layouts[0]) if there is None else there
    made = []
    for view, image in zip(there, images, strict=True):
        height = round(width * image.height / image.width)
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        tokens = f"{len(view.tokens)} visual tokens"
        made.append(Panel(_titled(view, f"As the model sees it: {tokens}"), small))
    for step in steps(ledger):
        for view, image in zip(there, images, strict=True):
            if not np.array_equal(view.kept(step.kept), _arrived(view, step)):
                made.append(panel(view, image, step, width=width))
    return made


def panel(view: View, image: Image.Image, step: Step, *, width: int = 504) -> Panel:
    """One view after one step."""
    drawing, fates = overlay.draw_tokens(
        image,
        view.grid,
        view.kept(step.kept),
        merged_into=None if step.into is None else view.merged_into(step.into),
        before=None if step.before is None else view.kept(step.before),
        width=width,
    )
    title = f"{step.name}: {len(view.kept(step.kept))} of {len(_arrived(view, step))}"
    return Panel(_titled(view, title), drawing, fates)


def _arrived(view: View, step: Step) -> np.ndarray:
    """Cells of a view whose tokens had come as far as a step."""
    return np.arange(len(view.tokens)) if step.before is None else view.kept(step.before)


def _titled(view: View, title: str) -> str:
    return f"{view.name.capitalize()}: {title[0].lower() + title[1:]}" if view.name else title
