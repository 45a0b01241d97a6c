"""`mllm inspect`: which visual tokens a plan keeps, merges and drops, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlanOption,
    check_writable,
    err_console,
    run_command,
    unwritable,
)
from mllm.errors import DataError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")


def command(
    images: Annotated[list[Path], typer.Argument(help="Picture files, or one video.")],
    question: Annotated[str, typer.Argument(help="Question about them.")],
    plan: PlanOption,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, .png or .html; give it again for both.",
            show_default="inspect.html and inspect.png",
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames that are taken of a video.")] = 8,
    model: ModelOption = "tiny-llava",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show what a plan does with pictures or a video and a question, stage by stage.

    The page has every layer on a slider, the attention that stages have read, both answers and the
    ledger; the picture has the stages side by side.

    Example: mllm inspect photo.png "How many dogs?" --plan visionzip:keep=64 -o kept.html
    """
    outputs = output or [Path("inspect.html"), Path("inspect.png")]
    run_command(
        "inspect",
        lambda: inspect(
            images, question, plan, outputs, model, frames, max_new_tokens, device, dtype
        ),
        json,
        _show,
    )


def inspect(
    images: list[Path],
    question: str,
    plan: str,
    outputs: list[Path],
    model: str,
    frames: int,
    max_new_tokens: int,
    device: str | None,
    dtype: str,
) -> dict[str, Any]:
    """Answer with and without the plan, draw what it did to the tokens, and write the files.

    Raises:
        DataError: a picture cannot be read, or an output cannot be written.
        PlanError: the plan cannot be read, or does not work on this model, or the model cuts
            pictures in a way that cannot be drawn.
    """
    from mllm.eval.files import suffix_of
    from mllm.eval.inspection import SUFFIXES

    for path in outputs:
        suffix_of(path, SUFFIXES)
        check_writable(path)
    with err_console().status("loading"):
        import transformers

        from mllm.eval import inspection
        from mllm.eval.plans import check_plans
        from mllm.loading import load_image, load_model
        from mllm.plan import Plan

        transformers.utils.logging.disable_progress_bar()
        parsed = Plan.of(plan)
        clip = _clip(images, frames)
        pictures = [] if clip else [load_image(path) for path in images]
        check_plans(model, [parsed])
        loaded, processor = load_model(model, device=device, dtype=dtype)

    with err_console().status("answering"):
        made = inspection.inspect(
            loaded,
            processor,
            parsed,
            question,
            pictures,
            frames=clip.frames if clip else (),
            metadata=clip.metadata() if clip else None,
            max_new_tokens=max_new_tokens,
        )
    for path in outputs:
        try:
            made.save(path)
        except OSError as error:
            raise unwritable(path, error) from error
    written = [str(path) for path in outputs]
    names = [str(path) for path in images]
    return {"image": names[0], "images": names, **made.as_dict(), "output": written[0],
            "outputs": written}  # fmt: skip


def _clip(images: list[Path], frames: int) -> Any:
    """The :class:`mllm.training.video.Clip` of a video, if one is given; else None."""
    videos = [path for path in images if path.suffix.lower() in VIDEOS]
    if not videos:
        return None
    if len(images) > 1:
        raise DataError(
            "a video is inspected alone",
            argument="images",
            given=", ".join(map(str, images)),
            expected="one video, or pictures",
        )
    from mllm.training.video import read_clip

    return read_clip(videos[0], frames, str(videos[0]))


def _show(data: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"unpatched  {data['visual_tokens']:>5} visual tokens  ", end="")
    console.print(" ".join(data["unpatched_answer"].split()), markup=False)
    console.print(f"patched    {data['kept_llm']:>5} into the LLM   ", end="")
    console.print(" ".join(data["answer"].split()), markup=False)
    console.print(f"{data['visual_avg']:.1f} visual tokens per decoder layer on average")
    for row in data["budgets"] if len(data["budgets"]) > 1 else ():
        console.print(
            f"{row['name']}: {row['kept_llm']} of {row['tokens']} into the LLM, "
            f"{row['last']} into the last layer"
        )
    for path in data["outputs"]:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
