"""What `tune` is told of a plan, and the file from which a search that was stopped goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mllm.errors import DataError, MllmError
from mllm.eval import cells
from mllm.plan import Plan
from mllm.routers import adapter as adapters

SCHEMA = 1
#: What an answer costs, summed over the questions of a block: prefill FLOPs, visual tokens per
#: layer, bytes of the KV cache.
UNITS = ("flops", "tokens", "kv_bytes")


class Refused(Exception):
    """A plan that the model cannot run; the text says why."""


class Block(NamedTuple):
    """Questions `start` to `stop` of a task's `dev` or `test` split."""

    task: str
    split: str
    start: int
    stop: int


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

    def data(self, block: Block) -> str:
        """What tells the questions of a block from those of another version of its data."""

    def ask(
        self, plan: Plan, blocks: Sequence[Block]
    ) -> Iterator[tuple[Block, dict[str, Any]]]:
        """Blocks under a plan (without stages: of the model as it is), as they are answered.

        Yields:
            A block, and its `outcomes`, which are a text of 0 and 1, or a list of scores from 0 to
            1 where there are others; and the sums of `UNITS`.

        Raises:
            MllmError: the model cannot run the plan; or, of `workers`, a process died.
        """

    def time(self, plan: Plan, pairs: int) -> dict[str, Any]:
        """Prefills of one question: `unpatched_s`, `patched_s`, and `share` of the time with `ci`.

        Raises:
            MllmError: the model cannot run the plan.
        """


@dataclass(frozen=True)
class Record:
    """What is known of a plan on some questions.

    Attributes:
        rows: scores from 0 to 1, one row per task.
        costs: mean per question, by `UNITS`; `latency`, in seconds, where it was measured.
    """

    rows: list[list[float]]
    costs: dict[str, float]

    @property
    def n(self) -> int:
        """Questions of all tasks."""
        return sum(map(len, self.rows))

    @property
    def score(self) -> float:
        """Mean of all questions: where they are right or wrong, the share of right answers."""
        return sum(map(sum, self.rows)) / self.n


def outcomes(scores: Sequence[float]) -> str | list[float]:
    """Scores as a journal has them: a text of 0 and 1, or else a list."""
    if all(score in (0, 1) for score in scores):
        return "".join("01"[int(score)] for score in scores)
    return [round(float(score), 2) for score in scores]


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
        named = self._named("answers", plan)
        blocks = {
            task: [Block(task, split, *ends) for ends in self._ends(task, split, edges)]
            for task in tasks
        }
        lines = {
            block: {**named, "data": self.evaluator.data(block), **block._asdict()}
            for own in blocks.values()
            for block in own
        }
        missing = [block for block, line in lines.items() if _name(line) not in self._known]
        for block, found in self._ask(plan, missing):
            self._put(lines[block] | found)
        known = {block: self._known[_name(line)] for block, line in lines.items()}
        rows = [
            [float(score) for block in own for score in known[block]["outcomes"]]
            for own in blocks.values()
        ]
        n = sum(map(len, rows))
        sums = {name: sum((one[name] for one in known.values()), 0.0) for name in UNITS}
        return Record(rows, {name: value / n for name, value in sums.items()})

    def _ends(self, task: str, split: str, edges: Sequence[int]) -> list[tuple[int, int]]:
        own = [self.evaluator.size(task, split, edge) for edge in edges]
        return [ends for ends in zip([0, *own], own, strict=False) if ends[0] < ends[1]]

    def _ask(
        self, plan: Plan, blocks: Sequence[Block]
    ) -> Iterator[tuple[Block, dict[str, Any]]]:
        """What the evaluator says to blocks that are not known."""
        answered = iter(self.evaluator.ask(plan, blocks)) if blocks else iter(())
        while True:
            with _refusals(plan):
                one = next(answered, None)
            if one is None:
                return
            yield one

    def timing(self, plan: Plan, pairs: int) -> dict[str, Any]:
        """The evaluator's timing of a plan, measured once on a device, with so many threads.

        Raises:
            Refused: the model cannot run the plan.
        """
        where = {name: self.evaluator.about.get(name) for name in _MACHINE}
        line = {**self._named("timing", plan), "pairs": pairs, **where}
        if (known := self._known.get(_name(line))) is None:
            with _refusals(plan):
                known = line | self.evaluator.time(plan, pairs)
            self._put(known)
        return known

    def _named(self, kind: str, plan: Plan) -> dict[str, Any]:
        learnt = adapters.digest(plan.folder)
        return {"kind": kind, "plan": plan.spec, "plan_sha256": plan.sha256, **learnt}

    def _put(self, line: dict[str, Any]) -> None:
        self._file.append(line)
        self._known[_name(line)] = line


@contextlib.contextmanager
def _refusals(plan: Plan) -> Iterator[None]:
    """Errors of a plan as :class:`Refused`; one of the unpatched model is an error."""
    try:
        yield
    except MllmError as error:
        if not plan.stages or error.argument == "workers":  # a process that died
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
    own = [line[key] for key in _NAMES[line["kind"]]]
    return line["kind"], *own, line.get("adapter_sha256"), *where


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
