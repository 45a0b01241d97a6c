"""An evaluator without a model: what plans lose is planted."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mllm.errors import PlanError
from mllm.eval.tuning_answers import UNITS, Block, outcomes
from mllm.plan import Plan

TASKS = ("first", "second")
LAYERS, TOKENS = 8, 100
WHOLE = {"flops": 1000.0, "tokens": float(TOKENS), "kv_bytes": 4000.0}
#: The unpatched model is right this often.
RIGHT = 0.9
#: `divprune` loses nothing from this share on, the others always something.
ENOUGH = 0.12


def loss(plan: Plan) -> float:
    """The true share of the answers that a plan loses."""
    lost = 0.0
    for stage in plan.stages:
        if stage.info.name == "divprune":
            lost += max(0.0, ENOUGH - stage.keep) * 4
        else:
            lost += 0.3
    return min(1.0, lost)


def share(plan: Plan) -> float:
    """Of every cost."""
    left = 1.0
    for stage in plan.stages:
        keep, layer = stage.keep, getattr(stage, "layer", 0)
        left *= layer / LAYERS + (1 - layer / LAYERS) * keep
    return 0.1 + 0.9 * left


class Fake:
    """An :class:`~mllm.eval.tuning_answers.Evaluator` whose truth is :func:`loss`."""

    tokens, num_layers = TOKENS, LAYERS

    def __init__(self, before_answer: Callable[[], Any] | None = None, seed: int = 0) -> None:
        self.about = {"weights_sha256": f"fake {seed}", "backend": "none", "style": "plain"}
        self.seed, self.before_answer = seed, before_answer or (lambda: None)
        self.asked: list[tuple] = []

    def size(self, task: str, split: str, n: int) -> int:
        return n

    def data(self, block: Block) -> str:
        return "made up"

    def ask(
        self, plan: Plan, blocks: Sequence[Block]
    ) -> Iterator[tuple[Block, dict[str, Any]]]:
        if any(stage.info.name == "visionzip" for stage in plan.stages):
            raise PlanError("this tower has no [CLS]", argument="plan", given=plan.spec)
        for block in blocks:
            self.before_answer()
            asked = [(plan.spec, *block[:2], index) for index in range(block.start, block.stop)]
            self.asked += asked
            right = [self.is_right(plan, *one[1:]) for one in asked]
            costs = {name: WHOLE[name] * share(plan) * len(right) for name in UNITS}
            yield block, {"outcomes": outcomes(right), **costs}

    def is_right(self, plan: Plan, task: str, split: str, index: int) -> bool:
        """Whether one question is answered correctly: the same questions are hard for all."""
        known, kept = (self._draw(task, split, index, what) for what in ("known", "kept"))
        return known < RIGHT and kept >= loss(plan)

    def _draw(self, *words: Any) -> float:
        text = json.dumps([self.seed, *words])
        return random.Random(hashlib.sha256(text.encode()).digest()).random()

    def time(self, plan: Plan, pairs: int) -> dict[str, Any]:
        spent = share(plan)
        return {"pairs": pairs, "unpatched_s": 2.0, "patched_s": 2 * spent, "share": spent,
                "ci": [0.98 * spent, 1.02 * spent]}  # fmt: skip
