"""How often the host waits for the device: exact numbers per forward, against the unpatched model.

Counted on the CPU, where every read of a value counts, also of tensors that would be there
anyway; a test on a GPU lets torch itself count.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import collate, model, samples
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mllm

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
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts what becomes Python values without an operator on the CPU."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits(call) -> int:
    found = Counter()
    with torch.no_grad(), Lists(found), Operators(found):
        call()
    return sum(found.values())


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
    assert waits(lambda: read(torch.tensor([1, 0, 2]))) == times


PRE, IN = "divprune:keep=3", "fastv:layer=2:keep=0.5"
ZIP = "visionzip:keep=8"
BOTH = "stride:keep=3:positions=original+fastv:layer=2:keep=2"
TWO = "fastv:layer=1:keep=0.5+fastv:layer=3:keep=2"

#: Reads beyond those of the unpatched model, (one sample, a padded batch of three): the engine
#: reads the counts of rows once, and transformers reads no mask that the engine has replaced.
PREFILL = {
    ("llava", PRE): (0, 0),
    ("llava", ZIP): (0, 0),
    ("llava", IN): (1, 1),
    ("llava", TWO): (1, 1),
    ("llava", BOTH): (0, 0),
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family, spec", PREFILL)
def test_prefill(family, spec, attn):
    got = []
    for kind in ("alone", "padded"):
        net, inputs = model(family, attn), collate(family, samples(family, kind))
        plain = waits(lambda: net(**inputs))
        with mllm.patch(net, spec):
            net(**inputs)
            got.append(waits(lambda: net(**inputs)) - plain)
    assert tuple(got) == PREFILL[family, spec]


def per_step(net, inputs) -> int:
    """Reads of one more step of generate()."""
    options = dict(do_sample=False, use_cache=True)
    few, more = (
        waits(lambda n=n: net.generate(**inputs, max_new_tokens=n, **options)) for n in (4, 5)
    )
    return more - few
