"""CDPruner: a determinantal point process by determinants, and the text that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
import transformers as hf
from families import collate, model, samples
from matrix import SIDE, fresh, reference
from torch.nn import functional as F
from zoo import FAMILIES, check_family, context, shared

import mllm
from mllm import joint
from mllm.compressors import CDPruner
from mllm.compressors.base import Keep, Positions, TextEmbeds, TokenReducer
from mllm.errors import DataError, PlanError
from mllm.plan import MethodInfo
from mllm.signals import Text


def situation(stage, grid=None, **signals):
    """What it is given, without tiles."""
    return context(stage, grid=grid or SimpleNamespace(tiles=(0, 0)), **signals)


def example(images=2, tokens=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, 32, generator=g)
    words = torch.randn(images, 5, 32, generator=g)
    valid = torch.ones(images, 5, dtype=torch.bool)
    valid[1, 3:] = False
    return features, Text(words, valid, torch.zeros(images, 5, dtype=torch.long))


def by_hand(features, words, keep, negate=False, theta=None, among=None, seen_by=None,
            parts=None):  # fmt: skip
    """Greedy by determinants of the kernel, one image, in double precision."""
    x, words = features.double(), [w.double() for w in words]
    y = x if seen_by is None else seen_by.double()
    n = len(x)
    among = list(range(n)) if among is None else among
    near = [sum(F.cosine_similarity(y[i], w, 0).item() for w in words) / len(words)
            for i in range(n)]  # fmt: skip
    q = [-s if negate else s for s in near]
    low, high = min(q[i] for i in among), max(q[i] for i in among)
    q = [(s - low + 1e-6) / (high - low) for s in q]
    if theta is not None:
        q = [torch.tensor(theta / (2 * (1 - theta)) * s).exp().item() for s in q]
    kernel = torch.tensor([
        [q[i] * F.cosine_similarity(x[i], x[j], 0).item() * q[j] for j in range(n)]
        for i in range(n)
    ]).double()  # fmt: skip
    every: list[int] = []
    of, shares = parts or ([0] * n, [keep])
    for part, share in enumerate(shares):
        own, chosen = [i for i in among if of[i] == part], []
        for _ in range(min(share, len(own))):
            left = [i for i in own if i not in chosen]
            chosen.append(max(left, key=lambda i: torch.linalg.det(
                kernel[[*chosen, i]][:, [*chosen, i]]).item()))  # fmt: skip
        every += chosen
    return sorted(every)


@pytest.mark.parametrize("options", [{}, {"negate": True}, {"theta": 0.6}], ids=str)
@pytest.mark.parametrize("keep", [1, 2, 6, 11, 12])
def test_cdpruner_equals_its_description(keep, options):
    features, text = example()
    stage = CDPruner(keep=keep, **options)
    (kept,) = stage.reduce(situation(stage, features=features, text=text))
    for i in range(2):
        words = text.embeds[i][text.valid[i]]
        want = by_hand(features[i], words, keep, **options)
        assert kept.mask[i].nonzero()[:, 0].tolist() == want
    assert kept.counts == [keep] * 2


def test_what_is_asked_for_stays():
    """Where tokens and words share a space, a token that is like the question is kept."""
    features, text = example()
    for image, asked in enumerate((3, 8)):
        features[image, asked] += 3 * text.embeds[image, text.valid[image]].mean(0)
    for keep in (1, 4):
        stage = CDPruner(keep=keep)
        (kept,) = stage.reduce(situation(stage, features=features, text=text))
        assert kept.mask[0, 3] and kept.mask[1, 8]


@pytest.mark.parametrize("keep, shares", [(4, (2, 2)), (5, (2, 3)), (9, (3, 6)), (12, (3, 9))])
def test_tiles_are_compared_with_themselves(keep, shares):
    """Each has its share, picked as if it were alone; the scale of relevance is the image's."""
    features, text = example()
    part = torch.tensor([0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1])
    grid, stage = SimpleNamespace(tiles=(1, 1), part=part, parts=2), CDPruner(keep=keep)
    (kept,) = stage.reduce(situation(stage, grid, features=features, text=text))
    for i in range(2):
        words = text.embeds[i][text.valid[i]]
        want = by_hand(features[i], words, 0, parts=(part.tolist(), shares))
        assert kept.mask[i].nonzero()[:, 0].tolist() == want
    whole = CDPruner(keep=5, tiles=False)
    (kept,) = whole.reduce(situation(whole, grid, features=features, text=text))
    assert kept.mask[0].nonzero()[:, 0].tolist() == by_hand(features[0], text.embeds[0], 5)


def test_behind_another_stage():
    """Tokens that are gone are neither picked nor looked at."""
    features, text = example()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, ::2] = False
    stage = CDPruner(keep=4)
    (kept,) = stage.reduce(situation(stage, valid=valid, features=features, text=text))
    want = by_hand(features[0], text.embeds[0], 4, among=list(range(1, 12, 2)))
    assert kept.mask[0].nonzero()[:, 0].tolist() == want


def test_ties_and_equal_tokens():
    """Equal tokens add nothing to each other: one of each, the earlier; then in order."""
    base = torch.eye(32)[:3].repeat(1, 4, 1)
    text = Text(torch.ones(1, 2, 32), torch.ones(1, 2, dtype=torch.bool), None)
    for keep, want in [(3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (12, list(range(12)))]:
        stage = CDPruner(keep=keep)
        (kept,) = stage.reduce(situation(stage, features=base, text=text))
        assert kept.mask[0].nonzero()[:, 0].tolist() == want


def test_batch_and_no_question():
    """An image chooses the same in any batch, and without words by diversity alone."""
    features, text = example(images=3)
    stage = CDPruner(keep=5)
    (kept,) = stage.reduce(situation(stage, features=features, text=text))
    for i in range(3):
        own = Text(text.embeds[i : i + 1], text.valid[i : i + 1], None)
        (alone,) = stage.reduce(situation(stage, features=features[i : i + 1], text=own))
        assert torch.equal(alone.mask[0], kept.mask[i])
    none = Text(text.embeds, torch.zeros_like(text.valid), None)
    (kept,) = stage.reduce(situation(stage, features=features, text=none))
    assert kept.mask.sum(1).tolist() == [5] * 3


@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("qwen2_5_vl_video",
                                                            marks=pytest.mark.slow)])  # fmt: skip
def test_families(family):
    assert check_family(family, CDPruner(keep=5)) == [[5] * 4, [10] * 4, [0] * 4]


@torch.no_grad()
def test_published_budgets():
    """192, 128 and 64 of 576 enter every layer."""
    net = tiny.llava(layers=1, side=24)
    inputs = tiny.collate(tiny.samples("alone", side=24))
    for keep in (192, 64):
        with mllm.patch(net, f"cdpruner:keep={keep}") as patched:
            net(**inputs, logits_to_keep=1)
            assert len(patched.ledger.kept("llm")[0]) == keep


@dataclass
class Reader(TokenReducer):
    """Looks at the text and keeps everything."""

    which: str = "question"
    positions: Positions | None = "original"
    info = MethodInfo("reader", "pre_llm")

    def reads(self):
        return {"text": TextEmbeds(self.which)}

    def reduce(self, ctx):
        seen.append(ctx["text"])
        return [Keep(ctx.valid)]


seen: list[Text] = []


@pytest.mark.parametrize("way", ["forward", "generate", "labels"])
@pytest.mark.parametrize("which", ["question", "all"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_text_of_each_image(family, which, way):
    """Every image is given the text of its own sample; answers that are trained are not."""
    batch, net = samples(family), model(family)
    inputs = collate(family, batch)
    answer = 3
    seen.clear()
    with mllm.patch(net, Reader(which=which)):
        if way == "generate":
            net.generate(**inputs, max_new_tokens=2, do_sample=False)
        else:
            if way == "labels":
                labels = torch.full_like(inputs["input_ids"], -100)
                labels[:, -answer:] = inputs["input_ids"][:, -answer:]
                inputs["labels"] = labels
            net(**inputs)
    got = {
        tuple(e[v].flatten().tolist()) for t in seen for e, v in zip(t.embeds, t.valid, strict=True)
    }
    want, words = set(), net.get_input_embeddings()
    for s in batch:
        if not s.pictures:
            continue
        first = int(s.visual.nonzero()[0])
        rows = [i for i in range(len(s.ids)) if not s.visual[i]]
        rows = [i for i in rows if which == "all" or i > first]
        if way == "labels":
            rows = [i for i in rows if i < len(s.ids) - answer]
        want.add(tuple(words(s.ids[rows]).flatten().tolist()))
    assert got == want
    assert sum(len(t.embeds) for t in seen) == sum(len(s.pictures) for s in batch)


@torch.no_grad()
def test_the_text_of_a_later_turn():
    """A picture that comes later has the text behind it, and nothing of the turns before."""
    net, (one, two) = fresh(), (tiny.samples("alone", side=SIDE, seed=s)[0] for s in (1, 2))
    options = dict(do_sample=False, return_dict_in_generate=True)
    with mllm.patch(net, Reader()):
        first = net.generate(**tiny.collate([one]), max_new_tokens=3, **options)
        seen.clear()
        ids = torch.cat([first.sequences[0], two.ids])[None]
        net.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=two.pixels,
            past_key_values=first.past_key_values, max_new_tokens=2, **options,
        )  # fmt: skip
    behind = ~two.visual & (two.visual.cumsum(0) > 0)
    (text,) = seen
    assert torch.equal(text.embeds[0][text.valid[0]], net.get_input_embeddings()(two.ids[behind]))


class Words:
    """A tokenizer whose words are numbers."""

    bos_token_id, eos_token_id = 1, 49

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(w) for w in text.split()]}


def space():
    """The text half of a CLIP whose vision half has the width of the tiny tower."""
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=1, image_size=56,
                  num_attention_heads=4, patch_size=14)  # fmt: skip
    text = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=50, max_position_embeddings=8, bos_token_id=1,
                eos_token_id=49)  # fmt: skip
    torch.manual_seed(3)
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for p in clip.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return joint.JointSpace(clip, Words(), lambda ids: " ".join(str(3 + i % 40) for i in ids))


@pytest.mark.parametrize("way", ["forward", "generate"])
@torch.no_grad()
def test_clip_equals_its_description(way):
    """Patches and the question, six words at a time, by CLIP's own halves; then determinants."""
    net, own, batch = fresh(), space(), tiny.samples(side=SIDE)
    joint.attach(net, own)
    with mllm.patch(net, "cdpruner:keep=5:relevance=clip") as patched:
        if way == "forward":
            net(**tiny.collate(batch))
        else:
            net.generate(**tiny.collate(batch), max_new_tokens=2, do_sample=False)
        kept = patched.ledger.kept("llm")
        assert patched.ledger.as_dict()["selection_flops"][0] > own.word_flops
    for b, sample in enumerate(batch):
        behind = ~sample.visual & (sample.visual.cumsum(0) > 0)
        words = [3 + i % 40 for i in sample.ids[behind].tolist()]
        parts = [[1, *words[i : i + 6], 49] for i in range(0, len(words), 6)]
        text = [own.clip.text_projection(own.clip.text_model(torch.tensor([p])).pooler_output[0])
                for p in parts]  # fmt: skip
        want = []
        for n, picture in enumerate(sample.pixels):
            tower = oracles.tower(reference(), picture).patches
            patches = own.clip.visual_projection(own.clip.vision_model.post_layernorm(tower))
            features = oracles.project(reference(), tower)
            found = by_hand(features, text, 5, negate=True, seen_by=patches)
            want += [n * SIDE**2 + t for t in found]
        assert kept[b].tolist() == want


def test_clip_on_tiles():
    joint.attach(shared("llava_next", "sdpa"), space())
    stage = CDPruner(keep=5, relevance="clip")
    assert check_family("llava_next", stage) == [[5] * 4, [10] * 4, [0] * 4]


def test_clip_needs_its_text_tower():
    with pytest.raises(PlanError, match="no text tower") as caught:
        mllm.patch(fresh(), "cdpruner:keep=4:relevance=clip")
    assert "relevance=llm" in caught.value.expected
    for net in (model("gemma3"), model("qwen2_5_vl")):
        with pytest.raises(PlanError, match="no CLIP"):
            joint.attach(net, space())


@torch.no_grad()
def test_pictures_without_a_prompt():
    net, sample = fresh(), tiny.samples("alone", side=SIDE)[0]
    with mllm.patch(net, CDPruner(keep=4)):
        with pytest.raises(DataError, match="without a prompt"):
            net.model.get_image_features(pixel_values=sample.pixels)


def test_theta():
    with pytest.raises(PlanError, match="theta"):
        CDPruner(theta=1.0)
    with pytest.raises(PlanError, match="relevance"):
        CDPruner(relevance="blip")


@pytest.mark.parametrize("relevance", ["llm", "clip"])
def test_rows_say_what_is_compared(relevance):
    """The default too: figures of one must not be taken for the other's."""
    plan = mllm.Plan([CDPruner(keep=64, relevance=relevance)])
    assert plan.spec == f"cdpruner:keep=64:relevance={relevance}"
    assert mllm.Plan.from_spec(plan.spec).stages == plan.stages
