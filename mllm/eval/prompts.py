"""Prompts of lmms-eval: read from its messages, known again by their content, answered in batches.

A :class:`Prompt` has its pictures and can be sent to another process. An :class:`Asked` is what is
kept of it while it waits: ten thousand photographs do not fit into memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from mllm import compat
from mllm.errors import DataError
from mllm.eval.answer import answer
from mllm.loading import chat_text, load_image, process
from mllm.views import with_tiles

#: A padded batch has no prompt that is shorter than its longest by more than this share.
PADDING = 1 / 16


@dataclass
class Prompt:
    """A rendered prompt with its pictures.

    Attributes:
        text: with the processor's placeholders.
        images: RGB pictures, in the order of the placeholders.
        options: arguments of :func:`mllm.eval.answer.answer`; empty for scoring.
        continuation: token ids to score instead of generating; None to generate.
    """

    text: str
    images: list[Image.Image]
    options: dict[str, Any] = field(default_factory=dict)
    continuation: list[int] | None = None


@dataclass(frozen=True)
class Asked:
    """What is known of a prompt without its pictures.

    Attributes:
        key: SHA-256 of everything that its answer depends on.
        options: as JSON; prompts of one batch must agree in it.
        shape: tokens of the text, and visual tokens of each picture: prompts of one shape make a
            batch without padding.
        prompt: makes the prompt once more.
        seed: of what is drawn for its answer: the same under every plan, kept or not.
    """

    key: str
    options: str
    shape: tuple[int, ...]
    prompt: Callable[[], Prompt]
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt, visual ones included."""
        return sum(self.shape)


def render(processor: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Image.Image]]:
    """Text and pictures of a chat.

    Raises:
        DataError: a message has something other than text and pictures, or a picture is broken.
    """
    plain, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = []
        for part in content:
            if part["type"] == "image":
                images.append(_image(part.get("url", part.get("image"))))
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise DataError(
                    f"the lmms-eval model 'mllm' cannot read {part['type']} yet",
                    argument="tasks",
                    given=part["type"],
                    expected="text and images",
                )
        plain.append({"role": message["role"], "content": parts})
    return chat_text(processor, plain), images


def ask(
    processor: Any, make: Iterable[Callable[[], Prompt]], depends_on: Sequence[Any]
) -> list[Asked]:
    """Prompts without their pictures, in order.

    A prompt that comes again (a task that asks repeatedly, or twice the same document) has a key
    of its own every time, so that each has its own answer.

    Args:
        processor: of the model.
        make: makes each prompt, once here and once when it is answered.
        depends_on: what all answers depend on besides: model, plan, and so on.
    """
    asked, seen = [], {}
    for prompt_of in make:
        prompt = prompt_of()
        options = json.dumps(prompt.options, sort_keys=True, default=str)
        pictures = [_digest(image) for image in prompt.images]
        parts = [prompt.text, pictures, options, prompt.continuation]
        content = _sha256(0, parts)
        seen[content] = before = seen.get(content, -1) + 1
        if prompt.continuation is not None:
            options = f"score {options}"
        key, seed = _sha256(before, [*depends_on, *parts]), int(_sha256(before, parts)[:15], 16)
        asked.append(Asked(key, options, _shape(processor, prompt), prompt_of, seed))
    return asked


def batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Indices in batches of at most `size` prompts with the same options.

    Prompts of one shape go together as long as they fill a batch: it then has no padding. What is
    left of each shape shares batches with prompts of about its length and as many pictures. The
    order inside is the order asked, and the same prompts always give the same batches.
    """
    full: list[list[int]] = []
    left: list[int] = []
    shapes: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(asked):
        shapes.setdefault((prompt.options, prompt.shape), []).append(index)
    for same in shapes.values():
        whole = len(same) // size * size
        full += [same[i : i + size] for i in range(0, whole, size)]
        left += same[whole:]

    def kind(index: int) -> tuple[str, int]:
        return asked[index].options, len(asked[index].shape)

    left.sort(key=lambda i: (kind(i), asked[i].length, asked[i].shape, i))
    padded: list[list[int]] = []
    for _, alike in itertools.groupby(left, kind):
        batch: list[int] = []
        for index in alike:
            longest = asked[index].length
            if batch and (
                len(batch) == size or asked[batch[0]].length < (1 - PADDING) * longest
            ):
                padded.append(sorted(batch))
                batch = []
            batch.append(index)
        padded.append(sorted(batch))
    return sorted(full + padded, key=lambda batch: batch[0])


def answer_batch(
    model: Any, processor: Any, patched: Any, prompts: Sequence[Prompt], seed: int = 0
) -> tuple[list[dict[str, Any]], float]:
    """Answers to one batch, as they are stored, and the seconds that it took.

    Args:
        model, processor: as `mllm.load_model` gives them, with the plan inside.
        patched: what `mllm.patch` returned; None for the model as it is.
        prompts: with the same options; all to be scored, or none.
        seed: of what is drawn, where a task asks for sampling.

    Returns:
        Per prompt `{text, input_tokens, output_tokens, mllm}`, or `{score, greedy}` for prompts
        with a continuation.
    """
    images = [image for prompt in prompts for image in prompt.images]
    started = time.perf_counter()
    inputs = process(processor, [p.text for p in prompts], [p.images for p in prompts])
    grid = None if patched is None else patched.tiles
    inputs = with_tiles(inputs, processor, images, grid).to(dtype=model.dtype)
    if prompts[0].continuation is not None:
        replies = _scores(model, processor, inputs, [prompt.continuation for prompt in prompts])
    else:
        options = prompts[0].options
        if options.get("do_sample") or options.get("temperature"):
            # Whoever answers this batch draws alike, whatever was answered before.
            torch.manual_seed(seed)
        replies = [
            {
                "text": given.text,
                "input_tokens": given.input_tokens,
                "output_tokens": given.output_tokens,
                "mllm": given.efficiency,
            }
            for given in answer(model, processor, inputs, patched, **options)
        ]
    return replies, time.perf_counter() - started


def _scores(
    model: Any, processor: Any, inputs: Any, continuations: list[list[int]]
) -> list[dict[str, Any]]:
    force = _Force(continuations, model.device)
    with torch.inference_mode():
        model.generate(
            **inputs.to(model.device),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            repetition_penalty=1.0,  # a model's own default would change what is scored
            max_new_tokens=force.targets.shape[1],
            logits_processor=LogitsProcessorList([force]),
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    return [
        {"score": float(total), "greedy": bool(greedy)}
        for total, greedy in zip(force.total, force.greedy, strict=True)
    ]


class _Force(LogitsProcessor):
    """Makes each row continue as told, and adds up what the model thought of it."""

    def __init__(self, continuations: list[list[int]], device: torch.device) -> None:
        longest = max(map(len, continuations))
        self.targets = torch.tensor(
            [ids + [-1] * (longest - len(ids)) for ids in continuations], device=device
        )
        self.total = torch.zeros(len(continuations), dtype=torch.float64, device=device)
        self.greedy = torch.ones(len(continuations), dtype=torch.bool, device=device)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        target = self.targets[:, self.step]
        self.step += 1
        live, index = target >= 0, target.clamp_min(0)[:, None]
        logs = scores.float().log_softmax(-1)
        self.total += torch.where(live, logs.gather(1, index)[:, 0], 0.0).double()
        self.greedy &= ~live | (logs.argmax(-1) == target)
        return torch.full_like(scores, float("-inf")).scatter_(1, index, 0.0)


def _sha256(before: int, parts: list[Any]) -> str:
    content = json.dumps(parts, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{before} {content}".encode()).hexdigest()


def _shape(processor: Any, prompt: Prompt) -> tuple[int, ...]:
    if not prompt.images:
        return (len(processor.tokenizer(prompt.text)["input_ids"]),)
    visual = compat.visual_tokens(processor, [image.size[::-1] for image in prompt.images])
    if visual is None:  # the processor does not say: let it make the prompt
        made = processor(images=prompt.images, text=[prompt.text], return_tensors="pt")
        return made["input_ids"].shape[1], *[0] * len(prompt.images)
    return len(processor.tokenizer(prompt.text)["input_ids"]), *visual


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    return load_image(Path(source))
