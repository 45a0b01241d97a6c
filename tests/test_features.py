"""Features of frozen towers that are kept: the same bits, and what cannot be kept."""

from __future__ import annotations

import json

import families
import pytest
import torch
from safetensors.torch import load_file
from train_tiny import save_small

import mllm
from mllm.errors import RecipeError
from mllm.training import features, preview
from mllm.training.features import FeatureCache
from mllm.training.launch import World
from mllm.training.recipe import validate
from mllm.training.run import run

PROJECTOR = {"freeze_vision_tower": True, "freeze_language_model": True}
# Their towers take pictures one by one, and are given nothing else that differs between batches.
KEPT = ("llava", "llava_next", "llava_onevision", "internvl", "gemma3", "idefics3", "smolvlm",
        "paligemma", "vipllava", "deepseek_vl")  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def recipe_for(small, folder, cache=None, *, method=None, plan=None, model=None, parallel=None):
    return validate(
        {
            "version": 1,
            "model": {"path": str(small), "dtype": "float32", "feature_cache": cache and str(cache)}
            | (PROJECTOR if model is None else model),
            "plan": plan,
            "data": [{"path": "yardstick", "tasks": ["exist"], "limit": 5}],
            "method": method or {"type": "full"},
            "parallel": parallel or {},
            "train": {
                "seed": 3,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,  # the last batch of an epoch is smaller
                "learning_rate": 1e-2,
                "save_strategy": "no",
                "logging_steps": 1,
            },
            "output": {"dir": str(folder)},
        }
    )


def logged(folder):
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def losses(folder):
    return [row["loss"] for row in logged(folder)]


@pytest.mark.parametrize(
    ("method", "plan", "model"),
    [
        (None, None, None),
        ({"type": "lora", "r": 4, "modules_to_save": ["multi_modal_projector"]}, None, {}),
        (None, "divprune:keep=6", None),  # reads features, which are kept
        (None, "fastv:layer=1:keep=6", {"freeze_vision_tower": True}),
    ],
)
def test_losses_and_weights_are_equal_to_the_last_bit(method, plan, model, small, tmp_path):
    cache = tmp_path / "cache"
    changes = {"method": method, "plan": plan, "model": model}
    run(recipe_for(small, tmp_path / "without", **changes))
    run(recipe_for(small, tmp_path / "filling", cache, **changes))
    run(recipe_for(small, tmp_path / "full", cache, **changes))
    assert losses(tmp_path / "without") == losses(tmp_path / "filling") == losses(tmp_path / "full")
    one, two, three = (
        load_file(tmp_path / name / "model/model.safetensors")
        for name in ("without", "filling", "full")
    )
    assert all(torch.equal(one[k], two[k]) and torch.equal(one[k], three[k]) for k in one)
    # The first epoch sees every picture for the first time.
    assert [row["feature_hits"] for row in logged(tmp_path / "filling")][:3] == [0, 0, 0]
    assert {row["feature_hits"] for row in logged(tmp_path / "full")} == {1}


def pictures(count, seed=0):
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def features_of(model, pixels):
    found = model.get_image_features(pixel_values=pixels).pooler_output
    return torch.cat(list(found))


def test_a_torn_file_is_computed_again(small, tmp_path):
    model, _ = mllm.load_model(small)
    with torch.no_grad(), FeatureCache(model, tmp_path).at_work() as cache:
        want = features_of(model, pictures(2))
        for file in tmp_path.rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:100])
        assert torch.equal(features_of(model, pictures(2)), want) and cache.hits == 0
        assert torch.equal(features_of(model, pictures(2)), want) and cache.hits == 2
    assert "forward" not in model.get_encoder("image").__dict__


def test_other_pixels_other_weights_and_other_batches_are_not_confused(small, tmp_path):
    model, _ = mllm.load_model(small)
    with torch.no_grad(), FeatureCache(model, tmp_path).at_work() as cache:
        features_of(model, pictures(2))
        features_of(model, pictures(2) + 1e-6)
        features_of(model, pictures(2)[:1])  # what a batch of another size gives may differ
        assert cache.hits == 0
    with torch.no_grad():
        next(model.get_encoder("image").parameters()).mul_(1.001)
        with FeatureCache(model, tmp_path).at_work() as cache:
            features_of(model, pictures(2))
            assert cache.hits == 0


@pytest.mark.parametrize("family", KEPT)
def test_other_families_get_what_their_towers_gave(family, tmp_path):
    model = families.model(family)
    inputs = families.collate(family, families.samples(family, "padded"))
    with torch.no_grad():
        want = model(**inputs).logits
        with FeatureCache(model, tmp_path).at_work() as cache:
            assert torch.equal(model(**inputs).logits, want) and not cache.hits
            assert torch.equal(model(**inputs).logits, want) and cache.hits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "the vision tower is trained"),
        (
            {"model": {}, "method": {"type": "lora", "r": 4, "target_modules": ["fc1"]}},
            "the vision tower is trained",
        ),
        ({"plan": "visionzip:keep=6"}, "reads attention or keys"),
        ({"plan": "tome:r=2"}, "inside the tower"),
        ({"parallel": {"zero": 3}, "method": {"type": "full"}}, "ZeRO-3"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes, words, small, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "check_deepspeed", lambda: None)
    with pytest.raises(RecipeError, match=words) as caught:
        preview.preview(recipe_for(small, tmp_path / "run", tmp_path / "cache", **changes), World())
    assert caught.value.argument == "model.feature_cache"
    assert not (tmp_path / "cache").exists()


def test_a_tower_that_takes_all_pictures_as_one_is_refused(small, tmp_path):
    recipe = recipe_for(small, tmp_path / "run", tmp_path / "cache")
    with pytest.raises(RecipeError, match="one sequence"):
        features.check_features(recipe, families.model("qwen2_vl"), None, False)
