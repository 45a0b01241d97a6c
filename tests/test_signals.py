"""Every signal of in-LLM methods against a decoder written out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from acting import acting
from families import KITS, LAYERS, Sample, collate, model, samples
from layer_oracle import Edits, Seen, run
from matrix import equal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm import attention
from mllm.compressors.base import (
    AttentionRows,
    Budget,
    ColumnMass,
    Grid,
    Hidden,
    Keep,
    Keys,
    LayerSchedule,
    Positions,
    Queries,
    Rotary,
    TextEmbeds,
    Values,
)
from mllm.errors import PlanError
from mllm.plan import MethodInfo

FAMILIES = ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl"]
CUT, HERE = 2, 3
TOLERANCE = 2e-4


def question(s: Sample) -> list[int]:
    """Text behind the first visual token."""
    rows = s.visual.nonzero()[:, 0].tolist()
    return [i for i in range(len(s.ids)) if rows and i > rows[0] and not s.visual[i]]


def window(s: Sample) -> list[int]:
    return list(range(len(s.ids) - 4, len(s.ids)))


def third_visual(s: Sample) -> list[int]:
    """The third of those that the cut leaves."""
    return s.visual.nonzero()[:, 0].tolist()[4:5]


def pick_third(ctx) -> Tensor:
    return ctx.visual & (ctx.visual.long().cumsum(1) == 3)


def last(s: Sample) -> list[int]:
    return [len(s.ids) - 1]


HEADS = {"mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0), "max": lambda x: x.amax(0),
         "none": lambda x: x}  # fmt: skip


def rows_of(choose, heads="mean", layer=HERE - 1, of="weights"):
    def want(seen: Seen, s: Sample, alive: Tensor) -> Tensor:
        x = getattr(seen, of)[layer]
        x = x.softmax(-1) if of == "bare" else x
        return HEADS[heads](x)[..., choose(s), :][..., alive]

    return want


def mass(choose, heads="mean", visible=False, layer=HERE - 1):
    def want(seen: Seen, s: Sample, alive: Tensor) -> Tensor:
        chosen = [i for i in choose(s) if seen.alive[i] or layer < CUT]
        total = HEADS[heads](seen.weights[layer])[..., chosen, :].sum(-2)
        if visible:
            total = total / (seen.weights[layer][0, chosen] > 0).sum(0).clamp(min=1)
        return total[..., alive]

    return want


def everything(s: Sample) -> list[int]:
    return list(range(len(s.ids)))


def pictures(s: Sample) -> list[int]:
    return s.visual.nonzero()[:, 0].tolist()


def per_row(of: str, layer: int):
    return lambda seen, s, alive: getattr(seen, of)[layer][..., alive, :]


#: Signal, and what it is for one sample over the rows that are there.
SIGNALS = {
    "last": (AttentionRows(), rows_of(last)),
    "last of layer 0": (AttentionRows(layer=0), rows_of(last, layer=0)),
    "last max": (AttentionRows(heads="max"), rows_of(last, "max")),
    "last per head": (AttentionRows(heads="none"), rows_of(last, "none")),
    "text sum": (AttentionRows(rows="text", heads="sum"), rows_of(question, "sum")),
    "text per head": (AttentionRows(rows="text", heads="none"), rows_of(question, "none")),
    "window": (AttentionRows(rows="window", window=4), rows_of(window)),
    "function": (AttentionRows(rows=pick_third), rows_of(third_visual)),
    "logits": (AttentionRows(softmax=False, heads="none"), rows_of(last, "none", of="raw")),
    "before": (AttentionRows(when="before"), rows_of(last, layer=HERE)),
    "before, text": (AttentionRows(when="before", rows="text"), rows_of(question, layer=HERE)),
    "no rope": (AttentionRows(rope=False), rows_of(last, of="bare")),
    "no rope of layer 0": (AttentionRows(layer=0, rope=False), rows_of(last, layer=0, of="bare")),
    "no rope before": (
        AttentionRows(rope=False, when="before", heads="max"),
        rows_of(last, "max", layer=HERE, of="bare"),
    ),
    "no rope, logits": (
        AttentionRows(rope=False, softmax=False, heads="none"),
        lambda seen, s, alive: seen.bare[HERE - 1][:, last(s)][..., alive],
    ),
    "mass": (ColumnMass(), mass(everything)),
    "mass of layer 0": (ColumnMass(layer=0, heads="sum"), mass(everything, "sum", layer=0)),
    "mass per head": (ColumnMass(heads="none", rows="visual"), mass(pictures, "none")),
    "mass of visual, max": (ColumnMass(heads="max", rows="visual"), mass(pictures, "max")),
    "mass of text": (ColumnMass(rows="text"), mass(question)),
    "mass by who sees": (ColumnMass(visible=True), mass(everything, visible=True)),
    "keys": (Keys(), per_row("keys", HERE - 1)),
    "keys of layer 0": (Keys(layer=0), per_row("keys", 0)),
    "plain keys": (Keys(rope=False), per_row("plain_keys", HERE - 1)),
    "keys before": (Keys(when="before"), per_row("keys", HERE)),
    "plain keys before": (Keys(rope=False, when="before"), per_row("plain_keys", HERE)),
    "queries": (Queries(), per_row("queries", HERE - 1)),
    "plain queries before": (Queries(rope=False, when="before"), per_row("plain_queries", HERE)),
    "values": (Values(), per_row("values", HERE - 1)),
    "rotary": (Rotary(), per_row("rotary", HERE - 1)),
    "rotary of layer 0": (Rotary(layer=0), per_row("rotary", 0)),
    "hidden": (Hidden(), per_row("hidden", HERE)),
    "hidden of layer 0": (Hidden(layer=0), per_row("hidden", 0)),
    "hidden, normed": (Hidden(norm=True), per_row("normed", HERE)),
    "hidden at the attention": (Hidden(of="attn"), per_row("attn", HERE - 1)),
    "hidden at the MLP": (Hidden(layer=1, of="mlp"), per_row("mlp", 1)),
}


def half(mask: Tensor) -> Tensor:
    return mask & (mask.long().cumsum(-1) % 2 == 1)


def cut():
    return acting([CUT], lambda ctx: [Keep(half(ctx.visual))], "Keep")


def recorded(family, attn, kind, side, at=HERE, **signals):
    """What a stage reads behind a cut: (its context, sample, own row of each of its rows)."""
    batch, kept = samples(family, kind), []
    inputs = collate(family, batch, side)
    if not KITS[family].mrope:  # as generate() does; a bare forward counts the padding
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    net = model(family, attn)
    reader = acting([at], lambda ctx: kept.append(ctx) or [], **signals)
    with mllm.patch(net, [cut(), reader]), torch.no_grad():
        net(**inputs)
    return kept[0], batch, inputs["attention_mask"].bool()


@pytest.mark.parametrize("kind, side", [("alone", "left"), ("padded", "left"),
                                        ("padded", "right")])  # fmt: skip
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family",
    FAMILIES + [pytest.param(f, marks=pytest.mark.slow)
                for f in ("qwen2_vl", "internvl", "idefics3", "smolvlm")],
)  # fmt: skip
def test_signals(family, attn, kind, side):
    ctx, batch, real = recorded(
        family, attn, kind, side, **{name: signal for name, (signal, _) in SIGNALS.items()}
    )
    for b, sample in enumerate(batch):
        seen = run(family, sample, Edits(drop={CUT: sample.visual & ~half(sample.visual)}))
        alive = seen.alive.nonzero()[:, 0]
        rows = ctx.prompt[b].nonzero()[:, 0]
        first = int(real[b].int().argmax())
        assert (ctx.index[b, rows] - first).tolist() == alive.tolist()
        for name, (signal, want) in SIGNALS.items():
            theirs = want(seen, sample, alive)
            mine = ctx[name][b].index_select(
                -2 if isinstance(signal, Keys | Values | Hidden | Rotary) else -1, rows
            )
            if isinstance(signal, AttentionRows):
                count = theirs.shape[-2]
                assert not mine[..., count:, :].any(), "fillers are zero"
                mine = mine[..., :count, :]
                asked = ctx.queries(name)[b]
                assert (asked[count:] == -1).all()
                assert (ctx.index[b, asked[:count]] - first).tolist() == {
                    "last": last, "text": question, "window": window, pick_third: third_visual
                }[signal.rows](sample)  # fmt: skip
            hidden = theirs == float("-inf")
            assert torch.equal(mine == float("-inf"), hidden), name
            size = float(theirs[~hidden].abs().max()) if (~hidden).any() else 1.0
            equal(
                mine.masked_fill(hidden, 0), theirs.masked_fill(hidden, 0), name,
                TOLERANCE * max(1.0, size),
            )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_grid(family):
    ctx, batch, real = recorded(
        family, "sdpa", "padded", "left", question=TextEmbeds(), all=TextEmbeds("all"), grid=Grid()
    )
    net = model(family)
    for b, sample in enumerate(batch):
        first = int(real[b].int().argmax())
        text = [i for i in range(len(sample.ids)) if not sample.visual[i]]
        words = net.get_input_embeddings()(sample.ids)
        for name, rows in (("question", question(sample)), ("all", text)):
            got = ctx[name]
            assert got.valid[b].sum() == len(rows) and got.valid[b, : len(rows)].all()
            own = ctx.index[b, got.rows[b, : len(rows)]] - first
            assert own.tolist() == rows
            equal(got.embeds[b, : len(rows)], words[rows], name)
        assert ctx.text[b].sum() == len(text)
        assert ctx.images[b] == len(sample.pictures)
        assert ctx.entered[b] == sample.visual.sum()
        grid = ctx["grid"]
        places = [
            (i, r, c)
            for i, p in enumerate(sample.pictures)
            for r in range(p.grid[0])
            for c in range(p.grid[1])
        ]
        left = ctx.visual[b].nonzero()[:, 0].tolist()
        got = [(int(grid.image[b, t]), int(grid.row[b, t]), int(grid.col[b, t])) for t in left]
        assert got == places[::2]


@torch.no_grad()
def test_what_is_declared_is_what_is_read():
    inputs = collate("llava", samples("llava", "alone"))
    net = model("llava")
    with mllm.patch(net, acting([2], lambda ctx: ctx["keys"], hidden=Hidden())):
        with pytest.raises(PlanError, match="does not declare it") as caught:
            net(**inputs)
    assert caught.value.given == "keys" and caught.value.expected == "hidden"


@pytest.mark.parametrize(
    "signal",
    [AttentionRows(layer=2), AttentionRows(layer=3, when="before"), Keys(layer=3), Hidden(layer=3),
     Hidden(layer=2, of="mlp"), ColumnMass(layer=-1), Values(layer=LAYERS)],
)  # fmt: skip
def test_layers_that_have_not_run(signal):
    with pytest.raises(PlanError, match="cannot read") as caught:
        mllm.patch(model("llava"), acting([2], lambda ctx: [], name="x", x=signal))
    assert caught.value.argument == "layer" and caught.value.given == signal.layer


@torch.no_grad()
def test_a_method_remembers_within_one_forward():
    """State, and rows of an earlier layer brought to a later one."""
    inputs = collate("llava", samples("llava"))
    seen = []

    def act(ctx):
        if ctx.layer == 1:
            assert not ctx.state
            ctx.state["first"] = ctx.logical.float(), ctx.index
        else:
            seen.append(torch.equal(ctx.bring(*ctx.state["first"]), ctx.logical.float()))
        return []

    net = model("llava")
    with mllm.patch(net, [cut(), acting([1, 3], act)]):
        net(**inputs)
        net(**inputs)
    assert seen == [True, True]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reading_is_booked(family):
    """A call of its own, rows and column sums cost what torch counts."""
    inputs = collate(family, samples(family, "alone"))
    net = model(family, "eager")

    def count(**signals):
        stage = acting([2], lambda ctx: [], **signals)
        with mllm.patch(net, stage) as patched, FlopCounterMode(display=False) as counter:
            net(**inputs)
        return counter.get_total_flops(), patched.ledger.as_dict()

    plain, _ = count()
    for signal in (
        AttentionRows(when="before"), AttentionRows(when="before", rope=False),
        AttentionRows(rows="text"), ColumnMass(),
    ):  # fmt: skip
        counted, data = count(x=signal)
        booked = data["selection_flops"][0]
        assert booked > 0 and abs(booked - (counted - plain)) <= 0.01 * booked, signal
        assert abs(data["prefill_flops"][0] - counted) <= 0.01 * counted


@torch.no_grad()
def test_reading_changes_nothing():
    """Signals alone, a call before the layer included, leave the model bit-equal."""
    signals = {str(i): signal for i, (signal, _) in enumerate(SIGNALS.values())}
    for family in FAMILIES:
        inputs = collate(family, samples(family))
        real = inputs["attention_mask"].bool()
        for attn in ("sdpa", "eager"):
            net = model(family, attn)
            plain = net(**inputs).logits[real]
            answer = net.generate(**inputs, max_new_tokens=4, do_sample=False)
            with mllm.patch(net, acting([HERE], lambda ctx: [], **signals)):
                assert torch.equal(net(**inputs).logits[real], plain)
                mine = net.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert torch.equal(mine, answer)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_of_a_column_sum(monkeypatch, block):
    """The sum does not depend on how many queries are looked at together."""
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    rows = torch.tensor([[1, 4, 8, -1], [0, 2, 3, 5]])
    total, seen = attention.column_mass(q, k, rows, None, None, heads="max")
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 8**-0.5
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1).amax(1)
    want = torch.stack([weights[0, [1, 4, 8]].sum(0), weights[1, [0, 2, 3, 5]].sum(0)])
    equal(total, want, "mass", 1e-6)
    assert seen.tolist() == [
        [sum(j <= i for i in (1, 4, 8)) for j in range(9)],
        [sum(j <= i for i in (0, 2, 3, 5)) for j in range(9)],
    ]


@torch.no_grad()
def test_second_turn_reads_its_own_rows():
    """With stored tokens, columns are the rows of this forward, and rows attend to all."""
    from transformers import DynamicCache

    family = "llava"
    first, second = samples(family, "alone"), samples(family, "alone", seed=5)
    net, kept = model(family), []
    reader = acting(
        [2], lambda ctx: kept.append(ctx) or [],
        after=AttentionRows(), bare=AttentionRows(rope=False), keys=Keys(),
    )  # fmt: skip
    cache = DynamicCache(config=net.config.text_config)
    one, two = collate(family, first), collate(family, second)
    with mllm.patch(net, reader):
        net(**one, past_key_values=cache)
        two["attention_mask"] = torch.ones(1, one["input_ids"].shape[1] + two["input_ids"].shape[1])
        net(**two, past_key_values=cache)
    both = Sample(
        torch.cat([first[0].ids, second[0].ids]), [*first[0].pictures, *second[0].pictures]
    )
    seen, n = run(family, both), len(second[0].ids)
    equal(kept[1]["after"][0, 0], seen.weights[1].mean(0)[-1, -n:], "attention")
    equal(kept[1]["keys"][0], seen.keys[1][:, -n:], "keys")
    bare = seen.bare[1][:, -1, -n:].softmax(-1).mean(0)
    equal(kept[1]["bare"][0, 0], bare, "no rope, among the rows of this forward")



@dataclass
class Pyramid(LayerSchedule):
    """PyramidDrop, as short as it is."""

    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)
    positions: Positions | None = None

    paper_layers = (8, 16, 24)
    info = MethodInfo("pyramid", "llm", reference_layers=32)

    def reads(self):
        return {"rows": AttentionRows(when="before")}

    def score(self, ctx):
        return ctx["rows"][:, 0]


def test_schedule_from_the_card():
    """One stage, several layers, scaled from the paper's depth."""
    family = "llava"
    batch = samples(family)
    for attn in ("sdpa", "eager"):
        net = model(family, attn)
        with mllm.patch(net, Pyramid()) as patched, torch.no_grad():
            logits = net(**collate(family, batch)).logits
            real = collate(family, batch)["attention_mask"].bool()
            assert patched.plan.stages[0].layers == (1, 2, 3)
            assert "layers 8/16/24 of 32 scaled to 1/2/3 of 4" in patched.ledger.notes[0]
            counts = patched.ledger.as_dict()["layers"]
        assert [row["visual"] for row in counts] == [[16, 32, 0], [8, 16, 0], [4, 8, 0], [2, 4, 0]]
        for b, s in enumerate(batch):
            edits = Edits()
            for layer, left in ((1, 2), (2, 4), (3, 8)) if s.pictures else ():
                seen = run(family, s, edits)
                score = seen.weights[layer].mean(0)[-1]
                alive = [i for i in pictures(s) if layer == 1 or not edits.drop[layer - 1][i]]
                best = sorted(alive, key=lambda i: -float(score[i]))[: len(pictures(s)) // left]
                gone = s.visual.clone()
                gone[best] = False
                edits.drop[layer] = gone
            want = run(family, s, edits)
            equal(logits[b][real[b]][want.alive], want.logits[want.alive], f"sample {b}")
    with pytest.raises(PlanError, match="3 layers and 2 budgets"):
        Pyramid(keep=(0.5, 0.25))
    with pytest.raises(PlanError, match="rising"):
        Pyramid(layers=(3, 1, 2))
