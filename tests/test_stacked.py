"""Stages before the LLM on top of each other: what a later one may do, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from matrix import SIDE, fresh

import mllm
from mllm.compressors import DivPrune, DualFilter, KeyTokens, Stride, VisionZip
from mllm.errors import DataError, PlanError

TOKENS = SIDE * SIDE


@torch.no_grad()
def test_no_later_stage_drops_what_is_protected():
    """A reducer behind the key tokens leaves them and what it has chosen itself."""
    net, inputs = fresh(), tiny.collate(tiny.samples(side=SIDE))
    keys = KeyTokens(share=0.3)
    with mllm.patch(net, [keys, DualFilter(together=2.0, alone=2.0, layers=(1,))]) as patched:
        net(**inputs)
        protected = patched.ledger.kept(1)  # nothing else is left
    with mllm.patch(net, [keys, Stride(keep=1)]) as patched:
        net(**inputs)
        net.generate(**inputs, max_new_tokens=2)
        kept = patched.ledger.kept("llm")
        rows = [row["visual"] for row in patched.ledger.as_dict()["layers"]]
    for own, must, images in zip(kept, protected, (1, 2, 0), strict=True):
        assert len(must) == 5 * images
        middle = {TOKENS * i + TOKENS // 2 for i in range(images)}
        assert set(own.tolist()) == set(must.tolist()) | middle
    assert rows[0] == [len(own) for own in kept]


@torch.no_grad()
def test_what_was_merged_into_a_token_goes_with_it():
    net, inputs = fresh(), tiny.collate(tiny.samples(side=SIDE))
    plan = [VisionZip(keep=10, dominant=0.5, cls=False), DivPrune(keep=3)]
    with mllm.patch(net, plan) as patched:
        net(**inputs)
        merged, kept = patched.ledger.merged_into, patched.ledger.kept("llm")
    followed = 0
    for into, own in zip(merged, kept, strict=True):
        stays = set(own.tolist())
        assert set(into.tolist()) <= stays | {-1}
        assert all(into[t] == t for t in stays)
        followed += sum(t not in stays and t >= 0 for t in range(len(into)) if into[t] >= 0)
    assert followed, "some tokens are still in others"


@pytest.mark.parametrize("spec", [
    "tome:keep=8+avgpool:keep=4", "tome:keep=8+adaptivepool:grid=2/2",
    "windowmerge:share=0.5:window=2+vscan_vision:keep=4:window=2",
])  # fmt: skip
def test_pooling_needs_what_a_tower_has_merged(spec):
    """Its means would have zeros in them, at tokens that are gone."""
    with pytest.raises(PlanError, match="needs all tokens of the tower") as caught:
        mllm.patch(fresh(), spec)
    assert caught.value.expected == "a stage behind the projector that chooses tokens"


@pytest.mark.parametrize("later", [
    "fastervlm:keep=2", "holov:keep=2:crops=2", "keytokens", "cdpruner:keep=2", "divprune:keep=2",
])  # fmt: skip
@torch.no_grad()
def test_smaller_pictures_have_fewer_patches(later):
    """What reads the tower cannot follow; what reads features behind the projector can."""
    net, spec = fresh(), f"downsample:keep=4+{later}"
    if later[0] in "cd":
        with mllm.patch(net, spec) as patched:
            net(**tiny.collate(tiny.samples(side=SIDE)))
            assert [len(own) for own in patched.ledger.kept("llm")] == [2, 4, 0]
        return
    with pytest.raises(PlanError, match="leaves it fewer of them") as caught:
        mllm.patch(net, spec)
    assert caught.value.argument == "plan" and "behind the projector" in caught.value.expected


@pytest.mark.parametrize("block", [3, 40, -4])
def test_a_block_outside_of_the_tower(block):
    """It is not counted around the tower: block 40 of 24 is not block 16."""
    with pytest.raises(PlanError, match=f"reads block {block} of a tower that has 3") as caught:
        mllm.patch(fresh(), KeyTokens(block=block))
    assert caught.value.argument == "block" and caught.value.expected == "-3 <= block < 3"
    mllm.patch(fresh(), KeyTokens(block=-3)).remove()


@pytest.mark.parametrize("spec", ["fastv:layer=2:keep=1.0", "divprune:keep=4"])
@torch.no_grad()
def test_packed_sequences_are_refused(spec):
    """transformers tells them apart by positions, when there is no mask and no cache."""
    net, batch = fresh(), tiny.samples("single", side=SIDE)[:2]
    inputs = {
        "input_ids": torch.cat([s.ids for s in batch])[None],
        "position_ids": torch.cat([torch.arange(len(s.ids)) for s in batch])[None],
        "pixel_values": torch.cat([s.pixels for s in batch]),
    }
    alone = net(input_ids=batch[1].ids[None], pixel_values=batch[1].pixels).logits[0]
    packed = net(**inputs, use_cache=False).logits[0, len(batch[0].ids) :]
    assert torch.allclose(packed, alone, atol=1e-4), "unpatched, they do not see each other"
    with mllm.patch(net, spec):
        with pytest.raises(DataError, match="begin anew") as caught:
            net(**inputs, use_cache=False)
        assert caught.value.argument == "position_ids"
        net(**{k: v for k, v in inputs.items() if k != "position_ids"}, use_cache=False)
