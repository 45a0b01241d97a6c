"""Every family: identity, dropping equals masking, batched equals alone, FLOPs, refusals."""

from __future__ import annotations

import functools
import inspect

import oracles
import pytest
import tiny
import torch
import transformers as hf
from families import KITS, LAYERS, Sample, collate, model, pairwise, reference, samples
from family_oracles import (
    PER_TOKEN,
    as_tokens,
    avgpool,
    base_name,
    dense,
    features,
    positions,
    seen,
    smaller,
    visionzip,
)
from matrix import CLOSE_CALL, PRECOMPUTED, equal
from oracles import Cut
from test_flops import counted

import mllm
from mllm import masks
from mllm.errors import DataError, PlanError
from mllm.models import base, gemma3, resolve
from mllm.models.base import Family
from mllm.models.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from mllm.pre_llm import VisionRun
from mllm.tokens import TokenTable

#: Videos go by names of their own; some of their prompts have an image too.
VIDEOS = [f for f in KITS if f.endswith("_video") and ("qwen" in f or PRECOMPUTED)]
FAMILIES = [f for f in KITS if not f.endswith("_video")]
family_ = pytest.mark.parametrize("family", FAMILIES)
ANY = [*FAMILIES, *VIDEOS]
any_ = pytest.mark.parametrize("family", ANY)
ATTN = ["sdpa", "eager"]
attn_ = pytest.mark.parametrize("attn", ATTN)
LAYOUTS = ["alone-left", "padded-left", "padded-right"]

IDENTITY = [
    "random:keep=1.0:positions=original",
    "divprune:keep=1.0",
    "visionzip:keep=1.0:cls=false:positions=original",
    "avgpool:keep=1.0",
    "downsample:keep=1.0",
    "fastv:layer=2:keep=1.0",
    "stride:keep=1.0+fastv:layer=2:keep=1.0+fastv:layer=3:keep=1.0",
]
#: Plans that only drop: their spec and their cuts in the decoder.
DROPS = {
    "random:keep=0.5:positions=original": [],
    "divprune:keep=3": [],
    "fastv:layer=2:keep=0.5": [Cut(2, 0.5)],
    "stride:keep=3:positions=original+fastv:layer=2:keep=2": [Cut(2, 2)],
    "fastv:layer=2:keep=0.5+fastv:layer=3:keep=1": [Cut(2, 0.5), Cut(3, 1)],
    "fastv:layer=1:keep=0.5+fastv:layer=2:keep=2": [Cut(1, 0.5), Cut(2, 2)],
}
#: Plans that change what stands at the rows that stay.
CHANGES = ["visionzip:keep=4", "avgpool:keep=4", "downsample:keep=4"]


def fields_of(family: str) -> dict[str, torch.Tensor]:
    """What a processor gives for one picture."""
    return KITS[family].picture(0, torch.Generator()).fields


def refused(family: str, spec: str) -> bool:
    """Whether the family says that it cannot run a plan."""
    from mllm.models import families

    names = {"avgpool": "Pool", "downsample": "Resize"}
    early, name = family.startswith("qwen3_vl") and "layer=1" in spec, names.get(spec.split(":")[0])
    if family in VIDEOS:
        return early or name is not None
    return early or name in families()[base_name(family)].refuses


def possible(family: str, spec: str, **rest) -> bool:
    return not refused(family, spec)


def compact(family: str, spec: str) -> bool:
    """Whether pre-LLM stages of the plan run on without gaps."""
    return not KITS[family].mrope and "original" not in spec and not spec.startswith("fastv")


@pairwise(possible, family=ANY, spec=IDENTITY, attn=ATTN, layout=[*LAYOUTS, "text-left"])
@torch.no_grad()
def test_identity(family, spec, attn, layout):
    kind, side = layout.split("-")
    inputs = collate(family, samples(family, kind), side)
    net = model(family, attn)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                   output_logits=True)
    real = inputs["attention_mask"].bool()
    plain = net(**inputs).logits[real]
    answer = net.generate(**inputs, **options)
    with mllm.patch(net, spec) as patched:
        assert torch.equal(net(**inputs).logits[real], plain)
        ledger = patched.ledger.as_dict()
        mine = net.generate(**inputs, **options)
    assert torch.equal(mine.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, answer.logits, strict=True))
    assert ledger["kept_llm"] == ledger["visual_tokens"]
    assert ledger["images"] == [len(s.pictures) for s in samples(family, kind)]
    assert torch.equal(net(**inputs).logits[real], plain), "removed without a trace"


def check(family, spec, sample, logits, kept, entering, more=None):
    """Logits of text rows and the sets that enter each layer are those of the oracle."""
    want = dense(
        family, sample, more, cuts=DROPS[spec], kept=kept, compact=compact(family, spec)
    )
    if entering is not None:
        assert [e.tolist() for e in entering] == [e.tolist() for e in want.entering]
    if more is not None:
        return equal(logits, want.logits[len(sample.ids) - 1 : -1], "steps")
    text = ~sample.visual
    equal(logits[text], want.logits[text], "text rows")
    there = sample.visual & want.alive
    equal(logits[there], want.logits[there], "visual rows")
    assert not logits[sample.visual & ~want.alive].any()


@pairwise(possible, family=ANY, spec=list(DROPS), attn=ATTN, layout=LAYOUTS)
@torch.no_grad()
def test_dropping_is_masking(family, spec, attn, layout):
    kind, side = layout.split("-")
    batch = samples(family, kind)
    inputs = collate(family, batch, side)
    net = model(family, attn)
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        ledger = patched.ledger
    for b, sample in enumerate(batch):
        entering = [ledger.kept(i)[b] for i in range(LAYERS)]
        check(family, spec, sample, logits[b], entering[0], entering)


@pairwise(possible, family=ANY, spec=list(DROPS), attn=ATTN, kind=["alone", "padded"])
@torch.no_grad()
def test_generation(family, spec, attn, kind, steps=10):
    batch = samples(family, kind)
    inputs = collate(family, batch)
    net = model(family, attn)
    with mllm.patch(net, spec) as patched:
        out = net.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )
        kept = patched.ledger.kept("llm")
    logits = torch.stack(out.logits, 1)
    for b, sample in enumerate(batch):
        check(family, spec, sample, logits[b], kept[b], None, out.sequences[b, -steps:])


@pairwise(possible, family=ANY, spec=[*DROPS, *CHANGES], attn=ATTN)
@torch.no_grad()
def test_batched_equals_alone(family, spec, attn):
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family, attn)
    with mllm.patch(net, spec) as patched:
        together = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept(LAYERS - 1)
        answers = net.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
        for b, sample in enumerate(batch):
            single = collate(family, [sample])
            equal(together[b], net(**single).logits[0], f"sample {b}")
            if sample.pictures:
                assert patched.ledger.kept(LAYERS - 1)[0].tolist() == kept[b].tolist()
            out = net.generate(**single, max_new_tokens=8, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)
            best = torch.stack(out.logits, 1)[0].topk(2, -1).values
            clear = (best[:, 0] - best[:, 1] > CLOSE_CALL).int().cumprod(0).bool()
            assert torch.equal(out.sequences[0, -8:][clear], answers[b][clear])


@any_
@torch.no_grad()
def test_divprune_chooses_per_image(family):
    batch = samples(family)
    net = model(family)
    with mllm.patch(net, "divprune:keep=3") as patched:
        net(**collate(family, batch))
        kept = patched.ledger.kept("llm")
    for b, sample in enumerate(batch):
        want, at = [], 0
        for picture, x in zip(sample.pictures, features(family, sample), strict=True):
            cells = KITS[family].cells(picture)
            want += [at + cells[t] for t in oracles.divprune(x[cells], 3)]
            at += picture.tokens
        extra = KITS[family].separators(sample, want)
        assert kept[b].tolist() == sorted(want + extra)


@attn_
@pytest.mark.parametrize("method", ["visionzip", "avgpool"])
@any_
@torch.no_grad()
def test_merging_is_rebuilding(family, method, attn):
    """What is written at the rows that stay, worked out picture by picture."""
    spec = f"{method}:keep=4:positions=original"
    if family in PER_TOKEN and method == "visionzip":
        pytest.skip("VisionZip works before the projector there: see the engine's own tests")
    if refused(family, spec):
        pytest.skip("the family refuses it")
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family, attn)
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept("llm")
    for b, sample in enumerate(batch):
        vectors, want, at = [], [], 0
        for i, (picture, x) in enumerate(
            zip(sample.pictures, features(family, sample), strict=True)
        ):
            own = [t - at for t in kept[b].tolist() if at <= t < at + picture.tokens]
            if method == "avgpool":
                x = avgpool(x, picture.grid, own)
            else:
                cells = KITS[family].cells(picture)
                own, merged = visionzip(x[cells], seen(family, sample, i), 4)
                x[cells], own = merged, [cells[t] for t in own]
            vectors.append(x)
            want += [at + t for t in own]
            at += picture.tokens
        if method == "visionzip":
            assert kept[b].tolist() == sorted(want + KITS[family].separators(sample, want))
        result = dense(
            family, sample, kept=kept[b], vectors=torch.cat(vectors) if vectors else None
        )
        equal(logits[b][~sample.visual], result.logits[~sample.visual], f"sample {b}")


@any_
@torch.no_grad()
def test_beams_share_their_images(family):
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    options = dict(max_new_tokens=6, num_beams=2, do_sample=False, length_penalty=0.0)
    if "mm_encoder_outputs" not in inspect.signature(net.forward).parameters:
        pytest.skip("this transformers repeats the images of a batch in another order")
    if family in ("glm4v_video", "glm46v_video"):
        pytest.skip("refused: see test_family_traits")
    with mllm.patch(net, "divprune:keep=3+fastv:layer=2:keep=0.5"):
        together = net.generate(**inputs, **options)[:, -6:]
        for b, sample in enumerate(batch):
            alone = net.generate(**collate(family, [sample]), **options)[0, -6:]
            assert torch.equal(together[b], alone)


@any_
@torch.no_grad()
def test_the_oracle_is_the_model(family):
    batch = samples(family)
    inputs = collate(family, batch)
    logits = tiny.per_sample(reference(family)(**inputs).logits, inputs["attention_mask"])
    for mine, sample in zip(logits, batch, strict=True):
        equal(mine, dense(family, sample).logits, "unpatched", 1e-5)


@pytest.mark.parametrize("spec", [*DROPS, "visionzip:keep=4"])
@family_
@torch.no_grad()
def test_the_choice_shows(family, spec):
    """The comparison with the oracle means something: the plan moves the logits."""
    if refused(family, spec):
        pytest.skip("the family refuses it")
    inputs = collate(family, samples(family, "alone"))
    net = model(family)
    plain = net(**inputs).logits[:, -1]
    with mllm.patch(net, spec):
        assert (net(**inputs).logits[:, -1] - plain).abs().max() > 0.01


COSTS = ["divprune:keep=1.0", "divprune:keep=3", "visionzip:keep=4", "avgpool:keep=4",
         "downsample:keep=4", "fastv:layer=2:keep=0.5",
         "stride:keep=3:positions=original+fastv:layer=2:keep=2"]  # fmt: skip


@pytest.mark.parametrize("spec", COSTS)
@any_
@torch.no_grad()
def test_flops_are_those_counted(family, spec):
    """Tower, projector, decoder, head and selection under eager; one picture, two unequal ones."""
    if refused(family, spec):
        pytest.skip("the family refuses it")
    net = model(family, "eager")
    alone = family in ("mistral3", "lighton_ocr")  # which says that it counts every picture alone
    for sample in samples(family, [((0,), 6), ((1,) if alone else (1, 2), 9)]):
        inputs = collate(family, [sample])
        plain = counted(lambda inputs=inputs: net(**inputs, logits_to_keep=1))
        with mllm.patch(net, spec) as patched:
            measured = counted(lambda inputs=inputs: net(**inputs, logits_to_keep=1))
        data = patched.ledger.as_dict()
        assert data["prefill_flops"] == [pytest.approx(measured, rel=1e-9)]
        assert data["baseline_prefill_flops"] == [pytest.approx(plain, rel=1e-9)]


@any_
@torch.no_grad()
def test_kv_bytes_are_those_stored(family):
    inputs = collate(family, samples(family))
    net = model(family)

    def stored() -> int:
        layers = net(**inputs, use_cache=True).past_key_values.layers
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))

    plain = stored()
    for spec in ("divprune:keep=3", "fastv:layer=2:keep=0.5"):
        with mllm.patch(net, spec) as patched:
            bytes_ = stored()
            data = patched.ledger.as_dict()
        assert data["kv_bytes"] == bytes_ < plain
        assert data["baseline_kv_bytes"] == plain


@any_
@torch.no_grad()
def test_tower_signals_reach_their_tokens(family):
    """Windows, merged patches, tiles: several images of one call, against one by one."""
    own = resolve(model(family))
    batch = samples(family)
    if family in VIDEOS:
        own = own.of_videos()
        batch = [Sample(s.ids, [p for p in s.pictures if p.frames]) for s in batch]
    pictures = [p for sample in batch for p in sample.pictures]
    layouts = own.layouts(KITS[family].join([sample.pictures for sample in batch]))
    assert [layout.tokens for layout in layouts] == [p.tokens for p in pictures]
    signals = [torch.randn(own.patches(layout), 3) for layout in layouts]
    rows = own.to_rows(torch.cat(signals), layouts).split([p.tokens for p in pictures])
    for mine, signal, picture in zip(rows, signals, pictures, strict=True):
        tiles = signal.view(-1, 16, 3) if family.startswith("llava_") else signal[None]
        tiles = tiles[:1] if picture.end and not picture.frames else tiles
        want = as_tokens(family, reference(family), tiles, picture)
        equal(mine[KITS[family].cells(picture)], want, "cells", 1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not refused(f, "downsample")])
@torch.no_grad()
def test_downsampling_is_a_smaller_picture(family):
    """The unpatched model's features of smaller pictures, at the seats that the plan reports."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    with mllm.patch(net, "downsample:keep=4:positions=original") as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept("llm")
    for b, sample in enumerate(batch):
        vectors, at = [torch.zeros(0, 48)], 0
        for picture in sample.pictures:
            seats = kept[b][(kept[b] >= at) & (kept[b] < at + picture.tokens)] - at
            vectors.append(torch.zeros(picture.tokens, 48))
            vectors[-1][seats] = smaller(family, picture, seats.tolist())
            at += picture.tokens
        want = dense(family, sample, kept=kept[b], vectors=torch.cat(vectors)).logits
        equal(logits[b][~sample.visual], want[~sample.visual], f"sample {b}")


def strange(family: str, what: str) -> dict[str, torch.Tensor]:
    """What the processor of another model gives."""
    inputs = collate(family, samples(family, "padded"))
    if what == "token":
        inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE] = 9
    elif what == "placeholders":
        inputs["input_ids"][inputs["input_ids"] == 8] = tiny.IMAGE
    elif what == "pictures":
        other = "llava" if KITS[family].mrope else "qwen2_vl"
        inputs["pixel_values"] = collate(other, samples(other))["pixel_values"]
    elif what == "fewer":
        fewer = KITS[family].join([[s.pictures[0]] for s in samples(family)[:2]])
        inputs |= fewer
    if KITS[family].mrope:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).int()
    return inputs


@pytest.mark.parametrize("what", ["token", "placeholders", "pictures", "fewer"])
@family_
@torch.no_grad()
def test_another_models_processor(family, what):
    """A clear error, and the model works on, patched and after."""
    good = collate(family, samples(family))
    net = model(family)
    plain = net(**good).logits
    with mllm.patch(net, "divprune:keep=3+fastv:layer=2:keep=0.5") as patched:
        want = net(**good).logits
        for call in (net, functools.partial(net.generate, max_new_tokens=2)):
            with pytest.raises(DataError) as caught:
                call(**strange(family, what))
            assert caught.value.argument and caught.value.expected
        assert torch.equal(net(**good).logits, want)
        assert patched.ledger.as_dict()["images"] == [1, 2, 0]
    assert torch.equal(net(**good).logits, plain)


SIZED = ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3",
         "lighton_ocr", "glm4v", "glm46v"]  # fmt: skip


@pytest.mark.parametrize("family", SIZED)
@torch.no_grad()
def test_a_picture_without_its_size(family):
    net = model(family)
    inputs = collate(family, samples(family, "alone"))
    name = next(k for k in fields_of(family) if k != "pixel_values")
    size = inputs.pop(name)
    with mllm.patch(net, "divprune:keep=3"):
        with pytest.raises(DataError, match="another model") as caught:
            net(**inputs)
        assert caught.value.argument == name
        net(**inputs, **{name: size})


@torch.no_grad()
def test_decoders_and_towers_that_are_refused():
    net = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=model("llava").config.vision_config, image_token_id=tiny.IMAGE,
            text_config=hf.MistralConfig(
                hidden_size=48, intermediate_size=96, num_hidden_layers=2, vocab_size=96,
                num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
            ),
        )
    )  # fmt: skip
    with pytest.raises(PlanError, match="do not see everything"):
        mllm.patch(net, "divprune:keep=3")
    net.config.text_config.sliding_window = None
    mllm.patch(net, "divprune:keep=3").remove()
    net = model("llava_onevision")
    net.config.vision_feature_select_strategy = "default"
    with pytest.raises(PlanError, match="first patch"):
        mllm.patch(net, "divprune:keep=3")


@pytest.mark.parametrize("family", [f for f in FAMILIES if KITS[f].mrope])
@torch.no_grad()
def test_positions_of_rows_and_columns(family):
    net = model(family)
    for spec in ("divprune:keep=3:positions=compact", "fastv:layer=2:keep=2:positions=compact"):
        with pytest.raises(PlanError, match="renumbered"):
            mllm.patch(net, spec)
    with mllm.patch(net, "divprune:keep=3") as patched:
        net(**collate(family, samples(family, "alone")))
        assert any("positions=original" in note for note in patched.ledger.notes)


@torch.no_grad()
def test_no_cut_before_added_features():
    net = model("qwen3_vl")
    with pytest.raises(PlanError, match="still adds features"):
        mllm.patch(net, "fastv:layer=1:keep=2")
    with mllm.patch(net, "fastv:keep=2") as patched:
        assert patched.plan.stages[0].layer == 2


@attn_
@any_
@torch.no_grad()
def test_a_second_turn_with_an_image(family, attn):
    """Rows of both turns see each other as if the conversation were one prompt."""
    first, second = (samples(family, "alone", seed)[0] for seed in (1, 5))
    both = Sample(torch.cat([first.ids, second.ids]), first.pictures + second.pictures)
    more, n, start = torch.tensor([11, 12]), len(both.ids), len(first.ids)
    position = positions(family, both, n + 2)
    net = model(family, attn)
    two = collate(family, [second])
    two["attention_mask"] = torch.ones(1, n, dtype=torch.long)
    if "token_type_ids" in two:
        two["token_type_ids"] = both.visual.int()[None]
    if family == "paligemma":  # the prefix was the first turn
        two["token_type_ids"] = torch.ones(1, n, dtype=torch.long)
    later = {}
    if KITS[family].mrope:
        two["position_ids"] = position[:, None, start:n]
        later["position_ids"] = position[:, None, n:]
    with mllm.patch(net, "divprune:keep=3:positions=original") as patched:
        cache = net(**collate(family, [first]), use_cache=True).past_key_values
        kept = patched.ledger.kept("llm")[0]
        answer = net(**two, past_key_values=cache).logits[0]
        kept = torch.cat([kept, patched.ledger.kept("llm")[0] + int(first.visual.sum())])
        ones = torch.ones(1, n + 2, dtype=torch.long)
        steps = net(
            input_ids=more[None], attention_mask=ones, past_key_values=cache, **later
        ).logits[0]
    prefix = start if family == "paligemma" else None
    want = dense(family, both, more, kept=kept, first=prefix).logits
    text = ~second.visual
    equal(answer[text], want[start:n][text], "second turn")
    equal(steps, want[n:], "after it")


@torch.no_grad()
def test_windows_are_told(monkeypatch):
    """A score read in a window says so; a kernel that counts slots is refused."""
    net = model("gemma3")
    with mllm.patch(net, "fastv:layer=2:keep=2") as patched:
        net(**collate("gemma3", samples("gemma3", "alone")))
        assert any("layer 1 of Gemma3" in note for note in patched.ledger.notes)
    with mllm.patch(net, "fastv:layer=3:keep=2") as patched:
        net(**collate("gemma3", samples("gemma3", "alone")))
        assert not any("further back" in note for note in patched.ledger.notes)
    monkeypatch.setattr(mllm.compat, "attention_name", lambda module: "flash_attention_2")
    with pytest.raises(PlanError, match="stored slots"):
        mllm.patch(net, "divprune:keep=3")


def slots_for_windows(mp):
    """Windows in stored slots: what is left of a pruned prompt seems near."""
    original = masks.of_kind

    def mask(run, layer, given):
        held, run.held = run.held, list(run.held)
        if held and (table := held[layer]) is not None:
            near = run.past_logical - torch.arange(table.slots, 0, -1)
            run.held[layer] = table.with_columns(logical=near.expand(table.valid.shape))
        try:
            return original(run, layer, given)
        finally:
            run.held = held

    mp.setattr(masks, "of_kind", mask)


def causal_blocks(mp):
    """Rows of an image see only what is before them."""
    original = masks.of_kind

    def mask(run, layer, given):
        if given is not None and given.shape[2] > 1:
            rows = torch.arange(given.shape[2])
            given = (given if given.dtype == torch.bool else given == 0) & (
                rows[:, None] >= rows[None] + given.shape[2] - given.shape[3]
            )
        return original(run, layer, given)

    mp.setattr(masks, "of_kind", mask)


def one_rope(mp):
    """All layers turn as those of the first kind."""
    mp.setattr(Family, "rotary", lambda self, hidden, position, kind: self.decoder.rotary_emb(
        hidden, position, *(["sliding_attention"] if kind else [])))  # fmt: skip


def windows_left_permuted(mp):
    mp.setattr(Qwen25VL, "to_rows", Qwen2VL.to_rows)


def first_patch_of_a_token(mp):
    """One patch speaks for all that the projector joins."""
    for owner in (base, gemma3):
        mp.setattr(owner, "join_patches", lambda signal, layouts, side: torch.cat(
            [signal.unflatten(0, (-1, side**2))[:, 0]]))  # fmt: skip
    mp.setattr(Qwen2VL, "to_rows", lambda self, signal, layouts: signal[:: self.merge**2])


def deepstack_of_other_tokens(mp):
    """Added features of the first tokens go to the rows that stay."""

    def take(self, arguments, rows, valid):
        there = arguments["visual_pos_masks"].gather(1, rows) & valid
        arguments["visual_pos_masks"] = there
        arguments["deepstack_visual_embeds"] = [
            x[: int(there.sum())] for x in arguments["deepstack_visual_embeds"]
        ]

    mp.setattr(Qwen3VL, "take_rows", take)


def separators_dropped(mp):
    mp.setattr(VisionRun, "_keep_newlines", lambda self: self.reduction.keep.logical_and_(
        ~torch.cat([x.places.newline for x in self.reduction.layouts])))  # fmt: skip
    mp.setattr(TokenTable, "with_newlines", lambda self, keep, *_: keep & ~self.newline)


CUT, RANDOM = "fastv:layer=2:keep=0.5", "random:keep=0.5:positions=original"


@pytest.mark.parametrize(
    "mutate, family, check",
    [
        (slots_for_windows, "gemma3", lambda: test_generation("gemma3", RANDOM, "sdpa", "alone")),
        (causal_blocks, "gemma3",
         lambda: test_dropping_is_masking("gemma3", CUT, "sdpa", "alone-left")),
        (one_rope, "gemma3", lambda: test_compact_cut_of_hybrid_layers("sdpa")),
        (windows_left_permuted, "qwen2_5_vl",
         lambda: test_tower_signals_reach_their_tokens("qwen2_5_vl")),
        *(
            (first_patch_of_a_token, f,
             lambda f=f: test_tower_signals_reach_their_tokens(f))
            for f in ("qwen2_vl", "internvl", "idefics3", "gemma3")
        ),
        (deepstack_of_other_tokens, "qwen3_vl",
         lambda: test_dropping_is_masking("qwen3_vl", RANDOM, "sdpa", "alone-left")),
        *(
            (separators_dropped, f,
             lambda f=f: test_dropping_is_masking(f, CUT, "sdpa", "alone-left"))
            for f in ("llava_next", "llava_onevision")
        ),
        (separators_dropped, "llava_next",
         lambda: test_divprune_chooses_per_image("llava_next")),
    ],
)  # fmt: skip
def test_a_broken_adapter_is_caught(monkeypatch, mutate, family, check):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@attn_
@torch.no_grad()
def test_compact_cut_of_hybrid_layers(attn):
    """Each kind of layer turns the renumbered positions by its own table."""
    spec, batch = "fastv:layer=1:keep=0.5:positions=compact", samples("gemma3")
    inputs = collate("gemma3", batch)
    net = model("gemma3", attn)
    with mllm.patch(net, spec):
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    for mine, sample in zip(logits, batch, strict=True):
        want = dense("gemma3", sample, cuts=[Cut(1, 0.5, "compact")]).logits
        equal(mine[~sample.visual], want[~sample.visual], "text rows")


@torch.no_grad()
def test_a_picture_of_zeros():
    """It fills up a sample; SmolVLM takes it for a picture if there is no other."""
    inputs = collate("smolvlm", samples("smolvlm", "alone"))
    inputs["pixel_values"].zero_()
    net = model("smolvlm")
    plain = net(**inputs).logits
    with mllm.patch(net, "divprune:keep=1.0"):
        assert torch.equal(net(**inputs).logits, plain)
    with mllm.patch(model("idefics3"), "divprune:keep=3") as patched:
        with pytest.raises(DataError, match="for 0 images"):
            patched.model(**inputs)


@torch.no_grad()
def test_flat_positions_are_told():
    """Qwen2.5-VL counts tokens where nobody says which of them are images."""
    net = model("qwen2_5_vl")
    inputs = collate("qwen2_5_vl", samples("qwen2_5_vl", "alone"))
    with mllm.patch(net, "divprune:keep=3") as patched:
        net(**inputs)
        assert not any("mm_token_type_ids" in note for note in patched.ledger.notes)
        del inputs["mm_token_type_ids"]
        net(**inputs)
        assert any("mm_token_type_ids" in note for note in patched.ledger.notes)


@pytest.mark.parametrize("attn", ATTN)
@family_
@torch.no_grad()
def test_half_precision(family, attn):
    """bf16: keeping everything changes nothing, and a cut follows it."""
    net = model(family, attn).to(torch.bfloat16)
    inputs = collate(family, samples(family))
    inputs |= {k: x.to(torch.bfloat16) for k, x in inputs.items() if x.is_floating_point()}
    real = inputs["attention_mask"].bool()
    plain = net(**inputs).logits[real]
    for keep in ("1.0", "0.5"):
        spec = f"divprune:keep={keep}:positions=original+fastv:layer=2:keep={keep}"
        with mllm.patch(net, spec):
            logits = net(**inputs).logits[real]
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert torch.equal(logits, plain) == (keep == "1.0")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["gemma3", "qwen3_vl", "llava_onevision", "paligemma", "mistral3", "glm4v"]
)
def test_checkpointed_layers(family, reentrant):
    """Kinds of layers and added features are replayed as they were: loss and gradients equal."""

    def run(checkpointed: bool) -> tuple[float, dict[str, torch.Tensor]]:
        net, inputs = model(family).train(), collate(family, samples(family))
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        with mllm.patch(net, "divprune:keep=6+fastv:layer=2:keep=0.5"):
            loss = net(**inputs, labels=labels).loss
            loss.backward()
        return loss.item(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    (loss, grads), (again, same) = run(False), run(True)
    assert loss == again and grads.keys() == same.keys()
    assert all(torch.equal(grads[name], same[name]) for name in grads)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_any_size_of_picture(family):
    """Layouts of real shapes: as many tokens as the model packs, separators where it puts them."""
    net = model(family)
    config, side = net.config, 336 if family == "llava_next" else 384
    patch = 14 if family == "llava_next" else 16
    config.vision_config.image_size, config.vision_config.patch_size = side, patch
    pins = range(side, 3 * side + 1, side)
    config.image_grid_pinpoints = [[a, b] for a in pins for b in pins]
    g, cells = torch.Generator().manual_seed(0), (side // patch) ** 2
    for _ in range(60):
        size = torch.randint(20, 2000, (1, 2), generator=g)
        (layout,) = resolve(net).layouts({"image_sizes": size})
        tiles = layout.tiling.rows * layout.tiling.cols
        more = ({"vision_aspect_ratio": config.vision_aspect_ratio} if "onevision" in family
                else {"vision_feature_select_strategy": "default"})  # fmt: skip
        packed, _ = net.model.pack_image_features(
            [torch.zeros(1 + tiles, cells, 2)], size, image_newline=torch.ones(2), **more
        )
        assert layout.tokens == len(packed[0])
        assert torch.equal(layout.places.newline, packed[0][:, 0] == 1)
