"""Contexts: what a method is given. Declared signals by name, and what is known of the tokens.

One for each place at which methods are asked: pre-LLM stages, the vision tower, decoder layers, the
KV cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mllm.errors import PlanError
from mllm.plan import Budget, resolve
from mllm.tokens import TokenTable, along, locate, on_device

if TYPE_CHECKING:
    from mllm.routers.account import Routing


class Context:
    """What a stage may read: its declared signals by name, and what it knows of the tokens.

    Attributes:
        grid: (rows, cols) of every image of this group; None where images are not one plain grid.
        valid: bool `[images, tokens]`, false where an earlier stage dropped the token.
        remarks: of the stage, for the ledger; see :meth:`remark`.
    """

    def __init__(
        self,
        stage: Any,
        signals: dict[str, Any],
        *,
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,
        seeds: Callable[[], list[int]] | None = None,
        counts: list[int] | None = None,
        route: Callable[..., Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stage, self._signals, self._seeds = stage, signals, seeds
        self._project = project
        self.grid, self.valid, self._counts, self._route = grid, valid, counts, route
        self.flops: Any = 0.0
        self.remarks: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if name not in self._signals:
            raise PlanError(
                f"{self.stage.info.name} reads {name!r} but does not declare it in reads()",
                argument="reads",
                given=name,
                expected=", ".join(sorted(self._signals)) or "a declared signal",
            )
        return self._signals[name]

    def __contains__(self, name: str) -> bool:
        return name in self._signals

    def route(self, part: str, x: Tensor, *more: Any) -> Tensor:
        """What a trained part of the stage makes of `x`; see `parts` of the kinds of stages."""
        return self._route(x, part, *more)

    def remark(self, text: str) -> None:
        """Add a fact to the ledger of this forward."""
        self.remarks.append(f"{self.stage.info.name}: {text}")

    def project(self, x: Tensor) -> Tensor:
        """What the model's projector makes of tokens that are like `Unprojected`; see `projects`.

        Args:
            x: `[images, n, width]`.
        """
        return self._project(x)

    def generators(self) -> list[torch.Generator]:
        """One CPU generator per image (in the LLM: per sample), seeded by plan and pictures.

        So a draw depends neither on the batch that a sample is in nor on its place there.

        Raises:
            PlanError: the method does not declare that it `draws`.
        """
        if not self.stage.draws:
            raise PlanError(
                f"{self.stage.info.name} draws random numbers but does not declare it",
                argument="draws",
                given=False,
                expected="draws = True in the class",
            )
        return [torch.Generator().manual_seed(seed) for seed in self._seeds()]

    def counts(self) -> list[int]:
        """Visual tokens that are still there, of each image or sample.

        Asks the device only where an earlier stage did not say what it keeps.
        """
        if self._counts is None:
            self._counts = self._there().sum(1).tolist()
        return self._counts

    def at_most(self, tokens: int) -> list[int]:
        """`tokens` of each image, or what is there of it."""
        return [min(tokens, there) for there in self.counts()]

    def _there(self) -> Tensor:
        return self.valid

    def book(self, flops: float | Sequence[float]) -> None:
        """Add the cost of this selection to the ledger, in FLOPs per image.

        One number is every image's, several are one for each. In the LLM it is one number, per
        sample with images.
        """
        self.flops = self.flops + (flops if isinstance(flops, int | float) else np.array(flops))


class TowerContext(Context):
    """What a tower stage reads at one block.

    ``ctx["keys"]`` are the block's keys, mean over heads: `[images, tokens, head_dim]`;
    ``ctx["hidden"]`` is what would enter its MLP, or what the block has made (see
    :attr:`TowerReducer.behind`), not normalised: `[images, tokens, width]`.

    Attributes:
        block: 0-based tower block.
        depth: blocks whose output the projector sees, as :meth:`TowerReducer.blocks` is given.
        patches: patches of an image before any block.
        grid: their (rows, cols).
        prefix: tokens at the start that are no patches ([CLS]); they must stay.
        size: fp32 `[images, tokens]`, how many original tokens each stands for.
    """

    def __init__(
        self, stage: Any, keys: Tensor, hidden: Tensor, *, block: int, depth: int,
        grid: tuple[int, int], prefix: int, size: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(stage, {"keys": keys, "hidden": hidden}, grid=grid)
        self.block, self.depth, self.patches = block, depth, grid[0] * grid[1]
        self.prefix, self.size = prefix, size


class LayerContext(Context):
    """What an in-LLM stage may read at one decoder layer.

    `rows` are those that arrive at the layer, padding included.

    Attributes:
        layer: 0-based decoder layer that is about to run; `num_layers` behind the last.
        num_layers: decoder layers of the model.
        visual: bool `[batch, rows]`, visual rows that are still there, without separators.
        text: bool `[batch, rows]`, text of the prompt.
        answers: bool `[batch, rows]`, rows behind the prompt: answers that are supervised, rows of
            later steps.
        decoding: whether there are no others, and the prompt is in the cache; only stages that set
            `decodes` are asked then.
        prompt: bool `[batch, rows]`, visual and text; no padding, no candidates of assisted
            decoding, nothing that is supervised.
        protected: bool `[batch, rows]`, rows that an action protects.
        images: int64 `[batch]`, images of each sample; `n_images` are the same as ints.
        entered: int64 `[batch]`, visual tokens that entered the decoder, without separators;
            `n_entered` are the same as ints.
        logical: int64 `[batch, rows]`, index in the uncompressed sequence.
        index: int64 `[batch, rows]`, row of this forward's own input.
        size: float32 `[batch, rows]`, how many of the tokens that entered the decoder a row stands
            for.
        state: dict of the stage's own, empty at the start of every forward.
    """

    def __init__(
        self,
        stage: Any,
        signals: dict[str, Any],
        *,
        layer: int,
        num_layers: int,
        table: TokenTable,
        visual: Tensor,
        prompt: Tensor,
        protected: Tensor,
        images: list[int],
        entered: list[int],
        state: dict[str, Any],
        queries: dict[str, Tensor],
        width: int,
        counts: list[int] | None = None,
        seeds: Callable[[], list[int]] | None = None,
        route: Callable[..., Tensor] | None = None,
        routing: Routing | None = None,
        number: int = 0,
        answers: Tensor | None = None,
        decoding: bool = False,
        answer_loss: Callable[[Tensor], Tensor] | None = None,
        seed_for: Callable[..., int] | None = None,
        attention_input: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(stage, signals, counts=counts, seeds=seeds, route=route)
        self._routing, self._number, self._seed_for = routing, number, seed_for
        self._attention_input = attention_input
        self.layer, self.num_layers = layer, num_layers
        self.visual, self.prompt, self.protected = visual, prompt, protected
        self.text = prompt & ~table.visual
        self.answers, self.decoding, self._answer_loss = answers, decoding, answer_loss
        self.n_images, self.n_entered, self.state = images, entered, state
        self.images = on_device(torch.tensor(images), visual)
        self.entered = on_device(torch.tensor(entered), visual)
        self.logical, self.index, self.size = table.logical, table.index, table.size
        self._queries, self._width = queries, width

    def _there(self) -> Tensor:
        return self.visual

    def attention_input(self, x: Tensor) -> Tensor:
        """What this layer's attention would be given if `x` `[batch, n, width]` entered it."""
        return self._attention_input(x)

    @property
    def learns(self) -> bool:
        """Whether the model learns from this forward, auxiliary losses included."""
        return self._routing is not None and self._routing.learns

    @property
    def learnt(self) -> int:
        """Forwards that the model has learnt from before this one; see `Patched.learnt`."""
        return self._routing.learnt

    def seed_for(self, *more: int) -> int:
        """A seed that the plan's seed, the stage's place in the plan, and `more` decide."""
        return self._seed_for(*more)

    def answer_loss(self, hidden: Tensor) -> Tensor:
        """The answers' loss if these hidden states left the last layer: a mean over tokens.

        Of samples with images; only where the model learns.

        Args:
            hidden: `[batch, rows, width]`.
        """
        return self._answer_loss(hidden)

    def penalise(self, name: str, loss: Tensor, coefficient: float) -> None:
        """Add an auxiliary loss to the model's, in training.

        Args:
            name: under which `patched.losses` has it.
            loss: scalar, a mean over what it speaks of in this process.
            coefficient: what it is multiplied by.
        """
        if self.learns:
            self._routing.penalise(self._number, self.layer, name, loss, coefficient)

    def note(self, **sums: Tensor) -> None:
        """Statistics of a router at this layer; see :mod:`mllm.routers.stats`."""
        if self._routing is not None:
            self._routing.note(self._number, self.layer, **sums)

    def queries(self, name: str) -> Tensor:
        """Rows of the queries of an AttentionRows signal: int64 `[batch, queries]`, -1 fills up."""
        return self._queries[name]

    def budget(self, keep: Budget, tokens: Sequence[int]) -> tuple[list[int], Tensor]:
        """Visual rows that a budget leaves of each sample, at most what is there.

        Args:
            keep: tokens per image, or a fraction of `tokens`.
            tokens: of each sample.

        Returns:
            The counts, and the same as int64 `[batch]`.
        """
        # In Python, so that rounding is that of `resolve` and the device is not asked.
        wanted = [resolve(keep, n, i) for n, i in zip(tokens, self.n_images, strict=True)]
        counts = [min(n, there) for n, there in zip(wanted, self.counts(), strict=True)]
        return counts, on_device(torch.tensor(counts), self.visual)

    def bring(self, x: Tensor, index: Tensor) -> Tensor:
        """What was kept over the rows of an earlier layer, over the rows of this one.

        Args:
            x: `[batch, rows then, ...]`.
            index: `ctx.index` of then.
        """
        return along(x, locate(self.index, index, self._width), 1)


@dataclass(frozen=True)
class CacheEvent:
    """What has happened to a cache; ``event["name"]`` is a declared signal.

    A signal of a decoder layer has one value per token, `[batch, heads, length]` by logical index,
    zero where the layer does not store it. It is there from that layer's `layer_end` on. One that
    is declared without a layer is read at all of them: it is there at the `layer_end` of each, and
    as ``event["name", layer]`` at a `decode_step`.

    Attributes:
        cache: the :class:`mllm.cache.KVCache` to look at and to change.
        phase: `"prefill"` (a later turn's too), `"decode"` or `"verify"`.
        layer: the layer that has run; None where all have.
        prompt: bool `[batch, rows]`, rows of this forward that belong to the prompt: no padding,
            nothing supervised. Candidates of assisted decoding are not among the rows.
        visual: bool `[batch, rows]`, visual rows of this forward.
        start: logical index of the first row.
        accepted: candidates that stayed (`verify_end`).
        valid: bool `[batch, length]`, tokens of the conversation that are no padding, by logical
            index.
        lengths: how many these are of each sample; None while decoding.
        protected: bool `[batch, rows]`, rows of this forward that an action protects; None is none.
        entered: of every part of the decoder that has run, its first layer and the rows of this
            forward that entered it, bool `[batch, rows]`.
        begins, ends: whether the prompt begins, and ends, with this forward; a prompt that is read
            in chunks has several.
        notes, costs: of the ledger; see :meth:`note` and :meth:`book`.
        seeds: what :meth:`generators` are seeded with.
    """

    cache: Any
    phase: Literal["prefill", "decode", "verify"]
    signals: dict[Any, Tensor]
    layer: int | None = None
    prompt: Tensor | None = None
    visual: Tensor | None = None
    start: int | None = None
    accepted: int | None = None
    valid: Tensor | None = None
    lengths: list[int] | None = None
    protected: Tensor | None = None
    entered: Sequence[tuple[int, Tensor]] = ()
    begins: bool = True
    ends: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)
    costs: list[float] = dataclasses.field(default_factory=list)
    seeds: Callable[[int], list[int]] | None = None

    def generators(self, number: int = 0) -> list[torch.Generator]:
        """One CPU generator per sample, seeded by plan, pictures and `number`; see `draws`.

        So a draw depends neither on the batch that a sample is in nor on its place there.
        """
        return [torch.Generator().manual_seed(seed) for seed in self.seeds(number)]

    def book(self, flops: float) -> None:
        """Add the cost of a choice to the ledger, in FLOPs per sample."""
        self.costs.append(flops)

    def note(self, text: str) -> None:
        """Add a fact to the ledger of this prefill, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        if name not in self.signals:
            raise PlanError(
                f"{name!r} was not declared in reads(), or its layer has not run",
                argument="reads",
                given=name,
                expected=", ".join(sorted(map(str, self.signals))) or "a declared signal",
            )
        return self.signals[name]
