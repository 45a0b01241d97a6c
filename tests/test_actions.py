"""Every action of in-LLM methods against a decoder written out by hand with the same edit."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import tiny
import torch
from acting import acting
from families import LAYERS, Sample, collate, model, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm import changes, rows
from mllm.compressors import FastV, Stride
from mllm.compressors.base import (
    BranchGate,
    BranchRows,
    Evict,
    HeadGate,
    Hidden,
    Inject,
    Insert,
    Keep,
    LogitBias,
    Merge,
    Positions,
    Protect,
    TokenReducer,
    Write,
    merge_rows,
)
from mllm.errors import PlanError
from mllm.in_llm import DecoderRun
from mllm.plan import MethodInfo

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]
LAYOUTS = [("alone", "left"), ("padded", "left"), ("padded", "right")]
HEADS = 4


def ordinal(mask: torch.Tensor) -> torch.Tensor:
    """The place of every row among the rows of a mask, -1 for others."""
    return torch.where(mask, mask.long().cumsum(-1) - 1, -1)


def every(n: int, rest: int = 0):
    """Every n-th visual token, by its ordinal."""
    return lambda x: (x >= 0) & (x % n == rest)


# Pairs of a stage and what it means, by name. The stage sees a batch, the edits one sample.


def gate(branch: str, scale: float):
    stage = acting([1], lambda ctx: [BranchGate(2, branch, scale)], "BranchGate")
    return stage, lambda s: Edits(scale={(2, branch): scale})


def gate_per_sample(branch: str):
    """The scale of a sample is the number of its visual tokens, small."""

    def act(ctx):
        return [BranchGate(2, branch, ctx.visual.sum(1).float() / 20)]

    return acting([1], act, "BranchGate"), lambda s: Edits(
        scale={(2, branch): float(s.visual.sum()) / 20}
    )


def gate_per_row(branch: str):
    def act(ctx):
        scale = torch.ones(ctx.visual.shape).masked_fill(every(3)(ordinal(ctx.visual)), 0.25)
        return [BranchGate(2, branch, scale), BranchGate(3, branch, scale)]

    def edits(s):
        scale = torch.ones(len(s.ids)).masked_fill(every(3)(ordinal(s.visual)), 0.25)
        return Edits(scale={(2, branch): scale, (3, branch): scale})

    return acting([1], act, "BranchGate"), edits


def rows_of(*branches: str, layers=(1, 2)):
    """Every third visual token, and all text, takes part."""

    def act(ctx):
        rows = ~ctx.visual | every(3)(ordinal(ctx.visual))
        return [BranchRows(i, b, rows) for i in layers for b in branches]

    def edits(s):
        rows = ~s.visual | every(3)(ordinal(s.visual))
        return Edits(take={(i, b): rows for i in layers for b in branches})

    return acting([1], act, "BranchRows"), edits


def heads(kind: str):
    g = torch.tensor([1.5, 0.0, 0.5, -1.0])

    def act(ctx):
        if kind == "heads":
            return [HeadGate(1, g)]
        if kind == "sample":
            return [HeadGate(1, g * ctx.images[:, None])]
        some = every(2)(ordinal(ctx.visual))
        return [HeadGate(1, torch.where(some[..., None], g, torch.ones(HEADS)))]

    def edits(s):
        if kind == "heads":
            return Edits(heads={1: g})
        if kind == "sample":
            return Edits(heads={1: g * len(s.pictures)})
        some = every(2)(ordinal(s.visual))
        return Edits(heads={1: torch.where(some[:, None], g, torch.ones(HEADS))})

    return acting([1], act, "HeadGate"), edits


def bias():
    """Further back counts less, by head; and one token in seven is hidden from later ones."""
    slope = torch.tensor([0.0, 0.1, 0.3, 1.0])

    def fn(rows, cols):
        distance = (rows[..., :, None] - cols[..., None, :]).abs()
        hidden = (cols % 7 == 3)[..., None, :] & (distance > 0)
        x = -slope[:, None, None] * distance[..., None, :, :]
        return x.masked_fill(hidden[..., None, :, :], float("-inf"))

    def act(ctx):
        first = (ctx.logical * ctx.prompt).where(ctx.prompt, 10**6).amin(1, keepdim=True)
        return [LogitBias(2, lambda q, k: fn(q - first, k - first))]

    def edits(s):
        return Edits(bias={2: lambda n: fn(torch.arange(n), torch.arange(n))})

    return acting([1], act, "LogitBias"), edits


def inject():
    """Something of the row itself, at every second visual token, before two layers."""
    width = 48
    vector = torch.linspace(-1, 1, width)

    def values(x):
        return (x[..., None] + 1).float() * vector

    def act(ctx):
        x = ordinal(ctx.visual)
        return [Inject(i, every(2)(x), values(x)) for i in (1, 3)]

    def edits(s):
        x = ordinal(s.visual)
        add = values(x) * every(2)(x)[:, None]
        return Edits(add={1: add, 3: add})

    return acting([0], act, "Inject"), edits


def drop_all():
    """VTW: no visual token from layer 2 on."""
    stage = acting([2], lambda ctx: [Keep(torch.zeros_like(ctx.visual))], "Keep")
    return stage, lambda s: Edits(drop={2: s.visual})


def two_cuts():
    """One stage, several cuts."""

    def act(ctx):
        return [Keep(every(ctx.layer + 1)(ordinal(ctx.visual)))]

    def edits(s):
        first = every(2)(ordinal(s.visual))
        second = every(4)(ordinal(first))
        return Edits(drop={1: s.visual & ~first, 3: s.visual & ~second})

    return acting([1, 3], act, "Keep"), edits


def merge():
    """Every odd visual token goes into the one before it; hidden states are averaged."""

    def pairs(visual):
        own = torch.arange(visual.shape[-1]).expand(visual.shape)
        odd = every(2, 1)(ordinal(visual))
        previous = torch.where(visual, own, -1).cummax(-1).values.roll(1, -1)
        return torch.where(odd, previous, own), odd

    def act(ctx):
        into, odd = pairs(ctx.visual)
        return [
            Keep(~odd), Merge(into), Write(merge_rows(ctx["hidden"], into, ctx.size)),
        ]  # fmt: skip

    def edits(s):
        into, odd = pairs(s.visual)

        def write(h):
            out = h.clone()
            for row in odd.nonzero()[:, 0].tolist():
                out[into[row]] = (h[row] + h[into[row]]) / 2
            return out

        return Edits(drop={2: odd}, write={2: write})

    return acting([2], act, "Keep", "Merge", "Write", hidden=Hidden()), edits


def write_text():
    """LLaVA-Mini: one visual token is left, and text rows are written too."""

    def act(ctx):
        x = ctx["hidden"]
        first = every(1000)(ordinal(ctx.visual))
        rows = first | ctx.text
        return [Keep(first), Write(2 * x + 0.1, rows=rows)]

    def edits(s):
        first = every(1000)(ordinal(s.visual))

        def write(h):
            rows = torch.cat([first | ~s.visual, torch.zeros(len(h) - len(s.ids)).bool()])
            return torch.where(rows[:, None], 2 * h + 0.1, h)

        return Edits(drop={0: s.visual & ~first}, write={0: write})

    return acting([0], act, "Keep", "Write", hidden=Hidden()), edits


def insert(layer: int, last: bool):
    """Two rows behind the last visual token, or behind the prompt; text-only samples get none."""
    vectors = torch.stack([torch.linspace(-2, 2, 48), torch.linspace(3, -1, 48)])

    def act(ctx):
        rows = ctx.prompt if last else ctx.visual
        at = torch.where(rows, torch.arange(rows.shape[1]), -1).amax(1)
        at = torch.where(ctx.images > 0, at, -1)
        return [Keep(every(2)(ordinal(ctx.visual))), Insert(vectors, at)]

    def edits(s):
        keep = every(2)(ordinal(s.visual))
        if not s.pictures:
            return Edits()
        at = len(s.ids) - 1 if last else int(s.visual.nonzero().max())
        return Edits(drop={layer: s.visual & ~keep}, insert={layer: (at, vectors)})

    return acting([layer], act, "Keep", "Insert"), edits


def evict(at: int):
    """Later tokens do not see every second visual token in some layers, earlier ones too."""

    def act(ctx):
        return [Evict([0, 1, 3], every(2)(ordinal(ctx.visual)))]

    def edits(s):
        rows = every(2)(ordinal(s.visual))
        return Edits(forget={0: rows, 1: rows, 3: rows})

    return acting([at], act, "Evict"), edits


def mod():
    """p-MoD: one call gives everything that a router decides for a layer."""
    direction = torch.linspace(-1, 1, 48)

    def weight(x):
        return 1 + 0.2 * torch.tanh(x @ direction)

    def act(ctx):
        x = ctx["hidden"]
        w = weight(x)
        kept = ctx.visual & (w > 1)
        skipped = ctx.visual & ~kept
        run_ = ~skipped
        return [
            BranchRows(ctx.layer, "attn", run_),
            BranchRows(ctx.layer, "mlp", run_),
            BranchGate(ctx.layer, "mlp", torch.where(kept, w, 1.0)),
            Inject(ctx.layer, skipped, (w[..., None] - 1) * x),
        ]

    return acting(
        [1, 2], act, "BranchRows", "BranchGate", "Inject", hidden=Hidden()
    ), mod_edits(weight)


def mod_edits(weight):
    def edits(s, family):
        edit = Edits()
        for layer in (1, 2):
            x = run(family, s, edit).hidden[layer]
            w = weight(x)
            kept = s.visual & (w > 1)
            skipped = s.visual & ~kept
            edit.take[layer, "attn"] = edit.take[layer, "mlp"] = ~skipped
            edit.scale[layer, "mlp"] = torch.where(kept, w, 1.0)
            edit.add[layer] = torch.where(skipped[:, None], (w[:, None] - 1) * x, 0)
        return edit

    edits.per_family = True
    return edits


CASES = {
    "gate attn 0.5": lambda: gate("attn", 0.5),
    "gate mlp -0.5": lambda: gate("mlp", -0.5),
    "no attn": lambda: gate("attn", 0.0),
    "no mlp": lambda: gate("mlp", 0.0),
    "gate attn per sample": lambda: gate_per_sample("attn"),
    "gate mlp per sample": lambda: gate_per_sample("mlp"),
    "gate attn per row": lambda: gate_per_row("attn"),
    "gate mlp per row": lambda: gate_per_row("mlp"),
    "rows attn": lambda: rows_of("attn"),
    "rows mlp": lambda: rows_of("mlp"),
    "rows both": lambda: rows_of("attn", "mlp"),
    "heads": lambda: heads("heads"),
    "heads per sample": lambda: heads("sample"),
    "heads per row": lambda: heads("row"),
    "bias": bias,
    "inject": inject,
    "drop all": drop_all,
    "two cuts": two_cuts,
    "merge": merge,
    "write text": write_text,
    "insert": lambda: insert(2, False),
    "insert at 0": lambda: insert(0, False),
    "insert at the end": lambda: insert(1, True),
    "evict before": lambda: evict(2),
    "evict behind": lambda: evict(LAYERS),
    "mixture of depths": mod,
}


def edits_of(case, family: str, sample: Sample) -> Edits:
    """The edits of a case; samples without images are left alone."""
    make = CASES[case]()[1]
    if not sample.pictures:
        return Edits()
    return make(sample, family) if getattr(make, "per_family", False) else make(sample)


def check_logits(case: str, family: str, attn: str, kind: str, side: str) -> None:
    batch = samples(family, kind)
    inputs = collate(family, batch, side)
    net = model(family, attn)
    with mllm.patch(net, CASES[case]()[0]), torch.no_grad():
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    for b, sample in enumerate(batch):
        want = run(family, sample, edits_of(case, family, sample))
        equal(logits[b][want.alive], want.logits[want.alive], f"sample {b}")
        assert not logits[b][~want.alive].any()


def check_generate(case: str, family: str, attn: str, kind: str, steps: int = 6) -> None:
    batch = samples(family, kind)
    inputs = collate(family, batch)
    net = model(family, attn)
    with mllm.patch(net, CASES[case]()[0]), torch.no_grad():
        out = net.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(out.logits, 1)
    for b, sample in enumerate(batch):
        more = out.sequences[b, -steps:]
        want = run(family, sample, edits_of(case, family, sample), more)
        equal(logits[b], want.logits[len(sample.ids) - 1 : -1], f"sample {b}")


def pairs(*axes):
    """All cases; most combinations of the other axes are slow, every pair of values stays."""
    rows = []
    for c, case in enumerate(CASES):
        for f, family in enumerate(FAMILIES):
            for a, attn in enumerate(["sdpa", "eager"]):
                for x, axis in enumerate(axes):
                    fast = (c + f + a) % 2 == 0 and (c + f) % len(axes) == x
                    marks = [] if fast else [pytest.mark.slow]
                    name = f"{case}-{family}-{attn}-{axis}"
                    rows.append(pytest.param(case, family, attn, axis, id=name, marks=marks))
    return rows


@pytest.mark.parametrize("case, family, attn, layout", pairs(*LAYOUTS))
def test_prompt(case, family, attn, layout):
    check_logits(case, family, attn, *layout)


@pytest.mark.parametrize("case, family, attn, kind", pairs("alone", "padded"))
def test_generation(case, family, attn, kind):
    """Decode steps too: what is said per row is over, what is said per sample goes on."""
    check_generate(case, family, attn, kind)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_action_shows(case):
    """The comparison with the oracle means something: the action moves later logits."""
    for family in FAMILIES:
        inputs = collate(family, samples(family, "alone"))
        net = model(family)
        options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
                       output_logits=True)  # fmt: skip
        plain = net.generate(**inputs, **options).logits[1]
        with mllm.patch(net, CASES[case]()[0]):
            assert (net.generate(**inputs, **options).logits[1] - plain).abs().max() > 1e-3


def neutral(ctx):
    """Everything that can be said without changing anything."""
    batch, rows = ctx.visual.shape
    own = torch.arange(rows).expand(batch, rows)
    yes = torch.ones_like(ctx.visual)
    return [
        Keep(yes), Protect(~yes), Merge(own), Write(ctx["hidden"]), Evict([0, 2], ~yes),
        BranchGate(2, "attn", 1.0), BranchGate(2, "mlp", torch.ones(batch)),
        BranchGate(3, "attn", torch.ones(batch, rows)), BranchRows(2, "attn", yes),
        BranchRows(3, "mlp", yes), HeadGate(2, torch.ones(HEADS)),
        HeadGate(3, torch.ones(batch, rows, HEADS)), Inject(3, ~yes, ctx["hidden"]),
    ]  # fmt: skip


@pytest.mark.parametrize("kind, side", LAYOUTS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_said_is_nothing_changed(family, attn, kind, side):
    """Bit-equal, decode steps included (nobody generates from prompts padded on the right)."""
    stage = acting(
        [1], neutral, "Keep", "Protect", "Merge", "Write", "Evict", "BranchGate", "BranchRows",
        "HeadGate", "Inject", hidden=Hidden(),
    )  # fmt: skip
    inputs = collate(family, samples(family, kind), side)
    real = inputs["attention_mask"].bool()
    net = model(family, attn)
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                   output_logits=True)  # fmt: skip
    plain, answer = net(**inputs).logits[real], net.generate(**inputs, **options)
    with mllm.patch(net, stage):
        assert torch.equal(net(**inputs).logits[real], plain)
        mine = net.generate(**inputs, **options)
    if side == "left":
        assert all(torch.equal(a, b) for a, b in zip(mine.logits, answer.logits, strict=True))
    assert torch.equal(net(**inputs).logits[real], plain), "removed without a trace"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_protected_rows_stay(family):
    """Against a cut that drops everything, a budget, and an eviction; they count in a budget."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)

    def chosen(s):
        return every(5)(ordinal(s.visual))

    protect = acting([1], lambda ctx: [Protect(every(5)(ordinal(ctx.visual)))], "Protect")
    drop = acting([2], lambda ctx: [Keep(torch.zeros_like(ctx.visual))], "Keep")
    with mllm.patch(net, [protect, drop]) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept(3)
    for b, s in enumerate(batch):
        assert kept[b].tolist() == list(range(0, int(s.visual.sum()), 5))
        want = run(family, s, Edits(drop={2: s.visual & ~chosen(s)}))
        equal(logits[b][want.alive], want.logits[want.alive], f"sample {b}")
    with mllm.patch(net, [protect, FastV(layer=3, keep=0.5)]) as patched:
        net(**inputs)
        kept = patched.ledger.kept(3)
    for b, s in enumerate(batch):
        count = int(s.visual.sum())
        assert len(kept[b]) == round(count / 2)
        assert set(range(0, count, 5)) <= set(kept[b].tolist())
    gone = acting([3], lambda ctx: [Evict([2], ctx.visual)], "Evict")
    with mllm.patch(net, [protect, gone]):
        out = net(**inputs)
    stored = out.past_key_values.layers[2].table.valid.sum(1).tolist()
    assert stored == [int((~s.visual | chosen(s)).sum()) for s in batch]


@torch.no_grad()
def test_protected_before_the_llm():
    """A pre-LLM method protects rows from a cut inside the LLM."""

    @dataclass
    class Guard(TokenReducer):
        positions: Positions | None = None
        info = MethodInfo("guard", "pre_llm")
        actions = ("Protect",)

        def reduce(self, ctx):
            rows = torch.zeros_like(ctx.valid)
            rows[:, [1, 6]] = True
            return [Protect(rows)]

    batch = samples("llava")
    net = model("llava")
    drop = acting([2], lambda ctx: [Keep(torch.zeros_like(ctx.visual))], "Keep")
    with mllm.patch(net, [Guard(), drop]) as patched:
        net(**collate("llava", batch))
        assert [k.tolist() for k in patched.ledger.kept(2)] == [[1, 6], [1, 6, 17, 22], []]


@pytest.mark.parametrize("case", ["rows both", "gate mlp per row", "evict before", "insert"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_behind_a_reducer(family, case):
    """Rows that left before the LLM: actions speak of those that are there."""
    batch = samples(family)
    inputs = collate(family, batch)
    net = model(family)
    stage, edits = CASES[case]()
    plan = [Stride(keep=0.5, positions="original"), stage]
    with mllm.patch(net, plan) as patched:
        out = net.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        kept = patched.ledger.kept("llm")
    for b, s in enumerate(batch):
        there = torch.zeros_like(s.visual)
        there[s.visual.nonzero()[kept[b], 0]] = True
        edit = edits(Sample(s.ids.where(there | ~s.visual, 1), s.pictures))
        edit.drop[0] = s.visual & ~there
        want = run(family, s, edit, out.sequences[b, -4:])
        logits = torch.stack([x[b] for x in out.logits])
        equal(logits, want.logits[len(s.ids) - 1 : -1], f"sample {b}")


@pytest.mark.parametrize("case", ["rows attn", "rows mlp", "rows both", "no attn", "no mlp"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_left_out_is_not_computed(family, case):
    """The ledger books the branches that ran, and torch counts as many FLOPs."""
    inputs = collate(family, samples(family, "alone"))
    net = model(family, "eager")
    with mllm.patch(net, CASES[case]()[0]) as patched, FlopCounterMode(display=False) as counter:
        net(**inputs)
    data, counted = patched.ledger.as_dict(), counter.get_total_flops()
    assert abs(data["prefill_flops"][0] - counted) <= 0.01 * counted
    assert data["prefill_flops"][0] < 0.99 * data["baseline_prefill_flops"][0]


@torch.no_grad()
def test_what_takes_no_part_is_not_stored():
    batch = samples("llava")
    for case, layer in (("rows attn", 1), ("no attn", 2), ("evict before", 3)):
        net = model("llava")
        with mllm.patch(net, CASES[case]()[0]) as patched:
            cache = net(**collate("llava", batch)).past_key_values
            data = patched.ledger.as_dict()
        stored = cache.layers[layer].keys.shape[2]
        left = [(s.visual.sum() + 2) // 3 if case == "rows attn" else s.visual.sum() // 2
                for s in batch]  # fmt: skip
        text = [(~s.visual).sum() for s in batch]
        most = max(int(a + b) for a, b in zip(left, text, strict=True))
        # The sample without images is left alone.
        assert stored == (len(batch[2].ids) if case == "no attn" else most)
        assert cache.get_seq_length(layer) == max(len(s.ids) for s in batch)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for x in cache.layers for segment in x.segments for t in segment.tensors()
        }  # fmt: skip
        assert data["kv_bytes"] == sum(held.values())
        assert data["kv_bytes"] <= sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@pytest.mark.parametrize("case", ["gate attn 0.5", "no mlp", "heads", "bias", "evict before",
                                  "rows attn", "insert", "insert at 0"])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams(family, case):
    """Batched beams equal those of each sample alone."""
    batch = samples(family)
    net = model(family)
    options = dict(max_new_tokens=5, num_beams=2, do_sample=False, length_penalty=0.0)
    if "mm_encoder_outputs" not in inspect.signature(net.forward).parameters:
        pytest.skip("this transformers repeats the images of a batch in another order")
    with mllm.patch(net, CASES[case]()[0]):
        together = net.generate(**collate(family, batch), **options)[:, -5:]
        for b, s in enumerate(batch):
            alone = net.generate(**collate(family, [s]), **options)[0, -5:]
            assert torch.equal(together[b], alone)


@pytest.mark.parametrize("case", ["gate mlp -0.5", "no attn", "heads", "rows both", "evict before",
                                  "insert", "inject", "two cuts"])  # fmt: skip
@torch.no_grad()
def test_a_second_turn_in_text(case):
    """What is said per sample holds for the conversation; the cache is the memory."""
    family = "llava"
    (s,) = samples(family, "alone")
    more = torch.tensor([20, 21, 22, 23])
    net = model(family)
    with mllm.patch(net, CASES[case]()[0]):
        first = net(**collate(family, [s]))
        out = net(input_ids=more[None], past_key_values=first.past_key_values)
    want = run(family, s, edits_of(case, family, s), more)
    equal(out.logits[0], want.logits[-4:], "second turn")


@torch.no_grad()
def test_a_second_image_asks_again():
    """A later prefill replaces what its stage had said for the conversation."""
    family, said = "llava", iter([0.5, 2.0])
    stage = acting([1], lambda ctx: [BranchGate(2, "mlp", next(said))], "BranchGate")
    one, two = samples(family, "alone")[0], samples(family, "alone", seed=5)[0]
    net = model(family)
    with mllm.patch(net, stage):
        cache = net(**collate(family, [one])).past_key_values
        inputs = collate(family, [two])
        inputs["attention_mask"] = torch.ones(1, len(one.ids) + len(two.ids))
        logits = net(**inputs, past_key_values=cache).logits[0]
        answer = net(input_ids=torch.tensor([[30]]), past_key_values=cache).logits[0]
    both = Sample(torch.cat([one.ids, two.ids]), [*one.pictures, *two.pictures])
    scale = torch.cat([torch.full((len(one.ids),), 0.5), torch.full((len(two.ids),), 2.0)])
    want = run(family, both, Edits(scale={(2, "mlp"): scale})).logits
    equal(logits, want[len(one.ids) :], "second image")
    last = Sample(torch.cat([both.ids, torch.tensor([30])]), both.pictures)
    scale = torch.cat([scale, torch.tensor([2.0])])
    equal(answer, run(family, last, Edits(scale={(2, "mlp"): scale})).logits[-1:], "answer")


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_gradients(family, reentrant):
    """A gate that is learnt: loss and gradients are those of the loop, checkpointing or not."""
    batch = samples(family)
    inputs = collate(family, batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model(family).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    direction = (torch.linspace(-1, 1, 48) * 0.1).requires_grad_()
    asked = []

    def act(ctx):
        asked.append(ctx.layer)
        weight = 1 + torch.tanh(ctx["hidden"].float() @ direction)
        rows = ~ctx.visual | every(3)(ordinal(ctx.visual))
        return [
            BranchGate(2, "mlp", torch.where(ctx.visual, weight, 1.0)),
            BranchRows(2, "attn", rows), BranchRows(3, "mlp", rows),
            Keep(every(2)(ordinal(ctx.visual))), HeadGate(3, torch.tensor([1.0, 2.0, 0.5, 0.0])),
        ]  # fmt: skip

    stage = acting(
        [2], act, "BranchGate", "BranchRows", "Keep", "HeadGate", differentiable=True,
        hidden=Hidden(),
    )  # fmt: skip
    with mllm.patch(net, stage):
        loss = net(**inputs, labels=labels).loss
        loss.backward()
    assert asked == [2], "nothing is selected again"
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    want, learnt = _by_hand(family, batch, direction.detach())
    equal(loss, want, "loss", 1e-5)
    equal(direction.grad, learnt, "gradient of the gate", 1e-4 * max(1, float(learnt.abs().max())))
    if reentrant is not None:
        plain = model(family).train()
        direction.grad = None
        with mllm.patch(plain, stage):
            plain(**inputs, labels=labels).loss.backward()
        for name, p in plain.named_parameters():
            if name in grads:
                equal(grads[name], p.grad, name, 1e-5 * max(1, float(p.grad.abs().max())))


def _by_hand(family, batch, direction):
    """Loss and gradient of the gate by the loop."""
    direction = direction.clone().requires_grad_()
    losses = []
    with torch.enable_grad():
        for s in batch:
            keep = every(2)(ordinal(s.visual))
            rows = ~s.visual | every(3)(ordinal(s.visual))
            x = run(family, s).hidden[2]
            weight = torch.where(s.visual, 1 + torch.tanh(x @ direction), 1.0)
            edits = Edits(
                drop={2: s.visual & ~keep}, scale={(2, "mlp"): weight},
                take={(2, "attn"): rows, (3, "mlp"): rows},
                heads={3: torch.tensor([1.0, 2.0, 0.5, 0.0])},
            ) if s.pictures else Edits()  # fmt: skip
            logits = run_with_gradients(family, s, edits).logits
            losses.append(
                torch.nn.functional.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none")
            )
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), direction.grad


@pytest.mark.parametrize("action", ["LogitBias", "Insert"])
def test_flash_cannot_bias(action):
    net = model("llava")
    net.model.language_model.config._attn_implementation = "flash_attention_2"
    stage = acting([1], lambda ctx: [], action)
    with pytest.raises(PlanError, match="additive mask") as caught:
        mllm.patch(net, stage, unvalidated=True)
    assert caught.value.argument == "attn_implementation"


def test_what_is_refused():
    net = model("llava")
    inputs = collate("llava", samples("llava", "alone"))
    with mllm.patch(net, acting([1], lambda ctx: [BranchGate(1, "mlp", 0.5)], "Keep")):
        with pytest.raises(PlanError, match="does not list it") as caught:
            net(**inputs)
    assert caught.value.given == "BranchGate" and caught.value.expected == "Keep"
    writers = [acting([2], lambda ctx: [], "Write", name=name) for name in ("a", "b")]
    with pytest.raises(PlanError, match="a and b both write"):
        mllm.patch(net, writers)
    for layer, actions in ((LAYERS, ["Keep"]), (LAYERS + 1, ["Evict"]), (-1, ["BranchGate"])):
        with pytest.raises(PlanError) as caught:
            mllm.patch(net, acting([layer], lambda ctx: [], *actions))
        assert caught.value.argument == "layer"
    qwen = model("qwen3_vl")
    with pytest.raises(PlanError, match="still adds features"):
        mllm.patch(qwen, acting([1], lambda ctx: [], "Keep"))
    mllm.patch(qwen, acting([1], lambda ctx: [], "BranchRows")).remove()


def test_reentrant_checkpointing():
    """What is not learnt runs under it; a learnt gate would get no gradient, and is refused."""
    batch = samples("llava")
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    direction = torch.ones(48, requires_grad=True)

    def act(ctx):
        weight = 1 + torch.tanh(ctx["hidden"] @ direction)
        return [BranchGate(2, "mlp", weight), BranchRows(3, "attn", ~ctx.visual)]

    losses = []
    for reentrant in (None, True):
        net = model("llava").train()
        if reentrant:
            net.gradient_checkpointing_enable({"use_reentrant": True})
        fixed = acting([2], act, "BranchGate", "BranchRows", hidden=Hidden())
        with mllm.patch(net, fixed):
            loss = net(**inputs, labels=labels).loss
            loss.backward()
            losses.append((loss, net.model.language_model.layers[1].mlp.up_proj.weight.grad))
    for mine, plain in zip(*losses, strict=True):
        equal(mine, plain, "loss and gradient", 1e-4)
    learnt = acting([2], act, "BranchGate", "BranchRows", hidden=Hidden(), differentiable=True)
    with mllm.patch(net, learnt), pytest.raises(PlanError, match="reentrant") as caught:
        net(**inputs, labels=labels)
    assert caught.value.argument == "use_reentrant"


# What goes wrong in such engines


def said_per_sample_is_forgotten(mp):
    """The gate holds in prefill only."""
    mp.setattr(changes, "_lasts", lambda action: False)


def everybody_is_gated(mp):
    """Samples without images depend on who shares their batch."""
    mp.setattr(DecoderRun, "pictured", None)


def rows_of_the_act(mp):
    """Values per row are read at the rows of now, though some of those of then have left."""

    def bring(self, x, then, new):
        return x[:, : self.run.table.valid.shape[1]]

    mp.setattr(changes.Changes, "_bring", bring)


def attention_of_everybody(mp):
    """Rows that take no part are still keys."""

    def narrow(self, inside, keep, hidden, kwargs):
        inside.rows.pop("attn"), inside.meant.pop("attn")

    mp.setattr(changes.Changes, "_narrow", narrow)


def narrow_positions(mp):
    """Rows that take part are numbered from zero."""
    original = changes.Changes._narrow

    def narrow(self, inside, *args):
        original(self, inside, *args)
        cos, sin = inside.given["position_embeddings"]
        whole = self.run.patched.family.rotary(
            cos, torch.arange(cos.shape[1])[None], ""
        )
        inside.given["position_embeddings"] = whole

    mp.setattr(changes.Changes, "_narrow", narrow)


def fillers_write(mp):
    """What fills the rectangle up adds to the residual."""
    original = changes.Inside.leave

    def leave(self, branch, output):
        self.meant = {k: torch.ones_like(v) for k, v in self.meant.items()}
        return original(self, branch, output)

    mp.setattr(changes.Inside, "leave", leave)


def bias_by_slot(mp):
    """The bias is told of slots instead of tokens."""
    original = changes.Inside.mask

    def mask(self, query, key, given):
        if self.keys is not None:
            self.keys = torch.arange(self.keys.shape[1]).expand_as(self.keys)
        return original(self, query, key, given)

    mp.setattr(changes.Inside, "mask", mask)


def only_layers_to_come(mp):
    """Layers that have run keep what was evicted."""
    original = changes.Changes._let_go

    def let_go(self, action, layer, table):
        if self.run.reached == LAYERS:
            original(self, action, layer, table)

    mp.setattr(changes.Changes, "_let_go", let_go)


def inserted_without_a_place(mp):
    """Inserted rows stand at the end."""
    mp.setattr(rows, "locate", lambda rows, among, size: rows * 0 - 2)


MUTATIONS = [
    (said_per_sample_is_forgotten, "gate attn 0.5", "generate"),
    (said_per_sample_is_forgotten, "no mlp", "generate"),
    (said_per_sample_is_forgotten, "heads", "generate"),
    (said_per_sample_is_forgotten, "bias", "generate"),
    (everybody_is_gated, "gate mlp -0.5", "logits"),
    (everybody_is_gated, "no attn", "logits"),
    (attention_of_everybody, "rows attn", "logits"),
    (narrow_positions, "rows attn", "logits"),
    (only_layers_to_come, "evict before", "generate"),
    (inserted_without_a_place, "insert", "logits"),
]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mutate, case, check", MUTATIONS,
                         ids=[f"{m.__name__}-{c}" for m, c, _ in MUTATIONS])  # fmt: skip
def test_a_broken_engine_is_caught(monkeypatch, mutate, case, check, attn):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        if check == "logits":
            check_logits(case, "llava", attn, "padded", "left")
        else:
            check_generate(case, "llava", attn, "padded")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_and_slots_are_not_confused(monkeypatch, attn):
    """A bias, and values per row, behind a cut: slots are no tokens, rows of then not of now."""
    stage, edits = bias()
    per_row, row_edits = gate_per_row("mlp")
    plan = [per_row, acting([2], lambda ctx: [Keep(every(2)(ordinal(ctx.visual)))], "Keep"), stage]
    batch = samples("llava")
    inputs = collate("llava", batch)

    def compare():
        net = model("llava", attn)
        with mllm.patch(net, plan), torch.no_grad():
            logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        for b, s in enumerate(batch):
            edit = Edits()
            if s.pictures:
                edit = edits(s)
                edit.scale = row_edits(s).scale
                edit.drop[2] = s.visual & ~every(2)(ordinal(s.visual))
            want = run("llava", s, edit)
            equal(logits[b][want.alive], want.logits[want.alive], f"sample {b}")

    compare()
    for mutate in (bias_by_slot, rows_of_the_act):
        with monkeypatch.context() as patch:
            mutate(patch)
            with pytest.raises(AssertionError):
                compare()


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_one_length_and_unequal_rows(monkeypatch, family):
    """Rows that take no part fill the rectangle up, and are masked and thrown away."""
    batch = [samples(family, "alone", seed=seed)[0] for seed in (1, 5)]
    inputs = collate(family, batch)

    def act(ctx):
        rows = ~ctx.visual | torch.tensor([[True], [False]])
        return [BranchRows(i, b, rows) for i in (1, 2) for b in ("attn", "mlp")]

    def compare():
        net = model(family)
        with mllm.patch(net, acting([1], act, "BranchRows")), torch.no_grad():
            logits = net(**inputs).logits
        take = {(i, b): ~batch[1].visual for i in (1, 2) for b in ("attn", "mlp")}
        for s, mine, edit in zip(batch, logits, (Edits(), Edits(take=take)), strict=True):
            equal(mine, run(family, s, edit).logits, "logits")

    compare()
    fillers_write(monkeypatch)
    with pytest.raises(AssertionError):
        compare()


OTHERS = ["qwen2_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm"]


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("write text", "insert at 0")])
def test_other_families(family, case):
    """No cut below the layers to which Qwen3-VL still adds features."""
    if family == "qwen3_vl" and case in ("two cuts", "insert at the end"):
        pytest.skip("rows cannot leave there")
    check_logits(case, family, "sdpa", "padded", "left")
    check_generate(case, family, "eager", "padded")


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_nothing_said_on_other_families(family):
    """Separators and added features stay where they are."""
    stage = acting(
        [2], neutral, "Keep", "Protect", "Merge", "Write", "Evict", "BranchGate", "BranchRows",
        "HeadGate", "Inject", hidden=Hidden(),
    )  # fmt: skip
    inputs = collate(family, samples(family))
    real = inputs["attention_mask"].bool()
    net = model(family)
    plain = net(**inputs).logits[real]
    answer = net.generate(**inputs, max_new_tokens=4, do_sample=False)
    with mllm.patch(net, stage):
        assert torch.equal(net(**inputs).logits[real], plain)
        assert torch.equal(net.generate(**inputs, max_new_tokens=4, do_sample=False), answer)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_that_let_go(family, attn):
    """Later tokens see other tokens by head; the layer's other heads keep all."""
    batch = samples(family)
    inputs = collate(family, batch)
    stage = acting([3], lambda ctx: [Evict([1, 3], every(2)(ordinal(ctx.visual)), [1])], "Evict")

    def bias(s):
        """Query heads 2 and 3 share KV head 1."""

        def hidden(n):
            gone = torch.zeros(n, dtype=torch.bool)
            gone[: len(s.ids)] = every(2)(ordinal(s.visual))
            later = torch.arange(n) >= len(s.ids)
            x = torch.zeros(HEADS, n, n)
            x[2:, later[:, None] & gone[None]] = float("-inf")
            return x

        return hidden

    net = model(family, attn)
    with mllm.patch(net, stage):
        out = net.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    for b, s in enumerate(batch):
        edits = Edits(bias={1: bias(s), 3: bias(s)}) if s.pictures else Edits()
        want = run(family, s, edits, out.sequences[b, -5:]).logits[len(s.ids) - 1 : -1]
        equal(torch.stack([x[b] for x in out.logits]), want, f"sample {b}")


@torch.no_grad()
def test_a_bias_needs_one_set_of_tokens():
    def act(ctx):
        gone = every(2)(ordinal(ctx.visual))
        return [
            Evict([1], gone, [0]), LogitBias(1, lambda q, k: torch.zeros(1, 1, 1, 1))
        ]  # fmt: skip

    net = model("llava")
    inputs = collate("llava", samples("llava", "alone"))
    with mllm.patch(net, acting([1], act, "Evict", "LogitBias")):
        with pytest.raises(PlanError, match="heads of layer 1") as caught:
            net.generate(**inputs, max_new_tokens=3)
    assert caught.value.argument == "heads"


@pytest.mark.parametrize("case", ["gate mlp -0.5", "heads", "bias", "rows both", "insert",
                                  "insert at the end", "evict before", "two cuts"])  # fmt: skip
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_assisted_decoding(family, case):
    """Candidates are verified under what holds for the conversation: greedy answers."""
    inputs = collate(family, samples(family, "alone"))
    net = model(family)
    options = dict(max_new_tokens=10, do_sample=False)
    with mllm.patch(net, CASES[case]()[0]):
        greedy = net.generate(**inputs, **options)
        assert torch.equal(net.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gate mlp per row", "rows both", "heads", "bias", "no attn"])
@torch.no_grad()
def test_compiled_layers(case):
    """Regional compile: what works inside of a layer breaks its graph, and stays right."""
    torch._dynamo.reset()
    batch = samples("llava")
    inputs = collate("llava", batch)
    net = model("llava")
    for layer in net.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")
    with mllm.patch(net, CASES[case]()[0]):
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    for b, s in enumerate(batch):
        want = run("llava", s, edits_of(case, "llava", s))
        equal(logits[b][want.alive], want.logits[want.alive], f"sample {b}")
