"""Who answers batches of prompts: this process, or several that this one feeds.

Batches are made before they are given away, so that no answer depends on how many processes there
are; the parent alone reads data and writes files.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

import mllm
from mllm.errors import MllmError
from mllm.eval.prompts import Prompt, answer_batch
from mllm.eval.provenance import describe_model, describe_run
from mllm.loading import load_model
from mllm.plan import Plan

#: Seconds for a process to end by itself.
PATIENCE = 5
#: A batch: its number, its prompts, and the seed of what is drawn for it.
Job = tuple[int, Sequence[Prompt], int]
#: Its number, replies as `prompts.answer_batch` gives them, and seconds.
Answered = tuple[int, list[dict[str, Any]], float]


class Engine(Protocol):
    """Answers batches under a plan.

    Attributes:
        processor: of the model.
        about: `provenance.describe_run` of the model.
        facts: `provenance.describe_model` of it.
        device: where tensors of the caller belong.
    """

    processor: Any
    about: dict[str, Any]
    facts: dict[str, Any]
    device: torch.device

    def use(self, plan: Plan) -> None:
        """Put a plan into the model, in place of the one before.

        Raises:
            PlanError: a plan that cannot work on the model.
        """

    def answer(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        """Answer batches, each when the one before has been taken; in any order."""

    def release(self) -> None:
        """Take the plan out again."""


class Here:
    """The engine of one process.

    Args:
        model, processor: as `mllm.load_model` gives them.
        name: of the model, for people.
    """

    def __init__(self, model: Any, processor: Any, name: str = "") -> None:
        self.model, self.processor, self._name = model, processor, name
        self.patched: Any = None
        self._described: dict[str, dict[str, Any]] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def about(self) -> dict[str, Any]:
        if not self._described:  # the hash of large weights takes seconds
            about = describe_run(self.model)
            facts = describe_model(self._name, self.model, self.processor, about)
            self._described = {"about": about, "facts": facts}
        return self._described["about"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.about and self._described["facts"]

    def use(self, plan: Plan) -> None:
        self.release()
        if plan.stages:
            self.patched = mllm.patch(self.model, plan)

    def answer(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        for number, prompts, seed in jobs:
            replies, seconds = answer_batch(
                self.model, self.processor, self.patched, prompts, seed
            )
            yield number, replies, seconds

    def release(self) -> None:
        if self.patched is not None:
            self.patched.remove()
            self.patched = None


class Pool:
    """The engine of several processes, each with a model of its own.

    Args:
        load: loads model and processor on the device it is given; picklable.
        devices: one for each process.
        name: of the model, for people.
        make: makes the engine of each process; picklable.

    Raises:
        MllmError: a process died, or what went wrong in it. After the latter it can be used on.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        load: Callable[[str], tuple[Any, Any]],
        devices: Sequence[str],
        name: str = "",
        make: Callable[[Any, Any, str], Here] = Here,
    ) -> None:
        # A forked process would inherit locks of torch's threads, and could not use CUDA.
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // len(devices))
        self._workers: dict[Connection, Any] = {}
        try:
            for number, device in enumerate(devices):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, daemon=True,
                    args=(theirs, load, device, threads, name, make, number == 0),
                )  # fmt: skip
                process.start()
                theirs.close()
                self._workers[ours] = process
            ready = [self._receive(ours) for ours in self._workers]
        except BaseException:
            self.close()
            raise
        self.about, self.facts, self.processor = ready[0]

    def use(self, plan: Plan) -> None:
        for ours in self._workers:
            _send(ours, ("use", plan))
        errors = []
        for ours in self._workers:  # of all: what is left unread would answer the next question
            try:
                self._receive(ours)
            except MllmError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def answer(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        waiting, free = iter(jobs), list(self._workers)
        busy: list[Connection] = []
        try:
            while True:
                while free and (job := next(waiting, None)) is not None:
                    ours = free.pop(0)
                    _send(ours, ("answer", job))
                    busy.append(ours)
                if not busy:
                    return
                for ours in wait(busy):
                    busy.remove(ours)
                    free.append(ours)
                    yield self._receive(ours)
        finally:
            for ours in busy:  # after an error, as in `use`
                with contextlib.suppress(MllmError, OSError):
                    self._receive(ours)

    def release(self) -> None:
        # Processes that are gone, as after Ctrl-C, hold no plan; whoever needs them is told.
        with contextlib.suppress(MllmError):
            self.use(Plan([]))

    def close(self) -> None:
        """End the processes."""
        for ours in self._workers:
            ours.close()  # at the end of their pipe they end by themselves, and tidy up
        for process in self._workers.values():
            process.join(PATIENCE)
            process.terminate()
            process.join()
        self._workers = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, ours: Connection) -> Any:
        try:
            fine, value = ours.recv()
        except (EOFError, ConnectionError) as error:
            process = self._workers[ours]
            process.join()
            raise MllmError(
                f"a worker process died (exit code {process.exitcode}); with --output, finished "
                "batches are kept: run the command again, with fewer --workers if memory was short",
                argument="workers",
                given=len(self._workers),
                expected="fewer workers",
            ) from error
        if not fine:
            raise value
        return value


def load_on(pretrained: str, device: str | None, **options: Any) -> tuple[Any, Any]:
    """:func:`mllm.load_model` with the device second, for processes that each have their own."""
    return load_model(pretrained, device=device, **options)


def devices_for(workers: int, device: str | None) -> list[str]:
    """A device for each process: the CPU for all, or a GPU for each.

    Raises:
        MllmError: more processes than GPUs, or several for one named GPU.
    """
    if workers < 1:
        raise MllmError(
            f"workers must be a whole number from 1, not {workers}",
            argument="workers",
            given=workers,
            expected="for example 2",
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda" or workers == 1:
        return [str(where)] * workers
    if where.index is not None or workers > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise MllmError(
            f"{workers} workers need a GPU each; there are {there}, and device is {device}",
            argument="workers",
            given=workers,
            expected=f"at most {there} workers without --device, or --device cpu",
        )
    return [f"cuda:{number}" for number in range(workers)]


def _send(pipe: Connection, what: Any) -> None:
    # A process that has died is found when its end of the pipe is read.
    with contextlib.suppress(ConnectionError):
        pipe.send(what)


def _work(
    pipe: Connection,
    load: Callable[[str], tuple[Any, Any]],
    device: str,
    threads: int,
    name: str,
    make: Callable[[Any, Any, str], Here],
    describe: bool,
) -> None:
    """Do what comes through the pipe until the parent is gone."""
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        try:
            model, processor = load(device)
            engine = make(model, processor, name)
            pipe.send((True, (engine.about, engine.facts, processor) if describe else None))
        except MllmError as error:
            pipe.send((False, error))
            return
        while True:
            what, value = pipe.recv()
            try:
                done = engine.use(value) if what == "use" else next(engine.answer([value]))
            except MllmError as error:
                pipe.send((False, error))
            else:
                pipe.send((True, done))
