"""MoVA: CLIP's features, and what experts that suit the question add to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RegNetConfig

from mllm import compat
from mllm.models.towers.base import Tower, TowerConfig, ZeroLinear, refuse, tokens_of


class MovaConfig(TowerConfig):
    """Configuration of :class:`Mova`: the first encoder is the base, the others are experts.

    The base sees pictures at `image_size`, unless it has a `size` of its own.

    Attributes:
        blocks: adapter blocks.
        heads: of their attention.
        top_k: experts that a picture is given, of those that are routed.
        routed: names of the experts that may be chosen; None is all.
        stage_depth: layers of each of the two RegNet stages; 0 is none.
        pool: cells of the base that become one, in each direction.
    """

    model_type = "mllm_mova"

    image_size: int = 672
    blocks: int = 3
    heads: int = 16
    top_k: int = 3
    routed: list | None = None
    stage_depth: int = 3
    pool: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if len(self.encoders or ()) < 2:
            return
        self.encoders = [{"size": self.image_size} | self.encoders[0], *self.encoders[1:]]
        if not 1 <= self.top_k <= len(self.names):
            refuse(
                f"top_k={self.top_k} experts are to be chosen of {len(self.names)}",
                "top_k", self.top_k, f"1 to {len(self.names)}",
            )  # fmt: skip
        self.hidden_size, side = self.channels(0), self.side(0)
        if self.hidden_size % (4 * self.heads) or side % self.pool:
            refuse(
                f"{self.heads} heads with rotary rows and columns do not share {self.hidden_size} "
                f"channels, or pool={self.pool} does not share {side} cells",
                "heads", self.heads, "heads * 4 that divides the width, pool that divides the side",
            )  # fmt: skip
        self.patch_size = self.image_size // self.grid[0]
        self.among(self.routed)

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return [spec["name"] for spec in self.encoders[1:]]

    @property
    def grid(self) -> tuple[int, int]:
        side = self.side(0) // self.pool
        return side, side

    def among(self, routed: list[str] | None) -> list[int]:
        """The experts of these names, 0-based; None is all.

        Raises:
            PlanError: there is no such expert, or none is named.
        """
        names = self.names
        odd = [name for name in routed or () if name not in names]
        if odd or routed == []:
            refuse(
                f"there is no expert {odd[0]!r}" if odd else "no expert is named",
                "routed", routed, ", ".join(names),
            )  # fmt: skip
        return [i for i, name in enumerate(names) if routed is None or name in routed]

    def smaller(self) -> dict[str, Any]:
        return {"blocks": 1, "heads": 4, "stage_depth": min(1, self.stage_depth)}


def turn(x: Tensor, rows: int, side: int) -> Tensor:
    """Rotate channels by row and column: the first half of each head by rows.

    Args:
        x: `[pictures, heads, rows * rows, channels]`, a square map.
        rows: its side.
        side: of the map that places are measured on.
    """
    at = (torch.arange(rows, device=x.device) + 0.5) * (side / rows) - 0.5
    quarter = x.shape[-1] // 4
    speed = 100.0 ** (-torch.arange(quarter, device=x.device) / quarter)
    angle = torch.stack(
        [at[:, None].expand(rows, rows).flatten(), at.expand(rows, rows).flatten()], 1
    )
    angle = (angle[:, :, None] * speed).to(x.dtype)  # [cells, row or column, quarter]
    a, b = x.unflatten(-1, (2, 2, quarter)).unbind(-2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2).flatten(-3)


class Attend(nn.Module):
    """Attention with rotary rows and columns, and a norm before an output that starts at zero.

    Args:
        width: channels of the queries.
        heads: heads.
        read: channels of what is read.
        side: rows of the map of queries.
    """

    def __init__(self, width: int, heads: int, read: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.norm, self.read_norm = nn.LayerNorm(width), nn.LayerNorm(read)
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            *(nn.Linear(read, width) for _ in range(2)),
        )
        self.inner_norm, self.out = nn.LayerNorm(width), ZeroLinear(width, width)

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        said = self.read_norm(said)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(self.norm(x)), self.k(said), self.v(said))
        )
        rows = round(said.shape[1] ** 0.5)
        q, k = turn(q, self.side, self.side), turn(k, rows, self.side)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.inner_norm(found))


class Gated(nn.Module):
    """SwiGLU of 8/3 the width, whose output starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = ZeroLinear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class AdapterBlock(nn.Module):
    """Experts by their gates, then attention among the tokens, then an MLP; all start at zero."""

    def __init__(self, config: MovaConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.side(0)
        self.experts = nn.ModuleList(
            Attend(width, config.heads, config.channels(number), side)
            for number in range(1, len(config.encoders))
        )
        self.self_attention = Attend(width, config.heads, width, side)
        self.mlp = Gated(width)

    def forward(self, x: Tensor, said: dict[int, Tensor], gates: Tensor) -> Tensor:
        for expert, tokens in said.items():
            x = x + gates[:, expert, None, None] * self.experts[expert](x, tokens)
        x = x + self.self_attention(x, x)
        return x + self.mlp(x)


class Mova(Tower):
    """A base encoder whose features take in those of experts, by gates from the question.

    In each of three blocks every routed expert is read by cross-attention and enters by its gate:
    a softmax over the routed experts of an MLP on the mean word and the mean base feature, of which
    the `top_k` largest are kept and scaled to sum 1. All outputs start at zero, so that the base is
    what it was, to the bit. Then a RegNet stage, average pooling and another stage make 24 x 24
    tokens of 48 x 48.

    In MoVA the LLM first answers which experts a question needs: here that is `routed`, in the
    configuration or by :meth:`route`. Every routed expert is computed, also where its gate is 0.

    Source: MoVA, arXiv:2404.13046, and its code (TempleX98/MoVA). The mean of the LLM's word
    embeddings stands for BERT's [CLS]; the stages are transformers' `RegNetStage` with LayerNorm
    in place of batch statistics.
    """

    config_class = MovaConfig
    reads_text = True
    count = (2, 64)

    def __init__(self, config: MovaConfig) -> None:
        super().__init__(config)
        width, cells = config.hidden_size, config.side(0) ** 2
        self.places = nn.Parameter(torch.zeros(cells, width))
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.blocks))
        self.before, self.after = (_stage(width, config.stage_depth) for _ in range(2))
        self.gate_features = nn.Linear(width, width)
        self.gate_out = nn.Linear(width, len(config.encoders) - 1)
        if config.text_width is not None:
            self.read_words(config.text_width)
        self.post_init()

    def read_words(self, width: int) -> None:
        self.gate_words = nn.Linear(width, self.config.hidden_size, bias=False)

    def route(self, routed: list[str] | None) -> None:
        """Let only these experts be chosen and computed; None is all.

        Raises:
            PlanError: there is no such expert, or none is named.
        """
        self.config.among(routed)
        self.config.routed = routed

    def gates(self, x: Tensor) -> Tensor:
        """The gate of each expert for each picture: `[pictures, experts]`, `top_k` above zero.

        Args:
            x: base features, `[pictures, cells, width]`.
        """
        hidden, question = self.gate_features(x.mean(1)), self.question(x)
        if question is not None:
            words, valid = question
            count = valid.sum(1, keepdim=True).clamp(min=1)
            mean = (words * valid[..., None]).sum(1) / count
            hidden = hidden + self.gate_words(mean)
        scores = self.gate_out(F.gelu(hidden)).float()
        routed = self.config.among(self.config.routed)
        shut = torch.full_like(scores, float("-inf"))
        shut[:, routed] = 0.0
        gates = (scores + shut).softmax(1)
        best = gates.topk(min(self.config.top_k, len(routed)), 1)
        kept = torch.zeros_like(gates).scatter(1, best.indices, best.values)
        return (kept / kept.sum(1, keepdim=True)).to(x.dtype)

    def features(self, pixels: Tensor) -> Tensor:
        side = self.config.side(0)
        x = tokens_of(self.encoders[0](pixels))
        gates = self.gates(x)
        said = {
            expert: tokens_of(self.encoders[1 + expert](pixels))
            for expert in self.config.among(self.config.routed)
        }
        x = x + self.places
        for block in self.blocks:
            x = block(x, said, gates)
        maps = self.before(x.transpose(1, 2).unflatten(2, (side, side)))
        if self.config.pool > 1:
            maps = F.adaptive_avg_pool2d(maps, self.config.grid)
        return tokens_of(self.after(maps))


def _stage(width: int, depth: int) -> nn.Module:
    """A RegNet stage of depthwise convolutions, with LayerNorm over the channels of each cell."""
    if not depth:
        return nn.Identity()
    config = RegNetConfig(groups_width=1, layer_type="y", hidden_act="silu")
    stage = compat.part("RegNetStage")(config, width, width, stride=1, depth=depth)
    for module in stage.modules():
        if isinstance(getattr(module, "normalization", None), nn.BatchNorm2d):
            module.normalization = compat.part("ConvNextLayerNorm")(
                module.normalization.num_features, data_format="channels_first"
            )
    return stage
