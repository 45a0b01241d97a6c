"""Speed and memory of a plan against the unpatched model, beside the ideal from FLOPs.

Both models run in the same process on the same weights, in interleaved pairs whose order
alternates; a figure is the median of the per-pair ratios with a bootstrap interval.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import mllm
from mllm import compat, flops
from mllm.eval.bench_clock import clock_of, peak_of
from mllm.eval.bench_machine import machine, reached, said
from mllm.eval.bench_shapes import (
    BENCH_CPU,
    Inputs,
    Shape,
    cannot_measure,
    model_of,
    one_image,
    pictures,
    random_inputs,
    text_inputs,
    visual_tokens,
    whole_images,
)
from mllm.eval.bench_words import CLAIM_PAIRS, summed
from mllm.eval.provenance import commit, versions
from mllm.eval.stats import median_interval
from mllm.loading import pick_device
from mllm.models import resolve

Progress = Callable[[str, int, int], None]  # what runs, pairs done, pairs in all
OnRow = Callable[[dict[str, Any]], None]  # the results so far, after each row
Size = tuple[int, int]  # height and width of a picture, in pixels

T = TypeVar("T")

SDPA = ("flash", "efficient", "math", "cudnn")
DTYPES = ("bfloat16", "float16", "float32")
#: Promised of every row; None where nothing was measured.
FIGURES = ("ratio", "ratio_ci", "ideal", "share", "peak_bytes")
OOM = {"status": "oom", "words": "out of memory"}
#: What torch's CPU allocator, C++, CUDA and its libraries say.
NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
LEAST_TEXT = 64  # of a prompt whose length alone is given


# Plan and the share of its ideal that we aim at (1 / 1.03: keeping everything costs at most 3 %).
PREFILL_PLANS = {
    "fastv:layer=2:keep=1.0": 1 / 1.03,
    "fastv:layer=2:keep=0.5": 0.95,
    "fastv:layer=2:keep=0.25": 0.95,
    "fastv:layer=2:keep=0.11": 0.95,
    "visionzip:keep=64": 0.9,
}


@dataclass(frozen=True)
class Options:
    """What every suite can be asked for, by keyword.

    Attributes:
        visual: visual tokens per sample: whole images where the model has one size of image, one
            image of that size where it takes any; None for the shape's own, or one and two images.
        size: (height, width) of one picture per sample instead, where the model takes any size.
        text: text tokens per sample.
        batch: batch sizes.
        unequal: whether prompts of a batch have unequal lengths, left padded: the first has
            `text` words, each further one fewer, down to about a quarter.
        pairs: interleaved pairs per row.
        dtype: of the weights.
        device: torch device; None for the GPU when there is one.
        sdpa: the only kernel that torch's sdpa may use: flash, efficient, math or cudnn; None
            leaves torch's choice. A kernel that cannot run is torch's error.
        threads: CPU threads while it is measured; None leaves torch's choice.
        progress: called after each pair.
        on_row: called with the results so far after each row, so that a long run can be saved.
    """

    visual: Sequence[int] | None = None
    size: Sequence[Size] | None = None
    text: int = 63
    batch: Sequence[int] = (1,)
    unequal: bool = False
    pairs: int = CLAIM_PAIRS
    dtype: str = "bfloat16"
    device: str | None = None
    sdpa: str | None = None
    threads: int | None = None
    progress: Progress | None = None
    on_row: OnRow | None = None

    def keep(self, results: dict[str, Any], row: dict[str, Any]) -> None:
        """Add a row to the results, and hand them out."""
        results["rows"].append(row)
        if self.on_row is not None:
            self.on_row(results)


@contextlib.contextmanager
def restoring_threads() -> Iterator[None]:
    """While open, or around a decorated function, torch's number of threads may be set."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@restoring_threads()
def prefill(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | Mapping[str, float | None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time the prefill: one forward with pictures, vision tower and cache included.

    Args:
        model: a shape or public model to build with random weights, a `config.json` likewise, or a
            path for `mllm.load_model`.
        plans: spec texts, perhaps with targets (shares of the ideal); None for `PREFILL_PLANS`.
        **options: those of :class:`Options`.

    Returns:
        The bench results object, schema 1. Times in seconds, `peak_bytes` in bytes: the largest
        sum of live tensors during one forward, weights included. `ratio` is unpatched time /
        patched time, `samples` that of every pair; `share` = ratio / ideal. `llm_*` leave the tower
        and projector out. `ideal_s` is the least time of `flops` and of reading the weights
        (`bytes`) on `machine`, `roofline_share` = ideal_s / patched_s. A point that runs out of
        memory is a row of status "oom", whose figures are None. `break_even`:
        :func:`mllm.eval.bench_words.break_even`; `words`: what the rows say together.
        `attainable` is the ratio of the unpatched model's own times: its tower as it is, its
        decoder layers at the lengths that the plan leaves them. Between `ideal` and `attainable`
        lies what tower and short matrices lose per FLOP, between `attainable` and `ratio` what
        the plan's own machinery costs.

    Raises:
        DataError: `visual` is no whole number of images, a count is below one, there is no such
            device, dtype, kernel or model, or no inputs can be drawn for the model.
        PlanError: a plan cannot work on this model.
    """
    asked = Options(**options)
    base, points, results = opened("prefill", model, asked)
    targets = targets_of(plans, PREFILL_PLANS)
    for point in points:
        with kernel(asked.sdpa):
            inputs = within_memory(point.inputs)
            base_peak = inputs and within_memory(functools.partial(peak_bytes, base, inputs))
        for plan, target in targets.items():
            label = f"{plan}, {point.visual} visual tokens, batch {point.batch}"
            run = functools.partial(
                _row, base, plan, inputs, asked.pairs, target, label, asked.progress
            )
            row = None
            with kernel(asked.sdpa):
                if base_peak:
                    row = within_memory(run)
                elif inputs:
                    row = _only_patched(base, plan, inputs)
            if row is not None and base_peak:
                row["baseline_peak_bytes"] = base_peak
            asked.keep(results, {**point.about(base, plan, asked.pairs), **(row or OOM)})
    return summed(results)


def within_memory(run: Callable[[], T]) -> T | None:
    """What `run` gives; None where memory runs out, and then what it held is free again."""
    try:
        return run()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # allocators that have no error of their own
        if not any(words in str(error) for words in NO_MEMORY):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _only_patched(base: Any, plan: str, inputs: Inputs) -> dict[str, Any] | None:
    """A row where the unpatched model runs out of memory: nothing to compare, but does it fit?"""
    other = twin(base)
    with mllm.patch(other, plan):
        peak = within_memory(functools.partial(peak_bytes, other, inputs))
    if peak is None:
        return None
    words = f"out of memory without the plan; with it a prefill takes {peak / 2**20:.0f} MiB"
    return {**OOM, "peak_bytes": peak, "words": words}


def targets_of(
    plans: Sequence[str] | Mapping[str, float | None] | None, own: Mapping[str, float | None]
) -> Mapping[str, float | None]:
    """Plans with their targets: what is given, with the targets of a suite's own plans."""
    if isinstance(plans, Mapping):
        return plans
    return own if plans is None else {plan: own.get(plan) for plan in plans}


@dataclass(frozen=True)
class Point:
    """What is measured: samples of a batch, their visual and text tokens.

    Attributes:
        size: (height, width) of the picture, where that was asked for.
        unequal: whether samples have unequal lengths.
        inputs: draws them.
    """

    batch: int
    visual: int
    text: int
    size: Size | None
    unequal: bool
    inputs: Callable[[], Inputs]

    def about(self, base: Any, plan: str, pairs: int) -> dict[str, Any]:
        """What a row is measured under, and None for what every row has once it is."""
        return {
            "plan": plan,
            "batch": self.batch,
            "visual": self.visual,
            "text": self.text,
            **({} if self.size is None else {"size": list(self.size)}),
            "unequal": self.unequal,
            "dtype": str(base.dtype).removeprefix("torch."),
            "backend": compat.attention_name(base.get_decoder()),
            "pairs": pairs,
            **dict.fromkeys(FIGURES),
        }


def opened(
    suite: str, model: str | Shape, asked: Options, *,
    length: Sequence[int] | None = None, single: bool = False,
) -> tuple[Any, list[Point], dict[str, Any]]:  # fmt: skip
    """What a suite needs before its first row.

    Args:
        suite: its name.
        model: as in :func:`prefill`.
        asked: what was asked for.
        length: tokens per sample, instead of `visual` and `text`: as many whole pictures as leave
            room for `LEAST_TEXT` text tokens.
        single: only the first of the lengths that are measured where nobody names one.

    Returns:
        The model, every measurement, and the results object without rows.
    """
    device, visual, size = checked(asked), asked.visual, asked.size
    if size is not None and (visual is not None or length is not None):
        raise cannot_measure("size", list(size), "it without visual and length")
    if visual is not None and length is not None:
        raise cannot_measure("visual", list(visual), "it without length")
    load_before = round(os.getloadavg()[0], 2)
    machine(device, asked.dtype)  # while memory is free
    base, shape = model_of(model, asked.dtype, device)
    shape["parameters"] = sum(p.numel() for p in base.parameters())
    family = resolve(base)
    if size is not None:
        sizes = [(visual_tokens(family, one), asked.text, one) for one in size]
    elif length is not None:
        least = LEAST_TEXT + one_image(family, 1)
        if min(length) < least:
            raise cannot_measure("length", min(length), f"{least} or more")
        counts = [whole_images(base, tokens - LEAST_TEXT) for tokens in length]
        sizes = [(n, tokens - n, None) for n, tokens in zip(counts, length, strict=True)]
    else:
        each = one_image(family, 576)
        own = model.visual if isinstance(model, Shape) else (each, 2 * each)
        sizes = [(count, asked.text, None) for count in visual or own[: 1 if single else None]]
    for count, _, one in sizes:
        pictures(family, None if one else count, one)

    def point(many: int, count: int, words: int, one: Size | None) -> Point:
        given = {"size": one} if one else {"visual": count}
        draw = functools.partial(
            random_inputs, base, **given, text=words, batch=many, unequal=asked.unequal
        )
        return Point(many, count, words, one, asked.unequal, draw)

    return base, [point(many, *one) for many in asked.batch for one in sizes], {
        **header(suite, device, asked.dtype, load_before), "model_shape": shape,
        "sdpa": asked.sdpa, "rows": [],
    }  # fmt: skip


def checked(asked: Options) -> str:
    """The device, once arguments are known to be good and threads are set.

    Suites give torch its number of threads back: :func:`restoring_threads`.

    Raises:
        DataError: an argument that cannot be used.
    """
    threads = 1 if asked.threads is None else asked.threads
    for name, values in (("pairs", [asked.pairs]), ("batch", asked.batch), ("text", [asked.text]),
                         ("threads", [threads])):  # fmt: skip
        if min(values) < 1:
            raise cannot_measure(name, min(values), "1 or more")
    if asked.dtype not in DTYPES:
        raise cannot_measure("dtype", asked.dtype, " or ".join(DTYPES))
    if asked.sdpa not in (None, *SDPA):
        raise cannot_measure("sdpa", asked.sdpa, " or ".join(SDPA))
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    return pick_device(asked.device)


def header(suite: str, device: str, dtype: str, load_before: float) -> dict[str, Any]:
    """Fields of a results object that say what stands behind it."""
    return {
        "schema": 1,
        "suite": suite,
        "model_shape": {},
        "device": device_name(device),
        "machine": said(machine(device, dtype), dtype),
        "versions": versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
    }


def device_of(base: Any) -> Any:
    """:func:`mllm.eval.bench_machine.machine` of a model."""
    return machine(str(base.device), str(base.dtype).removeprefix("torch."))


def held_bytes(base: Any) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in base.parameters())


def samples(values: np.ndarray) -> list[float]:
    """One figure of every pair, as it is kept in a row."""
    return [float(f"{x:.5g}") for x in values]


def kernel(sdpa: str | None) -> contextlib.AbstractContextManager:
    """torch's sdpa held to one kernel."""
    if sdpa is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH",
             "cudnn": "CUDNN_ATTENTION"}  # fmt: skip
    return sdpa_kernel(getattr(SDPBackend, names[sdpa]))


def _row(
    base: Any,
    plan: str,
    inputs: Inputs,
    pairs: int,
    target: float | None,
    label: str,
    progress: Progress | None,
) -> dict[str, Any]:
    other = twin(base)
    with mllm.patch(other, plan) as patched:
        peak = peak_bytes(other, inputs)
        ledger = patched.ledger.as_dict()
        lengths = [max(layer["tokens"]) for layer in ledger["layers"]]
        full = inputs["input_ids"].shape[1]
        shorter = sorted(set(lengths) - {full})
        times, short = time_pairs(
            base,
            other,
            inputs,
            pairs,
            lambda done: progress and progress(label, done, pairs),
            beside=[text_inputs(base, inputs, n) for n in shorter],
        )
    total, llm = times[..., 0], times[..., 1]
    by_length = {full: llm[:, 0], **dict(zip(shorter, short.T, strict=True))}
    floor = unpatched_at(lengths, times, by_length)
    attainable, *attainable_ci = median_interval(total[:, 0] / floor)
    ratio, *ratio_ci = median_interval(total[:, 0] / total[:, 1])
    llm_ratio, *llm_ci = median_interval(llm[:, 0] / llm[:, 1])
    saved, *saved_ci = median_interval(total[:, 0] - total[:, 1])
    work = sum(ledger["prefill_flops"])
    ideal = sum(ledger["baseline_prefill_flops"]) / work
    status, words = judge(ratio, ratio_ci, ideal, target, pairs)
    dtype, patched_s = str(base.dtype).removeprefix("torch."), float(np.median(total[:, 1]))
    return {
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "samples": samples(total[:, 0] / total[:, 1]),
        "saved_s": saved,
        "saved_s_ci": saved_ci,
        **reached(device_of(base), dtype, work, held_bytes(base), patched_s),
        "ideal": ideal,
        "share": ratio / ideal,
        "peak_bytes": peak,
        "status": status,
        "baseline_s": float(np.median(total[:, 0])),
        "patched_s": patched_s,
        "attainable": attainable,
        "attainable_ci": attainable_ci,
        "attainable_share": ratio / attainable,
        "llm_ratio": llm_ratio,
        "llm_ratio_ci": llm_ci,
        "llm_ideal": _llm_ideal(base.config.text_config, ledger),
        "target_share": target,
        "words": words,
    }


def unpatched_at(
    lengths: Sequence[int], times: np.ndarray, by_length: dict[int, np.ndarray]
) -> np.ndarray:
    """Seconds of the unpatched model's tower, with its decoder at the lengths that a plan leaves.

    Args:
        lengths: rows that enter each decoder layer.
        times: of :func:`time_pairs`.
        by_length: seconds `[pairs]` from the decoder on, for each of the lengths.
    """
    return times[:, 0, 0] - times[:, 0, 1] + np.mean([by_length[n] for n in lengths], 0)


def judge(
    ratio: float, ci: Sequence[float], ideal: float, target: float | None, pairs: int
) -> tuple[str, str]:
    """Status and a sentence for one row."""
    low, high = ci
    if low > 1:
        words = f"{ratio:.2f}x faster"
    elif high < 1:
        words = f"no real speed-up: {1 / ratio:.2f}x slower"
    else:
        words = "no real speed-up: the interval contains 1"
    status, more = against(ci, ideal, target, pairs)
    return status, words + more


def against(
    ci: Sequence[float], ideal: float, target: float | None, pairs: int
) -> tuple[str, str]:
    """Status of one row, and what is to be said of its target.

    A target (share of the ideal) holds if the interval contains or beats it; it is unresolved if
    the interval is wider than the margin that the target leaves below the ideal.
    """
    low, high = ci
    if pairs < CLAIM_PAIRS:
        return "unresolved", f"; {pairs} pairs are too few for a claim ({CLAIM_PAIRS})"
    if target is None:
        return "ok", ""
    if (high - low) / ideal > 1 - target:
        return "unresolved", f"; unresolved against the target of {target:.2f} of the ideal"
    if high / ideal >= target:
        return "ok", f"; reaches the target of {target:.2f} of the ideal"
    return "ok", f"; misses the target of {target:.2f} of the ideal"


def twin(model: Any) -> Any:
    """A copy of the modules that shares every weight and buffer with `model`.

    It can be patched while `model` runs unpatched, at no memory for a second set of weights.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def time_pairs(
    base: Any,
    other: Any,
    inputs: Inputs,
    pairs: int,
    on_pair: Callable[[int], Any] | None = None,
    warmup: int = 2,
    beside: Sequence[Inputs] = (),
    timed: Callable[[Any, Inputs], tuple[float, ...]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Time two models on the same inputs in interleaved pairs, the order alternating.

    Args:
        beside: other inputs that `base` runs after each pair.
        timed: what is timed: seconds of the whole, of the part from the decoder on, and of what
            else; None is :func:`timed_prefill`.

    Returns:
        Seconds, float64 `[pairs, 2, parts]`: pair, (base, other), (whole, from the decoder on,
        ...); and `[pairs, len(beside)]`, from the decoder on.
    """
    models, timed = (base, other), timed or timed_prefill
    for _ in range(warmup):
        for model in models:
            timed(model, inputs)
        for more in beside:
            timed(base, more)
    times: list[list[tuple[float, ...]]] = [[(), ()] for _ in range(pairs)]
    others = np.empty((pairs, len(beside)))
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[pair][which] = timed(models[which], inputs)
        for i, more in enumerate(beside):
            others[pair, i] = timed(base, more)[1]
        if on_pair is not None:
            on_pair(pair + 1)
    return np.array(times), others


@torch.inference_mode()
def timed_prefill(model: Any, inputs: Inputs) -> tuple[float, float]:
    """Seconds of one prefill, and of its part from the decoder on (LM head included)."""
    clock = clock_of(model)
    # Prepended: what the patch does when the decoder is entered belongs to the decoder's time.
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: clock.mark(), prepend=True)
    try:
        clock.mark()
        model(**inputs, use_cache=True, logits_to_keep=1)
        clock.mark()
    finally:
        hook.remove()
    start, decoder, end = clock.seconds()
    return end - start, end - decoder


@torch.inference_mode()
def peak_bytes(model: Any, inputs: Inputs) -> int:
    """Largest sum of live tensor bytes during one prefill, the model's weights included."""
    run = functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)
    return held_bytes(model) + peak_of(model.device, run)


def _llm_ideal(config: Any, ledger: dict[str, Any]) -> float:
    """FLOPs ratio of the language model alone, from the tokens that entered each layer."""

    def total(tokens_per_layer: list[list[int]]) -> float:
        layers = sum(flops.decoder_layer(config, t, t) for row in tokens_per_layer for t in row)
        return layers + flops.lm_head(config, ledger["batch"])

    patched = [layer["tokens"] for layer in ledger["layers"]]
    return total([ledger["prompt_tokens"]] * len(patched)) / total(patched)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} logical cores"
    return platform.processor() or platform.machine()
