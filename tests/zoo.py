"""What every method must do on every family, and contexts to call methods without a model."""

from __future__ import annotations

from functools import cache

import tiny
import torch
from families import KITS, collate, model, samples
from matrix import CLOSE_CALL, equal
from torch import Tensor

import mllm
from mllm.compressors.base import Context, LayerContext
from mllm.tokens import TokenTable

#: A family of every kind of layout and tower: one grid with and without [CLS], rotary rows and
#: columns, tiles with separators.
FAMILIES = ["llava", "gemma3", "qwen2_5_vl", "llava_next"]


@cache
def shared(family: str, attn: str):
    return model(family, attn)


def _placed(family: str, batch) -> dict[str, Tensor]:
    """As generate() does; a bare forward counts the padding, and norms of rotated keys tell."""
    inputs = collate(family, batch)
    if not KITS[family].mrope:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


@torch.no_grad()
def check_family(family: str, plan, attn: str = "sdpa", kind="padded") -> list[list[int]]:
    """Batched equals alone, decode included; samples without images are left alone.

    Returns:
        Cells (visual tokens without separators) that enter each layer, by sample.
    """
    batch, net = samples(family, kind), shared(family, attn)
    inputs = _placed(family, batch)
    plain = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True,
                   return_dict_in_generate=True)  # fmt: skip
    with mllm.patch(net, plan) as patched:
        together = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = [patched.ledger.kept(i) for i in range(len(patched.layers))]
        answers = net.generate(**collate(family, batch), **options)
        for b, s in enumerate(batch):
            single = _placed(family, [s])
            own = net(**single).logits[0]
            equal(together[b], own, f"sample {b}", 1e-4 * max(1.0, float(own.std())))
            for i in range(len(patched.layers)):
                assert patched.ledger.kept(i)[0].tolist() == kept[i][b].tolist()
            alone = net.generate(**collate(family, [s]), **options)
            best = torch.stack(alone.logits, 1)[0].topk(2, -1).values
            clear = (best[:, 0] - best[:, 1] > CLOSE_CALL).int().cumprod(0).bool()
            assert torch.equal(alone.sequences[0, -4:][clear], answers.sequences[b, -4:][clear])
    for b, s in enumerate(batch):
        if not s.pictures:
            equal(together[b], plain[b], f"sample {b}, without images", 1e-5)
    cells = []
    for sample in batch:
        own, at = set(), 0
        for picture in sample.pictures:
            own |= {at + t for t in KITS[family].cells(picture)}
            at += picture.tokens
        cells.append(own)
    return [
        [len(cells[b] & set(kept[i][b].tolist())) for i in range(len(kept))]
        for b in range(len(batch))
    ]


@torch.no_grad()
def check_generation(family: str, plan, prepare=lambda net: None) -> None:
    """With a cache as without: greedy, in beams, and with candidates out of the prompt.

    Args:
        family: of the model.
        plan: the plan.
        prepare: what is done to the patched model.
    """
    net, inputs = model(family), collate(family, samples(family))
    options = dict(max_new_tokens=5, do_sample=False)
    with mllm.patch(net, plan):
        prepare(net)
        cached = net.generate(**inputs, **options)
        assert torch.equal(cached, net.generate(**inputs, **options, use_cache=False))
        beams = net.generate(**inputs, **options, num_beams=2)
        assert torch.equal(beams, net.generate(**inputs, **options, num_beams=2, use_cache=False))
        lookup = collate(family, samples(family, "alone"))
        greedy = net.generate(**lookup, **options)
        assert torch.equal(greedy, net.generate(**lookup, **options, prompt_lookup_num_tokens=3))


def context(stage, valid: Tensor | None = None, **signals) -> Context:
    """What a pre-LLM method is given, from values; `valid` None is all tokens."""
    if valid is None:
        valid = torch.ones(signals["features"].shape[:2], dtype=torch.bool)
    return Context(stage, signals, valid=valid)


def layer_context(
    stage,
    visual: Tensor,
    place: dict[str, Tensor] | None = None,
    protected: Tensor | None = None,
    asked: dict[str, Tensor] | None = None,
    **signals,
) -> LayerContext:
    """What an in-LLM method is given, from values; without padding.

    Args:
        stage: the method.
        visual: bool `[batch, rows]`.
        place: fields of the token table that are not those of text; they say how many images.
        protected: bool `[batch, rows]`; None is none.
        asked: rows of the queries of signals.
        **signals: their values.
    """
    valid = torch.ones_like(visual)
    table = TokenTable.text(valid, 0)
    table.visual = visual
    images = visual.any(1).int()
    for name, value in (place or {}).items():
        setattr(table, name, value)
    if place:
        images, signals["grid"] = table.image.amax(1) + 1, table
    return LayerContext(
        stage, signals, layer=2, num_layers=4, table=table, visual=visual, prompt=valid, state={},
        queries=asked or {}, width=visual.shape[1], images=images.tolist(),
        entered=visual.sum(1).tolist(),
        protected=torch.zeros_like(valid) if protected is None else protected,
    )  # fmt: skip
