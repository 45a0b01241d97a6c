"""`mllm bench`: speed and memory against the unpatched model."""

from __future__ import annotations

import json as jsonlib
from enum import Enum
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mllm.cli._common import (
    DeviceOption,
    JsonOption,
    check_writable,
    err_console,
    run_command,
    write_text,
)


class Suite(str, Enum):
    """What can be measured."""

    prefill = "prefill"
    selection = "selection"


def command(
    suite: Annotated[
        Suite,
        typer.Option(help="prefill: speed and memory. selection: what choosing costs."),
    ] = Suite.prefill,
    model: Annotated[
        str,
        typer.Option(
            help="bench-cpu, llava-1.5-7b or qwen2.5-vl-7b (random weights), or a model folder."
        ),
    ] = "bench-cpu",
    plan: Annotated[
        list[str] | None, typer.Option(help="Plan text; repeatable. Default: the suite's plans.")
    ] = None,
    visual: Annotated[
        list[int] | None,
        typer.Option(help="Visual tokens per sample; repeatable. Default: one and two images."),
    ] = None,
    text: Annotated[int, typer.Option(help="Text tokens per sample.")] = 63,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size; repeatable. Default: 1; for selection 1 and 8."),
    ] = None,
    unequal: Annotated[
        bool, typer.Option("--unequal", help="Prompts of a batch differ in length (left padded).")
    ] = False,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs; 30 or more for a claim.")] = 30,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's choice if left out.")
    ] = None,
    device: DeviceOption = None,
    sdpa: Annotated[
        str | None,
        typer.Option(help="Hold torch's sdpa to one kernel: flash, efficient, math, cudnn."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Also write the results to this file, row by row.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time plans against the unpatched model in interleaved pairs, beside the ideal from FLOPs.

    Run it on an otherwise idle machine.

    The suite "selection" times every method against a choice that costs nothing and leaves as many
    tokens: what choosing costs, as a share of what fewer tokens save.

    Example: mllm bench --suite prefill --visual 576 --output bench.json
    """

    def measure() -> dict[str, Any]:
        from mllm.eval import bench, bench_selection
        from mllm.eval.bench_shapes import SHAPES

        def save(results: dict[str, Any]) -> None:
            if output is not None:
                write_text(output, jsonlib.dumps(results, indent=1) + "\n")

        if output is not None:
            check_writable(output)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} pairs"),
            TimeRemainingColumn(),
            console=err_console(),
            transient=True,
        ) as bar:
            task = bar.add_task("building the model", total=None)
            measured = bench.prefill if suite is Suite.prefill else bench_selection.selection
            results = measured(
                model=SHAPES.get(model, model),
                plans=plan or None,
                visual=visual or None,
                text=text,
                batch=batch or ((1,) if suite is Suite.prefill else (1, 8)),
                unequal=unequal,
                pairs=pairs,
                dtype=dtype,
                device=device,
                sdpa=sdpa,
                threads=threads,
                progress=lambda label, done, total: bar.update(
                    task, description=label, completed=done, total=total
                ),
                on_row=save,
            )
        return results

    run_command("bench", measure, json, _show if suite is Suite.prefill else _show_selection)


def _show_selection(results: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"selection, {results['model_shape']['name']}, {results['device']}, "
        f"{results['threads']} threads, load {results['load_before']} before"
    )
    for (batch, visual), rows in groupby(results["rows"], lambda r: (r["batch"], r["visual"])):
        console.print(f"\n{visual} visual tokens, batch {batch}")
        table = Table(box=None, pad_edge=False)
        table.add_column("plan", no_wrap=True)
        for column in ("layer avg", "saved", "spent", "share (95 %)"):
            table.add_column(column, justify="right", no_wrap=True)
        remarks = []
        for row in rows:
            if "cost" not in row:
                remarks.append(f"{row['plan']}: {row['words']}")
                continue
            low, high = row["cost_ci"]
            table.add_row(
                row["plan"],
                f"{row['visual_avg']:.1f}",
                f"{row['saved_s'] * 1e3:.1f} ms",
                f"{row['spent_s'] * 1e3:.2f} ms",
                f"{row['cost']:.1%} ({low:.1%} to {high:.1%})",
            )
        console.print(table)
        for remark in remarks:
            console.print(remark, markup=False)


def _show(results: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"prefill, {results['model_shape']['name']}, {results['device']}, "
        f"{results['threads']} threads, load {results['load_before']} before"
    )
    for (batch, visual), rows in groupby(results["rows"], lambda r: (r["batch"], r["visual"])):
        console.print(f"\n{visual} visual tokens, batch {batch}")
        table = Table(box=None, pad_edge=False)
        table.add_column("plan", no_wrap=True)
        for column in ("before", "after", "speed-up (95 %)", "ideal", "share"):
            table.add_column(column, justify="right", no_wrap=True)
        remarks = []
        for row in rows:
            remarks.append(f"{row['plan']}: {row['words']}.")
            if row["status"] == "oom":
                table.add_row(row["plan"], "out of memory")
                continue
            low, high = row["ratio_ci"]
            table.add_row(
                row["plan"],
                f"{row['baseline_s'] * 1e3:.0f} ms",
                f"{row['patched_s'] * 1e3:.0f} ms",
                f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
                f"{row['ideal']:.2f}",
                f"{row['share']:.2f}",
            )
            peak, before = row["peak_bytes"] / 2**20, row["baseline_peak_bytes"] / 2**20
            remarks[-1] += (
                f" The unpatched code at these lengths would reach {row['attainable']:.2f}x."
                f" Language model alone {row['llm_ratio']:.2f}x of {row['llm_ideal']:.2f};"
                f" peak {peak:.0f} of {before:.0f} MiB."
            )
        console.print(table)
        for remark in remarks:
            console.print(remark)
