"""Tiles of pictures, for plans that show a model finer views of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.errors import DataError


def tiled(processor: Any, images: Sequence[Any], grid: tuple[int, int] = (2, 2)) -> dict[str, Any]:
    """What a model under `deepstack` is given beside the pictures themselves.

    ```python
    from mllm.views import tiled

    inputs = processor(images=images, text=text, return_tensors="pt")
    model.generate(**inputs, **tiled(processor, images))
    ```

    Every tile is brought to the size of its picture, so that it has as many visual tokens. A
    processor that crops pictures to a square cuts off of each tile what it cuts off of a picture:
    give it square ones.

    Args:
        processor: the model's processor; its image processor must not cut pictures up.
        images: pictures of PIL, in the order of the prompts.
        grid: rows and columns of tiles, as the plan says.

    Returns:
        The image processor's tensors for the tiles, by names that begin with `view_`.

    Raises:
        DataError: there are no pictures, or the grid is none.
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
        image, high, wide = image.convert("RGB"), image.height / rows, image.width / cols
        tiles += [
            image.resize(image.size, box=(c * wide, r * high, (c + 1) * wide, (r + 1) * high))
            for r in range(rows)
            for c in range(cols)
        ]
    made = processor.image_processor(images=tiles, return_tensors="pt")
    return {f"view_{name}": value for name, value in made.items()}
