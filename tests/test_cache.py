"""The cache interface: every operation against naive lists, every event against a masked model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import ClassVar

import families
import pytest
import torch
from cache_oracles import Norms, Oracle, Retro, Sinks, Snap
from matrix import equal
from torch import Tensor
from transformers import DynamicCache

import mllm
from mllm.cache import (
    Dense,
    KVCache,
    Offloaded,
    Packed,
    SlotLayer,
    SlotTable,
    cache_bytes,
    load_prefix,
    save_prefix,
)
from mllm.compressors import FastV
from mllm.compressors.base import CacheCompressor
from mllm.errors import CacheMismatchError, DataError, PlanError
from mllm.plan import MethodInfo

METHODS = {
    "norms": [Norms()],
    "snap": [Snap()],
    "sinks": [Sinks()],
    "retro": [Retro()],
    "retro+snap": [Retro(), Snap()],
}
FAMILIES = ["llava", "qwen2_5_vl"]


def batch_of(family: str, kind: str):
    batch = families.samples(family, kind)
    return batch, families.collate(family, batch)


def run(family, attn, methods, inputs, steps=10, **options):
    model = families.model(family, attn)
    with mllm.patch(model, methods) as patched:
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **options,
        )
        return patched, out


@pytest.mark.parametrize("kind", ["alone", "padded"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_evicting_is_masking(family, name, attn, kind):
    """Each sample of a batch, alone in a model that keeps everything and masks what went."""
    batch, inputs = batch_of(family, kind)
    _, out = run(family, attn, METHODS[name], inputs)
    prompt = inputs["input_ids"].shape[1]
    for b, sample in enumerate(batch):
        oracle = Oracle(family, METHODS[name])
        oracle.visual = sample.visual
        want = oracle.generate(**families.collate(family, [sample]), max_new_tokens=10)
        mine = torch.stack(out.logits, 1)[b]
        equal(mine, torch.stack(want.logits, 1)[0], f"sample {b}")
        assert torch.equal(out.sequences[b, prompt:], want.sequences[0, len(sample.ids) :])
        for i, layer in enumerate(out.past_key_values.layers):
            valid = layer.table.valid if layer.table.headwise else layer.table.valid[:, None]
            for head in range(2):
                stored = valid[b, head % valid.shape[1]].sum()
                assert int(stored) == len(oracle.alive(i, head)), f"layer {i}, head {head}"
    assert out.past_key_values.get_seq_length() == prompt + 9
