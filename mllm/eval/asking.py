"""Asking a model the questions of a task, in batches that all plans share.

The same prompts and generation as the lmms-eval model, without its per-request cost:
pictures are drawn and preprocessed once per task, and plans share the output of the vision tower.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mllm import attention
from mllm.eval.answer import Answer, Protocol, answer
from mllm.eval.scoring import is_correct
from mllm.loading import build_inputs
from mllm.plan import Plan
from mllm.signals import BlockFeatures
from mllm.views import with_tiles
from mllm.yardstick import prompt

MAX_NEW_TOKENS = 12
STOPS = ("\n",)
TOWER_BYTES = 4 * 2**30


class Questions:
    """The questions of one task, preprocessed into batches that every plan shares.

    Args:
        processor: of the model.
        samples: of `mllm.eval.sources`.
        batch_size: questions per batch; like lengths go together, so padding is rare.
        dtype: of `pixel_values`.
        device: where the batches are kept.
        protocol: of :func:`mllm.eval.answer.answer`; but for `prompt`, a batch has prompts of one
            length and shape only.
    """

    def __init__(
        self,
        processor: Any,
        samples: list[dict],
        batch_size: int,
        dtype: Any,
        device: Any,
        protocol: Protocol = "prompt",
    ) -> None:
        self.samples, self.protocol = samples, protocol
        asked = [prompt(sample) for sample in samples]
        lengths = [_shape(processor.tokenizer, *prompted) for prompted in asked]
        order = sorted(range(len(samples)), key=lambda i: (lengths[i], i))
        alike = [
            list(same)
            for _, same in itertools.groupby(
                order, lambda i: None if protocol == "prompt" else lengths[i]
            )
        ]
        self.indices = [
            same[i : i + batch_size] for same in alike for i in range(0, len(same), batch_size)
        ]
        self._processor, self._asked, self._to = processor, asked, (device, dtype)
        self._made: dict[tuple, Any] = {}
        self.batches = [self.inputs(indices) for indices in self.indices]

    def inputs(self, indices: list[int], patched: Any = None) -> Any:
        """A batch of some questions, made once; with tiles where the plan asks for them.

        Args:
            indices: of samples.
            patched: what `mllm.patch` returned; None for the model as it is.
        """
        grid = None if patched is None else patched.tiles
        name = *indices, grid
        if name not in self._made:
            asked = [self._asked[i] for i in indices]
            if grid is None:
                made = build_inputs(self._processor, asked)
            else:
                pictures = [picture for own, _ in asked for picture in own]
                made = with_tiles(self.inputs(indices), self._processor, pictures, grid)
            self._made[name] = made.to(*self._to)
        return self._made[name]


def _shape(tokenizer: Any, pictures: list, text: str) -> tuple[int, int, int]:
    """Of a prompt: pictures, tokens with one for each of them, and tokens behind the last one."""
    ids = tokenizer(text)["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    behind = ids[::-1].index(image) if image in ids else len(ids)
    return len(pictures), len(ids), behind


class SharedTower:
    """Remembers what the vision tower gave for batches that come again.

    That is its output, and the queries, keys and values that plans have read in it. Plans that
    change something inside the tower or before it run it themselves. What the tower was given is
    known again by its place in memory, and kept alive so that nothing else can take that place.

    Args:
        model: the model.
        limit: bytes to remember at most; what comes after is computed again every time.
    """

    def __init__(self, model: Any, limit: int = TOWER_BYTES) -> None:
        self.tower = model.get_encoder("image")
        self.limit, self.held = limit, 0
        self._outputs: dict[tuple, Any] = {}
        self._given: dict[tuple, tuple] = {}
        self._calls: dict[tuple, list[tuple]] = {}

    @contextlib.contextmanager
    def used_by(self, plan: Plan) -> Iterator[None]:
        """Serve what is remembered inside this context, if `plan` allows it."""
        if not shares_tower(plan):
            yield
            return
        own = self.tower.__dict__.get("forward")
        self.tower.forward = functools.partial(self._remembered, self.tower.forward)
        try:
            yield
        finally:
            if own is None:
                del self.tower.forward
            else:
                self.tower.forward = own

    def _remembered(self, forward: Any, *given: Any, **options: Any) -> Any:
        held = (*given, *(x for pair in sorted(options.items()) for x in pair))
        name = tuple(
            (x.data_ptr(), x.shape) if isinstance(x, torch.Tensor) else repr(x)
            for x in held
        )
        taps = attention.opened()
        if name in self._outputs and all((name, module) in self._calls for module in taps):
            for module, readers in taps.items():
                for call in self._calls[name, module]:
                    for tap in readers:
                        tap(*call)
            return copy.copy(self._outputs[name])
        calls: dict[Any, list[tuple]] = {module: [] for module in taps}
        recorded = {
            module: [*readers, lambda *call, kept=calls[module]: kept.append(call)]
            for module, readers in taps.items()
        }
        with attention.taps(recorded):
            output = forward(*given, **options)
        new = {(name, module): made for module, made in calls.items()}
        size = _bytes(list(new.values()))
        if name not in self._outputs:
            size += _bytes(output) + _bytes(held)
        if self.held + size <= self.limit:
            self.held += size
            # A model may write into what it is given here (Qwen-VL splits it).
            self._outputs.setdefault(name, copy.copy(output))
            self._given[name] = held
            self._calls |= new
        return output

    def forget(self) -> None:
        """Free everything: the next task has other pictures."""
        self._outputs.clear()
        self._given.clear()
        self._calls.clear()
        self.held = 0


def _bytes(value: Any) -> int:
    """Bytes of the tensors in nested lists and outputs."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def shares_tower(plan: Plan) -> bool:
    """Whether a plan leaves pictures and tower as they are, and reads attention there at most."""
    return not any(
        stage.site in ("pixels", "tower")
        or any(isinstance(signal, BlockFeatures) for signal in stage.reads().values())
        for stage in plan.stages
    )


def answer_all(
    model: Any,
    processor: Any,
    questions: Questions,
    patched: Any,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers to all questions, in the order of the samples.

    Args:
        model, processor: as `mllm.load_model` gives them.
        questions: of one task.
        patched: what `mllm.patch` returned; None for the model as it is.
        on_batch: called with the number of questions just answered.
    """
    answers: list[Answer | None] = [None] * len(questions.samples)
    for indices in questions.indices:
        inputs = questions.inputs(indices, patched)
        results = answer(
            model, processor, inputs, patched, max_new_tokens=MAX_NEW_TOKENS, stops=STOPS,
            protocol=questions.protocol,
        )  # fmt: skip
        for index, result in zip(indices, results, strict=True):
            answers[index] = result
        if on_batch:
            on_batch(len(indices))
    return answers


def marks(questions: Questions, answers: list[Answer]) -> list[bool]:
    """Whether each answer is right by its sample's metric."""
    return [
        is_correct(given.text, sample["answer"], sample["metric"])
        for given, sample in zip(answers, questions.samples, strict=True)
    ]
