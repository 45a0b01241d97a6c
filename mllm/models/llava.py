"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, one square grid per image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm import flops
from mllm.errors import PlanError
from mllm.models.base import PerPatch
from mllm.tokens import Layout


class Llava(PerPatch):
    """`LlavaForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = model.config
        kind = self.vision_config.model_type
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise PlanError(
                f"LLaVA with a {kind} tower is not supported",
                argument="model",
                given=kind,
                expected="clip_vision_model, siglip_vision_model",
            )
        inner = getattr(self.tower, "vision_model", self.tower)
        self.blocks = inner.encoder.layers
        self.projector = self.base.multi_modal_projector
        self.prefix = 1 if kind == "clip_vision_model" else 0
        wanted = "default" if self.prefix else "full"
        given = getattr(config, "vision_feature_select_strategy", wanted)
        if given != wanted:
            raise PlanError(
                "a tower whose [CLS] is itself a visual token has no grid"
                if self.prefix
                else "a tower without [CLS] whose first patch is left out has no grid",
                argument="vision_feature_select_strategy",
                given=given,
                expected=wanted,
            )

    def _feature_layers(self) -> list[int]:
        chosen = self.model.config.vision_feature_layer
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def feature_blocks(self) -> list[int]:
        # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1.
        depth = len(self.blocks)
        return [(i if i >= 0 else depth + 1 + i) - 1 for i in self._feature_layers()]

    @property
    def tower_widths(self) -> tuple[int, int]:
        width = self.vision_config.hidden_size
        return width * len(self.feature_blocks()), width

    def cls_feature(self, tower_output: Any) -> Tensor:
        hidden = tower_output.hidden_states
        return torch.cat([hidden[i][:, :1] for i in self._feature_layers()], dim=-1)

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        width = config.hidden_size * len(self.feature_blocks())
        return flops.vision_tower(config, layout.cells, self.prefix) + flops.projector(
            width, self.text_config.hidden_size, projected
        )


class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration`: features of several tower blocks, normalised."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not self.prefix:
            raise PlanError(
                "ViP-LLaVA leaves out the first patch of a tower without [CLS]",
                argument="model",
                given=self.vision_config.model_type,
                expected="clip_vision_model",
            )

    def _feature_layers(self) -> list[int]:
        config = self.model.config
        # Older versions have several layers by another name.
        chosen = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
        return [chosen] if isinstance(chosen, int) else list(chosen)
