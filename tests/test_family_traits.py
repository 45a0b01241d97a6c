"""What only some families have: a prefix that sees itself, and channels turned with neighbours."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as hf
from families import END, KITS, LAYERS, PAD, START, VOCAB, collate, model, samples
from family_oracles import dense
from matrix import PRECOMPUTED, equal
from oracles import Cut
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb

import mllm
from mllm import attention
from mllm.errors import DataError, PlanError

SUFFIX = 3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", ["divprune:keep=3", "fastv:layer=2:keep=0.5"])
@torch.no_grad()
def test_a_suffix_sees_only_back(spec, attn):
    """The prefix that is left sees all of itself, and nothing of the suffix."""
    net, batch = model("paligemma", attn), samples("paligemma")
    inputs = collate("paligemma", batch)
    whole = net(**inputs).logits
    inputs["token_type_ids"][:, -SUFFIX:] = 1
    assert (net(**inputs).logits - whole).abs().max() > 0.01, "the suffix shows"
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept("llm")
        layers = [patched.ledger.kept(i) for i in range(LAYERS)]
    for b, sample in enumerate(batch):
        cuts = [Cut(2, 0.5)] if "fastv" in spec else []
        want = dense(
            "paligemma", sample, cuts=cuts, kept=None if cuts else kept[b], compact=not cuts,
            first=len(sample.ids) - SUFFIX,
        )  # fmt: skip
        assert [own[b].tolist() for own in layers] == [e.tolist() for e in want.entering]
        equal(logits[b][~sample.visual], want.logits[~sample.visual], f"sample {b}")


@torch.no_grad()
def test_the_prefix_must_be_told():
    net = model("paligemma")
    inputs = collate("paligemma", samples("paligemma"))
    types = inputs.pop("token_type_ids")
    with mllm.patch(net, "divprune:keep=3"):
        for call in (net, net.generate):
            with pytest.raises(DataError, match="which rows see each other") as caught:
                call(**inputs)
            assert caught.value.argument == "token_type_ids"
        net(**inputs, token_type_ids=types)


def test_what_paligemma_refuses():
    text = hf.Gemma2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        head_dim=12, num_key_value_heads=2, vocab_size=VOCAB, pad_token_id=PAD,
    )  # fmt: skip
    config = model("paligemma").config
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config=config.vision_config, image_token_index=tiny.IMAGE,
        projection_dim=48, hidden_size=48,
    )  # fmt: skip
    with torch.device("meta"):
        net = hf.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(PlanError, match="gemma2 decoder is not supported: it caps"):
        mllm.patch(net, "divprune:keep=3")


MORE = [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]


@torch.no_grad()
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("family", ["glm4v", "glm46v"])
def test_videos_of_glm_are_not_repeated(family, more):
    """transformers counts the placeholders of videos to repeat them; frames have other ones."""
    net = model(family)
    inputs = collate(f"{family}_video", samples(f"{family}_video"))
    if PRECOMPUTED:
        with pytest.raises((RuntimeError, ValueError)):
            net.generate(**inputs, max_new_tokens=2, **more)
    with mllm.patch(net, "divprune:keep=3"):
        with pytest.raises(PlanError, match="cannot repeat prompts of Glm4.*videos") as caught:
            net.generate(**inputs, max_new_tokens=2, **more)
        assert caught.value.argument == [*more][-1]
        net.generate(**inputs, max_new_tokens=2)
        net.generate(**collate(family, samples(family, "alone")), max_new_tokens=2, **more)


@torch.no_grad()
def test_images_and_videos_of_glm_are_told_apart_by_the_call():
    net = model("glm4v")
    image, video = (collate(name, samples(name, "alone")) for name in ("glm4v", "glm4v_video"))
    with mllm.patch(net, "divprune:keep=3") as patched:
        with pytest.raises(DataError, match="have the same placeholders") as caught:
            net(**{**image, **video})
        assert caught.value.argument == "pixel_values_videos"
        seen = []
        for inputs in (video, image, video):
            net(**inputs)
            seen.append(patched.ledger.as_dict()["visual_tokens"])
            assert len(patched.ledger.kept("llm")[0]) == 3
        assert seen == [[12], [16], [12]]
        del video["pixel_values_videos"]
        with pytest.raises(DataError, match="image placeholders but no pixels"):
            net(**video)


@pytest.mark.skipif(not PRECOMPUTED, reason="this transformers writes prompts in another place")
@torch.no_grad()
def test_a_prompt_of_glm_with_a_video_as_its_processor_writes_it():
    """Times between frames, and marks around the video; the processor itself wants torchvision."""
    (video,) = samples("glm4v_video", "alone")[0].pictures
    processor = object.__new__(hf.Glm4vProcessor)
    processor.image_token, processor.image_token_id = "<|image|>", tiny.IMAGE
    processor.video_start_id, processor.video_end_id = 3, 4
    processor.video_processor = SimpleNamespace(merge_size=2)
    told = SimpleNamespace(fps=2.0, timestamps=[0.0, 0.5, 1.0, 1.5])
    text = processor.replace_video_token(video.fields | {"video_metadata": [told]}, 0)
    ids = {"<|begin_of_image|>": START, "<|image|>": tiny.IMAGE, "<|end_of_image|>": END,
           "0": 20, "1": 21}  # fmt: skip
    frames = [ids[word] for word in re.findall(r"<.*?>|\d+", text)]
    assert frames.count(tiny.IMAGE) == video.tokens and frames[-1] == 21
    row = [1, 12, 3, *frames, 4, 15, 16]
    inputs = {
        "input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long(),
        "mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids([row])),
        **video.fields,
    }  # fmt: skip
    net, options = model("glm4v"), dict(max_new_tokens=4, do_sample=False)
    plain, answer = net(**inputs).logits, net.generate(**inputs, **options)
    with mllm.patch(net, "divprune:keep=1.0:positions=original") as patched:
        assert torch.equal(net(**inputs).logits, plain)
        assert torch.equal(net.generate(**inputs, **options), answer)
        assert patched.ledger.grid[0] == [(2, 3), (2, 3)]
    with mllm.patch(net, "divprune:keep=3") as patched:
        assert (net(**inputs).logits[0, -1] - plain[0, -1]).abs().max() > 1e-3
        assert patched.ledger.as_dict()["kept_llm"] == [3]


@torch.no_grad()
def test_sizes_that_are_no_pictures():
    net = model("mistral3")
    inputs = collate("mistral3", samples("mistral3"))
    sizes = inputs["image_sizes"]
    with mllm.patch(net, "divprune:keep=3"):
        for wrong in (sizes[:-1], sizes + 14, sizes + 28 * 8):
            with pytest.raises(DataError, match="other sizes") as caught:
                net(**inputs | {"image_sizes": wrong})
            assert caught.value.argument == "image_sizes"
        net(**inputs)


def test_neighbouring_channels_turn_together():
    """As the model turns them; the way back is exact."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 4, 5, 12, generator=g)
    angle = torch.randn(2, 5, 3, generator=g).repeat_interleave(2, -1)
    cos, sin = angle.cos(), angle.sin()
    want = apply_rotary_pos_emb(q, k, cos, sin)
    tables = 1.3 * cos[:, None], 1.3 * sin[:, None]
    for x, turned in zip((q, k), want, strict=True):
        mine = attention.rotate(x, cos[:, None], sin[:, None], neighbours=True)
        assert torch.allclose(mine, turned, atol=1e-6)
        scaled = attention.rotate(x, *tables, neighbours=True)
        assert torch.allclose(attention.unrotate(scaled, *tables, neighbours=True), x, atol=1e-6)


@pytest.mark.parametrize("family", ["glm4v", "mistral3", "paligemma"])
@torch.no_grad()
def test_scores_without_positions(family):
    """Scores among the rows of a layer as if all stood at one place."""
    net = model(family)
    inputs = collate(family, samples(family, "alone"))
    heads: dict[str, torch.Tensor] = {}
    own = net.get_decoder().layers[1].self_attn
    handles = [
        getattr(own, name).register_forward_hook(
            lambda _, args, out, name=name: heads.setdefault(name, out[0].view(-1, 12))
        )
        for name in ("q_proj", "k_proj")
    ]  # fmt: skip
    read = attention.unrotate
    seen = []

    def note(x, *tables):
        seen.append(read(x, *tables))
        return seen[-1]

    with pytest.MonkeyPatch.context() as mp, mllm.patch(net, "feather:layers=2:keep=0.5"):
        mp.setattr(attention, "unrotate", note)
        net(**inputs)
    for handle in handles:
        handle.remove()
    for mine, name in zip(seen, ("q_proj", "k_proj"), strict=True):
        rows = inputs["input_ids"].shape[1]
        raw = heads[name].view(rows, -1, 12).transpose(0, 1)
        assert torch.allclose(mine[0], raw, atol=1e-4)
    assert KITS[family].mrope == (family == "glm4v")
