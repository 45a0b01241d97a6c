"""Steps that let one token go for a new one: in place, and as exact as any other eviction."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from cache_oracles import Heavy, Oracle, Sinks
from kv_oracles import loops
from matrix import equal
from test_cache import DIM, HEADS, Naive, check, feed, toy
from test_kv import around, generate, running
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mllm
from mllm.cache import Dense, KVCache, Offloaded, Packed, load_prefix, save_prefix
from mllm.compressors.kv_base import best
from mllm.errors import CacheMismatchError
from mllm.plan import Plan

ONE = torch.ones(2, 1, dtype=torch.bool)


def held(slots: int = 20, headwise: bool = True):
    """A cache of two samples whose heads hold `slots` tokens each, out of order."""
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 2 * slots, DIM), torch.ones(2, 2 * slots).bool())
    kv.evict(drop=torch.arange(slots).expand(2, HEADS, -1) if headwise else ONE.long().expand(2, 1))
    step(cache, kv)
    return cache, kv


def step(cache, kv: KVCache, at: int = 3) -> None:
    """A token comes, and what is stored in column `at` of every head of every sample goes."""
    feed(cache, *torch.randn(2, 2, HEADS, 1, DIM), ONE)
    for i in range(kv.depth):
        kv.evict(i, drop=kv.view(i).logical[..., [at]])


class Copied(TorchDispatchMode):
    """Counts the numbers of keys and values that are written; they alone are DIM wide."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ in ("copy_", "index_put_"):
            written = given[-1]
        else:
            written = out
        places = {x.untyped_storage().data_ptr() for x in given if x is not written}
        if isinstance(written, Tensor) and written.shape[-1:] == (DIM,):
            view = written is out and written.untyped_storage().data_ptr() in places
            self.numbers += 0 if view else written.numel()
        return out


def test_a_step_writes_one_token():
    """Not what stays: a compaction would write 20 tokens here."""
    cache, kv = held()
    where = [layer.keys.data_ptr() for layer in cache.layers]
    token = kv.depth * 2 * 2 * HEADS * DIM  # keys and values of all layers and samples
    for at in (0, 7, 19, 20, 3):  # 20 is the new one itself
        new = torch.randn(2, 2, HEADS, 1, DIM)
        drop = [torch.cat([kv.view(i).logical, torch.full((2, HEADS, 1), kv.length)], 2)[..., [at]]
                for i in range(kv.depth)]  # fmt: skip
        with Copied() as copied:
            feed(cache, *new, ONE)
            feeding = copied.numbers
            for i in range(kv.depth):
                kv.evict(i, drop=drop[i])
        # `feed` of the tests makes two tensors of its own for each layer.
        assert copied.numbers - feeding <= 2 * token and feeding <= 2 * token
        assert [layer.slots for layer in cache.layers] == [20, 20]
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        assert all(isinstance(layer.segments[0], Dense) for layer in cache.layers)
        assert not cache.layers[0].table.padded


@pytest.mark.parametrize(
    "spec", ["streamingllm:budget=10:sinks=2", "h2o:budget=0.4", "h2o:budget=12:heads=shared",
             "snapkv:budget=12:window=4:hold=true"],
)  # fmt: skip
@torch.no_grad()
def test_answers_copy_nothing(spec, monkeypatch):
    """However long they are, in a padded batch too; and heads keep exactly the budget."""
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", (((0,), 40), ((0,), 34))))
    taken = []
    around(monkeypatch, Dense, "take", lambda f, self, *a: taken.append(self) or f(self, *a))
    with mllm.patch(model, spec) as patched:
        generate(model, inputs, 1)
        prompt = len(taken)
        out = generate(model, inputs, 30)
        assert prompt == 4 and len(taken) == 2 * prompt, "layers, once for each prompt"
        kv = patched.kv(out.past_key_values)
    assert not any(layer.table.ordered for layer in out.past_key_values.layers)
    stage, lengths = Plan.from_spec(spec).stages[0], inputs["attention_mask"].sum(1).tolist()
    for i in range(kv.depth):
        for b, tokens in enumerate(lengths):
            share = stage.budget
            limit = share if isinstance(share, int) else round(share * tokens)
            assert kv.view(i).valid[b].sum(-1).tolist() == [limit] * 2


@torch.no_grad()
def test_a_budget_that_is_never_reached_copies_nothing(monkeypatch):
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "alone"))
    with mllm.patch(model, "h2o:budget=900"):
        cache = model(**inputs, use_cache=True).past_key_values
        monkeypatch.setattr(Dense, "take", None)
        for token in (5, 6, 7):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    assert cache.layers[0].slots == cache.get_seq_length()


# Against naive lists


def scenario(seed: int) -> None:
    """Held steps, and everything else between them."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    batch = 1 + draw(2)
    (cache, kv), naive, saved = toy(batch), Naive(batch), []

    def more(new: int, valid: Tensor) -> None:
        keys, values = torch.randn(2, len(naive.cells), HEADS, new, DIM, generator=g)
        feed(cache, keys, values, valid)
        naive.append(keys, values, valid)

    more(12, torch.arange(12) >= torch.tensor([[0], [draw(3)]])[:batch])
    for _ in range(24):
        batch, what = len(naive.cells), draw(12)
        if what <= 6:
            more(1, torch.ones(batch, 1, dtype=torch.bool))
            if draw(2):  # of all heads together, now and then of none
                named = [s[0][draw(len(s[0]))][0] if s[0] and draw(8) else -1 for s in naive.cells]
                drop = torch.tensor(named)[:, None]
                kv.evict(drop=drop)
                naive.filter(lambda b, h, t, drop=drop: t != drop[b, 0])
            else:
                drop = torch.tensor([[[c[draw(len(c))][0]] if c else [-1] for c in s]
                                     for s in naive.cells])  # fmt: skip
                kv.evict(drop=drop)
                naive.filter(lambda b, h, t, drop=drop: t != drop[b, h, 0])
        elif what == 7:
            more(3, torch.ones(batch, 3, dtype=torch.bool))
        elif what == 8:
            left = max(1, naive.seen - draw(4))
            kv.crop(left)
            naive.filter(lambda b, h, t, left=left: t < left)
            naive.seen = left
        elif what == 9:
            index = torch.randint(0, batch, (1 + draw(3),), generator=g)
            [kv.select, kv.reorder][draw(2)](index)
            naive.take(index.tolist())
            saved = []
        elif what == 10:
            keep = torch.rand(batch, naive.seen, generator=g) < 0.9
            kv.evict(keep=keep)
            naive.filter(lambda b, h, t, keep=keep: keep[b, t])
        elif saved and draw(2):
            at = draw(len(saved))
            kv.rollback(saved[at][0])
            naive = copy.deepcopy(saved[at][1])
        else:
            saved.append((kv.snapshot(), copy.deepcopy(naive)))
        check(kv, naive)
    kv.settle()
    check(kv, naive)
    for i in range(kv.depth):
        view = kv.view(i, contents=False)
        for names, there in zip(view.logical.flatten(0, 1), view.valid.flatten(0, 1), strict=True):
            assert (names[there].diff() > 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_held_steps_against_lists(seed):
    scenario(seed)


def test_a_gap_filled_wrongly_is_caught(monkeypatch):
    """And so is one that a snapshot still holds."""
    with monkeypatch.context() as broken:
        around(broken, Dense, "close", lambda f, self, gap: f(self, (gap + 1) % self.slots))
        with pytest.raises(AssertionError):
            for seed in range(10):
                scenario(seed)
    monkeypatch.setattr(Dense, "writable", True)
    with pytest.raises(AssertionError):
        for seed in range(40):
            scenario(seed)


# What needs the order, or has storage that must stay as it is


def test_what_needs_the_order_of_tokens_gets_it():
    cache, kv = held()
    assert not cache.layers[0].table.ordered
    kv.offload(0, leave=3)
    assert [type(s) for s in cache.layers[0].segments] == [Offloaded, Dense]
    assert kv.view(0).logical[0, 0, -3:].tolist() == [kv.length - 3, kv.length - 2, kv.length - 1]
    names = kv.view(1).logical
    assert (names.diff(dim=-1) < 0).any()
    kv.settle(1)
    assert torch.equal(kv.view(1).logical, names.sort(-1).values)
    keys = cache.layers[1].keys
    kv.settle(1)
    assert cache.layers[1].keys.data_ptr() == keys.data_ptr(), "in order already"


def test_unequal_samples_become_packed_all_the_same():
    """One sample keeps one token less at every step: gaps are no way to hold on to memory."""
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 24, DIM), torch.ones(2, 24).bool())
    for i in range(12):
        feed(cache, *torch.randn(2, 2, HEADS, 1, DIM), ONE)
        kv.evict(drop=torch.tensor([[2 * i, 2 * i + 1], [-1, -1]]))
        valid = kv.view(0).valid
        empty = 1 - valid.float().mean().item()
        assert isinstance(cache.layers[0].segments[0], Packed) == (empty > 1 / 8)
    assert valid.sum(-1).tolist() == [[12] * HEADS, [36] * HEADS]


def test_storage_of_inference_mode_and_of_gradients_is_not_written():
    with torch.inference_mode():
        cache, kv = toy(2)
        feed(cache, *torch.randn(2, 2, HEADS, 12, DIM), torch.ones(2, 12).bool())
        kv.evict(drop=torch.tensor([[1], [2]]))
        step(cache, kv)
    step(cache, kv)
    step(cache, kv)
    assert kv.view(0).valid.all() and cache.layers[0].slots == 11
    cache, kv = toy(2)
    keys = torch.randn(2, HEADS, 6, DIM, requires_grad=True)
    feed(cache, keys, keys, torch.ones(2, 6).bool())
    feed(cache, keys[:, :, :1], keys[:, :, :1], ONE)
    loss = cache.layers[0].keys.square().sum()
    kv.evict(drop=torch.tensor([[1], [2]]))
    loss.backward()
    assert torch.equal(keys.grad[:, :, 1:], 2 * keys.detach()[:, :, 1:])


# The model against one that keeps everything and masks what has left

QUESTION, LATER = [11, 23, 31, 42], [9, 8, 7]
PLANS = {
    "sinks": lambda: [Sinks()], "heavy": lambda: [Heavy()],
    "h2o": lambda: Plan.from_spec("h2o:budget=0.4").stages,
    "shared": lambda: Plan.from_spec("h2o:budget=12:window=3:heads=shared").stages,
    "streamingllm": lambda: Plan.from_spec("streamingllm:budget=10:sinks=2").stages,
}  # fmt: skip


WAYS = ["turn", "crop", "file", "rollback", "copies"]


# What `Sinks` remembers does not follow into another batch.
@pytest.mark.parametrize(
    "name, way", [(n, w) for n in PLANS for w in WAYS if (n, w) != ("sinks", "copies")]
)
@torch.no_grad()
def test_what_follows_held_steps(name, way, tmp_path):
    """Eight steps; then a turn of four tokens at once, behind whatever happens between them."""
    (sample,) = families.samples("llava", "alone")
    inputs, model, answers = families.collate("llava", [sample]), families.model("llava"), []
    methods = PLANS[name]()
    several = name in ("sinks", "heavy")  # these decide alike in a prompt and in a step

    def tokens(net, cache, ids, rows=1):
        return net(input_ids=torch.tensor([ids] * rows), past_key_values=cache).logits

    with mllm.patch(model, methods) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        for token in range(20, 28):
            answers.append(tokens(model, cache, [token])[0])
        kv, rows = patched.kv(cache), 1
        assert not any(layer.table.ordered for layer in cache.layers)
        if way == "crop":
            kv.crop(kv.length - 3)
        elif way == "file":
            cache = load_prefix(save_prefix(cache, tmp_path), patched)
        elif way == "rollback":
            start = kv.snapshot()
            for token in range(30, 35):
                tokens(model, cache, [token])
            kv.rollback(start)
        elif way == "copies":
            kv.repeat(2)
            kv.reorder(torch.tensor([1, 0, 1]))
            rows = 3
        answers.append(tokens(model, cache, QUESTION, rows)[-1])
        if several:
            answers += [tokens(model, cache, [token], rows)[-1] for token in LATER]
    oracle = Oracle("llava", methods if several else [loops(methods[0])])
    oracle.visual = sample.visual.tolist()
    wants = []
    with running(oracle):
        cache = oracle.model(**inputs, use_cache=True).past_key_values
        for token in range(20, 28):
            wants.append(tokens(oracle.model, cache, [token])[0])
        if way == "crop":
            cache.crop(-3)
            oracle.length -= 3
            oracle.gone = {i: gone[:, : oracle.length] for i, gone in oracle.gone.items()}
            for total in oracle.heavy.values():
                for t in range(oracle.length, oracle.length + 3):
                    total.pop(t, None)
        if not several:
            oracle.methods = []
        wants.append(tokens(oracle.model, cache, QUESTION)[0])
        if several:
            wants += [tokens(oracle.model, cache, [token])[0] for token in LATER]
    for at, (mine, want) in enumerate(zip(answers, wants, strict=True)):
        equal(mine, want, f"{name}, {way}, forward {at}", 1e-5 * max(1.0, float(want.std())))


# Choosing


@pytest.mark.parametrize("ties", [False, True])
def test_the_one_that_leaves_is_the_worst_and_latest(ties):
    """With and without names, against sorting; a row may keep everything."""
    g = torch.Generator().manual_seed(3)
    score = torch.rand(3, 4, 9, generator=g)
    score = (score * 3).floor() if ties else score
    among = torch.rand(3, 4, 9, generator=g) < 0.8
    name = torch.rand(3, 4, 9, generator=g).argsort(-1)
    for less in (0, 1, 3):
        count = among.sum(-1) - torch.randint(less + 1, (3, 4), generator=g).clamp(max=less)
        for given in (None, name):
            mine = best(score, among, count, given)
            for b in range(3):
                for h in range(4):
                    key = range(9) if given is None else name[b, h].tolist()
                    there = among[b, h].nonzero()[:, 0].tolist()
                    order = sorted(there, key=lambda i: (-score[b, h, i], key[i]))
                    want = sorted(order[: max(0, count[b, h])])
                    assert mine[b, h].nonzero()[:, 0].tolist() == want


def test_slots_can_be_named_as_they_are_shown():
    """`retain` is `evict` without names, and leaves candidates alone."""
    cache, kv = held()
    other = copy.deepcopy(cache)
    keep = torch.rand(2, HEADS, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    kv.retain(0, keep)
    view = KVCache(other, kv._family).view(0)
    KVCache(other, kv._family).evict(0, keep=torch.where(keep, view.logical, -1))
    mine, want = cache.layers[0], other.layers[0]
    assert torch.equal(mine.table.logical, want.table.logical) and torch.equal(mine.keys, want.keys)
    feed(cache, *torch.randn(2, 2, HEADS, 2, DIM), torch.ones(2, 2).bool())
    certain = KVCache(cache, kv._family, length=kv.length - 2)
    names = certain.view(1).logical
    certain.retain(1, torch.arange(20).expand(2, -1) > 0)
    assert kv.view(1).logical.shape[2] == 21
    stored = kv.view(1).logical.sort(-1).values
    assert torch.equal(stored[..., :-2], names[..., 1:].sort(-1).values)
    for bad in (keep, torch.ones(2, 20).bool(), torch.ones(2, 3, 23).bool()):
        with pytest.raises(CacheMismatchError) as caught:
            kv.retain(0, bad)
        assert caught.value.argument == "keep"
