"""Methods x budgets x tasks x seeds: what is missing is run, the rest reused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import cells, sources, stats
from mllm.eval.answer import Answer, Protocol, answer
from mllm.eval.asking import Questions, SharedTower, answer_all, marks
from mllm.eval.plans import (
    UNPATCHED,
    baseline_at,
    on_cache,
    patched_with,
    plan_for_budget,
    plan_for_share,
    with_adapter,
)
from mllm.eval.provenance import describe_run
from mllm.eval.scoring import normalise
from mllm.loading import build_inputs
from mllm.plan import Plan
from mllm.routers import adapter as adapters
from mllm.yardstick import prompt

SANITY = ("random", "downsample", "stride", "avgpool")
METHODS = (*SANITY, "visionzip", "divprune", "fastv", "visionzip+fastv:layer=2")
BUDGETS = (192, 64, 16)
KV_SANITY = ("randomkv", "streamingllm")
KV_BUDGETS = (0.5, 0.25, 0.1)
BASELINES = ("random", "downsample")


@dataclass(frozen=True)
class Entry:
    """One row of the grid: a method at a budget (None for the unpatched model) with a seed.

    A budget is a number of visual tokens, or for methods on the KV cache a share of the slots.
    """

    method: str
    budget: int | float | None
    plan: Plan

    @property
    def name(self) -> str:
        """For progress displays."""
        if self.budget is None:
            return self.method
        seed = f", seed {self.plan.seed}" if self.plan.seed else ""
        return f"{self.method} @ {self.budget}{seed}"


@dataclass(frozen=True)
class Skipped:
    """A method that cannot reach a budget, and why."""

    method: str
    budget: int
    reason: str


@dataclass(frozen=True)
class Questioning:
    """What is asked in every cell, and how.

    Attributes:
        n: questions per task.
        split: `test`, `dev` or `train`.
        style: of the pictures.
        batch_size: questions per batch.
        timings: single-picture prefills to time per cell, tower included; 0 for none.
        protocol: when answers are read: see :func:`mllm.eval.answer.answer`.
    """

    n: int = 500
    split: str = "test"
    style: str = "plain"
    batch_size: int = 16
    timings: int = 8
    protocol: Protocol = "prompt"


def grid(
    model: Any,
    methods: Sequence[str],
    budgets: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    seeds_of: Mapping[str, Sequence[int]] | None = None,
    sanity_positions: Sequence[str] = ("compact",),
    kv_budgets: Sequence[float] = KV_BUDGETS,
    fixed: Mapping[str, int] | None = None,
    adapter: str | None = None,
) -> tuple[list[Entry], list[Skipped]]:
    """The plans of a sweep, sanity rows first: others are compared with them.

    Methods that draw nothing at random have one entry per budget, with seed 0. Neither the order
    of the arguments nor a repetition in them matters.

    Args:
        model: the model they are for.
        methods: spec templates (`visionzip`, `fastv:layer=1`, `visionzip+fastv:layer=2`); the
            sanity rows are added.
        budgets: visual tokens per image, averaged over decoder layers.
        seeds: seeds of the methods that draw.
        seeds_of: other seeds for some of them, by template or by the name of a method.
        sanity_positions: position policies of the sanity rows. `compact` ones are always there;
            `original` ones are called `random:positions=original` and so on.
        kv_budgets: for templates of methods on the KV cache, which have their own sanity rows:
            shares of the slots per layer and KV head.
        fixed: whole plans that keep what they keep, by spec text; the budget says only which rows
            they stand beside.
        adapter: folder with what the trained ones have learnt, under any of their budgets.

    Raises:
        PlanError: a template, budget or adapter that cannot be meant.
    """
    cached = [method for method in dict.fromkeys(methods) if on_cache(method)]
    methods = [method for method in methods if method not in cached]
    counted = bool(methods or fixed or not cached)
    tokens = visual_tokens(model) if counted else 0
    num_layers = model.config.get_text_config().num_hidden_layers
    sanity = [
        method if policy == "compact" else f"{method}:positions={policy}"
        for policy in sorted({"compact", *sanity_positions})
        for method in SANITY
    ]
    entries, skipped = [Entry(UNPATCHED, None, Plan([]))], []
    plans: list[tuple[str, int | float, Plan]] = []
    planned = set()
    for method in dict.fromkeys((*sanity, *methods)) if counted else ():
        for budget in sorted(set(budgets), reverse=True):
            try:
                plan = plan_for_budget(method, budget, tokens=tokens, num_layers=num_layers)
            except PlanError as error:
                if error.argument not in ("tokens_avg", "keep"):  # or a budget not trained
                    raise
                skipped.append(Skipped(method, budget, str(error)))
                continue
            plans.append((method, budget, plan))
    plans += [(text, budget, Plan.from_spec(text)) for text, budget in (fixed or {}).items()]
    for method in dict.fromkeys((*KV_SANITY, *cached)) if cached else ():
        # A method without a budget holds all tokens: it stands at 1.0.
        budgeted = plan_for_share(method, 0.5) is not None
        for share in sorted(set(kv_budgets), reverse=True) if budgeted else (1.0,):
            plans.append((method, share, plan_for_share(method, share)))
    for method, budget, plan in plans:
        for seed in _seeds(method, plan, seeds, seeds_of or {}):
            seeded = Plan(plan.stages, seed)
            if seeded.sha256 not in planned:
                planned.add(seeded.sha256)
                entries.append(Entry(method, budget, seeded))
    with_adapter([entry.plan for entry in entries], adapter)
    return entries, skipped


def draws(plan: Plan) -> bool:
    """Whether a plan uses random numbers, so that its seed matters."""
    return any(stage.draws for stage in plan.stages)


def _seeds(
    method: str, plan: Plan, seeds: Sequence[int], seeds_of: Mapping[str, Sequence[int]]
) -> list[int]:
    if not draws(plan):
        return [0]
    names = {stage.info.name for stage in plan.stages}
    own = next((v for k, v in seeds_of.items() if k in names), seeds)
    return sorted(set(seeds_of.get(method, own)))


def visual_tokens(model: Any) -> int:
    """Visual tokens of one square picture, from the config of the vision tower.

    Raises:
        DataError: the config does not say.
    """
    config = model.config.vision_config
    side, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not (isinstance(side, int) and isinstance(patch, int)):
        raise _no_grid(model, "has no fixed number of visual tokens per picture")
    return (side // patch) ** 2


def check_tokens(model: Any, processor: Any, task: str, asked: Questioning) -> None:
    """See that pictures have the number of tokens that budgets are fitted to.

    Raises:
        DataError: they have another, because the model cuts them into tiles, say.
    """
    pictures, text = prompt(draw(task, asked, 1)[0])
    ids = build_inputs(processor, [(pictures, text)])["input_ids"]
    there = int((ids == model.config.image_token_id).sum())
    if there != len(pictures) * visual_tokens(model):
        raise _no_grid(
            model, f"gives {len(pictures)} picture(s) of {task} {there} visual tokens, and budgets "
            f"are fitted to {visual_tokens(model)} of each"
        )  # fmt: skip


def _no_grid(model: Any, why: str) -> DataError:
    return DataError(
        f"a sweep needs a model that sees every picture as one grid; {type(model).__name__} {why}",
        argument="model",
        given=type(model).__name__,
        expected="a LLaVA as LLaVA 1.5; mllm eval takes plans for other models",
    )


def key(entry: Entry, task: str, split: str, weights_sha256: str) -> str:
    """Name of a cell: what it depends on, hashed."""
    parts = [entry.plan.sha256, task, split, entry.plan.seed, weights_sha256]
    parts += adapters.digest(entry.plan.folder).values()
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run(
    model: Any,
    processor: Any,
    entries: Sequence[Entry],
    tasks: Sequence[str],
    output: str | os.PathLike,
    *,
    n: int = 500,
    split: str = "test",
    style: str = "plain",
    batch_size: int = 16,
    timings: int = 8,
    protocol: Protocol = "prompt",
    workers: int = 1,
    load: Callable[[], tuple[Any, Any]] | None = None,
    on_start: Callable[[str, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Evaluate every entry on every task; cells that `output` has already are not run again.

    Args:
        model, processor: as `mllm.load_model` gives them.
        entries: rows of the grid, sanity rows first (see :func:`grid`).
        tasks: tasks of `mllm.eval.sources`.
        output: JSON Lines file; each finished cell is appended at once.
        n, split, style, batch_size, timings, protocol: see :class:`Questioning`.
        workers: processes that share the tasks among them; they change no cell.
        load: loads `model` and `processor` in a worker; picklable, needed with several workers.
        on_start: told the task and the entry's name before work on it starts.

    Yields:
        Every cell of the grid (contracts, Sweep): first those of the file, then new ones as they
        finish.

    Raises:
        DataError: `output` is not a sweep file, holds another model's cells, or is being written
            to by another process.
    """
    from mllm.eval import workers as processes

    asked = Questioning(n, split, style, batch_size, timings, protocol)
    about = describe_run(model, processor)
    with cells.ResultsFile(output) as file:
        done, todo = split_cells(entries, tasks, output, about, asked)
        for task in tasks:
            for entry in entries:
                if (cell := done.get(identity(entry, task, about, asked))) is not None:
                    yield cell
        jobs = [(task, missing) for task, missing in todo.items() if missing]
        if workers > 1 and len(jobs) > 1:
            threads = max(1, torch.get_num_threads() // workers)
            made = processes.evaluate(load, jobs, asked, workers, threads, on_start)
        else:
            made = evaluate(model, processor, jobs, asked, on_start)
        baselines = {(e.method, e.budget): e for e in reversed(entries)}
        for task, entry, cell in made:
            name = identity(entry, task, about, asked)
            cell = {"schema": cells.SCHEMA, "key": name[0], **cell}
            for baseline in BASELINES:
                other = baseline_at(baseline, entry.budget)
                first = baselines.get((other, entry.budget))
                theirs = first and done.get(identity(first, task, about, asked))
                compared = theirs is not None and entry.method != other
                cell[f"vs_{baseline}"] = (
                    stats.paired(_bits(cell), _bits(theirs)).as_dict() if compared else None
                )
            file.append(cell)
            done[name] = cell
            yield cell


def identity(
    entry: Entry, task: str, about: Mapping[str, Any], asked: Questioning
) -> cells.Identity:
    """The :func:`mllm.eval.cells.identity` that a cell will have."""
    name = key(entry, task, asked.split, about["weights_sha256"])
    return (
        name, asked.n, asked.style, data(task, asked.split), about["backend"], asked.protocol
    )  # fmt: skip


def split_cells(
    entries: Sequence[Entry],
    tasks: Sequence[str],
    output: str | os.PathLike,
    about: Mapping[str, Any],
    asked: Questioning,
) -> tuple[dict[tuple, dict[str, Any]], dict[str, list[Entry]]]:
    """What a results file has of a grid, by identity, and the entries that each task misses.

    Raises:
        DataError: `output` is not a sweep file, or holds another model's cells.
    """
    rows = cells.read(output).rows
    cells.check_model(rows, about, output)
    done = {cells.identity(cell): cell for cell in rows}
    todo = {
        task: [entry for entry in entries if identity(entry, task, about, asked) not in done]
        for task in tasks
    }
    return done, todo


def evaluate(
    model: Any,
    processor: Any,
    jobs: Sequence[tuple[str, Sequence[Entry]]],
    asked: Questioning,
    on_start: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, Entry, dict[str, Any]]]:
    """Run the entries of each task: yields task, entry, and the cell without its comparisons."""
    about = describe_run(model, processor)
    shared = SharedTower(model)
    for task, entries in jobs:
        drawn = draw(task, asked)
        questions = Questions(
            processor, drawn, asked.batch_size, model.dtype, model.device, asked.protocol
        )
        for entry in entries:
            if on_start:
                on_start(task, entry.name)
            cell = _cell(model, processor, questions, entry, shared, asked.timings)
            cell |= {"task": task, "split": asked.split, "style": asked.style}
            cell |= {"data": data(task, asked.split), "protocol": asked.protocol}
            yield task, entry, cell | {"n_asked": asked.n, "about": about}
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
    right = marks(questions, answers)
    n, correct = len(right), sum(right)
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
        "answers": [normalise(given.text) for given in answers],
    }


def _prefill_seconds(
    model: Any, processor: Any, questions: Questions, patched: Any, timings: int
) -> dict[str, Any] | None:
    """Median time to the first token of one picture and question, after one untimed run."""
    if not timings:
        return None
    seconds = []
    for index in [0, *range(min(timings, len(questions.samples)))]:
        inputs = questions.inputs([index], patched)
        (result,) = answer(model, processor, inputs, patched, max_new_tokens=1)
        seconds.append(result.efficiency["ttft_s"])
    median, low, high = stats.median_interval(seconds[1:])
    return {"median": median, "ci": [low, high]}


def _bits(cell: dict[str, Any]) -> list[bool]:
    return [value == "1" for value in cell["outcomes"]]


def _mean(answers: list[Answer], name: str) -> float:
    return sum(result.efficiency[name] for result in answers) / len(answers)


def data(task: str, split: str) -> str:
    """What tells the questions of a task from those of another version of its data."""
    return sources.source_of(task).digest(split)


def chosen_tasks(names: Sequence[str]) -> list[str]:
    """Tasks by name, each once; names of sources and `admitted` stand for several.

    Raises:
        MllmError: an unknown task, or the embedded model has none that are admitted.
    """
    bare = [name.removeprefix("yardstick_") for name in names]  # as `mllm eval` calls them
    tasks = [task for name in bare for task in sources.expand(name)]
    if not tasks:
        raise MllmError(
            "the embedded model has no admitted tasks; name some with --tasks",
            argument="tasks",
            expected=", ".join(sources.TASKS),
        )
    return list(dict.fromkeys(tasks))


def check_drawn(tasks: Sequence[str], asked: Questioning) -> None:
    """See that there are questions of every task in this split and style.

    Raises:
        DataError: an unknown split or style, or data that are not there.
    """
    for task in tasks:
        draw(task, asked, 1)


def draw(task: str, asked: Questioning, most: int | None = None) -> list[dict[str, Any]]:
    """The questions of a task, as many as there are up to `asked.n`, or the first `most`."""
    n = sources.at_most(task, asked.split, asked.n)
    return sources.samples(task, asked.split, n if most is None else min(most, n), asked.style)
