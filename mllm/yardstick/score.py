"""Ask a model the questions of samples, greedily and in batches, and mark the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mllm.eval.scoring import is_correct
from mllm.loading import build_inputs
from mllm.yardstick.samples import prompt


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 10,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to each sample (of `mllm.yardstick.samples`), in order.

    Args:
        model: a vision-language model, patched or not.
        processor: its processor, with a chat template and left padding.
        samples: need `image` and `question`.
        batch_size: samples per `generate`.
        max_new_tokens: the longest yardstick answer takes 6 tokens of the embedded model.
        on_batch: called with the number of samples just done.
    """
    said: list[str] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = build_inputs(processor, [prompt(sample) for sample in part])
        inputs = inputs.to(model.device, dtype=model.dtype)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if on_batch:
            on_batch(len(part))
    return said


def score(
    model: Any, processor: Any, samples: Sequence[dict[str, Any]], **options: Any
) -> list[bool]:
    """Whether each answer is right by its sample's metric; `options` as for `answers`."""
    said = answers(model, processor, samples, **options)
    return [
        is_correct(text, sample["answer"], sample["metric"])
        for text, sample in zip(said, samples, strict=True)
    ]
