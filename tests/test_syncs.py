"""How often the host waits for the device: exact numbers per forward, against the unpatched model.

Counted on the CPU, where every read of a value counts, also of tensors that would be there
anyway. Copies to the device do not wait (`on_device`), and are not counted.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import torch
import transformers
from families import collate, model, samples
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mllm
from mllm import attention

#: Operators whose result has a shape or a value that only the device knows.
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::equal",
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def asked_by() -> str:
    """The package whose code waits: `mllm`, `transformers`, or another."""
    frame = sys._getframe(2)
    while frame is not None:
        for package in (mllm, transformers):
            if frame.f_code.co_filename.startswith(os.path.dirname(package.__file__) + os.sep):
                return package.__name__
        frame = frame.f_back
    return "other"


class Operators(TorchDispatchMode):
    """Counts operators that make the host wait."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = args[1] if name in INDEXED else ()
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)
        unsized = name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS or by_mask or unsized:
            self.found[asked_by()] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts what becomes Python values without an operator on the CPU."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found[asked_by()] += 1
        return func(*args, **(kwargs or {}))


def waits(call) -> Counter:
    """Waits of a call by who asked."""
    found = Counter()
    with torch.no_grad(), Lists(found), Operators(found):
        call()
    return found


@pytest.mark.parametrize(
    "read, times",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.masked_fill(x > 0, 0).sort(), 0),
        (lambda x: x[torch.tensor([1, 0])], 0),
    ],
)
def test_the_counter_counts(read, times):
    assert waits(lambda: read(torch.tensor([1, 0, 2]))).total() == times


PRE, IN = "divprune:keep=3", "fastv:layer=2:keep=0.5"
BOTH = "stride:keep=3:positions=original+fastv:layer=2:keep=2"
TWO = "fastv:layer=1:keep=0.5+fastv:layer=3:keep=2"

#: Waits of a prefill beyond those of the unpatched model: (one sample, three unequal ones), sdpa.
#:
#: The engine reads one thing: how many rows of each sample are visual, and how many are padding.
#: Under a fixed budget it knows all other counts. What comes on top is either
#: - transformers asking twice whether a padded mask may be left out, once per part of the decoder;
#: - the sizes of the pictures, where they are given as tensors (Qwen, LLaVA-NeXT);
#: - `random`, whose seeds are the bits of the pictures;
#: - separators, which stay or go with their lines: nobody knows how many (LLaVA-NeXT);
#: - layers with a window: what they may forget is read once for each part of the decoder.
#: Where the decoder needs no mask any more, transformers asks once less than for the whole prompt.
PREFILL = {
    ("llava", PRE): (0, 1),
    ("llava", "visionzip:keep=8"): (0, 1),
    ("llava", "avgpool:keep=4"): (0, 1),
    ("llava", "cdpruner:keep=3"): (0, 1),
    ("llava", "holov:keep=3"): (0, 1),
    ("llava", "vmtc:keep=4"): (0, 1),
    ("llava", "dart:layer=2:keep=3"): (1, 3),
    ("llava", "topv:layer=2:keep=3"): (1, 3),
    ("llava", IN): (1, 3),
    ("llava", BOTH): (0, 3),
    ("llava", TWO): (1, 5),
    ("llava", "random:keep=4"): (1, 2),
    ("qwen2_5_vl", PRE): (2, 3),
    ("qwen2_5_vl", IN): (3, 5),
    ("llava_next", PRE): (2, 3),
    ("llava_next", IN): (5, 7),
    ("gemma3", PRE): (2, 2),
    ("gemma3", IN): (2, 3),
    ("llava", "fastervlm:keep=5"): (0, 1),
    ("llava_next", "fastervlm:keep=5"): (2, 3),
    ("llava_next", "hired:keep=5"): (2, 3),
    ("llava", "vscan_vision:keep=5"): (0, 1),
    # An adaptive count is read once; a fixed one is known.
    ("llava", "prumerge"): (1, 2),
    ("llava", "prumerge:keep=5"): (0, 1),
    # Attention that is read beforehand needs a mask of its own.
    ("llava", "pyramiddrop"): (1, 13),
    # How many raters and how much text there is: once, and raters once for every cut.
    ("llava", "sparsevlm"): (5, 11),
    ("llava", "btp:keep=0.5/0.25/0.1:end=0"): (1, 7),
    # Which rows are visual and which are text, once for every layer that is read.
    ("llava", "fitprune:layers=1/2:keep=0.5/0.25"): (5, 9),
}


@pytest.fixture(autouse=True)
def without_free_reads(monkeypatch):
    """As on a GPU: a CPU is asked for values that cost nothing there."""
    monkeypatch.setattr(attention, "free_to_read", lambda device: False)


def forward(net, inputs) -> int:
    """Waits of a prefill, when what is known of layouts is known."""
    net(**inputs)
    return waits(lambda: net(**inputs)).total()


@pytest.mark.parametrize("family, spec", PREFILL)
@torch.no_grad()
def test_prefill(family, spec):
    net, found = model(family), []
    for kind in ("alone", "padded"):
        inputs = collate(family, samples(family, kind))
        plain = forward(net, inputs)
        with mllm.patch(net, spec):
            found.append(forward(net, inputs) - plain)
    assert tuple(found) == PREFILL[family, spec]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("spec", [PRE, IN, BOTH])
@torch.no_grad()
def test_equal_counts_in_a_batch_cost_nothing_more(spec, count):
    net = model("llava")
    one = collate("llava", samples("llava", "alone"))
    many = {k: torch.cat([v] * count) for k, v in one.items()}
    with mllm.patch(net, spec):
        assert forward(net, many) == forward(net, one)


@pytest.mark.parametrize("kind", ["alone", "padded"])
@pytest.mark.parametrize("spec", [PRE, IN, BOTH, TWO])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "gemma3"])
@torch.no_grad()
def test_steps_never_wait(family, spec, kind):
    """Decode steps of generate(): the engine asks nothing, however many there are."""
    net, inputs = model(family), collate(family, samples(family, kind))
    options = dict(do_sample=False, max_new_tokens=1)
    with mllm.patch(net, spec):
        net.generate(**inputs, **options)
        prefill = waits(lambda: net.generate(**inputs, **options))["mllm"]
        options["max_new_tokens"] = 9
        assert waits(lambda: net.generate(**inputs, **options))["mllm"] == prefill
    assert prefill >= 1
