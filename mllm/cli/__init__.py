"""The `mllm` command line. Each command lives in its own module, imported when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mllm.cli import _common

# Summaries stand here, so that `mllm --help` imports no command (and no torch).
SUMMARIES = {
    "demo": "The whole job on the embedded model: table and report.",
    "methods": "List the methods, or explain some.",
    "doctor": "Say what works with a model, and why the rest does not.",
    "estimate": "Say what a plan will cost, without weights.",
    "run": "Answer one question with and without a plan, side by side.",
    "inspect": "Show what a plan keeps and merges, layer by layer.",
    "calibrate": "Fit a method's layers or budgets to a model.",
    "train": "Train or fine-tune from a recipe, with or without a plan.",
    "recipes": "List the shipped recipes, or copy one.",
    "eval": "Score a model under a plan with lmms-eval.",
    "sweep": "Score many plans and budgets; resumable.",
    "tune": "Find the plan that fits a goal; resumable.",
    "report": "Make a page of results, or compare two runs.",
    "bench": "Measure speed and memory against the unpatched model.",
}


class LazyGroup(TyperGroup):
    """Lists the commands from `SUMMARIES` and imports a command's module when it is called.

    A module `mllm.cli.<name>` defines `command`, or `app` (a `typer.Typer`) when it has commands of
    its own. Errors become exit codes here: 2 bad input, 1 failure, 130 interrupted.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in SUMMARIES if importlib.util.find_spec(f"mllm.cli.{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the summary: enough for help and completion."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return TyperCommand(cmd_name, help=SUMMARIES[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str, Any, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(known)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return name, load_command(name), args[1:]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        with _common.exit_codes(arguments, SUMMARIES):
            code = super().main(
                args=arguments,
                prog_name=prog_name or "mllm",
                complete_var=complete_var,
                standalone_mode=False,
                **extra,
            )
        # Without standalone mode --help and typer.Exit come back as a return value.
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def load_command(name: str) -> Any:
    """Import `mllm.cli.<name>` and build its command, `--traceback` included."""
    module = importlib.import_module(f"mllm.cli.{name}")
    own = getattr(module, "app", None)
    if own is None:
        own = typer.Typer(add_completion=False)
        own.command(name)(module.command)
    built = typer.main.get_command(own)
    built.name = name
    for command in [built, *getattr(built, "commands", {}).values()]:
        command.params.append(_traceback_option())
    return built


def _traceback_option() -> Any:
    """The option `--traceback`; `exit_codes` reads it from the command line itself."""

    def carrier(
        traceback: Annotated[
            bool,
            typer.Option(
                "--traceback", expose_value=False, help="Show the Python traceback of an error."
            ),
        ] = False,
    ) -> None: ...

    holder = typer.Typer(add_completion=False)
    holder.command()(carrier)
    return next(p for p in typer.main.get_command(holder).params if p.name == "traceback")


app = typer.Typer(
    name="mllm",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Patch, fine-tune and evaluate vision-language models with fewer visual tokens.",
    epilog='Example: mllm run photo.png "How many dogs?" --plan visionzip:keep=64',
)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Entry point of the `mllm` script."""
    # 128 + 15; a command that has something to save (train) installs its own handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
