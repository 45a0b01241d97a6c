"""How prefill, decode, memory and selection grow with visual tokens and batch, on a random shape.

    python benchmarks/scaling.py --output benchmarks/results/scaling-cpu.json
    python -m scripts.make_scaling                           writes docs/scaling.md from it

Every point runs in a process of its own, on an otherwise idle machine. One that needs more memory
than `--memory` is recorded as `oom`, one that takes longer than `--minutes` as `timeout`, and the
sweep goes on. Points that the output has already are not measured again; an output that was
measured under another plan, dtype, device, number of threads or version is refused. Points may have
other numbers of pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mllm
from mllm.errors import DataError
from mllm.eval import bench
from mllm.eval.bench_kv import next_token
from mllm.eval.bench_selection import free_choice, positions_of
from mllm.eval.bench_shapes import Inputs, Shape
from mllm.eval.files import ensure_writable, write_json
from mllm.eval.provenance import versions
from mllm.eval.stats import median_interval
from mllm.loading import pick_device

#: Small, so that 20,000 tokens fit; of a family that takes any number of visual tokens.
SCALING = Shape(
    name="scaling",
    family="qwen2_5_vl",
    vision=dict(
        depth=4, hidden_size=256, intermediate_size=688, num_heads=4, out_hidden_size=512,
        patch_size=14, window_size=112, fullatt_block_indexes=[3],
    ),
    text=dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=8192, max_position_embeddings=128000,
        rope_parameters=dict(rope_type="default", mrope_section=[8, 12, 12], rope_theta=1e6),
    ),
)  # fmt: skip
VISUAL = (144, 288, 576, 1152, 2304, 4608, 9216, 20000)
BATCH = (1, 4, 16)
PLAN, TEXT, STEPS = "fastv:layer=2:keep=0.25", 63, 8
OUT_OF_MEMORY = 3


@torch.inference_mode()
def timed(model: Any, inputs: Inputs) -> tuple[float, float, float]:
    """Seconds of a prefill, of its part from the decoder on, and of one decode step."""
    clock = bench.clock_of(model)
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: clock.mark(), prepend=True)
    try:
        clock.mark()
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        clock.mark()
    finally:
        hook.remove()
    for _ in range(STEPS):
        model(**next_token(model, cache, inputs))
    clock.mark()
    start, decoder, read, end = clock.seconds()
    return read - start, read - decoder, (end - read) / STEPS


@bench.restoring_threads()
def measure(
    shape: Shape, visual: int, batch: int, plan: str, pairs: int, dtype: str, device: str | None,
    threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The results object of one point, with one row."""
    asked = bench.Options(
        visual=[visual], text=TEXT, batch=[batch], pairs=pairs, dtype=dtype, device=device,
        threads=threads,
    )  # fmt: skip
    base, (point,), results = bench.opened("scaling", shape, asked)
    inputs, other, third = point.inputs(), bench.twin(base), bench.twin(base)
    with mllm.patch(other, plan) as patched:
        peaks = [bench.peak_bytes(model, inputs) for model in (base, other)]
        ledger = patched.ledger.as_dict()
        free = free_choice(ledger, positions_of(patched))
        times, _ = bench.time_pairs(base, other, inputs, pairs, timed=timed)
        with mllm.patch(third, free):
            chosen, _ = bench.time_pairs(other, third, inputs, pairs, timed=timed)
    said = mllm.estimate(base, plan, visual=visual, text=TEXT, batch=batch, dtype=dtype)
    row = point.about(base, plan, pairs)
    ideal = sum(ledger["baseline_prefill_flops"]) / sum(ledger["prefill_flops"])
    for part, name in enumerate(("", "llm_", "decode_")):
        ratio, *ratio_ci = median_interval(times[:, 0, part] / times[:, 1, part])
        row |= {f"{name}ratio": ratio, f"{name}ratio_ci": ratio_ci}
        for which, whose in enumerate(("baseline", "patched")):
            value, *interval = median_interval(times[:, which, part])
            row |= {f"{name}{whose}_s": value, f"{name}{whose}_s_ci": interval}
    spent, *spent_ci = median_interval(chosen[:, 0, 0] - chosen[:, 1, 0])
    status, words = bench.judge(row["ratio"], row["ratio_ci"], ideal, None, pairs)
    row |= {
        "ideal": ideal,
        "share": row["ratio"] / ideal,
        "selection_s": spent,
        "selection_s_ci": spent_ci,
        "peak_bytes": peaks[1],
        "baseline_peak_bytes": peaks[0],
        "kv_bytes": ledger["kv_bytes"],
        "baseline_kv_bytes": ledger["baseline_kv_bytes"],
        "flops": sum(ledger["prefill_flops"]),
        "baseline_flops": sum(ledger["baseline_prefill_flops"]),
        "layer_flops": [x["plain_flops"] for x in said.layers],
        "estimate_equal": all(
            said.ledger[name] == ledger[name]
            for name in ("layers", "prefill_flops", "baseline_prefill_flops", "kv_bytes")
        ),
        "status": status,
        "words": words,
    }
    return {**results, "rows": [row]}


def laws(rows: Sequence[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Fits to what was measured, by batch: seconds as a polynomial of the tokens of a sample.

    A decoder layer of the unpatched prefill costs `a + b n + c n^2` for n tokens, its decode step
    `a + b n`. Least squares of relative errors, no coefficient below zero. The FLOPs that
    :func:`mllm.estimate` has for the layer are such a polynomial too: `rates` are FLOP per second
    of its linear and its quadratic part; null where a coefficient is zero.

    Args:
        rows: measured rows; others are left out.
        layers: of the decoder.
    """
    found = []
    whole = [row for row in rows if row["status"] not in ("oom", "timeout")]
    for batch in sorted({row["batch"] for row in whole}):
        own = [row for row in whole if row["batch"] == batch]
        n = np.array([row["visual"] + row["text"] for row in own], float)
        if len(own) < 3:
            continue
        prefill, error = fit(n, np.array([row["llm_baseline_s"] for row in own]) / layers, 2)
        counted, _ = fit(n, np.array([row["layer_flops"][-1] for row in own]), 2)
        step, step_error = fit(n, np.array([row["decode_baseline_s"] for row in own]) / layers, 1)
        found.append({
            "batch": batch,
            "points": len(own),
            "tokens": [int(n.min()), int(n.max())],
            "prefill": prefill,
            "prefill_error": error,
            "rates": [f / s if s > 0 else None for f, s in zip(counted, prefill, strict=True)][1:],
            "decode": step,
            "decode_error": step_error,
        })  # fmt: skip
    return found


def fit(n: np.ndarray, y: np.ndarray, degree: int) -> tuple[list[float], float]:
    """Coefficients of 1, n, ... `>= 0`, and the largest relative error of what they give."""
    powers = np.stack([n**i for i in range(degree + 1)], 1)
    scale = powers.max(0)
    used = list(range(degree + 1))
    while True:  # what would be negative is left out, the most negative first
        found = np.zeros(degree + 1)
        weighted = (powers / scale)[:, used] / y[:, None]
        found[used] = np.linalg.lstsq(weighted, np.ones_like(y), rcond=None)[0]
        if found.min() >= 0:
            break
        used.remove(int(found.argmin()))
    return (found / scale).tolist(), float(np.abs(powers / scale @ found / y - 1).max())


def in_a_process(
    arguments: Sequence[str], visual: int, batch: int, minutes: float
) -> dict[str, Any]:
    """The results of one point, or a status that says why there are none."""
    command = [sys.executable, __file__, *arguments, "--point", f"{visual}x{batch}"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "words": f"not done within {minutes:g} minutes"}
    if done.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):
        return {"status": "oom", "words": "out of memory"}
    if done.returncode:
        raise SystemExit(f"{visual} visual tokens, batch {batch}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def conditions(
    plan: str, dtype: str, device: str | None, threads: int | None
) -> dict[str, Any]:
    """What all points of one output have in common."""
    own = versions()
    return {
        "plan": plan,
        "dtype": dtype,
        "device": bench.device_name(pick_device(device)),
        "threads": threads or torch.get_num_threads(),
        "torch": own["torch"],
        "transformers": own["transformers"],
    }


def measured_under(results: dict[str, Any]) -> dict[str, set]:
    """The same of results so far; None where nobody says."""
    rows, own = results["rows"], results.get("versions", {})
    return {
        **{name: {row.get(name) for row in rows} for name in ("plan", "dtype")},
        **{name: {results.get(name)} for name in ("device", "threads")},
        **{name: {own.get(name)} for name in ("torch", "transformers")},
    }


def there_already(output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The results so far, without rows where there are none.

    Raises:
        DataError: the output is no result of this script, or one of other :func:`conditions`.
    """
    if not output.is_file():
        return {"rows": []}
    try:
        results = json.loads(output.read_text())
        found = measured_under(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{output} is no result of this script; give another --output",
            argument="output", given=str(output), expected="a new file, or one of this script",
        ) from error  # fmt: skip
    other = [
        f"{name} {', '.join(map(str, sorted(found[name] - {None})))} instead of {value}"
        for name, value in asked.items()
        if found[name] - {None, value}
    ]
    if other:
        raise DataError(
            f"{output} was measured with {'; '.join(other)}; ask for the same, or give another "
            "--output",
            argument="output", given=str(output), expected="a file of the same conditions",
        )  # fmt: skip
    return results


def sweep(
    visual: Sequence[int], batch: Sequence[int], output: Path, asked: dict[str, Any],
    point: Callable[[int, int], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Measure what the output has not got; it is written after every point.

    Args:
        asked: :func:`conditions`.

    Raises:
        DataError: as :func:`there_already`; a folder that cannot be written to.
    """
    results, plan = there_already(output, asked), asked["plan"]
    ensure_writable(output.parent)
    there = {(row["visual"], row["batch"]) for row in results["rows"]}
    for size in batch:
        for count in visual:
            if (count, size) in there:
                continue
            print(f"{count} visual tokens, batch {size}", file=sys.stderr, flush=True)
            found = point(count, size)
            about = {"plan": plan, "visual": count, "text": TEXT, "batch": size}
            about["dtype"] = asked["dtype"]
            rows = found.pop("rows", None) or [about | found]
            if "suite" in found:
                # The commit is that of the first point; later ones of another say so.
                kept = {"commit": results.get("commit", found["commit"]), "rows": results["rows"]}
                if found["commit"] != kept["commit"]:
                    rows = [row | {"commit": found["commit"]} for row in rows]
                results = found | kept
            results["rows"] += rows
            layers = SCALING.text["num_hidden_layers"]
            write_json(output, results | {"plan": plan, "laws": laws(results["rows"], layers)})
    return json.loads(output.read_text())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--visual", type=int, nargs="+", default=VISUAL)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCH)
    parser.add_argument("--plan", default=PLAN)
    parser.add_argument("--pairs", type=int, default=bench.CLAIM_PAIRS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", type=float, help="GiB that a point may take on the host")
    parser.add_argument("--minutes", type=float, default=30, help="that a point may take")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.point is None:
        if asked.output is None:
            parser.error("--output is missing")
        try:
            alike = conditions(asked.plan, asked.dtype, asked.device, asked.threads)
            sweep(asked.visual, asked.batch, asked.output, alike,
                  lambda *at: in_a_process(arguments, *at, asked.minutes))  # fmt: skip
        except DataError as error:
            parser.error(str(error))
        return
    if asked.memory is not None:
        limit = int(asked.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    visual, batch = map(int, asked.point.split("x"))
    found = bench.within_memory(
        lambda: measure(SCALING, visual, batch, asked.plan, asked.pairs, asked.dtype,
                        asked.device, asked.threads)
    )  # fmt: skip
    if found is None:
        sys.exit(OUT_OF_MEMORY)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
