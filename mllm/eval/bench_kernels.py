"""Kernels and the torch that stands for them, at the shapes of a model's layer, beside ideals.

An ideal is the longer of two times on the machine: its peak rate on the FLOPs, and its bandwidth on
the bytes that have to be read and written once. Caches are filled with other bytes before every
call.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import attention, flops, kernels, tokens
from mllm.cache import Packed
from mllm.cache.quantised import Quantised
from mllm.errors import DataError, MllmError, first_line
from mllm.eval import bench
from mllm.eval.bench_clock import clock_of, peak_of
from mllm.eval.bench_machine import machine, reached
from mllm.eval.bench_shapes import BENCH_CPU, SHAPES, Shape, cannot_measure, config_of
from mllm.eval.bench_words import CLAIM_PAIRS, summed
from mllm.eval.stats import median_interval
from mllm.loading import model_path
from mllm.roofline import Hardware
from mllm.routers import dispatch

NAMES = (
    "row_scores", "compact", "scatter_back", "ragged_decode", "quantised_decode", "grouped_ffn",
)  # fmt: skip
DISPATCHER = "dispatcher"
NOT_RUN = "No Triton kernel was run, for want of a CUDA device; times are of torch."
TARGET = 0.7  # of the ideal, for kernels on a GPU
KEPT, WINDOW, EXPERTS, TOP_K, GROUP = 0.25, 64, 8, 2, 32
CALLS = 1000  # of the dispatcher in one measurement


@dataclass(frozen=True)
class Work:
    """A call of something that has a kernel.

    Attributes:
        run: calls it, through the dispatcher.
        flops: of matrix products.
        nbytes: to be read and written at least.
        served: what the engine does in torch, where that is not the reference; None where it is.
    """

    run: Callable[[], Any]
    flops: float
    nbytes: float
    served: Callable[[], Any] | None = None


@bench.restoring_threads()
def kernel_suite(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    length: Sequence[int] | None = None,
    batch: Sequence[int] = (1,),
    pairs: int = CLAIM_PAIRS,
    dtype: str = "bfloat16",
    device: str | None = None,
    threads: int | None = None,
    progress: bench.Progress | None = None,
    on_row: bench.OnRow | None = None,
) -> dict[str, Any]:
    """Time every kernel, and the torch path that is served without it.

    Args:
        model: heads and widths are those of this model's decoder layers; nothing is built.
        plans: names out of :data:`NAMES`, and "dispatcher"; None is all.
        length: tokens of a sample; None is 1,152 on a CPU, 4,096 and 32,768 on a GPU.
        pairs: calls of each.
        batch, dtype, device, threads, progress, on_row: as in :class:`mllm.eval.bench.Options`.

    Returns:
        The bench results object, schema 1. `plan` is the kernel with what was asked of it, `visual`
        the tokens. Medians in seconds: `torch_s` of what the engine does in torch, `reference_s` of
        the kernel's reference where that is something else, `triton_s` of the kernel, None without
        a CUDA device or where it cannot run (`words` says why). `ratio` is torch_s / triton_s, None
        without the latter; `share` is ideal_s over triton_s, or else over torch_s; `backend` what
        `auto` serves here. The row "dispatcher" has `overhead_s`, what one call costs on the host
        before anything is computed.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`; another kernel.
    """
    asked = bench.Options(
        batch=batch, pairs=pairs, dtype=dtype, device=device, threads=threads, on_row=on_row
    )
    device = bench.checked(asked)
    load_before = round(os.getloadavg()[0], 2)
    wanted = list(plans or (*NAMES, DISPATCHER))
    for name in wanted:
        if name not in (*NAMES, DISPATCHER):
            raise cannot_measure("plan", name, f"one of {', '.join((*NAMES, DISPATCHER))}")
    cuda = torch.device(device).type == "cuda"
    length = length or ((4096, 32768) if cuda else (1152,))
    if min(length) < 8:
        raise cannot_measure("length", min(length), "8 or more")
    config = _text_config(model)
    results = {
        **bench.header("kernels", device, dtype, load_before),
        "model_shape": _shape(model, config),
        "sdpa": None,
        "rows": [],
    }
    at = machine(device, dtype)

    def keep(plan: str, many: int, count: int, row: dict[str, Any] | None) -> None:
        about = {
            "plan": plan, "batch": many, "visual": count, "text": 0, "dtype": dtype,
            "pairs": pairs, "backend": _served(plan.split(":")[0], cuda),
            **dict.fromkeys(bench.FIGURES),
        }  # fmt: skip
        asked.keep(results, {**about, **(row or bench.OOM)})

    for many in batch:
        for count in length:
            for plan, make in _cases(config, count, many, getattr(torch, dtype), device):
                if plan.split(":")[0] in wanted:
                    label = f"{plan}, {count} tokens, batch {many}"
                    run = functools.partial(
                        _row, make, at, dtype, torch.device(device), pairs, label, progress
                    )
                    keep(plan, many, count, bench.within_memory(run))
    if DISPATCHER in wanted:
        keep(DISPATCHER, 1, 0, _dispatcher(pairs))
    summed(results)
    if not cuda:
        results["words"].append(NOT_RUN)
    return results


def _text_config(model: str | Shape) -> Any:
    from transformers import AutoConfig

    config = config_of(SHAPES.get(model, model) if isinstance(model, str) else model)
    if config is None:
        try:
            config = AutoConfig.from_pretrained(model_path(model))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the configuration of {model}: {first_line(error)}",
                argument="model", given=model, expected="a shape, or a folder with config.json",
            ) from error  # fmt: skip
    return config.get_text_config()


def _shape(model: str | Shape, config: Any) -> dict[str, Any]:
    name = model.name if isinstance(model, Shape) else str(model)
    return {"name": name, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "heads": config.num_attention_heads,
            "kv_heads": _kv_heads(config), "head_dim": flops.head_dim(config)}  # fmt: skip


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _served(name: str, cuda: bool) -> str:
    return "triton" if cuda and name in kernels.VALIDATED else "torch"


# Shapes


def _cases(
    config: Any, count: int, batch: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], Work]]]:
    """What is measured for so many tokens, and how it is made."""
    given = config, count, batch, _draw(dtype, device)
    for rows in (1, min(WINDOW, count)):
        yield f"row_scores:rows={rows}", functools.partial(_row_scores, *given, rows)
    yield f"compact:keep={KEPT}", functools.partial(_compact, *given)
    yield f"scatter_back:keep={KEPT}", functools.partial(_scatter_back, *given)
    yield "ragged_decode", functools.partial(_ragged, *given)
    for bits in (2, 4, 8):
        yield f"quantised_decode:bits={bits}", functools.partial(_quantised, *given, bits)
    yield (
        f"grouped_ffn:experts={EXPERTS}:top_k={TOP_K}", functools.partial(_grouped_ffn, *given)
    )  # fmt: skip


def _draw(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    drawn = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, device=device, dtype=torch.float32).to(dtype)

    return draw


def _heads(config: Any) -> tuple[int, int, int]:
    return config.num_attention_heads, _kv_heads(config), flops.head_dim(config)


def _some_rows(count: int, batch: int, device: torch.device) -> Tensor:
    drawn = torch.Generator().manual_seed(1)
    kept = max(1, round(KEPT * count))
    rows = [torch.randperm(count, generator=drawn)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows).to(device)


def _row_scores(config: Any, count: int, batch: int, draw: Callable, rows: int) -> Work:
    """The last rows of a prefill's queries over all keys, averaged over heads."""
    heads, kv_heads, width = _heads(config)
    query = draw(batch, count, heads, width).transpose(1, 2)
    key = draw(batch, count, kv_heads, width).transpose(1, 2)
    at = torch.arange(count - rows, count, device=key.device).expand(batch, -1)
    run = functools.partial(attention.row_scores, query, key, at, None, None)
    read = key.nbytes + query.nbytes * rows // count
    return Work(run, 2 * batch * heads * rows * count * width, read + 4 * batch * rows * count)


def _compact(config: Any, count: int, batch: int, draw: Callable) -> Work:
    """A quarter of the rows of hidden states and positions."""
    hidden = draw(batch, count, config.hidden_size)
    place = torch.arange(count, device=hidden.device).expand(batch, -1).contiguous()
    rows = _some_rows(count, batch, hidden.device)
    run = functools.partial(tokens.gather_parts, rows, [(hidden, 1), (place, 1)])
    moved = (hidden.nbytes + place.nbytes) * rows.shape[1] / count
    return Work(run, 0, 2 * moved + rows.nbytes)


def _scatter_back(config: Any, count: int, batch: int, draw: Callable) -> Work:
    """A quarter of the rows of hidden states back among zeros."""
    rows = _some_rows(count, batch, draw(1).device)
    x = draw(*rows.shape, config.hidden_size)
    run = functools.partial(tokens.scatter_back, x, rows, count)
    return Work(run, 0, x.nbytes + rows.nbytes + x.nbytes * count / rows.shape[1])


def _step(config: Any, count: int, batch: int, draw: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """The query of one new token, and the keys and values of `count` stored ones."""
    heads, kv_heads, width = _heads(config)
    return (draw(batch, 1, heads, width).transpose(1, 2), draw(batch, kv_heads, count, width),
            draw(batch, kv_heads, count, width))  # fmt: skip


def _ragged(config: Any, count: int, batch: int, draw: Callable) -> Work:
    """A decode step where heads store between an eighth and three eighths of the tokens."""
    heads, kv_heads, width = _heads(config)
    drawn = torch.Generator().manual_seed(2)
    slots = 3 * count // 8
    lengths = torch.randint(count // 8, slots + 1, (batch, kv_heads), generator=drawn)
    lengths[0, 0] = slots
    query, keys, values = _step(config, slots, batch, draw)
    there = (torch.arange(slots) < lengths[..., None]).to(keys.device)
    segment, seen = Packed.of(keys, values, there), there.repeat_interleave(heads // kv_heads, 1)
    cells = int(lengths.sum())
    return Work(
        functools.partial(segment.attend, query, seen, None),
        4 * cells * heads // kv_heads * width,
        2 * cells * width * keys.itemsize + segment.place.nbytes + seen.nbytes + query.nbytes,
        functools.partial(_rectangle, segment, query, seen),
    )


def _quantised(config: Any, count: int, batch: int, draw: Callable, bits: int) -> Work:
    """A decode step where all tokens are stored in few bits, bounds for every 32 of them."""
    heads, _, width = _heads(config)
    query, keys, values = _step(config, count, batch, draw)
    there = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    group = next(n for n in range(min(GROUP, width), 0, -1) if width % n == 0)
    segment = Quantised.of(keys, values, there, bits, bits, group)
    stored = {t.untyped_storage().data_ptr(): t.nbytes
              for t in (*segment.tensors(), *segment.meta())}  # fmt: skip
    return Work(
        functools.partial(segment.attend, query, None, None),
        4 * batch * heads * count * width,
        sum(stored.values()) + query.nbytes,
        functools.partial(_rectangle, segment, query, None),
    )


def _rectangle(segment: Any, query: Tensor, seen: Tensor | None) -> Tensor:
    """What a decode step does where no kernel is asked for."""
    mask = None if seen is None else seen[:, :, None]
    return F.scaled_dot_product_attention(
        query, segment.keys(), segment.values(), mask, enable_gqa=True
    )


def _grouped_ffn(config: Any, count: int, batch: int, draw: Callable) -> Work:
    """Two of eight experts for every token, as even as chance has it; gated FFNs."""
    width, inner, rows = config.hidden_size, config.intermediate_size, batch * count * TOP_K
    drawn = torch.Generator().manual_seed(3)
    counts = torch.randint(EXPERTS, (rows,), generator=drawn).bincount(minlength=EXPERTS).tolist()
    x, down = draw(rows, width), draw(EXPERTS, width, inner) / inner**0.5
    gate, up = (draw(EXPERTS, inner, width) / width**0.5 for _ in range(2))
    run = functools.partial(dispatch.grouped_ffn, x, counts, gate, up, down, F.silu)
    return Work(run, 6 * rows * width * inner, 3 * down.nbytes + 2 * x.nbytes)


# Times


@torch.inference_mode()
def _row(
    make: Callable[[], Work], at: Hardware, dtype: str, device: torch.device, pairs: int,
    label: str, progress: bench.Progress | None,
) -> dict[str, Any]:  # fmt: skip
    work, why = make(), "no CUDA device"
    runs = {"torch": _under("torch", work.served or work.run)}
    if work.served is not None:
        runs["reference"] = _under("torch", work.run)
    if device.type == "cuda":
        why = None
        triton = _under("triton", work.run)
        try:
            triton()
            runs["triton"] = triton
        except MllmError as error:
            why = str(error)
    seconds = time_calls(runs, device, pairs, lambda n: progress and progress(label, n, pairs))
    best = "torch" if why else "triton"
    median, low, high = median_interval(seconds[best])
    row: dict[str, Any] = {
        "triton_s": None,
        **reached(at, dtype, work.flops, work.nbytes, median),
        "peak_bytes": peak_of(device, runs[best]),
    }  # fmt: skip
    for name, own in seconds.items():
        value, *ci = median_interval(own)
        row |= {f"{name}_s": value, f"{name}_s_ci": ci}
    ideal = row["ideal_s"]
    row["ideal"] = row["torch_s"] / ideal
    row["share"], row["share_ci"] = ideal / median, [ideal / high, ideal / low]
    row["target_share"] = None if why else TARGET
    status, more = bench.against(row["share_ci"], 1.0, row["target_share"], pairs)
    if why:
        row["samples"] = bench.samples(seconds["torch"])
        words = f"torch, {row['share']:.0%} of the ideal; the Triton kernel was not run: {why}"
    else:
        each = seconds["torch"] / seconds["triton"]
        row["ratio"], *row["ratio_ci"] = median_interval(each)
        row["samples"] = bench.samples(each)
        words = f"{_against_torch(*row['ratio_ci'], row['ratio'])}, {row['share']:.0%} of the ideal"
    return {**row, "status": status, "words": words + more}


def _against_torch(low: float, high: float, ratio: float) -> str:
    if low > 1:
        return f"the Triton kernel is {ratio:.2f}x as fast as torch"
    if high < 1:
        return f"the Triton kernel is slower: {ratio:.2f}x as fast as torch"
    return "the Triton kernel is not resolved faster than torch"


def _under(mode: kernels.Mode, run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with kernels.use(mode, strict=True):
            return run()

    return call


def time_calls(
    runs: dict[str, Callable[[], Any]], device: torch.device, pairs: int,
    on_pair: Callable[[int], Any],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Seconds of single calls, float64 `[pairs]` by name, in turns whose order alternates.

    Before each call another buffer is written, of 64 MiB on a CPU and 512 MiB on a GPU, so that
    caches hold little else; on a GPU that also keeps it busy until the host has asked for the call,
    so that launches do not count where they can be hidden.
    """
    other = torch.empty(2**29 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    found = {name: np.empty(pairs) for name in runs}
    for turn in range(-2, pairs):
        for name in runs if turn % 2 == 0 else reversed(runs):
            clock = clock_of(other)
            other.zero_()
            clock.mark()
            runs[name]()
            clock.mark()
            start, end = clock.seconds()
            if turn >= 0:
                found[name][turn] = end - start
        if turn >= 0:
            on_pair(turn + 1)
    return found


def _dispatcher(pairs: int) -> dict[str, Any]:
    """What a call costs on the host before anything is computed."""
    given = [torch.zeros(1) for _ in range(3)]

    def reference(*args: Any) -> None:
        return None

    def seconds(call: Callable[..., Any], *args: Any) -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            call(*args)
        return (time.perf_counter() - started) / CALLS

    ways = ((kernels.run, "row_scores", reference, *given), (reference, *given))
    found = np.array([
        [seconds(*way) for way in ways] if turn % 2 else [seconds(*way) for way in ways[::-1]][::-1]
        for turn in range(-1, pairs)
    ])[1:]  # fmt: skip
    spent = found[:, 0] - found[:, 1]
    overhead, *ci = median_interval(spent)
    return {
        "overhead_s": overhead, "overhead_s_ci": ci,
        "samples": bench.samples(spent),
        "status": "ok" if pairs >= CLAIM_PAIRS else "unresolved",
        "words": f"the dispatcher costs {1e6 * overhead:.2f} µs per call",
    }  # fmt: skip
