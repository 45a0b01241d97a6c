"""LLaVA-Mini: text takes in the picture before the LLM, which is then given one token of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm import compat, flops
from mllm.compressors.base import (
    Context,
    Features,
    Grid,
    Hidden,
    LayerContext,
    LayerMethod,
    Positions,
    Preset,
    TokenReducer,
    Unprojected,
    Unreduced,
    Write,
    register,
)
from mllm.compressors.elastic import Attention, check_heads, spread, start
from mllm.compressors.mqt import check_places, on_grid, sincos
from mllm.compressors.pooling import placed, stacks
from mllm.errors import PlanError
from mllm.tokens import gather_rows

PAPER = "arXiv:2501.03895"


class Compressor(nn.Module):
    """Queries on a square that attend to the grids of a picture.

    Args:
        width: of the features and of the new tokens.
        side: of the square.
        heads: of the attention.
    """

    def __init__(self, width: int, side: int, heads: int) -> None:
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, width), std=0.02))
        self.norm_query, self.norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, heads)
        start(self)

    def forward(self, x: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """`[images, side**2, width]`.

        Args:
            x: `[images, tokens, width]`, grid after grid.
            sizes: (rows, cols) of the grids.
        """
        places = sincos(x.shape[2], self.side).to(x.device)
        keys = torch.cat([on_grid(places, size) for size in sizes], 1).to(x.dtype)
        query = (self.norm_query(self.queries) + places.to(x.dtype))[None]
        x = self.norm(x)
        return self.attention(query, x + keys, x)

    def flops(self, x: Tensor, sizes: tuple[tuple[int, int], ...]) -> float:
        """Of one image."""
        return self.attention.flops(self.side**2, x.shape[1])


@register("llavamini_compress", paper=PAPER, stage="pre_llm", trained=True)
@dataclass
class LLaVAMiniCompress(TokenReducer):
    """Let a few learnt queries read a picture; the first part of `llavamini`.

    Args:
        keep: visual tokens per image, and per frame of a video: so many queries, on a square. All
            grids of a tiled picture are read at once.
        heads: of the attention.
        compress: `before` the model's projector, which then maps what the queries have read, as
            the released code does; `behind` it, as the paper describes, and as models need whose
            projector joins patches.
        positions: `compact` or `original`; None is `compact`. Queries have no place of their own:
            they stand at tokens evenly spaced in reading order.
    """

    keep: int = 1
    heads: int = 8
    compress: Literal["before", "behind"] = "before"
    positions: Positions | None = None

    first = True
    actions = ("Keep", "Merge", "Write")
    oracle = "rebuild"
    identity = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isqrt(self.keep) ** 2 != self.keep:
            raise PlanError(
                f"{self.info.name}: keep={self.keep} is not a square number",
                argument="keep",
                given=self.keep,
                expected="1, 4, 9, ...",
            )

    @property
    def projects(self) -> bool:
        return self.compress == "before"

    def reads(self):
        features = Unprojected() if self.projects else Features()
        return {"features": features, "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        own = tower[0] if self.projects else width
        check_heads(self.info.name, self.heads, own)
        check_places(self.info.name, own)
        return {"compressor": Compressor(own, math.isqrt(self.keep), self.heads)}

    def reduce(self, ctx: Context) -> list:
        x, own = ctx["features"], stacks(ctx["grid"])
        pictures = [[stack.size[1:] for stack in own]]
        if (frames := own[0].size[0]) > 1:
            pictures = [[own[0].size[1:]]] * frames
        tokens = x.shape[1] // len(pictures)
        count = min(self.keep, tokens)
        made = [
            ctx.route("compressor", part, tuple(sizes))[:, :count]
            for part, sizes in zip(x.split(tokens, 1), pictures, strict=True)
        ]
        seat, into = spread(tokens, count)
        starts = range(0, x.shape[1], tokens)
        made = torch.cat(made, 1)
        return placed(
            ctx, torch.cat([seat + n for n in starts]), torch.cat([into + n for n in starts]),
            ctx.project(made) if self.projects else made,
        )  # fmt: skip


def _plain(module: nn.Module) -> nn.Module:
    """A copied module without what PEFT has put in, which is new where a plan comes behind it."""
    for name, child in module.named_children():
        child = getattr(child, "base_layer", getattr(child, "original_module", child))
        setattr(module, name, _plain(child))
    return module


class Fusion(nn.Module):
    """Decoder layers of its own, which start as the model's first ones.

    Args:
        family: of the model.
        depth: how many.
    """

    def __init__(self, family: Any, depth: int) -> None:
        super().__init__()
        self.config, self.mrope = family.text_config, family.mrope
        shared = {id(self.config): self.config}  # which backend attends is decided there
        layers = [copy.deepcopy(layer, dict(shared)) for layer in family.layers[:depth]]
        self.layers = nn.ModuleList([_plain(layer) for layer in layers]).requires_grad_(True)
        for module in self.layers.modules():  # those of the copied layers watch them alone
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.turns = [family.turned_by(family.kind(i)) for i in range(depth)]
        self.rotary = copy.deepcopy(family.decoder.rotary_emb, dict(shared))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[batch, rows, width]`, every row of which sees the valid ones up to it.

        Args:
            x: `[batch, rows, width]`.
            valid: bool `[batch, rows]`, the first of each sample true; None is all. Positions
                count them.
        """
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
        position = valid.long().cumsum(1) - 1
        mask = compat.causal_mask(self.config, x, valid, None, 0)
        place = position.expand(3, -1, -1) if self.mrope else position
        for layer, kind in zip(self.layers, self.turns, strict=True):
            rotary = self.rotary(x, place, *kind)
            x = layer(x, attention_mask=mask, position_ids=position, position_embeddings=rotary)
        return x

    def flops(self, x: Tensor, valid: Tensor) -> float:
        """Of one sample."""
        return len(self.layers) * flops.decoder_layer(self.config, x.shape[1], x.shape[1])


@register("llavamini_fuse", paper=PAPER, stage="llm", trained=True)
@dataclass
class LLaVAMiniFuse(LayerMethod):
    """Let text take in all visual tokens before the LLM; the second part of `llavamini`.

    Layers that start as the model's first ones run causally over all visual tokens, those that a
    stage before leaves of them, and the text of the prompt, in this order; what they make of text
    enters the LLM in its place. Text is detached before. Answers are not in it, in training or
    later. Every forward with pictures fuses its own prompt; text of later turns enters as it is.

    Args:
        depth: how many layers.
        fuse: `all`: the tokens that are left go through the layers too, as in the released code;
            `text`: they do not, as in the paper, and enter the LLM as they are.
        positions: `original` is all there is: nothing moves.
    """

    depth: int = 4
    fuse: Literal["all", "text"] = "all"
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("Write",)
    identity = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "compact":
            raise self._wrong("positions", "original: nothing moves")

    def _wrong(self, field: str, expected: str) -> PlanError:
        given = getattr(self, field)
        return PlanError(
            f"{self.info.name}: {field}={given!r} is not {expected}",
            argument=field, given=given, expected=expected,
        )  # fmt: skip

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LLaVAMiniFuse:
        if not 1 <= self.depth <= num_layers:
            raise self._wrong("depth", f"a number from 1 to {num_layers}, the model's layers")
        return self

    def at(self):
        return (0,)

    def reads(self):
        return {"fine": Unreduced(), "hidden": Hidden()}

    def parts_of(self, family: Any) -> dict[str, nn.Module]:
        return {"fusion": Fusion(family, self.depth)}

    def act(self, ctx: LayerContext) -> list[Any]:
        fine, hidden = ctx["fine"], ctx["hidden"]
        hidden = torch.where(ctx.text[..., None], hidden.detach(), hidden)
        coarse = ctx.visual if self.fuse == "all" else torch.zeros_like(ctx.visual)
        # All visual tokens, what is left of them, text, and at the end what takes no part.
        rank = torch.full_like(ctx.index, 3).masked_fill(ctx.text, 2).masked_fill(coarse, 1)
        rank = torch.cat([3 * (~fine.valid).long(), rank], 1)
        order = rank.argsort(dim=1, stable=True)
        both = gather_rows(torch.cat([fine.embeds.to(hidden), hidden], 1), order)
        fused = ctx.route("fusion", both, rank.gather(1, order) < 3)
        back = order.argsort(dim=1)[:, fine.valid.shape[1] :]
        return [Write(gather_rows(fused, back), rows=ctx.text | coarse)]


@register("llavamini", paper=PAPER, stage="preset", trained=True)
@dataclass
class LLaVAMini(Preset):
    """One visual token per image, and text that has taken in all others before (LLaVA-Mini).

    Args:
        keep: visual tokens per image, a square number.
        heads: of the attention of the queries.
        compress: `before` the projector (released code) or `behind` it (paper).
        depth: layers in which text takes in the picture.
        fuse: whether compressed tokens go through these layers: `all` (released code) or `text`
            alone (paper).
        positions: of the compressed tokens; None is `compact`.
    """

    keep: int = 1
    heads: int = 8
    compress: Literal["before", "behind"] = "before"
    depth: int = 4
    fuse: Literal["all", "text"] = "all"
    positions: Positions | None = None

    oracle = "reference"
    identity = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expand()  # which refuses what cannot be

    def expand(self) -> list:
        return [
            LLaVAMiniCompress(self.keep, self.heads, self.compress, self.positions),
            LLaVAMiniFuse(self.depth, self.fuse),
        ]
