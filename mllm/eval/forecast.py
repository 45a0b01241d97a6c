"""What a sweep will cost: cells, FLOPs and minutes, before it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mllm.eval import sources
from mllm.eval.answer import answer, unpatched_costs
from mllm.eval.asking import Questions, answer_all, shares_tower
from mllm.eval.plans import patched_with
from mllm.eval.sweep import Entry, Questioning, draw
from mllm.loading import build_inputs
from mllm.models import resolve
from mllm.plan import Plan
from mllm.yardstick import prompt

PROBE = 8


@dataclass(frozen=True)
class Forecast:
    """An estimate of what the missing cells cost.

    Attributes:
        cells: cells of the grid.
        missing: cells that the results file has not.
        flops: prefill FLOPs of the missing cells; a tower whose output plans share counts once.
        seconds: wall-clock seconds, from a probe of the unpatched model, scaled by FLOPs.
    """

    cells: int
    missing: int
    flops: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def forecast(
    model: Any,
    processor: Any,
    todo: Mapping[str, Sequence[Entry]],
    cells: int,
    asked: Questioning,
    workers: int = 1,
) -> Forecast:
    """Cost of the entries that each task misses.

    Every plan runs on one question, whose ledger gives its FLOPs, so a plan that cannot run is
    found here; the unpatched model answers a few questions against the clock. Tasks count by the
    FLOPs of the unpatched model on their first questions. Decoding is in the seconds as far as
    the probe decodes, not in the FLOPs.

    Args:
        model, processor: as `mllm.load_model` gives them.
        todo: entries by task (:func:`mllm.eval.sweep.split_cells`).
        cells: cells of the grid, done or not.
        asked: questions of every cell.
        workers: processes that share the tasks.

    Raises:
        PlanError: a plan that the model cannot run.
    """
    todo = {task: entries for task, entries in todo.items() if entries}
    missing = sum(map(len, todo.values()))
    if not missing:
        return Forecast(cells, 0)
    sizes = {task: sources.at_most(task, asked.split, asked.n) for task in todo}
    whole = {}
    for task in todo:
        drawn = [prompt(sample) for sample in draw(task, asked, PROBE)]
        unpatched = unpatched_costs(model, build_inputs(processor, drawn))
        whole[task] = sum(cost["prefill_flops"] for cost in unpatched) / len(drawn)
    first = next(iter(todo))
    one = Questions(processor, draw(first, asked, 1), 1, model.dtype, model.device)
    (scale,) = (cost["prefill_flops"] for cost in unpatched_costs(model, one.batches[0]))
    # Not by seed: a draw costs what another one does.
    plans = {e.plan.spec: e.plan for entries in todo.values() for e in entries}
    costs = {spec: _cost(model, processor, one, plan) for spec, plan in plans.items()}
    total = 0.0
    for task, entries in todo.items():
        every = [costs[entry.plan.spec] for entry in entries]
        tower = max((cost.tower for cost in every), default=0.0)
        own = sum(cost.prefill - cost.tower for cost in every)
        total += sizes[task] * whole[task] / scale * (tower + own)

    drawing, answering = probe(model, processor, first, asked, workers)
    repeats = 1 + (asked.timings + 1 if asked.timings else 0) / asked.n
    seconds = total * repeats * answering / whole[first] + sum(sizes.values()) * drawing
    return Forecast(cells, missing, total, seconds / min(workers, len(todo)))


def probe(
    model: Any, processor: Any, task: str, asked: Questioning, workers: int
) -> tuple[float, float]:
    """Seconds per question to draw and preprocess it, and to answer it without a plan."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))  # as each worker has
    try:
        started = time.perf_counter()
        drawn = draw(task, asked, PROBE)
        questions = Questions(processor, drawn, len(drawn), model.dtype, model.device)
        drawing = time.perf_counter() - started
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            answer_all(model, processor, questions, None)
            answering = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    return drawing / len(drawn), answering / len(drawn)


@dataclass(frozen=True)
class _Cost:
    """FLOPs of one prefill, and those of its tower if other plans can use its output."""

    prefill: float
    tower: float


def _cost(model: Any, processor: Any, one: Questions, plan: Plan) -> _Cost:
    if not plan.stages:
        family, inputs = resolve(model), one.batches[0]
        tower = sum(family.vision_flops(x, x.cells) for x in family.layouts(inputs))
        return _Cost(unpatched_costs(model, inputs)[0]["prefill_flops"], tower)
    with patched_with(model, plan) as patched:
        answer(model, processor, one.inputs([0], patched), patched, max_new_tokens=1)
        ledger = patched.ledger.as_dict()
    tower = ledger["vision_flops"][0] if shares_tower(plan) else 0.0
    return _Cost(ledger["prefill_flops"][0], tower)
