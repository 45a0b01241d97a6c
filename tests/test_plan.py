"""Plans as text, as files and as stages: nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm
from mllm import plan as plan_module
from mllm.compressors.base import Keep, TokenReducer
from mllm.errors import PlanError
from mllm.plan import Plan, get_method, register
from mllm.plan import _options as options

NAMES = sorted(row["name"] for row in mllm.methods())
keeps = st.one_of(
    st.integers(1, 10_000),
    st.floats(0, 1, exclude_min=True, allow_nan=False, width=64),
)

shares = st.floats(0, 1)
on_cache = {
    "budget": st.integers(64, 10_000) | st.floats(0.01, 1),
    "sinks": st.integers(0, 9),
    "tokens": st.sampled_from(["prompt", "visual"]),
    "heads": st.just("each"),
    "kernel": st.sampled_from([1, 3, 7]),
    "pool": st.sampled_from(["max", "avg"]),
    "gqa": st.sampled_from(["max", "mean"]),
    "beta": st.integers(1, 40),
    "distance": st.integers(-40, 9),
    "queries": st.integers(1, 40),
    "skip": st.integers(0, 9),
    "group": st.integers(1, 9),
    "chunk": st.integers(2, 64),
    **dict.fromkeys(["outliers", "local"], st.integers(0, 64)),
    **dict.fromkeys(["rank_keys", "rank_values"], st.integers(1, 900) | st.floats(0.01, 1)),
    "merge": st.sampled_from(["pivot", "mean", "weighted", "none"]),
    "weights": st.sampled_from(["exp", "cosine"]),
    "rule": st.sampled_from(["uniform", "top"]),
    "skip_last": st.integers(0, 9),
    "decay": shares,
    "ratios": st.none() | st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(tuple),
    **dict.fromkeys(["floor", "threshold", "least", "spread", "attentive", "indifferent"], shares),
}


@st.composite
def stages(draw):
    """Any method with any legal parameters, some of them left at their defaults."""
    cls = get_method(draw(st.sampled_from(NAMES)))
    hints, cuts = typing.get_type_hints(cls), len(getattr(cls, "paper_layers", ()))
    values = {
        "keep": st.tuples(*[keeps] * cuts) if cuts else keeps,
        "layers": st.sets(st.integers(1, 60), min_size=cuts or 1, max_size=cuts or None)
        .map(sorted)
        .map(tuple)
        | (st.nothing() if cuts else st.none()),
        "layer": st.one_of(st.none(), st.integers(1, 60)),
        "positions": st.sampled_from(["original", "compact"]),
        "dominant": st.floats(0.01, 1),
        "cls": st.booleans(),
        "window": st.integers(2, 24),
        "local": st.floats(0, 1),
        "alpha": st.floats(0, 1),
        "stride": st.integers(1, 9),
        "step": st.integers(1, 64),
        "version": st.sampled_from(["1.5", "2.0"]),
        "budget": st.sampled_from([192, 128, 96, 64]),
        "recycle": st.floats(0, 1),
        "cluster": st.integers(1, 100),
        "heads": st.floats(0.01, 1),
        "neighbours": st.integers(1, 64),
        "important": st.floats(0.01, 1),
        "merge": st.sampled_from(["sum", "mean"]),
        "seed": st.integers(0, 2**31),
        "spatial": st.tuples(*[st.floats(0, 1)] * cuts),
        "attention": st.tuples(*[st.floats(0, 1)] * cuts),
        "diversity": st.tuples(*[st.floats(0, 1)] * cuts),
        "over": st.tuples(*[st.floats(1, 9)] * cuts),
        "end": st.none() | st.just(0) | st.integers(61, 99),
        "calibration": st.none(),  # a file beside layers is refused
        "pivots": st.integers(1, 9),
        "text_pivots": st.integers(0, 9),
        "relevance": st.sampled_from(["llm", "clip"]),
        "theta": st.none() | st.floats(0, 0.99),
        "grid": st.tuples(st.integers(1, 64), st.integers(1, 64)),
        "grids": st.none() | st.lists(st.sampled_from(["12", "6x8", "1"]), min_size=1).map(tuple),
        "count": st.integers(1, 9),
        "p": st.lists(st.floats(0.1, 9), min_size=1, max_size=3).map(tuple),
        "frames": st.integers(1, 64),
        "inflect": st.floats(-1, 1),
        "r": st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
        "crops": st.none() | st.integers(1, 64),
        "beta": st.floats(0, 9),
        "gamma": st.floats(0, 9),
        "sigma": st.floats(0.1, 9),
        "epsilon": st.floats(0.1, 9),
        "iterations": st.integers(1, 9),
        "recover": st.floats(0, 1),
        "tau": st.floats(0.1, 1),
        "recent": st.integers(1, 99),
        "spread": st.integers(0, 99),
        "primary": st.floats(0, 1),
        "rounds": st.integers(0, 9),
        "share": st.floats(0.1, 0.9),
        "block": st.integers(-3, 3),
        "together": st.floats(0, 1),
        "keys": st.floats(0.01, 1),
        "first": st.none() | st.integers(0, 60),
        "features": st.sampled_from(["unit", "raw"]),
        "clusters": st.none() | keeps,
        "queries": st.sampled_from(["mean", "each"]),
        "alone": st.floats(0, 1),
        "distance": st.floats(0, 2),
        "retrieve": st.floats(0, 9),
        **dict.fromkeys(["bits", "high", "low"], st.sampled_from([2, 4, 8, 16])),
        **dict.fromkeys(["key_bits", "value_bits"], st.sampled_from([None, 2, 4, 8, 16])),
        "group_size": st.sampled_from([2, 4, 8, 16, 32]),
        "residual": st.sampled_from([32, 64, 128]),
        "every": st.integers(1, 200),
        "schedule": st.sampled_from(["shiftedcos", "shiftedlinear", "deep", "interleave"]),
        "max_ratio": st.floats(0.5, 1),
        "min_ratio": st.floats(0.01, 0.5),
        "shift": st.floats(0, 1),
        "scale": st.floats(0.1, 0.9),
        "capacity": st.floats(0.01, 1),
        "ratio": st.floats(0.1, 1),
        "active": st.floats(0.51, 1),  # over the shared heads, half of all by default
        "dropout": st.floats(0, 0.9),
        "exit": st.none() | st.integers(1, 9),
        "recursions": st.integers(2, 9),
        "routing": st.sampled_from(["expert", "token"]),
        "least": st.none() | st.floats(0.01, 1),
        "scope": st.sampled_from(["all", "visual"]),
        "gate": st.sampled_from(["raw", "tanh"]),
        **dict.fromkeys(["threshold", "later", "auxiliary"], st.floats(0, 0.9)),
        "experts": st.integers(4, 64) | st.lists(st.integers(4, 9), min_size=1).map(tuple),
        "top_k": st.integers(1, 4),
        "mode": st.sampled_from(["sparse", "dense", "first_half", "second_half"]),
        "capacity_factor": st.none() | st.floats(0.1, 9),
        "min_capacity": st.integers(0, 9),
        **dict.fromkeys(["balance", "z"], st.floats(0, 1)),
        "segments": st.integers(3, 9),
        "shared": st.integers(1, 2),
        "start_from": st.sampled_from(["added", "split"]),
        "train": st.sampled_from(["draw", "keep"]),
        "scales": st.just((576, 144, 36, 9)),
        "counts": st.just((64, 256, 400)),
        "weights": st.none(),
        "pools": st.lists(st.sampled_from(["1x1", "2x3"]), min_size=3, max_size=4).map(tuple),
        "pool": st.sampled_from(["max", "avg"]),
        "choice": st.none() | st.tuples(*[st.integers(0, 2)] * cuts),
        "query": st.sampled_from(["last", "text", "router"]),
        "router": st.sampled_from(["mlp", "linear"]),
        "weight": st.sampled_from(["straight", "probability"]),
        "temperature": st.floats(0.1, 20),
        "target": st.floats(0, 2),
        "start": st.none() | st.integers(0, 9),
        "interval": st.integers(1, 4),
        "depth": st.integers(1, 8),
        "compress": st.sampled_from(["before", "behind"]),
        "fuse": st.sampled_from(["all", "text"]),
        "shares": st.sampled_from(["token", "feature"]),
        "match": st.sampled_from(["hungarian", "nearest"]),
    }
    learned = {"m3": (9, 36), "tokenflex": (64, 256), "mqt": (1, 64), "tokenpacker": (36, 144),
               "videoccam": (64, 1024), "dynamicvlm": (None, 1, 36),
               "llavamini": (1, 64), "llavamini_compress": (1, 64)}  # fmt: skip
    if cls.info.name in learned:
        values["keep"] = st.sampled_from(learned[cls.info.name])
        values["heads"], values["queries"] = st.integers(1, 16), st.sampled_from([256, 400])
        values |= {"hidden": st.integers(1, 999), "least": st.integers(1, 36),
                   "most": st.integers(36, 999), "total": st.integers(1, 9999)}  # fmt: skip
    if cls.info.name == "dpn":
        values["least"] = st.integers(1, 64)
    still = ("pmod", "mod", "mor", "gammamod", "moh", "layerskip", "deepstack", "slowfast",
             "tcllava", "llavamini_fuse", "lookingtolearn", "croc")  # fmt: skip
    if cls.info.name in still:
        values["positions"] = st.sampled_from([None, "original"])
    if cls.info.name == "lookingtolearn":
        values["gate"] = st.sampled_from(["soft", "hard"])
    if cls.info.name == "croc":
        values |= {"pool": st.integers(1, 9999), "weight": st.floats(0, 99),
                   "beta": st.floats(0.01, 9)}  # fmt: skip
    if cls.info.name == "moh":
        values["shared"] = st.floats(0.1, 0.4)
    if cls.info.stage == "cache":
        values |= on_cache
    names = [f.name for f in dataclasses.fields(cls)]
    values |= {name: st.booleans() for name in names if bool in options(hints[name])}
    assert set(names) <= set(values), "a new parameter needs a strategy here"
    given = draw(st.sets(st.sampled_from(names)))
    return cls(**{name: draw(values[name]) for name in sorted(given)})


plans = st.builds(Plan, st.lists(stages(), min_size=1, max_size=4), st.integers(0, 2**31))


def kinds(plan: Plan) -> list:
    return [[type(v) for v in dataclasses.asdict(s).values()] for s in plan.stages]


@settings(max_examples=80, deadline=None)
@given(plans)
def test_spec_round_trip(plan):
    again = Plan.from_spec(plan.spec, seed=plan.seed)
    assert again == plan and kinds(again) == kinds(plan)
    assert again.spec == plan.spec and again.sha256 == plan.sha256
    assert not set(" ,") & set(plan.spec)


@settings(max_examples=50, deadline=None)
@given(plans)
def test_json_round_trip(plan):
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and kinds(again) == kinds(plan) and again.sha256 == plan.sha256


@settings(max_examples=50, deadline=None)
@given(plans, plans)
def test_the_hash_tells_plans_apart(one, two):
    assert (one.sha256 == two.sha256) == (one == two)


def test_folder_round_trip(tmp_path):
    plan = Plan.from_spec("visionzip:keep=1.0:cls=false+fastv:layer=2:keep=1", seed=7)
    path = plan.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "mllm_plan.json"
    assert Plan.from_pretrained(tmp_path / "new" / "folder") == plan
    assert Plan.of(tmp_path / "new" / "folder") == plan
    assert Plan.of(str(tmp_path / "new" / "folder")) == plan
    data = json.loads(path.read_text())
    assert set(data) == {"type", "version", "mllm_version", "seed", "stages"}
    assert (data["type"], data["version"], data["seed"]) == ("mllm.plan", 1, 7)
    assert [set(s) for s in data["stages"]] == [{"name", "version", "params"}] * 2
    assert data["stages"][0]["params"]["keep"] == {"fraction": 1.0}
    assert data["stages"][1]["params"]["keep"] == {"tokens": 1}
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["mllm_plan.json"]


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), ("1.0", 1.0), ("64", 64), ("0.5", 0.5), ("0.25", 0.25), ("1e-2", 0.01)],
)
def test_a_budget_is_tokens_or_a_fraction(text, value):
    keep = Plan.from_spec(f"fastv:keep={text}").stages[0].keep
    assert keep == value and type(keep) is type(value)


def test_defaults_are_left_out_of_the_text():
    assert Plan.from_spec("fastv:layer=2:keep=0.5").spec == "fastv:layer=2"
    assert Plan.from_spec("divprune").spec == "divprune"
    # 1 and 1.0 are different budgets.
    one, all_of_them = Plan.from_spec("fastv:keep=1"), Plan.from_spec("fastv:keep=1.0")
    assert one.spec != all_of_them.spec and one != all_of_them


def test_words():
    stage = Plan.from_spec("visionzip:cls=false:merge=mean").stages[0]
    assert stage.cls is False and stage.merge == "mean"
    assert Plan.from_spec("fastv:layer=none").stages[0].layer is None


def test_what_patch_takes():
    fastv, zipped = get_method("fastv")(keep=3), get_method("visionzip")(keep=9)
    assert Plan.of(fastv).stages == [fastv]
    assert Plan.of([zipped, fastv]).stages == Plan.of((zipped, fastv)).stages == [zipped, fastv]
    plan = Plan.of("visionzip:keep=9+fastv:keep=3")
    assert plan == Plan([zipped, fastv])
    assert Plan.of(plan) is plan


@pytest.fixture
def texted():
    """A method with fields of other types than the shipped ones have."""

    @register("texted", stage="pre_llm")
    @dataclasses.dataclass
    class Texted(TokenReducer):
        keep: int | float = 1.0
        path: str = ""
        layers: tuple[int, ...] = ()
        grids: tuple[str, ...] = ()
        mode: Literal["a", "b"] = "a"

        def reduce(self, ctx):
            return [Keep(ctx.valid)]

    yield Texted
    del plan_module._REGISTRY["texted"]


@settings(max_examples=80, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_survives(text):
    name = "anytext"

    @dataclasses.dataclass
    class AnyText(TokenReducer):
        keep: int | float = 1.0
        path: str = ""

    register(name, stage="pre_llm")(AnyText)
    try:
        plan = Plan([AnyText(path=text)])
        assert not set(" ,\t\n") & set(plan.spec)
        assert plan.spec.count(":") == 1 and "+" not in plan.spec
        assert Plan.from_spec(plan.spec) == plan
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    finally:
        del plan_module._REGISTRY[name]


def test_lists_and_paths(texted):
    text = "texted:path=runs/a%3Ab%2Bc/d.json:layers=8/16/24:grids=12x12/6x6:mode=b"
    stage = Plan.from_spec(text).stages[0]
    assert stage.path == "runs/a:b+c/d.json", "a path is not a list"
    assert stage.layers == (8, 16, 24) and stage.grids == ("12x12", "6x6")
    assert Plan.from_spec(text).spec == text
    plan = Plan.from_spec(text)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_methods_describe_themselves():
    keys = {
        "name",
        "stage",
        "site",
        "reads",
        "actions",
        "trained",
        "paper",
        "licence_note",
        "params",
        "positions",
        "identity",
        "oracle",
        "backends",
    }
    rows = mllm.methods()
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert keys <= set(row)
        assert row["stage"] in ("pre_llm", "llm", "cache", "experts", "preset")
        assert row["oracle"] in ("mask", "rebuild", "reference")
        assert row["positions"] in ("original", "compact")
        assert {"sdpa", "eager"} <= set(row["backends"])
        cls = get_method(row["name"])
        assert [p["name"] for p in row["params"]] == [f.name for f in dataclasses.fields(cls)]
        assert {tuple(sorted(p)) for p in row["params"]} == {("default", "name", "type")}


@pytest.mark.parametrize(
    "text, argument, hint",
    [
        ("fastvv:keep=2", "method", "fastv"),
        ("vision-zip", "method", "visionzip"),
        ("FastV", "method", "fastv"),
        ("fastv:kep=0.5", "kep", "keep"),
        ("visionzip:dominat=0.5", "dominat", "dominant"),
        ("fastv:keep", "plan", "key=value"),
        ("fastv:", "plan", "key=value"),
        ("fastv::keep=1", "plan", "key=value"),
        ("fastv:=1", "plan", "key=value"),
        ("fastv:keep=1:keep=2", "keep", "once"),
        ("+fastv", "plan", "key=value"),
        ("fastv+", "plan", "key=value"),
        ("", "plan", "visionzip"),
        ("   ", "plan", "visionzip"),
        ("fastv:keep=", "keep", ""),
        ("fastv:keep=half", "keep", ""),
        ("fastv:keep=1/2", "keep", ""),
        ("fastv:layer=2.5", "layer", ""),
        ("fastv:layer=-1", "layer", "0"),
        ("visionzip:cls=maybe", "cls", ""),
        ("visionzip:merge=max", "merge", "sum"),
        ("visionzip:positions=shuffled", "positions", "compact"),
        ("visionzip:keep=64,fastv:layer=2", "plan", "+"),
        ("visionzip:keep=64 fastv:layer=2", "plan", "+"),
        ("visionzip keep=64", "plan", "key=value"),
        ("fastv:keep=0", "keep", "1"),
        ("fastv:keep=-3", "keep", "1"),
        ("fastv:keep=0.0", "keep", "fraction"),
        ("fastv:keep=-0.5", "keep", "fraction"),
        ("fastv:keep=1.5", "keep", "fraction"),
        ("fastv:keep=64.0", "keep", "fraction"),
        ("fastv:keep=nan", "keep", "fraction"),
        ("fastv:keep=inf", "keep", "fraction"),
        ("fastv:keep=true", "keep", ""),
        ("visionzip:dominant=0.0", "dominant", ""),
        ("visionzip:dominant=1.5", "dominant", ""),
        ("no/such/folder", "method", ""),
    ],
)
def test_broken_text(text, argument, hint):
    """Each mistake names the argument, what was given and what would work."""
    with pytest.raises(PlanError) as caught:
        Plan.of(text)
    error = caught.value
    assert error.argument == argument
    assert error.given is not None and str(error.given) in text or text.strip() == ""
    assert error.expected and hint in str(error.expected)
    assert set(error.as_dict()) == {"type", "message", "argument", "given", "expected"}


@pytest.mark.parametrize(
    "change, argument",
    [
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["stages"][0].update(speed=1), "speed"),
        (lambda d: d["stages"][0]["params"].update(kep=1), "kep"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(type="other.plan"), "version"),
        (lambda d: d.pop("version"), "version"),
        (lambda d: d["stages"][0].update(version=99), "version"),
        (lambda d: d["stages"][0].update(name="fastvv"), "method"),
        (lambda d: d["stages"][0]["params"].update(keep={"tokens": 0}), "keep"),
        (lambda d: d["stages"][0]["params"].update(keep={"tokens": "many"}), "keep"),
        (lambda d: d["stages"][0]["params"].update(keep={"share": 0.5}), "keep"),
        (lambda d: d["stages"][0]["params"].update(keep={"fraction": 1.5}), "keep"),
        (lambda d: d["stages"][0]["params"].update(layer="two"), "layer"),
        (lambda d: d.update(stages={}), "stages"),
        (lambda d: d.update(stages=["fastv"]), "stages"),
        (lambda d: d.update(seed="zero"), "seed"),
    ],
)
def test_broken_files(change, argument, tmp_path):
    plan = Plan.from_spec("fastv:layer=2:keep=5")
    path = plan.save_pretrained(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(tmp_path)
    assert caught.value.argument == argument
    assert caught.value.expected


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_files_that_are_no_plan(content, tmp_path):
    (tmp_path / "mllm_plan.json").write_text(content)
    with pytest.raises(PlanError, match="plan"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="plan"):
        Plan.from_pretrained(tmp_path / "nothing here")


def test_a_preset_is_written_as_one_and_runs_as_its_stages(tmp_path):
    """The paper's name stands in spec text and files; everything else sees the stages."""
    plan = Plan.from_spec("vscan:keep=64+fastv:layer=20")
    assert plan.spec == "vscan:keep=64+fastv:layer=20" and len(plan.stages) == 3
    parts = Plan.from_spec("vscan_vision:keep=96+vscan_llm:keep=32+fastv:layer=20")
    assert plan.stages == parts.stages and plan.sha256 == parts.sha256
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plan
    (row,) = [row for row in mllm.methods() if row["name"] == "vscan"]
    assert row["stage"] == "preset" and row["site"] == "several"
    assert set(row["actions"]) == {"Keep", "Merge", "Write"}
    assert "VisionAttention" in row["reads"] and "AttentionRows" in row["reads"]
    with pytest.raises(PlanError, match="did you mean: keep"):
        Plan.from_spec("vscan:kep=64")


def test_a_plan_is_made_of_stages():
    for wrong in [[1], [None], ["fastv"], 3, None]:
        with pytest.raises(PlanError) as caught:
            Plan.of(wrong)
        assert caught.value.argument == "plan" and caught.value.expected


@pytest.mark.parametrize(
    "keep", [0, -1, 0.0, -0.1, 1.1, float("nan"), float("inf"), True, "4", None, [4]]
)
def test_budgets_in_python(keep):
    for name in NAMES:
        if "keep" not in typing.get_type_hints(get_method(name)):
            continue
        if keep is None and type(None) in typing.get_args(
            typing.get_type_hints(get_method(name))["keep"]
        ):
            continue  # the method's own rule
        with pytest.raises(PlanError) as caught:
            get_method(name)(keep=keep)
        assert caught.value.argument == "keep"
