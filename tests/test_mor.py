"""Draws that all processes share; LayerSkip's; and mixture of recursions, against a loop."""

from __future__ import annotations

import random

import pytest
import torch

from mllm.routers.schedules import draw


def test_draws_are_those_of_seed_and_step():
    """Any process at any time draws the same, and nobody else's generator moves."""
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    found = [draw("abc", [5, 3, 2], seed=7, step=i) for i in range(2000)]
    assert found[1234] == draw("abc", [5, 3, 2], seed=7, step=1234)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    shares = [found.count(x) / 2000 for x in "abc"]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    assert draw([8], None, 0, 0) == 8 and "b" not in {draw("abc", [1, 0, 1], 0, i) for i in range(99)}


def test_draws_of_other_seeds_are_others():
    """Not those of the next step: seed and step are no sum."""
    one, two = ([draw(range(100), None, seed, i) for i in range(50)] for seed in (0, 1))
    assert len(set(one)) > 25 and one[1:] != two[:-1]
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 10
