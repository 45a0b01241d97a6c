"""Methods on the KV cache in sweeps: budgets as shares, and answers read after compression."""

from __future__ import annotations

import pytest
import torch

import mllm
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import asking, cells, sweep, sweep_file, table
from mllm.eval.answer import PROTOCOLS, answer
from mllm.eval.asking import Questions
from mllm.eval.plans import budgets_slots, make_plan, on_cache, patched_with, plan_for_share
from mllm.plan import get_method
from mllm.yardstick import samples

METHODS = ("snapkv:window=8", "lookm")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 2)


def _run(loaded, path, methods=METHODS, tasks=("color",), grid=None, **options):
    entries, _ = sweep.grid(loaded[0], methods, [8], **{"kv_budgets": [0.25], **(grid or {})})
    return list(sweep.run(*loaded, entries, tasks, path, **{"n": 4, "timings": 0} | options))


def test_the_grid_of_cache_methods_is_their_own(loaded):
    entries, skipped = sweep.grid(
        loaded[0], METHODS, [8], kv_budgets=[0.1, 0.5], seeds_of={"randomkv": [0, 1]}
    )
    assert not skipped and [(e.method, e.budget, e.plan.seed) for e in entries] == [
        ("unpatched", None, 0),
        ("randomkv", 0.5, 0),
        ("randomkv", 0.5, 1),
        ("randomkv", 0.1, 0),
        ("randomkv", 0.1, 1),
        ("streamingllm", 0.5, 0),
        ("streamingllm", 0.1, 0),
        *((method, share, 0) for method in METHODS for share in (0.5, 0.1)),
    ]
    assert all(e.plan.stages[0].budget == e.budget for e in entries[1:])
    assert entries[-3].plan.stages[0].window == 8, "the rest of the template stays"


def test_both_kinds_of_methods_have_their_sanity_rows(loaded):
    entries, _ = sweep.grid(loaded[0], ["snapkv", "divprune"], [8], kv_budgets=[0.25])
    names = [e.method for e in entries]
    assert {"random", "downsample", "randomkv", "streamingllm"} <= set(names)
    assert {e.budget for e in entries} == {None, 8, 0.25}
    both, _ = sweep.grid(loaded[0], ["divprune"], [8])
    assert not {"randomkv", "snapkv"} & {e.method for e in both}


def test_a_share_sets_every_budget_and_no_other_field():
    assert plan_for_share("snapkv:window=4+h2o", 0.25).spec == (
        "snapkv:budget=0.25:window=4+h2o:budget=0.25"
    )
    assert plan_for_share("snapkv", 1).stages[0].budget == 1.0
    assert isinstance(plan_for_share("snapkv", 1).stages[0].budget, float)
    assert on_cache("snapkv+h2o") and not on_cache("fastv+snapkv")


def test_cells_have_their_protocol_and_are_compared_with_random_eviction(loaded, tmp_path):
    path = tmp_path / "kv.jsonl"
    found = _run(loaded, path, protocol="again")
    assert {cell["protocol"] for cell in found} == {"again"}
    for cell in found:
        compared = cell["method"] not in ("unpatched", "randomkv")
        assert (cell["vs_random"] is not None) == compared and cell["vs_downsample"] is None
    whole, kept = (next(c for c in found if c["method"] == m) for m in ("unpatched", METHODS[0]))
    assert 0.2 < kept["kv_bytes"] / whole["kv_bytes"] < 0.33, "really stored"
    assert kept["flops"] > whole["flops"], "the question is read twice"
    built = table.build(found)
    row = next(row for row in built["rows"] if row["method"] == METHODS[0])
    assert row["vs_random"] and row["vs_unpatched"] and not row["vs_downsample"]
    assert "downsample" not in row["verdict"] and "missing" not in row["verdict"]
    text = table.markdown(built)
    assert "At 0.25 of the slots" in text and "Protocol again" in text
    # Another protocol's cells are others, and the same ones are not run again.
    assert _run(loaded, path, protocol="again") == found
    more = _run(loaded, path, protocol="prompt")
    assert len(cells.read(path).rows) == len(found) + len(more)


@pytest.mark.parametrize(("method", "said"), [("fastv", "KV cache"), ("shadowkv", "everything")])
def test_a_protocol_that_a_method_cannot_have_is_refused_before_anything_runs(method, said):
    with pytest.raises(PlanError, match=said) as refused:
        sweep_file.SweepFile(model="tiny-llava", methods=("h2o", method), protocol="again")
    assert refused.value.argument == "protocol"


def test_cells_of_two_protocols_are_no_table(loaded, tmp_path):
    path = tmp_path / "kv.jsonl"
    both = _run(loaded, path, protocol="again") + _run(loaded, path)
    with pytest.raises(DataError, match="protocol again"):
        table.build(both)


# Protocols


def _batches(loaded, protocol, n=6, task="find_image"):
    model, processor = loaded
    drawn = samples(task, n=n)
    return Questions(processor, drawn, 3, model.dtype, model.device, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_dropped_is_the_unpatched_answer(loaded, protocol):
    """Under any protocol; the batches are such that nothing has to be padded."""
    questions = _batches(loaded, protocol)
    if protocol != "prompt":
        assert all(bool(batch["attention_mask"].all()) for batch in questions.batches)
    assert sorted(i for batch in questions.indices for i in batch) == list(range(6))
    want = asking.answer_all(*loaded, questions, None)
    with patched_with(loaded[0], make_plan("snapkv:budget=1.0")) as patched:
        found = asking.answer_all(*loaded, questions, patched)
    assert [x.text for x in found] == [x.text for x in want]


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["again", "context"])
def test_the_first_token_is_read_after_compression(loaded, protocol, monkeypatch):
    """By hand: what is stored of the picture, then the question. A prefill would see everything."""
    model, processor = loaded
    questions = _batches(loaded, protocol, n=1, task="color")
    inputs = questions.batches[0]
    ids, spec = inputs["input_ids"], "snapkv:budget=0.2:window=4"
    split = int((ids == model.config.image_token_id).nonzero()[-1, 1]) + 1
    with mllm.patch(model, spec) as patched:
        if protocol == "again":
            cache = model(**inputs).past_key_values
            kv = patched.kv(cache)
            kept = [v.logical[v.valid] for v in map(kv.view, range(kv.depth))]
            assert all((x >= split).any() and len(x) < ids.shape[1] * 2 for x in kept)
            kv.evict(drop=torch.arange(split, ids.shape[1])[None])
            kv.crop(split)
        else:
            first = dict(inputs) | {
                "input_ids": ids[:, :split], "attention_mask": inputs["attention_mask"][:, :split]
            }  # fmt: skip
            cache = model(**first).past_key_values
        kept = [patched.kv(cache).view(i).valid.sum(-1).max().item() for i in range(4)]
        assert max(kept) <= 0.25 * ids.shape[1]
        want = model(input_ids=ids[:, split:], past_key_values=cache).logits[:, -1]
        seen = []
        generate = type(model).generate

        def watched(self, *args, **options):
            out = generate(self, *args, **options, output_logits=True, return_dict_in_generate=True)
            seen.append(out.logits[0])
            return out.sequences

        monkeypatch.setattr(type(model), "generate", watched)
    with mllm.patch(model, spec) as patched:
        answer(model, processor, inputs, patched, max_new_tokens=1, protocol=protocol)
        answer(model, processor, inputs, patched, max_new_tokens=1)
    assert torch.allclose(seen[0], want.float(), atol=1e-4)
    assert not torch.allclose(seen[1], want.float(), atol=1e-2), "a prefill sees everything"


def test_what_a_protocol_cannot_do_is_refused(loaded):
    model, processor = loaded
    mixed = _batches(loaded, "prompt", n=4).batches[0]
    with mllm.patch(model, "snapkv:budget=0.5") as patched:
        with pytest.raises(DataError, match="behind the last picture"):
            answer(model, processor, mixed, patched, max_new_tokens=1, protocol="again")
    one = _batches(loaded, "again", n=1).batches[0]
    with mllm.patch(model, "shadowkv") as patched:
        with pytest.raises(PlanError, match="shadowkv then attends to everything"):
            answer(model, processor, one, patched, max_new_tokens=1, protocol="again")
    with mllm.patch(model, "divprune:keep=4") as patched:
        with pytest.raises(PlanError, match="divprune works before"):
            answer(model, processor, one, patched, max_new_tokens=1, protocol="context")


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"protocol": "later"}, "prompt"),
        ({"protocol": "again"}, "works before it"),
        ({"methods": ["snapkv:budget=0.5"]}, "sets budget from the kv_budgets"),
        ({"kv_budgets": [0.5, 1.5]}, "fraction"),
        ({"kv_budgets": [2]}, "fraction"),
        ({"seeds_of": {"snapkv": [1]}}, "randomkv"),
    ],
)
def test_bad_keys_are_named(keys, part):
    with pytest.raises(MllmError, match=part):
        sweep_file.combine({}, keys)


def test_the_committed_sweep_has_every_method_with_a_budget():
    chosen = sweep_file.combine(sweep_file.read("benchmarks/sweeps/kv.yaml"), {})
    named = {text.split(":")[0] for text in chosen.methods} | set(sweep.KV_SANITY)
    registered = {
        row["name"]
        for row in mllm.methods()
        if row["stage"] == "cache" and budgets_slots(get_method(row["name"])())
    }
    assert named >= registered and chosen.protocol == "again"
