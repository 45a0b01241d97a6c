"""The lmms-eval model `mllm`: a Hugging Face VLM with a plan inside.

```
python -m lmms_eval --model mllm --tasks yardstick --include_path <mllm.eval.tasks.PATH> \\
    --model_args pretrained=tiny-llava,plan=visionzip:keep=64 --batch_size 16
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

import mllm
from mllm.errors import DataError, MllmError
from mllm.eval import responses
from mllm.eval.engines import Engine, Here, Job, Pool, devices_for, load_on
from mllm.eval.plans import make_plan
from mllm.eval.prompts import Asked, Prompt, ask, batches, render
from mllm.plan import Plan, near
from mllm.routers import adapter as adapters

DEFAULT_NEW_TOKENS = 256
_MEANS = ("kept_llm", "visual_in", "visual_avg", "prefill_flops", "kv_bytes")
_FACTS = ("config_sha256", "processor_sha256", "weights_sha256", "dtype", "backend", "device")


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
        workers: processes that answer, each with a model of its own; answers do not depend on it.
        cache: folder in which answers are kept and found again; None keeps none.
        max_batch_size: accepted because lmms-eval passes it; not used.
        loaded: (model, processor) to use instead of loading `pretrained`.
        engine: what answers, instead of loading `pretrained`; it is not closed.
        kept: open file of answers, instead of one in `cache`; it is not closed.

    Attributes:
        counts: answers that were found (`kept`) and made (`computed`).
        seconds: that the answers took, by whoever and whenever they were made.

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
        workers: int | str = 1,
        cache: str | None = None,
        max_batch_size: int | None = None,
        loaded: tuple[Any, Any] | None = None,
        engine: Engine | None = None,
        kept: responses.Responses | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse(unknown)
        self.batch_size = _whole("batch_size", batch_size)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        if device is None and self._world_size > 1:
            device = str(state.device)
        self.plan = make_plan(plan, seed)
        self._open: list[Any] = []
        if engine is None:
            load = functools.partial(
                load_on, str(pretrained), dtype=dtype, attn_implementation=attn_implementation
            )
            engine = self._engine(load, _whole("workers", workers), device, str(pretrained), loaded)
        self.engine: Engine | None = engine
        facts = engine.facts if cache is not None else None  # of the model without a plan
        engine.use(self.plan)
        if facts is not None:
            path = responses.in_cache(cache, facts)
            if self._rank:
                path = path.with_stem(f"{path.stem}-{self._rank}")
            kept = responses.Responses(path, facts, "cache").__enter__()
            self._open.append(kept)
        self._kept = kept
        self.counts = {"kept": 0, "computed": 0}
        self.seconds = 0.0

    def _engine(
        self, load: Any, workers: int, device: str | None, name: str, loaded: Any
    ) -> Engine:
        if workers == 1:
            return Here(*(loaded or load(device)), name)
        pool = Pool(load, devices_for(workers, device), name)
        self._open.append(pool)
        return pool

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return self.engine.device

    @property
    def patched(self) -> Any:
        """What `mllm.patch` returned, where this process answers."""
        return getattr(self.engine, "patched", None)

    def clean(self) -> None:
        """Take the plan out of the model and let go of it (lmms-eval calls this at the end)."""
        if self.engine is not None:
            self.engine.release()
            self.engine = None
        while self._open:
            self._open.pop().__exit__(None, None, None)
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in order; one :class:`GenerationResult` each."""
        before = self.seconds
        found = self._replies([functools.partial(self._request, one) for one in requests])
        self._log(found, self.seconds - before)
        return [_generation_result(reply) for reply in found]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        The continuation is forced token by token after an ordinary prefill of the prompt, so a
        plan chooses its tokens without seeing the continuation, as in generation.
        """
        found = self._replies([functools.partial(self._continuation, one) for one in requests])
        return [(reply["score"], reply["greedy"]) for reply in found]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: tasks that feed answers back need a protocol of their own."""
        raise MllmError(
            "the lmms-eval model 'mllm' does not answer multi-round tasks",
            argument="tasks",
            given=requests[0].task_name if requests else None,
            expected="tasks with output_type generate_until or loglikelihood",
        )

    def _replies(self, make: list[Callable[[], Prompt]]) -> list[dict[str, Any]]:
        """Replies to prompts, in order: kept ones, and new ones, which are kept at once."""
        known = self._depends_on() if self._kept is not None else ()
        asked = ask(self.engine.processor, make, known)
        found: list[dict[str, Any] | None] = [None] * len(asked)
        todo: list[list[int]] = []
        holes: list[int] = []
        for batch in batches(asked, self.batch_size):
            missing = []
            for index in batch:
                if self._kept is not None:
                    # A batch size of one is asked for to have times of single samples.
                    alone = self.batch_size == 1
                    found[index] = self._kept.get(asked[index].key, alone)
                if found[index] is None:
                    missing.append(index)
            if len(missing) == len(batch):
                todo.append(batch)
            else:
                holes += missing
        # A batch is kept whole, so only answers of another command (a lower limit, say) leave
        # some of it to be asked: these make new batches.
        new = batches([asked[index] for index in holes], self.batch_size)
        todo += [[holes[place] for place in batch] for batch in new]
        self._compute(asked, todo, found)
        self.seconds += sum(reply["seconds"] for reply in found)
        return found

    def _compute(
        self, asked: list[Asked], todo: list[list[int]], found: list[dict[str, Any] | None]
    ) -> None:
        computed = sum(map(len, todo))
        self.counts["computed"] += computed
        self.counts["kept"] += len(asked) - computed

        def jobs() -> Iterator[Job]:
            for number, batch in enumerate(todo):
                yield number, [asked[i].prompt() for i in batch], asked[batch[0]].seed

        with tqdm(
            total=len(asked), initial=len(asked) - computed, desc="Answering",
            disable=self._rank != 0,
        ) as bar:  # fmt: skip
            for number, replies, seconds in self.engine.answer(jobs()):
                batch = todo[number]
                if self._kept is not None:
                    self._kept.add([asked[index].key for index in batch], replies, seconds)
                for index, reply in zip(batch, replies, strict=True):
                    found[index] = reply | {"seconds": seconds / len(batch)}
                bar.update(len(batch))

    def _depends_on(self) -> list[Any]:
        """What every answer depends on, besides its prompt."""
        facts = [self.engine.facts[name] for name in _FACTS]
        plan = [self.plan.spec, self.plan.sha256, self.plan.seed]
        learnt = list(adapters.digest(self.plan.folder).values())
        return [responses.SCHEMA, mllm.__version__, *facts, *plan, learnt]

    def _request(self, request: Instance) -> Prompt:
        """A generation request: (context, doc_to_messages, options, doc id, task, split)."""
        _, doc_to_messages, options, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        stops = options.get("until") or []
        kept = {k: v for k, v in options.items() if k not in ("until", "max_new_tokens")}
        if kept.get("temperature") and kept.get("do_sample") is False:
            del kept["do_sample"]  # MM-Vet and others say so and are sampled, by lmms-eval's models
        return Prompt(
            *render(self.engine.processor, messages),
            {
                **kept,
                "stops": [stops] if isinstance(stops, str) else list(stops),
                "max_new_tokens": int(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
            },
        )

    def _continuation(self, request: Instance) -> Prompt:
        """A scoring request: (context, continuation, doc_to_visual, doc id, task, split)."""
        context, target, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        target = target if isinstance(target, str) else target(doc)
        visuals = (doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual) or []
        content = [{"type": "image", "url": visual} for visual in visuals]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]
        text, images = render(self.engine.processor, messages)
        encode = self.engine.processor.tokenizer
        whole = encode(text + target, add_special_tokens=False)["input_ids"]
        prefix = encode(text, add_special_tokens=False)["input_ids"]
        if not whole[len(prefix) :]:
            raise DataError(
                f"{task}: the continuation of document {doc_id} is empty",
                argument="continuation",
                given=target,
                expected="at least one token",
            )
        return Prompt(text, images, {}, whole[len(prefix) :])

    def _log(self, found: list[dict[str, Any]], seconds: float) -> None:
        """Means over this call, for the `throughput` block of lmms-eval's results."""
        tokens = sum(reply["output_tokens"] for reply in found)
        means = {
            name: sum(reply["mllm"][name] for reply in found) / max(1, len(found))
            for name in _MEANS
        }
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=means,
        )


def _generation_result(reply: dict[str, Any]) -> GenerationResult:
    counts = EfficiencyCounts(
        input_tokens=reply["input_tokens"],
        output_tokens=reply["output_tokens"],
        mllm=reply["mllm"],
    )
    return GenerationResult(text=reply["text"], token_counts=counts)


def _whole(name: str, value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise MllmError(
            f"{name} must be a whole number from 1, not {value!r}",
            argument=name,
            given=value,
            expected="for example 16",
        )
    return int(value)


def _refuse(unknown: Iterable[str]) -> None:
    known = (
        "pretrained", "plan", "dtype", "device", "attn_implementation", "batch_size", "seed",
        "workers", "cache",
    )  # fmt: skip
    for name in unknown:
        expected = near(name, known)
        raise MllmError(
            f"the lmms-eval model 'mllm' has no argument {name!r}; did you mean: {expected}?",
            argument="model_args",
            given=name,
            expected=expected,
        )
