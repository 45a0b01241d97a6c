"""`mllm sweep`: many plans and budgets on the yardstick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mllm.cli._common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    err_console,
    run_command,
)
from mllm.cli.eval import results_console
from mllm.errors import MllmError


def command(
    model: ModelOption = "tiny-llava",
    plans: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, without keep; the sanity rows are added. "
            "A stack is one pre-LLM and one in-LLM method: visionzip+fastv:layer=2."
        ),
    ] = "visionzip,divprune,fastv,visionzip+fastv:layer=2",
    budgets: Annotated[
        str, typer.Option(help="Visual tokens, averaged over layers, separated by commas.")
    ] = "192,64,16",
    tasks: Annotated[
        str, typer.Option(help="Yardstick tasks, separated by commas; default: the admitted ones.")
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="Questions per task.")] = 500,
    split: Annotated[str, typer.Option(help="test, dev or train.")] = "test",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON Lines file; tables go beside it.")
    ] = Path("sweep.jsonl"),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 16,
    timings: Annotated[
        int, typer.Option(min=0, help="Single prefills timed per cell; 0 for none.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Score methods at equal token budgets, and say which beat random.

    Run it again to go on after an interruption: finished cells are kept.

    Example: mllm sweep --plans visionzip,divprune --budgets 64,16 --n 100 -o sweep.jsonl
    """

    def work() -> dict[str, Any]:
        from mllm.eval import files, sweep, table
        from mllm.loading import load_model
        from mllm.yardstick import ADMITTED, TASKS

        chosen = _split(tasks) or list(ADMITTED)
        if not chosen:
            raise MllmError(
                "the embedded model has no admitted tasks; name some with --tasks",
                argument="tasks",
                expected=", ".join(TASKS),
            )
        sweep.check_tasks(chosen, TASKS)
        files.ensure_writable(output.parent)
        loaded = load_model(model, dtype=dtype, device=device)
        entries, skipped = sweep.grid(loaded[0], _split(plans), _numbers(budgets), seed=seed)
        cells = list(
            _with_progress(
                lambda on_start: sweep.run(
                    *loaded,
                    entries,
                    chosen,
                    output,
                    n=n,
                    split=split,
                    batch_size=batch_size,
                    timings=timings,
                    on_start=on_start,
                ),
                len(entries) * len(chosen),
            )
        )
        built = table.build(cells, skipped)
        written = table.write(built, output.with_suffix(""))
        return {**built, "files": [str(path) for path in (output, *written)]}

    run_command("sweep", work, json, _show)


def _with_progress(start: Any, total: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=err_console()) as progress:
        bar = progress.add_task("sweep", total=total)
        for cell in start(lambda task, name: progress.update(bar, description=f"{task}: {name}")):
            progress.advance(bar)
            yield cell


def _show(built: dict[str, Any]) -> None:
    table = Table(
        title=f"{', '.join(built['tasks'])}; {built['n']} questions each", title_justify="left"
    )
    for column in ("method", "budget", "layer avg", "GFLOPs", "score %", "vs random"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in built["rows"]:
        low, high = (100 * bound for bound in row["ci"])
        versus = row["vs_random"]
        table.add_row(
            row["method"],
            "–" if row["budget"] is None else str(row["budget"]),
            f"{row['visual_avg']:.1f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{100 * row['score']:.1f} ({low:.1f}–{high:.1f})",
            "–" if versus is None else f"{100 * versus['diff']:+.1f}, {versus['verdict']}",
        )
    console = results_console()
    console.print(table)
    for paragraph in built["words"]:
        console.print(paragraph, end="\n\n")
    for skipped in built["skipped"]:
        console.print(f"Not reachable: {skipped['method']} at {skipped['budget']}.")
    console.print("Written:", *built["files"], sep="\n  ")


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _split(text)
    for word in words:
        if not word.isdigit() or int(word) < 1:
            raise MllmError(
                f"{word!r} is not a number of tokens",
                argument="budgets",
                given=text,
                expected="whole numbers from 1, separated by commas: 192,64,16",
            )
    return [int(word) for word in words]
