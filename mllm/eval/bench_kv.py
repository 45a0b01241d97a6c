"""Methods on the KV cache: what they really store, what a decode step takes, what choosing costs.

A long prompt is read once, by a cache method that keeps every event and signal and drops nothing
(:mod:`mllm.eval.bench_prompt`). Each plan then meets the same events on a cache that shares the
full one's storage, as if it had been there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import mllm
from mllm import flops
from mllm.cache import Dense, Offloaded, Packed, cache_bytes
from mllm.compressors.base import AttentionRows, CacheCompressor
from mllm.errors import PlanError
from mllm.eval import bench
from mllm.eval.bench_machine import reached
from mllm.eval.bench_prompt import Prompt, now
from mllm.eval.bench_shapes import BENCH_CPU, Inputs, Shape
from mllm.eval.bench_words import summed
from mllm.eval.plans import budgets_slots
from mllm.eval.stats import mean_interval, median_interval
from mllm.models import resolve
from mllm.plan import Plan, methods

LENGTH = 8192
BUDGET = "0.25"
TARGET = 0.85  # of the ideal, for plans that store plain rectangles
PAYLOAD = 0.02  # how far the payload may be from budget x slot size
SCORER = 0.10  # of the prefill, for scorers that look at a window of queries


@bench.restoring_threads()
def kv(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | None = None,
    budgets: Sequence[str] = (BUDGET,),
    length: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure cache methods on one long prompt of several pictures and text.

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: spec texts of cache methods; None is :func:`every_method` at each of `budgets`.
        budgets: slots per layer and KV head, as in a spec: `0.25` or `2048`.
        length: tokens of the prompt: as many whole pictures as leave room for some text. None is
            8,192, where neither `visual` nor `size` is given.
        **options: those of :class:`mllm.eval.bench.Options`; a pair is a decode step of each of
            two models.

    Returns:
        The bench results object, schema 1. `ratio` is unpatched time / patched time of a decode
        step, against the unpatched model with transformers' own cache; `ideal` the ratio of the
        bytes that a step has to read, weights and payload. Bytes, of the whole batch:

        * `payload_bytes`: keys and values of stored tokens. `payload_expected_bytes` is budget x
          slot size, and all tokens of layers that a method leaves whole, None without a budget;
          `payload_share` is their ratio.
        * `slack_bytes`: room to grow, and cells that stand for nothing.
        * `meta_bytes`: slot tables, indices and scales; tables that layers share count once.
        * `baseline_kv_bytes`: the whole prompt's.

        `scorer_s` is what reading the signals and choosing took, `scorer_share` its share of
        `prefill_s`: a mean over layers and `prefills`, with `scorer_ci`. `claim` is `memory`
        where heads or samples are stored raggedly or keys and values in another form, which no
        kernel serves: then the time has no target. All times in seconds.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`.
        PlanError: a plan that cannot work on this model, or that is no cache method's.
    """
    asked = bench.Options(**options)
    if asked.visual is None and asked.size is None and length is None:
        length = (LENGTH,)
    base, points, results = bench.opened("kv", model, asked, length=length)
    chosen = {spec: _stages(spec) for spec in plans or every_method(budgets)}
    for point in points:
        tokens = point.visual + point.text
        with bench.kernel(asked.sdpa), torch.inference_mode():
            on_prefill = functools.partial(
                asked.progress or (lambda *_: None), f"reading {tokens} tokens, batch {point.batch}"
            )

            def read(point: bench.Point = point, on_prefill: Callable = on_prefill) -> Prompt:
                return Prompt.read(base, point.inputs(), chosen.values(), asked.pairs, on_prefill)

            prompt = bench.within_memory(read)
            for spec in chosen:
                label = f"{spec}, {tokens} tokens, batch {point.batch}"
                run = functools.partial(
                    _row, base, spec, prompt, asked.pairs, label, asked.progress
                )
                try:
                    row = bench.within_memory(run) if prompt else None
                except PlanError as error:
                    if plans:
                        raise
                    row = {"status": "refused", "words": str(error)}
                about = point.about(base, spec, asked.pairs)
                asked.keep(results, {**about, "length": tokens, **(row or bench.OOM)})
    return summed(results)


def every_method(budgets: Sequence[str]) -> list[str]:
    """Every registered cache method; one that keeps everything first, to compare with."""
    found = ["streamingllm:budget=1.0"]
    rows = [row for row in methods() if row["stage"] == "cache"]
    for row in rows:
        if "budget" in {p["name"] for p in row["params"]}:
            found += [f"{row['name']}:budget={budget}" for budget in budgets]
        else:
            found.append(row["name"])
    return found


def _stages(spec: str) -> list[CacheCompressor]:
    stages = Plan.of(spec).stages
    if other := [s.info.name for s in stages if not isinstance(s, CacheCompressor)]:
        raise PlanError(
            f"{', '.join(other)} works before the cache is there, and the suite kv reads a prompt "
            "once for all plans",
            argument="plan",
            given=spec,
            expected="cache methods; --suite prefill for others",
        )
    return stages


# One plan


def _row(
    base: Any, spec: str, prompt: Prompt, pairs: int, label: str, progress: bench.Progress | None
) -> dict[str, Any]:
    other = bench.twin(base)
    with mllm.patch(other, spec) as patched:
        prefills = len(prompt.prefill_s)
        choosing = [prompt.told(patched, prompt.share(patched)) for _ in range(prefills - 1)]
        cache = prompt.share(patched)
        choosing.append(prompt.told(patched, cache))
        stored = storage(cache, patched.plan.stages, prompt)
        work = step_flops(base, cache, len(prompt.inputs["input_ids"]))
        claim = "memory" if ragged(cache) or converted(cache) else "time"
        theirs = prompt.unpatched(base)
        ideal = _ideal(base, prompt, stored)
        steps = ((base, theirs), (other, cache))
        seconds = time_steps(
            steps, prompt.inputs, pairs, lambda done: progress and progress(label, done, pairs)
        )
        peaks = [step_peak(*step, prompt.inputs) for step in steps]
    ratio, *ratio_ci = median_interval(seconds[:, 0] / seconds[:, 1])
    spent = prompt.reading(patched.plan.stages) + np.array(choosing)
    depth = spent.shape[1]
    # A mean, which is the share of the whole: a method may leave most layers alone.
    share, *share_ci = mean_interval((spent * depth / prompt.prefill_s[:, None]).ravel())
    target = TARGET if claim == "time" and stored["payload_share"] else None
    status, words = bench.judge(ratio, ratio_ci, ideal, target, pairs)
    patched_s, dtype = float(np.median(seconds[:, 1])), str(base.dtype).removeprefix("torch.")
    read = read_weights(base) + stored["payload_bytes"]
    return {
        **stored,
        **reached(bench.device_of(base), dtype, work, read, patched_s),
        "claim": claim,
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "samples": bench.samples(seconds[:, 0] / seconds[:, 1]),
        "ideal": ideal,
        "share": ratio / ideal,
        "target_share": target,
        "baseline_s": float(np.median(seconds[:, 0])),
        "patched_s": patched_s,
        "prefill_s": float(np.median(prompt.prefill_s)),
        "prefills": prefills,
        "scorer_s": float(np.median(spent.sum(1))),
        "scorer_share": share,
        "scorer_ci": share_ci,
        "peak_bytes": peaks[1],
        "baseline_peak_bytes": peaks[0],
        "status": status,
        "words": _words(words, stored, claim, _scorer(patched.plan.stages, share, share_ci)),
    }


def _words(time: str, stored: dict[str, Any], claim: str, scorer: str) -> str:
    """A row's sentence: time, then bytes, then what choosing costs."""
    parts = [time if claim == "time" else f"a memory claim, no kernel serves this storage; {time}"]
    if stored["payload_share"] is not None:
        off = abs(stored["payload_share"] - 1)
        within = "within" if off <= PAYLOAD else "not within"
        parts.append(f"payload {within} {PAYLOAD:.0%} of budget x slot size")
    return "; ".join([*parts, scorer])


def _scorer(stages: Sequence[CacheCompressor], share: float, ci: Sequence[float]) -> str:
    """What choosing costs; against :data:`SCORER` where only a window of queries is read."""
    words = f"choosing costs {share:.1%} of the prefill"
    read = [signal for stage in stages for signal in stage.reads().values()]
    if not read or not all(isinstance(signal, AttentionRows) for signal in read):
        return words
    low, high = ci
    found = "within" if high <= SCORER else "above" if low > SCORER else "unresolved against"
    return f"{words}, {found} {SCORER:.0%}"


def storage(
    cache: Any, stages: Sequence[CacheCompressor], prompt: Prompt
) -> dict[str, int | float | None]:
    """The bytes that :func:`kv` describes, of a cache right after the prompt."""
    held, meta = cache_bytes(cache)
    payload, others = 0, []
    slots = []  # bytes of one token in all heads of a layer
    for layer, whole in zip(cache.layers, prompt.cache.layers, strict=True):
        size = (whole.keys.shape[-1] + whole.values.shape[-1]) * whole.keys.element_size()
        slots.append(whole.keys.shape[1] * size)
        valid = layer.table.valid
        valid = valid if valid.dim() == 3 else valid[:, None].expand(-1, layer.heads, -1)
        at = 0
        for segment in layer.segments:
            here = valid[..., at : at + segment.slots]
            at += segment.slots
            if isinstance(segment, Dense | Packed | Offloaded):
                payload += int(here.sum()) * size
            else:
                others += segment.tensors()
    kinds = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in others}
    payload += sum(kinds.values())
    counts = _expected(stages, prompt)
    expected = None
    if counts is not None:
        expected = sum(n * slot for n, slot in zip(counts, slots, strict=True))
    lengths = prompt.events[None].lengths
    return {
        "payload_bytes": payload,
        "payload_expected_bytes": expected,
        "payload_share": None if expected is None else payload / expected,
        "slack_bytes": held - payload,
        "meta_bytes": meta,
        "baseline_kv_bytes": sum(lengths) * sum(slots),
    }


def _expected(stages: Sequence[CacheCompressor], prompt: Prompt) -> list[int] | None:
    """Slots of a head, by layer, of all samples together, that the smallest budget allows.

    None without a budget, with one that depends on the input, and where a slot is not stored in as
    many bytes as it came in.
    """
    if any(stage.stores or stage.lowrank or not stage.exact for stage in stages):
        return None
    event = prompt.events[None]
    visual = (event.visual & event.prompt).sum(1).tolist()
    depth, everything = len(prompt.cache.layers), sum(event.lengths)
    totals = []
    for stage in stages:
        if not budgets_slots(stage):
            continue
        budget, total = stage.budget, 0
        for length, seen in zip(event.lengths, visual, strict=True):
            # Methods that do not offer the choice let visual tokens go alone.
            counted = seen if getattr(stage, "tokens", "visual") == "visual" else length
            limit = budget if isinstance(budget, int) else max(1, round(budget * counted))
            total += min(limit, counted) + length - counted
        totals.append([everything if stage.leaves_whole(i, depth) else total for i in range(depth)])
    return [min(layer) for layer in zip(*totals, strict=True)] or None


def ragged(cache: Any) -> bool:
    """Whether heads or samples of some layer are stored at unequal lengths."""
    return any(
        layer.table.headwise
        and layer.table.padded
        or any(isinstance(segment, Packed) for segment in layer.segments)
        for layer in cache.layers
    )


def converted(cache: Any) -> bool:
    """Whether keys and values of some layer are stored in another form than plainly."""
    plain = Dense | Packed
    return any(not isinstance(s, plain) for layer in cache.layers for s in layer.segments)


def _ideal(base: Any, prompt: Prompt, stored: dict[str, Any]) -> float:
    """Bytes that a decode step reads, unpatched / patched: weights of the LLM, keys and values."""
    weights = read_weights(base)
    return (weights + stored["baseline_kv_bytes"]) / (weights + stored["payload_bytes"])


def read_weights(base: Any) -> int:
    """Bytes of the weights that a decode step reads."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    read = {id(p): p for module in (decoder, head) for p in module.parameters()}
    embedding = base.get_input_embeddings().weight
    if embedding is not head.weight:  # one row of it is read
        read.pop(id(embedding), None)
    return sum(p.numel() * p.element_size() for p in read.values())


def _held(cache: Any) -> tuple[int, int]:
    """Bytes of a cache of either kind: keys and values, everything else."""
    if hasattr(cache, "mllm"):
        return cache_bytes(cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0


def step_peak(model: Any, cache: Any, inputs: Inputs) -> int:
    """Most bytes that live in one decode step, weights and cache included."""
    step = functools.partial(model, **next_token(model, cache, inputs))
    return bench.held_bytes(model) + sum(_held(cache)) + bench.peak_of(model.device, step)


def time_steps(
    steps: Sequence, inputs: Inputs, pairs: int, on_pair: Callable[[int], Any]
) -> np.ndarray:
    """Seconds of a decode step, float64 `[pairs, 2]`, in interleaved pairs after two warm-ups.

    Args:
        steps: two models, each with a cache that holds a prompt.
        inputs: of the prompt.
    """
    times = np.empty((pairs, 2))
    for pair in range(-2, pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            model, cache = steps[which]
            token = next_token(model, cache, inputs)
            started = now(steps[1][1])
            model(**token)
            if pair >= 0:
                times[pair, which] = now(steps[1][1]) - started
        if pair >= 0:
            on_pair(pair + 1)
    return times


def step_flops(base: Any, cache: Any, batch: int) -> float:
    """FLOPs of a decode step from a cache, of the batch."""
    config = base.config.get_text_config()
    slots = [layer.slots for layer in cache.layers if layer.slots]  # others are not run
    layers = sum(flops.decoder_layer(config, 1, n + 1) for n in slots)
    return batch * (layers + flops.lm_head(config, 1))


def next_token(model: Any, cache: Any, inputs: Inputs) -> dict[str, Any]:
    """Arguments of a decode step: one more token per sample."""
    mask, past = inputs["attention_mask"], cache.get_seq_length()
    ids = torch.full_like(inputs["input_ids"][:, :1], 5)
    position = torch.full_like(ids, past)
    given = {
        "input_ids": ids,
        # transformers' own count is of the whole mask, where positions have three parts.
        "position_ids": position.expand(3, -1, -1) if resolve(model).mrope else position,
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    if not bool(mask.all()):
        new = mask.new_ones(len(mask), past + 1 - mask.shape[1])
        given["attention_mask"] = torch.cat([mask, new], 1)
    return given
