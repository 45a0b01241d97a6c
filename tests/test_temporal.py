"""Learned compression of videos: `videoccam` and `dynamicvlm`, against loops."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import families
import matrix
import oracles
import pytest
import torch
from families import collate, model, samples
from matrix import Case, check_generate, check_logits, equal
from test_learned import (
    PLAIN,
    TILED,
    VIDEO,
    _inputs,
    _logits,
    _loss,
    _training,
    attend,
    bank_of,
    linear,
    norm,
    taught,  # noqa: F401
    teach,
    two,
    windows,
)
from test_recipes import recipe_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import check_family, context

import mllm
from mllm.compressors import DivPrune, DynamicVLM, FastV, VideoCCAM
from mllm.errors import PlanError, RecipeError
from mllm.plan import Plan
from mllm.routers.schedules import draw
from mllm.tokens import Layout
from mllm.training import preview
from mllm.training.launch import World

CCAM = VideoCCAM(keep=6, hidden=24, heads=4)
DYNAMIC = DynamicVLM(keep=9, least=1, most=16, total=24)
BOTH = pytest.mark.parametrize("stage", [CCAM, DYNAMIC], ids=lambda s: s.info.name)
WIDTH, OUT = 12, 6


# What a method is, in loops


def ccam(part, x, frames, count):
    """Tokens `[n, width]`, each of a frame, to what `count` queries read."""
    every, last, found = len(part.queries), max(frames) + 1, []
    for j in range(count):
        i = math.floor(Fraction(2 * j + 1, 2 * count) * every)
        until = math.ceil(Fraction((i + 1) * last, every))  # frames, counted from one
        keys = norm(torch.stack([t for t, f in zip(x, frames, strict=True) if f + 1 <= until]),
                    part.norm_key)  # fmt: skip
        own = part.queries[i]
        own = own + attend(part.attention, norm(own, part.norm_query), keys, keys)
        inner = norm(own, part.ffn.norm)
        gate = linear(inner, part.ffn.gate)
        inner = gate * torch.sigmoid(gate) * linear(inner, part.ffn.up)
        found.append(linear(own + linear(inner, part.ffn.down), part.project))
    return torch.stack(found)


def pooled(part, x, side):
    """One frame `[rows, cols, width]` to at most side x side tokens."""
    rows, cols = (windows(n, min(n, side)) for n in x.shape[:2])
    cells = [x[list(r)][:, list(c)].mean((0, 1)) for r in rows for c in cols]
    return torch.stack([two(cell, part.layers) for cell in cells])


def run(stage, layout, seed=0):
    """What a stage gives for two images of random features, and its one part."""
    x = torch.randn(2, layout.cells, WIDTH, generator=torch.Generator().manual_seed(seed))
    (part,) = stage.parts(OUT, (WIDTH, WIDTH)).values()
    teach(part)
    ctx = context(stage, features=x, grid=layout.places.cells())
    ctx._route = lambda x, name, *more: part(x, *more)
    with torch.no_grad():
        keep, merge, write = stage.reduce(ctx)
    order = write.order[0].masked_fill(~keep.mask[0], layout.cells)
    rows = order.argsort(stable=True)[: keep.counts[0]]
    assert keep.counts == keep.mask.sum(1).tolist()
    there = merge.into[0][merge.into[0] >= 0]
    assert set(there.tolist()) == set(rows.tolist())
    return x, part, write.values[:, rows], rows, ctx


def film(frames, grid=(4, 6)):
    return Layout((grid,) * frames, "end", video=True)


@torch.no_grad()
@pytest.mark.parametrize("layout", [PLAIN, TILED, VIDEO, film(2), film(5), film(14, (1, 2))],
                         ids=range(6))  # fmt: skip
@pytest.mark.parametrize("keep", [1, 4, 6, 7, 30])
def test_queries_read_what_the_loop_reads(layout, keep):
    """More queries than frames, fewer, and more than the picture has tokens."""
    x, part, made, rows, _ = run(CCAM.replace(keep=keep), layout)
    count = min(keep, layout.cells)
    frames = layout.places.cells().frame.tolist()
    assert len(rows) == count and rows.tolist() == sorted(rows.tolist())
    for i in range(2):
        equal(made[i], ccam(part, x[i], frames, count), f"image {i}", 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 6, 16, 96])
def test_as_many_tokens_for_any_number_of_frames_and_none_from_the_future(frames):
    """Another last frame changes the tokens of queries that stand in it, and no other one."""
    layout = film(frames, (2, 3))
    x, part, made, rows, ctx = run(CCAM, layout)
    assert len(rows) == 6
    assert ctx.remarks == (
        ["videoccam: one frame, of which every query sees all"] if frames == 1 else []
    )
    frame = layout.places.cells().frame
    other = x.clone()
    other[:, frame == frames - 1] += 1
    again = part(other, frame, 6)
    changed = (again - made).abs().amax((0, 2)) > 1e-6
    # Of six queries the ones that see frame number T of T.
    assert changed.tolist() == [math.ceil(Fraction((i + 1) * frames, 6)) == frames
                                for i in range(6)]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("layout, keep, total, sides", [
    (PLAIN, 9, 99, [3]), (PLAIN, 15, 99, [3]), (PLAIN, 64, 99, [8]), (PLAIN, 64, 10, [3]),
    (TILED, 9, 24, [3, 3]), (VIDEO, 16, 48, [4] * 3), (VIDEO, 16, 26, [2] * 3),
    (film(5), 16, 48, [3] * 5), (film(5), 4, 99, [2] * 5), (film(9), 16, 8, [1] * 9),
])  # fmt: skip
def test_frames_share_the_budget_and_are_pooled_as_in_the_loop(layout, keep, total, sides):
    stage = DynamicVLM(keep=keep, most=64, total=total)
    x, part, made, _, _ = run(stage, layout)
    for i in range(2):
        want, at = [], 0
        for (height, width), side in zip(layout.grids, sides, strict=True):
            frame = x[i, at : at + height * width].view(height, width, -1)
            want.append(pooled(part, frame, side))
            at += height * width
        equal(made[i], torch.cat(want), f"image {i}", 2e-5)


# In a model


def case(stage):
    """The prompt of LLaVA written anew with what the loops make of the oracle's own tower."""
    (part,) = bank_of(stage).values()

    def rows(reference, sample, kept):
        blocks = []
        for i, pixels in enumerate(sample.pixels):
            features = oracles.tower(reference, pixels).patches
            if isinstance(stage, VideoCCAM):
                made = ccam(part, features, [0] * 16, min(16, stage.keep))
            else:
                made = pooled(part, features.view(4, 4, -1), math.isqrt(stage.keep))
            own = kept[(kept >= 16 * i) & (kept < 16 * (i + 1))] - 16 * i
            blocks.append(oracles.Block(made, own.tolist(), []))
        return oracles.rebuilt(reference, sample, blocks, stage.positions or "compact")

    return Case(Plan([stage]).spec, rows)


@pytest.mark.parametrize("attn, kind, side", [("sdpa", "padded", "left"),
                                              ("eager", "padded", "right")])  # fmt: skip
@pytest.mark.parametrize("stage", [CCAM, CCAM.replace(keep=20, positions="original"), DYNAMIC,
                                   DYNAMIC.replace(keep=4, positions="original")],
                         ids=lambda s: f"{s.info.name}{s.keep}")  # fmt: skip
@torch.no_grad()
def test_the_model_sees_the_tokens_of_the_loops(stage, attn, kind, side, taught):  # noqa: F811
    check_logits(case(stage), attn, kind, side)


@BOTH
def test_decoding_is_as_without_a_cache(stage, taught):  # noqa: F811
    check_generate(case(stage), "sdpa", matrix.REPEATABLE, steps=6)


needs_early_videos = pytest.mark.skipif(not matrix.PRECOMPUTED, reason="videos are read later")
FAMILIES = ["llava", "llava_next", "gemma3", "qwen2_5_vl_video", "qwen3_vl_video",
            pytest.param("llava_onevision_video", marks=needs_early_videos)]  # fmt: skip


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone(family, stage, taught):  # noqa: F811
    """Videos of unequal length and pictures in one batch; each has at most its budget."""
    counts = check_family(family, stage)
    for s, own in zip(samples(family), counts, strict=True):
        most = [min(p.tokens, 6) if stage is CCAM else 24 for p in s.pictures]
        assert len(set(own)) == 1 and own[0] <= sum(most)
        assert stage is DYNAMIC or own[0] == sum(most)


@BOTH
@torch.no_grad()
def test_a_video_is_one_and_pictures_are_noted(stage, taught):  # noqa: F811
    """Of videos of 2 and 3 frames, and a picture among them."""
    family, said = "qwen2_5_vl_video", "videoccam: one frame, of which every query sees all"
    net = model(family)
    with mllm.patch(net, stage) as patched:
        for sizes, pictures in (((0,), (2,)), False), (((0,), (1, 2)), True):
            net(**collate(family, samples(family, [(own, 5) for own in sizes])))
            assert patched.ledger.notes.count(said) == int(pictures and stage is CCAM)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl_video"])
@BOTH
@torch.no_grad()
def test_the_ledger_is_what_torch_counts(family, stage):
    net = model(family, "eager")
    inputs = collate(family, samples(family, "alone"))
    with mllm.patch(net, stage) as patched, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)


@torch.no_grad()
def test_beside_stages_behind_it(taught):  # noqa: F811
    check_family("qwen2_5_vl_video", [CCAM, FastV(layer=2, keep=0.5)])
    check_family("llava", [DYNAMIC, DivPrune(keep=3)])


# Training


@BOTH
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl_video"])
def test_gradients_reach_everything(family, stage):
    """Checkpointing or not, the same ones."""
    stage = stage if stage is CCAM else stage.replace(train="keep")
    inputs = _inputs(family)
    loss, plain = _loss(_training(family), stage, inputs)
    for name, grad in plain.items():
        # All keys of an attention may move together: softmax does not see it.
        assert float(grad.abs().max()) > 0 or name.endswith("key.bias"), name
    again, checked = _loss(_training(family, False), stage, inputs)
    equal(again, loss, "loss", 1e-6)
    for name, grad in plain.items():
        equal(checked[name], grad, name, 1e-5 * max(1.0, float(grad.abs().max())))


@BOTH
def test_text_alone_gives_every_part_a_gradient(stage):
    net = _training()
    with mllm.patch(net, stage):
        net(**_inputs(kind="text")).loss.backward()
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name


def test_draws_of_frames_depend_on_seed_and_step_alone():
    net, inputs = _training(), _inputs()
    seed = Plan([DYNAMIC]).seed_for(0)
    with mllm.patch(net, DYNAMIC) as patched:
        seen = []
        for _ in range(8):
            torch.rand(1)
            net(**inputs)
            seen.append(len(patched.ledger.kept("llm")[0]))
        net.eval()(**inputs)
        assert len(patched.ledger.kept("llm")[0]) == 9
    drawn = [draw(range(1, 17), None, seed, step) for step in range(8)]
    assert seen == [math.isqrt(n) ** 2 for n in drawn] and len(set(seen)) > 1


# Adapters


@BOTH
def test_saved_and_loaded_bit_for_bit(stage, tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, stage) as patched:
        teach(net.mllm)
        trained = _logits(net, inputs)
        patched.save_adapter(tmp_path)
    other = model("llava")
    with mllm.patch(other, tmp_path):
        assert torch.equal(_logits(other, inputs), trained)


def test_one_adapter_serves_every_budget(tmp_path):
    net = model("llava")
    with mllm.patch(net, DYNAMIC) as patched:
        patched.save_adapter(tmp_path / "dynamic")
    for changes in (dict(keep=4), dict(total=4), dict(train="keep")):
        with mllm.patch(net, DYNAMIC.replace(**changes)) as patched:
            patched.load_adapter(tmp_path / "dynamic")
    with mllm.patch(net, CCAM) as patched:
        patched.save_adapter(tmp_path / "ccam")
    with mllm.patch(net, CCAM.replace(keep=5)) as patched:
        with pytest.raises(PlanError, match="another plan"):
            patched.load_adapter(tmp_path / "ccam")


# What is refused


@pytest.mark.parametrize("make, words", [
    (lambda: mllm.patch(model("llava"), CCAM.replace(heads=5)), "do not divide the width 24"),
    (lambda: mllm.patch(model("llava"), CCAM.replace(heads=0)), "do not divide"),
    (lambda: mllm.patch(model("llava"), [DYNAMIC, CCAM]), "needs the full grid"),
    (lambda: mllm.patch(model("qwen2_vl"), CCAM.replace(positions="compact")), "renumbered"),
    (lambda: VideoCCAM(keep=0), "keep"), (lambda: VideoCCAM(keep=0.5), "keep"),
    (lambda: DynamicVLM(keep=600), "not a trained budget"),
    (lambda: DynamicVLM(least=0), "least"), (lambda: DynamicVLM(least=9, most=4), "least"),
    (lambda: DynamicVLM(total=0), "total"),
])  # fmt: skip
def test_bad_input(make, words):
    with pytest.raises(PlanError, match=words):
        make()


def test_a_method_without_time_is_refused_before_weights_are_read(tmp_path):
    """Where the model takes videos as such, and there are some; elsewhere frames are pictures."""
    families.model("qwen2_5_vl").config.save_pretrained(tmp_path / "qwen")
    families.model("llava").config.save_pretrained(tmp_path / "llava")

    def check(name, plan, videos):
        records = [SimpleNamespace(seen=True, videos=n) for n in (0, videos)]
        data = SimpleNamespace(streamed=True, sample=lambda: iter(records))
        recipe = recipe_for(tmp_path / name, tmp_path / "run", plan=plan,
                            learning_rates={"vision_tower": 1e-5})  # fmt: skip
        preview.check(recipe, data, World())

    with pytest.raises(PlanError, match="avgpool cannot work on a video") as caught:
        check("qwen", "avgpool:keep=4", 1)
    assert caught.value.argument == "plan"
    for name, plan, videos in (("qwen", "avgpool:keep=4", 0), ("llava", "avgpool:keep=4", 1),
                               ("qwen", "pllava:frames=2", 1)):  # fmt: skip
        with pytest.raises(RecipeError, match="nothing of it is trained"):  # its next mistake
            check(name, plan, videos)
