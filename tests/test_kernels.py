"""Kernels against their references: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import collate, model, samples
from matrix import equal

import mllm
from mllm import attention, kernels, tokens
from mllm.cache import Packed
from mllm.cache.layer import SlotLayer
from mllm.cache.quantised import Plain, Quantised
from mllm.cache.segments import attend, joined
from mllm.errors import MllmError
from mllm.routers import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def device(request):
    """Where tensors have to be so that kernels run; falling back to torch is an error."""
    pytest.importorskip("triton", minversion="3.7.1")  # older interpreters break with numpy 2.4
    interpreter = request.param == "interpreter"
    if not interpreter and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if why := kernels._triton_obstacle(interpreter):
        pytest.skip(why)

    with kernels.use(request.param, strict=True):
        yield "cpu" if interpreter else "cuda"


def normal(g, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=g).to(dtype)


# Attention of a few rows


def drawn(batch, kv_heads, group, rows, queries, keys, width, dtype=torch.float32, seed=0):
    """Queries and keys as models hand them over (strided), and rows in any order."""
    g = torch.Generator().manual_seed(seed)
    q = normal(g, batch, queries, kv_heads * group, width, dtype=dtype).transpose(1, 2)
    k = normal(g, batch, keys, kv_heads, width, dtype=dtype).transpose(1, 2)
    return q, k, torch.randint(0, queries, (batch, rows), generator=g)


def masked(kind, q, k, seed=0):
    """A mask in which every query sees something, and one sample is padded on the left."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if kind is None:
        return None
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[0, : keys - queries + queries // 2] = False
    if kind == "keys":
        return valid
    sees = valid[:, None, None] & (torch.rand(batch, 1, queries, keys, generator=g) < 0.8)
    if kind == "heads":
        sees = sees & (torch.rand(batch, heads, queries, keys, generator=g) < 0.8)
    sees[..., -1] = True
    if kind != "added":
        return sees
    bias = torch.randn(sees.shape, generator=g).to(q.dtype)
    return bias.masked_fill(~sees, torch.finfo(q.dtype).min)


def check_rows(device, q, k, rows, mask, scaling=None, heads="mean", causal=True):
    options = {"heads": heads, "causal": causal}
    given = [t if t is None else t.to(device) for t in (q, k, rows, mask)]
    found = attention.row_scores(*given, scaling, **options).cpu()
    want = attention._row_scores(q, k, rows, mask, scaling, **options)
    assert found.dtype == torch.float32 and found.shape == want.shape
    # Both add up in fp32, in another order.
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("heads", ["mean", "sum", "max", "none"])
@pytest.mark.parametrize(
    "batch, kv_heads, group, rows, queries, keys, width",
    [
        (1, 1, 1, 1, 1, 1, 16),
        (2, 2, 4, 1, 37, 37, 64),  # the last row alone
        (1, 4, 7, 3, 20, 53, 128),  # groups that are no power of two, keys stored before
        (2, 1, 8, 9, 30, 30, 80),
        (1, 2, 1, 33, 40, 70, 8),  # several tiles of rows
        (1, 1, 3, 2, 5, 530, 256),  # several parts of the keys
    ],
)
def test_rows(device, batch, kv_heads, group, rows, queries, keys, width, heads):
    q, k, at = drawn(batch, kv_heads, group, rows, queries, keys, width)
    check_rows(device, q, k, at, None, heads=heads)


@pytest.mark.parametrize("mask", [None, "keys", "one", "heads", "added"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_behind_masks(device, mask, dtype):
    q, k, at = drawn(2, 2, 3, 5, 13, 29, 72, dtype)
    given = masked(mask, q, k)
    for options in ({"heads": "mean"}, {"heads": "max", "causal": False}):
        check_rows(device, q, k, at, given, 0.2, **options)
    if mask == "keys":
        check_rows(device, q, k, at, given.long())
    if mask == "one":  # longer than the keys, and one for all samples
        check_rows(device, q, k, at, torch.nn.functional.pad(given[1:], (0, 3)))


@pytest.mark.parametrize("heads", ["mean", "max", "none"])
def test_rows_that_see_nothing(device, heads):
    """A softmax over nothing is not a number, as in torch; other rows are not touched by it."""
    q, k, _ = drawn(2, 2, 2, 1, 6, 6, 16)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :4] = False
    check_rows(device, q, k, torch.tensor([[1, 5], [0, 5]]), valid, heads=heads)


def test_no_rows(device):
    check_rows(device, *drawn(2, 2, 2, 0, 5, 5, 16), None)


# Chosen rows


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "batch, rows, kept, width", [(1, 1, 1, 1), (3, 37, 11, 96), (2, 9, 9, 1030), (2, 5, 0, 8)]
)
def test_gathered_rows(device, dtype, batch, rows, kept, width):
    g = torch.Generator().manual_seed(1)
    at = torch.stack([torch.randperm(rows, generator=g)[:kept] for _ in range(batch)])
    x = (normal(g, width, batch, rows) * 9).to(dtype).permute(1, 2, 0)  # strided
    parts = [
        (x, 1),
        (torch.randint(0, 99, (3, batch, rows), generator=g), 2),
        (torch.arange(rows)[None], 1),  # one for all samples
        (normal(g, 1, rows, 24), 1),
        (normal(g, 3, batch, rows, 10), 2),
    ]
    found = tokens.gather_parts(at.to(device), [(t.to(device), dim) for t, dim in parts])
    for own, want in zip(found, tokens._gather_parts(at, parts), strict=True):
        assert own.is_contiguous() and torch.equal(own.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, kept, length, width", [(1, 1, 1, 1), (3, 11, 37, 96), (2, 4, 4, 1030), (2, 0, 5, 8)]
)
def test_scattered_rows(device, dtype, batch, kept, length, width):
    g = torch.Generator().manual_seed(2)
    at = torch.stack([torch.randperm(length, generator=g)[:kept] for _ in range(batch)])
    x = normal(g, batch, width, kept, dtype=dtype).transpose(1, 2)
    for real in (None, torch.rand(batch, kept, generator=g) < 0.5):
        given = real if real is None else real.to(device)
        found = tokens.scatter_back(x.to(device), at.to(device), length, given)
        assert torch.equal(found.cpu(), tokens._scatter_back(x, at, length, real))


FAR = 2**26  # elements between neighbours: the 33rd is out of the reach of 32 bits


@pytest.fixture(scope="module")
def room():
    """8 GiB of addresses, of which a few pages in the middle are ever touched.

    An offset that has become negative is within the first half.
    """
    try:
        return torch.empty(2**32 + 2**12, dtype=torch.float16)[2**31 :]
    except RuntimeError:
        pytest.skip("no room")


@pytest.mark.parametrize("far", ["keys", "heads"])
def test_rows_of_tensors_beyond_32_bits(device, room, far):
    """Neighbouring keys, or neighbouring heads of queries and keys, lie far apart."""
    room, g = room.to(device), torch.Generator().manual_seed(3)
    if far == "keys":
        q, k = normal(g, 1, 2, 1, 16), room.as_strided((1, 1, 33, 16), (0, 0, FAR, 1))
    else:
        strides = (0, FAR, 16, 1)
        q, k = (room[at:].as_strided((1, 33, 2, 16), strides) for at in (0, 64))
        q.copy_(normal(g, *q.shape))
    k.copy_(normal(g, *k.shape))
    q, at = q.to(k), torch.full((1, 1), q.shape[2] - 1)
    found = attention.row_scores(q, k, at.to(device), None, None)
    want = attention._row_scores(q.cpu(), k.cpu(), at, None, None, causal=True, heads="mean")
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-6)


def test_moved_rows_of_tensors_beyond_32_bits(device, room):
    """Neighbouring channels, or planes, lie far apart."""
    room, g = room.to(device), torch.Generator().manual_seed(3)
    x = room.as_strided((1, 3, 33), (0, 1, FAR))
    planes = room[16:].as_strided((33, 1, 3), (FAR, 0, 1))
    for t in (x, planes):
        t.copy_(normal(g, *t.shape))
    at = torch.tensor([[2, 0, 1]]).to(device)
    parts = [(x, 1), (planes, 2)]
    for own, want in zip(tokens.gather_parts(at, parts), tokens._gather_parts(at, parts),
                         strict=True):  # fmt: skip
        assert torch.equal(own, want)
    assert torch.equal(tokens.scatter_back(x, at, 5), tokens._scatter_back(x, at, 5))


# One new token over what is stored


def stored(seed, dtype, slots=None):
    """A drawn query, keys and values, which cells are there, and which of these each head sees.

    One head holds nothing, and one sees nothing of what it holds.
    """
    g = torch.Generator().manual_seed(seed)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    batch, kv_heads, group = one_of(1, 2), one_of(1, 2, 3), one_of(1, 2, 3, 4, 5, 7, 8)
    width = one_of(64, 72, 80, 96, 128, 192, 256)
    value_width = one_of(width, 24, 64)
    shape = batch, kv_heads, one_of(1, 2, 31, 64, 77) if slots is None else slots
    keys, values = (normal(g, *shape, w, dtype=dtype) for w in (width, value_width))
    lengths = torch.randint(0, shape[2] + 1, shape[:2], generator=g)
    lengths[-1, -1] = 0
    lengths[0, 0] = shape[2]
    there = torch.arange(shape[2]) < lengths[..., None]
    seen = there.repeat_interleave(group, 1)
    if one_of(False, True):
        seen = seen & (torch.rand(seen.shape, generator=g) < 0.7)
        seen[0, -1] = False
    query = normal(g, batch, 1, kv_heads * group, width, dtype=dtype).transpose(1, 2)
    return query, keys, values, there, seen, one_of(None, 0.3)


def check_attention(device, segment, query, seen, scaling, close):
    """A segment, moved by `segment(device)`, against its rectangle in torch."""
    given = seen if seen is None else seen.to(device)
    found = segment(device).attend(query.to(device), given, scaling)
    plain = segment("cpu")
    want = attend(query, plain.keys(), plain.values(), seen, scaling)
    for own, like in zip(found, want, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.cpu(), like, rtol=close, atol=close)


CLOSE = [(torch.float32, 1e-5), (torch.float16, 2e-3)]  # weights are rounded before the product


@pytest.mark.parametrize("dtype, close", CLOSE)
@pytest.mark.parametrize("seed, slots", [*((s, None) for s in range(8)), (8, 300), (9, 0)])
def test_ragged_heads(device, seed, slots, dtype, close):
    """A packed cache, with rows appended behind; also one of several parts, and one of no cell."""
    query, keys, values, there, seen, scaling = stored(seed, dtype, slots or None)
    more = [t[:, :, :1] * 0.5 for t in (keys, values)]

    def segment(place):
        packed = Packed.of(*(t.to(place) for t in (keys, values, there)))
        if slots == 0:
            return packed.first(0)
        packed.append(*(t.to(place) for t in more))
        return packed

    seen = seen[..., :0] if slots == 0 else torch.nn.functional.pad(seen, (0, 1), value=True)
    check_attention(device, segment, query, seen, scaling, close)
    check_attention(device, segment, query, None, scaling, close)


@pytest.mark.parametrize("seed", [0, 3])
def test_heads_in_bfloat16(device, seed):
    """What is stored is rounded to it, and so are weights, but not in the interpreter."""
    query, keys, values, there, seen, scaling = stored(seed, torch.bfloat16)
    for make in (Packed.of, lambda *given: Quantised.of(*given, 4, 4, 8)):
        check_attention(
            device, lambda place, make=make: make(*(t.to(place) for t in (keys, values, there))),
            query, seen, scaling, 2e-2,
        )  # fmt: skip


@pytest.mark.parametrize("dtype, close", CLOSE)
@pytest.mark.parametrize(
    "seed, key_bits, value_bits, size",
    [
        (0, 2, 2, 8), (1, 4, 4, 4), (2, 8, 8, 8), (3, 2, 4, 8), (4, 8, 2, 8), (5, 16, 4, 8),
        (6, 4, 16, 8), (7, 2, 8, 512), (8, 4, 2, 1), (9, 16, 16, 8),
    ],
)  # fmt: skip
def test_quantised_heads(device, seed, key_bits, value_bits, size, dtype, close):
    """A ragged segment, its first columns, and one whose rows are its cells."""
    query, keys, values, there, seen, scaling = stored(20 + seed, dtype)

    def segment(place, kept=there):
        given = (t.to(place) for t in (keys, values, kept))
        return Quantised.of(*given, key_bits, value_bits, size)

    def part(place):
        return segment(place).first(1 + there.shape[2] // 2)

    def whole(place):
        return segment(place, torch.ones_like(there))

    check_attention(device, segment, query, seen, scaling, close)
    check_attention(device, part, query, seen[..., : part("cpu").slots], scaling, close)
    check_attention(device, whole, query, None, scaling, close)


def test_attention_in_parts_is_attention():
    """The reference: parts joined are torch's own attention, and who sees nothing reads zeros."""
    query, keys, values, _, _, scaling = stored(1, torch.float32, 77)
    g = torch.Generator().manual_seed(0)
    seen = torch.rand(*query.shape[:2], 77, generator=g) < 0.5
    seen[..., 0], seen[0, 0, :40] = True, False  # one part is nothing to one head
    want = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, seen[:, :, None], scale=scaling, enable_gqa=True
    )
    seen[-1, -1] = want[-1, -1] = False
    parts = [
        attend(query, keys[:, :, a:b], values[:, :, a:b], seen[..., a:b], scaling)
        for a, b in ((0, 30), (30, 31), (31, 77))
    ]
    torch.testing.assert_close(joined(parts), want)
    torch.testing.assert_close(joined([attend(query, keys, values, seen, scaling)]), want)


# Rows of experts


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(
    "counts, width, inner",
    [
        ([1], 8, 8), ([0, 3, 1, 0, 7], 40, 33), ([70, 0, 5], 17, 96), ([0, 0], 8, 24),
        ([16, 16, 16, 16], 64, 16), ([2, 70], 40, 72),
    ],
)  # fmt: skip
def test_groups_of_rows(device, counts, width, inner, dtype, close):
    """With a gate and without; rows may go on behind the groups, and are strided."""
    g = torch.Generator().manual_seed(4)
    x = normal(g, width, sum(counts) + 2, dtype=dtype).T
    experts, silu = len(counts), torch.nn.functional.silu
    up, gate = (normal(g, experts, inner, width, dtype=dtype) / width**0.5 for _ in range(2))
    down = normal(g, experts, inner, width, dtype=dtype).transpose(1, 2) / inner**0.5
    for own in (gate, None):
        given = own if own is None else own.to(device)
        moved = up.to(device), down.to(device)
        found = dispatch.grouped_ffn(x.to(device), counts, given, *moved, silu, least=4)
        want = dispatch._grouped_ffn(x, counts, own, up, down, silu, least=4)
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu(), want, rtol=close, atol=close)


# The engine


@pytest.mark.parametrize(
    "family, spec",
    [
        ("llava", "visionzip:keep=4+fastv:layer=2:keep=0.5"),
        ("llava", "snapkv:budget=12:window=4"),
        ("qwen2_5_vl", "fastv:layer=1:keep=0.5:positions=original"),
        ("llava", "adakv:budget=0.5:window=2"),
        ("llava", "kivi:bits=4:group_size=4:residual=4"),
    ],
)
@torch.no_grad()
def test_a_model(family, spec):
    """A patched model's prefill and decode, with kernels wherever the engine asks for one."""
    pytest.importorskip("triton", minversion="3.7.1")
    if why := kernels._triton_obstacle(True):
        pytest.skip(why)
    net, inputs = model(family), collate(family, samples(family))
    options = {
        "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip
    with mllm.patch(net, spec) as patched:
        want = net.generate(**inputs, **options)
        ledger = patched.ledger.as_dict()
        with kernels.use("interpreter"):
            found = net.generate(**inputs, **options)
        assert patched.ledger.as_dict() == ledger
    assert torch.equal(found.sequences, want.sequences)
    for i, (own, like) in enumerate(zip(found.logits, want.logits, strict=True)):
        equal(own, like, f"token {i}", 1e-5)


KIVI = "kivi:bits=4:group_size=4:residual=4"


@pytest.mark.parametrize(
    "family, attn, spec, storage",
    [
        ("llava", "sdpa", "adakv:budget=0.5:window=2", Packed),
        ("qwen2_5_vl", "sdpa", KIVI, Quantised),
        ("llava", "sdpa", f"adakv:budget=0.6:window=2+{KIVI}", Quantised),
        ("gemma3", "sdpa", KIVI, Quantised),
        ("llava", "eager", KIVI, Quantised),
        ("llava", "sdpa", "snapkv:budget=4:window=2", None),  # a rectangle
        ("llava", "sdpa", "h2o:budget=0.5:window=2", None),  # read at every step
    ],
)
@torch.no_grad()
def test_steps_attend_to_storage_as_it_lies(family, attn, spec, storage, monkeypatch):
    """Decode steps over ragged and quantised layers, as with a kernel that then cannot run.

    What is left of the kernels' way is the engine's: which layers go it, the mask, parts joined.
    Eager attention, which may be asked for its weights, does not go it.
    """
    said, asked = set(), []
    monkeypatch.setattr(kernels, "_say", lambda name, why: said.add(name))
    attends = SlotLayer.attend

    def asking(layer, *given):
        asked.append(layer)
        return attends(layer, *given)

    monkeypatch.setattr(SlotLayer, "attend", asking)
    net, inputs = model(family, attn), collate(family, samples(family))
    options = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip
    with mllm.patch(net, spec):
        want = net.generate(**inputs, **options)
        assert not asked
        with kernels.use("triton"):
            found = net.generate(**inputs, **options)
    held = {type(s) for layer in found.past_key_values.layers for s in layer.segments}
    assert storage is None or storage in held
    assert bool(asked) == (storage is not None and attn == "sdpa")
    assert not any(layer.window for layer in asked)
    assert torch.equal(found.sequences, want.sequences)
    for i, (own, like) in enumerate(zip(found.logits, want.logits, strict=True)):
        equal(own, like, f"token {i}", 1e-5)
    if asked:
        assert {s.kernel for layer in asked for s in layer.segments if hasattr(s, "kernel")} <= said


# Who runs


def reference(x, parts=()):
    return x + 1


@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_torch_by_default(mode, monkeypatch):
    """No kernel is validated on a GPU, so none is even looked at."""
    monkeypatch.setattr(kernels, "_obstacle", lambda *_: pytest.fail("looked at a kernel"))
    with kernels.use(mode):
        assert kernels.run("row_scores", reference, torch.zeros(1)) == 1


@torch.no_grad()
def test_choosing_cuts_no_graph():
    """`torch.compile` traces through the dispatcher while no mode is asked for."""

    def rows(x, at):
        return tokens.gather_rows(x, at) + 1

    x, at = torch.arange(12.0).view(1, 4, 3), torch.tensor([[3, 1]])
    compiled = torch.compile(rows, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, at), rows(x, at))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mode, grad, words", [("triton", False, "one cuda device"), ("interpreter", True, "gradients")]
)
def test_what_kernels_cannot_do_stays_in_torch(mode, grad, words, caplog):
    kernels._say.cache_clear()
    x = torch.zeros(2, requires_grad=grad)
    with kernels.use(mode):
        for _ in range(2):
            found = kernels.run("compact", reference, x, parts=[(x, 0)])
    assert found.tolist() == [1, 1] and found.requires_grad == grad
    (line,) = caplog.messages
    assert line.startswith("compact runs in torch") and words in line


def test_unsupported_arguments_stay_in_torch(caplog):
    pytest.importorskip("triton", minversion="3.7.1")
    if why := kernels._triton_obstacle(True):
        pytest.skip(why)
    kernels._say.cache_clear()
    q, k, at = drawn(1, 1, 2, 1, 3, 3, 512)
    with kernels.use("interpreter"):
        found = attention.row_scores(q, k, at, None, None)
        attention.row_scores(q, k, at, None, None)
    assert torch.equal(found, attention.row_attention(q, k, at, None, None).mean(1))
    assert [m for m in caplog.messages if "512 channels" in m] == caplog.messages
    assert len(caplog.messages) == 1


def test_what_decode_kernels_refuse(caplog):
    """Head sizes, dtypes and strides; each is logged once, and the result is the reference's."""
    pytest.importorskip("triton", minversion="3.7.1")
    if why := kernels._triton_obstacle(True):
        pytest.skip(why)
    kernels._say.cache_clear()

    def check(segment, query):
        with kernels.use("interpreter"):
            for _ in range(2):
                found = segment.attend(query, None, None)
        want = attend(query, segment.keys(), segment.values(), None, None)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    g, there = torch.Generator().manual_seed(0), torch.ones(1, 1, 3, dtype=torch.bool)
    for width, dtype in ((512, torch.float32), (16, torch.float64)):
        x, query = normal(g, 1, 1, 3, width, dtype=dtype), normal(g, 1, 2, 1, width, dtype=dtype)
        check(Packed.of(x, x, there), query)
        check(Quantised.of(x, x, there, 4, 4, 4), query)
    x, query = normal(g, 1, 1, 3, 16), normal(g, 1, 2, 1, 16)
    plain = Quantised.of(x, x, there, 16, 4, 4)
    strided = Plain(plain._keys.codes.T.contiguous().T)
    check(Quantised(strided, plain._values, plain.shape), query)
    steps = replace(plain._values, step=plain._values.step.repeat_interleave(2, 1)[:, ::2])
    check(Quantised(plain._keys, steps, plain.shape), query)
    weights = torch.ones(1, 2, 4), torch.ones(1, 4, 2)
    with kernels.use("interpreter"), torch.autocast("cpu", torch.bfloat16):
        dispatch.grouped_ffn(torch.ones(3, 4), [3], None, *weights, torch.relu)
    words = ["512 channels", "512 channels", "float64", "float64", "stride", "stride", "autocast"]
    assert len(caplog.messages) == len(words)
    assert all(w in m for w, m in zip(words, caplog.messages, strict=True))


@pytest.mark.parametrize("name", ["row_scores", "ragged_decode", "quantised_decode"])
def test_more_programs_than_a_launch_takes_stay_in_torch(name):
    """CUDA launches 65,535 along the axis of samples and heads."""
    pytest.importorskip("triton", minversion="3.7.1")
    module = importlib.import_module(f"mllm.kernels.{name}")
    for batch, refused in ((2**13 - 1, False), (2**13, True)):
        q = torch.empty(1, 8, 1, 16).expand(batch, -1, -1, -1)
        there = torch.ones(1, 8, 1, dtype=torch.bool).expand(batch, -1, -1)
        rows = Plain(torch.empty(1, 16))
        given = {
            "row_scores": (q, q, torch.zeros(batch, 1).long(), None, None),
            "ragged_decode": (q, rows.codes, rows.codes, there.int(), None, None),
            "quantised_decode": (q, rows, rows, tuple(there.shape), there.int(), None, None),
        }  # fmt: skip
        why = module.unsupported(*given[name])
        assert (why is not None) == refused and (why is None or "65535 in all" in why)


def test_tensors_within_what_is_stored_have_to_be_on_the_device(caplog):
    """Codes and bounds come in objects of the cache."""
    kernels._say.cache_clear()
    side = Plain(torch.empty(2, 16, device="meta"))
    with kernels.use("interpreter"):
        assert kernels.run("quantised_decode", lambda *_: 1, torch.zeros(1), side) == 1
    (line,) = caplog.messages
    assert "not all on one cpu device" in line


def test_kernels_run_with_the_tensors_gpu_as_the_current_one(monkeypatch):
    """Triton launches there, and a model may be on another, or on several."""
    pytest.importorskip("triton", minversion="3.7.1")
    if why := kernels._triton_obstacle(True):
        pytest.skip(why)
    assert kernels._current(torch.device("cuda:1")).idx == 1
    done = []

    @contextlib.contextmanager
    def current(device):
        done.append(device.type)
        yield
        done.append("left")

    monkeypatch.setattr(kernels, "_current", current)
    module = importlib.import_module("mllm.kernels.scatter_back")
    monkeypatch.setattr(module, "scatter_back", lambda *_: done.append("ran"))
    with kernels.use("interpreter"):
        tokens.scatter_back(torch.zeros(1, 1, 1), torch.zeros(1, 1).long(), 2)
    assert done == ["cpu", "ran", "left"]


def test_gradients_with_kernels_asked_for():
    x = torch.zeros(1, 3, 2, requires_grad=True)
    with kernels.use("triton"):
        tokens.gather_rows(x, torch.tensor([[2, 0]])).sum().backward()
    assert x.grad[0].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_another_mode():
    with pytest.raises(MllmError, match="'cuda'.*") as error, kernels.use("cuda"):
        pass
    assert "interpreter" in error.value.expected


COMPILES = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, mangle_type

def types(value):
    return tuple(map(types, value)) if isinstance(value, tuple) else mangle_type(value)

def compiled(self, *args, grid, warmup, **kwargs):
    given = self.signature.bind(*args, **kwargs).arguments
    constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
    signature = {
        p.name: "constexpr" if p.is_constexpr else types(given[p.name]) for p in self.params
    }
    source = triton.compiler.ASTSource(self, signature, constants)
    for capability, room in ((80, 163), (90, 227)):  # KiB of shared memory that a block may have
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.metadata.shared <= room * 1024, (self.__name__, capability, made.metadata)
    print(self.__name__, flush=True)

JITFunction.run = compiled
sys.path.insert(0, "tests")
import test_kernels
test_kernels.launch_all()
"""


def launch_all():
    """One launch of every kernel, in half precision, past the dispatcher."""
    from mllm.kernels import compact, grouped_ffn, ragged_decode, row_scores, scatter_back
    from mllm.kernels import quantised_decode as quantised

    half = torch.float16
    q, k, at = drawn(1, 2, 4, 1, 8, 8, 128, half)
    row_scores.row_scores(q, k, at, None, None)
    row_scores.row_scores(q.bfloat16(), k.bfloat16(), at, masked("added", q, k), None, heads="max")
    row_scores.row_scores(q.float(), k.float(), at, masked("keys", q, k), None, heads="none")
    x = torch.zeros(1, 8, 64, dtype=half)
    compact.compact(at, [(x, 1), (at.expand(3, 1, -1), 2), (x[..., :32], 1)])
    scatter_back.scatter_back(x[:, :1], at, 8, at > 0)
    there = torch.ones(1, 2, 8, dtype=torch.bool)
    every = there.repeat_interleave(4, 1)
    for dtype, width, seen in (
        (half, 128, every), (torch.bfloat16, 128, None), (torch.float32, 256, every),
    ):  # fmt: skip
        own, keys = (t.to(dtype).repeat(1, 1, 1, width // 128) for t in (q, k))
        p = Packed.of(keys, keys, there)
        ragged_decode.ragged_decode(
            own[:, :, :1], p.buffer.keys, p.buffer.values, p.place, seen, None
        )
        for bits, kept in (((2, 4), there), ((16, 8), there.clone().fill_(False))):
            kept[..., 0] = True
            s = Quantised.of(keys, keys, kept, *bits, 32)
            given = s._keys, s._values, s.shape, s.place
            quantised.quantised_decode(own[:, :, :1], *given, seen, None)
    w = torch.zeros(2, 64, 64, dtype=half)
    grouped_ffn.grouped_ffn(x[0], [3, 5], w, w, w, torch.relu)


@pytest.mark.slow
def test_kernels_compile(tmp_path):
    """Without a GPU, for capability 8.0 and 9.0. It says nothing about their results."""
    pytest.importorskip("triton", minversion="3.7.1")
    root = Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", COMPILES], cwd=root, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == {
        "_softmax", "_weights", "_gather", "_scatter", "_ragged", "_quantised", "_join",
        "_grouped_linear",
    }  # fmt: skip


def test_importing_is_light():
    """Triton is imported when a kernel runs, not before."""
    code = "import mllm.kernels, mllm.tokens, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
