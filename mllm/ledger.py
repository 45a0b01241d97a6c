"""What a plan did: tokens per stage and layer, FLOPs and KV bytes, against the unpatched model."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm import flops
from mllm.errors import DataError
from mllm.tokens import Layout, TokenTable


@dataclass
class Reduction:
    """Result of the pre-LLM stages for the images of one call.

    Images may differ in size, so their tokens lie flat, one image after another.

    Attributes:
        layouts: layout of every image, before any stage.
        keep: bool `[tokens]`.
        into: int64 `[tokens]`: itself if kept, the token it was merged into, or -1; indices
            within the image.
        order: int64 `[tokens]`, sequence order of kept tokens within their image.
        vision_flops, baseline_vision_flops, selection_flops: FLOPs of each image.
        projected: tokens of each image that go through the model's projector.
        ran: indices of the plan's stages that ran.
        notes: what they have remarked.
        protected: bool `[tokens]`, tokens that no stage may drop; None is none.
        counts: kept tokens of each image without separators, where the methods have said so.
        bits: sum of the bits of each picture, for stages in the LLM that draw at random.
        features: `[tokens, width]`, before any stage, where a stage in the LLM reads them.
        views: `[tokens, n, width]`, what finer views show at each token; None is none.
    """

    layouts: list[Layout]
    keep: Tensor
    into: Tensor
    order: Tensor | None = None
    vision_flops: list[float] = field(default_factory=list)
    baseline_vision_flops: list[float] = field(default_factory=list)
    selection_flops: list[float] = field(default_factory=list)
    projected: list[int] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    protected: Tensor | None = None
    counts: list[int | None] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    features: Tensor | None = None
    views: Tensor | None = None

    @classmethod
    def join(cls, parts: list[Reduction]) -> Reduction:
        """Pictures and videos of one prompt, one kind after the other."""
        orders = [part.order for part in parts]

        def whole(name: str) -> Tensor | None:
            """A field by token, zero where a part has none."""
            found = [getattr(part, name) for part in parts]
            like = next((x for x in found if x is not None), None)
            return None if like is None else torch.cat([
                like.new_zeros(len(part.keep), *like.shape[1:]) if x is None else x
                for x, part in zip(found, parts, strict=True)
            ])  # fmt: skip

        return cls(
            layouts=[x for part in parts for x in part.layouts],
            keep=torch.cat([part.keep for part in parts]),
            into=torch.cat([part.into for part in parts]),
            order=None if None in orders else torch.cat(orders),
            vision_flops=[x for part in parts for x in part.vision_flops],
            baseline_vision_flops=[x for part in parts for x in part.baseline_vision_flops],
            selection_flops=[x for part in parts for x in part.selection_flops],
            projected=[n for part in parts for n in part.projected],
            ran=set.intersection(*(part.ran for part in parts)),
            notes=[note for part in parts for note in part.notes],
            counts=[n for part in parts for n in part.counts],
            bits=[n for part in parts for n in part.bits],
            protected=whole("protected"),
            features=whole("features"),
            views=whole("views"),
        )

    def account(self) -> Reduction:
        """What a ledger needs of it: no features, which are large and hold a graph."""
        return dataclasses.replace(self, features=None, views=None)

    @property
    def kept(self) -> list[int] | None:
        """Rows of each image that stay, separators included; None if somebody has to count."""
        kept = []
        for layout, cells in zip(self.layouts, self.counts, strict=True):
            if cells == layout.cells:
                kept.append(layout.tokens)
            elif cells is None or layout.newline != "none":
                return None
            else:
                kept.append(cells)
        return kept

    @property
    def sizes(self) -> list[int]:
        """Tokens of each image."""
        return [layout.tokens for layout in self.layouts]

    @property
    def starts(self) -> list[int]:
        """First token of each image."""
        return [0, *itertools.accumulate(self.sizes)][:-1]


@dataclass
class ExpertCost:
    """FLOPs of a layer whose FFN is a router with experts.

    Attributes:
        row: of every row, the router and what is always on.
        choice: of a row in one expert.
        top_k: experts of a row.
        dropped: per sample, choices that found no room; None is none.
    """

    row: float
    choice: float
    top_k: int
    dropped: Tensor | None

    def flops(self, rows: int, sample: int) -> float:
        """Of `rows` rows of a sample."""
        dropped = 0 if self.dropped is None else int(self.dropped[sample])
        return rows * self.row + (rows * self.top_k - dropped) * self.choice


@dataclass
class Record:
    """Raw facts of one prefill, kept until somebody asks."""

    config: Any
    full: TokenTable
    tables: list[tuple[int, TokenTable]]  # (first layer, rows from there on)
    past: list[int]  # stored slots per layer before this prefill
    past_logical: int
    windows: list[int | None]  # what each layer sees, None is everything
    images: list[list[int]]  # per sample, images of `reduction`
    reduction: Reduction | None
    logit_rows: int
    kv_bytes: int
    kv_meta_bytes: int
    itemsize: int
    cached: bool
    selection_flops: float
    notes: list[str]
    branch_rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # that take part
    # Per chunk of the prompt, its rows of each sample and the slots of each layer before it.
    chunks: list[tuple[list[int], list[int]]] = field(default_factory=list)
    passed: dict[int, Tensor] = field(default_factory=dict)  # by layer, rows that pass it by
    cache_flops: float = 0.0  # of methods on the cache, which every sample pays
    decode_steps: int = 0
    experts: dict[int, ExpertCost] = field(default_factory=dict)  # of layers with experts


class Ledger:
    """The account of the newest prefill, and of the decode steps since. It stays up to date.

    `kept(layer)`, `merged_into` and `grid` are for Python; `as_dict()` is the promised format.
    FLOPs include the vision tower, the selection itself and the LM head on the rows computed.

    Attributes:
        history: ledgers of earlier turns of the same conversation.
        notes: facts worth knowing, in words.
    """

    def __init__(self, records: list[Record]) -> None:
        self._records = records  # owned by the patched model, newest last

    @property
    def _record(self) -> Record | None:
        return self._records[-1] if self._records else None

    @property
    def history(self) -> list[Ledger]:
        return [Ledger([record]) for record in self._records[:-1]]

    @property
    def notes(self) -> list[str]:
        return list(self._record.notes) if self._records else ["no forward pass yet"]

    @property
    def _tables(self) -> list[TokenTable]:
        """The rows that enter each decoder layer."""
        tables, cuts = [], dict(self._record.tables)
        for layer in range(self._record.config.num_hidden_layers):
            tables.append(cuts.get(layer, tables[-1] if tables else None))
        return tables

    def kept(self, layer: int | str) -> list[Tensor]:
        """Per sample, the visual tokens that enter decoder layer `layer`: sorted int64 indices.

        Args:
            layer: 0-based decoder layer, or `"llm"` for the language model's input.

        Returns:
            Indices among the sample's visual tokens, in prompt order, on the CPU.

        Raises:
            DataError: there is no such layer.
        """
        if self._record is None:
            return []
        depth = len(self._tables)
        if layer != "llm" and layer not in range(-depth, depth):
            raise DataError(
                f"{layer!r} is no decoder layer: they are 0 to {depth - 1}",
                argument="layer",
                given=layer,
                expected=f"0 to {depth - 1}, or 'llm'",
            )
        table = self._tables[0 if layer == "llm" else layer]
        there = table.visual & (table.valid if layer == "llm" else self._enters(layer))
        ordinal = (self._record.full.visual.long().cumsum(1) - 1).gather(1, table.index)
        return [o[t].sort().values.cpu() for o, t in zip(ordinal, there, strict=True)]

    @property
    def merged_into(self) -> list[Tensor]:
        """Per sample, what the pre-LLM stages did to each visual token: int64 `[visual]`.

        Its own index if it was kept, another index if it was merged into that token, -1 if it
        was dropped. A token whose row carries [CLS] counts as kept.
        """
        record = self._record
        if record is None or record.reduction is None:
            return [torch.empty(0, dtype=torch.long) for _ in self.kept("llm")]
        reduction, out = record.reduction, []
        every = reduction.into.cpu().split(reduction.sizes)
        for sample in record.images:
            parts, at = [every[0][:0]], 0
            for image in sample:
                into = every[image]
                parts.append(torch.where(into < 0, into, into + at))
                at += len(into)
            out.append(torch.cat(parts))
        return out

    @property
    def grid(self) -> list[list[tuple[int, int]]]:
        """Per sample, (rows, cols) of its grids: one per image or frame, two under anyres."""
        record = self._record
        if record is None:
            return []
        return [
            [grid for image in sample for grid in record.reduction.layouts[image].grids]
            for sample in record.images
        ]

    @property
    def layouts(self) -> list[list[Layout]]:
        """Per sample, how the visual tokens of its pictures and videos lie, in prompt order."""
        record = self._record
        if record is None or record.reduction is None:
            return []
        return [[record.reduction.layouts[i] for i in sample] for sample in record.images]

    def tokens(self, layer: int) -> list[int]:
        """Per sample, rows (text and visual, no padding) that enter decoder layer `layer`."""
        return [] if self._record is None else self._enters(layer).sum(1).tolist()

    def _enters(self, layer: int) -> Tensor:
        """Rows of a layer's table that enter it: no padding, and none that passes it by."""
        valid, passed = self._tables[layer].valid, self._record.passed.get(layer)
        return valid if passed is None else valid & ~passed

    def _visual(self) -> list[list[int]]:
        """Visual rows that enter each layer, per sample."""
        counts = {
            id(t): (t.valid & t.visual).sum(1).tolist() for _, t in self._record.tables
        }
        return [
            (table.visual & self._enters(i)).sum(1).tolist()
            if i in self._record.passed
            else counts[id(table)]
            for i, table in enumerate(self._tables)
        ]

    @property
    def visual_avg(self) -> list[float]:
        """Per sample, visual tokens per decoder layer on average ("input to layer")."""
        if self._record is None:
            return []
        layers = self._visual()
        return [sum(column) / len(layers) for column in zip(*layers, strict=True)]

    def _decoder_flops(
        self,
        tokens: list[list[int]],
        past: list[int],
        branch_rows: dict[tuple[int, str], Tensor] | None = None,
    ) -> list[float]:
        """FLOPs of each sample, the LM head included; see :meth:`_layer_flops`."""
        head = flops.lm_head(self._record.config, self._record.logit_rows)
        return [head + layers for layers in self._layer_flops(tokens, past, branch_rows)]

    def _layer_flops(
        self,
        tokens: list[list[int]],
        past: list[int],
        branch_rows: dict[tuple[int, str], Tensor] | None = None,
    ) -> list[float]:
        """FLOPs of each sample, of rows that enter layers or, where told, their branches."""
        by_layer = self._by_layer(tokens, past, branch_rows)
        return [sum(column) for column in zip(*by_layer, strict=True)]

    def _by_layer(
        self,
        tokens: list[list[int]],
        past: list[int],
        branch_rows: dict[tuple[int, str], Tensor] | None = None,
    ) -> list[list[float]]:
        """:meth:`_layer_flops` of each layer."""
        record, found = self._record, []
        own = {key: rows.tolist() for key, rows in (branch_rows or {}).items()}
        for i, row in enumerate(tokens):
            attn, mlp = own.get((i, "attn"), row), own.get((i, "mlp"), row)
            experts = record.experts.get(i) if branch_rows is not None else None
            found.append([
                flops.attention_branch(record.config, queries, past[i] + queries)
                + (
                    flops.mlp_branch(record.config, mlp[b])
                    if experts is None
                    else experts.flops(mlp[b], b)
                )
                for b, queries in enumerate(attn)
            ])  # fmt: skip
        return found

    def separators(self, layer: int) -> list[int]:
        """Per sample, visual rows that enter a decoder layer and only separate lines."""
        table = self._tables[layer]
        return (table.newline & self._enters(layer)).sum(1).tolist()

    @property
    def projected(self) -> list[int]:
        """Tokens of each image that went through the model's projector."""
        reduction = None if self._record is None else self._record.reduction
        return [] if reduction is None else list(reduction.projected)

    def layer_flops(self) -> tuple[list[list[float]], list[list[float]]]:
        """FLOPs of every decoder layer for each sample, with the plan and without.

        Of a prefill in one piece, without tower, selection and LM head.
        """
        record, prompt = self._record, self._record.full.valid.sum(1).tolist()
        layers = range(len(self._tables))
        own = self._by_layer([self.tokens(i) for i in layers], record.past, record.branch_rows)
        stored = [_within(record.past_logical, window) for window in record.windows]
        return own, self._by_layer([prompt] * len(layers), stored)

    def as_dict(self) -> dict[str, Any]:
        """The promised fields (schema 1), plain Python values only."""
        record = self._record
        if record is None:
            empty = (
                "prompt_tokens visual_tokens images kept_llm layers visual_avg prefill_flops "
                "baseline_prefill_flops vision_flops selection_flops"
            )
            return {
                "schema": 1, "phase": "prefill", "decode_steps": 0, "batch": 0,
                **{name: [] for name in empty.split()},
                "kv_bytes": 0, "kv_meta_bytes": 0, "baseline_kv_bytes": 0, "notes": self.notes,
            }
        config, full, reduction = record.config, record.full, record.reduction
        layers = len(self._tables)
        prompt = full.valid.sum(1).tolist()
        counts = [len(sample) for sample in record.images]
        vision, base_vision, select = (
            [sum(of[i] for i in sample) for sample in record.images]
            for of in (
                ([], [], [])
                if reduction is None
                else (
                    reduction.vision_flops,
                    reduction.baseline_vision_flops,
                    reduction.selection_flops,
                )
            )
        )
        selection = [
            per_sample + record.selection_flops * (images > 0) + record.cache_flops
            for per_sample, images in zip(select, counts, strict=True)
        ]
        tokens, visual = [self.tokens(i) for i in range(layers)], self._visual()
        llm = self._decoder_flops(tokens, record.past, record.branch_rows)
        if record.chunks:
            llm = [flops.lm_head(config, record.logit_rows)] * len(prompt)
            for rows, past in record.chunks:
                part = self._layer_flops([rows] * layers, past, {})
                llm = [x + y for x, y in zip(llm, part, strict=True)]
        stored = [_within(record.past_logical, window) for window in record.windows]
        base = self._decoder_flops([prompt] * layers, stored)
        length = full.valid.shape[1] + record.past_logical
        slots = len(prompt) * sum(_within(length, window) for window in record.windows)
        return {
            "schema": 1,
            "phase": "decode" if record.decode_steps else "prefill",
            "decode_steps": record.decode_steps,
            "batch": len(prompt),
            "prompt_tokens": prompt,
            "visual_tokens": (full.visual & full.valid).sum(1).tolist(),
            "images": counts,
            "kept_llm": visual[0],
            "layers": [
                {"layer": i, "tokens": tokens[i], "visual": visual[i]}
                for i in range(layers)
            ],
            "visual_avg": self.visual_avg,
            "prefill_flops": [sum(x) for x in zip(llm, vision, selection, strict=True)],
            "baseline_prefill_flops": [sum(x) for x in zip(base, base_vision, strict=True)],
            "vision_flops": vision,
            "selection_flops": selection,
            "kv_bytes": record.kv_bytes,
            "kv_meta_bytes": record.kv_meta_bytes,
            "baseline_kv_bytes": int(flops.kv_bytes(config, slots, record.itemsize))
            * record.cached,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        data = self.as_dict()
        if not data["batch"]:
            return "Ledger(no forward pass yet)"
        visual, kept = sum(data["visual_tokens"]), sum(data["kept_llm"])
        ratio = sum(data["prefill_flops"]) / sum(data["baseline_prefill_flops"])
        lines = [
            f"visual tokens {visual} -> {kept} into the language model, "
            f"{sum(data['visual_avg']):.1f} per layer on average (batch {data['batch']})",
            f"prefill {sum(data['prefill_flops']) / 1e9:.2f} GFLOPs, {ratio:.1%} of unpatched",
        ]
        if data["baseline_kv_bytes"]:
            share = data["kv_bytes"] / data["baseline_kv_bytes"]
            lines.append(f"KV cache {data['kv_bytes'] / 2**20:.2f} MiB, {share:.1%} of unpatched")
        return "\n".join([*lines, *data["notes"]])

    def __repr__(self) -> str:
        return f"<Ledger {str(self).splitlines()[0]}>"


def _within(tokens: int, window: int | None) -> int:
    """Tokens that an unpatched layer stores of so many."""
    return tokens if window is None else min(tokens, window - 1)
