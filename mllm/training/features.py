"""What a frozen vision tower says of every picture, kept on disk from one epoch to the next."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm.compat import BaseModelOutputWithPooling
from mllm.errors import RecipeError
from mllm.models import resolve as resolve_family
from mllm.training.recipe import Recipe


def check_features(recipe: Recipe, model: nn.Module, patched: Any, tower_learns: bool) -> None:
    """Say why the features of a model cannot be kept.

    Args:
        recipe: the recipe.
        model: without adapters; weights are not read.
        patched: the plan on the model, if any.
        tower_learns: whether something inside the tower is trained.

    Raises:
        RecipeError: the tower is trained, is read or changed by the plan, has dropout, takes all
            pictures as one, or is in parts.
    """
    family = resolve_family(model)
    inside = set(family.tower.modules())
    reason = expected = None
    if tower_learns:
        reason, expected = "the vision tower is trained", "model.freeze_vision_tower: true"
    elif family.new_parameters():
        reason = "parts of the tower are trained with the projector, or read the question"
        expected = "no cache, or a model with a tower of its own"
    elif patched is not None and patched.mergers:
        reason, expected = "the plan acts inside the tower", "a plan that acts behind it"
    elif patched is not None and (patched.tower_blocks or inside & set(patched.tapped())):
        reason = "the plan reads attention or keys or blocks inside the tower, which are not kept"
        expected = "no cache, or a plan that reads features alone, such as divprune"
    elif family.packed:
        reason = "this tower takes all pictures of a batch as one sequence"
        expected = "no cache, or a model whose tower takes them one by one"
    elif any("dropout" in key and value for key, value in family.vision_config.to_dict().items()):
        reason, expected = "the tower has dropout", "a tower without dropout"
    elif recipe.parallel.zero == 3:
        reason, expected = "ZeRO-3 takes the tower apart", "parallel.zero of 0, 1 or 2"
    if reason:
        raise RecipeError(
            f"model.feature_cache cannot be used: {reason}",
            argument="model.feature_cache",
            given=recipe.model.feature_cache,
            expected=expected,
        )


class FeatureCache:
    """Serves what the tower of a model gave for the same pixels before.

    A picture is known by its pixels as the tower is given them, by how many pictures the tower was
    given with it, and by the tower: its weights, configuration, arithmetic and device. So what is
    served is what the tower would compute, bit by bit, as long as the pictures of a batch of one
    size do not touch each other.

    Attributes:
        hits, pictures: how many were served, of how many.

    Args:
        model: without adapters; its tower is frozen.
        folder: shared by runs and processes; one folder of files for each tower.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        family = resolve_family(model)
        self.tower = family.tower
        blocks = family.feature_blocks()
        self.states = [block + 1 for block in blocks]  # entry 0 is what enters the first block
        self.depth = len(family.blocks)
        self.last = self.depth - 1 in blocks
        self.folder = Path(folder) / _tower_sha256(self.tower)
        self.hits = self.pictures = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[FeatureCache]:
        """Serve the tower inside this context."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.tower.__dict__.get("forward")
        self.tower.forward = functools.partial(self._served, self.tower.forward)
        try:
            yield self
        finally:
            if own is None:
                del self.tower.forward
            else:
                self.tower.forward = own

    def _served(self, forward: Any, pixel_values: Tensor, *given: Any, **options: Any) -> Any:
        files = self._files(pixel_values, (given, sorted(options.items())))
        self.pictures += len(files)
        found = [_read(file) for file in files]
        if any(tensors is None for tensors in found):
            output = forward(pixel_values, *given, **options)
            kept = self._kept(output)
            for row, file in enumerate(files):
                if found[row] is None:
                    _write(file, {name: tensor[row] for name, tensor in kept.items()})
            return output
        self.hits += len(files)
        device = pixel_values.device
        tensors = {name: torch.stack([row[name] for row in found]).to(device) for name in found[0]}
        # All places, because some are counted from the end.
        states = [tensors.get(f"hidden_{state}") for state in range(self.depth + 1)]
        return BaseModelOutputWithPooling(
            last_hidden_state=tensors.get("last"), hidden_states=tuple(states)
        )

    def _kept(self, output: Any) -> dict[str, Tensor]:
        kept = {}
        if output.hidden_states is not None:
            kept = {f"hidden_{state}": output.hidden_states[state] for state in self.states}
        if self.last:
            kept["last"] = output.last_hidden_state
        return {name: tensor.detach().cpu() for name, tensor in kept.items()}

    def _files(self, pixels: Tensor, rest: Any) -> list[Path]:
        """The file of every picture."""
        shared = hashlib.sha256(str((len(pixels), pixels.dtype, pixels.device.type)).encode())
        if torch.is_autocast_enabled(pixels.device.type):
            shared.update(str(torch.get_autocast_dtype(pixels.device.type)).encode())
        _update(shared, rest)
        files = []
        for picture in pixels:
            mine = shared.copy()
            _update(mine, picture)
            name = mine.hexdigest()
            files.append(self.folder / name[:2] / f"{name}.safetensors")
        return files


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(str((plain.dtype, plain.shape)).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())


def _tower_sha256(tower: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), default=str).encode())
    digest.update(torch.__version__.encode())
    _update(digest, list(tower.state_dict().items()))
    return digest.hexdigest()


def _read(file: Path) -> dict[str, Tensor] | None:
    """What was kept; None where nothing is, or where a crash of the machine has torn the file."""
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}.tmp")
    # Apart from each other and from the batch: safetensors refuses tensors in one memory.
    own = torch.contiguous_format
    save_file({name: t.clone(memory_format=own) for name, t in tensors.items()}, fresh)
    os.replace(fresh, file)
