"""Muon or AdamW on matrices and AdamW on the rest, behind one optimizer interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer for schedulers and checkpoints, two inside.

    Args:
        model: its trainable parameters are shared out: 2-D weights that are no embedding and no
            training head are the matrices.
        lr: learning rate of what is no matrix; Muon's updates are scaled to the same root mean
            square.
        matrices: "muon" or "adamw", what trains the matrices; all others have AdamW.
        matrix_scale: factor on `lr` for matrices outside the vision tower.
        vision_scale: factor on `lr` for everything in the vision tower.
        weight_decay: decay of the matrices.

    Source: Jordan et al., "Muon", 2024; scaling of Liu et al., arXiv:2502.16982.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        matrices: str = "muon",
        matrix_scale: float = 1.0,
        vision_scale: float = 1.0,
        weight_decay: float = 0.02,
    ) -> None:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim == 2 and not any(
                    part in name for part in ("embed", "lm_head", "heads.")
                )
                groups.setdefault((matrix, "vision_tower" in name), []).append(parameter)

        def part(matrix: bool) -> list[dict]:
            return [
                {
                    "params": groups[matrix, vision],
                    "lr": lr * (vision_scale if vision else matrix_scale if matrix else 1.0),
                }
                for vision in (True, False)
                if (matrix, vision) in groups
            ]

        options = {"lr": lr, "weight_decay": weight_decay}
        if matrices == "muon":
            self.matrices = torch.optim.Muon(
                part(True), momentum=0.95, adjust_lr_fn="match_rms_adamw", **options
            )
        else:
            self.matrices = torch.optim.AdamW(part(True), betas=(0.9, 0.98), **options)
        self.adamw = torch.optim.AdamW(part(False), lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
        super().__init__([{"params": group["params"]} for group in self._groups()], {})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict]:
        # The very dictionaries of the inner optimizers: a scheduler that writes "lr" reaches them.
        return self.matrices.param_groups + self.adamw.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure else None
        self.matrices.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"matrices": self.matrices.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.matrices.load_state_dict(state_dict["matrices"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self._groups()
