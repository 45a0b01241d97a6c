"""Modes of torch around a patched model: autocast, and inference mode before training."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from families import collate, model, samples
from matrix import SIDE, fresh

import mllm
from mllm import tokens
from mllm.compressors import ToMe
from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Keep,
    LayerPruner,
    Positions,
    TokenReducer,
    VisionAttention,
)
from mllm.models import qwen_vl
from mllm.plan import MethodInfo

SEEN: dict[str, torch.dtype] = {}


def product() -> torch.dtype:
    """What a product of fp32 matrices is here."""
    return (torch.eye(2) @ torch.eye(2)).dtype


@dataclass
class Before(TokenReducer):
    """Notes in what it may choose."""

    keep: Budget = 1.0
    positions: Positions | None = None

    info = MethodInfo("before", "pre_llm")

    def reads(self):
        return {"attention": VisionAttention()}

    def reduce(self, ctx):
        SEEN.update(tower=ctx["attention"].dtype, reduce=product())
        return [Keep(ctx.valid)]


@dataclass
class Inside(LayerPruner):
    """The same before a layer, and while attention is read."""

    layer: int | None = 2
    keep: Budget = 0.5
    positions: Positions | None = None

    info = MethodInfo("inside", "llm", reference_layers=4)
    when = "after"

    def reads(self):
        return {"rows": AttentionRows(rows=self.asking, softmax=False, when=self.when)}

    def asking(self, ctx):
        SEEN["asking"] = product()
        return ctx.prompt

    def score(self, ctx):
        SEEN.update(rows=ctx["rows"].dtype, act=product())
        return ctx["rows"].amax(1)


class Ahead(Inside):
    """The same of the layer that is about to run."""

    when = "before"


class Tower(ToMe):
    """The same in the tower."""

    def merge(self, ctx):
        SEEN["merge"] = product()
        return super().merge(ctx)


@torch.no_grad()
def test_autocast_stops_where_stages_choose():
    net, inputs = fresh(), tiny.collate(tiny.samples(side=SIDE))
    for inside in (Inside(), Ahead()):
        SEEN.clear()
        with mllm.patch(net, [Tower(r=(2,)), Before(), inside]):
            with torch.autocast("cpu", torch.bfloat16):
                assert product() == torch.bfloat16
                half = net(**inputs).logits
                assert product() == torch.bfloat16
        assert half.dtype == torch.bfloat16, "the model itself is computed in half precision"
        wanted = {"tower", "reduce", "asking", "rows", "act", "merge"}
        assert {name: SEEN.get(name) for name in wanted} == dict.fromkeys(wanted, torch.float32)


def test_what_is_learnt_runs_under_autocast():
    """Its weights are fp32 and what it is given is not: only autocast brings them together."""
    net, inputs = fresh().train(), tiny.collate(tiny.samples(side=SIDE), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for spec in ("tokenflex:keep=4:counts=4/9", "pmod"):
        with mllm.patch(net, spec), torch.autocast("cpu", torch.bfloat16):
            loss = net(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("family, spec", [
    ("llava_next", "tokenflex:keep=4:counts=4/9"), ("qwen2_5_vl", "tokenflex:keep=4:counts=4/9"),
])  # fmt: skip
def test_training_after_inference_mode(family, spec):
    """What is remembered of a layout does not stop the gradient of a later training."""
    net, inputs = model(family), collate(family, samples(family, "alone"))
    tokens._places.cache_clear(), tokens._cells.cache_clear(), qwen_vl._windows.cache_clear()
    with mllm.patch(net, spec) as patched:
        with torch.inference_mode():
            net(**inputs)
        net.train()
        net(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert all(p.grad is not None for p in patched.routers.parameters())
