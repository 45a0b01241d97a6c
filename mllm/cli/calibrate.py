"""`mllm calibrate`: fit a method's layers or budgets to a model, on a few dozen samples."""

from __future__ import annotations

import contextlib
import json as jsonlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    check_writable,
    err_console,
    run_command,
    unwritable,
)


def command(
    method: Annotated[
        str,
        typer.Argument(help="fitprune, btp or prefixkv, or one of them as plan text: btp:end=0."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; METHOD.json here if not given."),
    ] = None,
    model: ModelOption = "tiny-llava",
    data: Annotated[
        str,
        typer.Option(
            help="'yardstick' (its dev split), or a JSON Lines file of "
            '{"image": path beside the file, "question": text}.'
        ),
    ] = "yardstick",
    n: Annotated[int, typer.Option("--n", min=1, help="Samples.")] = 64,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0,
            help="Visual tokens that layers shall see on average, as a fraction (prefixkv: tokens "
            "that they shall store); the method's own if not given.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Fit a method to a model, and write the file that its parameter `calibration` takes.

    The file belongs to this model; another one refuses it.

    Example: mllm calibrate fitprune --share 0.4 -o fitprune.json

    Then: mllm run photo.png "How many dogs?" --plan fitprune:calibration=fitprune.json
    """
    run_command(
        "calibrate",
        lambda: calibrate(method, output, model, data, n, share, batch_size, dtype, device),
        json,
        _show,
    )


def calibrate(
    method: str, output: Path | None, model: str, data: str, n: int, share: float | None,
    batch_size: int, dtype: str, device: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Load, record, fit, write.

    Raises:
        DataError: the data cannot be read, or the output cannot be written.
        PlanError: the method cannot be fitted, does not work on this model, or cannot reach the
            share.
    """
    from mllm.calibration import calibrate as fit
    from mllm.calibration import fittable
    from mllm.loading import load_model
    from mllm.plan import Plan

    stage = fittable(method)
    path = output or Path(f"{stage.info.name}.json")
    check_writable(path)
    samples = _samples(data, n)
    with err_console().status("loading"):
        loaded, processor = load_model(model, dtype=dtype, device=device)
    batches = (
        _batch(processor, samples[i : i + batch_size], loaded)
        for i in range(0, len(samples), batch_size)
    )
    with _progress(len(samples)) as advance:
        fitted = fit(loaded, stage, batches, share=share, progress=advance)
    try:
        fitted.save(path)
    except OSError as error:
        raise unwritable(path, error) from error
    plan = Plan([type(stage)(calibration=str(path))]).spec
    return {"path": str(path), "plan": plan, "fitted": Plan([fitted.stage]).spec, **fitted.header}


def _samples(data: str, n: int) -> list[Any]:
    """Samples to load: of the yardstick, task by task, or lines of a file."""
    from mllm.errors import DataError

    if data == "yardstick":
        from mllm.yardstick import ADMITTED, TASKS

        tasks = ADMITTED or TASKS
        return [(tasks[i % len(tasks)], i // len(tasks)) for i in range(n)]
    try:
        lines = Path(data).read_text(encoding="utf-8").splitlines()
        rows = [jsonlib.loads(line) for line in lines if line.strip()][:n]
        return [(Path(data).parent / row["image"], row["question"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {data}: {type(error).__name__}: {error}",
            argument="data",
            given=data,
            expected='"yardstick", or a JSON Lines file of {"image": path, "question": text}',
        ) from error


def _batch(processor: Any, samples: list[Any], model: Any) -> Any:
    from mllm.loading import build_inputs, load_image
    from mllm.yardstick import prompt, sample

    pairs = [
        ([load_image(first)], second)
        if isinstance(first, Path)
        else prompt(sample(first, "dev", second))
        for first, second in samples
    ]
    return build_inputs(processor, pairs).to(model.device, model.dtype)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and what advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("calibrate"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=err_console()) as progress:
        bar = progress.add_task("calibrate", total=total)
        yield lambda samples: progress.advance(bar, samples)


def _show(data: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"{data['n_samples']} samples: {data['fitted']}", markup=False, soft_wrap=True)
    console.print(f"wrote {data['path']}; use it with", markup=False, soft_wrap=True)
    console.print(f"  --plan {data['plan']}", markup=False, soft_wrap=True)
