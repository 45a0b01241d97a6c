"""What choosing costs: a plan against one that leaves as many tokens without looking.

Three models run in turn on the same weights: the unpatched one, the plan, and a plan that leaves
equally many tokens in every layer, the first ones of each sample. The third is the plan with a
choice that costs nothing, so

    spent = plan - free choice,    saved = unpatched - free choice,

and the cost of a selection is spent / saved: signals, arithmetic and small kernels, but not what
the engine does for any plan. Methods that also make the tower cheaper may come out below zero.
What is saved is many times what is spent, so the unpatched model runs in a few of the rounds only;
the interval of the cost is that of both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mllm
from mllm.compressors.base import (
    Context,
    Keep,
    LayerContext,
    LayerMethod,
    LayerSchedule,
    Positions,
    Preset,
    TokenReducer,
    even_shares,
    on_device,
)
from mllm.errors import PlanError
from mllm.eval import bench
from mllm.eval.bench_shapes import BENCH_CPU, Inputs, Shape
from mllm.eval.bench_words import summed
from mllm.eval.stats import RESAMPLES
from mllm.plan import MethodInfo, get_method, methods

#: Visual tokens kept by default: 64 of 576, 320 of 2,880.
SHARE = 0.111
TARGET = 0.05  # of what is saved, for methods that score by attention
BASELINES = 5  # rounds in which the unpatched model runs too


@bench.restoring_threads()
def selection(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    batch: Sequence[int] = (1, 8),
    **options: Any,
) -> dict[str, Any]:
    """Time what choosing costs, as a share of the prefill that it saves.

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: spec texts; None is :func:`every_method`.
        batch: batch sizes.
        **options: those of :class:`mllm.eval.bench.Options`; a pair is a round of plan and free
            choice, and in :data:`BASELINES` of them the unpatched model runs as well.

    Returns:
        The bench results object, schema 1. A row has `spent_s`, `saved_s` (medians, seconds),
        `cost` = spent / saved with `cost_ci` (`samples`: that of every round), `saved_s_ci`,
        `baseline_s`,
        `visual_avg` (tokens per layer and sample), `selection_flops` (booked by the ledger, per
        sample), `status` and `words`. A plan that the model refuses, or that saves nothing, has a
        row that says so and no `cost`.
    """
    asked = bench.Options(batch=batch, **options)
    base, points, results = bench.opened("selection", model, asked)
    for point in points:
        inputs = bench.within_memory(point.inputs)
        for plan in plans or every_method():
            label = f"{plan}, {point.visual} visual tokens, batch {point.batch}"
            run = functools.partial(_row, base, plan, inputs, asked.pairs, label, asked.progress)
            try:
                with bench.kernel(asked.sdpa):
                    row = bench.within_memory(run) if inputs else None
            except PlanError as error:
                if plans:
                    raise
                row = {"status": "refused", "words": str(error)}
            asked.keep(results, {**point.about(base, plan, asked.pairs), **(row or bench.OOM)})
    return summed(results)


def every_method() -> list[str]:
    """Every method that looks at something: at the share above if it has one, or as published.

    Not those on the KV cache, which save nothing of a prefill: the suite "kv" measures them. Nor
    trained ones: tokens pass some layers by and come back, or all stay.
    """
    found = []
    for row in methods():
        if row["stage"] == "cache" or row["trained"]:
            continue
        cls = get_method(row["name"])
        looks = issubclass(cls, Preset) or set(row["reads"]) - {"Grid"} or row["site"] == "tower"
        scalar = {"keep"} & {p["name"] for p in row["params"]} and not issubclass(
            cls, LayerSchedule
        )
        if looks:
            found.append(f"{row['name']}:keep={SHARE}" if scalar else row["name"])
    return found


def _row(
    base: Any, plan: str, inputs: Inputs, pairs: int, label: str, progress: bench.Progress | None
) -> dict[str, Any]:
    other, third = bench.twin(base), bench.twin(base)
    with mllm.patch(other, plan) as patched:
        bench.timed_prefill(other, inputs)
        ledger = patched.ledger.as_dict()
        about = {
            "visual_avg": float(np.mean(ledger["visual_avg"])),
            "selection_flops": float(np.mean(ledger["selection_flops"])),
        }
        free = free_choice(ledger, positions_of(patched))
        if not free:
            return {**about, "status": "ok", "words": "no token leaves, so nothing is saved"}
        with mllm.patch(third, free):
            whole, times = _rounds(
                base, (other, third), inputs, pairs,
                lambda done: progress and progress(label, done, pairs),
            )  # fmt: skip
    spent, baseline = times[:, 0] - times[:, 1], float(np.median(whole))
    saved = baseline - float(np.median(times[:, 1]))
    cost, ci, saved_ci = interval(np.array(whole), times)
    return {
        **about,
        "baseline_s": baseline,
        "spent_s": float(np.median(spent)),
        "saved_s": saved,
        "saved_s_ci": saved_ci,
        "cost": cost,
        "cost_ci": ci,
        "samples": bench.samples(spent / saved),
        **judge(cost, ci, saved_ci, pairs),
    }


def interval(whole: np.ndarray, times: np.ndarray) -> tuple[float, list[float], list[float]]:
    """The cost with its 95 % interval, and that of what is saved: rounds are drawn anew.

    Args:
        whole: seconds of the unpatched model, `[rounds in which it ran]`.
        times: of plan and free choice, `[rounds, 2]`.
    """
    draw = np.random.default_rng(0)

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[draw.integers(0, len(values), (RESAMPLES, len(values)))]

    own = drawn(times)
    saved = np.median(drawn(whole), 1) - np.median(own[..., 1], 1)
    spent = np.median(own[..., 0] - own[..., 1], 1)
    cost = np.median(times[:, 0] - times[:, 1]) / (np.median(whole) - np.median(times[:, 1]))
    ends = [np.percentile(x, [2.5, 97.5]).tolist() for x in (spent / saved, saved)]
    return float(cost), *ends


def judge(
    cost: float, ci: Sequence[float], saved_ci: Sequence[float], pairs: int
) -> dict[str, str]:
    """Status and a sentence for one row, against :data:`TARGET`."""
    if saved_ci[0] <= 0:
        more = "save no time here" if saved_ci[1] <= 0 else "are not resolved to save time here"
        return {"status": "unresolved", "words": f"fewer tokens {more}"}
    words = f"choosing costs {cost:.1%} of what fewer tokens save"
    if pairs < bench.CLAIM_PAIRS:
        return {
            "status": "unresolved",
            "words": f"{words}; {pairs} rounds are too few for a claim ({bench.CLAIM_PAIRS})",
        }
    low, high = ci
    if low <= TARGET < high:
        return {"status": "unresolved", "words": f"{words}; unresolved against {TARGET:.0%}"}
    return {"status": "ok", "words": f"{words}: {'above' if low > TARGET else 'within'} "
            f"{TARGET:.0%}"}  # fmt: skip


def _rounds(
    base: Any, pair: Sequence[Any], inputs: Inputs, pairs: int, on_round: Callable[[int], Any]
) -> tuple[list[float], np.ndarray]:
    """Seconds of whole prefills: of `base` in some rounds, and of the pair `[pairs, 2]`.

    Who of the pair is first alternates.
    """
    for model in (base, *pair) * 2:
        bench.timed_prefill(model, inputs)
    whole, times = [], np.empty((pairs, 2))
    for turn in range(pairs):
        if turn * BASELINES % pairs < BASELINES:
            whole.append(bench.timed_prefill(base, inputs)[0])
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            times[turn, which] = bench.timed_prefill(pair[which], inputs)[0]
        on_round(turn + 1)
    return whole, times


# The choice that costs nothing


def free_choice(
    ledger: dict[str, Any], positions: dict[str, Positions]
) -> list[TokenReducer | LayerMethod]:
    """Stages that leave as many visual tokens as a prefill did, the first ones of each sample.

    Args:
        ledger: `as_dict()` of that prefill.
        positions: of the plan's stages, by `pre_llm` and `llm`.
    """
    stages: list[TokenReducer | LayerMethod] = []
    there = ledger["visual_tokens"]
    if ledger["kept_llm"] != there:
        first = _First(positions=positions.get("pre_llm"))
        first.kept, there = ledger["kept_llm"], ledger["kept_llm"]
        stages.append(first)
    cuts = {}
    for row in ledger["layers"]:
        if row["visual"] != there:
            cuts[row["layer"]] = there = row["visual"]
    if cuts:
        leave = _Leave(positions=positions.get("llm"))
        leave.cuts = cuts
        stages.append(leave)
    return stages


def positions_of(patched: Any) -> dict[str, Positions]:
    return {s.info.stage: patched.positions(s) for s in reversed(patched.plan.stages)}


@dataclass
class _First(TokenReducer):
    """The first tokens of each image, as many in all as `kept` says of each sample."""

    positions: Positions | None = None

    info = MethodInfo(name="first", stage="pre_llm")

    def reduce(self, ctx: Context) -> list:
        images, tokens = ctx.valid.shape
        counts = torch.cat([even_shares(n, images // len(self.kept)) for n in self.kept])
        keep = torch.arange(tokens) < counts[:, None]
        return [Keep(on_device(keep, ctx.valid), counts.tolist())]


@dataclass
class _Leave(LayerMethod):
    """The first visual rows of each sample, as many as `cuts` says of each layer and sample."""

    positions: Positions | None = None

    info = MethodInfo(name="leave", stage="llm")

    def at(self) -> Sequence[int]:
        return tuple(self.cuts)

    def act(self, ctx: LayerContext) -> list:
        counts = self.cuts[ctx.layer]
        limit = on_device(torch.tensor(counts), ctx.visual)
        return [Keep(ctx.visual & (ctx.visual.cumsum(1) <= limit[:, None]), counts)]
