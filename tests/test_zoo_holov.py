"""HoloV: strips, quotas and what stays in each, in loops."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from zoo import FAMILIES, check_family, context

import mllm
from mllm.compressors import HoloV
from mllm.errors import PlanError


def example(images=2, tokens=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, 8, generator=g), torch.rand(images, tokens, generator=g) ** 4


@pytest.mark.parametrize("options", [{}, {"beta": 2.0, "tau": 3.0}], ids=str)
@pytest.mark.parametrize("crops", [1, 4, 7, 30, 64])
@pytest.mark.parametrize("keep", [1, 3, 8, 17, 29, 30])
def test_holov_equals_its_description(keep, crops, options):
    features, attention = example()
    stage = HoloV(keep=keep, crops=crops, **options)
    (kept,) = stage.reduce(context(stage, features=features, attention=attention))
    for i in range(2):
        want = oracles.holov(features[i], attention[i], keep, min(crops, 30), **options)
        assert kept.mask[i].nonzero()[:, 0].tolist() == want
    assert kept.counts == [keep] * 2


def test_behind_another_stage():
    features, attention = example()
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, 3:20] = False
    stage = HoloV(keep=9, crops=4)
    (kept,) = stage.reduce(context(stage, valid, features=features, attention=attention))
    among = valid[0].nonzero()[:, 0].tolist()
    want = oracles.holov(features[0], attention[0], 9, 4, among=among)
    assert kept.mask[0].nonzero()[:, 0].tolist() == want


def test_ties_go_to_the_earlier_token_of_every_strip():
    features, attention = torch.ones(3, 12, 4), torch.ones(3, 12)
    stage = HoloV(keep=6, crops=4)
    (kept,) = stage.reduce(context(stage, features=features, attention=attention))
    assert kept.mask[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4, 6, 9]
    assert (kept.mask == kept.mask[0]).all()


def test_every_strip_is_seen():
    """One strip has nearly all the attention; the others still get tokens for their variety."""
    features, _ = example(tokens=32)
    attention = torch.full((2, 32), 1e-3)
    attention[:, :8] = 1.0
    stage = HoloV(keep=16, crops=4, beta=1.0)
    (kept,) = stage.reduce(context(stage, features=features, attention=attention))
    assert (kept.mask.view(2, 4, 8).sum(2) > 0).all()


@torch.no_grad()
def test_published_budgets():
    """192, 128 and 64 of 576: 36 tokens in each of 16 strips."""
    features, attention = example(1, 576)
    for keep in (192, 128, 64):
        stage = HoloV(keep=keep)
        (kept,) = stage.reduce(context(stage, features=features, attention=attention))
        assert int(kept.mask.sum()) == keep
        assert kept.mask.view(16, 36).sum(1).min() >= 1
    net = tiny.llava(layers=1, side=24)
    with mllm.patch(net, "holov:keep=64") as patched:
        net(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        assert len(patched.ledger.kept(0)[0]) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    plan = HoloV(keep=5, crops=3) if family == "llava" else HoloV(keep=5, crops=None)
    assert check_family(family, plan) == [[5] * 4, [10] * 4, [0] * 4]


def test_crops():
    with pytest.raises(PlanError, match="crops=0"):
        HoloV(crops=0)
