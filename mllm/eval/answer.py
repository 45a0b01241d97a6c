"""Batched answers with their cost: the one generation loop of the lmms-eval model and of sweeps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mllm import flops
from mllm.errors import DataError
from mllm.eval.plans import check_protocol
from mllm.models import resolve
from mllm.tokens import split_images

if TYPE_CHECKING:
    from mllm.patcher import Patched

#: When the answer is read, against when the KV cache is compressed; see :func:`answer`.
Protocol = Literal["prompt", "again", "context"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
GENERATE_KEYS = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: the answer, cut at the first stop string, without surrounding white space.
        input_tokens: prompt tokens, visual ones included at full length.
        output_tokens: generated tokens, the end token included.
        efficiency: the per-sample `mllm` object of the evaluation results.
    """

    text: str
    input_tokens: int
    output_tokens: int
    efficiency: dict[str, Any]


class _Watch(StoppingCriteria):
    """Ends a row at a stop string, and notes when the first token was there."""

    def __init__(self, tokenizer: Any, prompt_length: int, stops: Sequence[str]) -> None:
        self.tokenizer, self.prompt_length, self.stops = tokenizer, prompt_length, stops
        self.first_token_at: float | None = None
        self.rows = 0
        self.ended: dict[int, int] = {}  # row -> tokens up to its first stop string

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, self.prompt_length :].tolist()  # also waits for the device
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.rows, done = len(tails), [False] * len(tails)
        if self.stops:
            texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
            done = [any(stop in text for stop in self.stops) for text in texts]
            for row in (row for row, ends in enumerate(done) if ends):
                self.ended.setdefault(row, len(tails[row]))
        return torch.tensor(done, device=input_ids.device)


def answer(
    model: Any,
    processor: Any,
    inputs: Any,
    patched: Patched | None,
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    protocol: Protocol = "prompt",
    **options: Any,
) -> list[Answer]:
    """Answer one batch.

    A cache that is compressed when the prompt ends has already been read in full: the first token
    of the answer comes from that very forward. So for plans on the KV cache `protocol` can be

    * `prompt`: as `generate` does it;
    * `again`: the whole prompt is read and the cache compressed, with the question in sight; what
      stands behind the pictures is then taken back and read anew, from what is left of them;
    * `context`: the cache is compressed behind the last picture, before the question is known, as
      for a saved prefix.

    The model as it is answers alike under all three.

    Args:
        model: the model, with its plan inside if it has one.
        processor: its processor.
        inputs: left-padded batch of `mllm.build_inputs`: ids `[B, P]`.
        patched: what `mllm.patch` returned; None for the model as it is.
        max_new_tokens: most tokens of an answer.
        stops: strings that end an answer; they are cut off.
        protocol: see above; but for `prompt`, rows without padding whose text behind the last
            picture is equally long.
        **options: further arguments of `generate` (see `GENERATE_KEYS`); greedy without any. A
            temperature above 0 samples.

    Returns:
        One answer per row, in order.

    Raises:
        PlanError: another protocol than `prompt` for a plan that does not only work on the cache;
            `again` for one whose steps choose what they attend to.
        DataError: rows that such a protocol cannot have in one batch; a temperature above 0 beside
            `do_sample=False`.
    """
    chosen = _generate_options(options)
    inputs = inputs.to(model.device)
    rows, prompt_length = inputs["input_ids"].shape
    watch = _Watch(processor.tokenizer, prompt_length, stops)
    before = None
    started = time.perf_counter()
    with torch.inference_mode():
        if protocol != "prompt" and patched is not None:
            inputs, before = _read(model, inputs, patched, protocol)
        output = model.generate(
            **inputs,
            **chosen,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([watch]),
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    tails = output[:, prompt_length:].tolist()
    seconds = time.perf_counter() - started
    ttft = watch.first_token_at - started if watch.first_token_at else seconds
    costs = unpatched_costs(model, inputs) if patched is None else costs_of(patched, rows)
    if before is not None:  # the newest prefill was the question's
        flops_of = [cost["prefill_flops"] for cost in costs]
        costs = [
            cost | {"prefill_flops": cost["prefill_flops"] + more}
            for cost, more in zip(before, flops_of, strict=True)
        ]
    lengths = inputs["attention_mask"].sum(1).tolist()
    ends = _end_ids(model)
    stopped = watch.ended if watch.rows == rows else {}  # beams are other rows
    answers = []
    for row, (ids, length, cost) in enumerate(zip(tails, lengths, costs, strict=True)):
        # What stands behind an end is padding, of a batch that went on.
        ids = _until_end(ids[: stopped.get(row)], ends)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        cost |= {
            "ttft_s": ttft if rows == 1 else None,
            "decode_s": seconds - ttft,
            "batch": rows,
        }
        answers.append(Answer(_cut(text, stops).strip(), length, len(ids), cost))
    return answers


def _read(
    model: Any, inputs: Any, patched: Patched, protocol: Protocol
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `generate` goes on from where the answer is read after compression, and the costs."""
    check_protocol(patched.plan, protocol)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    place = torch.arange(ids.shape[1], device=ids.device)
    last = (place * (ids == model.config.image_token_id)).amax(1).tolist()
    if min(last) != max(last) or last[0] in (0, ids.shape[1] - 1) or not bool(mask.all()):
        raise DataError(
            f"protocol={protocol!r} reads the text behind the last picture apart, which starts at "
            f"different tokens of these rows, is missing, or is padded: last visual tokens {last}",
            argument="protocol",
            given=last,
            expected="equally long prompts without padding, pictures at the same places",
        )
    split = last[0] + 1
    read = dict(inputs)
    if protocol == "context":
        read |= {k: v[:, :split] for k, v in inputs.items() if v.shape == ids.shape}
    cache = model(**read, use_cache=True, logits_to_keep=1).past_key_values
    costs = costs_of(patched, len(ids))
    if protocol == "again":
        patched.kv(cache).crop(split)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, costs


def costs_of(patched: Patched, rows: int) -> list[dict[str, Any]]:
    """Per-sample cost of the newest prefill, without times: contracts, Evaluation results.

    `kv_bytes` counts the sample's own tokens, not the padding of its batch; where a plan works on
    the cache, it is an equal share of what the batch really holds, room to grow included.

    Args:
        patched: after a prefill.
        rows: samples of the batch (beams repeat them).
    """
    record = patched.ledger.as_dict()
    repeats = max(1, record["batch"] // rows)
    held = record["kv_bytes"] // record["batch"] if patched.compressors else None
    return [
        {
            "kept_llm": record["kept_llm"][i],
            "visual_in": record["visual_tokens"][i],
            "visual_avg": record["visual_avg"][i],
            "prefill_flops": record["prefill_flops"][i],
            "kv_bytes": _kv_bytes(patched.model, [row["tokens"][i] for row in record["layers"]])
            if held is None
            else held,
        }
        for i in range(0, rows * repeats, repeats)
    ]


def unpatched_costs(model: Any, inputs: Any) -> list[dict[str, Any]]:
    """The same numbers for a model without a plan, from its config and the inputs."""
    family, config = resolve(model), model.config.get_text_config()
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    tokens = inputs["attention_mask"].sum(1).tolist()
    vision = [0.0] * len(visual)
    if inputs.get("pixel_values") is not None:
        layouts = family.layouts(inputs)
        cost = [family.vision_flops(layout, layout.cells) for layout in layouts]
        images = split_images(visual, [layout.tokens for layout in layouts])
        vision = [sum(cost[i] for i in own) for own in images]
    layers = config.num_hidden_layers
    return [
        {
            "kept_llm": seen,
            "visual_in": seen,
            "visual_avg": float(seen),
            "prefill_flops": layers * flops.decoder_layer(config, length, length)
            + flops.lm_head(config, 1)
            + seen_flops,
            "kv_bytes": _kv_bytes(model, [length] * layers),
        }
        for seen, length, seen_flops in zip(visual, tokens, vision, strict=True)
    ]


def _kv_bytes(model: Any, tokens: list[int]) -> int:
    config = model.config.get_text_config()
    return int(sum(flops.kv_bytes(config, count, model.dtype.itemsize) for count in tokens))


def _generate_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `generate`: greedy unless sampling or a temperature was asked for."""
    chosen = {k: v for k, v in options.items() if k in GENERATE_KEYS and v is not None}
    if chosen.get("temperature") and chosen.get("do_sample") is False:
        raise DataError(
            f"temperature={chosen['temperature']} is of sampling, and do_sample=False is greedy",
            argument="temperature",
            given=chosen["temperature"],
            expected="temperature=0, or do_sample=True",
        )
    sample = chosen.pop("do_sample", None) or bool(chosen.get("temperature"))
    if sample and chosen.get("temperature") == 0:
        sample = False
    if not sample:
        # A model's own defaults for sampling would only draw warnings under greedy decoding.
        for key in ("temperature", "top_p", "top_k"):
            chosen[key] = None
    return {"do_sample": sample, **chosen}


def _end_ids(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """`ids` up to and with the first end token."""
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the earliest stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
