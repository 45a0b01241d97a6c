"""`mllm recipes`: list, show and copy the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mllm.cli._common import JsonOption, check_writable, run_command, write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The shipped recipes.")


@app.command("list")
def list_command(json: JsonOption = False) -> None:
    """List the shipped recipes.

    Example: mllm recipes list --json
    """
    run_command("recipes", _rows, json, _table)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")],
    json: JsonOption = False,
) -> None:
    """Print a recipe with its comments.

    Example: mllm recipes show tiny-llava
    """
    run_command("recipes", lambda: _read(name), json, lambda data: print(data["text"], end=""))


@app.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="New file; the recipe's name here.")] = None,
    json: JsonOption = False,
) -> None:
    """Copy a recipe, to edit it.

    Example: mllm recipes copy lora-visionzip mine.yaml
    """
    run_command(
        "recipes", lambda: _copy(name, to), json, lambda data: Console().print(data["path"])
    )


def _rows() -> list[dict[str, Any]]:
    from mllm.training.recipe import load, shipped

    rows = []
    for name, path in shipped().items():
        recipe = load(path)
        plans = [part.plan for _, part in recipe.tunes()]
        plans += recipe.eval.plans if recipe.eval else []
        stages = [stage for plan in plans if plan for stage in plan.split("+")]
        rows.append(
            {
                "name": name,
                "path": str(path),
                "summary": recipe.summary,
                "methods": sorted({stage.split(":")[0] for stage in stages}),
                "published": recipe.published,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{len(rows)} recipes", title_justify="left")
    for column in ("recipe", "what it does", "methods"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["summary"], ", ".join(row["methods"]) or "-")
    Console().print(table)


def _read(name: str) -> dict[str, Any]:
    from mllm.training.recipe import resolve

    path = resolve(name)
    return {"name": path.stem, "path": str(path), "text": path.read_text(encoding="utf-8")}


def _copy(name: str, to: Path | None) -> dict[str, Any]:
    from mllm.errors import RecipeError

    found = _read(name)
    target = to or Path(f"{found['name']}.yaml")
    if target.is_dir():
        target = target / f"{found['name']}.yaml"
    if target.exists():
        raise RecipeError(
            f"{target} exists; nothing is overwritten",
            argument="to",
            given=target,
            expected="a file that does not exist yet",
        )
    check_writable(target)
    write_text(target, found["text"])
    return {"name": found["name"], "path": str(target)}
