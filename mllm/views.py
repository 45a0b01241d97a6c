"""Tiles of pictures, for plans that show a model finer views of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.errors import DataError

#: What the names of arguments begin with that have the tiles of pictures.
VIEW = "view_"


def with_tiles(
    inputs: Any, processor: Any, images: Sequence[Any], grid: tuple[int, int] | None
) -> Any:
    """A batch with the tiles of its pictures, if a plan asks for them.

    ```python
    inputs = processor(images=images, text=text, return_tensors="pt")
    with mllm.patch(model, "deepstack") as patched:
        model.generate(**with_tiles(inputs, processor, images, patched.tiles))
    ```

    Args:
        inputs: what the processor made of prompts and pictures; it is not changed.
        processor, images: of :func:`tiled`.
        grid: rows and columns of tiles; None is none.

    Raises:
        DataError: as :func:`tiled` does.
    """
    if grid is None or not images:
        return inputs
    return type(inputs)({**inputs, **tiled(processor, images, grid)})


def tiled(processor: Any, images: Sequence[Any], grid: tuple[int, int] = (2, 2)) -> dict[str, Any]:
    """What a model under `deepstack` is given beside the pictures themselves.

    Every tile is brought to the size of its picture, so that it has as many visual tokens. Where
    the processor crops pictures, tiles are cut from what it leaves of them.

    Args:
        processor: the model's processor; its image processor must not cut pictures up.
        images: pictures of PIL, in the order of the prompts.
        grid: rows and columns of tiles, as the plan says.

    Returns:
        The image processor's tensors for the tiles, by names that begin with `view_`.

    Raises:
        DataError: there are no pictures, the grid is none, or the image processor cuts tiles up.
    """
    rows, cols = grid
    if not images or rows < 1 or cols < 1:
        raise DataError(
            "tiles are cut from pictures, in rows and columns",
            argument="images" if not images else "grid",
            given=len(images) if not images else grid,
            expected="pictures of PIL, and a grid like (2, 2)",
        )
    tiles = []
    for image in images:
        left, top, width, height = _seen(image.size, processor.image_processor)
        size, wide, high = (round(width), round(height)), width / cols, height / rows
        corners = [(left + c * wide, top + r * high) for r in range(rows) for c in range(cols)]
        image = image.convert("RGB")
        tiles += [image.resize(size, box=(x, y, x + wide, y + high)) for x, y in corners]
    made = processor.image_processor(images=tiles, return_tensors="pt")
    pixels = made["pixel_values"]
    if getattr(pixels, "ndim", 0) > 2 and pixels.shape[:-3].numel() != len(tiles):
        raise DataError(
            f"{type(processor.image_processor).__name__} cuts pictures up, and so their tiles: "
            f"{len(tiles)} became {pixels.shape[:-3].numel()}",
            argument="processor",
            given=list(pixels.shape),
            expected="an image processor that makes one picture of each",
        )
    return {f"{VIEW}{name}": value for name, value in made.items()}


def _seen(size: tuple[int, int], processor: Any) -> tuple[float, float, float, float]:
    """Left, top, width and height of what an image processor leaves of a picture."""
    wide, high = size
    crops = getattr(processor, "do_center_crop", False)
    edge = processor.size.get("shortest_edge") if crops else None
    if not edge:
        return 0.0, 0.0, wide, high
    scale, crop = min(size) / edge, processor.crop_size
    width, height = min(wide, crop["width"] * scale), min(high, crop["height"] * scale)
    return (wide - width) / 2, (high - height) / 2, width, height
