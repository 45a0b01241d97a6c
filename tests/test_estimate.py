"""What `mllm.estimate` says is what the ledger of a real run says, and its times are a roofline."""

from __future__ import annotations

import copy
import dataclasses
import json

import families
import pytest
import torch
from matrix import anatomy
from transformers import AutoConfig
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.compressors import FastV
from mllm.doctor import bones
from mllm.errors import DataError, PlanError
from mllm.estimate import Estimate
from mllm.estimating import SEPARATORS, WINDOWS, prompt, tiles
from mllm.models import resolve
from mllm.plan import get_method
from mllm.roofline import Hardware
from mllm.shapes import SHAPES

PROMPT = dict(text=9, batch=2)
SIZES = {"llava_next": (60, 110), "llava_onevision": (60, 110), "qwen2_vl": (112, 140),
         "qwen2_5_vl": (112, 140), "qwen3_vl": (112, 140), "glm4v": (112, 140),
         "glm46v": (112, 140), "mistral3": (84, 112), "lighton_ocr": (84, 112)}  # fmt: skip
#: Chosen before the LLM by values and by place, cut in it once and twice, on the cache.
PLANS = (
    "divprune:keep=5",
    "stride:keep=7+fastv:layer=2:keep=0.5",
    "pyramiddrop:layers=2/3:keep=0.5/0.25",
    "stride:keep=7",
    "snapkv:budget=0.5:window=2",
)
#: Those that choose the same tokens of every picture: of separators, and within windows, the same.
EVEN, SPACED = PLANS[-2:], ("llava_next", "llava_onevision")
#: Methods whose counts depend on values.
UNKNOWN = {
    "dualfilter", "mod", "mor", "mustdrop", "pact", "plphp", "prefixkv", "prumerge",
    "prumergeplus", "sparsevlm", "zipvl", "zipvl_prefill",
}  # fmt: skip
FAMILIES = [kind for kind in families.KITS if "video" not in kind and "many" not in kind]
CASES = [(f, p) for f in FAMILIES for p in PLANS if f not in (*SPACED, "gemma3") or p in EVEN]


def said(ledger: dict) -> dict:
    """A ledger without its notes, and without the bytes that heads of one choice can share."""
    return {key: x for key, x in ledger.items() if key not in ("notes", "kv_meta_bytes")}


@torch.no_grad()
def measured(family: str, plan: str | None, images: int = 1) -> dict:
    """The ledger of a real run on what `mllm.estimate` takes as the prompt."""
    net = families.model(family)
    inputs = prompt(resolve(net), images=images, size=SIZES.get(family), **PROMPT)
    torch.manual_seed(3)
    inputs = {k: torch.randn(x.shape) if x.is_meta else x for k, x in inputs.items()}
    with mllm.patch(net, [] if plan is None else plan) as patched:
        if patched.tiles is not None:
            inputs |= tiles(patched.family, inputs, patched.tiles)
        net(**inputs, use_cache=True, logits_to_keep=1)
        return patched.ledger.as_dict()


def estimated(family: str, plan: str | None, images: int = 1, **more) -> Estimate:
    config = copy.deepcopy(families.model(family).config)
    given = PROMPT | {"dtype": "float32", "images": images, "size": SIZES.get(family)} | more
    return mllm.estimate(config, plan, **given)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        pytest.param(*case, marks=[] if case[0] == "llava" or i % 3 == 0 else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_the_numbers_are_those_of_a_real_run(family, plan):
    found, real = estimated(family, plan, images=2), measured(family, plan, images=2)
    assert said(found.ledger) == said(real)
    assert found.patched.prefill_flops == sum(real["prefill_flops"])
    assert found.plain.prefill_flops == sum(real["baseline_prefill_flops"])
    assert found.patched.kv_bytes == real["kv_bytes"]
    assert [row["tokens"] for row in found.layers] == [x["tokens"][0] for x in real["layers"]]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "idefics3"])
def test_tiles_are_counted_where_a_plan_is_shown_some(family):
    plan = "deepstack:grid=1/2"
    found, real = estimated(family, plan, images=2), measured(family, plan, images=2)
    assert said(found.ledger) == said(real)
    plain = found.plain.tower_flops + found.plain.projector_flops
    assert found.patched.prefill_flops - found.plain.prefill_flops == pytest.approx(2 * plain)


@pytest.mark.parametrize("family", SPACED)
def test_separators_of_a_choice_by_values_are_said_to_be_a_guess(family):
    found = estimated(family, "divprune:keep=3", batch=6)
    assert SEPARATORS in found.assumptions
    assert SEPARATORS not in estimated(family, "stride:keep=3").assumptions
    assert all(0 <= n - 3 <= 3 for n in found.ledger["kept_llm"]), "a row has at most one"


def test_what_a_window_holds_of_a_choice_by_values_is_said_to_be_a_guess():
    found, real = (of("gemma3", PLANS[1], images=2) for of in (estimated, measured))
    assert WINDOWS in found.assumptions
    for name in ("layers", "prefill_flops", "selection_flops"):
        assert found.ledger[name] == real[name]


@pytest.mark.parametrize("images", [1, 3])
def test_without_a_plan_both_columns_are_those_of_the_unpatched_model(images):
    found = estimated("llava", None, images=images)
    assert dataclasses.asdict(found.plain) == dataclasses.asdict(found.patched)
    assert found.plain.visual == 16 * images == found.prompt["visual"]
    assert set(found.ratios.values()) == {1.0} and found.break_even == 0 and found.plan == ""


@pytest.mark.slow
@pytest.mark.parametrize("method", [row["name"] for row in mllm.methods()])
def test_every_method_is_counted_or_refused(method):
    """A refused plan is one whose ledger depends on values, so there is nothing to compare."""
    cls = get_method(method)
    net, stage = families.model("llava"), cls()
    try:
        mllm.patch(net, [stage]).remove()
    except PlanError:
        stage = cls(**(cls.identity or {}))
        try:
            mllm.patch(net, [stage]).remove()
        except PlanError:
            pytest.skip("not on this model")
    spec = mllm.Plan([stage]).spec
    if method in UNKNOWN:
        with pytest.raises(PlanError, match="depends on the picture"):
            estimated("llava", spec, images=2)
        return
    assert said(estimated("llava", spec, images=2).ledger) == said(measured("llava", spec, 2))


@pytest.mark.parametrize("plan", ["dualfilter", "plphp"])
def test_what_depends_on_the_picture_is_refused(plan):
    with pytest.raises(PlanError, match="nobody can say beforehand") as caught:
        estimated("llava", plan)
    assert caught.value.argument == "plan"


def test_every_part_takes_the_longer_of_computing_and_reading():
    plan, new = "stride:keep=4+snapkv:budget=0.5:window=2", 5
    fast = Hardware("reads at once", {"float32": 1e9}, 1e30)
    found = estimated("llava", plan, new=new, hardware=fast)
    assert found.patched.ttft_s == pytest.approx(found.patched.prefill_flops / 1e9)
    assert found.plain.ttft_s == pytest.approx(found.plain.prefill_flops / 1e9)

    slow = Hardware("computes at once", {"float32": 1e30}, 1e6)
    found = estimated("llava", plan, new=new, hardware=slow)
    net = families.model("llava")
    weights = {
        part: sum(p.nbytes for p in module.parameters())
        for part, module in (
            ("tower", net.model.vision_tower), ("projector", net.model.multi_modal_projector),
            ("layers", net.model.language_model.layers), ("head", net.lm_head),
        )
    }  # fmt: skip
    assert found.patched.ttft_s == found.plain.ttft_s == pytest.approx(sum(weights.values()) / 1e6)
    slot = 2 * 4 * 2 * 12 * 4 * 2  # keys and values, layers, heads, width, bytes, samples
    for cost in (found.plain, found.patched):
        stored = cost.kv_bytes + slot * (new - 1) / 2
        read = weights["layers"] + weights["head"] + stored
        assert cost.decode_s == pytest.approx(read / 1e6)
        assert cost.total_s == pytest.approx(cost.ttft_s + (new - 1) * cost.decode_s)
    assert found.plain.kv_bytes == slot * (16 + 9)


def bytes_of(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def test_what_a_plan_has_learnt_is_read_once_and_experts_at_every_step():
    slow, new = Hardware("computes at once", {"float32": 1e30}, 1e6), 5
    net, layers = families.model("llava"), families.LAYERS
    body = bytes_of(net.model.language_model.layers, net.lm_head)
    front = bytes_of(net.model.vision_tower, net.model.multi_modal_projector)
    slot = 2 * 4 * 2 * 12 * 4 * 2  # keys and values, layers, heads, width, bytes, samples
    for plan in ("llavamini:depth=2:heads=2", "moellava"):
        found = estimated("llava", plan, new=new, hardware=slow)
        with mllm.patch(net, plan) as patched:
            own = bytes_of(net.mllm)
            steps = 0
            if experts := patched.upcycled.layers:
                steps = own - bytes_of(*(net.model.language_model.layers[i].mlp for i in experts))
        assert own > body / layers
        read = body + steps + found.patched.kv_bytes + slot * (new - 1) / 2
        assert found.patched.decode_s == pytest.approx(read / 1e6)
        once = 0 if steps else own
        assert found.patched.ttft_s == pytest.approx((front + body + steps + once) / 1e6)
        assert found.patched.weight_bytes == found.plain.weight_bytes + own


def test_layers_that_are_not_run_are_not_read():
    """An early exit: two layers of four, in prefill and steps."""
    slow = Hardware("computes at once", {"float32": 1e30}, 1e6)
    found = estimated("llava", "layerskip:exit=2", new=1, hardware=slow)
    net = families.model("llava")
    left = bytes_of(*net.model.language_model.layers[2:])
    for name in ("ttft_s", "decode_s"):
        saved = getattr(found.plain, name) - getattr(found.patched, name)
        cache = 0 if name == "ttft_s" else found.plain.kv_bytes - found.patched.kv_bytes
        assert saved == pytest.approx((left + cache) / 1e6)


def test_break_even():
    base = estimated("llava", "snapkv:budget=0.5:window=2", new=5)
    late = dataclasses.replace(base.patched, ttft_s=1.0, decode_s=0.1)
    even = dataclasses.replace(base, plain=dataclasses.replace(late, ttft_s=0.75, decode_s=0.2),
                               patched=late)  # fmt: skip
    # The first token comes with the prefill; 0.25 s are three steps that save 0.1 s each.
    assert even.break_even == 4
    never = dataclasses.replace(even, patched=dataclasses.replace(late, decode_s=0.2))
    assert never.break_even is None and "No real speed-up" in str(never)
    # 0.25 s are saved at first, and 0.1 s lost in each of 4 steps.
    short = dataclasses.replace(
        even, plain=dataclasses.replace(late, ttft_s=1.25, decode_s=0.1, total_s=1.65),
        patched=dataclasses.replace(late, decode_s=0.2, total_s=1.8),
    )  # fmt: skip
    assert short.break_even is None and "faster up to 3 new tokens" in str(short)
    # So it is where the tokens that were asked for are few enough to gain.
    few = dataclasses.replace(short, plain=dataclasses.replace(short.plain, total_s=1.35),
                              patched=dataclasses.replace(short.patched, total_s=1.2))  # fmt: skip
    assert few.break_even is None and "faster up to 3 new tokens" in str(few)


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        (dict(batch=0), "batch"),
        (dict(visual=17), "visual"),
        (dict(text=2, images=2), "text"),
        (dict(dtype="int8"), "dtype"),
        (dict(hardware="abacus"), "hardware"),
        (dict(text=6.5), "text"),
        (dict(images=True), "images"),
        (dict(batch="2"), "batch"),
        (dict(size=1080), "size"),
        (dict(size="1920x1080"), "size"),
        (dict(size=(1, 2, 3)), "size"),
        (dict(size=(0, 5)), "size"),
    ],
)
def test_bad_input_is_named(given, argument):
    with pytest.raises(DataError) as caught:
        estimated("qwen2_vl" if "size" in given else "llava", None,
                  **({"size": None, "images": None} | given))  # fmt: skip
    assert caught.value.argument == argument


def test_pictures_of_one_size_are_given_none():
    with pytest.raises(DataError, match="pictures have one size"):
        estimated("llava", None, size=(60, 60))


@pytest.mark.parametrize(("family", "visual"), [("llava", 48), ("qwen2_5_vl", 42)])
def test_visual_tokens_can_be_asked_for(family, visual):
    found = estimated(family, None, visual=visual, images=None, size=None)
    assert found.ledger["visual_tokens"] == [visual, visual]


def test_a_users_plan_and_model_stay_as_they_were():
    net = families.model("llava")
    before, stage = anatomy(net), FastV(layer=2, keep=0.5)
    found = mllm.estimate(net, stage, **PROMPT, dtype="float32")
    assert found.patched.prefill_flops < found.plain.prefill_flops
    assert anatomy(net) == before
    assert vars(stage) == vars(FastV(layer=2, keep=0.5))


#: Parameters, in billions, as the models' pages on the hub say.
PARAMETERS = {
    "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "llava-next-7b": 7.06, "llava-next-13b": 13.35,
    "llava-onevision-7b": 8.03, "qwen2-vl-2b": 2.21, "qwen2-vl-7b": 8.29, "qwen2-vl-72b": 73.4,
    "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29, "qwen2.5-vl-32b": 33.5, "qwen2.5-vl-72b": 73.4,
    "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77, "internvl3-8b": 7.94, "smolvlm2-2.2b": 2.25,
    "gemma-3-4b": 4.30, "gemma-3-12b": 12.19, "gemma-3-27b": 27.43,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes_have_the_size_of_the_model(name):
    given = copy.deepcopy(SHAPES[name])
    net = bones(AutoConfig.for_model(given.pop("model_type"), **given), "bfloat16")
    count = sum(p.numel() for p in net.parameters()) / 1e9
    assert count == pytest.approx(PARAMETERS[name], rel=0.005)


def test_the_command_line():
    cli = CliRunner()
    given = ["estimate", "tiny-llava", "--plan", "stride:keep=64", "--dtype", "float32"]
    done = cli.invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert data == json.loads(json.dumps(mllm.estimate(
        "tiny-llava", "stride:keep=64", dtype="float32").as_dict()))  # fmt: skip
    assert data["patched"]["visual"] == 64 and data["ratios"]["kv_bytes"] == 640 / 128
    shown = cli.invoke(app, [*given, "--layers", "--peak", "1", "--bandwidth", "10"])
    assert shown.exit_code == 0 and "selection" in shown.stdout and "KV MiB" in shown.stdout
    for bad in (["--size", "12"], ["--peak", "1"], ["--plan", "nothing"], ["--visual", "7"]):
        refused = cli.invoke(app, ["estimate", "tiny-llava", *bad, "--json"])
        assert refused.exit_code == 2 and not json.loads(refused.stdout)["ok"]


@pytest.mark.parametrize(
    ("more", "argument"),
    [
        (["--hardware", "a100-80gb"], "hardware"),
        (["--hardware", "h100"], "hardware"),  # though it is the default
        (["--memory", "-1"], "memory"),
        (["--bandwidth", "nan"], "bandwidth"),
        (["--peak", "inf"], "peak"),
    ],
)
def test_a_device_of_ones_own_is_one_device(more, argument):
    """Nothing of it is passed over in silence."""
    given = ["estimate", "tiny-llava", "--peak", "1", "--bandwidth", "10", *more, "--json"]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2, refused.output
    assert json.loads(refused.stdout)["error"]["argument"] == argument
