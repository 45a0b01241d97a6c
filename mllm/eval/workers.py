"""Several processes for a sweep: each evaluates whole tasks, the parent alone writes.

Two processes of one thread do more than one process of two threads where the model is small. A
task is drawn, batched and answered as in one process, so that no cell depends on their number.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from mllm.errors import MllmError

if TYPE_CHECKING:
    from mllm.eval.sweep import Entry, Questioning


def evaluate(
    load: Callable[[], tuple[Any, Any]],
    jobs: Sequence[tuple[str, Sequence[Entry]]],
    asked: Questioning,
    workers: int,
    threads: int,
    on_start: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, Entry, dict[str, Any]]]:
    """:func:`mllm.eval.sweep.evaluate` in `workers` processes; cells come as they finish.

    Args:
        load: loads model and processor; picklable.
        jobs: tasks and their entries.
        asked: questions of every cell.
        workers: processes.
        threads: threads of each.
        on_start: told the task and the entry's name before work on it starts.

    Raises:
        MllmError: a worker was killed, or what went wrong in it.
    """
    # A forked process would inherit locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, load, asked, threads), daemon=True
            )
            process.start()
            theirs.close()
            running[ours] = process
            _send(ours, waiting.pop())
        while running:
            for ours in wait(list(running)):
                try:
                    kind, value = ours.recv()
                except (EOFError, ConnectionError) as error:
                    process = running[ours]
                    process.join()
                    raise MllmError(
                        f"a worker process died (exit code {process.exitcode}); finished cells "
                        "are kept: run the sweep again, with fewer --workers if memory was short",
                        argument="workers",
                        given=workers,
                        expected="fewer workers",
                    ) from error
                if kind == "start" and on_start:
                    on_start(*value)
                elif kind == "cell":
                    yield value
                elif kind == "error":
                    raise value
                elif kind == "done":
                    if waiting:
                        _send(ours, waiting.pop())
                    else:
                        _send(ours, None)
                        running.pop(ours).join()
                        ours.close()
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _send(pipe: Connection, job: Any) -> None:
    # A worker that has died is found when its end of the pipe is read.
    with contextlib.suppress(ConnectionError):
        pipe.send(job)


def _work(
    pipe: Connection, load: Callable[[], tuple[Any, Any]], asked: Questioning, threads: int
) -> None:
    """Evaluate the jobs that come through the pipe, until None comes or the parent is gone."""
    from mllm.eval import sweep

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        try:
            loaded = load()
            while (job := pipe.recv()) is not None:
                for made in sweep.evaluate(
                    *loaded, [job], asked, lambda *where: pipe.send(("start", where))
                ):
                    pipe.send(("cell", made))
                pipe.send(("done", None))
        except MllmError as error:
            pipe.send(("error", error))
