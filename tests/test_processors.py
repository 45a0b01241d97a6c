"""Models of other families as a user has them: a folder, a processor, pictures of any kind."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from saved import KINDS, save
from typer.testing import CliRunner

import mllm
from mllm import compat
from mllm.cli import app
from mllm.errors import DataError, PlanError, first_line
from mllm.eval import sweep
from mllm.eval.prompts import Prompt, answer_batch
from mllm.loading import EMBEDDED, load_processor
from mllm.training.data import Collator

NO_TORCHVISION = importlib.util.find_spec("torchvision") is None
FAMILIES = [
    pytest.param(name, marks=pytest.mark.skipif(
        name == "smolvlm" and importlib.util.find_spec("num2words") is None,
        reason="SmolVLM's processor needs num2words",
    ))
    for name in KINDS
]  # fmt: skip


def drawn(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    try:
        return folder, *mllm.load_model(folder, dtype="float32")
    except DataError as error:
        newest = transformers.__version__.startswith(f"{compat.TESTED[1]}.")
        if newest or "image processor class" not in str(error):
            raise
        pytest.skip("this transformers reads its pictures by torchvision alone")


ASKED = [
    ([drawn(90, 60), drawn(50, 120, seed=1)], "<image> or <image>?"),
    ([drawn(300, 40, seed=2)], "what is it?"),
    ([], "hello"),
]


def said(model, inputs):
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_batch_of_different_prompts_is_its_prompts(loaded):
    """Pictures stay with their prompt, whatever their number, and a plan sees them so."""
    _, model, processor = loaded
    with mllm.patch(model, "fastv:layer=2:keep=0.5") as patched:
        answers = said(model, mllm.build_inputs(processor, ASKED))
        whole = patched.ledger.as_dict()
        for i, one in enumerate(ASKED):
            (alone,) = said(model, mllm.build_inputs(processor, [one]))
            own = patched.ledger.as_dict()
            assert answers[i] == alone
            for name in ("images", "visual_tokens", "kept_llm", "visual_avg"):
                assert own[name] == [whole[name][i]], name
    assert whole["visual_tokens"][0] > whole["visual_avg"][0] and whole["images"][2] == 0


def test_evaluation_and_training_take_batches(loaded):
    _, model, processor = loaded
    prompts = [
        Prompt(
            mllm.loading.chat_text(processor, [{"role": "user", "content": content(one)}]),
            one[0],
            {"max_new_tokens": 2},
        )
        for one in ASKED
    ]
    replies, _ = answer_batch(model, processor, None, prompts)
    assert [reply["mllm"]["visual_in"] > 0 for reply in replies] == [True, True, False]
    talks = [
        {
            "images": one[0],
            "messages": [
                {"role": "user", "content": content(one)},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
        }
        for one in ASKED
    ]
    batch = Collator(processor)(talks)
    learnt = [processor.decode(row[row >= 0]) for row in batch["labels"]]
    assert all(text.startswith("yes") for text in learnt)
    assert model(**batch).loss.isfinite()


def content(one):
    text = one[1].replace("<image>", "")
    return [*[{"type": "image"}] * len(one[0]), {"type": "text", "text": text}]


def test_the_command_line_takes_the_folder(loaded, tmp_path):
    folder, *_ = loaded
    drawn(80, 70, "RGBA").save(tmp_path / "a.png")
    words = ["run", str(tmp_path / "a.png"), "what?", "--model", str(folder), "--plan",
             "fastv:layer=2:keep=0.5", "--pairs", "0", "--max-new-tokens", "2",
             "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    data = json.loads(done.stdout)["data"]
    assert done.exit_code == 0 and data["visual_tokens"] > data["visual_avg"]


@pytest.mark.parametrize("size", [(500, 1), (1, 500)])
def test_pictures_that_a_processor_refuses_are_named(loaded, size):
    """Either the model takes them, or the error has their size."""
    _, model, processor = loaded
    try:
        inputs = mllm.build_inputs(processor, [([drawn(*size)], "what?")])
    except DataError as error:
        assert f"{size[0]} x {size[1]}" in str(error)
        assert error.argument == "images" and error.expected
    else:
        assert said(model, inputs)


@pytest.mark.skipif(not NO_TORCHVISION, reason="torchvision is there")
def test_without_torchvision_videos_are_refused(tmp_path):
    processor = load_processor(save("qwen2_5_vl", tmp_path))
    frames = np.zeros((2, 56, 56, 3), np.uint8)
    with pytest.raises(DataError, match="torchvision"):
        processor(text=["<|video_pad|>"], videos=[frames], return_tensors="pt")
    processor.save_pretrained(tmp_path)  # as a recipe does
    (tmp_path / "preprocessor_config.json").unlink()
    again = load_processor(tmp_path)
    assert type(again).__name__ == "Qwen2_5_VLProcessor"
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["video_processor"]["merge_size"] == 2 and again.for_videos["patch_size"] == 14


def test_prompts_without_a_template(tmp_path):
    folder = save("gemma3", tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="chat template"):
        mllm.build_inputs(load_processor(folder), ASKED[1:2])


def test_a_processor_without_pictures_is_refused(tmp_path):
    folder = save("gemma3", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(DataError, match="processor") as caught:
        mllm.load_model(folder)
    assert str(folder) in str(caught.value)


def test_what_is_no_batch_says_what_is(loaded):
    for wrong in ([], [(drawn(9, 9), "what?")], ([drawn(9, 9)], "what?")):
        with pytest.raises(DataError, match="pairs of a list of images and a text"):
            mllm.build_inputs(loaded[2], wrong)


def test_plain_prompts_of_paligemma():
    class PaliGemmaProcessor:
        image_token, chat_template = "<image>", None

    assert compat.asks_plainly(PaliGemmaProcessor())
    shown = [{"type": "image"}, {"type": "text", "text": "caption en"}]
    text = mllm.loading.chat_text(PaliGemmaProcessor(), [{"role": "user", "content": shown}])
    assert text == "<image>caption en"


# Pictures


def test_photographs_are_turned_upright(tmp_path):
    picture = drawn(40, 20)
    turned = Image.Exif()
    turned[0x0112] = 6  # the top is at the right
    picture.save(tmp_path / "a.png", exif=turned)
    assert mllm.load_image(tmp_path / "a.png").size == (20, 40)
    picture.save(tmp_path / "b.jpg", exif=b"Exif\0\0broken")
    assert mllm.load_image(tmp_path / "b.jpg").size == (40, 20)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "F", "I", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(8, 0)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(ramp).convert(mode)
    picture.save(tmp_path / "a.tiff")
    found = np.asarray(mllm.load_image(tmp_path / "a.tiff"))
    assert found.shape == (8, 64, 3)
    if mode in ("L", "RGBA", "I;16"):
        assert np.abs(found[0, :, 0].astype(int) - ramp[0]).max() <= 1


# Plans and names


def test_what_is_no_plan_says_what_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "plan.yaml").write_text("fastv: {keep: 0.5}")
    for given in ("run", "plan.yaml"):
        with pytest.raises(PlanError, match="mllm_plan.json, which") as caught:
            mllm.Plan.of(given)
        assert given in str(caught.value)
    with pytest.raises(PlanError, match="a folder with mllm_plan.json"):
        mllm.Plan.of("nowhere/at/all")
    with pytest.raises(PlanError, match="did you mean: fastv"):
        mllm.Plan.of("fastvv")
    with pytest.raises(PlanError, match="unknown method"):
        mllm.Plan.of("x" * 5000)
    with pytest.raises(PlanError, match="the model as it is needs no plan"):
        mllm.Plan.of("none")
    made = mllm.Plan.of("fastv:keep=0.25")
    assert mllm.Plan.of(made.save_pretrained("own")) == made
    with pytest.raises(PlanError, match="the class FastV"):
        mllm.Plan([mllm.compressors.FastV])


def test_a_name_is_no_model():
    with pytest.raises(PlanError, match=r"mllm.load_model\('tiny-llava'\)"):
        mllm.patch(EMBEDDED, "fastv")


def test_methods_are_explained_by_name():
    done = CliRunner().invoke(app, ["methods", "fastv", "kivi"])
    assert done.exit_code == 0 and "arXiv:2403.06764" in done.stdout and "bits" in done.stdout
    rows = json.loads(CliRunner().invoke(app, ["methods", "fastv", "--json"]).stdout)["data"]
    assert [row["name"] for row in rows] == ["fastv"]
    done = CliRunner().invoke(app, ["methods", "fastvv"])
    assert done.exit_code == 2 and "did you mean: fastv" in done.stderr


def test_tasks_have_the_names_of_either_command():
    assert sweep.chosen_tasks(["yardstick_color", "color"]) == ["color"]


def test_the_ledger_names_what_is_no_layer(loaded):
    _, model, processor = loaded
    with mllm.patch(model, "fastv:layer=2") as patched:
        model(**mllm.build_inputs(processor, ASKED[1:2]))
        assert len(patched.ledger.kept(-1)[0]) < len(patched.ledger.kept("llm")[0])
        for layer in (4, -5, "lm"):
            with pytest.raises(DataError, match="0 to 3"):
                patched.ledger.kept(layer)


def test_first_lines():
    assert first_line(ValueError("\n  one \ntwo")) == "one"
    assert first_line(OSError()) == "OSError"
