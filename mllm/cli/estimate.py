"""`mllm estimate`: what a plan will cost on a model, without its weights."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer
from rich.console import Console

from mllm.cli._common import JsonOption, err_console, picture_size, run_command
from mllm.errors import DataError
from mllm.roofline import HARDWARE, Hardware, device
from mllm.shapes import SHAPES


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A public shape, a folder with config.json, or a hub name. Shapes: "
            + ", ".join(SHAPES)
        ),
    ],
    plan: Annotated[
        str | None,
        typer.Option(help="Plan text such as visionzip:keep=64+fastv:keep=0.5, or a folder."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images per sample; tiles, where a model takes tiles.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT of the images in pixels, for models that take any size."),
    ] = None,
    visual: Annotated[
        int | None, typer.Option(help="Visual tokens per sample, instead of --images or --size.")
    ] = None,
    text: Annotated[int, typer.Option(help="Text tokens per sample.")] = 64,
    new: Annotated[int, typer.Option(help="Tokens of the answer.")] = 128,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    hardware: Annotated[
        str | None,
        typer.Option(help=f"A device by its data sheet: {', '.join(HARDWARE)}. Default: h100."),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s of a device of your own, with --bandwidth, instead of --hardware."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of a device of your own, with --peak.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB of a device of your own, with --peak.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what a plan will cost: tokens, FLOPs, KV bytes, and times on a device at best.

    Nothing is loaded or computed but shapes. Tokens, FLOPs and KV bytes are those of the ledger of
    a real run; times are a roofline that real runs stay above.

    Example: mllm estimate llava-1.5-7b --plan visionzip:keep=64

    Example: mllm estimate qwen2.5-vl-7b --plan fastv:keep=0.1 --size 1920x1080 --batch 8
    """

    def work() -> Any:
        at = _device(hardware, peak, bandwidth, memory, dtype)
        shape = None if size is None else picture_size(size)
        with err_console().status("running the engine over shapes"):
            import mllm

            found = mllm.estimate(
                model, plan, images=images, size=shape, visual=visual, text=text, new=new,
                batch=batch, hardware=at, dtype=dtype,
            )  # fmt: skip
        return found.as_dict() if json else found

    def show(found: Any) -> None:
        console = Console()
        for part in found.tables(layers):
            console.print(part, markup=False)

    run_command("estimate", work, json, show)


def _device(
    name: str | None, peak: float | None, bandwidth: float | None, memory: float | None, dtype: str
) -> Hardware:
    """A device by name, or by its own numbers."""
    own = {"peak": peak, "bandwidth": bandwidth, "memory": memory}
    if peak is None and bandwidth is None and memory is None:
        return device("h100" if name is None else name)
    for argument, value in own.items():
        if value is None and argument == "memory":
            continue
        if value is None or not 0 < value < math.inf:
            raise DataError(
                f"{argument}={value} is no device of your own; give --peak, --bandwidth and "
                "perhaps --memory, all above 0",
                argument=argument,
                given=value,
                expected="--peak TFLOP/s, --bandwidth GB/s and perhaps --memory GB",
            )
    if name is not None:
        raise DataError(
            f"hardware={name} is one device, and --peak and --bandwidth are another; give one of "
            "them",
            argument="hardware",
            given=name,
            expected="--hardware alone, or --peak and --bandwidth without it",
        )
    return Hardware(
        "given", {dtype: peak * 1e12}, bandwidth * 1e9, None if memory is None else memory * 1e9
    )
