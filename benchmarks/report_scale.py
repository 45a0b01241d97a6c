"""How long `mllm report` takes on large results, and how large the page is.

    python -m benchmarks.report_scale [FILE]    writes benchmarks/results/report-scale-cpu.json

Two made-up runs in the real formats: a folder of `mllm eval` with 100,000 samples (five plans, four
tasks), and a sweep of eleven rows with 100,000 questions each. Every report is a process of its
own, from start to end; processor time is given beside the time on the wall, which others may
stretch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mllm.eval.files import write_json
from mllm.eval.provenance import commit, versions
from mllm.plan import Plan
from mllm.yardstick import VERSION

TARGET = Path(__file__).parent / "results" / "report-scale-cpu.json"
PLANS = ("", *(f"{name}:keep=64" for name in ("random", "downsample", "visionzip", "divprune")))
ABOUT = {
    "weights_sha256": "0" * 64, "dtype": "bfloat16", "backend": "sdpa", "device": "cpu",
    "threads": 1, "versions": {"mllm": "0"}, "commit": None,
}  # fmt: skip
COSTS = {"kept_llm": 64, "visual_in": 576, "visual_avg": 64.0, "prefill_flops": 4.3e9,
         "kv_bytes": 520192, "ttft_s": 0.05, "decode_s": 0.01, "batch": 1}  # fmt: skip


def outcomes(rng: np.random.Generator, hard: np.ndarray, share: float) -> np.ndarray:
    """Right or wrong, bool `[n]`: about `share` right, and alike for all plans."""
    return 0.7 * hard + 0.3 * rng.random(len(hard)) < share


def evaluation(folder: Path, each: int = 5000) -> Path:
    """A folder as `mllm eval --output` writes it."""
    rng = np.random.default_rng(0)
    tasks = {task: rng.random(each) for task in ("gqa", "pope", "mmbench", "vqav2")}
    for i, spec in enumerate(PLANS):
        plan = Plan.from_spec(spec) if spec else Plan([])
        own = folder / f"plan{i}"
        own.mkdir(parents=True)
        record = {
            "mllm": {"plan": plan.to_dict(), "plan_sha256": plan.sha256, "seed": 0, "n": each}
            | ABOUT,
            "results": {task: {"alias": task, "exact_match,none": 0.5} for task in tasks},
            "configs": {task: {"test_split": "val"} for task in tasks},
        }
        write_json(own / "20260101_000000_results.json", record)
        for task, hard in tasks.items():
            right = outcomes(rng, hard, 0.9 - 0.05 * i)
            with (own / f"20260101_000000_samples_{task}.jsonl").open("w") as file:
                for k in range(each):
                    said = "yes" if right[k] else "no"
                    doc = {"question": f"Is question {k} of {task} as long as real ones are?",
                           "answer": "yes", "image_id": f"{k:012d}", "split": "val"}  # fmt: skip
                    sample = {"doc_id": k, "doc": doc, "target": "yes", "resps": [[said]],
                              "filtered_resps": [said], "doc_hash": f"{k:064x}",
                              "token_counts": [{"input_tokens": 600, "mllm": COSTS}],
                              "exact_match": float(right[k]), "mllm": COSTS}  # fmt: skip
                    file.write(json.dumps(sample) + "\n")
    return folder


def sweep(path: Path, each: int = 50_000) -> Path:
    """A file as `mllm sweep` writes it."""
    rng = np.random.default_rng(1)
    rows = [("unpatched", None), *((p.split(":")[0], b) for p in PLANS[1:] for b in (64, 16))]
    rows += [("tome", 64), ("tome", 16)]
    with path.open("w") as file:
        for task in ("exist", "color"):
            hard = rng.random(each)
            for i, (method, budget) in enumerate(rows):
                right = outcomes(rng, hard, 0.95 - 0.04 * i)
                plan = f"{method}:keep={budget}" if budget else "unpatched"
                cell = {
                    "schema": 1, "key": f"{task}{i}", "method": method, "budget": budget,
                    "plan": plan, "task": task, "split": "test", "style": "plain",
                    "data": f"scenes {VERSION}", "protocol": "prompt", "seed": 0, "n": each,
                    "n_asked": each, "correct": int(right.sum()), "score": float(right.mean()),
                    "visual_avg": float(budget or 576), "kept_llm": float(budget or 576),
                    "flops": 4e9, "kv_bytes": 5e5, "prefill_s": None, "about": ABOUT,
                    "outcomes": "".join(np.where(right, "1", "0")),
                    "answers": ["yes" if x else "no" for x in right],
                }  # fmt: skip
                file.write(json.dumps(cell) + "\n")
    return path


def measured(results: Path, page: Path) -> dict[str, Any]:
    """One `mllm report`, from start to end."""
    size = sum(p.stat().st_size for p in results.rglob("*.json*")) or results.stat().st_size
    command = [sys.executable, "-m", "mllm", "report", str(results), "-o", str(page)]
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu - before.children_user - before.children_system, 2),
        "results_bytes": size,
        "page_bytes": page.stat().st_size,
    }


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        made = {"evaluation of 100,000 samples": evaluation(Path(folder) / "eval"),
                "sweep of 11 rows, 100,000 questions each": sweep(Path(folder) / "sweep.jsonl")}
        rows = {name: measured(path, Path(folder) / "page.html") for name, path in made.items()}
    write_json(target, {"schema": 1, "suite": "report-scale", "versions": versions(),
                        "commit": commit(), "load_before": load, "cores": os.cpu_count(),
                        "rows": rows})  # fmt: skip
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
