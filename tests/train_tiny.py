"""A random LLaVA small enough to be trained many times over, with an ordinary processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from mllm.training.tiny import new_model, new_processor


def save_small(folder: Path) -> Path:
    """Write the model and its processor to `folder`: two narrow layers, 16 visual tokens."""
    processor = new_processor()
    config = new_model(processor.tokenizer).config
    config.vision_config.update({"num_hidden_layers": 2, "image_size": 56})
    config.vision_feature_layer = -2
    config.text_config.update(
        {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    )
    config.image_seq_length = 16
    processor.image_processor.size = {"shortest_edge": 56}
    processor.image_processor.crop_size = {"height": 56, "width": 56}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
