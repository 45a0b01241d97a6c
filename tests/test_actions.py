"""Every action of in-LLM methods against a decoder written out by hand with the same edit."""

from __future__ import annotations

import pytest
import tiny
import torch
from acting import acting
from families import LAYERS, Sample, collate, model, samples
from layer_oracle import Edits, run
from matrix import equal

import mllm
from mllm.compressors.base import (
    BranchGate,
    BranchRows,
    Evict,
    HeadGate,
    Inject,
    Insert,
    Keep,
    LogitBias,
    Merge,
    Write,
    merge_rows,
)

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

    from mllm.compressors.base import Hidden

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

    from mllm.compressors.base import Hidden

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
        [1, 2], act, "BranchRows", "BranchGate", "Inject", hidden=_hidden()
    ), mod_edits(weight)


def _hidden():
    from mllm.compressors.base import Hidden

    return Hidden()


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
    """The edits of a case; samples without images are left alone, as no stage acts there."""
    make = CASES[case]()[1]
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
