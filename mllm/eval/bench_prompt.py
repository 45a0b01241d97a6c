"""A long prompt that is read once, and that any cache method can then have read."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import mllm
from mllm import attention, compat
from mllm.cache import CacheMark, KVCache
from mllm.compressors.base import AttentionRows, CacheCompressor, CacheEvent, ColumnMass
from mllm.eval import bench
from mllm.eval.bench_shapes import Inputs
from mllm.models import resolve
from mllm.plan import MethodInfo


@dataclass
class _Recorder(CacheCompressor):
    """Keeps what cache methods are told of a prompt, and drops nothing.

    `signals` are what it reads; events are kept by layer, the end of the prefill under None, their
    signals in host memory.
    """

    info = MethodInfo(name="record", stage="cache")
    signals: ClassVar[tuple] = ()
    draws = True  # so that events have seeds for methods that do

    def reads(self) -> dict[str, AttentionRows | ColumnMass]:
        return {str(i): signal for i, signal in enumerate(self.signals)}

    def layer_end(self, event: CacheEvent) -> None:
        started = now(event.cache.cache)
        signals = {name: x.cpu() for name, x in event.signals.items()}
        self.events[event.layer] = dataclasses.replace(event, signals=signals)
        self.seconds += now(event.cache.cache) - started

    def prefill_end(self, event: CacheEvent) -> None:
        self.layer_end(event)


@dataclass
class Prompt:
    """A prompt that was read: the full cache, and what methods are told of it.

    Attributes:
        cache: the full cache.
        signals: what was read.
        events: by layer; under None the end of the prefill.
        inputs: what was read from.
        prefill_s: seconds of each prefill without the reading of signals.
        read_s: float64 `[prefills, signals, layers]`, seconds of reading each signal.
    """

    cache: Any
    signals: tuple[AttentionRows | ColumnMass, ...]
    events: dict[int | None, CacheEvent]
    inputs: Inputs
    prefill_s: np.ndarray
    read_s: np.ndarray

    @classmethod
    def read(
        cls,
        base: Any,
        inputs: Inputs,
        plans: Any,
        pairs: int,
        on_prefill: Callable[[int, int], Any] | None = None,
    ) -> Prompt:
        """Read a prompt, several times where the layers of one prefill are fewer than `pairs`.

        Args:
            base: the unpatched model.
            inputs: a batch.
            plans: lists of stages whose signals are to be read.
            pairs: (layer, prefill) pairs to time at least.
            on_prefill: told how many prefills are done, of how many.
        """
        model = bench.twin(base)
        recorder = _Recorder()
        recorder.signals = _distinct(x for plan in plans for s in plan for x in s.reads().values())
        depth = len(resolve(base).layers)
        prefills = math.ceil(pairs / depth)
        seconds = np.zeros(prefills)
        read = np.zeros((prefills, len(recorder.signals), depth))
        with mllm.patch(model, [recorder]) as patched:
            for turn in range(prefills):
                recorder.events, recorder.seconds = {}, 0.0  # lets the cache of the last one go
                seconds[turn], cache = _timed_reading(patched, recorder, inputs, read[turn])
                if on_prefill is not None:
                    on_prefill(turn + 1, prefills)
        return cls(cache, recorder.signals, recorder.events, inputs, seconds, read)

    def share(self, patched: Any) -> Any:
        """A cache of the patched model's that holds the prompt, in the same storage."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for own, layer in zip(cache.layers, self.cache.layers, strict=True):
            own.restore(layer.state())
        mark = patched.mark
        cache.mllm = CacheMark(
            mark.config_sha256, mark.plan_sha256, carried=dict(self.cache.mllm.carried)
        )
        return cache

    def unpatched(self, base: Any) -> Any:
        """A cache of transformers' own that holds the prompt, for the unpatched model."""
        cache = compat.dynamic_cache(base.get_decoder())
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def told(self, patched: Any, cache: Any) -> np.ndarray:
        """Tell the stages of a plan what happened to `cache`: float64 `[layers]`, their seconds.

        What they did when all layers, or those of a group, had run counts in equal parts.
        """
        stages = [stage for _, stage in patched.compressors]
        depth = len(self.cache.layers)
        seconds = np.zeros(depth)
        for layer in (*range(depth), None):
            ran = KVCache(cache, patched.family, None if layer is None else layer + 1)
            for stage in stages:
                event = self._event(stage, layer, ran)
                started = now(cache)
                if layer is None:
                    stage.prefill_end(event)
                    seconds += (now(cache) - started) / depth
                    continue
                stage.layer_end(event)
                seconds[layer] += now(cache) - started
                if stage.group and ((layer + 1) % stage.group == 0 or layer + 1 == depth):
                    first, started = layer - layer % stage.group, now(cache)
                    stage.group_end(event)
                    seconds[first : layer + 1] += (now(cache) - started) / (layer + 1 - first)
        return seconds

    def reading(self, stages: Sequence[CacheCompressor]) -> np.ndarray:
        """Seconds that reading the signals of some stages took: float64 `[prefills, layers]`."""
        which = [self._number(x) for stage in stages for x in stage.reads().values()]
        return self.read_s[:, which].sum(1)

    def _number(self, signal: Any) -> int:
        return [_named(x) for x in self.signals].index(_named(signal))

    def _event(self, stage: CacheCompressor, layer: int | None, cache: KVCache) -> CacheEvent:
        event = self.events[layer]
        device = event.valid.device
        signals: dict[Any, Tensor] = {}
        for name, signal in stage.reads().items():
            number = str(self._number(signal))
            for key, value in event.signals.items():
                if key == number:
                    signals[name] = value.to(device)
                elif isinstance(key, tuple) and key[0] == number:
                    signals[name, key[1]] = value.to(device)
        return dataclasses.replace(event, cache=cache, signals=signals, notes=[], costs=[])


def _distinct(signals: Iterable[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    for signal in signals:
        if _named(signal) not in map(_named, found):
            found.append(signal)
    return tuple(found)


def _named(signal: Any) -> tuple:
    """Equal for equal signals; rows chosen by a method are those of any equal stage."""
    chooser = getattr(signal, "rows", None)
    if not isinstance(chooser, types.MethodType):
        return (signal,)
    return dataclasses.replace(signal, rows="last"), chooser.__func__, chooser.__self__


def now(cache: Any) -> float:
    """Seconds; what was asked of a GPU before is done."""
    return _seconds(cache.layers[0].device)


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed_reading(
    patched: Any, recorder: _Recorder, inputs: Inputs, read: np.ndarray
) -> tuple[float, Any]:
    """One prefill: its seconds without recording, the cache; `read` is filled with the taps'."""
    model = patched.model
    place = {patched.family.attention(i): i for i in range(len(patched.layers))}

    def timed(tap: Callable, signal: int, layer: int, *given: Any) -> None:
        started = _seconds(model.device)
        tap(*given)
        read[signal, layer] = _seconds(model.device) - started

    def watch(*_: Any) -> None:
        for module, taps in attention.opened().items():
            layer = place[module]
            here = [i for i, s in enumerate(recorder.signals) if s.layer in (None, layer)]
            taps[:] = [
                functools.partial(timed, tap, signal, layer)
                for tap, signal in zip(taps, here, strict=True)
            ]

    hook = patched.layers[0].register_forward_pre_hook(watch)
    try:
        started = _seconds(model.device)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        seconds = _seconds(model.device) - started
    finally:
        hook.remove()
    return seconds - read.sum() - recorder.seconds, output.past_key_values
