"""What runs must not lose: the order after a stop, the last step, labels, auxiliary losses."""

from __future__ import annotations

import json
import shutil
import signal
from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
from safetensors.torch import load_file
from test_recipes import recipe_for, rows_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from train_tiny import save_small
from transformers import PreTrainedTokenizerFast

import mllm
from mllm.errors import DataError, RecipeError
from mllm.loading import load_model
from mllm.training import finetune, preview
from mllm.training.data import IGNORED, Collator, load_data
from mllm.training.distill import Teacher
from mllm.training.launch import World
from mllm.training.run import run
from mllm.training.schema import DataPart, DistillPart
from mllm.training.tiny import new_processor
from mllm.training.trainer import CheckpointTrainer, training_arguments


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def stopped(folder, *lost):
    """The run as it would be if it had been killed before it wrote these."""
    for name in lost:
        shutil.rmtree(folder / name)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))


def losses(folder):
    return {row["step"]: row["loss"] for row in rows_of(folder) if "loss" in row}


# --- after a stop


def test_a_run_that_was_stopped_behind_its_last_step_takes_no_other(small, tmp_path):
    """Not even one, though the epoch goes on."""
    train = {"max_steps": 3, "lr_scheduler_type": "constant"}  # of four in an epoch
    recipe = recipe_for(small, tmp_path / "run", train=train)
    run(recipe)
    weights = load_file(tmp_path / "run/model/model.safetensors")
    stopped(tmp_path / "run", "model")
    assert run(recipe, resume=True)["status"] == "complete"
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert max(losses(tmp_path / "run")) == 3


def test_a_process_of_several_goes_on_in_the_order_of_its_epoch(small, tmp_path, monkeypatch):
    """Stopped in the second epoch, it sees what it would have seen."""
    real = accelerate.accelerator.prepare_data_loader

    def first_of_two(*args, **options):
        return real(*args, **options | {"num_processes": 2, "process_index": 0})

    monkeypatch.setattr(accelerate.accelerator, "prepare_data_loader", first_of_two)
    train = {"max_steps": 8, "save_steps": 5, "per_device_train_batch_size": 1}
    recipe = recipe_for(small, tmp_path / "run", train=train)  # four steps in an epoch
    run(recipe)
    whole = losses(tmp_path / "run")
    stopped(tmp_path / "run", "model", "checkpoint-8")
    (tmp_path / "run/metrics.jsonl").unlink()
    run(recipe, resume=True)
    assert losses(tmp_path / "run") == {step: whole[step] for step in (6, 7, 8)}


def test_what_was_just_saved_stays_beside_a_later_checkpoint_that_is_not_whole(
    small, tmp_path, monkeypatch
):
    recipe = recipe_for(small, tmp_path / "run", train={"max_steps": 3, "save_total_limit": 1})
    real = finetune.FinetuneTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune.FinetuneTrainer, "training_step", interrupted)
        run(recipe)
    (tmp_path / "run/checkpoint-9").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-9 has no COMPLETE"):
        run(recipe, resume=True)
    found = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert found == {"checkpoint-3", "checkpoint-9"}


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(small, tmp_path):
    recipe = recipe_for(small, tmp_path / "run", train={"save_only_model": True})
    run(recipe)
    stopped(tmp_path / "run", "model", "checkpoint-2")
    with pytest.raises(RecipeError, match="checkpoint-1 has weights alone"):
        run(recipe, resume=True)


def test_sigterm_is_given_back_by_a_run_that_fails(small, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    recipe = recipe_for(
        small, tmp_path / "run", method={"type": "full"}, train={"learning_rate": 1e30}
    )
    with pytest.raises(RecipeError, match="the loss became"):
        run(recipe)
    assert signal.getsignal(signal.SIGTERM) is before


# --- labels

ROLES = (
    "{% for message in messages %}{{ message.role }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
THINKS = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
)


def talk(*texts):
    roles = ("user", "assistant") * len(texts)
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(roles, texts, strict=False)
        ],
        "images": [],
    }


def words_with_their_space():
    """A tokenizer as Llama's: the space before a word is part of its token."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("_", "merged_with_next")
    core.train_from_iterator(
        ["user: is there a cat? assistant: yes and dog? no why?"] * 9,
        trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>", "<image>"],
                            show_progress=False),
    )  # fmt: skip
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_what_follows_an_answer_is_not_learnt():
    """LLaVA-1.5's template has a space behind an answer, which is the next role's in its tokens."""
    processor = new_processor()
    processor.tokenizer, processor.chat_template = words_with_their_space(), ROLES
    batch = Collator(processor)([talk("is there a cat?", "yes", "and a dog?", "no", "why?", "yes")])
    labels = batch["labels"][0]
    words = processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORED])
    assert words == ["_yes", "_no", "_yes", "_", "</s>"]


def test_a_template_that_changes_earlier_answers_is_refused():
    """Where an answer was when it was the last one says nothing about the whole text."""
    processor = new_processor()
    processor.chat_template = THINKS
    collate = Collator(processor)
    labels = collate([talk("cat?", "yes")])["labels"]
    assert processor.tokenizer.decode(labels[labels != IGNORED]).endswith("yes</s>")
    with pytest.raises(DataError, match="rewrites earlier turns"):
        collate([talk("cat?", "yes", "dog?", "no")])


# --- text alone


def test_a_black_picture_beside_text_alone_teaches_nothing(small):
    model, processor = load_model(small)
    plain, pictured = Collator(processor), Collator(processor)
    pictured.pictured = True
    items = [talk("is there a cat?", "yes"), talk("a dog?", "no")]
    one, two = plain(items), pictured(items)
    assert "pixel_values" not in one and two["pixel_values"].shape[0] == 1
    assert two["input_ids"].shape[0] == 3 and (two["labels"][2] == IGNORED).all()
    model.train()
    grads = []
    for batch in (one, two):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    for name, grad in grads[1][1].items():
        if name.startswith("model.multi_modal_projector"):
            assert grads[0][1][name] is None and not grad.any()
        elif grads[0][1][name] is not None:
            assert torch.allclose(grad, grads[0][1][name], atol=1e-6), name


# --- what is refused


def test_adapters_in_what_is_frozen_are_refused(small, tmp_path):
    model = {"path": str(small), "dtype": "float32", "freeze_vision_tower": True}
    for options in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"modules_to_save": ["vision_tower"]},
    ):
        method = {"type": "lora", "r": 2, **options}
        recipe = recipe_for(small, tmp_path / "run", model=model, method=method)
        with pytest.raises(RecipeError, match="freeze_vision_tower is true, and method trains"):
            preview.check(recipe, load_data(recipe.data)[0], World())
    method = {"type": "lora", "r": 2, "target_modules": "all-linear",
              "exclude_modules": ".*vision_tower.*"}  # fmt: skip
    assert run(recipe_for(small, tmp_path / "run", model=model, method=method))
    weights = [load_file(f / "model.safetensors") for f in (tmp_path / "run/model", small)]
    moved = {k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])}
    assert moved and not any("vision_tower" in key for key in moved)


def test_samples_that_fill_no_batch_are_refused(small, tmp_path):
    train = {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 2,
             "save_strategy": "no"}  # fmt: skip
    recipe = recipe_for(
        small, tmp_path / "run", train=train | {"per_device_train_batch_size": 16}
    )
    with pytest.raises(RecipeError, match="8 samples do not fill a batch of 16"):
        preview.check(recipe, load_data(recipe.data)[0], World())
    record = run(recipe_for(small, tmp_path / "run", train=train | {
        "per_device_train_batch_size": 3}))  # fmt: skip
    assert record["resolved"]["batch"]["steps"] == max(losses(tmp_path / "run")) == 4


def test_a_teacher_of_several_budgets_at_once_is_refused(small, tmp_path):
    method = {"type": "full", "distill": {}}
    with pytest.raises(RecipeError, match="m3 answers from every budget") as caught:
        recipe_for(small, tmp_path, method=method, plan="m3:scales=16/4")
    assert recipe_for(small, tmp_path, method=method, plan="m3:scales=16/4:train=draw")
    assert "train=draw" in caught.value.expected


# --- distillation


def test_auxiliary_losses_stay_beside_a_teacher(small, tmp_path):
    """The predictor of `mod` learns from nothing else, and starts at zero."""
    method = {"type": "router", "distill": {"weight": 1.0}}
    plan = "mod:capacity=0.5:gate=tanh:layers=1:auxiliary={}"
    moved = {}
    for auxiliary in (0.0, 1.0):
        folder = tmp_path / str(auxiliary)
        run(recipe_for(small, folder, method=method, plan=plan.format(auxiliary)))
        learnt = load_file(folder / "model/mllm_adapter.safetensors")
        moved[auxiliary] = bool(learnt["mllm.0.1_later.outer.weight"].any())
    assert moved == {0.0: False, 1.0: True}


def test_the_answers_have_their_share_beside_a_teacher(small):
    """Of the loss that the model returns, whose auxiliary losses are whole."""
    model, processor = load_model(small)
    data, _ = load_data([DataPart(path="yardstick", tasks=["exist"], limit=2)])
    batch = Collator(processor)([data[0], data[1]])
    model.train()
    found = []
    with mllm.patch(model, "mod:capacity=0.5:gate=tanh:layers=1:auxiliary=1.0") as patched:
        for share in (1.0, 0.25):
            patched.answers = share
            loss = model(**batch).loss.detach()
            found.append((float(loss), float(patched.losses["predictor"])))
    (whole, extra), (part, same) = found
    assert extra == same and extra > 0.1
    assert part == pytest.approx(0.25 * (whole - extra) + extra, rel=1e-5)


def test_a_teacher_follows_the_type_of_its_student(small):
    """As under DeepSpeed in bf16: what both have is narrowed with the student."""
    model, processor = load_model(small, dtype="float32")
    model.model.vision_tower.requires_grad_(False)
    teacher = Teacher(model)
    teacher.part_from(model)
    model.bfloat16()
    data, _ = load_data([DataPart(path="yardstick", tasks=["exist"], limit=1)])
    batch = Collator(processor)([data[0]])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert teacher(batch, False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("across", [True, False])
def test_a_teacher_is_scaled_as_the_answers_are(across, monkeypatch):
    """By the number of processes only where tokens of all of them are counted."""
    logits = torch.randn(1, 4, 5)
    said, meant = (SimpleNamespace(logits=x, hidden_states=()) for x in (logits, logits.flip(2)))
    monkeypatch.setattr(
        CheckpointTrainer, "compute_loss", lambda *args: (torch.tensor(0.0), said)
    )
    trainer = object.__new__(finetune.FinetuneTrainer)
    trainer.recipe = SimpleNamespace(method=SimpleNamespace(distill=DistillPart(weight=1.0)))
    trainer.teacher, trainer.meter, trainer._distilled = lambda *args: meant, None, [0.0, 0.0, 0]
    trainer.patched = SimpleNamespace(plan=SimpleNamespace(stages=[]))
    trainer.args = SimpleNamespace(average_tokens_across_devices=across)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    inputs = {"labels": torch.tensor([[IGNORED, 1, 2, 3]])}
    loss = trainer.compute_loss(None, inputs, False, 3)
    assert float(loss) == pytest.approx(float(trainer._distilled[0]) * (2 if across else 1))


def test_a_process_has_one_gpu(tmp_path, monkeypatch):
    """With several, the Trainer would split batches over copies of the model, without its hooks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    train = {"per_device_train_batch_size": 3, "use_cpu": False}
    arguments = training_arguments(train, tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3


# --- precision


def test_mixed_precision_trains_fp32_weights(small, tmp_path):
    """Steps that bf16 would round away count, and the result is in the type it was loaded in."""
    model = {"path": str(small), "dtype": "bfloat16", "freeze_vision_tower": True}
    train = {"bf16": True, "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    recipe = recipe_for(
        small, tmp_path / "run", model=model, method={"type": "full"}, train=train
    )
    record = run(recipe)
    start = {k: v.bfloat16().float() for k, v in load_model(small)[0].state_dict().items()}
    after = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    moved = torch.cat([
        (value.float() - start[name]).abs().flatten()
        for name, value in after.items() if "_proj" in name and "vision" not in name
    ])  # fmt: skip
    assert ((moved > 1e-6) & (moved < 3e-5)).float().mean() > 0.9
    final = load_file(tmp_path / "run/model/model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    parts, memory = record["resolved"]["parts"], record["resolved"]["memory"]
    learnt = sum(part["trained"] for part in parts.values())
    every = sum(part["parameters"] for part in parts.values())
    assert memory["weights"] == 2 * every + 2 * learnt
    assert memory["gradients"] == 4 * learnt and memory["optimizer"] == 8 * learnt


# --- speed


@pytest.mark.parametrize(
    ("method", "plan", "frozen"),
    [
        ("router", "pmod:shift=0.0:min_ratio=0.5", (True, True)),
        ("moe", "moellava:experts=2:layers=0", (False, True)),
        ("full", None, (False, False)),
    ],
)
def test_arithmetic_of_a_frozen_decoder_has_no_gradients(
    method, plan, frozen, small, tmp_path, monkeypatch
):
    seen, real = [], finetune.Meter

    def meter(*args):
        seen.append(args[2])
        return real(*args)

    monkeypatch.setattr(finetune, "Meter", meter)
    train = {"max_steps": 1, "save_strategy": "no"}
    run(recipe_for(small, tmp_path / "run", method={"type": method}, plan=plan, train=train))
    assert seen == [frozen]
