"""PaliGemma: a SigLIP tower, one linear projector, a prompt whose rows all see each other."""

from __future__ import annotations

from torch import nn

from mllm import flops
from mllm.errors import PlanError
from mllm.models.base import PerPatch
from mllm.tokens import Layout


class PaliGemma(PerPatch):
    """`PaliGemmaForConditionalGeneration`.

    Rows of the prefix (`token_type_ids` of 0) see each other in both directions, the suffix only
    what is before it. A row that leaves is seen by nobody from then on, as if it were masked.
    """

    hybrid = True
    asks = ("token_type_ids",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        kind = self.text_config.model_type
        if kind != "gemma":
            raise PlanError(
                f"PaliGemma with a {kind} decoder is not supported: it caps its attention, which "
                "only eager computes, and methods would read scores without the cap",
                argument="model",
                given=kind,
                expected="gemma",
            )
        self.blocks = getattr(self.tower, "vision_model", self.tower).encoder.layers
        self.projector = self.base.multi_modal_projector

    def kind(self, layer: int) -> str:
        return "full_attention"

    def turned_by(self, kind: str) -> tuple[str, ...]:
        return ()

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        projection = 2 * projected * config.hidden_size * config.projection_dim
        return flops.vision_tower(config, layout.cells, 0) + projection
