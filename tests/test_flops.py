"""Analytic FLOPs equal torch's counter, for the model as it is and under every plan."""

from __future__ import annotations

import pytest
import tiny
import torch
from matrix import CASES, LAYERS, SIDE, fresh
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm import attention, flops

aten = torch.ops.aten


def distances(first, second, *_, **__) -> int:
    """A distance costs a multiplication and an addition per dimension."""
    return 2 * first[:-2].numel() * first[-2] * second[-2] * first[-1]


def counted(call) -> int:
    """FLOPs by torch's counter, without the rotary angles (a matmul in some transformers)."""
    known = dict.fromkeys((aten._cdist_forward, aten._euclidean_dist), distances)
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
        call()
    angles = [sum(v.values()) for k, v in counter.get_flop_counts().items() if "rotary" in k]
    return counter.get_total_flops() - sum(angles)


@pytest.fixture(autouse=True)
def without_free_reads(monkeypatch):
    """As on a GPU: the ledger books the keys behind a block of queries too."""
    monkeypatch.setattr(attention, "free_to_read", lambda device: False)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("spec", CASES)
def test_prefill(spec, last):
    """Selection, tower, projector, decoder and head: nothing is missing, nothing is added."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh("eager")
    plain = counted(lambda: model(**inputs, logits_to_keep=last))
    with mllm.patch(model, spec) as patched:
        measured = counted(lambda: model(**inputs, logits_to_keep=last))
        data = patched.ledger.as_dict()
    assert data["baseline_prefill_flops"] == [plain]
    assert data["prefill_flops"] == [pytest.approx(measured, rel=1e-9)]
    assert measured < plain


@pytest.mark.parametrize("spec", ["fastv:layer=2:keep=0.5", "visionzip:keep=10", "downsample"])
def test_first_token_of_generate(spec):
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh("eager")
    with mllm.patch(model, spec) as patched:
        measured = counted(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))
        assert patched.ledger.as_dict()["prefill_flops"] == [pytest.approx(measured, rel=1e-9)]


@pytest.mark.parametrize("spec", ["fastv:layer=1:keep=4", "divprune:keep=5"])
def test_two_images(spec):
    sample = tiny.samples(side=SIDE)[1]
    model = fresh("eager")
    with mllm.patch(model, spec) as patched:
        measured = counted(lambda: model(**tiny.collate([sample])))
        assert patched.ledger.as_dict()["prefill_flops"] == [pytest.approx(measured, rel=1e-9)]


def test_a_second_turn_attends_to_the_stored_slots():
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh("eager")
    new = tiny.samples("alone", side=SIDE, seed=5)[0]
    later = tiny.collate([new])
    with mllm.patch(model, "fastv:layer=2:keep=0.5") as patched:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        length = inputs["input_ids"].shape[1] + len(new.ids)
        later["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        measured = counted(lambda: model(**later, past_key_values=cache))
        data = patched.ledger.as_dict()
    assert data["prefill_flops"] == [pytest.approx(measured, rel=1e-9)]
    assert data["prefill_flops"][0] < data["baseline_prefill_flops"][0]


def test_formulas_by_hand():
    """One decoder layer of known shape, multiplied out."""
    cfg = tiny.config(hidden=48).text_config
    rows, keys = 7, 11
    projections = 48 * 48 * 2 + 48 * 24 * 2  # q, o; k, v of two of four heads
    want = 2 * rows * (projections + 3 * 48 * 96) + 2 * 2 * rows * keys * 48
    assert flops.decoder_layer(cfg, rows, keys) == want
    assert flops.lm_head(cfg, 3) == 2 * 3 * 48 * tiny.VOCAB
    assert flops.kv_bytes(cfg, 5, 2) == 2 * 5 * 2 * 12 * 2


def test_keep_all_costs_its_selection():
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh()
    with mllm.patch(model, "fastv:layer=2:keep=1.0") as patched, torch.no_grad():
        model(**inputs)
        data = patched.ledger.as_dict()
    assert data["prefill_flops"][0] == (
        data["baseline_prefill_flops"][0] + data["selection_flops"][0]
    )
    assert len(data["layers"]) == LAYERS
