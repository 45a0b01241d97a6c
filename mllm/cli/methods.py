"""`mllm methods`: what there is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mllm.cli._common import JsonOption, run_command


def command(json: JsonOption = False) -> None:
    """List every method: where it acts, what it reads, its parameters and defaults, its paper.

    Example: mllm methods --json
    """
    run_command("methods", _methods, json, _show)


def _methods() -> list[dict[str, Any]]:
    import mllm

    return [dict(row) for row in mllm.methods()]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{len(rows)} methods", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for column in ("method", "acts at", "reads", "parameters", "paper"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"] + (" (trained)" if row["trained"] else ""),
            row["site"] or row["stage"],
            "\n".join(row["reads"]) or "-",
            "\n".join(f"{p['name']}={p['default']}" for p in row["params"]),
            row["paper"] or "-",
        )
    Console().print(table)
