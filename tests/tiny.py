"""Tiny random models of the real classes, and batches for them. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE, PAD, VOCAB = 5, 0, 96


def config(
    *,
    layers: int = 4,
    side: int = 4,
    hidden: int = 48,
    tower_layers: int = 3,
    tower: str = "clip",
) -> LlavaConfig:
    """A LLaVA with a tower of `side` x `side` patches and a GQA LLaMA decoder."""
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=side * 14,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=side * side,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )


def llava(
    attn: str = "sdpa", *, seed: int = 0, cfg: LlavaConfig | None = None, **shape
) -> LlavaForConditionalGeneration:
    """A random model in fp32; the same seed gives the same weights whatever the backend.

    A random initialisation attends almost uniformly, and then every choice of tokens is as good
    as any other: queries and keys are scaled up so that the choice shows in the logits.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(cfg or config(**shape)).eval()
    model.set_attn_implementation(attn)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                weight.uniform_(0.7, 1.3)
            elif weight.dim() == 1:
                weight.normal_(0, 0.1)
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(8.0 if "language_model" in name else 12.0)
            elif "embed_tokens" in name:
                weight.mul_(20.0)
            elif weight.dim() == 2 and "embed" not in name:
                weight.mul_(3.0)
        model.model.vision_tower.get_parameter(_position_name(model)).normal_(0, 0.3)
    # Long answers of any token: an early end of sequence would hide later steps.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _position_name(model: LlavaForConditionalGeneration) -> str:
    names = [n for n, _ in model.model.vision_tower.named_parameters()]
    return next(n for n in names if n.endswith("position_embedding.weight"))


@dataclass
class Sample:
    """One conversation: unpadded ids and its images.

    Attributes:
        ids: int64 `[tokens]`, placeholders included.
        pixels: `[images, 3, height, width]`.
    """

    ids: Tensor
    pixels: Tensor

    @property
    def visual(self) -> Tensor:
        """bool `[tokens]`."""
        return self.ids == IMAGE

    @property
    def n_visual(self) -> int:
        return int(self.visual.sum())


#: (images, text tokens) of each sample.
SPECS = {
    "alone": ((1, 7),),
    "padded": ((1, 6), (2, 9), (0, 5)),
    "single": ((1, 6), (1, 9), (0, 5)),
    "text": ((0, 6), (0, 9)),
}


def samples(kind: str = "padded", *, side: int = 4, seed: int = 1) -> list[Sample]:
    """Random conversations; images stand in the middle of the text."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n_images, n_text in SPECS[kind]:
        text = torch.randint(10, VOCAB, (n_text + 2 * n_images,), generator=g).tolist()
        ids = [1] + text[:3]
        rest = text[3:]
        for _ in range(n_images):
            ids += [IMAGE] * (side * side) + rest[:2]
            rest = rest[2:]
        pixels = torch.randn(n_images, 3, side * 14, side * 14, generator=g)
        out.append(Sample(torch.tensor(ids + rest), pixels))
    return out


def collate(batch: list[Sample], side: str = "left") -> dict[str, Tensor]:
    """What a processor would give: padded ids, mask, pictures of all samples in a row."""
    width = max(len(s.ids) for s in batch)
    ids = torch.full((len(batch), width), PAD)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for b, s in enumerate(batch):
        n = len(s.ids)
        where = slice(width - n, width) if side == "left" else slice(0, n)
        ids[b, where], mask[b, where] = s.ids, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pixels = torch.cat([s.pixels for s in batch])
    if len(pixels):
        inputs["pixel_values"] = pixels
    return inputs


def per_sample(x: Tensor, mask: Tensor) -> list[Tensor]:
    """Rows of a padded batch without their padding: `[B, Q, ...]` to B x `[n, ...]`."""
    return [row[m.bool()] for row, m in zip(x, mask, strict=True)]
