"""Who answers a search: a model in this process, or several worker processes."""

from __future__ import annotations

import difflib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm.errors import MllmError, PlanError
from mllm.eval import runner, sources, sweep
from mllm.eval.answer import unpatched_costs
from mllm.eval.asking import Questions, SharedTower, answer_all, marks
from mllm.eval.bench import time_pairs, twin
from mllm.eval.engines import Answered, Here, Job, Pool, devices_for
from mllm.eval.forecast import PROBE, probe
from mllm.eval.plans import patched_with
from mllm.eval.provenance import describe_run
from mllm.eval.stats import median_interval
from mllm.eval.tuning_answers import Block, outcomes
from mllm.plan import Plan
from mllm.yardstick import prompt

if TYPE_CHECKING:
    from mllm.eval.tuning_public import PublicTask


@dataclass(frozen=True)
class Chosen:
    """Tasks to search on.

    Attributes:
        names: each once; those of a group by their own names.
        public: the lmms-eval tasks among them.
    """

    names: list[str]
    public: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, names: Sequence[str], style: str, data_dir: str | os.PathLike | None = None
    ) -> Chosen:
        """By their names, as for `mllm sweep` or `mllm eval`.

        Raises:
            MllmError: an unknown task, or none; or lmms-eval, which has the public ones, is not
                installed.
            DataError: an unknown style, or data that cannot be had.
        """
        data_dir = runner.existing(data_dir)
        ours = [name for name in names if is_ours(name)]
        others = [name for name in names if name not in ours]
        found, public = [], {}
        if ours or not others:
            found = sweep.chosen_tasks(ours)
        if others:
            runner.need_lmms_eval()
            from mllm.eval import tuning_public

            public = tuning_public.load(others, data_dir)
        for split in ("dev", "test"):
            sweep.check_drawn(found, sweep.Questioning(split=split, style=style))
        return cls([*found, *public], public)

    def asked_of(self, model: Any, processor: Any, **options: Any) -> ModelEvaluator:
        """A model, and workers, that answer them; see :class:`ModelEvaluator`."""
        public = {}
        if self.public:
            from mllm.eval.tuning_public import PublicTask

            public = {
                name: PublicTask(name, task, processor) for name, task in self.public.items()
            }
        return ModelEvaluator(model, processor, self.names, public=public, **options)


def is_ours(name: str) -> bool:
    """Whether a task is none of lmms-eval's, be it for a slip."""
    known = (*sources.TASKS, *sources.GROUPS)
    near = difflib.get_close_matches(name, known, 1, 0.8)  # it is itself, if it is known
    return bool(near) or name.startswith("yardstick_")


class Asker(Here):
    """The engine of one process, which answers whole blocks of our own questions, too.

    It draws them itself, once: all plans share what was preprocessed, and what the tower made of
    it. A plan with a method on the KV cache is asked under the protocol `again`, for under plain
    generation the first token of an answer has seen the whole cache.

    Args:
        model, processor, name: as for `Here`.
        style: of the pictures.
        batch_size: questions per batch.
    """

    def __init__(
        self, model: Any, processor: Any, name: str = "", *, style: str, batch_size: int
    ) -> None:
        super().__init__(model, processor, name)
        self.style, self.batch_size = style, batch_size
        self._blocks: dict[tuple, Questions] = {}
        self._tower = SharedTower(model)

    def answer(self, jobs: Iterable[Job | tuple[int, Block, int]]) -> Iterator[Answered]:
        """Batches of prompts as `Here` answers them; of a block, what it adds up to."""
        for job in jobs:
            number, asked, _ = job
            try:
                if isinstance(asked, Block):
                    yield number, [self._block(asked)], 0.0
                else:
                    yield from super().answer([job])
            except torch.OutOfMemoryError as error:
                given = self.patched and self.patched.plan.spec
                raise PlanError("out of memory", argument="plan", given=given) from error

    def _block(self, block: Block) -> dict[str, Any]:
        plan = Plan([]) if self.patched is None else self.patched.plan
        questions = self.questions(block, protocol_of(plan))
        with self._tower.used_by(plan):
            answers = answer_all(self.model, self.processor, questions, self.patched)
        spent = [given.efficiency for given in answers]
        return {"outcomes": outcomes(marks(questions, answers)), **costs(spent)}

    def questions(self, block: Block, protocol: str) -> Questions:
        """A block, preprocessed once: all of the dev split are kept, of others one task's."""
        name = *block, protocol
        if name not in self._blocks:
            if block.split != "dev" and any(held[:2] != block[:2] for held in self._blocks):
                self._blocks.clear()
                self._tower.forget()
            make = sources.source_of(block.task).make
            samples = [
                make(block.task, block.split, index, self.style)
                for index in range(block.start, block.stop)
            ]
            self._blocks[name] = Questions(
                self.processor, samples, self.batch_size, self.model.dtype, self.model.device,
                protocol,
            )  # fmt: skip
        return self._blocks[name]


def protocol_of(plan: Plan) -> str:
    """How a plan is asked; see `mllm.eval.answer.answer`."""
    return "again" if any(stage.site == "cache" for stage in plan.stages) else "prompt"


def costs(spent: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums of `tuning_answers.UNITS`."""
    return {
        "flops": sum(cost["prefill_flops"] for cost in spent),
        "tokens": sum(cost["visual_avg"] for cost in spent),
        "kv_bytes": sum(cost["kv_bytes"] for cost in spent),
    }


class ModelEvaluator:
    """Asks a model; see :class:`mllm.eval.tuning_answers.Evaluator`.

    What is timed is timed in this process, while workers rest.

    Args:
        model, processor: as `mllm.load_model` gives them.
        tasks: of `mllm.eval.sources`, or names of `public`.
        style: of the pictures of our own tasks.
        batch_size: questions per batch.
        public: tasks of lmms-eval by name.
        workers: processes that answer; answers do not depend on it.
        load: loads the same model and its processor on the device it is given; picklable, needed
            with several workers.

    Raises:
        MllmError: workers without `load`, without a GPU each, or with another model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tasks: Sequence[str],
        style: str,
        batch_size: int,
        *,
        public: Mapping[str, PublicTask] | None = None,
        workers: int = 1,
        load: Callable[[str], tuple[Any, Any]] | None = None,
    ) -> None:
        self.model, self.processor, self.tasks, self.style = model, processor, tasks, style
        self.public, self.workers = public or {}, workers
        self.about = {**describe_run(model), "style": style}
        self.num_layers = model.config.get_text_config().num_hidden_layers
        make = functools.partial(Asker, style=style, batch_size=batch_size)
        self._here = make(model, processor)
        self._batch_size = batch_size
        pictures, self._inputs = self._first_question()
        (cost,) = unpatched_costs(model, self._inputs)
        self.tokens = cost["visual_in"] // max(1, pictures)
        self._engine: Any = self._here
        if workers != 1:
            self._engine = self._pool(load, make)

    def _pool(self, load: Any, make: Any) -> Pool:
        devices = devices_for(self.workers, self.model.device.type)
        if load is None:
            raise MllmError(
                f"{self.workers} workers load a model each, and nothing says how",
                argument="load",
                given=None,
                expected="load=functools.partial(mllm.eval.engines.load_on, PATH)",
            )
        pool = Pool(load, devices, make=make)
        for name in ("weights_sha256", "backend"):
            ours, theirs = self.about[name], pool.about[name]
            if ours != theirs:
                pool.close()
                raise MllmError(
                    f"the workers have loaded another model: {name} {theirs}, not {ours}",
                    argument="load",
                    given=theirs,
                    expected="what loads the model that was given, in its dtype",
                )
        return pool

    def __enter__(self) -> ModelEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        if isinstance(self._engine, Pool):
            self._engine.close()

    def size(self, task: str, split: str, n: int) -> int:
        if task in self.public:
            return self.public[task].size(split, n)
        return sources.at_most(task, split, n)

    def data(self, block: Block) -> str:
        if block.task in self.public:
            return self.public[block.task].digest(block)
        return sources.source_of(block.task).digest(block.split)

    def ask(self, plan: Plan, blocks: Sequence[Block]) -> Iterator[tuple[Block, dict[str, Any]]]:
        own = [block for block in blocks if block.task not in self.public]
        try:
            if own:
                self._engine.use(plan)
                jobs = ((number, block, 0) for number, block in enumerate(own))
                for number, (found,), _ in self._engine.answer(jobs):
                    yield own[number], found
            for block in blocks:
                if block.task in self.public:
                    task = self.public[block.task]
                    yield block, task.ask(self._engine, plan, block, self._batch_size)
        finally:
            self._here.release()  # workers take the next plan instead, if they are still there

    @functools.cached_property
    def _twin(self) -> Any:
        return twin(self.model)

    def time(self, plan: Plan, pairs: int) -> dict[str, Any]:
        with patched_with(self._twin, plan):
            times, _ = time_pairs(self.model, self._twin, self._inputs, pairs)
        unpatched, patched = times[:, 0, 0], times[:, 1, 0]
        share, *ci = median_interval(patched / unpatched)
        return {
            "pairs": pairs,
            "unpatched_s": float(np.median(unpatched)),
            "patched_s": float(np.median(patched)),
            "share": share,
            "ci": ci,
        }

    def _first_question(self) -> tuple[int, Any]:
        """How many pictures the first question has, and what the model is given of it."""
        task = self.tasks[0]
        if task in self.public:
            pictures, inputs = self.public[task].first_inputs()
            return pictures, inputs.to(self.model.device, self.model.dtype)
        questions = self._here.questions(Block(task, "dev", 0, 1), "prompt")
        return len(prompt(questions.samples[0])[0]), questions.batches[0]

    def probe(self) -> dict[str, float]:
        """Of a question of the first task without a plan: prefill `flops`, seconds of `drawing`
        and preprocessing it, and of `answering`, by several processes where there are some."""
        task = self.tasks[0]
        if task not in self.public:
            asked = sweep.Questioning(split="dev", style=self.style)
            drawn = sweep.draw(task, asked, PROBE)
            questions = Questions(
                self.processor, drawn, len(drawn), self.model.dtype, self.model.device
            )
            spent = [c for inputs in questions.batches for c in unpatched_costs(self.model, inputs)]
            drawing, answering = probe(self.model, self.processor, task, asked, self.workers)
            flops = sum(cost["prefill_flops"] for cost in spent) / len(drawn)
            return {"flops": flops, "drawing": drawing, "answering": answering / self.workers}
        started = time.perf_counter()
        n = self.size(task, "dev", PROBE)
        drawing = (time.perf_counter() - started) / n
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            ((_, found),) = self.ask(Plan([]), [Block(task, "dev", 0, n)])
            answering = (time.perf_counter() - started) / n
        return {"flops": found["flops"] / n, "drawing": drawing, "answering": answering}
