"""`mllm sweep`: methods x budgets x tasks x seeds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from mllm.cli._common import JsonOption, err_console, run_command
from mllm.cli.eval import percent, results_console
from mllm.errors import MllmError


def command(
    grid: Annotated[
        Path | None,
        typer.Argument(help="YAML with the grid, as examples/sweep.yaml. Flags override its keys."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a model.", show_default="tiny-llava"),
    ] = None,
    plans: Annotated[
        str | None,
        typer.Option(
            "--plans",
            "--methods",
            help="Methods, separated by commas, without keep; the sanity rows are added. "
            "A stack is one pre-LLM and one in-LLM method: visionzip+fastv:layer=2.",
            show_default="visionzip,divprune,fastv,visionzip+fastv:layer=2",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens, averaged over layers, separated by commas.",
            show_default="192,64,16",
        ),
    ] = None,
    kv_budgets: Annotated[
        str | None,
        typer.Option(
            help="For methods on the KV cache: shares of its slots, separated by commas.",
            show_default="0.5,0.25,0.1",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas; also `admitted` (those that the embedded model "
            "learnt), or all of a source: `yardstick`, `easyvqa`, `mnist`.",
            show_default="admitted",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            "--seed",
            help="Seeds, separated by commas, of methods that draw at random; others run once.",
            show_default="0",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Questions per task.", show_default="500")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="test, dev or train.", show_default="test")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="Style of the pictures.", show_default="plain")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON Lines file; tables go beside it.",
            show_default="sweep.jsonl",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions per batch.", show_default="16")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="When answers are read. prompt: as generate does, so the first token sees the "
            "whole cache. again: the question is asked again after compression. context: the "
            "cache is compressed before the question is known.",
            show_default="prompt",
        ),
    ] = None,
    timings: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Single prefills timed per cell; 0 for none.",
            show_default="8; 0 with several workers",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that share the tasks; no result changes.", show_default="1"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU when there is one.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder with what the methods have learnt, for all of their budgets."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and what it costs, and stop.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Score methods at equal token budgets, and say which beat random.

    Cells that the output file has are not run again: run the same command to go on after an
    interruption, or after adding a method, a budget, a task or a seed.

    Example: mllm sweep --plans visionzip,divprune --budgets 64,16 --n 100 -o sweep.jsonl

    Example: mllm sweep examples/sweep.yaml --dry-run

    Example: mllm sweep --plans snapkv,h2o --kv-budgets 0.25 --protocol again --n 100 -o kv.jsonl
    """
    flags = {
        "model": model,
        "methods": _split(plans),
        "budgets": _numbers("budgets", budgets, 1),
        "kv_budgets": _shares(kv_budgets),
        "tasks": _split(tasks),
        "seeds": _numbers("seeds", seeds, 0),
        "n": n,
        "split": split,
        "style": style,
        "output": None if output is None else str(output),
        "batch_size": batch_size,
        "protocol": protocol,
        "timings": timings,
        "workers": workers,
        "dtype": dtype,
        "device": device,
        "adapter": adapter,
    }
    run_command(
        "sweep",
        lambda: _sweep(grid, flags, dry_run),
        json,
        _show_forecast if dry_run else _show,
    )


def _sweep(grid: Path | None, flags: dict[str, Any], dry_run: bool) -> dict[str, Any]:
    from mllm.eval import sweep_file

    # What is cheap to refuse comes before torch.
    chosen = sweep_file.combine({} if grid is None else sweep_file.read(grid), flags)
    output = Path(chosen.output)

    from mllm.doctor import skeleton
    from mllm.eval import cells, files, sweep, table
    from mllm.eval.forecast import forecast
    from mllm.eval.plans import check_plans
    from mllm.eval.provenance import describe_run
    from mllm.loading import load_model

    tasks = sweep.chosen_tasks(chosen.tasks)
    asked = sweep.Questioning(
        n=chosen.n,
        split=chosen.split,
        style=chosen.style,
        batch_size=chosen.batch_size,
        timings=chosen.timed,
        protocol=chosen.protocol,
    )
    sweep.check_drawn(tasks, asked)
    if not dry_run:
        files.ensure_writable(output.parent)
    damaged = cells.read(output).damaged
    console = err_console()
    load = functools.partial(load_model, chosen.model, dtype=chosen.dtype, device=chosen.device)
    with console.status("loading the model"):
        entries, skipped = sweep.grid(
            skeleton(chosen.model),
            chosen.methods,
            chosen.budgets,
            seeds=chosen.seeds,
            seeds_of=chosen.seeds_of,
            sanity_positions=chosen.sanity_positions,
            kv_budgets=chosen.kv_budgets,
            fixed=chosen.fixed,
            adapter=chosen.adapter,
        )
        check_plans(chosen.model, [entry.plan for entry in entries if entry.plan.folder])
        loaded = load()
        if any(isinstance(entry.budget, int) for entry in entries):
            sweep.check_tokens(*loaded, tasks[0], asked)
        about = describe_run(*loaded)
        _, todo = sweep.split_cells(entries, tasks, output, about, asked)
    if damaged:
        lines, theirs = ("line", "its cell is") if damaged == 1 else ("lines", "their cells are")
        console.print(f"{damaged} damaged {lines} skipped, {theirs} computed again")
    with console.status("estimating the cost"):
        cost = forecast(*loaded, todo, len(entries) * len(tasks), asked, chosen.workers)
    ahead = {"output": str(output), "damaged": damaged, **cost.as_dict()}
    if dry_run:
        return ahead
    console.print(_in_words(ahead), highlight=False, soft_wrap=True)

    started = sweep.run(
        *loaded,
        entries,
        tasks,
        output,
        **vars(asked),
        workers=chosen.workers,
        load=load,
        on_start=(display := _Display(console, cost.cells, cost.missing)).start,
    )
    found = {(c["task"], c["key"]): c for c in display.follow(started)}
    ordered = [
        found[task, sweep.key(entry, task, asked.split, about["weights_sha256"])]
        for task in tasks
        for entry in entries
    ]
    built = table.build(ordered, skipped)
    written = table.write(built, output.with_suffix(""))
    return {**built, "forecast": ahead, "files": [str(path) for path in (output, *written)]}


class _Display:
    """Finished cells as they come: a live table on a terminal, else one line each."""

    def __init__(self, console: Console, cells: int, missing: int) -> None:
        self.console, self.missing, self.reused = console, missing, cells - missing
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
        self.progress = Progress(*columns, console=console)
        self.bar = self.progress.add_task("sweep", total=missing)
        self.rows: list[tuple[str, ...]] = []

    def start(self, task: str, name: str) -> None:
        """Say what is worked on."""
        self.progress.update(self.bar, description=f"{task}: {name}")

    def follow(self, cells: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`cells`, shown as they come; those of the file come first and are only counted."""
        live = None
        if self.console.is_terminal and self.missing:
            live = Live(console=self.console, get_renderable=self._table, refresh_per_second=4)
            live.start()
        try:
            for index, cell in enumerate(cells):
                if index >= self.reused:
                    self._finished(cell, live is None)
                yield cell
        finally:
            if live is not None:
                live.stop()

    def _finished(self, cell: dict[str, Any], plain: bool) -> None:
        self.rows.append(_row(cell))
        self.progress.advance(self.bar)
        if plain:
            task, method, budget, seed, score, versus = self.rows[-1]
            at = "" if cell["budget"] is None else f" @ {budget}"
            at += f", seed {seed}" if cell["seed"] else ""
            self.console.print(
                f"[{len(self.rows)}/{self.missing}] {task} {method}{at}: {score}, "
                f"vs random {versus}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _table(self) -> Group:
        table = Table(title="newest cells", title_justify="left")
        for name in ("task", "method", "budget", "seed", "score % (95 %)", "vs random"):
            left = name in ("task", "method")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row in self.rows[-max(1, self.console.height - 8) :]:
            table.add_row(*row)
        return Group(table, self.progress)


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    versus = cell["vs_random"]
    return (
        cell["task"],
        cell["method"],
        "–" if cell["budget"] is None else str(cell["budget"]),
        str(cell["seed"]),
        percent(cell),
        "–" if versus is None else f"{100 * versus['diff']:+.1f} {_interval(versus['ci'], '+.1f')}",
    )


def _interval(bounds: Sequence[float], form: str) -> str:
    return "[" + ", ".join(format(100 * bound, form) for bound in bounds) + "]"


def _in_words(ahead: dict[str, Any]) -> str:
    """The forecast as one line."""
    there = f"{ahead['cells']} cells, {ahead['missing']} missing in {ahead['output']}"
    if not ahead["missing"]:
        return there
    minutes = ahead["seconds"] / 60
    duration = f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"
    return f"{there}: about {ahead['flops'] / 1e12:.3g} TFLOPs, an estimated {duration} minutes"


def _show_forecast(ahead: dict[str, Any]) -> None:
    results_console().print(_in_words(ahead), highlight=False, soft_wrap=True)


def _show(built: dict[str, Any]) -> None:
    from mllm.eval import words

    table = Table(
        title=f"{', '.join(built['tasks'])}; {words.per_task(built)} questions each",
        title_justify="left",
    )
    for column in ("method", "budget", "layer avg", "GFLOPs", "score %", "vs random"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in built["rows"]:
        versus = row["vs_random"]
        table.add_row(
            row["method"],
            "–" if row["budget"] is None else str(row["budget"]),
            f"{row['visual_avg']:.1f}",
            f"{row['flops'] / 1e9:.2f}",
            percent(row),
            "–" if versus is None else f"{100 * versus['diff']:+.1f}, {versus['verdict']}",
        )
    console = results_console()
    console.print(table)
    for paragraph in built["words"]:
        console.print(paragraph, end="\n\n")
    for skipped in built["skipped"]:
        console.print(f"Not reachable: {skipped['method']} at {skipped['budget']}.")
    console.print("Written:", *built["files"], sep="\n  ")


def _split(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str | None, least: int) -> list[int] | None:
    if text is None:
        return None
    words = _split(text) or []
    for word in words:
        if not word.isdigit() or int(word) < least:
            raise MllmError(
                f"{word!r} is not {'a number of tokens' if option == 'budgets' else 'a seed'}",
                argument=option,
                given=text,
                expected=f"whole numbers from {least}, separated by commas",
            )
    return [int(word) for word in words]


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in _split(text) or []]
    except ValueError as error:
        raise MllmError(
            f"{text!r} is no list of shares",
            argument="kv_budgets",
            given=text,
            expected="fractions in (0, 1], separated by commas",
        ) from error
