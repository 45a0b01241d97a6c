"""What holds for every family, backend, batch, stage and way of running, checked in one place.

The checks are plain functions: the matrix, hypothesis and the mutation tests run the same ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import oracles
import torch
from families import (
    END,
    KITS,
    LAYERS,
    START,
    VIDEO,
    Sample,
    collate,
    model,
    reference,
    samples,
)
from family_oracles import PER_TOKEN, Dense, dense, encode, features, seen, visionzip
from matrix import CLOSE_CALL, PRECOMPUTED, TOLERANCE, equal
from oracles import Cut
from tiny import IMAGE
from torch import Tensor

import mllm
from mllm.plan import Plan

#: Checks done in this process, by what they are; printed at the end of a run.
COUNTS: Counter[str] = Counter()

#: On 5.17 LLaVA-OneVision puts a separator behind videos where no plan can follow.
FAMILIES = [name for name in KITS if PRECOMPUTED or name != "llava_onevision_video"]
BACKENDS = ["sdpa", "eager"]
SHAPES = ["alone", "left", "right", "several", "none"]
STAGES = ["identity", "keep", "write", "cut", "two", "stacked"]
WAYS = ["forward", "greedy", "sampling", "beams", "returns", "lookup", "no_cache", "second_turn"]
STEPS = 5
#: What a model never answers with.
SILENT = [IMAGE, VIDEO, START, END]


@dataclass(frozen=True)
class Draw:
    """A plan on a batch.

    Attributes:
        family, attn: the model.
        spec: the plan.
        batch: per sample the sizes of its images and its text tokens.
        side: of padding.
        way: how it is run, one of `WAYS`.
        seed: of the batch.
    """

    family: str
    attn: str
    spec: str
    batch: tuple[tuple[tuple[int, ...], int], ...]
    side: str = "left"
    way: str = "forward"
    seed: int = 1


def possible(family: str, attn: str, shape: str, stage: str, way: str) -> bool:
    """Whether transformers itself can do it, or the combination says nothing of its own."""
    if shape == "right" and way not in ("forward", "no_cache"):
        return False  # the next token would follow padding
    if way == "lookup" and shape in ("left", "none"):
        return False  # assisted decoding takes one sample
    if family == "paligemma" and (way == "lookup" or (way == "no_cache" and not PRECOMPUTED)):
        return False  # tokens behind the prompt would become part of its prefix
    if way in ("beams", "returns") and family in ("glm4v_video", "glm46v_video"):
        return False  # its videos are not repeated
    repeats = way in ("beams", "returns") and mixes(family)
    if family == "llava_onevision_many" and (shape == "several" or repeats):
        return False  # its images are alone, or two of a sample
    return not repeats or shape != "several"


def mixes(family: str) -> bool:
    """Whether transformers mixes up several images of one sample where it repeats samples."""
    return not PRECOMPUTED or family.startswith("glm4")


def draw(family: str, attn: str, shape: str, stage: str, way: str) -> Draw:
    """The case of the matrix at a place of its axes."""
    from families import SPECS

    kinds = {"left": "padded", "right": "padded", "none": "text"}
    kind = kinds.get(shape, shape)
    if way in ("beams", "returns") and kind == "padded" and mixes(family):
        kind = "single"
    side = "right" if shape == "right" else "left"
    return Draw(family, attn, plan(family, stage), SPECS[kind], side, way)


def plan(family: str, stage: str) -> str:
    """The spec of a stage; plans that renumber where the family can."""
    compact = "original" if KITS[family].mrope else "compact"
    return {
        "identity": "visionzip:keep=1.0:cls=false:positions=original+fastv:layer=2:keep=1.0",
        "keep": f"divprune:keep=3:positions={compact}",
        "write": "visionzip:keep=4:cls=false:positions=original",
        "cut": "fastv:layer=2:keep=0.5",
        "two": f"fastv:layer=2:keep=5:positions={compact}"
        f"+fastv:layer=3:keep=0.5:positions={compact}",
        "stacked": "divprune:keep=5:positions=original+fastv:layer=2:keep=0.5",
    }[stage]


@cache
def shared(family: str, attn: str):
    """One model for all cases: every one of them checks that it was left as it was."""
    return model(family, attn)


# The oracle's side



def written(family: str, sample: Sample, ordinal: int, keep: int, own: Tensor) -> tuple:
    """VisionZip without [CLS] on one picture: (cells that stay, `[tokens, width]`)."""
    cells = KITS[family].cells(sample.pictures[ordinal])
    own = own.clone()
    if family not in PER_TOKEN:
        stay, own[cells] = visionzip(own[cells], seen(family, sample, ordinal), keep)
        return stay, own
    net, given = reference(family).model, []
    projector = net.aligner if family == "deepseek_vl" else net.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    encode(family, [sample.pictures[ordinal]])
    handle.remove()
    stay, merged = visionzip(given[0][0], seen(family, sample, ordinal), keep)
    return stay, projector(merged)


@torch.no_grad()
def chosen(family: str, spec: str, sample: Sample, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the pre-LLM stages of a plan leave of one sample, and what stands there.

    Args:
        kept: what the engine says; followed only where no formula fixes the choice.
    """
    kit, total = KITS[family], int(sample.visual.sum())
    alive, vectors = torch.ones(total, dtype=torch.bool), None
    for stage in Plan.from_spec(spec).stages:
        name = stage.info.name
        if name == "fastv" or not sample.pictures:
            continue
        if name in ("random", "stride"):
            alive &= torch.isin(torch.arange(total), kept)
            continue
        own, at, stay = features(family, sample), 0, []
        for i, picture in enumerate(sample.pictures):
            cells = kit.cells(picture)
            budget = oracles.budget(stage.keep, len(cells))
            if name == "divprune":
                picked = oracles.divprune(own[i][cells], budget)
            else:
                picked, own[i] = written(family, sample, i, budget, own[i])
            stay += [at + cells[t] for t in picked]
            at += picture.tokens
        stay += kit.separators(sample, stay)
        alive &= torch.isin(torch.arange(total), torch.tensor(stay))
        if name == "visionzip":
            vectors = torch.cat(own)
    return alive.nonzero()[:, 0], vectors


def want(draw: Draw, sample: Sample, kept: Tensor, more: Tensor | None) -> Dense:
    """The oracle's run of one sample under the plan of a draw."""
    stages = Plan.from_spec(draw.spec).stages
    left, vectors = chosen(draw.family, draw.spec, sample, kept)
    cuts = [
        Cut(s.layer, s.keep, s.positions or "original") for s in stages if s.info.name == "fastv"
    ]
    first = [s for s in stages if s.info.name != "fastv"][:1]
    compact = bool(first) and (first[0].positions or "compact") == "compact"
    return dense(
        draw.family, sample, more, cuts=cuts, kept=left if first else None, vectors=vectors,
        compact=compact and not KITS[draw.family].mrope,
    )  # fmt: skip


# The model's side


@dataclass
class Answer:
    """What a way of running gave for one sequence.

    Attributes:
        sample: ordinal of its sample.
        more: int64 `[m]`, tokens after the prompt; None for a plain forward.
        logits: of the last rows of `more`, or of all rows of the prompt.
        greedy: whether the tokens are the most likely ones.
        score: sum of the log-probabilities of `more`, for beams.
    """

    sample: int
    more: Tensor | None
    logits: Tensor | None
    greedy: bool = False
    score: Tensor | None = None


def _forward(net, draw: Draw, batch: Sequence[Sample], inputs: dict, **options) -> list[Answer]:
    logits = net(**inputs, **options).logits
    real = inputs["attention_mask"].bool()
    return [Answer(b, None, logits[b][real[b]]) for b in range(len(batch))]


def _generate(net, draw: Draw, batch: Sequence[Sample], inputs: dict, **options) -> list[Answer]:
    torch.manual_seed(draw.seed)
    options = {"do_sample": False, "suppress_tokens": SILENT, **options}
    out = net.generate(
        **inputs, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, **options
    )
    prompt, copies = inputs["input_ids"].shape[1], len(out.sequences) // len(batch)
    assert out.sequences.shape[1] == prompt + STEPS
    logits = torch.stack(out.logits, 1)
    return [
        Answer(i // copies, sequence[prompt:], logits[i], greedy=not options["do_sample"])
        for i, sequence in enumerate(out.sequences)
    ]


def _beams(net, draw: Draw, batch: Sequence[Sample], inputs: dict) -> list[Answer]:
    out = net.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, num_beams=3, length_penalty=0.0,
        suppress_tokens=SILENT, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    return [
        Answer(b, out.sequences[b, prompt:], None, score=out.sequences_scores[b])
        for b in range(len(batch))
    ]


def _lookup(net, draw: Draw, batch: Sequence[Sample], inputs: dict) -> list[Answer]:
    out = net.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SILENT,
        prompt_lookup_num_tokens=3,
    )  # fmt: skip
    return [Answer(0, out[0, inputs["input_ids"].shape[1] :], None, greedy=True)]


def _no_cache(net, draw: Draw, batch: Sequence[Sample], inputs: dict) -> list[Answer]:
    if draw.side == "right":
        return _forward(net, draw, batch, inputs, use_cache=False)
    return _generate(net, draw, batch, inputs, use_cache=False)


def _second_turn(net, draw: Draw, batch: Sequence[Sample], inputs: dict) -> list[Answer]:
    """A question about what was said, on the cache of the first turn."""
    options = dict(do_sample=False, suppress_tokens=SILENT, return_dict_in_generate=True)
    first = net.generate(**inputs, max_new_tokens=3, **options)
    question = torch.tensor([11, 23, 31, 42]).expand(len(batch), -1)
    ids = torch.cat([first.sequences, question], 1)
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(batch), ids.shape[1] - mask.shape[1])], 1)
    second = net.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values,
        max_new_tokens=STEPS, output_logits=True, **options,
    )  # fmt: skip
    prompt, logits = inputs["input_ids"].shape[1], torch.stack(second.logits, 1)
    return [
        Answer(b, second.sequences[b, prompt:], logits[b], greedy=True) for b in range(len(batch))
    ]


RUN: dict[str, Callable[..., list[Answer]]] = {
    "forward": _forward,
    "greedy": _generate,
    "sampling": lambda *a: _generate(*a, do_sample=True),
    "beams": _beams,
    "returns": lambda *a: _generate(*a, do_sample=True, num_return_sequences=2),
    "lookup": _lookup,
    "no_cache": _no_cache,
    "second_turn": _second_turn,
}


# The comparison


def prepared(draw: Draw) -> list[Sample]:
    """The samples of a draw; assisted decoding needs a prompt that repeats itself."""
    batch = samples(draw.family, draw.batch, draw.seed)
    if draw.way == "lookup":
        for s in batch:
            s.ids = torch.cat([s.ids, s.ids[-4:], s.ids[-4:], s.ids[-4:-2]])
    return batch


@contextlib.contextmanager
def entering(net) -> Iterator[list[int]]:
    """Rows that really enter each decoder layer at first, by hooks inside of the layers."""
    rows, handles = [0] * LAYERS, []
    for i, layer in enumerate(net.get_decoder().layers):

        def note(_, args, i=i):
            rows[i] = rows[i] or args[0].shape[1]

        handles.append(layer.input_layernorm.register_forward_pre_hook(note))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def tolerance(logits: Tensor) -> float:
    """1e-4 of the spread of the logits, which is about 1; a random Gemma 3 has 3."""
    return TOLERANCE * max(1.0, float(logits.std()))


def compare(answer: Answer, sample: Sample, result: Dense, what: str, near: float) -> None:
    """One sequence against the oracle's run of it."""
    if answer.more is None:
        text, there = ~sample.visual, sample.visual & result.alive
        equal(answer.logits[text], result.logits[text], f"{what}, text rows", near)
        equal(answer.logits[there], result.logits[there], f"{what}, visual rows", near)
        gone = sample.visual & ~result.alive
        assert not answer.logits[gone].any(), f"{what}: dropped rows come back as zeros"
        return
    if answer.score is not None:
        steps = result.logits[-len(answer.more) - 1 : -1].log_softmax(-1)
        total = steps.gather(1, answer.more[:, None]).sum()
        return equal(answer.score, total, f"{what}, beam", CLOSE_CALL)
    count = STEPS if answer.logits is None else len(answer.logits)
    steps = result.logits[-count - 1 : -1]
    if answer.logits is not None:
        equal(answer.logits, steps, f"{what}, steps", near)
    if answer.greedy:
        said = steps.index_fill(1, torch.tensor(SILENT), float("-inf"))
        choice, margin = oracles.next_tokens(said)
        wrong = (choice != answer.more[-count:]) & (margin >= CLOSE_CALL)
        assert not wrong.any(), f"{what}: not the oracle's greedy answer"


@torch.no_grad()
def check(draw: Draw) -> None:
    """The patched model equals the oracle; the ledger tells what it did; nothing is left behind.

    Under a plan that keeps everything it equals the unpatched model bit by bit. A batch of
    several is compared with its samples alone as well.
    """
    net, batch = shared(draw.family, draw.attn), prepared(draw)
    inputs = collate(draw.family, batch, draw.side)
    real = inputs["attention_mask"].bool()
    plain, owner = net(**inputs).logits[real], real.nonzero()[:, 0]
    whole = all(repr(s.keep) == "1.0" for s in Plan.from_spec(draw.spec).stages)
    unpatched = RUN[draw.way](net, draw, batch, inputs) if whole else None
    with mllm.patch(net, draw.spec) as patched:
        with entering(net) as lengths:
            answers = RUN[draw.way](net, draw, batch, inputs)
        ledger = patched.ledger
        ledger = ([*ledger.history, ledger])[0]  # that of the turn with the pictures
        data = ledger.as_dict()
        copies = data["batch"] // len(batch)
        kept = [[k.cpu() for k in ledger.kept(i)[::copies]] for i in range(LAYERS)]
        if draw.way == "forward" and len(batch) > 1:
            for answer, sample in zip(answers, batch, strict=True):
                alone = net(**collate(draw.family, [sample])).logits[0]
                what = f"sample {answer.sample} alone"
                equal(answer.logits, alone, what, tolerance(alone))
                now = patched.ledger
                assert all(
                    now.kept(i)[0].tolist() == kept[i][answer.sample].tolist()
                    for i in range(LAYERS)
                ), f"sample {answer.sample} alone keeps others"
    assert torch.equal(net(**inputs).logits[real], plain), "removed without a trace"
    if unpatched is not None:
        for mine, theirs in zip(answers, unpatched, strict=True):
            for a, b in ((mine.more, theirs.more), (mine.logits, theirs.logits),
                         (mine.score, theirs.score)):  # fmt: skip
                assert a is b is None or torch.equal(a, b), "identity is bit-exact"
    most = [0] * LAYERS
    for answer in answers:
        b, sample = answer.sample, batch[answer.sample]
        result = want(draw, sample, kept[0][b], answer.more)
        text = len(sample.ids) - int(sample.visual.sum())
        for i in range(LAYERS):
            entered = sorted(result.entering[i].tolist())
            assert kept[i][b].tolist() == entered, (
                f"sample {b}, layer {i}: kept {kept[i][b].tolist()}, oracle {entered}"
            )
            assert data["layers"][i]["visual"][b * copies] == len(entered)
            if draw.way == "forward":
                assert data["layers"][i]["tokens"][b * copies] == len(entered) + text
            most[i] = max(most[i], len(entered) + text)
        near = tolerance(result.logits)
        try:
            compare(answer, sample, result, f"sample {b}", near)
        except AssertionError:
            # A long prompt can amplify the rounding of a kernel, in the unpatched model too.
            own = plain[owner == b] - dense(draw.family, sample).logits
            compare(answer, sample, result, f"sample {b}", max(near, 2 * float(own.abs().max())))
            COUNTS["rounded like unpatched"] += 1
    # Masked is not dropped: layers must really be given fewer rows. (Candidates of assisted
    # decoding may come with the prompt.)
    if not whole and draw.way != "lookup":
        assert lengths == most, f"rows that entered {lengths}, expected {most}"
    COUNTS[draw.way] += 1
    COUNTS["sequences"] += len(answers)
