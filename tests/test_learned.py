"""Learned compression before the LLM: `m3`, `mqt`, `tokenflex`, `tokenpacker`, against loops."""

from __future__ import annotations

import copy
import json
import math
import shutil

import matrix
import oracles
import pytest
import tiny
import torch
from families import collate, model, samples
from matrix import Case, check_generate, check_logits, equal
from safetensors.torch import load_file
from test_distributed import alone, check_as_one, needs_deepspeed, small  # noqa: F401
from test_recipes import recipe_for
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_tiny import save_small
from zoo import check_family, context

import mllm
from mllm.compressors import M3, MQT, TokenFLEX, TokenPacker, ToMe
from mllm.compressors.elastic import spread
from mllm.errors import PlanError
from mllm.eval.plans import make_plan, with_adapter
from mllm.plan import Plan
from mllm.routers.schedules import draw
from mllm.tokens import Layout
from mllm.training.run import run as train

FLEX = TokenFLEX(keep=4, counts=(1, 4, 9, 16))
QUERIES = MQT(keep=5, queries=9, heads=4)
PACK = TokenPacker(keep=4, heads=4)
PLAIN = Layout(((6, 8),))
TILED = Layout(((4, 4), (4, 7)), "rows")
VIDEO = Layout(((4, 6),) * 3, "end", video=True)
WIDTH, BLOCK, OUT = 12, 8, 6  # of what the projector gets, of a tower block, of the LLM


def teach(module: nn.Module, seed: int = 3) -> None:
    """Weights as if they were trained."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread_of = 0.3 if parameter.dim() > 1 else 0.1
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + spread_of * torch.randn(parameter.shape, generator=g))


# What a method is, in loops


def norm(x, layer):
    scale = (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / scale * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def two(x, layers):
    return linear(F.gelu(linear(x, layers[0])), layers[2])


def attend(part, query, keys, values):
    """One query `[width]` over `[n, width]`."""
    q, k, v = linear(query, part.query), linear(keys, part.key), linear(values, part.value)
    size = len(q) // part.heads
    found = []
    for h in range(part.heads):
        own = slice(h * size, (h + 1) * size)
        weights = (k[:, own] @ q[own] / math.sqrt(size)).softmax(0)
        found.append(weights @ v[:, own])
    return linear(torch.cat(found), part.out)


def windows(n, m):
    return [range(i * n // m, math.ceil((i + 1) * n / m)) for i in range(m)]


def flex(part, x, rows, cols):
    """One grid `[height, width, channels]` to rows x cols tokens."""
    height, width, _ = x.shape
    full = [math.ceil(height / rows) * rows, math.ceil(width / cols) * cols]
    x = F.interpolate(x.permute(2, 0, 1)[None], full, mode="bilinear", align_corners=True)[0]
    tall, wide = full[0] // rows, full[1] // cols
    found = []
    for r in range(rows):
        for c in range(cols):
            cell = x[:, r * tall : (r + 1) * tall, c * wide : (c + 1) * wide].mean((1, 2))
            y = norm(cell, part.norm)
            gate = linear(y, part.gate)
            found.append(linear(gate * torch.sigmoid(gate) * linear(y, part.up), part.down))
    return torch.stack(found)


def pack(part, x, rows, cols, width=WIDTH):
    height, wide, _ = x.shape
    features, levels = x[..., :width], x[..., width:]
    coarse = F.interpolate(
        features.permute(2, 0, 1)[None], (rows, cols), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    found = []
    for r, rr in enumerate(windows(height, rows)):
        for c, cc in enumerate(windows(wide, cols)):
            around = torch.stack([levels[i, j] for i in rr for j in cc])
            query = norm(linear(coarse[r, c], part.query), part.norm_query)
            key = norm(two(around, part.key), part.norm_key)
            value = norm(two(around, part.value), part.norm_value)
            found.append(two(attend(part.attention, query, key, value), part.project))
    return torch.stack(found)


def place(row, col, width):
    """Column first, then row; sines, then cosines."""
    quarter = width // 4
    wave = [10_000 ** -(i / quarter) for i in range(quarter)]
    return torch.tensor(
        [f(at * w) for at in (col, row) for f in (math.sin, math.cos) for w in wave]
    )


def resample(part, x, count):
    """One grid `[height, width, channels]` to as many tokens as there are queries."""
    height, wide, channels = x.shape
    side = math.isqrt(len(part.queries))
    places = torch.stack([place(r, c, channels) for r in range(side) for c in range(side)])
    square = places.view(side, side, -1).permute(2, 0, 1)[None]
    keys = F.interpolate(square, (height, wide), mode="bicubic", align_corners=False)
    keys = norm(keys[0].permute(1, 2, 0).reshape(-1, channels), part.norm_key)
    values = norm(x.reshape(-1, channels), part.norm_value)
    found = []
    for i in range(count):
        query = norm(part.queries[i] + places[i], part.norm_query)
        found.append(linear(attend(part.attention, query, keys, values), part.project))
    return torch.stack(found)


def run(stage, layout, seed=0):
    """What a stage gives for two images of random features, and its one part."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layout.cells, WIDTH + 4 * BLOCK, generator=g)
    (part,) = stage.parts(OUT, (WIDTH, BLOCK)).values()
    teach(part)
    ctx = context(
        stage, features=x[..., :WIDTH], levels=x[..., WIDTH:], grid=layout.places.cells()
    )
    ctx._route = lambda x, name, *more: part(x, *more)
    with torch.no_grad():
        keep, merge, write = stage.reduce(ctx)
    order = write.order[0].masked_fill(~keep.mask[0], layout.cells)
    rows = order.argsort(stable=True)[: keep.counts[0]]
    return x, part, keep, merge.into, write.values[:, rows], rows


#: Stage, layout, and of every grid its first token, its size, and that of its tokens.
CASES = [
    (FLEX, PLAIN, [(0, 6, 8, 1, 4)]),
    (TokenFLEX(keep=9, counts=(9,)), PLAIN, [(0, 6, 8, 2, 4)]),
    (TokenFLEX(keep=25, counts=(25,)), PLAIN, [(0, 6, 8, 4, 6)]),
    (TokenFLEX(keep=11, counts=(11,)), TILED, [(0, 4, 4, 2, 2), (16, 4, 7, 2, 3)]),
    (TokenFLEX(keep=18, counts=(18,)), VIDEO, [(0, 4, 6, 2, 3), (24, 4, 6, 2, 3),
                                               (48, 4, 6, 2, 3)]),
    (TokenPacker(keep=12, heads=4), PLAIN, [(0, 6, 8, 3, 4)]),
    (TokenPacker(keep=20, heads=2), PLAIN, [(0, 6, 8, 3, 6)]),
    (TokenPacker(keep=48, heads=2), PLAIN, [(0, 6, 8, 6, 8)]),
    (TokenPacker(keep=11, heads=4), TILED, [(0, 4, 4, 2, 2), (16, 4, 7, 2, 3)]),
    (TokenPacker(keep=18, heads=4), VIDEO, [(0, 4, 6, 2, 3), (24, 4, 6, 2, 3), (48, 4, 6, 2, 3)]),
    (MQT(keep=7, queries=9, heads=3), PLAIN, [(0, 6, 8, 7, 1)]),
    (MQT(keep=9, queries=9, heads=3), TILED, [(0, 4, 4, 3, 1), (16, 4, 7, 6, 1)]),
    (MQT(keep=2, queries=4, heads=3), VIDEO, [(0, 4, 6, 1, 1), (24, 4, 6, 1, 1)]),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("stage, layout, grids", CASES, ids=lambda x: getattr(x, "info", None)
                         and x.info.name)  # fmt: skip
def test_tokens_are_those_of_the_loops(stage, layout, grids):
    x, part, keep, into, made, rows = run(stage, layout)
    for i in range(2):
        want = []
        for start, height, width, r, c in grids:
            own = x[i, start : start + height * width].view(height, width, -1)
            if isinstance(stage, MQT):
                want.append(resample(part, own[..., :WIDTH], r * c))
            elif isinstance(stage, TokenFLEX):
                want.append(flex(part, own[..., :WIDTH], r, c))
            else:
                want.append(pack(part, own, r, c))
        want = torch.cat(want)
        assert keep.counts == [len(want)] * 2 == keep.mask.sum(1).tolist()
        equal(made[i], want, f"image {i}", 2e-5)
    there = into[0][into[0] >= 0]
    assert set(there.tolist()) == set(rows.tolist()) and torch.equal(into[0, rows], rows)
    flops = part.flops(*[x[:, :4, :WIDTH], (2, 2), 1] if isinstance(stage, MQT) else (
        [x[:, :4, :WIDTH]] if isinstance(stage, TokenFLEX) else
        [x[:, :1, :WIDTH], x[:, :4, WIDTH:], torch.zeros(1, 4, dtype=torch.long), None]
    ))  # fmt: skip
    assert flops > 0


def test_seats_of_queries_are_even_and_their_own():
    for tokens in (1, 2, 7, 16, 24, 576):
        for count in range(1, min(tokens, 40) + 1):
            seat, into = spread(tokens, count)
            assert len(set(seat.tolist())) == count and seat.tolist() == sorted(seat.tolist())
            gaps = seat.diff()
            assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1
            assert torch.equal(into[seat], seat) and set(into.tolist()) == set(seat.tolist())


# In a model


def _tokens(stage, size):
    """What the learnt part of `stage` makes of the oracle's own tower: a block for an image."""

    def block(reference, pixels, bank):
        features = oracles.tower(reference, pixels).patches.view(4, 4, -1)
        if isinstance(stage, M3):
            cells = oracles.cells(4, size)
            flat = oracles.project(reference, features.flatten(0, 1))
            return torch.stack([flat[cell].mean(0) for cell in cells])
        (part,) = bank.values()
        if isinstance(stage, MQT):
            return resample(part, features, stage.keep)
        if isinstance(stage, TokenFLEX):
            return flex(part, features, *size)
        net = reference.model.vision_tower
        net = getattr(net, "vision_model", net)
        states = net(pixels[None], output_hidden_states=True).hidden_states
        depth = len(net.encoder.layers)
        blocks = [min(depth - 1, round(share * depth)) for share in (11 / 24, 15 / 24, 21 / 24,
                                                                     22 / 24)]  # fmt: skip
        levels = [states[b + 1][0, 1:].view(4, 4, -1) for b in blocks]
        return pack(part, torch.cat([features, *levels], 2), *size, width=features.shape[2])

    return block


def case(stage, size, bank):
    """The prompt written anew with what the loops make."""
    make = _tokens(stage, size)

    def rows(reference, sample, kept):
        blocks = []
        for i, pixels in enumerate(sample.pixels):
            own = kept[(kept >= 16 * i) & (kept < 16 * (i + 1))] - 16 * i
            blocks.append(oracles.Block(make(reference, pixels, bank), own.tolist(), []))
        return oracles.rebuilt(reference, sample, blocks, stage.positions or "compact")

    spec = Plan([stage]).spec
    return Case(spec, rows)


STAGES = [
    (M3(keep=4, scales=(16, 4, 1)), (2, 2)),
    (FLEX, (2, 2)),
    (TokenFLEX(keep=9, counts=(9,), positions="original"), (3, 3)),
    (QUERIES, None),
    (PACK, (2, 2)),
    (TokenPacker(keep=9, heads=8), (3, 3)),
]


@pytest.fixture
def taught(monkeypatch):
    """Every model that is patched gets the same weights into what it learns."""
    inner = mllm.patch

    def patch(net, plan, **options):
        patched = inner(net, plan, **options)
        if patched.routers is not None:
            teach(net.mllm)
        return patched

    monkeypatch.setattr(mllm, "patch", patch)
    return patch


def bank_of(stage):
    net = matrix.fresh()
    with mllm.patch(net, stage) as patched:
        if patched.routers is None:
            return {}
        return copy.deepcopy(net.mllm._modules["0"])._modules


@pytest.mark.parametrize("attn, kind, side", [("sdpa", "padded", "left"),
                                              ("eager", "padded", "right")])  # fmt: skip
@pytest.mark.parametrize("stage, size", STAGES, ids=lambda x: getattr(x, "info", None)
                         and f"{x.info.name}{x.keep}")  # fmt: skip
@torch.no_grad()
def test_the_model_sees_the_tokens_of_the_loops(stage, size, attn, kind, side, taught):
    check_logits(case(stage, size, bank_of(stage)), attn, kind, side)


@pytest.mark.parametrize("stage, size", STAGES[::3], ids=lambda x: getattr(x, "info", None)
                         and x.info.name)  # fmt: skip
def test_decoding_is_as_without_a_cache(stage, size, taught):
    check_generate(case(stage, size, bank_of(stage)), "sdpa", matrix.REPEATABLE, steps=6)


FAMILIES = ["llava", "gemma3", "qwen2_5_vl", "llava_next", "internvl", "idefics3"]


@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("qwen3_vl", marks=pytest.mark.slow),
                                    pytest.param("llava_onevision", marks=pytest.mark.slow),
                                    "qwen2_5_vl_video"])  # fmt: skip
@pytest.mark.parametrize("stage", [FLEX, QUERIES, PACK], ids=lambda s: s.info.name)
def test_batched_equals_alone(family, stage, taught):
    """In every kind of layout and tower; a picture has at most its budget."""
    counts = check_family(family, stage)
    for sample, own in zip(samples(family), counts, strict=True):
        assert len(set(own)) == 1 and own[0] <= stage.keep * len(sample.pictures)
        assert bool(own[0]) == bool(sample.pictures)


def test_batched_equals_alone_m3():
    for family in ("qwen2_5_vl", "llava_next"):
        check_family(family, M3(keep=9))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
@torch.no_grad()
def test_what_is_projected_is_what_the_projector_was_given(family, taught):
    """By hooks on the unpatched model; where it joins patches by itself, their mean."""
    net = model(family)
    inputs = collate(family, samples(family, "alone"))
    (s,) = samples(family, "alone")
    rows, cols = s.pictures[0].grid
    given = []
    projector = mllm.models.resolve(net).projector
    handle = projector.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    net(**inputs)
    handle.remove()
    x = given[0].flatten(0, -2)
    if len(x) != rows * cols:  # joined by the projector
        join = math.isqrt(len(x) // (rows * cols))
        if family.startswith("qwen"):
            order = _token_order(rows, cols)
            x = x.unflatten(0, (-1, join**2)).mean(1)[order]
        else:
            x = x.view(rows, join, cols, join, -1).mean((1, 3)).flatten(0, 1)
    stage = TokenFLEX(keep=16, counts=(16,))
    entered = []
    handle = net.get_decoder().layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with mllm.patch(net, stage) as patched:
        (part,) = copy.deepcopy(net.mllm._modules["0"]).values()
        net(**inputs)
        kept = patched.ledger.kept("llm")[0]
        seen = patched.ledger.as_dict()["layers"][0]["visual"]
    handle.remove()
    want = flex(part, x.view(rows, cols, -1), *_within(16, rows, cols))
    assert seen == [len(want)] == [len(kept)]
    first = int(s.visual.nonzero()[0, 0])
    equal(entered[0][0, first : first + len(want)], want, family, 1e-4)


def _within(budget, rows, cols):
    r = max(1, min(rows, int((budget * rows / cols) ** 0.5 + 1e-9)))
    return r, min(cols, budget // r)


def _token_order(rows, cols):
    """Where the windows of Qwen2.5-VL put each token, worked out by hand: windows of 2 x 2."""
    places = [(r, c) for r in range(0, rows, 2) for c in range(0, cols, 2)]
    order = [
        (i, j)
        for r, c in places
        for i in range(r, min(r + 2, rows))
        for j in range(c, min(c + 2, cols))
    ]
    found = torch.empty(rows * cols, dtype=torch.long)
    for at, (i, j) in enumerate(order):
        found[i * cols + j] = at
    return found


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("stage", [FLEX, QUERIES, PACK], ids=lambda s: s.info.name)
@torch.no_grad()
def test_the_ledger_is_what_torch_counts(family, stage):
    """The model's projector costs nothing; the learnt one is in it."""
    net = model(family, "eager")
    inputs = collate(family, samples(family, "alone"))
    with mllm.patch(net, stage) as patched, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["selection_flops"][0] > 0 and any("knows nothing" in n for n in row["notes"])
    before = row["baseline_prefill_flops"][0]
    with mllm.patch(net, "stride:keep=1.0") as patched:
        net(**inputs)
        assert patched.ledger.as_dict()["prefill_flops"][0] == before
        assert patched.ledger.as_dict()["vision_flops"][0] > row["vision_flops"][0]


@torch.no_grad()
def test_the_model_is_what_it_was_afterwards():
    net = model("llava")
    inputs, names = collate("llava", samples("llava")), list(net.state_dict())
    plain = net(**inputs).logits
    with mllm.patch(net, FLEX):
        added = [name for name in net.state_dict() if name not in names]
        assert added and all(name.startswith("mllm.0.projector.") for name in added)
        assert not torch.equal(net(**inputs).logits, plain)
        assert not hasattr(copy.deepcopy(net), "mllm")
    assert list(net.state_dict()) == names and torch.equal(net(**inputs).logits, plain)


@torch.no_grad()
def test_beside_stages_behind_it(taught):
    check_family("llava", [FLEX, mllm.compressors.FastV(layer=2, keep=0.5)])
    check_family("llava", [QUERIES, mllm.compressors.DivPrune(keep=3)])


# What is refused


@pytest.mark.parametrize("make, words", [
    (lambda: M3(keep=64), "36 or 144"), (lambda: TokenFLEX(keep=100), "64 or 144"),
    (lambda: MQT(keep=300), "not a trained budget; nearest: 256"),
    (lambda: M3(weights=(1.0,)), "5 weights"),
    (lambda: TokenFLEX(weights=(0.0, 0.0, 0.0)), "3 weights"),
    (lambda: TokenFLEX(weights=(-1.0, 1.0, 1.0)), "3 weights"),
    (lambda: MQT(keep=2, queries=10), "a square number"),
    (lambda: MQT(queries=0), "nearest: none"), (lambda: M3(scales=()), "nearest: none"),
    (lambda: mllm.patch(model("llava"), MQT(heads=5)), "do not divide the width 32"),
    (lambda: mllm.patch(model("llava"), TokenPacker(keep=4, heads=3)), "do not divide"),
    (lambda: mllm.patch(model("llava"), [FLEX, QUERIES]), "needs the full grid"),
    (lambda: mllm.patch(model("llava"), [ToMe(keep=8), FLEX]), "needs all tokens of the tower"),
    (lambda: mllm.patch(model("qwen2_vl"), FLEX.replace(positions="compact")), "renumbered"),
])  # fmt: skip
def test_bad_input(make, words):
    with pytest.raises(PlanError, match=words):
        make()


# Training


def _inputs(family="llava", kind="padded"):
    inputs = collate(family, samples(family, kind))
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def _loss(net, stage, inputs, learnt=0):
    """Loss and gradients of what a plan learns, or of the language model."""
    net.zero_grad()
    with mllm.patch(net, stage) as patched:
        if patched.routers is not None:
            teach(net.mllm)
        patched.learnt = learnt
        loss = net(**inputs).loss
        loss.backward()
        trained = net.mllm if patched.routers is not None else net.model.language_model
        return loss.detach(), {n: p.grad.clone() for n, p in trained.named_parameters()}


def _training(family="llava", reentrant=None):
    net = model(family).train()
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return net


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("stage", [FLEX, QUERIES, PACK], ids=lambda s: s.info.name)
def test_gradients_reach_everything(family, stage):
    """Checkpointing or not, the same ones."""
    stage = stage if stage is PACK else stage.replace(train="keep")
    inputs = _inputs(family)
    loss, plain = _loss(_training(family), stage, inputs)
    for name, grad in plain.items():
        unused = name.endswith("queries")
        own = grad[: stage.keep] if unused else grad
        # All keys of an attention may move together: softmax does not see it.
        assert float(own.abs().max()) > 0 or name.endswith("key.bias"), name
        assert not unused or not grad[stage.keep :].any()
    again, checked = _loss(_training(family, False), stage, inputs)
    equal(again, loss, "loss", 1e-6)
    for name, grad in plain.items():
        equal(checked[name], grad, name, 1e-5 * max(1.0, float(grad.abs().max())))


def test_the_frozen_projector_and_the_tower_have_gradients():
    """Those of the projector are zero: other processes, with text alone, have none else."""
    net = _training()
    _loss(net, FLEX, _inputs())
    projector = list(net.model.multi_modal_projector.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in projector)
    tower = net.model.vision_tower.get_parameter
    names = [n for n, _ in net.model.vision_tower.named_parameters() if "layers.0" in n]
    assert any(tower(name).grad.abs().max() > 0 for name in names)


@pytest.mark.parametrize("stage", [FLEX, QUERIES, PACK], ids=lambda s: s.info.name)
def test_text_alone_gives_every_part_a_gradient(stage):
    net = _training()
    inputs = _inputs(kind="text")
    with mllm.patch(net, stage):
        net(**inputs).loss.backward()
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name


def test_m3_averages_the_loss_over_all_grids():
    stage = M3(keep=4, scales=(16, 4, 1))
    net, inputs = _training(), _inputs()
    every = [_loss(net, stage.replace(keep=k, train="keep"), inputs) for k in stage.scales]
    loss, grads = _loss(net, stage, inputs)
    equal(loss, torch.stack([own for own, _ in every]).mean(), "loss", 1e-6)
    for name, grad in grads.items():
        want = torch.stack([own[name] for _, own in every]).mean(0)
        equal(grad, want, name, 1e-5 * max(1.0, float(want.abs().max())))
    weighted = _loss(net, stage, inputs | {"num_items_in_batch": 18})[0]
    equal(weighted, loss * (inputs["labels"][:, 1:] != -100).sum() / 18, "a step's share", 1e-5)


@pytest.mark.parametrize("stage", [M3(keep=4, scales=(16, 4, 1), train="draw"), FLEX,
                                   QUERIES.replace(queries=16, keep=16)],
                         ids=lambda s: s.info.name)  # fmt: skip
def test_draws_depend_on_seed_and_step_alone(stage):
    """Whatever was drawn before, whatever torch's generators say; none in evaluation."""
    net, inputs = _training(), _inputs()

    def drawn(plan, first=0, steps=8, train=True):
        found = []
        net.train(train)
        with mllm.patch(net, plan) as patched:
            patched.learnt = first
            for _ in range(steps):
                torch.rand(1)
                net(**inputs)
                found.append(len(patched.ledger.kept("llm")[0]))
        return found

    seen = drawn(stage)
    trained, seed = stage.trained(), Plan([stage]).seed_for(0)
    assert seen == [draw(trained, stage.weights, seed, step) for step in range(8)]
    assert len(set(seen)) > 1 and drawn(stage, 3, 5) == seen[3:]
    assert drawn(Plan([stage], seed=5)) != seen
    assert set(drawn(stage, train=False)) == {stage.keep}
    assert set(drawn(stage.replace(train="keep"))) == {stage.keep}
    first = stage.trained()[0]
    only = tuple(float(n == first) for n in stage.trained())
    assert set(drawn(stage.replace(weights=only))) == {first}


def test_beside_lora(tmp_path):
    """As modules_to_save, saved and read again."""
    from peft import LoraConfig, get_peft_model

    net, inputs = _training(), _inputs()
    patched = mllm.patch(net, FLEX)
    options = dict(target_modules=r".*language_model.*(q_proj|v_proj)", r=2)
    wrapped = get_peft_model(net, LoraConfig(**options, modules_to_save=["mllm"]))
    wrapped(**inputs).loss.backward()
    learnt = [p for n, p in wrapped.named_parameters() if "mllm" in n and p.requires_grad]
    assert len(learnt) == 8 and all(p.grad.abs().max() > 0 for p in learnt)
    patched.save_adapter(tmp_path / "one")
    patched.save_adapter(tmp_path / "two", state=wrapped.state_dict())
    one, two = (tmp_path / n / "mllm_adapter.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# Adapters and budgets


def _logits(net, inputs):
    with torch.no_grad():
        return net(**inputs).logits


@pytest.mark.parametrize("stage", [FLEX, QUERIES, PACK], ids=lambda s: s.info.name)
def test_saved_and_loaded_bit_for_bit(stage, tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, stage) as patched:
        new = _logits(net, inputs)
        teach(net.mllm)
        trained = _logits(net, inputs)
        assert not torch.equal(new, trained)
        patched.save_adapter(tmp_path)
    other = model("llava")
    with mllm.patch(other, tmp_path) as patched:
        assert torch.equal(_logits(other, inputs), trained)
        assert not any("knows nothing" in note for note in patched.ledger.notes)


def test_one_adapter_serves_every_budget(tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, FLEX) as patched:
        teach(net.mllm)
        patched.save_adapter(tmp_path)
    for keep in FLEX.counts:
        own = FLEX.replace(keep=keep, train="keep")
        with mllm.patch(net, own):
            teach(net.mllm)
            want = _logits(net, inputs)
        with mllm.patch(net, own) as patched:
            patched.load_adapter(tmp_path)
            assert torch.equal(_logits(net, inputs), want)
            assert len(patched.ledger.kept("llm")[0]) == keep
        (plan,) = with_adapter([make_plan(Plan([own]).spec)], str(tmp_path))
        with mllm.patch(net, plan):
            assert torch.equal(_logits(net, inputs), want)


def test_what_is_not_free_is_refused(tmp_path):
    net = model("llava")
    with mllm.patch(net, FLEX) as patched:
        patched.save_adapter(tmp_path / "flex")
    with mllm.patch(net, PACK) as patched:
        patched.save_adapter(tmp_path / "pack")
    with mllm.patch(net, FLEX.replace(counts=(4, 9))) as patched:
        with pytest.raises(PlanError) as caught:
            patched.load_adapter(tmp_path / "flex")
        assert caught.value.argument == "plan"
    with mllm.patch(net, PACK.replace(keep=9)) as patched:
        with pytest.raises(PlanError, match="another plan"):
            patched.load_adapter(tmp_path / "pack")
    head = json.loads((tmp_path / "flex/mllm_adapter.json").read_text())
    assert head["tower_width"] == 32 and "learnt_sha256" in head
    (tmp_path / "flex/mllm_adapter.json").write_text(json.dumps(head | {"tower_width": 64}))
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, tmp_path / "flex")
    assert caught.value.argument == "tower_width" and not hasattr(net, "mllm")


def test_plans_that_an_adapter_is_for(tmp_path):
    with pytest.raises(PlanError, match="is no adapter"):
        with_adapter([make_plan("tokenflex")], str(tmp_path))
    with pytest.raises(PlanError, match="no plan has something to learn"):
        with_adapter([make_plan("none"), make_plan("random")], str(tmp_path))
    assert with_adapter([make_plan("tokenflex")], None)[0].folder is None


def test_a_sweep_takes_the_trained_budgets_and_names_the_others(tmp_path):
    from mllm.eval import sweep

    net = tiny.llava(side=8)
    stage = "tokenflex:counts=16/64"
    with mllm.patch(net, stage + ":keep=16") as patched:
        patched.save_adapter(tmp_path)
    entries, skipped = sweep.grid(net, [stage], (64, 20, 16), adapter=str(tmp_path))
    own = [e for e in entries if e.method == stage]
    assert [e.budget for e in own] == [64, 16] and all(e.plan.folder == tmp_path for e in own)
    assert all(e.plan.folder is None for e in entries if e.method != stage)
    assert [(s.method, s.budget) for s in skipped] == [(stage, 20)]
    assert "16 or 64" in skipped[0].reason
    names = [sweep.key(own[0], "color", "test", "x")]
    own[0].plan.folder = None
    assert sweep.key(own[0], "color", "test", "x") not in names


# Runs


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_draws(tmp_path):
    """To the same weights, of the model and of what the plan learns."""
    own = save_small(tmp_path / "small")
    plan = "tokenflex:counts=1/4/9/16"
    changes = {"plan": plan, "method": {"type": "full"}}
    train(recipe_for(own, tmp_path / "first", **changes))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("checkpoint-2", "model", "routers"):
        shutil.rmtree(tmp_path / "second" / name)
    record = json.loads((tmp_path / "second/run.json").read_text())
    (tmp_path / "second/run.json").write_text(json.dumps(record | {"status": "stopped"}))
    train(recipe_for(own, tmp_path / "second", **changes), resume=True)
    for name in ("mllm_adapter.safetensors", "model.safetensors"):
        first, second = (load_file(tmp_path / n / "model" / name) for n in ("first", "second"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "first/routers.png").exists(), "there is nothing to draw"
    seed = Plan.from_spec(plan).seed_for(0)
    assert len({draw((1, 4, 9, 16), None, seed, step) for step in range(2)}) == 2


@needs_deepspeed
@pytest.mark.slow
def test_two_processes_draw_and_train_as_one(small, tmp_path, alone):  # noqa: F811
    plan = "tokenflex:counts=4/9/16"
    cases = [(None, "full", plan), (3, "full", plan), (2, "lora", plan)]
    check_as_one(cases, 2, small, tmp_path, alone)
