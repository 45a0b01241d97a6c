"""The yardstick as lmms-eval tasks: samples drawn on the spot instead of a downloaded data set."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from mllm.eval.scoring import is_correct
from mllm.yardstick import prompt, samples
from mllm.yardstick.questions import PLACEHOLDER

PREFIX = "yardstick_"
# Where things are is no input of the model.
DROPPED = ("objects", "answer_boxes", "answer_picture")


class Docs(list):
    """Samples of one split, as the little of `datasets.Dataset` that lmms-eval asks for.

    Images are kept as PNG bytes (500 bare pictures are 170 MB) and decoded on access.
    """

    @property
    def features(self) -> dict[str, None]:
        """Column names; the types are not used."""
        return dict.fromkeys(super().__getitem__(0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _decoded(super().__getitem__(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_decoded, super().__iter__())


class YardstickTask(ConfigurableMessagesTask):
    """One yardstick task; `dataset_kwargs` of its YAML are `n` and `style` of `samples()`."""

    def __init__(self, config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = {key: value for key, value in (config or {}).items() if key != "class"}
        super().__init__(config=config, **kwargs)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Draw the samples: what a data set's download is for other tasks."""
        split = self.config.test_split
        name = self.config.task.removeprefix(PREFIX)
        docs = _draw(name, split, **dataset_kwargs)
        self.dataset = {split: docs}
        self.dataset_no_image = {
            split: Docs(
                {k: v for k, v in doc.items() if k != "image"} for doc in list.__iter__(docs)
            )
        }


@functools.lru_cache(maxsize=32)
def _draw(task: str, split: str, n: int, style: str) -> Docs:
    """The samples, once per process: several plans are evaluated on the same ones."""
    return Docs(
        {k: v for k, v in sample.items() if k not in DROPPED} | {"image": _png(sample["image"])}
        for sample in samples(task, split=split, n=n, style=style)
    )


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of the prompt, in order."""
    return prompt(doc)[0]


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict]:
    """One user turn; pictures stand where the question has placeholders, else before it."""
    images, text = prompt(doc)
    parts = text.split(PLACEHOLDER) if len(images) > 1 else ["", text]
    content: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if number:
            content.append({"type": "image", "url": images[number - 1]})
        if part:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score of one answer, under the name of the metric."""
    return {"exact_match": float(is_correct(results[0], doc["answer"], doc["metric"]))}


def _png(image: Image.Image | list[Image.Image]) -> bytes | list[bytes]:
    if isinstance(image, list):
        return [_png(one) for one in image]
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _image(png: bytes | list[bytes]) -> Image.Image | list[Image.Image]:
    if isinstance(png, list):
        return [_image(one) for one in png]
    return Image.open(io.BytesIO(png)).convert("RGB")


def _decoded(doc: dict[str, Any]) -> dict[str, Any]:
    return {**doc, "image": _image(doc["image"])} if "image" in doc else doc
