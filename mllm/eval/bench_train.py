"""Time of a training step with a plan against the same step without, beside the ideal from FLOPs.

A step is what the Trainer does with one batch: forward, loss, backward, AdamW. Its learning rate is
0, so that every step of every row finds the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import mllm
from mllm import flops
from mllm.errors import DataError
from mllm.eval import bench
from mllm.eval.bench_machine import reached
from mllm.eval.bench_shapes import BENCH_CPU, Inputs, Shape, cannot_measure, text_inputs
from mllm.eval.bench_words import summed
from mllm.eval.stats import median_interval
from mllm.models import resolve

# Plan and the share of its ideal that we aim at, as for the prefill.
PLANS = {"visionzip:keep=64": 0.9, "fastv:layer=2:keep=1.0": 1 / 1.03}
METHODS = ("full", "lora")
IGNORED = -100


@bench.restoring_threads()
def train(
    *,
    model: str | Shape = BENCH_CPU,
    plans: Sequence[str] | Mapping[str, float | None] | None = None,
    method: str = "full",
    **options: Any,
) -> dict[str, Any]:
    """Time a training step: forward, loss on the last quarter of the text, backward, AdamW.

    The tower is frozen, weights and their gradients have `dtype`, nothing is computed twice
    (no gradient checkpointing).

    Args:
        model: as in :func:`mllm.eval.bench.prefill`.
        plans: spec texts, perhaps with targets (shares of the ideal); None for :data:`PLANS`, the
            second of which keeps everything.
        method: `"full"` trains projector and language model, `"lora"` adapters of rank 8 in every
            projection of the language model alone.
        **options: those of :class:`mllm.eval.bench.Options`; without `visual` it is one picture.

    Returns:
        The bench results object, schema 1. `ratio` is unpatched time / patched time of a whole
        step; `passes_ratio` leaves the optimizer out, whose time `optimizer_s` (median of the
        unpatched steps) no plan can change. `ideal` is the ratio of :func:`step_flops`, in which
        the optimizer, having no matrix products, counts nothing; `share` = ratio / ideal.
        `attainable` is the ratio of the unpatched model's own times, its decoder, LM head and loss
        at the lengths that the plan leaves, optimizer included. `peak_bytes`: the largest sum of
        live tensors during one step, weights and optimizer states included.

    Raises:
        DataError: as :func:`mllm.eval.bench.prefill`; an unknown method; no PEFT for `"lora"`.
        PlanError: a plan cannot work on this model.
    """
    if method not in METHODS:
        raise cannot_measure("method", method, " or ".join(METHODS))
    asked = bench.Options(**options)
    base, points, results = bench.opened("train", model, asked, single=True)
    optimizer = prepare(base, method)
    targets = bench.targets_of(plans, PLANS)
    for point in points:
        with bench.kernel(asked.sdpa):
            inputs = bench.within_memory(lambda point=point: supervised(point.inputs(), asked.text))
            run = functools.partial(peak_bytes, base, optimizer, inputs)
            peak = inputs and bench.within_memory(run)
        for plan, target in targets.items():
            label = f"{plan}, {point.visual} visual tokens, batch {point.batch}"
            run = functools.partial(
                _row, base, optimizer, plan, inputs, asked.pairs, target, label, asked.progress
            )
            with bench.kernel(asked.sdpa):
                row = bench.within_memory(run) if peak else None
            if row is None:
                optimizer.zero_grad()  # gradients of a step that was not done
            else:
                row["baseline_peak_bytes"] = peak
            about = point.about(base, plan, asked.pairs)
            asked.keep(results, {**about, "method": method, **(row or bench.OOM)})
    return summed(results)


def prepare(base: Any, method: str) -> torch.optim.Optimizer:
    """Freeze what `method` does not train, and give AdamW for the rest, as the Trainer takes it.

    Raises:
        DataError: `"lora"` without PEFT.
    """
    family = resolve(base)
    if method == "lora":
        _add_adapters(base)
    else:
        family.tower.requires_grad_(False)
        family.projector.requires_grad_(True)  # some towers hold it
    base.train()
    trained = [p for p in base.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)


def _add_adapters(base: Any) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model

        from mllm.training.finetune import LORA_TARGETS
    except ImportError as error:
        raise DataError(
            f"method=lora needs {error.name}, which is not installed",
            argument="method",
            given="lora",
            expected="full, or pip install 'mllm-efficiency[train]'",
        ) from error
    base.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(target_modules=LORA_TARGETS), base)


def supervised(inputs: Inputs, text: int) -> Inputs:
    """The inputs with labels on the last quarter of `text` words, one word at least."""
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    answer = max(1, text // 4)
    labels[:, -answer:] = inputs["input_ids"][:, -answer:]
    return {**inputs, "labels": labels}


def _row(
    base: Any,
    optimizer: torch.optim.Optimizer,
    plan: str,
    inputs: Inputs,
    pairs: int,
    target: float | None,
    label: str,
    progress: bench.Progress | None,
) -> dict[str, Any]:
    other = bench.twin(base)
    with mllm.patch(other, plan) as patched:
        timed_step(other, inputs, optimizer)
        ledger = patched.ledger.as_dict()
        peak = peak_bytes(other, optimizer, inputs)
        lengths = [max(layer["tokens"]) for layer in ledger["layers"]]
        full = inputs["input_ids"].shape[1]
        shorter = sorted(set(lengths) - {full})
        times, short = bench.time_pairs(
            base,
            other,
            inputs,
            pairs,
            lambda done: progress and progress(label, done, pairs),
            beside=[_words_alone(base, inputs, n) for n in shorter],
            timed=functools.partial(timed_step, optimizer=optimizer),
        )
    optimizer.zero_grad()
    total, passes = times[..., 0], times[..., 0] - times[..., 2]
    by_length = {full: times[:, 0, 1], **dict(zip(shorter, short.T, strict=True))}
    floor = bench.unpatched_at(lengths, times, by_length)
    attainable, *attainable_ci = median_interval(total[:, 0] / floor)
    ratio, *ratio_ci = median_interval(total[:, 0] / total[:, 1])
    passes_ratio, *passes_ci = median_interval(passes[:, 0] / passes[:, 1])
    before, after = step_flops(base, ledger, full)
    ideal, patched_s = before / after, float(np.median(total[:, 1]))
    dtype, trained = str(base.dtype).removeprefix("torch."), optimizer.param_groups[0]["params"]
    # Weights are read forward and backward; the trained ones, gradients and states to be updated.
    touched = 2 * bench.held_bytes(base) + 7 * sum(p.numel() * p.element_size() for p in trained)
    status, words = bench.judge(ratio, ratio_ci, ideal, target, pairs)
    return {
        "ratio": ratio,
        "ratio_ci": ratio_ci,
        "samples": bench.samples(total[:, 0] / total[:, 1]),
        **reached(bench.device_of(base), dtype, after, touched, patched_s),
        "ideal": ideal,
        "share": ratio / ideal,
        "peak_bytes": peak,
        "status": status,
        "baseline_s": float(np.median(total[:, 0])),
        "patched_s": patched_s,
        "optimizer_s": float(np.median(times[:, 0, 2])),
        "passes_ratio": passes_ratio,
        "passes_ci": passes_ci,
        "attainable": attainable,
        "attainable_ci": attainable_ci,
        "attainable_share": ratio / attainable,
        "target_share": target,
        "words": words,
    }


def _words_alone(base: Any, inputs: Inputs, length: int) -> Inputs:
    """Words without pictures, of which as many are answers as in `inputs`."""
    answer = int((inputs["labels"][0] != IGNORED).sum())
    return supervised(text_inputs(base, inputs, length), 4 * min(answer, length))


def timed_step(
    model: Any, inputs: Inputs, optimizer: torch.optim.Optimizer
) -> tuple[float, float, float]:
    """Seconds of one step, of its part from the decoder on, and of the optimizer alone."""
    clock = bench.clock_of(model)
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: clock.mark(), prepend=True)
    try:
        clock.mark()
        optimizer.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        clock.mark()
        optimizer.step()
        clock.mark()
    finally:
        hook.remove()
    start, decoder, stepping, end = clock.seconds()
    return end - start, end - decoder, end - stepping


def peak_bytes(model: Any, optimizer: torch.optim.Optimizer, inputs: Inputs) -> int:
    """Largest sum of live tensor bytes in one step, after a first one that makes the states."""
    run = functools.partial(timed_step, model, inputs, optimizer)
    run()
    optimizer.zero_grad()
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = [*model.parameters(), *(x for x in states if isinstance(x, torch.Tensor))]
    return sum(x.numel() * x.element_size() for x in held) + bench.peak_of(model.device, run)


def step_flops(base: Any, ledger: dict[str, Any], rows: int) -> tuple[float, float]:
    """FLOPs of a training step of the ledger's batch: unpatched, and as the plan leaves it.

    Matrix products alone, as everywhere (:mod:`mllm.flops`). Behind each product of the forward
    there are two in the backward, one for what went in and one for the weight, or one where the
    weight is frozen; attention's products of queries, keys and values always have two. So decoder
    and LM head cost three forwards in full training; under LoRA two, attention's own products once
    more, and three times the products of the adapters. The frozen tower and what choosing costs
    count once, and so does the projector: its backward, below 1 % of the step, is left out. LM head
    and loss run on every row of the prompt, with a plan too: nothing is saved there.

    Args:
        base: the model as it is trained, adapters inside.
        ledger: `as_dict()` of a training forward.
        rows: of the prompt, padding included, whose logits are computed.
    """
    config = base.config.text_config
    adapters = sum(p.numel() for name, p in base.named_parameters() if ".lora_" in name)
    head = ledger["batch"] * flops.lm_head(config, rows)

    def more(forward: float, lengths: list[list[int]]) -> float:
        """What decoder and LM head cost on top of their forward."""
        if not adapters:
            return 2 * forward
        tokens = [n for layer in lengths for n in layer]
        products = sum(
            flops.attention_branch(config, n, n) - flops.attention_products(config, n)
            for n in tokens
        )
        return forward + products + 6 * sum(tokens) * adapters / len(lengths)

    after, vision = sum(ledger["prefill_flops"]), sum(ledger["vision_flops"])
    left = [layer["tokens"] for layer in ledger["layers"]]
    whole = [ledger["prompt_tokens"]] * len(left)
    llm = head + sum(flops.decoder_layer(config, n, n) for layer in whole for n in layer)
    before = sum(ledger["baseline_prefill_flops"]) + more(llm, whole)
    after += more(after - vision - sum(ledger["selection_flops"]), left)
    return before, after
