"""The questions of a report whose answers changed: which to show, their pictures, what was kept.

Thousands of questions change; a page shows some. Pictures of our own tasks are made again from
task, split and number; those of public data sets are not in the results. What a plan kept is not
in the results either: the model is asked again, where it is the one that gave them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import sources, table
from mllm.eval.plans import UNPATCHED, patched_with
from mllm.eval.report import Flip
from mllm.plan import Plan

OTHER_DATA = "pictures of questions from another version of the data are not shown"


@dataclass(frozen=True)
class Found:
    """A question that changed.

    Attributes:
        task, index: which one.
        right: whether the reference answered it.
        first: cell of the reference.
        changed: cells of the plans that changed it, the most telling first.
    """

    task: str
    index: int
    right: bool
    first: dict[str, Any]
    changed: list[dict[str, Any]]


def choose(
    entries: Iterable[table.Entry], tasks: Sequence[str], limit: int, sanity: Iterable[str] = ()
) -> tuple[list[Found], list[Found], dict[bool, int]]:
    """Questions that plans changed against the unpatched model.

    From every task in turn, those first that most methods changed, sanity rows not counted.

    Args:
        entries: of :func:`mllm.eval.table.grouped`.
        tasks: in the order of the page.
        limit: questions lost, and questions won, at most.
        sanity: names of sanity rows.

    Returns:
        Lost and won questions, and how many there are of each: right before -> number.
    """
    entries, sanity = [entry for entry in entries if entry.runs], set(sanity)
    base = next((entry for entry in entries if entry.method == UNPATCHED), None)
    others = [entry for entry in entries if entry is not base]
    # What a large budget loses says more than what a small one does.
    others.sort(key=lambda e: (e.method in sanity, -float(e.budget or 0)))
    counts = {True: 0, False: 0}
    if base is None or not others:
        return [], [], counts
    by_task: dict[bool, list[list[Found]]] = {True: [], False: []}
    for task in tasks:
        first = base.runs[0][task]
        before = table.bits(first)
        cells = [entry.runs[0][task] for entry in others]
        changed = np.stack([table.bits(cell) for cell in cells]) != before
        methods = np.array([entry.method not in sanity for entry in others])
        weight = (changed & methods[:, None]).sum(0) + changed.any(0) / (1 + len(others))
        for right in (True, False):
            there = np.flatnonzero(changed.any(0) & (before == right))
            counts[right] += len(there)
            best = there[np.argsort(-weight[there], kind="stable")][:limit]
            by_task[right].append(
                [
                    Found(task, int(i), right, first, [
                        cell for cell, other in zip(cells, changed[:, i], strict=True) if other
                    ])
                    for i in best
                ]
            )  # fmt: skip
    return in_turn(by_task[True], limit), in_turn(by_task[False], limit), counts


def in_turn(lists: Sequence[Sequence[Found]], limit: int) -> list[Found]:
    """The first of every list, then the second of every list, and so on, up to `limit`."""
    mixed = [found for row in zip_longest(*lists) for found in row if found is not None]
    return mixed[:limit]


class Pictures:
    """Questions and pictures of cells, and what plans kept of these where a model is given.

    Args:
        model: (model, processor) to ask again; None draws nothing.
        docs: `(cell, index)` to the question and the answer that the results hold; None where
            they hold none.

    Attributes:
        missing: why some pictures or drawings are not there.
    """

    def __init__(
        self,
        model: tuple[Any, Any] | None = None,
        docs: Callable[[dict[str, Any], int], tuple[str, str]] | None = None,
    ) -> None:
        self.model, self.docs = model, docs
        self.missing: dict[str, None] = {}

    def flip(self, found: Found, first: str = UNPATCHED) -> Flip:
        """The card of a question."""
        sample = self._sample(found.first, found.index)
        question, truth = self.docs(found.first, found.index) if self.docs else ("", "")
        if sample is not None and question not in ("", sample["question"]):
            self.missing[OTHER_DATA], sample = None, None
        said: dict[str, list[dict[str, Any]]] = {}
        for cell in found.changed:
            said.setdefault(answer_of(cell, found.index, not found.right), []).append(cell)
        pictures = []
        if sample is not None:
            question, truth = sample["question"], sample["answer"]
            pictures = self._pictures(sample, found.changed[0])
        return Flip(
            pictures,
            found.task,
            question or f"question {found.index + 1}",
            truth,
            answer_of(found.first, found.index, found.right),
            [(text, at_budgets(cells)) for text, cells in said.items()],
            first,
        )

    def _sample(self, cell: dict[str, Any], index: int) -> dict[str, Any] | None:
        try:
            source = sources.source_of(cell["task"])
            if cell.get("data", "scenes 1") != source.digest(cell["split"]):
                self.missing[OTHER_DATA] = None
                return None
            number = int(cell["ids"][index]) if "ids" in cell else index
            return _made(cell["task"], cell["split"], number, cell.get("style", "plain"))
        except DataError as error:
            if cell["task"] in sources.TASKS:
                self.missing[str(error)] = None
            else:
                self.missing["pictures of public data sets are not in the results"] = None
            return None

    def _pictures(self, sample: dict[str, Any], cell: dict[str, Any]) -> list[tuple[str, Any]]:
        from mllm.yardstick import prompt

        plain = [("", picture) for picture in prompt(sample)[0]]
        if self.model is None:
            return plain
        try:
            return self._drawn(sample, cell)
        except MllmError as error:
            self.missing[f"{cell['plan']} is not drawn: {error}"] = None
            return plain

    def _drawn(self, sample: dict[str, Any], cell: dict[str, Any]) -> list[tuple[str, Any]]:
        """Each view as the model saw it, and behind the plan's last step in which it changed."""
        from mllm.eval import seen
        from mllm.eval.answer import answer
        from mllm.loading import build_inputs
        from mllm.views import with_tiles
        from mllm.yardstick import prompt

        model, processor = self.model
        plan = Plan(Plan.from_spec(cell["plan"]).stages, cell["seed"])
        if any(stage.info.trained for stage in plan.stages):
            raise PlanError("what it has learnt is not in the results", argument="plan")
        pictures, text = prompt(sample)
        inputs = build_inputs(processor, [(pictures, text)])
        with patched_with(model, plan) as patched:
            given = with_tiles(inputs, processor, pictures, patched.tiles)
            answer(model, processor, given.to(model.device, model.dtype), patched, max_new_tokens=1)
            ledger = patched.ledger
        layouts = ledger.layouts[0]
        there = seen.views(layouts)
        images = seen.pictures(processor, inputs, pictures, layouts)
        *_, last = seen.steps(ledger)
        made = [(view.name, image) for view, image in zip(there, images, strict=True)]
        if len(last.kept) < sum(len(view.tokens) for view in there):
            named = f"{cell['method']} at {cell['budget']}"
            for view, image in zip(there, images, strict=True):
                drawn = seen.panel(view, image, last, width=336)
                made.append((f"{named}. {drawn.title}", drawn.image))
        return made


@functools.lru_cache(maxsize=64)
def _made(task: str, split: str, index: int, style: str) -> dict[str, Any]:
    return sources.source_of(task).make(task, split, index, style)


def answer_of(cell: dict[str, Any], index: int, right: bool) -> str:
    """What was answered, or whether it was right where answers are not in the results."""
    sign = "✓" if right else "✗"
    answers = cell.get("answers")
    if not answers:
        return f"{sign} {'right' if right else 'wrong'}"
    return f"{sign} {answers[index] or '(nothing)'}"


def at_budgets(cells: Iterable[dict[str, Any]]) -> list[str]:
    """`random at 64, 16` and the like, one text for each method."""
    budgets: dict[str, list[str]] = {}
    for cell in cells:
        budgets.setdefault(cell["method"], []).append(str(cell["budget"]))
    return [f"{method} at {', '.join(at)}" for method, at in budgets.items()]
