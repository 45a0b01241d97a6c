"""The lmms-eval model `mllm`: a Hugging Face VLM with a plan inside.

```
python -m lmms_eval --model mllm --tasks yardstick --include_path <mllm.eval.tasks.PATH> \\
    --model_args pretrained=tiny-llava,plan=visionzip:keep=64 --batch_size 16
```
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

import mllm
from mllm.errors import DataError, MllmError
from mllm.eval.answer import Answer, answer
from mllm.eval.plans import make_plan
from mllm.loading import load_image, load_model
from mllm.plan import Plan, near
from mllm.views import with_tiles

DEFAULT_NEW_TOKENS = 256
_MEANS = ("kept_llm", "visual_in", "visual_avg", "prefill_flops", "kv_bytes")


@dataclass
class EfficiencyCounts(TokenCounts):
    """Token counts that carry the `mllm` object into lmms-eval's logged samples."""

    mllm: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Counts as logged, with the ledger's numbers under `mllm`."""
        return {**super().to_dict(), "mllm": self.mllm}


class MllmModel(lmms):
    """lmms-eval chat model that runs a plan (registered by `mllm.eval.registry`).

    Args:
        pretrained: model folder, hub name, or `tiny-llava`.
        plan: spec text or plan folder; `none` leaves the model as it is.
        dtype: `auto`, `float32` or `bfloat16`.
        device: torch device; None picks one (its own for each process under torchrun).
        attn_implementation: `sdpa` or `eager`.
        batch_size: requests per batch; answers do not depend on it.
        seed: seed of the plan.
        max_batch_size: accepted because lmms-eval passes it; not used.
        loaded: (model, processor) to use instead of loading `pretrained`.

    Raises:
        PlanError, DataError: a plan or model that cannot be used.
        MllmError: an argument that does not exist.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny-llava",
        plan: str | Plan = "none",
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str = "sdpa",
        batch_size: int | str = 1,
        seed: int = 0,
        max_batch_size: int | None = None,
        loaded: tuple[Any, Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse(unknown)
        self.batch_size = _batch_size(batch_size)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        if device is None and self._world_size > 1:
            device = str(state.device)
        self.model, self.processor = loaded or load_model(
            str(pretrained), dtype=dtype, device=device, attn_implementation=attn_implementation
        )
        self.plan = make_plan(plan, seed)
        self.patched = mllm.patch(self.model, self.plan) if self.plan.stages else None
        self.seconds = 0.0

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return self.model.device

    def clean(self) -> None:
        """Take the plan out of the model and let go of it (lmms-eval calls this at the end)."""
        if self.patched is not None:
            self.patched.remove()
            self.patched = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in order; one :class:`GenerationResult` each."""
        asked = [self._request(request) for request in requests]
        results: list[Answer | None] = [None] * len(asked)
        started = time.perf_counter()
        with self._progress(len(asked), "Answering") as bar:
            for batch in batches(asked, self.batch_size):
                options = dict(asked[batch[0]].options)
                inputs = self._encode([asked[i] for i in batch])
                answers = answer(self.model, self.processor, inputs, self.patched, **options)
                for index, result in zip(batch, answers, strict=True):
                    results[index] = result
                bar.update(len(batch))
        self.seconds += time.perf_counter() - started
        self._log(results, time.perf_counter() - started)
        return [_generation_result(result) for result in results]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        The continuation is forced token by token after an ordinary prefill of the prompt, so a
        plan chooses its tokens without seeing the continuation, as in generation.
        """
        asked = [self._continuation(request) for request in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        with self._progress(len(asked), "Scoring") as bar:
            for batch in batches(asked, self.batch_size):
                inputs = self._encode([asked[i] for i in batch]).to(self.device)
                force = _Force([asked[i].continuation for i in batch], self.device)
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        do_sample=False,
                        temperature=None,
                        top_p=None,
                        top_k=None,
                        max_new_tokens=force.targets.shape[1],
                        logits_processor=LogitsProcessorList([force]),
                        pad_token_id=self.processor.tokenizer.pad_token_id,
                    )
                for row, index in enumerate(batch):
                    results[index] = (float(force.total[row]), bool(force.greedy[row]))
                bar.update(len(batch))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: tasks that feed answers back need a protocol of their own."""
        raise MllmError(
            "the lmms-eval model 'mllm' does not answer multi-round tasks",
            argument="tasks",
            given=requests[0].task_name if requests else None,
            expected="tasks with output_type generate_until or loglikelihood",
        )

    def _request(self, request: Instance) -> _Request:
        """A generation request: (context, doc_to_messages, options, doc id, task, split)."""
        _, doc_to_messages, options, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        stops = options.get("until") or []
        kept = {k: v for k, v in options.items() if k not in ("until", "max_new_tokens")}
        return self._prompt(
            messages,
            {
                **kept,
                "stops": [stops] if isinstance(stops, str) else list(stops),
                "max_new_tokens": int(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
            },
        )

    def _continuation(self, request: Instance) -> _Request:
        """A scoring request: (context, continuation, doc_to_visual, doc id, task, split)."""
        context, target, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        target = target if isinstance(target, str) else target(doc)
        visuals = (doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual) or []
        content = [{"type": "image", "url": visual} for visual in visuals]
        asked = self._prompt(
            [{"role": "user", "content": [*content, {"type": "text", "text": context}]}], {}
        )
        encode = self.processor.tokenizer
        whole = encode(asked.text + target, add_special_tokens=False)["input_ids"]
        prefix = encode(asked.text, add_special_tokens=False)["input_ids"]
        asked.continuation = whole[len(prefix) :]
        if not asked.continuation:
            raise DataError(
                f"{task}: the continuation of document {doc_id} is empty",
                argument="continuation",
                given=target,
                expected="at least one token",
            )
        return asked

    def _prompt(self, messages: list[dict], options: dict[str, Any]) -> _Request:
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
        text = self.processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return _Request(text, images, options)

    def _encode(self, asked: list[_Request]) -> Any:
        images = [image for request in asked for image in request.images]
        inputs = self.processor(
            images=images or None,
            text=[request.text for request in asked],
            padding=True,
            return_tensors="pt",
        )
        grid = None if self.patched is None else self.patched.tiles
        return with_tiles(inputs, self.processor, images, grid).to(dtype=self.model.dtype)

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, disable=self._rank != 0)

    def _log(self, results: list[Answer], seconds: float) -> None:
        """Means over this call, for the `throughput` block of lmms-eval's results."""
        tokens = sum(result.output_tokens for result in results)
        means = {
            name: sum(result.efficiency[name] for result in results) / max(1, len(results))
            for name in _MEANS
        }
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=means,
        )


@dataclass
class _Request:
    """A prompt as text with its pictures; `continuation` is for scoring."""

    text: str
    images: list[Image.Image]
    options: dict[str, Any]
    continuation: list[int] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Requests of one batch must agree in this."""
        return json.dumps(self.options, sort_keys=True, default=str)


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


def batches(asked: list[_Request], size: int) -> Iterator[list[int]]:
    """Indices in batches of alike requests: same options, images and, as far as possible, length.

    Alike lengths keep padding rare; the order inside is the order asked.
    """
    order = sorted(
        range(len(asked)),
        key=lambda i: (asked[i].group, len(asked[i].images), len(asked[i].text), i),
    )
    batch: list[int] = []
    for index in order:
        same = batch and asked[batch[0]].group == asked[index].group
        if batch and (len(batch) == size or not same):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generation_result(result: Answer) -> GenerationResult:
    counts = EfficiencyCounts(
        input_tokens=result.input_tokens,
        output_tokens=result.output_tokens,
        mllm=result.efficiency,
    )
    return GenerationResult(text=result.text, token_counts=counts)


def _image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    return load_image(Path(source))


def _batch_size(value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise MllmError(
            f"batch_size must be a whole number from 1, not {value!r}",
            argument="batch_size",
            given=value,
            expected="for example 16",
        )
    return int(value)


def _refuse(unknown: Iterable[str]) -> None:
    known = ("pretrained", "plan", "dtype", "device", "attn_implementation", "batch_size", "seed")
    for name in unknown:
        expected = near(name, known)
        raise MllmError(
            f"the lmms-eval model 'mllm' has no argument {name!r}; did you mean: {expected}?",
            argument="model_args",
            given=name,
            expected=expected,
        )
