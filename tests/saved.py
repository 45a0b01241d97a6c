"""Tiny random models with their real processors, in a folder as a user has them.

Weights are those of `families`, whose numbers of tokens the vocabulary here follows.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import families
from tiny import VOCAB
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = " \n?.,:<>_-|/" + string.ascii_letters + string.digits
_SIZE = {"height": 112, "width": 112}
_NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}



def _tiled(name: str) -> tuple[dict[str, str], str, dict[str, Any], dict[str, Any]]:
    """SmolVLM is Idefics3 by another name."""
    return (
        {"image_token": "<image>", "video_token": "<video>",
         "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
        "<image>",
        {"processor_class": f"{name}Processor", "image_seq_len": 16},
        {"image_processor_type": f"{name}ImageProcessor", "size": {"longest_edge": 224},
         "max_image_size": {"longest_edge": 112}},
    )  # fmt: skip


#: By family: what tokens 5 to 8 are called, how a template shows a picture, and the settings of
#: processor and image processor.
KINDS: dict[str, tuple[dict[str, str], str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
         "start": "<|vision_start|>", "end": "<|vision_end|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
        {"processor_class": "Qwen2_5_VLProcessor"},
        {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
         "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}},
    ),
    "internvl": (
        {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
         "start_image_token": "<img>", "end_image_token": "</img>"},
        "<IMG_CONTEXT>\n",
        {"processor_class": "InternVLProcessor", "image_seq_length": 16},
        {"image_processor_type": "GotOcr2ImageProcessor", "size": _SIZE, "crop_to_patches": True,
         "min_patches": 1, "max_patches": 3},
    ),
    "idefics3": _tiled("Idefics3"),
    "smolvlm": _tiled("SmolVLM"),
    "gemma3": (
        {"image_token": "<image_soft_token>", "video_token": "<video>",
         "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
        {"processor_class": "Gemma3Processor", "image_seq_length": 16},
        {"image_processor_type": "Gemma3ImageProcessor", "size": _SIZE},
    ),
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """Write model, tokenizer, template and processors of a family into `folder`."""
    named, picture, processor, pictures = KINDS[family]
    net = families.model(family)
    net.save_pretrained(folder)
    tokenizer(named).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% else %}" + picture + "{% endif %}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps({**_NORM, **pictures, **processor}))
    return folder


def tokenizer(named: dict[str, str]) -> PreTrainedTokenizerFast:
    """A token for every letter, and those that a family names, as numbers 5 to 8."""
    plain = ["<pad>", "<s>", "</s>", "<unk>", "<end>", *named.values(), "<spare>"]
    vocabulary = {token: i for i, token in enumerate([*plain, *LETTERS])}
    assert len(vocabulary) <= VOCAB
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(plain)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens=named,
    )  # fmt: skip
