"""The yardstick: drawn scenes, questions about them, and which of those the model learnt."""

from mllm.yardstick.samples import TASKS, VERSION, admitted, prompt, sample, samples

ADMITTED = admitted()

__all__ = ["ADMITTED", "TASKS", "VERSION", "admitted", "prompt", "sample", "samples"]
