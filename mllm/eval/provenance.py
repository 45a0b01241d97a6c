"""What produced a number: versions, commit, weights, device and threads."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_PACKAGES = ("torch", "transformers", "lmms-eval", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, where installed."""
    import mllm

    found = {"python": platform.python_version(), "mllm": mllm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this package runs from, `+dirty` if it was edited; else None."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+dirty" if dirty else "")


def weights_sha256(model: nn.Module) -> str:
    """Hash of every weight by name, shape, dtype and bytes, as loaded (so dtype matters)."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_run(model: nn.Module, processor: Any = None) -> dict[str, Any]:
    """The part of a run record that holds for every plan: model, device, software.

    Args:
        model: as it is loaded.
        processor: where one is given, hashes of its settings, and of the model's, are there too.
    """
    import torch

    from mllm import compat

    parameter = next(model.parameters())
    told = {}
    if processor is not None:
        told = _settings(model, processor) | {"template_sha256": _sha256(processor.chat_template)}
    return {
        "weights_sha256": weights_sha256(model),
        **told,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "backend": compat.attention_name(model),
        "device": str(parameter.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def describe_model(
    name: str, model: nn.Module, processor: Any, about: dict[str, Any]
) -> dict[str, Any]:
    """What tells a model's answers from those of others: for result folders and kept answers.

    Args:
        name: as it was given; only for people.
        model, processor: as `mllm.load_model` gives them.
        about: of :func:`describe_run`.
    """
    return {
        "name": str(name),
        "class": type(model).__name__,
        **_settings(model, processor),
        "weights_sha256": about["weights_sha256"],
        "dtype": about["dtype"],
        "backend": about["backend"],
        "device": model.device.type,
    }


def _settings(model: nn.Module, processor: Any) -> dict[str, str]:
    """What answers depend on beside weights and prompts."""
    from mllm import compat

    settings = getattr(processor, "image_processor", None)
    settings = settings.to_dict() if settings is not None else {}
    return {
        "config_sha256": compat.config_sha256(model),
        "generation_sha256": compat.generation_sha256(model),
        "processor_sha256": _sha256([settings, len(processor.tokenizer)]),
    }


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
