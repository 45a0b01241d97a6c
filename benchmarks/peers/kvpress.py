"""SnapKV here and in kvpress: decode steps and bytes, each against its own unpatched model.

kvpress needs an older transformers, so it has an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0 'transformers<5.3' kvpress==0.5.5
    python benchmarks/peers/kvpress.py --python kvpress-env/bin/python

About 15 minutes on two idle cores for 8,192 tokens. The two libraries run one after the other on
the same shape and length, batch 1, with the same window, kernel and pooling; each ratio is
unpatched time / compressed time of the same library, in interleaved pairs. Without kvpress its row
says why it is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm.eval import bench, bench_kv, bench_shapes, files
from mllm.eval.stats import median_interval

WINDOW, KERNEL = 64, 5  # kvpress's defaults; it pools by the mean
SIDE = Path(__file__).with_name("kvpress_side.py")


def ours(options: argparse.Namespace, shape: bench_shapes.Shape) -> dict[str, Any]:
    """Our row, by `mllm bench --suite kv`, and the conditions of the run."""
    spec = f"snapkv:budget={options.budget}:window={WINDOW}:kernel={KERNEL}:pool=avg"
    results = bench_kv.kv(
        model=shape, plans=[spec], length=[options.length], pairs=options.pairs,
        dtype=options.dtype, device="cpu", threads=options.threads,
    )  # fmt: skip
    (row,) = results.pop("rows")
    return results | {"ours": row}


def theirs(
    options: argparse.Namespace, shape: bench_shapes.Shape, about: dict[str, Any]
) -> dict[str, Any]:
    """kvpress's row, or `{"status": "skipped", "words": why}`."""
    if options.python is None:
        return _skipped("no --python: the interpreter of an environment that has kvpress")
    task = asdict(shape) | {
        "visual": about["ours"]["visual"], "words": about["ours"]["text"],
        "budget": options.budget, "window": WINDOW, "kernel": KERNEL, "pairs": options.pairs,
        "dtype": options.dtype, "threads": about["threads"],
    }  # fmt: skip
    # -I: this folder has a kvpress.py of its own, which must not be found.
    try:
        ran = subprocess.run(
            [options.python, "-I", str(SIDE)], input=json.dumps(task), text=True,
            capture_output=True, check=True,
        )  # fmt: skip
    except OSError as error:
        return _skipped(f"{options.python} cannot be run: {error.strerror}")
    except subprocess.CalledProcessError as error:
        return _skipped(f"kvpress failed: {(error.stderr.strip().splitlines() or ['?'])[-1]}")
    found = json.loads(ran.stdout)
    seconds = np.array(found.pop("seconds"))
    ratio, *ratio_ci = median_interval(seconds[:, 0] / seconds[:, 1])
    plain_s, small_s = found["prefill_s"]
    whole, held = found["kv_bytes"]
    return {
        "status": "ok" if options.pairs >= bench.CLAIM_PAIRS else "unresolved",
        "versions": found["versions"],
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "baseline_s": float(np.median(seconds[:, 0])),
        "patched_s": float(np.median(seconds[:, 1])),
        "payload_bytes": held,
        "baseline_kv_bytes": whole,
        "prefill_s": small_s,
        "baseline_prefill_s": plain_s,
        "pairs": options.pairs,
    }


def _skipped(why: str) -> dict[str, Any]:
    return {"status": "skipped", "words": why}


def words(results: dict[str, Any]) -> str:
    """What the two rows say."""
    lines = []
    for name in ("ours", "kvpress"):
        row = results[name]
        if "ratio" not in row:
            lines.append(f"{name}: {row['words']}")
            continue
        low, high = row["ratio_ci"]
        lines.append(
            f"{name}: {1e3 * row['baseline_s']:.1f} -> {1e3 * row['patched_s']:.1f} ms per step, "
            f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f}); keys and values "
            f"{row['payload_bytes'] / 2**20:.1f} of {row['baseline_kv_bytes'] / 2**20:.1f} MiB"
        )
    if results["relative"] is not None:
        lines.append(f"our ratio / kvpress's ratio: {results['relative']:.2f}")
    if results["ours"]["status"] == "unresolved":
        lines.append(f"a look, no claim: {results['ours']['pairs']} pairs, or not resolved")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="interpreter of an environment that has kvpress")
    parser.add_argument("--model", default="bench-cpu", help="a LLaVA shape of mllm bench")
    parser.add_argument("--length", type=int, default=bench_kv.LENGTH)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--pairs", type=int, default=bench.CLAIM_PAIRS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", default="benchmarks/results/peer-kvpress.json")
    options = parser.parse_args()
    shape = bench_shapes.SHAPES[options.model]
    torch.manual_seed(0)
    results = ours(options, shape)
    results["suite"] = "peer-kvpress"
    results["kvpress"] = theirs(options, shape, results)
    compared = "ratio" in results["kvpress"]
    results["relative"] = (
        results["ours"]["ratio"] / results["kvpress"]["ratio"] if compared else None
    )
    files.write_json(Path(options.output), results)
    print(words(results))


if __name__ == "__main__":
    main()
