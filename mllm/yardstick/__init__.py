"""The yardstick: drawn scenes, questions about them, and which of those the model learnt."""

from mllm.yardstick.samples import TASKS, admitted, sample, samples

ADMITTED = admitted()

__all__ = ["ADMITTED", "TASKS", "admitted", "sample", "samples"]
