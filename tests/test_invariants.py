"""Families x backends x batches x stages x ways of running, and plans, prompts and batches drawn.

The fast suite runs a covering set: every two values of two axes meet in it. `make test-all` runs
the whole product and many more drawn cases.
"""

from __future__ import annotations

import itertools

import families
import invariants
import pytest
import tiny
import torch
from families import KITS, LAYERS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from invariants import (
    BACKENDS,
    COUNTS,
    FAMILIES,
    SHAPES,
    STAGES,
    WAYS,
    Draw,
    check,
    draw,
    plan,
    possible,
    prepared,
    shared,
)
from matrix import pairwise

import mllm
from mllm.errors import DataError

AXES = [FAMILIES, BACKENDS, SHAPES, STAGES, WAYS]
ROWS = [row for row in itertools.product(*AXES) if possible(*row)]
COVERING = pairwise(ROWS)
#: Draws in the fast suite, and with `make test-all`.
FEW, MANY = 60, 2000


def test_every_pair_is_covered():
    """All values of two axes that can meet do meet in the fast suite."""

    def pairs(rows):
        return {
            (i, row[i], j, row[j]) for row in rows for i, j in itertools.combinations(range(5), 2)
        }

    assert pairs(COVERING) == pairs(ROWS)
    assert len(COVERING) < len(ROWS) / 20
    impossible = {(way, shape) for way in WAYS for shape in SHAPES} - {(r[4], r[2]) for r in ROWS}
    right = {(way, "right") for way in WAYS} - {("forward", "right"), ("no_cache", "right")}
    assert right | {("lookup", "left"), ("lookup", "none")} <= impossible


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row, id="-".join(row), marks=[] if row in set(COVERING) else [pytest.mark.slow]
        )
        for row in ROWS
    ],
)
def test_invariants(row):
    check(draw(*row))
    COUNTS["matrix"] += 1


@pytest.mark.xfail(raises=DataError, strict=True, reason="placeholders among the candidates")
@torch.no_grad()
def test_candidates_may_look_like_placeholders():
    """Prompt lookup copies from the prompt, image placeholders too; they are verified as text."""
    net = shared("idefics3", "sdpa")
    batch = prepared(draw("idefics3", "sdpa", "alone", "two", "lookup"))
    inputs = families.collate("idefics3", batch)
    options = dict(max_new_tokens=8, do_sample=False)
    rows = []
    handle = net.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: rows.append(args[0])
    )
    with mllm.patch(net, plan("idefics3", "two")):
        greedy = net.generate(**inputs, **options)
        rows.clear()
        assert torch.equal(net.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)
    handle.remove()
    assert any((ids == tiny.IMAGE).any() for ids in rows[1:]), "a candidate did look so"


KEEPS = st.one_of(st.integers(1, 7), st.floats(0.05, 1.0).map(lambda x: round(x, 3)))


@st.composite
def drawn(draw_: st.DrawFn) -> Draw:
    """A plan that may run on its family, and a batch for it."""
    anything = [name for name in FAMILIES if possible(name, "sdpa", "several", "cut", "forward")]
    family = draw_(st.sampled_from(anything))
    turns = ["original"] if KITS[family].mrope else ["original", "compact"]
    parts = []
    positions = draw_(st.sampled_from(turns))
    for name in draw_(st.sampled_from([[], ["random"], ["stride"], ["divprune"], ["visionzip"],
                                       ["divprune", "random"]])):  # fmt: skip
        keep = draw_(KEEPS)
        if name == "visionzip":
            parts.append(f"visionzip:keep={keep}:cls=false:positions=original")
        else:
            parts.append(f"{name}:keep={keep}:positions={positions}")
    first = 2 if family.startswith("qwen3") else 1
    layers = draw_(st.lists(st.integers(first, LAYERS - 1), unique=True, max_size=2))
    if not parts and not layers:
        layers = [2]
    for layer in sorted(layers):
        parts.append(
            f"fastv:layer={layer}:keep={draw_(KEEPS)}:positions={draw_(st.sampled_from(turns))}"
        )
    batch = draw_(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 2), max_size=3).map(tuple), st.integers(4, 12)
            ),
            min_size=1, max_size=3,
        )
    )  # fmt: skip
    side = draw_(st.sampled_from(["left", "right"]))
    way = "forward" if side == "right" else draw_(st.sampled_from(["forward", "greedy"]))
    attn = draw_(st.sampled_from(BACKENDS))
    return Draw(
        family, attn, "+".join(parts), tuple(batch), side, way, draw_(st.integers(0, 2**16))
    )


def _drawn(examples: int, derandomize: bool):
    @settings(
        max_examples=examples, derandomize=derandomize, deadline=None, database=None,
        print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @example(Draw("qwen2_5_vl", "sdpa", "divprune:keep=1:positions=original",
                  (((0, 2, 2), 5), ((2,), 6)), seed=0))  # two tokens are nearest to each other
    @example(Draw("qwen2_5_vl_video", "sdpa", "fastv:layer=2:keep=1", (((2,), 4),),
                  way="greedy", seed=0))  # the video runs ahead of the text in time
    @given(drawn())
    def run(case):
        check(case)
        COUNTS["drawn"] += 1

    return run


def test_drawn_plans():
    _drawn(FEW, derandomize=True)()


@pytest.mark.slow
def test_many_drawn_plans():
    _drawn(MANY, derandomize=False)()
    assert invariants.COUNTS["drawn"] >= MANY


def test_samples_of_a_draw_are_those_asked_for():
    batch = families.samples("llava_next", (((0, 2), 5), ((), 4)), seed=3)
    assert [len(s.pictures) for s in batch] == [2, 0]
    assert [int(s.visual.sum()) for s in batch] == [sum(p.tokens for p in batch[0].pictures), 0]
