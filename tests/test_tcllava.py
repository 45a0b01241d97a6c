"""TC-LLaVA against a decoder written out by hand, with every token's time and frame in loops."""

from __future__ import annotations

import pytest
import tiny
import torch
from acting import acting
from families import LAYERS, collate, model, reference, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import PRECOMPUTED, equal
from test_depth import MORE
from test_slowfast import decoded
from torch.nn import functional as F
from zoo import _placed, check_family, check_generation

import mllm
from mllm.compressors import AvgPool, FastV, SnapKV, Stride, TCLLaVA
from mllm.compressors.base import LogitBias
from mllm.errors import PlanError

BOTH, TIME, FRAMES = TCLLaVA(), TCLLaVA(gamma=1.3, mask=False), TCLLaVA(gamma=0.0)
each = pytest.mark.parametrize("stage", [BOTH, TIME, FRAMES], ids=["both", "time", "frames"])
needs_early_videos = pytest.mark.skipif(not PRECOMPUTED, reason="videos are read later")
FAMILIES = ["llava", "gemma3", "llava_next",
            pytest.param("llava_onevision_video", marks=needs_early_videos)]  # fmt: skip


def frames_of(s):
    """The frame of each token, None for text; a separator is in the frame before it."""
    found, pictures = [None] * len(s.ids), iter(enumerate(s.pictures))
    left = 0
    for i in range(len(s.ids)):
        if not s.visual[i]:
            continue
        if not left:
            number, picture = next(pictures)
            left = picture.tokens
        cells = picture.grid[0] * picture.grid[1]
        at = picture.tokens - left
        found[i] = (number, min(at // cells, picture.frames - 1) if picture.frames else 0)
        left -= 1
    return found


def times(frames, gone):
    """How many moments each token is behind the first."""
    found, now, last = [], -1, None
    for frame, is_gone in zip(frames, gone, strict=True):
        if not is_gone:
            now += frame is None or frame != last
            last = frame
        found.append(float(now))
    return found


def by_hand(s, stage, gone=None, edits=None):
    edits, frames = edits or Edits(), frames_of(s)
    if not s.pictures:
        return edits
    time = times(frames, [False] * len(frames) if gone is None else gone.tolist())

    def turn(n):
        later = [time[-1] + 1 + i for i in range(n - len(time))]
        return stage.gamma * torch.tensor(time + later)

    def show(n):
        own = frames + [None] * (n - len(frames))
        return torch.tensor([[a is not None and a == b for b in own] for a in own])

    for layer in range(LAYERS):
        if stage.gamma:
            edits.turn[layer] = turn
        if stage.mask:
            edits.show[layer] = show
    return edits


@each
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_its_description(family, attn, stage):
    """Of a padded batch, and of tokens behind it."""
    net, batch = model(family, attn), samples(family)
    with mllm.patch(net, stage):
        logits = decoded(net, family, batch)
    for b, s in enumerate(batch):
        want = run(family, s, by_hand(s, stage), MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_vl_video"])
@torch.no_grad()
def test_frames_alone_where_positions_have_rows(family):
    net, batch = model(family), samples(family, "alone")
    with mllm.patch(net, FRAMES):
        logits = decoded(net, family, batch)
    want = run(family, batch[0], by_hand(batch[0], FRAMES), MORE).logits
    equal(logits[0], want, family, 2e-4 * max(1.0, float(want.std())))


@each
@torch.no_grad()
def test_tokens_that_left_take_no_time_and_are_not_shown(stage):
    net, batch = model("llava"), samples("llava")
    with mllm.patch(net, [Stride(keep=5, positions="original"), stage]) as patched:
        logits = decoded(net, "llava", batch)
        kept = patched.ledger.kept("llm")
    for b, s in enumerate(batch):
        gone = s.visual.clone()
        gone[s.visual.nonzero()[kept[b], 0]] = False
        edits = by_hand(s, stage, gone, Edits(drop={0: gone}))
        want = run("llava", s, edits, MORE).logits
        there = torch.cat([~gone, torch.ones(3, dtype=torch.bool)])
        near = 2e-4 * max(1.0, float(want.std()))
        equal(logits[b][there], want[there], f"sample {b}", near)


@each
@pytest.mark.parametrize("family", [*FAMILIES, "internvl", "idefics3"])
@torch.no_grad()
def test_batched_equals_alone(family, stage):
    check_family(family, stage)


@torch.no_grad()
def test_beside_other_stages():
    check_family("llava", [AvgPool(keep=4), BOTH])
    check_family("llava", [BOTH, FastV(layer=2, keep=0.5)])
    check_family("llava", [BOTH, SnapKV(budget=6, window=2, heads="shared")])
    check_family("llava", [BOTH, mllm.routers.PMoD(max_ratio=0.8, min_ratio=0.32)])


@each
def test_generation_with_and_without_a_cache(stage):
    check_generation("llava", stage)


@each
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(checkpointed, stage):
    """Loss and all gradients of the decoder are those of the loop."""
    batch, inputs = samples("llava"), _placed("llava", samples("llava"))
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model("llava").train()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, stage):
        loss = net(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    answers = []
    for s in batch:
        logits = run_with_gradients("llava", s, by_hand(s, stage)).logits
        answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
    want = torch.cat(answers).mean()
    equal(loss, want, "loss", 1e-5)
    names, own = zip(*reference("llava").get_decoder().layers.named_parameters(), strict=True)
    mine = dict(net.get_decoder().layers.named_parameters())
    for name, grad in zip(names, torch.autograd.grad(want, own), strict=True):
        equal(mine[name].grad, grad, name, 1e-4 * max(1.0, float(grad.abs().max())))


@torch.no_grad()
def test_each_half_does_something_to_pictures_alone():
    net, inputs = model("llava"), collate("llava", samples("llava"))
    plain = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    for stage in (TIME, FRAMES):
        with mllm.patch(net, stage):
            logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        assert (logits[0] - plain[0]).abs().max() > 1e-2
        equal(logits[2], plain[2], "without pictures", 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_shown_and_what_is_hidden_stays_so(side):
    """A bias that shows everything, and one that hides one token in three from the others."""

    def hide(q, k):
        gone = (k % 3 == 1)[..., None, :] & (q[..., :, None] != k[..., None, :])
        return torch.zeros(gone.shape).masked_fill(gone, float("-inf"))

    def act(ctx):
        first = ctx.logical.masked_fill(~ctx.prompt, 10**6).amin(1, keepdim=True)
        return [
            LogitBias(1, lambda q, k: hide(q - first, k - first)[:, None]),
            LogitBias(1, lambda q, k: torch.full((1, 1, 1, 1), float("inf"))),
        ]

    net, batch = model("llava"), samples("llava")
    inputs = collate("llava", batch, side)
    with mllm.patch(net, acting([0], act, "LogitBias")):
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    for b, s in enumerate(batch):
        edits = Edits(
            show={1: lambda n: torch.ones(n, n, dtype=torch.bool)},
            bias={1: lambda n: hide(torch.arange(n), torch.arange(n))[None]},
        )
        want = run("llava", s, edits if s.pictures else None).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


# What is refused


@pytest.mark.parametrize("make, argument", [
    (lambda: TCLLaVA(gamma=-1.0), "gamma"), (lambda: TCLLaVA(gamma=float("inf")), "gamma"),
    (lambda: TCLLaVA(positions="compact"), "positions"),
    (lambda: mllm.patch(model("qwen2_vl"), BOTH), "gamma"),
    (lambda: mllm.patch(model("qwen2_vl"), TIME), "gamma"),
])  # fmt: skip
def test_bad_input(make, argument):
    with pytest.raises(PlanError) as caught:
        make()
    assert caught.value.argument == argument


@torch.no_grad()
def test_pictures_of_a_later_turn_are_refused_and_its_text_is_not():
    net, (s,) = model("llava"), samples("llava", "alone")
    inputs = collate("llava", [s])
    with mllm.patch(net, BOTH):
        cache = net(**inputs).past_key_values
        net(input_ids=MORE[None], past_key_values=cache)
        with pytest.raises(PlanError, match="later turn") as caught:
            mask = torch.ones(1, 2 * len(s.ids) + len(MORE))
            net(**{**inputs, "attention_mask": mask}, past_key_values=cache)
    assert caught.value.argument == "past_key_values"
