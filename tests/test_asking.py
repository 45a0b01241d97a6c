"""Sharing the vision tower between plans changes no answer, whatever the model."""

import families
import pytest
import torch

import mllm
from mllm.eval.asking import SharedTower
from mllm.plan import Plan


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3"])
@torch.inference_mode()
def test_a_shared_tower_changes_nothing(family):
    """Also where forward makes the tower's input anew, so that its place in memory is no name."""
    net = families.model(family)
    batches = [families.collate(family, families.samples(family, k)) for k in ("alone", "padded")]
    shared = SharedTower(net)
    for spec in ("random:keep=0.5", "divprune:keep=0.5", "fastv:layer=2:keep=0.5"):
        plan = Plan.from_spec(spec)
        with mllm.patch(net, plan):
            for inputs in [*batches, *batches]:
                want = net(**inputs).logits
                with shared.used_by(plan):
                    assert torch.equal(net(**inputs).logits, want), spec
    assert shared.held > 0
