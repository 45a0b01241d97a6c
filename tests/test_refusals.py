"""What learnt tokens, adapters and videos are refused for, and what is only remarked."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from eval_tiny import save_tiny
from families import collate, model, samples
from PIL import Image
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.compressors import PLLaVA, TokenFLEX, TokenPacker
from mllm.errors import PlanError

FLEX = TokenFLEX(keep=4, counts=(4, 9))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folder of adapters of a tiny model, and the model's own folder."""
    folder = tmp_path_factory.mktemp("adapters")
    save_tiny(folder / "model")
    net, _ = mllm.load_model(str(folder / "model"), device="cpu")
    for name, stage in (("flex", FLEX), ("pack", TokenPacker(keep=16, heads=4))):
        with mllm.patch(net, stage) as patched:
            patched.save_adapter(folder / name)
    return folder


@pytest.mark.parametrize("stage, name, argument, words", [
    (FLEX.replace(counts=(4, 9, 16), keep=16), "flex", "keep",
     "keep=16 is not a trained budget; nearest: 9"),
    (FLEX.replace(counts=(1, 4, 9), keep=1), "flex", "keep", "nearest: 4"),
    (FLEX.replace(counts=(4, 9, 16)), "flex", "plan",
     "another plan: tokenflex:keep=4:counts=4/9, not tokenflex:keep=4:counts=4/9/16"),
    (TokenPacker(keep=4, heads=4), "pack", "plan", "another plan: tokenpacker:.*keep=16.*, not"),
    (TokenPacker(keep=4, heads=4), "flex", "plan", "another plan: tokenflex:.*, not tokenpacker"),
])  # fmt: skip
def test_a_budget_that_an_adapter_has_not_names_the_nearest(
    adapters, stage, name, argument, words
):
    """What the plan itself would allow, and the folder was not trained for."""
    net = mllm.load_model(str(adapters / "model"), device="cpu")[0]
    with mllm.patch(net, stage) as patched, pytest.raises(PlanError, match=words) as caught:
        patched.load_adapter(adapters / name)
    assert caught.value.argument == argument


@pytest.mark.parametrize("change, spec, argument", [
    ({"tower_width": 64}, "tokenflex:counts=4/9:keep=4", "tower_width"),
    ({"hidden_size": 64}, "tokenflex:counts=4/9:keep=4", "hidden_size"),
    ({}, "tokenflex:counts=4/16:keep=16", "keep"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["eval", "sweep", "run", "inspect", "tune"])
def test_adapters_are_refused_before_weights_are_read(
    adapters, tmp_path, monkeypatch, command, change, spec, argument
):
    if command == "eval":
        pytest.importorskip("lmms_eval")
    if command == "tune":
        pytest.importorskip("optuna")
        importlib.import_module("mllm.eval.engines")  # before its `load_model` is another
    if command in ("run", "inspect", "tune") and not change:
        pytest.skip("they take a folder with its own plan")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (adapters / "flex").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    head = json.loads((folder / "mllm_adapter.json").read_text())
    (folder / "mllm_adapter.json").write_text(json.dumps(head | change))
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    monkeypatch.setattr("mllm.loading.load_model", lambda *_, **__: pytest.fail("weights"))
    given = [str(tmp_path / "picture.png"), "what?", "--plan", str(folder)]
    adapter = ["--adapter", str(folder), "--tasks"]
    words = {
        "eval": ["--plan", spec, *adapter, "yardstick_color", "--limit", "1"],
        "sweep": ["--plans", spec.rpartition(":")[0], "--budgets", "4,9,16", *adapter, "color",
                  "--n", "2", "-o", str(tmp_path / "s.jsonl")],
        "run": given, "inspect": [*given, "-o", str(tmp_path / "out.png")],
        "tune": ["--max-loss", "1", *adapter, "color", "-o", str(tmp_path / "tuned")],
    }[command]  # fmt: skip
    words = [command, *words, "--model", str(adapters / "model"), "--json"]
    shown = CliRunner().invoke(app, words)
    error = json.loads(shown.stdout)["error"]
    assert shown.exit_code == 2 and error["argument"] == argument, error


VIDEOS = [((0,), 5), ((2,), 5)]  # of two and of three frames


@torch.no_grad()
def test_a_video_and_a_method_of_one_grid():
    family = "qwen2_5_vl_video"
    net, inputs = model(family), collate(family, samples(family, VIDEOS))
    with mllm.patch(net, "avgpool:keep=4"):
        with pytest.raises(PlanError, match="avgpool cannot work on a video") as caught:
            net(**inputs)
    assert caught.value.argument == "plan" and "chooses tokens" in caught.value.expected


@torch.no_grad()
@pytest.mark.parametrize("family, shown, one", [
    ("llava", "padded", True), ("qwen2_5_vl_video", VIDEOS, False),
    ("qwen2_5_vl_video", [((0,), 5), ((1, 2), 5)], True),  # a picture among videos
])  # fmt: skip
def test_one_frame_is_pooled_in_space_alone_and_the_ledger_says_so(family, shown, one):
    """PLLaVA takes a picture for a frame; there is nothing to refuse."""
    net = model(family)
    with mllm.patch(net, PLLaVA(frames=2, grid=(2, 2))) as patched:
        net(**collate(family, samples(family, shown)))
        notes = patched.ledger.notes
    assert ("pllava: one frame, pooled in space alone" in notes) == one
