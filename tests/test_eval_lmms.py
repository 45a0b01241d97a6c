"""The lmms-eval model: batches, options, scoring, accounting."""

import dataclasses
import json

import pytest
import torch
from eval_tiny import TOKENS
from PIL import Image

pytest.importorskip("lmms_eval")

import mllm  # noqa: E402
from mllm.errors import DataError, MllmError, PlanError  # noqa: E402
from mllm.eval.answer import answer, costs_of, unpatched_costs  # noqa: E402
from mllm.eval.lmms import MllmModel  # noqa: E402
from mllm.eval.plans import make_plan, patched_with  # noqa: E402
from mllm.loading import build_inputs  # noqa: E402
from mllm.yardstick import samples  # noqa: E402

PLANS = [
    "none",
    "random:keep=9",
    "downsample:keep=16",
    "visionzip:keep=8",
    "divprune:keep=8:positions=original",
    "fastv:layer=1:keep=10",
    "visionzip:keep=20+fastv:layer=2:keep=6",
]
OPTIONS = {"max_new_tokens": 6, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def docs():
    """Questions of several lengths, on one picture, on two, and on none."""
    drawn = samples("color", n=3) + samples("ocr_word", n=2)
    found = [{"images": [d["image"]], "text": d["question"]} for d in drawn]
    found.append({"images": [drawn[0]["image"], drawn[3]["image"]], "text": "what is written?"})
    found.append({"images": [], "text": "how many cat objects are there?"})
    found.append({"images": [drawn[1]["image"].resize((90, 200))], "text": "is there a dog?"})
    return found


def _messages(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["text"]}]}]


def _model(loaded, docs, plan="none", batch_size=1, **options):
    model = MllmModel("tiny", plan, batch_size=batch_size, loaded=loaded, **options)
    model.task_dict = {"task": {"test": docs}}
    return model


def _instance(kind, *arguments):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "task", "doc_id": arguments[3], "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def _ask(model, docs, options=OPTIONS):
    asked = [
        _instance("generate_until", doc["text"], _messages, dict(options), i, "task", "test")
        for i, doc in enumerate(docs)
    ]
    try:
        return model.generate_until(asked)
    finally:
        if model.patched:
            model.patched.remove()


def _score(model, pairs):
    asked = [
        _instance("loglikelihood", text, target, lambda doc: doc["images"], i, "task", "test")
        for i, text, target in pairs
    ]
    try:
        return model.loglikelihood(asked)
    finally:
        if model.patched:
            model.patched.remove()


@pytest.mark.parametrize("plan", PLANS)
def test_batches_answer_like_single_requests(loaded, docs, plan):
    alone = _ask(_model(loaded, docs, plan), docs)
    together = _ask(_model(loaded, docs, plan, batch_size=5), docs)
    assert [r.text for r in together] == [r.text for r in alone]
    assert len({r.text for r in alone}) > 2
    for one, many in zip(alone, together, strict=True):
        a, b = one.token_counts.to_dict(), many.token_counts.to_dict()
        assert a["input_tokens"] == b["input_tokens"]
        assert a["output_tokens"] == b["output_tokens"]
        same = ("kept_llm", "visual_in", "visual_avg", "kv_bytes")
        assert {k: a["mllm"][k] for k in same} == {k: b["mllm"][k] for k in same}
        # A batch also scores the padding of its shorter prompts.
        assert a["mllm"]["prefill_flops"] == pytest.approx(b["mllm"]["prefill_flops"], rel=2e-3)
        assert a["mllm"]["batch"] == 1 and a["mllm"]["ttft_s"] > 0
        assert (b["mllm"]["ttft_s"] is None) == (b["mllm"]["batch"] > 1)


def test_the_plan_shows_in_the_counts(loaded, docs):
    plain = [r.token_counts.mllm for r in _ask(_model(loaded, docs), docs)]
    cut = [r.token_counts.mllm for r in _ask(_model(loaded, docs, "visionzip:keep=8"), docs)]
    images = [len(doc["images"]) for doc in docs]
    assert [c["visual_in"] for c in plain] == [TOKENS * n for n in images]
    assert [c["kept_llm"] for c in plain] == [TOKENS * n for n in images]
    assert [c["visual_in"] for c in cut] == [TOKENS * n for n in images]
    assert [c["kept_llm"] for c in cut] == [8 * n for n in images]
    for before, after, n in zip(plain, cut, images, strict=True):
        assert (after["prefill_flops"] < before["prefill_flops"]) == (n > 0)
        assert (after["kv_bytes"] < before["kv_bytes"]) == (n > 0)
    fields = {"kept_llm", "visual_in", "visual_avg", "prefill_flops", "kv_bytes"}
    assert set(cut[0]) == fields | {"ttft_s", "decode_s", "batch"}


def test_unpatched_costs_are_the_ledgers_baseline(loaded):
    model, processor = loaded
    image = Image.new("RGB", (112, 112), "red")
    inputs = build_inputs(processor, [([image], "what is written?"), ([image], "color?")])
    with mllm.patch(model, "random:keep=4") as patched:
        model.generate(**inputs, max_new_tokens=1)
        record = patched.ledger.as_dict()
        assert [c["kept_llm"] for c in costs_of(patched, 2)] == [4, 4]
    plain = unpatched_costs(model, inputs)
    assert [c["prefill_flops"] for c in plain] == pytest.approx(record["baseline_prefill_flops"])
    padding = inputs["attention_mask"].numel() - int(inputs["attention_mask"].sum())
    per_token = plain[0]["kv_bytes"] / int(inputs["attention_mask"][0].sum())
    kv_bytes = sum(c["kv_bytes"] for c in plain) + padding * per_token
    assert kv_bytes == record["baseline_kv_bytes"]


def test_stop_strings_and_length_are_respected(loaded, docs):
    free = _ask(_model(loaded, docs), docs[:2], {"max_new_tokens": 8})
    stop = free[0].text[3]
    cut = _ask(_model(loaded, docs), docs[:2], {"max_new_tokens": 8, "until": [stop, "never"]})
    assert cut[0].text == free[0].text[: free[0].text.index(stop)].strip()
    assert cut[0].token_counts.output_tokens <= free[0].token_counts.output_tokens
    short = _ask(_model(loaded, docs, batch_size=2), docs[:2], {"max_new_tokens": 2})
    assert all(r.token_counts.output_tokens <= 2 for r in short)


def test_padding_of_a_batch_is_no_generated_token(loaded, docs):
    """A row that a stop string ends is padded while the others go on."""
    free = _ask(_model(loaded, docs), docs[:4], {"max_new_tokens": 8})
    options = {"max_new_tokens": 8, "until": [free[0].text[1]]}
    alone, together = (_ask(_model(loaded, docs, batch_size=n), docs[:4], options) for n in (1, 4))
    counts = [[r.token_counts.output_tokens for r in found] for found in (alone, together)]
    assert counts[0] == counts[1] and min(counts[0]) < max(counts[0])


def test_what_is_drawn_does_not_depend_on_a_cache(loaded, docs, tmp_path):
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.0}
    plain, again, cached = (
        [r.text for r in _ask(_model(loaded, docs, cache=cache), docs[:3], options)]
        for cache in (None, None, str(tmp_path))
    )
    assert plain == again == cached
    assert plain != [r.text for r in _ask(_model(loaded, docs), docs[:3])]


def test_a_temperature_samples_whatever_the_task_says_beside_it(loaded, docs):
    """As in lmms-eval's own models; by hand that is a contradiction."""
    options = {"max_new_tokens": 6, "temperature": 1.0}
    drawn, beside = (
        [r.text for r in _ask(_model(loaded, docs), docs[:3], options | more)]
        for more in ({}, {"do_sample": False})
    )
    assert drawn == beside != [r.text for r in _ask(_model(loaded, docs), docs[:3])]
    inputs = build_inputs(loaded[1], [(docs[0]["images"], docs[0]["text"])])
    with pytest.raises(DataError, match="temperature=1.0 is of sampling") as caught:
        answer(*loaded, inputs, None, **options, do_sample=False)
    assert caught.value.argument == "temperature"
    greedy = [answer(*loaded, inputs, None, max_new_tokens=2, **more)[0].text
              for more in ({}, {"do_sample": False, "temperature": 0.0})]  # fmt: skip
    assert greedy[0] == greedy[1]


def test_requests_with_other_options_do_not_share_a_batch(loaded, docs):
    model = _model(loaded, docs, batch_size=8)
    asked = [
        _instance("generate_until", "", _messages, {"max_new_tokens": 1 + i % 2}, i, "task", "test")
        for i in range(5)
    ]
    lengths = [r.token_counts.output_tokens for r in model.generate_until(asked)]
    assert lengths == [1, 2, 1, 2, 1]


def test_loglikelihood_is_teacher_forcing(loaded, docs):
    model, processor = loaded
    pairs = [(0, docs[0]["text"], " red"), (3, docs[3]["text"], " A4"), (6, docs[6]["text"], " no")]
    found = _score(_model(loaded, docs), pairs)
    for (index, text, target), (total, _) in zip(pairs, found, strict=True):
        inputs = build_inputs(processor, [(docs[index]["images"], text)])
        ids = torch.tensor([processor.tokenizer(target, add_special_tokens=False)["input_ids"]])
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}).logits
        logs = logits[0, prompt - 1 : -1].float().log_softmax(-1)
        assert total == pytest.approx(float(logs.gather(1, ids.T).sum()), abs=1e-4)


def test_a_models_own_penalty_is_not_scored(loaded, docs, monkeypatch):
    """Qwen2.5-VL, for one, comes with a penalty on repeated tokens for generation."""
    pairs = [(0, docs[0]["text"], " red"), (3, docs[3]["text"], " what what")]
    plain = _score(_model(loaded, docs), pairs)
    monkeypatch.setattr(loaded[0].generation_config, "repetition_penalty", 1.5)
    assert _score(_model(loaded, docs), pairs) == plain


@pytest.mark.parametrize("plan", ["none", "visionzip:keep=8", "fastv:layer=1:keep=10"])
def test_loglikelihood_in_batches_and_greedy(loaded, docs, plan):
    pairs = [(i, docs[i]["text"], target) for i in (0, 3, 5, 6) for target in (" red", " top left")]
    alone = _score(_model(loaded, docs, plan), pairs)
    together = _score(_model(loaded, docs, plan, batch_size=3), pairs)
    assert [a for a, _ in together] == pytest.approx([a for a, _ in alone], abs=1e-4)
    assert [g for _, g in together] == [g for _, g in alone]


@pytest.mark.parametrize("plan", ["none", "fastv:layer=1:keep=10"])
def test_loglikelihood_knows_the_greedy_answer(loaded, docs, plan):
    (model, processor), pairs = loaded, []
    with patched_with(model, make_plan(plan)):
        for i, doc in enumerate(docs):
            inputs = build_inputs(processor, [(doc["images"], doc["text"])])
            ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
            text = processor.tokenizer.decode(ids)
            if processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
                pairs.append((i, doc["text"], text))
    assert pairs  # others are bytes that do not survive decoding
    assert all(greedy for _, greedy in _score(_model(loaded, docs, plan), pairs))


def test_multi_round_says_what_works(loaded, docs):
    model = _model(loaded, docs)
    asked = _instance("generate_until_multi_round", "", _messages, {}, 0, "task", "test")
    with pytest.raises(MllmError, match="multi-round"):
        model.generate_until_multi_round([asked])


def test_bad_arguments(loaded, docs, tmp_path):
    with pytest.raises(MllmError, match="batch_size"):
        _model(loaded, docs, batch_size="auto")
    with pytest.raises(MllmError, match="pretrained"):
        MllmModel(pretraind="x", loaded=loaded)
    with pytest.raises(PlanError, match="visionzip"):
        _model(loaded, docs, "visionzp:keep=8")
    with pytest.raises(DataError, match="missing"):
        MllmModel(pretrained=str(tmp_path / "missing"))
    video = [{"images": [], "text": ""}]
    model = _model(loaded, video)
    with pytest.raises(DataError, match="video"):
        model.generate_until(
            [
                _instance(
                    "generate_until",
                    "",
                    lambda doc: [{"role": "user", "content": [{"type": "video", "url": "x"}]}],
                    {},
                    0,
                    "task",
                    "test",
                )
            ]
        )


def test_clean_takes_the_plan_out(loaded, docs):
    model = _model(loaded, docs, "visionzip:keep=8")
    model.clean()
    assert not hasattr(model, "model")
    with mllm.patch(loaded[0], "random:keep=4"):  # a second plan would be refused
        pass


def test_the_entry_point_names_the_class():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from mllm.eval.registry import manifests

    registry = ModelRegistryV2()
    for manifest in manifests():
        registry.register_manifest(manifest)
    assert registry.get_model_class("mllm") is MllmModel


def test_counts_survive_json(loaded, docs):
    counts = _ask(_model(loaded, docs), docs[:1])[0].token_counts
    assert json.loads(json.dumps(counts.to_dict()))["mllm"] == counts.mllm
    assert dataclasses.is_dataclass(counts)
