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

import mllm
from mllm.compressors.base import (
    BranchRows,
    Evict,
    Hidden,
    Insert,
    LayerMethod,
    Positions,
)
from mllm.plan import MethodInfo


def sketch(name: str) -> MethodInfo:
    return MethodInfo(name, "llm", reference_layers=LAYERS)


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


SKETCHES = [SkipVision()]
#: Visual tokens that enter each layer, of a picture of 16.
COUNTS = {
    "skipvision": [16] * 4,
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
