"""Methods x budgets x tasks x seeds on the yardstick: what is missing is run, the rest reused.

The same prompts, batches and generation as the lmms-eval model, without its per-request cost:
pictures are drawn and preprocessed once per task, and plans share the output of the vision tower.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm import attention
from mllm.errors import MllmError, PlanError
from mllm.eval import cells, sources, stats
from mllm.eval.answer import Answer, answer
from mllm.eval.plans import UNPATCHED, patched_with, plan_for_budget
from mllm.eval.provenance import describe_run
from mllm.eval.scoring import is_correct, normalise
from mllm.loading import build_inputs
from mllm.plan import Plan
from mllm.yardstick import prompt

SANITY = ("random", "downsample", "stride", "avgpool")
METHODS = (*SANITY, "visionzip", "divprune", "fastv", "visionzip+fastv:layer=2")
BUDGETS = (192, 64, 16)
MAX_NEW_TOKENS = 12
STOPS = ("\n",)
BASELINES = ("random", "downsample")
TOWER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Entry:
    """One row of the grid: a method at a budget (None for the unpatched model) with a seed."""

    method: str
    budget: int | None
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
    """

    n: int = 500
    split: str = "test"
    style: str = "plain"
    batch_size: int = 16
    timings: int = 8


def grid(
    model: Any,
    methods: Sequence[str],
    budgets: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    seeds_of: Mapping[str, Sequence[int]] | None = None,
    sanity_positions: Sequence[str] = ("compact",),
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

    Raises:
        PlanError: a template or budget that cannot be meant.
    """
    tokens = visual_tokens(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    sanity = [
        method if policy == "compact" else f"{method}:positions={policy}"
        for policy in sorted({"compact", *sanity_positions})
        for method in SANITY
    ]
    entries, skipped = [Entry(UNPATCHED, None, Plan([]))], []
    planned = set()
    for method in dict.fromkeys((*sanity, *methods)):
        for budget in sorted(set(budgets), reverse=True):
            try:
                plan = plan_for_budget(method, budget, tokens=tokens, num_layers=num_layers)
            except PlanError as error:
                if error.argument != "tokens_avg":
                    raise
                skipped.append(Skipped(method, budget, str(error)))
                continue
            for seed in _seeds(method, plan, seeds, seeds_of or {}):
                seeded = Plan(plan.stages, seed)
                if seeded.sha256 not in planned:
                    planned.add(seeded.sha256)
                    entries.append(Entry(method, budget, seeded))
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
        samples: of `mllm.eval.sources`.
        batch_size: questions per batch; like lengths go together, so padding is rare.
        dtype: of `pixel_values`.
        device: where the batches are kept.
    """

    def __init__(
        self, processor: Any, samples: list[dict], batch_size: int, dtype: Any, device: Any
    ) -> None:
        self.samples = samples
        asked = [prompt(sample) for sample in samples]
        lengths = [
            (len(pictures), len(processor.tokenizer(text)["input_ids"])) for pictures, text in asked
        ]
        order = sorted(range(len(samples)), key=lambda i: (lengths[i], i))
        self.indices = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self._processor, self._asked, self._to = processor, asked, (device, dtype)
        self._alone: dict[int, Any] = {}
        self.batches = [self._inputs(indices) for indices in self.indices]

    def alone(self, index: int) -> Any:
        """A batch of the question `index` only; made once."""
        if index not in self._alone:
            self._alone[index] = self._inputs([index])
        return self._alone[index]

    def _inputs(self, indices: list[int]) -> Any:
        return build_inputs(self._processor, [self._asked[i] for i in indices]).to(*self._to)


class SharedTower:
    """Remembers what the vision tower gave for batches that come again.

    That is its output, and the queries, keys and values that plans have read in it. Plans that
    change something inside the tower or before it run it themselves. The batches' `pixel_values`
    must stay alive and in place.

    Args:
        model: the model.
        limit: bytes to remember at most; what comes after is computed again every time.
    """

    def __init__(self, model: Any, limit: int = TOWER_BYTES) -> None:
        self.tower = model.get_encoder("image")
        self.limit, self.held = limit, 0
        self._outputs: dict[tuple, Any] = {}
        self._calls: dict[tuple, list[tuple]] = {}

    @contextlib.contextmanager
    def used_by(self, plan: Plan) -> Iterator[None]:
        """Serve what is remembered inside this context, if `plan` allows it."""
        if not shares_tower(plan):
            yield
            return
        own = self.tower.__dict__.get("forward")
        self.tower.forward = functools.partial(self._remembered, self.tower.forward)
        try:
            yield
        finally:
            if own is None:
                del self.tower.forward
            else:
                self.tower.forward = own

    def _remembered(self, forward: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        name = (pixel_values.data_ptr(), tuple(pixel_values.shape), repr(sorted(options.items())))
        taps = attention.opened()
        if name in self._outputs and all((name, module) in self._calls for module in taps):
            for module, readers in taps.items():
                for call in self._calls[name, module]:
                    for tap in readers:
                        tap(*call)
            return self._outputs[name]
        calls: dict[Any, list[tuple]] = {module: [] for module in taps}
        recorded = {
            module: [*readers, lambda *call, kept=calls[module]: kept.append(call)]
            for module, readers in taps.items()
        }
        with attention.taps(recorded):
            output = forward(pixel_values, **options)
        new = {(name, module): made for module, made in calls.items()}
        size = _bytes(list(new.values())) + (0 if name in self._outputs else _bytes(output))
        if self.held + size <= self.limit:
            self.held += size
            self._outputs.setdefault(name, output)
            self._calls |= new
        return output

    def forget(self) -> None:
        """Free everything: the next task has other pictures."""
        self._outputs.clear()
        self._calls.clear()
        self.held = 0


def _bytes(value: Any) -> int:
    """Bytes of the tensors in nested lists and outputs."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def shares_tower(plan: Plan) -> bool:
    """Whether a plan leaves pictures and tower as they are, and only reads there."""
    return all(stage.site not in ("pixels", "tower") for stage in plan.stages)


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
    style: str = "plain",
    batch_size: int = 16,
    timings: int = 8,
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
        n, split, style, batch_size, timings: see :class:`Questioning`.
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

    asked = Questioning(n, split, style, batch_size, timings)
    about = describe_run(model)
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
        baselines = {(e.method, e.budget): e for e in reversed(entries) if e.method in BASELINES}
        for task, entry, cell in made:
            name = identity(entry, task, about, asked)
            cell = {"schema": cells.SCHEMA, "key": name[0], **cell}
            for baseline in BASELINES:
                first = baselines.get((baseline, entry.budget))
                theirs = first and done.get(identity(first, task, about, asked))
                compared = theirs is not None and entry.method != baseline
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
    return name, asked.n, asked.style, data(task, asked.split), about["backend"]


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
    about = describe_run(model)
    shared = SharedTower(model)
    for task, entries in jobs:
        drawn = draw(task, asked)
        questions = Questions(processor, drawn, asked.batch_size, model.dtype, model.device)
        for entry in entries:
            if on_start:
                on_start(task, entry.name)
            cell = _cell(model, processor, questions, entry, shared, asked.timings)
            cell |= {"task": task, "split": asked.split, "style": asked.style}
            cell["data"] = data(task, asked.split)
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
        inputs = questions.alone(index)
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
    tasks = [task for name in names for task in sources.expand(name)]
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
