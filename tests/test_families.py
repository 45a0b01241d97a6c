"""Every family: identity, dropping equals masking, batched equals alone, FLOPs, refusals."""

from __future__ import annotations

import inspect

import oracles
import pytest
import tiny
import torch
from families import KITS, LAYERS, collate, model, reference, samples
from family_oracles import avgpool, dense, features, seen, visionzip
from matrix import CLOSE_CALL, equal
from oracles import Cut
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm.errors import DataError, PlanError

FAMILIES = list(KITS)
family_ = pytest.mark.parametrize("family", FAMILIES)
attn_ = pytest.mark.parametrize("attn", ["sdpa", "eager"])

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
}
#: Plans that change what stands at the rows that stay.
CHANGES = ["visionzip:keep=4", "avgpool:keep=4", "downsample:keep=4"]


def refused(family: str, spec: str) -> bool:
    """Whether the family says that it cannot run a plan."""
    from mllm.models import families

    names = {"avgpool": "Pool", "downsample": "Resize"}
    return names.get(spec.split(":")[0]) in families()[family].refuses


def compact(family: str, spec: str) -> bool:
    """Whether pre-LLM stages of the plan run on without gaps."""
    return not KITS[family].mrope and "original" not in spec and not spec.startswith("fastv")


@pytest.mark.parametrize("kind, side", [("alone", "left"), ("padded", "left"),
                                        ("padded", "right"), ("text", "left")])
@attn_
@pytest.mark.parametrize("spec", IDENTITY)
@family_
@torch.no_grad()
def test_identity(family, spec, attn, kind, side):
    if refused(family, spec):
        pytest.skip("the family refuses it")
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


@pytest.mark.parametrize("kind, side", [("alone", "left"), ("padded", "left"),
                                        ("padded", "right")])
@attn_
@pytest.mark.parametrize("spec", DROPS)
@family_
@torch.no_grad()
def test_dropping_is_masking(family, spec, attn, kind, side):
    batch = samples(family, kind)
    inputs = collate(family, batch, side)
    net = model(family, attn)
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        ledger = patched.ledger
    for b, sample in enumerate(batch):
        entering = [ledger.kept(i)[b] for i in range(LAYERS)]
        check(family, spec, sample, logits[b], entering[0], entering)


@pytest.mark.parametrize("kind", ["alone", "padded"])
@attn_
@pytest.mark.parametrize("spec", DROPS)
@family_
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


@attn_
@pytest.mark.parametrize("spec", [*DROPS, *CHANGES])
@family_
@torch.no_grad()
def test_batched_equals_alone(family, spec, attn):
    if refused(family, spec):
        pytest.skip("the family refuses it")
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


@family_
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
@family_
@torch.no_grad()
def test_merging_is_rebuilding(family, method, attn):
    """What is written at the rows that stay, worked out picture by picture."""
    spec = f"{method}:keep=4:positions=original"
    if family == "llava":
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


@family_
@torch.no_grad()
def test_beams_share_their_images(family):
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    options = dict(max_new_tokens=6, num_beams=2, do_sample=False, length_penalty=0.0)
    if "mm_encoder_outputs" not in inspect.signature(net.forward).parameters:
        pytest.skip("this transformers repeats the images of a batch in another order")
    with mllm.patch(net, "divprune:keep=3+fastv:layer=2:keep=0.5"):
        together = net.generate(**inputs, **options)[:, -6:]
        for b, sample in enumerate(batch):
            alone = net.generate(**collate(family, [sample]), **options)[0, -6:]
            assert torch.equal(together[b], alone)


@family_
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
    inputs = collate(family, samples(family, "alone"))
    net = model(family)
    plain = net(**inputs).logits[:, -1]
    with mllm.patch(net, spec):
        assert (net(**inputs).logits[:, -1] - plain).abs().max() > 0.01


@family_
@torch.no_grad()
def test_flops_are_those_counted(family):
    """Tower, projector, decoder and head under eager, whole and after a cut."""
    inputs = collate(family, samples(family, "alone"))
    net = model(family, "eager")
    for spec in ("divprune:keep=1.0", "divprune:keep=3", "fastv:layer=2:keep=0.5"):
        with mllm.patch(net, spec) as patched, FlopCounterMode(display=False) as counter:
            net(**inputs)
        data = patched.ledger.as_dict()
        counted = counter.get_total_flops()
        booked = data["prefill_flops"][0]
        assert abs(booked - counted) <= 0.01 * counted, (spec, booked, counted)
    with FlopCounterMode(display=False) as counter:
        net(**inputs)
    assert abs(data["baseline_prefill_flops"][0] - counter.get_total_flops()) <= (
        0.01 * counter.get_total_flops()
    )


@family_
@torch.no_grad()
def test_miscounted_placeholders(family):
    inputs = collate(family, samples(family, "alone"))
    inputs["input_ids"][inputs["input_ids"] == 8] = tiny.IMAGE
    if KITS[family].mrope:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).int()
    net = model(family)
    with mllm.patch(net, "divprune:keep=3"), pytest.raises(DataError, match="placeholders"):
        net(**inputs)


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
