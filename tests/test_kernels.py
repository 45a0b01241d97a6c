"""Kernels against their references: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import collate, model, samples
from matrix import equal

import mllm
from mllm import attention, kernels, tokens
from mllm.errors import MllmError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["interpreter", pytest.param("triton", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where tensors have to be so that kernels run; falling back to torch is an error."""
    pytest.importorskip("triton", minversion="3.7.1")  # older interpreters break with numpy 2.4
    interpreter = request.param == "interpreter"
    if not interpreter and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if why := kernels._triton_obstacle(interpreter):
        pytest.skip(why)

    def say(name, why):
        raise AssertionError(f"{name} runs in torch: {why}")

    monkeypatch.setattr(kernels, "_say", say)
    with kernels.use(request.param):
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
        (1, 1, 3, 2, 5, 1100, 256),  # several parts of the keys
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


# The engine


@pytest.mark.parametrize(
    "family, spec",
    [
        ("llava", "visionzip:keep=4+fastv:layer=2:keep=0.5"),
        ("llava", "snapkv:budget=12:window=4"),
        ("qwen2_5_vl", "fastv:layer=1:keep=0.5:positions=original"),
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


# Who runs


def reference(x, parts=()):
    return x + 1


@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_torch_by_default(mode, monkeypatch):
    """No kernel is validated on a GPU, so none is even looked at."""
    monkeypatch.setattr(kernels, "_obstacle", lambda *_: pytest.fail("looked at a kernel"))
    with kernels.use(mode):
        assert kernels.run("row_scores", reference, torch.zeros(1)) == 1


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
    for capability in (80, 90):
        triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(self.__name__, flush=True)

JITFunction.run = compiled
sys.path.insert(0, "tests")
import test_kernels
test_kernels.launch_all()
"""


def launch_all():
    """One launch of every kernel, in half precision, past the dispatcher."""
    from mllm.kernels import compact, row_scores, scatter_back

    half = torch.float16
    q, k, at = drawn(1, 2, 4, 1, 8, 8, 128, half)
    row_scores.row_scores(q, k, at, None, None)
    row_scores.row_scores(q.bfloat16(), k.bfloat16(), at, masked("added", q, k), None, heads="max")
    row_scores.row_scores(q.float(), k.float(), at, masked("keys", q, k), None, heads="none")
    x = torch.zeros(1, 8, 64, dtype=half)
    compact.compact(at, [(x, 1), (at.expand(3, 1, -1), 2), (x[..., :32], 1)])
    scatter_back.scatter_back(x[:, :1], at, 8, at > 0)


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
    assert set(run.stdout.split()) == {"_softmax", "_weights", "_gather", "_scatter"}


def test_importing_is_light():
    """Triton is imported when a kernel runs, not before."""
    code = "import mllm.kernels, mllm.tokens, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
