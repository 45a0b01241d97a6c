"""Speed and memory of a plan against the unpatched model, beside the ideal from FLOPs.

Both models run in the same process on the same weights, in interleaved pairs whose order
alternates; a figure is the median of the per-pair ratios with a bootstrap interval.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mllm
from mllm import compat, flops
from mllm.eval.bench_shapes import (
    BENCH_CPU,
    Inputs,
    Shape,
    cannot_measure,
    random_inputs,
    text_inputs,
    whole_images,
)
from mllm.eval.provenance import commit, versions
from mllm.eval.stats import median_interval
from mllm.loading import load_model, pick_device

Progress = Callable[[str, int, int], None]  # what runs, pairs done, pairs in all
OnRow = Callable[[dict[str, Any]], None]  # the results so far, after each row

SDPA = ("flash", "efficient", "math", "cudnn")
DTYPES = ("bfloat16", "float16", "float32")
CLAIM_PAIRS = 30  # fewer pairs are a look, not a figure to quote
LEAST_TEXT = 64  # of a prompt whose length alone is given


# Plan and the share of its ideal that we aim at (1 / 1.03: keeping everything costs at most 3 %).
PREFILL_PLANS = {
    "fastv:layer=2:keep=1.0": 1 / 1.03,
    "fastv:layer=2:keep=0.5": 0.95,
    "fastv:layer=2:keep=0.25": 0.95,
    "fastv:layer=2:keep=0.11": 0.95,
    "visionzip:keep=64": 0.9,
}


def prefill(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | Mapping[str, float | None] | None = None,
    visual: Sequence[int] | None = None,
    text: int = 63,
    batch: Sequence[int] = (1,),
    unequal: bool = False,
    pairs: int = CLAIM_PAIRS,
    dtype: str = "bfloat16",
    device: str | None = None,
    sdpa: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    on_row: OnRow | None = None,
) -> dict[str, Any]:
    """Time the prefill: one forward with pictures, vision tower and cache included.

    Args:
        model: a shape to build with random weights, or a path for `mllm.load_model`.
        plans: spec texts, perhaps with targets (shares of the ideal); None for `PREFILL_PLANS`.
        visual: visual tokens per sample: whole images where the model has one size of image, one
            image of that size where it takes any; None for the shape's own.
        text: text tokens per sample.
        batch: batch sizes.
        unequal: whether prompts of a batch have unequal lengths, left padded: the first has
            `text` words, each further one fewer, down to about a quarter.
        pairs: interleaved pairs per row.
        dtype: of the weights.
        device: torch device; None for the GPU when there is one.
        sdpa: the only kernel that torch's sdpa may use: flash, efficient, math or cudnn; None
            leaves torch's choice. A kernel that cannot run is torch's error.
        threads: CPU threads; None leaves torch's choice.
        progress: called after each pair.
        on_row: called with the results so far after each row, so that a long run can be saved.

    Returns:
        The bench results object, schema 1. Times in seconds, `peak_bytes` in bytes: the largest
        sum of live tensors during one forward, weights included. `ratio` is unpatched time /
        patched time; `share` = ratio / ideal. `llm_*` leave the tower and projector out.
        `attainable` is the ratio of the unpatched model's own times: its tower as it is, its
        decoder layers at the lengths that the plan leaves them. Between `ideal` and `attainable`
        lies what tower and short matrices lose per FLOP, between `attainable` and `ratio` what
        the plan's own machinery costs.

    Raises:
        DataError: `visual` is no whole number of images, a count is below one, there is no such
            device, dtype, kernel or model, or no inputs can be drawn for the model.
        PlanError: a plan cannot work on this model.
    """
    base, draw, results = opened(
        "prefill", model=model, visual=visual, text=text, batch=batch, unequal=unequal,
        pairs=pairs, dtype=dtype, device=device, sdpa=sdpa, threads=threads,
    )  # fmt: skip
    rows = results["rows"]
    targets = targets_of(plans, PREFILL_PLANS)
    for size, count, inputs in draw:
        with kernel(sdpa):
            base_peak = peak_bytes(base, inputs)
        for plan, target in targets.items():
            label = f"{plan}, {count} visual tokens, batch {size}"
            try:
                with kernel(sdpa):
                    row = _row(base, plan, inputs, pairs, target, label, progress)
                row["baseline_peak_bytes"] = base_peak
            except torch.OutOfMemoryError:
                row = {"status": "oom", "words": "out of memory"}
            rows.append({**conditions(base, plan, size, count, text, unequal, pairs), **row})
            if on_row is not None:
                on_row(results)
    return results


def targets_of(
    plans: Sequence[str] | Mapping[str, float | None] | None, own: Mapping[str, float | None]
) -> Mapping[str, float | None]:
    """Plans with their targets: what is given, with the targets of a suite's own plans."""
    if isinstance(plans, Mapping):
        return plans
    return own if plans is None else {plan: own.get(plan) for plan in plans}


def opened(
    suite: str,
    *,
    model: str | Shape,
    visual: Sequence[int] | None,
    text: int = 63,
    batch: Sequence[int] = (1,),
    unequal: bool = False,
    pairs: int = CLAIM_PAIRS,
    dtype: str = "bfloat16",
    device: str | None = None,
    sdpa: str | None = None,
    threads: int | None = None,
    length: Sequence[int] | None = None,
) -> tuple[Any, list[tuple[int, int, Inputs]], dict[str, Any]]:
    """What a suite needs before its first row; arguments as in :func:`prefill`.

    Args:
        length: tokens per sample, instead of `visual` and `text`: as many whole pictures as leave
            room for `LEAST_TEXT` text tokens.

    Returns:
        The model; batch size, visual tokens and inputs of every measurement; and the results
        object without rows.
    """
    for name, values in (("pairs", [pairs]), ("batch", batch), ("text", [text])):
        if min(values) < 1:
            raise cannot_measure(name, min(values), "1 or more")
    if threads is not None and threads < 1:
        raise cannot_measure("threads", threads, "1 or more")
    if dtype not in DTYPES:
        raise cannot_measure("dtype", dtype, " or ".join(DTYPES))
    if sdpa not in (None, *SDPA):
        raise cannot_measure("sdpa", sdpa, " or ".join(SDPA))
    if threads is not None:
        torch.set_num_threads(threads)
    load_before = round(os.getloadavg()[0], 2)
    device = pick_device(device)
    if isinstance(model, Shape):
        base, shape = model.build(getattr(torch, dtype), device), asdict(model)
    else:
        base, shape = load_model(model, dtype=dtype, device=device)[0], {"name": model}
    shape["parameters"] = sum(p.numel() for p in base.parameters())
    visual = visual or (model.visual if isinstance(model, Shape) else (576, 1152))
    sizes = [(count, text) for count in visual]
    if length is not None:
        counts = [whole_images(base, tokens - LEAST_TEXT) for tokens in length]
        sizes = [(count, tokens - count) for count, tokens in zip(counts, length, strict=True)]
    draw = [
        (size, count, random_inputs(base, visual=count, text=words, batch=size, unequal=unequal))
        for size in batch
        for count, words in sizes
    ]
    results = {
        "schema": 1,
        "suite": suite,
        "model_shape": shape,
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "sdpa": sdpa,
        "load_before": load_before,
        "rows": [],
    }
    return base, draw, results


def conditions(
    base: Any, plan: str, batch: int, visual: int, text: int, unequal: bool, pairs: int
) -> dict[str, Any]:
    """What a row was measured under."""
    return {
        "plan": plan,
        "batch": batch,
        "visual": visual,
        "text": text,
        "unequal": unequal,
        "dtype": str(base.dtype).removeprefix("torch."),
        "backend": compat.attention_name(base.get_decoder()),
        "pairs": pairs,
    }


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
    ideal = sum(ledger["baseline_prefill_flops"]) / sum(ledger["prefill_flops"])
    status, words = judge(ratio, ratio_ci, ideal, target, pairs)
    return {
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "ideal": ideal,
        "share": ratio / ideal,
        "peak_bytes": peak,
        "status": status,
        "baseline_s": float(np.median(total[:, 0])),
        "patched_s": float(np.median(total[:, 1])),
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


def clock_of(model: Any) -> _CpuClock | _CudaClock:
    """A clock for the device of a model: `mark()` at each moment, then `seconds()` of all."""
    return _CudaClock() if model.device.type == "cuda" else _CpuClock()


class _CpuClock:
    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return self.marks


class _CudaClock:
    """CUDA events: the GPU's own time, whatever the queue of launches does."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []
        torch.cuda.synchronize()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [self.marks[0].elapsed_time(event) / 1e3 for event in self.marks]


@torch.inference_mode()
def peak_bytes(model: Any, inputs: Inputs) -> int:
    """Largest sum of live tensor bytes during one prefill, the model's weights included."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    run = functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)
    return weights + peak_of(model.device, run)


def peak_of(device: torch.device, run: Callable[[], Any]) -> int:
    """Most bytes of tensors that lived at once during `run`, beyond what lived before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator keeps no peak; the profiler's trace has every allocation and release.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as p:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        p.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    steps = np.cumsum([size for _, size in sorted(memory, key=lambda item: item[0])])
    return int(max(0, steps.max(initial=0)))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the profiler's native log lines (one at start, one at stop) off the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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
