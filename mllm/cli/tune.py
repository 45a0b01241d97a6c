"""`mllm tune`: the plan that fits a goal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from mllm.cli._common import (
    DataDirOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    WorkersOption,
    err_console,
    run_command,
)
from mllm.cli.eval import quiet, results_console
from mllm.errors import MllmError

_BUDGET = "a number, or a share of the unpatched model's such as 40%"


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan and its evidence.")
    ] = Path("tuned"),
    max_loss: Annotated[
        float | None,
        typer.Option(help="Points of accuracy that may be lost; the cheapest plan is looked for."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="With --max-loss, what is saved: flops, tokens, kv_bytes, or latency (measured "
            "prefill seconds).",
            show_default="flops",
        ),
    ] = None,
    max_flops: Annotated[
        str | None,
        typer.Option(help=f"Instead: most prefill FLOPs per question, {_BUDGET}. The most "
                     "accurate plan is looked for."),
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(help=f"Or: most visual tokens per layer, {_BUDGET}.")
    ] = None,
    max_kv_bytes: Annotated[
        str | None, typer.Option(help=f"Or: most bytes of the KV cache, {_BUDGET}.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help=f"Or: most seconds of a prefill, {_BUDGET}.")
    ] = None,
    model: ModelOption = "tiny-llava",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; what their text sets is not searched "
            "(fastv:layer=2). `all` is every one that needs no training. Stacks are searched.",
            show_default="a dozen, sanity methods among them",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Fractions kept to choose among, separated by commas.",
                     show_default="12 from 0.02 to 0.75"),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="Tasks, separated by commas, as for mllm sweep; or public ones, as for "
                     "mllm eval."),
    ] = "admitted",
    trials: Annotated[int, typer.Option(help="Plans to try, without those over the budget.")] = 60,
    first: Annotated[int, typer.Option(help="Dev questions per task for every plan.")] = 16,
    n: Annotated[
        int, typer.Option("--n", help="Dev questions per task for plans that stay.")
    ] = 128,
    confirm: Annotated[int, typer.Option(help="Plans to ask the test questions.")] = 3,
    n_test: Annotated[int, typer.Option(help="Test questions per task.")] = 500,
    claim: Annotated[
        str,
        typer.Option(help="What has to keep within --max-loss on test: the whole interval, or "
                     "the mean alone."),
    ] = "interval",
    pairs: Annotated[
        int, typer.Option(help="Prefills to time per plan where time is the cost.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    style: Annotated[
        str, typer.Option(help="Style of the pictures of our own tasks.")
    ] = "plain",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 16,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder with what a plan has learnt: it is searched too, by itself, "
                     "under the budgets that it was trained for."),
    ] = None,
    data_dir: DataDirOption = None,
    workers: WorkersOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say about what it costs, and stop.")
    ] = False,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Search the plan that fits a goal, and confirm it on test questions.

    Run the same command again after an interruption: answers that are there are not asked again.
    Exit code 1 says that no plan was confirmed; the evidence is written, a plan is not.

    Example: mllm tune --max-loss 1 -o tuned

    Example: mllm tune --max-flops 30% --methods visionzip,divprune,fastv --trials 40 -o tuned

    Example: mllm tune --max-loss 1 --tasks pope,gqa --data-dir data --workers 4 -o tuned

    Example: mllm tune --max-loss 1 --adapter runs/m3/model --model runs/m3/model -o tuned

    Then: mllm run photo.png "How many dogs?" --plan tuned
    """
    options = {
        "max_loss": max_loss, "objective": objective, "max_flops": max_flops,
        "max_tokens": max_tokens, "max_kv_bytes": max_kv_bytes, "max_latency": max_latency,
        "methods": _words(methods), "budgets": _fractions(budgets), "tasks": _words(tasks),
        "claim": claim, "style": style, "batch_size": batch_size, "adapter": adapter,
        "data_dir": data_dir, "workers": workers,
    }  # fmt: skip
    effort = {"trials": trials, "first": first, "n": n, "confirm": confirm, "n_test": n_test,
              "pairs": pairs, "seed": seed}  # fmt: skip
    run_command(
        "tune",
        lambda: _tune(output, model, dtype, device, options, effort, dry_run),
        json,
        _show_estimate if dry_run else _show,
        None if dry_run else _unconfirmed,
    )


def _tune(
    output: Path, model: str, dtype: str, device: str | None, options: dict[str, Any],
    effort: dict[str, int], dry_run: bool,
) -> dict[str, Any]:  # fmt: skip
    from mllm.eval import tuning_space
    from mllm.eval.tuning_goal import COSTS, Goal

    # What is cheap to refuse comes before the model.
    goal = Goal.of(
        max_loss=options["max_loss"],
        objective=options["objective"],
        budgets={cost: options[f"max_{cost}"] for cost in COSTS},
    )
    if options["budgets"] is None:
        options["budgets"] = list(tuning_space.SHARES)
    tuning_space.check_shares(options["budgets"])

    from mllm.eval import engines, plans, tuning
    from mllm.eval.tuning_model import Chosen, is_ours
    from mllm.loading import load_model

    tuning.need(options["claim"])
    much = tuning.Effort(**effort)
    workers = options["workers"]
    if workers > 1:
        engines.devices_for(workers, device)  # refuses what there is no GPU for
    learnt = None
    if options["adapter"] is not None:
        learnt = tuning_space.Learnt.of(options["adapter"], model)
    methods = tuning.methods_for(goal, options["methods"])
    tuning_space.candidates(methods, learnt)
    if not all(map(is_ours, options["tasks"] or [])):
        quiet()
    tasks = Chosen.of(options["tasks"] or [], options["style"], options["data_dir"])
    if not dry_run:
        tuning.check_output(output)
    console = err_console()
    with contextlib.ExitStack() as stack:
        with console.status("loading the model"):
            if learnt is not None:
                plans.check_plans(model, [learnt.plan], learnt=True)
            evaluator = stack.enter_context(
                tasks.asked_of(
                    *load_model(model, dtype=dtype, device=device),
                    style=options["style"],
                    batch_size=options["batch_size"],
                    workers=workers,
                    load=functools.partial(engines.load_on, model, dtype=dtype),
                )
            )
        with console.status("estimating the cost"):
            cost = tuning.estimate(evaluator, tasks.names, much)
            ahead = {"goal": str(goal), **cost}
        if dry_run:
            return ahead
        console.print(_ahead(ahead), highlight=False, soft_wrap=True)
        with _display() as (progress, on_trial):
            evidence = tuning.search(
                evaluator, output, goal, tasks.names, methods=methods, learnt=learnt,
                budgets=options["budgets"], claim=options["claim"], effort=much,
                progress=progress, on_trial=on_trial,
            )  # fmt: skip
    names = (tuning.JOURNAL, tuning.EVIDENCE, tuning.PLAN_FILE, *tuning.ADAPTER_FILES)
    written = [str(output / name) for name in names if (output / name).exists()]
    return {**evidence, "forecast": ahead, "files": written}


@contextlib.contextmanager
def _display() -> Iterator[tuple[Any, Any]]:
    """A bar on stderr, and lines of finished trials; what advances them."""
    console = err_console()
    columns = (BarColumn(20), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        running = bar.add_task("", total=None)

        def progress(text: str, done: int, total: int) -> None:
            bar.update(running, description=text, completed=done, total=total)

        def on_trial(trial: dict[str, Any]) -> None:
            console.print(_line(trial), markup=False, highlight=False, soft_wrap=True)

        yield progress, on_trial


def _line(trial: dict[str, Any]) -> str:
    """A finished trial."""
    said = f"[{trial['number'] + 1}] {trial['plan'] or 'no stage'}: {trial['state']}"
    if "share" in trial:
        said += f", {100 * trial['share']:.1f} % of the cost"
    if "diff" in trial:
        said += f", {100 * trial['diff']:+.1f} points on {trial['n']} questions"
    return said


def _ahead(ahead: dict[str, Any]) -> str:
    minutes = ahead["seconds"] / 60
    duration = f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"
    return (
        f"{ahead['goal']}: about {ahead['questions']:,} questions, at most "
        f"{ahead['flops'] / 1e12:.3g} TFLOPs and {duration} minutes if no answer is there yet and "
        "every plan cost what the unpatched model does"
    )


def _show_estimate(ahead: dict[str, Any]) -> None:
    results_console().print(_ahead(ahead), highlight=False, soft_wrap=True)


def _show(evidence: dict[str, Any]) -> None:
    table = Table(title="On test questions, best on dev first", title_justify="left")
    for column in ("plan", "holds", "% of the cost", "score %", "vs unpatched"):
        left = column == "plan"
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    for one in evidence["confirmed"]:
        if "cost" not in one:
            table.add_row(one["plan"], "no", "–", "–", "–")
            continue
        low, high = (100 * bound for bound in one["vs_unpatched"]["ci"])
        table.add_row(
            one["plan"],
            "yes" if one["holds"] else "no",
            f"{100 * one['cost']['share']:.1f}",
            f"{100 * one['score']:.1f}",
            f"{100 * one['vs_unpatched']['diff']:+.1f} [{low:+.1f}, {high:+.1f}]",
        )
    console = results_console()
    if evidence["confirmed"]:
        console.print(table)
    for refused in evidence["refused"]:
        text = f"{refused['count']} refused: {refused['reason']}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(evidence["words"], markup=False, highlight=False, soft_wrap=True)
    console.print("Written:", *evidence["files"], sep="\n  ")


def _unconfirmed(evidence: dict[str, Any]) -> dict[str, Any] | None:
    """The error object where no plan was confirmed."""
    if evidence["plan"] is not None:
        return None
    return {"type": "Unconfirmed", "message": evidence["words"], "argument": None, "given": None,
            "expected": None}  # fmt: skip


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _fractions(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in _words(text) or []]
    except ValueError as error:
        raise MllmError(
            f"{text!r} is no list of fractions",
            argument="budgets",
            given=text,
            expected="fractions in (0, 1], separated by commas",
        ) from error
