"""Time of a decode step under a plan, of any stages, beside the ideal from the bytes it reads.

Both models read the prompt, each into its own cache; then steps run in interleaved pairs, and every
step adds a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import mllm
from mllm.eval import bench
from mllm.eval.bench_kv import read_weights, step_flops, step_peak, time_steps
from mllm.eval.bench_machine import reached
from mllm.eval.bench_shapes import BENCH_CPU, Inputs, Shape
from mllm.eval.bench_words import summed
from mllm.eval.stats import median_interval

# Plan and the share of its ideal that we aim at, as for the suite kv.
PLANS = {"fastv:layer=2:keep=0.25": 0.85, "visionzip:keep=64": 0.85, "snapkv:budget=0.25": 0.85}


def decode(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    visual: Sequence[int] | None = None,
    size: Sequence[bench.Size] | None = None,
    text: int = 63,
    length: Sequence[int] | None = None,
    batch: Sequence[int] = (1,),
    unequal: bool = False,
    pairs: int = bench.CLAIM_PAIRS,
    dtype: str = "bfloat16",
    device: str | None = None,
    sdpa: str | None = None,
    threads: int | None = None,
    progress: bench.Progress | None = None,
    on_row: bench.OnRow | None = None,
) -> dict[str, Any]:
    """Time decode steps behind a prompt.

    Args:
        plans: spec texts; None for :data:`PLANS`.
        length: tokens per sample, instead of `visual` and `text`: as many whole pictures as leave
            room for some text.
        pairs: steps of each of the two models.
        model, visual, size, text, batch, unequal, dtype, device, sdpa, threads, progress, on_row:
            as in :func:`mllm.eval.bench.prefill`.

    Returns:
        The bench results object, schema 1. `ratio` is unpatched time / patched time of a step;
        `ideal` the ratio of the bytes that it has to read: weights of the language model, keys and
        values (`baseline_kv_bytes`, `kv_bytes`: of the batch behind the prompt). transformers'
        cache copies itself at every token, which the ideal does not count, so a plan whose cache
        appends in place can beat it. `ideal_s` is the least time of a patched step on `machine`.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`.
        PlanError: a plan cannot work on this model.
    """
    base, points, results = bench.opened(
        "decode", model=model, visual=visual, size=size, text=text, length=length, batch=batch,
        unequal=unequal, pairs=pairs, dtype=dtype, device=device, sdpa=sdpa, threads=threads,
    )  # fmt: skip
    targets = bench.targets_of(plans, PLANS)
    for point in points:
        inputs = bench.within_memory(point.inputs)
        for plan, target in targets.items():
            label = f"{plan}, {point.visual + point.text} tokens, batch {point.batch}"
            run = functools.partial(_row, base, plan, inputs, pairs, target, label, progress)
            with bench.kernel(sdpa):
                row = bench.within_memory(run) if inputs else None
            results["rows"].append({**point.about(base, plan, pairs), **(row or bench.OOM)})
            if on_row is not None:
                on_row(results)
    return summed(results)


@torch.inference_mode()
def _row(
    base: Any, plan: str, inputs: Inputs, pairs: int, target: float | None, label: str,
    progress: bench.Progress | None,
) -> dict[str, Any]:  # fmt: skip
    other = bench.twin(base)
    with mllm.patch(other, plan) as patched:
        steps = [
            (which, which(**inputs, use_cache=True, logits_to_keep=1).past_key_values)
            for which in (base, other)
        ]
        ledger = patched.ledger.as_dict()
        work = step_flops(base, steps[1][1], ledger["batch"])
        seconds = time_steps(
            steps, inputs, pairs, lambda done: progress and progress(label, done, pairs)
        )
        peaks = [step_peak(*step, inputs) for step in steps]
    ratio, *ratio_ci = median_interval(seconds[:, 0] / seconds[:, 1])
    weights = read_weights(base)
    before, after = weights + ledger["baseline_kv_bytes"], weights + ledger["kv_bytes"]
    ideal, patched_s = before / after, float(np.median(seconds[:, 1]))
    dtype = str(base.dtype).removeprefix("torch.")
    status, words = bench.judge(ratio, ratio_ci, ideal, target, pairs)
    return {
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "samples": bench.samples(seconds[:, 0] / seconds[:, 1]),
        "ideal": ideal,
        "share": ratio / ideal,
        **reached(bench.device_of(base), dtype, work, after, patched_s),
        "target_share": target,
        "baseline_s": float(np.median(seconds[:, 0])),
        "patched_s": patched_s,
        "kv_bytes": ledger["kv_bytes"],
        "baseline_kv_bytes": ledger["baseline_kv_bytes"],
        "peak_bytes": peaks[1],
        "baseline_peak_bytes": peaks[0],
        "status": status,
        "words": words,
    }
