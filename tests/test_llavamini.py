"""LLaVA-Mini: compression against loops, fusion against an unpatched decoder."""

from __future__ import annotations

import copy
import math

import matrix
import oracles
import pytest
import test_learned
import tiny
import torch
from families import KITS, collate, model, reference, samples
from family_oracles import features
from matrix import Case, check_generate, check_logits, equal
from test_depth import MORE
from test_learned import OUT, PLAIN, TILED, VIDEO, WIDTH, attend, norm, place
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import check_family, context

import mllm
from mllm.compressors import (
    MQT,
    DivPrune,
    FastV,
    LLaVAMini,
    LLaVAMiniCompress,
    LLaVAMiniFuse,
    SnapKV,
    Stride,
)
from mllm.errors import PlanError
from mllm.plan import Plan

MINI = LLaVAMini(heads=4, depth=2)
PAPER = MINI.replace(keep=4, compress="behind", fuse="text")
PLANS = {"code": MINI, "paper": PAPER, "placed": MINI.replace(keep=4, positions="original")}
each = pytest.mark.parametrize("stage", PLANS.values(), ids=PLANS)


def teach(bank: nn.Module) -> nn.Module:
    """Weights as if they were trained: fusion is not what it started as."""
    g = torch.Generator().manual_seed(5)
    for own in bank._modules.values():
        if "compressor" in own:
            test_learned.teach(own)
            continue
        with torch.no_grad():
            for parameter in own.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return bank


@pytest.fixture
def taught(monkeypatch):
    """Every model that is patched gets the same weights into what it learns."""
    inner = mllm.patch

    def patch(net, plan, **options):
        patched = inner(net, plan, **options)
        teach(net.mllm)
        return patched

    monkeypatch.setattr(mllm, "patch", patch)


# Compression, in loops


def compress(part, grids):
    """Grids `[rows, cols, width]` of one picture to as many tokens as there are queries."""
    width, side = grids[0].shape[2], math.isqrt(len(part.queries))
    places = torch.stack([place(r, c, width) for r in range(side) for c in range(side)])
    square = places.view(side, side, -1).permute(2, 0, 1)[None]
    keys, values = [], []
    for x in grids:
        own = F.interpolate(square, x.shape[:2], mode="bicubic", align_corners=False)[0]
        for r in range(x.shape[0]):
            for c in range(x.shape[1]):
                values.append(norm(x[r, c], part.norm))
                keys.append(values[-1] + own[:, r, c])
    found = []
    for query, at in zip(part.queries, places, strict=True):
        query = norm(query, part.norm_query) + at
        found.append(attend(part.attention, query, torch.stack(keys), torch.stack(values)))
    return torch.stack(found)


#: Layout, and for every picture that is read by itself its grids: first token, rows, columns.
LAYOUTS = {
    "plain": (PLAIN, [[(0, 6, 8)]]),
    "tiled": (TILED, [[(0, 4, 4), (16, 4, 7)]]),
    "video": (VIDEO, [[(24 * i, 4, 6)] for i in range(3)]),
}


@pytest.mark.parametrize("keep", [1, 4, 9])
@pytest.mark.parametrize("layout, pictures", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_tokens_are_those_of_the_loops(layout, pictures, keep):
    """All tiles of a picture are read at once, frames one by one."""
    for how in ("before", "behind"):
        stage = LLaVAMiniCompress(keep=keep, heads=2, compress=how)
        (part,) = stage.parts(OUT * 2, (WIDTH, 8)).values()
        test_learned.teach(part)
        width = WIDTH if how == "before" else OUT * 2
        x = torch.randn(2, layout.cells, width, generator=torch.Generator().manual_seed(0))
        ctx = context(stage, features=x, grid=layout.places.cells())
        ctx._route = lambda x, name, *more, part=part: part(x, *more)
        ctx._project = lambda x: 2 * x
        mask, merge, write = stage.reduce(ctx)
        count = keep * len(pictures)
        assert mask.counts == [count] * 2 == mask.mask.sum(1).tolist()
        rows = mask.mask[0].nonzero()[:, 0]
        assert torch.equal(merge.into[0, rows], rows)
        assert set(merge.into[0].tolist()) == set(rows.tolist())
        for i in range(2):
            want = torch.cat([
                compress(part, [x[i, at : at + r * c].view(r, c, -1) for at, r, c in grids])
                for grids in pictures
            ])  # fmt: skip
            equal(write.values[i, rows], want * (2 if how == "before" else 1), how, 2e-5)


# The whole, in a model


def case(stage):
    """The prompt written anew: loops compress, an unpatched decoder with their layers fuses."""
    net = matrix.fresh()
    with mllm.patch(net, stage):
        bank = copy.deepcopy(net.mllm)._modules
    part, fusion = bank["0"]["compressor"], bank["1"]["fusion"]

    def rows(reference, sample, kept):
        whole, blocks = [], []
        for i, pixels in enumerate(sample.pixels):
            x = oracles.tower(reference, pixels).patches
            whole.append(oracles.project(reference, x))
            if stage.compress == "before":
                made = oracles.project(reference, compress(part, [x.view(4, 4, -1)]))
            else:
                made = compress(part, [whole[-1].view(4, 4, -1)])
            own = kept[(kept >= 16 * i) & (kept < 16 * (i + 1))] - 16 * i
            blocks.append(oracles.Block(made, own.tolist(), []))
        found = oracles.rebuilt(reference, sample, blocks, stage.positions or "compact")
        if not blocks:
            return found
        coarse, text = found.source >= 0, found.source < 0
        goes = [coarse, text] if stage.fuse == "all" else [text]
        given = torch.cat(whole + [found.embeds[own] for own in goes])
        decoder = copy.deepcopy(reference).get_decoder()
        own = copy.deepcopy(fusion.layers)  # transformers hangs hooks on them
        decoder.layers = nn.ModuleList([*own, *decoder.layers[stage.depth :]])
        states = decoder(inputs_embeds=given[None], output_hidden_states=True).hidden_states
        fused = states[stage.depth][0, 16 * len(whole) :]
        for own in goes:
            found.embeds[own], fused = fused[: own.sum()], fused[own.sum() :]
        return found

    return Case(Plan([stage]).spec, rows)


@pytest.mark.parametrize("attn, kind, side", [("sdpa", "padded", "left"),
                                              ("eager", "padded", "right")])  # fmt: skip
@each
@torch.no_grad()
def test_the_model_sees_what_the_reference_does(stage, attn, kind, side, taught):
    check_logits(case(stage), attn, kind, side)


@pytest.mark.parametrize("stage", [MINI, PAPER], ids=["code", "paper"])
@torch.no_grad()
def test_decoding_is_as_without_a_cache(stage, taught):
    """The prompt alone is fused: what is generated enters as it is."""
    check_generate(case(stage), "sdpa", matrix.REPEATABLE, steps=6)
    if stage is MINI:
        check_generate(case(stage), "sdpa", matrix.REPEATABLE, steps=4, use_cache=False)


def entering(net):
    """What enters the first decoder layer from now on, behind the hooks that are there."""
    caught = []
    net.get_decoder().layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0].detach().clone()), with_kwargs=True
    )
    return caught


@pytest.mark.parametrize("fuse", ["all", "text"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "internvl",
                                    "llava_next", "idefics3", "paligemma"])  # fmt: skip
@torch.no_grad()
def test_new_layers_are_the_model_s_first(family, fuse):
    """What enters the LLM is what two layers of the unpatched decoder make of the sequence."""
    net, stage = model(family), LLaVAMiniFuse(depth=2, fuse=fuse)
    batch = samples(family)
    plain = copy.deepcopy(reference(family)).get_decoder()
    if family == "gemma3":
        plain.config.sliding_window = 4096  # fusion sees everything before
    for layer in plain.layers:
        layer.self_attn.is_causal = True  # and nothing behind
    inputs = collate(family, batch)
    with mllm.patch(net, [Stride(keep=3, positions="original"), stage]) as patched:
        states = net(**inputs, output_hidden_states=True).hidden_states
        kept = patched.ledger.kept("llm")
    entered = tiny.per_sample(states[0], inputs["attention_mask"])
    for b, s in enumerate(batch):
        words, cells = net.get_input_embeddings()(s.ids), []
        rows, visual = words.clone(), s.visual.nonzero()[:, 0]
        if s.pictures:
            fine = torch.cat(features(family, s)).to(words)
            at = 0
            for picture in s.pictures:
                cells += [at + t for t in KITS[family].cells(picture)]
                at += picture.tokens
            coarse = [t for t in kept[b].tolist() if t in set(cells)]
            rows[visual] = fine
            first = [fine, fine[coarse]] if fuse == "all" else [fine]
            given = torch.cat([*first, words[~s.visual]])[None]
            fused = plain(inputs_embeds=given, output_hidden_states=True).hidden_states[2][0]
            fused = fused[len(fine) :]
            if fuse == "all":
                rows[visual[coarse]], fused = fused[: len(coarse)], fused[len(coarse) :]
            rows[~s.visual] = fused
        stay = ~s.visual
        stay[visual[kept[b]]] = True
        equal(entered[b][stay], rows[stay], f"sample {b}", 1e-4 * max(1.0, float(rows.std())))


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl", "gemma3",
                                    "paligemma", pytest.param("idefics3", marks=pytest.mark.slow),
                                    pytest.param("qwen3_vl", marks=pytest.mark.slow),
                                    pytest.param("llava_onevision", marks=pytest.mark.slow),
                                    pytest.param("qwen2_5_vl_video", marks=pytest.mark.slow),
                                    ])  # fmt: skip
def test_batched_equals_alone(family, taught):
    stage = MINI.replace(keep=4, compress="behind" if mllm.models.resolve(
        model(family)).joins else "before")  # fmt: skip
    counts = check_family(family, stage)
    for s, own in zip(samples(family), counts, strict=True):
        frames = sum(max(1, picture.frames) for picture in s.pictures)
        assert own == [4 * frames] * len(own)


def test_beside_other_stages(taught):
    check_family("llava", [MINI.replace(keep=9), FastV(layer=2, keep=0.5)])
    check_family("llava", [MINI.replace(keep=9), SnapKV(budget=6, window=2)])
    check_family("llava", [DivPrune(keep=3), LLaVAMiniFuse(depth=1)])
    check_family("llava", "llavamini_compress:keep=4:heads=4")


@torch.no_grad()
def test_a_second_turn_enters_as_it_is(taught):
    """Over the cache its text is not fused, as an answer is not."""
    net, (s,) = model("llava"), samples("llava", "alone")
    inputs = collate("llava", [s])
    labels = torch.cat([torch.full_like(s.ids, -100), MORE])[None]
    with mllm.patch(net, MINI):
        cache = net(**inputs).past_key_values
        mine = net(input_ids=MORE[None], past_key_values=cache).logits[0]
        both = {**inputs, "input_ids": torch.cat([s.ids, MORE])[None],
                "attention_mask": torch.ones(1, len(s.ids) + 3)}  # fmt: skip
        equal(mine, net(**both, labels=labels).logits[0, -3:], "turn", 1e-4)
        again = net(**both).logits[0, -3:]
        assert not torch.allclose(mine, again, atol=1e-3), "read anew, it belongs to the prompt"


@torch.no_grad()
def test_answers_are_hidden_from_fusion(taught):
    """In the middle too: what stands behind one is fused without it."""
    net, (s,) = model("llava"), samples("llava", "alone")
    inputs = collate("llava", [s])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -4:-2] = inputs["input_ids"][0, -4:-2]
    other = inputs["input_ids"].clone()
    other[0, -4:-2] += 1
    with mllm.patch(net, MINI):
        caught = entering(net)
        for given, known in ((inputs["input_ids"], labels), (other, labels), (other, None)):
            net(**{**inputs, "input_ids": given}, labels=known)
    first, second, third = (x[0] for x in caught)
    words = net.get_input_embeddings()
    assert torch.equal(first[-4:-2], words(inputs["input_ids"][0, -4:-2]))
    assert torch.equal(second[-4:-2], words(other[0, -4:-2]))
    there = torch.ones(len(first), dtype=torch.bool)
    there[-4:-2] = False
    equal(first[there], second[there], "the prompt", 1e-6)
    assert not torch.allclose(second[-2:], third[-2:], atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_the_ledger_is_what_torch_counts(family):
    net, how = model(family, "eager"), "behind" if family == "qwen2_5_vl" else "before"
    inputs = collate(family, samples(family, "alone"))
    with mllm.patch(net, MINI.replace(compress=how)) as patched, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["selection_flops"][0] > 0


# Training


def _inputs(family="llava", kind="padded"):
    inputs = collate(family, samples(family, kind))
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def _grads(net, stage, inputs):
    net.zero_grad()
    with mllm.patch(net, stage):
        teach(net.mllm)
        loss = net(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters()
                               if p.grad is not None}  # fmt: skip


@pytest.mark.parametrize("family, stage", [("llava", MINI), ("qwen2_5_vl", PAPER)])
def test_gradients_reach_everything(family, stage):
    """Checkpointing or not, the same ones; prompt text is detached, so its words learn nothing."""
    inputs = _inputs(family, "single")
    loss, plain = _grads(model(family).train(), stage, inputs)
    learnt = [name for name in plain if name.startswith("mllm.")]
    for name in learnt:
        # All keys of an attention may move together: softmax does not see it.
        free = name.endswith(("key.bias", "k_proj.bias"))
        assert free or plain[name].abs().max() > 0, name
    with mllm.patch(net := model(family), stage):
        assert len(learnt) == len(list(net.mllm.parameters()))
    net = model(family).train()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    again, checked = _grads(net, stage, inputs)
    equal(again, loss, "loss", 1e-6)
    for name, grad in plain.items():
        equal(checked[name], grad, name, 1e-5 * max(1.0, float(grad.abs().max())))


def test_the_words_of_a_prompt_have_no_gradient():
    inputs = _inputs(kind="alone")
    net = model("llava").train()
    _, grads = _grads(net, MINI, inputs)
    words = grads["model.language_model.embed_tokens.weight"]
    ids, answers = inputs["input_ids"][0], inputs["input_ids"][0, -3:]
    prompt = [t for t in ids[:-3].tolist() if t not in answers.tolist()]
    assert not words[prompt].any() and words[answers[:2]].any()
    assert grads["model.multi_modal_projector.linear_1.weight"].any()


@pytest.mark.parametrize("stage", [MINI, PAPER], ids=["code", "paper"])
def test_text_alone_gives_every_part_a_gradient(stage):
    for family in ("llava", "qwen2_5_vl"):
        net = model(family).train()
        own = stage.replace(compress="behind") if family != "llava" else stage
        with mllm.patch(net, own):
            net(**_inputs(family, "text")).loss.backward()
            for name, p in net.mllm.named_parameters():
                assert p.grad is not None and not p.grad.any(), name


def test_beside_lora(tmp_path):
    """As modules_to_save: read from the copy that PEFT trains."""
    from peft import LoraConfig, get_peft_model

    net = model("llava").train()
    patched = mllm.patch(net, MINI)
    options = dict(target_modules=r".*language_model.*(q_proj|v_proj)", r=2)
    wrapped = get_peft_model(net, LoraConfig(**options, modules_to_save=["mllm"]))
    wrapped(**_inputs()).loss.backward()
    learnt = [p for n, p in wrapped.named_parameters() if "mllm" in n and p.requires_grad]
    assert len(learnt) == len(list(patched.routers.parameters()))
    patched.save_adapter(tmp_path / "one")
    patched.save_adapter(tmp_path / "two", state=wrapped.state_dict())
    one, two = (tmp_path / n / "mllm_adapter.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("stage", [MINI, PAPER], ids=["code", "paper"])
@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(stage, tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    plain = net(**inputs).logits
    with mllm.patch(net, stage) as patched:
        new = net(**inputs).logits
        teach(net.mllm)
        trained = net(**inputs).logits
        assert not torch.equal(new, trained)
        patched.save_adapter(tmp_path)
    other = model("llava")
    with mllm.patch(other, tmp_path):
        assert torch.equal(other(**inputs).logits, trained)
    assert torch.equal(net(**inputs).logits, plain), "the model is what it was"


# What is refused


@pytest.mark.parametrize("make, argument", [
    (lambda: LLaVAMini(keep=2), "keep"),
    (lambda: mllm.patch(model("llava"), LLaVAMini(heads=5)), "heads"),
    (lambda: mllm.patch(model("llava"), LLaVAMini(heads=4, depth=9)), "depth"),
    (lambda: mllm.patch(model("llava"), LLaVAMiniFuse(depth=0)), "depth"),
    (lambda: LLaVAMiniFuse(positions="compact"), "positions"),
    (lambda: mllm.patch(model("qwen2_5_vl"), LLaVAMini(heads=4, depth=2)), "compress"),
    (lambda: mllm.patch(model("llava"), [MQT(keep=4, queries=4, heads=4), MINI]), "plan"),
    (lambda: mllm.patch(model("llava"), [MQT(keep=4, queries=4, heads=4),
                                         LLaVAMiniFuse(depth=2)]), "plan"),
    (lambda: mllm.patch(model("llava"), "downsample:keep=4+llavamini_fuse:depth=2"), "plan"),
])  # fmt: skip
def test_bad_input(make, argument):
    with pytest.raises(PlanError) as caught:
        make()
    assert caught.value.argument == argument


def test_a_prompt_is_not_read_in_chunks():
    net = model("llava")
    with mllm.patch(net, MINI), pytest.raises(PlanError, match="in chunks: llavamini_fuse"):
        net.generate(**collate("llava", samples("llava", "alone")), max_new_tokens=2,
                     prefill_chunk_size=4)  # fmt: skip


def test_reentrant_checkpointing_is_refused():
    net = model("llava").train()
    net.gradient_checkpointing_enable({"use_reentrant": True})
    with mllm.patch(net, MINI), pytest.raises(PlanError, match="reentrant"):
        net(**_inputs())


@torch.no_grad()
def test_hidden_states_are_those_of_the_model_s_layers():
    """Hooks by which transformers collects them are not copied with a layer."""
    net, inputs = model("llava"), collate("llava", samples("llava", "alone"))
    plain = net(**inputs, output_hidden_states=True).hidden_states
    with mllm.patch(net, MINI):
        states = net(**inputs, output_hidden_states=True).hidden_states
    assert [x.shape for x in states] == [x.shape for x in plain]
