"""Published methods sketched on signals and actions: each is short, and right in a batch.

They check that the lists are enough; their numbers are not those of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from matrix import CLOSE_CALL, equal
from torch import Tensor

import mllm
from mllm.compressors.base import (
    AttentionRows,
    BranchRows,
    Budget,
    ColumnMass,
    Evict,
    Grid,
    Hidden,
    Insert,
    Keep,
    LayerMethod,
    LayerPruner,
    LayerSchedule,
    Merge,
    Positions,
    TextEmbeds,
    Write,
    merge_rows,
    top_k,
)
from mllm.plan import MethodInfo


def sketch(name: str) -> MethodInfo:
    return MethodInfo(name, "llm", reference_layers=LAYERS)


@dataclass
class VTW(LayerPruner):
    """No visual token from a layer on."""

    layer: int | None = 2
    positions: Positions | None = None
    info = sketch("vtw")

    def act(self, ctx):
        return [Keep(torch.zeros_like(ctx.visual))]


@dataclass
class SparseVLM(LayerSchedule):
    """Text that resembles the picture rates; some of what goes is recycled into clusters."""

    layers: tuple[int, ...] | None = (2, 3)
    keep: tuple[Budget, ...] = (0.5, 3)
    positions: Positions | None = None
    info = sketch("sparsevlm")
    actions = ("Keep", "Merge", "Write")

    def reads(self):
        return {
            "rows": AttentionRows(rows=self.raters), "text": TextEmbeds(),
            "inputs": Hidden(layer=0), "hidden": Hidden(),
        }  # fmt: skip

    def raters(self, ctx) -> Tensor:
        if "raters" not in ctx.state:  # chosen once, by what enters the decoder
            text = ctx["text"]
            like = ctx["inputs"] @ text.embeds.transpose(1, 2)
            like = like.masked_fill(~text.valid[:, None], -1e9).softmax(-1)
            rate = (like * ctx.visual[..., None]).sum(1) / ctx.visual.sum(1, True).clamp(min=1)
            mean = rate.sum(1, True) / text.valid.sum(1, True).clamp(min=1)
            chosen = (text.valid & (rate > mean)).int()
            mask = torch.zeros_like(ctx.visual, dtype=torch.int).scatter_add(1, text.rows, chosen)
            ctx.state["raters"] = mask > 0, ctx.index
        return ctx.bring(*ctx.state["raters"])

    def score(self, ctx) -> Tensor:
        count = (ctx.queries("rows") >= 0).sum(1, True).clamp(min=1)
        return ctx["rows"].sum(1) / count

    def act(self, ctx):
        (kept,) = super().act(ctx)
        gone = ctx.visual & ~kept.mask
        recycled = top_k(self.score(ctx), gone, (0.3 * gone.sum(1)).int() + 1)
        centre = top_k(self.score(ctx), recycled, 1)
        own = torch.arange(gone.shape[1]).expand_as(gone)
        at = centre.int().argmax(1, keepdim=True)
        into = torch.where(recycled, at, torch.where(gone, -1, own))
        values = merge_rows(ctx["hidden"], into)
        return [Keep(kept.mask | centre), Merge(into), Write(values)]


@dataclass
class Feather(LayerSchedule):
    """Scores without rotary positions, and a coarse grid at the first cut."""

    layers: tuple[int, ...] | None = (1, 3)
    keep: tuple[Budget, ...] = (0.25, 0.125)
    positions: Positions | None = None
    info = sketch("feather")

    def reads(self):
        return {"rows": AttentionRows(rope=False), "grid": Grid()}

    def score(self, ctx) -> Tensor:
        return ctx["rows"][:, 0]

    def act(self, ctx):
        (kept,) = super().act(ctx)
        if ctx.layer != self.layers[0]:
            return [kept]
        grid = ctx["grid"]
        return [Keep(kept.mask | ((grid.row % 3 == 1) & (grid.col % 3 == 1)))]


@dataclass
class FitPrune(LayerMethod):
    """Every layer drops a few of those that neither pictures nor text look at."""

    drop: int = 2
    positions: Positions | None = None
    info = sketch("fitprune")

    def at(self):
        return range(1, LAYERS)

    def reads(self):
        return {
            "own": ColumnMass(rows="visual", heads="max"),
            "cross": ColumnMass(rows="text", heads="max"),
        }  # fmt: skip

    def act(self, ctx):
        count = (ctx.visual.sum(1) - self.drop * ctx.images).clamp(min=0)
        return [Keep(top_k(ctx["own"] * ctx["cross"], ctx.visual, count))]


@dataclass
class SkipVision(LayerMethod):
    """Some visual tokens skip every MLP and leave the cache; a summary of them stays."""

    positions: Positions | None = None
    info = sketch("skipvision")
    actions = ("BranchRows", "Insert", "Evict")

    def at(self):
        return (0,)

    def reads(self):
        return {"hidden": Hidden()}

    def act(self, ctx):
        ordinal = ctx.visual.long().cumsum(1) - 1
        skipped = ctx.visual & (ordinal % 4 != 0)
        mean = (ctx["hidden"] * skipped[..., None]).sum(1, True)
        mean = mean / skipped.sum(1)[:, None, None].clamp(min=1)
        last = torch.where(ctx.visual, torch.arange(ctx.visual.shape[1]), -1).amax(1)
        layers = range(ctx.num_layers)
        return [
            *(BranchRows(i, "mlp", ~skipped) for i in layers),
            Insert(mean, last), Evict(layers, skipped),
        ]  # fmt: skip


SKETCHES = [VTW(), SparseVLM(), Feather(), FitPrune(), SkipVision()]
#: Visual tokens that enter each layer, of a picture of 16.
COUNTS = {
    "vtw": [16, 16, 0, 0], "sparsevlm": [16, 16, 9, 4],
    "fitprune": [16, 14, 12, 10], "skipvision": [16] * 4,
}  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", SKETCHES, ids=lambda s: s.info.name)
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_sketches(family, stage, attn):
    """Batched equals alone, decode included; the plan shows; counts are what was asked."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family, attn)
    plain = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True,
                   return_dict_in_generate=True)  # fmt: skip
    with mllm.patch(net, stage) as patched:
        together = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        counts = [row["visual"] for row in patched.ledger.as_dict()["layers"]]
        answers = net.generate(**inputs, **options)
        for b, s in enumerate(batch):
            single = collate(family, [s])
            equal(together[b], net(**single).logits[0], f"sample {b}")
            alone = net.generate(**single, **options)
            best = torch.stack(alone.logits, 1)[0].topk(2, -1).values
            clear = (best[:, 0] - best[:, 1] > CLOSE_CALL).int().cumprod(0).bool()
            assert torch.equal(alone.sequences[0, -5:][clear], answers.sequences[b, -5:][clear])
    assert (together[0][-1] - plain[0][-1]).abs().max() > 1e-3
    equal(together[2], plain[2], "the sample without images", 1e-5)
    if stage.info.name in COUNTS:
        assert [row[0] for row in counts] == COUNTS[stage.info.name]
