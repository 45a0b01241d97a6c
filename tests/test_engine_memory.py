"""Capturing scores costs rows x keys: nothing of shape queries x keys is ever made."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mllm

SIDE = 12  # 144 visual tokens: longer than any width of the model


class Squares(TorchDispatchMode):
    """Collects outputs with two axes that are both as long as the sequence."""

    def __init__(self, at_least: int):
        super().__init__()
        self.at_least, self.found = at_least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and sum(n >= self.at_least for n in x.shape) > 1:
                self.found.append((str(func), tuple(x.shape)))
        return out


def squares(model, inputs) -> list:
    with torch.no_grad(), Squares(SIDE * SIDE) as seen:
        model(**inputs, logits_to_keep=1)
    return seen.found


@pytest.mark.parametrize(
    "spec",
    [
        "fastv:layer=2:keep=1.0",
        "fastv:layer=1:keep=0.5+fastv:layer=2:keep=0.1",
        "visionzip:keep=16",
        "visionzip:keep=16+fastv:layer=2:keep=0.5",
        "avgpool:keep=36",
    ],
)
def test_no_tensor_of_queries_by_keys(spec):
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = tiny.llava("sdpa", layers=3, side=SIDE)
    assert not squares(model, inputs)
    with mllm.patch(model, spec):
        assert not squares(model, inputs)


def test_the_detector_works():
    """Eager attention does make such tensors."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    assert squares(tiny.llava("eager", layers=3, side=SIDE), inputs)


def test_received_attention_goes_in_blocks():
    """The substitute for [CLS] sums columns without holding the whole map."""
    from mllm.attention import received_attention

    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 300, 8, generator=g) for _ in range(2))
    with torch.no_grad(), Squares(300) as seen:
        mine = received_attention(q, k, None, 0.3)
    assert not seen.found
    want = (q @ k.transpose(-1, -2) * 0.3).softmax(-1).sum(2)
    assert torch.allclose(mine, want, atol=1e-5)
