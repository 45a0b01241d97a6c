"""Vision towers for LLaVA, made of well-kept encoders of transformers.

Importing this package makes their configurations known to transformers' Auto classes.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mllm.models.towers.base import Tower, TowerConfig
from mllm.models.towers.brave import Brave, BraveConfig
from mllm.models.towers.convllava import ConvLLaVA, ConvLLaVAConfig
from mllm.models.towers.hybrid import Hybrid, HybridConfig
from mllm.models.towers.model import TowerLlava, TowerLlavaConfig, with_tower
from mllm.models.towers.mova import Mova, MovaConfig

#: Towers by their names in recipes.
TOWERS: dict[str, type[Tower]] = {
    "convllava": ConvLLaVA,
    "deepseek-hybrid": Hybrid,
    "brave": Brave,
    "mova": Mova,
}

__all__ = [
    "TOWERS",
    "Brave",
    "BraveConfig",
    "ConvLLaVA",
    "ConvLLaVAConfig",
    "Hybrid",
    "HybridConfig",
    "Mova",
    "MovaConfig",
    "Tower",
    "TowerConfig",
    "TowerLlava",
    "TowerLlavaConfig",
    "with_tower",
]

for _tower in TOWERS.values():
    AutoConfig.register(_tower.config_class.model_type, _tower.config_class)
    AutoModel.register(_tower.config_class, _tower)
AutoConfig.register(TowerLlavaConfig.model_type, TowerLlavaConfig)
AutoModelForImageTextToText.register(TowerLlavaConfig, TowerLlava)
