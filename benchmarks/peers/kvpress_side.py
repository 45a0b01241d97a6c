"""kvpress's part of `kvpress.py`, run by the interpreter of an environment that has kvpress.

Reads what to do as JSON from stdin and writes what it measured as JSON to stdout. It knows nothing
of mllm: transformers builds the model, `with press(model)` compresses the cache of a prefill, and
decode steps go on from it outside of the press, as in kvpress's own readme.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from kvpress import SnapKVPress
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
)


def build(task: dict[str, Any]) -> Any:
    """The model of a shape, weights drawn with seed 0."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**task["vision"]),
        text_config=LlamaConfig(**task["text"]),
        image_token_id=task["text"]["vocab_size"] - 1,
    )
    dtype = getattr(torch, task["dtype"])
    return AutoModelForImageTextToText.from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    ).eval()


def draw(model: Any, task: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Noise pictures, then random words: one sample."""
    vision, image = task["vision"], model.config.image_token_id
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    ids = torch.randint(3, image, (1, task["visual"] + task["words"]))
    ids[:, 1 : 1 + task["visual"]] = image
    size = (task["visual"] // tokens, 3, vision["image_size"], vision["image_size"])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size).to(model.dtype),
    }


def prefilled(model: Any, inputs: dict[str, Any], press: Any) -> tuple[DynamicCache, float]:
    """The cache of a prefill, compressed if there is a press, and the seconds it took."""
    cache = DynamicCache()
    started = time.perf_counter()
    with contextlib.nullcontext() if press is None else press(model):
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, time.perf_counter() - started


def step(model: Any, cache: DynamicCache, position: int) -> float:
    """Seconds of one decode step; positions go on from the whole prompt."""
    where = torch.tensor([position])
    ids = torch.full((1, 1), 5)
    started = time.perf_counter()
    model(
        input_ids=ids, position_ids=where[None], cache_position=where, past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    model = build(task)
    inputs = draw(model, task)
    press = SnapKVPress(
        compression_ratio=1 - task["budget"], window_size=task["window"], kernel_size=task["kernel"]
    )
    prefilled(model, inputs, None)
    plain, plain_s = prefilled(model, inputs, None)
    small, small_s = prefilled(model, inputs, press)
    caches, held = (plain, small), []
    for cache in caches:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        held.append(sum(t.numel() * t.element_size() for t in tensors))
    seconds, position = [], inputs["input_ids"].shape[1]
    for pair in range(-2, task["pairs"]):
        took = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            took[which] = step(model, caches[which], position)
        position += 1
        if pair >= 0:
            seconds.append(took)
    json.dump(
        {
            "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
            "seconds": seconds,
            "prefill_s": [plain_s, small_s],
            "kv_bytes": held,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
