"""`mllm run`: one question, with and without a plan."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mllm.cli._common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlanOption,
    err_console,
    run_command,
)


def command(
    image: Annotated[str, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What to ask.")] = "What is in the picture?",
    *,
    plan: PlanOption,
    model: ModelOption = "tiny-llava",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    pairs: Annotated[
        int, typer.Option(help="Interleaved prefill timings of each; 0 leaves them out.", min=0)
    ] = 5,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a question with and without a plan: answers, tokens, FLOPs, memory, time.

    Example: mllm run photo.png "How many dogs?" --plan visionzip:keep=64
    """
    run_command(
        "run",
        lambda: _compare(image, question, plan, model, max_new_tokens, pairs, dtype, device),
        json,
        _show,
    )


def _compare(
    image: str,
    question: str,
    plan: str,
    model_path: str,
    max_new_tokens: int,
    pairs: int,
    dtype: str,
    device: str | None,
) -> dict[str, Any]:
    from mllm import Plan, patch
    from mllm.loading import build_inputs, load_image, load_model
    from mllm.views import with_tiles

    # What is cheap to refuse comes before the model.
    chosen, picture = Plan.of(plan), load_image(image)
    with err_console().status("loading the model"):
        import numpy as np

        from mllm.eval.bench import device_name, time_pairs, timed_prefill, twin
        from mllm.eval.plans import check_plans

        check_plans(model_path, [chosen])
        model, processor = load_model(model_path, dtype=dtype, device=device)
        inputs = build_inputs(processor, [([picture], question)]).to(model.device)

    def answer(which: Any, given: Any) -> str:
        length = given["input_ids"].shape[1]
        ids = which.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        return processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()

    other = twin(model)
    with patch(other, chosen) as patched, err_console().status("answering") as status:
        own = with_tiles(inputs, processor, [picture], patched.tiles).to(model.device)
        answers = {"unpatched": answer(model, inputs), "patched": answer(other, own)}
        ledger = patched.ledger.as_dict()
        prefill_s = None
        if pairs:
            status.update("timing the prefill")
            times, _ = time_pairs(
                model, other, inputs, pairs, warmup=1,
                timed=lambda which, given: timed_prefill(which, own if which is other else given),
            )  # fmt: skip
            times = np.median(times[..., 0], axis=0)
            prefill_s = {"unpatched": times[0], "patched": times[1], "pairs": pairs}
    return {
        "model": model_path,
        "plan": plan,
        "plan_sha256": chosen.sha256,
        "image": image,
        "question": question,
        "answers": answers,
        "visual_tokens": ledger["visual_tokens"][0],
        "kept_llm": ledger["kept_llm"][0],
        "visual_avg": ledger["visual_avg"][0],
        "layers": len(ledger["layers"]),
        "prefill_flops": ledger["prefill_flops"][0],
        "baseline_prefill_flops": ledger["baseline_prefill_flops"][0],
        "kv_bytes": ledger["kv_bytes"],
        "baseline_kv_bytes": ledger["baseline_kv_bytes"],
        "prefill_s": prefill_s,
        "device": device_name(str(model.device)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "notes": ledger["notes"],
    }


def _show(data: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{data['question']}\nplan: {data['plan']}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("unpatched", "patched"):
        table.add_column(column, overflow="fold")
    table.add_column("ratio", justify="right")

    def row(label: str, before: float, after: float, unit: str, scale: float = 1) -> None:
        left, right = (f"{value / scale:.4g} {unit}".strip() for value in (before, after))
        table.add_row(label, left, right, f"{after / before:.1%}" if before else "-")

    table.add_row("answer", data["answers"]["unpatched"], data["answers"]["patched"], "")
    visual = data["visual_tokens"]
    row("visual tokens into the LLM", visual, data["kept_llm"], "")
    row("visual tokens per layer on average", visual, data["visual_avg"], "")
    row("prefill", data["baseline_prefill_flops"], data["prefill_flops"], "GFLOPs", 1e9)
    row("KV cache", data["baseline_kv_bytes"], data["kv_bytes"], "MiB", 2**20)
    if times := data["prefill_s"]:
        row("prefill, measured", times["unpatched"], times["patched"], "ms", 1e-3)
    console.print(table)
    if times:
        console.print(
            f"Measured: median of {times['pairs']} interleaved prefills each on {data['device']}, "
            f"{data['dtype']}. A first look; `mllm bench` gives intervals."
        )
    for note in data["notes"]:
        console.print(f"Note: {note}")
