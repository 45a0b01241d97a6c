"""Methods x budgets x tasks on the yardstick, in one process and resumable.

The same prompts, batches and generation as the lmms-eval model, without its per-request cost:
pictures are drawn and preprocessed once per task, and plans that do not look into the vision
tower share its output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm.errors import MllmError, PlanError
from mllm.eval import files, stats
from mllm.eval.answer import Answer, answer
from mllm.eval.plans import UNPATCHED, patched_with, plan_for_budget
from mllm.eval.provenance import describe_run
from mllm.eval.scoring import is_correct
from mllm.loading import build_inputs
from mllm.plan import Plan, near
from mllm.yardstick import prompt

SANITY = ("random", "downsample", "stride", "avgpool")
METHODS = (*SANITY, "visionzip", "divprune", "fastv", "visionzip+fastv:layer=2")
BUDGETS = (192, 64, 16)
MAX_NEW_TOKENS = 12
STOPS = ("\n",)
BASELINES = ("random", "downsample")


@dataclass(frozen=True)
class Entry:
    """One row of the grid: a method at a budget (None for the unpatched model)."""

    method: str
    budget: int | None
    plan: Plan

    @property
    def name(self) -> str:
        """For progress displays."""
        return self.method if self.budget is None else f"{self.method} @ {self.budget}"


@dataclass(frozen=True)
class Skipped:
    """A method that cannot reach a budget, and why."""

    method: str
    budget: int
    reason: str


def grid(
    model: Any, methods: Sequence[str], budgets: Sequence[int], *, seed: int = 0
) -> tuple[list[Entry], list[Skipped]]:
    """The plans of a sweep, sanity rows first: others are compared with them.

    Args:
        model: the model they are for.
        methods: spec templates (`visionzip`, `fastv:layer=1`, `visionzip+fastv:layer=2`); the
            sanity rows are added.
        budgets: visual tokens per image, averaged over decoder layers.
        seed: seed of every plan.

    Raises:
        PlanError: a template or budget that cannot be meant.
    """
    tokens = visual_tokens(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    entries, skipped = [Entry(UNPATCHED, None, Plan([], seed))], []
    for method in dict.fromkeys((*SANITY, *methods)):
        for budget in sorted(set(budgets), reverse=True):
            try:
                plan = plan_for_budget(
                    method, budget, tokens=tokens, num_layers=num_layers, seed=seed
                )
            except PlanError as error:
                if error.argument != "tokens_avg":
                    raise
                skipped.append(Skipped(method, budget, str(error)))
            else:
                entries.append(Entry(method, budget, plan))
    return entries, skipped


def visual_tokens(model: Any) -> int:
    """Visual tokens of one square picture, from the config of the vision tower."""
    config = model.config.vision_config
    return (config.image_size // config.patch_size) ** 2


def key(entry: Entry, task: str, split: str, weights_sha256: str) -> str:
    """Name of a cell: what it depends on, hashed."""
    parts = [entry.plan.sha256, task, split, entry.plan.seed, weights_sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Questions:
    """The questions of one task, preprocessed into batches that every plan shares.

    Args:
        processor: of the model.
        samples: yardstick samples.
        batch_size: questions per batch; like lengths go together, so padding is rare.
        dtype: of `pixel_values`.
        device: where the batches are kept.
    """

    def __init__(
        self, processor: Any, samples: list[dict], batch_size: int, dtype: Any, device: Any
    ) -> None:
        self.samples = samples
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i]["question"]), i))
        self.indices = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.batches = []
        for indices in self.indices:
            asked = [prompt(samples[i]) for i in indices]
            self.batches.append(build_inputs(processor, asked).to(device, dtype))


class SharedTower:
    """Remembers the vision tower's output for batches that come again.

    Only for plans whose stages all come after the tower: a remembered output has no attention
    or keys to read. The batches' `pixel_values` must stay alive and in place.
    """

    def __init__(self, model: Any) -> None:
        self.tower = model.get_encoder("image")
        self._outputs: dict[tuple, Any] = {}

    @contextlib.contextmanager
    def used_by(self, plan: Plan) -> Iterator[None]:
        """Serve remembered outputs inside this context, if `plan` allows it."""
        if not all(_after_tower(stage) for stage in plan.stages):
            yield
            return
        forward, own = self.tower.forward, self.tower.__dict__.get("forward")

        def remembered(pixel_values: torch.Tensor, **options: Any) -> Any:
            name = (pixel_values.data_ptr(), tuple(pixel_values.shape), repr(sorted(options)))
            if name not in self._outputs:
                self._outputs[name] = forward(pixel_values, **options)
            return self._outputs[name]

        self.tower.forward = remembered
        try:
            yield
        finally:
            if own is None:
                del self.tower.forward
            else:
                self.tower.forward = own

    def forget(self) -> None:
        """Free the outputs: the next task has other pictures."""
        self._outputs.clear()


def _after_tower(stage: Any) -> bool:
    reads = (type(signal).__name__ for signal in stage.reads().values())
    return stage.site in ("post_projector", "decoder") and not any(
        name.startswith("Vision") for name in reads
    )


def answer_all(model: Any, processor: Any, questions: Questions, patched: Any) -> list[Answer]:
    """Answers to all questions, in the order of the samples."""
    answers: list[Answer | None] = [None] * len(questions.samples)
    for indices, inputs in zip(questions.indices, questions.batches, strict=True):
        results = answer(
            model, processor, inputs, patched, max_new_tokens=MAX_NEW_TOKENS, stops=STOPS
        )
        for index, result in zip(indices, results, strict=True):
            answers[index] = result
    return answers


def run(
    model: Any,
    processor: Any,
    entries: Sequence[Entry],
    tasks: Sequence[str],
    output: str | os.PathLike,
    *,
    n: int = 500,
    split: str = "test",
    batch_size: int = 16,
    timings: int = 8,
    on_start: Callable[[str, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Evaluate every entry on every task; cells that `output` has already are not run again.

    Args:
        model, processor: as `mllm.load_model` gives them.
        entries: rows of the grid, sanity rows first (see :func:`grid`).
        tasks: yardstick tasks.
        output: JSON Lines file; each finished cell is appended at once.
        n: questions per task.
        split: `test`, `dev` or `train`.
        batch_size: questions per batch.
        timings: single-picture prefills to time per cell, tower included; 0 for none.
        on_start: told the task and the entry's name before work on it starts.

    Yields:
        Every cell of the grid, done before or now: contracts, Sweep.

    Raises:
        DataError: `output` is not a sweep file, or holds another model's cells only in part.
    """
    from mllm.yardstick import samples

    done = {cell["key"]: cell for cell in files.read_jsonl(output) if cell["n"] == n}
    about = describe_run(model)
    shared = SharedTower(model)
    for task in tasks:
        questions = None
        outcomes: dict[tuple[str, int | None], list[bool]] = {}
        for entry in entries:
            name = key(entry, task, split, about["weights_sha256"])
            cell = done.get(name)
            if cell is None:
                if on_start:
                    on_start(task, entry.name)
                if questions is None:
                    drawn = samples(task, split=split, n=n)
                    questions = Questions(processor, drawn, batch_size, model.dtype, model.device)
                cell = {"key": name} | _cell(model, processor, questions, entry, shared, timings)
                cell |= {"task": task, "split": split, "about": about}
                cell |= _comparisons(cell, entry, outcomes)
                files.append_jsonl(output, cell)
            outcomes[entry.method, entry.budget] = _bits(cell)
            yield cell
        shared.forget()


def _cell(
    model: Any,
    processor: Any,
    questions: Questions,
    entry: Entry,
    shared: SharedTower,
    timings: int,
) -> dict[str, Any]:
    with patched_with(model, entry.plan) as patched:
        with shared.used_by(entry.plan):
            answers = answer_all(model, processor, questions, patched)
        seconds = _prefill_seconds(model, processor, questions, patched, timings)
    samples = questions.samples
    right = [
        is_correct(given.text, sample["answer"], sample["metric"])
        for given, sample in zip(answers, samples, strict=True)
    ]
    n, correct = len(samples), sum(right)
    return {
        "method": entry.method,
        "params": entry.plan.to_dict()["stages"],
        "plan": entry.plan.spec or UNPATCHED,
        "budget": entry.budget,
        "seed": entry.plan.seed,
        "n": n,
        "correct": correct,
        "score": correct / n,
        "ci": list(stats.wilson(correct, n)),
        "visual_avg": _mean(answers, "visual_avg"),
        "kept_llm": _mean(answers, "kept_llm"),
        "flops": _mean(answers, "prefill_flops"),
        "kv_bytes": _mean(answers, "kv_bytes"),
        "prefill_s": seconds,
        "outcomes": "".join("01"[value] for value in right),
    }


def _prefill_seconds(
    model: Any, processor: Any, questions: Questions, patched: Any, timings: int
) -> dict[str, Any] | None:
    """Median time to the first token of one picture and question, after one untimed run."""
    if not timings:
        return None
    seconds = []
    for sample in [questions.samples[0], *questions.samples[:timings]]:
        inputs = build_inputs(processor, [prompt(sample)])
        inputs = inputs.to(model.device, model.dtype)
        (result,) = answer(model, processor, inputs, patched, max_new_tokens=1)
        seconds.append(result.efficiency["ttft_s"])
    median, low, high = stats.median_interval(seconds[1:])
    return {"median": median, "ci": [low, high]}


def _comparisons(
    cell: dict[str, Any], entry: Entry, outcomes: dict[tuple[str, int | None], list[bool]]
) -> dict[str, Any]:
    """`vs_random` and `vs_downsample` of a cell: paired, on the same questions and budget."""
    found: dict[str, Any] = {}
    for baseline in BASELINES:
        theirs = outcomes.get((baseline, entry.budget))
        compared = theirs is not None and entry.method != baseline
        found[f"vs_{baseline}"] = stats.paired(_bits(cell), theirs).as_dict() if compared else None
    return found


def _bits(cell: dict[str, Any]) -> list[bool]:
    return [value == "1" for value in cell["outcomes"]]


def _mean(answers: list[Answer], name: str) -> float:
    return sum(result.efficiency[name] for result in answers) / len(answers)


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise MllmError with near names if one of `tasks` is not a yardstick task."""
    for task in tasks:
        if task not in known:
            expected = near(task, known)
            raise MllmError(
                f"there is no yardstick task {task!r}; did you mean: {expected}?",
                argument="tasks",
                given=task,
                expected=expected,
            )
