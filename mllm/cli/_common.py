"""What the commands share: options, the `--json` object, exit codes, writing files."""

from __future__ import annotations

import contextlib
import json as jsonlib
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from mllm.errors import DataError, MllmError
from mllm.eval import files

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ModelOption = Annotated[
    str,
    typer.Option("--model", help="Folder or hub name of a model; tiny-llava is embedded."),
]
PlanOption = Annotated[
    str,
    typer.Option("--plan", help="Plan text such as visionzip:keep=64+fastv:keep=0.5, or a folder."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...; the GPU when there is one."),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with local copies of public data sets; nothing is "
                 "fetched."),
]  # fmt: skip
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Processes: on the CPU, or with a GPU each.")
]

# Typer carries its own copy of click in some releases and imports click in others.
UsageError, ClickException = typer.BadParameter.__mro__[1:3]

T = TypeVar("T")


def err_console() -> Console:
    """Console on stderr, for progress and messages: stdout belongs to results."""
    return Console(stderr=True)


def run_command(
    name: str,
    fn: Callable[[], T],
    json: bool = False,
    render: Callable[[T], None] | None = None,
    failure: Callable[[T], dict[str, Any] | None] | None = None,
) -> None:
    """Run the body of a command and show its result.

    Args:
        name: the command's name, as in `mllm <name>`.
        fn: does the work and returns the `data` of the `--json` object.
        json: print that object on stdout; whatever else is printed goes to stderr meanwhile.
        render: shows the data to people, when `json` is off.
        failure: the error object of data that say that the command did not reach what it is for,
            or None: then the exit code is 1, and the object has both.

    Errors pass through: the command group turns them into messages and exit codes.
    """
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        data = fn()
    error = failure(data) if failure is not None else None
    if json:
        said = {} if error is None else {"error": error}
        print_json({"schema": 1, "command": name, "ok": error is None, **said, "data": data})
    elif render is not None:
        render(data)
    if error is not None:
        raise typer.Exit(1)


def print_json(payload: dict[str, Any]) -> None:
    """Print one JSON object on stdout. Raises `ValueError` on NaN, which is not JSON."""
    print(jsonlib.dumps(payload, ensure_ascii=False, allow_nan=False), flush=True)


@contextlib.contextmanager
def exit_codes(arguments: Sequence[str], commands: Collection[str]) -> Iterator[None]:
    """Turn exceptions into one line (or the JSON error object) and an exit code.

    2: bad input (`MllmError`, wrong usage); 1: any other failure; 130: interrupted.

    Args:
        arguments: the command line; `--json` and `--traceback` are honoured even when the rest of
            it cannot be parsed.
        commands: names among which the command is looked for.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, with_traceback = "--json" in options, "--traceback" in options
    command = next((word for word in arguments if word in commands), None)

    def fail(code: int, error: dict[str, Any]) -> NoReturn:
        if with_traceback:
            tracebacks.print_exc()
        if as_json:
            print_json({"schema": 1, "command": command, "ok": False, "error": error})
        else:
            line = " ".join(error["message"].split())
            if error["expected"] and error["expected"] not in line:
                line += f"; expected {error['expected']}"
            print(f"{' '.join(filter(None, ['mllm', command]))}: error: {line}", file=sys.stderr)
        sys.exit(code)

    try:
        yield
    except MllmError as error:
        fail(2, error.as_dict())
    except UsageError as error:
        fail(2, _usage(error))
    except (KeyboardInterrupt, typer.Abort):
        fail(130, _plain("Interrupted", "interrupted"))
    except Exception as error:  # the boundary of the program: anything else is a failure
        hint = "" if with_traceback else " (--traceback shows where)"
        fail(1, _plain(type(error).__name__, f"{type(error).__name__}: {error}{hint}"))


def _plain(kind: str, message: str) -> dict[str, Any]:
    return {"type": kind, "message": message, "argument": None, "given": None, "expected": None}


def _usage(error: Any) -> dict[str, Any]:
    """The error object of a command line that does not parse."""
    param = getattr(error, "param", None)
    name = getattr(error, "option_name", None) or (param.opts[0] if param is not None else None)
    message = error.format_message()
    if not message:  # `mllm` alone: the help was the answer
        message = "missing command; see mllm --help"
    elif error.ctx is not None:
        message = f"{message} (see {error.ctx.command_path} --help)"
    return {**_plain("UsageError", message), "argument": name}


def picture_size(text: str) -> tuple[int, int]:
    """(height, width) of `WIDTHxHEIGHT`.

    Raises:
        DataError: it is something else.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise DataError(
            f"size={text!r} is no size in pixels; give it as 1920x1080",
            argument="size",
            given=text,
            expected="WIDTHxHEIGHT",
        )
    return int(found[2]), int(found[1])


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: to a temporary name beside it, then renamed.

    Raises:
        DataError: the folder is missing or cannot be written.
    """
    try:
        files.write_text(path, text)
    except OSError as error:
        raise unwritable(Path(path), error) from error


def check_writable(path: str | Path) -> None:
    """Find out before minutes of work that `path` cannot be written.

    Raises:
        DataError: the folder is missing or cannot be written.
    """
    path = Path(path)
    probe = path.with_name(f".{path.name}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """The error for an output file that cannot be written."""
    return DataError(
        f"cannot write {path}: {error.strerror}; give a file in a folder that exists and can be "
        "written",
        argument="output",
        given=str(path),
        expected="a writable folder",
    )
