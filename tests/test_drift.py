"""Which transformers mllm runs on: one file knows its unstable names, and says so in time."""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import tiny
import transformers
from transformers import masking_utils

import mllm
from mllm import compat
from mllm.errors import MllmError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "mllm").rglob("*.py"))
#: Public and documented; everything else goes through compat.py.
PUBLIC = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "BitsAndBytesConfig",
    "Blip2QFormerConfig",
    "CLIPVisionConfig",
    "ConvNextConfig",
    "LlamaConfig",
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "LlavaImageProcessorPil",
    "LlavaProcessor",
    "LogitsProcessor",
    "LogitsProcessorList",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PrinterCallback",
    "Qwen2_5_VLConfig",
    "RegNetConfig",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "set_seed",
}
DOTTED = {"transformers.utils.logging", "transformers.__version__"}


def imported(path: Path):
    """(module, name) of what a file takes from transformers, also by attribute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name, None) for alias in node.names if alias.name.startswith("transformers")
            )
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith("transformers."):
                yield ".".join(dotted.split(".")[:3]), None


def test_unstable_names_are_known_to_one_file():
    found = set()
    for path in SOURCES:
        for module, name in imported(path):
            found.add(name)
            if path.name == "compat.py":
                continue
            allowed = name in PUBLIC and module == "transformers"
            allowed |= name is None and any(f"{d}.".startswith(f"{module}.") for d in DOTTED)
            assert allowed, f"{path.relative_to(ROOT)} takes {module}.{name or ''}"
        if path.name != "compat.py":
            private = re.findall(r"\._attn_implementation\w*|\b_can_record\w*", path.read_text())
            assert not private, f"{path.relative_to(ROOT)}: {private}"
    assert "create_causal_mask" in found, "the file that is exempt is the one that needs it"
    assert not PUBLIC - found, "names that nobody takes any more"


def test_methods_do_not_know_transformers():
    files = sorted((ROOT / "mllm" / "compressors").glob("*.py"))
    assert len(files) > 4
    assert not [path.name for path in files if "transformers" in path.read_text()]


def test_public_names_are_public():
    assert set(dir(transformers)) >= PUBLIC


def test_the_tested_range_is_one_and_the_same_everywhere():
    oldest, newest = compat.TESTED
    assert f'"transformers>={oldest},' in (ROOT / "pyproject.toml").read_text()
    pinned = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned[1] == newest
    assert f"{oldest} to {newest}" in (ROOT / "README.md").read_text()
    assert f"transformers {oldest} to {newest}" in (ROOT / "docs" / "models.md").read_text()
    assert compat.tested(transformers.__version__), "these tests run on a tested release"


@pytest.mark.parametrize(
    "version, inside",
    [("5.17.0", True), ("5.20.3", True), ("5.23.9", True), ("5.16.2", False), ("5.24.0", False),
     ("6.0.0.dev0", False), ("4.57.1", False)],
)  # fmt: skip
def test_a_warning_at_the_first_patch_only(monkeypatch, version, inside):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    compat.warn_if_untested.cache_clear()
    model = tiny.llava(layers=2)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                mllm.patch(model, "stride:keep=4").remove()
        said = [str(w.message) for w in caught if "transformers" in str(w.message)]
        assert len(said) == (not inside)
        if said:
            assert version in said[0] and " to ".join(compat.TESTED) in said[0]
    finally:
        compat.warn_if_untested.cache_clear()


def again():
    """compat.py executed anew, as on the first import of a process."""
    spec = importlib.util.spec_from_file_location("compat_again", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nothing(monkeypatch):
    monkeypatch.delattr(masking_utils, "create_causal_mask")
    return "create_causal_mask"


def _another_signature(monkeypatch):
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda config, input_embeds: None)
    return "inputs_embeds"


@pytest.mark.parametrize("change", [_nothing, _another_signature])
def test_a_missing_name_is_one_clear_error(monkeypatch, change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # importing warns of nothing
        again()
    name = change(monkeypatch)
    with pytest.raises(MllmError) as caught:
        again()
    error = caught.value
    assert name in str(error) and transformers.__version__ in str(error)
    assert error.argument == "transformers" and error.expected == " to ".join(compat.TESTED)
    assert error.expected in str(error) and len(str(error)) < 300


def test_attention_that_is_chosen_in_another_way(monkeypatch):
    """If the attribute that we set chooses nothing, no score would ever be read."""
    model = tiny.llava(layers=2)
    module = model.model.language_model.layers[0].self_attn
    config = module.config
    monkeypatch.setattr(compat, "attention_name", lambda module: "sdpa")
    with pytest.raises(MllmError, match="another way"):
        compat.serve(module, "mllm_sdpa")
    assert module.config is config
