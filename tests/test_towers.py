"""Vision towers made of transformers' encoders: shapes, files, batches, gradients, references."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_tiny import save_small
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SamVisionConfig,
    SiglipVisionConfig,
)

import mllm
from mllm.errors import DataError, PlanError, RecipeError
from mllm.loading import build_inputs, load_model
from mllm.models.towers import (
    TOWERS,
    Brave,
    BraveConfig,
    ConvLLaVA,
    ConvLLaVAConfig,
    Hybrid,
    HybridConfig,
    Mova,
    MovaConfig,
    TowerLlava,
)
from mllm.models.towers.base import Question, asking
from mllm.plan import get_method
from mllm.training import parts
from mllm.training.launch import World
from mllm.training.preview import preview
from mllm.training.recipe import load, validate

CLIP = CLIPVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    image_size=56, patch_size=14,
)  # fmt: skip
SIGLIP = SiglipVisionConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    image_size=64, patch_size=16,
)  # fmt: skip
DINO = Dinov2Config(
    hidden_size=16, mlp_ratio=2, num_hidden_layers=1, num_attention_heads=4, image_size=42,
    patch_size=14,
)  # fmt: skip
SAM = SamVisionConfig(
    hidden_size=16, output_channels=8, mlp_dim=32, num_hidden_layers=2, num_attention_heads=4,
    image_size=128, window_size=4, global_attn_indexes=[1], initializer_range=0.02,
)  # fmt: skip
CONVNEXT = ConvNextConfig(
    hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_scale_init_value=0.5
)
BRIDGE = {"width": 24, "queries": 6, "bridge_width": 16, "bridge_layers": 2, "bridge_heads": 4,
          "bridge_mlp": 32}  # fmt: skip
MAKE = {
    "convllava": lambda: ConvLLaVA.of(CONVNEXT, image_size=256, depth=2),
    "deepseek-hybrid": lambda: Hybrid.of(
        SAM, {"config": SIGLIP.to_dict(), "mean": [0.5] * 3, "std": [0.2] * 3}, image_size=128
    ),
    "brave": lambda: Brave.of(
        {"config": CLIP.to_dict(), "layer": -2}, DINO, image_size=56, dropout=0.0, **BRIDGE
    ),
    "mova": lambda: Mova.of(
        {"config": CLIP.to_dict(), "layer": -2}, DINO, SIGLIP, image_size=56, blocks=2, heads=4,
        top_k=2, stage_depth=1,
    ),
}  # fmt: skip
TOKENS = {"convllava": 16, "deepseek-hybrid": 16, "brave": 6, "mova": 4}
names = pytest.mark.parametrize("name", list(MAKE))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_model(save_small(tmp_path_factory.mktemp("small")), dtype="float32", device="cpu")


def towered(small, name, make=None):
    """The small LLaVA with a tower whose weights all do something."""
    torch.manual_seed(0)
    model, processor = mllm.with_tower(small[0], (make or MAKE[name])(), small[1])
    for parameter in (*model.model.vision_tower.new_parameters(),
                      *model.model.multi_modal_projector.parameters()):  # fmt: skip
        if parameter.dim() > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model, processor


def picture(seed):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (60, 90, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLES = [
    ([picture(0)], "What is left of the red circle?"),
    ([picture(1), picture(2)], "Is there a blue square in both of these pictures, and where?"),
    ([], "Yes or no?"),
]


@names
def test_forward_and_generate(small, name):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES)
    assert isinstance(model, TowerLlava) and isinstance(model, LlavaForConditionalGeneration)
    placed = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    count = TOKENS[name]
    assert placed == [count, 2 * count, 0]
    assert model.config.image_seq_length == model.config.vision_config.tokens == count
    output = model(**inputs)
    assert output.image_hidden_states.shape == (3 * count, model.config.text_config.hidden_size)
    assert output.logits.isfinite().all()
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    again = model(
        input_ids=made[:, :-1],
        attention_mask=torch.nn.functional.pad(
            inputs["attention_mask"], (0, made.shape[1] - 1 - inputs["input_ids"].shape[1]), value=1
        ),
        pixel_values=inputs["pixel_values"],
        # What was generated is no question.
        labels=torch.cat(
            [torch.full_like(inputs["input_ids"], -100), made[:, inputs["input_ids"].shape[1] :]], 1
        )[:, :-1],
    )
    ended = (made == model.generation_config.eos_token_id).any(1)
    assert torch.equal(again.logits[~ended, -1].argmax(-1), made[~ended, -1])


@names
def test_the_first_model_stays_as_it_is(small, name):
    model, processor = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = model.config.to_dict()
    changed, other = towered(small, name)
    assert type(model) is LlavaForConditionalGeneration and model.config.to_dict() == told
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert changed.model.language_model is model.model.language_model
    assert processor.num_additional_image_tokens == 1 and other is not processor
    assert processor.vision_feature_select_strategy == "default"


@names
def test_saved_and_loaded_to_the_bit(small, name, tmp_path):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, other = load_model(tmp_path, dtype="float32", device="cpu")
    assert type(loaded) is TowerLlava
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    again = build_inputs(other, SAMPLES)
    assert all(torch.equal(again[k], inputs[k]) for k in inputs)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**inputs).logits)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain.model.multi_modal_projector) is type(model.model.multi_modal_projector)


@names
@torch.no_grad()
def test_a_padded_batch_is_its_samples(small, name):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES)
    together = model(**inputs).logits
    for row, sample in enumerate(SAMPLES):
        own = build_inputs(processor, [sample])
        own = {k: v for k, v in own.items() if v is not None}
        alone = model(**own).logits[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, atol=2e-5, rtol=1e-4)


@names
@pytest.mark.parametrize("again", [False, True])
def test_gradients_reach_what_is_trained(small, name, again):
    model, processor = towered(small, name)
    recipe = validate(
        {
            "version": 1,
            "model": {"path": "x", "freeze_vision_tower": True, "freeze_language_model": True},
            "data": [{"path": "yardstick", "limit": 1}],
            "output": {"dir": "x"},
        }
    )
    model = copy.deepcopy(model).train()
    before = parts.parts(model)
    parts.freeze(model, recipe)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = build_inputs(processor, SAMPLES)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    model(**inputs, labels=labels).loss.backward()
    new = {id(p) for p in model.model.vision_tower.new_parameters()}
    assert new
    for key, parameter in model.named_parameters():
        if before[key] == "multi_modal_projector":
            # A bias under keys moves all scores alike, which softmax does not see.
            flat = key.endswith((".k.bias", ".key.bias"))
            moved = parameter.grad is not None and (flat or bool(parameter.grad.any()))
            assert moved, key
        else:
            assert parameter.grad is None, key
    inside = {before[k] for k, p in model.named_parameters() if id(p) in new}
    assert inside == {"multi_modal_projector"}


# --- under plans


@names
@torch.no_grad()
def test_plans_work_behind_a_tower(small, name):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES)
    plain = model(**inputs).logits
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with mllm.patch(model, "divprune:keep=1.0+fastv:layer=1:keep=1.0"):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said)
    with mllm.patch(model, "divprune:keep=3+fastv:layer=1:keep=2") as patched:
        model(**inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert patched.ledger.as_dict()
    assert torch.equal(model(**inputs).logits, plain)


@names
def test_methods_that_cannot_work_are_refused(small, name):
    model, _ = towered(small, name)
    with pytest.raises(PlanError, match="it reads blocks of the tower"):
        mllm.patch(model, "visionzip:keep=2")
    with pytest.raises(PlanError, match="has no blocks with the visual tokens"):
        mllm.patch(model, "tome")
    pooled = {"brave": "no places in the picture"}
    if name in pooled:
        with pytest.raises(PlanError, match=pooled[name]):
            mllm.patch(model, "avgpool")
    if name != "convllava":
        with pytest.raises(PlanError, match="one size|no places"):
            mllm.patch(model, "downsample:keep=1")


@torch.no_grad()
def test_convllava_takes_smaller_pictures_under_a_plan(small):
    model, processor = towered(small, "convllava")
    inputs = build_inputs(processor, SAMPLES[:1])
    with mllm.patch(model, "downsample:keep=4") as patched:
        model(**inputs)
        assert patched.ledger.as_dict()["visual_avg"] == [4.0]


@names
@torch.no_grad()
def test_the_ledger_counts_the_tower(small, name, tmp_path):
    model, processor = towered(small, name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_model(
        tmp_path, dtype="float32", device="cpu", attn_implementation="eager"
    )
    inputs = build_inputs(processor, SAMPLES[:1])
    with mllm.patch(model, "fastv:layer=1:keep=2") as patched:
        family = patched.family
        layout = family.layouts(inputs)[0]
        expected = family.vision_flops(layout, layout.cells)
        # The fused attention of CPUs is not counted by torch.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.model.get_image_features(inputs["pixel_values"])
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)
        model(**inputs)
        noted = any("without a question" in note for note in patched.ledger.notes)
        assert noted == (name in ("brave", "mova"))


@pytest.mark.slow
@names
@torch.no_grad()
def test_what_doctor_promises_runs(small, name):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES[:2])
    report = mllm.doctor(model)
    assert report.facts["tower_blocks"] == "none" and report.backends["tower"] == "none"
    verdicts = {check.name: check.verdict for check in report.methods}
    assert verdicts["visionzip"] == verdicts["tome"] == "no"
    assert verdicts["fastv"] != "no" and verdicts["divprune"] != "no"
    for check in report.methods:
        method = get_method(check.name)
        stage = method(**method.identity) if check.verdict == "adjust" else method()
        if check.verdict == "no":
            with pytest.raises(PlanError):
                mllm.patch(model, [stage])
            continue
        with mllm.patch(model, [stage]):
            model(**inputs)


# --- the towers themselves


def test_published_sizes():
    large = {"config": ConvNextConfig(
        depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]).to_dict()}  # fmt: skip
    for side, tokens in ((768, 144), (1024, 256), (1536, 576)):
        config = ConvLLaVAConfig(encoders=[large], image_size=side)
        assert (config.tokens, config.hidden_size, config.patch_size) == (tokens, 3072, 64)
    low = SiglipVisionConfig(hidden_size=1024, image_size=384, patch_size=16).to_dict()
    config = HybridConfig(encoders=[{"config": SamVisionConfig().to_dict()}, {"config": low}])
    assert (config.tokens, config.hidden_size) == (576, 2048)
    clip = CLIPVisionConfig(
        hidden_size=1024, image_size=336, patch_size=14, num_attention_heads=16
    ).to_dict()
    pair = [{"config": clip}, {"config": SamVisionConfig().to_dict(), "name": "sam"}]
    config = MovaConfig(encoders=pair, top_k=1)
    assert (config.tokens, config.hidden_size, config.side(0)) == (576, 1024, 48)
    assert BraveConfig(encoders=pair).tokens == 160


def test_brave_trains_about_116_million_parameters():
    with torch.device("meta"):
        widths = (1408, 1024, 1664, 1792, 1024)  # EVA-CLIP-g, CLIP-L, SILC-G, ViT-e, DINOv2-L
        tower = Brave.of(*(
            CLIPVisionConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=16)
            for width in widths
        ), text_width=2048)  # fmt: skip
        projector = tower.projector(tiny.config(hidden=2048).text_config)
    trained = [*tower.new_parameters(), *projector.parameters()]
    assert sum(p.numel() for p in trained) == pytest.approx(116e6, rel=0.03)


@torch.no_grad()
def test_convllava_is_convnext_and_one_more_stage():
    for config in (CONVNEXT, ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])):
        tower = ConvLLaVA.of(config, image_size=128, depth=2).eval()
        pixels = torch.randn(2, 3, 128, 192)
        found = tower(pixels)
        maps = tower.encoders[0].model(pixels).last_hidden_state
        assert maps.shape == (2, 16, 4, 6)
        norm, conv = tower.stage.downsampling_layer
        x = conv(norm(maps))
        for layer in tower.stage.layers:
            x = layer(x)
        assert len(tower.stage.layers) == 2 and x.shape == (2, 32, 2, 3)
        assert torch.equal(found.last_hidden_state, x.flatten(2).transpose(1, 2))
        assert found.hidden_states == (found.last_hidden_state,)


@torch.no_grad()
def test_hybrid_has_a_branch_for_each_resolution(small):
    model, _ = towered(small, "deepseek-hybrid")
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels = torch.randn(1, 3, 128, 128)
    features = tower(pixels).last_hidden_state
    width = model.config.text_config.hidden_size
    sam = tower.encoders[0].model(pixels).last_hidden_state
    big = torch.nn.functional.interpolate(sam, size=(16, 16), mode="bilinear")
    high = tower.down.conv2(tower.down.conv1(big)).flatten(2).transpose(1, 2)
    high = projector.high_up(tower.high_norm(high))
    # The low branch sees the picture at 64 pixels, as SigLIP's own processor would normalise it.
    mean, std = (torch.tensor(x)[:, None, None] for x in (
        tower.config.image_mean, tower.config.image_std))  # fmt: skip
    least = torch.nn.functional.interpolate(
        pixels, size=(64, 64), mode="bilinear", antialias=True, align_corners=False
    )
    read = tower.encoders[1].model((least * std + mean - 0.5) / 0.2).last_hidden_state
    low = projector.low_up(tower.low_norm(read))
    assert high.shape == low.shape == (1, 16, width // 2)
    expected = projector.proj(torch.nn.functional.gelu(torch.cat([high, low], -1)))
    torch.testing.assert_close(projector(features), expected, atol=1e-5, rtol=1e-4)


def bridge(tower, asked, seen, said):
    """The MEQ-Former in plain loops: one query, one head at a time."""
    heads = tower.config.bridge_heads

    def attend(module, x, of, valid):
        own = module.attention
        q, k, v = own.query(x), own.key(of), own.value(of)
        size = q.shape[-1] // heads
        rows = []
        for query in q:
            parts = []
            for head in range(heads):
                at = slice(head * size, (head + 1) * size)
                scores = [
                    float(query[at] @ k[j, at]) / math.sqrt(size) if valid[j] else -math.inf
                    for j in range(len(k))
                ]
                weights = torch.tensor(scores).softmax(0)
                parts.append(sum(weights[j] * v[j, at] for j in range(len(k))))
            rows.append(torch.cat(parts))
        return module.output.LayerNorm(module.output.dense(torch.stack(rows)) + x)

    x = tower.bridge.layernorm(asked)
    for number, layer in enumerate(tower.bridge.encoder.layer):
        x = attend(layer.attention, x, x, seen)
        if number % tower.config.cross_every == 0:
            x = attend(layer.crossattention, x, said, [True] * len(said))
        inner = torch.nn.functional.gelu(layer.intermediate_query.dense(x))
        x = layer.output_query.LayerNorm(layer.output_query.dense(inner) + x)
    return x


@torch.no_grad()
def test_meq_former_against_plain_loops(small):
    tower = towered(small, "brave")[0].model.vision_tower.eval()
    pixels, words = torch.randn(2, 3, 56, 56), torch.randn(1, 3, 32)
    valid = torch.tensor([[False, True, True]])
    with asking(Question(words, valid, [2])):
        found = tower(pixels).last_hidden_state
    clip, dino = (encoder.model for encoder in tower.encoders)
    for row in range(2):
        own = pixels[row : row + 1]
        first = clip(own, output_hidden_states=True).hidden_states[-2][0, 1:]
        least = torch.nn.functional.interpolate(
            own, size=(42, 42), mode="bilinear", antialias=True, align_corners=False
        )
        second = dino(least).last_hidden_state[0, 1:]
        said = torch.cat([tower.project[0](first), tower.project[1](second)])
        assert said.shape == (16 + 9, 24)
        asked = torch.cat([tower.query, tower.words(words[0]) + tower.places[-3:]])
        seen = [True] * 6 + valid[0].tolist()
        expected = bridge(tower, asked, seen, said)[:6]
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_brave_drops_encoders_in_training_and_never_all():
    tower = Brave.of(CLIP, DINO, image_size=56, dropout=0.7, **BRIDGE).train()
    sizes = [16, 9]
    kept = tower._kept(500, sizes, "cpu")
    whole = torch.stack([kept[:, :16].all(1), kept[:, 16:].all(1)], 1)
    none = torch.stack([~kept[:, :16].any(1), ~kept[:, 16:].any(1)], 1)
    assert (whole ^ none).all() and whole.any(1).all() and none.any(1).any()
    # An encoder that is not seen changes nothing.
    pixels = torch.randn(1, 3, 56, 56)
    tower._kept = lambda *_: torch.tensor([[True] * 16 + [False] * 9])
    first = tower(pixels).last_hidden_state
    tower.project[1].weight.normal_()
    assert torch.equal(first, tower(pixels).last_hidden_state)
    del tower._kept
    assert tower.eval()._kept(5, sizes, "cpu") is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["brave", "mova"])
def test_the_question_is_read_and_the_answer_is_not(small, name):
    model, processor = towered(small, name)
    inputs = build_inputs(processor, SAMPLES[:1])
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]

    def seen(ids, labels):
        return model(**{**inputs, "input_ids": ids}, labels=labels).image_hidden_states

    other = ids.clone()
    other[:, -1] = ids[0, -1] + 1
    assert torch.equal(seen(ids, labels), seen(other, labels))
    assert not torch.equal(seen(ids, None), seen(other, None))


@torch.no_grad()
def test_mova_starts_as_its_base_to_the_bit():
    base = {"config": CLIP.to_dict(), "layer": -2}
    tower = Mova.of(
        base, DINO, SIGLIP, image_size=56, heads=4, top_k=2, stage_depth=0, pool=1, text_width=8
    ).eval()
    pixels = torch.randn(3, 3, 56, 56)
    clip = tower.encoders[0].model
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    with asking(Question(torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool), [3])):
        assert torch.equal(tower(pixels).last_hidden_state, expected)
        for block in tower.blocks:
            block.experts[0].out.weight.normal_()
        assert not torch.equal(tower(pixels).last_hidden_state, expected)


@torch.no_grad()
def test_mova_gates_against_plain_loops():
    experts = [DINO, SIGLIP, CONVNEXT, SAM]
    tower = Mova.of(
        CLIP, *experts, image_size=56, heads=4, top_k=2, stage_depth=0, text_width=8
    ).eval()
    for layer in (tower.gate_words, tower.gate_features, tower.gate_out):
        torch.nn.init.normal_(layer.weight)
    x, words = torch.randn(3, 16, 32), torch.randn(2, 4, 8)
    valid = torch.tensor([[False, True, True, True], [False, False, False, False]])
    for routed in (None, ["dinov2", "sam_vision_model", "convnext"], ["convnext"]):
        tower.route(routed)
        with asking(Question(words, valid, [2, 1])):
            gates = tower.gates(x)
        for row, sample in enumerate([0, 0, 1]):
            heard = [words[sample, j] for j in range(4) if valid[sample, j]]
            mean = sum(heard) / len(heard) if heard else torch.zeros(8)
            seen = sum(x[row, j] for j in range(16)) / 16
            joined = torch.cat([tower.gate_words.weight, tower.gate_features.weight], 1)
            hidden = joined @ torch.cat([mean, seen]) + tower.gate_features.bias
            scores = tower.gate_out(torch.nn.functional.gelu(hidden)).tolist()
            open_ = [i for i, name in enumerate(tower.config.names) if routed is None
                     or name in routed]  # fmt: skip
            chosen = sorted(open_, key=lambda i: -scores[i])[:2]
            total = sum(math.exp(scores[i]) for i in chosen)
            for i in range(4):
                expected = math.exp(scores[i]) / total if i in chosen else 0.0
                assert float(gates[row, i]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_mova_computes_routed_experts_alone(small):
    model, processor = towered(small, "mova")
    tower, pixels = model.model.vision_tower, torch.randn(1, 3, 56, 56)
    both = tower(pixels).last_hidden_state
    tower.route(["dinov2"])
    one = tower(pixels).last_hidden_state
    tower.encoders[2].model = None  # SigLIP is not asked
    assert torch.equal(tower(pixels).last_hidden_state, one)
    assert not torch.equal(one, both)


# --- what is refused


@torch.no_grad()
def test_pictures_of_another_size_are_refused(small):
    for name in MAKE:
        model, processor = towered(small, name)
        inputs = build_inputs(processor, SAMPLES[:1])
        inputs["pixel_values"] = inputs["pixel_values"][..., :-2, :]
        with pytest.raises(DataError, match="is given pictures of") as caught:
            model(**inputs)
        assert caught.value.argument == "pixel_values" and caught.value.expected


def test_parts_that_do_not_fit_are_refused(small):
    model, processor = small
    with pytest.raises(PlanError, match="top_k=3 experts are to be chosen of 2"):
        Mova.of(CLIP, DINO, SIGLIP, image_size=56, heads=4)
    with pytest.raises(PlanError, match="no expert 'sam'"):
        Mova.of(CLIP, DINO, image_size=56, heads=4, top_k=1, routed=["sam"])
    with pytest.raises(PlanError, match="made of 2 encoders, not of 1"):
        Hybrid.of(SAM)
    with pytest.raises(PlanError, match="is a ConvNeXt, not a clip_vision_model"):
        ConvLLaVA.of(CLIP)
    with pytest.raises(PlanError, match="no whole cells of 64"):
        ConvLLaVA.of(CONVNEXT, image_size=1000)
    with pytest.raises(PlanError, match="ConvLLaVA has no 'deep'"):
        ConvLLaVA.of(CONVNEXT, deep=3)
    with pytest.raises(DataError, match="cannot read an encoder"):
        ConvLLaVA.of("no/such/folder")
    tower = MAKE["brave"]()
    tower.meet(8)
    with pytest.raises(PlanError, match="reads words of 8 channels"):
        mllm.with_tower(model, tower, processor)
    with mllm.patch(model, "fastv"), pytest.raises(PlanError, match="is patched"):
        mllm.with_tower(model, MAKE["convllava"](), processor)
    with torch.device("meta"):
        other = LlavaNextForConditionalGeneration(
            LlavaNextConfig(text_config=tiny.config().text_config, vision_config=CLIP)
        )
    with pytest.raises(PlanError, match="LlavaNextForConditionalGeneration takes no other tower"):
        mllm.with_tower(other, MAKE["convllava"](), processor)
    with pytest.raises(PlanError, match="does not count a picture's tokens"):
        mllm.with_tower(model, MAKE["convllava"](), processor.tokenizer)


def test_recipes_name_towers():
    written = load("convllava", tiny=True)._written
    for name in TOWERS:
        assert load(name).model.tower.type == name
    for key, value, message in (
        ("type", "convlava", "did you mean 'convllava'"),
        ("depht", 3, "did you mean 'depth'"),
        ("encoders", [], "at least 1 item"),
    ):
        changed = copy.deepcopy(written)
        changed["model"]["tower"][key] = value
        with pytest.raises(RecipeError, match=message):
            validate(changed)
    with pytest.raises(RecipeError, match="parallel.zero=3"):
        validate(written | {"parallel": {"zero": 3}})


@pytest.mark.slow
@names
def test_a_dry_run_tries_the_tower(name):
    found = preview(load(name, tiny=True), World())["stages"]
    new = [stage["parts"]["multi_modal_projector"] for stage in found]
    assert all(math.isfinite(stage["step"]["loss"]) for stage in found)
    assert all(part["trained"] == part["parameters"] > 3000 for part in new)


@pytest.mark.slow
def test_a_dry_run_takes_a_folder_with_a_tower(small, tmp_path):
    model, processor = towered(small, "brave")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    written = {
        "version": 1,
        "model": {"path": str(tmp_path), "freeze_vision_tower": True},
        "data": [{"path": "yardstick", "tasks": ["exist"], "limit": 4}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 2},
        "output": {"dir": "x"},
    }
    assert math.isfinite(preview(validate(written), World())["step"]["loss"])
    written["model"]["feature_cache"] = str(tmp_path)
    with pytest.raises(RecipeError, match="trained with the projector, or read the question"):
        preview(validate(written), World())
