"""Every registered method: its paper, its documentation, its checks, and what its budgets leave."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tiny
import torch
from matrix import CASES

import mllm
from mllm.compressors.base import LayerPruner, LayerSchedule, Preset, TokenReducer, TowerReducer
from mllm.errors import PlanError
from mllm.plan import Plan, get_method, keep_for_average, resolve

METHODS = {row["name"]: row for row in mllm.methods()}
PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
#: Rows for comparison, which no paper claims.
PLAIN = {"random", "randomllm", "randomkv", "stride", "avgpool", "downsample", "adaptivepool",
         "pyramid"}  # fmt: skip
#: What lets stored tokens go: no token of these leaves a layer.
ON_CACHE = {name for name, row in METHODS.items() if row["stage"] == "cache"}
#: They choose an FFN for every token; none leaves.
EXPERTS = {name for name, row in METHODS.items() if row["stage"] == "experts"}
#: What the matrix does not hold: where it is checked instead, against a reference of its own.
ELSEWHERE = {
    **dict.fromkeys(ON_CACHE, "test_kv.py"), **dict.fromkeys(EXPERTS, "test_experts.py"),
    "tome": "test_tower.py", "cmai": "test_zoo_vmtc.py", "zipvl": "test_kv_quant.py",
    "keytokens": "test_zoo_mustdrop.py", "mustdrop": "test_zoo_mustdrop.py",
    "zipvl_prefill": "test_zoo_zipvl.py", "kivi": "test_kv_quant.py",
    "zipvl_cache": "test_kv_quant.py", "outputaware": "test_zoo_mustdrop.py",
    "randomllm": "test_methods.py", "pmod": "test_routers.py", "mod": "test_depth.py",
    "gammamod": "test_depth.py", "moh": "test_depth.py", "skipffn": "test_depth.py",
    "layerskip": "test_depth.py", "mor": "test_mor.py", "dpn": "test_dpn.py",
    "deepstack": "test_deepstack.py", "slowfast": "test_slowfast.py",
    "lookingtolearn": "test_slowfast.py", "croc": "test_croc.py",
    **dict.fromkeys(["m3", "mqt", "tokenflex", "tokenpacker"], "test_learned.py"),
    **dict.fromkeys(["videoccam", "dynamicvlm"], "test_temporal.py"), "tcllava": "test_tcllava.py",
    **dict.fromkeys(["llavamini", "llavamini_compress", "llavamini_fuse"], "test_llavamini.py"),
}  # fmt: skip
PUBLISHED = [(576, 192), (576, 128), (576, 64), (2880, 640), (2880, 320), (2880, 160)]
DEPTH = 32


def section(name: str) -> str:
    """What the page says of a method."""
    found = re.search(rf"^### `{name}`\n\n(.*?)(?=\n#|\Z)", PAGE, re.M | re.S)
    assert found, f"docs/methods.md has no section '### `{name}`'"
    return found[1]


@pytest.mark.parametrize("name", METHODS)
def test_paper_and_documentation(name):
    """A paper, the licence if it binds, a section of the page that names both paper and cost."""
    row, text = METHODS[name], section(name)
    if name in PLAIN:
        assert row["paper"] is None
    else:
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}(v\d)?|ICCV 2025", row["paper"])
        assert row["paper"].split("v2")[0] in text
    assert len(text.split()) >= 25 and re.search(r"[Cc]ost|O\(N D\)|[Nn]othing", text)
    if name in ("divprune", "tome", "fitprune"):
        assert "from the paper" in row["licence_note"]


def test_the_page_has_no_other_sections():
    assert set(re.findall(r"^### `(.*?)`$", PAGE, re.M)) == set(METHODS)


def _documented(cls) -> set[str]:
    """Parameters that a class's docstring explains."""
    args = "".join((cls.__doc__ or "").split("Args:")[1:]).split("Attributes:")[0]
    lines = re.findall(r"^        ?([a-z_, ]+):", args, re.M)
    return {word.strip() for line in lines for word in line.split(",")}


@pytest.mark.parametrize("name", METHODS)
def test_documented_defaults(name):
    """Every parameter has a default, and its docstring, or one of its bases', says what it is."""
    cls = get_method(name)
    said = set().union(*(_documented(c) for c in cls.__mro__ if dataclasses.is_dataclass(c)))
    fields = {f.name for f in dataclasses.fields(cls)}
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))
    assert said == fields
    assert cls() == cls(**{f.name: f.default for f in dataclasses.fields(cls)})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_checked(name):
    """In the matrix of invariants, or against a reference in a file of its own."""
    used = {stage.info.name for spec in CASES for stage in Plan.from_spec(spec).stages}
    if name in ELSEWHERE:
        assert name not in used, "it is in the matrix: take it out of the list above"
        text = (Path(__file__).parent / ELSEWHERE[name]).read_text()
        assert name in text.lower() and "def test_" in text
        return
    own = get_method(name)()
    stages = own.expand() if isinstance(own, Preset) else [own]
    assert {stage.info.name for stage in stages} <= used


# What budgets leave, layer by layer


def entering(plan, tokens: int) -> list[int]:
    """Visual tokens of one image that enter each of 32 layers, from the plan alone."""
    seen, first = [], tokens
    stages = [s.at_depth(DEPTH) if hasattr(s, "at_depth") else s for s in Plan.of(plan).stages]
    for stage in stages:
        if isinstance(stage, TokenReducer | TowerReducer):
            first = resolve(stage.keep, first)
    there = first
    for layer in range(DEPTH):
        for stage in stages:
            if isinstance(stage, TokenReducer | TowerReducer) or layer not in stage.at():
                continue
            if stage.info.name == "vtw" or layer == getattr(stage, "end", None):
                there = 0
            elif isinstance(stage, LayerSchedule):
                there = min(there, resolve(stage.budgets()[stage.layers.index(layer)], first))
            else:
                there = resolve(stage.keep, there)
        seen.append(there)
    return seen


#: Before the decoder: the budget is what every layer sees.
EXACT = ["random", "stride", "visionzip", "divprune", "fastervlm", "vispruner", "prumerge",
         "prumergeplus", "hired", "vscan_vision", "cdpruner", "holov", "vmtc", "tome"]  # fmt: skip
#: Inside: one cut, before this layer of 32.
CUT = {"fastv": 2, "randomllm": 2, "dart": 2, "topv": 3, "vscan_llm": 16}
#: Inside: schedules, whose shape is kept.
SHAPED = ["pyramiddrop", "feather", "btp", "fitprune"]
#: Neither: the picture decides, or the parameters are no budget of tokens.
OTHERS = {
    "avgpool": "whole grids", "downsample": "whole grids", "pyramid": "whole grids",
    "ggem": "whole grids", "adaptivepool": "one grid", "pllava": "one grid",
    "sparsevlm": "published schedules", "vscan": "a preset", "mustdrop": "a preset",
    "vtw": "one layer",
    "pact": "the picture decides", "dualfilter": "the picture decides",
    "zipvl": "a preset", "zipvl_prefill": "the picture decides", "keytokens": "nothing leaves",
    "cmai": "nothing leaves", "windowmerge": "a share of windows",
    **dict.fromkeys(["pmod", "mod", "mor", "gammamod"], "tokens pass layers by"),
    "moh": "nothing leaves",
    "skipffn": "FFNs are passed by", "layerskip": "layers are left out",
    "m3": "whole grids", "tokenflex": "whole grids", "tokenpacker": "whole grids",
    "mqt": "as many queries", "videoccam": "as many queries", "dynamicvlm": "whole grids",
    "llavamini": "a preset", "llavamini_compress": "a square of queries",
    "llavamini_fuse": "nothing leaves",
    "dpn": "a router decides", "deepstack": "nothing leaves", "slowfast": "nothing leaves",
    "tcllava": "nothing leaves", "lookingtolearn": "nothing leaves", "croc": "nothing leaves",
    **dict.fromkeys(ON_CACHE, "slots of the cache"), **dict.fromkeys(EXPERTS, "experts"),
}  # fmt: skip
#: Averages below the layers that see everything.
UNREACHABLE = {
    ("fastv", 160), ("randomllm", 160), ("dart", 160), ("topv", 160),
    *(("vscan_llm", average) for average in (192, 128, 64, 640, 320, 160)),
    ("pyramiddrop", 128), ("pyramiddrop", 64), ("pyramiddrop", 640), ("pyramiddrop", 320),
    ("pyramiddrop", 160), ("feather", 128), ("feather", 64), ("feather", 640), ("feather", 320),
    ("feather", 160), ("btp", 160),
}  # fmt: skip
#: What the papers, or their code, keep at these cuts.
FASTV = {192: 166, 128: 98, 64: 30, 640: 491, 320: 149}


def test_every_method_has_a_kind_of_budget():
    kinds = [EXACT, CUT, SHAPED, OTHERS]
    assert sorted(name for kind in kinds for name in kind) == sorted(METHODS)


@pytest.mark.parametrize("tokens, budget", PUBLISHED)
def test_published_budgets(tokens, budget):
    """Per layer, or on average over the layers, at 192/128/64 of 576 and 640/320/160 of 2,880."""
    for name in EXACT:
        stage = get_method(name)(keep=budget)
        assert entering(stage, tokens) == [budget] * DEPTH, name
        assert entering(stage.replace(keep=budget / tokens), tokens) == [budget] * DEPTH, name
    for name in [*CUT, *SHAPED]:
        stage = get_method(name)().at_depth(DEPTH)
        try:
            if name in CUT:
                assert stage.layer == CUT[name]
                stage = stage.replace(keep=keep_for_average(budget, tokens, CUT[name], DEPTH))
            else:
                stage = stage.for_average(budget, tokens, DEPTH)
        except PlanError as error:
            assert error.argument == "tokens_avg" and (name, budget) in UNREACHABLE, name
            continue
        assert (name, budget) not in UNREACHABLE, name
        seen = entering(stage, tokens)
        assert sum(seen) / DEPTH == pytest.approx(budget, abs=1), name
        assert seen == sorted(seen, reverse=True) and seen[0] == tokens
        if name == "fastv":
            assert seen == [tokens] * 2 + [FASTV[budget]] * 30


#: Spec, tokens: what enters the layers, and its published average.
SCHEDULES = [
    ("pyramiddrop", 576, [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8, 270),
    ("vscan:keep=192", 576, [288] * 16 + [96] * 16, 192),
    ("vscan:keep=128", 576, [192] * 16 + [64] * 16, 128),
    ("vscan:keep=64", 576, [96] * 16 + [32] * 16, 64),
    ("vscan:keep=640", 2880, [960] * 16 + [320] * 16, 640),
    ("vscan:keep=320", 2880, [480] * 16 + [160] * 16, 320),
    ("vscan:keep=160", 2880, [240] * 16 + [80] * 16, 160),
    ("btp", 576, [576] * 3 + [288] * 3 + [144] * 8 + [48] * 8 + [0] * 10, 129),
    ("vtw", 576, [576] * 16 + [0] * 16, 288),
    ("dart:keep=192", 576, [576] * 2 + [192] * 30, 216),
    ("dart:keep=320", 2880, [2880] * 2 + [320] * 30, 480),
    ("fastv:keep=0.5", 576, [576] * 2 + [288] * 30, 306),
    (
        "fitprune", 576,
        [576, 562, 529, 440, 404, 368, 348, 293, 272, 254, 250, 243, 238] + [236] * 19, 289.4,
    ),
]  # fmt: skip


@pytest.mark.parametrize("spec, tokens, seen, average", SCHEDULES)
def test_published_schedules(spec, tokens, seen, average):
    assert entering(spec, tokens) == seen
    assert sum(seen) / DEPTH == pytest.approx(average, abs=0.1)


@pytest.mark.parametrize("spec", [spec for spec, tokens, *_ in SCHEDULES if tokens == 576])
@torch.no_grad()
def test_the_engine_leaves_what_the_plan_says(spec):
    """576 tokens through 32 narrow layers."""
    model = tiny.llava(layers=DEPTH, side=24, hidden=16)
    with mllm.patch(model, spec) as patched:
        model(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        seen = [row["visual"][0] for row in patched.ledger.as_dict()["layers"]]
    assert seen == entering(spec, 576)


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@torch.no_grad()
def test_an_average_counts_clusters(version):
    model = tiny.llava(layers=DEPTH, side=24, hidden=16)
    stage = get_method("sparsevlm")(version=version).for_average(192, 576, DEPTH)
    with mllm.patch(model, stage) as patched:
        model(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        assert patched.ledger.as_dict()["visual_avg"][0] == pytest.approx(192, abs=1)


#: Cells of the largest grids within the budgets: 13 x 14, 11 x 11, 8 x 8, and pyramids of grids.
POOLED = {
    ("avgpool", 192): 182, ("avgpool", 128): 121, ("avgpool", 64): 64, ("pyramid", 192): 190,
    ("pyramid", 128): 124, ("pyramid", 64): 59, ("ggem", 192): 182, ("ggem", 64): 64,
    ("downsample", 128): 121,
}  # fmt: skip


@pytest.mark.parametrize("name, budget", POOLED)
@torch.no_grad()
def test_pooled_budgets(name, budget):
    model = tiny.llava(layers=1, side=24, hidden=16)
    with mllm.patch(model, get_method(name)(keep=budget)) as patched:
        model(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        assert patched.ledger.as_dict()["kept_llm"] == [POOLED[name, budget]]


def test_kinds_of_stage():
    """The lists above agree with what the methods are."""
    assert all(issubclass(get_method(n), TokenReducer | TowerReducer) for n in EXACT)
    assert all(issubclass(get_method(n), LayerPruner) for n in CUT)
    assert all(issubclass(get_method(n), LayerSchedule) for n in SHAPED)
