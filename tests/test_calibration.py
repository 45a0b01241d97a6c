"""Calibration: what is recorded, what is fitted to it, the file, and who may use it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import zoo_oracles as cards
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run
from matrix import SIDE, fresh
from torch import Tensor

import mllm
from mllm.calibration import Calibration, applied
from mllm.compressors import BTP, FitPrune, PrefixKV
from mllm.compressors.base import farthest
from mllm.compressors.fitprune import fit
from mllm.errors import DataError, PlanError
from mllm.plan import Plan


def batches(family: str, size: int = 3) -> list[dict]:
    batch = samples(family, seed=2)
    return [collate(family, batch[i : i + size]) for i in range(0, len(batch), size)]


def recorded(monkeypatch, method: str, family: str, size: int = 3) -> list[list[Tensor]]:
    """What a method is given to fit to."""
    found = []
    cls = type(Plan.of(method).stages[0])

    def spy(self, seen, share):
        found.extend(seen)
        return {"layers": (1,), "keep": (0.5,)} if cls is FitPrune else {}

    monkeypatch.setattr(cls, "fit", spy)
    mllm.calibrate(model(family), method, batches(family, size))
    return found


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_what_is_recorded(monkeypatch, family, size):
    """Of every sample with images, by layer, alone or in a padded batch: what the oracle sees."""
    own = [s for s in samples(family, seed=2) if s.pictures]
    masses = recorded(monkeypatch, "fitprune", family, size)
    changes = recorded(monkeypatch, "btp", family, size)
    assert len(masses) == len(changes) == len(own)
    for sample, mass, change in zip(own, masses, changes, strict=True):
        seen = run(family, sample, Edits())
        visual = sample.visual
        text = ~visual & (visual.cumsum(0) > 0)
        assert len(mass) == len(change) == LAYERS - 1
        for layer in range(LAYERS - 1):
            top = seen.weights[layer].amax(0)
            want = torch.stack([top[visual][:, visual].sum(0), top[text][:, visual].sum(0)])
            torch.testing.assert_close(mass[layer], want, atol=1e-4, rtol=1e-3)
            pairs = zip(seen.hidden[layer], seen.hidden[layer + 1], visual, strict=True)
            like = [cards.cosine(a, b) for a, b, v in pairs if v]
            assert float(change[layer]) == pytest.approx(1 - sum(like) / len(like), abs=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_fitprune_meets_the_share(share):
    """The smallest loss of attention, to the tolerance, under which layers see the share."""
    g = torch.Generator().manual_seed(0)
    masses = [torch.rand(7, 2, n, generator=g) ** 2 for n in (30, 21)]
    left = fit(masses, share)
    assert (1 + sum(left)) / 8 <= share
    assert list(left) == sorted(left, reverse=True)
    # It is the scheme of some alpha, and a little less attention lost would not do.
    alphas = [i / 128 for i in range(129)]
    match = [a for a in alphas if cards.fitted(masses, a) == pytest.approx(list(left), abs=1.1e-3)]
    assert match
    less = cards.fitted(masses, max(0.0, match[0] - 1 / 64))
    assert match[0] <= 1 / 64 or (1 + sum(less)) / 8 > share


def test_a_share_that_cannot_be_reached():
    with pytest.raises(PlanError, match="the least is") as caught:
        fit([torch.ones(7, 2, 30)], 0.1)
    assert caught.value.argument == "share"


def test_btp_cuts_behind_sharp_changes():
    """The sharpest before the end, apart from each other; the first layer does not count."""
    changes = [0.01] * 31
    for layer, change in [(0, 0.9), (4, 0.5), (5, 0.4), (11, 0.3), (17, 0.2), (29, 0.8)]:
        changes[layer] = change
    seen = [[torch.tensor(x) for x in changes]] * 2
    fitted = BTP().fit(seen, None)
    assert fitted == {"layers": (5, 12, 18), "end": 22, "keep": BTP().keep}
    stage = BTP().replace(**BTP().fit(seen, 0.3))
    kept = [1.0] * 5 + [stage.keep[0]] * 7 + [stage.keep[1]] * 6 + [stage.keep[2]] * 4
    assert sum(kept) / 32 == pytest.approx(0.3, abs=1e-3)


BTP_SPEC = (
    "btp:layers=1/3:keep=0.5/0.25:spatial=0/0:attention=0.5/1:diversity=0.3/0:over=2/1"
)


@pytest.mark.parametrize("method", ["fitprune", BTP_SPEC])
def test_a_file_is_its_stage(tmp_path, method):
    """Written, read, applied: rows leave as with the fitted stage itself."""
    net = model("llava")
    done = []
    fitted = mllm.calibrate(net, method, batches("llava", 2), share=0.7, progress=done.append)
    assert done == [2, 1]
    path = fitted.save(tmp_path / "of a model.json")
    assert [p.name for p in tmp_path.iterdir()] == ["of a model.json"]
    data = json.loads(path.read_text())
    assert {"base_model", "config_sha256", "hidden_size", "num_hidden_layers", "plan_sha256",
            "trained_dtype", "n_samples", "data_sha256"} < set(data)  # fmt: skip
    assert data["n_samples"] == 2 and data["num_hidden_layers"] == LAYERS
    again = Calibration.load(path)
    assert again == fitted and again.stage.layers

    plan = Plan([type(fitted.stage)(calibration=str(path))])
    inputs = collate("llava", samples("llava"))
    kept = []
    for used in (plan, Plan.from_spec(plan.spec), fitted.stage):
        with mllm.patch(net, used) as patched:
            net(**inputs)
            kept.append([row["visual"] for row in patched.ledger.as_dict()["layers"]])
            assert patched.plan.stages[0].calibration is None
    assert kept[0] == kept[1] == kept[2] and kept[0][-1] != kept[0][0]


def test_batches_do_not_matter():
    one, three = (mllm.calibrate(model("llava"), "fitprune", batches("llava", n)) for n in (1, 3))
    assert one.stage.keep == pytest.approx(three.stage.keep)
    assert one.header["data_sha256"] == three.header["data_sha256"]
    other = mllm.calibrate(model("llava"), "fitprune", batches("llava", 3)[:1] * 2)
    assert other.header["data_sha256"] != one.header["data_sha256"]


def test_another_model_is_refused(tmp_path):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    fitted = mllm.calibrate(fresh(), "fitprune", [inputs])
    path = str(fitted.save(tmp_path / "x.json"))
    deeper = tiny.llava(layers=6, side=SIDE)
    before = dict(deeper.__dict__)
    with pytest.raises(DataError, match="another model") as caught:
        mllm.patch(deeper, f"fitprune:calibration={path}")
    assert caught.value.argument == "calibration" and "\n" not in str(caught.value)
    assert deeper.__dict__.keys() == before.keys()
    with pytest.raises(PlanError, match="fits fitprune, not btp"):
        mllm.patch(fresh(), BTP(calibration=path))
    assert applied(FitPrune(positions="compact", calibration=path), fresh()).positions == "compact"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"type": "mllm.plan", "version": 1}',
                                  '{"type": "mllm.calibration", "version": 2}',
                                  '{"type": "mllm.calibration", "version": 1, "stage": {}}'])
def test_broken_files(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    for file in (path, tmp_path / "none.json", tmp_path):
        with pytest.raises((DataError, PlanError)):
            mllm.patch(fresh(), FitPrune(calibration=str(file)))


def test_the_hash_of_a_plan_is_of_what_the_file_says(tmp_path):
    """Else results under a file that was written anew would count as those of the old one."""
    path = tmp_path / "x.json"
    plan = Plan([FitPrune(calibration=str(path))])
    path.write_text("one")
    one = plan.sha256
    path.write_text("two")
    assert plan.sha256 != one
    two = plan.sha256
    path.rename(tmp_path / "y.json")
    assert Plan([FitPrune(calibration=str(tmp_path / "y.json"))]).sha256 == two


@pytest.mark.parametrize("method", ["fastv", "vscan", "fitprune+fastv"])
def test_methods_without_a_fit(method):
    with pytest.raises(PlanError, match="cannot be fitted") as caught:
        mllm.calibrate(fresh(), method, [])
    assert caught.value.expected == "btp or fitprune or prefixkv"


def test_no_images_and_both():
    text = [s for s in samples("llava") if not s.pictures]
    with pytest.raises(DataError, match="no sample has an image"):
        mllm.calibrate(model("llava"), "fitprune", [collate("llava", text)])
    with pytest.raises(PlanError, match="end=0 beside a calibration file"):
        BTP(end=0, calibration="x.json")


@pytest.mark.parametrize("fault, argument", [
    (dict(spatial=(0.5,)), "spatial"), (dict(over=(0.5, 1.0, 1.0)), "over"),
    (dict(attention=(1.5, 0.0, 0.0)), "attention"), (dict(layers=(3, 6, 9), end=9), "end"),
])  # fmt: skip
def test_btp_says_what_is_wrong(fault, argument):
    with pytest.raises(PlanError) as caught:
        BTP(**fault)
    assert caught.value.argument == argument


@pytest.mark.parametrize("count", [1, 4, 9, 20])
def test_farthest_first(count):
    """Unequal samples in one batch, some with a start, equal tokens among them."""
    g = torch.Generator().manual_seed(count)
    x = torch.randint(0, 5, (3, 12, 2), generator=g).float()
    apart = (x[:, :, None] - x[:, None]).abs().sum(-1)
    among = torch.rand(3, 12, generator=g) < 0.7
    among[:, 0], start = True, torch.zeros(3, 12, dtype=torch.bool)
    start[1, 0] = True
    for limit in (count, torch.tensor([count, 2, 5])):
        mine = farthest(apart, among, limit, 12, start)
        for b in range(3):
            own = limit if isinstance(limit, int) else int(limit[b])
            want = cards.farthest(
                lambda i, j, b=b: float(apart[b, i, j]), among[b].nonzero()[:, 0].tolist(), own,
                start[b].nonzero()[:, 0].tolist(),
            )  # fmt: skip
            assert mine[b].nonzero()[:, 0].tolist() == sorted(want)


# PrefixKV: shares of layers


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_what_is_recorded_of_caches(monkeypatch, family, size):
    """Of every sample with images and every layer: what its tokens receive, mean over heads."""
    found = []
    monkeypatch.setattr(PrefixKV, "fit", lambda self, seen, share: found.extend(seen) or {})
    mllm.calibrate(model(family), "prefixkv", batches(family, size))
    own = [s for s in samples(family, seed=2) if s.pictures]
    assert len(found) == len(own)
    for sample, layers in zip(own, found, strict=True):
        seen = run(family, sample, Edits())
        assert len(layers) == LAYERS
        for mine, weights in zip(layers, seen.weights, strict=True):
            stored = mine > 0  # beyond a window nothing is
            assert stored.sum() > 5
            want = weights.mean(0).sum(0)
            torch.testing.assert_close(mine[stored], want[stored], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_prefixkv_finds_the_threshold(share):
    """Each layer of a sample keeps its prefix up to one threshold, and all meet the share."""
    g = torch.Generator().manual_seed(0)
    seen = [torch.rand(6, n, generator=g) ** torch.tensor([[1], [2], [3], [4], [5], [6]])
            for n in (40, 33)]  # fmt: skip
    stage = PrefixKV(sinks=2, window=3)
    fitted = stage.fit([list(x) for x in seen], share)
    assert fitted["budget"] == share and len(fitted["ratios"]) == 6
    want = [cards.prefixes(x, share, first=2, last=3) for x in seen]
    for layer, ratio in enumerate(fitted["ratios"]):
        assert ratio == pytest.approx(sum(x[layer] for x in want) / 2, abs=1e-4)
    assert sum(fitted["ratios"]) / 6 == pytest.approx(share, abs=0.02)
    assert share == 1.0 or max(fitted["ratios"]) - min(fitted["ratios"]) > 0.05


@torch.no_grad()
def test_a_file_for_the_cache(tmp_path):
    """Layers store what it says; the window and the heads that were asked for are in it."""
    net, path = model("llava"), tmp_path / "prefixkv.json"
    asked = "prefixkv:heads=each:window=2"
    fitted = mllm.calibrate(net, asked, batches("llava"), share=0.4)
    other = mllm.calibrate(net, asked, batches("llava", 1), share=0.4)
    assert other.stage == fitted.stage and other.header["n_samples"] == 2
    fitted.save(path)
    assert (fitted.stage.heads, fitted.stage.window) == ("each", 2)
    inputs = collate("llava", samples("llava", "alone"))
    tokens = inputs["input_ids"].shape[1]
    with mllm.patch(net, f"prefixkv:calibration={path}") as patched:
        cache = net(**inputs, use_cache=True).past_key_values
        assert patched.plan.stages[0] == fitted.stage
    slots = [layer.slots for layer in cache.layers]
    assert slots == [max(3, round(ratio * tokens)) for ratio in fitted.stage.ratios]
    with pytest.raises(DataError, match="another model") as caught:
        mllm.patch(model("gemma3"), f"prefixkv:calibration={path}")
    assert caught.value.argument == "calibration"
    with pytest.raises(PlanError, match="sinks=2 beside a calibration file"):
        PrefixKV(sinks=2, calibration=str(path))
    with pytest.raises(PlanError, match="fits prefixkv, not fitprune"):
        mllm.patch(net, FitPrune(calibration=str(path)))
    for share in (0.0, 1.5):
        with pytest.raises(PlanError) as caught:
            mllm.calibrate(net, "prefixkv", batches("llava"), share=share)
        assert caught.value.argument == "share"
    with pytest.raises(PlanError, match="fraction of the prompt, not 64"):
        mllm.calibrate(net, "prefixkv:budget=64", batches("llava"))


def test_the_command(tmp_path, capsys):
    from PIL import Image

    from mllm.cli.calibrate import calibrate

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    lines = [json.dumps({"image": "red.png", "question": q}) for q in ("what colour?", "a cat?")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    out = tmp_path / "btp.json"
    data = calibrate(BTP_SPEC, out, "tiny-llava", str(tmp_path / "data.jsonl"), 64, None, 2,
                     "auto", "cpu")  # fmt: skip
    assert data["n_samples"] == 2 and data["path"] == str(out) and out.exists()
    net, processor = mllm.load_model(device="cpu")
    with mllm.patch(net, data["plan"]) as patched:
        assert Plan([patched.plan.stages[0]]).spec == data["fitted"]
    assert "calibrate" in capsys.readouterr().err, "a bar that people can see"


@pytest.mark.parametrize("text", ["not json", '{"picture": "x.png"}', None])
def test_data_that_cannot_be_read(tmp_path, text):
    from mllm.cli.calibrate import _samples

    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        _samples(str(path), 4)
    assert caught.value.argument == "data"
    assert len(_samples("yardstick", 5)) == 5
