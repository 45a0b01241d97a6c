"""`mllm eval`: accuracy beside tokens, FLOPs, memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mllm.cli._common import (
    DataDirOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    WorkersOption,
    run_command,
)


def command(
    model: ModelOption = "tiny-llava",
    plan: Annotated[
        list[str] | None,
        typer.Option(help="Plan text or folder; give it again for more plans. none: unpatched."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="lmms-eval task names, separated by commas.")
    ] = "yardstick",
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples per task.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Requests per batch; 1 also measures the first token.")
    ] = 16,
    split: Annotated[
        str | None, typer.Option(help="test, dev or train (our own tasks only).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o",
            help="Folder for results, samples and answers; the same command goes on there.",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    workers: WorkersOption = 1,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for answers that several outputs share, instead of --output."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    attn_implementation: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder with what the plans have learnt, perhaps at another budget."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score a model under one or more plans with lmms-eval.

    Our own tasks (yardstick, easyvqa, mnist) need no network. Public tasks (mme, pope, gqa, ...)
    run where lmms-eval can fetch their data, or from local copies (--data-dir).

    Example: mllm eval --plan none --plan visionzip:keep=64 --tasks yardstick --limit 100 -o run

    A command that was killed goes on where it stopped when it is given again.
    """

    def work() -> list[dict[str, Any]]:
        from mllm.eval.runner import evaluate

        quiet()
        records = evaluate(
            model,
            plan or ["none"],
            [name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            batch_size=batch_size,
            split=split,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            seed=seed,
            output=output,
            adapter=adapter,
            data_dir=data_dir,
            workers=workers,
            cache=cache,
        )
        return [{k: v for k, v in record.items() if k != "results"} for record in records]

    run_command("eval", work, json, _show)


def results_console() -> Console:
    """Console on stdout; wide enough for a table where nothing says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def quiet() -> None:
    """Keep lmms-eval's messages below warnings away, and all of them off stdout."""
    import importlib.util
    import sys

    if importlib.util.find_spec("lmms_eval") is None:
        return
    import lmms_eval.models  # noqa: F401  (adds its own sink on import)
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")


def _show(records: list[dict[str, Any]]) -> None:
    table = Table(title="Scores with 95 % intervals; costs per sample", title_justify="left")
    for column in ("plan", "task", "n", "score %", "tokens in", "layer avg", "GFLOPs", "KV KiB"):
        justify = "left" if column in ("plan", "task") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    timed = all(row["seconds"] is not None for record in records for row in record["rows"])
    table.add_column("ms" if timed else "s in all", justify="right", no_wrap=True)
    for record in records:
        for index, row in enumerate(record["rows"]):
            last = index == len(record["rows"]) - 1
            seconds = f"{record['mllm']['totals']['seconds']:.1f}" if last else ""
            table.add_row(
                record["plan"] if index == 0 else "",
                row["task"].removeprefix("yardstick_"),
                str(row["n"]),
                percent(row),
                _number(row["kept_llm"], 1, ".0f"),
                _number(row["visual_avg"], 1, ".1f"),
                _number(row["prefill_flops"], 1e-9, ".2f"),
                _number(row["kv_bytes"], 1 / 1024, ".0f"),
                _number(row["seconds"], 1e3, ".0f") if timed else seconds,
                end_section=last,
            )
    console = results_console()
    console.print(table)
    for record in records:
        if record["files"]:
            console.print(f"Written: {record['files'][0]}", soft_wrap=True)
    answers = {name: sum(record["answers"][name] for record in records)
               for name in ("kept", "computed")}  # fmt: skip
    damaged = records[0]["answers"]["damaged"]
    if answers["kept"] or damaged:
        skipped = f"; {damaged} unfinished lines skipped" if damaged else ""
        console.print(f"{answers['kept']} answers kept, {answers['computed']} computed{skipped}")


def percent(row: dict[str, Any]) -> str:
    """A score with its interval, or a metric that has none."""
    if row["ci"] is None:
        return f"{row['metric']} {_number(row['score'], 1, '.3f')}"
    low, high = (100 * bound for bound in row["ci"])
    return f"{100 * row['score']:.1f} ({low:.1f}–{high:.1f})"


def _number(value: float | None, scale: float, form: str) -> str:
    return "–" if value is None else format(value * scale, form)
