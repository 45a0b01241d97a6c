"""Seconds per question of `mllm eval` on a CPU, in batches of 8 against one at a time.

`python benchmarks/eval_batches.py` writes `benchmarks/results/eval-batches-cpu.json` in a few
minutes. Both sides answer the same yardstick questions with the embedded model, in turns; the time
is CPU time of one thread, so that other processes on the machine do not count.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch

from mllm.eval import files, stats
from mllm.eval.engines import Here
from mllm.eval.plans import UNPATCHED, make_plan
from mllm.eval.prompts import Prompt, ask, batches, render
from mllm.eval.provenance import describe_run
from mllm.loading import load_model
from mllm.yardstick import prompt, samples

PLANS = ("none", "visionzip:keep=64", "fastv:layer=2:keep=0.25")
TASKS = ("color", "exist", "ocr_word", "chart_max")
QUESTIONS, PAIRS, BATCH = 4, 12, 8
OPTIONS = {"max_new_tokens": 12, "stops": ["\n"], "do_sample": False}
PLACE = Path(__file__).parent / "results" / "eval-batches-cpu.json"


def question(processor: Any, sample: dict[str, Any]) -> Prompt:
    pictures, text = prompt(sample)
    content = [{"type": "image", "url": picture} for picture in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return Prompt(*render(processor, [message]), OPTIONS)


def seconds(engine: Here, jobs: list[list[Prompt]]) -> float:
    """CPU seconds per question."""
    started = time.process_time()
    for _ in engine.answer((number, job, 0) for number, job in enumerate(jobs)):
        pass
    return (time.process_time() - started) / sum(map(len, jobs))


def main() -> None:
    """Measure, write, print."""
    torch.set_num_threads(1)
    model, processor = load_model(device="cpu")
    drawn = [sample for task in TASKS for sample in samples(task, n=QUESTIONS)]
    prompts = [question(processor, sample) for sample in drawn]
    asked = ask(processor, [functools.partial(lambda p: p, one) for one in prompts], ())
    sides = [[[prompts[i] for i in batch] for batch in batches(asked, n)] for n in (1, BATCH)]
    rows = []
    for text in PLANS:
        engine = Here(model, processor)
        engine.use(make_plan(text))
        for side in sides:
            seconds(engine, side)  # untimed
        times = [[seconds(engine, side) for side in sides] for _ in range(PAIRS)]
        engine.release()
        ratio, low, high = stats.median_interval([alone / many for alone, many in times])
        rows.append(
            {
                "plan": UNPATCHED if text == "none" else text,
                "pairs": PAIRS,
                "questions": len(prompts),
                "batches": [len(batch) for batch in sides[1]],
                "seconds_alone": stats.median_interval([alone for alone, _ in times])[0],
                "seconds_batched": stats.median_interval([many for _, many in times])[0],
                "ratio": ratio,
                "ratio_ci": [low, high],
            }
        )
        print(rows[-1], flush=True)
    files.write_json(PLACE, {"schema": 1, "batch": BATCH, "rows": rows, **describe_run(model)})


if __name__ == "__main__":
    main()
