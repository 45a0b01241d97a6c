"""The one matrix of plans, and the checks that every plan must pass.

The checks are plain functions, so that the mutation tests can run them on a broken engine.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import oracles
import pytest
import tiny
import torch
import zoo_oracles as cards
from oracles import Cut, Rows
from tiny import Sample
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import mllm

LAYERS, SIDE = 4, 4
#: Features are computed before prefill. Older versions do it in forward, and repeat the pictures
#: of a sample with several of them in the wrong order for beams and returned sequences.
PRECOMPUTED = "mm_encoder_outputs" in inspect.signature(
    LlavaForConditionalGeneration.forward
).parameters
REPEATABLE = "padded" if PRECOMPUTED else "single"
TOLERANCE = 1e-4
CLOSE_CALL = 1e-3


@dataclass(frozen=True)
class Case:
    """A plan and what it must equal.

    Attributes:
        spec: the plan.
        rows: builds the rows that enter the decoder from (model, sample, kept), where `kept` is
            what the engine says it kept; only choices that no formula fixes may use it.
        cuts: drops inside the decoder.
        placed: every row is where its source was, so rows of visual tokens compare too.
    """

    spec: str
    rows: Callable[[object, Sample, Tensor], Rows]
    cuts: Sequence[Cut] = ()
    placed: bool = True


def _plain(model, sample, kept):
    return oracles.plain(model, sample)


def _chosen(positions):
    return lambda model, sample, kept: oracles.dropped(model, sample, kept, positions)


def _divprune(keep, positions):
    def rows(model, sample, kept):
        chosen, at = [], 0
        for picture in sample.pixels:
            features = oracles.project(model, oracles.tower(model, picture).patches)
            chosen += [at + i for i in oracles.divprune(features, keep)]
            at += len(features)
        return oracles.dropped(model, sample, torch.tensor(chosen, dtype=torch.long), positions)

    return rows


def _cdpruner(keep, positions):
    def rows(model, sample, kept):
        chosen, at = [], 0
        words = model.model.language_model.embed_tokens(sample.ids)
        behind = ~sample.visual & (sample.visual.cumsum(0) > 0)
        for picture in sample.pixels:
            features = oracles.project(model, oracles.tower(model, picture).patches)
            chosen += [at + i for i in oracles.cdpruner(features, words[behind], keep)]
            at += len(features)
        return oracles.dropped(model, sample, torch.tensor(chosen, dtype=torch.long), positions)

    return rows


def _visionzip(keep, positions="compact", **options):
    def rows(model, sample, kept):
        blocks = [
            oracles.visionzip(model, p, keep, positions=positions, **options) for p in sample.pixels
        ]
        return oracles.rebuilt(model, sample, blocks, positions)

    return rows


def _pooled(reference, small, positions):
    def rows(model, sample, kept):
        n = SIDE * SIDE
        blocks = []
        for i, p in enumerate(sample.pixels):
            seats = (kept[(kept >= i * n) & (kept < (i + 1) * n)] - i * n).tolist()
            blocks.append(reference(model, p, small, seats))
        return oracles.rebuilt(model, sample, blocks, positions)

    return rows


def _picked(choose, keep, positions="compact"):
    """Tokens that a reference chooses picture by picture."""

    def rows(model, sample, kept):
        n = SIDE * SIDE
        own = [[i * n + t for t in choose(model, p, keep)] for i, p in enumerate(sample.pixels)]
        return oracles.dropped(model, sample, torch.tensor(sum(own, [])).long(), positions)

    return rows


def _merged(block, keep, positions="compact", **options):
    """Tokens that a reference makes picture by picture."""

    def rows(model, sample, kept):
        blocks = [block(model, p, keep, **options) for p in sample.pixels]
        return oracles.rebuilt(model, sample, blocks, positions)

    return rows


def _pyramid(levels, positions, order):
    def reference(model, picture, small, seats):
        block = oracles.pyramid(model, picture, levels, order)
        return dataclasses.replace(block, seat=seats)

    return _pooled(reference, None, positions)


LAYOUTS = ["alone-left", "padded-left", "padded-right"]

_CASES = [
    Case("random:keep=0.5", _chosen("compact")),
    Case("random:keep=3:positions=original", _chosen("original")),
    Case("stride:keep=5", _chosen("compact")),
    Case("stride:keep=0.25:positions=original", _chosen("original")),
    Case("avgpool:keep=4", _pooled(oracles.avgpool, (2, 2), "compact"), placed=False),
    Case(
        "avgpool:keep=9:positions=original",
        _pooled(oracles.avgpool, (3, 3), "original"),
        placed=False,
    ),
    Case("downsample:keep=0.25", _pooled(oracles.downsample, (2, 2), "compact"), placed=False),
    Case(
        "downsample:keep=8:positions=original",
        _pooled(oracles.downsample, (2, 4), "original"),
        placed=False,
    ),
    Case("adaptivepool:grid=2/3", _pooled(oracles.avgpool, (2, 3), "compact"), placed=False),
    Case(
        "pyramid:keep=6:positions=original",
        _pyramid([(2, 2), (1, 1)], "original", [0, 1, 4, 2, 3]),
        placed=False,
    ),
    Case("pyramid:grids=3/1x2", _pyramid([(3, 3), (1, 2)], "compact", range(11)), placed=False),
    Case("ggem:keep=4:p=1/2/3", _pooled(oracles.ggem, (2, 2), "compact"), placed=False),
    Case(
        "pllava:grid=2/4:positions=original",
        _pooled(oracles.avgpool, (2, 4), "original"),
        placed=False,
    ),
    Case("vmtc:keep=8", _merged(oracles.vmtc_block, 8), placed=False),
    Case(
        "vmtc:keep=6:primary=0.0:rounds=2:positions=original",
        _merged(oracles.vmtc_block, 6, "original", primary=0.0, rounds=2),
        placed=False,
    ),
    Case("visionzip:keep=10", _visionzip(10), placed=False),
    Case("visionzip:keep=8:positions=original", _visionzip(8, "original"), placed=False),
    Case(
        "visionzip:keep=0.5:dominant=0.5:cls=false:merge=mean",
        _visionzip(0.5, dominant=0.5, cls=False, merge="mean"),
        placed=False,
    ),
    Case("divprune:keep=6", _divprune(6, "compact")),
    Case("divprune:keep=6:positions=original", _divprune(6, "original")),
    Case("fastv:layer=2:keep=0.5", _plain, [Cut(2, 0.5)]),
    Case("fastv:layer=1:keep=3:positions=compact", _plain, [Cut(1, 3, "compact")]),
    Case(
        "fastv:layer=1:keep=0.5+fastv:layer=3:keep=2",
        _plain,
        [Cut(1, 0.5), Cut(3, 2)],
    ),
    Case(
        "fastv:layer=1:keep=9:positions=compact+fastv:layer=3:keep=0.5:positions=compact",
        _plain,
        [Cut(1, 9, "compact"), Cut(3, 0.5, "compact")],
    ),
    Case("cdpruner:keep=6", _cdpruner(6, "compact")),
    Case("cdpruner:keep=9:positions=original", _cdpruner(9, "original")),
    Case("holov:keep=7:crops=3", _picked(functools.partial(oracles.holov_alone, crops=3), 7)),
    Case("dart:layer=2:keep=11:rope=false", _plain, [Cut(2, choose=oracles.dart(11))]),
    Case(
        "dart:layer=1:keep=9:pivots=2:text_pivots=3:rope=false:positions=compact",
        _plain,
        [Cut(1, positions="compact", choose=oracles.dart(9, pivots=2, text_pivots=3))],
    ),
    Case(
        "visionzip:keep=10+fastv:layer=2:keep=3:positions=compact",
        _visionzip(10),
        [Cut(2, 3, "compact")],
        placed=False,
    ),
    Case("visionzip:keep=10+fastv:layer=2:keep=0.5", _visionzip(10), [Cut(2, 0.5)], placed=False),
    Case(
        "divprune:keep=9:positions=original+fastv:layer=2:keep=2:positions=compact",
        _divprune(9, "original"),
        [Cut(2, 2, "compact")],
    ),
    Case("fastervlm:keep=5", _picked(cards.fastervlm, 5)),
    Case("prumerge:neighbours=3", _merged(cards.prumerge_block, None, neighbours=3), placed=False),
    Case(
        "prumergeplus:keep=9:neighbours=3:merge=mean",
        _merged(cards.prumerge_block, 9, neighbours=3, merge="mean", plus=True),
        placed=False,
    ),
    Case("hired:keep=6", _picked(cards.hired_alone, 6)),
    Case(
        "vscan_vision:keep=9:window=2:local=0.0+vscan_llm:keep=3",
        _merged(cards.vscan_block, 9, window=2),
        [Cut(2, positions="compact", choose=cards.pyramiddrop(3))],
        placed=False,
    ),
    Case("vispruner:keep=6:step=3", _picked(cards.vispruner_alone, 6)),
    Case("vtw:layer=2", _plain, [Cut(2, choose=cards.withdrawn)]),
    Case(
        "feather:layers=1/3:keep=5/2:stride=2",
        _plain,
        [Cut(1, choose=cards.feather(5, 2)), Cut(3, choose=cards.feather(2, None))],
    ),
    Case(
        "fitprune:layers=1/2/3:keep=0.7/6/0.2",
        _plain,
        [Cut(i, choose=cards.fitprune_cut(k)) for i, k in [(1, 0.7), (2, 6), (3, 0.2)]],
    ),
    Case(
        "btp:layers=1/2:keep=10/6:spatial=0.4/0.0:attention=0.5/0.5:diversity=0.3/0.4:over=2.0/1.5"
        ":end=3",
        _plain,
        [
            Cut(1, choose=cards.btp_cut(10, spatial=0.4, attention=0.5, diversity=0.3, over=2.0)),
            Cut(2, choose=cards.btp_cut(6, spatial=0.0, attention=0.5, diversity=0.4, over=1.5)),
            Cut(3, choose=cards.withdrawn),
        ],
    ),
    Case(
        "pyramiddrop:keep=0.5/5/0.125",
        _plain,
        [
            Cut(i, positions="compact", choose=cards.pyramiddrop(k))
            for i, k in [(1, 0.5), (2, 5), (3, 0.125)]
        ],
    ),
    Case(
        "sparsevlm:keep=9/5/0.125:cluster=2:recycle=0.5",
        _plain,
        [
            Cut(i, positions="compact",
                choose=cards.sparsevlm_cut(k, recycle=0.5, per_cluster=2))
            for i, k in [(1, 9), (2, 5), (3, 0.125)]
        ],
        placed=False,
    ),
    Case(
        "sparsevlm:version=2.0:keep=9/5/2",
        _plain,
        [
            Cut(i, choose=cards.sparsevlm_cut(k, True, recycle=0, per_cluster=10, heads=14 / 32))
            for i, k in [(1, 9), (2, 5), (3, 2)]
        ],
    ),
    Case("topv:layer=2:keep=5", _plain, [Cut(2, choose=cards.topv_cut(5))]),
    Case(
        "topv:layer=1:keep=9:positions=compact",
        _plain,
        [Cut(1, positions="compact", choose=cards.topv_cut(9))],
    ),
    Case(
        "pact:layer=2:keep=0.8:distance=0.9:proportional=false",
        _plain,
        [Cut(2, choose=cards.pact_cut(0.8, 0.9))],
    ),
    Case(
        "dualfilter:layers=1/3:together=0.07:alone=0.09",
        _plain,
        [Cut(i, positions="compact", choose=cards.dualfilter_cut(0.07, 0.09)) for i in (1, 3)],
    ),
    Case(
        "windowmerge:share=0.5:window=2",
        _merged(cards.windowmerge_block, None, share=0.5, window=2),
        placed=False,
    ),
    Case(
        "windowmerge:share=0.25:window=2:positions=original+fastv:layer=2:keep=5",
        _merged(cards.windowmerge_block, None, "original", share=0.25, window=2),
        [Cut(2, 5)],
        placed=False,
    ),
]
CASES = {case.spec: case for case in _CASES}
#: One case of every kind of stage, for tests of what happens around a forward.
FEW = [
    "visionzip:keep=10",
    "divprune:keep=6:positions=original",
    "fastv:layer=2:keep=0.5",
    "visionzip:keep=10+fastv:layer=2:keep=0.5",
]


@cache
def reference(tower: str = "clip"):
    """The model that the oracles run on; nothing ever patches it."""
    return tiny.llava("eager", layers=LAYERS, side=SIDE, tower=tower)


def fresh(attn: str = "sdpa", **options):
    """A new model with the weights of :func:`reference`, to be patched."""
    return tiny.llava(attn, layers=LAYERS, side=SIDE, **options)


def covering(**axes: Sequence) -> pytest.MarkDecorator:
    """Parametrise over a full product of axes and of the backends, most of it marked slow.

    What stays in the fast suite meets every value of every axis, and with two or more axes every
    pair of values: the backend alternates with the sum of the other indices.
    """
    rows = []
    for at in itertools.product(*(range(len(values)) for values in axes.values())):
        values = [options[i] for options, i in zip(axes.values(), at, strict=True)]
        for b, attn in enumerate(["sdpa", "eager"]):
            marks = [] if b == sum(at) % 2 else [pytest.mark.slow]
            name = "-".join(map(str, [*values, attn]))
            rows.append(pytest.param(*values, attn, marks=marks, id=name))
    return pytest.mark.parametrize([*axes, "attn"], rows)


def pairwise(rows: Sequence[tuple]) -> list[tuple]:
    """A few of `rows` in which all values meet that meet in any of them. Always the same few.

    Args:
        rows: what is possible, one value per axis.
    """
    # Of equally good rows the first is taken: shuffled, or the first values would be everywhere.
    rows = random.Random(0).sample(rows, len(rows))
    numbers: dict[tuple, int] = {}
    pairs = []  # bits of the pairs of each row
    for row in rows:
        ends = itertools.combinations(enumerate(row), 2)
        pairs.append(sum(1 << numbers.setdefault(pair, len(numbers)) for pair in ends))
    chosen, left = [], (1 << len(numbers)) - 1
    while left:
        best = max(range(len(rows)), key=lambda i: (pairs[i] & left).bit_count())
        chosen.append(rows[best])
        left &= ~pairs[best]
    return chosen


def anatomy(model, shared: bool = True) -> dict:
    """Everything about a model that a patch could leave behind.

    Args:
        model: the model.
        shared: whether the config objects count, or only what is in them.
    """
    found = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        found[name] = {
            "class": type(module),
            "attributes": sorted(module.__dict__),
            "forward": getattr(module.forward, "__func__", module.forward),
            "config": id(getattr(module, "config", None)) if shared else None,
            "attention": getattr(getattr(module, "config", None), "_attn_implementation", None),
            "hooks": [
                len(getattr(module, kind))
                for kind in (
                    "_forward_hooks",
                    "_forward_pre_hooks",
                    "_forward_hooks_with_kwargs",
                    "_forward_pre_hooks_with_kwargs",
                    "_forward_hooks_always_called",
                    "_backward_hooks",
                    "_backward_pre_hooks",
                )
            ],
        }
    found["config"] = model.config.to_dict()
    found["generation"] = model.generation_config.to_dict()
    return found


def equal(mine: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Assert closeness in fp32; an assertion that mutations can count on."""
    assert mine.shape == theirs.shape, f"{what}: {tuple(mine.shape)} != {tuple(theirs.shape)}"
    worst = float((mine - theirs).abs().max()) if mine.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.2e}"


def watch(model):
    """Rows that really enter every decoder layer, by hooks of our own."""
    rows = {}
    for i, layer in enumerate(model.model.language_model.layers):
        # On a norm inside the layer: whatever an engine does around a layer, this is after it; and
        # not on the first norm, which is also called for attention that is read beforehand.
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, i=i: rows.setdefault(i, []).append(args[0].shape[1])
        )
    return rows


def expected(case: Case, sample: Sample, kept: Tensor, more: Tensor | None = None, tower="clip"):
    """The oracle's run of one sample: (rows, dense result)."""
    rows = case.rows(reference(tower), sample, kept)
    return rows, oracles.dense(reference(tower), rows, more, case.cuts)


@torch.no_grad()
def check_logits(case: Case, attn: str, kind: str, side: str = "left", tower: str = "clip") -> None:
    """One forward over a batch equals the oracle, sample by sample; so do the kept sets."""
    batch = tiny.samples(kind, side=SIDE)
    inputs = tiny.collate(batch, side)
    model = fresh(attn, tower=tower)
    seen = watch(model)
    with mllm.patch(model, case.spec) as patched:
        logits = model(**inputs).logits
        ledger = patched.ledger
    lengths, texts = [0] * LAYERS, [len(s.ids) - s.n_visual for s in batch]
    assert logits.shape[:2] == inputs["input_ids"].shape
    theirs = tiny.per_sample(logits, inputs["attention_mask"])
    for b, sample in enumerate(batch):
        rows, want = expected(case, sample, ledger.kept("llm")[b], tower=tower)
        for layer in range(LAYERS):
            mine = ledger.kept(layer)[b]
            assert mine.tolist() == sorted(want.entering[layer].tolist()), (
                f"sample {b}, layer {layer}: kept {mine.tolist()}, "
                f"oracle {sorted(want.entering[layer].tolist())}"
            )
            lengths[layer] = max(lengths[layer], len(mine) + texts[b])
        equal(theirs[b][~sample.visual], want.logits[rows.source < 0], f"sample {b}, text rows")
        if case.placed:
            visual = rows.source[want.alive & rows.visual]
            where = sample.visual.nonzero()[:, 0]
            equal(
                theirs[b][where[visual]],
                want.logits[want.alive & rows.visual],
                f"sample {b}, visual rows",
            )
            gone = torch.ones(sample.n_visual, dtype=torch.bool)
            gone[visual] = False
            assert not theirs[b][where[gone]].any(), "dropped rows come back as zeros"
    # Masked is not dropped: layers must really be given fewer rows.
    assert [seen[i][0] for i in range(LAYERS)] == lengths


def follow(case: Case, batch: Sequence[Sample], kept, sequences, logits, prompt, greedy) -> None:
    """Every step's logits equal the oracle's along the tokens that were generated."""
    copies = len(sequences) // len(batch)
    for row, sequence in enumerate(sequences):
        sample = batch[row // copies]
        rows, want = expected(case, sample, kept[row // copies], sequence[prompt:])
        steps = want.logits[len(rows.source) - 1 : -1]
        equal(logits[row], steps, f"sequence {row}")
        if greedy:
            choice, margin = oracles.next_tokens(steps)
            wrong = (choice != sequence[prompt:]) & (margin >= CLOSE_CALL)
            assert not wrong.any(), f"sequence {row}: not the oracle's greedy answer"


@torch.no_grad()
def check_generate(case: Case, attn: str, kind: str, steps: int = 20, **options) -> Tensor:
    """Generation equals the oracle's cache-free run at every step; returns the sequences."""
    batch = tiny.samples(kind, side=SIDE)
    inputs = tiny.collate(batch)
    model = fresh(attn)
    options = {"do_sample": False, **options}
    with mllm.patch(model, case.spec) as patched:
        torch.manual_seed(0)
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        kept = patched.ledger.kept("llm")
    prompt = inputs["input_ids"].shape[1]
    copies = len(out.sequences) // len(batch)
    assert out.sequences.shape[1] == prompt + steps
    assert torch.equal(
        out.sequences[:, :prompt], inputs["input_ids"].repeat_interleave(copies, 0)
    ), "the returned ids keep the prompt as it was"
    logits = torch.stack(out.logits, 1)
    per_sample = len(kept) // len(batch)
    greedy = not options["do_sample"]
    follow(case, batch, kept[::per_sample], out.sequences, logits, prompt, greedy)
    return out.sequences
