"""`mllm inspect`: which visual tokens a plan keeps, merges and drops, drawn over the picture."""

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


def command(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[str, typer.Argument(help="Question about it.")],
    plan: PlanOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG to write; replaced if it is there.")
    ] = Path("inspect.png"),
    model: ModelOption = "tiny-llava",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Draw the kept, merged and dropped visual tokens over the picture, stage by stage.

    Example: mllm inspect photo.png "How many dogs?" --plan visionzip:keep=64 -o kept.png
    """
    run_command(
        "inspect",
        lambda: inspect(image, question, plan, output, model, max_new_tokens, device, dtype),
        json,
        _show,
    )


def inspect(
    image: Path,
    question: str,
    plan: str,
    output: Path,
    model: str,
    max_new_tokens: int,
    device: str | None,
    dtype: str,
) -> dict[str, Any]:
    """Answer with and without the plan, draw what it did to the tokens, and write the figure.

    Raises:
        DataError: the picture cannot be read, or the output cannot be written.
        PlanError: the plan cannot be read, or does not work on this model, or the model does not
            see a picture as one plain grid.
    """
    check_writable(output)
    with err_console().status("loading"):
        import transformers

        from mllm.eval import overlay
        from mllm.eval.answer import answer
        from mllm.eval.plans import check_plans, patched_with
        from mllm.loading import build_inputs, load_image, load_model
        from mllm.plan import Plan
        from mllm.views import with_tiles

        transformers.utils.logging.disable_progress_bar()
        parsed, picture = Plan.of(plan), load_image(image)
        check_plans(model, [parsed])
        loaded, processor = load_model(model, device=device, dtype=dtype)
        inputs = build_inputs(processor, [([picture], question)])
        overlay.check_plain(loaded, inputs["pixel_values"])

    with err_console().status("answering"):
        answers = []
        for stages in (Plan([]), parsed):
            with patched_with(loaded, stages) as patched:
                grid = None if patched is None else patched.tiles
                given = with_tiles(inputs, processor, [picture], grid)
                given = given.to(loaded.device, loaded.dtype)
                (result,) = answer(loaded, processor, given, patched, max_new_tokens=max_new_tokens)
                answers.append(result.text)
        ledger = patched.ledger
        record = ledger.as_dict()
        shape = processor.image_processor
        seen = overlay.as_seen(inputs["pixel_values"][0], shape.image_mean, shape.image_std)
        panels = overlay.panels(seen, ledger)

    share = record["prefill_flops"][0] / record["baseline_prefill_flops"][0]
    data = {
        "image": str(image),
        "question": question,
        "plan": parsed.spec,
        "answer": answers[1],
        "unpatched_answer": answers[0],
        "visual_tokens": record["visual_tokens"][0],
        "kept_llm": record["kept_llm"][0],
        "visual_avg": record["visual_avg"][0],
        "prefill_flops_share": share,
        "panels": [panel.title for panel in panels],
        "output": str(output),
    }
    caption = [
        f"Question: {question}",
        f"Unpatched answer: {answers[0]}",
        f"With {plan}: {answers[1]}",
        f"{data['visual_tokens']} visual tokens, {data['kept_llm']} into the LLM, "
        f"{data['visual_avg']:.1f} per decoder layer on average; {share:.0%} of the prefill FLOPs",
    ]
    _save(overlay.figure(panels, caption), output)
    return data


def _save(picture: Any, path: Path) -> None:
    """Write a PNG to a temporary name beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def _show(data: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"unpatched  {data['visual_tokens']:>5} visual tokens  ", end="")
    console.print(data["unpatched_answer"], markup=False)
    console.print(f"patched    {data['kept_llm']:>5} into the LLM   ", end="")
    console.print(data["answer"], markup=False)
    console.print(f"{data['visual_avg']:.1f} visual tokens per decoder layer on average")
    console.print(f"wrote {data['output']}", markup=False, soft_wrap=True)
