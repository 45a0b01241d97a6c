"""What recipes can say: data, order, rates, teachers; what is refused; what is tried beforehand."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from PIL import Image
from train_tiny import save_small

import mllm
from mllm.errors import DataError, PlanError, RecipeError
from mllm.loading import load_model
from mllm.routers.adapter import is_adapter
from mllm.training import parts, preview, speed
from mllm.training.data import Collator, Conversations, load_data
from mllm.training.distill import Teacher, distill_loss
from mllm.training.finetune import check_four_bits, wrap_lora
from mllm.training.launch import World, deepspeed_config
from mllm.training.ordering import Order
from mllm.training.recipe import load, shipped, validate
from mllm.training.run import run
from mllm.training.schema import DataPart, DistillPart, LearningRates
from mllm.training.tiny import new_processor

REPOSITORY = Path(__file__).parents[1]
PLAN = "visionzip:keep=6"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def recipe_for(small, folder, **changes):
    written = {
        "version": 1,
        "model": {"path": str(small), "dtype": "float32"},
        "data": [{"path": "yardstick", "tasks": ["exist", "ocr_word"], "limit": 4}],
        "method": {"type": "lora", "r": 4},
        "train": {
            "seed": 3,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 1,
            "logging_steps": 1,
        },
        "output": {"dir": str(folder)},
    }
    written["train"] |= changes.pop("train", {})
    return validate(written | changes)


def turn(who, text):
    return {"from": who, "value": text}


def rows_of(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


# --- shipped recipes


def with_tiny():
    return [name for name in shipped() if load(name).tiny is not None]


def test_the_published_recipes_are_there():
    assert len(with_tiny()) >= 6
    for name in with_tiny():
        text = shipped()[name].read_text()
        assert text.startswith("# ") and f"mllm train {name} --tiny" in text, name
        # The tiny part runs on one CPU, and nowhere near the real run's folder.
        tiny = load(name, tiny=True)
        assert tiny.model.path == "tiny-llava" and tiny.parallel.zero is None
        assert tiny.output.dir != load(name).output.dir
        assert "published" in load(name).model_dump()


def test_a_tiny_part_is_laid_over_and_not_hashed():
    plain, tiny = load("distil-64"), load("distil-64", tiny=True)
    assert tiny.method.distill.layers == [3, 7] and tiny.method.distill.temperature == 2.0
    assert plain.sha256 != tiny.sha256
    without = {k: v for k, v in plain._written.items() if k != "tiny"}
    assert validate(without).sha256 == plain.sha256
    assert plain.sha256 == load("distil-64", ["parallel.nproc=4"]).sha256
    with pytest.raises(RecipeError, match="has no tiny part"):
        load("lora-visionzip", tiny=True)
    with pytest.raises(RecipeError, match="did you mean 'model'"):
        validate(plain._written | {"tiny": {"modle": {}}})


@pytest.mark.slow
@pytest.mark.parametrize("name", with_tiny())
def test_every_tiny_part_runs(name, tmp_path):
    if name in ("pllava", "tcllava-finetune"):
        pytest.importorskip("av")
    recipe = load(name, [f"output.dir={tmp_path / 'run'}"], tiny=True)
    assert run(recipe)["status"] == "complete"
    model, _ = load_model(tmp_path / "run/model")
    if plan := recipe.tunes()[-1][1].plan:
        with mllm.patch(model, plan) as patched:
            learns = patched.routers is not None
        assert is_adapter(tmp_path / "run/routers") == learns


# --- data


def picture(path, colour="red"):
    Image.new("RGB", (20, 20), colour).save(path)
    return path


def messages(text, images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]


def write_lines(path, entries):
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return DataPart(path=str(path), format="messages")


def test_messages_with_several_pictures(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        picture(tmp_path / name, colour)
    entries = [
        {"id": "x", "images": ["a.png", "b.png"], "messages": messages("which?", 2)},
        {"id": "y", "messages": [{"role": "user", "content": "hello"},
                                 {"role": "assistant", "content": "hi"}]},
    ]  # fmt: skip
    data, _ = load_data([write_lines(tmp_path / "d.jsonl", entries)])
    assert [record.images for record in data.records] == [2, 0]
    assert [image.getpixel((0, 0)) for image in data[0]["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert data.records[0].length > data.records[1].length
    batch = Collator(new_processor())([data[0], data[1]])
    assert batch["pixel_values"].shape[0] == 2


@pytest.mark.skipif(find_spec("datasets") is None, reason="pip install datasets")
@pytest.mark.parametrize("kind", ["parquet", "folder", "split", "parquets"])
def test_parquet_and_datasets_folders(kind, tmp_path):
    import datasets

    raw = io.BytesIO()
    Image.new("RGB", (20, 20), "blue").save(raw, "PNG")
    rows = {
        "id": [1, 2],
        "messages": [messages("a?"), messages("b?")],
        "images": [[{"bytes": raw.getvalue(), "path": None}]] * 2,
    }
    found = datasets.Dataset.from_dict(rows)
    found = found.cast_column("images", datasets.List(datasets.Image()))
    path = tmp_path / "data"
    if kind == "parquet":
        path = tmp_path / "data.parquet"
        found.to_parquet(path)
    elif kind == "parquets":
        path.mkdir()
        found.to_parquet(path / "train-00000-of-00001.parquet")
        found.select([0]).to_parquet(path / "test-00000-of-00001.parquet")
    else:
        whole = datasets.DatasetDict({"train": found, "test": found.select([0])})
        (whole if kind == "split" else found).save_to_disk(path)
    data, digests = load_data([DataPart(path=str(path), format="messages")])
    assert len(data) == 2 and data.records[1].where.endswith("entry 1 (id 2)")
    assert data[0]["images"][0].getpixel((3, 3)) == (0, 0, 255)
    assert load_data([DataPart(path=str(path), format="messages")])[1] == digests
    if kind == "split":
        with pytest.raises(DataError, match="none of"):
            load_data([DataPart(path=str(path), format="messages", split="dev")])


def test_broken_entries_are_counted_and_skipped_up_to_a_share(tmp_path):
    picture(tmp_path / "a.png")
    good = {"images": ["a.png"], "messages": messages("a?")}
    lines = [good, '{"images": [', good, {"id": 9, "images": [], "messages": messages("b?")}]
    part = write_lines(tmp_path / "d.jsonl", [*lines, good, good])
    with pytest.raises(DataError, match="entry 1 is no JSON"):
        load_data([part])
    with pytest.raises(DataError, match="2 of 6 entries cannot be used"):
        load_data([part.model_copy(update={"skip_bad": 0.2})])
    with pytest.warns(UserWarning, match="2 entries are skipped"):
        data, _ = load_data([part.model_copy(update={"skip_bad": 0.4})])
    assert len(data) == 4 and "1 image placeholders for 0 images" in data.skipped[1]
    assert "entry 3 (id 9)" in data.skipped[1]


def test_unreadable_pictures_are_passed_over_up_to_a_share(tmp_path, small):
    """The next conversation stands in; the count is shared by loader workers and recorded."""
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    entries = [
        {"images": [n], "messages": messages(n)} for n in ("a.png", "b.png") + ("a.png",) * 4
    ]
    part = write_lines(tmp_path / "d.jsonl", entries)
    data, _ = load_data([part])
    with pytest.raises(DataError, match="1 of 6 conversations.*entry 1.*b.png"):
        data[1]
    part = part.model_copy(update={"skip_bad": 0.2})
    data, _ = load_data([part])
    assert data[1]["messages"] == data[2]["messages"] and int(data.bad.sum()) == 1
    recipe = recipe_for(
        small, tmp_path / "run", data=[part.model_dump()],
        train={"dataloader_num_workers": 1, "max_steps": 3},
    )  # fmt: skip
    assert run(recipe)["skipped"] == {"entries": 0, "pictures": 1}


def test_other_parts_and_missing_files_are_named(tmp_path):
    talk = messages("a?", 0)
    talk[0]["content"].append({"type": "audio"})
    with pytest.raises(DataError, match="entry 0 .* part of type 'audio'"):
        load_data([write_lines(tmp_path / "d.jsonl", [{"id": 3, "messages": talk}])])
    with pytest.raises(DataError, match="cannot read the data file"):
        load_data([DataPart(path=str(tmp_path / "none.parquet"))])
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="not a non-empty list"):
        load_data([DataPart(path=str(tmp_path / "empty.json"))])


# --- order


def test_the_order_depends_on_seed_and_epoch_alone():
    order = Order(20, seed=1)
    torch.manual_seed(5)
    first = list(order)
    torch.manual_seed(6)
    assert list(order) == first and sorted(first) == list(range(20))
    order.set_epoch(1)
    assert list(order) != first
    assert list(Order(20, seed=2)) != first


@pytest.mark.parametrize("lengths", [None, list(range(50))])
def test_batches_are_of_one_kind(lengths):
    kinds = [i % 3 > 0 for i in range(50)]
    order = list(Order(50, 0, 4, lengths, kinds))
    assert sorted(order) == list(range(50))
    whole = [order[i : i + 4] for i in range(0, 48, 4)]
    mixed = [batch for batch in whole if len({kinds[i] for i in batch}) > 1]
    assert len(mixed) <= 1  # what fills no batch of its kind comes last
    if lengths:
        spread = [max(batch) - min(batch) for batch in whole[:-1]]
        assert max(spread) <= 12  # of 50, in order of length


# --- parts and rates


@pytest.mark.parametrize("family", families.KITS)
def test_every_family_has_its_three_parts(family):
    model = families.model(family)
    found = parts.parts(model)
    assert set(found.values()) == set(parts.PARTS)
    assert found.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    words = ("language_model", "text_model", "lm_head")
    assert all(any(w in n for w in words) for n in found if found[n] == parts.PARTS[2])


def test_rates_by_part_reach_the_optimizer(small, tmp_path):
    model, _ = load_model(small)
    before = parts.parts(model)
    recipe = recipe_for(
        small, tmp_path,
        method={"type": "lora", "r": 2, "modules_to_save": ["multi_modal_projector"],
                "target_modules": r".*(language_model|vision_tower).*q_proj"},
    )  # fmt: skip
    wrapped = wrap_lora(model, recipe)
    rates = LearningRates(multi_modal_projector=1e-5, vision_tower=1e-6)
    names = {id(p): name for name, p in wrapped.named_parameters()}

    def rate_of(rates):
        return {
            names[id(p)]: group["lr"]
            for group in parts.groups(wrapped, before, rates, 1e-3, (), 0.0)
            for p in group["params"]
        }

    found = rate_of(rates)
    assert {lr for n, lr in found.items() if "multi_modal_projector" in n} == {1e-5}
    assert {lr for n, lr in found.items() if "vision_tower" in n} == {1e-6}
    assert {lr for n, lr in found.items() if "language_model" in n} == {1e-3}
    assert len(found) == sum(p.requires_grad for p in wrapped.parameters())
    found = rate_of(LearningRates(new_modules=7e-4, vision_tower=1e-6, multi_modal_projector=1e-5))
    assert {lr for n, lr in found.items() if "lora" in n} == {7e-4}
    assert {lr for n, lr in found.items() if "multi_modal_projector" in n} == {1e-5}


def test_a_part_with_a_tiny_rate_hardly_moves(small, tmp_path):
    from safetensors.torch import load_file

    changes = {"method": {"type": "full"}, "learning_rates": {"multi_modal_projector": 1e-9}}
    run(recipe_for(small, tmp_path / "run", **changes))
    new, old = (load_file(f / "model.safetensors") for f in (tmp_path / "run/model", small))
    moved = {key: float((new[key] - old[key]).abs().max()) for key in new}
    assert max(v for k, v in moved.items() if "projector" in k) < 1e-6
    assert max(v for k, v in moved.items() if "language_model" in k) > 1e-3


def test_the_projector_alone_from_a_random_start(small, tmp_path):
    from safetensors.torch import load_file

    model = {"path": str(small), "dtype": "float32", "reset_projector": True,
             "freeze_vision_tower": True, "freeze_language_model": True}  # fmt: skip
    run(recipe_for(small, tmp_path / "run", method={"type": "full"}, model=model))
    new, old = (load_file(f / "model.safetensors") for f in (tmp_path / "run/model", small))
    changed = {key for key in new if not torch.equal(new[key], old[key])}
    assert changed == {key for key in new if "multi_modal_projector" in key}
    with pytest.raises(RecipeError, match="drawn anew in parts"):
        recipe_for(small, tmp_path, model=model, parallel={"zero": 3})


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_variants_of_lora_train_and_merge(option, small, tmp_path):
    method = {"type": "lora", "r": 4, "lora_alpha": 4, option: True}
    run(recipe_for(small, tmp_path / "run", method=method, plan=PLAN))
    model, processor = load_model(tmp_path / "run/model")
    plain, _ = load_model(small)
    data, _ = load_data([DataPart(path="yardstick", tasks=["exist"], limit=1)])
    batch = Collator(processor)([data[0]])
    with torch.no_grad():
        assert float(model(**batch).loss) != float(plain(**batch).loss)
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config[option]


def test_four_bits_say_what_is_missing(small, tmp_path, monkeypatch):
    method = {"type": "lora", "r": 4, "load_in_4bit": True}
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="load_in_4bit cannot run here"):
            run(recipe_for(small, tmp_path / "run", method=method))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="bitsandbytes is not installed"):
        check_four_bits()


@pytest.mark.parametrize(
    "method",
    [{"target_modules": r".*\.(q_proj|down_proj)"}, {"modules_to_save": ["mlp"]}],
    ids=["adapters", "modules_to_save"],
)
def test_layers_that_a_plan_copies_are_the_models_own(method, small, tmp_path):
    """LLaVA-Mini copies decoder layers, which in a recipe PEFT has been at; its adapter is read
    back by a model where it has not."""
    model, _ = load_model(small)
    plan, word = "llavamini:depth=1", torch.ones(1, 1, dtype=torch.long)
    layer = model.get_decoder().layers[0]
    want = {name: x.clone() for name, x in layer.state_dict().items()}
    wrapped = wrap_lora(model, recipe_for(small, tmp_path, method={"type": "lora", **method}))
    assert layer.state_dict().keys() != want.keys()
    with mllm.patch(model, plan) as patched:
        own = model.mllm.state_dict()
        start = "1.fusion.layers.0."
        own = {k.removeprefix(start): x for k, x in own.items() if k.startswith(start)}
        assert own.keys() == want.keys()
        assert all(torch.equal(x, want[name]) for name, x in own.items())
        assert all(p.requires_grad for p in model.mllm.parameters())
        patched.save_adapter(tmp_path / "adapter")
    assert wrapped(input_ids=word).logits.isfinite().all()  # what was copied is as it was
    assert layer.state_dict().keys() != want.keys()
    with mllm.patch(load_model(small)[0], tmp_path / "adapter") as patched:
        read = patched.routers.state_dict()
        assert all(torch.equal(read[start + name], x) for name, x in want.items())


# --- distillation


def test_a_teacher_shares_what_is_frozen_and_keeps_what_is_not(small, tmp_path):
    model, _ = load_model(small)
    teacher = Teacher(model)
    wrapped = wrap_lora(model, recipe_for(small, tmp_path))
    teacher.part_from(wrapped)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in pointers for p in teacher.model.parameters())

    model, _ = load_model(small)
    teacher = Teacher(model)
    teacher.part_from(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in teacher.model.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_the_loss_of_a_student_is_its_distance_from_the_teacher(small):
    """Zero for the teacher itself; the divergence by hand for another."""
    model, processor = load_model(small)
    data, _ = load_data([DataPart(path="yardstick", tasks=["exist"], limit=2)])
    batch = Collator(processor)([data[0], data[1]])
    part = DistillPart(temperature=2.0, layers=[0, -1])
    meant = Teacher(model)(batch, True)
    with torch.no_grad():
        same = model(**batch, output_hidden_states=True)
        with mllm.patch(model, PLAN):
            other = model(**batch, output_hidden_states=True)
    labels = batch["labels"]
    soft, hidden = distill_loss(same, meant, labels, part, None)
    assert abs(float(soft)) < 1e-5 and float(hidden) < 1e-8
    soft, hidden = distill_loss(other, meant, labels, part, None)
    where = [(b, t) for b in range(2) for t in range(labels.shape[1] - 1) if labels[b, t + 1] >= 0]
    want = 0.0
    for b, t in where:
        p, q = ((o.logits[b, t].double() / 2).softmax(-1) for o in (meant, other))
        want += float((p * (p / q).log()).sum()) * 4
    assert float(soft) == pytest.approx(want / len(where), rel=1e-2)
    assert float(hidden) > 0
    counted = distill_loss(other, meant, labels, part, 2 * len(where))[0]
    assert float(counted) == pytest.approx(float(soft) / 2, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_compressed_model_recovers_from_itself(method, small, tmp_path):
    """With the teacher alone in the loss, its distance falls."""
    part = {"weight": 1.0, "layers": [-1]}
    recipe = recipe_for(
        small, tmp_path / "run", plan=PLAN,
        method={"type": method, "distill": part, **({"r": 8} if method == "lora" else {})},
        data=[{"path": "yardstick", "tasks": ["exist"], "limit": 2}],
        train={"max_steps": 12, "save_steps": 100, "learning_rate": 3e-3},
    )  # fmt: skip
    run(recipe)
    away = [row["distill_hidden"] for row in rows_of(tmp_path / "run") if "distill_hidden" in row]
    assert len(away) == 12 and sum(away[-3:]) < 0.8 * sum(away[:3])


def test_distillation_needs_a_plan_and_whole_weights(small, tmp_path):
    method = {"type": "full", "distill": {}}
    with pytest.raises(RecipeError, match="nothing to distil"):
        recipe_for(small, tmp_path, method=method)
    with pytest.raises(RecipeError, match="ZeRO-3 takes apart"):
        recipe_for(small, tmp_path, method=method, plan=PLAN, parallel={"zero": 3})


# --- before training


def test_the_preview_resolves_counts_and_tries_a_step(small, tmp_path):
    recipe = recipe_for(
        small, tmp_path / "run", plan=PLAN,
        train={"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 3},
    )  # fmt: skip
    found = preview.preview(recipe, World(size=2))
    assert found["recipe"]["plan"] == PLAN and found["recipe"]["sampling"] == {"group_by": None}
    model, _ = load_model(small)
    wrapped = wrap_lora(model, recipe)
    learnt = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert found["parts"]["new_modules"]["trained"] == learnt
    assert sum(part["trained"] for part in found["parts"].values()) == learnt
    assert sum(part["parameters"] for part in found["parts"].values()) == sum(
        p.numel() for p in wrapped.parameters()
    )
    batch = found["batch"]
    assert batch["effective"] == 2 * 2 * 2 and batch["samples"] == 8
    assert batch["steps_per_epoch"] == 1 and batch["steps"] == 3
    assert found["memory"]["weights"] == 4 * sum(p.numel() for p in wrapped.parameters())
    assert 0 < found["step"]["loss"] < 20
    assert not (tmp_path / "run").exists()  # nothing is written


def test_steps_are_those_that_the_trainer_takes(small, tmp_path):
    recipe = recipe_for(
        small, tmp_path / "run",
        train={"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2,
               "save_strategy": "no"},
    )  # fmt: skip
    record = run(recipe)
    steps = max(row["step"] for row in rows_of(tmp_path / "run"))
    assert record["resolved"]["batch"]["steps"] == steps


@pytest.mark.parametrize(
    ("zero", "processes", "weights", "gradients", "optimizer"),
    [(None, 1, 4, 4, 8), (1, 4, 4, 4, 2), (2, 4, 4, 1, 2), (3, 4, 1, 1, 2)],
)
def test_memory_is_shared_out_by_stage(
    zero, processes, weights, gradients, optimizer, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(preview, "check_deepspeed", lambda: None)
    changes = {"method": {"type": "full"}, "parallel": {"zero": zero}}
    recipe = recipe_for(small, tmp_path, **changes)
    data, _ = load_data(recipe.data)
    found = preview.check(recipe, data, World(size=processes))["memory"]
    count = sum(p.numel() for p in load_model(small)[0].parameters())
    assert found["weights"] == weights * count
    assert found["gradients"] == gradients * count
    assert found["optimizer"] == optimizer * count


def test_too_little_memory_is_found_before_weights_are_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_available", lambda here: 2**20)
    with pytest.raises(RecipeError, match="0.0 GiB on each device") as caught:
        run(recipe_for(small, tmp_path / "run", method={"type": "full"}))
    assert "parallel.offload" in caught.value.expected


def test_text_alone_gives_a_plan_nothing_to_do(small, tmp_path):
    part = write_lines(tmp_path / "d.jsonl", [{"messages": messages("a?", 0)}] * 4)
    changes = {"data": [part.model_dump()]}
    with pytest.raises(DataError, match="none of the 4 conversations has a picture"):
        run(recipe_for(small, tmp_path / "run", plan=PLAN, **changes))
    assert run(recipe_for(small, tmp_path / "text", **changes))["status"] == "complete"


def test_a_plan_that_does_not_fit_is_found_before_weights_are_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.training.finetune.load_model", None)
    with pytest.raises(PlanError, match="layer"):
        run(recipe_for(small, tmp_path / "run", plan="fastv:keep=2:layer=9"))


def test_nothing_left_to_train_is_an_error(small, tmp_path):
    method = {"type": "lora", "r": 2, "target_modules": "nothing_like_this"}
    with pytest.raises(RecipeError, match="method"):
        run(recipe_for(small, tmp_path / "run", method=method))


def test_a_checkpoint_of_another_plan_is_another_recipe(small, tmp_path):
    run(recipe_for(small, tmp_path / "run", plan=PLAN))
    with pytest.raises(RecipeError, match="another recipe"):
        run(recipe_for(small, tmp_path / "run", plan="visionzip:keep=4"), resume=True)


def test_a_resume_on_other_data_is_refused(small, tmp_path):
    entries = [{"messages": messages("a?", 0)}] * 4
    part = write_lines(tmp_path / "d.jsonl", entries)
    recipe = recipe_for(small, tmp_path / "run", data=[part.model_dump()])
    run(recipe)
    shutil.rmtree(tmp_path / "run/model")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "stopped"}))
    write_lines(tmp_path / "d.jsonl", entries * 2)
    with pytest.raises(DataError, match="not what the run"):
        run(recipe, resume=True)


def test_small_models_of_other_families_take_a_step(tmp_path):
    """Qwen2.5-VL: rotary sections and the width behind the merger must fit the narrow layers."""
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": 512, "num_hidden_layers": 3},
        vision_config={"depth": 3, "fullatt_block_indexes": [1]},
        image_token_id=500, video_token_id=501, vision_start_token_id=502,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = preview.small_like(str(tmp_path))
    assert len(model.model.language_model.layers) == 3
    ids = torch.tensor([[3, 502, *[500] * 4, 7, 8]])
    out = model(
        input_ids=ids, labels=ids, pixel_values=torch.randn(16, 1176),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == 500).long(),
    )  # fmt: skip
    out.loss.backward()
    assert torch.isfinite(out.loss)


@pytest.mark.slow
def test_the_dry_run_of_the_command(small, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for(small, tmp_path / "run").to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "mllm", "train", str(path), "--dry-run", "--nproc", "2"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("new_modules", "batch    4 = 2 x 1", "memory   about", "trial    one step"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


def test_what_deepspeed_is_given(small, tmp_path):
    part = {"zero": 3, "offload": "parameters", "deepspeed": {"zero_optimization": {"x": 1}}}
    config = deepspeed_config(recipe_for(small, tmp_path, parallel=part))
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["x"] == 1 and zero["offload_param"] == {"device": "cpu"}
    assert zero["offload_optimizer"] == {"device": "cpu"} and "optimizer" not in config
    assert deepspeed_config(recipe_for(small, tmp_path)) is None


# --- during a run


def test_metrics_have_speed_and_memory(small, tmp_path):
    """A plan lowers the arithmetic of a step, by the ledger."""
    found = {}
    for name, plan in (("with", PLAN), ("without", None)):
        run(recipe_for(small, tmp_path / name, plan=plan, method={"type": "full"}))
        rows = [row for row in rows_of(tmp_path / name) if "loss" in row]
        assert all(row["tokens_per_second"] > 0 and row["memory_gib"] > 0 for row in rows)
        found[name] = rows[0]["tflops"] / rows[0]["tokens_per_second"]
    assert 0 < found["with"] < found["without"]


def test_metrics_have_the_share_of_waiting_for_data(small, tmp_path, monkeypatch):
    """By a clock of our own: a sample takes one second, a forward and backward pass two."""
    clock = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    make, count = Conversations.__getitem__, speed.Meter.count

    def slow_make(self, index):
        clock[0] += 1
        return make(self, index)

    def slow_count(self, inputs):
        clock[0] += 2
        return count(self, inputs)

    monkeypatch.setattr(Conversations, "__getitem__", slow_make)
    monkeypatch.setattr(speed.Meter, "count", slow_count)
    run(recipe_for(small, tmp_path / "run"))
    waits = [row["data_wait"] for row in rows_of(tmp_path / "run") if "loss" in row]
    # Two samples a step; the loader may have fetched a batch ahead in the first.
    assert waits[1] == 0.5 and waits[0] in (0.5, 0.6667)


def test_tensorboard_when_asked(small, tmp_path):
    pytest.importorskip("tensorboard")
    run(recipe_for(small, tmp_path / "run", train={"report_to": "tensorboard"}))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    run(recipe_for(small, tmp_path / "plain"))
    assert not list((tmp_path / "plain").rglob("events.out.tfevents.*"))


def test_a_loss_that_is_no_number_stops_the_run(small, tmp_path):
    recipe = recipe_for(
        small, tmp_path / "run", method={"type": "full"}, train={"learning_rate": 1e30}
    )
    with pytest.raises(RecipeError, match="the loss became (nan|inf) in step 2; checkpoint-1"):
        run(recipe)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert (tmp_path / "run/checkpoint-1/COMPLETE").is_file()
    assert not (tmp_path / "run/model").exists()


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_the_run_goes_on(
    small, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    run(recipe_for(small, tmp_path / "whole"))
    recipe = recipe_for(small, tmp_path / "run")
    real, calls = torch.save, []

    def save(thing, where, *more, **options):
        calls.append(str(where))
        if "checkpoint-2" in str(where):
            full_disk()
        return real(thing, where, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(DataError, match="No space left.*checkpoint-1 is whole"):
            run(recipe)
    assert calls
    assert {path.name for path in (tmp_path / "run").glob("checkpoint*")} == {"checkpoint-1"}
    assert not (tmp_path / "run/.saving").exists()
    assert run(recipe, resume=True)["status"] == "complete"
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_full_disk_at_the_end_is_one_error(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mllm.training.run.save_whole", full_disk)
        with pytest.raises(DataError, match="no room is left"):
            run(recipe_for(small, tmp_path / "run"))
    assert run(recipe_for(small, tmp_path / "run"), resume=True)["status"] == "complete"
    shutil.rmtree(tmp_path / "run")


# --- what a new user does wrong


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"conversations": [turn("human", "hi"), turn("bot", "x")]}, "from 'bot': roles are human"),
        ({"conversations": [turn("human", "hi"), turn("gpt", " ")]}, "no answer to learn"),
        ({"video": "a", "conversations": [turn("human", "<video>"), turn("gpt", "x")]}, "video"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(entry, words, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=words):
        load_data([DataPart(path=str(tmp_path / "a.json"))])


def test_a_source_that_may_skip_nothing_does_not_borrow_from_another(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    for name in ("whole", "torn"):
        turns = [turn("human", "<image>"), turn("gpt", "x")]
        entries = [{"image": f"{name}.png", "conversations": turns}] * 4
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    data, _ = load_data(
        [
            DataPart(path=str(tmp_path / "whole.json"), skip_bad=0.9),
            DataPart(path=str(tmp_path / "torn.json")),
        ]
    )
    with pytest.raises(DataError, match="1 of 4 conversations of data.1") as caught:
        data[4]
    assert caught.value.argument == "data.1.skip_bad"


def test_the_number_of_processes_leaves_no_trace_in_the_hash(small, tmp_path):
    here = recipe_for(small, tmp_path / "run")
    assert recipe_for(small, tmp_path / "run", parallel={"nproc": 2}).sha256 == here.sha256
    assert recipe_for(small, tmp_path / "run", parallel={"zero": 2}).sha256 != here.sha256


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_the_decoder_has_not_is_refused(layer, small, tmp_path):
    method = {"type": "full", "distill": {"layers": [layer]}}
    recipe = recipe_for(small, tmp_path / "run", plan=PLAN, method=method)
    with pytest.raises(RecipeError, match="the decoder has 2 layers"):
        preview.preview(recipe, World())


def test_a_rate_for_what_is_frozen_is_refused(small, tmp_path):
    changes = {"method": {"type": "full"}, "learning_rates": {"vision_tower": 1e-5}}
    model = {"path": str(small), "freeze_vision_tower": True}
    with pytest.raises(RecipeError, match="nothing of it is trained"):
        preview.preview(recipe_for(small, tmp_path / "run", model=model, **changes), World())


def test_the_preview_shows_the_rate_that_adapters_have(small, tmp_path):
    recipe = recipe_for(small, tmp_path / "run", learning_rates={"language_model": 3e-5})
    assert preview.preview(recipe, World())["parts"]["new_modules"]["learning_rate"] == 3e-5


def test_an_unknown_place_to_report_to_is_found_before_weights_are_read(small, tmp_path):
    recipe = recipe_for(small, tmp_path / "run", train={"report_to": "nosuch"})
    with pytest.raises(RecipeError, match="report_to='nosuch'"):
        run(recipe)


def test_a_folder_of_something_else_is_not_deleted(small, tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/mine").write_text("precious")
    (tmp_path / "run/run.json").write_text('{"tool": "another"}')
    output = {"dir": str(tmp_path / "run"), "overwrite": True}
    with pytest.raises(RecipeError, match="no record of a run"):
        run(recipe_for(small, tmp_path / "run", output=output))
    assert (tmp_path / "run/model/mine").read_text() == "precious"
