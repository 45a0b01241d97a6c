"""DeepStack: tiles are read, put together and added where the card says, and booked."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import KITS, LAYERS, SPECS, collate, model, samples
from family_oracles import encode
from invariants import SILENT
from layer_oracle import Edits, run
from matrix import PRECOMPUTED, equal
from PIL import Image
from test_depth import MORE
from torch.utils.flop_counter import FlopCounterMode
from train_tiny import save_small

import mllm
from mllm.compressors import AvgPool, DeepStack, FastV, VisionZip
from mllm.errors import DataError, PlanError
from mllm.pre_llm import VisionRun
from mllm.training.recipe import validate
from mllm.training.run import run as run_recipe
from mllm.views import tiled

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3", "idefics3"]
PLAN = DeepStack(grid=(1, 2), start=1, interval=2)
WIDE = DeepStack(grid=(2, 2))


def tiles(family, kind, grid, seed=3):
    """Tiles of every picture of the samples, one list for each picture."""
    g = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    sizes = [size for own, _ in SPECS[kind] for size in own]
    return [[KITS[family].picture(size, g) for _ in range(count)] for size in sizes]


def given(family, found):
    """Tiles as arguments of a model."""
    fields = KITS[family].join([[tile for own in found for tile in own]])
    return {f"view_{name}": x for name, x in fields.items()}


def by_hand(family, s, found, stage):
    """What is added to the rows of one sample; `found` are the tiles of its pictures."""
    edit, stage = Edits(), stage.at_depth(LAYERS)
    rows, at = s.visual.nonzero()[:, 0].tolist(), 0
    high, wide = stage.grid
    layers = [stage.start + k * stage.interval for k in range(high * wide)]
    adds = {layer: torch.zeros(len(s.ids), model_width(family)) for layer in layers}
    for picture, own in zip(s.pictures, found, strict=True):
        n, m = picture.grid
        features = [made[0].view(n, m, -1) for made in encode(family, own)]
        for y in range(n * high):  # of the map
            for x in range(m * wide):
                tile = features[y // n * wide + x // m]
                token, sample = (y // high) * m + x // wide, (y % high) * wide + x % wide
                adds[layers[sample]][rows[at + token]] = tile[y % n, x % m]
        at += n * m
    edit.add = adds if s.pictures else {}
    return edit


def model_width(family):
    return model(family).get_decoder().config.hidden_size


def split(found, batch):
    parts = iter(found)
    return [[next(parts) for _ in s.pictures] for s in batch]


@pytest.mark.parametrize("stage", [PLAN, WIDE], ids=["wide", "square"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_its_description(family, stage):
    """Of a padded batch; and of tokens decoded behind a prompt, to which nothing is added."""
    net, batch, found = model(family), samples(family), tiles(family, "padded", stage.grid)
    inputs = collate(family, batch)
    mask = inputs["attention_mask"]
    with mllm.patch(net, stage) as patched:
        out = net(**inputs, **given(family, found))
        logits = tiny.per_sample(out.logits, mask)
        row = patched.ledger.as_dict()
        for token in MORE:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more = {"attention_mask": mask} if len(batch) > 1 else {}
            ids = token.expand(len(batch), 1)
            out = net(input_ids=ids, past_key_values=out.past_key_values, **more)
            logits = [torch.cat([x, out.logits[b, -1:]]) for b, x in enumerate(logits)]
    for b, (s, own) in enumerate(zip(batch, split(found, batch), strict=True)):
        want = run(family, s, by_hand(family, s, own, stage), MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))
    times = 1 + stage.grid[0] * stage.grid[1]
    base = row["baseline_prefill_flops"][0] - (row["prefill_flops"][0] - row["vision_flops"][0])
    assert row["vision_flops"][0] == pytest.approx(times * base)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_tiles_it_is_the_model(family):
    net, inputs = model(family), collate(family, samples(family))
    plain, answer = net(**inputs).logits, net.generate(**inputs, max_new_tokens=4)
    with mllm.patch(net, "deepstack"):
        assert torch.equal(net(**inputs).logits, plain)
        assert torch.equal(net.generate(**inputs, max_new_tokens=4), answer)


@torch.no_grad()
def test_tiles_that_say_nothing_change_nothing():
    """Bit for bit, if what the projector makes of them is zero."""
    net, inputs = model("llava"), collate("llava", samples("llava"))
    plain, calls = net(**inputs).logits, []
    handle = net.model.multi_modal_projector.register_forward_hook(
        lambda _, args, out: calls.append(out) or (None if len(calls) == 1 else out * 0)
    )
    with mllm.patch(net, WIDE):
        views = given("llava", tiles("llava", "padded", (2, 2)))
        assert torch.equal(net(**inputs, **views).logits, plain)
    handle.remove()
    assert len(calls) == 2 and len(calls[1]) == 12


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_generation(family):
    """With and without a cache, in beams, and as a sample alone."""
    net, found = model(family), tiles(family, "single", (2, 2))
    batch = samples(family, "single")
    inputs = {**collate(family, batch), **given(family, found)}
    options = dict(max_new_tokens=5, do_sample=False, suppress_tokens=SILENT)
    with mllm.patch(net, WIDE):
        answers = net.generate(**inputs, **options)
        assert torch.equal(answers, net.generate(**inputs, **options, use_cache=False))
        assert set(inputs) > {"view_pixel_values"}, "the caller's arguments are not touched"
        own = split(found, batch)
        for b, s in enumerate(batch):
            views = given(family, own[b]) if s.pictures else {}
            alone = net.generate(**collate(family, [s]), **views, **options)
            assert torch.equal(alone[0, -5:], answers[b, -5:])
        if PRECOMPUTED:  # transformers 5.17 repeats pictures for beams, and not their tiles
            beams = net.generate(**inputs, **options, num_beams=2)
            again = net.generate(**inputs, **options, num_beams=2, use_cache=False)
            assert torch.equal(beams, again)
    bare = {k: v for k, v in inputs.items() if not k.startswith("view_")}
    assert not torch.equal(net.generate(**bare, **options), answers)


@torch.no_grad()
def test_beside_stages_that_drop_tokens():
    """What is left of a picture gets what belongs to it."""
    net, (s,) = model("llava"), samples("llava", "alone")
    found = tiles("llava", "alone", (1, 2))
    for stage in [AvgPool(keep=4, positions="original"), FastV(layer=2, keep=0.5)]:
        with mllm.patch(net, [stage, PLAN] if stage.info.stage == "pre_llm" else [PLAN, stage]):
            together = net(**collate("llava", [s]), **given("llava", found)).logits
            without = net(**collate("llava", [s])).logits
        assert (together - without).abs().max() > 1e-3
    with mllm.patch(net, [FastV(layer=2, keep=0.5), PLAN]) as patched:
        logits = net(**collate("llava", [s]), **given("llava", found)).logits[0, -1]
        kept = patched.ledger.kept(2)[0]
    edit, gone = by_hand("llava", s, found, PLAN), s.visual.clone()
    gone[s.visual.nonzero()[kept, 0]] = False
    edit.drop[2] = gone
    want = run("llava", s, edit).logits[-1]
    equal(logits, want, "a cut between", 2e-4)


def test_the_projector_learns_from_tiles():
    """Its gradient is that of the loop's, with gradient checkpointing too."""
    net, batch = model("llava").train(), samples("llava")
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    views = given("llava", tiles("llava", "padded", (2, 2)))
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        with mllm.patch(net, WIDE):
            net.zero_grad()
            net(**inputs, **views, labels=labels, use_cache=False).loss.backward()
            grads.append(net.model.multi_modal_projector.linear_2.weight.grad.clone())
    with mllm.patch(net, WIDE):
        net.zero_grad()
        net(**inputs, labels=labels, use_cache=False).loss.backward()
        bare = net.model.multi_modal_projector.linear_2.weight.grad.clone()
    equal(grads[0], grads[1], "checkpointed", 1e-5)
    assert (grads[0] - bare).abs().max() > 1e-4


@torch.no_grad()
def test_flops_are_what_torch_counts():
    net, inputs = model("llava", "eager"), collate("llava", samples("llava", "alone"))
    with mllm.patch(net, WIDE) as patched:
        with FlopCounterMode(display=False) as counter:
            net(**inputs, **given("llava", tiles("llava", "alone", (2, 2))))
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize("family, found", [
    ("llava", lambda: tiles("llava", "alone", (2, 2))),  # for three pictures
    ("llava", lambda: tiles("llava", "padded", (1, 2))),
    ("qwen2_5_vl", lambda: tiles("qwen2_5_vl", "padded", (2, 2))[::-1]),
    ("llava_next", lambda: tiles("llava_next", "padded", (2, 2))),
])  # fmt: skip
def test_tiles_that_do_not_fit(family, found):
    net = model(family)
    with mllm.patch(net, WIDE), pytest.raises(DataError) as caught:
        net(**collate(family, samples(family)), **given(family, found()))
    assert caught.value.argument == "view_pixel_values"


def test_tiles_of_another_processor():
    net, inputs = model("llava"), collate("llava", samples("llava", "alone"))
    with mllm.patch(net, WIDE), pytest.raises(DataError, match="another model's processor"):
        net(**inputs, view_pixel_values=torch.zeros(4, 588))


@pytest.mark.parametrize("bad, argument", [
    (dict(grid=(2,)), "grid"), (dict(grid=(0, 2)), "grid"), (dict(grid=(3, 2)), "grid"),
    (dict(start=1), "start"), (dict(start=-1), "start"), (dict(interval=0), "interval"),
    (dict(positions="compact"), "positions"), (dict(interval=2), "grid"),
])  # fmt: skip
def test_bad_values(bad, argument):
    with pytest.raises(PlanError) as caught:
        mllm.patch(model("llava"), DeepStack(**bad))
    assert caught.value.argument == argument


@pytest.mark.parametrize("plan", [
    [VisionZip(keep=4), DeepStack()], "downsample:keep=4+deepstack", "tome:keep=8+deepstack",
    "deepstack+deepstack:grid=1/2",
])  # fmt: skip
def test_stages_that_it_cannot_stand_beside(plan):
    with pytest.raises(PlanError) as caught:
        mllm.patch(model("llava"), plan)
    assert caught.value.argument == "plan"


def test_a_model_that_stacks_by_itself():
    with pytest.raises(PlanError, match="by itself"):
        mllm.patch(model("qwen3_vl"), DeepStack())


class _Pictures:
    """An image processor that hands pictures on."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": images}


def test_tiles_of_a_picture():
    """Each is a part of it, in reading order, as large as the whole."""
    picture = Image.new("RGB", (40, 60))
    colours = [(i * 40, 0, 0) for i in range(6)]
    for i, colour in enumerate(colours):
        picture.paste(colour, (i % 2 * 20, i // 2 * 20, i % 2 * 20 + 20, i // 2 * 20 + 20))
    processor = type("Processor", (), {"image_processor": _Pictures()})
    ((name, made),) = tiled(processor, [picture, picture], grid=(3, 2)).items()
    assert name == "view_pixel_values" and len(made) == 12
    assert {tile.size for tile in made} == {(40, 60)}
    assert [tile.getpixel((20, 30)) for tile in made[:6]] == colours
    with pytest.raises(DataError):
        tiled(processor, [])


def test_recipes_give_tiles(tmp_path, monkeypatch):
    """Two pictures of a batch, and two tiles of each."""
    small, seen = save_small(tmp_path / "small"), []
    add = VisionRun.add_views
    monkeypatch.setattr(
        VisionRun, "add_views", lambda self, x, of, grid: (
            seen.append((len(x), grid)) or add(self, x, of, grid)
        ),
    )  # fmt: skip
    recipe = validate({
        "version": 1, "model": {"path": str(small), "dtype": "float32"},
        "plan": "deepstack:grid=1/2", "method": {"type": "lora", "r": 4},
        "data": [{"path": "yardstick", "tasks": ["exist"], "limit": 4}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 2},
        "output": {"dir": str(tmp_path / "run")},
    })  # fmt: skip
    assert run_recipe(recipe)["status"] == "complete"
    assert seen == [(4, (1, 2))]
