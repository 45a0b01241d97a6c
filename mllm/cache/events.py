"""Tells the cache methods of a plan what happens in a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mllm.cache.ops import KVCache
from mllm.compressors.base import CacheEvent

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun
    from mllm.patcher import Patched


class CacheEvents:
    """The events of one forward that has a cache.

    Within `generate()` several rows behind the prompt are candidates of assisted decoding. Nothing
    is decided by them until it is known which of them stay: their forward ends without an event,
    and `verify_end` comes before the next one.

    Args:
        run: the forward, its table made.
        prompt_length: logical length of the prompt, where generate() told it.
    """

    def __init__(self, run: DecoderRun, prompt_length: int | None) -> None:
        self.run = run
        past, rows = run.past_logical, run.full.valid.shape[1]
        turn = rows > 1 if prompt_length is None else past < prompt_length
        self.phase = "prefill" if turn or not past else "decode" if rows == 1 else "verify"
        certain = past + (1 if self.phase == "verify" else rows)
        if self.phase == "prefill" and prompt_length is not None:
            certain = min(certain, prompt_length)
        self.certain = certain
        run.cache.mllm.unverified = certain if certain < past + rows else None
        for layer in run.cache.layers:
            layer.journals = certain < past + rows

    @staticmethod
    def verified(patched: Patched, cache: Any) -> None:
        """Before a forward: `verify_end`, if the last one held candidates."""
        certain = cache.mllm.unverified
        if certain is None:
            return
        cache.mllm.unverified = None
        accepted = cache.get_seq_length() - certain
        for _, stage in patched.compressors:
            with torch.no_grad():
                stage.verify_end(
                    CacheEvent(patched.kv(cache), phase="verify", accepted=accepted, signals={})
                )

    def layer_end(self, layer: int) -> None:
        """A decoder layer has run."""
        if self.phase != "prefill":
            return
        self._tell("layer_end", layer)
        depth = len(self.run.patched.layers)
        for number, stage in self.run.patched.compressors:
            if stage.group and ((layer + 1) % stage.group == 0 or layer + 1 == depth):
                self._tell("group_end", layer, number)

    def forward_end(self) -> None:
        """All decoder layers have run."""
        if self.phase != "verify":
            self._tell("prefill_end" if self.phase == "prefill" else "decode_step")

    def _tell(self, name: str, layer: int | None = None, only: int | None = None) -> None:
        run = self.run
        ran = None if layer is None else layer + 1
        cache = KVCache(run.cache, run.patched.family, ran, self.certain)
        rows = self.certain - run.past_logical
        for number, stage in run.patched.compressors:
            if only is not None and number != only:
                continue
            signals = {
                name: value[..., : self.certain]
                for (of, name), value in run.captures.by_token.items()
                if of == number
            }
            event = CacheEvent(
                cache,
                phase=self.phase,
                layer=layer,
                prompt=run.prompt[:, :rows],
                visual=run.full.visual[:, :rows],
                start=run.past_logical,
                signals=signals,
            )
            with torch.no_grad():
                getattr(stage, name)(event)
            run.ran.add(number)
