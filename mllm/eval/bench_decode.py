"""Time of a decode step under a plan, of any stages, beside the ideal from the bytes it reads.

Both models read the prompt, each into its own cache; then steps run in interleaved pairs, and every
step adds a token.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import mllm
from mllm.estimating import Weights
from mllm.eval import bench
from mllm.eval.bench_kv import read_weights, step_flops, step_peak, time_steps
from mllm.eval.bench_machine import reached
from mllm.eval.bench_shapes import BENCH_CPU, Inputs, Shape
from mllm.eval.bench_words import summed
from mllm.eval.stats import median_interval
from mllm.models import resolve

# Plan and the share of its ideal that we aim at, as for the suite kv.
PLANS = {"fastv:layer=2:keep=0.25": 0.85, "visionzip:keep=64": 0.85, "snapkv:budget=0.25": 0.85}


@bench.restoring_threads()
def decode(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    length: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time decode steps behind a prompt.

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: spec texts; None for :data:`PLANS`.
        length: tokens per sample, instead of `visual` and `text`: as many whole pictures as leave
            room for some text.
        **options: those of :class:`mllm.eval.bench.Options`; a pair is a step of each model.

    Returns:
        The bench results object, schema 1. `ratio` is unpatched time / patched time of a step;
        `ideal` the ratio of the bytes that it has to read: weights of the decoder layers that are
        run (all experts) and of the LM head, keys and values (`baseline_kv_bytes`, `kv_bytes`: of
        the batch behind the prompt). transformers'
        cache copies itself at every token, which the ideal does not count, so a plan whose cache
        appends in place can beat it. `ideal_s` is the least time of a patched step on `machine`.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`.
        PlanError: a plan cannot work on this model.
    """
    asked = bench.Options(**options)
    base, points, results = bench.opened("decode", model, asked, length=length)
    targets = bench.targets_of(plans, PLANS)
    for point in points:
        inputs = bench.within_memory(point.inputs)
        for plan, target in targets.items():
            label = f"{plan}, {point.visual + point.text} tokens, batch {point.batch}"
            run = functools.partial(
                _row, base, plan, inputs, asked.pairs, target, label, asked.progress
            )
            with bench.kernel(asked.sdpa):
                row = bench.within_memory(run) if inputs else None
            asked.keep(results, {**point.about(base, plan, asked.pairs), **(row or bench.OOM)})
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
        own = Weights.of(patched.family, patched.upcycled.layers)
        work = step_flops(base, steps[1][1], ledger["batch"])
        seconds = time_steps(
            steps, inputs, pairs, lambda done: progress and progress(label, done, pairs)
        )
        peaks = [step_peak(*step, inputs) for step in steps]
    ratio, *ratio_ci = median_interval(seconds[:, 0] / seconds[:, 1])
    whole = Weights.of(resolve(base))
    rest = read_weights(base) - sum(whole.layers)
    runs = [max(row["tokens"]) > 0 for row in ledger["layers"]]
    before = rest + sum(whole.layers) + ledger["baseline_kv_bytes"]
    after = rest + sum(itertools.compress(own.layers, runs)) + ledger["kv_bytes"]
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
