"""Every mistake is one clear error that names what was given, and the model stays as it was."""

from __future__ import annotations

import pytest
import tiny
import torch
from matrix import FEW, LAYERS, PRECOMPUTED, SIDE, anatomy, fresh
from transformers import (
    CLIPVisionModel,
    DynamicCache,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    StaticCache,
)

import mllm
from mllm.errors import CacheMismatchError, DataError, MllmError, NoEffectError, PlanError

TOKENS = SIDE * SIDE


def complete(error: MllmError, argument: str) -> None:
    assert error.argument == argument
    assert error.expected
    assert "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize(
    "plan, argument",
    [
        (f"fastv:layer=2:keep={TOKENS + 1}", "keep"),
        (f"visionzip:keep={TOKENS + 1}", "keep"),
        ("random:keep=1000", "keep"),
        ("avgpool:keep=577", "keep"),
        (f"fastv:layer={LAYERS}", "layer"),
        ("fastv:layer=99", "layer"),
        ("fastv:layer=0", "layer"),
        ("fastvv", "method"),
        ("fastv:kep=3", "kep"),
        ("fastv:keep", "plan"),
        ("avgpool:keep=4+visionzip:keep=4", "plan"),
        ("visionzip:keep=8+avgpool:keep=4", "plan"),
        ("avgpool:keep=9+avgpool:keep=4", "plan"),
        ("divprune:keep=8+downsample:keep=4", "plan"),
        ("divprune:keep=9+visionzip:keep=4", "plan"),
        ("divprune:keep=9:positions=original+random:keep=4", "positions"),
        ("/no/such/folder", "method"),
        (None, "plan"),
        ([7], "plan"),
    ],
)
@torch.no_grad()
def test_plans_are_refused_at_once(plan, argument):
    model = fresh()
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    plain, before = model(**inputs).logits, anatomy(model)
    with pytest.raises(PlanError) as caught:
        mllm.patch(model, plan)
    complete(caught.value, argument)
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)
    with mllm.patch(model, FEW[0]):
        model(**inputs)


def test_the_message_gives_the_limit():
    with pytest.raises(PlanError, match=rf"{TOKENS + 1}.*{TOKENS}"):
        mllm.patch(fresh(), f"divprune:keep={TOKENS + 1}")
    with pytest.raises(PlanError) as caught:
        mllm.patch(fresh(), f"fastv:layer={LAYERS}")
    assert str(LAYERS) in caught.value.expected


def _unsupported():
    yield LlamaForCausalLM(tiny.config(layers=1).text_config)
    yield CLIPVisionModel(tiny.config().vision_config)
    yield torch.nn.Linear(2, 2)
    yield fresh().model.language_model
    yield "a path"
    yield None


@pytest.mark.parametrize("model", list(_unsupported()), ids=lambda m: type(m).__name__)
def test_unsupported_models(model):
    with pytest.raises(PlanError) as caught:
        mllm.patch(model, "fastv:layer=1")
    complete(caught.value, "model")
    assert type(model).__name__ in str(caught.value)
    assert "llava" in caught.value.expected


def test_a_tower_without_a_grid_is_refused():
    cfg = tiny.config(side=SIDE)
    cfg.vision_feature_select_strategy = "full"
    with pytest.raises(PlanError) as caught:
        mllm.patch(LlavaForConditionalGeneration(cfg), "fastv:layer=1")
    complete(caught.value, "vision_feature_select_strategy")


@pytest.mark.parametrize("spec", FEW)
def test_attention_that_cannot_be_read(spec):
    """Reading rows needs a known kernel; plans that read none may run on any."""
    model = fresh()
    model.set_attn_implementation("flex_attention")
    before = anatomy(model)
    if spec.startswith("divprune"):
        mllm.patch(model, spec).remove()
    else:
        with pytest.raises(PlanError) as caught:
            mllm.patch(model, spec)
        complete(caught.value, "attn_implementation")
        assert "flex_attention" in str(caught.value)
    assert anatomy(model) == before


def _one():
    return tiny.collate(tiny.samples("alone", side=SIDE))


def _without_pixels():
    inputs = tiny.collate(tiny.samples(side=SIDE))
    del inputs["pixel_values"]
    return inputs


def _without_placeholder():
    return {**tiny.collate(tiny.samples("text")), "pixel_values": _one()["pixel_values"]}


def _two_pictures_for_one():
    inputs = _one()
    return {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}


def _a_placeholder_short():
    inputs = _one()
    inputs["input_ids"][0, 5] = 17
    return inputs


def _a_placeholder_in_the_wrong_sample():
    """The total is right, so transformers itself would not notice."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    ids = inputs["input_ids"]
    ids[1, (ids[1] == tiny.IMAGE).nonzero()[0]] = 17
    ids[2, -2] = tiny.IMAGE
    return inputs


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    "build",
    [
        _without_pixels,
        _without_placeholder,
        _two_pictures_for_one,
        _a_placeholder_short,
        _a_placeholder_in_the_wrong_sample,
    ],
    ids=lambda f: f.__name__[1:],
)
@pytest.mark.parametrize("spec", FEW)
@torch.no_grad()
def test_pictures_and_placeholders_must_agree(spec, build, call):
    model = fresh()
    good = _one()
    with mllm.patch(model, spec):
        want = model(**good).logits
        with pytest.raises(DataError) as caught:
            if call == "forward":
                model(**build())
            else:
                model.generate(**build(), max_new_tokens=2)
        complete(caught.value, caught.value.argument)
        assert caught.value.argument in ("input_ids", "pixel_values")
        assert torch.equal(model(**good).logits, want)


@torch.no_grad()
def test_pixels_need_input_ids():
    model = fresh()
    inputs = _one()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with mllm.patch(model, FEW[0]):
        with pytest.raises(DataError) as caught:
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        complete(caught.value, "input_ids")


@torch.no_grad()
def test_static_caches_are_refused():
    inputs = _one()
    model = fresh()
    with mllm.patch(model, FEW[2]):
        want = model(**inputs).logits
        with pytest.raises(PlanError) as caught:
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        complete(caught.value, "cache_implementation")
        with pytest.raises(PlanError) as caught:
            model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        complete(caught.value, "past_key_values")
        model.generation_config.cache_implementation = "static"
        with pytest.raises(PlanError) as caught:
            model.generate(**inputs, max_new_tokens=2)
        complete(caught.value, "cache_implementation")
        model.generation_config.cache_implementation = None
        with pytest.raises(PlanError) as caught:
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 26, 26, dtype=torch.bool)})
        complete(caught.value, "attention_mask")
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("spec", FEW)
@torch.no_grad()
def test_continuous_batching_is_refused(spec):
    """Its paged cache holds every token of every layer."""
    inputs = _one()
    model = fresh()
    plain, before = model(**inputs).logits, anatomy(model)
    with mllm.patch(model, spec):
        for call in (
            lambda: model.generate_batch([[1, 17, 23]], max_new_tokens=2),
            lambda: model.init_continuous_batching(),
            lambda: model.continuous_batching_context_manager().__enter__(),
        ):
            with pytest.raises(PlanError, match="paged") as caught:
                call()
            complete(caught.value, "model")
            assert "generate()" in caught.value.expected
        model.generate(**inputs, max_new_tokens=2)
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)


def test_tensor_parallel_is_refused():
    """Every rank would choose by the heads that it has."""
    model = fresh()
    model._tp_size = 2
    before = anatomy(model)
    with pytest.raises(PlanError, match="2 ranks") as caught:
        mllm.patch(model, FEW[0])
    complete(caught.value, "model")
    assert anatomy(model) == before
    model._tp_size = 1
    mllm.patch(model, FEW[0]).remove()


@pytest.mark.parametrize("spec", FEW)
@torch.no_grad()
def test_patching_and_removing_twice(spec):
    """Both are said, and the model goes on as it was: patched by the first, then unpatched."""
    inputs = _one()
    model = fresh()
    plain, before = model(**inputs).logits, anatomy(model)
    first = mllm.patch(model, spec)
    mine = model(**inputs).logits
    with pytest.raises(PlanError, match="already patched") as caught:
        mllm.patch(model, FEW[0])
    complete(caught.value, "model")
    assert torch.equal(model(**inputs).logits, mine)
    first.remove()
    with pytest.raises(PlanError, match="removed before") as caught:
        first.remove()
    complete(caught.value, "remove")
    assert anatomy(model) == before
    second = mllm.patch(model, FEW[1])
    other = model(**inputs).logits
    with pytest.raises(PlanError, match="removed before"):
        first.remove()
    assert torch.equal(model(**inputs).logits, other), "the new plan is not taken out by the old"
    second.remove()
    assert anatomy(model) == before
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_leaving_the_block_after_remove_is_fine():
    model = fresh()
    before = anatomy(model)
    with mllm.patch(model, FEW[0]) as patched:
        patched.remove()
    assert anatomy(model) == before


@pytest.mark.parametrize("spec", FEW)
@torch.no_grad()
def test_what_changes_the_tower_or_the_prefill_under_a_plan(spec):
    inputs = _one()
    model = fresh()
    with mllm.patch(model, spec):
        want = model(**inputs).logits
        assert torch.equal(model(**inputs, vision_feature_layer=-2).logits, want)
        with pytest.raises(PlanError) as caught:
            model(**inputs, vision_feature_layer=-1)
        complete(caught.value, "vision_feature_layer")


@torch.no_grad()
def test_a_compressed_cache_belongs_to_its_plan():
    inputs = _one()
    model = fresh()
    token = torch.tensor([[7]])
    with mllm.patch(model, "fastv:layer=2:keep=0.5"):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(3)]
    with pytest.raises(CacheMismatchError) as caught:
        model(input_ids=token, past_key_values=caches[0])
    complete(caught.value, "past_key_values")
    for cache, other in zip(caches[1:], ["visionzip:keep=10", "fastv:layer=3"], strict=True):
        with mllm.patch(model, other):
            with pytest.raises(CacheMismatchError) as caught:
                model(input_ids=token, past_key_values=cache)
            complete(caught.value, "past_key_values")


@pytest.mark.parametrize("spec", FEW)
@torch.no_grad()
def test_an_unpatched_cache_is_refused(spec):
    """Its pictures were never reduced: going on would only look like a plan at work."""
    inputs = _one()
    model = fresh()
    length = inputs["input_ids"].shape[1]
    more = {
        "input_ids": torch.tensor([[7, 9, 11]]),
        "attention_mask": torch.ones(1, length + 3, dtype=torch.long),
    }
    cache = model(**inputs, past_key_values=DynamicCache(config=model.config)).past_key_values
    keys = [layer.keys.clone() for layer in cache.layers]
    with mllm.patch(model, spec):
        with pytest.raises(CacheMismatchError, match="without a plan") as caught:
            model(**more, past_key_values=cache)
        complete(caught.value, "past_key_values")
        with pytest.raises(CacheMismatchError):
            ids = torch.cat([inputs["input_ids"], more["input_ids"]], 1)
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
        model(**inputs)
    assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, keys, strict=True))
    assert model(**more, past_key_values=cache).logits.isfinite().all(), "it is still good"


@torch.no_grad()
def test_features_of_another_model():
    """Features that the plan never saw cannot be reduced, and that is said."""
    model, other = fresh(), fresh()
    if not PRECOMPUTED:
        pytest.skip("this transformers computes features inside forward")
    inputs = _one()
    features = other.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
    with mllm.patch(model, FEW[0]):
        with pytest.raises(DataError) as caught:
            model(**inputs, mm_encoder_outputs={"image": features})
        complete(caught.value, "mm_encoder_outputs")


def test_undeclared_signals_cannot_be_read():
    """A method gets what it declares; anything else is an error of the method."""
    from mllm.compressors.base import Context
    from mllm.plan import get_method

    stage = get_method("divprune")()
    ctx = Context(stage, {"features": torch.zeros(1, 4, 2)})
    with pytest.raises(PlanError, match="does not declare"):
        ctx["attention"]


def test_errors_are_value_errors_with_fields():
    for cls in (PlanError, DataError, CacheMismatchError):
        error = cls("what happened", argument="keep", given=0, expected="1")
        assert isinstance(error, MllmError) and isinstance(error, ValueError)
        assert error.as_dict() == {
            "type": cls.__name__,
            "message": "what happened",
            "argument": "keep",
            "given": "0",
            "expected": "1",
        }


def _new_layer(model):
    """Layer 2 exchanged after the patch: its hooks are gone, so the cut never comes."""
    lm = model.model.language_model
    lm.layers[2] = type(lm.layers[2])(lm.config, 2).eval()


def _new_attention(model):
    """Attention of layer 1 exchanged: nobody reads the scores that the cut needs."""
    layer = model.model.language_model.layers[1]
    layer.self_attn = type(layer.self_attn)(model.model.language_model.config, 1).eval()


def _new_tower_block(model):
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    block = tower.encoder.layers[-2]
    block.self_attn = type(block.self_attn)(tower.config).eval()


@pytest.mark.parametrize(
    "spec, change, method",
    [
        ("fastv:layer=2:keep=0.5", _new_layer, "fastv"),
        ("fastv:layer=2:keep=0.5", _new_attention, "fastv"),
        ("visionzip:keep=10", _new_tower_block, "visionzip"),
    ],
)
@torch.no_grad()
def test_a_plan_that_has_no_effect_says_so(spec, change, method):
    """A hook that has silently become a no-op is the classic failure of such tools."""
    model = fresh()
    patched = mllm.patch(model, spec)
    change(model)
    with pytest.raises(NoEffectError, match=method) as caught:
        model(**_one())
    assert caught.value.expected
    model(**tiny.collate(tiny.samples("text")))
    patched.remove()
    assert model(**_one()).logits.shape[1] == 26
