"""What `tune` asks and measures, and the file from which a search that was stopped goes on."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import cells, sources
from mllm.eval.answer import unpatched_costs
from mllm.eval.asking import Questions, SharedTower, answer_all, marks
from mllm.eval.bench import time_pairs, twin
from mllm.eval.plans import patched_with
from mllm.eval.provenance import describe_run
from mllm.eval.stats import median_interval
from mllm.plan import Plan
from mllm.yardstick import prompt

SCHEMA = 1
#: What an answer costs, summed over the questions of a block: prefill FLOPs, visual tokens per
#: layer, bytes of the KV cache.
UNITS = ("flops", "tokens", "kv_bytes")


class Refused(Exception):
    """A plan that the model cannot run; the text says why."""


class Evaluator(Protocol):
    """Where a search gets its answers: the place to put something else than a model and its tasks.

    Attributes:
        about: what the answers depend on, as JSON; a file of answers belongs to it.
        tokens: visual tokens of an image.
        num_layers: decoder layers.
    """

    about: dict[str, Any]
    tokens: int
    num_layers: int

    def size(self, task: str, split: str, n: int) -> int:
        """`n`, or the number of questions there are if that is less."""

    def data(self, task: str, split: str) -> str:
        """What tells the questions of a task from those of another version of its data."""

    def ask(self, plan: Plan, task: str, split: str, start: int, stop: int) -> dict[str, Any]:
        """Questions `start` to `stop` under a plan (without stages: of the model as it is).

        Returns:
            `outcomes`, a text of 0 and 1, and the sums of `UNITS`.

        Raises:
            MllmError: the model cannot run the plan.
        """

    def time(self, plan: Plan, pairs: int) -> dict[str, Any]:
        """Prefills of one question: `unpatched_s`, `patched_s`, and `share` of the time with `ci`.

        Raises:
            MllmError: the model cannot run the plan.
        """


class ModelEvaluator:
    """Asks a model the questions of `mllm.eval.sources`; see :class:`Evaluator`.

    A plan with a method on the KV cache is asked under the protocol `again`, for under plain
    generation the first token of an answer has seen the whole cache.

    Args:
        model, processor: as `mllm.load_model` gives them.
        tasks: of `mllm.eval.sources`.
        style: of the pictures.
        batch_size: questions per batch.
    """

    def __init__(
        self, model: Any, processor: Any, tasks: Sequence[str], style: str, batch_size: int
    ) -> None:
        self.model, self.processor = model, processor
        self.tasks, self.style, self.batch_size = tasks, style, batch_size
        self.about = {**describe_run(model), "style": style}
        self.num_layers = model.config.get_text_config().num_hidden_layers
        self._blocks: dict[tuple, Questions] = {}
        self._tower = SharedTower(model)
        first = self._questions(tasks[0], "dev", 0, 1, "prompt")
        (cost,) = unpatched_costs(model, first.batches[0])
        self.tokens = cost["visual_in"] // max(1, len(prompt(first.samples[0])[0]))

    @functools.cached_property
    def _twin(self) -> Any:
        return twin(self.model)

    def size(self, task: str, split: str, n: int) -> int:
        return sources.at_most(task, split, n)

    def data(self, task: str, split: str) -> str:
        return sources.source_of(task).digest(split)

    def ask(self, plan: Plan, task: str, split: str, start: int, stop: int) -> dict[str, Any]:
        cached = any(stage.site == "cache" for stage in plan.stages)
        protocol = "again" if cached else "prompt"
        questions = self._questions(task, split, start, stop, protocol)
        try:
            with patched_with(self.model, plan) as patched, self._tower.used_by(plan):
                answers = answer_all(self.model, self.processor, questions, patched)
        except torch.OutOfMemoryError as error:
            raise PlanError("out of memory", argument="plan", given=plan.spec) from error
        spent = [given.efficiency for given in answers]
        return {
            "outcomes": "".join("01"[right] for right in marks(questions, answers)),
            "flops": sum(cost["prefill_flops"] for cost in spent),
            "tokens": sum(cost["visual_avg"] for cost in spent),
            "kv_bytes": sum(cost["kv_bytes"] for cost in spent),
        }

    def time(self, plan: Plan, pairs: int) -> dict[str, Any]:
        inputs = self._questions(self.tasks[0], "dev", 0, 1, "prompt").batches[0]
        with patched_with(self._twin, plan):
            times, _ = time_pairs(self.model, self._twin, inputs, pairs)
        unpatched, patched = times[:, 0, 0], times[:, 1, 0]
        share, *ci = median_interval(patched / unpatched)
        return {
            "pairs": pairs,
            "unpatched_s": float(np.median(unpatched)),
            "patched_s": float(np.median(patched)),
            "share": share,
            "ci": ci,
        }

    def _questions(self, task: str, split: str, start: int, stop: int, protocol: str) -> Questions:
        """A block, preprocessed once: all of them of the dev split, of others one task's."""
        name = task, split, start, stop, protocol
        if name not in self._blocks:
            if split != "dev" and any(held[:2] != (task, split) for held in self._blocks):
                self._blocks.clear()
                self._tower.forget()
            make = sources.source_of(task).make
            samples = [make(task, split, index, self.style) for index in range(start, stop)]
            self._blocks[name] = Questions(
                self.processor, samples, self.batch_size, self.model.dtype, self.model.device,
                protocol,
            )  # fmt: skip
        return self._blocks[name]


@dataclass(frozen=True)
class Record:
    """What is known of a plan on some questions.

    Attributes:
        rows: outcomes, one text of 0 and 1 per task.
        costs: mean per question, by `UNITS`; `latency`, in seconds, where it was measured.
    """

    rows: list[str]
    costs: dict[str, float]

    @property
    def bits(self) -> list[list[bool]]:
        """`rows`, as `mllm.eval.stats` takes them."""
        return [[value == "1" for value in row] for row in self.rows]

    @property
    def n(self) -> int:
        """Questions of all tasks."""
        return sum(map(len, self.rows))

    @property
    def score(self) -> float:
        """Share of right answers."""
        return sum(row.count("1") for row in self.rows) / self.n


class Journal:
    """An evaluator's answers, each asked once: those that the file has are not asked again.

    The file is JSON Lines, only appended to, and only inside the `with` block: `about`, then
    blocks of answers and timings as they are measured.

    Args:
        path: the file; made with the first line.
        evaluator: asked what the file has not.

    Raises:
        DataError: the file is none of these, belongs to another model, or is being written to.
    """

    def __init__(self, path: str | os.PathLike, evaluator: Evaluator) -> None:
        self.path, self.evaluator = Path(path), evaluator
        self.asked = self.reused = 0
        self._file = cells.ResultsFile(path)
        self._about = {"kind": "about", "schema": SCHEMA, **evaluator.about}

    def __enter__(self) -> Journal:
        self._file.__enter__()
        try:
            self._known = {_name(line): line for line in read(self.path, self._about)}
        except DataError:
            self._file.__exit__()
            raise
        if not self._known:
            self._put(self._about)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def answers(self, plan: Plan, tasks: Iterable[str], split: str, edges: Sequence[int]) -> Record:
        """A plan's answers to the first `edges[-1]` questions of each task, asked block by block.

        Raises:
            Refused: the model cannot run the plan.
        """
        rows, sums = [], dict.fromkeys(UNITS, 0.0)
        named = {"kind": "answers", "plan": plan.spec, "plan_sha256": plan.sha256}
        for task in tasks:
            row = ""
            own = [self.evaluator.size(task, split, edge) for edge in edges]
            for start, stop in zip([0, *own], own, strict=False):
                if start == stop:
                    continue
                block = self._block(plan, named, task, split, start, stop)
                row += block["outcomes"]
                sums = {name: value + block[name] for name, value in sums.items()}
            rows.append(row)
        n = sum(map(len, rows))
        return Record(rows, {name: value / n for name, value in sums.items()})

    def timing(self, plan: Plan, pairs: int) -> dict[str, Any]:
        """The evaluator's timing of a plan, measured once on a device, with so many threads.

        Raises:
            Refused: the model cannot run the plan.
        """
        where = {name: self.evaluator.about.get(name) for name in _MACHINE}
        line = {"kind": "timing", "plan": plan.spec, "plan_sha256": plan.sha256, "pairs": pairs}
        line |= where
        if (known := self._known.get(_name(line))) is None:
            with _refusals(plan):
                known = line | self.evaluator.time(plan, pairs)
            self._put(known)
        return known

    def _block(
        self, plan: Plan, named: dict[str, Any], task: str, split: str, start: int, stop: int
    ) -> dict[str, Any]:
        asked = {"task": task, "data": self.evaluator.data(task, split), "split": split}
        line = {**named, **asked, "start": start, "stop": stop}
        if (known := self._known.get(_name(line))) is None:
            with _refusals(plan):
                known = line | self.evaluator.ask(plan, task, split, start, stop)
            self._put(known)
            self.asked += stop - start
        else:
            self.reused += stop - start
        return known

    def _put(self, line: dict[str, Any]) -> None:
        self._file.append(line)
        self._known[_name(line)] = line


@contextlib.contextmanager
def _refusals(plan: Plan) -> Iterator[None]:
    """Errors of a plan as :class:`Refused`; one of the unpatched model is an error."""
    try:
        yield
    except MllmError as error:
        if not plan.stages:
            raise
        raise Refused(str(error)) from error


_NAMES = {
    "about": (),
    "answers": ("plan_sha256", "task", "data", "split", "start", "stop"),
    "timing": ("plan_sha256", "pairs"),
}
#: What a time belongs to besides.
_MACHINE = ("device", "threads")


def _name(line: dict[str, Any]) -> tuple:
    """What tells a line from others."""
    where = [line.get(key) for key in _MACHINE] if line["kind"] == "timing" else []
    return line["kind"], *(line[key] for key in _NAMES[line["kind"]]), *where


def read(path: str | os.PathLike, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole lines of a journal; none if there is no such file.

    Raises:
        DataError: a line is of another kind or schema, or the file is about another model.
    """
    lines, _ = cells.parsed(path)
    for number, line in lines:
        kind = line.get("kind") if isinstance(line, dict) else None
        if kind not in _NAMES or not line.keys() >= {*_NAMES[kind]}:
            raise cells.foreign(path, number, "not a line of a tuning")
        if kind == "about":
            for key in ("schema", "weights_sha256", "backend", "style"):
                if line.get(key) != about.get(key):
                    raise DataError(
                        f"{path} was written with {key} {line.get(key)!r}, not {about.get(key)!r}; "
                        "give another --output",
                        argument="output",
                        given=path,
                        expected="another --output",
                    )
    if lines and lines[0][1]["kind"] != "about":
        raise cells.foreign(path, lines[0][0], "not the first line of a tuning")
    return [line for _, line in lines]
