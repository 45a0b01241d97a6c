"""What :func:`mllm.estimate` does: the engine runs over shapes, and its ledger counts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mllm import flops
from mllm.cache import cache_bytes
from mllm.doctor import bones, skeleton
from mllm.errors import DataError, PlanError, unusable
from mllm.estimate import Cost, Estimate
from mllm.hollow import Hollow, guessing, hollow_out, let_guess
from mllm.ledger import Ledger
from mllm.models import resolve
from mllm.models.base import Family
from mllm.patcher import Patched
from mllm.plan import Plan
from mllm.roofline import Hardware, device
from mllm.routers.base import NAME
from mllm.shapes import SHAPES
from mllm.views import VIEW

DTYPES = ("bfloat16", "float16", "float32")
SIZE = (768, 1024)
#: Random values of two kinds: even ones, and few large ones among many small ones.
GUESSES = ((0, 1), (1, 12))

#: What must not depend on values, in words.
COUNTED = {
    "cells": "visual tokens per layer",
    "kv_bytes": "bytes of keys and values",
    "selection_flops": "FLOPs of selection",
    "prefill_flops": "FLOPs of prefill",
}

ASSUMPTIONS = (
    "FLOPs are 2 x multiply-adds of matrix products, attention over the full rectangle; norms, "
    "softmax, embeddings and sampling are not counted.",
    "Times are a roofline: tower, projector, selection, every decoder layer that is run and the LM "
    "head each take the longer of their FLOPs at the device's peak rate and of their weights at "
    "its full bandwidth. Activations, launches and the host cost nothing here, so a real run is "
    "slower.",
    "A decode step reads the weights of all layers that the prefill has run (all experts too), and "
    "what they store, once for the batch; its time is a mean over the new tokens, each of which "
    "takes a slot in every layer.",
    "All samples of a batch are alike, and nothing is padded.",
)

SEPARATORS = (
    "A separator stays while a cell of its row does, so how many there are depends on the picture: "
    "these numbers are those of a choice at random."
)
WINDOWS = (
    "A layer with a window stores what lies within it, so how much that is depends on which tokens "
    "stay: KV bytes are those of a choice at random."
)


def run(
    model: Any, plan: Any, *, images: int | None, size: tuple[int, int] | None, visual: int | None,
    text: int, new: int, batch: int, hardware: str | Hardware, dtype: str,
) -> Estimate:  # fmt: skip
    """See :func:`mllm.estimate`."""
    for name, value in (("images", images), ("visual", visual), ("text", text), ("new", new),
                        ("batch", batch)):  # fmt: skip
        if value is not None and (type(value) is not int or value < 1):
            raise _unfit(name, value, "a whole number from 1")
    pair = isinstance(size, list | tuple) and [type(n) is int and n > 0 for n in size]
    if size is not None and pair != [True, True]:
        raise _unfit("size", size, "height and width in pixels, such as (1080, 1920)")
    if dtype not in DTYPES:
        raise _unfit("dtype", dtype, " or ".join(DTYPES))
    at = hardware if isinstance(hardware, Hardware) else device(hardware)
    given = None if plan is None or plan in ("none", "unpatched") else Plan.of(plan)
    name, net = _opened(model, dtype)
    family = resolve(net)
    images, size = _pictures(family, images, size, visual)
    inputs = prompt(family, images=images, size=size, text=text, batch=batch)
    weights = Weights.of(family)
    plain, patched, ledger, notes = prefill(net, given, inputs, weights)
    costs = [_cost(side, family, at, dtype, new, batch) for side in (plain, patched)]
    return Estimate(
        model=name,
        family=net.config.model_type,
        parameters=weights.count,
        plan="" if given is None else given.spec,
        dtype=dtype,
        prompt={
            "batch": batch, "images": images, "size": None if size is None else list(size),
            "visual": ledger["visual_tokens"][0], "text": text, "new": new,
        },
        hardware=at,
        plain=costs[0],
        patched=costs[1],
        layers=[
            {
                "layer": i, "tokens": row["tokens"][0], "visual": row["visual"][0],
                "flops": patched.layers[i], "plain_flops": plain.layers[i],
                "kv_bytes": patched.kv[i], "plain_kv_bytes": plain.kv[i],
            }
            for i, row in enumerate(ledger["layers"])
        ],
        ledger=ledger,
        assumptions=[*ASSUMPTIONS, *_more(family), *notes],
    )  # fmt: skip


def _unfit(argument: str, given: Any, expected: str) -> DataError:
    return unusable(argument, given, "estimated", expected)


def _more(family: Family) -> list[str]:
    """What else is assumed of a family."""
    said = list(family.notes())
    if family.native_grid() is None:
        said.append("Pictures arrive at the tower with the size given; the processor's own limits "
                    "on pixels are not applied.")  # fmt: skip
    else:
        said.append("An image is one picture of the size that the tower takes; a picture that the "
                    "processor cuts into tiles is as many images.")  # fmt: skip
    return said


def _opened(model: Any, dtype: str) -> tuple[str, nn.Module]:
    """A model without weights, and its name."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, nn.Module):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return type(inner).__name__, bones(copy.deepcopy(inner.config), dtype)
    if isinstance(model, PreTrainedConfig):
        return model.model_type, bones(copy.deepcopy(model), dtype)
    if str(model) in SHAPES:
        given = copy.deepcopy(SHAPES[str(model)])
        return str(model), bones(AutoConfig.for_model(given.pop("model_type"), **given), dtype)
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    try:
        return str(model), skeleton(folder if folder.exists() else os.fspath(model), dtype)
    except DataError as error:
        raise DataError(
            f"{error}; built-in shapes are {', '.join(SHAPES)}",
            argument="model",
            given=model,
            expected="a built-in shape, a folder with config.json, or a hub name",
        ) from error


def _pictures(
    family: Family, images: int | None, size: tuple[int, int] | None, visual: int | None
) -> tuple[int, tuple[int, int] | None]:
    """Images of each sample, and their (height, width) where there are several."""
    grid = family.native_grid()
    if grid is not None:
        if size is not None:
            raise _unfit("size", size, "none: this model's pictures have one size")
        each = grid[0] * grid[1]
        if visual is None:
            return images or 1, None
        if visual % each or (images is not None and visual != images * each):
            raise _unfit("visual", visual, f"a multiple of {each}, the tokens of one image")
        return visual // each, None
    if visual is None:
        return images or 1, size or SIZE
    images = images or 1
    if size is not None or visual % images:
        raise _unfit("visual", visual, "it without size, and as a multiple of images")
    size = family.size_of(visual // images)
    if size is None:
        raise _unfit("visual", visual, "size instead: the tokens of a picture follow from it")
    return images, size


def prompt(
    family: Family, *, images: int, size: tuple[int, int] | None, text: int, batch: int
) -> dict[str, Any]:
    """Inputs of samples that are all alike: a word, images with a word behind each, more words.

    Pixels are on the meta device, in the model's dtype.

    Raises:
        DataError: there is not enough text to stand between the images.
    """
    if text < images + 1:
        raise _unfit("text", text, f"at least {images + 1}: a word behind each image, and one more")
    pictures = family.shaped(batch, images, size)
    word = next(i for i in (1, 2) if i != family.image_token_id)
    ids = [word]
    for layout in family.layouts(_hollow(pictures))[:images]:
        ids += [family.image_token_id] * layout.tokens + [word]
    row = torch.tensor([ids + [word] * (text - 1 - images)])
    found = {"input_ids": row.repeat(batch, 1)}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if family.mrope:
        found["mm_token_type_ids"] = (found["input_ids"] == family.image_token_id).int()
    found |= {name: torch.zeros_like(found["input_ids"]) for name in family.asks}
    pixels = pictures[family.pixels]
    return found | pictures | {family.pixels: pixels.to(family.model.dtype)}


def tiles(family: Family, inputs: dict[str, Any], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The tiles of pictures that are all alike, for plans that are shown some."""
    count = grid[0] * grid[1]
    own = {name: inputs[name] for name in family.needs}
    return {f"{VIEW}{k}": x.repeat(count, *[1] * (x.dim() - 1)) for k, x in own.items()}


def _hollow(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: Hollow(x) if isinstance(x, Tensor) and x.is_meta else x for k, x in inputs.items()}


@dataclass(frozen=True)
class Weights:
    """Bytes of weights.

    Attributes:
        whole: of everything; `count` are its parameters.
        tower, projector, layers, head: of what a prefill reads.
        once: of what a plan has learnt, without experts: the prefill alone reads it.
    """

    whole: int
    count: int
    tower: int
    projector: int
    layers: list[int]
    head: int
    once: int

    @classmethod
    def of(cls, family: Family, experts: Mapping[int, nn.Module] | None = None) -> Weights:
        """Those of a model, with what a plan has added.

        Args:
            family: of the model.
            experts: by layer, what stands in for its FFN.
        """

        def size(modules: Iterable[nn.Module | None]) -> int:
            own = {id(p): p for m in modules if m is not None for p in m.parameters()}
            return sum(p.numel() * p.element_size() for p in own.values())

        model, experts = family.model, experts or {}
        layers = [size([layer]) for layer in family.layers]
        for i, instead in experts.items():
            layers[i] += size([instead]) - size([family.mlp(i)])
        projector, head = size([family.projector]), size([model.get_output_embeddings()])
        tower = size([family.tower, family.projector]) - projector
        once = size([getattr(model, NAME, None)]) - size(experts.values())
        return cls(
            size([model]), sum(p.numel() for p in model.parameters()), tower, projector, layers,
            head, once,
        )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One prefill, with the plan or without: FLOPs and bytes of the batch.

    Attributes:
        visual, visual_avg: of a sample, as in :class:`Cost`.
        vision, projector, selection, total: FLOPs; `projector` is a part of `vision`.
        layers: FLOPs of every decoder layer.
        kv: bytes of keys and values of every layer; `kv_total` is their sum, less what layers
            share.
        slots: stored by every layer for a sample.
        runs: whether a layer is run at all.
    """

    visual: int
    visual_avg: float
    vision: float
    projector: float
    selection: float
    total: float
    layers: list[float]
    kv: list[int]
    kv_total: int
    slots: list[int]
    runs: list[bool]
    weights: Weights


def prefill(
    net: nn.Module, plan: Plan | None, inputs: dict[str, Any], weights: Weights
) -> tuple[Side, Side, dict[str, Any], list[str]]:
    """Run a plan over shapes; `net`, on the meta device, is hollow and patched afterwards.

    Args:
        net: the model.
        plan: None is none.
        inputs: of :func:`prompt`.
        weights: of the model without the plan.

    Returns:
        What the model needs without the plan and with it; the ledger; what to say of it.

    Raises:
        PlanError: the plan cannot work on this model, or its ledger depends on values.
    """
    stages = [] if plan is None else copy.deepcopy(plan.stages)
    for stage in stages:
        if not getattr(stage, "exact", True):
            raise _unknown(plan, f"{stage.info.name} stores as many tokens as that asks for")
    patched = Patched(net, Plan(stages, 0 if plan is None else plan.seed))
    family = patched.family
    if patched.tiles is not None:
        inputs = inputs | tiles(family, inputs, patched.tiles)
    given = _hollow(inputs)
    own = Weights.of(family, patched.upcycled.layers)
    hollow_out(net)
    _skip_blocks(patched)
    for stage in patched.plan.stages:
        let_guess(stage)
    found = []
    for seed, power in GUESSES[: 2 if stages else 1]:
        with guessing(seed, power):
            cache = net(**given, use_cache=True, logits_to_keep=1).past_key_values
        ledger = patched.ledger.as_dict()
        found.append({
            name: ledger[name] for name in COUNTED if name in ledger
        } | {"cells": _cells(patched.ledger)})  # fmt: skip
    layouts, config, batch = family.layouts(given), family.text_config, ledger["batch"]
    differ = [name for name in COUNTED if found[0][name] != found[-1][name]]
    notes = []
    if differ and "cells" not in differ and any(x.newline == "rows" for x in layouts):
        notes.append(SEPARATORS)
    elif differ == ["kv_bytes"] and any(patched.windows):
        notes.append(WINDOWS)
    elif differ:
        what = " and ".join(COUNTED[name] for name in differ)
        raise _unknown(plan, f"two kinds of random values give other {what}")
    projector = [
        sum(
            family.vision_flops(x, n) - family.vision_flops(x, 0)
            for x, n in zip(layouts, many, strict=True)
        )
        for many in ([x.cells for x in layouts], patched.ledger.projected)
    ]
    layers, plain_layers = patched.ledger.layer_flops()
    (length, *_), depth = ledger["prompt_tokens"], len(layers)
    windows = [family.window(i) for i in range(depth)]
    stored = [length if window is None else min(length, window - 1) for window in windows]
    itemsize = torch.empty(0, dtype=net.dtype).element_size()
    plain = Side(
        visual=ledger["visual_tokens"][0],
        visual_avg=float(ledger["visual_tokens"][0]),
        vision=sum(family.vision_flops(x, x.cells) for x in layouts),
        projector=projector[0],
        selection=0.0,
        total=sum(ledger["baseline_prefill_flops"]),
        layers=[sum(samples) for samples in plain_layers],
        kv=[int(flops.kv_bytes(config, batch * n, itemsize)) for n in stored],
        kv_total=ledger["baseline_kv_bytes"],
        slots=stored,
        runs=[True] * depth,
        weights=weights,
    )
    return (
        plain,
        Side(
            visual=ledger["kept_llm"][0],
            visual_avg=ledger["visual_avg"][0],
            vision=sum(ledger["vision_flops"]),
            projector=projector[1],
            selection=sum(ledger["selection_flops"]),
            total=sum(ledger["prefill_flops"]),
            layers=[sum(samples) for samples in layers],
            kv=[cache_bytes(SimpleNamespace(layers=[layer]))[0] for layer in cache.layers],
            kv_total=ledger["kv_bytes"],
            slots=[layer.slots for layer in cache.layers],
            runs=[row["tokens"][0] > 0 for row in ledger["layers"]],
            weights=own,
        ),
        ledger,
        notes,
    )


def _cost(side: Side, family: Family, at: Hardware, dtype: str, new: int, batch: int) -> Cost:
    """What a side needs, in seconds too."""
    config, weights = family.text_config, side.weights
    head = at.seconds(batch * flops.lm_head(config, 1), weights.head, dtype)
    ttft = at.seconds(side.vision - side.projector, weights.tower, dtype)
    ttft += at.seconds(side.projector, weights.projector, dtype)
    ttft += at.seconds(side.selection, weights.once, dtype) + head
    step, grown = head, (new - 1) / 2
    for i, slots in enumerate(side.slots):
        if side.runs[i]:
            ttft += at.seconds(side.layers[i], weights.layers[i], dtype)
            window = family.window(i)
            full = slots + grown if window is None else max(slots, min(slots + grown, window - 1))
            more = flops.kv_bytes(config, batch * (full - slots), getattr(torch, dtype).itemsize)
            product = batch * flops.decoder_layer(config, 1, full + 1)
            step += at.seconds(product, weights.layers[i] + side.kv[i] + more, dtype)
    return Cost(
        visual=side.visual,
        visual_avg=side.visual_avg,
        tower_flops=side.vision - side.projector,
        projector_flops=side.projector,
        selection_flops=side.selection,
        llm_flops=side.total - side.vision - side.selection,
        prefill_flops=side.total,
        kv_bytes=side.kv_total,
        weight_bytes=weights.whole,
        ttft_s=ttft,
        decode_s=step,
        total_s=ttft + (new - 1) * step,
    )


def _cells(ledger: Ledger) -> list[list[int]]:
    """Visual tokens without separators that enter each layer, per sample."""
    return [
        [n - own for n, own in zip(row["visual"], ledger.separators(row["layer"]), strict=True)]
        for row in ledger.as_dict()["layers"]
    ]


def _skip_blocks(patched: Patched) -> None:
    """Let tower blocks that nobody reads pass their input on: they change no shape."""
    if patched.mergers:
        return
    family, tapped = patched.family, patched.tapped()
    for i, block in enumerate(family.blocks):
        if i not in patched.tower_blocks and family.block_attention(i) not in tapped:
            block.forward = lambda hidden, *_, **__: hidden


def _unknown(plan: Plan, why: str) -> PlanError:
    """The error for a plan whose ledger depends on values."""
    return PlanError(
        f"how much {plan.spec} keeps depends on the picture, and nobody can say beforehand: {why}",
        argument="plan",
        given=plan.spec,
        expected="methods with a fixed budget, such as visionzip:keep=64",
    )
