"""How fast a run is: tokens, arithmetic and memory since the last log."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mllm import flops
from mllm.models import resolve as resolve_family
from mllm.training.features import FeatureCache

T = TypeVar("T")

# Dense bf16 products per second, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "4090": 165e12,
}


def peak_flops() -> float | None:
    """Dense bf16 FLOPs per second of the GPU; None where they are not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def forward_flops(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """FLOPs of an unpatched forward of a batch: in the tower and projector, and in the decoder."""
    family = resolve_family(model)
    lengths = inputs["attention_mask"].sum(1).tolist()
    llm = sum(
        len(family.layers) * flops.decoder_layer(family.text_config, n, n)
        + flops.lm_head(family.text_config, n)
        for n in lengths
    )
    vision = 0.0
    for kind in (family, family.of_videos()):
        if kind is not None and kind.pixels in inputs:
            vision += sum(kind.vision_flops(each, each.cells) for each in kind.layouts(inputs))
    return vision, llm


class Meter:
    """Counts between two logs.

    MFU is model FLOPs: the forward as the plan leaves it, twice that for the gradients of the
    decoder (once where its weights are frozen: LoRA), and once for a frozen tower. What is computed
    again under gradient checkpointing is not counted.

    Args:
        model: without adapters.
        patched: the plan at work, if any.
        frozen: whether the weights of the decoder, and of the tower, are frozen.
        features: what saves runs of the tower, if anything.
    """

    def __init__(
        self,
        model: nn.Module,
        patched: Any,
        frozen: tuple[bool, bool],
        features: FeatureCache | None = None,
    ) -> None:
        self.model, self.patched, self.frozen, self.features = model, patched, frozen, features
        self.peak = peak_flops()
        self._start()

    def _start(self) -> None:
        self.began, self.tokens, self.batch = time.perf_counter(), 0, None
        self.waited = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waiting."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    def count(self, inputs: dict[str, Tensor]) -> None:
        """One forward and backward pass of this process."""
        self.tokens = self.tokens + inputs["attention_mask"].sum()
        self.batch = inputs

    def read(self, processes: int) -> dict[str, float]:
        """Rows for the log, and a new start; nothing before the first batch.

        Returns:
            `tokens_per_second` of all processes (visual tokens as the processor gives them),
            `tflops` per device and second, `mfu` where the device's peak is known, `memory_gib`:
            the highest so far, of the device or of the process; `data_wait`: the share of the time
            in which this process waited for data. `feature_hits`: the share of
            pictures that the tower did not have to see, with a cache.
        """
        if self.batch is None:
            return {}
        tokens, seconds = float(self.tokens), time.perf_counter() - self.began
        vision, llm = forward_flops(self.model, self.batch)
        if self.patched is not None and (data := self.patched.ledger.as_dict())["batch"]:
            vision = float(sum(data["vision_flops"]))
            llm = float(sum(data["prefill_flops"])) - vision
        hits = self._hits()
        vision *= 1 - (hits or 0)
        decoder, tower = self.frozen
        step = llm * (2 if decoder else 3) + vision * (1 if tower else 3)
        # The newest batch stands for all since the last log.
        rate = step * tokens / float(self.batch["attention_mask"].sum()) / seconds
        found = {
            "tokens_per_second": float(f"{tokens * processes / seconds:.5g}"),
            "tflops": float(f"{rate / 1e12:.5g}"),
            "memory_gib": round(_memory() / 2**30, 3),
            "data_wait": round(self.waited / seconds, 4),
        }
        if hits is not None:
            found["feature_hits"] = round(hits, 4)
        if self.peak:
            found["mfu"] = round(rate / self.peak, 4)
        self._start()
        return found

    def _hits(self) -> float | None:
        cache = self.features
        if cache is None or not cache.pictures:
            return None
        share, cache.hits, cache.pictures = cache.hits / cache.pictures, 0, 0
        return share


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
