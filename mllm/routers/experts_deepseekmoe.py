"""DeepSeekMoE (arXiv:2401.06066): many narrow experts, beside some that are always on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm.errors import PlanError
from mllm.plan import register
from mllm.routers.experts import Choice, Experts, Mode


@dataclass
class _Segmented(Choice):
    """A base of their own, so that these fields stand where they always have: before `mode`."""

    segments: int = 8
    shared: int = 2
    start_from: Literal["added", "split"] = "added"
    normalise: bool = False


@register("deepseekmoe", paper="arXiv:2401.06066", stage="experts", trained=True)
@dataclass
class DeepSeekMoE(Experts, _Segmented):
    """FFNs cut into narrow experts, of which a token chooses `top_k`, beside shared ones.

    The FFN is cut into `segments` equal groups of neurons. How a dense model becomes this is not in
    the paper: with `start_from="added"` the whole FFN is shared and the experts begin with output
    zero; with `start_from="split"` the first `shared` groups are always on and the experts are
    copies of the others in turn, scaled so that a router without preference keeps the mean: not
    an identity.

    Args:
        segments: equal groups of neurons that an FFN is cut into; an expert has the width of one.
        shared: groups that are always on, with `start_from=split`.
        start_from: "added" or "split", see above.
        normalise: whether the weights of a row are made to add up to one.
    """

    experts: int | tuple[int, ...] = 16
    top_k: int = 4
    mode: Mode = "dense"
    balance: float = 0.001

    first_only = False
    per_sequence = True
    whole = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand("segments", self.segments >= 2, "from 2")
        self._demand("shared", 1 <= self.shared < self.segments, f"from 1 to {self.segments - 1}")

    def weights(self, best: Tensor) -> Tensor:
        if self.normalise:
            best = best / best.sum(-1, keepdim=True)
        if self.start_from == "added":
            return best
        routed = self.segments - self.shared
        return best * (routed if self.normalise else routed * self.least / self.top_k)

    @property
    def least(self) -> int:
        """Experts of the layer that has the fewest."""
        return min(self.experts) if isinstance(self.experts, tuple) else self.experts

    def start(self, weights: dict[str, Tensor], own: range) -> dict[str, Tensor]:
        inner = len(weights["up_proj"])
        if inner % self.segments:
            raise PlanError(
                f"{self.info.name}: an FFN of {inner} neurons has no {self.segments} equal parts",
                argument="segments",
                given=self.segments,
                expected=f"a number that divides {inner}",
            )
        added, part = self.start_from == "added", inner // self.segments
        first = 0 if added else self.shared
        always = inner if added else self.shared * part
        found = {}
        for name, w in weights.items():
            cut = (
                w.unflatten(-1, (self.segments, part)).movedim(-2, 0)
                if "down" in name
                else (w.unflatten(0, (self.segments, part)))
            )
            picked = [first + e % (self.segments - first) for e in own]
            found[name] = cut[picked]
            found[f"shared_{name}"] = w[..., :always] if "down" in name else w[:always]
        if added:
            found["down_proj"] = torch.zeros_like(found["down_proj"])
        return found
