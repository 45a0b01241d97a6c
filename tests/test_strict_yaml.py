"""One reader for the YAML of recipes and of sweeps: what it refuses, and how aliases read."""

from __future__ import annotations

import re

import pytest

from mllm import strict_yaml
from mllm.errors import MllmError, RecipeError
from mllm.eval import sweep_file
from mllm.training import recipe as recipes


@pytest.mark.parametrize(
    ("read", "error", "argument"),
    [(recipes.load, RecipeError, "recipe"), (sweep_file.read, MllmError, "grid")],
)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nmodel: {[a, b]: 1}\n", "line 2, column 9: a list cannot be a key"),
        ("version: 1\n? {a: 1}\n: 2\n", "line 2, column 3: a mapping cannot be a key"),
        ("version: 1\nversion: 1\n", "line 2, column 1: the key 'version' is given twice"),
        ("version: 1\nfixed:\n  vtw: 64\n  vtw: 64\n", "line 4, column 3: the key 'vtw'"),
        ("version: 1\ntasks: &own [*own]\n", "line 2, column 14: the alias *own is within"),
        ("version: 1\ntasks: *other\n", "line 2, column 8: found undefined alias"),
        ("version: 1\nmodel: {path: [\n", "line 3"),
        ("version: 1\nmodel: 2026-13-01\n", "month must be in 1..12"),
    ],
)
def test_what_cannot_be_meant_is_one_error(tmp_path, read, error, argument, text, words):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(error, match=re.escape(words)) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not valid YAML: ")
    assert (type(caught.value), caught.value.argument) == (error, argument)
    assert caught.value.expected


def test_what_is_merged_twice_is_no_key_given_twice():
    """Merging changes nodes in place, here before the one in `deep` is read itself."""
    text = "a: &a {x: 1}\ndeep: {own: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 2e-3}\n"
    assert strict_yaml.parse(text, "own", MllmError) == {
        "a": {"x": 1}, "deep": {"own": {"x": 2}}, "c": {"x": 2, "y": 0.002},
    }  # fmt: skip
