"""What trained stages cost: routers over depth in prefill and training step, experts in a layer.

Routers and experts have random weights here, which changes nothing about their time but how even
the load of experts is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mllm
from mllm.errors import PlanError
from mllm.eval import bench, bench_train
from mllm.eval.bench_shapes import BENCH_CPU, Shape
from mllm.eval.bench_words import summed
from mllm.eval.stats import median_interval
from mllm.models import resolve
from mllm.plan import Plan

# Plan and the share of its ideal that we aim at: keeping everything costs at most 2 %, and experts
# compute at three quarters of the rate of the dense FFN.
PLANS = {
    "pmod": 0.9,
    "pmod:max_ratio=1.0:min_ratio=1.0": 1 / 1.02,
    "moe:experts=8:top_k=2": 0.75,
}
ROWS = (576, 4608)  # that go through a layer with experts


def routers(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    visual: Sequence[int] | None = None,
    on_row: bench.OnRow | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time routers over depth against the unpatched model, and layers with experts (`dispatch`).

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: spec texts; None for :data:`PLANS`. A plan is of experts alone or has none.
        visual: as in :func:`mllm.eval.bench_train.train`; through a layer with experts, as many
            rows; None is :data:`ROWS`.
        on_row, **options: those of :class:`mllm.eval.bench.Options`.

    Returns:
        The bench results object, schema 1. Rows of a router have `part` "prefill" or "train", and
        else what :func:`mllm.eval.bench.prefill` and :func:`mllm.eval.bench_train.train` give; of
        experts "dispatch", see :func:`dispatch`.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`.
        PlanError: a plan cannot work on this model.
    """
    targets = bench.targets_of(plans, PLANS)
    spread = {plan: share for plan, share in targets.items() if _experts(plan)}
    depth = {plan: share for plan, share in targets.items() if plan not in spread}
    if visual is None and isinstance(model, Shape):
        picture = model.visual[:1]
    else:
        picture = visual or (576,)
    results: dict[str, Any] = {}
    for part, measured, own, sizes in (
        ("prefill", bench.prefill, depth, picture),
        ("train", bench_train.train, depth, picture),
        ("dispatch", dispatch, spread, visual or ROWS),
    ):
        before = results.get("rows", [])

        def keep(found: dict[str, Any], part: str = part, before: list = before) -> None:
            rows = [*before, *({"part": part, **row} for row in found["rows"])]
            results.update({**found, **results, "suite": "routers", "rows": rows})
            if on_row is not None:
                on_row(results)

        if own:
            measured(model=model, plans=own, visual=sizes, on_row=keep, **options)
    return summed(results)


def _experts(plan: str) -> bool:
    return any(stage.info.stage == "experts" for stage in Plan.of(plan).stages)


@bench.restoring_threads()
def dispatch(
    *,
    model: str | Shape,
    plans: Mapping[str, float | None],
    **options: Any,
) -> dict[str, Any]:
    """Time the experts of the first decoder layer against its dense FFN at as many FLOPs.

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: one stage of experts each, and its target.
        **options: those of :class:`mllm.eval.bench.Options`; `visual` are rows of a sample that go
            through the layer.

    Returns:
        The bench results object, schema 1. `ratio` is the time of the FFN / that of the experts,
        where the FFN has as many rows (`dense_rows`) as cost what the experts cost, router
        included; so `share` is the share of its FLOP rate. `peak_bytes` has the layer's weights.
    """
    asked = bench.Options(**options)
    base, points, results = bench.opened("dispatch", model, asked)
    for point in points:
        point = dataclasses.replace(point, text=0, unequal=False)
        for plan, target in plans.items():
            label = f"{plan}, {point.visual} rows, batch {point.batch}"
            run = functools.partial(
                _row, base, plan, point.batch, point.visual, asked.pairs, target, label,
                asked.progress,
            )  # fmt: skip
            row = bench.within_memory(run) or bench.OOM
            asked.keep(results, {**point.about(base, plan, asked.pairs), **row})
    return summed(results)


def _row(
    base: Any,
    plan: str,
    size: int,
    count: int,
    pairs: int,
    target: float | None,
    label: str,
    progress: bench.Progress | None,
) -> dict[str, Any]:
    stages = Plan.of(plan).stages
    if len(stages) > 1:
        raise PlanError(
            f"experts are timed alone, without the other stages of {plan}",
            argument="plan",
            given=plan,
            expected="one stage",
        )
    ffn, width = resolve(base).mlp(0), base.config.text_config.hidden_size
    drawn = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, width, generator=drawn).to(base.device, base.dtype)

    with mllm.upcycle(bench.twin(base), [stages[0].replace(layers=(0,))]) as patched:
        experts = patched.upcycled.layers[0]
        cost = experts.flops_row() + stages[0].top_k * experts.flops_choice()
        alone = 2.0 * sum(p.numel() for p in ffn.parameters())
        same = round(size * count * cost / alone)
        runs = [
            functools.partial(ffn, rows(1, same)),
            functools.partial(experts, rows(size, count)),
        ]
        peaks = [_peak(module, run) for module, run in zip((ffn, experts), runs, strict=True)]
        times, _ = bench.time_pairs(
            *runs, {}, pairs, lambda done: progress and progress(label, done, pairs),
            timed=functools.partial(_timed, base),
        )  # fmt: skip
    seconds = times[..., 0]
    ratio, *ci = median_interval(seconds[:, 0] / seconds[:, 1])
    ideal = same * alone / (size * count * cost)
    status, words = bench.against(ci, ideal, target, pairs)
    return {
        "ratio": ratio,
        "ratio_ci": ci,
        "samples": bench.samples(seconds[:, 0] / seconds[:, 1]),
        "ideal": ideal,
        "share": ratio / ideal,
        "peak_bytes": peaks[1],
        "baseline_peak_bytes": peaks[0],
        "status": status,
        "baseline_s": float(np.median(seconds[:, 0])),
        "patched_s": float(np.median(seconds[:, 1])),
        "dense_rows": same,
        "target_share": target,
        "words": f"{ratio / ideal:.0%} of the dense FFN's rate{words}",
    }


@torch.inference_mode()
def _timed(base: Any, run: Callable[[], Tensor], _: Any) -> tuple[float]:
    clock = bench.clock_of(base)
    clock.mark()
    run()
    clock.mark()
    start, end = clock.seconds()
    return (end - start,)


@torch.inference_mode()
def _peak(module: torch.nn.Module, run: Callable[[], Tensor]) -> int:
    held = list(module.parameters())
    return sum(p.numel() * p.element_size() for p in held) + bench.peak_of(held[0].device, run)
