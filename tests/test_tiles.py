"""Tiles of pictures reach a model that a plan shows them to: `run`, `inspect`, `eval`, `sweep`."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from train_tiny import save_small
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.errors import DataError
from mllm.eval import asking, sweep
from mllm.eval.answer import unpatched_costs
from mllm.eval.forecast import forecast
from mllm.eval.plans import make_plan, patched_with
from mllm.loading import build_inputs
from mllm.models import resolve
from mllm.training.recipe import validate
from mllm.training.run import run as run_recipe
from mllm.views import tiled, with_tiles
from mllm.yardstick import prompt, samples

SPEC = "deepstack:grid=1/2"


def by_hand(loaded, asked, spec=SPEC, length=3):
    """Texts of one question after another, with tiles, and FLOPs of their prefills."""
    model, processor = loaded
    texts, flops = [], []
    for pictures, text in asked:
        inputs = build_inputs(processor, [(pictures, text)])
        with mllm.patch(model, spec) as patched, torch.inference_mode():
            grid = getattr(patched.plan.stages[0], "grid", None)
            views = tiled(processor, pictures, grid) if pictures and grid else {}
            ids = model.generate(**inputs, **views, max_new_tokens=length, do_sample=False)
            record = patched.ledger.as_dict()
        ids = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        flops.append(record["prefill_flops"][0])
    return texts, flops


def tower(loaded, asked):
    """FLOPs of the tower and projector on one picture."""
    family = resolve(loaded[0])
    (layout,) = family.layouts(build_inputs(loaded[1], [asked]))
    return family.vision_flops(layout, layout.cells)


def questions(n=3):
    return [prompt(sample) for sample in samples("color", n=n)]


def test_a_batch_gets_tiles_only_where_they_are_asked_for(loaded):
    _, processor = loaded
    (pictures, text), *_ = questions()
    inputs = build_inputs(processor, [(pictures, text)])
    names = set(inputs)
    assert with_tiles(inputs, processor, pictures, None) is inputs
    assert with_tiles(inputs, processor, [], (2, 2)) is inputs
    more = with_tiles(inputs, processor, pictures, (2, 2))
    assert set(inputs) == names and set(more) - names == {"view_pixel_values"}
    assert more["pixel_values"].data_ptr() == inputs["pixel_values"].data_ptr()
    assert len(more.to("cpu", torch.bfloat16)["view_pixel_values"]) == 4
    for spec, grid in (("stride:keep=9", None), (SPEC, (1, 2))):
        with mllm.patch(loaded[0], spec) as patched:
            assert patched.tiles == grid


@pytest.mark.parametrize("size", [(112, 200), (300, 100), (64, 64)])
def test_tiles_are_cut_from_what_the_processor_leaves(loaded, size):
    """The middle square, a quarter of it in each tile; what is cropped is in none."""
    (wide, high), side = size, min(size)
    left, top, half = (wide - side) // 2, (high - side) // 2, side // 2
    picture = Image.new("RGB", size, "white")
    for i in range(4):
        x, y = left + i % 2 * half, top + i // 2 * half
        picture.paste((50 * i, 0, 0), (x, y, x + half, y + half))
    pixels = tiled(loaded[1], [picture])["view_pixel_values"]
    shape = loaded[1].image_processor
    red, green = ((pixels[:, c] * shape.image_std[c] + shape.image_mean[c]) * 255 for c in (0, 1))
    for i in range(4):
        inner = (slice(8, -8),) * 2
        assert (red[i][inner] - 50 * i).abs().max() < 1 and green[i][inner].abs().max() < 1


def test_processors_that_cut_pictures_up_are_refused(loaded):
    class Cutter:
        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(len(images), 5, 3, 8, 8)}

    processor = type("Processor", (), {"image_processor": Cutter()})
    with pytest.raises(DataError, match="Cutter cuts pictures up.*4 became 20") as caught:
        tiled(processor, [Image.new("RGB", (8, 8))])
    assert caught.value.argument == "processor"


def test_run_and_inspect_cut_tiles(folder, loaded, tmp_path):
    """The answer is that of tiles given by hand, and their passes of the tower are booked."""
    asked = questions(1)
    (text,), (flops,) = by_hand(loaded, [([asked[0][0][0]], "what colour?")])
    picture = tmp_path / "picture.png"
    asked[0][0][0].save(picture)
    words = [str(picture), "what colour?", "--plan", SPEC, "--model", str(folder), "--json",
             "--max-new-tokens", "3", "--device", "cpu"]  # fmt: skip
    shown = CliRunner().invoke(app, ["run", *words, "--pairs", "1"])
    data = json.loads(shown.stdout)["data"]
    assert data["answers"]["patched"] == text and data["notes"] == []
    assert data["prefill_flops"] == flops
    more = 2 * tower(loaded, ([asked[0][0][0]], "what colour?"))
    assert flops == pytest.approx(data["baseline_prefill_flops"] + more)
    seen = CliRunner().invoke(app, ["inspect", *words, "-o", str(tmp_path / "out.png")])
    again = json.loads(seen.stdout)["data"]
    assert again["answer"] == text and again["unpatched_answer"] == data["answers"]["unpatched"]
    assert again["prefill_flops_share"] == pytest.approx(flops / data["baseline_prefill_flops"])


def test_sweeps_cut_tiles(loaded, monkeypatch):
    """Beside other plans in batches, with a shared tower, whose memory knows tiles apart."""
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 3)
    model, processor = loaded
    drawn, timed = samples("color", n=3), []
    texts, flops = by_hand(loaded, [prompt(sample) for sample in drawn])
    wide, _ = by_hand(loaded, [prompt(sample) for sample in drawn], "deepstack")
    plain, _ = by_hand(loaded, [prompt(sample) for sample in drawn], "stride:keep=64")
    assert len({tuple(texts), tuple(wide), tuple(plain)}) == 3, "tiles change the answers"
    asked = asking.Questions(processor, drawn, 2, model.dtype, model.device)
    shared = asking.SharedTower(model)
    for spec, want in [("none", plain), (SPEC, texts), ("deepstack", wide), (SPEC, texts)]:
        plan = make_plan(spec)
        with patched_with(model, plan) as patched, shared.used_by(plan):
            found = asking.answer_all(model, processor, asked, patched)
        assert [a.text for a in found] == [t.split("\n")[0].strip() for t in want], spec
    cell = sweep._cell(model, processor, asked, sweep.Entry(SPEC, 64, make_plan(SPEC)), shared, 1)
    assert cell["flops"] == pytest.approx(sum(flops) / 3, rel=2e-3)  # padding is scored too
    answer = sweep.answer
    monkeypatch.setattr(sweep, "answer", lambda *a, **k: timed.append(a[2]) or answer(*a, **k))
    with patched_with(model, make_plan(SPEC)) as patched:
        sweep._prefill_seconds(model, processor, asked, patched, 1)
    assert all("view_pixel_values" in inputs for inputs in timed)


def test_forecasts_count_tiles(loaded):
    entry = sweep.Entry(SPEC, 64, make_plan(SPEC))
    found = forecast(*loaded, {"color": [entry]}, 1, sweep.Questioning(n=2, timings=0))
    asked = [prompt(sample) for sample in samples("color", n=1)]
    _, (flops,) = by_hand(loaded, asked)
    whole = unpatched_costs(loaded[0], build_inputs(loaded[1], asked))[0]["prefill_flops"]
    assert flops == pytest.approx(whole + 2 * tower(loaded, asked[0]))
    assert found.flops == pytest.approx(2 * flops, rel=0.02)


def test_lmms_eval_cuts_tiles(loaded):
    """In batches of several pictures, of none, and of both."""
    pytest.importorskip("lmms_eval")
    from test_eval_lmms import _ask, _model

    (first, text), (second, _), *_ = questions()
    docs = [{"images": [first[0]], "text": text}, {"images": [], "text": "is there a dog?"},
            {"images": [first[0], second[0]], "text": "what is written?"}]  # fmt: skip
    options = {"max_new_tokens": 3}
    want, flops = by_hand(loaded, [(doc["images"], doc["text"]) for doc in docs])
    for size in (1, 3):
        found = _ask(_model(loaded, docs, SPEC, batch_size=size), docs, options)
        assert [result.text for result in found] == want
        made = [result.token_counts.mllm["prefill_flops"] for result in found]
        assert made == pytest.approx(flops, rel=2e-3)


def test_a_teacher_sees_no_tiles(tmp_path):
    """It has no plan, which would take them."""
    recipe = validate({
        "version": 1, "model": {"path": str(save_small(tmp_path / "small")), "dtype": "float32"},
        "plan": SPEC, "method": {"type": "lora", "r": 4, "distill": {"weight": 0.5}},
        "data": [{"path": "yardstick", "tasks": ["exist"], "limit": 2}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 2},
        "output": {"dir": str(tmp_path / "run")},
    })  # fmt: skip
    assert run_recipe(recipe)["status"] == "complete"
