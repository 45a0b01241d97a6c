"""What `mllm doctor` says is what `mllm.patch` does, and docs/models.md is what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path

import families
import invariants
import pytest
import tiny
import torch
import transformers
from matrix import anatomy
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig
from typer.testing import CliRunner

import mllm
from mllm import actions, compat, examine, signals
from mllm.cli import app
from mllm.compressors import base
from mllm.doctor import skeleton
from mllm.errors import DataError, PlanError
from mllm.models import families as known
from mllm.plan import get_method

ROOT = Path(__file__).parents[1]
FAMILIES = [kind for kind in known() if kind != "mllm_llava"]  # that is in test_towers.py


@functools.cache
def said(family):
    """The report on a family's tiny model; it takes a second or two."""
    return mllm.doctor(families.model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verdicts_are_those_of_patch(family):
    net = families.model(family)
    before = anatomy(net)
    report = mllm.doctor(net)
    assert anatomy(net) == before, "nothing is left behind"
    assert report.family == family and report.model == type(net).__name__ and report.tested
    assert [check.name for check in report.methods] == [row["name"] for row in mllm.methods()]
    for check in report.methods:
        method = get_method(check.name)
        if check.verdict == "yes":
            mllm.patch(net, [method()]).remove()
            assert not check.reason
            continue
        with pytest.raises(PlanError) as caught:
            mllm.patch(net, [method()])
        assert str(caught.value) in check.reason
        if check.verdict == "adjust":
            mllm.patch(net, [method(**method.identity)]).remove()
        elif method.identity is not None:
            with pytest.raises(PlanError):
                mllm.patch(net, [method(**method.identity)])


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, x in enumerate(FAMILIES)],
)
@torch.no_grad()
def test_what_it_promises_runs(family):
    net = families.model(family)
    inputs = families.collate(family, families.samples(family, "alone"))
    for check in said(family).methods:
        if check.verdict != "no":
            method = get_method(check.name)
            stage = method(**method.identity) if check.verdict == "adjust" else method()
            with mllm.patch(net, [stage]) as patched:
                net(**inputs)
                notes = patched.ledger.notes
            assert set(check.notes) <= set(notes)


def test_every_signal_and_action_is_tried():
    """A new one in the base module has to be added to the doctor."""
    for module, tried in (
        (signals, {type(signal).__name__ for _, signal in examine.SIGNALS}),
        (actions, set(examine.ACTIONS)),
    ):
        public = {name for name in vars(module) if name in base.__all__}
        assert tried == {n for n in public if dataclasses.is_dataclass(getattr(module, n))}


def test_backends_are_tried_without_being_used():
    net = families.model("llava")
    report = mllm.doctor(net)
    by_name = {check.name: check for check in report.methods}
    assert report.backends == {"decoder": "sdpa", "tower": "sdpa"}
    assert by_name["fastv"].backends["eager"] == ""
    assert "never validated" in by_name["fastv"].backends["flash_attention_2"]
    assert by_name["divprune"].backends["flash_attention_2"] == "", "it reads no attention"
    net.set_attn_implementation("flex_attention")
    report = mllm.doctor(net)
    by_name = {check.name: check for check in report.methods}
    assert by_name["fastv"].verdict == "no" and "flex_attention" in by_name["fastv"].reason
    assert by_name["divprune"].verdict == "yes"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_class_token_is_read_where_there_is_none(family):
    signals = {check.name: check for check in said(family).signals}
    check = signals["VisionAttention(query='cls')"]
    has = family in ("llava", "vipllava", "llava_next", "internvl")
    assert check.verdict == ("yes" if has else "no")
    assert has or "[CLS]" in check.reason and "received" in check.reason
    assert signals["VisionAttention(query='received')"].verdict == "yes"


@pytest.mark.parametrize("family", FAMILIES)
def test_ways_are_refused_as_when_they_are_taken(family):
    net = families.model(family)
    ways = {check.name: check for check in said(family).ways}
    inputs = families.collate(family, families.samples(family, "alone"))
    with mllm.patch(net, "stride:keep=4"):
        with pytest.raises(PlanError) as caught:
            net.generate(**inputs, cache_implementation="static", max_new_tokens=1)
        way = ways["static cache"]
        assert way.verdict == "no" and str(caught.value) in way.reason
        way = ways["prefill in chunks"]
        assert way.verdict == ("no" if "gemma" in family else "yes")
        if way.verdict == "no":
            with pytest.raises(PlanError) as caught:
                net.generate(**inputs, prefill_chunk_size=8, max_new_tokens=1)
            assert str(caught.value) in way.reason
        else:
            net.generate(**inputs, prefill_chunk_size=8, max_new_tokens=1)
        with pytest.raises(PlanError) as caught:
            net.generate_batch([[1, 2]])
        assert str(caught.value) in ways["continuous batching"].reason
    video = f"{family}_video" in invariants.FAMILIES
    assert ways["videos"].verdict == ("yes" if video else "no")
    assert ways["generate"].verdict == ways["images"].verdict == "yes"
    assert ways["compact positions"].verdict == ("no" if families.KITS[family].mrope else "yes")


def test_the_report_reads_well():
    report = said("qwen3_vl")
    text = str(report)
    assert "Qwen3VLForConditionalGeneration (qwen3_vl), transformers" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    for check in (*report.methods, *report.signals, *report.actions, *report.ways):
        assert check.name in text and (check.verdict == "yes" or check.reason)
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert {"model", "family", "backends", "transformers", "methods", "facts"} <= set(data)
    assert data["facts"]["first_cut"] == 2


@pytest.mark.parametrize("kind", ["llava_next_video", "qwen2_5_omni", "llama"])
def test_an_unsupported_family_names_the_nearest(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(PlanError) as caught:
        skeleton(tmp_path)
    nearest = {"llava_next_video": "llava_next", "qwen2_5_omni": "qwen2_5_vl"}.get(kind, "llava")
    assert f"the nearest family is {nearest}" in str(caught.value)
    assert caught.value.argument == "model" and nearest in caught.value.expected


@pytest.mark.parametrize(
    "kind, why",
    [("mllama", "cross-attention"), ("idefics", "cross-attention"), ("florence2", "encoder")],
)
def test_an_architecture_without_visual_tokens_says_so(kind, why, tmp_path, cli):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=f"not a supported .*: .*{why}") as caught:
        skeleton(tmp_path)
    assert all(family in caught.value.expected for family in known())
    result = cli.invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2 and why in " ".join(result.output.split())


@torch.no_grad()
def test_a_model_that_crosses_is_refused_before_anything_changes():
    text = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, cross_attention_layers=[1], pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        net = transformers.MllamaForConditionalGeneration(
            transformers.MllamaConfig(text_config=text)
        )
    before = anatomy(net)
    with pytest.raises(PlanError, match="no visual tokens in the sequence"):
        mllm.patch(net, "fastv:layer=1:keep=0.5")
    assert anatomy(net) == before


def test_an_unsupported_class_names_the_nearest_family():
    with pytest.raises(PlanError, match="nearest family is llava"):
        mllm.doctor(tiny.llava(layers=1).model.language_model)
    with pytest.raises(PlanError, match="Linear is not a supported"):
        mllm.doctor(torch.nn.Linear(2, 2))


def test_a_patched_model_is_not_examined():
    net = families.model("llava")
    with mllm.patch(net, "stride:keep=4"), pytest.raises(PlanError, match="already patched"):
        mllm.doctor(net)


@pytest.fixture
def cli():
    return CliRunner()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_enough(family, tmp_path, cli):
    net = families.KITS[family].build()
    net.config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    result = cli.invoke(app, ["doctor", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    payload = json.loads(result.stdout)
    assert (payload["schema"], payload["command"], payload["ok"]) == (1, "doctor", True)
    assert payload["data"] == said(family).as_dict()


def test_the_embedded_model_by_name(cli):
    assert all(p.is_meta for p in skeleton("tiny-llava").parameters())
    result = cli.invoke(app, ["doctor", "tiny-llava"])
    assert result.exit_code == 0, result.output
    assert "fastv" in result.stdout and "LlavaForConditionalGeneration" in result.stdout


@pytest.mark.parametrize("broken", ["nothing", "no json", "no type"])
def test_bad_folders(broken, tmp_path, cli):
    folder = tmp_path / "there"
    if broken != "nothing":
        folder.mkdir()
        (folder / "config.json").write_text("{}" if broken == "no type" else "{")
    with pytest.raises(DataError, match="cannot read the configuration"):
        skeleton(folder)
    result = cli.invoke(app, ["doctor", str(folder), "--json"])
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "DataError" and error["argument"] == "model" and error["expected"]


def test_a_text_model_is_bad_input(tmp_path, cli):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    result = cli.invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert "not a supported vision-language model" in result.stderr


@pytest.mark.skipif(
    not transformers.__version__.startswith(f"{compat.TESTED[1]}."),
    reason="made with the newest tested transformers",
)
@pytest.mark.slow
def test_the_document_is_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "make_models_doc.py"))
    assert script["document"]() == script["TARGET"].read_text(), (
        "run make docs"
    )


def test_default_configurations_build_without_weights():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_vl"))
    assert all(p.is_meta for p in model.parameters())
