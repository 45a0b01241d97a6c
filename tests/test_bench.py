"""The bench on a shape of a few thousand weights: what it reports, never how fast it was."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

import mllm
from mllm import flops, shapes
from mllm.cli import app
from mllm.errors import DataError, PlanError
from mllm.eval import (
    bench,
    bench_clock,
    bench_decode,
    bench_kernels,
    bench_kv,
    bench_machine,
    bench_prompt,
    bench_routers,
    bench_selection,
    bench_shapes,
    bench_train,
)
from mllm.eval.bench_shapes import Shape
from mllm.models import resolve

TINY = Shape(
    name="tiny",
    vision=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                image_size=56, patch_size=14),
    text=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=128, max_position_embeddings=8192),
    visual=(16, 32),
)  # fmt: skip
TINY_QWEN = Shape(
    name="tiny-qwen",
    family="qwen2_5_vl",
    vision=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=48,
                patch_size=14, window_size=56, fullatt_block_indexes=[1]),
    text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=128, max_position_embeddings=2048,
              rope_parameters=dict(rope_type="default", mrope_section=[2, 2, 2], rope_theta=1e4)),
    visual=(20,),
)  # fmt: skip
SUITES = {
    "prefill": bench.prefill, "decode": bench_decode.decode, "kv": bench_kv.kv,
    "selection": bench_selection.selection, "train": bench_train.train,
    "dispatch": bench_routers.dispatch,
}  # fmt: skip
PROMISED = {
    "plan", "batch", "visual", "text", "dtype", "backend", "pairs", "ratio", "ratio_ci", "ideal",
    "share", "peak_bytes", "status",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return TINY.build(torch.float32, "cpu")


def test_results_have_the_promised_fields():
    results = bench.prefill(
        model=TINY, plans=["fastv:layer=2:keep=0.5"], text=9, batch=(1, 2), pairs=3, dtype="float32"
    )
    json.dumps(results, allow_nan=False)
    assert results["schema"] == 1 and results["suite"] == "prefill"
    assert {"model_shape", "device", "versions", "commit", "threads", "load_before"} <= set(results)
    assert [(r["batch"], r["visual"]) for r in results["rows"]] == [
        (1, 16),
        (1, 32),
        (2, 16),
        (2, 32),
    ]
    for row in results["rows"]:
        assert PROMISED <= set(row)
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
        assert row["status"] == "unresolved" and "3 pairs" in row["words"]


def test_ideal_is_the_ratio_of_flops(model):
    results = bench.prefill(
        model=TINY, plans=["fastv:layer=2:keep=0.25"], visual=[16], text=9, pairs=1, dtype="float32"
    )
    text = model.config.text_config
    head = flops.lm_head(text, 1)
    full, cut = flops.decoder_layer(text, 25, 25), flops.decoder_layer(text, 13, 13)
    row = results["rows"][0]
    assert row["llm_ideal"] == pytest.approx((4 * full + head) / (2 * full + 2 * cut + head))
    assert 1 < row["ideal"] < row["llm_ideal"]


def test_the_bench_shape_is_the_promised_one():
    shape = bench.BENCH_CPU
    assert list(shape.vision.values()) == [512, 2048, 6, 8, 336, 14]
    assert list(shape.text.values())[:6] == [1024, 2816, 16, 16, 16, 8192]
    assert set(bench.PREFILL_PLANS) == {
        "fastv:layer=2:keep=1.0", "fastv:layer=2:keep=0.5", "fastv:layer=2:keep=0.25",
        "fastv:layer=2:keep=0.11", "visionzip:keep=64",
    }  # fmt: skip


def test_twin_shares_weights_and_is_patched_alone(model):
    inputs = bench.random_inputs(model, visual=16, text=9, batch=2)
    twin = bench.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with torch.inference_mode():
        before = model(**inputs).logits
        with mllm.patch(twin, "random:keep=4") as patched:
            twin(**inputs)
            assert patched.ledger.kept("llm")[0].numel() == 4
            assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(twin(**inputs).logits, before)


@pytest.mark.parametrize("text", [9, 2])
def test_inputs_have_the_stated_length(model, text):
    """Also where there are too few words to stand between the pictures."""
    inputs = bench.random_inputs(model, visual=32, text=text, batch=3, unequal=text == 2)
    image = inputs["input_ids"] == model.config.image_token_id
    assert image.shape == (3, 2 * 16 + text) and image.sum(1).tolist() == [32] * 3
    assert inputs["pixel_values"].shape == (6, 3, 56, 56)
    assert image[0].diff().sum() == (4 if text == 9 else 2), "pictures lie apart, or together"
    assert inputs["attention_mask"].all()


def test_unequal_prompts_are_padded_on_the_left(model):
    inputs = bench.random_inputs(model, visual=16, text=16, batch=4, unequal=True)
    mask = inputs["attention_mask"]
    assert mask.sum(1).tolist() == [32, 29, 26, 23]
    assert (mask.diff(dim=1) >= 0).all()
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == 16).all()
    with mllm.patch(bench.twin(model), "fastv:layer=2:keep=0.5") as patched:
        patched.model(**inputs)
        assert patched.ledger.tokens(3) == [24, 21, 18, 15]


def test_pairs_alternate_their_order(monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench, "timed_prefill", lambda which, inputs: seen.append(which) or (1.0, 0.5)
    )
    times, others = bench.time_pairs("a", "b", {}, 3, warmup=1)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert times.shape == (3, 2, 2) and others.shape == (3, 0)


def test_each_time_is_booked_to_its_model(monkeypatch):
    cost = {"base": (4.0, 2.0), "other": (1.0, 0.5)}
    monkeypatch.setattr(bench, "timed_prefill", lambda which, inputs: cost[which])
    times, _ = bench.time_pairs("base", "other", {}, 2)
    assert np.array_equal(times[..., 0], [[4.0, 1.0], [4.0, 1.0]])
    assert np.array_equal(times[..., 1], [[2.0, 0.5], [2.0, 0.5]])


def test_attainable_is_the_unpatched_tower_and_layers_at_the_plans_lengths(model, monkeypatch):
    # 41 tokens until the cut before layer 2 of 4, then 9 text and 8 visual ones.
    def timed(which, inputs):
        llm = inputs["input_ids"].shape[1] / 10 if which is model else 3.0
        return (llm + 1.0, llm)

    monkeypatch.setattr(bench, "timed_prefill", timed)
    row = bench._row(
        model, "fastv:layer=2:keep=0.25", bench.random_inputs(model, visual=32, text=9, batch=1),
        3, None, "", None,
    )  # fmt: skip
    assert row["attainable"] == pytest.approx(5.1 / (1.0 + (4.1 + 1.7) / 2))
    assert row["ratio"] == pytest.approx(5.1 / 4.0)
    assert row["attainable_share"] == pytest.approx(row["ratio"] / row["attainable"])


def test_pictures_of_any_size_are_drawn_for_qwen():
    results = bench.prefill(
        model=TINY_QWEN, plans=["fastv:layer=2:keep=0.5", "divprune:keep=5"], text=9, batch=(2,),
        unequal=True, pairs=1, dtype="float32", sdpa="math",
    )  # fmt: skip
    assert [row["visual"] for row in results["rows"]] == [20, 20]
    assert all(row["ideal"] > 1 for row in results["rows"]) and results["sdpa"] == "math"


def test_pictures_of_a_size():
    """112 x 168 pixels are 4 x 6 visual tokens of 28 pixels each."""
    results = bench.prefill(
        model=TINY_QWEN, plans=["stride:keep=5"], text=9, size=[(112, 168)], pairs=1,
        dtype="float32",
    )  # fmt: skip
    (row,) = results["rows"]
    assert (row["visual"], row["size"]) == (24, [112, 168])
    inputs = bench.random_inputs(TINY_QWEN.build(torch.float32, "cpu"), size=(112, 168), text=9,
                                 batch=1)  # fmt: skip
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]


@pytest.mark.parametrize("family", ["gemma3", "llava_next", "idefics3", "mistral3"])
def test_inputs_of_other_families(family):
    """What is drawn goes through the model, and is as long as was asked for."""
    model = families.model(family)
    own = resolve(model)
    fixed = own.native_grid()
    given = {"visual": fixed[0] * fixed[1]} if fixed else {"size": (56, 56)}
    inputs = bench.random_inputs(model, **given, text=9, batch=2, unequal=True)
    count = int((inputs["input_ids"][0] == own.image_token_id).sum())
    assert inputs["input_ids"].shape == (2, count + 9)
    assert inputs["attention_mask"].sum(1).tolist() == [count + 9, count + 6]
    if fixed is None:
        assert count == bench_shapes.visual_tokens(own, (56, 56))
    with mllm.patch(bench.twin(model), "stride:keep=0.5") as patched, torch.inference_mode():
        patched.model(**inputs)
        assert patched.ledger.as_dict()["visual_tokens"][0] <= count


def full(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_a_point_without_memory_is_a_row_and_the_sweep_goes_on(monkeypatch):
    real = bench.timed_prefill

    def timed(which, inputs):
        return full() if inputs["input_ids"].shape[1] == 41 else real(which, inputs)

    monkeypatch.setattr(bench, "timed_prefill", timed)
    results = bench.prefill(
        model=TINY, plans=["random:keep=4", "stride:keep=4"], text=9, visual=[16, 32, 48], pairs=1,
        dtype="float32",
    )  # fmt: skip
    found = [(row["visual"], row["status"]) for row in results["rows"]]
    assert found == [(n, s) for n, s in ((16, "unresolved"), (32, "oom"), (48, "unresolved"))
                     for _ in range(2)]  # fmt: skip
    assert results["words"][1] == "Out of memory: 2 of 6 rows."
    assert all(PROMISED <= set(row) for row in results["rows"])
    assert results["rows"][2]["ratio_ci"] is None


@pytest.mark.parametrize(
    "words",
    ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "std::bad_alloc",
     "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x",
     "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"],
)  # fmt: skip
def test_whoever_runs_out_of_memory(words):
    def fails():
        raise RuntimeError(words)

    assert bench.within_memory(fails) is None


def test_where_only_the_plan_fits_its_peak_is_said(monkeypatch):
    real = bench.peak_bytes
    built = []

    def build(*given):
        built.append(bench_shapes.model_of(*given))
        return built[0]

    def peak(which, inputs):
        return full() if which is built[0][0] else real(which, inputs)

    monkeypatch.setattr(bench, "model_of", build)
    monkeypatch.setattr(bench, "peak_bytes", peak)
    row = bench.prefill(
        model=TINY, plans=["random:keep=4"], text=9, visual=[16], pairs=1, dtype="float32"
    )["rows"][0]
    assert row["status"] == "oom" and row["peak_bytes"] > 0 and row["ratio"] is None
    assert "out of memory without the plan; with it a prefill takes" in row["words"]


def test_inputs_without_memory_are_rows_too(monkeypatch):
    monkeypatch.setattr(bench, "random_inputs", full)
    rows = bench.prefill(model=TINY, plans=["random:keep=4"], text=9, pairs=1,
                         dtype="float32")["rows"]  # fmt: skip
    assert [row["status"] for row in rows] == ["oom", "oom"]


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def fails(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(bench, "timed_prefill", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        bench.prefill(model=TINY, plans=["random:keep=4"], text=9, pairs=1, dtype="float32")


def test_a_config_file_gets_random_weights(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TINY.config().to_json_string())
    model, about = bench_shapes.model_of(str(path), "float32", "cpu")
    assert about == {"name": str(path), "weights": "random"}
    for own, other in zip(model.parameters(), TINY.build(torch.float32, "cpu").parameters(),
                          strict=True):  # fmt: skip
        assert torch.equal(own, other)
    assert bench_shapes.config_of("qwen2-vl-2b").model_type == "qwen2_vl"
    with pytest.raises(DataError, match="cannot read the configuration"):
        bench_shapes.model_of(str(tmp_path / "none.json"), "float32", "cpu")


def test_the_shapes_of_7b_models_are_theirs():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in shape.build(torch.bfloat16, "meta").parameters())
            for name, shape in bench_shapes.SHAPES.items()
        }
    assert sizes["llava-1.5-7b"] == pytest.approx(7.06e9, rel=0.01)
    assert sizes["qwen2.5-vl-7b"] == pytest.approx(8.29e9, rel=0.01)


@pytest.mark.parametrize(
    "shape", [*bench_shapes.SHAPES.values(), TINY_QWEN, *shapes.SHAPES],
    ids=lambda shape: getattr(shape, "name", shape),
)  # fmt: skip
def test_tokens_with_a_meaning_are_of_the_vocabulary(shape):
    """transformers warns of others."""
    config = bench_shapes.config_of(shape)
    text = config.get_text_config()
    named = {**config.to_dict(), **text.to_dict()}.items()
    ids = {k: v for k, v in named if k[0] != "_" and k.endswith("_token_id") and type(v) is int}
    assert not {k: v for k, v in ids.items() if not 0 <= v < text.vocab_size}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_takes_the_options_of_all(suite, monkeypatch):
    """By keyword, with one meaning and one default; another keyword is an error at once."""
    seen = []

    def opened(name, model, asked, **_):
        seen.append(asked)
        return None, [], {"suite": name, "rows": []}

    monkeypatch.setattr(bench, "opened", opened)
    monkeypatch.setattr(bench_train, "prepare", lambda *_: None)
    run, more = SUITES[suite], {"plans": {"moe": None}} if suite == "dispatch" else {}
    run(model=TINY, **more)
    batch = (1, 8) if suite == "selection" else (1,)
    assert seen[0] == bench.Options(
        visual=None, size=None, text=63, batch=batch, unequal=False, pairs=30, dtype="bfloat16",
        device=None, sdpa=None, threads=None, progress=None, on_row=None,
    )  # fmt: skip
    given = dict(visual=[16], size=None, text=9, batch=(2,), unequal=True, pairs=3,
                 dtype="float32", device="cpu", sdpa="math", threads=1, progress=print,
                 on_row=print)  # fmt: skip
    run(model=TINY, **more, **given)
    assert seen[1] == bench.Options(**given)
    with pytest.raises(TypeError, match="pair"):
        run(model=TINY, **more, pair=3)


@pytest.mark.parametrize("suite", [*SUITES, "kernels", "routers"])
def test_threads_are_those_of_before_even_after_an_error(suite):
    more = {"kernels": bench_kernels.kernel_suite, "routers": bench_routers.routers}
    plans = {"plans": {"moe": None}} if suite == "dispatch" else {}
    before = torch.get_num_threads()
    with pytest.raises(DataError, match="toaster"):  # is found out once threads are set
        (SUITES | more)[suite](model=TINY, threads=before + 1, device="toaster", **plans)
    assert torch.get_num_threads() == before


def test_threads_are_those_asked_for_while_it_is_measured():
    before, seen = torch.get_num_threads(), []
    results = bench.prefill(
        model=TINY, plans=["random:keep=4"], visual=[16], text=9, pairs=1, dtype="float32",
        threads=before + 1, progress=lambda *_: seen.append(torch.get_num_threads()),
    )  # fmt: skip
    assert results["threads"] == seen[0] == before + 1 == torch.get_num_threads() + 1


def test_lengths_are_those_of_the_models_pictures():
    """One picture and two; none of a size that the model has not."""
    asked = bench.Options(dtype="float32", text=9)
    gemma = families.model("gemma3")
    each = np.prod(resolve(gemma).native_grid())
    for single, shares in ((False, [1, 2]), (True, [1])):
        points = opened_on(gemma, asked, single=single)
        assert [point.visual for point in points] == [each * n for n in shares]
    anysize = opened_on(families.model("qwen2_5_vl"), asked)
    assert [point.visual for point in anysize] == [576, 1152]


def opened_on(model, asked, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "model_of", lambda *_: (model, {}))
        return bench.opened("prefill", "somewhere", asked, **more)[1]


@pytest.mark.parametrize(
    ("given", "length", "argument"),
    [
        ({"visual": [16]}, [120], "visual"), ({"size": [(56, 56)]}, [120], "size"),
        ({}, [79], "length"),  # no room for one picture and 64 words
    ],
)  # fmt: skip
def test_one_way_to_say_how_long_a_prompt_is(given, length, argument):
    with pytest.raises(DataError) as error:
        bench.opened("kv", TINY, bench.Options(dtype="float32", **given), length=length)
    assert error.value.argument == argument
    if argument == "length":
        assert error.value.expected == "80 or more"
        bench.opened("kv", TINY, bench.Options(dtype="float32"), length=[80])


class Gpu:
    """What `torch.cuda` is asked, and for which device."""

    def __init__(self, monkeypatch):
        self.asked = []
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated",
                     "max_memory_allocated", "current_stream"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, self.noted(name))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: self)

    def noted(self, name):
        def call(device=None):
            self.asked.append(device)
            return device if name == "current_stream" else 7

        return call

    def record(self, stream=None):
        self.asked.append(stream)

    def elapsed_time(self, _):
        return 5.0


def test_times_and_peaks_are_those_of_the_models_gpu(monkeypatch):
    """The current GPU is another one: nobody asks it."""
    gpu, second = Gpu(monkeypatch), torch.device("cuda:1")
    clock = bench_clock.clock_of(SimpleNamespace(device=second))
    clock.mark()
    assert clock.seconds() == [5e-3]
    assert bench_clock.peak_of(second, lambda: None) == 0
    bench_prompt.now(SimpleNamespace(layers=[SimpleNamespace(device=second)]))
    bench_machine._best(lambda: time.sleep(0.11), second)
    assert len(gpu.asked) > 12 and set(gpu.asked) == {second}


def test_results_are_given_after_each_row():
    seen = []
    bench.prefill(
        model=TINY, plans=["random:keep=4", "stride:keep=4"], visual=[16], text=9, pairs=1,
        dtype="float32", on_row=lambda results: seen.append(len(results["rows"])),
    )  # fmt: skip
    assert seen == [1, 2]


def test_peak_counts_weights_and_grows_with_the_batch(model):
    small = bench.peak_bytes(model, bench.random_inputs(model, visual=16, text=9, batch=1))
    large = bench.peak_bytes(model, bench.random_inputs(model, visual=16, text=9, batch=8))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = 8 * 128 * 4
    assert weights < small < large - logits


@pytest.mark.parametrize(
    ("ratio", "ci", "ideal", "target", "pairs", "status", "part"),
    [
        (1.9, (1.88, 1.92), 2.0, 0.95, 30, "ok", "reaches"),
        (1.8, (1.78, 1.91), 2.0, 0.95, 30, "unresolved", "unresolved"),
        (1.7, (1.69, 1.71), 2.0, 0.95, 30, "ok", "misses"),
        (0.8, (0.79, 0.81), 2.0, None, 30, "ok", "no real speed-up: 1.25x slower"),
        (1.0, (0.99, 1.01), 1.0, 1 / 1.03, 30, "ok", "contains 1; reaches"),
        (1.9, (1.88, 1.92), 2.0, 0.95, 5, "unresolved", "too few"),
    ],
)
def test_verdicts(ratio, ci, ideal, target, pairs, status, part):
    found, words = bench.judge(ratio, ci, ideal, target, pairs)
    assert found == status and part in words


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"visual": [100]}, DataError, "multiple of 16"),
        ({"visual": [0]}, DataError, "multiple of 16"),
        ({"pairs": 0}, DataError, "pairs=0"),
        ({"batch": (0,)}, DataError, "batch=0"),
        ({"threads": 0}, DataError, "threads=0"),
        ({"dtype": "int8"}, DataError, "bfloat16"),
        ({"device": "toaster"}, DataError, "toaster"),
        ({"sdpa": "slow"}, DataError, "flash"),
        ({"model": TINY_QWEN, "visual": [0]}, DataError, "1 or more"),
        ({"size": [(56, 56)]}, DataError, "one size of image"),
        ({"model": TINY_QWEN, "size": [(0, 56)]}, DataError, "size=56x0"),
        ({"visual": [16], "size": [(56, 56)]}, DataError, "without visual"),
        ({"plans": ["fastw:keep=0.5"]}, PlanError, "fastw"),
        ({"plans": ["fastv:layer=9:keep=0.5"]}, PlanError, "layer"),
    ],
)
def test_bad_input_is_named(options, error, part):
    with pytest.raises(error, match=part):
        bench.prefill(**{"model": TINY, "pairs": 1, "dtype": "float32", "text": 9, **options})


def test_command_writes_the_same_results_to_a_file(tmp_path, monkeypatch, cli):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    output = tmp_path / "bench.json"
    words = ["bench", "--model", "tiny", "--plan", "random:keep=4", "--visual", "16", "--text", "9"]
    words += ["--pairs", "1", "--dtype", "float32"]
    result = cli.invoke(app, [*words, "--json", "--output", str(output)])
    assert result.exit_code == 0, result.output
    payload = json.loads(result.stdout)
    assert payload["command"] == "bench" and payload["ok"]
    assert json.loads(output.read_text()) == payload["data"]
    assert list(tmp_path.iterdir()) == [output]
    shown = cli.invoke(app, words)
    assert shown.exit_code == 0 and "random:keep=4" in shown.stdout


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        ("--suite kernels --text 9", "text"),
        ("--suite decode --length 120 --text 9", "text"),
        ("--suite decode --length 120 --visual 16", "visual"),
        ("--suite kv --plan h2o --budget 0.5", "budget"),
        ("--compare a.json b.json --plot rows.svg", "plot"),
        ("--compare a.json b.json --suite kv", "suite"),
    ],
)
def test_no_option_is_passed_over_in_silence(words, argument, monkeypatch, cli):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    model = [] if "compare" in words else ["--model", "tiny", "--pairs", "1"]
    result = cli.invoke(app, ["bench", *model, *words.split(), "--json"])
    assert result.exit_code == 2, result.output
    assert json.loads(result.stdout)["error"]["argument"] == argument


def test_an_unwritable_output_is_refused_before_the_work(tmp_path, cli):
    result = cli.invoke(app, ["bench", "--output", str(tmp_path / "no" / "bench.json")])
    assert result.exit_code == 2 and "bench.json" in result.stderr


@pytest.fixture
def cli():
    from typer.testing import CliRunner

    return CliRunner()
