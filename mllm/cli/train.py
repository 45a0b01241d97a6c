"""`mllm train`: run a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

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
    json: JsonOption = False,
) -> None:
    """Train or fine-tune from a recipe, with or without a plan.

    Example: mllm train lora-visionzip train.max_steps=50 output.dir=runs/try

    Example: mllm train recipes/tiny-llava.yaml --resume
    """
    from mllm.training.run import train

    # `--resume PATH`: the path arrives as one more argument, the only one without "=".
    changes = list(overrides or [])
    paths = [word for word in changes if "=" not in word]
    where: bool | str = resume
    if resume and len(paths) == 1:
        changes.remove(paths[0])
        where = paths[0]
    outcome: dict[str, Any] = {}

    def work() -> dict[str, Any]:
        outcome.update(train(recipe, changes, where))
        return outcome

    run_command("train", work, json, _show)
    if outcome["status"] == "stopped":
        raise typer.Exit(143)


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
