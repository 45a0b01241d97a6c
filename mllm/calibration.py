"""Calibration: fit a method's layers or budgets to what a model does on some samples.

The result is a small JSON file, written for one model:

    fitted = mllm.calibrate(model, "fitprune", batches, share=0.4)
    fitted.save("fitprune.json")
    mllm.patch(model, "fitprune:calibration=fitprune.json")
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm import compat
from mllm.compressors.base import (
    CacheCompressor,
    CacheEvent,
    Calibrated,
    Fittable,
    LayerContext,
    LayerMethod,
    Positions,
)
from mllm.errors import DataError, PlanError
from mllm.models import resolve
from mllm.plan import MethodInfo, Plan, get_method, methods

TYPE = "mllm.calibration"


@dataclass(frozen=True)
class Calibration:
    """A fitted stage, and what it was fitted to.

    Attributes:
        stage: the stage, its layers and budgets written out.
        header: `{type, version, mllm_version, base_model, config_sha256, hidden_size,
            num_hidden_layers, plan_sha256, trained_dtype, n_samples, data_sha256, share}`;
            `plan_sha256` is that of the fitted stage, `trained_dtype` that of the model.
    """

    stage: Any
    header: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The content of the file: the header, and the stage as a plan file has it."""
        return {**self.header, "stage": Plan([self.stage]).to_dict()["stages"][0]}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file: to a temporary name, then renamed."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read a file.

        Raises:
            DataError: it is missing, or no calibration file of version 1.
        """
        try:
            data = json.loads(Path(path).read_text())
            if (data["type"], data["version"]) != (TYPE, 1):
                raise KeyError("type")
            (stage,) = Plan.from_dict(
                {"type": "mllm.plan", "version": 1, "stages": [data.pop("stage")]}
            ).stages
            data["config_sha256"], data["num_hidden_layers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"cannot read the calibration file {path}: {error}",
                argument="calibration",
                given=path,
                expected="a file written by mllm calibrate",
            ) from error
        return cls(stage, data)


def calibrate(
    model: nn.Module,
    method: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    share: float | None = None,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Calibration:
    """Fit a method to what a model does on some samples.

    Args:
        model: a model of a supported family.
        method: name or spec text of a method that can be fitted (`fitprune`, `btp`, `prefixkv`), or
            a stage.
        batches: inputs of the model, as processors make them, on the model's device.
        share: visual tokens that decoder layers see on average, as a fraction, or for a method on
            the cache tokens that they store; None is the method's own.
        progress: called with the number of samples after each batch.

    Raises:
        PlanError: the method cannot be fitted, or the share cannot be reached.
        DataError: no sample has an image.
    """
    from mllm import __version__, patch

    stage = fittable(method)
    if isinstance(batches, Mapping):  # one batch, as the processor gives it
        batches = [batches]
    family, seen, digest = resolve(model), [], _Digest()
    cached = isinstance(stage, CacheCompressor)
    recorder = (_CacheRecorder if cached else _Recorder).make(stage)
    with torch.no_grad(), patch(model, [recorder]):
        for batch in batches:
            model(**batch, logits_to_keep=1, use_cache=cached)
            seen += recorder.taken()
            digest.add(batch)
            progress(len(batch["input_ids"]))
    if not seen:
        raise DataError(
            "no sample has an image", argument="data", given=0, expected="samples with images"
        )
    fitted = stage.replace(calibration=None, **stage.fit(seen, share))
    header = {
        "type": TYPE,
        "version": 1,
        "mllm_version": __version__,
        "base_model": model.config._name_or_path,
        "config_sha256": compat.config_sha256(model),
        "hidden_size": family.text_config.hidden_size,
        "num_hidden_layers": len(family.layers),
        "plan_sha256": Plan([fitted]).sha256,
        "trained_dtype": str(model.dtype).removeprefix("torch."),
        "n_samples": len(seen),
        "data_sha256": digest.hex(),
        "share": share,
    }
    return Calibration(fitted, header)


def fittable(method: Any) -> Any:
    """The stage of a method that can be fitted.

    Args:
        method: its name, spec text or the stage.

    Raises:
        PlanError: it cannot be fitted.
    """
    stages = Plan.of(method).stages
    if len(stages) == 1 and isinstance(stages[0], Fittable):
        return stages[0]
    names = [row["name"] for row in methods() if issubclass(get_method(row["name"]), Fittable)]
    raise PlanError(
        f"{method} cannot be fitted to a model",
        argument="method",
        given=method,
        expected=" or ".join(names),
    )


def applied(stage: Any, model: nn.Module) -> Any:
    """A stage with its calibration file's layers and budgets; one without a file is as it was.

    Raises:
        DataError: the file cannot be read, or is of another model.
        PlanError: the file is of another method.
    """
    path = getattr(stage, "calibration", None)
    if path is None:
        return stage
    found = Calibration.load(path)
    if found.stage.info.name != stage.info.name:
        raise PlanError(
            f"{path} fits {found.stage.info.name}, not {stage.info.name}",
            argument="calibration",
            given=path,
            expected=f"a file of `mllm calibrate {stage.info.name}`",
        )
    if found.header["config_sha256"] != compat.config_sha256(model):
        raise DataError(
            f"{path} was fitted to another model: {found.header.get('base_model')!r} with "
            f"{found.header['num_hidden_layers']} decoder layers",
            argument="calibration",
            given=path,
            expected=f"a file of `mllm calibrate {stage.info.name} --model "
            f"{model.config._name_or_path}`",
        )
    if isinstance(stage, CacheCompressor):
        return found.stage
    positions = stage.positions or found.stage.positions
    return found.stage.replace(positions=positions)


class _Digest:
    """Hash of samples that does not depend on how they are batched."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor) and name != "attention_mask":
                own = self.parts.setdefault(name, hashlib.sha256())
                if name == "input_ids" and "attention_mask" in batch:
                    value = value[batch["attention_mask"].bool()]
                own.update(value.detach().float().cpu().contiguous().numpy().tobytes())

    def hex(self) -> str:
        text = json.dumps({name: own.hexdigest() for name, own in sorted(self.parts.items())})
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class _Recorder(LayerMethod):
    """Calls `of.observe` before every decoder layer but the first, and changes nothing."""

    positions: Positions | None = None

    info = MethodInfo(name="recorder", stage="llm")
    actions = ()

    @classmethod
    def make(cls, of: Calibrated) -> _Recorder:
        own = cls()
        own.of, own.depth, own.found = of, 0, {}
        return own

    def at_depth(self, num_layers: int, first_cut: int = 0) -> _Recorder:
        self.depth = num_layers
        return self

    def at(self) -> range:
        return range(1, self.depth)

    def reads(self) -> dict[str, Any]:
        return self.of.observes()

    def act(self, ctx: LayerContext) -> list[Any]:
        own = zip(self.of.observe(ctx), ctx.n_images, strict=True)
        self.found[ctx.layer] = [x for x, images in own if images]
        return []

    def taken(self) -> list[list[Tensor]]:
        """See :func:`_by_sample`."""
        found, self.found = self.found, {}
        return _by_sample(found)


@dataclass
class _CacheRecorder(CacheCompressor):
    """Calls `of.observe` at the end of every decoder layer, and changes nothing."""

    info = MethodInfo(name="recorder", stage="cache")

    @classmethod
    def make(cls, of: Any) -> _CacheRecorder:
        own = cls()
        own.of, own.found = of, {}
        return own

    def reads(self) -> dict[str, Any]:
        return self.of.reads()

    def layer_end(self, event: CacheEvent) -> None:
        own = zip(self.of.observe(event), event.visual.any(1).tolist(), strict=True)
        self.found[event.layer] = [x for x, pictured in own if pictured]

    def taken(self) -> list[list[Tensor]]:
        """See :func:`_by_sample`."""
        found, self.found = self.found, {}
        return _by_sample(found)


def _by_sample(found: dict[int, list[Tensor]]) -> list[list[Tensor]]:
    """What was recorded since the last call, at each layer, by sample with images."""
    return [list(own) for own in zip(*(found[i] for i in sorted(found)), strict=True)]
