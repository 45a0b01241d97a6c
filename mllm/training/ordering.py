"""The order of the samples: the same for every number of processes, and after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class Order(Sampler[int]):
    """A shuffle that depends on the seed and the epoch alone.

    With groups, every batch of `batch` successive samples is of one kind and of like length, and
    the batches are shuffled; the samples that fill no batch of their kind come last.

    Args:
        count: samples.
        seed: of the shuffle.
        batch: samples of one optimizer step, over all processes.
        lengths: sort by these within stretches of 50 batches; None does not sort.
        kinds: keep these apart; None does not.

    Source: LLaVA's `group_by_modality_length`.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        batch: int = 1,
        lengths: Sequence[int] | None = None,
        kinds: Sequence[bool] | None = None,
    ) -> None:
        self.count, self.seed, self.batch = count, seed, batch
        self.lengths, self.kinds = lengths, kinds
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader before every pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None and self.kinds is None:
            return iter(order)
        whole: list[list[int]] = []
        rest: list[int] = []
        for kind in (True, False):
            members = [i for i in order if self.kinds is None or self.kinds[i] == kind]
            if self.kinds is None and not kind:
                break
            if self.lengths is not None:
                members = self._by_length(members)
            cut = len(members) - len(members) % self.batch
            whole += [members[i : i + self.batch] for i in range(0, cut, self.batch)]
            rest += members[cut:]
        mixed = torch.randperm(len(whole), generator=generator).tolist()
        return iter([i for place in mixed for i in whole[place]] + rest)

    def _by_length(self, members: list[int]) -> list[int]:
        """Sorted, longest first, within stretches that are still random."""
        stretch = 50 * self.batch
        return [
            index
            for start in range(0, len(members), stretch)
            for index in sorted(members[start : start + stretch], key=lambda i: -self.lengths[i])
        ]
