"""`mllm bench`: speed and memory against the unpatched model."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Annotated, Any

import typer
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
from mllm.cli.eval import results_console


class Suite(str, Enum):
    """What can be measured."""

    prefill = "prefill"
    selection = "selection"
    kv = "kv"
    train = "train"
    routers = "routers"


class Method(str, Enum):
    """What a training step trains."""

    full = "full"
    lora = "lora"


def command(
    suite: Annotated[
        Suite,
        typer.Option(
            help="prefill: speed and memory. selection: what choosing costs. kv: methods on the "
            "KV cache, decode steps and bytes. train: training steps. routers: routers over depth, "
            "and experts."
        ),
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
        typer.Option(
            help="Visual tokens per sample; repeatable. Default: one and two images; for train and "
            "routers one."
        ),
    ] = None,
    text: Annotated[int, typer.Option(help="Text tokens per sample.")] = 63,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="kv: tokens of the prompt, pictures and text; repeatable. Default: 8192, unless "
            "--visual is given."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="kv: slots per layer and KV head of the default plans, 0.25 or 2048; repeatable. "
            "Default: 0.25."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size; repeatable. Default: 1; for selection 1 and 8."),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="train: full trains all but the tower, lora adapters in the language model. "
            "Default: full."
        ),
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

    The suite "kv" reads one long prompt and compresses its cache by every plan: the bytes that are
    really stored, the time of a decode step, what choosing costs as a share of the prefill.

    The suite "train" times a training step: forward, backward and optimizer.

    The suite "routers" times prefill and training step of a router over depth, and the experts of a
    layer against its FFN at as many FLOPs.

    Example: mllm bench --suite prefill --visual 576 --output bench.json

    Example: mllm bench --suite kv --length 8192 --budget 0.25 --output kv.json
    """

    def measure() -> dict[str, Any]:
        from mllm.eval import bench, bench_kv, bench_routers, bench_selection, bench_train
        from mllm.eval.bench_shapes import SHAPES, cannot_measure

        more: dict[str, Any] = {}
        if method and suite is not Suite.train:
            raise cannot_measure("method", method.value, "it with --suite train")
        if suite is Suite.kv:
            more = {"length": length or None, "budgets": budget or (bench_kv.BUDGET,)}
        elif length or budget:
            name = "length" if length else "budget"
            raise cannot_measure(name, (length or budget)[0], "it with --suite kv")
        elif suite is Suite.selection:
            more = {"batch": (1, 8)}
        elif suite is Suite.train and method:
            more = {"method": method.value}
        if batch:
            more["batch"] = batch

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
            measured = {
                Suite.prefill: bench.prefill,
                Suite.selection: bench_selection.selection,
                Suite.kv: bench_kv.kv,
                Suite.train: bench_train.train,
                Suite.routers: bench_routers.routers,
            }[suite]
            results = measured(
                model=SHAPES.get(model, model),
                plans=plan or None,
                visual=visual or None,
                text=text,
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
                **more,
            )
        return results

    run_command("bench", measure, json, _show)


@dataclass(frozen=True)
class _Look:
    """How the rows of a suite are shown.

    Attributes:
        columns: behind the plan.
        cells: of a row; None where nothing was measured.
        remark: below the table; None for none.
    """

    columns: tuple[str, ...]
    cells: Callable[[dict[str, Any]], list[str] | None]
    remark: Callable[[dict[str, Any]], str | None]


def _show(results: dict[str, Any]) -> None:
    console, look = results_console(), _LOOKS[Suite(results["suite"])]
    console.print(
        f"{results['suite']}, {results['model_shape']['name']}, {results['device']}, "
        f"{results['threads']} threads, load {results['load_before']} before"
    )
    sizes = groupby(results["rows"], lambda r: (r["batch"], r["visual"], r["text"]))
    for (batch, visual, text), rows in sizes:
        console.print(f"\n{visual} visual tokens and {text} of text, batch {batch}")
        table = Table(box=None, pad_edge=False)
        table.add_column("plan", no_wrap=True)
        for column in look.columns:
            table.add_column(column, justify="right", no_wrap=True)
        remarks = []
        for row in rows:
            cells = look.cells(row)
            if cells is not None:
                table.add_row(row["plan"], *cells)
            if remark := f"{row['words']}." if cells is None else look.remark(row):
                remarks.append(f"{row['plan']}: {remark}")
        console.print(table)
        for remark in remarks:
            console.print(remark, markup=False)


def _speed(row: dict[str, Any], digits: int) -> list[str]:
    """Times before and after, and their ratio beside the ideal."""
    low, high = row["ratio_ci"]
    return [
        f"{row['baseline_s'] * 1e3:.{digits}f} ms",
        f"{row['patched_s'] * 1e3:.{digits}f} ms",
        f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
        f"{row['ideal']:.2f}",
        f"{row['share']:.2f}",
    ]


def _time_cells(row: dict[str, Any]) -> list[str] | None:
    return None if row["status"] == "oom" else _speed(row, 0)


def _prefill_remark(row: dict[str, Any]) -> str:
    peak, before = row["peak_bytes"] / 2**20, row["baseline_peak_bytes"] / 2**20
    return (
        f"{row['words']}. The unpatched code at these lengths would reach "
        f"{row['attainable']:.2f}x. Language model alone {row['llm_ratio']:.2f}x of "
        f"{row['llm_ideal']:.2f}; peak {peak:.0f} of {before:.0f} MiB."
    )


def _routers_cells(row: dict[str, Any]) -> list[str] | None:
    return None if row["status"] == "oom" else [row["part"], *_speed(row, 1)]


def _selection_cells(row: dict[str, Any]) -> list[str] | None:
    if "cost" not in row:
        return None
    low, high = row["cost_ci"]
    return [
        f"{row['visual_avg']:.1f}",
        f"{row['saved_s'] * 1e3:.1f} ms",
        f"{row['spent_s'] * 1e3:.2f} ms",
        f"{row['cost']:.1%} ({low:.1%} to {high:.1%})",
    ]


def _kv_cells(row: dict[str, Any]) -> list[str] | None:
    if "ratio" not in row:
        return None
    sizes = (row[f"{what}_bytes"] / 2**20 for what in ("payload", "slack", "meta"))
    share = row["payload_share"]
    return [
        " + ".join(f"{size:.1f}" for size in sizes),
        "–" if share is None else f"{share:.3f}",
        *_speed(row, 1),
        f"{row['scorer_share']:.1%}",
    ]


def _train_remark(row: dict[str, Any]) -> str:
    peak, before = row["peak_bytes"] / 2**20, row["baseline_peak_bytes"] / 2**20
    return (
        f"{row['words']}. The unpatched code at these lengths would reach "
        f"{row['attainable']:.2f}x. Without the optimizer ({row['optimizer_s'] * 1e3:.0f} ms) "
        f"{row['passes_ratio']:.2f}x; peak {peak:.0f} of {before:.0f} MiB."
    )


_SPEED = ("before", "after", "speed-up (95 %)", "ideal", "share")
_LOOKS = {
    Suite.prefill: _Look(_SPEED, _time_cells, _prefill_remark),
    Suite.selection: _Look(
        ("layer avg", "saved", "spent", "share (95 %)"), _selection_cells, lambda row: None
    ),
    Suite.kv: _Look(
        ("MiB + slack + meta", "of budget", *_SPEED, "scorer"),
        _kv_cells,
        lambda row: f"{row['words']}.",
    ),
    Suite.train: _Look(_SPEED, _time_cells, _train_remark),
    Suite.routers: _Look(("part", *_SPEED), _routers_cells, lambda row: f"{row['words']}."),
}
