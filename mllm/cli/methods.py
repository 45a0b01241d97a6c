"""`mllm methods`: what there is."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm.cli._common import JsonOption, run_command


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods to explain; none lists them all.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List every method: where it acts, its paper, what it does.

    With names, say more of these, with their parameters and defaults; --json has it of all.

    Example: mllm methods fastv visionzip
    """
    if names:
        run_command("methods", lambda: _named(names), json, _explain)
    else:
        run_command("methods", _methods, json, _show)


def _methods() -> list[dict[str, Any]]:
    import mllm

    return [dict(row) for row in mllm.methods()]


def _named(names: list[str]) -> list[dict[str, Any]]:
    from mllm.plan import get_method

    wanted = [get_method(name).info.name for name in names]
    rows = {row["name"]: row for row in _methods()}
    return [rows[name] for name in wanted]


def _explain(rows: list[dict[str, Any]]) -> None:
    from mllm.plan import get_method

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        trained = "; must be trained" if row["trained"] else ""
        console.print(f"[bold]{row['name']}[/bold]  {_place(row)}; {row['paper'] or 'no paper'}"
                      f"{trained}\n")  # fmt: skip
        console.print(inspect.getdoc(get_method(row["name"])), markup=False)
        params = [f"{p['name']}={p['default']}" for p in row["params"]]
        console.print(f"\nDefaults: {', '.join(params)}\n", markup=False)


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{len(rows)} methods", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for column in ("method", "acts at", "paper"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it does")
    for row in rows:
        trained = " *" if row["trained"] else ""
        paper = (row["paper"] or "-").removeprefix("arXiv:")
        table.add_row(row["name"] + trained, _place(row), paper, Text(row["summary"]))
    console = Console()
    console.print(table)
    console.print("\n* must be trained. `mllm methods NAME` says more, with the parameters.")


def _place(row: dict[str, Any]) -> str:
    return row["site"] or row["stage"]
