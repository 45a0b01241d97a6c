"""Every source of samples under one roof: training data, evaluation tasks and sweeps ask here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mllm import yardstick
from mllm.errors import DataError
from mllm.eval.outside import easyvqa, mnist
from mllm.plan import near
from mllm.yardstick.samples import SPLITS
from mllm.yardstick.styles import STYLES


@dataclass(frozen=True)
class Source:
    """Samples of several tasks.

    Attributes:
        name: means all of its tasks, in recipes and on the command line.
        tasks: what can be asked.
        styles: how it can look.
        make: `(task, split, index, style)` to a sample.
        size: `(task, split)` to the number of samples; None for a source without end.
        digest: split to what tells its samples from other ones: the version of drawn scenes, or
            the SHA-256 of the published data.
    """

    name: str
    tasks: tuple[str, ...]
    styles: tuple[str, ...]
    make: Callable[[str, str, int, str], dict[str, Any]]
    digest: Callable[[str], str]
    size: Callable[[str, str], int] | None = None


def _packaged(name: str, module: Any) -> Source:
    return Source(
        name,
        module.TASKS,
        ("plain",),
        lambda task, split, index, style: module.sample(task, split, index),
        module.digest,
        module.size,
    )


SOURCES = {
    source.name: source
    for source in (
        Source(
            "yardstick",
            yardstick.TASKS,
            tuple(STYLES),
            yardstick.sample,
            lambda split: f"scenes {yardstick.VERSION}",
        ),
        _packaged("easyvqa", easyvqa),
        _packaged("mnist", mnist),
    )
}
TASKS = tuple(task for source in SOURCES.values() for task in source.tasks)
GROUPS = (*SOURCES, "admitted")


def expand(name: str) -> tuple[str, ...]:
    """The tasks that a name means: a source, `admitted` (what the embedded model learnt) or one.

    Raises:
        DataError: neither.
    """
    if name == "admitted":
        return yardstick.admitted()
    if name in SOURCES:
        return SOURCES[name].tasks
    return (_named("task", name, (*TASKS, *GROUPS)),)


def source_of(task: str) -> Source:
    """The source that has a task.

    Raises:
        DataError: none has it.
    """
    _named("task", task, TASKS)
    return next(source for source in SOURCES.values() if task in source.tasks)


def size(task: str, split: str = "test") -> int | None:
    """Number of samples of a task; None where there is no end.

    Raises:
        DataError: unknown task or split, or the data package is missing.
    """
    source = source_of(task)
    _named("split", split, SPLITS)
    return source.size(task, split) if source.size else None


def samples(
    task: str, split: str = "test", n: int = 500, style: str = "plain"
) -> list[dict[str, Any]]:
    """The first `n` samples of a task of any source; the same on every machine.

    Args:
        task: one of `TASKS`.
        split: "train", "dev" or "test"; no two splits share a picture.
        n: number of samples (any test split has at least 500).
        style: of drawn scenes; published pictures have only "plain".

    Returns:
        As `mllm.yardstick.samples`. Published pictures also have `size`, the `[width, height]` of
        `image`, which is as published (the processor scales it); boxes are in its pixels.

    Raises:
        DataError: unknown task, split or style, n outside what there is, or a data package that
            is missing (the message has the command that installs it).
    """
    source = source_of(task)
    _named("split", split, SPLITS)
    _named("style", style, source.styles)
    there = size(task, split)
    if n < 1 or there is not None and n > there:
        expected = ">= 1" if there is None else f"1 to {there}"
        raise DataError(
            f"n={n} samples of {task}, split {split}, cannot be had: {expected}",
            argument="n",
            given=n,
            expected=expected,
        )
    return [source.make(task, split, index, style) for index in range(n)]


def at_most(task: str, split: str, n: int) -> int:
    """`n`, or the number of samples there are if that is less."""
    there = size(task, split)
    return n if there is None else min(n, there)


def _named(argument: str, given: str, known: tuple[str, ...]) -> str:
    if given not in known:
        raise DataError(
            f"{argument} {given!r} does not exist; did you mean: {near(given, known)}?",
            argument=argument,
            given=given,
            expected=", ".join(known),
        )
    return given
