"""The ledger says what happened: counts, bytes and turns against what hooks and caches show."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from matrix import CASES, FEW, LAYERS, SIDE, covering, fresh, watch

import mllm

FIELDS = {
    "schema",
    "phase",
    "decode_steps",
    "batch",
    "prompt_tokens",
    "visual_tokens",
    "images",
    "kept_llm",
    "layers",
    "visual_avg",
    "prefill_flops",
    "baseline_prefill_flops",
    "vision_flops",
    "selection_flops",
    "kv_bytes",
    "kv_meta_bytes",
    "baseline_kv_bytes",
    "notes",
}
PER_SAMPLE = {
    "prompt_tokens",
    "visual_tokens",
    "images",
    "kept_llm",
    "visual_avg",
    "prefill_flops",
    "baseline_prefill_flops",
    "vision_flops",
    "selection_flops",
}
few = pytest.mark.parametrize("spec", FEW)


def stored(cache) -> int:
    return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@covering(spec=list(CASES))
@torch.no_grad()
def test_counts_are_the_true_lengths(spec, attn):
    """With one sample nothing is padded: every layer sees exactly what the ledger says."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh(attn)
    plain_cache = model(**inputs, use_cache=True).past_key_values
    rows = watch(model)
    with mllm.patch(model, spec) as patched:
        out = model(**inputs, use_cache=True)
        ledger, data = patched.ledger, patched.ledger.as_dict()
    lengths = [rows[i][-1] for i in range(LAYERS)]
    assert [row["tokens"] for row in data["layers"]] == [[n] for n in lengths]
    assert [ledger.tokens(i) for i in range(LAYERS)] == [[n] for n in lengths]
    assert [x.keys.shape[2] for x in out.past_key_values.layers] == lengths
    assert lengths[-1] < inputs["input_ids"].shape[1], "the plan has an effect"
    text = inputs["input_ids"].shape[1] - 16
    assert [row["visual"] for row in data["layers"]] == [[n - text] for n in lengths]
    assert [len(ledger.kept(i)[0]) for i in range(LAYERS)] == [n - text for n in lengths]
    assert data["visual_avg"] == [pytest.approx(sum(lengths) / LAYERS - text)]
    assert data["kept_llm"] == [lengths[0] - text]
    assert data["kv_bytes"] == stored(out.past_key_values)
    assert data["baseline_kv_bytes"] == stored(plain_cache)
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", CASES)
@torch.no_grad()
def test_batches(spec, side):
    """Padding is in no count; the rectangle is as wide as its longest sample needs."""
    batch = tiny.samples(side=SIDE)
    inputs = tiny.collate(batch, side)
    model = fresh()
    rows = watch(model)
    with mllm.patch(model, spec) as patched:
        out = model(**inputs, use_cache=True)
        data = patched.ledger.as_dict()
        alone = []
        for sample in batch:
            model(**tiny.collate([sample]), use_cache=True)
            alone.append(patched.ledger.as_dict())
    assert data["batch"] == 3
    assert data["images"] == [1, 2, 0]
    assert data["visual_tokens"] == [16, 32, 0]
    assert data["prompt_tokens"] == [len(s.ids) for s in batch]
    for key in (
        "prompt_tokens",
        "visual_tokens",
        "images",
        "kept_llm",
        "visual_avg",
        "vision_flops",
    ):
        assert data[key] == [one[key][0] for one in alone], key
    for i in range(LAYERS):
        assert data["layers"][i]["layer"] == i
        for key in ("tokens", "visual"):
            assert data["layers"][i][key] == [one["layers"][i][key][0] for one in alone]
        assert rows[i][0] == max(data["layers"][i]["tokens"])
    assert data["kv_bytes"] == stored(out.past_key_values)


@few
@torch.no_grad()
def test_the_promised_fields(spec):
    model = fresh()
    with mllm.patch(model, spec) as patched:
        empty = patched.ledger.as_dict()
        model.generate(**tiny.collate(tiny.samples(side=SIDE)), max_new_tokens=5)
        data = patched.ledger.as_dict()
        text, short = str(patched.ledger), repr(patched.ledger)
    assert set(data) == set(empty) == FIELDS
    assert json.loads(json.dumps(data)) == data
    assert data["schema"] == 1
    assert (data["phase"], data["decode_steps"]) == ("decode", 4)
    assert (empty["phase"], empty["decode_steps"], empty["batch"]) == ("prefill", 0, 0)
    assert all(len(data[key]) == 3 for key in PER_SAMPLE)
    assert len(data["layers"]) == LAYERS
    assert all(set(row) == {"layer", "tokens", "visual"} for row in data["layers"])
    assert data["kv_bytes"] < data["baseline_kv_bytes"]
    assert data["kv_meta_bytes"] > 0
    assert "visual tokens 48" in text and "%" in text and short


@few
@torch.no_grad()
def test_indices_are_plain_and_sorted(spec):
    model = fresh()
    with mllm.patch(model, spec) as patched:
        model(**tiny.collate(tiny.samples(side=SIDE)))
        ledger = patched.ledger
        for layer in ["llm", *range(LAYERS)]:
            for kept, n in zip(ledger.kept(layer), (16, 32, 0), strict=True):
                assert kept.dtype == torch.long and kept.device.type == "cpu"
                assert kept.tolist() == sorted(set(kept.tolist()))
                assert not len(kept) or (kept.min() >= 0 and kept.max() < n)
        for into, kept, n in zip(ledger.merged_into, ledger.kept("llm"), (16, 32, 0), strict=True):
            assert into.dtype == torch.long and into.shape == (n,)
            own = torch.arange(n)
            assert own[into == own].tolist() == kept.tolist()
            others = into[(into != own) & (into >= 0)]
            assert set(others.tolist()) <= set(kept.tolist()), "merged into tokens that stayed"
            assert (others // 16 == own[(into != own) & (into >= 0)] // 16).all(), "same image"
        assert ledger.grid == [[(4, 4)], [(4, 4), (4, 4)], []]


@torch.no_grad()
def test_layers_nest():
    """What enters a layer entered every earlier one."""
    model = fresh()
    with mllm.patch(model, "divprune:keep=12+fastv:layer=1:keep=8+fastv:layer=3:keep=3") as p:
        model(**tiny.collate(tiny.samples(side=SIDE)))
        kept = [p.ledger.kept(i) for i in range(LAYERS)]
    for early, late in zip(kept, kept[1:], strict=False):
        for a, b in zip(early, late, strict=True):
            assert set(b.tolist()) <= set(a.tolist())
    assert [len(k[0]) for k in kept] == [12, 8, 8, 3]


@few
@torch.no_grad()
def test_turns(spec):
    """A turn on an old cache moves the earlier account to the history; a new one clears it."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh()
    with mllm.patch(model, spec) as patched:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        first = patched.ledger.as_dict()
        assert patched.ledger.history == []
        ids = torch.cat([out.sequences, torch.tensor([[11, 23, 31]])], 1)
        model.generate(
            input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False
        )
        second, history = patched.ledger.as_dict(), patched.ledger.history
        assert [h.as_dict() for h in history] == [first]
        assert second["visual_tokens"] == [0] and second["notes"]
        assert second["prompt_tokens"] == [4] and second["decode_steps"] == 2
        assert patched.ledger.kept("llm")[0].tolist() == []
        assert patched.ledger.grid == [[]]
        model(**inputs)
        assert patched.ledger.history == []
        assert patched.ledger.as_dict()["visual_tokens"] == [16]


@torch.no_grad()
def test_notes_speak_of_budgets_that_cut_nothing():
    """Fewer tokens arrive than the budget allows: legal, and said."""
    model = fresh()
    with mllm.patch(model, "stride:keep=4+fastv:layer=2:keep=9") as patched:
        model(**tiny.collate(tiny.samples("alone", side=SIDE)))
        assert [len(patched.ledger.kept(i)[0]) for i in range(LAYERS)] == [4] * LAYERS
        assert any("fastv" in note and "9" in note for note in patched.ledger.notes)


@torch.no_grad()
def test_scaled_layers_are_recorded():
    model = fresh()
    with mllm.patch(model, "fastv:keep=0.5") as patched:
        model(**tiny.collate(tiny.samples("alone", side=SIDE)))
        assert any("layer" in note and "32" in note for note in patched.ledger.notes)


@torch.no_grad()
def test_without_a_cache_no_bytes_are_claimed():
    model = fresh()
    with mllm.patch(model, FEW[-1]) as patched:
        model(**tiny.collate(tiny.samples(side=SIDE)), use_cache=False)
        data = patched.ledger.as_dict()
    assert data["kv_bytes"] == data["baseline_kv_bytes"] == data["kv_meta_bytes"] == 0


@torch.no_grad()
def test_assisted_steps_are_no_prefill():
    """Verifying candidates is decoding: the account stays that of the prompt."""
    sample = tiny.samples("alone", side=SIDE)[0]
    ids = torch.cat([sample.ids, sample.ids[-4:], sample.ids[-4:], sample.ids[-4:-2]])
    model = fresh()
    with mllm.patch(model, FEW[2]) as patched:
        model.generate(
            **tiny.collate([tiny.Sample(ids, sample.pixels)]),
            max_new_tokens=8,
            do_sample=False,
            prompt_lookup_num_tokens=3,
        )
        assert patched.ledger.as_dict()["visual_tokens"] == [16]
        assert patched.ledger.history == []
