"""Our samples as lmms-eval tasks: made on the spot instead of a downloaded data set."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from mllm.eval import sources
from mllm.eval.scoring import is_correct
from mllm.loading import chat_content
from mllm.yardstick import prompt

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
    """One task of `mllm.eval.sources`; `dataset_kwargs` of its YAML are `n` (at most) and `style`.

    Yardstick tasks have the prefix `yardstick_` here, so as not to claim names like `color`.
    """

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
    n = sources.at_most(task, split, n)
    return Docs(
        {k: v for k, v in sample.items() if k not in DROPPED}
        | {"image": [_png(image) for image in prompt(sample)[0]]}
        for sample in sources.samples(task, split=split, n=n, style=style)
    )


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of the question, in its order."""
    return doc["image"]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The user's turn, with every picture where the question has it."""
    pictures = iter(doc["image"])
    content = [
        {"type": "image", "url": next(pictures)} if piece["type"] == "image" else piece
        for piece in chat_content(len(doc["image"]), doc["question"])
    ]
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score of one answer, under the name of the metric."""
    return {"exact_match": float(is_correct(results[0], doc["answer"], doc["metric"]))}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _decoded(doc: dict[str, Any]) -> dict[str, Any]:
    if "image" not in doc:
        return doc
    return {**doc, "image": [Image.open(io.BytesIO(png)).convert("RGB") for png in doc["image"]]}
