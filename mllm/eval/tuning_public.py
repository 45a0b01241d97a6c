"""lmms-eval's tasks for a search: their questions in two parts, which have no picture in common."""

from __future__ import annotations

import hashlib
import json
import numbers
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.errors import DataError, MllmError
from mllm.eval import public
from mllm.eval.engines import Engine
from mllm.eval.lmms import MllmModel
from mllm.eval.prompts import Prompt, render
from mllm.eval.tuning_answers import Block, outcomes
from mllm.eval.tuning_model import costs, protocol_of
from mllm.plan import Plan

#: One picture of so many is for the search, the others are for the confirmation.
SHARE = 4


def load(names: Sequence[str], data_dir: Path | None) -> dict[str, Any]:
    """lmms-eval's tasks by name, those of groups by their own, with their data.

    Raises:
        MllmError: an unknown task, or one that cannot be asked.
        DataError: the data cannot be had.
    """
    manager = public.find_tasks(names, None, data_dir)
    leaves = list(dict.fromkeys(leaf for name in names for leaf in manager.leaves(name)))
    found = public.check_data(manager, leaves, data_dir)
    return {name: found[name] for name in leaves}


class PublicTask:
    """A task of lmms-eval whose one split is divided into `dev` and `test`.

    Questions come in an order that is shuffled once and for all. A picture that was not seen before
    goes to one of the parts in turn, with all its questions; a question that shows pictures of both
    is left out. So the first questions of a part are the same however many are asked.

    Args:
        name: for people, and in the results.
        task: as :func:`load` gives it.
        processor: of the model.
    """

    def __init__(self, name: str, task: Any, processor: Any) -> None:
        self.name, self.task, self.processor = name, task, processor
        config = task.config
        self._split = config.test_split or config.validation_split
        self._metrics = [entry["metric"] for entry in config.metric_list or ()]
        self._left = list(range(len(task.eval_docs)))
        random.Random(0).shuffle(self._left)
        self._left.reverse()
        self._pictures: dict[str, str] = {}  # which part each belongs to
        self._groups = 0
        self._found: dict[str, list[tuple[int, str]]] = {"dev": [], "test": []}

    def size(self, split: str, n: int) -> int:
        """`n`, or the number of questions there are if that is less.

        Raises:
            DataError: there is none, or a message has something other than text and pictures.
        """
        own = self._found[split]
        while len(own) < n and self._left:
            self._take(self._left.pop())
        if not own:
            raise DataError(
                f"{self.name} has no question for {split}: all of it shows the same pictures",
                argument="tasks",
                given=self.name,
                expected="a data set of several pictures",
            )
        return min(n, len(own))

    def _take(self, index: int) -> None:
        text, images = self._rendered(index)
        seen = [_digest(image) for image in images] or [hashlib.sha256(text.encode()).hexdigest()]
        parts = {self._pictures[one] for one in seen if one in self._pictures}
        if len(parts) > 1:
            return
        if not parts:
            parts = {"test" if self._groups % SHARE else "dev"}
            self._groups += 1
        (part,) = parts
        self._pictures |= dict.fromkeys(seen, part)
        target = self.task.doc_to_target(self.task.eval_docs[index])
        content = [text, seen, target, self.task.config.generation_kwargs]
        digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
        self._found[part].append((index, digest))

    def _rendered(self, index: int) -> tuple[str, list[Image.Image]]:
        return render(self.processor, self.task.doc_to_messages(self.task.eval_docs[index]))

    def digest(self, block: Block) -> str:
        """What tells the questions of a block, their pictures and answers, from others."""
        own = [digest for _, digest in self._found[block.split][block.start : block.stop]]
        return hashlib.sha256(" ".join(own).encode()).hexdigest()

    def first_inputs(self) -> tuple[int, Any]:
        """Pictures of the first dev question, and what a model is given of it."""
        self.size("dev", 1)
        text, images = self._rendered(self._found["dev"][0][0])
        inputs = self.processor(
            images=images or None, text=[text], padding=True, return_tensors="pt"
        )
        return len(images), inputs

    def ask(self, engine: Engine, plan: Plan, block: Block, batch_size: int) -> dict[str, Any]:
        """Answers and costs of a block; see `tuning_answers.Evaluator.ask`. Leaves the plan inside.

        Questions under the protocol `again` are asked one by one: it cannot have padding.
        """
        protocol = protocol_of(plan)
        if protocol == "again":
            batch_size = 1
        chosen = [index for index, _ in self._found[block.split][block.start : block.stop]]
        meta = {"task": self.name, "repeats": self.task.config.repeats, "split": self._split}
        requests = [
            self.task.construct_requests(doc_id=i, ctx="", metadata={**meta, "doc_id": i})
            for i in chosen
        ]
        model = _Model(plan=plan, batch_size=batch_size, engine=engine, protocol=protocol)
        model.task_dict[self.task.config.task] = self.task.dataset
        replies = model.generate_until(requests)
        scores = [
            self._score(index, request, reply.text)
            for index, request, reply in zip(chosen, requests, replies, strict=True)
        ]
        return {
            "outcomes": outcomes(scores),
            **costs([reply.token_counts.mllm for reply in replies]),
        }

    def _score(self, index: int, request: Any, text: str) -> float:
        """By the task's first metric of one question, filtered as lmms-eval does it.

        The aggregates of lmms-eval are of whole data sets, some of them of nothing less.
        """
        request.resps = [text] * request.repeats
        self.task._instances = [request]
        self.task.apply_filters()
        filtered = next(iter(request.filtered_resps.values()))
        found = self.task.process_results(self.task.eval_docs[index], [filtered])
        value = next((found[name] for name in self._metrics if name in found), None)
        value = value.get("score") if isinstance(value, dict) else value
        if isinstance(value, numbers.Real) and 0 <= value <= 1:
            return float(value)
        raise MllmError(
            f"{self.name} gives a question no score from 0 to 1, but {', '.join(found)}: a plan "
            "cannot be compared by single questions",
            argument="tasks",
            given=self.name,
            expected="a task that scores every question, such as pope, gqa or textvqa_val",
        )


class _Model(MllmModel):
    """The lmms-eval model, asked under a protocol."""

    def __init__(self, *, protocol: str, **options: Any) -> None:
        super().__init__(**options)
        self._protocol = protocol
        self._rank = 1  # the first rank has a bar for every block

    def _request(self, request: Any) -> Prompt:
        made = super()._request(request)
        if made.images and self._protocol != "prompt":  # the others are about what pictures leave
            made.options["protocol"] = self._protocol
        return made


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
