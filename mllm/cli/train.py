"""`mllm train`: run a recipe."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mllm.cli._common import JsonOption, run_command


def command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.max_steps=10."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run; a PATH may follow.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Resolve and check everything, try one small step, and stop."
        ),
    ] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes on this machine.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The recipe's tiny part: a minute on a CPU.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    json: JsonOption = False,
) -> None:
    """Train or fine-tune from a recipe, with or without a plan.

    Example: mllm train lora-visionzip train.max_steps=50 output.dir=runs/try

    Example: mllm train lora-visionzip --dry-run

    Example: mllm train recipes/tiny-llava.yaml --resume
    """
    # `--local_rank` is what the deepspeed launcher adds; it says the same in the environment.
    from mllm.training import launch
    from mllm.training.recipe import load

    # `--resume PATH`: the path arrives as one more argument, the only one without "=".
    changes = list(overrides or [])
    paths = [word for word in changes if "=" not in word]
    where: bool | str = resume
    if resume and len(paths) == 1:
        changes.remove(paths[0])
        where = paths[0]
    if nproc is not None:
        changes.append(f"parallel.nproc={nproc}")
    outcome: dict[str, Any] = {}
    here = launch.world()

    def work() -> dict[str, Any]:
        wanted = load(recipe, changes, tiny)
        processes = here.size if launch.launched() else wanted.parallel.nproc
        if dry_run:
            from mllm.training.preview import preview

            outcome.update(preview(wanted, launch.World(size=processes)))
        elif processes > 1 and not launch.launched():
            words = [recipe, *changes, *(["--tiny"] if tiny else [])]
            words += ["--resume"] if where else []
            words += [where] if isinstance(where, str) else []
            outcome.update(launch.many(wanted, where, processes, words))
        else:
            from mllm.training.run import run

            outcome.update(run(wanted, where))
        return outcome

    if not here.first:
        work()
    else:
        run_command("train", work, json, _show_preview if dry_run else _show)
    code = 143 if outcome.get("status") == "stopped" else 0
    if here.size > 1:
        launch.end_worker(code)
    if code:
        raise typer.Exit(code)


def _show(record: dict[str, Any]) -> None:
    console = Console()
    if record["status"] == "stopped":
        console.print(f"Stopped and saved; continue with --resume ({record['folder']}).")
        return
    console.print(f"Done in {record['seconds'] / 60:.1f} minutes: {record['folder']}")
    for row in record["eval"]:
        plan = row["plan"] or "unpatched"
        low, high = row["ci"]
        console.print(
            f"  {row['task']:14} {plan:24} {row['score']:6.1%}  ({low:.1%} to {high:.1%}, "
            f"n {row['n']})"
        )


def _show_preview(found: dict[str, Any]) -> None:
    import yaml

    console = Console()
    print(yaml.safe_dump(found["recipe"], sort_keys=False), end="")
    if "parts" in found:
        _show_parts(console, found)
    for stage in found.get("stages", ()):
        if "parts" in stage:
            console.print(f"\n[bold]stage {stage['name']}[/bold]")
            _show_parts(console, stage)
        else:
            console.print(f"stage {stage['name']}: {stage['steps']} steps of {stage['effective']}")


def _show_parts(console: Console, found: dict[str, Any]) -> None:
    table = Table(title="\nparameters", title_justify="left")
    for column in ("part", "all", "trained", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, row in found["parts"].items():
        rate = row.get("learning_rate")
        table.add_row(
            part,
            f"{row['parameters']:,}",
            f"{row['trained']:,}",
            "-" if rate is None else f"{rate:g}",
        )
    console.print(table)
    if "batch" not in found:
        return
    experts = Counter((row["experts"], row["per_process"]) for row in found["experts"])
    for (number, own), layers in experts.items():
        console.print(f"experts  {number} in each of {layers} layers, {own} of them in a process")
    batch, memory, step = found["batch"], found["memory"], found["step"]
    console.print(
        f"batch    {batch['effective']} = {batch['per_device']} x {batch['accumulation']} "
        f"accumulated x {batch['processes']} processes\n"
        f"steps    {batch['steps']} ({batch['steps_per_epoch']} an epoch of {batch['samples']})"
    )
    gib = {name: f"{size / 2**30:.2f}" for name, size in memory.items()}
    console.print(
        f"memory   about {gib['total']} GiB of {gib['available']} on each device: weights "
        f"{gib['weights']}, gradients {gib['gradients']}, optimizer {gib['optimizer']}, "
        f"activations roughly {gib['activations']} (without a plan)\n"
        f"trial    one step of a random model of {step['parameters']:,} parameters: loss "
        f"{step['loss']:.3f}, {step['seconds']} s"
    )
