"""Where parts of the KV cache meet: storage and eviction, chunks, windows, candidates, files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import families
import pytest
import torch
from test_kv import generate

import mllm
from mllm.cache import Quantised, load_prefix, save_prefix
from mllm.compressors.base import CacheCompressor
from mllm.errors import CacheMismatchError
from mllm.plan import MethodInfo

BITS = "kivi:bits=4:group_size=4:residual=4"


def inputs_of(family: str, kind: str = "alone") -> dict:
    return families.collate(family, families.samples(family, kind))


@dataclass
class Forms(CacheCompressor):
    """Writes down what layer 0 is stored in when chunks begin."""

    seen: list = field(default_factory=list, compare=False)
    info: ClassVar = MethodInfo(name="forms", stage="cache")
    chunks: ClassVar[bool] = True

    def layer_end(self, event):
        if event.layer == 0:
            segments = event.cache.cache.layers[0].segments
            self.seen.append([(isinstance(x, Quantised), x.slots) for x in segments])


@torch.no_grad()
def test_every_chunk_is_stored_in_few_bits():
    """Not all of them when the prompt ends: then full precision of the prompt would be held."""
    forms, inputs = Forms(), inputs_of("llava")
    stage = mllm.plan.Plan.from_spec(BITS).stages[0]
    with mllm.patch(families.model("llava"), [forms, stage]) as patched:
        generate(patched.model, inputs, 1, prefill_chunk_size=8)
    assert len(forms.seen) > 2
    for *before, (few, slots) in forms.seen:
        assert not few and slots < 8 + 4
        assert all(few and slots % 4 == 0 for few, slots in before)


@torch.no_grad()
def test_nothing_is_rounded_where_nothing_is_merged():
    """A method that merges leaves quantised segments alone until something has to leave."""
    model, inputs = families.model("llava"), inputs_of("llava")
    with mllm.patch(model, f"d2o:budget=900:skip=0:skip_last=0+{BITS}") as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        before = [layer.segments[0] for layer in cache.layers]
        model(input_ids=torch.tensor([[11]]), past_key_values=cache)
        assert all(isinstance(x, Quantised) for x in before)
        assert all(a is layer.segments[0] for a, layer in zip(before, cache.layers, strict=True))
        kv = patched.kv(cache)
        old = [kv.view(i) for i in range(kv.depth)]
        own = torch.arange(kv.length)[None]
        kv.merge(None, torch.where(own == 3, 4, own))
        for was, layer in zip(old, cache.layers, strict=True):
            few, *plain = layer.segments
            assert isinstance(few, Quantised) and not any(isinstance(x, Quantised) for x in plain)
            logical = layer.table.logical[0, 0].tolist()
            assert sorted(logical) == [t for t in range(kv.length) if t != 3]
            assert logical.index(4) >= few.slots and all(t in logical[: few.slots] for t in (2, 5))
            for now, then in ((layer.keys, was.keys), (layer.values, was.values)):
                rest = [(at, t) for at, t in enumerate(logical) if t != 4]
                assert all(torch.equal(now[:, :, at], then[:, :, t]) for at, t in rest)
                mean = (then[:, :, 3] + then[:, :, 4]) / 2
                assert torch.allclose(now[:, :, logical.index(4)], mean, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["d2o:budget=0.4:skip=0:skip_last=0:sinks=1", "lookm:budget=0.4"]
)
@torch.no_grad()
def test_merging_in_few_bits_keeps_the_budget(method):
    """Unequal heads fill segments up with cells that have names of tokens stored elsewhere."""
    model, batch = families.model("llava").double(), families.samples("llava", "padded")
    stage = mllm.plan.Plan.from_spec(method).stages[0].replace(hold=True)
    with mllm.patch(model, [stage, mllm.plan.Plan.from_spec(BITS).stages[0]]):

        def answer(samples):
            inputs = families.collate("llava", samples)
            return generate(model, inputs | {"pixel_values": inputs["pixel_values"].double()}, 9)

        together = answer(batch)
        for layer in together.past_key_values.layers:
            held, total = layer.table.valid.sum(-1), layer.samples[f"{stage.info.name}_total"]
            assert (held <= total.expand_as(held)).all() and (held >= total - 1).all()
        alone = answer(batch[:1])
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(a[0], b[0], atol=1e-6)


@pytest.mark.parametrize("spec", ["divprune:keep=1.0", "xkv:rank_keys=1.0:rank_values=1.0", BITS])
@torch.no_grad()
def test_what_a_window_has_forgotten_does_not_come_back(spec):
    """As transformers' own layers refuse it; a snapshot from before is fine."""
    model, inputs = families.model("gemma3"), inputs_of("gemma3")
    prompt = inputs["input_ids"].shape[1]
    with mllm.patch(model, spec) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        kv, more = patched.kv(cache), torch.tensor([[11, 23, 31]])
        start = kv.snapshot()
        want = model(input_ids=more, past_key_values=cache).logits
        with pytest.raises(CacheMismatchError, match="12 tokens has forgotten") as caught:
            kv.crop(prompt)
        assert caught.value.given == prompt
        kv.rollback(start)
        assert torch.equal(model(input_ids=more, past_key_values=cache).logits, want)


@pytest.mark.parametrize("method", ["snapkv:budget=12:window=4", "lookm:budget=12"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_rejected_candidates_leave_where_positions_are_compact(family, method):
    """An eviction by the prompt alone holds, whatever becomes of candidates that came with it."""
    (sample,) = families.samples(family, "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate(family, [families.Sample(ids, sample.pictures)])
    model = families.model(family)
    with mllm.patch(model, f"divprune:keep=5+{method}"):
        greedy = generate(model, inputs, 12)
        assisted = generate(model, inputs, 12, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, assisted.sequences)


@pytest.mark.parametrize(
    "spec, lossy",
    [
        ("xkv:rank_keys=4:rank_values=1.0", True),
        ("xkv:rank_keys=1.0:rank_values=4", True),
        ("shadowkv:budget=4:chunk=2:outliers=0:local=0:rank_keys=2", True),
        ("xkv:rank_keys=1.0:rank_values=1.0", False),
        ("shadowkv:budget=4:chunk=2:outliers=0:local=0:rank_keys=1.0", False),
    ],
)
@torch.no_grad()
def test_an_unpatched_model_does_not_go_on_from_approximations(spec, lossy, tmp_path):
    model, token = families.model("llava"), torch.tensor([[5]])
    with mllm.patch(model, spec) as patched:
        cache = model(**inputs_of("llava"), use_cache=True).past_key_values
        save_prefix(cache, tmp_path)
        loaded = load_prefix(tmp_path, patched)
    for held in (cache, loaded):
        if lossy:
            with pytest.raises(CacheMismatchError, match="compressed by a plan"):
                model(input_ids=token, past_key_values=held)
        else:
            model(input_ids=token, past_key_values=held)


@torch.no_grad()
def test_a_layer_that_stores_nothing_is_seen_saved_and_goes_on(tmp_path):
    model, token = families.model("llava"), torch.tensor([[5]])
    with mllm.patch(model, f"snapkv:budget=12:window=4:hold=true+{BITS}") as patched:
        cache = model(**inputs_of("llava"), use_cache=True).past_key_values
        kv = patched.kv(cache)
        kv.evict(1, drop=torch.ones(1, kv.length, dtype=torch.bool))
        view = kv.view(1)
        assert view.keys is None and view.values is None and not view.valid.numel()
        save_prefix(cache, tmp_path)
        loaded = load_prefix(tmp_path, patched)
        assert not patched.kv(loaded).holds(1)
        want, mine = (model(input_ids=token, past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(mine, want)


@pytest.mark.parametrize(
    "spec, forms",
    [
        ("adakv:budget=0.4:window=4", {"rectangle", "cells"}),
        (f"adakv:budget=0.6:window=4+{BITS}", {"quantised", "rectangle", "cells"}),
    ],
)
@torch.no_grad()
def test_files_of_several_forms(spec, forms, tmp_path):
    """Every segment is written for itself and comes back as it was."""
    model = families.model("llava")
    with mllm.patch(model, spec) as patched:
        cache = generate(model, inputs_of("llava", "padded"), 3).past_key_values
        save_prefix(cache, tmp_path)
        loaded = load_prefix(tmp_path, patched)
        for a, b in zip(cache.layers, loaded.layers, strict=True):
            assert [type(x) for x in a.segments] == [type(x) for x in b.segments]
            for x, y in zip((a.keys, a.values), (b.keys, b.values), strict=True):
                valid = a.table.valid
                valid = valid if valid.dim() == 3 else valid[:, None].expand(x.shape[:3])
                assert torch.equal(x[valid], y[valid])
    rows = json.loads((tmp_path / "prefix.json").read_text())["layers"]
    assert {part["form"] for row in rows for part in row["parts"]} <= forms
