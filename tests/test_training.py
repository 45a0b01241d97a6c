"""Training: recipes, data, collator, checkpoints, resuming, the command."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mllm
from mllm.errors import DataError, PlanError, RecipeError
from mllm.loading import load_model
from mllm.training import recipe as recipes
from mllm.training.data import IGNORED, Collator, load_data
from mllm.training.recipe import load
from mllm.training.run import run
from mllm.training.schema import DataPart
from mllm.training.tiny import new_model, new_processor
from mllm.training.trainer import check_sealed, checkpoints, newest_checkpoint

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor():
    return new_processor()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, processor):
    """A folder with a random model of two narrow layers and 4 visual tokens."""
    from transformers import LlavaForConditionalGeneration

    config = new_model(processor.tokenizer).config
    config.vision_config.update({"num_hidden_layers": 2, "image_size": 28})
    config.text_config.update(
        {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    )
    config.image_seq_length = 4
    small = new_processor()
    small.image_processor.size = {"shortest_edge": 28}
    small.image_processor.crop_size = {"height": 28, "width": 28}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    small.save_pretrained(folder)
    return folder


def recipe_for(model, folder, **changes):
    written = {
        "version": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "data": [{"path": "yardstick", "tasks": ["exist", "ocr_word"], "limit": 6}],
        "method": {"type": "lora", "r": 4},
        "train": {
            "seed": 3,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "output": {"dir": str(folder)},
    }
    return recipes.validate(written | changes)


# --- recipes


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_is_valid(name):
    assert load(name).summary
    assert load(f"recipes/{name}.yaml").sha256 == load(name).sha256


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.path=x", "did you mean 'model'"),
        ("model.pth=x", "did you mean 'path'"),
        ("train.lerning_rate=1", "did you mean 'learning_rate'"),
        ("method.lora_alfa=1", "did you mean 'lora_alpha'"),
        ("data.0.styl=dusk", "did you mean 'style'"),
        ("data.0.tasks=[exst]", "did you mean 'exist'"),
        ("data.7.limit=1", "from 0 to 0"),
        ("data.0.limit=null", "data.0.limit must be given"),
        ("train.output_dir=x", "output.dir"),
        ("train.eval_strategy=steps", "nothing is evaluated during training"),
        ("train.load_best_model_at_end=true", "nothing is evaluated during training"),
        ("train.label_smoothing_factor=0.1", "takes the labels from the model"),
        ("train.train_sampling_strategy=group_by_length", "sampling.group_by"),
        ("parallel.zero=4", "less than or equal to 3"),
        ("parallel.sp_size=2", "not available"),
        ("parallel.offload=optimizer", "needs ZeRO"),
        ("parallel={zero: 2, offload: parameters}", "needs zero=3"),
        ("parallel.deepspeed={steps_per_print: 1}", "not DeepSpeed's"),
        ("train.deepspeed=ds.json", "parallel.zero"),
        ("train.max_steps=abc", "train.max_steps='abc'"),
        ("train.per_device_train_batch_size=0", "greater than or equal to 1"),
        ("train.per_device_train_batch_size=two", "valid integer"),
        ("train.gradient_accumulation_steps=0", "greater than or equal to 1"),
        ("train.learning_rate=abc", "valid number"),
        ("train.learning_rate=-1", "greater than 0"),
        ("train.bf16=2", "valid boolean"),
        ("train.seed=x", "valid integer"),
        ("train={num_train_epochs: 0}", "neither steps nor epochs"),
        ("learning_rates.tower=1", "did you mean 'vision_tower'"),
        ("learning_rates.vision_tower=0", "greater than 0"),
        ("method.distil.weight=1", "distil"),
        ("method.distill={weight: 2}", "less than or equal to 1"),
        ("method={type: full, load_in_4bit: true}", "cannot be trained"),
        ("sampling.group_by=size", "'length' or 'modality'"),
        ("method.type=router", "what its plan learns"),
        ("method.type=full", "belongs to lora"),
        ("model.path=new:tiny-llava", "needs stages"),
        ("version=2", "version=2"),
        ("train.learning_rate=[", "not valid YAML"),
        ("train", "no override"),
        ("output.dir.x=1", "has no parts"),
        ("train={? [a, b] : 1}", "a list cannot be a key"),
    ],
)
def test_a_wrong_override_is_named(override, words):
    with pytest.raises(RecipeError) as caught:
        load("lora-visionzip", [override])
    message = f"{caught.value} {caught.value.expected}"
    assert words in message


def test_an_override_changes_one_place_and_not_its_aliases():
    changed = load("tiny-llava", ["stages.2.optimizer.matrix_scale=3", "stages.3.losses.words=0"])
    before = load("tiny-llava")
    assert changed.stages[2].optimizer.matrix_scale == 3 and changed.stages[3].losses.words == 0
    changed.stages[2].optimizer, changed.stages[3].losses = (
        before.stages[2].optimizer, before.stages[3].losses,
    )  # fmt: skip
    assert changed.stages == before.stages


def test_a_place_in_an_empty_list_is_named():
    with pytest.raises(RecipeError, match="no place in a list of 0") as caught:
        load("lora-visionzip", ["data=[]", "data.0.limit=1"])
    assert caught.value.expected == "a list with entries"


def test_lora_needs_a_part_that_is_not_frozen():
    written = recipes.parse(recipes.resolve("lora-visionzip").read_text())
    del written["method"]["target_modules"]
    written["model"]["freeze_language_model"] = True
    with pytest.raises(RecipeError, match="frozen"):
        recipes.validate(written)


def test_a_wrong_plan_is_a_plan_error():
    with pytest.raises(PlanError):
        load("lora-visionzip", ["plan=visionzip:kep=4"])


def test_overrides_are_applied_and_hashed():
    changed = load("lora-visionzip", ["train.learning_rate=2e-3", "plan=null"])
    assert changed.train["learning_rate"] == 2e-3
    assert changed.plan is None
    assert changed.sha256 != load("lora-visionzip").sha256
    assert load("lora-visionzip", ["output.dir=/x"]).sha256 == load("lora-visionzip").sha256


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("version: 1\nmodel: {path: [\n")
    with pytest.raises(RecipeError, match="line 3"):
        load(path)
    path.write_text("version: 1\nversion: 1\n")
    with pytest.raises(RecipeError, match="line 2.*twice"):
        load(path)
    with pytest.raises(RecipeError, match="did you mean 'tiny-llava'"):
        load("tiny-lava")


# --- data


def test_labels_stand_on_the_answers_only(tmp_path, processor):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    talk = [
        {"from": "human", "value": "<image>\nis there a cat?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "what is written?"},
        {"from": "gpt", "value": "X7"},
    ]
    entries = [
        {"id": "one", "image": "a.png", "conversations": talk},
        {"id": "two", "conversations": talk[2:]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data, digests = load_data([DataPart(path=str(tmp_path / "data.json"))])
    batch = Collator(processor)([data[0], data[1]])
    decode = processor.tokenizer.decode
    learnt = [decode(row[row != IGNORED]) for row in batch["labels"]]
    assert learnt == [" yes</s> X7</s>", " X7</s>"]
    assert batch["pixel_values"].shape == (1, 3, 336, 336)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert len(digests[0]) == 64


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"id": 7, "image": "no.png", "conversations": []}, "0 image placeholders for 1"),
        ({"id": 7, "conversations": [{"from": "human", "value": "a"}]}, "no answer"),
        ({"id": 7, "conversations": [{"from": "alien", "value": "a"}]}, "from 'alien'"),
        (
            {
                "id": 7,
                "image": "no.png",
                "conversations": [
                    {"from": "human", "value": "<image> a"},
                    {"from": "gpt", "value": "b"},
                ],
            },
            "no.png, which does not exist",
        ),
        ([], "not an object"),
    ],
)
def test_bad_entries_are_named(tmp_path, entry, words):
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=words) as caught:
        load_data([DataPart(path=str(tmp_path / "data.json"))])
    assert "entry 0" in str(caught.value)


def test_weights_thin_out_and_repeat():
    part = {"path": "yardstick", "tasks": ["exist"], "limit": 8}
    assert len(load_data([DataPart(**part, weight=0.5)])[0]) == 4
    assert len(load_data([DataPart(**part, weight=2.0)])[0]) == 16


# --- runs


@pytest.fixture(scope="module")
def whole_run(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    record = run(recipe_for(small_model, folder))
    assert record["status"] == "complete"
    return folder


def test_the_run_folder_is_as_promised(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {
        "recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "README.md", "model",
        "checkpoint-2", "checkpoint-4",
    }  # fmt: skip
    assert all(check_sealed(path) is None for path in checkpoints(whole_run))
    assert (
        load(whole_run / "recipe.yaml").sha256
        == json.loads((whole_run / "run.json").read_text())["recipe_sha256"]
    )
    losses = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == [1, 2, 3, 4]


def test_the_saved_model_loads_and_differs_from_the_base(whole_run, small_model):
    new, old = (load_file(f / "model.safetensors") for f in (whole_run / "model", small_model))
    assert new.keys() == old.keys()
    changed = {key for key in new if not torch.equal(new[key], old[key])}
    assert changed and all("language_model" in key and "_proj" in key for key in changed)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resuming_gives_the_run_that_was_never_interrupted(small_model, tmp_path, method):
    changes = {} if method == "lora" else {"method": {"type": "full"}}
    first = recipe_for(small_model, tmp_path / "first", **changes)
    run(first)
    second = recipe_for(small_model, tmp_path / "second", **changes)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "second" / name)
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    (tmp_path / "second" / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    assert run(second, resume=True)["status"] == "complete"
    weights = [load_file(tmp_path / n / "model/model.safetensors") for n in ("first", "second")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


DEPTH, EXPERTS = "pmod:shift=0.0:min_ratio=0.5", "moellava:experts=3:layers=0"


def of_layers(folder, part):
    """Weights of decoder layers whose name has `part`."""
    weights = load_file(folder / "model.safetensors")
    return {k: v for k, v in weights.items() if "language_model" in k and part in k}


@pytest.mark.slow
@pytest.mark.parametrize("method, plan, moves", [
    ({"type": "lora", "r": 4}, DEPTH, ("self_attn", "mlp")),
    ({"type": "full"}, DEPTH, ("self_attn", "mlp")),
    ({"type": "router"}, DEPTH, ()),
    ({"type": "moe"}, EXPERTS, ()),
    ({"type": "moe", "r": 4}, EXPERTS, ("self_attn",)),
    ({"type": "moe", "dense_ffn": True}, EXPERTS, ("layers.1.mlp",)),
    ({"type": "full"}, f"{DEPTH}+{EXPERTS}", ("self_attn", "layers.1.mlp")),
], ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else None)  # fmt: skip
def test_what_a_plan_learns_is_trained_kept_and_resumed(
    small_model, tmp_path, method, plan, moves
):
    """It learns with any method; `model/` brings it along; of the rest only what is meant moves."""
    changes = {"method": method, "plan": plan}
    run(recipe_for(small_model, tmp_path / "first", **changes))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("checkpoint-4", "model", "routers"):
        shutil.rmtree(tmp_path / "second" / name)
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    (tmp_path / "second" / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    run(recipe_for(small_model, tmp_path / "second", **changes), resume=True)
    first, second = (
        load_file(tmp_path / n / "model/mllm_adapter.safetensors") for n in ("first", "second")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not any("mllm" in key for key in load_file(tmp_path / "first/model/model.safetensors"))
    assert (tmp_path / "first/routers.png").stat().st_size > 1000
    model, _ = load_model(tmp_path / "first/model")
    with mllm.patch(model, plan):
        start = {f"mllm.{k}": v.clone() for k, v in model.mllm.state_dict().items()}
    for name, value in first.items():
        idle = name.startswith("mllm.0.1.")  # of p-MoD: nothing reads what its last layer makes
        assert torch.equal(start[name], value) == idle, name
    with mllm.patch(model, tmp_path / "first/model"):
        assert all(torch.equal(first[f"mllm.{k}"], v) for k, v in model.mllm.state_dict().items())
    for part in ("self_attn", "layers.0.mlp", "layers.1.mlp"):
        before, after = of_layers(small_model, part), of_layers(tmp_path / "first/model", part)
        moved = not all(torch.equal(after[k], before[k]) for k in before)
        assert before and moved == any(m in part for m in moves), part


@pytest.mark.slow
def test_a_model_goes_on_with_what_its_plan_has_learnt(small_model, tmp_path):
    """As stages do: the next run starts from the experts, not from new copies of the FFNs."""
    method = {"type": "moe"}
    run(recipe_for(small_model, tmp_path / "first", method=method, plan=EXPERTS))
    start = tmp_path / "first/model"
    with pytest.raises(RecipeError, match="would lose it"):
        run(recipe_for(start, tmp_path / "without"))
    with pytest.raises(PlanError, match="another plan"):
        run(recipe_for(start, tmp_path / "other", method=method, plan="moe:experts=3:layers=0"))
    still = {"max_steps": 1, "learning_rate": 1e-12}
    run(recipe_for(start, tmp_path / "second", method=method, plan=EXPERTS, train=still))
    one, two = (
        load_file(tmp_path / n / "model/mllm_adapter.safetensors") for n in ("first", "second")
    )
    assert all(torch.allclose(one[k], two[k], atol=1e-9) for k in one)


def test_a_half_written_checkpoint_is_named_and_passed_over(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    damaged = folder / "checkpoint-4"
    next(damaged.glob("*.safetensors")).write_bytes(b"half")
    assert "damaged adapter_model.safetensors" in check_sealed(damaged)
    with pytest.warns(UserWarning, match="checkpoint-4 has a damaged"):
        assert newest_checkpoint(folder) == folder / "checkpoint-2"
    (damaged / "COMPLETE").unlink()
    assert "half-written" in check_sealed(damaged)


def test_resuming_from_a_damaged_checkpoint_is_refused(whole_run, small_model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text()) | {"status": "stopped"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "checkpoint-4" / "COMPLETE").unlink()
    with pytest.raises(DataError, match="checkpoint-4 has no COMPLETE") as caught:
        run(recipe_for(small_model, folder), resume=str(folder / "checkpoint-4"))
    assert "checkpoint-2" in caught.value.expected


def test_an_existing_run_is_not_overwritten(whole_run, small_model, tmp_path):
    before = (whole_run / "run.json").read_bytes()
    with pytest.raises(RecipeError, match="already holds a run"):
        run(recipe_for(small_model, whole_run))
    assert (whole_run / "run.json").read_bytes() == before
    (tmp_path / "letter.txt").write_text("mine")
    for overwrite in (False, True):
        output = {"dir": str(tmp_path), "overwrite": overwrite}
        with pytest.raises(RecipeError, match="not empty"):
            run(recipe_for(small_model, tmp_path, output=output))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_bad_places_to_resume_from(whole_run, small_model, tmp_path):
    with pytest.raises(RecipeError, match="nothing to resume"):
        run(recipe_for(small_model, tmp_path / "none"), resume=True)
    with pytest.raises(DataError, match="no such folder"):
        run(recipe_for(small_model, tmp_path), resume=str(tmp_path / "none"))
    other = recipe_for(small_model, whole_run, method={"type": "lora", "r": 2})
    with pytest.raises(RecipeError, match="another recipe"):
        run(other, resume=True)


def test_an_unwritable_output_is_one_error(small_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot write the run folder"):
        run(recipe_for(small_model, tmp_path / "file" / "run"))


def test_training_with_a_plan_sees_fewer_tokens(small_model, tmp_path):
    """The plan acts during training: other losses than without, and the folder keeps the plan."""
    losses = {}
    for name, plan in (("with", "random:keep=1"), ("without", None)):
        run(recipe_for(small_model, tmp_path / name, plan=plan))
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row).get("loss") for row in rows]
    assert losses["with"] != losses["without"]
    assert (tmp_path / "with/model/mllm_plan.json").is_file()
    assert not (tmp_path / "without/model/mllm_plan.json").exists()


def test_the_final_evaluation(small_model, tmp_path):
    part = {"tasks": ["exist"], "plans": [None, "random:keep=2"], "limit": 3}
    record = run(recipe_for(small_model, tmp_path / "run", eval=part))
    assert [(row["task"], row["plan"], row["n"]) for row in record["eval"]] == [
        ("exist", None, 3),
        ("exist", "random:keep=2", 3),
    ]
    rows = json.loads((tmp_path / "run/eval.json").read_text())["rows"]
    assert len(rows[0]["outcomes"]) == 3 and rows[1]["visual_avg"] == 2
    assert "| exist | random:keep=2 | 2 | 3 |" in (tmp_path / "run/README.md").read_text()


def test_sigterm_saves_and_exits_143_then_resumes(small_model, tmp_path):
    recipe = recipe_for(small_model, tmp_path / "run")
    recipe._written["train"]["max_steps"] = 100_000
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "mllm", "train", str(path), "--json"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not metrics.is_file():
            signal.sigtimedwait([], 0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert json.loads(out)["data"]["status"] == "stopped"
    assert newest_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "model").exists()


def test_the_command_reports_errors_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "mllm", "train", "tiny-llava", "trian.seed=1"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "trian" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_recipes_command_lists_and_copies(tmp_path, capsys):
    from mllm.cli import recipes as command

    command.list_command(json=True)
    payload = json.loads(capsys.readouterr().out)
    assert payload["schema"] == 1 and payload["ok"]
    rows = {row["name"]: row for row in payload["data"]}
    assert set(rows) == set(recipes.shipped())
    assert rows["lora-visionzip"]["methods"] == ["visionzip"]
    command.copy_command("tiny-llava", tmp_path / "mine.yaml", json=True)
    assert load(tmp_path / "mine.yaml").sha256 == load("tiny-llava").sha256
    with pytest.raises(RecipeError, match="nothing is overwritten"):
        command.copy_command("tiny-llava", tmp_path / "mine.yaml", json=True)


# --- stages


@pytest.mark.parametrize("pictures", [1, 2])
def test_packed_questions_cost_what_each_costs_alone(processor, pictures):
    """Packing behind the pictures gives exactly the loss of the processor's own prompts."""
    from torch.nn import functional as F

    from mllm.training.grounding import GroundedLlava, GroundingData
    from mllm.yardstick.questions import PLACEHOLDER, Question, prompt_text

    model = new_model(processor.tokenizer).eval()
    grounded = GroundedLlava(model, processor.tokenizer, {})
    data = GroundingData("full", 4, 1, 0, processor.tokenizer, pictures={pictures: 1.0})
    item = data[0]
    images = [Image.fromarray(pixels) for pixels in item["pixels"]]
    asked = [Question("exist", "is there a cat?", "yes"), Question("ocr_word", "what is it?", "X7")]
    packed = data._pack(asked, (24, 24), item["offset"])
    alone = []
    with torch.no_grad():
        hidden, _ = grounded.see(torch.tensor(item["pixels"]), torch.tensor(item["offset"]))
        tokens = model.model.multi_modal_projector(hidden[:, 1:])
        names = ("input_ids", "targets", "segment", "positions")
        together = grounded._answer_loss(tokens, *(torch.tensor([packed[k]]) for k in names))
        for question in asked:
            parts = prompt_text(question.text, pictures).split(PLACEHOLDER)
            parts = parts if pictures > 1 else ["", *parts]
            content = [_text(parts[0])] if parts[0] else []
            for part in parts[1:]:
                content += [{"type": "image"}, _text(part)]
            talk = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [_text(question.answer)]},
            ]
            batch = Collator(processor)([{"messages": talk, "images": images}])
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch).logits[0, :-1]
            known = labels != IGNORED
            alone.append(F.cross_entropy(logits[known], labels[known], reduction="none"))
    assert torch.allclose(together, torch.cat(alone).mean(), atol=1e-4)


def _text(text):
    return {"type": "text", "text": text}


def test_a_stage_asks_its_tasks_and_as_many_yes_as_no(processor):
    from mllm.training.grounding import GroundingData

    tasks = {"exist": 1.0, "color": 5.0}
    data = GroundingData("mini", 30, 1, 0, processor.tokenizer, tasks, {"objects": 1.0})
    packed: list = []
    data._pack = lambda questions, *place: packed.extend(questions) or {}
    for index in range(20):
        data[index]
    assert {question.task for question in packed} == set(tasks)
    said = [question.answer for question in packed if question.task == "exist"]
    assert said.count("yes") == said.count("no")


@pytest.mark.slow
def test_a_staged_run_resumes_to_the_same_weights(tmp_path):
    def staged(folder):
        short = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "bf16": False}
        changes = [f"stages.{i}.train.{k}={v}" for i in range(5) for k, v in short.items()]
        changes += ["eval=null", f"output.dir={folder}"]
        return load("tiny-llava", changes)

    first, second = tmp_path / "first", tmp_path / "second"
    assert run(staged(first))["status"] == "complete"
    shutil.copytree(first, second)
    # As if killed in the second stage, after its first step.
    later = ("stage-3-read", "stage-4-drill", "stage-5-full")
    for name in ("model", *later, "stage-2-frame/checkpoint-2"):
        shutil.rmtree(second / name)
    (second / "stage-2-frame/stage.json").unlink()
    record = json.loads((second / "run.json").read_text()) | {"status": "running"}
    (second / "run.json").write_text(json.dumps(record))
    assert run(staged(second), resume=True)["status"] == "complete"
    one, other = (load_file(f / "model/model.safetensors") for f in (first, second))
    assert all(torch.equal(one[key], other[key]) for key in one)
