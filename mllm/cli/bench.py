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
    picture_size,
    run_command,
    write_text,
)
from mllm.cli.eval import results_console


class Suite(str, Enum):
    """What can be measured."""

    prefill = "prefill"
    decode = "decode"
    selection = "selection"
    select = "select"
    kv = "kv"
    kernels = "kernels"
    train = "train"
    routers = "routers"


class Method(str, Enum):
    """What a training step trains."""

    full = "full"
    lora = "lora"


def command(
    context: typer.Context,
    suite: Annotated[
        Suite,
        typer.Option(
            help="prefill: speed and memory. decode: steps behind a prompt. selection (or select): "
            "what choosing costs. kv: methods on the KV cache, decode steps and bytes. kernels: "
            "kernels, and the torch they stand for. train: training steps. routers: routers over "
            "depth, and experts."
        ),
    ] = Suite.prefill,
    model: Annotated[
        str,
        typer.Option(
            help="bench-cpu, a public model of mllm estimate or a config.json (random weights), "
            "or a model folder."
        ),
    ] = "bench-cpu",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan text, for kernels the name of one; repeatable. Default: the suite's."
        ),
    ] = None,
    visual: Annotated[
        list[int] | None,
        typer.Option(
            help="Visual tokens per sample; repeatable. Default: one and two images; for train and "
            "routers one; for kv see --length."
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHT of one picture per sample instead of --visual, for models that take "
            "any size; repeatable."
        ),
    ] = None,
    text: Annotated[
        int | None, typer.Option(help="Text tokens per sample. Default: 63.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="kv, decode, kernels: tokens of the prompt, pictures and text, instead of "
            "--visual and --text; repeatable. Default: for kv 8192, for kernels 1152, on a GPU "
            "4096 and 32768."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="kv: slots per layer and KV head of the default plans, 0.25 or 2048, without "
            "--plan; repeatable. Default: 0.25."
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
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
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
    plot: Annotated[
        str | None, typer.Option(help="Also draw them, to an .svg or .png file.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A.json B.json",
            help="Measure nothing; say what changed from one result file to another. Goes with "
            "--output and --json alone.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time plans against the unpatched model in interleaved pairs, beside the ideal from FLOPs.

    Run it on an otherwise idle machine.

    The suite "selection" times every method against a choice that costs nothing and leaves as many
    tokens: what choosing costs, as a share of what fewer tokens save.

    The suite "kv" reads one long prompt and compresses its cache by every plan: the bytes that are
    really stored, the time of a decode step, what choosing costs as a share of the prefill.

    The suite "decode" times steps behind a prompt under any plan; "kernels" every kernel and the
    torch that stands for it, at the shapes of a model's layer.

    The suite "train" times a training step: forward, backward and optimizer.

    The suite "routers" times prefill and training step of a router over depth, and the experts of a
    layer against its FFN at as many FLOPs.

    Example: mllm bench --suite prefill --visual 576 --output bench.json

    Example: mllm bench --suite kv --length 8192 --budget 0.25 --output kv.json

    Example: mllm bench --compare before.json after.json
    """

    if compare is not None:
        from mllm.eval import bench_compare

        def changed() -> dict[str, Any]:
            _compares_alone(context)
            if output is not None:
                check_writable(output)
            found = bench_compare.compare(*map(bench_compare.read, compare))
            if output is not None:
                write_text(output, jsonlib.dumps(found, indent=1) + "\n")
            return found

        run_command("bench", changed, json, _show_changes)
        return

    def measure() -> dict[str, Any]:
        from mllm.eval import bench_plot

        if output is not None:
            check_writable(output)
        if plot is not None:
            check_writable(plot)
            bench_plot.check(plot)

        def save(results: dict[str, Any]) -> None:
            if output is not None:
                write_text(output, jsonlib.dumps(results, indent=1) + "\n")

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} pairs"),
            TimeRemainingColumn(),
            console=err_console(),
            transient=True,
        ) as bar:
            task = bar.add_task("building the model", total=None)
            results = _measured(
                suite,
                model=model,
                plans=plan or None,
                visual=visual or None,
                size=[picture_size(one) for one in size] if size else None,
                text=text,
                length=length or None,
                budgets=budget or None,
                batch=batch or None,
                method=None if method is None else method.value,
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
        save(results)
        if plot is not None:
            bench_plot.plot(results, plot)
        return results

    run_command("bench", measure, json, _show)


#: Options that only some suites have.
_ONLY = {
    "length": ("kv", "decode", "kernels"),
    "budgets": ("kv",),
    "method": ("train",),
    "size": ("prefill", "decode", "selection", "kv", "train"),
}


def _compares_alone(context: typer.Context) -> None:
    """DataError where an option beside `--compare` asks for a measurement."""
    from mllm.eval.bench_shapes import cannot_measure

    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in ("compare", "output", "json"):
            raise cannot_measure(name, value, "it without --compare, which measures nothing")


def _measured(suite: Suite, *, model: str, **options: Any) -> dict[str, Any]:
    """The results of a suite; options that are None, or not the suite's, are left out."""
    from mllm.eval import (
        bench,
        bench_decode,
        bench_kernels,
        bench_kv,
        bench_routers,
        bench_selection,
        bench_train,
    )
    from mllm.eval.bench_shapes import SHAPES, cannot_measure

    name = "selection" if suite is Suite.select else suite.value
    for option, suites in _ONLY.items():
        if name not in suites and (given := options.pop(option)) is not None:
            shown = given[0] if isinstance(given, list) else given
            raise cannot_measure(
                option.removesuffix("s"), shown, f"it with --suite {' or '.join(suites)}"
            )
    given = {key: value for key, value in options.items() if value is not None}
    if name == "kernels":
        for option in ("visual", "text", "sdpa", "unequal"):
            if other := given.pop(option, None):
                raise cannot_measure(option, other, "it with another suite than kernels")
    for option, other in (("text", "length"), ("budgets", "plans")):
        if option in given and other in given:
            raise cannot_measure(
                option.removesuffix("s"), given[option], f"it without {other.removesuffix('s')}"
            )
    measured = {
        "prefill": bench.prefill,
        "decode": bench_decode.decode,
        "selection": bench_selection.selection,
        "kv": bench_kv.kv,
        "kernels": bench_kernels.kernel_suite,
        "train": bench_train.train,
        "routers": bench_routers.routers,
    }[name]
    return measured(model=SHAPES.get(model, model), **given)


@dataclass(frozen=True)
class _Look:
    """How the rows of a suite are shown.

    Attributes:
        columns: behind the plan.
        cells: of a row; None where nothing was measured.
        remark: below the table; None for none.
        heading: above it, of visual tokens, text tokens and batch.
    """

    columns: tuple[str, ...]
    cells: Callable[[dict[str, Any]], list[str] | None]
    remark: Callable[[dict[str, Any]], str | None]
    heading: str = "{0} visual tokens and {1} of text, batch {2}"


def _show(results: dict[str, Any]) -> None:
    console, look = results_console(), _LOOKS[results["suite"]]
    console.print(
        f"{results['suite']}, {results['model_shape']['name']}, {results['device']}, "
        f"{results['threads']} threads, load {results['load_before']} before"
    )
    sizes = groupby(results["rows"], lambda r: (r["batch"], r["visual"], r["text"]))
    for (batch, visual, text), rows in sizes:
        console.print("\n" + look.heading.format(visual, text, batch))
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
        if table.row_count:
            console.print(table)
        for remark in remarks:
            console.print(remark, markup=False)
    at = results["machine"]
    console.print(
        f"\nIdeal times are of {at['flops'] / 1e12:.3g} TFLOP/s and "
        f"{at['bandwidth'] / 1e9:.3g} GB/s ({at['source']}).",
        markup=False,
    )
    for words in results["words"]:
        console.print(words, markup=False)


def _show_changes(found: dict[str, Any]) -> None:
    console = results_console()
    for row in found["rows"]:
        console.print(f"{row['name']}: {row['words']}", markup=False)
    for one in found["differ"]:
        console.print(f"{one['what']}: {one['a']} | {one['b']}", markup=False)
    for words in found["words"]:
        console.print(words, markup=False)


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
    return None if row["ratio"] is None else _speed(row, 0)


def _prefill_remark(row: dict[str, Any]) -> str:
    peak, before = row["peak_bytes"] / 2**20, row["baseline_peak_bytes"] / 2**20
    return (
        f"{row['words']}. The unpatched code at these lengths would reach "
        f"{row['attainable']:.2f}x. Language model alone {row['llm_ratio']:.2f}x of "
        f"{row['llm_ideal']:.2f}; peak {peak:.0f} of {before:.0f} MiB; "
        f"{row['roofline_share']:.0%} of what the machine can."
    )


def _routers_cells(row: dict[str, Any]) -> list[str] | None:
    return None if row["ratio"] is None else [row["part"], *_speed(row, 1)]


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
    if row["ratio"] is None:
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


def _decode_remark(row: dict[str, Any]) -> str:
    size, before = row["kv_bytes"] / 2**20, row["baseline_kv_bytes"] / 2**20
    peak, whole = row["peak_bytes"] / 2**20, row["baseline_peak_bytes"] / 2**20
    return (
        f"{row['words']}. Keys and values {size:.1f} of {before:.1f} MiB; peak of a step "
        f"{peak:.0f} of {whole:.0f} MiB; {row['roofline_share']:.0%} of what the machine can."
    )


def _kernel_cells(row: dict[str, Any]) -> list[str] | None:
    if "torch_s" not in row:
        return None
    times = (row.get(f"{name}_s") for name in ("torch", "reference", "triton"))
    return [
        *("–" if x is None else f"{1e6 * x:,.0f} µs" for x in times),
        f"{1e6 * row['ideal_s']:,.0f} µs",
        f"{row['share']:.2f}",
        row["backend"],
    ]


_SPEED = ("before", "after", "speed-up (95 %)", "ideal", "share")
_LOOKS = {
    "prefill": _Look(_SPEED, _time_cells, _prefill_remark),
    "decode": _Look(
        _SPEED, lambda row: None if row["ratio"] is None else _speed(row, 1), _decode_remark
    ),
    "selection": _Look(
        ("layer avg", "saved", "spent", "share (95 %)"), _selection_cells, lambda row: None
    ),
    "kv": _Look(
        ("MiB + slack + meta", "of budget", *_SPEED, "scorer"),
        _kv_cells,
        lambda row: f"{row['words']}.",
    ),
    "kernels": _Look(
        ("torch", "reference", "Triton", "ideal", "share", "served"),
        _kernel_cells,
        lambda row: f"{row['words']}.",
        "{0} tokens, batch {2}",
    ),
    "train": _Look(_SPEED, _time_cells, _train_remark),
    "routers": _Look(("part", *_SPEED), _routers_cells, lambda row: f"{row['words']}."),
}
