"""ShadowKV: keys in low-rank factors, values in host memory, and steps that look at some chunks."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.compressors.base import Budget, CacheCompressor, CacheEvent, register

__all__ = ["ShadowKV"]


@register("shadowkv", paper="arXiv:2410.21465", stage="cache")
@dataclass
class ShadowKV(CacheCompressor):
    """Attend to the chunks whose mean key the query likes; values wait on the host (ShadowKV).

    When a layer has run over a prompt, its keys go into low-rank factors, as they were before
    rotary embedding, and its values to the host. A chunk is a few neighbours, its landmark the mean
    of their keys after rotary embedding. At every step and for every KV head the landmarks take
    part in a softmax of their own, the largest share among the query heads of the group counts, and
    only the best chunks are made and fetched. The newest chunks, and those with a key that is
    unlike its landmark, are kept as they are and always attended to; so are the tokens of the
    answer. Several tokens at once, a later turn for one, attend to everything, and a turn's prompt
    is stored in chunks of its own. Layers with a sliding window stay as they are.

    Args:
        budget: tokens of the chunks that a step chooses, or a fraction of the prompt.
        rank_keys: rank of a layer's keys over all its heads, an int, or a fraction of the full
            rank. With the full rank keys stay as they are.
        chunk: tokens of a chunk.
        outliers: chunks of every KV head that are kept as they are.
        local: newest chunks that are.
    """

    budget: Budget = 2048
    rank_keys: int | float = 160
    chunk: int = 8
    outliers: int = 48
    local: int = 4

    identity = {"budget": 1.0, "rank_keys": 1.0}
    oracle = "reference"
    actions = ()
    lowrank = True
    selects = True
    headwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = self.rank_keys
        fine = rank > 0 and (isinstance(rank, int) or rank <= 1)
        self.demand("rank_keys", fine, "a whole number from 1, or a fraction in (0, 1]")
        self.demand("chunk", self.chunk > 0, "a whole number from 1")
        self.demand("outliers", self.outliers >= 0, "a whole number from 0")
        odd = self.chunk > 1 or not self.outliers
        self.demand("outliers", odd, "0 with chunk=1: a token is never unlike its own mean")
        self.demand("local", self.local >= 0, "a whole number from 0")
        short = isinstance(self.budget, int) and self.budget < self.chunk
        self.demand("budget", not short, f"a chunk of {self.chunk} tokens at least")

    def _many(self, tokens: int) -> int:
        """Chunks that a step chooses of a prompt."""
        if isinstance(self.budget, int):
            return self.budget // self.chunk
        return max(1, round(self.budget * tokens) // self.chunk)

    def layer_end(self, event: CacheEvent) -> None:
        if event.cache.window(event.layer) is not None:
            event.note("shadowkv: layers with a window stay as they are")
        fits = event.cache.landmarks(
            event.layer, rank=self.rank_keys, size=self.chunk, local=self.local,
            outliers=self.outliers, many=self._many,
        )  # fmt: skip
        for fit in fits:
            event.book(fit.flops)
            short = [n for n in fit.tokens if n // self.chunk <= self.local + self.outliers]
            for tokens in sorted(set(short)):
                event.note(
                    f"shadowkv: {tokens} tokens are no more than local and outlier chunks, which "
                    "are kept as they are"
                )
            most = min(fit.full[0])
            whole = len(short) == len(fit.tokens)
            if isinstance(self.rank_keys, int) and self.rank_keys > most and not whole:
                event.note(
                    f"shadowkv: rank_keys={self.rank_keys} is cut to the full rank where that is "
                    f"less, to {most} for one"
                )
