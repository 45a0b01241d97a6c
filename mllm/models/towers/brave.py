"""BRAVE: several frozen encoders, bridged by one Q-Former over all that they say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from mllm import compat
from mllm.models.towers.base import WORDS, Tower, TowerConfig, tokens_of


class BraveConfig(TowerConfig):
    """Configuration of :class:`Brave`.

    Attributes:
        width: channels that every encoder is projected to.
        queries: learnt queries, and so visual tokens of a picture.
        bridge_width, bridge_layers, bridge_heads, bridge_mlp: of the MEQ-Former.
        cross_every: every so many of its layers read the encoders, from the first on.
        dropout: share of encoders that a picture goes without in training.
    """

    model_type = "mllm_brave"

    width: int = 1408
    queries: int = 160
    bridge_width: int = 768
    bridge_layers: int = 12
    bridge_heads: int = 12
    bridge_mlp: int = 3072
    cross_every: int = 2
    dropout: float = 0.2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.patch_size, self.hidden_size = self.image_size, self.bridge_width

    @property
    def grid(self) -> tuple[int, int]:
        return 1, self.queries

    def smaller(self) -> dict[str, Any]:
        return {"width": 32, "bridge_width": 32, "bridge_layers": 2, "bridge_heads": 4,
                "bridge_mlp": 32}  # fmt: skip


class Brave(Tower):
    """Learnt queries and the question read several encoders through one MEQ-Former.

    Every encoder is projected to `width` channels, and all tokens stand in one sequence, without a
    mark of where they come from. Queries and the words of the question attend to each other and, in
    every second layer, to that sequence; what the queries have become is projected to the LLM by
    one linear layer. In training a picture goes without an encoder with probability `dropout`, but
    never without all.

    Visual tokens have no places in the picture. The encoders are frozen where
    `freeze_vision_tower` is set, as BRAVE has it.

    Source: BRAVE, arXiv:2404.07204 (no official code). The MEQ-Former is transformers'
    `Blip2QFormerModel`. Words are the LLM's own embeddings behind a linear layer, with learnt
    places counted from the end; the paper's are not said.
    """

    config_class = BraveConfig
    reads_text = True
    has_grid = False
    count = (1, 64)

    def __init__(self, config: BraveConfig) -> None:
        super().__init__(config)
        self.project = nn.ModuleList(
            nn.Linear(config.channels(number), config.width)
            for number in range(len(config.encoders))
        )
        self.query = nn.Parameter(torch.randn(config.queries, config.bridge_width) * 0.02)
        self.places = nn.Parameter(torch.randn(WORDS, config.bridge_width) * 0.02)
        self.bridge = compat.part("Blip2QFormerModel")(
            Blip2QFormerConfig(
                hidden_size=config.bridge_width,
                num_hidden_layers=config.bridge_layers,
                num_attention_heads=config.bridge_heads,
                intermediate_size=config.bridge_mlp,
                cross_attention_frequency=config.cross_every,
                encoder_hidden_size=config.width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **compat.eager_like(config),
            )
        )
        if config.text_width is not None:
            self.read_words(config.text_width)
        self.post_init()

    def read_words(self, width: int) -> None:
        self.words = nn.Linear(width, self.config.bridge_width)

    def projector(self, text_config: Any) -> nn.Module:
        return nn.Linear(self.config.bridge_width, text_config.hidden_size)

    def features(self, pixels: Tensor) -> Tensor:
        said = [
            project(tokens_of(encoder(pixels)))
            for encoder, project in zip(self.encoders, self.project, strict=True)
        ]
        kept = self._kept(len(pixels), [x.shape[1] for x in said], pixels.device)
        asked, seen = self.query.repeat(len(pixels), 1, 1), None
        question = self.question(pixels)
        if question is not None:
            words, valid = question
            words = self.words(words) + self.places[-words.shape[1] :]
            asked = torch.cat([asked, words.to(asked)], 1)
            seen = torch.cat([valid.new_ones(len(pixels), len(self.query)), valid], 1)
        read = self.bridge(
            asked, attention_mask=seen, encoder_hidden_states=torch.cat(said, 1),
            encoder_attention_mask=kept,
        )  # fmt: skip
        return read.last_hidden_state[:, : len(self.query)]

    def _kept(self, pictures: int, sizes: list[int], device: Any) -> Tensor | None:
        """Tokens of encoders that are seen in this step: bool `[pictures, tokens]`; None is all."""
        if not self.training or not self.config.dropout:
            return None
        drawn = torch.rand(pictures, len(sizes), device=device)
        kept = drawn >= self.config.dropout
        kept |= drawn == drawn.max(1, keepdim=True).values
        return kept.repeat_interleave(torch.tensor(sizes, device=device), dim=1)
