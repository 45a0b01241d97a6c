"""`mllm doctor`: what works with a model, and why the rest does not."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import JsonOption, err_console, run_command


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or name of a model; config.json is enough. tiny-llava is embedded."
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Say which methods, signals, actions and ways of running work with a model, and why not.

    No weights are loaded.

    Example: mllm doctor tiny-llava
    """
    run_command(
        "doctor",
        lambda: _examine(model).as_dict() if json else _examine(model),
        json,
        lambda report: Console().print(*report.tables()),
    )


def _examine(model: str) -> Any:
    with err_console().status("reading the configuration"):
        import mllm
        from mllm.doctor import skeleton

        return mllm.doctor(skeleton(model))
