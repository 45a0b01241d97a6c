"""Do the scores of a method find the tokens that show the answer?

    python -m benchmarks.score_auc [questions per task]    writes benchmarks/results/score-auc.json

A method that ranks tokens is asked for its scores on the test questions of the embedded model, and
they are compared with the boxes of the answer: the area under the ROC curve is the chance that a
token inside outranks one outside. 0.5 is a coin; far below it, a method throws away what is asked
for. Scores are those of the first choice that a method makes, before budgets, windows or variety
have their say. Methods that only compare tokens with each other have none.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import mllm
from mllm import compressors
from mllm.eval.asking import SharedTower
from mllm.eval.files import write_json
from mllm.eval.provenance import describe_run
from mllm.loading import build_inputs, load_model
from mllm.yardstick import ADMITTED, prompt, samples
from mllm.yardstick.saliency import auc, object_patches
from mllm.yardstick.scenes import GRID

TARGET = Path(__file__).parent / "results" / "score-auc.json"
#: The first cut of each method, at the layers of an 8-layer decoder with 192 tokens on average.
#: fastervlm, vispruner, hired, holov, vmtc and vscan rank by what visionzip ranks by.
PLANS = (
    "random:keep=0.5",
    "visionzip:keep=0.5",
    "prumerge:keep=0.5",
    "cdpruner:keep=0.5",
    "cdpruner:keep=0.5:negate=true",
    "fastv:layer=1",
    "fastv:layer=2",
    "pyramiddrop:layers=2/4/6:keep=146/37/9",
    "vscan_llm:layer=4:keep=96",
    "feather:layers=2/4:keep=104/44",
    "fitprune:layers=1/2/3:keep=257/128/115",
    "btp:layers=1/2/4:keep=348/211/95:end=6",
    "sparsevlm:version=2.0:layers=1/2/4:keep=268/166/90",
    "pact:layer=2:keep=0.5",
    "pact:layer=2:keep=0.5:queries=each",
    "topv:layer=1",
    "topv:layer=2",
    "topv:layer=1:beta=0.0",
    "topv:layer=2:beta=0.0",
    "topv:layer=1:features=raw",
    "topv:layer=2:features=raw",
)


@contextlib.contextmanager
def watched(seen: list[torch.Tensor]) -> Iterator[None]:
    """Note the scores of all visual tokens in `seen` whenever a method takes the best of them."""

    def noting(function: Any, first: int) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            scores, among = args[first : first + 2]
            if int(among[0].sum()) == GRID**2:
                seen.append(scores[0][among[0]].float())
            return function(*args, **kwargs)

        return called

    with contextlib.ExitStack() as stack:
        for name in (m.name for m in pkgutil.iter_modules(compressors.__path__)):
            module = importlib.import_module(f"mllm.compressors.{name}")
            for function, first in (("top_k", 0), ("greedy_map", 1)):
                if found := getattr(module, function, None):
                    noted = mock.patch.object(module, function, noting(found, first))
                    stack.enter_context(noted)
        yield


def shown(sample: dict[str, Any]) -> np.ndarray:
    """Bool `[576]`: tokens at least half covered by a box of the answer."""
    return object_patches(sample | {"objects": [{"box": box} for box in sample["answer_boxes"]]})


@torch.no_grad()
def main(n: int = 40) -> None:
    model, processor = load_model("tiny-llava")
    tower = SharedTower(model)
    values: dict[str, dict[str, list[float]]] = {plan: {} for plan in PLANS}
    for task in ADMITTED:
        drawn = [sample for sample in samples(task, "test", n) if shown(sample).any()]
        asked = [build_inputs(processor, [prompt(sample)]) for sample in drawn]
        asked = [inputs.to(model.device, model.dtype) for inputs in asked]
        for plan in PLANS:
            found = values[plan][task] = []
            with mllm.patch(model, plan) as patched, tower.used_by(patched.plan):
                for sample, inputs in zip(drawn, asked, strict=True):
                    seen: list[torch.Tensor] = []
                    with watched(seen):
                        model(**inputs)
                    found.append(auc(seen[0].cpu().numpy(), shown(sample)))
            print(f"{task:14} {plan:52} {np.mean(found):.3f}", flush=True)
        tower.forget()
    rows = [
        {
            "plan": plan,
            "auc": float(np.mean([np.mean(found) for found in by_task.values()])),
            "tasks": {task: float(np.mean(found)) for task, found in by_task.items()},
            "n": sum(map(len, by_task.values())),
        }
        for plan, by_task in values.items()
    ]
    data = {"schema": 1, "about": describe_run(model), "n": n, "seed": 0, "split": "test"}
    write_json(TARGET, data | {"rows": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
